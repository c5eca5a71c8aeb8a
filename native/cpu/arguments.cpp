#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace deeptalk {

void refuse(const char* what, int64_t found, const std::string& wanted) {
    throw Refusal(std::string(what) + " = " + std::to_string(found) + ", expected " + wanted);
}

void check_range(const char* what, int64_t found, int64_t least, int64_t most) {
    if (found >= least && found <= most) return;
    refuse(what, found, std::to_string(least) + " to " + std::to_string(most));
}

void check_equal(const char* what, int64_t found, int64_t wanted) {
    if (found != wanted) refuse(what, found, std::to_string(wanted));
}

void check_array(const char* what, const void* data, int64_t bytes, int64_t n, Value value) {
    if (!data) bytes = 0;
    if (bytes / value.bytes < n) {
        refuse(("bytes of " + std::string(what)).c_str(), bytes,
               std::to_string(value.bytes) + " for each of " + std::to_string(n));
    }
    const auto address = reinterpret_cast<uintptr_t>(data);
    if (address % uintptr_t(value.alignment)) {
        refuse(("address of " + std::string(what)).c_str(), int64_t(address),
               "a multiple of " + std::to_string(value.alignment));
    }
}

// ---- matrices and records ----------------------------------------------------------------------

namespace {

void check_group(const std::string& what, int group) {
    if (group != 0 && group != 32 && group != 64 && group != 128) {
        refuse(what.c_str(), group, "0 for int8, or 32, 64 or 128 weights that share an int4 scale");
    }
}

// Of a matrix whose group is one of those.
void check_columns(const std::string& what, int columns, int group) {
    check_range(what.c_str(), columns, 1, kMaxColumns);
    if (group && columns % group) refuse(what.c_str(), columns, "whole groups of the int4 scale");
}

int64_t weight_bytes(int64_t rows, int columns, int group) { return rows * columns / (group ? 2 : 1); }
int64_t scale_bytes(int64_t rows, int columns, int group) {
    return group ? rows * (columns / group) * 2 : rows * 4;
}

Matrix matrix_of(const std::string& name, const dt_matrix& matrix, int64_t rows, int64_t columns) {
    check_equal((name + " rows").c_str(), matrix.rows, rows);
    check_equal((name + " columns").c_str(), matrix.columns, columns);
    return checked_matrix(name, matrix);
}

}  // namespace

Matrix checked_matrix(const std::string& name, const dt_matrix& m, int heads) {
    check_group(name + " group", m.group);
    check_columns(name + " columns", m.columns, m.group);
    check_range("heads", heads, 1, kMaxHeads);
    check_range((name + " rows").c_str(), m.rows, 1, kMaxRows);
    if (m.rows % heads) refuse((name + " rows").c_str(), m.rows, "a multiple of the number of heads");
    const std::string scales = name + " scales";
    const int64_t scales_size = scale_bytes(m.rows, m.columns, m.group);
    const void* scales_at = m.group
        ? static_cast<const void*>(array_of<uint16_t>(scales.c_str(), m.scales, scales_size / 2))
        : static_cast<const void*>(array_of<float>(scales.c_str(), m.scales, scales_size / 4));
    return {array_of<uint8_t>((name + " weights").c_str(), m.weights, weight_bytes(m.rows, m.columns, m.group)),
            static_cast<const uint8_t*>(scales_at), m.rows, m.columns, m.group};
}

int64_t check_record(const dt_record& record) {
    const int width = record.width, ffn_width = record.ffn_width, group = record.group;
    check_group("group of a record", group);
    check_columns("width of a record", width, group);
    check_columns("ffn_width of a record", ffn_width, group);
    const struct {
        const char* name;
        int64_t offset, bytes;
    } sections[] = {
        {"gate_up of a record", record.gate_up, weight_bytes(2 * ffn_width, width, group)},
        {"down of a record", record.down, weight_bytes(width, ffn_width, group)},
        {"gate_up_scales of a record", record.gate_up_scales, scale_bytes(2 * ffn_width, width, group)},
        {"down_scales of a record", record.down_scales, scale_bytes(width, ffn_width, group)},
    };
    int64_t end = 0;
    for (const auto& section : sections) {
        check_range(section.name, section.offset, 0, int64_t(1) << 32);
        if (section.offset % int64_t(sizeof(float))) refuse(section.name, section.offset, "a multiple of 4");
        end = std::max(end, section.offset + section.bytes);
    }
    return end;
}

