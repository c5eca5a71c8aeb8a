// The table of an instruction set's kernels: each `path_*.cpp` fills one in, all other code calls
// through it.
//
// K columns of a matrix; V bytes of weights per step of an instruction set, which are 2 V int4
// weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deeptalk {

enum WeightKind { kInt8 = 0, kInt4x32 = 1, kInt4x64 = 2, kInt4x128 = 3, kNumWeightKinds = 4 };

inline int group_of(int kind) { return kind == kInt8 ? 0 : 16 << kind; }

constexpr int kTileRows = 64;         // most rows of weights of one call of `tile`
constexpr int kMaxColumns = 16384;    // of a matrix: bounds the scales that a tile unpacks
constexpr int kMaxLatentWidth = 1024;  // of a cached row, padding included
constexpr int kAttendHeads = 16;      // most heads of one call of `attend`

// Int8 rows of activations. A step holds 2 V activations and the V / 4 initial sums of its dot
// products. For int4 weights the even activations are before the odd ones, the order of unpacked
// nibbles, and lanes use the int4 scales of a step in turn.
struct QuantisedRows {
    int8_t* steps;
    float* scales;  // one per 128 columns, padded with 0 to a whole vector
    size_t row_bytes, row_scales;
};
inline int scales_of_row(int columns) { return (columns + 2047) / 2048 * 16; }

// Rows of a row-major matrix (rows, K) times rows of activations.
struct Tile {
    const uint8_t* weights;  // the tile's first row
    const void* scales;      // its scales: float per row for int8, half per group for int4
    int columns, num_rows;
    QuantisedRows x;
    const int32_t* tokens;  // which rows of x; null for the first `num_tokens`
    int num_tokens;
    float* out;           // (num_tokens, num_rows), tokens are `out_step` floats apart
    size_t out_step;
    const uint8_t* next;  // the weights to read afterwards, for prefetches
};

enum CacheKind { kBf16Rows = 0, kInt8Rows = 1, kNumCacheKinds = 2 };

// The partial result of a softmax over some rows for up to 16 heads.
struct Gathered {
    float *maximum, *total;  // (16)
    float* mixed;            // (heads, latent), weighted
};

// Attention of up to 16 heads over cached rows `begin` to `end`. A row is [latent | rotary key],
// both parts padded with zeros, to a multiple of 32 values, or of 128 in int8 rows; those
// hold the two parts' scales in their last 8 bytes, where queries are 0.
struct Attend {
    const uint8_t* shared;  // row 0 of the cache that holds the first `num_shared` rows
    const uint8_t* own;     // row 0 of the cache that holds the others, at their own rows
    size_t row_bytes;
    int num_shared, begin, end;
    int next_end;  // rows [end, next_end) are prefetched
    int heads, latent, width;
    const float* queries;  // (heads, width), scaled
    Gathered out;
};

constexpr int kPanelColumns = 32;  // of a codec layer's matrix: contiguous for each input
constexpr int kCodecTaps = 7;      // of a depthwise convolution

// Per column: the bias, and alpha and 1 / alpha of a following snake. Padded to whole panels.
struct BiasSnake {
    const float *bias, *alpha, *inverse;
};

// Rows of `taps` x `channels` inputs times one panel: skip + gain x (sums + bias), and the snake of
// that.
struct Convolution {
    const float* x;
    size_t row_step, tap_step;  // floats between rows, and between the rows of two taps
    int taps, channels;
    const float* panel;  // (taps x channels, 32)
    BiasSnake bias_snake;
    int num_rows, columns;
    size_t out_step;    // of skip, y and snaked
    const float* skip;  // null: 0
    const float* gain;  // one for each row; null: 1
    float* y;           // null: not wanted
    float* snaked;        // y's snake; null: not wanted
};

// Rows `begin` to `end`; dense, so a tap's rows lie `tap_step` floats apart.
struct Depthwise {
    const float* x;
    size_t tap_step;
    const float* weights;  // (7, channels)
    BiasSnake bias_snake;
    int channels, begin, end;
    float* y;
};

struct Path {
    const char* name;
    size_t (*quantised_bytes)(int columns);  // of one row
    // For weights of the given group size, 0 for int8. False if a value is not finite.
    bool (*quantise)(const float* x, int columns, int group, int8_t* steps, float* scales);
    void (*tile[kNumWeightKinds])(const Tile& tile);
    void (*attend[kNumCacheKinds])(const Attend& call);
    void (*add_gathered)(const Gathered& all, const Gathered& part, int heads, int latent);
    void (*rms_norm)(const float* x, const float* weight, int n, float epsilon, float* y);
    void (*silu_times_up)(const float* gate, const float* up, int n, float* y);
    void (*dot_rows)(const float* weights, int rows, int columns, const float* x, float* y);
    void (*snake)(const float* x, int n, float alpha, float* y);
    void (*convolve)(const Convolution& call);
    void (*convolve_depthwise)(const Depthwise& call);
    int64_t (*read)(const uint8_t* bytes, size_t n);  // for timing reads; returns one lane of a maximum
};

// Null if the processor or the build lacks the path.
const Path* avx512_bf16_path();
const Path* avx512_path();
const Path* avx512_intel_path();
const Path* avx2_vnni_path();
const Path* avx2_path();
const Path* neon_i8mm_path();
const Path* neon_path();
const Path* portable_path();

}  // namespace deeptalk
