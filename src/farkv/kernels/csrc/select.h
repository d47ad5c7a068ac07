/* The cap best records of an index, one scan over its codes.

   A sample of the records gives a reference logit, a guess of every query head's softmax sum, and a bound on the group
   mass that about one and a half times the wanted records reach. The scan sums the true softmax sums and keeps what
   reaches the bound (candidates, some per cent). With the true sums the candidates are weighed exactly; a histogram of
   the floats' bits finds the threshold. A record that was not kept weighs less than bound * max(guess / sum): where the
   threshold lies below that, the scan is done again with the true sums, at last keeping everything. */
#include <math.h>
#include <stdlib.h>

#include "codes.h"
#include "farkv.h"

#define TILE 2048 /* records whose sums are joined in a fixed order, whatever the threads */
#define SAMPLE_RUNS 66 /* the first and the last records, and runs in between */
#define SAMPLE_RUN 16
#define BINS 2048

struct head {
    const struct select_args *args;
    struct index_query query;
    const uint8_t *codes;
    vi *table;
    float *projected, *step, *offset; /* [group][columns], [group], [group] */
    double *guess, *sums, *tile_sums; /* [group], [group], [tiles][group] */
    float *inverse;                   /* [group]: 1 / guess */
    float bound;
    int64_t *n_kept; /* [parts] */
    int32_t *kept;   /* [n]: positions, each part's from its first record on */
    float *weights;  /* [n][group] of what is kept */
    uint8_t *taken;  /* a bit per record */
    float *run;      /* [group][RUN] */
    uint8_t *copies; /* RUN rows with room for whole pieces */
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
    h->projected = carve(&at, group * a->columns * 4);
    h->step = carve(&at, group * 4);
    h->offset = carve(&at, group * 4);
    h->inverse = carve(&at, group * 4);
    h->guess = carve(&at, group * 8);
    h->sums = carve(&at, group * 8);
    h->tile_sums = carve(&at, count_tiles(a) * group * 8);
    h->n_kept = carve(&at, (count_tiles(a) + 1) * 8);
    h->taken = carve(&at, a->n / 8 + 1);
    h->kept = carve(&at, a->n * 4);
    h->weights = carve(&at, a->n * group * 4);
    return at;
}

/* Each task's own: a run's weights and copied rows. */
static uint8_t *lay_out_run(const struct select_args *a, struct head *h, uint8_t *at) {
    h->run = carve(&at, a->group * RUN * 4);
    h->copies = carve(&at, RUN * padded_bytes(a));
    return at;
}

/* projected = scaling * scale * (q A) */
static void project(struct head *h, int64_t head) {
    const struct select_args *a = h->args;
    const float *side = a->query + (a->query_batch == 1 ? head % a->heads : head) * a->dim * a->columns;
    const float *scale = a->scale + head * a->columns;
    for (int64_t g = 0; g < a->group; g++) {
        const float *q = a->q + (head * a->group + g) * a->dim;
        float *to = h->projected + g * a->columns;
        memset(to, 0, a->columns * 4);
        for (int64_t d = 0; d < a->dim; d++)
            for (int64_t r = 0; r < a->columns; r++) to[r] += q[d] * side[d * a->columns + r];
        for (int64_t r = 0; r < a->columns; r++) to[r] *= scale[r] * (float)a->scaling;
    }
}

/* The column whose code is number `half` (0, 1) of pair `part` of word `word`; -1 behind the last. */
static int64_t find_column(const struct select_args *a, int64_t word, int64_t part, int64_t half) {
    int64_t byte = 4 * word + 2 * half + (a->bits == 4 ? part / 2 : part);
    if (byte >= a->code_bytes) return -1;
    return a->bits == 4 ? byte + part % 2 * (a->columns / 2) : byte;
}

/* Round the projected queries to 16 bits or what the sum leaves, each with its own step, and fill the table. */
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
                    int16_t x = r < 0 ? 0 : (int16_t)lrintf(p[r] / step);
                    pair |= (uint32_t)(uint16_t)x << (16 * half);
                }
                h->table[(g * words + w) * parts + part] = (vi)((vu){0} + pair);
            }
    }
    h->query = (struct index_query){a->group, words, parts, h->table, h->step, h->offset, (float)a->softcap * 1.44269504f};
}

