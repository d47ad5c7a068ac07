/* Four nibbles of a record looked up at once, where the CPU permutes the bytes of a whole vector (VBMI) and adds four
   neighbouring bytes to a lane (VNNI): four tables of 16 bytes are one vector, a lane is a record.

   Keys: byte i of a lane is 16 i + nibble, its entry in the four tables. Quad 2 j holds the low nibbles of bytes 4 j ..
   4 j + 3, quad 2 j + 1 the high ones; bytes beyond a row look up zeros. Tables of 24 bits are three of 8: as near as
   float32, so that what is chosen is weighed by them, too, and does not follow from how a fit was rounded. */
#ifndef FARKV_QUADS_H
#define FARKV_QUADS_H

#include <math.h>

#include "codes.h"

#define MOST_QUADS 32             /* of a row of 64 bytes */
#define QUAD_BYTES 64             /* of its four tables */
#define FINE_BYTES 3              /* of an entry, highest first */
#define MOST_FINE_ERROR 0x1p-14f  /* of log2 of a weight; fine tables that may be off by more are not used */

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define PERMUTES_BYTES 1
INLINE int64_t count_quads(int64_t code_bytes) {
    int64_t n = (code_bytes + 3) / 4 * 2;
    return n <= MOST_QUADS ? n : 0;
}

/* Keys of the two quads of 4 bytes of 16 records, a record to a lane. */
INLINE void form_keys(__m512i bytes, vi *keys) {
    const __m512i low = _mm512_set1_epi8(15), table = _mm512_set1_epi32(0x30201000);
    keys[0] = (vi)_mm512_ternarylogic_epi32(bytes, low, table, 0xea); /* bytes & low | table */
    keys[1] = (vi)_mm512_ternarylogic_epi32(_mm512_srli_epi32(bytes, 4), low, table, 0xea);
}

/* Keys of 16 bytes of 16 records, of which vector r holds records 4 r .. 4 r + 3 side by side. */
INLINE void turn_16(const __m512i *x, vi *keys) {
    const __m512i first = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    __m512i a = _mm512_permutex2var_epi32(x[0], first, x[1]), b = _mm512_permutex2var_epi32(x[2], first, x[3]);
    __m512i c = _mm512_permutex2var_epi32(x[0], second, x[1]), d = _mm512_permutex2var_epi32(x[2], second, x[3]);
    form_keys(_mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1), keys);
    form_keys(_mm512_shuffle_i64x2(a, b, 0xee), keys + 2);
    form_keys(_mm512_inserti64x4(c, _mm512_castsi512_si256(d), 1), keys + 4);
    form_keys(_mm512_shuffle_i64x2(c, d, 0xee), keys + 6);
}

/* Keys of 16 records, 4 from each of `runs` on, of 16 bytes and as many from one to the next. */
INLINE void read_16(const uint8_t *const *runs, int64_t at, vi *keys) {
    __m512i x[4];
    UNROLL for (int r = 0; r < 4; r++) x[r] = _mm512_loadu_si512(runs[r] + at);
    turn_16(x, keys);
}

/* The same of 8 bytes. */
INLINE void read_8(const uint8_t *const *runs, int64_t at, vi *keys) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512i x[2];
    UNROLL for (int r = 0; r < 2; r++) {
        __m256i low = _mm256_loadu_si256((const void *)(runs[2 * r] + at));
        x[r] = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256((const void *)(runs[2 * r + 1] + at)), 1);
    }
    form_keys(_mm512_permutex2var_epi32(x[0], even, x[1]), keys);
    form_keys(_mm512_permutex2var_epi32(x[0], _mm512_add_epi32(even, _mm512_set1_epi32(1)), x[1]), keys + 2);
}

