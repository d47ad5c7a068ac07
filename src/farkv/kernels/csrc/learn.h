/* Nibble tables (math/tables.py): learn them by weighted k-means, stage after stage; code keys by them.

   The columns are cut into groups of `width`. Nibble i belongs to group i % groups; it codes what the earlier nibbles of
   its group left of a key. Keys are compared VL at a time, a key to a lane. */
#ifndef FARKV_LEARN_H
#define FARKV_LEARN_H
#include "farkv.h"
#include "simd.h"

#include <math.h>

#define ENTRIES 16
/* Entries that are compared at a time: one sum would wait for itself. */
#define N_SUMS (N_ACC < ENTRIES ? N_ACC : ENTRIES)
/* A multiple of VL. */
#define BLOCK_KEYS 256

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

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

/* lanes[d][VL] = keys, of n <= VL that lie `stride` apart; zeros for the others. */
static void lay_in_lanes(const float *keys, int64_t stride, int64_t n, int64_t width, float *lanes) {
    for (int64_t r = 0; r < VL; r++)
        for (int64_t d = 0; d < width; d++) lanes[d * VL + r] = r < n ? keys[r * stride + d] : 0;
}

/* to[r] = the entry nearest to the key in lane r, the first of equal ones; 0 for NaN. */
INLINE void find_nearest(const struct table *t, const float *lanes, int32_t *to) {
    vf top = fill(-INFINITY);
    vi best = {0};
    for (int v = 0; v < ENTRIES; v += N_SUMS) {
        const float *entry = t->turned + v;
        vf near[N_SUMS];
        UNROLL for (int i = 0; i < N_SUMS; i++) near[i] = fill(-t->half[v + i]);
        for (int64_t d = 0; d < t->width; d++) {
            vf x = load(lanes + d * VL);
            UNROLL for (int i = 0; i < N_SUMS; i++) near[i] += x * entry[d * ENTRIES + i];
        }
        UNROLL for (int i = 0; i < N_SUMS; i++) {
            vi nearer = (vi)(near[i] > top);
            top = pick(nearer, near[i], top);
            best = (nearer & (v + i)) | (~nearer & best);
        }
    }
    memcpy(to, &best, VB);
}

/* Leave of x what an entry does not tell; less than `tiny` is rounding. */
INLINE void leave(float *x, const float *entry, int64_t width, float tiny) {
    for (int64_t d = 0; d < width; d++) {
        x[d] -= entry[d];
        if (fabsf(x[d]) < tiny) x[d] = 0;
    }
}

/* --- learning -------------------------------------------------------------------------------------------------- */

/* Keys of one group of one head, what is left of them in lanes too, how much each counts; room for a table and sums. */
struct sample {
    float *weights, *rest, *lanes, *turned, *sum;
    int64_t n, width;
};

static void fill_lanes(struct sample s) {
    for (int64_t t = 0; t < s.n; t += VL)
        lay_in_lanes(s.rest + t * s.width, s.width, least_of(s.n - t, VL), s.width, s.lanes + t * s.width);
}

/* Weigh every key by the square of what is left of it besides, over its mean; not where nothing is left of any. */
static void weigh_rest(struct sample s, const float *weights) {
    double total = 0;
    for (int64_t t = 0; t < s.n; t++) {
        float square = 0;
        for (int64_t d = 0; d < s.width; d++) square += s.rest[t * s.width + d] * s.rest[t * s.width + d];
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
        memcpy(table + v * s.width, s.rest + (at < 0 ? 0 : at) * s.width, s.width * 4);
    }
}

/* One round: every entry moves to the weighted mean of the keys that are nearest to it; without any it stays. */
static void move_entries(struct sample s, float *entries) {
    double mass[ENTRIES] = {0};
    struct table table = turn_table(entries, s.width, s.turned);
    memset(s.sum, 0, s.width * ENTRIES * 4);
    for (int64_t first = 0; first < s.n; first += VL) {
        int32_t best[VL];
        find_nearest(&table, s.lanes + first * s.width, best);
        for (int64_t t = first; t < first + VL && t < s.n; t++) {
            float *to = s.sum + best[t - first] * s.width, weight = s.weights[t];
            const float *x = s.rest + t * s.width;
            mass[best[t - first]] += weight;
            for (int64_t d = 0; d < s.width; d++) to[d] += weight * x[d];
        }
    }
    for (int v = 0; v < ENTRIES; v++)
        for (int64_t d = 0; mass[v] > 0 && d < s.width; d++)
            entries[v * s.width + d] = s.sum[v * s.width + d] / (float)mass[v];
}

/* Take what a table tells away from the keys. */
static void take_away(struct sample s, const float *entries, float tiny) {
    struct table table = turn_table(entries, s.width, s.turned);
    for (int64_t first = 0; first < s.n; first += VL) {
        int32_t best[VL];
        find_nearest(&table, s.lanes + first * s.width, best);
        for (int64_t t = first; t < first + VL && t < s.n; t++)
            leave(s.rest + t * s.width, entries + best[t - first] * s.width, s.width, tiny);
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
    int64_t n_laned = (a->n + VL - 1) / VL * VL;
    float *rest = farkv_scratch(SCRATCH_TASK, ((a->n + n_laned + 2 * ENTRIES) * width + a->n) * 4);
    if (!rest) {
        call->status = FARKV_NO_MEMORY;
        return;
    }
    float *lanes = rest + a->n * width, *turned = lanes + n_laned * width;
    float *sum = turned + ENTRIES * width, *weights = sum + ENTRIES * width;
    struct sample sample = {weights, rest, lanes, turned, sum, a->n, width};
    memcpy(weights, a->weights + head * a->n, a->n * 4);
    for (int64_t t = 0; t < a->n; t++)
        memcpy(rest + t * width, a->keys + (head * a->n + t) * a->columns + group * width, width * 4);
    float tiny = find_tiny(a->keys + head * a->n * a->columns, a->n * a->columns);
    for (int64_t i = group; i < a->nibbles; i += groups) {
        float *table = a->tables + (head * a->nibbles + i) * ENTRIES * width;
        fill_lanes(sample);
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
    float *rest = farkv_scratch(SCRATCH_TASK, (n * a->columns + width * (VL + ENTRIES)) * 4);
    if (!rest) {
        call->status = FARKV_NO_MEMORY;
        return;
    }
    float *lanes = rest + n * a->columns, *turned = lanes + width * VL;
    uint8_t *codes = a->codes + (head * a->n + first) * half;
    memcpy(rest, a->keys + (head * a->n + first) * a->columns, n * a->columns * 4);
    memset(codes, 0, n * half);
    for (int64_t i = 0; i < a->nibbles; i++) {
        const float *entries = a->tables + (head * a->nibbles + i) * ENTRIES * width;
        struct table table = turn_table(entries, width, turned);
        for (int64_t start = 0; start < n; start += VL) {
            float *keys = rest + start * a->columns + i % groups * width;
            int32_t best[VL];
            lay_in_lanes(keys, a->columns, least_of(n - start, VL), width, lanes);
            find_nearest(&table, lanes, best);
            for (int64_t t = start; t < start + VL && t < n; t++) {
                int32_t v = best[t - start];
                leave(rest + t * a->columns + i % groups * width, entries + v * width, width, 0);
                codes[t * half + i % half] |= (uint8_t)(i < half ? v : v << 4);
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
