// The routed experts of one layer: out[t] = sum over t's experts of weight x down(silu(gate) * up).
//
// A use is one (token, expert) pair: use = token * top_k + rank. Each kernel multiplies weight rows,
// straight from the experts' slots, with up to 8 * kColumnTiles uses of one expert:
//
//   plan      (prefill) sorts the uses by expert and cuts them into tiles of uses
//   ffn       twice: gate_up -> h (uses, G) in the activations' type, down -> y (uses, C) in float32
//   combine   out[t] += weight * y in ascending expert id; counts the uses without a slot
//
// Weights are the mma's A operand and go from global memory to registers: only one warp uses each
// byte, so shared memory would only delay it. A and B may use any common order of k inside an mma,
// so a lane takes consecutive bytes, which it loads fastest. Integers are exact in fp16 and bf16,
// and their products are summed in float32 before the scale is applied. Only shapes set the order
// of a sum, so neither slots nor other tokens change a token's bits.
#pragma once

#include "simt.cuh"

namespace deeptalk {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kPlanThreads = 1024;
constexpr int kMaxTopK = 16;
constexpr int kMaxExperts = 512;
constexpr int kChunkTokens = 512;  // tokens of one pass; bounds the workspace
constexpr int kMaxUses = kChunkTokens * kMaxTopK;
constexpr int kDecodeTokens = 8;
constexpr int kDecodeUses = 64;  // two ballots cover them

// ---- weight formats ----------------------------------------------------------------------------
// A piece is one lane's load from one row; the pieces of 4 lanes are a chunk of the row. `expand`
// turns 8 weights of a piece into four pairs for the mma.

template <class Act>
struct FloatWeights {
    static constexpr int kPieceWeights = 8, kWords = 4, kWordsPer8 = 4, kGroup = 0;
    static constexpr bool kRowScales = false, kPairsApart = false;
    static __device__ __forceinline__ void expand(const uint32_t* words, uint32_t (&pairs)[4]) {
        for (int i = 0; i < 4; ++i) pairs[i] = words[i];
    }
};

template <class Act>
struct Int8Weights;

template <>
struct Int8Weights<Fp16> {
    static constexpr int kPieceWeights = 16, kWords = 4, kWordsPer8 = 2, kGroup = 0;
    static constexpr bool kRowScales = true, kPairsApart = false;
    static __device__ __forceinline__ void expand(const uint32_t* words, uint32_t (&pairs)[4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t biased = words[i] ^ 0x80808080u;
            // 0x6400 | n is the half 1024 + n.
            pairs[2 * i] = Fp16::subtract2(pick_bytes(biased, 0x64646464u, 0x4140), 0x64806480u);
            pairs[2 * i + 1] = Fp16::subtract2(pick_bytes(biased, 0x64646464u, 0x4342), 0x64806480u);
        }
    }
};

template <>
struct Int8Weights<Bf16> {
    static constexpr int kPieceWeights = 16, kWords = 4, kWordsPer8 = 2, kGroup = 0;
    static constexpr bool kRowScales = true, kPairsApart = false;
    static __device__ __forceinline__ void expand(const uint32_t* words, uint32_t (&pairs)[4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t biased = words[i] ^ 0x80808080u;
            uint32_t value[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                // 0x4b000000 | n is the float 2^23 + n; a small integer's upper half is its bf16.
                const uint32_t shifted = pick_bytes(biased, 0x4b000000u, 0x7440u + j);
                value[j] = as_bits(as_float(shifted) - (8388608.f + 128.f));
            }
            pairs[2 * i] = pick_bytes(value[0], value[1], 0x7632);
            pairs[2 * i + 1] = pick_bytes(value[2], value[3], 0x7632);
        }
    }
};

// Weights 2i and 2i + 1 share a byte, 16 * odd + even + 8. A word's nibbles come out four apart.
template <class Act, int kGroupSize>
struct Int4Weights {
    static constexpr int kPieceWeights = kGroupSize / 4, kWords = kGroupSize / 32, kWordsPer8 = 1;
    static constexpr int kGroup = kGroupSize;  // a chunk is one group, so its sum has one scale
    static constexpr bool kRowScales = false, kPairsApart = true;
    static __device__ __forceinline__ void expand(const uint32_t* words, uint32_t (&pairs)[4]) {
        constexpr uint32_t kBase = Act::kIsBf16 ? 0x43004300u : 0x64006400u;
        constexpr uint32_t kZero = kBase + 0x00080008u;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Even weights are biased by 8 already; flipping bit 3 biases the odd ones.
            const uint32_t nibbles = (words[0] >> (4 * i)) & 0x000f000fu;
            pairs[i] = Act::subtract2(nibbles ^ (i % 2 ? kZero : kBase), kZero);
        }
    }
};

