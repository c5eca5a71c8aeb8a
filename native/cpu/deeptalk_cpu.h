/* The CPU backend's C interface, which runtime/backends/cpu/library.py binds by ctypes.
 *
 * Letters: B items, T rows of each, N = B T tokens, K codebooks, C model width, E experts, k experts
 * of a token, V vocabulary. Arrays are dense and row-major. Every call belongs to one context and
 * one thread at a time. Memory is the caller's and must outlive its use.
 *
 * Every array is passed as a span, a pointer with its length. A call refuses sizes that do not agree and
 * spans that are too short, before it reads or writes any of them: arguments.h. Spans may be longer than
 * needed.
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

/* An array to read, or one to write (dt_room). Null means that the array is left out. */
typedef struct {
    const void* data;
    int64_t bytes;
} dt_span;
typedef struct {
    void* data;
    int64_t bytes;
} dt_room;

/* A weight matrix (rows, columns), row-major: int8, or int4 as in expert_record.py. */
typedef struct {
    dt_span weights;
    dt_span scales; /* int8: float32 per row; int4: float16 per group of a row */
    int32_t rows, columns;
    int32_t group; /* 32, 64 or 128 weights share an int4 scale; 0 for int8 */
} dt_matrix;

/* A packed expert record, as expert_record.py defines it. */
typedef struct {
    int32_t width, ffn_width, group;
    int64_t gate_up, down, gate_up_scales, down_scales; /* byte offsets */
} dt_record;

/* The addresses of the records of a layer's experts, 0 for absent ones. */
typedef struct {
    dt_span addresses;    /* uint64 */
    int64_t record_bytes; /* readable at each address */
} dt_table;

typedef struct {
    dt_record record;     /* of the routed experts; in a dense layer as `own_record` */
    dt_record own_record; /* of `own_mlps`; may be of another precision */
    dt_matrix qkv;      /* C to [q_nope | q_rope, k_rope | latent], rotary halves apart */
    dt_matrix key_up;   /* per head: nope to latent */
    dt_matrix value_up; /* per head: latent to value */
    dt_matrix out;      /* heads x value to C */
    dt_span attention_norm, latent_norm, mlp_norm; /* float32 */
    dt_span router;   /* float32 (E, C); null in a dense layer */
    dt_span own_mlps; /* dt_span each: records that every token uses, shared experts or the MLP */
} dt_layer;

typedef struct {
    int32_t width, num_layers, heads, nope, rope, value, latent;
    /* The weights of a token's experts are divided by their sum if `normalise_top_k` is set and
     * top_k is 2 or more; else `routed_scale` multiplies them. */
    int32_t num_experts, top_k, normalise_top_k;
    int32_t vocabulary, num_codebooks, cache_kind, max_tokens;
    float norm_epsilon, softmax_scale, rope_amplitude, routed_scale;
    int64_t cache_rows;       /* capacity of one layer of a cache */
    dt_span rope_frequencies; /* float32 (rope / 2) */
    dt_span final_norm;       /* float32 (C) */
    dt_matrix table;          /* (V, C): the embedding */
    dt_matrix head;           /* (V, C); the same arrays as `table` if the head is tied */
    dt_span layers;           /* (L) dt_layer */
} dt_decoder_spec;

/* B caches of (layers, capacity) rows. Rows below `num_shared` are read from `shared` instead, a cache
 * of the same shape. */
typedef struct {
    dt_span shared;
    dt_room caches[2];
    int32_t num_items, num_rows, position, num_shared;
} dt_pass;

enum { DT_CODEC_MOST = 8 }; /* scales or blocks of a codec */

/* SNAC's decoder; spec.py's CodecSpec. */
typedef struct {
    int32_t num_scales, vq_strides[DT_CODEC_MOST];
    int32_t codebook_size, codebook_dim, latent_dim, width;
    int32_t num_blocks, rates[DT_CODEC_MOST];
    int32_t is_depthwise, has_noise;
    dt_span weights; /* float32, their number given by the sizes */
} dt_codec_spec;

/* One call of the codec's stream: docs/bundle.md, `codec`. `state` (S) is zeros at the beginning of an
 * utterance, then the `next_state` of the last call; the two may be one array. */
typedef struct {
    dt_span codes; /* int64 (num_frames, codes of a frame) */
    int32_t num_frames;
    int64_t position, length;
    dt_span noise[DT_CODEC_MOST]; /* float32 (num_frames x rate) for each block, with noise */
    dt_span state;
    dt_room next_state, pcm; /* float32; pcm (num_frames x samples of a frame) */
} dt_codec_call;

