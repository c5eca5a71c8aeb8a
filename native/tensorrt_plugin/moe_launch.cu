// Chooses the kernels for a call and lays out their workspace.
#include "moe_launch.h"

#include "moe_kernels.cuh"

namespace deeptalk {
namespace {

constexpr int64_t kPage = 4096;
constexpr int kMaxWidth = 1 << 16;  // bytes of a record stay far within 64 bits
// Most tokens for which a tile of 8 or of 16 uses holds most experts' uses.
constexpr int kNarrowTokens = 32, kMediumTokens = 128;

constexpr int64_t align(int64_t bytes, int64_t step) { return (bytes + step - 1) / step * step; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Format {
    int weight_bits, group, scale_bytes;  // group 0: one scale a row, if any
};

Format format_of(int32_t kind) {
    switch (kind) {
        case DT_WEIGHT_INT8: return {8, 0, 4};
        case DT_WEIGHT_INT4_32: return {4, 32, 2};
        case DT_WEIGHT_INT4_64: return {4, 64, 2};
        case DT_WEIGHT_INT4_128: return {4, 128, 2};
        default: return {16, 0, 0};
    }
}

// Workspace of one pass of at most kChunkTokens tokens.
struct Workspace {
    int64_t h, y, order, tiles, num_tiles, bytes;
};

int64_t max_tiles(const DtMoeConfig& config, int64_t uses, int tile_uses) {
    return ceil_div(uses, tile_uses) + (uses < config.num_experts ? uses : config.num_experts);
}

Workspace workspace_of(const DtMoeConfig& config, int64_t tokens) {
    const int64_t uses = (tokens < kChunkTokens ? tokens : kChunkTokens) * config.top_k;
    Workspace w{};
    w.y = align(uses * config.ffn_width * 2, 256);
    w.order = w.y + align(uses * config.width * 4, 256);
    w.tiles = w.order + align(uses * 4, 256);
    w.num_tiles = w.tiles + align(max_tiles(config, uses, 8) * int64_t(sizeof(Tile)), 256);
    w.bytes = w.num_tiles + 256;
    return w;
}

#if defined(__CUDACC__)
template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, unsigned threads, bool early, cudaStream_t stream,
                   const Args& args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}
#else
using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;

template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, unsigned threads, bool, cudaStream_t, const Args& args) {
    gridDim = grid;
    blockDim = {threads, 1, 1};
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
            HostBlock::current().run(threads, [&] { kernel(args); });
        }
    }
    return cudaSuccess;
}
#endif

struct Pass {
    FfnArgs gate_up, down;
    CombineArgs combine;
    int tokens;
    bool float_out, overlap;
};

template <class Weights, class Act, int kColumnTiles, bool kDecode>
cudaError_t run_ffn(const DtMoeConfig& config, const Pass& pass, cudaStream_t stream) {
    const unsigned gate_strips = unsigned(ceil_div(config.ffn_width, 16));
    const unsigned down_strips = unsigned(ceil_div(config.width, 32));
    const unsigned uses = unsigned(pass.tokens * config.top_k);
    // Neighbouring blocks of a prefill compute the same rows of different tiles, so an expert with
    // two tiles is read from DRAM once.
    const unsigned tiles = unsigned(max_tiles(config, uses, 8 * kColumnTiles));
    const dim3 gate_grid = kDecode ? dim3{gate_strips, uses, 1}
                                   : dim3{tiles, unsigned(ceil_div(gate_strips, kWarps)), 1};
    const dim3 down_grid = kDecode ? dim3{down_strips, uses, 1}
                                   : dim3{tiles, unsigned(ceil_div(down_strips, kWarps)), 1};
    cudaError_t error = launch(&ffn_kernel<Weights, Act, kColumnTiles, true, kDecode>, gate_grid, kThreads,
                               false, stream, pass.gate_up);
    if (error != cudaSuccess) return error;
    return launch(&ffn_kernel<Weights, Act, kColumnTiles, false, kDecode>, down_grid, kThreads,
                  kDecode && pass.overlap, stream, pass.down);
}