/* Exponents of the records [first, first + n), n <= RUN; lanes behind them hold anything finite. */
static void weigh_run(struct head *h, int64_t first, int64_t n) {
    const struct select_args *a = h->args;
    void (*form)(const struct index_query *, const uint8_t *, int64_t, int64_t, float *) = a->bits == 4 ? form_run4 : form_run8;
    int64_t stride = a->row_stride, padded = padded_bytes(a);
    const uint8_t *rows = h->codes + first * stride;
    /* A piece that starts in the last row may reach behind what may be read; the lanes of a vector may, too. */
    if (n % VL || (first + n - 1) * stride + padded > (a->n - 1) * stride + a->code_bytes) {
        memset(h->copies, 0, RUN * padded);
        for (int64_t i = 0; i < n; i++) memcpy(h->copies + i * padded, rows + i * stride, a->code_bytes);
        rows = h->copies, stride = padded;
    }
    form(&h->query, rows, stride, (n + VL - 1) / VL, h->run);
}

/* The threshold's bits and how many of what shares them are taken. */
struct threshold {
    uint32_t prefix;
    int64_t n_equal;
};

static int64_t find_bin(const uint32_t *bins, int64_t *wanted) {
    int64_t bin = BINS - 1;
    for (; bin > 0 && bins[bin] < *wanted; bin--) *wanted -= bins[bin];
    return bin;
}

#define PREFIX(key) ((key) >> 9)

/* The wanted-th largest of keys, the bits of positive floats, to 14 bits of the mantissa; key 0 does not count. */
static struct threshold find_threshold(const uint32_t *keys, int64_t n, int64_t wanted) {
    uint32_t bins[BINS] = {0};
    for (int64_t i = 0; i < n; i++) bins[keys[i] >> 20]++;
    int64_t high = find_bin(bins, &wanted);
    memset(bins, 0, sizeof bins);
    for (int64_t i = 0; i < n; i++)
        if (keys[i] >> 20 == high) bins[keys[i] >> 9 & (BINS - 1)]++;
    int64_t low = find_bin(bins, &wanted);
    return (struct threshold){(uint32_t)(high * BINS + low), wanted};
}

INLINE uint32_t key_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= 0x7fffffff;
    return bits ? bits : 1;
}

INLINE float float_of(uint32_t key) {
    float x;
    memcpy(&x, &key, 4);
    return x;
}

/* First record and weight of a sampled run. */
static int64_t find_sample(const struct select_args *a, int64_t i, double *weight) {
    int64_t n_between = a->n - 2 * SAMPLE_RUN, n_runs = SAMPLE_RUNS - 2;
    *weight = i < 2 ? 1 : (double)n_between / (double)(n_runs * SAMPLE_RUN);
    if (i < 2) return i * (a->n - SAMPLE_RUN);
    return SAMPLE_RUN + (i - 2) * (n_between - SAMPLE_RUN) / (n_runs - 1);
}

/* Set reference logits, guesses of the sums, and the bound that about `wanted` records reach. */
static void take_sample(struct head *h, int64_t wanted) {
    const struct select_args *a = h->args;
    int64_t group = a->group, n_samples = SAMPLE_RUNS * SAMPLE_RUN, all = a->n < 4 * n_samples || wanted > a->n / 4;
    int64_t n_runs = a->n < n_samples ? (a->n + SAMPLE_RUN - 1) / SAMPLE_RUN : SAMPLE_RUNS;
    float *samples = h->weights; /* not in use yet; [run][group][SAMPLE_RUN] */
    float *top = h->inverse;
    for (int64_t g = 0; g < group; g++) top[g] = -3e38f, h->offset[g] = 0, h->guess[g] = 0;
    for (int64_t i = 0; i < n_runs; i++) {
        double weight;
        int64_t first = n_runs < SAMPLE_RUNS ? i * SAMPLE_RUN : find_sample(a, i, &weight);
        int64_t n = a->n - first < SAMPLE_RUN ? a->n - first : SAMPLE_RUN;
        weigh_run(h, first, n);
        for (int64_t g = 0; g < group; g++)
            for (int64_t j = 0; j < n; j++) {
                float t = h->run[g * RUN + j];
                top[g] = t > top[g] ? t : top[g];
                if (!all) samples[(i * group + g) * SAMPLE_RUN + j] = t;
            }
    }
    for (int64_t g = 0; g < group; g++) h->offset[g] = top[g];
    h->bound = 0;
    if (all) {
        for (int64_t g = 0; g < group; g++) h->inverse[g] = 1, h->guess[g] = 1;
        return;
    }
    for (int64_t i = 0; i < n_runs; i++)
        for (int64_t g = 0; g < group; g++) {
            double weight;
            find_sample(a, i, &weight);
            float *t = samples + (i * group + g) * SAMPLE_RUN;
            for (int64_t j = 0; j < SAMPLE_RUN; j++) {
                t[j] = exp2f(fmaxf(t[j] - h->offset[g], LEAST_EXP));
                h->guess[g] += weight * t[j];
            }
        }
    for (int64_t g = 0; g < group; g++) h->inverse[g] = (float)(1 / h->guess[g]);
    uint32_t keys[SAMPLE_RUNS * SAMPLE_RUN];
    int64_t n_keys = 0;
    for (int64_t i = 2; i < n_runs; i++)
        for (int64_t j = 0; j < SAMPLE_RUN; j++) {
            float mass = 0;
            for (int64_t g = 0; g < group; g++) mass += samples[(i * group + g) * SAMPLE_RUN + j] * h->inverse[g];
            keys[n_keys++] = key_of(mass);
        }
    double rank = 1.3 * (double)wanted / (double)a->n * (double)n_keys;
    h->bound = float_of(find_threshold(keys, n_keys, (int64_t)(rank + 3 * sqrt(rank) + 4)).prefix << 9);
}

