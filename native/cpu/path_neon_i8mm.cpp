// The dotprod path with other tiles, for processors that multiply matrices of bytes (smmla): two
// tokens times two rows, eight columns at a time.
//
// Products with common scales are summed in integers, so a single token gets the same bits.
// Compiled with its own processor flags (build.py); empty where they do not apply.
#ifdef __ARM_FEATURE_MATMUL_INT8
#include "attention.h"
#include "isa_neon.h"

namespace {
namespace i8mm {

constexpr int kRows = 4, kStep = 2 * Neon::kBytes;

inline int8x16_t low(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
inline int8x16_t high(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

// Adds (x w, x v, y w, y v).
inline int32x4_t add_dots(int32x4_t sum, Neon::Pair x, Neon::Pair y, Neon::Pair w, Neon::Pair v) {
    sum = vmmlaq_s32(sum, low(x.a, y.a), low(w.a, v.a));
    sum = vmmlaq_s32(sum, high(x.a, y.a), high(w.a, v.a));
    sum = vmmlaq_s32(sum, low(x.b, y.b), low(w.b, v.b));
    return vmmlaq_s32(sum, high(x.b, y.b), high(w.b, v.b));
}

// The scales of four int4 rows as floats, (groups, 4).
inline void unpack_scales(const uint16_t* const (&rows)[kRows], int groups, float* out) {
    for (int group = 0; group < groups; group += 4) {
        float32x4x4_t floats;
        for (int r = 0; r < kRows; ++r) {
            const uint16_t* halves = rows[r] + group;
            uint16_t rest[4] = {};
            if (group + 4 > groups) {
                std::memcpy(rest, halves, size_t(groups - group) * sizeof(uint16_t));
                halves = rest;
            }
            floats.val[r] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
        }
        vst4q_f32(out + 4 * group, floats);
    }
}

// Four rows of weights times M rows of activations, M even or 1; out begins at the first row. After
// the tile's last row that row is repeated, and its results are dropped.
template <int kGroup, int M>
void multiply(const Tile& t, int row, int first_token, float* out) {
    constexpr int kShared = kGroup ? kGroup : kScaleBlock;  // columns with the same scales
    constexpr int kStepBytes = kGroup ? Neon::kBytes : kStep;
    const size_t row_bytes = size_t(t.columns) * kStepBytes / kStep;
    const uint8_t* w[kRows];
    alignas(16) float scales[kGroup ? 4 * kMaxColumns / kShared : 4];
    const uint16_t* halves[kRows];
    const int groups = t.columns / kShared;
    for (int r = 0; r < kRows; ++r) {
        const int at = min_of(row + r, t.num_rows - 1);
        w[r] = t.weights + size_t(at) * row_bytes;
        if (!kGroup) scales[r] = static_cast<const float*>(t.scales)[at];
        if (kGroup) halves[r] = static_cast<const uint16_t*>(t.scales) + size_t(at) * groups;
    }
    if (kGroup) {
        for (int i = 0; i < kRows * groups; i += 32) __builtin_prefetch(halves[3] + groups + i);
        unpack_scales(halves, groups, scales);
    }
    const int8_t* q[M];
    const float* q_scales[M];
    for (int m = 0; m < M; ++m) {
        const size_t token = size_t(t.tokens ? t.tokens[first_token + m] : first_token + m);
        q[m] = t.x.steps + token * t.x.row_bytes;
        q_scales[m] = t.x.scales + token * t.x.row_scales;
    }
    float32x4_t sums[M];  // the four rows of each token
    for (int m = 0; m < M; ++m) sums[m] = Neon::splat(0.f);
    Ahead<Neon> ahead(t, row_bytes, row, kRows, first_token);
    const bool is_asking = M < Neon::kTokens || first_token == 0;  // a later pass finds its tile in a cache
    uint8_t rest[kRows][kStep] = {};
    size_t place = 0;  // offset of the step in the activations
    for (int begin = 0; begin < t.columns; begin += kShared) {
        // One token: a row's sums. Pairs of tokens: the results of add_dots for two rows, then for
        // two more.
        int32x4_t dots[M == 1 ? kRows : M];
        for (int32x4_t& dot : dots) dot = Neon::zero();
        const int end = kGroup ? begin + kShared : min_of(begin + kShared, t.columns);
        for (int at = begin; at < end; at += kStep, place += 3 * Neon::kBytes) {
            if (is_asking) ahead.step(kRows * kStepBytes);
            Neon::Pair weights[kRows];
            for (int r = 0; r < kRows; ++r) {
                if (!kGroup && at + kStep > t.columns) {
                    std::memcpy(rest[r], w[r], size_t(t.columns - at));
                    w[r] = rest[r];
                }
                weights[r] = kGroup ? Neon::weights4<1>(w[r]) : Neon::weights8(w[r]);
                w[r] += kStepBytes;
            }
            if constexpr (M == 1) {
                const Neon::Pair x = Neon::load_pair(q[0] + place);
                for (int r = 0; r < kRows; ++r) dots[r] = Neon::dot(dots[r], weights[r], x);
            } else {
                for (int m = 0; m < M; m += 2) {
                    const Neon::Pair x = Neon::load_pair(q[m] + place), y = Neon::load_pair(q[m + 1] + place);
                    dots[m] = add_dots(dots[m], x, y, weights[0], weights[1]);
                    dots[m + 1] = add_dots(dots[m + 1], x, y, weights[2], weights[3]);
                }
            }
        }
        const float32x4_t w_scales = Neon::load(scales + (kGroup ? begin / kShared * 4 : 0));
        const auto add = [&](int m, int32x4_t dot) {
            const float32x4_t x_scale = Neon::splat(q_scales[m][begin / kScaleBlock]);
            sums[m] = Neon::fma(Neon::to_float(dot) * x_scale, w_scales, sums[m]);
        };
        if constexpr (M == 1) {
            add(0, vpaddq_s32(vpaddq_s32(dots[0], dots[1]), vpaddq_s32(dots[2], dots[3])));
        } else {
            for (int m = 0; m < M; m += 2) {
                const int64x2_t a = vreinterpretq_s64_s32(dots[m]), b = vreinterpretq_s64_s32(dots[m + 1]);
                add(m, vreinterpretq_s32_s64(vzip1q_s64(a, b)));
                add(m + 1, vreinterpretq_s32_s64(vzip2q_s64(a, b)));
            }
        }
    }
    const int num_rows = min_of(kRows, t.num_rows - row);
    for (int m = 0; m < M; ++m) store_at<Neon>(out + m * t.out_step, 0, sums[m], num_rows);
}

template <int kGroup, int M>
void multiply_rows(const Tile& t, int first_token) {
    float* out = t.out + size_t(first_token) * t.out_step;
    for (int row = 0; row < t.num_rows; row += kRows) {
        multiply<kGroup, M>(t, row, first_token, out + row);
    }
}

template <int kGroup>
void tile(const Tile& t) {
    int token = 0;
    for (; token + 4 <= t.num_tokens; token += 4) multiply_rows<kGroup, 4>(t, token);
    if (t.num_tokens - token >= 2) multiply_rows<kGroup, 2>(t, token), token += 2;
    if (t.num_tokens > token) multiply_rows<kGroup, 1>(t, token);
}

constexpr Path make_path() {
    Path path = ::make_path<Neon>("neon-i8mm");
    path.tile[kInt8] = tile<0>;
    path.tile[kInt4x32] = tile<32>;
    path.tile[kInt4x64] = tile<64>;
    path.tile[kInt4x128] = tile<128>;
    return path;
}

}  // namespace i8mm
}  // namespace

const deeptalk::Path* deeptalk::neon_i8mm_path() {
    static constexpr Path kPath = i8mm::make_path();
    return &kPath;
}
#else
#include "path.h"

const deeptalk::Path* deeptalk::neon_i8mm_path() { return nullptr; }
#endif
