// Compiled with its own processor flags (build.py); empty where they do not apply.
#ifdef __AVX512BF16__
#include "attention.h"
#include "isa_avx512.h"

const deeptalk::Path* deeptalk::avx512_bf16_path() {
    static constexpr Path kPath = make_path<Avx512<true>>("avx512-bf16");
    return &kPath;
}
#else
#include "path.h"

const deeptalk::Path* deeptalk::avx512_bf16_path() { return nullptr; }
#endif
