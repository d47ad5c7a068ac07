/* Logits of an index's nibbles: each nibble of a row looks up what it adds in a table of 16 entries (query.h makes it).

   Exactly: a record at a time, the queries of a group in lanes, in float32. Coarsely, where the CPU shuffles bytes: VB
   records at a time, each table rounded to 8 bits; a vector of nibbles is looked up by one shuffle. */
#ifndef FARKV_CODES_H
#define FARKV_CODES_H

#include "simd.h"

#define RUN 64              /* records weighed exactly at a time, in the L1 cache */
#define LEAST_EXP (-126.0f) /* weights are clamped to 2^-126 .. 2^100 times the reference's */
#define MOST_EXP 100.0f
#define PIECE 8             /* bytes of a row that are transposed at once */
#define MOST_NIBBLES 514    /* of a row, that sums of 16 bits have room for */

typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));
typedef uint8_t vc __attribute__((vector_size(VB)));
typedef uint16_t vs __attribute__((vector_size(VB)));

/* Where nibble i of n is in a table in which nibbles i and n - 1 - i are neighbours. */
INLINE int64_t pair_place(int64_t i, int64_t n) { return i < n / 2 ? 2 * i : 2 * (n - 1 - i) + 1; }

/* The queries of one KV head against its index. */
struct index_query {
    int64_t group, code_bytes;
    int64_t lanes;                 /* the group, in whole vectors of 4 (up to 4 queries) or 8 */
    const float *exact;            /* [nibble][16][lanes], in units of log2 */
    int64_t n_quads;               /* 0: tables are in pairs (pair_place), else in quads (quads.h) */
    const uint8_t *coarse;         /* [group][pair_place(nibble)][16], or [group][quad][64] */
    const uint8_t *fine;           /* [group][byte, highest first][quad][64], or NULL */
    const float *fine_step, *fine_base; /* log2 of a weight = base + step * (sum of entries - center) */
    const int32_t *fine_center;
    const float *step, *base;      /* log2 of a coarse weight = base + step * sum of entries, [group] */
    const float *offset;           /* what is taken off log2 of a weight, [group] */
    float softcap;                 /* in units of log2; 0: none */
};

