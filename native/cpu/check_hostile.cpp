// Hostile arguments with real arrays: a small decoder of one dense and one routed layer, and a
// small codec, with fields set to values that no valid file has.
//
// Lengths are only made shorter: the library must trust the caller that an array has its stated
// length.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "check.h"

namespace {

std::mt19937 engine(11);

size_t below(size_t n) { return size_t(engine() % n); }

// A field of a structure and its original value.
struct Field {
    enum Kind { kInt32, kInt64, kFloat, kSpan } kind;
    void* at;
};

template <class T>
T read(const void* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
template <class T>
void write(void* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

std::vector<int64_t> hostile_integers(int64_t found, bool is_wide) {
    const int64_t most = std::numeric_limits<int32_t>::max();
    std::vector<int64_t> values{0,         1,         -1,        2,       33,      found - 1, found + 1,
                                2 * found, 1 << 14,   1 << 20,   1 << 30, most,    -most - 1};
    if (is_wide) values.insert(values.end(), {most + 1, int64_t(1) << 50, int64_t(1) << 62, -(int64_t(1) << 62)});
    return values;
}

std::vector<dt_span> hostile_spans(const dt_span& found) {
    std::vector<dt_span> spans;
    for (int64_t bytes : {int64_t(0), int64_t(1), found.bytes / 2, found.bytes - 1, found.bytes - 8, int64_t(-1)}) {
        if (bytes < found.bytes) spans.push_back({found.data, bytes});
    }
    spans.push_back({nullptr, found.bytes});
    spans.push_back({nullptr, 0});
    if (found.bytes > 1) spans.push_back({static_cast<const char*>(found.data) + 1, found.bytes - 1});
    return spans;
}

// Sets a field to each of its hostile values in turn, and back.
template <class Try>
void for_each_value(const Field& field, Try attempt) {
    if (field.kind == Field::kInt32) {
        const auto found = read<int32_t>(field.at);
        for (int64_t value : hostile_integers(found, false)) write(field.at, int32_t(value)), attempt();
        write(field.at, found);
    } else if (field.kind == Field::kInt64) {
        const auto found = read<int64_t>(field.at);
        for (int64_t value : hostile_integers(found, true)) write(field.at, value), attempt();
        write(field.at, found);
    } else if (field.kind == Field::kFloat) {
        const auto found = read<float>(field.at);
        for (float value : {0.f, -1.f, NAN, INFINITY, -INFINITY, 3e38f}) write(field.at, value), attempt();
        write(field.at, found);
    } else {
        const auto found = read<dt_span>(field.at);
        for (const dt_span& value : hostile_spans(found)) write(field.at, value), attempt();
        write(field.at, found);
    }
}

// The same for up to three fields at once, with one random value each.
template <class Try>
void with_some(const std::vector<Field>& fields, int depth, Try attempt) {
    if (depth == 0) return attempt();
    int which = 0;
    const int chosen = int(below(6));
    for_each_value(fields[below(fields.size())], [&] {
        if (which++ == chosen) with_some(fields, depth - 1, attempt);
    });
}

class Fields {
  public:
    void integer(int32_t& field) { fields_.push_back({Field::kInt32, &field}); }
    void integer(int64_t& field) { fields_.push_back({Field::kInt64, &field}); }
    void number(float& field) { fields_.push_back({Field::kFloat, &field}); }
    void span(dt_span& field) { fields_.push_back({Field::kSpan, &field}); }
    void room(dt_room& field) { fields_.push_back({Field::kSpan, &field}); }  // laid out alike
    void matrix(dt_matrix& m) {
        span(m.weights), span(m.scales), integer(m.rows), integer(m.columns), integer(m.group);
    }
    void record(dt_record& r) {
        integer(r.width), integer(r.ffn_width), integer(r.group);
        integer(r.gate_up), integer(r.down), integer(r.gate_up_scales), integer(r.down_scales);
    }
    void pass(dt_pass& p) {
        integer(p.num_items), integer(p.num_rows), integer(p.position), integer(p.num_shared);
        span(p.shared), room(p.caches[0]), room(p.caches[1]);
    }
    const std::vector<Field>& all() const { return fields_; }

  private:
    std::vector<Field> fields_;
};

// Owns arrays, each in a separate allocation.
class Arrays {
  public:
    dt_span floats(size_t n) {
        floats_.emplace_back(n);
        for (float& value : floats_.back()) value = float(int(below(201)) - 100) / 400.f;
        return span(floats_.back());
    }
    dt_span bytes(size_t n) {
        bytes_.emplace_back(n);
        for (uint8_t& value : bytes_.back()) value = uint8_t(below(256));
        return span(bytes_.back());
    }
    dt_span halves(size_t n) {  // 2^-7
        halves_.emplace_back(n, uint16_t(0x2000));
        return span(halves_.back());
    }
    dt_matrix matrix(int rows, int columns, int group) {
        const size_t n = size_t(rows) * size_t(columns);
        const dt_span scales = group ? halves(n / size_t(group)) : floats(size_t(rows));
        return {bytes(group ? n / 2 : n), scales, rows, columns, group};
    }

  private:
    std::vector<std::vector<float>> floats_;
    std::vector<std::vector<uint8_t>> bytes_;
    std::vector<std::vector<uint16_t>> halves_;
};

// ---- the decoder -------------------------------------------------------------------------------

constexpr int kTokens = 3, kLayers = 2;

// Valid arguments to open a decoder and run a pass.
struct Decoding {
    Arrays arrays;
    dt_decoder_spec spec{};
    std::vector<dt_layer> layers;
    std::vector<dt_span> own_mlps[kLayers];
    std::vector<std::vector<uint64_t>> addresses;
    std::vector<dt_table> tables;
    std::vector<uint8_t> caches[2];
    std::vector<int64_t> rows;
    std::vector<uint8_t> mask;
    std::vector<float> logits;
    dt_pass pass{};
    dt_span row_span{}, features{}, mask_span{}, table_span{};
    dt_room logit_room{};
    int32_t first_stage = 0, last_stage = 2 * kLayers;

    Decoding(dt_context* c, int group, int kind) {
        set_sizes(kind);
        for (int i = 0; i < kLayers; ++i) layers.push_back(layer(group, i));
        spec.layers = span(layers);
        spec.rope_frequencies = arrays.floats(size_t(spec.rope / 2));
        spec.final_norm = arrays.floats(size_t(spec.width));
        spec.table = arrays.matrix(spec.vocabulary, spec.width, group);
        spec.head = arrays.matrix(spec.vocabulary, spec.width, group);
        table_span = span(tables);
        const size_t row_bytes = size_t(dt_cache_row_bytes(c, spec.latent, spec.rope, kind));
        for (auto& cache : caches) cache.resize(size_t(kLayers) * size_t(spec.cache_rows) * row_bytes);
        pass = {span(caches[0]), {room(caches[0]), room(caches[1])}, 2, kTokens, 4, 2};
        const size_t width = size_t(spec.width), columns = size_t(spec.num_codebooks) + 1;
        for (size_t i = 0; i < 2 * kTokens * columns; ++i) rows.push_back(int64_t(below(size_t(spec.vocabulary))));
        row_span = span(rows);
        mask = {1, 0, 1};
        mask_span = span(mask);
        features = arrays.floats(kTokens * width);
        logits.resize(2 * size_t(spec.vocabulary));
        logit_room = room(logits);
    }

    void set_sizes(int kind) {
        spec.width = 64, spec.num_layers = kLayers, spec.heads = 3, spec.nope = 32, spec.rope = 6;
        spec.value = 64, spec.latent = 32, spec.num_experts = 3, spec.top_k = 2, spec.normalise_top_k = 1;
        spec.vocabulary = 21, spec.num_codebooks = 2, spec.cache_kind = kind, spec.max_tokens = 2 * kTokens;
        spec.norm_epsilon = 1e-6f, spec.softmax_scale = 0.2f, spec.rope_amplitude = 1.f, spec.routed_scale = 1.f;
        spec.cache_rows = 8;
    }

    dt_layer layer(int group, int index) {
        const int width = spec.width, heads = spec.heads;
        const size_t w = size_t(width);
        dt_layer l{};
        const dt_span record = this->record(l.record, group, index == 0 ? 96 : 64);
        l.own_record = l.record;
        own_mlps[index] = {record, record};
        l.own_mlps = span(own_mlps[index]);
        l.qkv = arrays.matrix(heads * spec.nope + (heads + 1) * spec.rope + spec.latent, width, group);
        l.key_up = arrays.matrix(heads * spec.latent, spec.nope, group);
        l.value_up = arrays.matrix(heads * spec.value, spec.latent, group);
        l.out = arrays.matrix(width, heads * spec.value, group);
        l.attention_norm = arrays.floats(w), l.mlp_norm = arrays.floats(w);
        l.latent_norm = arrays.floats(size_t(spec.latent));
        addresses.emplace_back();
        if (index > 0) {
            l.router = arrays.floats(size_t(spec.num_experts) * w);
            addresses.back().assign(size_t(spec.num_experts), reinterpret_cast<uint64_t>(record.data));
        }
        tables.push_back({span(addresses.back()), record.bytes});
        return l;
    }

    // A record whose scales read as 1 in half precision or as about 2^-7 in float.
    dt_span record(dt_record& form, int group, int ffn_width) {
        const int64_t n = int64_t(spec.width) * ffn_width, weights = group ? n / 2 : n;
        const int64_t gate_scales = group ? 2 * n / group * 2 : 2 * ffn_width * 4;
        form = {spec.width, ffn_width, group, 0, 2 * weights, 3 * weights, 3 * weights + gate_scales};
        const int64_t end = form.down_scales + (group ? n / group * 2 : spec.width * 4);
        const dt_span bytes = arrays.bytes(size_t(end));
        auto* scale = static_cast<uint8_t*>(const_cast<void*>(bytes.data));
        for (int64_t i = form.gate_up_scales; i < end; ++i) scale[i] = i % 2 ? 0x3c : 0;
        return bytes;
    }

    std::vector<Field> opening() {
        Fields f;
        for (int32_t* size : {&spec.width, &spec.num_layers, &spec.heads, &spec.nope, &spec.rope, &spec.value,
                              &spec.latent, &spec.num_experts, &spec.top_k, &spec.normalise_top_k,
                              &spec.vocabulary, &spec.num_codebooks, &spec.cache_kind, &spec.max_tokens}) {
            f.integer(*size);
        }
        f.integer(spec.cache_rows);
        for (float* number : {&spec.norm_epsilon, &spec.softmax_scale, &spec.rope_amplitude, &spec.routed_scale}) {
            f.number(*number);
        }
        f.span(spec.rope_frequencies), f.span(spec.final_norm), f.span(spec.layers), f.matrix(spec.table), f.matrix(spec.head);
        for (dt_layer& l : layers) {
            f.record(l.record), f.record(l.own_record);
            for (dt_matrix* m : {&l.qkv, &l.key_up, &l.value_up, &l.out}) f.matrix(*m);
            for (dt_span* s : {&l.attention_norm, &l.latent_norm, &l.mlp_norm, &l.router, &l.own_mlps}) f.span(*s);
        }
        for (auto& mlps : own_mlps) f.span(mlps[0]), f.span(mlps[1]);
        return f.all();
    }

    std::vector<Field> calling() {
        Fields f;
        f.pass(pass);
        f.span(row_span), f.span(features), f.span(mask_span), f.span(table_span), f.room(logit_room);
        f.integer(first_stage), f.integer(last_stage);
        for (dt_table& table : tables) f.span(table.addresses), f.integer(table.record_bytes);
        return f.all();
    }
};

void expect_reason(dt_context* c, int32_t status, const char* path) {
    expect(status >= DT_OK && status <= DT_OUT_OF_RANGE, "a call returns a status", path, status);
    if (status == DT_REFUSED) expect(*dt_message(c) != 0, "a refusal says why", path, status);
}

// Runs a whole pass, ignoring refusals, then waves and a head out of order.
void run_pass(dt_context* c, dt_decoder* decoder, const char* path, Decoding& d) {
    const auto call = [&](int32_t status) { expect_reason(c, status, path); };
    dt_room ids{}, weights{};
    dt_span normed{};
    call(dt_wave(decoder, 1, &d.tables[1]));
    call(dt_begin(decoder, &d.pass, d.row_span, d.features, d.mask_span));
    call(dt_run(decoder, d.first_stage, d.last_stage, d.table_span));
    const int32_t tokens = dt_routed(decoder, &ids, &weights, &normed);
    expect(tokens <= d.spec.max_tokens, "no more tokens than max_tokens", path, tokens);
    call(dt_wave(decoder, d.first_stage, &d.tables[1]));
    call(dt_head(decoder, d.logit_room));
}

void try_decoder(dt_context* c, const char* path, Decoding& d) {
    dt_decoder* decoder = dt_decoder_open(c, &d.spec);
    if (!decoder) return expect_reason(c, DT_REFUSED, path);
    run_pass(c, decoder, path, d);
    dt_decoder_close(decoder);
}

// Logits of the unchanged decoder.
std::vector<float> logits_of(dt_context* c, const char* path, Decoding& d) {
    for (auto& cache : d.caches) std::fill(cache.begin(), cache.end(), uint8_t(0));  // passes wrote to them
    dt_decoder* decoder = dt_decoder_open(c, &d.spec);
    expect(decoder != nullptr, dt_message(c), path, 0);
    int32_t status = dt_begin(decoder, &d.pass, d.row_span, d.features, d.mask_span);
    if (status == DT_OK) status = dt_run(decoder, 0, 2 * kLayers, d.table_span);
    if (status == DT_OK) status = dt_head(decoder, d.logit_room);
    expect(status == DT_OK, "a valid decoder runs", path, status);
    dt_decoder_close(decoder);
    return d.logits;
}

void check_decoder(dt_context* c, const char* path, int group, int kind, int rounds) {
    Decoding d(c, group, kind);
    const std::vector<float> expected = logits_of(c, path, d);
    const auto attempt = [&] { try_decoder(c, path, d); };
    for (const Field& field : d.opening()) for_each_value(field, attempt);
    dt_decoder* decoder = dt_decoder_open(c, &d.spec);
    for (const Field& field : d.calling()) for_each_value(field, [&] { run_pass(c, decoder, path, d); });
    for (uint64_t& address : d.addresses[1]) {
        const uint64_t found = address;
        for (uint64_t value : {uint64_t(0), found + 1}) address = value, run_pass(c, decoder, path, d);
        address = found;
    }
    dt_decoder_close(decoder);
    std::vector<Field> all = d.opening();
    for (const Field& field : d.calling()) all.push_back(field);
    for (int i = 0; i < rounds; ++i) with_some(all, 1 + int(below(3)), attempt);
    expect(logits_of(c, path, d) == expected, "hostile calls do not change later results", path, group);
}

// ---- the codec ---------------------------------------------------------------------------------

struct Coding {
    Arrays arrays;
    dt_codec_spec spec{};
    std::vector<int64_t> codes;
    std::vector<float> state, next_state, pcm;
    dt_codec_call call{};

    Coding(dt_context* c, bool is_depthwise) {
        spec.num_scales = 2, spec.vq_strides[0] = 2, spec.vq_strides[1] = 1;
        spec.codebook_size = 5, spec.codebook_dim = 3, spec.latent_dim = 4, spec.width = 8;
        spec.num_blocks = 2, spec.rates[0] = 3, spec.rates[1] = 2;
        spec.is_depthwise = is_depthwise, spec.has_noise = 1;
        spec.weights = arrays.floats(size_t(num_weights(c)));
        dt_codec* codec = dt_codec_open(c, &spec);
        state.resize(size_t(dt_codec_state_size(codec)));
        dt_codec_close(codec);
        next_state = state;
        const size_t frames = 5;  // more than one piece
        codes.assign(3 * frames, 1);
        pcm.resize(frames * 12);
        call = {span(codes), int32_t(frames), 0, 4, {}, span(state), room(next_state), room(pcm)};
        call.noise[0] = arrays.floats(frames * 6), call.noise[1] = arrays.floats(frames * 12);
    }

    // Finds the right number of weights; opening does not read them.
    int64_t num_weights(dt_context* c) {
        std::vector<float> room_for_many(1 << 14);
        dt_codec* codec = nullptr;
        for (spec.weights = span(room_for_many.data(), 0); !codec; codec = dt_codec_open(c, &spec)) {
            spec.weights.bytes += 64;
        }
        dt_codec_close(codec);
        return spec.weights.bytes / 4;
    }

    std::vector<Field> fields() {
        Fields f;
        for (int32_t* size : {&spec.num_scales, &spec.codebook_size, &spec.codebook_dim, &spec.latent_dim,
                              &spec.width, &spec.num_blocks, &spec.is_depthwise, &spec.has_noise,
                              &spec.vq_strides[0], &spec.vq_strides[1], &spec.rates[0], &spec.rates[1]}) {
            f.integer(*size);
        }
        f.span(spec.weights);
        f.integer(call.num_frames), f.integer(call.position), f.integer(call.length);
        for (dt_span* s : {&call.codes, &call.noise[0], &call.noise[1], &call.state}) f.span(*s);
        f.room(call.next_state), f.room(call.pcm), f.integer(codes[0]), f.integer(codes[14]);
        return f.all();
    }
};

void check_codec(dt_context* c, const char* path, bool is_depthwise, int rounds) {
    Coding coding(c, is_depthwise);
    const auto attempt = [&] {
        dt_codec* codec = dt_codec_open(c, &coding.spec);
        if (!codec) return expect_reason(c, DT_REFUSED, path);
        expect_reason(c, dt_codec_run(codec, &coding.call), path);
        dt_codec_close(codec);
    };
    for (const Field& field : coding.fields()) for_each_value(field, attempt);
    for (int i = 0; i < rounds; ++i) with_some(coding.fields(), 1 + int(below(3)), attempt);
}

// ---- single kernels ----------------------------------------------------------------------------

void check_kernels(dt_context* c, const char* path) {
    Arrays arrays;
    std::vector<float> y(3 * 20);
    dt_matrix matrix = arrays.matrix(20, 64, 32);
    dt_span x = arrays.floats(3 * 64), query = arrays.floats(2 * 2 * 20);
    dt_room out = room(y);
    std::vector<uint8_t> cache(size_t(5 * dt_cache_row_bytes(c, 16, 4, 1)));
    dt_pass pass{{}, {room(cache), {}}, 1, 2, 3, 0};
    int32_t heads = 1, tokens = 3, latent = 16, rope = 4, kind = 1, two = 2;
    Fields f;
    f.matrix(matrix), f.span(x), f.span(query), f.room(out), f.pass(pass);
    for (int32_t* size : {&heads, &tokens, &latent, &rope, &kind, &two}) f.integer(*size);
    for (const Field& field : f.all()) {
        for_each_value(field, [&] {
            expect_reason(c, dt_linear(c, &matrix, heads, x, tokens, out), path);
            expect_reason(c, dt_cache_write(c, latent, rope, kind, query, pass.caches[0]), path);
            expect_reason(c, dt_attend(c, two, latent, rope, kind, &pass, query, out), path);
            expect_reason(c, dt_snake(c, x, query, tokens, latent, out), path);
            dt_cache_row_bytes(c, latent, rope, kind);
            dt_read(c, x);
        });
    }
}

}  // namespace

void check_hostile(dt_context* c, const char* path, int rounds) {
    check_decoder(c, path, 0, 1, rounds);
    check_decoder(c, path, 32, 0, rounds);
    for (bool is_depthwise : {false, true}) check_codec(c, path, is_depthwise, rounds);
    check_kernels(c, path);
}
