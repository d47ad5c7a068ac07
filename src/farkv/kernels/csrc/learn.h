/* Nibble tables (math/tables.py): learn them by weighted k-means, stage after stage; code keys by them.

   The columns are cut into groups of `width`. Nibble i belongs to group i % groups; it codes what the earlier nibbles of
   its group left of a key. Keys are compared KEYS at a time, a key to a lane; what is left of them stays in lanes. */
#ifndef FARKV_LEARN_H
#define FARKV_LEARN_H
#include "farkv.h"
#include "simd.h"

#include <math.h>

#define ENTRIES 16
/* Keys, and entries, that are compared at a time: their sums stay in registers, and a load serves several of them. */
#define KEYS (2 * VL)
#define N_SUMS (N_ACC / 2)
/* Keys of a task; a multiple of KEYS. */
#define BLOCK_KEYS 512

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* A table turned, [width][16], and half of each entry's squared length. */
struct table {
    const float *turned;
    float half[ENTRIES];
    int64_t width;
};

static struct table turn_table(const float *entries, int64_t width, float *turned) {
    struct table t = {.turned = turned, .width = width};
    for (int v = 0; v < ENTRIES; v++)
        for (int64_t d = 0; d < width; d++) {
            float x = entries[v * width + d];
            turned[d * ENTRIES + v] = x, t.half[v] += 0.5f * x * x;
        }
    return t;
}

/* lanes[block][d][KEYS] = n keys, that lie `stride` apart; zeros fill the last block. */
static void lay_in_lanes(const float *keys, int64_t stride, int64_t n, int64_t width, float *lanes) {
    for (int64_t first = 0; first < n; first += KEYS, lanes += KEYS * width)
        for (int64_t r = 0; r < KEYS; r++)
            for (int64_t d = 0; d < width; d++) lanes[d * KEYS + r] = first + r < n ? keys[(first + r) * stride + d] : 0;
}

/* best[i] = the entries nearest to KEYS keys, the first of equal ones; 0 for NaN. */
INLINE void find_nearest(const struct table *t, const float *lanes, vi best[2]) {
    vf top[2] = {fill(-INFINITY), fill(-INFINITY)};
    best[0] = best[1] = (vi){0};
    for (int v = 0; v < ENTRIES; v += N_SUMS) {
        const float *entry = t->turned + v;
        vf near[2][N_SUMS];
        UNROLL for (int i = 0; i < N_SUMS; i++) near[0][i] = near[1][i] = fill(-t->half[v + i]);
        for (int64_t d = 0; d < t->width; d++) {
            vf x = load(lanes + d * KEYS), y = load(lanes + d * KEYS + VL);
            UNROLL for (int i = 0; i < N_SUMS; i++) {
                vf e = fill(entry[d * ENTRIES + i]);
                near[0][i] += x * e, near[1][i] += y * e;
            }
        }
        UNROLL for (int half = 0; half < 2; half++) UNROLL for (int i = 0; i < N_SUMS; i++) {
            vi nearer = (vi)(near[half][i] > top[half]);
            top[half] = pick(nearer, near[half][i], top[half]);
            best[half] = (nearer & (v + i)) | (~nearer & best[half]);
        }
    }
}

/* Leave of KEYS keys what their entries do not tell; less than `tiny` is rounding. */
INLINE void leave(const struct table *t, float *lanes, const vi best[2], float tiny) {
    for (int64_t d = 0; d < t->width; d++)
        UNROLL for (int half = 0; half < 2; half++) {
            float *at = lanes + d * KEYS + half * VL;
            vf x = load(at) - pick_of_16(t->turned + d * ENTRIES, best[half]);
            vi is_tiny = (vi)(max_of(x, -x) < fill(tiny));
            store(at, (vf)((vi)x & ~is_tiny));
        }
}

/* --- learning -------------------------------------------------------------------------------------------------- */

/* What is left of the keys of one group of one head, row by row and in lanes, how much each counts; room for a table
   and sums. Rows are `width` apart, the width filled up to whole vectors with zeros. */
struct sample {
    float *weights, *rest, *lanes, *turned, *sum;
    int64_t n, width, stride;
};

/* Weigh every key by the square of what is left of it besides, over its mean; not where nothing is left of any. */
static void weigh_rest(struct sample s, const float *weights) {
    double total = 0;
    for (int64_t t = 0; t < s.n; t++) {
        float square = 0;
        for (int64_t d = 0; d < s.width; d++) square += s.rest[t * s.stride + d] * s.rest[t * s.stride + d];
        s.weights[t] = square, total += square;
    }
    float inverse = total > 0 ? (float)(s.n / total) : 0;
    for (int64_t t = 0; t < s.n; t++) s.weights[t] = inverse > 0 ? weights[t] * (s.weights[t] * inverse) : weights[t];
}

/* Begin with keys at even steps of the summed weight: heavy keys are likely to be among them. */
static void pick_first(struct sample s, float *table) {
    double total = 0, sum = 0;
    for (int64_t t = 0; t < s.n; t++) total += s.weights[t];
    int64_t at = -1;
    for (int v = 0; v < ENTRIES; v++) {
        while (at < s.n - 1 && sum <= total * (v + 0.5) / ENTRIES) sum += s.weights[++at];
        memcpy(table + v * s.width, s.rest + (at < 0 ? 0 : at) * s.stride, s.width * 4);
    }
}

