// Matrix products over tiles of rows: linear layers, also per head.
#include <algorithm>
#include <atomic>

#include "context.h"

namespace deeptalk {

constexpr size_t kLine = 64;

QuantisedRows Quantised::reserve(const Path& path, int rows, int columns) {
    const size_t row_bytes = path.quantised_bytes(columns), row_scales = size_t(scales_of_row(columns));
    if (steps_.size() < rows * row_bytes + kLine) steps_.resize(rows * row_bytes + kLine);
    if (scales_.size() < rows * row_scales) scales_.resize(rows * row_scales);
    // Steps are whole cache lines: if weights begin at a line, no load crosses two lines.
    const size_t past_line = reinterpret_cast<uintptr_t>(steps_.data()) % kLine;
    return {steps_.data() + (kLine - past_line) % kLine, scales_.data(), row_bytes, row_scales};
}

bool quantise_rows(dt_context& c, const float* x, int n, int columns, size_t stride, int group,
                   const QuantisedRows& rows) {
    std::atomic<bool> finite{true};
    const auto part = [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
            int8_t* steps = rows.steps + i * rows.row_bytes;
            if (!c.path.quantise(x + i * stride, columns, group, steps,
                                 rows.scales + i * rows.row_scales)) {
                finite = false;
            }
        }
    };
    // Waking a thread costs more than a row or two.
    if (size_t(n) * size_t(columns) < 8192) {
        part(0, n);
    } else {
        c.pool.run_ranges(n, part);
    }
    return finite;
}

void multiply(dt_context& c, const Product& product) {
    const Matrix& matrix = product.matrix;
    const int kind = kind_of_group(matrix.group);
    const int head_rows = matrix.rows / product.heads;
    const int tile_rows = tile_rows_of(product.tokens);
    const int head_tiles = (head_rows + tile_rows - 1) / tile_rows;
    const size_t row_bytes = size_t(matrix.columns) / (matrix.group ? 2 : 1);
    const size_t row_scale_bytes = matrix.group ? size_t(matrix.columns / matrix.group) * 2 : 4;
    c.pool.run_ranges(product.heads * head_tiles, [&](int begin, int end) {
        int32_t tokens[kTileTokens];
        for (int i = begin; i < end; ++i) {
            const int head = i / head_tiles, row = i % head_tiles * tile_rows;
            const int rows = std::min(tile_rows, head_rows - row);
            const size_t at = size_t(head) * size_t(head_rows) + size_t(row);
            for (int first = 0; first < product.tokens; first += kTileTokens) {
                const int count = std::min(kTileTokens, product.tokens - first);
                for (int t = 0; t < count; ++t) tokens[t] = (first + t) * product.heads + head;
                const uint8_t* weights = matrix.weights + at * row_bytes;
                const uint8_t* scales = matrix.scales + at * row_scale_bytes;
                float* y = product.y + size_t(first) * product.token_stride +
                           size_t(head) * product.head_stride + row;
                c.path.tile[kind]({weights, scales, matrix.columns, rows, product.x, tokens, count, y,
                                   product.token_stride, weights + size_t(rows) * row_bytes});
            }
        }
    });
}

int32_t linear(dt_context& c, const Matrix& matrix, int heads, const float* x, size_t x_stride,
               int tokens, float* y, size_t token_stride, size_t head_stride) {
    const QuantisedRows rows = c.linear_room.reserve(c.path, tokens * heads, matrix.columns);
    if (!quantise_rows(c, x, tokens * heads, matrix.columns, x_stride, matrix.group, rows)) {
        return DT_NOT_FINITE;
    }
    multiply(c, {matrix, heads, rows, tokens, y, token_stride, head_stride});
    return DT_OK;
}

}  // namespace deeptalk
