// Absorbed latent attention: online softmax over blocks of cached rows.
//
// Scores of a block are computed for four heads and four rows at a time, the softmax for all heads
// together, then the latents are mixed for eight heads and two vectors at a time, so that
// arithmetic and not loads limits the speed. Int8 rows are scored in integers, with queries rounded
// to int8. Bfloat16 rows become floats two vectors at a time, with even and odd elements separate,
// which is cheapest. Queries are deinterleaved in the same way, and the mixed latents are
// interleaved at the end. If an instruction set multiplies pairs of 16 bits, two rows are mixed at
// once, with bfloat16 shares for bfloat16 rows and 15-bit shares for int8 rows. Blocks begin at the
// same rows for every caller, so the way rows were fed does not change a bit.
#pragma once

#include <algorithm>

#include "codec_kernels.h"
#include "kernels.h"

namespace {

constexpr int kBlockRows = 128;

template <class Isa>
using TwoOf = typename Isa::Two;

struct Bf16Rows {
    static constexpr bool kScaled = false;
    using Value = uint16_t;
    template <class Isa>
    using PairSum = typename Isa::Float;
    template <class Isa>
    static constexpr bool kMixesPairs = Isa::kDotsBf16;
    template <class Isa>
    static TwoOf<Isa> load_two(const Value* p) {
        return Isa::bf16_deinterleaved(p);
    }
    template <class Isa>
    static TwoOf<Isa> in_order(TwoOf<Isa> x) {
        return Isa::interleave(x);
    }
};

struct Int8Rows {
    static constexpr bool kScaled = true;
    using Value = int8_t;
    template <class Isa>
    using PairSum = typename Isa::Int;
    template <class Isa>
    static constexpr bool kMixesPairs = Isa::kDotsInt16;
    template <class Isa>
    static TwoOf<Isa> load_two(const Value* p) {
        return {Isa::int8(p), Isa::int8(p + Isa::kLanes)};
    }
    template <class Isa>
    static TwoOf<Isa> in_order(TwoOf<Isa> x) {
        return x;
    }
};

template <class Isa, class Rows>
class Attention {
    static constexpr int kHeads = 4, kRows = Isa::kRows;  // of a block of scores
    static constexpr int kRowsAhead = 8;
    static constexpr int kMixHeads = Isa::kRows == 4 ? 8 : 4, kMixVectors = 2;
    static constexpr int kParts = Rows::kScaled ? 2 : 1;  // of a row that are scored separately
    static constexpr bool kDotsBf16 = Isa::kDotsBf16 && !Rows::kScaled;
    static constexpr bool kMixesPairs = Rows::template kMixesPairs<Isa>;
    using Float = FloatOf<Isa>;
    using Int = typename Isa::Int;
    using Value = typename Rows::Value;

  public:
    explicit Attention(const Attend& call) : call_(call) {
        if constexpr (Rows::kScaled) {
            for (int head = 0; head < call.heads; ++head) {
                quantise_query(head, 0, 0, call.latent);
                quantise_query(head, 1, call.latent, call.width);
            }
        } else if constexpr (kDotsBf16) {
            for (int i = 0; i < call.heads * call.width; ++i) queries_[i] = to_bf16(call.queries[i]);
        } else {
            for (int i = 0; i < call.heads * call.width; i += 2 * Isa::kLanes) {
                const float* place = call.queries + i;
                const TwoOf<Isa> two = Isa::deinterleave({Isa::load(place), Isa::load(place + Isa::kLanes)});
                Isa::store(deinterleaved_ + i, two.a);
                Isa::store(deinterleaved_ + i + Isa::kLanes, two.b);
            }
        }
    }