/* One round: every entry moves to the weighted mean of the keys that are nearest to it; without any it stays. */
static void move_entries(struct sample s, float *entries) {
    double mass[ENTRIES] = {0};
    struct table table = turn_table(entries, s.width, s.turned);
    memset(s.sum, 0, s.stride * ENTRIES * 4);
    for (int64_t first = 0; first < s.n; first += KEYS) {
        vi best[2];
        find_nearest(&table, s.lanes + first * s.width, best);
        for (int64_t t = first; t < first + KEYS && t < s.n; t++) {
            int32_t v = best[(t - first) / VL][(t - first) % VL];
            float *to = s.sum + v * s.stride, weight = s.weights[t];
            mass[v] += weight;
            for (int64_t d = 0; d < s.stride; d += VL) store(to + d, load(to + d) + weight * load(s.rest + t * s.stride + d));
        }
    }
    for (int v = 0; v < ENTRIES; v++)
        for (int64_t d = 0; mass[v] > 0 && d < s.width; d++)
            entries[v * s.width + d] = s.sum[v * s.stride + d] / (float)mass[v];
}

/* Take what a table tells away from the keys. */
static void take_away(struct sample s, const float *entries, float tiny) {
    struct table table = turn_table(entries, s.width, s.turned);
    for (int64_t first = 0; first < s.n; first += KEYS) {
        float *lanes = s.lanes + first * s.width;
        vi best[2];
        find_nearest(&table, lanes, best);
        leave(&table, lanes, best, tiny);
        for (int64_t t = first; t < first + KEYS && t < s.n; t++)
            for (int64_t d = 0; d < s.width; d++) s.rest[t * s.stride + d] = lanes[d * KEYS + t - first];
    }
}

/* Of a head's largest number, what is rounding. */
static float find_tiny(const float *keys, int64_t n) {
    vf most = {0};
    int64_t i = 0;
    for (; i + VL <= n; i += VL) most = max_of((vf)(load_bits(keys + i) & 0x7fffffffu), most);
    float tiny = 0;
    for (int lane = 0; lane < VL; lane++) tiny = fmaxf(tiny, most[lane]);
    for (; i < n; i++) tiny = fmaxf(tiny, fabsf(keys[i]));
    return tiny * 0x1p-16f;
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
    int64_t stride = round_up(width, VL), n_laned = round_up(a->n, KEYS);
    float *rest = farkv_scratch(SCRATCH_TASK, (a->n * stride + n_laned * width + ENTRIES * (width + stride) + a->n) * 4);
    if (!rest) {
        call->status = FARKV_NO_MEMORY;
        return;
    }
    float *lanes = rest + a->n * stride, *turned = lanes + n_laned * width;
    float *sum = turned + ENTRIES * width, *weights = sum + ENTRIES * stride;
    struct sample sample = {weights, rest, lanes, turned, sum, a->n, width, stride};
    const float *keys = a->keys + head * a->n * a->columns;
    memcpy(weights, a->weights + head * a->n, a->n * 4);
    memset(rest, 0, a->n * stride * 4);
    for (int64_t t = 0; t < a->n; t++) memcpy(rest + t * stride, keys + t * a->columns + group * width, width * 4);
    lay_in_lanes(rest, stride, a->n, width, lanes);
    float tiny = find_tiny(keys, a->n * a->columns);
    for (int64_t i = group; i < a->nibbles; i += groups) {
        float *table = a->tables + (head * a->nibbles + i) * ENTRIES * width;
        if (i >= groups) weigh_rest(sample, a->weights + head * a->n);
        pick_first(sample, table);
        for (int64_t round = 0; round < a->rounds; round++) move_entries(sample, table);
        take_away(sample, table, tiny);
    }
}

/* --- coding ---------------------------------------------------------------------------------------------------- */

static void code_block(void *context, int64_t task) {
    struct learn_call *call = context;
    const struct table_args *a = call->args;
    int64_t blocks = (a->n + BLOCK_KEYS - 1) / BLOCK_KEYS, head = task / blocks, first = task % blocks * BLOCK_KEYS;
    int64_t groups = a->columns / a->width, width = a->width, half = a->nibbles / 2;
    int64_t n = least_of(a->n - first, BLOCK_KEYS);
    float *lanes = farkv_scratch(SCRATCH_TASK, (round_up(n, KEYS) + ENTRIES) * width * 4);
    if (!lanes) {
        call->status = FARKV_NO_MEMORY;
        return;
    }
    float *turned = lanes + round_up(n, KEYS) * width;
    uint8_t *codes = a->codes + (head * a->n + first) * half;
    memset(codes, 0, n * half);
    for (int64_t i = 0; i < a->nibbles; i++) {
        int64_t group = i / (a->nibbles / groups), nibble = group + i % (a->nibbles / groups) * groups;
        const float *entries = a->tables + (head * a->nibbles + nibble) * ENTRIES * width;
        struct table table = turn_table(entries, width, turned);
        if (nibble == group)
            lay_in_lanes(a->keys + (head * a->n + first) * a->columns + group * width, a->columns, n, width, lanes);
        for (int64_t start = 0; start < n; start += KEYS) {
            vi best[2];
            find_nearest(&table, lanes + start * width, best);
            leave(&table, lanes + start * width, best, 0);
            for (int64_t t = start; t < start + KEYS && t < n; t++) {
                int32_t v = best[(t - start) / VL][(t - start) % VL];
                codes[t * half + nibble % half] |= (uint8_t)(nibble < half ? v : v << 4);
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
