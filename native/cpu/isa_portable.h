// Plain C++ for any processor: 16 bytes of weights a step, four lanes that compilers can vectorise.
#pragma once

#include <math.h>

#include "lanes.h"

namespace {

struct Portable {
    static constexpr int kBytes = 16, kLanes = 4, kRows = 2, kTokens = 2;
    static constexpr size_t kAhead = kUsualAhead, kFarAhead = 0;
    static constexpr int kBias4 = 0, kBias8 = 0;
    static constexpr bool kDotsBf16 = false, kDotsInt16 = false;
    typedef float Float __attribute__((vector_size(16)));
    typedef int32_t Int __attribute__((vector_size(16)));
    struct Pair {
        int8_t a[kBytes], b[kBytes];
    };
    struct Two {
        Float a, b;
    };

    static Float splat(float x) { return Float{x, x, x, x}; }
    static Float load(const float* p) {
        Float x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
    static Float fma(Float a, Float b, Float c) { return a * b + c; }
    static Float max(Float a, Float b) { return a > b ? a : b; }
    static Float min(Float a, Float b) { return a < b ? a : b; }
    static Float round(Float x) {
        return Float{nearbyintf(x[0]), nearbyintf(x[1]), nearbyintf(x[2]),
                     nearbyintf(x[3])};
    }
    static Float times_power_of_2(Float x, Float n) {
        const Int exponent = (to_int(n) + 127) << 23;
        Float power;
        std::memcpy(&power, &exponent, sizeof power);
        return x * power;
    }
    static float sum(Float x) { return (x[0] + x[1]) + (x[2] + x[3]); }
    static void store_sums(float* p, Float a, Float b, Float c, Float d) {
        p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d);
    }
    // Two vectors of bfloat16 as floats, in order: another order is not faster here.
    static Two bf16_deinterleaved(const uint16_t* p) {
        float values[2 * kLanes];
        for (int i = 0; i < 2 * kLanes; ++i) values[i] = float_of_bits(uint32_t(p[i]) << 16);
        return {load(values), load(values + kLanes)};
    }
    static Two deinterleave(Two x) { return x; }
    static Two interleave(Two x) { return x; }
    static Float int8(const int8_t* p) {
        return Float{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
    }
    static void half_to_float(const uint16_t* p, float* out) {
        for (int i = 0; i < kLanes; ++i) out[i] = half_bits_to_float(p[i]);
    }
    // Loads the next numbers and repeats each `kTimes` times.
    template <int kTimes>
    static Float repeat(const float* p) {
        return Float{p[0], p[1 / kTimes], p[2 / kTimes], p[3 / kTimes]};
    }
    // Loads the next `kSpans` numbers and repeats the sequence.
    template <int kSpans>
    static Float in_turns(const float* p) {
        return splat(*p);
    }

    static Int zero() { return Int{0, 0, 0, 0}; }
    static Int load_int(const int32_t* p) { return Int{p[0], p[1], p[2], p[3]}; }
    static void store_int(int32_t* p, Int x) { std::memcpy(p, &x, sizeof x); }
    static Float to_float(Int x) { return Float{float(x[0]), float(x[1]), float(x[2]), float(x[3])}; }
    static Int to_int(Float x) {
        const Float whole = round(x);
        return Int{int32_t(whole[0]), int32_t(whole[1]), int32_t(whole[2]), int32_t(whole[3])};
    }
    static Int magnitude_bits(Float x) {
        Int bits;
        std::memcpy(&bits, &x, sizeof bits);
        return bits & 0x7fffffff;
    }
    static Int max_int(Int a, Int b) { return a > b ? a : b; }

    static Pair load_pair(const int8_t* p) {
        Pair pair;
        std::memcpy(&pair, p, sizeof pair);
        return pair;
    }
    static Pair weights8(const uint8_t* p) { return load_pair(reinterpret_cast<const int8_t*>(p)); }
    // Scales of `kSpans` int4 groups, in turn by lane.
    template <int kSpans>
    static Pair weights4(const uint8_t* p) {
        Pair pair;
        for (int i = 0; i < kBytes; ++i) {
            pair.a[i] = int8_t((p[i] & 15) - 8);
            pair.b[i] = int8_t((p[i] >> 4 ^ 8) - 8);
        }
        return pair;
    }
    static Int dot(Int sum, const Pair& w, const Pair& q) {
        for (int i = 0; i < kBytes; ++i) sum[i / 4] += w.a[i] * q.a[i] + w.b[i] * q.b[i];
        return sum;
    }
    static Int dot_int8(Int sum, const Pair& w, const Pair& q) { return dot(sum, w, q); }
    static Int dot_of_ones(const Pair& q) {
        Pair ones;
        std::memset(&ones, 1, sizeof ones);
        return dot(zero(), ones, q);
    }
};

}  // namespace