/* Which of VL records weigh at least the bound, a bit each; what is no number counts as heavy. */
INLINE unsigned reach(const struct head *h, const float *run, float bound) {
    vf mass = {0};
    for (int64_t g = 0; g < h->query.group; g++) mass += load(run + g * RUN) * h->inverse[g];
#if VL == 16
    return _mm512_cmp_ps_mask((__m512)mass, _mm512_set1_ps(bound), _CMP_NLT_UQ);
#elif VL == 8
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps((__m256)mass, _mm256_set1_ps(bound), _CMP_NLT_UQ));
#else
    unsigned bits = 0;
    for (int i = 0; i < VL; i++) bits |= (unsigned)!(mass[i] < bound) << i;
    return bits;
#endif
}

/* Weigh the records [first, first + n), add to the sums, keep what reaches the bound; returns how many are kept. */
static int64_t scan_run(struct head *h, int64_t first, int64_t n, double *sums, int64_t at) {
    int64_t group = h->query.group;
    weigh_run(h, first, n);
    for (int64_t g = 0; g < group; g++) {
        float *e = h->run + g * RUN;
        vf sum = {0};
        int64_t i = 0;
        for (; i + VL <= n; i += VL) {
            vf x = exp2_of(load(e + i));
            store(e + i, x);
            sum += x;
        }
        if (i < n) {
            store(e + i, exp2_of(load(e + i)));
            for (int64_t j = i; j < n; j++) sums[g] += e[j];
        }
        sums[g] += sum_lanes(sum);
    }
    for (int64_t i = 0; i < n; i += VL) {
        unsigned bits = reach(h, h->run + i, h->bound);
        if (n - i < VL) bits &= (1u << (n - i)) - 1;
        for (; bits; bits &= bits - 1, at++) {
            int64_t j = i + __builtin_ctz(bits);
            h->kept[at] = (int32_t)(first + j);
            for (int64_t g = 0; g < group; g++) h->weights[at * group + g] = h->run[g * RUN + j];
        }
    }
    return at;
}

static int64_t find_part(const struct select_args *a, int64_t part, int64_t n_parts) {
    int64_t at = count_tiles(a) * part / n_parts * TILE;
    return at < a->n ? at : a->n;
}

/* Scan the tiles of one part. */
static void scan(struct head *h, int64_t part, int64_t n_parts) {
    const struct select_args *a = h->args;
    int64_t from = find_part(a, part, n_parts), to = find_part(a, part + 1, n_parts), at = from;
    for (int64_t tile = from; tile < to; tile += TILE) {
        double *sums = h->tile_sums + tile / TILE * a->group;
        int64_t end = tile + TILE < to ? tile + TILE : to;
        for (int64_t g = 0; g < a->group; g++) sums[g] = 0;
        for (int64_t i = tile; i < end; i += RUN) at = scan_run(h, i, end - i < RUN ? end - i : RUN, sums, at);
    }
    h->n_kept[part] = at - from;
}