    void run() {
        for (int begin = call_.begin; begin < call_.end; begin += kBlockRows) {
            num_rows_ = min_of(kBlockRows, call_.end - begin);
            for (int r = 0; r < kBlockRows; ++r) rows_[r] = row(begin + min_of(r, num_rows_ - 1));
            is_first_ = begin == call_.begin;
            const int next = begin + num_rows_;
            ahead_ = row(next);
            ahead_end_ = ahead_ + size_t(min_of(kBlockRows, call_.next_end - next)) * call_.row_bytes;
            for (int r = 0; r < num_rows_; r += kRows) {
                if (begin == 0) ask_for_rows(r + kRowsAhead);
                for (int head = 0; head < call_.heads; head += kHeads) score(head, r);
            }
            for (int head = 0; head < call_.heads; head += Isa::kLanes) softmax_block(head);
            for (int i = 0; i < call_.latent; i += kMixVectors * Isa::kLanes) {
                int head = 0;
                for (; head + kMixHeads <= call_.heads; head += kMixHeads) mix<kMixHeads>(head, i);
                for (; head < call_.heads; ++head) mix<1>(head, i);
            }
        }
    }

  private:
    const uint8_t* row(int i) const {
        return (i < call_.num_shared ? call_.shared : call_.own) + size_t(i) * call_.row_bytes;
    }
    const Value* values(int r, int i) const { return reinterpret_cast<const Value*>(rows_[r]) + i; }

    // The cache's first block has not been prefetched.
    void ask_for_rows(int first) {
        const uint8_t* line = rows_[min_of(first, num_rows_ - 1)];
        const uint8_t* end = line + kRows * call_.row_bytes;
        for (; line < end; line += 64) __builtin_prefetch(line);
    }

    // Prefetch a line of the next block, so that memory is read during arithmetic; a block is
    // larger than the L1 cache.
    void prefetch() {
        __builtin_prefetch(ahead_, 0, kIntoL2);
        ahead_ += ahead_ < ahead_end_ ? 64 : 0;
    }

    // The scale of a row's latent (part 0) or rotary key (part 1).
    float row_scale(int r, int part) const {
        float scale;
        std::memcpy(&scale, rows_[r] + call_.width - 8 + 4 * part, sizeof scale);
        return scale;
    }

    // A part of a query as int8, and the initial sums of its dot products.
    void quantise_query(int head, int part, int begin, int end) {
        const float* query = call_.queries + head * call_.width;
        Int magnitude = Isa::zero();
        for (int i = begin; i < end; i += Isa::kLanes) {
            magnitude = Isa::max_int(magnitude, Isa::magnitude_bits(Isa::load(query + i)));
        }
        alignas(64) int32_t lanes[Isa::kLanes];
        Isa::store_int(lanes, magnitude);
        const float largest = float_of_bits(uint32_t(*std::max_element(lanes, lanes + Isa::kLanes)));
        const bool is_zero = largest < 1e-30f;  // its reciprocal might overflow
        query_scales_[part][head] = is_zero ? 0.f : largest / 127.f;
        const Float inverse = Isa::splat(is_zero ? 0.f : 127.f / largest);
        int8_t* bytes = reinterpret_cast<int8_t*>(queries_) + head * call_.width;
        for (int i = begin; i < end; i += Isa::kLanes) {
            Isa::store_int(lanes, Isa::to_int(Isa::load(query + i) * inverse));
            for (int lane = 0; lane < Isa::kLanes; ++lane) bytes[i + lane] = int8_t(lanes[lane]);
        }
        std::fill_n(starts_[part][head], int(Isa::kLanes), 0);
        for (int i = begin; i < end; i += 2 * Isa::kBytes) {
            Isa::store_int(lanes, Isa::dot_of_ones(Isa::load_pair(bytes + i)));
            for (int lane = 0; lane < Isa::kLanes; ++lane) {
                starts_[part][head][lane] -= Isa::kBias8 * lanes[lane];
            }
        }
    }