typedef struct dt_context dt_context;
typedef struct dt_decoder dt_decoder;
typedef struct dt_codec dt_codec;

/* The kernel paths of this build that this processor can run, the best one first; null after the
 * last. */
DT_API const char* dt_path_name(int32_t index);

DT_API dt_context* dt_open(int32_t path, int32_t threads);
DT_API void dt_close(dt_context*);
/* Threads that compute: fewer than requested if the system refuses more. */
DT_API int32_t dt_threads(const dt_context*);
/* The message of the last refusal. */
DT_API const char* dt_message(const dt_context*);

/* y (N, heads x rows) from x (N, heads x columns): each head has its own `rows / heads` rows. */
DT_API int32_t dt_linear(dt_context*, const dt_matrix*, int32_t heads, dt_span x, int32_t tokens,
                         dt_room y);

/* y (N, C) += the weighted experts of each token, ascending by id, then each of the table's last
 * `num_own` entries with weight 1. */
DT_API int32_t dt_moe(dt_context*, const dt_record*, const dt_table*, int32_t num_own, dt_span x,
                      int32_t tokens, dt_span ids, dt_span weights, int32_t top_k, dt_room y);

/* Bytes of one cached row; parts are padded for `attend`. Negative if refused. */
DT_API int64_t dt_cache_row_bytes(dt_context*, int32_t latent, int32_t rope, int32_t cache_kind);
DT_API int32_t dt_cache_write(dt_context*, int32_t latent, int32_t rope, int32_t cache_kind, dt_span row,
                              dt_room place);
/* mixed (B T, heads, latent) from queries (B T, heads, latent + rope), scaled; row t of an item
 * attends to the cache up to position + t, which the caller has written. */
DT_API int32_t dt_attend(dt_context*, int32_t heads, int32_t latent, int32_t rope, int32_t cache_kind,
                         const dt_pass*, dt_span queries, dt_room mixed);

/* y = x + sin(alpha x)^2 / alpha for x (channels, samples). */
DT_API int32_t dt_snake(dt_context*, dt_span x, dt_span alpha, int32_t channels, int32_t samples,
                        dt_room y);
/* Reads all bytes with all threads; the result only keeps compilers from removing the reads. */
DT_API int64_t dt_read(dt_context*, dt_span bytes);

/* Null if refused. The layers are copied, the arrays that they name are not. */
DT_API dt_decoder* dt_decoder_open(dt_context*, const dt_decoder_spec*);
DT_API void dt_decoder_close(dt_decoder*);
/* Embed rows, int64 (B, T, K + 1); `features`, float32 (T, C), replace the codebooks of the T rows that
 * `audio_mask`, a byte each, marks; both may be null. */
DT_API int32_t dt_begin(dt_decoder*, const dt_pass*, dt_span rows, dt_span features, dt_span audio_mask);
/* Run stages [first, last): 2 L is layer L up to its router, 2 L + 1 its experts. `tables` has one
 * dt_table per layer, each of E addresses. The last layer's MLP runs for the last row of each item. */
DT_API int32_t dt_run(dt_decoder*, int32_t first, int32_t last, dt_span tables);
/* Runs one wave of a layer's experts: those in the table. Absent ones belong to other waves; waves are in
 * ascending order of ids. The wave with the last choice also adds the layer's own MLPs, and stage
 * 2 L + 1 of dt_run then does nothing. */
DT_API int32_t dt_wave(dt_decoder*, int32_t layer, const dt_table*);
/* The last router's results for the N tokens of the pass: ids (int64) and weights (float32) (N, k), and
 * the experts' input, float32 (N, C). The addresses never change and have space for the most tokens;
 * the values are valid until the next call. Returns N. */
DT_API int32_t dt_routed(dt_decoder*, dt_room* ids, dt_room* weights, dt_span* normed);
/* Logits, float32 (B, V), of the last row of each item. */
DT_API int32_t dt_head(dt_decoder*, dt_room logits);

/* Null if refused. The weights are not copied; export/packed/cpu_codec.py defines their layout. */
DT_API dt_codec* dt_codec_open(dt_context*, const dt_codec_spec*);
DT_API void dt_codec_close(dt_codec*);
/* The number of float32 values in a state. */
DT_API int64_t dt_codec_state_size(const dt_codec*);
DT_API int32_t dt_codec_run(dt_codec*, const dt_codec_call*);

#ifdef __cplusplus
}
#endif

#endif