// ---- arguments ---------------------------------------------------------------------------------

struct Routing {
    const int32_t* ids;         // (uses), expert of each use
    const int32_t* slot_table;  // (experts), -1 where the expert is not resident
    int uses, top_k, num_experts, num_slots;
};

struct Tile {
    int32_t slot, start, count;
};

struct Plan {
    int32_t* order;  // (uses), the resident ones sorted by expert, then by use
    Tile* tiles;
    int32_t* num_tiles;
};

struct PlanArgs {
    Routing routing;
    Plan plan;
};

struct FfnArgs {
    Routing routing;
    Plan plan;                  // prefill only
    const uint8_t* arena;
    int64_t record_bytes, weights_offset, scales_offset;
    const uint16_t* in;         // (tokens, columns) or (uses, columns)
    void* out;                  // (uses, rows)
    int rows, columns;          // of one matrix: G x C for gate and for up, C x G for down
    int uses_per_input;         // top_k where `in` has a row per token, 1 where per use
};

struct CombineArgs {
    Routing routing;
    const float* weights;       // (uses)
    const float* y;             // (uses, width)
    const float* carry_in;      // (tokens, width) or null
    void* out;                  // (tokens, width)
    int width;
    const int32_t* all_ids;     // every use of the call: its first pass counts for all passes
    int all_uses;
    int32_t* missing;           // null in later passes
};

__device__ __forceinline__ int slot_of(const Routing& routing, int expert) {
    if (expert < 0 || expert >= routing.num_experts) return -1;
    const int slot = routing.slot_table[expert];
    return slot < routing.num_slots ? slot : -1;
}

// ---- plan --------------------------------------------------------------------------------------

// One block. A warp owns every 32nd expert and finds its uses by ballot, so the order is stable.
template <int kTileUses>
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(PlanArgs args) {
    const Routing& routing = args.routing;
    const Plan& plan = args.plan;
    __shared__ int32_t ids[kMaxUses];
    __shared__ int32_t slots[kMaxExperts], counts[kMaxExperts];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int use = threadIdx.x; use < routing.uses; use += kPlanThreads) ids[use] = routing.ids[use];
    for (int e = threadIdx.x; e < routing.num_experts; e += kPlanThreads) {
        slots[e] = slot_of(routing, e);
    }
    __syncthreads();
    for (int e = warp; e < routing.num_experts; e += kPlanThreads / 32) {
        int count = 0;
        for (int base = 0; base < routing.uses && slots[e] >= 0; base += 32) {
            const int use = base + lane;
            count += count_bits(ballot(use < routing.uses && ids[use] == e));
        }
        if (lane == 0) counts[e] = count;
    }
    __syncthreads();
    for (int e = warp; e < routing.num_experts; e += kPlanThreads / 32) {
        int start = 0, first_tile = 0;
        for (int before = 0; before < e; ++before) {
            start += counts[before];
            first_tile += (counts[before] + kTileUses - 1) / kTileUses;
        }
        const int count = counts[e], tiles = (count + kTileUses - 1) / kTileUses;
        for (int i = lane; i < tiles; i += 32) {
            const int left = count - i * kTileUses;
            plan.tiles[first_tile + i] = {slots[e], start + i * kTileUses,
                                          left < kTileUses ? left : kTileUses};
        }
        if (e == routing.num_experts - 1 && lane == 0) *plan.num_tiles = first_tile + tiles;
        int place = start;
        for (int base = 0; base < routing.uses && count > 0; base += 32) {
            const int use = base + lane;
            const bool mine = use < routing.uses && ids[use] == e;
            const uint32_t all = ballot(mine);
            if (mine) plan.order[place + count_bits(all & ((1u << lane) - 1))] = use;
            place += count_bits(all);
        }
    }
}

// ---- ffn ---------------------------------------------------------------------------------------

