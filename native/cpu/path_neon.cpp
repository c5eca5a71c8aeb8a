// Compiled with its own processor flags (build.py); empty where they do not apply.
#ifdef __ARM_FEATURE_DOTPROD
#include "attention.h"
#include "isa_neon.h"

const deeptalk::Path* deeptalk::neon_path() {
    static constexpr Path kPath = make_path<Neon>("neon-dotprod");
    return &kPath;
}
#else
#include "path.h"

const deeptalk::Path* deeptalk::neon_path() { return nullptr; }
#endif