    void score(int first_head, int first_row) {
        int heads[kHeads];
        for (int h = 0; h < kHeads; ++h) heads[h] = min_of(first_head + h, call_.heads - 1);
        Float sums[kHeads][kRows] = {};
        if constexpr (Rows::kScaled) {
            add_byte_products(first_row, heads, 0, 0, call_.latent, sums);
            store_scores(first_head, first_row, 0, sums);
            add_byte_products(first_row, heads, 1, call_.latent, call_.width, sums);
            store_scores(first_head, first_row, 1, sums);
            return;
        } else if constexpr (kDotsBf16) {
            for (int i = 0; i < call_.width; i += 2 * Isa::kLanes) {
                Int keys[kRows];
                for (int r = 0; r < kRows; ++r) keys[r] = Isa::words(values(first_row + r, i));
                for (int h = 0; h < kHeads; ++h) {
                    const Int query = Isa::words(queries_ + heads[h] * call_.width + i);
                    for (int r = 0; r < kRows; ++r) sums[h][r] = Isa::dot_words(sums[h][r], keys[r], query);
                }
            }
        } else {
            for (int i = 0; i < call_.width; i += 2 * Isa::kLanes) {
                TwoOf<Isa> keys[kRows];
                for (int r = 0; r < kRows; ++r) keys[r] = Isa::bf16_deinterleaved(values(first_row + r, i));
                for (int h = 0; h < kHeads; ++h) {
                    const float* query = deinterleaved_ + heads[h] * call_.width + i;
                    const Float a = Isa::load(query), b = Isa::load(query + Isa::kLanes);
                    for (int r = 0; r < kRows; ++r) sums[h][r] = Isa::fma(keys[r].a, a, sums[h][r]);
                    for (int r = 0; r < kRows; ++r) sums[h][r] = Isa::fma(keys[r].b, b, sums[h][r]);
                }
            }
        }
        store_scores(first_head, first_row, 0, sums);
    }

    // Integers below 2^24, which floats hold exactly.
    void add_byte_products(int first_row, const int* heads, int part, int begin, int end,
                           Float (&floats)[kHeads][kRows]) {
        Int sums[kHeads][kRows];
        for (int h = 0; h < kHeads; ++h) {
            for (int r = 0; r < kRows; ++r) sums[h][r] = Isa::load_int(starts_[part][heads[h]]);
        }
        for (int i = begin; i < end; i += 2 * Isa::kBytes) {
            typename Isa::Pair keys[kRows];
            for (int r = 0; r < kRows; ++r) keys[r] = Isa::weights8(rows_[first_row + r] + i);
            for (int h = 0; h < kHeads; ++h) {
                const int8_t* query = reinterpret_cast<const int8_t*>(queries_) + heads[h] * call_.width;
                const typename Isa::Pair bytes = Isa::load_pair(query + i);
                for (int r = 0; r < kRows; ++r) sums[h][r] = Isa::dot_int8(sums[h][r], keys[r], bytes);
            }
        }
        for (int h = 0; h < kHeads; ++h) {
            for (int r = 0; r < kRows; ++r) floats[h][r] = Isa::to_float(sums[h][r]);
        }
    }

    void store_scores(int first_head, int first_row, int part, const Float (&sums)[kHeads][kRows]) {
        for (int r = 0; r < kRows; ++r) {
            Isa::store_sums(scores_[part][first_row + r] + first_head, sums[0][r], sums[1][r], sums[2][r],
                            sums[3][r]);
        }
    }

