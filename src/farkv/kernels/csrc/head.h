/* One KV head of a selection: its scratch, its queries against the index, exponents of some records. */
#ifndef FARKV_HEAD_H
#define FARKV_HEAD_H
#include <math.h>
#include <stdlib.h>

#include "codes.h"
#include "farkv.h"

#define TILE 2048 /* records per partial sum; these are added in a fixed order for any number of threads */

struct head {
    const struct select_args *args;
    struct index_query query;
    const uint8_t *codes;
    vi *table, *coarse_table;
    float *coarse_step, *coarse_bias, margin; /* margin: most that 8 bits lower log2 of a weight */
    float furthest;                           /* largest possible log2 of a coarse weight, before the offset */
    int coarse, fused;                        /* whether the scan is coarse, and fused (scan_fused) */
    float *projected, *step, *offset; /* [group][columns], [group], [group] */
    double *guess, *sums, *tile_sums; /* [group], [group], [tiles][group] */
    float *inverse;                   /* [group]: 1 / guess */
    float bound;
    int64_t *n_kept; /* [parts] */
    int32_t *kept;   /* [n + VL]: positions of candidates, each part's starting at its first record */
    float *weights;  /* [group][n + VL]: their weights, in the same places */
    uint32_t *keys;  /* [n + VL] */
    uint8_t *taken;  /* a bit per record */
    float *run;      /* [group][RUN] */
    vf *lane_sums;   /* [group], of the current tile */
    uint8_t *copies; /* RUN rows, padded to whole pieces */
};

static int64_t count_parts(const struct select_args *a) { return a->bits == 4 ? 4 : 2; }
static int64_t count_words(const struct select_args *a) { return (a->code_bytes + 3) / 4; }
static int64_t padded_bytes(const struct select_args *a) { return (a->code_bytes + PIECE - 1) / PIECE * PIECE; }
static int64_t count_tiles(const struct select_args *a) { return (a->n + TILE - 1) / TILE; }

static void *carve(uint8_t **at, int64_t n_bytes) {
    void *here = *at;
    *at += (n_bytes + 63) / 64 * 64;
    return here;
}

/* Lay a head's scratch out from `at` on; returns its end. */
static uint8_t *lay_out(const struct select_args *a, struct head *h, uint8_t *at) {
    int64_t group = a->group;
    h->args = a;
    h->table = carve(&at, group * count_words(a) * count_parts(a) * VB);
    h->coarse_table = carve(&at, group * count_words(a) * 2 * VB);
    h->coarse_step = carve(&at, group * 4);
    h->coarse_bias = carve(&at, group * 4);
    h->projected = carve(&at, group * a->columns * 4);
    h->step = carve(&at, group * 4);
    h->offset = carve(&at, group * 4);
    h->inverse = carve(&at, group * 4);
    h->guess = carve(&at, group * 8);
    h->sums = carve(&at, group * 8);
    h->tile_sums = carve(&at, count_tiles(a) * group * 8);
    h->n_kept = carve(&at, (count_tiles(a) + 1) * 8);
    h->taken = carve(&at, a->n / 8 + 1);
    h->kept = carve(&at, (a->n + VL) * 4);
    h->weights = carve(&at, (a->n + VL) * group * 4);
    h->keys = carve(&at, (a->n + VL) * 4);
    return at;
}

/* Scratch of each task: a run's weights and copied rows. */
static uint8_t *lay_out_run(const struct select_args *a, struct head *h, uint8_t *at) {
    h->run = carve(&at, a->group * RUN * 4);
    h->lane_sums = carve(&at, a->group * VB);
    h->copies = carve(&at, RUN * padded_bytes(a));
    return at;
}

/* to[0 .. n VL) = sum over d of q[d] side[d][0 .. n VL) */
INLINE void project_columns(int n, const float *q, const float *side, int64_t dim, int64_t columns, float *to) {
    vf sum[4];
    UNROLL for (int i = 0; i < n; i++) sum[i] = (vf){0};
    for (int64_t d = 0; d < dim; d++)
        UNROLL for (int i = 0; i < n; i++) sum[i] += q[d] * load(side + d * columns + i * VL);
    UNROLL for (int i = 0; i < n; i++) store(to + i * VL, sum[i]);
}

/* projected = scaling * scale * (q A) */
static void project(struct head *h, int64_t head) {
    const struct select_args *a = h->args;
    const float *side = a->query + (a->query_batch == 1 ? head % a->heads : head) * a->dim * a->columns;
    const float *scale = a->scale + head * a->columns;
    for (int64_t g = 0; g < a->group; g++) {
        const float *q = a->q + (head * a->group + g) * a->dim;
        float *to = h->projected + g * a->columns, scaling = (float)a->scaling;
        int64_t r = 0;
        for (; r + 4 * VL <= a->columns; r += 4 * VL) project_columns(4, q, side + r, a->dim, a->columns, to + r);
        for (; r + VL <= a->columns; r += VL) project_columns(1, q, side + r, a->dim, a->columns, to + r);
        for (; r < a->columns; r++) {
            to[r] = 0;
            for (int64_t d = 0; d < a->dim; d++) to[r] += q[d] * side[d * a->columns + r];
        }
        for (r = 0; r < a->columns; r++) to[r] *= scale[r] * scaling;
    }
}

