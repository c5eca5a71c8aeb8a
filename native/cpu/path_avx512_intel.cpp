// Compiled with its own processor flags (build.py); empty where they do not apply.
//
// Without the bfloat16 dot product, which has half the rate of FMA on Intel's cores.
#ifdef __AVX512VNNI__
#include "attention.h"
#include "isa_avx512.h"

const deeptalk::Path* deeptalk::avx512_intel_path() {
    static constexpr Path kPath = make_path<Avx512<false, true>>("avx512-intel");
    return &kPath;
}
#else
#include "path.h"

const deeptalk::Path* deeptalk::avx512_intel_path() { return nullptr; }
#endif
