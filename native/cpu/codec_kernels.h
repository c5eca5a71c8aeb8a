// SNAC's kernels, written once for every instruction set. Values are time-major: a row holds one
// sample's channels, so every convolution is a product of rows, and all kernels run along channels.
//
// The order of an output's sum does not depend on other rows: any cut of the stream and any number
// of threads give the same samples to the bit.
#pragma once

#include "kernels.h"

namespace {

// y + sin(alpha y)^2 / alpha, each channel with its own alpha.
template <class Isa>
FloatOf<Isa> snaked_of(FloatOf<Isa> y, const BiasSnake& bias_snake, int channel) {
    return snake_of<Isa>(y, Isa::load(bias_snake.alpha + channel), Isa::load(bias_snake.inverse + channel));
}

// R rows times V vectors of a panel's columns.
template <class Isa, int R, int V>
void convolve_block(const Convolution& c, int row, int column) {
    constexpr int L = Isa::kLanes;
    FloatOf<Isa> sums[R][V];
    for (int v = 0; v < V; ++v) {
        for (int r = 0; r < R; ++r) sums[r][v] = Isa::load(c.bias_snake.bias + column + v * L);
    }
    const float* w = c.panel + column;
    for (int tap = 0; tap < c.taps; ++tap) {
        const float* x = c.x + size_t(row) * c.row_step + size_t(tap) * c.tap_step;
        for (int i = 0; i < c.channels; ++i, w += kPanelColumns) {
            __builtin_prefetch(w + 16 * kPanelColumns);
            FloatOf<Isa> weights[V];
            for (int v = 0; v < V; ++v) weights[v] = Isa::load(w + v * L);
            for (int r = 0; r < R; ++r) {
                const FloatOf<Isa> value = Isa::splat(x[size_t(r) * c.row_step + i]);
                for (int v = 0; v < V; ++v) sums[r][v] = Isa::fma(value, weights[v], sums[r][v]);
            }
        }
    }
    for (int v = 0; v < V; ++v, column += L) {
        const int part = min_of(L, c.columns - column);
        for (int r = 0; r < R && part > 0; ++r) {
            const size_t at = size_t(row + r) * c.out_step + size_t(column);
            FloatOf<Isa> y = sums[r][v];
            if (c.gain) y = y * Isa::splat(c.gain[row + r]);
            if (c.skip) y = y + load_at<Isa>(c.skip + at, 0, part);
            if (c.y) store_at<Isa>(c.y + at, 0, y, part);
            if (c.snaked) store_at<Isa>(c.snaked + at, 0, snaked_of<Isa>(y, c.bias_snake, column), part);
        }
    }
}

template <class Isa, int R, int V>
void convolve_rows(const Convolution& c, int row, int column) {
    for (; row + R <= c.num_rows; row += R) convolve_block<Isa, R, V>(c, row, column);
    if constexpr (R > 1) convolve_rows<Isa, R / 2, V>(c, row, column);
}

template <class Isa>
void convolve(const Convolution& c) {
    // The number of sums that fit the registers together with a panel's weights.
    constexpr int kVectors = Isa::kLanes == 4 ? 4 : 2, kRows = 4 * Isa::kRows / kVectors;
    int column = 0;
    for (; c.columns - column > Isa::kLanes; column += kVectors * Isa::kLanes) {
        convolve_rows<Isa, kRows, kVectors>(c, 0, column);
    }
    if (column < c.columns) convolve_rows<Isa, kRows, 1>(c, 0, column);
}

template <class Isa>
void convolve_depthwise(const Depthwise& d) {
    const size_t channels = size_t(d.channels);
    for (int row = d.begin; row < d.end; ++row) {
        const float* x = d.x + size_t(row) * channels;
        for_vectors<Isa>(d.channels, [&](int i, int part) {
            FloatOf<Isa> sum = Isa::load(d.bias_snake.bias + i);
            for (int tap = 0; tap < kCodecTaps; ++tap) {
                sum = Isa::fma(load_at<Isa>(x + size_t(tap) * d.tap_step, i, part),
                               load_at<Isa>(d.weights + size_t(tap) * channels, i, part), sum);
            }
            if (d.bias_snake.alpha) sum = snaked_of<Isa>(sum, d.bias_snake, i);
            store_at<Isa>(d.y + size_t(row) * channels, i, sum, part);
        });
    }
}

}  // namespace
