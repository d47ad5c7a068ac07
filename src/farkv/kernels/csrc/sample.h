/* Estimates from a sample of the records: reference logits, guesses of softmax sums, a bound; and thresholds. */
#include <math.h>

#include "query.h"

#define SAMPLE_RUNS 66 /* the first and the last records, and runs in between */
#define SAMPLE_RUN 16

/* The threshold's bits, and how many keys with these bits are taken. */
struct threshold {
    uint32_t prefix;
    int64_t n_equal;
};

#define PREFIX(key) ((key) >> 9)

/* How many of keys, which are below 2^31, are at least `least` > 0. */
static int64_t count_keys(const uint32_t *keys, int64_t n, uint32_t least) {
    vi count[4] = {{0}}, below = (vi){0} + (int32_t)(least - 1);
    int64_t i = 0, total = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        UNROLL for (int j = 0; j < 4; j++) count[j] -= (vi)load_bits(keys + i + j * VL) > below;
    count[0] += count[1] + count[2] + count[3];
    for (; i + VL <= n; i += VL) count[0] -= (vi)load_bits(keys + i) > below;
    for (int j = 0; j < VL; j++) total += count[0][j];
    for (; i < n; i++) total += keys[i] >= least;
    return total;
}

/* The wanted-th largest of keys, the bits of positive floats, to 14 bits of the mantissa; key 0 does not count.
   Each count of the keys halves the range: the keys stay in the CPU's cache, and the counts vectorise. */
static struct threshold find_threshold(const uint32_t *keys, int64_t n, int64_t wanted) {
    uint32_t low = 0, high = PREFIX(0x7fffffffu) + 1; /* enough keys are at least `low`, too few at least `high` */
    int64_t above = 0;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        int64_t count = count_keys(keys, n, middle << 9);
        if (count == wanted) return (struct threshold){middle, wanted};
        if (count > wanted) low = middle;
        else high = middle, above = count;
    }
    return (struct threshold){low, wanted - above};
}

