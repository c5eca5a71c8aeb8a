// The GPU operations of the MoE kernels, for nvcc and for any C++17 compiler.
//
// Under nvcc each name is an instruction or two. Under a host compiler a block runs as 128 or 1024
// coroutines on one thread. Barriers, ballots and mma fragments behave as on the GPU, so a wrong
// index or a missing barrier shows in the result. The host form checks arithmetic, not speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another, so one copy suffices
#endif

namespace deeptalk {

struct Words4 {
    uint32_t x, y, z, w;
};

#if defined(__CUDACC__)

// ---- the GPU -----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t order) {
    return __byte_perm(a, b, order);
}
__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float half_to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

// Weights are read once: keep them out of L1, which holds the activations that all warps share.
__device__ __forceinline__ Words4 load_weights16(const uint8_t* address) {
    Words4 v;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
}
__device__ __forceinline__ void load_weights8(const uint8_t* address, uint32_t& x, uint32_t& y) {
    asm("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "l"(address));
}
__device__ __forceinline__ uint32_t load_weights4(const uint8_t* address) {
    uint32_t x;
    asm("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(x) : "l"(address));
    return x;
}
__device__ __forceinline__ Words4 load_activations16(const uint16_t* address) {
    const uint4 v = *reinterpret_cast<const uint4*>(address);
    return {v.x, v.y, v.z, v.w};
}

// Programmatic dependent launch: the next kernel may fetch its weights while this one ends.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Fp16 {
    static constexpr bool kIsBf16 = false;
    static __device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b) {
        const __half2 d = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
        return *reinterpret_cast<const uint32_t*>(&d);
    }
    static __device__ __forceinline__ uint16_t store(float value) {
        return __half_as_ushort(__float2half_rn(value));
    }
    // d += a (16 rows x 16) * b (16 x 8 columns), in float32.
    static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

struct Bf16 {
    static constexpr bool kIsBf16 = true;
    static __device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b) {
        const __nv_bfloat162 d = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a),
                                         *reinterpret_cast<__nv_bfloat162*>(&b));
        return *reinterpret_cast<const uint32_t*>(&d);
    }
    static __device__ __forceinline__ uint16_t store(float value) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(value));
    }
    static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

#else

// ---- the host ----------------------------------------------------------------------------------

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1f, fraction = bits & 0x3ffu;
    if (exponent == 0x1f) return as_float(sign | 0x7f800000u | (fraction << 13));
    const float magnitude = exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25)
                                     : std::ldexp(float(fraction), -24);
    return as_float(sign | as_bits(magnitude));
}

inline uint16_t float_to_half(float value) {
    const uint32_t bits = as_bits(value);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    const float magnitude = as_float(bits & 0x7fffffffu);
    if (std::isnan(value)) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 65520.f) return uint16_t(sign | 0x7c00u);
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    exponent = exponent - 11 < -24 ? -24 : exponent - 11;  // weight of the last bit kept
    const long steps = std::lrint(std::ldexp(magnitude, -exponent));  // ties to even
    // The addition carries into the exponent, which is right when rounding up to 2^n.
    return uint16_t(sign | (steps < 1024 ? steps : ((exponent + 24) << 10) + steps));
}

inline float bfloat_to_float(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = as_bits(value);
    if (std::isnan(value)) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// One block: every thread is a coroutine; a collective returns only when all have arrived.
class HostBlock {
  public:
    struct Lane {
        uint32_t a[4], b[2];
        float d[4];
        bool vote;
    };
    struct Warp {
        Lane lanes[32];
        uint32_t votes = 0;
        int arrived = 0;
        unsigned generation = 0;
    };

    static HostBlock& current() {
        static HostBlock block;
        return block;
    }

    void run(unsigned threads, std::function<void()> body) {
        static constexpr size_t kStack = 128 << 10;
        if (fibers_.size() < threads) fibers_.resize(threads);
        warps_.assign((threads + 31) / 32, Warp{});
        threads_ = threads;
        arrived_ = 0;
        body_ = std::move(body);
        for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = fibers_[i];
            if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
            getcontext(&fiber.state);
            fiber.state.uc_stack.ss_sp = fiber.stack.get();
            fiber.state.uc_stack.ss_size = kStack;
            fiber.state.uc_link = &scheduler_;
            fiber.done = false;
            makecontext(&fiber.state, &HostBlock::enter, 0);
        }
        // Every other round runs backwards, so that no result can depend on the order of threads.
        unsigned left = threads;
        for (unsigned round = 0; left; ++round) {
            progress_ = false;
            for (unsigned i = 0; i < threads; ++i) {
                const unsigned thread = round % 2 ? threads - 1 - i : i;
                if (fibers_[thread].done) continue;
                running_ = thread;
                threadIdx.x = thread;
                swapcontext(&scheduler_, &fibers_[thread].state);
                if (fibers_[thread].done) --left, progress_ = true;
            }
            if (!progress_ && left) {
                std::fprintf(stderr, "a barrier waits for threads that have returned or wait elsewhere\n");
                std::abort();
            }
        }
    }

    void barrier() {
        const unsigned generation = generation_;
        progress_ = true;
        if (++arrived_ == threads_) {
            arrived_ = 0;
            ++generation_;
            return;
        }
        while (generation == generation_) yield();
    }

    // `exchange` runs once, when all 32 lanes have written theirs.
    template <class Exchange>
    Warp& meet(Exchange exchange) {
        Warp& warp = warps_[running_ / 32];
        const unsigned generation = warp.generation;
        progress_ = true;
        if (++warp.arrived == 32) {
            exchange(warp);
            warp.arrived = 0;
            ++warp.generation;
        } else {
            while (generation == warp.generation) yield();
        }
        return warp;
    }

    Lane& lane() { return warps_[running_ / 32].lanes[running_ % 32]; }

  private:
    struct Fiber {
        ucontext_t state;
        std::unique_ptr<char[]> stack;
        bool done = true;
    };

    static void enter() {
        HostBlock& block = current();
        block.body_();
        block.fibers_[block.running_].done = true;
    }

    void yield() {
        const unsigned me = running_;
        swapcontext(&fibers_[me].state, &scheduler_);
        running_ = me;
        threadIdx.x = me;
    }

    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    ucontext_t scheduler_{};
    std::function<void()> body_;
    unsigned threads_ = 0, running_ = 0, arrived_ = 0, generation_ = 0;
    bool progress_ = false;
};