bool is_alike(const dt_record& a, const dt_record& b) {
    const auto fields = [](const dt_record& r) {
        return std::tie(r.width, r.ffn_width, r.group, r.gate_up, r.down, r.gate_up_scales, r.down_scales);
    };
    return fields(a) == fields(b);
}

void check_address(uint64_t record) {
    if (record % sizeof(float)) refuse("address of a record", int64_t(record), "a multiple of 4");
}

// ---- the decoder -------------------------------------------------------------------------------

namespace {

void check_finite(const char* what, float found) {
    if (!std::isfinite(found)) throw Refusal(std::string(what) + " is not a finite number");
}

void check_sizes(const dt_decoder_spec& s) {
    check_range("width", s.width, 1, kMaxColumns);
    check_range("num_layers", s.num_layers, 1, kMaxLayers);
    check_range("heads", s.heads, 1, kMaxHeads);
    check_range("nope", s.nope, 1, kMaxColumns);
    check_range("value", s.value, 1, kMaxColumns);
    checked_shape(s.latent, s.rope, s.cache_kind);
    if (s.rope % 2) refuse("rope", s.rope, "an even number: values are rotated in pairs");
    check_range("num_experts", s.num_experts, 1, kMaxExperts);
    check_range("top_k", s.top_k, 1, s.num_experts);
    check_range("vocabulary", s.vocabulary, 1, kMaxRows);
    check_range("num_codebooks", s.num_codebooks, 1, kMaxCodebooks);
    check_range("max_tokens", s.max_tokens, 1, kMaxTokens);
    check_range("cache_rows", s.cache_rows, 1, kMaxCacheRows);
    check_finite("norm_epsilon", s.norm_epsilon);
    if (s.norm_epsilon < 0) throw Refusal("norm_epsilon is below 0");
    check_finite("softmax_scale", s.softmax_scale);
    check_finite("rope_amplitude", s.rope_amplitude);
    check_finite("routed_scale", s.routed_scale);
}

Layer checked_layer(const std::string& name, const dt_layer& layer, const dt_decoder_spec& s) {
    const auto floats = [&](const char* array, const dt_span& span, int64_t n) {
        return array_of<float>((name + array).c_str(), span, n);
    };
    Layer out{};
    out.record = layer.record;
    out.record_bytes = check_record(layer.record);
    check_equal("width of a record", layer.record.width, s.width);
    out.own_record = layer.own_record;
    const int64_t own_bytes = check_record(layer.own_record);
    check_equal("width of an own record", layer.own_record.width, s.width);
    const int64_t heads = s.heads;
    const int64_t qkv_rows = heads * s.nope + (heads + 1) * s.rope + s.latent;
    out.qkv = matrix_of(name + "qkv", layer.qkv, qkv_rows, s.width);
    out.key_up = matrix_of(name + "key_up", layer.key_up, heads * s.latent, s.nope);
    out.value_up = matrix_of(name + "value_up", layer.value_up, heads * s.value, s.latent);
    out.out = matrix_of(name + "out", layer.out, s.width, heads * s.value);
    out.attention_norm = floats("attention_norm", layer.attention_norm, s.width);
    out.latent_norm = floats("latent_norm", layer.latent_norm, s.latent);
    out.mlp_norm = floats("mlp_norm", layer.mlp_norm, s.width);
    if (layer.router.data) out.router = floats("router", layer.router, int64_t(s.num_experts) * s.width);
    const int64_t num_own = layer.own_mlps.data ? layer.own_mlps.bytes / int64_t(sizeof(dt_span)) : 0;
    check_range((name + "own_mlps").c_str(), num_own, 0, kMaxExperts);
    const dt_span* own = array_of<dt_span>((name + "own_mlps").c_str(), layer.own_mlps, num_own);
    for (int64_t i = 0; i < num_own; ++i) {
        const auto* mlp = array_of<uint8_t>((name + "own_mlps").c_str(), own[i], own_bytes);
        out.own_mlps.push_back(reinterpret_cast<uint64_t>(mlp));
        check_address(out.own_mlps.back());
    }
    return out;
}

}  // namespace