/* Keys of 16 rows anywhere; no byte beyond a row is touched. */
INLINE void read_rows_16(const uint8_t *const *rows, int64_t code_bytes, vi *keys) {
    for (int64_t at = 0; at < code_bytes; at += 16, keys += 8) {
        int64_t n = code_bytes - at < 16 ? code_bytes - at : 16;
        __mmask16 piece = (__mmask16)((1u << n) - 1);
        __m512i x[4];
        UNROLL for (int r = 0; r < 4; r++) {
            const uint8_t *const *row = rows + 4 * r;
            x[r] = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(piece, row[0] + at));
            x[r] = _mm512_inserti32x4(x[r], _mm_maskz_loadu_epi8(piece, row[1] + at), 1);
            x[r] = _mm512_inserti32x4(x[r], _mm_maskz_loadu_epi8(piece, row[2] + at), 2);
            x[r] = _mm512_inserti32x4(x[r], _mm_maskz_loadu_epi8(piece, row[3] + at), 3);
        }
        turn_16(x, keys);
    }
}

/* What the entries of n quads, an even number, add up to. */
INLINE vi add_quads(const uint8_t *table, const vi *keys, int64_t n) {
    const __m512i one = _mm512_set1_epi8(1);
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    _Pragma("GCC unroll 8") for (int64_t i = 0; i < n; i += 2, table += 2 * QUAD_BYTES) {
        __m512i low = _mm512_permutexvar_epi8((__m512i)keys[i], _mm512_loadu_si512(table));
        __m512i high = _mm512_permutexvar_epi8((__m512i)keys[i + 1], _mm512_loadu_si512(table + QUAD_BYTES));
        sum[0] = _mm512_dpbusd_epi32(sum[0], low, one);
        sum[1] = _mm512_dpbusd_epi32(sum[1], high, one);
    }
    return (vi)_mm512_add_epi32(sum[0], sum[1]);
}

/* exponents[g][j] = log2 of the weights of n records by the fine tables; whole vectors are written. */
INLINE void sum_fine(const struct index_query *q, const uint8_t *rows, int64_t stride, const int32_t *at, int64_t n,
                     float *exponents) {
    const int64_t quads = q->n_quads;
    for (int64_t j = 0; j < n; j += 16) {
        const uint8_t *row[16];
        vi keys[MOST_QUADS];
        for (int64_t r = 0; r < 16; r++) {
            int64_t i = j + r < n ? j + r : n - 1;
            row[r] = rows + (at ? at[i] : i) * stride;
        }
        read_rows_16(row, q->code_bytes, keys);
        for (int64_t g = 0; g < q->group; g++) {
            const uint8_t *table = q->fine + g * FINE_BYTES * quads * QUAD_BYTES;
            vi high = add_quads(table, keys, quads), middle = add_quads(table + quads * QUAD_BYTES, keys, quads);
            vi low = add_quads(table + 2 * quads * QUAD_BYTES, keys, quads);
            /* Exact, modulo 2^32, and near 0 where weights are near 1: rounded once, as finely as float32 is there. */
            vi sum = (high << 16) + (middle << 8) + low - q->fine_center[g];
            store(exponents + g * RUN + j, __builtin_convertvector(sum, vf) * q->fine_step[g] + q->fine_base[g]);
        }
    }
}

/* A query's tables in 8 and 24 bits. */
struct rounded {
    float step, base;           /* log2 of a coarse weight = base + step * sum of entries */
    float lost, furthest;       /* most that 8 bits lower it; the largest possible */
    float fine_step, fine_base; /* the same in 24 bits, of a sum less the center */
    int32_t fine_center;
};

