// Code that every instruction set shares. All code of a path is in an unnamed namespace, so that
// the linker cannot replace a function by one that was compiled for another processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kScaleBlock = 128;  // activations that share one int8 scale
constexpr int kIntoL2 = 2;  // hint of __builtin_prefetch: into the L2 cache
constexpr size_t kUsualAhead = 3072;  // bytes from the present weights to the prefetched ones

inline int min_of(int a, int b) { return a < b ? a : b; }
inline int max_of(int a, int b) { return a > b ? a : b; }
inline int round_up(int value, int step) { return (value + step - 1) / step * step; }

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Ties to even; the caller has refused NaN.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Any half, subnormals included: a multiplication adjusts the exponent.
inline float half_bits_to_float(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    const float scaled = float_of_bits(magnitude) * 0x1p112f;
    const uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return float_of_bits(bits_of(scaled) | infinite | uint32_t(half & 0x8000) << 16);
}

}  // namespace
