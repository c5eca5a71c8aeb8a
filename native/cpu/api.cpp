// The C interface: checks sizes, turns refusals into status codes, finds the paths.
#include <algorithm>
#include <atomic>

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
// Asked by hand: of two compilers' __builtin_cpu_supports, one forgot what it had found.
struct Processor {
    bool is_intel = false, avx2 = false, avx2_vnni = false, avx512 = false, avx512_bf16 = false;

    Processor() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        is_intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // the system saves no registers
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

// Runs a call; what it refuses becomes the context's message.
template <class Call>
int32_t guarded(dt_context& c, Call call) {
    try {
        return call();
    } catch (const std::exception& error) {
        c.message = error.what();
        return DT_REFUSED;
    }
}

CacheShape checked_shape(int latent, int rope, int kind) {
    const CacheShape shape{latent, rope, kind};
    if (latent < 1 || rope < 0 || shape.padded_width() > kMaxLatentWidth) {
        refuse("width of a cached row", latent + rope, "1 to 1024 with its padding");
    }
    if (kind < 0 || kind >= kNumCacheKinds) refuse("cache_kind", kind, "0 for bfloat16 or 1 for int8");
    return shape;
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
        return chosen && threads > 0 ? new dt_context(*chosen, threads) : nullptr;
    } catch (const std::exception&) {
        return nullptr;
    }
}

void dt_close(dt_context* c) { delete c; }

int32_t dt_threads(const dt_context* c) { return c->pool.threads(); }

const char* dt_message(const dt_context* c) { return c->message.c_str(); }

int32_t dt_linear(dt_context* c, const dt_matrix* matrix, int32_t heads, const float* x,
                  int32_t tokens, float* y) {
    return guarded(*c, [&] {
        check_group(matrix->group, matrix->columns);
        if (heads < 1 || matrix->rows < 1 || matrix->rows % heads) {
            refuse("rows", matrix->rows, "as many for each head, at least one");
        }
        const size_t rows = size_t(matrix->rows), columns = size_t(matrix->columns);
        return linear(*c, *matrix, heads, x, columns, tokens, y, rows, rows / size_t(heads));
    });
}

int32_t dt_moe(dt_context* c, const dt_record* record, const uint64_t* table, int32_t num_experts,
               int32_t num_own, const float* x, int32_t tokens, const int64_t* ids,
               const float* weights, int32_t top_k, float* y) {
    return guarded(*c, [&] {
        check_record(*record);
        const Records records{*record, table, num_experts, table + num_experts, num_own};
        const Choices choices{ids, weights, top_k};
        int num_left = num_wanted(tokens, choices);
        const int32_t status = add_experts(*c, records, x, tokens, choices, y, &num_left);
        return status == DT_OK && num_left ? int32_t(DT_EXPERT_ABSENT) : status;
    });
}

int64_t dt_cache_row_bytes(int32_t latent, int32_t rope, int32_t cache_kind) {
    return int64_t(CacheShape{latent, rope, cache_kind}.row_bytes());
}

int32_t dt_cache_write(dt_context* c, int32_t latent, int32_t rope, int32_t cache_kind,
                       const float* row, uint8_t* place) {
    return guarded(*c, [&] {
        const CacheShape shape = checked_shape(latent, rope, cache_kind);
        return write_cache_row(shape, row, place) ? DT_OK : DT_NOT_FINITE;
    });
}

int32_t dt_attend(dt_context* c, int32_t heads, int32_t latent, int32_t rope, int32_t cache_kind,
                  const dt_pass* pass, const float* queries, float* mixed) {
    return guarded(*c, [&] {
        const CacheShape shape = checked_shape(latent, rope, cache_kind);
        const size_t padded = size_t(shape.padded_latent()), width = size_t(shape.padded_width());
        const size_t n = size_t(pass->num_items * pass->num_rows * heads);
        std::vector<float> padded_queries(n * width), padded_mixed(n * padded);
        for (size_t i = 0; i < n; ++i) {
            const float* query = queries + i * size_t(latent + rope);
            std::copy_n(query, latent, &padded_queries[i * width]);
            std::copy_n(query + latent, rope, &padded_queries[i * width + padded]);
        }
        attend(*c, shape, heads, *pass, padded_queries.data(), padded_mixed.data());
        for (size_t i = 0; i < n; ++i) {
            std::copy_n(&padded_mixed[i * padded], latent, mixed + i * size_t(latent));
        }
        return DT_OK;
    });
}

void dt_snake(dt_context* c, const float* x, const float* alpha, int32_t channels, int32_t samples,
              float* y) {
    c->pool.run_ranges(channels, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
            const size_t at = size_t(i) * size_t(samples);
            c->path.snake(x + at, samples, alpha[i], y + at);
        }
    });
}

int64_t dt_read(dt_context* c, const uint8_t* bytes, int64_t n) {
    constexpr int64_t kPiece = 1 << 16;
    std::atomic<int64_t> sum{0};
    c->pool.run_ranges(int(n / kPiece), [&](int begin, int end) {
        sum += c->path.read(bytes + begin * kPiece, size_t((end - begin) * kPiece));
    });
    return sum;
}

dt_decoder* dt_decoder_open(dt_context* c, const dt_decoder_spec* spec, const dt_layer* layers) {
    dt_decoder* decoder = nullptr;
    guarded(*c, [&] {
        decoder = new dt_decoder(*c, *spec, layers);
        return DT_OK;
    });
    return decoder;
}

void dt_decoder_close(dt_decoder* decoder) { delete decoder; }

int32_t dt_begin(dt_decoder* decoder, const dt_pass* pass, const int64_t* rows,
                 const float* features, const uint8_t* audio_mask) {
    return guarded(decoder->context(),
                   [&] { return decoder->begin(*pass, rows, features, audio_mask); });
}

int32_t dt_run(dt_decoder* decoder, int32_t first, int32_t last, const uint64_t* const* tables) {
    return guarded(decoder->context(), [&] { return decoder->run(first, last, tables); });
}

int32_t dt_wave(dt_decoder* decoder, int32_t layer, const uint64_t* table) {
    return guarded(decoder->context(), [&] { return decoder->add_wave(layer, table); });
}

int32_t dt_routed(const dt_decoder* decoder, const int64_t** ids, const float** weights,
                  const float** normed) {
    *ids = decoder->ids();
    *weights = decoder->weights();
    *normed = decoder->normed();
    return decoder->tokens();
}

int32_t dt_head(dt_decoder* decoder, float* logits) {
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
