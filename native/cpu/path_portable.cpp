#include "attention.h"
#include "isa_portable.h"

const deeptalk::Path* deeptalk::portable_path() {
    static constexpr Path kPath = make_path<Portable>("portable");
    return &kPath;
}
