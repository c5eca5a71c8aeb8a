#pragma once

#include <vector>

#include "context.h"

namespace deeptalk {

void check_record(const dt_record& record);

class Decoder {
  public:
    Decoder(dt_context& c, const dt_decoder_spec& spec, const dt_layer* layers);

    dt_context& context() const { return c_; }
    int32_t begin(const dt_pass& pass, const int64_t* rows, const float* features,
                  const uint8_t* audio_mask);
    int32_t run(int first, int last, const uint64_t* const* tables);
    int32_t head(float* logits);
    int32_t add_wave(int layer, const uint64_t* table);
    const int64_t* ids() const { return ids_.data(); }
    const float* weights() const { return weights_.data(); }
    const float* normed() const { return normed_.data(); }
    int tokens() const { return tokens_; }

  private:
    int qkv_width() const {
        return spec_.heads * spec_.nope + (spec_.heads + 1) * spec_.rope + spec_.latent;
    }
    int32_t to_router(int layer);
    int32_t attend_and_add(const dt_layer& l, int layer);
    int32_t absorb(const dt_matrix& key_up, size_t qkv_row, size_t query_row);
    void rotate(float* ropes, int position) const;
    void keep_last_rows();
    void norm_rows(const std::vector<float>& x, const float* weight);
    void choose(const float* router);

    dt_context& c_;
    const dt_decoder_spec spec_;
    const std::vector<dt_layer> layers_;
    const CacheShape shape_;
    dt_pass pass_{};
    int tokens_ = 0;  // under way: the last layer ends with one for each item
    int served_ = 0;        // choices of the last router that experts have answered
    bool has_own_ = false;  // the layer's own MLPs are added, which come behind all experts
    // (tokens, ...): the residual stream, and what one layer makes of it.
    std::vector<float> x_, normed_, qkv_, queries_, mixed_, values_, weights_, shares_, row_;
    std::vector<int64_t> ids_;
};

}  // namespace deeptalk
