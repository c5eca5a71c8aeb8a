// The kernels, written once for every instruction set.
#pragma once

#include <math.h>

#include "lanes.h"
#include "path.h"

namespace {

using namespace deeptalk;

template <class Isa>
using FloatOf = typename Isa::Float;

// Loads the first n lanes of a vector; the others are 0.
template <class Isa>
FloatOf<Isa> load_part(const float* p, int n) {
    alignas(64) float lanes[Isa::kLanes] = {};
    std::memcpy(lanes, p, size_t(n) * sizeof(float));
    return Isa::load(lanes);
}
template <class Isa>
void store_part(float* p, FloatOf<Isa> x, int n) {
    alignas(64) float lanes[Isa::kLanes];
    Isa::store(lanes, x);
    std::memcpy(p, lanes, size_t(n) * sizeof(float));
}

// Calls f(i, part) for each vector of n floats: its first index and its number of used lanes.
template <class Isa, class F>
void for_vectors(int n, F f) {
    int i = 0;
    for (; i + Isa::kLanes <= n; i += Isa::kLanes) f(i, Isa::kLanes);
    if (i < n) f(i, n - i);
}
template <class Isa>
FloatOf<Isa> load_at(const float* p, int i, int n) {
    return n == Isa::kLanes ? Isa::load(p + i) : load_part<Isa>(p + i, n);
}
template <class Isa>
void store_at(float* p, int i, FloatOf<Isa> x, int n) {
    n == Isa::kLanes ? Isa::store(p + i, x) : store_part<Isa>(p + i, x, n);
}

// e^x with a relative error of about 2e-7, clamped to the range of normal floats.
template <class Isa>
FloatOf<Isa> exp_of(FloatOf<Isa> x) {
    x = Isa::min(Isa::max(x, Isa::splat(-87.f)), Isa::splat(88.f));
    const FloatOf<Isa> n = Isa::round(x * Isa::splat(1.44269504f));
    FloatOf<Isa> r = Isa::fma(n, Isa::splat(-0.693145752f), x);
    r = Isa::fma(n, Isa::splat(-1.42860677e-6f), r);
    FloatOf<Isa> p = Isa::splat(1.f / 720);
    constexpr float kTerms[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    for (float term : kTerms) p = Isa::fma(p, r, Isa::splat(term));
    return Isa::times_power_of_2(p, n);
}

template <class Isa>
size_t quantised_bytes(int columns) {
    return size_t(round_up(columns, 2 * Isa::kBytes) / (2 * Isa::kBytes)) * 3 * Isa::kBytes;
}

// The number of int4 scales in a step. Lanes use them in turn: four bytes of one lane for each
// scale, then the next lane, so that scales are read from memory in the order of lanes, repeated.
template <class Isa>
constexpr int spans_of(int group) {
    return group && group < 2 * Isa::kBytes ? 2 * Isa::kBytes / group : 1;
}

template <class Isa>
bool quantise(const float* x, int columns, int group, int8_t* steps, float* scales) {
    constexpr int kStep = 2 * Isa::kBytes, kBytes = Isa::kBytes;
    const int spans = spans_of<Isa>(group);
    bool finite = true;
    for (int begin = 0; begin < columns; begin += kScaleBlock) {
        const int n = min_of(kScaleBlock, columns - begin);
        typename Isa::Int largest = Isa::zero();
        for_vectors<Isa>(n, [&](int i, int part) {
            largest = Isa::max_int(largest, Isa::magnitude_bits(load_at<Isa>(x + begin, i, part)));
        });
        alignas(64) int32_t lanes[Isa::kLanes];
        Isa::store_int(lanes, largest);
        for (int i = 1; i < Isa::kLanes; ++i) lanes[0] = max_of(lanes[0], lanes[i]);
        finite = finite && lanes[0] < 0x7f800000;
        const float maximum = float_of_bits(uint32_t(lanes[0]));
        const bool is_zero = !finite || maximum < 1e-30f;  // its reciprocal might overflow
        scales[begin / kScaleBlock] = is_zero ? 0.f : maximum / 127.f;
        const FloatOf<Isa> inverse = Isa::splat(is_zero ? 0.f : 127.f / maximum);
        alignas(64) int32_t values[kScaleBlock] = {};
        for_vectors<Isa>(finite ? n : 0, [&](int i, int part) {
            Isa::store_int(values + i, Isa::to_int(load_at<Isa>(x + begin, i, part) * inverse));
        });
        for (int in = 0; in < round_up(n, kStep); in += kStep, steps += 3 * kBytes) {
            const int32_t* v = values + in;
            alignas(64) int8_t bytes[kStep];
            for (int i = 0; i < kBytes; ++i) {
                bytes[i] = int8_t(v[group ? 2 * i : i]);
                bytes[kBytes + i] = int8_t(v[group ? 2 * i + 1 : kBytes + i]);
            }
            for (int lane = 0, span = 0; span < spans; ++span) {
                for (int at = span; at < Isa::kLanes; at += spans, ++lane) {
                    std::memcpy(steps + 4 * at, bytes + 4 * lane, 4);
                    std::memcpy(steps + kBytes + 4 * at, bytes + kBytes + 4 * lane, 4);
                }
            }
            const int bias = group ? Isa::kBias4 : Isa::kBias8;
            alignas(64) int32_t sums[Isa::kLanes];
            Isa::store_int(sums, Isa::dot_of_ones(Isa::load_pair(steps)));
            for (int32_t& sum : sums) sum *= -bias;
            std::memcpy(steps + kStep, sums, sizeof sums);
        }
    }
    for (int i = (columns + kScaleBlock - 1) / kScaleBlock; i < scales_of_row(columns); ++i) scales[i] = 0.f;
    return finite;
}

template <class Isa>
void halves_to_floats(const uint16_t* p, int n, float* out) {
    int i = 0;
    for (; i + Isa::kLanes <= n; i += Isa::kLanes) Isa::half_to_float(p + i, out + i);
    if (i == n) return;
    uint16_t rest[Isa::kLanes] = {};
    std::memcpy(rest, p + i, size_t(n - i) * sizeof(uint16_t));
    Isa::half_to_float(rest, out + i);
}

constexpr int columns_of_scale(int group) { return group ? group : kMaxColumns; }

// The scales of a tile's int4 rows as floats, followed by a vector of 0.
template <class Isa, int kGroup>
void unpack_scales(const Tile& t, float* scales) {
    const int n = t.num_rows * (t.columns / kGroup);
    const uint16_t* halves = static_cast<const uint16_t*>(t.scales);
    halves_to_floats<Isa>(halves, n, scales);
    Isa::store(scales + n, Isa::splat(0.f));
}

// The scales of R rows of weights times those of M rows of activations.
template <class Isa, int kGroup, int R, int M, int kMaxGroups>
void multiply_scales(const float* scales, int groups, const float* const (&x_scales)[M],
                     float (&products)[M][R][kMaxGroups]) {
    constexpr int kTimes = kScaleBlock / kGroup;
    for (int i = 0; i < groups; i += Isa::kLanes) {
        FloatOf<Isa> x[M];
        for (int m = 0; m < M; ++m) x[m] = Isa::template repeat<kTimes>(x_scales[m] + i / kTimes);
        for (int r = 0; r < R; ++r) {
            const FloatOf<Isa> w = Isa::load(scales + r * groups + i);
            for (int m = 0; m < M; ++m) Isa::store(products[m][r] + i, x[m] * w);
        }
    }
}

// Prefetches weights: `step` does it in the order of memory, whatever the order of use; a later
// pass of tokens over the same tile prefetches its share of the next tile.
template <class Isa>
class Ahead {
  public:
    // For a pass of the tokens from `first_token` on, over `num_rows` rows from `row` on.
    Ahead(const Tile& t, size_t row_bytes, int row, int num_rows, int first_token)
        : weights_(t.weights),
          next_(t.next),
          tile_bytes_(size_t(t.num_rows) * row_bytes),
          at_(size_t(row + num_rows) * row_bytes) {
        if (first_token == 0) return;
        const int pass = first_token / Isa::kTokens, passes = (t.num_tokens - 1) / Isa::kTokens;
        const size_t part = size_t((pass - 1) * t.num_rows + row), parts = size_t(passes * t.num_rows);
        const uint8_t* line = next_ + tile_bytes_ * part / parts;
        const uint8_t* end = next_ + tile_bytes_ * (part + size_t(num_rows)) / parts;
        for (; line < end; line += 64) __builtin_prefetch(line, 0, kIntoL2);
    }

    // Prefetches one line for each line of the next `bytes` of weights.
    void step(int bytes) {
        for (int line = 0; line < bytes; line += 64, at_ += 64) {
            if constexpr (Isa::kFarAhead) __builtin_prefetch(place(at_ + Isa::kFarAhead), 0, kIntoL2);
            __builtin_prefetch(place(at_ + Isa::kAhead));
        }
    }

  private:
    const uint8_t* place(size_t at) const {
        return at < tile_bytes_ ? weights_ + at : next_ + (at - tile_bytes_);
    }

    const uint8_t *weights_, *next_;
    size_t tile_bytes_, at_;
};

// R rows of weights times M rows of activations; out begins at the first of the R. For int4
// weights, the scales of weights and activations are multiplied first; with `kScalesFirst` all of
// them before the steps, as vectors, which is faster for many scales and more than one token.
template <class Isa, int kGroup, int R, int M, bool kScalesFirst>
void multiply(const Tile& t, const float* tile_scales, int row, int first_token, float* out) {
    constexpr int kStep = 2 * Isa::kBytes;
    constexpr int kStepBytes = kGroup ? Isa::kBytes : kStep;
    constexpr int kSpans = spans_of<Isa>(kGroup), kColumns = columns_of_scale(kGroup);
    const size_t row_bytes = size_t(t.columns) * kStepBytes / kStep;
    const int8_t* q[M];
    const float* q_scales[M];
    for (int m = 0; m < M; ++m) {
        const size_t token = size_t(t.tokens ? t.tokens[first_token + m] : first_token + m);
        q[m] = t.x.steps + token * t.x.row_bytes;
        q_scales[m] = t.x.scales + token * t.x.row_scales;
    }
    constexpr int kMaxGroups = kMaxColumns / kColumns;
    alignas(64) float products[kScalesFirst ? M : 1][kScalesFirst ? R : 1][kScalesFirst ? kMaxGroups : 1];
    const int groups = t.columns / kColumns;
    const float* scales = tile_scales + row * groups;
    if constexpr (kScalesFirst) multiply_scales<Isa, kGroup>(scales, groups, q_scales, products);
    FloatOf<Isa> sums[M][R];
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) sums[m][r] = Isa::splat(0.f);
    }
    const uint8_t* w = t.weights + size_t(row) * row_bytes;
    const auto step = [&](int at, const uint8_t* bytes, size_t bytes_apart) __attribute__((always_inline)) {
        typename Isa::Pair weights[R];
        FloatOf<Isa> scale[R];
        const int group = at * kStep / kColumns;
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = bytes + r * bytes_apart;
            if constexpr (kGroup == 0) {
                weights[r] = Isa::weights8(p);
            } else {
                weights[r] = Isa::template weights4<kSpans>(p);
                if (!kScalesFirst) scale[r] = Isa::template in_turns<kSpans>(scales + r * groups + group);
            }
        }
        for (int m = 0; m < M; ++m) {
            const int8_t* pair = q[m] + at * 3 * Isa::kBytes;
            const typename Isa::Pair x = Isa::load_pair(pair);
            const FloatOf<Isa> x_scale = Isa::splat(q_scales[m][at * kStep / kScaleBlock]);
            constexpr bool kShifted = kGroup ? Isa::kBias4 != 0 : Isa::kBias8 != 0;
            const typename Isa::Int start =
                kShifted ? Isa::load_int(reinterpret_cast<const int32_t*>(pair + kStep)) : Isa::zero();
            for (int r = 0; r < R; ++r) {
                FloatOf<Isa> product = x_scale;
                if constexpr (kScalesFirst) {
                    product = Isa::template in_turns<kSpans>(products[m][r] + group);
                } else if constexpr (kGroup != 0) {
                    product = x_scale * scale[r];
                }
                const FloatOf<Isa> dot = Isa::to_float(
                    kGroup ? Isa::dot(start, weights[r], x) : Isa::dot_int8(start, weights[r], x));
                sums[m][r] = Isa::fma(dot, product, sums[m][r]);
            }
        }
    };
    const int steps = t.columns / kStep;
    if (kGroup && first_token == 0) {  // the scales of the next tile
        const uint16_t* next = static_cast<const uint16_t*>(t.scales) + (t.num_rows + row) * groups;
        for (int i = 0; i < R * groups; i += 32) __builtin_prefetch(next + i);
    }
    Ahead<Isa> ahead(t, row_bytes, row, R, first_token);
    const bool is_asking = M < Isa::kTokens || first_token == 0;  // a later pass finds its tile in a cache
    for (int s = 0; s < steps; ++s) {
        if (is_asking) ahead.step(R * kStepBytes);
        step(s, w + size_t(s) * kStepBytes, row_bytes);
    }
    if (t.columns % kStep) {
        const size_t done = size_t(steps) * kStepBytes;
        alignas(64) uint8_t rest[R * kStepBytes] = {};
        for (int r = 0; r < R; ++r) {
            std::memcpy(rest + r * kStepBytes, w + r * row_bytes + done, row_bytes - done);
        }
        step(steps, rest, kStepBytes);
    }
    const float* row_scales = static_cast<const float*>(t.scales) + row;
    for (int m = 0; m < M; ++m, out += t.out_step) {
        if constexpr (R == 4) {
            Isa::store_sums(out, sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
        } else {
            for (int r = 0; r < R; ++r) out[r] = Isa::sum(sums[m][r]);
        }
        for (int r = 0; r < R && !kGroup; ++r) out[r] *= row_scales[r];
    }
}

