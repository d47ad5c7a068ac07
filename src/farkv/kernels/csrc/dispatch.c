/* The exported functions: which instruction sets can run here, and each kernel for a chosen one. */
#include "farkv.h"

#define EXPORT __attribute__((visibility("default")))

extern const struct kernels farkv_kernels_generic;
#if defined(__x86_64__) || defined(__i386__)
extern const struct kernels farkv_kernels_avx2, farkv_kernels_avx512, farkv_kernels_avx512vbmi;
#elif defined(__aarch64__)
extern const struct kernels farkv_kernels_neon;
#endif

static const struct kernels *find(int64_t isa) {
    if (isa == ISA_GENERIC) return &farkv_kernels_generic;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
               __builtin_cpu_supports("popcnt");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == ISA_AVX2 && avx2) return &farkv_kernels_avx2;
    if (isa == ISA_AVX512 && avx512) return &farkv_kernels_avx512;
    if (isa == ISA_AVX512VBMI && avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
        return &farkv_kernels_avx512vbmi;
#elif defined(__aarch64__)
    if (isa == ISA_NEON) return &farkv_kernels_neon;
#endif
    return 0;
}

/* native_abi.py compares these with its own sizes: a library built from other sources must not be called. */
EXPORT int64_t farkv_size(int64_t which) {
    const int64_t sizes[] = {sizeof(struct attend_args), sizeof(struct select_args), sizeof(struct gather_args),
                             sizeof(struct table_args), sizeof(struct page_args),
                             sizeof(struct locate_args), sizeof(struct halves_args)};
    return sizes[which];
}

EXPORT int farkv_can_run(int64_t isa) { return find(isa) != 0; }
EXPORT int farkv_attend(int64_t isa, const struct attend_args *args) { return find(isa)->attend(args); }
EXPORT int farkv_select(int64_t isa, const struct select_args *args) { return find(isa)->select(args); }
EXPORT int farkv_gather(int64_t isa, const struct gather_args *args) { return find(isa)->gather(args); }

EXPORT void farkv_split(int64_t isa, const struct halves_args *args) { find(isa)->split(args); }
EXPORT void farkv_join(int64_t isa, const struct halves_args *args) { find(isa)->join(args); }

EXPORT int farkv_learn(int64_t isa, const struct table_args *args) { return find(isa)->learn(args); }

EXPORT uint64_t farkv_read(int64_t isa, const uint8_t *data, int64_t n_bytes, int64_t threads) {
    return find(isa)->read(data, n_bytes, threads);
}

EXPORT uint64_t farkv_read_rows(int64_t isa, const uint8_t *data, const int64_t *positions, int64_t n, int64_t row_bytes,
                                int64_t threads) {
    return find(isa)->read_rows(data, positions, n, row_bytes, threads);
}
