// SNAC's streaming decoder in float32, like export/graphs/codec.py: a convolution keeps the samples
// to its left, and its right-hand samples delay its output.
//
// Values are time-major, (samples, channels). The caller keeps the state of a stream, which is as
// large as the graph's; the decoder itself holds no stream.
#pragma once

#include <vector>

#include "context.h"

namespace deeptalk {

class Codec {
  public:
    // Throws Refusal if a size is impossible, or the number of weights does not match the sizes.
    Codec(dt_context& context, const dt_codec_spec& spec);

    dt_context& context() { return context_; }
    size_t state_size() const { return state_size_; }
    int32_t run(const dt_codec_call& call);

  private:
    // A product of `taps` rows of `channels`, `dilation` apart, or a depthwise one.
    struct Layer {
        int taps, dilation, channels, columns;
        bool is_depthwise;
        const float* weights;
        BiasSnake bias_snake;  // alpha and inverse of the following snake, if there is one
    };
    struct Unit {
        Layer wide, point;
    };
    struct Block {
        Layer up, noise;
        Unit units[3];
    };
    // Outputs computed from a layer's sums; null leaves one out.
    struct Ending {
        const float* skip;
        const float* gain;
        float* y;
        float* snaked;
    };
    // Rows of values, with space for the history before them.
    struct Rows {
        std::vector<float> room;
        float* first = nullptr;
        void reserve(size_t history, size_t values);
    };
    struct Clock {
        int rate, delay;  // in samples per frame, and in samples
    };

    const float* take(size_t n);
    Layer take_layer(int taps, int channels, int columns, bool has_snake);
    Layer take_wide(int dilation, int channels, bool has_snake);
    BiasSnake take_bias_snake(int columns, bool has_snake);

    // A call's arrays, each sized by its frames.
    struct Frames {
        const int64_t* codes;
        const float *noise[DT_CODEC_MOST], *state;
        float *next_state, *pcm;
    };
    Frames checked(const dt_codec_call& call) const;
    void decode(const Frames& frames, int first_frame);
    void look_up(const int64_t* codes, float* rows) const;
    void apply(const Layer& layer, const float* x, int rows, const Ending& ending);
    const float* with_history(float* rows, int samples, int channels);
    void silence_outside(float* rows, int channels) const;
    int num_rows() const { return clock_.rate * num_frames_; }

    dt_context& context_;
    const dt_codec_spec spec_;
    const float *next_, *end_;  // weights not read yet
    std::vector<const float*> tables_;
    Layer latent_{}, deep_{}, first_{};
    std::vector<Block> blocks_;
    const float *last_weights_, *last_bias_;
    size_t state_size_ = 0;
    int frame_codes_ = 0, frame_samples_ = 0;
    Rows x_[2], snaked_[2], between_, noise_;

    // Of the present call.
    Clock clock_{};
    int num_frames_ = 0;
    int64_t position_ = 0, length_ = 0;
    const float* state_ = nullptr;
    float* next_state_ = nullptr;
};

}  // namespace deeptalk
