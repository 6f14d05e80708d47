// Working memory of one call. Nothing outlives a call, so calls from several threads do not meet.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Null if there is no memory; never null for a count of 0.
template <class Value>
std::unique_ptr<Value[], Free> aligned_array(int64_t count) {
    const size_t bytes = size_t(std::max<int64_t>(count, 1)) * sizeof(Value);
    return std::unique_ptr<Value[], Free>(static_cast<Value*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
}

}  // namespace