template <class Weights, class Act>
cudaError_t run_pass(const DtMoeConfig& config, const Pass& pass, cudaStream_t stream) {
    const bool decode = pass.tokens <= kDecodeTokens && pass.tokens * config.top_k <= kDecodeUses;
    cudaError_t error;
    if (decode) {
        error = run_ffn<Weights, Act, 1, true>(config, pass, stream);
    } else {
        const int tile = pass.tokens <= kNarrowTokens ? 8 : pass.tokens <= kMediumTokens ? 16 : 32;
        const PlanArgs plan{pass.gate_up.routing, pass.gate_up.plan};
        error = launch(tile == 8 ? &plan_kernel<8> : tile == 16 ? &plan_kernel<16> : &plan_kernel<32>, {1, 1, 1},
                       kPlanThreads, false, stream, plan);
        if (error != cudaSuccess) return error;
        error = tile == 8    ? run_ffn<Weights, Act, 1, false>(config, pass, stream)
                : tile == 16 ? run_ffn<Weights, Act, 2, false>(config, pass, stream)
                             : run_ffn<Weights, Act, 4, false>(config, pass, stream);
    }
    if (error != cudaSuccess) return error;
    const dim3 grid{unsigned(pass.tokens), unsigned(ceil_div(config.width, 4 * kThreads)), 1};
    return launch(pass.float_out ? &combine_kernel<Act, true> : &combine_kernel<Act, false>, grid, kThreads,
                  decode && pass.overlap, stream, pass.combine);
}

template <class Act>
cudaError_t run_pass_with(const DtMoeConfig& config, const Pass& pass, cudaStream_t stream) {
    switch (config.weight_kind) {
        case DT_WEIGHT_INT8: return run_pass<Int8Weights<Act>, Act>(config, pass, stream);
        case DT_WEIGHT_INT4_32: return run_pass<Int4Weights<Act, 32>, Act>(config, pass, stream);
        case DT_WEIGHT_INT4_64: return run_pass<Int4Weights<Act, 64>, Act>(config, pass, stream);
        case DT_WEIGHT_INT4_128: return run_pass<Int4Weights<Act, 128>, Act>(config, pass, stream);
        default: return run_pass<FloatWeights<Act>, Act>(config, pass, stream);
    }
}

}  // namespace
}  // namespace deeptalk

using namespace deeptalk;

