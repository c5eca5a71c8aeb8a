#pragma once

#include <vector>

#include "context.h"

namespace deeptalk {

class Decoder {
  public:
    // Throws Refusal if a size or an array is impossible.
    Decoder(dt_context& c, const dt_decoder_spec& spec);

    dt_context& context() const { return c_; }
    int32_t begin(const dt_pass& pass, const dt_span& rows, const dt_span& features,
                  const dt_span& audio_mask);
    int32_t run(int first, int last, const dt_span& tables);
    int32_t head(const dt_room& logits);
    int32_t add_wave(int layer, const dt_table& table);
    std::vector<int64_t>& ids() { return ids_; }
    std::vector<float>& weights() { return weights_; }
    const std::vector<float>& normed() const { return normed_; }
    int tokens() const { return tokens_; }

  private:
    int qkv_width() const {
        return spec_.heads * spec_.nope + (spec_.heads + 1) * spec_.rope + spec_.latent;
    }
    void check_begun() const;
    int32_t to_router(int layer);
    int32_t attend_and_add(const Layer& l, int layer);
    int32_t absorb(const Matrix& key_up, size_t qkv_row, size_t query_row);
    void rotate(float* ropes, int position) const;
    void keep_last_rows();
    void norm_rows(const std::vector<float>& x, const float* weight);
    void choose(const float* router);

    dt_context& c_;
    const dt_decoder_spec spec_;  // only sizes are used; the model has the arrays
    const Model model_;
    const CacheShape shape_;
    Pass pass_{};
    int tokens_ = 0;  // in the present pass: one per item after the last layer
    int served_ = 0;        // choices of the last router whose experts have run
    bool has_own_ = false;  // whether the layer's own MLPs are added, which follow all experts
    // (tokens, ...): the residual stream and one layer's intermediate values.
    std::vector<float> x_, normed_, qkv_, queries_, mixed_, values_, weights_, shares_, row_;
    std::vector<int64_t> ids_;
};

}  // namespace deeptalk