template <class Isa, int kGroup, int M, bool kScalesFirst>
void multiply_rows(const Tile& t, const float* scales, int first_token) {
    float* out = t.out + size_t(first_token) * t.out_step;
    int row = 0;
    for (; row + Isa::kRows <= t.num_rows; row += Isa::kRows) {
        multiply<Isa, kGroup, Isa::kRows, M, kScalesFirst>(t, scales, row, first_token, out + row);
    }
    for (; row < t.num_rows; ++row) {
        multiply<Isa, kGroup, 1, M, kScalesFirst>(t, scales, row, first_token, out + row);
    }
}

template <class Isa, int kGroup, int M>
void multiply_tokens(const Tile& t, const float* scales, int first_token) {
    constexpr bool kMay = kGroup && M > 1;
    if (kMay && t.columns >= 1024) {
        multiply_rows<Isa, kGroup, M, kMay>(t, scales, first_token);
    } else {
        multiply_rows<Isa, kGroup, M, false>(t, scales, first_token);
    }
}

template <class Isa, int kGroup>
void tile(const Tile& t) {
    alignas(64) float scales[kTileRows * kMaxColumns / columns_of_scale(kGroup) + 2 * Isa::kLanes];
    if constexpr (kGroup != 0) unpack_scales<Isa, kGroup>(t, scales);
    int token = 0;
    for (; token + Isa::kTokens <= t.num_tokens; token += Isa::kTokens) {
        multiply_tokens<Isa, kGroup, Isa::kTokens>(t, scales, token);
    }
    const int rest = t.num_tokens - token;
    if constexpr (Isa::kTokens == 4) {
        if (rest == 3) multiply_tokens<Isa, kGroup, 3>(t, scales, token);
        if (rest == 2) multiply_tokens<Isa, kGroup, 2>(t, scales, token);
    }
    if (rest == 1) multiply_tokens<Isa, kGroup, 1>(t, scales, token);
}

