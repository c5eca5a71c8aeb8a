// AVX2 with FMA and F16C: 32 bytes of weights a step. `kVnni` has the byte dot product (AVX-VNNI).
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace {

template <bool kVnni>
struct Avx2 {
    static constexpr int kBytes = 32, kLanes = 8, kRows = 2, kTokens = 4;
    static constexpr size_t kAhead = kUsualAhead, kFarAhead = 0;
    // Without VNNI, 16-bit sums would overflow with unsigned int8 weights: use absolute weights and
    // move their signs to the activations.
    static constexpr int kBias4 = 8, kBias8 = kVnni ? 128 : 0;
    static constexpr bool kDotsBf16 = false, kDotsInt16 = false;
    using Float = __m256;
    using Int = __m256i;
    struct Pair {
        Int a, b;
    };
    struct Two {
        Float a, b;
    };

    static Float splat(float x) { return _mm256_set1_ps(x); }
    static Float load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
    static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
    static Float round(Float x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Float times_power_of_2(Float x, Float n) {
        const Int exponent = _mm256_slli_epi32(_mm256_add_epi32(to_int(n), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
    }
    static float sum(Float x) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static void store_sums(float* p, Float a, Float b, Float c, Float d) {
        const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    }
    // Two vectors of bfloat16 as floats: the even elements, then the odd ones, one instruction
    // each.
    static Two bf16_deinterleaved(const uint16_t* p) {
        const Int both = load_bytes(p);
        return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int32_t(0xffff0000))))};
    }
    static Two deinterleave(Two x) {
        return {in_order(_mm256_shuffle_ps(x.a, x.b, 0x88)), in_order(_mm256_shuffle_ps(x.a, x.b, 0xdd))};
    }
    static Two interleave(Two x) {
        const Float low = _mm256_unpacklo_ps(x.a, x.b), high = _mm256_unpackhi_ps(x.a, x.b);
        return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
    }
    static Float int8(const int8_t* p) {
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static void half_to_float(const uint16_t* p, float* out) {
        _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    // Loads the next numbers and repeats each `kTimes` times.
    template <int kTimes>
    static Float repeat(const float* p) {
        if constexpr (kTimes == 1) return load(p);
        if constexpr (kTimes == 4) return _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0]));
        const Float four = _mm256_castps128_ps256(_mm_loadu_ps(p));
        return _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    }
    // Loads the next `kSpans` numbers and repeats the sequence.
    template <int kSpans>
    static Float in_turns(const float* p) {
        if constexpr (kSpans == 1) return splat(*p);
        return _mm256_castsi256_ps(
            _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }

    static Int zero() { return _mm256_setzero_si256(); }
    static Int load_int(const int32_t* p) { return load_bytes(p); }
    static void store_int(int32_t* p, Int x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    }
    static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
    static Int to_int(Float x) { return _mm256_cvtps_epi32(x); }
    static Int magnitude_bits(Float x) {
        return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    }
    static Int max_int(Int a, Int b) { return _mm256_max_epi32(a, b); }

    static Pair load_pair(const int8_t* p) { return {load_bytes(p), load_bytes(p + kBytes)}; }
    static Pair weights8(const uint8_t* p) {
        const Int shift = _mm256_set1_epi8(int8_t(kBias8));
        return {_mm256_xor_si256(load_bytes(p), shift),
                _mm256_xor_si256(load_bytes(p + kBytes), shift)};
    }
    // Scales of `kSpans` int4 groups, in turn by lane.
    template <int kSpans>
    static Pair weights4(const uint8_t* p) {
        const Int low = _mm256_set1_epi8(0x0f), eight = _mm256_set1_epi8(8);
        Int both = load_bytes(p);
        if constexpr (kSpans == 2) {
            both = _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        }
        return {_mm256_and_si256(both, low),
                _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(both, 4), low), eight)};
    }
    // Unsigned weights times signed activations.
    static Int dot(Int sum, Pair w, Pair q) {
#ifdef __AVXVNNI__
        if constexpr (kVnni) {
            return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, w.a, q.a), w.b, q.b);
        }
#endif
        const Int ones = _mm256_set1_epi16(1);
        const Int a = _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, q.a), ones);
        const Int b = _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, q.b), ones);
        return _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
    }
    static Int dot_int8(Int sum, Pair w, Pair q) {
        if constexpr (kVnni) return dot(sum, w, q);
        return dot(sum, {_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)},
                   {_mm256_sign_epi8(q.a, w.a), _mm256_sign_epi8(q.b, w.b)});
    }
    static Int dot_of_ones(Pair q) {
        const Int ones = _mm256_set1_epi8(1);
        return dot(zero(), {ones, ones}, q);
    }

  private:
    static Float in_order(Float pairs) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
    }
    static Int load_bytes(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
};

}  // namespace
