/* The C interface of the MoE kernels: the TensorRT plugin, the GPU check and the tests call the same
 * functions, built by nvcc or by a host compiler. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Version of the node's attributes and the records' layout; a runtime must have the same one. */
#define DT_MOE_ABI 1

enum DtWeightKind { DT_WEIGHT_FP16 = 0, DT_WEIGHT_BF16, DT_WEIGHT_INT8, DT_WEIGHT_INT4_32,
                    DT_WEIGHT_INT4_64, DT_WEIGHT_INT4_128 };
enum DtActivationKind { DT_ACTIVATION_FP16 = 0, DT_ACTIVATION_BF16 };

/* Values that do not change between calls. */
struct DtMoeConfig {
    int32_t weight_kind, activation_kind;
    int32_t width, ffn_width, num_experts, top_k;
};

/* One call. Pointers are the device's; every array is dense and starts on 16 bytes. */
struct DtMoeCall {
    const void* x;             /* (tokens, width), activation type */
    const int32_t* topk_ids;   /* (tokens, top_k) */
    const float* topk_weights; /* (tokens, top_k) */
    const int32_t* slot_table; /* (num_experts), expert to slot or -1 */
    const void* slot_arena;    /* (num_slots, record bytes) */
    const float* carry;        /* (tokens, width) to add to, or null for zeros; only with float_out */
    void* out;                 /* (tokens, width), activation type, or float where float_out is set */
    int32_t* missing;          /* (1), uses of experts without a slot; they add nothing to `out` */
    void* workspace;
    int32_t tokens, num_slots;
    int32_t float_out;
    int32_t overlap;           /* the card is sm_90 or newer: start each decode kernel early */
};

/* Null if the kernels support it, else the reason. */
const char* dt_moe_refusal(const struct DtMoeConfig* config);

/* Byte offsets of gate_up, down, their scales, and the whole record; as deeptalk_edge/bundle/expert_record.py. */
struct DtRecordLayout {
    int64_t gate_up, down, gate_up_scales, down_scales, record_bytes;
};
struct DtRecordLayout dt_moe_record_layout(const struct DtMoeConfig* config);

int64_t dt_moe_workspace_bytes(const struct DtMoeConfig* config, int32_t tokens);

/* Enqueues on `stream`, a cudaStream_t. Returns 0 or the cudaError_t of the failed launch. */
int32_t dt_moe_enqueue(const struct DtMoeConfig* config, const struct DtMoeCall* call, void* stream);

#ifdef __cplusplus
}
#endif
