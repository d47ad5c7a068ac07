/* Vectors of one instruction set. GCC's and Clang's vector extensions cover most of it; the rest is here.

   VL float lanes. vf, vi, vu: float, signed, unsigned lanes. N_ACC: accumulators that stay in registers. */
#ifndef FARKV_SIMD_H
#define FARKV_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "-ffast-math: the kernels tell NaN and infinity from numbers"
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#define N_ACC 16
#elif defined(__AVX2__)
#define VL 8
#define N_ACC 8
#else
#define VL 4
#define N_ACC 8
#endif
#define VB (4 * VL)

typedef float vf __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

INLINE vf load(const float *p) { vf x; memcpy(&x, p, VB); return x; }
INLINE vu load_bits(const void *p) { vu x; memcpy(&x, p, VB); return x; }
INLINE void store(float *p, vf x) { memcpy(p, &x, VB); }
INLINE vf fill(float x) { return x - (vf){0}; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

INLINE void prefetch_row(const uint8_t *p, int64_t n_bytes) {
    const uint8_t *end = p + n_bytes;
    for (p -= (uintptr_t)p % 64; p < end; p += 64) prefetch(p);
}

/* Where a lane of x is NaN, the result is x's. */
#if defined(__AVX512F__)
INLINE vf max_of(vf x, vf y) { return (vf)_mm512_max_ps((__m512)y, (__m512)x); }
INLINE vf min_of(vf x, vf y) { return (vf)_mm512_min_ps((__m512)y, (__m512)x); }
#elif defined(__AVX2__)
INLINE vf max_of(vf x, vf y) { return (vf)_mm256_max_ps((__m256)y, (__m256)x); }
INLINE vf min_of(vf x, vf y) { return (vf)_mm256_min_ps((__m256)y, (__m256)x); }
#elif defined(__SSE2__)
INLINE vf max_of(vf x, vf y) { return (vf)_mm_max_ps((__m128)y, (__m128)x); }
INLINE vf min_of(vf x, vf y) { return (vf)_mm_min_ps((__m128)y, (__m128)x); }
#else
INLINE vf max_of(vf x, vf y) { return pick((vi)(x < y), y, x); }
INLINE vf min_of(vf x, vf y) { return pick((vi)(x > y), y, x); }
#endif

/* Widen VL unsigned bytes, signed bytes, or float16 values to lanes. */
#if defined(__AVX512F__)
INLINE vi widen_u8(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
INLINE vi widen_i8(const uint8_t *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
INLINE vf widen_f16(const uint8_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
#elif defined(__AVX2__)
INLINE vi widen_u8(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
INLINE vi widen_i8(const uint8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
INLINE vf widen_f16(const uint8_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
#else
INLINE vi widen_u8(const uint8_t *p) {
    typedef uint8_t bytes __attribute__((vector_size(VL)));
    bytes x;
    memcpy(&x, p, VL);
    return __builtin_convertvector(x, vi);
}
INLINE vi widen_i8(const uint8_t *p) { return (widen_u8(p) << 24) >> 24; }
INLINE vf widen_f16(const uint8_t *p) {
    typedef uint16_t halves __attribute__((vector_size(2 * VL)));
    halves h;
    memcpy(&h, p, 2 * VL);
    vu x = __builtin_convertvector(h, vu);
    /* The exponent's bias differs by 112; infinity and NaN, which have the largest exponent, keep it. */
    vf y = (vf)((x & 0x7fff) << 13) * 0x1p112f;
    vu special = (vu)(y >= 65536.0f) & 0x7f800000u;
    return (vf)((vu)y | special | ((x & 0x8000) << 16));
}
#endif

/* row[at[lane]] of 16 numbers. */
#if defined(__AVX512F__)
INLINE vf pick_of_16(const float *row, vi at) { return (vf)_mm512_permutexvar_ps((__m512i)at, (__m512)load(row)); }
#elif defined(__AVX2__)
INLINE vf pick_of_16(const float *row, vi at) {
    __m256 low = _mm256_permutevar8x32_ps((__m256)load(row), (__m256i)at);
    __m256 high = _mm256_permutevar8x32_ps((__m256)load(row + 8), (__m256i)at);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(at << 28));
}
#else
INLINE vf pick_of_16(const float *row, vi at) {
    vf x;
    for (int lane = 0; lane < VL; lane++) x[lane] = row[at[lane]];
    return x;
}
#endif

/* Whether any lane of a comparison is true. */
#if defined(__AVX2__) && !defined(__AVX512F__)
INLINE int any_of(vi x) { return _mm256_movemask_ps((__m256)x); }
#else
INLINE int any_of(vi x) {
    int any = 0;
    for (int i = 0; i < VL; i++) any |= x[i];
    return any;
}
#endif

/* A bfloat16 broadcast to every lane. */
#if defined(__AVX2__) && !defined(__AVX512F__)
INLINE vf fill_bf16(const uint8_t *p) {
    int16_t bits;
    memcpy(&bits, p, 2);
    return (vf)_mm256_slli_epi32(_mm256_set1_epi16(bits), 16);
}
#else
INLINE vf fill_bf16(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return (vf)((vu){0} + ((uint32_t)bits << 16));
}
#endif

#define EXPONENT_BIAS 127
/* 1.5 * 2^23 puts the nearest integer into the low bits; with the bias, that is the exponent of a power of two. */
#define TO_EXPONENT (12582912.0f + EXPONENT_BIAS)

/* exp(x) = (1 + the result) * scale, x clamped to -88 .. 89, where the scale is 0 and infinity; NaN stays NaN.

   The scale is multiplied with: the bits of a NaN plus an exponent may be any number. */
INLINE vf split_exp(vf x, vf *scale) {
    x = min_of(max_of(x, fill(-88.0f)), fill(89.0f));
    vf shifted = x * 1.44269504088896f + TO_EXPONENT, n = shifted - TO_EXPONENT;
    *scale = (vf)((vu)shifted << 23);
    vf f = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
    vf p = f * 1.3888889e-3f + 8.3333333e-3f;
    p = p * f + 4.1666668e-2f;
    p = p * f + 1.6666667e-1f;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    return p * f;
}

/* exp(x), relative error below 2^-22; 0 below -87, infinity above 88.4; NaN stays NaN. */
INLINE vf exp_of(vf x) {
    vf scale, p = split_exp(x, &scale);
    return (vf)((vi)((p + 1.0f) * scale) & ~(vi)(x < -87.0f));
}

/* c * tanh(x / c): with y = 2 x / c that is c e / (e + 2), e = exp(y) - 1, exact for small y too. */
INLINE vf cap_softly(vf x, float c) {
    vf scale, y = min_of(max_of(x * (2.0f / c), fill(-40.0f)), fill(40.0f)), p = split_exp(y, &scale);
    vf e = p * scale + (scale - 1.0f);
    return c * (e / (e + 2.0f));
}

INLINE float sum_lanes(vf x) {
    float sum = 0;
    for (int i = 0; i < VL; i++) sum += x[i];
    return sum;
}

INLINE float largest_lane(vf x) {
    float largest = x[0];
    for (int i = 1; i < VL; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* out[i] = sum of the lanes of x[i], for N_ACC vectors. */
#if VL == 4
INLINE vf pair_sums(vf a, vf b) { return SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7); }
INLINE vf quad_sums(vf ab, vf cd) { return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7); }
#elif VL == 8
INLINE vf pair_sums(vf a, vf b) {
    return SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}
INLINE vf quad_sums(vf ab, vf cd) {
    return SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
}
#else
INLINE vf pair_sums(vf a, vf b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
INLINE vf quad_sums(vf ab, vf cd) {
    return SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
#endif

INLINE void sum_each(const vf *x, float *out) {
    vf y[N_ACC / 4];
    UNROLL for (int i = 0; i < N_ACC / 4; i++)
        y[i] = quad_sums(pair_sums(x[4 * i], x[4 * i + 1]), pair_sums(x[4 * i + 2], x[4 * i + 3]));
#if VL == 4
    store(out, y[0]);
    store(out + 4, y[1]);
#elif VL == 8
    store(out, SHUFFLE(y[0], y[1], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(y[0], y[1], 4, 5, 6, 7, 12, 13, 14, 15));
#else
    vf a = SHUFFLE(y[0], y[1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(y[0], y[1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    vf b = SHUFFLE(y[2], y[3], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(y[2], y[3], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    store(out, SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
#endif
}

#endif
