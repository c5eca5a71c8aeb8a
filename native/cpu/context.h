// The state of calls: a kernel path, threads, and buffers that are kept between calls.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"
#include "pool.h"

namespace deeptalk {

constexpr int kTileTokens = 64;  // of one call of a tile: their results stay in the cache
constexpr int kFewRows = 16;
// The rows of a tile: with few rows memory is read as an even stream, with many rows activations
// are reused.
inline int tile_rows_of(int tokens) { return tokens < 8 ? kFewRows : kTileRows; }

inline int kind_of_group(int group) {
    return group == 0 ? kInt8 : group == 32 ? kInt4x32 : group == 64 ? kInt4x64 : kInt4x128;
}

// Rows of activations in a path's layout; grows to the largest call.
class Quantised {
  public:
    // Makes space for (rows, columns).
    QuantisedRows reserve(const Path& path, int rows, int columns);

  private:
    std::vector<int8_t> steps_;
    std::vector<float> scales_;
};

// One expert or MLP and its tokens.
struct Unit {
    const uint8_t* record;
    int first, count;  // in the lists of tokens and weights
};

struct ExpertRoom {
    std::vector<Unit> units;
    std::vector<int32_t> tokens, hidden_rows, counts;
    std::vector<float> weights, hidden;
    Quantised x, quantised_hidden;
};

struct AttentionRoom {
    std::vector<float> maximum, total, mixed;
};

}  // namespace deeptalk

struct dt_context {
    dt_context(const deeptalk::Path& chosen, int threads) : path(chosen), pool(threads) {}

    const deeptalk::Path& path;
    deeptalk::Pool pool;
    std::string message;
    deeptalk::Quantised linear_room;
    deeptalk::ExpertRoom experts;
    deeptalk::AttentionRoom attention;
};

namespace deeptalk {

// Quantise n rows, `stride` floats apart. False if a value is not finite.
bool quantise_rows(dt_context& c, const float* x, int n, int columns, size_t stride, int group,
                   const QuantisedRows& rows);

// y[token, head] = the head's rows of the matrix times x[token, head].
struct Product {
    const Matrix& matrix;
    int heads;
    QuantisedRows x;  // (tokens, heads) rows
    int tokens;
    float* y;
    size_t token_stride, head_stride;  // of y
};
void multiply(dt_context& c, const Product& product);

int32_t linear(dt_context& c, const Matrix& matrix, int heads, const float* x, size_t x_stride,
               int tokens, float* y, size_t token_stride, size_t head_stride);

struct Choices {
    const int64_t* ids;  // (tokens, top_k)
    const float* weights;
    int top_k;
};
// A choice of weight 0 is skipped.
int num_wanted(int tokens, const Choices& choices);
// The addresses of a layer's records. `own` are the records that every token uses with weight 1,
// after its experts.
struct Records {
    const dt_record& form;  // of all records
    const uint64_t* table;  // 0 where an expert is absent
    int num_experts;
    const uint64_t* own;
    int num_own;
};
// Adds the present experts to y (tokens, width), and `own` when none of the `num_left` remaining
// choices is left.
int32_t add_experts(dt_context& c, const Records& records, const float* x, int tokens,
                    const Choices& choices, float* y, int* num_left);

// False if a value is not finite. `row` is (latent + rope).
bool write_cache_row(const CacheShape& shape, const float* row, uint8_t* place);
// queries (tokens, heads, padded width) and mixed (tokens, heads, padded latent); the caches are
// those of one layer.
void attend(dt_context& c, const CacheShape& shape, int heads, const Pass& pass,
            const float* queries, float* mixed);

}  // namespace deeptalk
