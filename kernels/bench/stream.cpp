// The speed at which this machine reads memory: the ceiling of every kernel whose weights come from there.

#include <cstdint>

extern "C" __attribute__((visibility("default"))) uint64_t quantlab_read(const uint64_t* words, int64_t count, int threads) {
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t line = 0; line < count / 64; ++line) {
        __builtin_prefetch(words + line * 64 + 1024);
        for (int word = 0; word < 64; ++word) total += words[line * 64 + word];
    }
    return total;
}