// Decode, without a plan: the block of use u computes u and the next 7 uses of its expert, unless
// an earlier block does. `column_use` becomes the use of this lane's column, if there is one.
__device__ __forceinline__ bool find_decode_tile(const Routing& routing, int use, int lane, Tile& tile,
                                                 int& column_use) {
    const int expert = routing.ids[use];
    uint64_t same = 0;
    for (int base = 0; base < kDecodeUses; base += 32) {
        const bool match = base + lane < routing.uses && routing.ids[base + lane] == expert;
        same |= uint64_t(ballot(match)) << base;
    }
    const uint64_t before = same & ((uint64_t(1) << use) - 1);
    const int rank = count_bits(uint32_t(before)) + count_bits(uint32_t(before >> 32));
    const int left = count_bits(uint32_t(same)) + count_bits(uint32_t(same >> 32)) - rank;
    tile = {slot_of(routing, expert), 0, left < 8 ? left : 8};
    if (rank % 8 != 0 || tile.slot < 0) return false;
    uint64_t rest = same & ~((uint64_t(1) << use) - 1);
    for (int column = 0; column <= lane / 4 && rest; ++column) {
        const uint32_t low = uint32_t(rest);
        // The number of zeros below the lowest 1 bit.
        const int bit = low ? count_bits((low & (0u - low)) - 1)
                            : 32 + count_bits((uint32_t(rest >> 32) & (0u - uint32_t(rest >> 32))) - 1);
        column_use = bit;
        rest &= rest - 1;
    }
    return true;
}

// Pieces of a row that a lane loads while it computes another, and blocks that an SM must hold.
// More pieces hide more latency but use registers, which allows fewer blocks; docs/measurements/
// has both.
template <class Weights, int kColumnTiles, bool kDecode>
struct Tuning {
    static constexpr int kDepth = !kDecode && Weights::kPieceWeights == 8 ? 2 : 1;
    static constexpr int kBlocks = Weights::kGroup > 0 && kColumnTiles == 4 ? 3 : 1;
};

template <class Weights>
struct Piece {
    uint32_t words[Weights::kWords];
};

template <class Weights>
__device__ __forceinline__ void load_piece(Piece<Weights>& piece, const uint8_t* row, int byte, bool there) {
    if (!there) {
#pragma unroll
        for (int i = 0; i < Weights::kWords; ++i) piece.words[i] = 0;
    } else if constexpr (Weights::kWords == 4) {
        const Words4 v = load_weights16(row + byte);
        piece.words[0] = v.x, piece.words[1] = v.y, piece.words[2] = v.z, piece.words[3] = v.w;
    } else if constexpr (Weights::kWords == 1) {
        piece.words[0] = load_weights4(row + byte);
    } else {
        // int4 in groups of 64: with 16 bytes a lane, the 4 lanes of a row would span two groups.
        load_weights8(row + byte, piece.words[0], piece.words[1]);
    }
}

