/* The tables of one KV head's queries for the index's nibbles, and the logits that they give. */
#ifndef FARKV_QUERY_H
#define FARKV_QUERY_H

#include "head.h"

/* to[0 .. n VL) = sum over d of q[d] side[d][0 .. n VL) */
INLINE void project_columns(int n, const float *q, const float *side, int64_t dim, int64_t columns, float *to) {
    vf sum[4];
    UNROLL for (int i = 0; i < n; i++) sum[i] = (vf){0};
    for (int64_t d = 0; d < dim; d++)
        UNROLL for (int i = 0; i < n; i++) sum[i] += q[d] * load(side + d * columns + i * VL);
    UNROLL for (int i = 0; i < n; i++) store(to + i * VL, sum[i]);
}

/* projected = scaling * log2(e) * (q A); zeros for a query that is not finite: it has no direction. */
static void project(struct head *h, int64_t head) {
    const struct select_args *a = h->args;
    const float *side = a->query + (a->query_batch == 1 ? head % a->heads : head) * a->dim * a->columns;
    for (int64_t g = 0; g < a->group; g++) {
        const float *q = a->q + (head * a->group + g) * a->dim;
        float *to = h->projected + g * a->columns, scaling = (float)a->scaling * LOG2E, sum = 0;
        int64_t r = 0;
        for (; r + 4 * VL <= a->columns; r += 4 * VL) project_columns(4, q, side + r, a->dim, a->columns, to + r);
        for (; r + VL <= a->columns; r += VL) project_columns(1, q, side + r, a->dim, a->columns, to + r);
        for (; r < a->columns; r++) {
            to[r] = 0;
            for (int64_t d = 0; d < a->dim; d++) to[r] += q[d] * side[d * a->columns + r];
        }
        for (r = 0; r < a->columns; r++) to[r] *= scaling, sum += to[r] * 0;
        if (sum != 0) memset(to, 0, a->columns * 4);
    }
}

/* The projected queries as [columns][lanes]: a lane is a query, zeros beyond the last. */
static void turn_projected(struct head *h) {
    int64_t lanes = count_lanes(h->args), group = h->args->group, columns = h->args->columns;
    memset(h->turned, 0, columns * lanes * 4);
    for (int64_t g = 0; g < group; g++)
        for (int64_t r = 0; r < columns; r++) h->turned[r * lanes + g] = h->projected[g * columns + r];
}

/* exact[nibble][16][lane] = projected . table, 4 lanes at a time: what each nibble adds to log2 of a weight. */
static void add_narrow(struct head *h, const float *tables) {
    const struct select_args *a = h->args;
    int64_t n = count_nibbles(a), width = a->width, groups = a->columns / width, lanes = count_lanes(a);
    turn_projected(h);
    for (int64_t lane = 0; lane < lanes; lane += 4)
        for (int64_t i = 0; i < n; i++) {
            const float *p = h->turned + i % groups * width * lanes + lane, *table = tables + i * 16 * width;
            v4 sum[16] = {{0}};
            for (int64_t j = 0; j < width; j++) {
                v4 q;
                memcpy(&q, p + j * lanes, 16);
                UNROLL for (int v = 0; v < 16; v++) sum[v] += q * table[v * width + j];
            }
            for (int v = 0; v < 16; v++) memcpy(h->exact + (i * 16 + v) * lanes + lane, &sum[v], 16);
        }
}

#define N_ROWS (N_ACC / 4)
/* The same where tables are vectors wide: 4 queries and N_ROWS entries at a time. */
static void add_wide(struct head *h, const float *tables) {
    const struct select_args *a = h->args;
    int64_t n = count_nibbles(a), width = a->width, groups = a->columns / width, lanes = count_lanes(a);
    memset(h->turned, 0, a->columns * 4);
    for (int64_t lane = 0; lane < lanes; lane += 4) {
        const float *queries[4];
        for (int g = 0; g < 4; g++)
            queries[g] = lane + g < a->group ? h->projected + (lane + g) * a->columns : h->turned;
        for (int64_t v = 0; v < n * 16; v += N_ROWS) {
            int64_t first = v / 16 % groups * width;
            const float *table = tables + v * width;
            vf sum[N_ACC];
            UNROLL for (int i = 0; i < N_ACC; i++) sum[i] = (vf){0};
            for (int64_t d = 0; d < width; d += VL) {
                vf q[4];
                UNROLL for (int g = 0; g < 4; g++) q[g] = load(queries[g] + first + d);
                UNROLL for (int r = 0; r < N_ROWS; r++) {
                    vf x = load(table + r * width + d);
                    UNROLL for (int g = 0; g < 4; g++) sum[4 * r + g] += x * q[g];
                }
            }
            float found[N_ACC];
            sum_each(sum, found);
            for (int r = 0; r < N_ROWS; r++) memcpy(h->exact + (v + r) * lanes + lane, found + 4 * r, 16);
        }
    }
}

