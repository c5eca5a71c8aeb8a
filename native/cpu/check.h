// What the check program's parts share.
//
// Every buffer is its own allocation of exactly its size, so that a sanitizer sees a byte too far.
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

// Sizes, lengths and addresses that no file should hold, one at a time and, `rounds` times, a few at
// once: whatever they say, a call refuses them or stays within its arrays.
void check_hostile(dt_context* c, const char* path, int rounds);