// A warp multiplies two tiles of 16 rows with the columns of one tile of uses.
//   gate_up: rows 16s.. of gate and of up, so that silu(gate) * up needs no other warp
//   down:    rows 32s.. and 32s + 16..
// Decode gives the 4 warps of a block every 4th chunk of the same rows, prefill other rows each.
template <class Weights, class Act, int kColumnTiles, bool kGateUp, bool kDecode>
__global__ void __launch_bounds__(kThreads, (Tuning<Weights, kColumnTiles, kDecode>::kBlocks))
    ffn_kernel(FfnArgs args) {
    constexpr int kColumns = 8 * kColumnTiles;
    constexpr int kSplits = kDecode ? kWarps : 1;
    constexpr int kPiece = Weights::kPieceWeights, kChunk = 4 * kPiece;
    constexpr int kPieceBytes = 4 * Weights::kWords;
    constexpr int kDepth = Tuning<Weights, kColumnTiles, kDecode>::kDepth;
    constexpr int kSteps = kPiece / 8;
    static_assert(!Weights::kGroup || Weights::kGroup == kChunk, "a chunk is a group");
    __shared__ float sums[kWarps][kColumns][33];
    __shared__ int32_t column_uses[kColumns];

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    if constexpr (kDecode) let_next_kernel_start();

    Tile tile;
    int use_of[kColumnTiles];
    if constexpr (kDecode) {
        if (!find_decode_tile(args.routing, blockIdx.y, lane, tile, use_of[0])) return;
        if (warp == 0 && t == 0) column_uses[g] = use_of[0];
    } else {
        if (int(blockIdx.x) >= *args.plan.num_tiles) return;
        tile = args.plan.tiles[blockIdx.x];
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
            const int column = 8 * j + g;
            use_of[j] = column < tile.count ? args.plan.order[tile.start + column] : -1;
            if (warp == 0 && t == 0) column_uses[column] = use_of[j];
        }
    }

    const int strip = kDecode ? blockIdx.x : blockIdx.y * kWarps + warp;
    const int first_row = strip * (kGateUp ? 16 : 32);
    const uint8_t* record = args.arena + tile.slot * args.record_bytes;
    const int64_t row_bytes = int64_t(args.columns) * kPieceBytes / kPiece;
    const int chunks = (args.columns + kChunk - 1) / kChunk;

    // Rows g and g + 8 of both row tiles. All sizes are multiples of 16, so a tile is whole or absent.
    bool row_there[2];
    int64_t matrix_row[2];
    const uint8_t* row_of[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const int row = kGateUp ? first_row : first_row + 16 * m;
        row_there[m] = row < args.rows;
        matrix_row[m] = (row_there[m] ? row : 0) + (kGateUp ? int64_t(m) * args.rows : 0) + g;
        for (int half = 0; half < 2; ++half) {
            row_of[m][half] =
                record + args.weights_offset + (matrix_row[m] + 8 * half) * row_bytes + t * kPieceBytes;
        }
    }

    Piece<Weights> pieces[kDepth][2][2];
    uint16_t scales[kDepth][2][2];
    const uint16_t* group_scales = reinterpret_cast<const uint16_t*>(record + args.scales_offset);
    auto fetch = [&](int slot, int chunk) {
        const bool there = chunk < chunks && chunk * kChunk + t * kPiece < args.columns;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                load_piece<Weights>(pieces[slot][m][half], row_of[m][half], chunk * 4 * kPieceBytes,
                                    there && row_there[m]);
                if constexpr (Weights::kGroup > 0) {
                    scales[slot][m][half] =
                        there && row_there[m]
                            ? group_scales[(matrix_row[m] + 8 * half) * chunks + chunk]
                            : uint16_t(0);
                }
            }
        }
    };

    const int first_chunk = kDecode ? warp : 0;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) fetch(d, first_chunk + d * kSplits);
    // The weights above do not depend on earlier kernels; h below is an output of the previous one.
    if constexpr (kDecode && !kGateUp) wait_for_previous_kernel();

    // Columns of an mma are independent, so a column without a use may read any row.
    const uint16_t* input_of[kColumnTiles];
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
        const int row = use_of[j] < 0 ? 0 : use_of[j] / args.uses_per_input;
        input_of[j] = args.in + int64_t(row) * args.columns;
    }
    Words4 inputs[kColumnTiles];
    // After the end of a row the weights are zeros, so any finite inputs will do.
    auto fetch_inputs = [&](int chunk, int step) {
        const int k = chunk * kChunk + t * kPiece;
        const int offset = (k < args.columns ? k : 0) + 8 * step;
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) inputs[j] = load_activations16(input_of[j] + offset);
    };
    if (first_chunk < chunks) fetch_inputs(first_chunk, 0);

    float acc[2][kColumnTiles][4] = {};
    for (int base = first_chunk; base < chunks; base += kDepth * kSplits) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const int chunk = base + d * kSplits;
            if (chunk >= chunks) break;
            Piece<Weights> piece[2][2];
            float scale[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    piece[m][half] = pieces[d][m][half];
                    if constexpr (Weights::kGroup > 0) scale[m][half] = half_to_float(scales[d][m][half]);
                }
            }
            fetch(d, chunk + kDepth * kSplits);

            float group_acc[2][kColumnTiles][4] = {};
            auto& into = Weights::kGroup > 0 ? group_acc : acc;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                Words4 b[kColumnTiles];
#pragma unroll
                for (int j = 0; j < kColumnTiles; ++j) b[j] = inputs[j];
                if (step + 1 < kSteps) {
                    fetch_inputs(chunk, step + 1);
                } else if (chunk + kSplits < chunks) {
                    fetch_inputs(chunk + kSplits, 0);
                }
                uint32_t a[2][2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        Weights::expand(piece[m][half].words + step * Weights::kWordsPer8, a[m][half]);
                    }
                }
#pragma unroll
                for (int j = 0; j < kColumnTiles; ++j) {
                    if constexpr (Weights::kPairsApart) {
                        b[j] = {pick_bytes(b[j].x, b[j].z, 0x5410), pick_bytes(b[j].x, b[j].z, 0x7632),
                                pick_bytes(b[j].y, b[j].w, 0x5410), pick_bytes(b[j].y, b[j].w, 0x7632)};
                    }
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        Act::mma(into[m][j], a[m][0][0], a[m][1][0], a[m][0][1], a[m][1][1], b[j].x, b[j].y);
                        Act::mma(into[m][j], a[m][0][2], a[m][1][2], a[m][0][3], a[m][1][3], b[j].z, b[j].w);
                    }
                }
            }
            if constexpr (Weights::kGroup > 0) {
#pragma unroll
                for (int m = 0; m < 2; ++m) {
#pragma unroll
                    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            acc[m][j][i] = fmaf(scale[m][i / 2], group_acc[m][j][i], acc[m][j][i]);
                        }
                    }
                }
            }
        }
    }

    if constexpr (Weights::kRowScales) {
        const float* row_scales = reinterpret_cast<const float*>(record + args.scales_offset);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            for (int i = 0; i < 4; ++i) {
                const float scale = row_there[m] ? row_scales[matrix_row[m] + 8 * (i / 2)] : 0.f;
#pragma unroll
                for (int j = 0; j < kColumnTiles; ++j) acc[m][j][i] *= scale;
            }
        }
    }

