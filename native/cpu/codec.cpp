// Each piece of a few frames runs through all layers before the next piece; `decode` has the
// structure of export/graphs/codec.py.
#include "codec.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace deeptalk {

constexpr int kPieceFrames = 4;  // decoded at once: bounds the memory
constexpr int kMaxFrames = 1 << 20;  // of one call
constexpr int kSliceRows = 64;   // of a product: they stay in the L2 cache for all its columns
constexpr int kDilations[] = {1, 3, 9};
constexpr size_t kLineFloats = 16;
constexpr int64_t kNever = int64_t(1) << 40;  // frames
constexpr int64_t kMostValues = 1 << 24;      // between two layers: bounds the memory

namespace {

size_t rounded_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

}  // namespace

void Codec::Rows::reserve(size_t history, size_t values) {
    history = rounded_up(history, kLineFloats);
    room.resize(history + values + kLineFloats);
    const size_t past_line = reinterpret_cast<uintptr_t>(room.data()) / sizeof(float) % kLineFloats;
    first = room.data() + history + (kLineFloats - past_line) % kLineFloats;
}

Codec::Codec(dt_context& context, const dt_codec_spec& spec)
    : context_(context), spec_(spec) {
    check_codec(spec);
    const int64_t num_weights = spec.weights.bytes / int64_t(sizeof(float));
    next_ = array_of<float>("weights", spec.weights, num_weights);
    end_ = next_ + num_weights;
    frame_samples_ = spec.vq_strides[0];
    for (int i = 0; i < spec.num_blocks; ++i) frame_samples_ *= spec.rates[i];
    for (int i = 0; i < spec.num_scales; ++i) frame_codes_ += spec.vq_strides[0] / spec.vq_strides[i];
    const size_t table = size_t(spec.codebook_size) * size_t(spec.codebook_dim);
    for (int i = 0; i < spec.num_scales; ++i) tables_.push_back(take(table));
    const int found = spec.num_scales * spec.codebook_dim;
    latent_ = take_layer(1, found, spec.latent_dim, false);
    const int history = kCodecTaps - 1;
    if (spec.is_depthwise) deep_ = take_wide(1, spec.latent_dim, false);
    first_ = take_layer(spec.is_depthwise ? 1 : kCodecTaps, spec.latent_dim, spec.width, true);
    size_t kept = size_t(history) * size_t(spec.latent_dim);
    state_size_ = kept;
    size_t channels = size_t(spec.width), rows = size_t(spec.vq_strides[0]), delay = history / 2;
    size_t values = rows * std::max({size_t(found), size_t(spec.latent_dim), channels});
    for (int i = 0; i < spec.num_blocks; ++i) {
        Block block;
        const size_t rate = size_t(spec.rates[i]);
        state_size_ += channels;
        kept = std::max(kept, channels);
        channels /= 2, rows *= rate, delay = delay * rate + (rate + 1) / 2;
        const int width = int(channels);
        block.up = take_layer(2, 2 * width, spec.rates[i] * width, !spec.has_noise);
        if (spec.has_noise) {
            block.noise = take_layer(1, width, width, true);
            noise_.reserve(delay, rows * kPieceFrames);
            state_size_ += delay;
        }
        for (int unit = 0; unit < 3; ++unit) {
            const size_t reach = size_t(kDilations[unit] * history / 2);
            block.units[unit].wide = take_wide(kDilations[unit], width, true);
            block.units[unit].point = take_layer(1, width, width, true);
            state_size_ += 3 * reach * channels;
            kept = std::max(kept, 2 * reach * channels);
            delay += reach;
        }
        values = std::max(values, rows * channels);
        blocks_.push_back(block);
    }
    state_size_ += size_t(history) * channels;
    last_weights_ = take(size_t(kCodecTaps) * channels);
    last_bias_ = take(1);
    if (next_ != end_) refuse("bytes of weights", spec.weights.bytes, "exactly those of the codec's sizes");
    check_range("values between two layers", int64_t(values) * kPieceFrames, 1, kMostValues);
    for (Rows* buffer : {&x_[0], &x_[1], &snaked_[0], &snaked_[1], &between_}) {
        buffer->reserve(kept, values * kPieceFrames);
    }
}

// Returns the next n weights; every array begins at a cache line.
const float* Codec::take(size_t n) {
    const size_t left = size_t(end_ - next_);
    if (left < rounded_up(n, kLineFloats)) refuse("bytes of weights", spec_.weights.bytes, "more");
    const float* taken = next_;
    next_ += rounded_up(n, kLineFloats);
    return taken;
}

BiasSnake Codec::take_bias_snake(int columns, bool has_snake) {
    const size_t padded = rounded_up(size_t(columns), kPanelColumns);
    BiasSnake bias_snake{take(padded), nullptr, nullptr};
    if (has_snake) bias_snake.alpha = take(padded), bias_snake.inverse = take(padded);
    return bias_snake;
}

