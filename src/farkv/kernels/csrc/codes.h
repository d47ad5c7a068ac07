/* Products of an index's codes and 16-bit queries: exact integer logits of some records, then their weights.

   Sixteen bytes of VL records are transposed, so that a lane is a record; codes are widened to 16 bits and multiplied in
   pairs. The queries are in a table in the order of the codes, each pair broadcast to all lanes. */
#ifndef FARKV_CODES_H
#define FARKV_CODES_H

#include "simd.h"

#define PIECE 16          /* bytes of a row that are transposed at once */
#define RUN 64            /* records weighed at a time, in the L1 cache */
#define MOST_FUSED 8      /* queries of a group that are weighed together in registers */
#define LEAST_EXP (-126.0f) /* weights are clamped to 2^-126 .. 2^100 times the reference's */
#define MOST_EXP 100.0f

typedef int16_t vh __attribute__((vector_size(VB)));

/* The queries of one KV head against its index. */
struct index_query {
    int64_t group, n_words, n_parts; /* 4-byte words of a row; pairs of codes in a word */
    const vi *table;                 /* [group][n_words][n_parts] */
    const float *step, *offset;      /* log2 of a weight = step * integer logit - offset, [group] */
    float softcap;                   /* in units of log2; 0: none */
    /* The same queries in 8 bits, for the coarse scan: [group][n_words][2], their steps, and what the codes' offset of
       8 adds to log2 of a weight. */
    const vi *coarse_table;
    const float *coarse_step, *coarse_bias;
};

