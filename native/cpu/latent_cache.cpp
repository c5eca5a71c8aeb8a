// The latent cache's rows, and attention over them in parts for several threads.
//
// A part always has 256 rows, and parts are added in order, so the result does not depend on the
// number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "context.h"
#include "lanes.h"

namespace deeptalk {
namespace {

constexpr int kPartRows = 256;

// One part of a cache row as int8; its scale maps the largest value to 127.
void write_int8(const float* x, int n, uint8_t* place, uint8_t* scale_place) {
    float largest = 0.f;
    for (int i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
    const bool is_zero = largest < 1e-30f;
    const float scale = is_zero ? 0.f : largest / 127.f, inverse = is_zero ? 0.f : 127.f / largest;
    for (int i = 0; i < n; ++i) place[i] = uint8_t(int8_t(std::lrintf(x[i] * inverse)));
    std::memcpy(scale_place, &scale, sizeof scale);
}

void clear(const Gathered& all, int heads, int latent) {
    std::fill_n(all.maximum, kAttendHeads, -1e30f);
    std::fill_n(all.total, kAttendHeads, 0.f);
    std::fill_n(all.mixed, size_t(heads) * size_t(latent), 0.f);
}

}  // namespace

bool write_cache_row(const CacheShape& shape, const float* row, uint8_t* place) {
    for (int i = 0; i < shape.latent + shape.rope; ++i) {
        if (!std::isfinite(row[i])) return false;
    }
    const int rope_at = shape.padded_latent();
    std::memset(place, 0, shape.row_bytes());
    if (shape.kind == kBf16Rows) {
        uint16_t* values = reinterpret_cast<uint16_t*>(place);
        for (int i = 0; i < shape.latent; ++i) values[i] = to_bf16(row[i]);
        for (int i = 0; i < shape.rope; ++i) values[rope_at + i] = to_bf16(row[shape.latent + i]);
        return true;
    }
    uint8_t* scales = place + shape.padded_width() - 2 * sizeof(float);
    write_int8(row, shape.latent, place, scales);
    write_int8(row + shape.latent, shape.rope, place + rope_at, scales + sizeof(float));
    return true;
}

void attend(dt_context& c, const CacheShape& shape, int heads, const Pass& pass,
            const float* queries, float* mixed) {
    const int latent = shape.padded_latent(), width = shape.padded_width();
    const int tokens = pass.tokens();
    const int threads = c.pool.threads();
    const int parts = (pass.position + pass.num_rows + kPartRows - 1) / kPartRows;
    // With few tokens and many threads, each thread takes a part of the rows, and fewer heads if
    // there are too few parts. All heads together read a row once; with halves of the heads, two
    // threads would each read the whole cache.
    const bool is_wide = threads == 1 || tokens >= 2 * threads;
    const bool has_few = !is_wide && tokens * parts < 2 * threads;
    const int span = has_few ? kAttendHeads / 2 : kAttendHeads;
    const int spans = (heads + span - 1) / span;
    AttentionRoom& room = c.attention;
    const size_t sets = is_wide ? 0 : size_t(tokens) * size_t(spans) * size_t(parts);
    room.maximum.resize((sets + 1) * kAttendHeads);  // kernels use whole vectors of heads
    room.total.resize((sets + 1) * kAttendHeads);
    room.mixed.resize(sets * size_t(span) * size_t(latent));

    const auto gather = [&](int token, int first_head, int count, int part, const Gathered& into) {
        const int item = token / pass.num_rows;
        const int end = pass.position + token % pass.num_rows + 1;
        if (part * kPartRows >= end) return;
        const size_t at = (size_t(token) * size_t(heads) + size_t(first_head)) * size_t(width);
        c.path.attend[shape.kind]({pass.shared, pass.caches[item], shape.row_bytes(),
                                   pass.num_shared, part * kPartRows,
                                   std::min(end, (part + 1) * kPartRows), end, count, latent, width,
                                   queries + at, into});
    };
    const auto finish = [&](int token, int first_head, int count, auto part_of) {
        float maximum[kAttendHeads], total[kAttendHeads];
        const size_t at = (size_t(token) * size_t(heads) + size_t(first_head)) * size_t(latent);
        const Gathered all{maximum, total, mixed + at};
        clear(all, count, latent);
        const int end = pass.position + token % pass.num_rows + 1;
        for (int part = 0; part * kPartRows < end; ++part) {
            c.path.add_gathered(all, part_of(part), count, latent);
        }
        for (int h = 0; h < count; ++h) {
            float* row = all.mixed + size_t(h) * size_t(latent);
            const float share = 1.f / total[h];
            for (int i = 0; i < latent; ++i) row[i] *= share;
        }
    };
    if (is_wide) {
        c.pool.run(tokens * spans, [&](int i) {
            const int token = i / spans, first_head = i % spans * span;
            const int count = std::min(span, heads - first_head);
            float maximum[kAttendHeads], total[kAttendHeads];
            alignas(64) float sums[kAttendHeads * kMaxLatentWidth];
            const Gathered own{maximum, total, sums};
            finish(token, first_head, count, [&](int part) {
                gather(token, first_head, count, part, own);
                return own;
            });
        });
        return;
    }
    const auto set = [&](int token, int first_head, int part) {
        const size_t which = size_t(token) * size_t(spans) + size_t(first_head / span);
        const size_t i = which * size_t(parts) + size_t(part), skipped = size_t(first_head % span);
        return Gathered{&room.maximum[i * kAttendHeads + skipped], &room.total[i * kAttendHeads + skipped],
                        &room.mixed[(i * size_t(span) + skipped) * size_t(latent)]};
    };
    // One half of the heads after the other: the second finds the rows in the processor's cache.
    c.pool.run(tokens * spans * parts, [&](int i) {
        const int first_head = i % spans * span, part = i / spans % parts, token = i / spans / parts;
        gather(token, first_head, std::min(span, heads - first_head), part, set(token, first_head, part));
    });
    constexpr int kFinished = 4;  // heads at a time
    const int fours = (heads + kFinished - 1) / kFinished;
    c.pool.run(tokens * fours, [&](int i) {
        const int token = i / fours, first_head = i % fours * kFinished;
        finish(token, first_head, std::min(kFinished, heads - first_head),
               [&](int part) { return set(token, first_head, part); });
    });
}

}  // namespace deeptalk