/* to[g * RUN + r] = what the nibbles of row[r] add up to, of n <= 4 rows and `width` queries from `first` on. */
#define SUM_ROWS(name, vector, width)                                                                                  \
    INLINE void name(const struct index_query *q, int64_t first, const uint8_t *const *row, int64_t n, float *to) {   \
        const float *table = q->exact + first;                                                                         \
        const int64_t lanes = q->lanes, half = q->code_bytes * 16 * lanes;                                             \
        vector sum[4] = {{0}};                                                                                         \
        for (int64_t j = 0; j < q->code_bytes; j++, table += 16 * lanes) {                                             \
            UNROLL for (int r = 0; r < 4; r++) {                                                                       \
                vector low, high;                                                                                      \
                memcpy(&low, table + (row[r][j] & 15) * lanes, sizeof low);                                            \
                memcpy(&high, table + half + (row[r][j] >> 4) * lanes, sizeof high);                                   \
                sum[r] += low + high;                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t r = 0; r < n; r++)                                                                                \
            for (int64_t g = 0; g < width && first + g < q->group; g++) to[(first + g) * RUN + r] = sum[r][g];         \
    }
SUM_ROWS(sum_rows_4, v4, 4)
SUM_ROWS(sum_rows_8, v8, 8)

/* EVEN, ODD: the even bytes of a, then of b, in every 16 bytes; the odd ones. LOOK_UP: table[nibble], 16 bytes each. */
#if defined(__AVX512BW__)
#define SHUFFLES_BYTES 1
INLINE vc even_bytes(vc a, vc b) {
    const __m512i low = _mm512_set1_epi16(255);
    return (vc)_mm512_packus_epi16(_mm512_and_si512((__m512i)a, low), _mm512_and_si512((__m512i)b, low));
}
INLINE vc odd_bytes(vc a, vc b) {
    return (vc)_mm512_packus_epi16(_mm512_srli_epi16((__m512i)a, 8), _mm512_srli_epi16((__m512i)b, 8));
}
INLINE vc look_up(const uint8_t *table, vc nibbles) {
    __m512i wide = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
    return (vc)_mm512_shuffle_epi8(wide, (__m512i)nibbles);
}
INLINE vs low_words(vs a, vs b) { return (vs)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
INLINE vs high_words(vs a, vs b) { return (vs)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
#define SHUFFLES_BYTES 1
INLINE vc even_bytes(vc a, vc b) {
    const __m256i low = _mm256_set1_epi16(255);
    return (vc)_mm256_packus_epi16(_mm256_and_si256((__m256i)a, low), _mm256_and_si256((__m256i)b, low));
}
INLINE vc odd_bytes(vc a, vc b) {
    return (vc)_mm256_packus_epi16(_mm256_srli_epi16((__m256i)a, 8), _mm256_srli_epi16((__m256i)b, 8));
}
INLINE vc look_up(const uint8_t *table, vc nibbles) {
    __m256i wide = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
    return (vc)_mm256_shuffle_epi8(wide, (__m256i)nibbles);
}
INLINE vs low_words(vs a, vs b) { return (vs)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
INLINE vs high_words(vs a, vs b) { return (vs)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
#elif defined(__aarch64__)
#define SHUFFLES_BYTES 1
INLINE vc even_bytes(vc a, vc b) { return (vc)vuzp1q_u8((uint8x16_t)a, (uint8x16_t)b); }
INLINE vc odd_bytes(vc a, vc b) { return (vc)vuzp2q_u8((uint8x16_t)a, (uint8x16_t)b); }
INLINE vc look_up(const uint8_t *table, vc nibbles) { return (vc)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)nibbles); }
INLINE vs low_words(vs a, vs b) { return (vs)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); }
INLINE vs high_words(vs a, vs b) { return (vs)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); }
#else
#define SHUFFLES_BYTES 0
#endif

#if SHUFFLES_BYTES
/* In every 16 bytes those at runs[lane] + at; or 8 from there, and 8 from `stride` further on. */
INLINE vc load_runs(const uint8_t *const *runs, int64_t at) {
#if VB == 64
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(runs[0] + at)));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const void *)(runs[1] + at)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const void *)(runs[2] + at)), 2);
    return (vc)_mm512_inserti32x4(x, _mm_loadu_si128((const void *)(runs[3] + at)), 3);
#elif VB == 32
    __m256i x = _mm256_castsi128_si256(_mm_loadu_si128((const void *)(runs[0] + at)));
    return (vc)_mm256_inserti128_si256(x, _mm_loadu_si128((const void *)(runs[1] + at)), 1);
#else
    vc x;
    memcpy(&x, runs[0] + at, 16);
    return x;
#endif
}

INLINE vc load_pairs(const uint8_t *const *runs, int64_t at, int64_t stride) {
    uint8_t pairs[VB];
    const uint8_t *each[VB / 16];
    for (int lane = 0; lane < VB / 16; lane++) {
        memcpy(pairs + 16 * lane, runs[lane] + at, 8);
        memcpy(pairs + 16 * lane + 8, runs[lane] + at + stride, 8);
        each[lane] = pairs + 16 * lane;
    }
    return load_runs(each, 0);
}

/* x[i]: 16 / n_bytes rows of n_bytes, in every 16 bytes. Afterwards x[i]: byte i of 16 rows. */
INLINE void turn_bytes(int n_bytes, vc *x) {
    vc y[16];
    UNROLL for (int turn = 1; turn < n_bytes; turn *= 2) {
        UNROLL for (int i = 0; i < n_bytes / 2; i++) {
            y[i] = even_bytes(x[2 * i], x[2 * i + 1]);
            y[n_bytes / 2 + i] = odd_bytes(x[2 * i], x[2 * i + 1]);
        }
        UNROLL for (int i = 0; i < n_bytes; i++) x[i] = y[i];
    }
}