/* Round the tables of query g of exact[nibble][16][lanes] into coarse[quads][64] and fine[3][quads][64], zeros before. */
static struct rounded round_quads(const float *exact, int64_t n, int64_t lanes, int64_t g, uint8_t *coarse, uint8_t *fine) {
    const __m512i place = _mm512_mullo_epi32(_mm512_set1_epi32((int)lanes),
                                             _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    __m512 entries[4 * MOST_QUADS];
    float lows[4 * MOST_QUADS], widest = 1e-30f, top = 0;
    double base = 0;
    struct rounded r = {0};
    for (int64_t i = 0; i < n; i++) {
        __m512 x = entries[i] = _mm512_i32gather_ps(place, exact + i * 16 * lanes + g, 4);
        float high = _mm512_reduce_max_ps(x);
        lows[i] = _mm512_reduce_min_ps(x);
        widest = fmaxf(widest, high - lows[i]);
        top += high, base += lows[i];
    }
    const float step = widest / 255, inverse = 255 / widest;
    for (int64_t i = 0; i < n; i++) {
        int64_t byte = i < n / 2 ? i : i - n / 2, to = (byte / 4 * 2 + (i >= n / 2)) * QUAD_BYTES + byte % 4 * 16;
        __m512 x = _mm512_sub_ps(entries[i], _mm512_set1_ps(lows[i]));
        __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
        __m512i near = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse * 65792))); /* below 2^24, rounding included */
        __m512 error = _mm512_sub_ps(x, _mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(step)));
        _mm_storeu_si128((void *)(coarse + to), _mm512_cvtepi32_epi8(code));
        for (int part = 0; part < FINE_BYTES; part++) {
            __m512i byte_of = _mm512_srli_epi32(near, 8 * (FINE_BYTES - 1 - part));
            _mm_storeu_si128((void *)(fine + part * count_quads(n / 2) * QUAD_BYTES + to), _mm512_cvtepi32_epi8(byte_of));
        }
        float sum = _mm512_reduce_add_ps(error), squares = _mm512_reduce_add_ps(_mm512_mul_ps(error, error));
        float shift = (sum - 0.34657359f * (squares - sum * sum / 16)) / 16; /* as in round_tables */
        r.base += lows[i] + shift, r.lost += _mm512_reduce_max_ps(error) - shift;
    }
    r.fine_step = step / 65792;
    double center = nearbyint(-base / r.fine_step);
    r.fine_center = (int32_t)fmax(fmin(center, 0x7fffffff), -0x7fffffff);
    r.fine_base = (float)(base + r.fine_center * (double)r.fine_step);
    r.step = step, r.furthest = top + 2 * (float)n * step;
    return r;
}
#else
#define PERMUTES_BYTES 0
INLINE int64_t count_quads(int64_t code_bytes) { return (void)code_bytes, 0; }
INLINE void sum_fine(const struct index_query *q, const uint8_t *rows, int64_t stride, const int32_t *at, int64_t n,
                     float *exponents) {
    (void)q, (void)rows, (void)stride, (void)at, (void)n, (void)exponents;
}
#endif

/* exponents[g][j] = log2 of the weights of n records by the tables in float32. */
INLINE void sum_exact(const struct index_query *q, const uint8_t *rows, int64_t stride, const int32_t *at, int64_t n,
                      float *exponents) {
    for (int64_t j = 0; j < n; j += 4) {
        const uint8_t *row[4];
        for (int64_t r = 0; r < 4; r++) {
            int64_t i = j + r < n ? j + r : n - 1;
            row[r] = rows + (at ? at[i] : i) * stride;
        }
        int64_t left = n - j < 4 ? n - j : 4;
        if (q->lanes == 4) sum_rows_4(q, 0, row, left, exponents + j);
        else
            for (int64_t first = 0; first < q->group; first += 8) sum_rows_8(q, first, row, left, exponents + j);
    }
}

/* exponents[g][j] = log2 of the weights of n <= RUN records: in sequence, or those at `at`. Lanes beyond are 0. */
static __attribute__((noinline)) void form_exponents(const struct index_query *q, const uint8_t *rows, int64_t stride,
                                                     const int32_t *at, int64_t n, float *exponents) {
    if (q->fine) sum_fine(q, rows, stride, at, n, exponents);
    else sum_exact(q, rows, stride, at, n, exponents);
    for (int64_t g = 0; g < q->group; g++) {
        float *to = exponents + g * RUN;
        for (int64_t j = n; j % VL; j++) to[j] = 0;
        for (int64_t j = 0; j < n; j += VL) {
            vf t = load(to + j);
            if (q->softcap != 0) t = cap_softly(t, q->softcap);
            store(to + j, t - q->offset[g]);
        }
    }
}

#endif
