// The decoder in stages: a layer up to its router, then its experts.
//
// Attention is absorbed (export/graphs/decoder.py has the algebra); the softmax scale is in the
// queries.
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"

namespace deeptalk {
namespace {

constexpr float kLatentNormEpsilon = 1e-6f;  // spec.LATENT_NORM_EPS, not norm_epsilon

// sum (columns) += a row of the matrix.
void add_row(const Matrix& m, int64_t row, float* sum) {
    const size_t columns = size_t(m.columns);
    if (!m.group) {
        const int8_t* weights = reinterpret_cast<const int8_t*>(m.weights) + size_t(row) * columns;
        const float scale = reinterpret_cast<const float*>(m.scales)[row];
        for (size_t i = 0; i < columns; ++i) sum[i] += float(weights[i]) * scale;
        return;
    }
    const uint8_t* weights = m.weights + size_t(row) * columns / 2;
    const size_t groups = columns / size_t(m.group);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(m.scales) + size_t(row) * groups;
    for (size_t g = 0; g < groups; ++g) {
        const float scale = half_bits_to_float(scales[g]);
        for (size_t i = g * size_t(m.group); i < (g + 1) * size_t(m.group); i += 2) {
            const uint8_t both = weights[i / 2];
            sum[i] += float((both & 15) - 8) * scale;
            sum[i + 1] += float(int8_t(both) >> 4) * scale;
        }
    }
}

}  // namespace

Decoder::Decoder(dt_context& c, const dt_decoder_spec& spec)
    : c_(c), spec_(spec), model_(checked_model(spec)), shape_{spec.latent, spec.rope, spec.cache_kind} {
    const size_t n = size_t(spec.max_tokens), h = size_t(spec.heads);
    x_.resize(n * size_t(spec.width));
    normed_.resize(x_.size());
    qkv_.resize(n * size_t(qkv_width()));
    queries_.resize(n * h * size_t(shape_.padded_width()));
    mixed_.resize(n * h * size_t(shape_.padded_latent()));
    values_.resize(n * h * size_t(spec.value));
    row_.resize(size_t(spec.latent + spec.rope));
    ids_.resize(n * size_t(spec.top_k));
    weights_.resize(ids_.size());
    shares_.resize(n * size_t(spec.num_experts));
}

int32_t Decoder::begin(const dt_pass& pass, const dt_span& row_span, const dt_span& feature_span,
                       const dt_span& mask_span) {
    const Pass where = checked_pass(pass, shape_, spec_.num_layers, spec_.cache_rows);
    const int tokens = where.tokens(), columns = spec_.num_codebooks + 1;
    check_range("tokens", tokens, 1, spec_.max_tokens);
    const int64_t* rows = array_of<int64_t>("rows", row_span, int64_t(tokens) * columns);
    const int marked = mask_span.data ? where.num_rows : 0;
    const uint8_t* audio_mask = array_of<uint8_t>("audio_mask", mask_span, marked);
    const float* features = array_of<float>("features", feature_span, int64_t(marked) * spec_.width);
    for (int i = 0; i < tokens * columns; ++i) {
        if (rows[i] < 0 || rows[i] >= model_.table.rows) return DT_OUT_OF_RANGE;
    }
    pass_ = where;
    tokens_ = tokens;
    const size_t width = size_t(spec_.width);
    for (int n = 0; n < tokens; ++n) {
        float* x = &x_[size_t(n) * width];
        const int row = n % where.num_rows;
        const bool is_heard = audio_mask && audio_mask[row];
        std::fill_n(x, width, 0.f);
        for (int i = is_heard ? columns - 1 : 0; i < columns; ++i) {
            add_row(model_.table, rows[n * columns + i], x);
        }
        const float heard = is_heard ? float(spec_.num_codebooks) : 0.f;
        for (size_t i = 0; i < width; ++i) {
            if (is_heard) x[i] += heard * features[size_t(row) * width + i];
            x[i] /= float(columns);
        }
    }
    return DT_OK;
}

int32_t Decoder::run(int first, int last, const dt_span& table_span) {
    check_begun();
    check_range("the last stage", last, 0, 2 * spec_.num_layers);
    check_range("the first stage", first, 0, last);
    const dt_table* tables = array_of<dt_table>("tables", table_span, spec_.num_layers);
    for (int stage = first; stage < last; ++stage) {
        const int layer = stage / 2;
        const int32_t status = stage % 2 ? add_wave(layer, tables[layer]) : to_router(layer);
        if (status != DT_OK) return status;
        if (stage % 2 && !has_own_) return DT_EXPERT_ABSENT;
    }
    return DT_OK;
}

void Decoder::check_begun() const {
    if (tokens_ == 0) throw Refusal("no pass was begun");
}

int32_t Decoder::to_router(int layer) {
    const Layer& l = model_.layers[size_t(layer)];
    norm_rows(x_, l.attention_norm);
    int32_t status = attend_and_add(l, layer);
    if (status != DT_OK) return status;
    if (layer == spec_.num_layers - 1) keep_last_rows();
    norm_rows(x_, l.mlp_norm);
    if (l.router) choose(l.router);
    served_ = 0;
    has_own_ = false;
    return DT_OK;
}

int32_t Decoder::attend_and_add(const Layer& l, int layer) {
    const int heads = spec_.heads, width = spec_.width, padded = shape_.padded_width();
    const int nope_width = heads * spec_.nope;
    const size_t w = size_t(width), row = size_t(qkv_width());
    int32_t status = linear(c_, l.qkv, 1, normed_.data(), w, tokens_, qkv_.data(), row, 0);
    if (status != DT_OK) return status;
    Pass pass = pass_;
    const size_t layer_at = size_t(layer) * size_t(spec_.cache_rows) * shape_.row_bytes();
    for (int item = 0; item < pass.num_items; ++item) pass.caches[item] += layer_at;
    if (pass.shared) pass.shared += layer_at;
    for (int n = 0; n < tokens_; ++n) {
        const int position = pass.position + n % pass.num_rows;
        float* ropes = &qkv_[size_t(n) * row + size_t(nope_width)];
        rotate(ropes, position);
        float* latent = ropes + (heads + 1) * spec_.rope;
        c_.path.rms_norm(latent, l.latent_norm, spec_.latent, kLatentNormEpsilon, row_.data());
        std::copy_n(ropes + heads * spec_.rope, spec_.rope, row_.data() + spec_.latent);
        uint8_t* cache = pass.caches[n / pass.num_rows];
        if (!write_cache_row(shape_, row_.data(), cache + size_t(position) * shape_.row_bytes())) {
            return DT_NOT_FINITE;
        }
    }
    // Queries: key_up of the part without rotation, then the rotary part, both scaled.
    const size_t query_row = size_t(heads) * size_t(padded);
    status = absorb(l.key_up, row, query_row);
    if (status != DT_OK) return status;
    for (int n = 0; n < tokens_; ++n) {
        const float* ropes = &qkv_[size_t(n) * row + size_t(nope_width)];
        for (int h = 0; h < heads; ++h) {
            float* query = &queries_[size_t(n) * query_row + size_t(h) * size_t(padded)];
            const float* rope = ropes + h * spec_.rope;
            for (int i = 0; i < spec_.latent; ++i) query[i] *= spec_.softmax_scale;
            float* turned = query + shape_.padded_latent();
            for (int i = 0; i < spec_.rope; ++i) turned[i] = rope[i] * spec_.softmax_scale;
        }
    }
    attend(c_, shape_, heads, pass, queries_.data(), mixed_.data());
    const size_t value_row = size_t(heads) * size_t(spec_.value);
    status = linear(c_, l.value_up, heads, mixed_.data(), size_t(shape_.padded_latent()), tokens_,
                    values_.data(), value_row, size_t(spec_.value));
    if (status != DT_OK) return status;
    status = linear(c_, l.out, 1, values_.data(), value_row, tokens_, normed_.data(), w, 0);
    for (size_t i = 0; i < size_t(tokens_) * w; ++i) x_[i] += normed_[i];
    return status;
}

// queries = key_up times the heads' nope parts, which are side by side in a row of qkv.
int32_t Decoder::absorb(const Matrix& key_up, size_t qkv_row, size_t query_row) {
    const int heads = spec_.heads;
    const QuantisedRows rows = c_.linear_room.reserve(c_.path, tokens_ * heads, spec_.nope);
    for (int n = 0; n < tokens_; ++n) {
        QuantisedRows own = rows;
        own.steps += size_t(n * heads) * rows.row_bytes;
        own.scales += size_t(n * heads) * rows.row_scales;
        const float* nope = &qkv_[size_t(n) * qkv_row];
        if (!quantise_rows(c_, nope, heads, spec_.nope, size_t(spec_.nope), key_up.group, own)) {
            return DT_NOT_FINITE;
        }
    }
    multiply(c_, {key_up, heads, rows, tokens_, queries_.data(), query_row, size_t(shape_.padded_width())});
    return DT_OK;
}

// Rotates all heads' queries and the one key, `rope` values each, in two halves.
void Decoder::rotate(float* ropes, int position) const {
    const int half = spec_.rope / 2;
    for (int i = 0; i < half; ++i) {
        const float angle = float(position) * model_.rope_frequencies[i];
        const float cos = std::cos(angle) * spec_.rope_amplitude;
        const float sin = std::sin(angle) * spec_.rope_amplitude;
        for (int h = 0; h <= spec_.heads; ++h) {
            float* pair = ropes + h * spec_.rope + i;
            const float a = pair[0], b = pair[half];
            pair[0] = a * cos - b * sin;
            pair[half] = b * cos + a * sin;
        }
    }
}

// No later stage reads the last layer's other rows.
void Decoder::keep_last_rows() {
    const size_t width = size_t(spec_.width);
    for (int item = 0; item < pass_.num_items; ++item) {
        const size_t last = size_t((item + 1) * pass_.num_rows - 1);
        std::memmove(&x_[size_t(item) * width], &x_[last * width], width * sizeof(float));
    }
    tokens_ = pass_.num_items;
}

void Decoder::norm_rows(const std::vector<float>& x, const float* weight) {
    const size_t width = size_t(spec_.width);
    for (size_t at = 0; at < size_t(tokens_) * width; at += width) {
        c_.path.rms_norm(&x[at], weight, spec_.width, spec_.norm_epsilon, &normed_[at]);
    }
}

// Softmax over all experts, then the best `top_k`; of equal ones the lower id first.
void Decoder::choose(const float* router) {
    const int experts = spec_.num_experts, top_k = spec_.top_k;
    const size_t width = size_t(spec_.width);
    c_.pool.run_ranges(experts, [&](int begin, int end) {
        for (int n = 0; n < tokens_; ++n) {
            c_.path.dot_rows(router + size_t(begin) * width, end - begin, spec_.width,
                             &normed_[size_t(n) * width], &shares_[size_t(n * experts + begin)]);
        }
    });
    for (int n = 0; n < tokens_; ++n) {
        float* shares = &shares_[size_t(n * experts)];
        const float largest = *std::max_element(shares, shares + experts);
        float total = 0.f, chosen_total = 0.f;
        for (int e = 0; e < experts; ++e) total += shares[e] = std::exp(shares[e] - largest);
        int64_t* ids = &ids_[size_t(n * top_k)];
        float* weights = &weights_[size_t(n * top_k)];
        for (int k = 0; k < top_k; ++k) {
            ids[k] = std::max_element(shares, shares + experts) - shares;
            weights[k] = shares[ids[k]] / total;
            chosen_total += weights[k];
            shares[ids[k]] = -1.f;
        }
        const bool normalises = spec_.normalise_top_k && top_k > 1;
        const float factor = normalises ? 1.f / chosen_total : spec_.routed_scale;
        for (int k = 0; k < top_k; ++k) weights[k] *= factor;
    }
}

int32_t Decoder::add_wave(int layer, const dt_table& table) {
    check_begun();
    check_range("layer", layer, 0, spec_.num_layers - 1);
    const Layer& l = model_.layers[size_t(layer)];
    const int num_experts = l.router ? spec_.num_experts : 0;
    const uint64_t* addresses = addresses_of(table, num_experts, l.record_bytes);
    if (has_own_) return DT_OK;
    // One pass if all records have one form; own records of another form need a second pass.
    const bool in_one_pass = is_alike(l.record, l.own_record);
    const int num_own = int(l.own_mlps.size());
    const Records records{l.record, addresses, num_experts, l.own_mlps.data(), in_one_pass ? num_own : 0};
    const Choices choices{ids_.data(), weights_.data(), l.router ? spec_.top_k : 0};
    const int wanted = num_wanted(tokens_, choices);  // the caller may have dropped choices
    int num_left = wanted - served_;
    int32_t status = add_experts(c_, records, normed_.data(), tokens_, choices, x_.data(), &num_left);
    served_ = wanted - num_left;
    has_own_ = num_left == 0;
    if (status == DT_OK && has_own_ && !in_one_pass && num_own) {
        const Records own{l.own_record, nullptr, 0, l.own_mlps.data(), num_own};
        status = add_experts(c_, own, normed_.data(), tokens_, Choices{nullptr, nullptr, 0}, x_.data(), &num_left);
    }
    return status;
}

int32_t Decoder::head(const dt_room& logits) {
    check_begun();
    const size_t rows = size_t(model_.head.rows);
    float* out = room_of<float>("logits", logits, tokens_ * int64_t(rows));
    norm_rows(x_, model_.final_norm);
    return linear(c_, model_.head, 1, normed_.data(), size_t(spec_.width), tokens_, out, rows, 0);
}

}  // namespace deeptalk