#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[warp][8 * j + 2 * t + i % 2][16 * m + g + 8 * (i / 2)] = acc[m][j][i];
            }
        }
    }
    __syncthreads();

    // Decode: the block adds its warps' shares. Prefill: each warp writes its own rows.
    constexpr int kRows = kGateUp ? 16 : 32;
    const int step = kDecode ? kThreads : 32;
    for (int i = kDecode ? threadIdx.x : lane; i < kRows * tile.count; i += step) {
        const int column = i / kRows, row = i % kRows;
        if (first_row + row >= args.rows) continue;
        const int64_t place = int64_t(column_uses[column]) * args.rows + first_row + row;
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int split = 0; split < kSplits; ++split) {
            const float* share = sums[kDecode ? split : warp][column];
            sum[0] += share[row];
            if (kGateUp) sum[1] += share[16 + row];
        }
        if constexpr (kGateUp) {
            static_cast<uint16_t*>(args.out)[place] = Act::store(sum[0] / (1.f + expf(-sum[0])) * sum[1]);
        } else {
            static_cast<float*>(args.out)[place] = sum[0];
        }
    }
}

// ---- combine -----------------------------------------------------------------------------------

// Block (t, b): four columns of token t per thread. With kCarry the sum starts from `carry_in` and
// stays float32, so that a prefill in waves of ascending experts gives the bits of a single call.
template <class Act, bool kCarry>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineArgs args) {
    __shared__ int32_t order[kMaxTopK];
    __shared__ int32_t missing;
    const int token = blockIdx.x, top_k = args.routing.top_k;
    const int32_t* ids = args.routing.ids + int64_t(token) * top_k;
    if (threadIdx.x == 0) missing = 0;
    if (int(threadIdx.x) < top_k) {
        const int mine = ids[threadIdx.x];
        int place = 0;
        for (int i = 0; i < top_k; ++i) {
            place += ids[i] < mine || (ids[i] == mine && i < int(threadIdx.x));
        }
        order[place] = slot_of(args.routing, mine) >= 0 ? int(threadIdx.x) : -1;
    }
    __syncthreads();
    if (args.missing && token == 0 && blockIdx.y == 0) {
        int mine = 0;
        for (int use = threadIdx.x; use < args.all_uses; use += kThreads) {
            mine += slot_of(args.routing, args.all_ids[use]) < 0;
        }
        atomicAdd(&missing, mine);
        __syncthreads();
        if (threadIdx.x == 0) *args.missing = missing;
    }
    const int column = 4 * (blockIdx.y * kThreads + threadIdx.x);
    wait_for_previous_kernel();
    if (column >= args.width) return;
    const int64_t place = int64_t(token) * args.width + column;
    float sum[4] = {};
    if (kCarry && args.carry_in) {
        for (int i = 0; i < 4; ++i) sum[i] = args.carry_in[place + i];
    }
#pragma unroll 6
    for (int rank = 0; rank < top_k; ++rank) {
        if (order[rank] < 0) continue;
        const int64_t use = int64_t(token) * top_k + order[rank];
        const Words4 y = load_activations16(
            reinterpret_cast<const uint16_t*>(args.y + use * args.width + column));
        const float weight = args.weights[use];
        sum[0] = fmaf(weight, as_float(y.x), sum[0]);
        sum[1] = fmaf(weight, as_float(y.y), sum[1]);
        sum[2] = fmaf(weight, as_float(y.z), sum[2]);
        sum[3] = fmaf(weight, as_float(y.w), sum[3]);
    }
    for (int i = 0; i < 4; ++i) {
        if constexpr (kCarry) {
            static_cast<float*>(args.out)[place + i] = sum[i];
        } else {
            static_cast<uint16_t*>(args.out)[place + i] = Act::store(sum[i]);
        }
    }
}

}  // namespace deeptalk