Model checked_model(const dt_decoder_spec& spec) {
    check_sizes(spec);
    Model model{};
    model.rope_frequencies = array_of<float>("rope_frequencies", spec.rope_frequencies, spec.rope / 2);
    for (int i = 0; i < spec.rope / 2; ++i) check_finite("rope_frequencies", model.rope_frequencies[i]);
    model.final_norm = array_of<float>("final_norm", spec.final_norm, spec.width);
    model.table = matrix_of("table", spec.table, spec.vocabulary, spec.width);
    model.head = matrix_of("head", spec.head, spec.vocabulary, spec.width);
    const dt_layer* layers = array_of<dt_layer>("layers", spec.layers, spec.num_layers);
    for (int i = 0; i < spec.num_layers; ++i) {
        model.layers.push_back(checked_layer("layers." + std::to_string(i) + ".", layers[i], spec));
    }
    return model;
}

// ---- calls -------------------------------------------------------------------------------------

CacheShape checked_shape(int latent, int rope, int kind) {
    if (kind < 0 || kind >= kNumCacheKinds) refuse("cache_kind", kind, "0 for bfloat16 or 1 for int8");
    check_range("latent", latent, 1, kMaxLatentWidth);
    check_range("rope", rope, 0, kMaxLatentWidth);
    const CacheShape shape{latent, rope, kind};
    if (shape.padded_width() > kMaxLatentWidth) {
        refuse("width of a cached row", latent + rope, "1 to 1024 with its padding");
    }
    return shape;
}

Pass checked_pass(const dt_pass& pass, const CacheShape& shape, int layers, int64_t cache_rows) {
    check_range("items", pass.num_items, 1, 2);
    check_range("rows", pass.num_rows, 1, kMaxTokens / pass.num_items);
    check_range("position", pass.position, 0, kMaxCacheRows);
    check_range("rows of a cache", pass.position + pass.num_rows, 1, cache_rows);
    check_range("shared rows", pass.num_shared, 0, pass.position);
    const int64_t cache_bytes = layers * cache_rows * int64_t(shape.row_bytes());
    Pass out{nullptr, {nullptr, nullptr}, pass.num_items, pass.num_rows, pass.position, pass.num_shared};
    const int64_t values = cache_bytes / int64_t(sizeof(uint16_t));  // also what a row begins at
    for (int i = 0; i < pass.num_items; ++i) {
        out.caches[i] = reinterpret_cast<uint8_t*>(room_of<uint16_t>("a cache", pass.caches[i], values));
    }
    if (pass.num_shared) {
        const auto* shared = array_of<uint16_t>("the shared cache", pass.shared, values);
        out.shared = reinterpret_cast<const uint8_t*>(shared);
    }
    return out;
}

const uint64_t* addresses_of(const dt_table& table, int64_t n, int64_t record_bytes) {
    if (n && table.record_bytes < record_bytes) {
        refuse("record_bytes of a table", table.record_bytes, std::to_string(record_bytes));
    }
    return array_of<uint64_t>("a table of experts", table.addresses, n);
}

// ---- the codec ---------------------------------------------------------------------------------

void check_codec(const dt_codec_spec& s) {
    constexpr int kMost = 1 << 16;
    check_range("num_scales", s.num_scales, 1, DT_CODEC_MOST);
    check_range("num_blocks", s.num_blocks, 1, DT_CODEC_MOST);
    check_range("vq_strides[0]", s.vq_strides[0], 1, 64);
    for (int i = 0; i < s.num_scales; ++i) {
        const int stride = s.vq_strides[i];
        if (stride < 1 || s.vq_strides[0] % stride) refuse("a vq_stride", stride, "a divisor of the first");
    }
    int64_t samples = s.vq_strides[0];
    for (int i = 0; i < s.num_blocks; ++i) {
        check_range("a rate", s.rates[i], 1, 64);
        samples *= s.rates[i];
    }
    check_range("samples of a frame", samples, 1, kMost);
    check_range("codebook_size", s.codebook_size, 1, kMost);
    check_range("codebook_dim", s.codebook_dim, 1, kMost);
    check_range("latent_dim", s.latent_dim, 1, kMost);
    check_range("width", s.width, 1, kMost);
    if (s.width % (1 << s.num_blocks)) refuse("width", s.width, "a multiple of 2 to the power num_blocks");
}

}  // namespace deeptalk