extern "C" {

#define DT_EXPORT __attribute__((visibility("default")))

DT_EXPORT const char* dt_moe_refusal(const DtMoeConfig* config) {
    const int kind = config->weight_kind, act = config->activation_kind;
    if (kind < DT_WEIGHT_FP16 || kind > DT_WEIGHT_INT4_128) {
        return "weights: expected float16, bfloat16, int8, or int4 in groups of 32, 64 or 128";
    }
    if (act != DT_ACTIVATION_FP16 && act != DT_ACTIVATION_BF16) {
        return "activations: expected float16 or bfloat16";
    }
    if ((kind == DT_WEIGHT_FP16 && act != DT_ACTIVATION_FP16) ||
        (kind == DT_WEIGHT_BF16 && act != DT_ACTIVATION_BF16)) {
        return "16-bit weights need activations of the same type";
    }
    const int step = format_of(kind).group ? format_of(kind).group : 16;
    if (config->width <= 0 || config->width > kMaxWidth || config->width % step) {
        return "width: expected a multiple of the int4 group, or of 16, up to 65536";
    }
    if (config->ffn_width <= 0 || config->ffn_width > kMaxWidth || config->ffn_width % step) {
        return "ffn_width: expected a multiple of the int4 group, or of 16, up to 65536";
    }
    if (config->num_experts < 1 || config->num_experts > kMaxExperts) {
        return "num_experts: expected 1 to 512";
    }
    if (config->top_k < 1 || config->top_k > kMaxTopK) return "top_k: expected 1 to 16";
    return nullptr;
}

DT_EXPORT DtRecordLayout dt_moe_record_layout(const DtMoeConfig* config) {
    const Format format = format_of(config->weight_kind);
    const int64_t weights = int64_t(config->width) * config->ffn_width;
    const int64_t gate_rows = 2 * int64_t(config->ffn_width), down_rows = config->width;
    const int64_t gate_scales = gate_rows * (format.group ? config->width / format.group : 1);
    const int64_t down_scales = down_rows * (format.group ? config->ffn_width / format.group : 1);
    DtRecordLayout layout{};
    layout.down = align(2 * weights * format.weight_bits / 8, 16);
    layout.gate_up_scales = layout.down + align(weights * format.weight_bits / 8, 16);
    layout.down_scales = layout.gate_up_scales + align(gate_scales * format.scale_bytes, 16);
    layout.record_bytes = align(layout.down_scales + down_scales * format.scale_bytes, kPage);
    return layout;
}

DT_EXPORT int64_t dt_moe_workspace_bytes(const DtMoeConfig* config, int32_t tokens) {
    return workspace_of(*config, tokens).bytes;
}

DT_EXPORT int32_t dt_moe_enqueue(const DtMoeConfig* config, const DtMoeCall* call, void* stream_handle) {
    if (call->tokens <= 0) return 1;  // cudaErrorInvalidValue
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const DtRecordLayout layout = dt_moe_record_layout(config);
    const Workspace places = workspace_of(*config, call->tokens);
    auto* workspace = static_cast<uint8_t*>(call->workspace);
    const int top_k = config->top_k, width = config->width;
    const bool fp16 = config->activation_kind == DT_ACTIVATION_FP16;

    for (int first = 0; first < call->tokens; first += kChunkTokens) {
        Pass pass{};
        pass.tokens = call->tokens - first < kChunkTokens ? call->tokens - first : kChunkTokens;
        pass.float_out = call->float_out != 0;
        pass.overlap = call->overlap != 0;
        const Routing routing{call->topk_ids + int64_t(first) * top_k, call->slot_table,
                              pass.tokens * top_k, top_k, config->num_experts, call->num_slots};

        FfnArgs ffn{};
        ffn.routing = routing;
        ffn.plan = {reinterpret_cast<int32_t*>(workspace + places.order),
                    reinterpret_cast<Tile*>(workspace + places.tiles),
                    reinterpret_cast<int32_t*>(workspace + places.num_tiles)};
        ffn.arena = static_cast<const uint8_t*>(call->slot_arena);
        ffn.record_bytes = layout.record_bytes;

        pass.gate_up = ffn;
        pass.gate_up.weights_offset = layout.gate_up;
        pass.gate_up.scales_offset = layout.gate_up_scales;
        pass.gate_up.in = static_cast<const uint16_t*>(call->x) + int64_t(first) * width;
        pass.gate_up.out = workspace + places.h;
        pass.gate_up.rows = config->ffn_width;
        pass.gate_up.columns = width;
        pass.gate_up.uses_per_input = top_k;

        pass.down = ffn;
        pass.down.weights_offset = layout.down;
        pass.down.scales_offset = layout.down_scales;
        pass.down.in = reinterpret_cast<const uint16_t*>(workspace + places.h);
        pass.down.out = workspace + places.y;
        pass.down.rows = width;
        pass.down.columns = config->ffn_width;
        pass.down.uses_per_input = 1;

        const int64_t out_offset = int64_t(first) * width;
        pass.combine = {routing,
                        call->topk_weights + int64_t(first) * top_k,
                        reinterpret_cast<const float*>(workspace + places.y),
                        call->carry ? call->carry + out_offset : nullptr,
                        static_cast<uint8_t*>(call->out) + out_offset * (pass.float_out ? 4 : 2),
                        width,
                        call->topk_ids,
                        call->tokens * top_k,
                        first == 0 ? call->missing : nullptr};

        const cudaError_t error = fp16 ? run_pass_with<Fp16>(*config, pass, stream)
                                       : run_pass_with<Bf16>(*config, pass, stream);
        if (error != cudaSuccess) return int32_t(error);
    }
    return 0;
}

}  // extern "C"
