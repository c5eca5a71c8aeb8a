// Checks the library's arguments before any other code reads them: sizes against limits and each
// other, spans against sizes.
//
// A decoder and a codec are checked once, when they are opened; the results have typed pointers and
// are not checked again. A call checks its own spans, with a comparison or two each.
//
// The limits keep every product of sizes within 64 bits, and tokens x heads, tokens x top_k and the
// parts of attention within 31 bits.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "deeptalk_cpu.h"
#include "path.h"

namespace deeptalk {

constexpr int kMaxThreads = 1 << 10;
constexpr int kMaxTokens = 1 << 14;     // of one call
constexpr int kMaxLayers = 1 << 12;
constexpr int kMaxHeads = 1 << 10;
constexpr int kMaxExperts = 1 << 12;    // of a layer, and its own MLPs
constexpr int kMaxRows = 1 << 28;       // of a matrix
constexpr int kMaxCodebooks = 1 << 8;
constexpr int kMaxCacheRows = 1 << 20;

struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] void refuse(const char* what, int64_t found, const std::string& wanted);
void check_range(const char* what, int64_t found, int64_t least, int64_t most);
void check_equal(const char* what, int64_t found, int64_t wanted);
struct Value {
    int64_t bytes, alignment;
};
void check_array(const char* what, const void* data, int64_t bytes, int64_t n, Value value);

// The first n values of a span. Refuses a span that is shorter or whose address is not aligned.
template <class T>
const T* array_of(const char* what, const dt_span& span, int64_t n) {
    check_array(what, span.data, span.bytes, n, {sizeof(T), alignof(T)});
    return static_cast<const T*>(span.data);
}
template <class T>
T* room_of(const char* what, const dt_room& room, int64_t n) {
    check_array(what, room.data, room.bytes, n, {sizeof(T), alignof(T)});
    return static_cast<T*>(room.data);
}

struct Matrix {
    const uint8_t *weights, *scales;
    int rows, columns, group;
};
// For `heads` heads with the same number of rows each.
Matrix checked_matrix(const std::string& name, const dt_matrix& matrix, int heads = 1);

// Returns the bytes of a record. A record is aligned like a float.
int64_t check_record(const dt_record& record);
bool is_alike(const dt_record& a, const dt_record& b);
void check_address(uint64_t record);

struct Layer {
    dt_record record, own_record;
    int64_t record_bytes;
    Matrix qkv, key_up, value_up, out;
    const float *attention_norm, *latent_norm, *mlp_norm;
    const float* router;  // null in a dense layer
    std::vector<uint64_t> own_mlps;
};
struct Model {
    const float *rope_frequencies, *final_norm;
    Matrix table, head;
    std::vector<Layer> layers;
};
Model checked_model(const dt_decoder_spec& spec);

struct CacheShape {
    int latent, rope, kind;
    int padded_latent() const { return padded(latent); }
    // int8 rows end with two scales.
    int padded_width() const { return padded_latent() + padded(kind == kBf16Rows ? rope : rope + 8); }
    size_t row_bytes() const { return size_t(padded_width()) * (kind == kBf16Rows ? 2 : 1); }

  private:
    // A multiple of every kernel's step and of a cache line.
    int padded(int n) const { return kind == kBf16Rows ? (n + 31) / 32 * 32 : (n + 127) / 128 * 128; }
};
CacheShape checked_shape(int latent, int rope, int kind);

// A checked dt_pass: its caches hold every row that it names.
struct Pass {
    const uint8_t* shared;
    uint8_t* caches[2];
    int num_items, num_rows, position, num_shared;
    int tokens() const { return num_items * num_rows; }
};
// The caches have `layers` layers of `cache_rows` rows.
Pass checked_pass(const dt_pass& pass, const CacheShape& shape, int layers, int64_t cache_rows);

// The addresses of a layer's experts, each of a record of `record_bytes`.
const uint64_t* addresses_of(const dt_table& table, int64_t n, int64_t record_bytes);

// Checks everything but the weights, which are counted as the codec reads them.
void check_codec(const dt_codec_spec& spec);

}  // namespace deeptalk
