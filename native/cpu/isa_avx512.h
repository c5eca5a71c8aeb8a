// AVX-512 with VNNI: 64 bytes of weights a step. `kBf16` also uses the bfloat16 dot product.
// `kIsIntel` prefetches into the L2 cache first, because on Intel's cores lines from memory fill up
// the few line buffers of L1: without it a step takes 5 % longer, on two threads 13 %.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace {

template <bool kBf16, bool kIsIntel = false>
struct Avx512 {
    static constexpr int kBytes = 64, kLanes = 16, kRows = 4, kTokens = 4;
    static constexpr size_t kAhead = kIsIntel ? 512 : kUsualAhead, kFarAhead = kIsIntel ? 8192 : 0;
    // vpdpbusd needs one unsigned operand: weights are shifted up, and the sums begin lower.
    static constexpr int kBias4 = 8, kBias8 = 128;
    static constexpr bool kDotsBf16 = kBf16, kDotsInt16 = true;
    using Float = __m512;
    using Int = __m512i;
    struct Pair {
        Int a, b;
    };
    struct Two {
        Float a, b;
    };

    static Float splat(float x) { return _mm512_set1_ps(x); }
    static Float load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
    static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
    static Float round(Float x) { return _mm512_roundscale_ps(x, 0); }
    static Float times_power_of_2(Float x, Float n) { return _mm512_scalef_ps(x, n); }
    static float sum(Float x) { return _mm512_reduce_add_ps(x); }
    static void store_sums(float* p, Float a, Float b, Float c, Float d) {
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512 abcd =
            _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m256 half =
            _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
        _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
    // Two vectors of bfloat16 as floats: the even elements, then the odd ones, one instruction
    // each.
    static Two bf16_deinterleaved(const uint16_t* p) {
        const Int both = _mm512_loadu_si512(p);
        return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int32_t(0xffff0000))))};
    }
    static Two deinterleave(Two x) {
        const Int even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const Int odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        return {_mm512_permutex2var_ps(x.a, even, x.b), _mm512_permutex2var_ps(x.a, odd, x.b)};
    }
    static Two interleave(Two x) {
        const Int first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const Int others = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        return {_mm512_permutex2var_ps(x.a, first, x.b), _mm512_permutex2var_ps(x.a, others, x.b)};
    }
    static Float int8(const int8_t* p) {
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static void half_to_float(const uint16_t* p, float* out) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        _mm512_storeu_ps(out, _mm512_cvtph_ps(halves));
    }
    // Loads the next numbers and repeats each `kTimes` times.
    template <int kTimes>
    static Float repeat(const float* p) {
        if constexpr (kTimes == 1) return load(p);
        const Float some = kTimes == 2 ? _mm512_castps256_ps512(_mm256_loadu_ps(p))
                                       : _mm512_castps128_ps512(_mm_loadu_ps(p));
        const Int lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, kTimes == 2 ? 1 : 2), some);
    }
    // Loads the next `kSpans` numbers and repeats the sequence.
    template <int kSpans>
    static Float in_turns(const float* p) {
        if constexpr (kSpans == 1) return splat(*p);
        const __m128i* bytes = reinterpret_cast<const __m128i*>(p);
        return _mm512_castsi512_ps(kSpans == 2 ? _mm512_broadcastq_epi64(_mm_loadl_epi64(bytes))
                                               : _mm512_broadcast_i32x4(_mm_loadu_si128(bytes)));
    }

    static Int zero() { return _mm512_setzero_si512(); }
    static Int load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void store_int(int32_t* p, Int x) { _mm512_storeu_si512(p, x); }
    static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
    static Int to_int(Float x) { return _mm512_cvtps_epi32(x); }
    static Int magnitude_bits(Float x) {
        return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    }
    static Int max_int(Int a, Int b) { return _mm512_max_epi32(a, b); }

    static Pair load_pair(const int8_t* p) {
        return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + kBytes)};
    }
    static Pair weights8(const uint8_t* p) {
        const Int sign = _mm512_set1_epi8(int8_t(0x80));
        return {_mm512_xor_si512(_mm512_loadu_si512(p), sign),
                _mm512_xor_si512(_mm512_loadu_si512(p + kBytes), sign)};
    }
    // Scales of `kSpans` int4 groups, in turn by lane.
    template <int kSpans>
    static Pair weights4(const uint8_t* p) {
        const Int low = _mm512_set1_epi8(0x0f), eight = _mm512_set1_epi8(8);
        Int both = _mm512_loadu_si512(p);
        if constexpr (kSpans == 2) {
            both = _mm512_permutexvar_epi32(
                _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), both);
        }
        if constexpr (kSpans == 4) {
            both = _mm512_permutexvar_epi32(
                _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), both);
        }
        // (both >> 4 & low) ^ eight
        return {_mm512_and_si512(both, low),
                _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), low, eight, 0x6a)};
    }
    // Assembly, because GCC 12 copies every sum before and after the intrinsics; also in
    // `dot_words`.
    static Int dot(Int sum, Pair w, Pair q) {
        add_bytes(sum, w.a, q.a);
        add_bytes(sum, w.b, q.b);
        return sum;
    }
    static Int dot_int8(Int sum, Pair w, Pair q) { return dot(sum, w, q); }
    static Int dot_of_ones(Pair q) {
        const Int ones = _mm512_set1_epi8(1);
        return dot(zero(), {ones, ones}, q);
    }

    // 32 words of 16 bits, bfloat16 or int16.
    static Int words(const uint16_t* p) { return _mm512_loadu_si512(p); }
    static Int words(const int8_t* p) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    // Interleaves the words of both: the first 16, then the others.
    static Pair interleave(Int a, Int b) {
        const Int first = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005,
                                            0x260006, 0x270007, 0x280008, 0x290009, 0x2a000a, 0x2b000b,
                                            0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
        const Int others = _mm512_add_epi32(first, _mm512_set1_epi32(0x100010));
        return {_mm512_permutex2var_epi16(a, first, b), _mm512_permutex2var_epi16(a, others, b)};
    }
    static Int splat_int(int32_t x) { return _mm512_set1_epi32(x); }
    static Int int16_pairs(Int low, Int high) {
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    static Int dot_words(Int sum, Int a, Int b) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
        return sum;
    }
#ifdef __AVX512BF16__
    static Int bf16_pairs(Float low, Float high) {
        const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        return interleave(words, _mm512_shuffle_i64x2(words, words, 0x4e)).a;
    }
    static Float dot_words(Float sum, Int a, Int b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
#endif

  private:
    static void add_bytes(Int& sum, Int unsigned_bytes, Int signed_bytes) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "vm"(signed_bytes));
    }
};

}  // namespace