/* The column whose code is number `half` (0, 1) of pair `part` of word `word`; -1 beyond the last. */
static int64_t find_column(const struct select_args *a, int64_t word, int64_t part, int64_t half) {
    int64_t byte = 4 * word + 2 * half + (a->bits == 4 ? part / 2 : part);
    if (byte >= a->code_bytes) return -1;
    return a->bits == 4 ? byte + part % 2 * (a->columns / 2) : byte;
}

/* The nearest integer; 0 for NaN, which is what inf / inf is: a query without a size has no direction. */
INLINE float round_code(float x) { return x == x ? rintf(x) : 0; }

/* Round the projected queries to 16 bits, or fewer so that sums fit, each with its own step, and fill the table. */
static void quantize(struct head *h) {
    const struct select_args *a = h->args;
    int64_t words = count_words(a), parts = count_parts(a);
    float most = fminf(32767, floorf(2147483000.0f / ((a->bits == 4 ? 8.0f : 128.0f) * (float)a->columns)));
    for (int64_t g = 0; g < a->group; g++) {
        const float *p = h->projected + g * a->columns;
        float largest = 1e-30f;
        for (int64_t r = 0; r < a->columns; r++) largest = fmaxf(largest, fabsf(p[r]));
        float step = largest / most;
        h->step[g] = step * 1.44269504f;
        for (int64_t w = 0; w < words; w++)
            for (int64_t part = 0; part < parts; part++) {
                uint32_t pair = 0;
                for (int64_t half = 0; half < 2; half++) {
                    int64_t r = find_column(a, w, part, half);
                    int16_t x = r < 0 ? 0 : (int16_t)round_code(p[r] / step);
                    pair |= (uint32_t)(uint16_t)x << (16 * half);
                }
                h->table[(g * words + w) * parts + part] = (vi)((vu){0} + pair);
            }
    }
    h->query = (struct index_query){
        .group = a->group, .n_words = words, .n_parts = parts, .table = h->table, .step = h->step, .offset = h->offset,
        .softcap = (float)a->softcap * 1.44269504f, .coarse_table = h->coarse_table, .coarse_step = h->coarse_step,
        .coarse_bias = h->coarse_bias};
}

/* The queries in 8 bits, and the most that this rounding lowers a logit. With codes of -8 .. 7 that is 7.5 * the sum of
   absolute rounding errors, as the bias centres the range. */
static void quantize_coarsely(struct head *h) {
    const struct select_args *a = h->args;
    int64_t words = count_words(a), half = a->columns / 2;
    h->margin = 0, h->furthest = 0;
    for (int64_t g = 0; g < a->group; g++) {
        const float *p = h->projected + g * a->columns;
        float largest = 1e-30f, lost = 0, balance = 0, sum = 0, size = 0;
        for (int64_t r = 0; r < a->columns; r++) largest = fmaxf(largest, fabsf(p[r]));
        float step = largest / 127;
        for (int64_t i = 0; i < words * 2; i++) {
            uint32_t bytes = 0;
            for (int64_t j = 0; j < 4; j++) {
                int64_t byte = i / 2 * 4 + j;
                float exact = byte < half ? p[i % 2 * half + byte] : 0, x = round_code(exact / step);
                lost += fabsf(exact - x * step), balance += exact - x * step, sum += x, size += fabsf(x);
                bytes |= (uint32_t)(uint8_t)(int8_t)x << (8 * j);
            }
            h->coarse_table[g * words * 2 + i] = (vi)((vu){0} + bytes);
        }
        h->coarse_step[g] = step * 1.44269504f;
        h->coarse_bias[g] = h->coarse_step[g] * 8 * sum + 0.5f * balance * 1.44269504f;
        h->margin = fmaxf(h->margin, 7.5f * lost * 1.44269504f);
        h->furthest = fmaxf(h->furthest, 8 * size * h->coarse_step[g]);
    }
}

/* Exponents of the records [first, first + n), n <= RUN; lanes beyond are finite but undefined. */
static void weigh_run(struct head *h, int64_t first, int64_t n, int coarse) {
    const struct select_args *a = h->args;
    form_function *form = form_functions[coarse ? COARSE4 : a->bits == 4 ? EXACT4 : EXACT8];
    int64_t stride = a->row_stride, padded = padded_bytes(a);
    const uint8_t *rows = h->codes + first * stride;
    /* Pieces of the last rows, and lanes of the last vector, may reach beyond readable memory: copy. */
    if (n % VL || (first + n - 1) * stride + padded > (a->n - 1) * stride + a->code_bytes) {
        memset(h->copies, 0, RUN * padded);
        for (int64_t i = 0; i < n; i++) memcpy(h->copies + i * padded, rows + i * stride, a->code_bytes);
        rows = h->copies, stride = padded;
    }
    form(&h->query, rows, stride, (n + VL - 1) / VL, h->run);
}

#endif
