/* Nibble tables (math/tables.py): learn them by weighted k-means, stage after stage; code keys by them.

   The columns are cut into groups of `width`. Nibble i belongs to group i % groups; it codes what the earlier nibbles of
   its group left of a key. The 16 entries of a table are in lanes. */
#ifndef FARKV_LEARN_H
#define FARKV_LEARN_H
#include "farkv.h"
#include "lanes.h"

#include <math.h>

#define ENTRIES 16
#define N_LANED (ENTRIES / VL)
#define BLOCK_KEYS 256

/* A table in lanes: entry[d][16], and half of each entry's squared length. */
struct laned {
    const float *entry, *half;
};

/* Put a table [16][width] into lanes. */
static void lay_in_lanes(const float *table, int64_t width, float *entry, float *half) {
    for (int v = 0; v < ENTRIES; v++) {
        half[v] = 0;
        for (int64_t d = 0; d < width; d++) {
            float x = table[v * width + d];
            entry[d * ENTRIES + v] = x, half[v] += 0.5f * x * x;
        }
    }
}

/* Keys that are compared together: one alone would wait for its own sums. */
#define TOGETHER 4

/* Keys: the first of n <= TOGETHER, and how far apart they lie. */
struct keys {
    const float *x;
    int64_t stride, n;
};

/* to[r] = the entry nearest to key r, the first of equal ones; 0 for NaN. */
INLINE void find_nearest(struct laned t, struct keys k, int64_t width, int *to) {
    vf near[TOGETHER][N_LANED];
    const float *x[TOGETHER];
    UNROLL for (int r = 0; r < TOGETHER; r++) {
        x[r] = k.x + (r < k.n ? r : 0) * k.stride;
        UNROLL for (int i = 0; i < N_LANED; i++) near[r][i] = -load(t.half + i * VL);
    }
    for (int64_t d = 0; d < width; d++)
        UNROLL for (int i = 0; i < N_LANED; i++) {
            vf entry = load(t.entry + d * ENTRIES + i * VL);
            UNROLL for (int r = 0; r < TOGETHER; r++) near[r][i] += x[r][d] * entry;
        }
    for (int r = 0; r < k.n; r++) {
        vf top = near[r][0];
        UNROLL for (int i = 1; i < N_LANED; i++) top = max_of(near[r][i], top);
        float most = largest_lane(top);
        unsigned best = 0;
        UNROLL for (int i = 0; i < N_LANED; i++) best |= lane_bits((vi)(near[r][i] == fill(most))) << (i * VL);
        to[r] = best ? __builtin_ctz(best) : 0;
    }
}

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* Leave of x what an entry does not tell; less than `tiny` is rounding. */
INLINE void leave(float *x, const float *entry, int64_t width, float tiny) {
    for (int64_t d = 0; d < width; d++) {
        x[d] -= entry[d];
        if (fabsf(x[d]) < tiny) x[d] = 0;
    }
}

/* --- learning -------------------------------------------------------------------------------------------------- */

/* Begin with keys at even steps of the summed weight: heavy keys are likely to be among them. */
static void pick_first(const float *rest, const float *weights, int64_t n, int64_t width, float *table) {
    double total = 0, sum = 0;
    for (int64_t t = 0; t < n; t++) total += weights[t];
    int64_t at = -1;
    for (int v = 0; v < ENTRIES; v++) {
        while (at < n - 1 && sum <= total * (v + 0.5) / ENTRIES) sum += weights[++at];
        memcpy(table + v * width, rest + (at < 0 ? 0 : at) * width, width * 4);
    }
}

/* One round: every entry moves to the weighted mean of the keys that are nearest to it; without any it stays. */
static void move_entries(const float *rest, const float *weights, int64_t n, int64_t width, float *table, float *room) {
    float *entry = room, *half = entry + width * ENTRIES, *sum = half + ENTRIES;
    double mass[ENTRIES] = {0};
    lay_in_lanes(table, width, entry, half);
    memset(sum, 0, width * ENTRIES * 4);
    for (int64_t first = 0; first < n; first += TOGETHER) {
        struct keys k = {rest + first * width, width, least_of(n - first, TOGETHER)};
        int best[TOGETHER];
        find_nearest((struct laned){entry, half}, k, width, best);
        for (int r = 0; r < k.n; r++) {
            mass[best[r]] += weights[first + r];
            float *to = sum + best[r] * width, weight = weights[first + r];
            for (int64_t d = 0; d < width; d++) to[d] += weight * k.x[r * width + d];
        }
    }
    for (int v = 0; v < ENTRIES; v++)
        for (int64_t d = 0; mass[v] > 0 && d < width; d++) table[v * width + d] = sum[v * width + d] / (float)mass[v];
}