    // Turns scores into softmax shares for a vector of heads, and returns the factor that rescales
    // the earlier mixed latents.
    void softmax_block(int head) {
        const Float before = is_first_ ? Isa::splat(-1e30f) : Isa::load(call_.out.maximum + head);
        Float maximum = before, total = Isa::splat(0.f), largest = total;
        for (int r = 0; r < num_rows_; ++r) {
            Float score = Isa::load(scores_[0][r] + head);
            if constexpr (Rows::kScaled) {
                const Float rotary = Isa::load(scores_[1][r] + head);
                const Float scale = Isa::load(query_scales_[0] + head) * Isa::splat(row_scale(r, 0));
                const Float rotary_scale = Isa::load(query_scales_[1] + head) * Isa::splat(row_scale(r, 1));
                score = Isa::fma(rotary, rotary_scale, score * scale);
                Isa::store(scores_[0][r] + head, score);
            }
            maximum = Isa::max(maximum, score);
        }
        for (int r = 0; r < num_rows_; ++r) {
            Float share = exp_of<Isa>(Isa::load(scores_[0][r] + head) - maximum);
            total = total + share;
            if constexpr (Rows::kScaled) share = share * Isa::splat(row_scale(r, 0));
            largest = Isa::max(largest, share);
            Isa::store(scores_[0][r] + head, share);
        }
        const Float shrink = exp_of<Isa>(before - maximum);
        Isa::store(call_.out.maximum + head, maximum);
        if (!is_first_) total = Isa::fma(Isa::load(call_.out.total + head), shrink, total);
        Isa::store(call_.out.total + head, total);
        Isa::store(shrink_ + head, shrink);
        if constexpr (kMixesPairs) pair_shares(head, largest);
    }

    // Shares of two rows side by side, 16 bits each, for `mix`; a missing second row is 0.
    void pair_shares(int head, Float largest) {
        constexpr float kSteps = 32767.f;
        largest = Isa::max(largest, Isa::splat(1e-30f));
        const Float inverse = Isa::splat(kSteps) / largest;
        Isa::store(share_steps_ + head, largest / Isa::splat(kSteps));
        for (int r = 0; r < num_rows_; r += 2) {
            Float low = Isa::load(scores_[0][r] + head), high = Isa::splat(0.f);
            if (r + 1 < num_rows_) high = Isa::load(scores_[0][r + 1] + head);
            Int pair;
            if constexpr (Rows::kScaled) {
                pair = Isa::int16_pairs(Isa::to_int(low * inverse), Isa::to_int(high * inverse));
            } else {
                pair = Isa::bf16_pairs(low, high);
            }
            Isa::store_int(pairs_[r / 2] + head, pair);
        }
    }

    // Mixes the latents' columns from i on for a few heads.
    template <int kCount>
    void mix(int first_head, int i) {
        Float sums[kCount][kMixVectors] = {};
        if constexpr (kMixesPairs) {
            add_pairs<kCount>(first_head, i, sums);
        } else {
            for (int r = 0; r < num_rows_; ++r) {
                prefetch();
                const TwoOf<Isa> latents = Rows::template load_two<Isa>(values(r, i));
                for (int h = 0; h < kCount; ++h) {
                    const Float share = Isa::splat(scores_[0][r][first_head + h]);
                    sums[h][0] = Isa::fma(latents.a, share, sums[h][0]);
                    sums[h][1] = Isa::fma(latents.b, share, sums[h][1]);
                }
            }
            for (int h = 0; h < kCount; ++h) {
                const TwoOf<Isa> two = Rows::template in_order<Isa>({sums[h][0], sums[h][1]});
                sums[h][0] = two.a;
                sums[h][1] = two.b;
            }
        }
        for (int h = 0; h < kCount; ++h) {
            float* mixed = call_.out.mixed + size_t(first_head + h) * size_t(call_.latent) + i;
            const Float shrink = Isa::splat(shrink_[first_head + h]);
            for (int v = 0; v < kMixVectors; ++v, mixed += Isa::kLanes) {
                Isa::store(mixed, is_first_ ? sums[h][v] : Isa::fma(Isa::load(mixed), shrink, sums[h][v]));
            }
        }
    }

