// Absorbed latent attention: online softmax over blocks of cached rows.
//
// A block's scores are found for four heads and four rows at a time, then its latents are mixed for
// eight heads and two vectors at a time, so that arithmetic, not loads, sets the pace. Blocks begin
// at the same rows for every caller: how rows were fed does not change a bit.
#pragma once

#include "kernels.h"

namespace {

constexpr int kBlockRows = 32;

struct Bf16Rows {
    template <class Isa>
    static FloatOf<Isa> load(const uint8_t* row, int i) {
        return Isa::bf16(reinterpret_cast<const uint16_t*>(row) + i);
    }
    static constexpr bool kScaled = false;
};

struct Int8Rows {
    template <class Isa>
    static FloatOf<Isa> load(const uint8_t* row, int i) {
        return Isa::int8(reinterpret_cast<const int8_t*>(row) + i);
    }
    static constexpr bool kScaled = true;
};

// The scale of a row's latent (part 0) or rotary key (part 1).
inline float row_scale(const uint8_t* row, int width, int part) {
    float scale;
    std::memcpy(&scale, row + width + part * sizeof scale, sizeof scale);
    return scale;
}

template <class Isa, class Rows>
class Attention {
    static constexpr int kHeads = 4, kRows = Isa::kRows;  // of a block of scores
    static constexpr bool kDotsBf16 = Isa::kDotsBf16 && !Rows::kScaled;
    using Float = FloatOf<Isa>;

  public:
    explicit Attention(const Attend& call) : call_(call) {
        if (!kDotsBf16) return;
        for (int i = 0; i < call.heads * call.width; ++i) queries_[i] = to_bf16(call.queries[i]);
    }

    void run() {
        for (begin_ = call_.begin; begin_ < call_.end; begin_ += kBlockRows) {
            num_rows_ = min_of(kBlockRows, call_.end - begin_);
            for (int head = 0; head < call_.heads; head += kHeads) {
                for (int row = 0; row < num_rows_; row += kRows) score(head, row);
            }
            for (int head = 0; head < call_.heads; ++head) soften(head);
            int head = 0;
            for (; head + kMixHeads <= call_.heads; head += kMixHeads) mix<kMixHeads>(head);
            for (; head < call_.heads; ++head) mix<1>(head);
        }
    }

  private:
    static constexpr int kMixHeads = Isa::kRows == 4 ? 8 : 4, kMixVectors = 2;

    const uint8_t* row(int i) const {
        const int at = begin_ + min_of(i, num_rows_ - 1);
        return (at < call_.num_shared ? call_.shared : call_.own) + size_t(at) * call_.row_bytes;
    }

