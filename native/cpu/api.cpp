// The C interface: it checks arguments, turns refusals into status codes and finds the kernel
// paths.
#include <algorithm>
#include <atomic>
#include <limits>
#include <new>

#include "codec.h"
#include "decoder.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

using namespace deeptalk;

namespace {

#if defined(__x86_64__)
// Not __builtin_cpu_supports: with one of two compilers it lost its result.
struct Processor {
    bool is_intel = false, avx2 = false, avx2_vnni = false, avx512 = false, avx512_bf16 = false;

    Processor() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        is_intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // the system saves no AVX state
        const bool has_fma = (c >> 12 & 1) && (c >> 29 & 1);  // and half floats
        unsigned saved = 0, high = 0;
        __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = (saved & 0x06) == 0x06 && has_fma && (b >> 5 & 1);
        constexpr unsigned kFoundations = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // f, dq, bw, vl
        avx512 = avx2 && (saved & 0xe6) == 0xe6 && (b & kFoundations) == kFoundations && (c >> 11 & 1);
        if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
        avx2_vnni = avx2 && (a >> 4 & 1);
        avx512_bf16 = avx512 && (a >> 5 & 1);
    }
};

const Processor& this_processor() {
    static const Processor processor;
    return processor;
}
#endif

bool runs_here(const Path* path) {
    if (!path) return false;
#if defined(__x86_64__)
    const Processor& processor = this_processor();
    if (path == avx512_bf16_path()) return processor.avx512_bf16;
    if (path == avx512_path() || path == avx512_intel_path()) return processor.avx512;
    if (path == avx2_vnni_path()) return processor.avx2_vnni;
    if (path == avx2_path()) return processor.avx2;
#elif defined(__aarch64__)
    const bool has_dots = getauxval(AT_HWCAP) >> 20 & 1;  // asimddp
    if (path == neon_i8mm_path()) return has_dots && (getauxval(AT_HWCAP2) >> 13 & 1);  // i8mm
    if (path == neon_path()) return has_dots;
#endif
    return true;
}

// The best one first.
std::vector<const Path*> paths_here() {
    std::vector<const Path*> paths{avx512_bf16_path(), avx512_path(), avx512_intel_path(), avx2_vnni_path(),
                                   avx2_path(), neon_i8mm_path(), neon_path(), portable_path()};
#if defined(__x86_64__)
    if (this_processor().is_intel) {
        const auto best = std::find(paths.begin(), paths.end(), avx512_intel_path());
        std::rotate(paths.begin(), best, best + 1);
    }
#endif
    paths.erase(std::remove_if(paths.begin(), paths.end(), [](auto path) { return !runs_here(path); }),
                paths.end());
    return paths;
}

const Path* path_at(int index) {
    static const std::vector<const Path*> paths = paths_here();
    return size_t(index) < paths.size() ? paths[size_t(index)] : nullptr;
}

// Runs a call; a refusal becomes the context's message.
template <class Call>
int32_t guarded(dt_context& c, Call call) {
    try {
        return call();
    } catch (const std::bad_alloc&) {
        c.message = "there is not enough memory";
        return DT_REFUSED;
    } catch (const std::exception& error) {
        c.message = error.what();
        return DT_REFUSED;
    }
}

}  // namespace

struct dt_decoder : Decoder {
    using Decoder::Decoder;
};

struct dt_codec : Codec {
    using Codec::Codec;
};