Codec::Layer Codec::take_layer(int taps, int channels, int columns, bool has_snake) {
    const size_t padded = rounded_up(size_t(columns), kPanelColumns);
    const float* weights = take(size_t(taps) * size_t(channels) * padded);
    return {taps, 1, channels, columns, false, weights, take_bias_snake(columns, has_snake)};
}

Codec::Layer Codec::take_wide(int dilation, int channels, bool has_snake) {
    if (!spec_.is_depthwise) {
        Layer layer = take_layer(kCodecTaps, channels, channels, has_snake);
        layer.dilation = dilation;
        return layer;
    }
    const float* weights = take(size_t(kCodecTaps) * size_t(channels));
    return {kCodecTaps, dilation, channels, channels, true, weights, take_bias_snake(channels, has_snake)};
}

Codec::Frames Codec::checked(const dt_codec_call& call) const {
    check_range("num_frames", call.num_frames, 1, kMaxFrames);
    check_range("position", call.position, 0, kNever);
    check_range("length", call.length, 0, std::numeric_limits<int64_t>::max());
    const int64_t frames = call.num_frames, state_size = int64_t(state_size_);
    Frames out{};
    out.codes = array_of<int64_t>("codes", call.codes, frames * frame_codes_);
    for (int64_t i = 0, rate = spec_.vq_strides[0]; spec_.has_noise && i < spec_.num_blocks; ++i) {
        rate *= spec_.rates[i];
        out.noise[i] = array_of<float>("noise", call.noise[i], frames * rate);
    }
    out.state = array_of<float>("state", call.state, state_size);
    out.next_state = room_of<float>("next_state", call.next_state, state_size);
    out.pcm = room_of<float>("pcm", call.pcm, frames * frame_samples_);
    return out;
}

int32_t Codec::run(const dt_codec_call& call) {
    const Frames frames = checked(call);
    length_ = std::min(call.length, kNever);
    const int64_t present = std::clamp<int64_t>(length_ - call.position, 0, call.num_frames);
    for (int64_t i = 0; i < present * frame_codes_; ++i) {
        if (frames.codes[i] < 0 || frames.codes[i] >= spec_.codebook_size) return DT_OUT_OF_RANGE;
    }
    state_ = frames.state;
    for (int first = 0; first < call.num_frames; first += kPieceFrames) {
        num_frames_ = std::min(kPieceFrames, call.num_frames - first);
        position_ = call.position + first;
        next_state_ = frames.next_state;
        decode(frames, first);
        state_ = frames.next_state;
    }
    return DT_OK;
}

void Codec::decode(const Frames& frames, int first_frame) {
    float* pcm = frames.pcm + size_t(first_frame) * size_t(frame_samples_);
    float *x = x_[0].first, *other_x = x_[1].first, *between = between_.first;
    float *snaked = snaked_[0].first, *other_snaked = snaked_[1].first;
    constexpr int kHistory = kCodecTaps - 1;

    clock_ = {spec_.vq_strides[0], 0};
    look_up(frames.codes + size_t(first_frame) * size_t(frame_codes_), between);
    apply(latent_, between, num_rows(), {nullptr, nullptr, x, nullptr});
    silence_outside(x, spec_.latent_dim);
    const float* past = with_history(x, kHistory, spec_.latent_dim);
    if (spec_.is_depthwise) {
        apply(deep_, past, num_rows(), {nullptr, nullptr, between, nullptr});
        past = between;
    }
    apply(first_, past, num_rows(), {nullptr, nullptr, nullptr, snaked});
    clock_.delay += kHistory / 2;
    silence_outside(snaked, spec_.width);

    int channels = spec_.width;
    for (int i = 0; i < spec_.num_blocks; ++i) {
        const Block& block = blocks_[size_t(i)];
        past = with_history(snaked, 1, channels);
        apply(block.up, past, num_rows(), {nullptr, nullptr, x, spec_.has_noise ? nullptr : other_snaked});
        std::swap(snaked, other_snaked);
        channels /= 2;
        const int rate = spec_.rates[i];
        clock_ = {clock_.rate * rate, clock_.delay * rate + (rate + 1) / 2};
        silence_outside(x, channels);
        if (spec_.has_noise) {
            const float* noise = frames.noise[i] + size_t(first_frame) * size_t(clock_.rate);
            std::copy_n(noise, num_rows(), noise_.first);
            const float* gain = with_history(noise_.first, clock_.delay, 1);
            apply(block.noise, x, num_rows(), {x, gain, other_x, snaked});
            std::swap(x, other_x);
        } else {
            silence_outside(snaked, channels);
        }
        for (int unit = 0; unit < 3; ++unit) {
            const int reach = kDilations[unit] * kHistory / 2;
            past = with_history(snaked, 2 * reach, channels);
            apply(block.units[unit].wide, past, num_rows(), {nullptr, nullptr, nullptr, between});
            const float* skip = with_history(x, reach, channels);
            float* y = unit < 2 ? other_x : nullptr;  // the next block reads only the snake
            apply(block.units[unit].point, between, num_rows(), {skip, nullptr, y, snaked});
            clock_.delay += reach;
            silence_outside(other_x, channels);
            silence_outside(snaked, channels);
            std::swap(x, other_x);
        }
    }
    past = with_history(snaked, kHistory, channels);
    clock_.delay += kHistory / 2;
    context_.pool.run_ranges(num_rows(), [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            const float* window = past + size_t(row) * size_t(channels);
            context_.path.dot_rows(last_weights_, 1, kCodecTaps * channels, window, pcm + row);
            pcm[row] = std::tanh(pcm[row] + *last_bias_);
        }
    });
    silence_outside(pcm, 1);
}

