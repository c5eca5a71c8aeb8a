// Declarations that the check program's files share.
//
// Every buffer is a separate allocation of exactly its size, so that a sanitizer sees an access one
// byte outside.
#pragma once

#include <vector>

#include "deeptalk_cpu.h"

inline dt_span span(const void* data, size_t bytes) { return {data, int64_t(bytes)}; }
template <class T>
dt_span span(const std::vector<T>& array) {
    return span(array.data(), array.size() * sizeof(T));
}
template <class T>
dt_room room(std::vector<T>& array) {
    return {array.data(), int64_t(array.size() * sizeof(T))};
}

// Ends the program with the claim if it does not hold.
void expect(bool holds, const char* claim, const char* path, double found);

// Tries sizes, lengths and addresses that no valid file has: one at a time, then, `rounds` times, a
// few at once. A call must refuse them or stay within its arrays.
void check_hostile(dt_context* c, const char* path, int rounds);