#if PERMUTES_BYTES
/* Round every query's tables for quads. */
static void round_queries(struct head *h) {
    const struct select_args *a = h->args;
    int64_t n = count_nibbles(a), quads = count_quads(a->code_bytes), bytes = quads * QUAD_BYTES;
    float worst = 0;
    memset(h->coarse_table, 0, a->group * bytes);
    memset(h->fine_table, 0, a->group * bytes * FINE_BYTES);
    h->margin = 0, h->furthest = -MOST_LOGIT;
    for (int64_t g = 0; g < a->group; g++) {
        struct rounded r = round_quads(h->exact, n, h->query.lanes, g, h->coarse_table + g * bytes,
                                       h->fine_table + FINE_BYTES * g * bytes);
        h->step[g] = r.step, h->base[g] = r.base, h->fine_step[g] = r.fine_step, h->fine_base[g] = r.fine_base;
        h->fine_center[g] = r.fine_center;
        h->margin = fmaxf(h->margin, r.lost), h->furthest = fmaxf(h->furthest, r.furthest);
        worst = fmaxf(worst, r.fine_step * (float)n / 2);
    }
    h->query.n_quads = quads;
    h->query.fine_step = h->fine_step, h->query.fine_base = h->fine_base, h->query.fine_center = h->fine_center;
    h->query.fine = worst <= MOST_FINE_ERROR ? h->fine_table : NULL;
}
#else
static void round_queries(struct head *h) { (void)h; }
#endif

static void fill_tables(struct head *h, int64_t head) {
    const struct select_args *a = h->args;
    int64_t n = count_nibbles(a), lanes = count_lanes(a);
    const float *tables = a->tables + head * n * 16 * a->width;
    if (a->width % VL) add_narrow(h, tables);
    else add_wide(h, tables);
    for (int64_t i = 0; i < n * 16 * lanes; i++) {
        float x = h->exact[i];
        h->exact[i] = x != x ? 0 : x > MOST_LOGIT ? MOST_LOGIT : x < -MOST_LOGIT ? -MOST_LOGIT : x;
    }
    h->query = (struct index_query){
        .group = a->group, .code_bytes = a->code_bytes, .lanes = lanes, .exact = h->exact, .coarse = h->coarse_table,
        .step = h->step, .base = h->base, .offset = h->offset, .softcap = (float)a->softcap * LOG2E};
    if (count_quads(a->code_bytes)) round_queries(h);
}

typedef int32_t v4i __attribute__((vector_size(16)));

INLINE v4 pick_4(v4i mask, v4 yes, v4 no) { return (v4)(((v4i)yes & mask) | ((v4i)no & ~mask)); }
INLINE v4 lower_of(v4 x, v4 y) { return pick_4(x < y, x, y); }
INLINE v4 higher_of(v4 x, v4 y) { return pick_4(x > y, x, y); }

/* The tables in 8 bits, each query's with one step, and the most that this rounding lowers a logit. */
static void round_tables(struct head *h) {
    const struct select_args *a = h->args;
    int64_t n = count_nibbles(a), lanes = h->query.lanes;
    h->margin = 0, h->furthest = -MOST_LOGIT;
    for (int64_t lane = 0; lane < lanes && lane < a->group; lane += 4) {
        v4 widest = {1e-30f, 1e-30f, 1e-30f, 1e-30f}, top = {0}, base = {0}, lost = {0};
        for (int64_t i = 0; i < n; i++) {
            v4 low, high, x;
            memcpy(&low, h->exact + i * 16 * lanes + lane, 16);
            high = low;
            for (int v = 1; v < 16; v++) {
                memcpy(&x, h->exact + (i * 16 + v) * lanes + lane, 16);
                low = lower_of(low, x), high = higher_of(high, x);
            }
            memcpy(h->lows + i * 4, &low, 16);
            top += high, base += low, high -= low;
            /* Entries of nibbles i and n - 1 - i are added up in 8 bits. */
            if (i < n / 2) memcpy(h->lows + (n + i) * 4, &high, 16);
            else memcpy(&x, h->lows + (2 * n - 1 - i) * 4, 16), widest = higher_of(widest, high + x);
        }
        v4 step = widest / 254, inverse = 254 / widest;
        for (int64_t i = 0; i < n; i++) {
            v4 low, x, most = {0}, sum = {0}, squares = {0};
            memcpy(&low, h->lows + i * 4, 16);
            for (int v = 0; v < 16; v++) {
                memcpy(&x, h->exact + (i * 16 + v) * lanes + lane, 16);
                /* Adding 1.5 * 2^23 rounds to the nearest integer. */
                v4 shifted = (x - low) * inverse + 12582912.0f, code = shifted - 12582912.0f;
                v4 error = x - low - code * step;
                most = higher_of(most, error), sum += error, squares += error * error;
                for (int64_t g = 0; g < 4 && lane + g < a->group; g++)
                    h->coarse_table[((lane + g) * n + pair_place(i, n)) * 16 + v] = (uint8_t)(int32_t)code[g];
            }
            /* So that errors leave the mean weight as it is: of 2^e that is 1 + ln(2) mean(e) + ln(2)^2 / 2 var(e). */
            v4 shift = (sum - 0.34657359f * (squares - sum * sum / 16)) / 16;
            base += shift, lost += most - shift;
        }
        for (int64_t g = 0; g < 4 && lane + g < a->group; g++) {
            h->step[lane + g] = step[g], h->base[lane + g] = base[g];
            h->margin = fmaxf(h->margin, lost[g]);
            h->furthest = fmaxf(h->furthest, top[g] + 2 * n * step[g]);
        }
    }
}

