// Which instruction sets this machine runs, operating system included. The numbers are those of `isa.py`.

extern "C" __attribute__((visibility("default"))) int quantlab_cpu_isa() {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
    if (avx512) return 2;
    return avx2 ? 1 : 0;
}