template <class Isa>
void rms_norm(const float* x, const float* weight, int n, float epsilon, float* y) {
    FloatOf<Isa> squares = Isa::splat(0.f);
    for_vectors<Isa>(n, [&](int i, int part) {
        const FloatOf<Isa> v = load_at<Isa>(x, i, part);
        squares = Isa::fma(v, v, squares);
    });
    const FloatOf<Isa> factor = Isa::splat(1.f / sqrtf(Isa::sum(squares) / float(n) + epsilon));
    for_vectors<Isa>(n, [&](int i, int part) {
        store_at<Isa>(y, i, load_at<Isa>(x, i, part) * factor * load_at<Isa>(weight, i, part), part);
    });
}

template <class Isa>
void silu_times_up(const float* gate, const float* up, int n, float* y) {
    for_vectors<Isa>(n, [&](int i, int part) {
        const FloatOf<Isa> g = load_at<Isa>(gate, i, part), zero = Isa::splat(0.f);
        const FloatOf<Isa> silu = g / (Isa::splat(1.f) + exp_of<Isa>(zero - g));
        store_at<Isa>(y, i, silu * load_at<Isa>(up, i, part), part);
    });
}

template <class Isa>
void dot_rows(const float* weights, int rows, int columns, const float* x, float* y) {
    constexpr int kSums = 4, kLanes = Isa::kLanes;
    for (int row = 0; row < rows; ++row, weights += columns) {
        FloatOf<Isa> sums[kSums] = {Isa::splat(0.f), Isa::splat(0.f), Isa::splat(0.f), Isa::splat(0.f)};
        int i = 0;
        for (; i + kSums * kLanes <= columns; i += kSums * kLanes) {
            for (int k = 0; k < kSums; ++k) {
                const int at = i + k * kLanes;
                sums[k] = Isa::fma(Isa::load(weights + at), Isa::load(x + at), sums[k]);
            }
        }
        for (; i < columns; i += kLanes) {
            const int part = min_of(kLanes, columns - i);
            sums[0] = Isa::fma(load_at<Isa>(weights, i, part), load_at<Isa>(x, i, part), sums[0]);
        }
        y[row] = Isa::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

// v + sin(alpha v)^2 / alpha, SNAC's activation. The squared sine has the period pi.
template <class Isa>
FloatOf<Isa> snake_of(FloatOf<Isa> v, FloatOf<Isa> alpha, FloatOf<Isa> inverse) {
    const FloatOf<Isa> angle = v * alpha;
    const FloatOf<Isa> turns = Isa::round(angle * Isa::splat(0.318309886f));
    FloatOf<Isa> r = Isa::fma(turns, Isa::splat(-3.140625f), angle);
    r = Isa::fma(turns, Isa::splat(-9.67502594e-4f), r);
    r = Isa::fma(turns, Isa::splat(-1.50995799e-7f), r);
    const FloatOf<Isa> square = r * r;
    FloatOf<Isa> p = Isa::splat(-2.50521084e-8f);
    constexpr float kTerms[] = {2.75573192e-6f, -1.98412698e-4f, 8.33333333e-3f, -1.66666667e-1f};
    for (float term : kTerms) p = Isa::fma(p, square, Isa::splat(term));
    const FloatOf<Isa> sine = Isa::fma(p * square, r, r);
    return Isa::fma(sine * sine, inverse, v);
}
template <class Isa>
void snake(const float* x, int n, float alpha, float* y) {
    const FloatOf<Isa> factor = Isa::splat(alpha), inverse = Isa::splat(1.f / (alpha + 1e-9f));
    for_vectors<Isa>(n, [&](int i, int part) {
        store_at<Isa>(y, i, snake_of<Isa>(load_at<Isa>(x, i, part), factor, inverse), part);
    });
}

template <class Isa>
int64_t read_all(const uint8_t* bytes, size_t n) {
    constexpr size_t kStep = sizeof(typename Isa::Pair), kAhead = 4096;
    typename Isa::Int largest[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
    for (size_t i = 0; i + 4 * kStep <= n; i += 4 * kStep) {
        for (size_t line = 0; line < 4 * kStep; line += 64) __builtin_prefetch(bytes + i + line + kAhead);
        for (size_t part = 0; part < 4; ++part) {
            const int32_t* words = reinterpret_cast<const int32_t*>(bytes + i + part * kStep);
            largest[part] = Isa::max_int(largest[part], Isa::load_int(words));
            largest[part] = Isa::max_int(largest[part], Isa::load_int(words + Isa::kLanes));
        }
    }
    int32_t lanes[Isa::kLanes];
    Isa::store_int(lanes, Isa::max_int(Isa::max_int(largest[0], largest[1]),
                                       Isa::max_int(largest[2], largest[3])));
    return lanes[0];
}

}  // namespace