#if defined(__AVX512VNNI__)
INLINE vi add_products(vi acc, vh a, vi b) { return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
#elif defined(__AVX512BW__)
INLINE vi add_products(vi acc, vh a, vi b) { return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
INLINE vi add_products(vi acc, vh a, vi b) { return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
INLINE vi add_products(vi acc, vh a, vi b) { return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#elif defined(__aarch64__)
INLINE vi add_products(vi acc, vh a, vi b) {
    int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return acc + (vi)vpaddq_s32(low, high);
}
#else
INLINE vi add_products(vi acc, vh a, vi b) {
    vi x = (vi)a;
    return acc + ((x << 16) >> 16) * ((b << 16) >> 16) + (x >> 16) * (b >> 16);
}
#endif

#if VL == 4
#define LOW_WORDS(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH_WORDS(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#elif VL == 8
#define LOW_WORDS(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH_WORDS(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define LOW_WORDS(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH_WORDS(a, b) SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#endif

/* word[w], lane t: bytes 4 w .. 4 w + 3 of a piece of row t, or of row at[t]. */
INLINE void transpose(const uint8_t *rows, int64_t stride, const int32_t *at, vi *word) {
    vi v[4];
#define ROW(t) (const void *)(rows + (at ? at[t] : (t)) * stride)
    UNROLL for (int i = 0; i < 4; i++) {
#if VL == 4
        memcpy(&v[i], ROW(i), 16);
#elif VL == 8
        __m256i x = _mm256_castsi128_si256(_mm_loadu_si128(ROW(i)));
        v[i] = (vi)_mm256_inserti128_si256(x, _mm_loadu_si128(ROW(i + 4)), 1);
#else
        __m512i x = _mm512_castsi128_si512(_mm_loadu_si128(ROW(i)));
        x = _mm512_inserti32x4(x, _mm_loadu_si128(ROW(i + 4)), 1);
        x = _mm512_inserti32x4(x, _mm_loadu_si128(ROW(i + 8)), 2);
        v[i] = (vi)_mm512_inserti32x4(x, _mm_loadu_si128(ROW(i + 12)), 3);
#endif
    }
#undef ROW
    vi a = LOW_WORDS(v[0], v[1]), b = LOW_WORDS(v[2], v[3]), c = HIGH_WORDS(v[0], v[1]), d = HIGH_WORDS(v[2], v[3]);
    word[0] = LOW_PAIRS(a, b);
    word[1] = HIGH_PAIRS(a, b);
    word[2] = LOW_PAIRS(c, d);
    word[3] = HIGH_PAIRS(c, d);
}

/* Integer logits of VL records and `heads` queries from `first` on. */
INLINE void multiply(int bits, int heads, const struct index_query *q, int64_t first, const uint8_t *rows,
                     int64_t stride, const int32_t *at, vi *acc) {
    const int parts = bits == 4 ? 4 : 2;
    const vi *table = q->table + first * q->n_words * parts;
    UNROLL for (int g = 0; g < heads; g++) acc[g] = (vi){0};
    for (int64_t w = 0; w < q->n_words; w += 4) {
        vi word[4];
        transpose(rows + 4 * w, stride, at, word);
        UNROLL for (int i = 0; i < 4; i++) {
            if (w + i >= q->n_words) break;
            vh x = (vh)word[i];
            vh part[4];
            if (bits == 4) {
                part[0] = (x << 12) >> 12, part[1] = (x << 8) >> 12, part[2] = (x << 4) >> 12, part[3] = x >> 12;
            } else {
                part[0] = (x << 8) >> 8, part[1] = x >> 8;
            }
            UNROLL for (int g = 0; g < heads; g++) {
                const vi *pairs = table + (g * q->n_words + w + i) * parts;
                UNROLL for (int p = 0; p < parts; p++) acc[g] = add_products(acc[g], part[p], pairs[p]);
            }
        }
    }
}

#if defined(__AVX512BW__) || defined(__AVX2__)
/* Sums of 16 bits hold 8 columns of up to 15 * 127 each in every lane: rows of 16 bytes. */
#define COARSE_BYTES 16
#if defined(__AVX512BW__)
INLINE vh pair_products(vi a, vi b) { return (vh)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
INLINE vi pair_halves(vh a) { return (vi)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1)); }
#else
INLINE vh pair_products(vi a, vi b) { return (vh)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
INLINE vi pair_halves(vh a) { return (vi)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1)); }
#endif

/* As `multiply`, with four-bit codes plus 8 and the 8-bit queries in `table`: half the work. */
INLINE void multiply_coarsely(int heads, const vi *table, int64_t n_words, const uint8_t *rows, int64_t stride,
                              vi *acc) {
    vh sum[MOST_FUSED];
    vi word[4];
    UNROLL for (int g = 0; g < heads; g++) sum[g] = (vh){0};
    transpose(rows, stride, NULL, word);
    UNROLL for (int i = 0; i < 4; i++) {
        if (i >= n_words) break;
        vi x = word[i] ^ (int32_t)0x88888888, low = x & 0x0f0f0f0f, high = (x >> 4) & 0x0f0f0f0f;
        UNROLL for (int g = 0; g < heads; g++) {
            const vi *pairs = table + (g * n_words + i) * 2;
            sum[g] += pair_products(low, pairs[0]);
            sum[g] += pair_products(high, pairs[1]);
            __asm__("" : "+x"(sum[g])); /* else compilers compute all products first, and registers spill */
        }
    }
    UNROLL for (int g = 0; g < heads; g++) acc[g] = pair_halves(sum[g]);
}
#else
#define COARSE_BYTES 0
INLINE void multiply_coarsely(int heads, const vi *table, int64_t n_words, const uint8_t *rows, int64_t stride,
                              vi *acc) {
    (void)heads, (void)table, (void)n_words, (void)rows, (void)stride, (void)acc;
}
#endif

/* y * 2^n, where `shifted` has n in its low bits. Of what can be NaN here the low bits are 0: it stays NaN. */
INLINE vf add_exponent(vf y, vf shifted) { return (vf)((vu)y + ((vu)shifted << 23)); }

/* 2^t of a clamped t, relative error below 2^-13. */
INLINE vf exp2_of(vf t) {
    t = min_of(max_of(t, fill(LEAST_EXP)), fill(MOST_EXP));
    vf shifted = t + 12582912.0f, f = t - (shifted - 12582912.0f);
    vf p = f * 5.5171669e-2f + 2.4022651e-1f;
    p = p * f + 6.9315308e-1f;
    p = p * f + 1.0f;
    return add_exponent(p, shifted);
}

/* 2^t of a t below 126, clamped below; its log2 is off by less than ROUGHLY. */
#define ROUGHLY 0.0025f
INLINE vf exp2_roughly(vf t) {
    t = max_of(t, fill(LEAST_EXP));
    vf shifted = t + 12582912.0f, f = t - (shifted - 12582912.0f);
    vf p = (f * 2.3842893e-1f + 7.0344807e-1f) * f + 1.00044315f;
    return add_exponent(p, shifted);
}

enum { EXACT4, EXACT8, COARSE4, EXACT4_AT };

/* exponents[g][record] = log2 of the weights of n_vectors * VL records: in sequence, or (EXACT4_AT) those named. */
INLINE void form_exponents(int how, int heads, const struct index_query *q, int64_t first, const uint8_t *rows,
                           int64_t stride, const int32_t *at, int64_t n_vectors, float *exponents) {
    const vi *coarse = q->coarse_table + first * q->n_words * 2;
    for (int64_t v = 0; v < n_vectors; v++) {
        const uint8_t *from = how == EXACT4_AT ? rows : rows + v * VL * stride;
        vi acc[4];
        if (how == COARSE4) multiply_coarsely(heads, coarse, q->n_words, from, stride, acc);
        else multiply(how == EXACT8 ? 8 : 4, heads, q, first, from, stride, how == EXACT4_AT ? at + v * VL : NULL, acc);
        UNROLL for (int g = 0; g < heads; g++) {
            vf t = __builtin_convertvector(acc[g], vf);
            t = how == COARSE4 ? t * q->coarse_step[first + g] - q->coarse_bias[first + g] : t * q->step[first + g];
            if (q->softcap != 0) t = cap_softly(t, q->softcap);
            store(exponents + (first + g) * RUN + v * VL, t - q->offset[first + g]);
        }
    }
}

/* Exponents of up to RUN records, all queries of the group. */
INLINE void form_run(int how, const struct index_query *q, const uint8_t *rows, int64_t stride, const int32_t *at,
                     int64_t n_vectors, float *exponents) {
    int64_t g = 0;
    for (; g + 4 <= q->group; g += 4) form_exponents(how, 4, q, g, rows, stride, at, n_vectors, exponents);
    for (; g + 2 <= q->group; g += 2) form_exponents(how, 2, q, g, rows, stride, at, n_vectors, exponents);
    for (; g < q->group; g++) form_exponents(how, 1, q, g, rows, stride, at, n_vectors, exponents);
}

typedef void form_function(const struct index_query *q, const uint8_t *rows, int64_t stride, int64_t n, float *exponents);

static __attribute__((noinline)) void form_exact4(const struct index_query *q, const uint8_t *rows, int64_t stride,
                                                  int64_t n, float *exponents) {
    form_run(EXACT4, q, rows, stride, NULL, n, exponents);
}

static __attribute__((noinline)) void form_exact8(const struct index_query *q, const uint8_t *rows, int64_t stride,
                                                  int64_t n, float *exponents) {
    form_run(EXACT8, q, rows, stride, NULL, n, exponents);
}

static __attribute__((noinline)) void form_coarse4(const struct index_query *q, const uint8_t *rows, int64_t stride,
                                                   int64_t n, float *exponents) {
    form_run(COARSE4, q, rows, stride, NULL, n, exponents);
}

static __attribute__((noinline)) void form_exact4_at(const struct index_query *q, const uint8_t *rows, int64_t stride,
                                                     const int32_t *at, int64_t n, float *exponents) {
    form_run(EXACT4_AT, q, rows, stride, at, n, exponents);
}

static form_function *const form_functions[] = {form_exact4, form_exact8, form_coarse4};

#endif