    void score(int first_head, int first_row) {
        const uint8_t* rows[kRows];
        int heads[kHeads];
        for (int r = 0; r < kRows; ++r) rows[r] = row(first_row + r);
        for (int h = 0; h < kHeads; ++h) heads[h] = min_of(first_head + h, call_.heads - 1);
        Float sums[kHeads][kRows] = {};
        if constexpr (kDotsBf16) {
            for (int i = 0; i < call_.width; i += 2 * Isa::kLanes) {
                typename Isa::Bf16Pairs keys[kRows];
                for (int r = 0; r < kRows; ++r) {
                    keys[r] = Isa::load_bf16_pairs(reinterpret_cast<const uint16_t*>(rows[r]) + i);
                }
                for (int h = 0; h < kHeads; ++h) {
                    const auto query = Isa::load_bf16_pairs(queries_ + heads[h] * call_.width + i);
                    for (int r = 0; r < kRows; ++r) sums[h][r] = Isa::dot_bf16(sums[h][r], keys[r], query);
                }
            }
        } else if constexpr (Rows::kScaled) {
            add_products(rows, heads, 0, call_.latent, sums);
            for (int r = 0; r < kRows; ++r) {
                const float ratio = row_scale(rows[r], call_.width, 0);
                for (int h = 0; h < kHeads; ++h) sums[h][r] = sums[h][r] * Isa::splat(ratio);
            }
            Float rotary[kHeads][kRows] = {};
            add_products(rows, heads, call_.latent, call_.width, rotary);
            for (int r = 0; r < kRows; ++r) {
                const Float scale = Isa::splat(row_scale(rows[r], call_.width, 1));
                for (int h = 0; h < kHeads; ++h) {
                    sums[h][r] = Isa::fma(rotary[h][r], scale, sums[h][r]);
                }
            }
        } else {
            add_products(rows, heads, 0, call_.width, sums);
        }
        for (int h = 0; h < kHeads; ++h) {
            float* scores = scores_[first_head + h] + first_row;
            if constexpr (kRows == 4) {
                Isa::store_sums(scores, sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
            } else {
                for (int r = 0; r < kRows; ++r) scores[r] = Isa::sum(sums[h][r]);
            }
        }
    }

    void add_products(const uint8_t* const* rows, const int* heads, int begin, int end,
                      Float (&sums)[kHeads][kRows]) {
        for (int i = begin; i < end; i += Isa::kLanes) {
            Float keys[kRows];
            for (int r = 0; r < kRows; ++r) keys[r] = Rows::template load<Isa>(rows[r], i);
            for (int h = 0; h < kHeads; ++h) {
                const Float query = Isa::load(call_.queries + heads[h] * call_.width + i);
                for (int r = 0; r < kRows; ++r) sums[h][r] = Isa::fma(keys[r], query, sums[h][r]);
            }
        }
    }

    // Scores to shares of the softmax, and the factor by which what was mixed before shrinks.
    void soften(int head) {
        float* scores = scores_[head];
        float maximum = call_.maximum[head];
        for (int r = 0; r < num_rows_; ++r) maximum = scores[r] > maximum ? scores[r] : maximum;
        shrink_[head] = expf(call_.maximum[head] - maximum);
        for (int r = num_rows_; r < kBlockRows; ++r) scores[r] = 0.f;
        Float total = Isa::splat(0.f);
        for (int r = 0; r < kBlockRows; r += Isa::kLanes) {
            const Float share = exp_of<Isa>(Isa::load(scores + r) - Isa::splat(maximum));
            Isa::store(scores + r, share);
        }
        for (int r = num_rows_; r < kBlockRows; ++r) scores[r] = 0.f;
        for (int r = 0; r < kBlockRows; r += Isa::kLanes) total = total + Isa::load(scores + r);
        call_.total[head] = call_.total[head] * shrink_[head] + Isa::sum(total);
        call_.maximum[head] = maximum;
        for (int r = 0; r < num_rows_ && Rows::kScaled; ++r) {
            scores[r] *= row_scale(row(r), call_.width, 0);
        }
    }

    template <int kCount>
    void mix(int first_head) {
        for (int i = 0; i < call_.latent; i += kMixVectors * Isa::kLanes) {
            Float sums[kCount][kMixVectors];
            for (int h = 0; h < kCount; ++h) {
                const float* mixed = call_.mixed + size_t(first_head + h) * call_.latent + i;
                const Float shrink = Isa::splat(shrink_[first_head + h]);
                for (int v = 0; v < kMixVectors; ++v) {
                    sums[h][v] = Isa::load(mixed + v * Isa::kLanes) * shrink;
                }
            }
            for (int r = 0; r < num_rows_; ++r) {
                const uint8_t* at = row(r);
                Float latents[kMixVectors];
                for (int v = 0; v < kMixVectors; ++v) {
                    latents[v] = Rows::template load<Isa>(at, i + v * Isa::kLanes);
                }
                for (int h = 0; h < kCount; ++h) {
                    const Float share = Isa::splat(scores_[first_head + h][r]);
                    for (int v = 0; v < kMixVectors; ++v) {
                        sums[h][v] = Isa::fma(latents[v], share, sums[h][v]);
                    }
                }
            }
            for (int h = 0; h < kCount; ++h) {
                float* mixed = call_.mixed + size_t(first_head + h) * call_.latent + i;
                for (int v = 0; v < kMixVectors; ++v) Isa::store(mixed + v * Isa::kLanes, sums[h][v]);
            }
        }
    }

    const Attend& call_;
    int begin_ = 0, num_rows_ = 0;
    float shrink_[kAttendHeads];
    alignas(64) float scores_[kAttendHeads + kHeads][kBlockRows];
    alignas(64) uint16_t queries_[kDotsBf16 ? kAttendHeads * kMaxLatentWidth : 1];
};

template <class Isa, class Rows>
void attend(const Attend& call) {
    Attention<Isa, Rows>(call).run();
}

template <class Isa>
constexpr Path make_path(const char* name) {
    return {name,
            quantised_bytes<Isa>,
            quantise<Isa>,
            {tile<Isa, 0>, tile<Isa, 32>, tile<Isa, 64>, tile<Isa, 128>},
            {attend<Isa, Bf16Rows>, attend<Isa, Int8Rows>},
            rms_norm<Isa>,
            silu_times_up<Isa>,
            dot_rows<Isa>,
            snake<Isa>,
            read_all<Isa>};
}

}  // namespace
