// Compiled with its own processor flags (build.py); empty where they do not apply.
#ifdef __AVXVNNI__
#include "attention.h"
#include "isa_avx2.h"

const deeptalk::Path* deeptalk::avx2_vnni_path() {
    static constexpr Path kPath = make_path<Avx2<true>>("avx2-vnni");
    return &kPath;
}
#else
#include "path.h"

const deeptalk::Path* deeptalk::avx2_vnni_path() { return nullptr; }
#endif