/* Put the nibbles of bytes [at, at + n) of all rows into their planes. */
INLINE void put_planes(const vc *x, int64_t at, int64_t n, int64_t code_bytes, vc *planes) {
    UNROLL for (int64_t i = 0; i < n; i++) {
        planes[pair_place(at + i, 2 * code_bytes)] = x[i] & 15;
        planes[pair_place(code_bytes + at + i, 2 * code_bytes)] = (vc)(((vs)x[i] >> 4) & 0x0f0f);
    }
}

/* planes[pair_place(nibble)]: that nibble of VB rows, 16 from each of `runs` on. Rows are read in pieces of 8 bytes. */
INLINE void split_rows(const uint8_t *const *runs, int64_t stride, int64_t code_bytes, vc *planes) {
    vc x[16];
    int64_t at = 0;
    for (; at + 16 <= code_bytes; at += 16) {
        UNROLL for (int i = 0; i < 16; i++) x[i] = load_runs(runs, i * stride + at);
        turn_bytes(16, x);
        put_planes(x, at, 16, code_bytes, planes);
    }
    for (; at < code_bytes; at += PIECE) {
        if (stride == PIECE) {
            UNROLL for (int i = 0; i < 8; i++) x[i] = load_runs(runs, 2 * i * stride);
        } else {
            UNROLL for (int i = 0; i < 8; i++) x[i] = load_pairs(runs, 2 * i * stride + at, stride);
        }
        turn_bytes(8, x);
        put_planes(x, at, code_bytes - at < PIECE ? code_bytes - at : PIECE, code_bytes, planes);
    }
}

/* sums[4 q + j] of each of `queries`, 16 bytes at a time: coarse entries of records 4 j .. 4 j + 3 of 16, summed up;
   tables and planes in pairs whose entries add up in 8 bits. */
INLINE void sum_planes(int queries, const uint8_t *tables, const vc *planes, int64_t n, vi *sums) {
    vs even[2] = {{0}}, odd[2] = {{0}}, zero = {0};
    const int64_t stride = n * 16;
    _Pragma("GCC unroll 4") for (int64_t i = 0; i < n; i += 2, tables += 32, planes += 2) {
        UNROLL for (int q = 0; q < queries; q++) {
            const uint8_t *own = tables + q * stride;
            vs found = (vs)(look_up(own, planes[0]) + look_up(own + 16, planes[1]));
            even[q] += found;
            odd[q] += found >> 8;
        }
    }
    UNROLL for (int q = 0; q < queries; q++) {
        even[q] -= odd[q] << 8;
        vs low = low_words(even[q], odd[q]), high = high_words(even[q], odd[q]);
        sums[4 * q] = (vi)low_words(low, zero), sums[4 * q + 1] = (vi)high_words(low, zero);
        sums[4 * q + 2] = (vi)low_words(high, zero), sums[4 * q + 3] = (vi)high_words(high, zero);
    }
}
#else
INLINE void split_rows(const uint8_t *const *runs, int64_t stride, int64_t code_bytes, vc *planes) {
    (void)runs, (void)stride, (void)code_bytes, (void)planes;
}
INLINE void sum_planes(int queries, const uint8_t *tables, const vc *planes, int64_t n, vi *sums) {
    (void)queries, (void)tables, (void)planes, (void)n, (void)sums;
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
#define ROUGHLY 0.0026f
#if defined(__AVX512DQ__)
INLINE vf exp2_roughly(vf t) {
    vf f = (vf)_mm512_reduce_ps((__m512)t, 1); /* t - floor(t) */
    vf p = (f * 3.3718944e-1f + 6.5763628e-1f) * f + 1.00172476f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)t);
}
#else
INLINE vf exp2_roughly(vf t) {
    t = max_of(t, fill(LEAST_EXP));
    vf shifted = t + 12582912.0f, f = t - (shifted - 12582912.0f);
    vf p = (f * 2.3842893e-1f + 7.0344807e-1f) * f + 1.00044315f;
    return add_exponent(p, shifted);
}
#endif

#endif