struct learn_call {
    const struct table_args *args;
    _Atomic int status;
};

/* Learn the tables of one group of one head. */
static void learn_group(void *context, int64_t task) {
    struct learn_call *call = context;
    const struct table_args *a = call->args;
    int64_t groups = a->columns / a->width, head = task / groups, group = task % groups, width = a->width;
    float *rest = farkv_scratch(SCRATCH_TASK, (a->n * width + (2 * width + 1) * ENTRIES) * 4);
    if (!rest) {
        call->status = FARKV_NO_MEMORY;
        return;
    }
    float *room = rest + a->n * width;
    const float *weights = a->weights + head * a->n;
    for (int64_t t = 0; t < a->n; t++)
        memcpy(rest + t * width, a->keys + (head * a->n + t) * a->columns + group * width, width * 4);
    float tiny = 0;
    for (int64_t i = 0; i < a->n * a->columns; i++) tiny = fmaxf(tiny, fabsf(a->keys[head * a->n * a->columns + i]));
    tiny *= 0x1p-16f;
    for (int64_t i = group; i < a->nibbles; i += groups) {
        float *table = a->tables + (head * a->nibbles + i) * ENTRIES * width;
        pick_first(rest, weights, a->n, width, table);
        for (int64_t round = 0; round < a->rounds; round++) move_entries(rest, weights, a->n, width, table, room);
        lay_in_lanes(table, width, room, room + width * ENTRIES);
        for (int64_t t = 0; t < a->n; t += TOGETHER) {
            struct keys k = {rest + t * width, width, least_of(a->n - t, TOGETHER)};
            int best[TOGETHER];
            find_nearest((struct laned){room, room + width * ENTRIES}, k, width, best);
            for (int r = 0; r < k.n; r++) leave(rest + (t + r) * width, table + best[r] * width, width, tiny);
        }
    }
}

/* --- coding ---------------------------------------------------------------------------------------------------- */

static void code_block(void *context, int64_t task) {
    struct learn_call *call = context;
    const struct table_args *a = call->args;
    int64_t blocks = (a->n + BLOCK_KEYS - 1) / BLOCK_KEYS, head = task / blocks, first = task % blocks * BLOCK_KEYS;
    int64_t groups = a->columns / a->width, width = a->width, half = a->nibbles / 2;
    int64_t n = a->n - first < BLOCK_KEYS ? a->n - first : BLOCK_KEYS;
    float *rest = farkv_scratch(SCRATCH_TASK, (n * a->columns + (width + 1) * ENTRIES) * 4);
    if (!rest) {
        call->status = FARKV_NO_MEMORY;
        return;
    }
    float *room = rest + n * a->columns;
    uint8_t *codes = a->codes + (head * a->n + first) * half;
    memcpy(rest, a->keys + (head * a->n + first) * a->columns, n * a->columns * 4);
    memset(codes, 0, n * half);
    for (int64_t i = 0; i < a->nibbles; i++) {
        const float *table = a->tables + (head * a->nibbles + i) * ENTRIES * width;
        lay_in_lanes(table, width, room, room + width * ENTRIES);
        for (int64_t t = 0; t < n; t += TOGETHER) {
            struct keys k = {rest + t * a->columns + i % groups * width, a->columns, least_of(n - t, TOGETHER)};
            int best[TOGETHER];
            find_nearest((struct laned){room, room + width * ENTRIES}, k, width, best);
            for (int r = 0; r < k.n; r++) {
                leave(rest + (t + r) * a->columns + i % groups * width, table + best[r] * width, width, 0);
                codes[(t + r) * half + i % half] |= (uint8_t)(i < half ? best[r] : best[r] << 4);
            }
        }
    }
}

static int learn(const struct table_args *a) {
    struct learn_call call = {a, FARKV_OK};
    int64_t groups = a->columns / a->width, blocks = (a->n + BLOCK_KEYS - 1) / BLOCK_KEYS;
    if (a->codes) farkv_parallel(a->threads, a->heads * blocks, code_block, &call);
    else farkv_parallel(a->threads, a->heads * groups, learn_group, &call);
    return call.status;
}

#endif