    template <int kCount>
    void add_pairs(int first_head, int i, Float (&floats)[kCount][kMixVectors]) {
        typename Rows::template PairSum<Isa> sums[kCount][kMixVectors] = {};
        const int32_t* shares = pairs_[0] + first_head;
        for (int r = 0; r < num_rows_; r += 2, shares += kAttendHeads) {
            prefetch();
            const typename Isa::Pair latents =
                Isa::interleave(Isa::words(values(r, i)), Isa::words(values(r + 1, i)));
            for (int h = 0; h < kCount; ++h) {
                const Int share = Isa::splat_int(shares[h]);
                sums[h][0] = Isa::dot_words(sums[h][0], latents.a, share);
                sums[h][1] = Isa::dot_words(sums[h][1], latents.b, share);
            }
        }
        for (int h = 0; h < kCount; ++h) {
            for (int v = 0; v < kMixVectors; ++v) {
                if constexpr (Rows::kScaled) {
                    floats[h][v] = Isa::to_float(sums[h][v]) * Isa::splat(share_steps_[first_head + h]);
                } else {
                    floats[h][v] = sums[h][v];
                }
            }
        }
    }

    const Attend& call_;
    int num_rows_ = 0;  // of the present block
    bool is_first_ = true;
    const uint8_t* rows_[kBlockRows];
    const uint8_t *ahead_ = nullptr, *ahead_end_ = nullptr;
    alignas(64) float shrink_[kAttendHeads];
    alignas(64) float share_steps_[kAttendHeads];
    alignas(64) float query_scales_[kParts][kAttendHeads] = {};
    alignas(64) int32_t starts_[kParts][kAttendHeads][Isa::kLanes];
    alignas(64) float scores_[kParts][kBlockRows][kAttendHeads] = {};
    alignas(64) int32_t pairs_[kBlockRows / 2][kAttendHeads];
    static constexpr bool kRounds = kDotsBf16 || Rows::kScaled;  // queries, to the rows' type
    alignas(64) Value queries_[kRounds ? kAttendHeads * kMaxLatentWidth : 1];
    alignas(64) float deinterleaved_[kRounds ? 1 : kAttendHeads * kMaxLatentWidth];
};

template <class Isa, class Rows>
void attend(const Attend& call) {
    Attention<Isa, Rows>(call).run();
}

// Merges `part` into `all`; the maximum of `all` may rise.
template <class Isa>
void add_gathered(const Gathered& all, const Gathered& part, int heads, int latent) {
    alignas(64) float old_shares[kAttendHeads], new_shares[kAttendHeads];
    for (int h = 0; h < kAttendHeads; h += Isa::kLanes) {
        const FloatOf<Isa> before = Isa::load(all.maximum + h), added = Isa::load(part.maximum + h);
        const FloatOf<Isa> maximum = Isa::max(before, added);
        const FloatOf<Isa> old_share = exp_of<Isa>(before - maximum), new_share = exp_of<Isa>(added - maximum);
        Isa::store(all.maximum + h, maximum);
        const FloatOf<Isa> total = Isa::load(all.total + h) * old_share;
        Isa::store(all.total + h, Isa::fma(Isa::load(part.total + h), new_share, total));
        Isa::store(old_shares + h, old_share);
        Isa::store(new_shares + h, new_share);
    }
    for (int h = 0; h < heads; ++h) {
        const FloatOf<Isa> old_share = Isa::splat(old_shares[h]), new_share = Isa::splat(new_shares[h]);
        float* mixed = all.mixed + size_t(h) * size_t(latent);
        const float* added = part.mixed + size_t(h) * size_t(latent);
        for (int i = 0; i < latent; i += Isa::kLanes) {
            const FloatOf<Isa> sum = Isa::load(mixed + i) * old_share;
            Isa::store(mixed + i, Isa::fma(Isa::load(added + i), new_share, sum));
        }
    }
}

template <class Isa>
constexpr Path make_path(const char* name) {
    return {name,
            quantised_bytes<Isa>,
            quantise<Isa>,
            {tile<Isa, 0>, tile<Isa, 32>, tile<Isa, 64>, tile<Isa, 128>},
            {attend<Isa, Bf16Rows>, attend<Isa, Int8Rows>},
            add_gathered<Isa>,
            rms_norm<Isa>,
            silu_times_up<Isa>,
            dot_rows<Isa>,
            snake<Isa>,
            convolve<Isa>,
            convolve_depthwise<Isa>,
            read_all<Isa>};
}

}  // namespace
