/* The native CPU backend's C interface: what ctypes binds (runtime/backends/native_library.py).
 *
 * Letters: B items, T rows of each, N = B T tokens, K codebooks, C model width, E experts, k experts
 * of a token, V vocabulary. Arrays are dense and row-major. Every call belongs to one context and
 * one thread at a time. Pointers are the caller's and must outlive their use.
 */
#ifndef DEEPTALK_CPU_H
#define DEEPTALK_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DT_API __attribute__((visibility("default")))

enum dt_status {
    DT_OK = 0,
    DT_REFUSED = 1,       /* sizes that the kernels do not take; dt_message says which */
    DT_NOT_FINITE = 2,    /* an activation is NaN or infinite */
    DT_EXPERT_ABSENT = 3, /* the table holds 0 for an expert that a token chose */
    DT_OUT_OF_RANGE = 4   /* an id is outside its table */
};

/* A weight matrix (rows, columns), row-major: int8, or int4 as in expert_record.py. */
typedef struct {
    const void* weights;
    const void* scales; /* int8: float32 per row; int4: float16 per group of a row */
    int32_t rows, columns;
    int32_t group; /* 32, 64 or 128 weights share an int4 scale; 0 for int8 */
} dt_matrix;

/* A packed expert record: expert_record.py is its definition. */
typedef struct {
    int32_t width, ffn_width, group;
    int64_t gate_up, down, gate_up_scales, down_scales; /* byte offsets */
} dt_record;

typedef struct {
    dt_record record; /* of the routed and shared experts, or of a dense layer's one MLP */
    dt_matrix qkv;      /* C to [q_nope | q_rope, k_rope | latent], rotary halves apart */
    dt_matrix key_up;   /* per head: nope to latent */
    dt_matrix value_up; /* per head: latent to value */
    dt_matrix out;      /* heads x value to C */
    const float *attention_norm, *latent_norm, *mlp_norm;
    const float* router;      /* (E, C); null in a dense layer */
    const uint64_t* own_mlps; /* addresses of records that every token takes: shared experts, MLP */
    int32_t num_own_mlps;
} dt_layer;

typedef struct {
    int32_t width, num_layers, heads, nope, rope, value, latent;
    int32_t num_experts, top_k, normalise_top_k;
    int32_t num_codebooks, cache_kind, max_tokens;
    float norm_epsilon, softmax_scale, rope_amplitude, routed_scale;
    int64_t cache_rows;             /* capacity of one layer of a cache */
    const float* rope_frequencies;  /* (rope / 2) */
    const float* final_norm;
    dt_matrix table; /* (V, C): the embedding and the tied head */
} dt_decoder_spec;

/* B caches of (layers, capacity) rows. Rows below `num_shared` are read from `shared` instead, a cache
 * of the same shape. */
typedef struct {
    const uint8_t* shared;
    uint8_t* caches[2];
    int32_t num_items, num_rows, position, num_shared;
} dt_pass;

enum { DT_CODEC_MOST = 8 }; /* scales or blocks of a codec */

/* SNAC's decoder; spec.py's CodecSpec. */
typedef struct {
    int32_t num_scales, vq_strides[DT_CODEC_MOST];
    int32_t codebook_size, codebook_dim, latent_dim, width;
    int32_t num_blocks, rates[DT_CODEC_MOST];
    int32_t is_depthwise, has_noise;
    int64_t num_weights;
    const float* weights;
} dt_codec_spec;

/* One call of the codec's stream: docs/bundle.md, `codec`. `state` (S) is zeros at the beginning of an
 * utterance, then the `next_state` of the call before; the two may be one array. */
typedef struct {
    const int64_t* codes; /* (num_frames, K) */
    int32_t num_frames;
    int64_t position, length;
    const float* noise[DT_CODEC_MOST]; /* (num_frames x rate) for each block, with noise */
    const float* state;
    float *next_state, *pcm;
} dt_codec_call;

typedef struct dt_context dt_context;
typedef struct dt_decoder dt_decoder;
typedef struct dt_codec dt_codec;

/* The kernel paths of this build that this processor can run, the best one first; null behind the
 * last. */