inline void __syncthreads() { HostBlock::current().barrier(); }
inline void __syncwarp() {
    HostBlock::current().meet([](HostBlock::Warp&) {});
}
inline int atomicAdd(int* address, int value) {
    const int old = *address;
    *address += value;
    return old;
}

inline uint32_t ballot(bool vote) {
    HostBlock& block = HostBlock::current();
    block.lane().vote = vote;
    return block
        .meet([](HostBlock::Warp& warp) {
            warp.votes = 0;
            for (int i = 0; i < 32; ++i) warp.votes |= uint32_t(warp.lanes[i].vote) << i;
        })
        .votes;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t order) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) {
        picked |= uint32_t((bytes >> (8 * ((order >> (4 * i)) & 7))) & 0xff) << (8 * i);
    }
    return picked;
}
inline Words4 load_weights16(const uint8_t* address) {
    Words4 v;
    std::memcpy(&v, address, 16);
    return v;
}
inline void load_weights8(const uint8_t* address, uint32_t& x, uint32_t& y) {
    std::memcpy(&x, address, 4);
    std::memcpy(&y, address + 4, 4);
}
inline uint32_t load_weights4(const uint8_t* address) {
    uint32_t x;
    std::memcpy(&x, address, 4);
    return x;
}
inline Words4 load_activations16(const uint16_t* address) {
    Words4 v;
    std::memcpy(&v, address, 16);
    return v;
}
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

// The fragments of m16n8k16 as the PTX manual gives them: lane = 4 * g + t holds of A the rows g and
// g + 8, of B the column g, of D the columns 2t and 2t + 1.
template <float (*ToFloat)(uint16_t)>
void host_mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
              uint32_t b1) {
    HostBlock& block = HostBlock::current();
    HostBlock::Lane& mine = block.lane();
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    std::memcpy(mine.a, a, sizeof a);
    std::memcpy(mine.b, b, sizeof b);
    std::memcpy(mine.d, d, sizeof d);
    block.meet([](HostBlock::Warp& warp) {
        float rows[16][16], columns[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 2; ++i) {
                for (int part = 0; part < 4; ++part) {
                    rows[g + 8 * (part % 2)][2 * t + i + 8 * (part / 2)] =
                        ToFloat(uint16_t(warp.lanes[lane].a[part] >> (16 * i)));
                }
                for (int part = 0; part < 2; ++part) {
                    columns[2 * t + i + 8 * part][g] =
                        ToFloat(uint16_t(warp.lanes[lane].b[part] >> (16 * i)));
                }
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int part = 0; part < 4; ++part) {
                const int row = g + 8 * (part / 2), column = 2 * t + part % 2;
                float sum = warp.lanes[lane].d[part];
                for (int k = 0; k < 16; ++k) sum += rows[row][k] * columns[k][column];
                warp.lanes[lane].d[part] = sum;
            }
        }
    });
    std::memcpy(d, block.lane().d, sizeof d);
}

template <float (*ToFloat)(uint16_t), uint16_t (*FromFloat)(float)>
struct HostFloat16 {
    static uint32_t subtract2(uint32_t a, uint32_t b) {
        const uint16_t low = FromFloat(ToFloat(uint16_t(a)) - ToFloat(uint16_t(b)));
        const uint16_t high = FromFloat(ToFloat(uint16_t(a >> 16)) - ToFloat(uint16_t(b >> 16)));
        return uint32_t(high) << 16 | low;
    }
    static uint16_t store(float value) { return FromFloat(value); }
    static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
        host_mma<ToFloat>(d, a0, a1, a2, a3, b0, b1);
    }
};
struct Fp16 : HostFloat16<half_to_float, float_to_half> {
    static constexpr bool kIsBf16 = false;
};
struct Bf16 : HostFloat16<bfloat_to_float, float_to_bfloat> {
    static constexpr bool kIsBf16 = true;
};

#endif

}  // namespace deeptalk
