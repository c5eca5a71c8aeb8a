// Armv8.2 with the byte dot product: 16 bytes of weights a step. All arithmetic is signed.
#pragma once

#include <arm_neon.h>

#include "lanes.h"

namespace {

struct Neon {
    static constexpr int kBytes = 16, kLanes = 4, kRows = 4, kTokens = 4;
    static constexpr size_t kAhead = kUsualAhead, kFarAhead = 0;
    static constexpr int kBias4 = 0, kBias8 = 0;
    static constexpr bool kDotsBf16 = false, kDotsInt16 = false;
    using Float = float32x4_t;
    using Int = int32x4_t;
    struct Pair {
        int8x16_t a, b;
    };
    struct Two {
        Float a, b;
    };

    static Float splat(float x) { return vdupq_n_f32(x); }
    static Float load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, Float x) { vst1q_f32(p, x); }
    static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
    static Float max(Float a, Float b) { return vmaxq_f32(a, b); }
    static Float min(Float a, Float b) { return vminq_f32(a, b); }
    static Float round(Float x) { return vrndnq_f32(x); }
    static Float times_power_of_2(Float x, Float n) {
        const Int exponent = vshlq_n_s32(vaddq_s32(to_int(n), vdupq_n_s32(127)), 23);
        return vmulq_f32(x, vreinterpretq_f32_s32(exponent));
    }
    static float sum(Float x) { return vaddvq_f32(x); }
    static void store_sums(float* p, Float a, Float b, Float c, Float d) {
        vst1q_f32(p, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
    }
    // Two vectors of bfloat16 as floats, in order: another order is not faster here.
    static Two bf16_deinterleaved(const uint16_t* p) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)),
                vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + kLanes), 16))};
    }
    static Two deinterleave(Two x) { return x; }
    static Two interleave(Two x) { return x; }
    static Float int8(const int8_t* p) {
        int32_t four;
        std::memcpy(&four, p, sizeof four);
        const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    }
    static void half_to_float(const uint16_t* p, float* out) {
        vst1q_f32(out, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
    }
    // Loads the next numbers and repeats each `kTimes` times.
    template <int kTimes>
    static Float repeat(const float* p) {
        if constexpr (kTimes == 1) return load(p);
        if constexpr (kTimes == 4) return splat(*p);
        const float32x2_t two = vld1_f32(p);
        return vcombine_f32(vdup_lane_f32(two, 0), vdup_lane_f32(two, 1));
    }
    // Loads the next `kSpans` numbers and repeats the sequence.
    template <int kSpans>
    static Float in_turns(const float* p) {
        return splat(*p);
    }

    static Int zero() { return vdupq_n_s32(0); }
    static Int load_int(const int32_t* p) { return vld1q_s32(p); }
    static void store_int(int32_t* p, Int x) { vst1q_s32(p, x); }
    static Float to_float(Int x) { return vcvtq_f32_s32(x); }
    static Int to_int(Float x) { return vcvtnq_s32_f32(x); }
    static Int magnitude_bits(Float x) {
        return vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff));
    }
    static Int max_int(Int a, Int b) { return vmaxq_s32(a, b); }

    static Pair load_pair(const int8_t* p) { return {vld1q_s8(p), vld1q_s8(p + kBytes)}; }
    static Pair weights8(const uint8_t* p) {
        return {vreinterpretq_s8_u8(vld1q_u8(p)), vreinterpretq_s8_u8(vld1q_u8(p + kBytes))};
    }
    // Scales of `kSpans` int4 groups, in turn by lane.
    template <int kSpans>
    static Pair weights4(const uint8_t* p) {
        const uint8x16_t both = vld1q_u8(p);
        const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        return {vsubq_s8(low, vdupq_n_s8(8)), vshrq_n_s8(vreinterpretq_s8_u8(both), 4)};
    }
    static Int dot(Int sum, Pair w, Pair q) {
        return vdotq_s32(vdotq_s32(sum, w.a, q.a), w.b, q.b);
    }
    static Int dot_int8(Int sum, Pair w, Pair q) { return dot(sum, w, q); }
    static Int dot_of_ones(Pair q) { return dot(zero(), {vdupq_n_s8(1), vdupq_n_s8(1)}, q); }
};

}  // namespace