extern "C" {

const char* dt_path_name(int32_t index) {
    const Path* path = path_at(index);
    return path ? path->name : nullptr;
}

dt_context* dt_open(int32_t path, int32_t threads) {
    const Path* chosen = path_at(path);
    try {
        return chosen && threads > 0 && threads <= kMaxThreads ? new dt_context(*chosen, threads) : nullptr;
    } catch (const std::exception&) {
        return nullptr;
    }
}

void dt_close(dt_context* c) { delete c; }

int32_t dt_threads(const dt_context* c) { return c->pool.threads(); }

const char* dt_message(const dt_context* c) { return c->message.c_str(); }

int32_t dt_linear(dt_context* c, const dt_matrix* matrix, int32_t heads, dt_span x, int32_t tokens,
                  dt_room y) {
    return guarded(*c, [&] {
        const Matrix m = checked_matrix("matrix", *matrix, heads);
        check_range("tokens", tokens, 0, kMaxTokens);
        const float* in = array_of<float>("x", x, int64_t(tokens) * heads * m.columns);
        float* out = room_of<float>("y", y, int64_t(tokens) * m.rows);
        const size_t rows = size_t(m.rows), columns = size_t(m.columns);
        return linear(*c, m, heads, in, columns, tokens, out, rows, rows / size_t(heads));
    });
}

int32_t dt_moe(dt_context* c, const dt_record* record, const dt_table* table, int32_t num_own, dt_span x,
               int32_t tokens, dt_span ids, dt_span weights, int32_t top_k, dt_room y) {
    return guarded(*c, [&] {
        const int64_t record_bytes = check_record(*record);
        const int64_t num_records = table->addresses.bytes / int64_t(sizeof(uint64_t));
        check_range("num_own", num_own, 0, kMaxExperts);
        check_range("experts", num_records - num_own, 0, kMaxExperts);
        check_range("tokens", tokens, 0, kMaxTokens);
        check_range("top_k", top_k, 0, kMaxExperts);
        const int num_experts = int(num_records) - num_own;
        const uint64_t* addresses = addresses_of(*table, num_records, record_bytes);
        const Records records{*record, addresses, num_experts, addresses + num_experts, num_own};
        for (int i = 0; i < num_own; ++i) check_address(records.own[i]);
        const int64_t values = int64_t(tokens) * record->width, num_choices = int64_t(tokens) * top_k;
        const Choices choices{array_of<int64_t>("ids", ids, num_choices),
                              array_of<float>("weights", weights, num_choices), top_k};
        const float* in = array_of<float>("x", x, values);
        float* out = room_of<float>("y", y, values);
        int num_left = num_wanted(tokens, choices);
        const int32_t status = add_experts(*c, records, in, tokens, choices, out, &num_left);
        return status == DT_OK && num_left ? int32_t(DT_EXPERT_ABSENT) : status;
    });
}

int64_t dt_cache_row_bytes(dt_context* c, int32_t latent, int32_t rope, int32_t cache_kind) {
    int64_t bytes = -1;
    guarded(*c, [&] {
        bytes = int64_t(checked_shape(latent, rope, cache_kind).row_bytes());
        return DT_OK;
    });
    return bytes;
}

int32_t dt_cache_write(dt_context* c, int32_t latent, int32_t rope, int32_t cache_kind, dt_span row,
                       dt_room place) {
    return guarded(*c, [&] {
        const CacheShape shape = checked_shape(latent, rope, cache_kind);
        const float* values = array_of<float>("row", row, latent + rope);
        uint16_t* out = room_of<uint16_t>("place", place, int64_t(shape.row_bytes() / sizeof(uint16_t)));
        return write_cache_row(shape, values, reinterpret_cast<uint8_t*>(out)) ? DT_OK : DT_NOT_FINITE;
    });
}

int32_t dt_attend(dt_context* c, int32_t heads, int32_t latent, int32_t rope, int32_t cache_kind,
                  const dt_pass* pass, dt_span queries, dt_room mixed) {
    return guarded(*c, [&] {
        const CacheShape shape = checked_shape(latent, rope, cache_kind);
        check_range("heads", heads, 1, kMaxHeads);
        const int64_t end = int64_t(pass->position) + pass->num_rows;
        const Pass where = checked_pass(*pass, shape, 1, std::min<int64_t>(end, kMaxCacheRows));
        const size_t padded = size_t(shape.padded_latent()), width = size_t(shape.padded_width());
        const int64_t n = int64_t(where.tokens()) * heads;
        const float* in = array_of<float>("queries", queries, n * (latent + rope));
        float* out = room_of<float>("mixed", mixed, n * latent);
        std::vector<float> padded_queries(size_t(n) * width), padded_mixed(size_t(n) * padded);
        for (size_t i = 0; i < size_t(n); ++i) {
            const float* query = in + i * size_t(latent + rope);
            std::copy_n(query, latent, &padded_queries[i * width]);
            std::copy_n(query + latent, rope, &padded_queries[i * width + padded]);
        }
        attend(*c, shape, heads, where, padded_queries.data(), padded_mixed.data());
        for (size_t i = 0; i < size_t(n); ++i) {
            std::copy_n(&padded_mixed[i * padded], latent, out + i * size_t(latent));
        }
        return DT_OK;
    });
}

int32_t dt_snake(dt_context* c, dt_span x, dt_span alpha, int32_t channels, int32_t samples, dt_room y) {
    return guarded(*c, [&] {
        check_range("channels", channels, 0, kMaxRows);
        check_range("samples", samples, 0, kMaxRows);
        const int64_t n = int64_t(channels) * samples;
        const float *in = array_of<float>("x", x, n), *factors = array_of<float>("alpha", alpha, channels);
        float* out = room_of<float>("y", y, n);
        c->pool.run_ranges(channels, [&](int begin, int end) {
            for (int i = begin; i < end; ++i) {
                const size_t at = size_t(i) * size_t(samples);
                c->path.snake(in + at, samples, factors[i], out + at);
            }
        });
        return DT_OK;
    });
}

int64_t dt_read(dt_context* c, dt_span bytes) {
    constexpr int64_t kPiece = 1 << 16;
    if (!bytes.data || bytes.bytes / kPiece > std::numeric_limits<int>::max()) return 0;
    const uint8_t* first = static_cast<const uint8_t*>(bytes.data);
    std::atomic<int64_t> sum{0};
    c->pool.run_ranges(int(bytes.bytes / kPiece), [&](int begin, int end) {
        sum += c->path.read(first + begin * kPiece, size_t((end - begin) * kPiece));
    });
    return sum;
}

dt_decoder* dt_decoder_open(dt_context* c, const dt_decoder_spec* spec) {
    dt_decoder* decoder = nullptr;
    guarded(*c, [&] {
        decoder = new dt_decoder(*c, *spec);
        return DT_OK;
    });
    return decoder;
}

void dt_decoder_close(dt_decoder* decoder) { delete decoder; }

int32_t dt_begin(dt_decoder* decoder, const dt_pass* pass, dt_span rows, dt_span features,
                 dt_span audio_mask) {
    return guarded(decoder->context(),
                   [&] { return decoder->begin(*pass, rows, features, audio_mask); });
}

int32_t dt_run(dt_decoder* decoder, int32_t first, int32_t last, dt_span tables) {
    return guarded(decoder->context(), [&] { return decoder->run(first, last, tables); });
}

int32_t dt_wave(dt_decoder* decoder, int32_t layer, const dt_table* table) {
    return guarded(decoder->context(), [&] { return decoder->add_wave(layer, *table); });
}

int32_t dt_routed(dt_decoder* decoder, dt_room* ids, dt_room* weights, dt_span* normed) {
    const auto bytes_of = [](const auto& array) { return int64_t(array.size() * sizeof(array[0])); };
    *ids = {decoder->ids().data(), bytes_of(decoder->ids())};
    *weights = {decoder->weights().data(), bytes_of(decoder->weights())};
    *normed = {decoder->normed().data(), bytes_of(decoder->normed())};
    return decoder->tokens();
}

int32_t dt_head(dt_decoder* decoder, dt_room logits) {
    return guarded(decoder->context(), [&] { return decoder->head(logits); });
}

dt_codec* dt_codec_open(dt_context* c, const dt_codec_spec* spec) {
    dt_codec* codec = nullptr;
    guarded(*c, [&] {
        codec = new dt_codec(*c, *spec);
        return DT_OK;
    });
    return codec;
}

void dt_codec_close(dt_codec* codec) { delete codec; }

int64_t dt_codec_state_size(const dt_codec* codec) { return int64_t(codec->state_size()); }

int32_t dt_codec_run(dt_codec* codec, const dt_codec_call* call) {
    return guarded(codec->context(), [&] { return codec->run(*call); });
}

}  // extern "C"