/* The keys of masses: their float bits, at least 1; NaN gets a key too. */
INLINE void keys_of(vf mass, uint32_t *keys) {
    vu key = (vu)mass & 0x7fffffffu;
    key |= (vu)(key == 0) & 1;
    memcpy(keys, &key, VB);
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

/* Note the exponents of a sampled run, one query's at `from`; inverse becomes the largest. */
INLINE void note_sample(struct head *h, int64_t run, int64_t g, const float *from, float *samples) {
    vf top = load(from);
    for (int j = 0; j < SAMPLE_RUN; j += VL) {
        vf t = load(from + j);
        top = max_of(t, top);
        store(samples + (run * h->args->group + g) * SAMPLE_RUN + j, t);
    }
    h->inverse[g] = fmaxf(h->inverse[g], largest_lane(top));
}

/* Weigh the sampled runs into samples[run][group][SAMPLE_RUN]; the references are the largest exponents. */
static void weigh_sample(struct head *h, float *samples) {
    const struct select_args *a = h->args;
    double weight;
    for (int64_t i = 0; i < SAMPLE_RUNS; i++)
        prefetch_row(h->codes + find_sample(a, i, &weight) * a->row_stride, SAMPLE_RUN * a->row_stride);
    for (int64_t g = 0; g < a->group; g++) h->inverse[g] = -3e38f, h->offset[g] = 0;
    for (int64_t i = 0; i < (h->coarse ? 2 : SAMPLE_RUNS); i++) {
        weigh_run(h, find_sample(a, i, &weight), SAMPLE_RUN);
        for (int64_t g = 0; g < a->group; g++) note_sample(h, i, g, h->run + g * RUN, samples);
    }
    for (int64_t i = 2; h->coarse && i < SAMPLE_RUNS; i += VB / SAMPLE_RUN) {
        const uint8_t *runs[VB / SAMPLE_RUN];
        for (int64_t j = 0; j < VB / SAMPLE_RUN; j++)
            runs[j] = h->codes + find_sample(a, i + j, &weight) * a->row_stride;
        form_block(h, runs);
        for (int64_t g = 0; g < a->group; g++)
            for (int64_t j = 0; j < VB / SAMPLE_RUN; j++) {
                float run[SAMPLE_RUN];
                for (int part = 0; part < 4; part++)
                    memcpy(run + 4 * part, h->block + g * VB + part * VL + 4 * j, 16);
                note_sample(h, i + j, g, run, samples);
            }
    }
    for (int64_t g = 0; g < a->group; g++) h->offset[g] = h->inverse[g];
}

/* Guess the sum of query g from its samples; add their weights, over that sum, to the group's masses. */
static void guess_sum(struct head *h, int64_t g, float *samples, float *mass) {
    int64_t group = h->args->group;
    vf sum = {0}, edges = {0};
    double weight = 1;
    for (int64_t i = 0; i < SAMPLE_RUNS; i++) {
        find_sample(h->args, i, &weight);
        for (int j = 0; j < SAMPLE_RUN; j += VL) {
            float *t = samples + (i * group + g) * SAMPLE_RUN + j;
            vf e = exp2_of(load(t) - h->offset[g]);
            store(t, e);
            if (i < 2) edges += e;
            else sum += e;
        }
    }
    h->guess[g] = sum_lanes(edges) + weight * sum_lanes(sum);
    h->inverse[g] = (float)(1 / h->guess[g]);
    for (int64_t i = 2; i < SAMPLE_RUNS; i++)
        for (int j = 0; j < SAMPLE_RUN; j += VL) {
            float *to = mass + i * SAMPLE_RUN + j;
            store(to, load(to) + load(samples + (i * group + g) * SAMPLE_RUN + j) * h->inverse[g]);
        }
}

/* Whether so few records, or so many of them wanted, that a sample does not pay. */
static int is_small(const struct select_args *a) {
    return a->n < 4 * SAMPLE_RUNS * SAMPLE_RUN || (!a->least && a->cap + a->n_taken > a->n / 4);
}

/* A mass that slightly more than `wanted` records should reach, by the keys of sampled ones. */
static float guess_bound(const struct select_args *a, const uint32_t *keys, int64_t n_keys, int64_t wanted) {
    double rank = 1.1 * (double)wanted / (double)a->n * (double)n_keys;
    int64_t place = (int64_t)(rank + 2 * sqrt(rank) + 3);
    return place < n_keys ? float_of(find_threshold(keys, n_keys, place).prefix << 9) : 0;
}

/* Set reference logits, guesses of the sums, and a bound for the scan. */
static void take_sample(struct head *h, int64_t head) {
    const struct select_args *a = h->args;
    int64_t group = a->group, n_keys = (SAMPLE_RUNS - 2) * SAMPLE_RUN;
    float *samples = h->weights; /* not in use yet */
    float mass[SAMPLE_RUNS * SAMPLE_RUN] = {0};
    h->coarse = SHUFFLES_BYTES && h->query.softcap == 0 && count_nibbles(a) <= MOST_NIBBLES &&
                a->row_stride >= a->code_bytes;
    if (h->coarse && !h->query.n_quads) round_tables(h);
    h->coarse &= h->margin < MOST_MARGIN;
    weigh_sample(h, samples);
    for (int64_t g = 0; g < group; g++) guess_sum(h, g, samples, mass);
    for (int64_t g = 0; g < group; g++) h->coarse &= h->furthest - h->offset[g] < MOST_EXP;
    uint32_t keys[(SAMPLE_RUNS - 2) * SAMPLE_RUN];
    double weight;
    for (int64_t i = 0; i < n_keys; i += VL) {
        vf x = load(mass + 2 * SAMPLE_RUN + i);
        int64_t first = find_sample(a, 2 + i / SAMPLE_RUN, &weight) + i % SAMPLE_RUN;
        if (h->seed >= 0) x /= draw_lanes(h->seed, count_from(first));
        keys_of(x, keys + i);
    }
    h->bound = guess_bound(a, keys, n_keys, a->cap + a->n_taken + (h->seed >= 0));
    if (!h->least) return;
    /* What weighs less than is asked for need not be kept, beyond the fewest; the sums are guessed to a fifth, or the
       scan is repeated. */
    float fewest = guess_bound(a, keys, n_keys, a->fewest[head / a->heads] + a->n_taken);
    h->bound = fmaxf(h->bound, fminf(0.8f * h->least, fewest));
}