// Puts the codebook rows of all scales side by side, (rows, scales x codebook_dim).
void Codec::look_up(const int64_t* codes, float* rows) const {
    const int stride = spec_.vq_strides[0], width = spec_.codebook_dim;
    for (int frame = 0; frame < num_frames_; ++frame) {
        const bool is_absent = position_ + frame >= length_;
        for (int scale = 0; scale < spec_.num_scales; ++scale) {
            const int repeats = spec_.vq_strides[scale];
            for (int row = 0; row < stride; ++row) {
                const int64_t code = is_absent ? 0 : codes[row / repeats];
                const float* found = tables_[size_t(scale)] + code * width;
                const int at = (frame * stride + row) * spec_.num_scales + scale;
                std::copy_n(found, width, rows + size_t(at) * size_t(width));
            }
            codes += stride / repeats;
        }
    }
}

// `x` is the first input row of the first output.
void Codec::apply(const Layer& layer, const float* x, int rows, const Ending& ending) {
    const size_t channels = size_t(layer.channels), columns = size_t(layer.columns);
    const size_t tap_step = size_t(layer.dilation) * channels;
    if (layer.is_depthwise) {
        float* y = ending.snaked ? ending.snaked : ending.y;
        context_.pool.run_ranges(rows, [&](int begin, int end) {
            context_.path.convolve_depthwise(
                {x, tap_step, layer.weights, layer.bias_snake, layer.channels, begin, end, y});
        });
        return;
    }
    const int panels = (layer.columns + kPanelColumns - 1) / kPanelColumns;
    const int slices = (rows + kSliceRows - 1) / kSliceRows;
    const auto at = [](auto* p, size_t i) { return p ? p + i : nullptr; };
    context_.pool.run_ranges(slices * panels, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
            const int row = i / panels * kSliceRows, column = i % panels * kPanelColumns;
            const size_t out = size_t(row) * columns + size_t(column);
            const BiasSnake& bias_snake = layer.bias_snake;
            Convolution part{};
            part.x = x + size_t(row) * channels;
            part.row_step = channels, part.tap_step = tap_step;
            part.taps = layer.taps, part.channels = layer.channels;
            part.panel = layer.weights + size_t(column) * size_t(layer.taps) * channels;
            part.bias_snake = {at(bias_snake.bias, size_t(column)), at(bias_snake.alpha, size_t(column)),
                         at(bias_snake.inverse, size_t(column))};
            part.num_rows = std::min(kSliceRows, rows - row);
            part.columns = std::min(kPanelColumns, layer.columns - column);
            part.out_step = columns;
            part.skip = at(ending.skip, out), part.gain = at(ending.gain, size_t(row));
            part.y = at(ending.y, out), part.snaked = at(ending.snaked, out);
            context_.path.convolve(part);
        }
    });
}

// Copies the last samples of earlier calls in front of the rows and saves the last samples of these
// rows; returns the start of the history.
const float* Codec::with_history(float* rows, int samples, int channels) {
    const size_t size = size_t(samples) * size_t(channels);
    float* begin = rows - size;
    std::copy_n(state_, size, begin);
    std::copy_n(begin + size_t(num_rows()) * size_t(channels), size, next_state_);
    state_ += size, next_state_ += size;
    return begin;
}

// Zeroes samples before the first or after the last sample of the utterance.
void Codec::silence_outside(float* rows, int channels) const {
    const int64_t first = position_ * clock_.rate - clock_.delay;
    const int64_t begin = std::clamp<int64_t>(-first, 0, num_rows());
    const int64_t end = std::clamp<int64_t>(length_ * clock_.rate - first, begin, num_rows());
    std::fill(rows, rows + begin * channels, 0.f);
    std::fill(rows + end * channels, rows + int64_t(num_rows()) * channels, 0.f);
}

}  // namespace deeptalk
