// Compiled with its own processor flags (build.py); empty where they do not apply.
#ifdef __AVX2__
#include "attention.h"
#include "isa_avx2.h"

const deeptalk::Path* deeptalk::avx2_path() {
    static constexpr Path kPath = make_path<Avx2<false>>("avx2");
    return &kPath;
}
#else
#include "path.h"

const deeptalk::Path* deeptalk::avx2_path() { return nullptr; }
#endif