/* block[g][VB] = coarse log2 of weights, before the offset, of 16 records from each of `runs` on, in the order of
   sum_planes. */
INLINE void weigh_planes(int queries, int64_t n, struct head *h, int64_t first, const vc *planes) {
    vi found[8] = {{0}};
    sum_planes(queries, h->coarse_table + first * n * 16, planes, n, found);
    UNROLL for (int q = 0; q < queries; q++) {
        vf step = fill(h->step[first + q]), base = fill(h->base[first + q]);
        UNROLL for (int i = 0; i < 4; i++)
            store(h->block + (first + q) * VB + i * VL, __builtin_convertvector(found[4 * q + i], vf) * step + base);
    }
}

INLINE void form_sized(struct head *h, const uint8_t *const *runs, int64_t code_bytes, int64_t stride, vc *planes) {
    int64_t g = 0, group = h->args->group;
    split_rows(runs, stride, code_bytes, planes);
    for (; g + 2 <= group; g += 2) weigh_planes(2, 2 * code_bytes, h, g, planes);
    if (g < group) weigh_planes(1, 2 * code_bytes, h, g, planes);
}

#if PERMUTES_BYTES
/* The same by quads. */
INLINE void form_quads(struct head *h, const uint8_t *const *runs, int64_t code_bytes, int64_t stride) {
    int64_t quads = count_quads(code_bytes), group = h->args->group;
    UNROLL for (int i = 0; i < 4; i++) {
        vi keys[MOST_QUADS];
        if (stride == 16 && code_bytes == 16) read_16(runs, 64 * i, keys);
        else if (stride == 8 && code_bytes == 8) read_8(runs, 32 * i, keys);
        else {
            const uint8_t *rows[16];
            for (int r = 0; r < 16; r++) rows[r] = runs[r / 4] + (4 * i + r % 4) * stride;
            read_rows_16(rows, code_bytes, keys);
        }
        for (int64_t g = 0; g < group; g++) {
            vi sum = add_quads(h->coarse_table + g * quads * QUAD_BYTES, keys, quads);
            store(h->block + g * VB + i * VL, __builtin_convertvector(sum, vf) * h->step[g] + h->base[g]);
        }
    }
}
#else
INLINE void form_quads(struct head *h, const uint8_t *const *runs, int64_t code_bytes, int64_t stride) {
    (void)h, (void)runs, (void)code_bytes, (void)stride;
}
#endif

/* Sizes that the compiler knows: of head dimensions 64 and 128 in half precision. */
#define FORM_SIZED(bytes)                                                                                              \
    static __attribute__((noinline)) void form_##bytes(struct head *h, const uint8_t *const *runs) {                  \
        vc planes[2 * bytes];                                                                                          \
        if (PERMUTES_BYTES) form_quads(h, runs, bytes, bytes);                                                         \
        else form_sized(h, runs, bytes, bytes, planes);                                                                \
    }
FORM_SIZED(8)
FORM_SIZED(16)

static __attribute__((noinline)) void form_block(struct head *h, const uint8_t *const *runs) {
    int64_t code_bytes = h->args->code_bytes, stride = h->args->row_stride;
    if (code_bytes == 8 && stride == 8) form_8(h, runs);
    else if (code_bytes == 16 && stride == 16) form_16(h, runs);
    else if (h->query.n_quads) form_quads(h, runs, code_bytes, stride);
    else form_sized(h, runs, code_bytes, stride, h->planes);
}

/* Exponents of the records [first, first + n), n <= RUN. */
static void weigh_run(struct head *h, int64_t first, int64_t n) {
    form_exponents(&h->query, h->codes + first * h->args->row_stride, h->args->row_stride, NULL, n, h->run);
}

#endif