DT_API const char* dt_path_name(int32_t index);

DT_API dt_context* dt_open(int32_t path, int32_t threads);
DT_API void dt_close(dt_context*);
/* Threads that compute: fewer than were asked for where the system refuses more. */
DT_API int32_t dt_threads(const dt_context*);
/* What the last refusal was about. */
DT_API const char* dt_message(const dt_context*);

/* y (N, heads x rows) from x (N, heads x columns): each head has its own `rows / heads` rows. */
DT_API int32_t dt_linear(dt_context*, const dt_matrix*, int32_t heads, const float* x, int32_t tokens,
                         float* y);

/* y (N, C) += the weighted experts of each token, ascending by id, then each of the table's last
 * `num_own` entries with weight 1. `table` holds a record's address for each expert, or 0. */
DT_API int32_t dt_moe(dt_context*, const dt_record*, const uint64_t* table, int32_t num_experts,
                      int32_t num_own, const float* x, int32_t tokens, const int64_t* ids,
                      const float* weights, int32_t top_k, float* y);

/* Bytes of one cached row; parts are padded as `attend` wants them. */
DT_API int64_t dt_cache_row_bytes(int32_t latent, int32_t rope, int32_t cache_kind);
DT_API int32_t dt_cache_write(dt_context*, int32_t latent, int32_t rope, int32_t cache_kind,
                              const float* row, uint8_t* place);
/* mixed (B T, heads, latent) from queries (B T, heads, latent + rope), scaled; row t of an item sees
 * the cache up to position + t, which is written already. */
DT_API int32_t dt_attend(dt_context*, int32_t heads, int32_t latent, int32_t rope, int32_t cache_kind,
                         const dt_pass*, const float* queries, float* mixed);

/* y = x + sin(alpha x)^2 / alpha for x (channels, samples). */
DT_API void dt_snake(dt_context*, const float* x, const float* alpha, int32_t channels,
                     int32_t samples, float* y);
/* Reads n bytes with all threads; the result only keeps compilers from leaving it out. */
DT_API int64_t dt_read(dt_context*, const uint8_t* bytes, int64_t n);

/* Null if refused. The layers are copied, what they point to is not. */
DT_API dt_decoder* dt_decoder_open(dt_context*, const dt_decoder_spec*, const dt_layer* layers);
DT_API void dt_decoder_close(dt_decoder*);
/* Embed rows (B, T, K + 1); `features` (T, C) replace the codebooks of the T rows that
 * `audio_mask` marks; both may be null. */
DT_API int32_t dt_begin(dt_decoder*, const dt_pass*, const int64_t* rows, const float* features,
                        const uint8_t* audio_mask);
/* Run stages [first, last): 2 L is layer L up to its router, 2 L + 1 its experts. `tables` has one
 * entry per layer, each of E addresses. The last layer's MLP runs for the last row of each item. */
DT_API int32_t dt_run(dt_decoder*, int32_t first, int32_t last, const uint64_t* const* tables);
/* One wave of a layer's experts: those of the table, absent ones left for other waves, which come in
 * ascending order of ids. The wave that meets the last choice adds the layer's own MLPs as well; stage
 * 2 L + 1 of dt_run then finds nothing left to do. */
DT_API int32_t dt_wave(dt_decoder*, int32_t layer, const uint64_t* table);
/* What the last router made of the tokens still under way: ids and weights (N, k), and what the
 * experts will see, (N, C). The places never change, what they hold is valid until the next call.
 * Returns N. */
DT_API int32_t dt_routed(const dt_decoder*, const int64_t** ids, const float** weights,
                         const float** normed);
/* Logits (B, V) of the last row of each item. */
DT_API int32_t dt_head(dt_decoder*, float* logits);

/* Null if refused. The weights are not copied: export/native_codec.py says how they lie. */
DT_API dt_codec* dt_codec_open(dt_context*, const dt_codec_spec*);
DT_API void dt_codec_close(dt_codec*);
DT_API int64_t dt_codec_state_size(const dt_codec*);
DT_API int32_t dt_codec_run(dt_codec*, const dt_codec_call*);

#ifdef __cplusplus
}
#endif

#endif
