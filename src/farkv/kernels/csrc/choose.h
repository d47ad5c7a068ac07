/* Choose records from the candidates of a scan, and run the selection for all heads. */
#include "pages.h"

static int are_stored(const int64_t *positions, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; i++)
        if (positions[i] < 0 || positions[i] >= n) return 0;
    return 1;
}

static void mark_taken(struct head *h, int64_t head) {
    const struct select_args *a = h->args;
    memset(h->taken, 0, a->n / 8 + 1);
    for (int64_t i = 0; i < a->n_taken; i++) {
        int64_t at = a->taken[head * a->n_taken + i];
        if (at >= 0 && at < a->n) h->taken[at / 8] |= (uint8_t)(1 << at % 8);
    }
}

static int is_taken(const struct head *h, int64_t at) { return h->args->n_taken && h->taken[at / 8] >> at % 8 & 1; }

/* Move all parts' candidates together, with keys of their exact weights; returns how many there are.

   Sinks, taken records and those out of reach get key 0. Keys are stored a vector at a time, so some beyond the last are written too. */
static int64_t weigh_kept(struct head *h, int64_t head, int64_t sinks, int64_t n_parts) {
    const struct select_args *a = h->args;
    int64_t n = 0, group = a->group, stride = a->n + VL;
    for (int64_t part = 0; part < n_parts; part++) {
        int64_t from = find_part(a, part, n_parts), count = h->n_kept[part];
        for (int64_t i = 0; i < count; i += VL) {
            vf mass = {0};
            for (int64_t g = 0; g < group; g++) mass += load(h->weights + g * stride + from + i) * h->inverse[g];
            if (h->seed >= 0) {
                vi place;
                memcpy(&place, h->kept + from + i, VB);
                mass /= draw_lanes(h->seed, place);
            }
            keys_of(mass, h->keys + n + i);
        }
        memmove(h->kept + n, h->kept + from, (size_t)count * 4);
        n += count;
    }
    if (a->here && n == a->n) limit_keys(h, head, sinks);
    for (int64_t i = 0; i < n && h->kept[i] < sinks; i++) h->keys[i] = 0;
    for (int64_t i = 0; a->n_taken && i < n; i++)
        if (is_taken(h, h->kept[i])) h->keys[i] = 0;
    return n;
}

/* The largest priority that is not chosen; 0 where all are. */
static float find_next(const uint32_t *keys, int64_t n, struct threshold t, int64_t wanted) {
    uint32_t least = t.prefix << 9, next = 0;
    if (count_keys(keys, n, least ? least : 1) > wanted) return float_of(least);
    for (int64_t i = 0; i < n; i++) next = keys[i] < least && keys[i] > next ? keys[i] : next;
    return float_of(next);
}

/* Write the positions of keys above the threshold, and of the first n_equal with the threshold's bits; and with `odds`
   what each that was drawn stands for, as a logit: log(next / mass) where that is above 0. */
static void take_kept(const struct head *h, int64_t n, struct threshold t, int64_t *out, int64_t wanted, float next,
                      float *odds) {
    int64_t chosen = 0;
    for (int64_t i = 0; i < n && chosen < wanted; i += VL) {
        vi prefix = (vi)PREFIX(load_bits(h->keys + i)), place;
        unsigned lanes = n - i < VL ? (1u << (n - i)) - 1 : ALL_LANES;
        unsigned above = lane_bits(prefix > (int32_t)t.prefix) & lanes;
        unsigned equal = lane_bits(prefix == (int32_t)t.prefix) & lanes;
        for (; equal; equal &= equal - 1) {
            int64_t j = __builtin_ctz(equal);
            if (h->keys[i + j] == 0 || t.n_equal == 0) continue;
            above |= 1u << j;
            t.n_equal--;
        }
        int32_t few[VL];
        unsigned bits = odds ? above : 0;
        for (int64_t at = chosen; bits && at < wanted; bits &= bits - 1, at++) {
            int64_t j = i + __builtin_ctz(bits);
            float mass = float_of(h->keys[j]) * draw(h->seed, h->kept[j]);
            odds[at] = mass < next ? logf(next / mass) : 0;
        }
        memcpy(&place, h->kept + i, VB);
        int64_t count = keep_lanes(above, place, few), room = wanted - chosen;
        if (room >= VL) {
            for (int j = 0; j < VL; j++) out[chosen + j] = few[j];
        } else {
            for (int64_t j = 0; j < count && j < room; j++) out[chosen + j] = few[j];
        }
        chosen += count;
    }
}

/* Set the threshold of up to *wanted of n candidates, and how many reach it; returns 0 where more must be kept. */
static int find_choice(const struct head *h, int64_t n, int64_t fewest, int64_t *wanted, struct threshold *t) {
    const uint32_t *keys = h->keys;
    if (h->least > 0 && *wanted) {
        uint32_t key;
        memcpy(&key, &h->least, 4);
        *t = (struct threshold){PREFIX(key), *wanted};
        int64_t count = count_keys(keys, n, key & ~511u ? key & ~511u : 1);
        if (count >= fewest && count <= *wanted) {
            *wanted = count;
            return 1;
        }
        if (count < fewest) *wanted = fewest;
    }
    if (*wanted == 0) return 1;
    int64_t count = count_keys(keys, n, 1);
    if (h->args->here && count < *wanted) *wanted = count;
    if (count < *wanted) return 0;
    if (*wanted == 0) return 1;
    *t = find_threshold(keys, n, *wanted);
    return 1;
}

/* Choose from the candidates; returns 0 where a record that the scan dropped might be better. */
static int choose(struct head *h, int64_t head, int64_t n_parts) {
    const struct select_args *a = h->args;
    float worst = 0;
    for (int64_t g = 0; g < a->group; g++) {
        h->sums[g] = 0;
        for (int64_t tile = 0; tile < count_tiles(a); tile++) h->sums[g] += h->tile_sums[tile * a->group + g];
        worst = fmaxf(worst, (float)(h->guess[g] / h->sums[g]));
        h->inverse[g] = (float)(1 / h->sums[g]);
    }
    int64_t cap = a->caps ? a->caps[head / a->heads] : a->cap, sinks = a->sinks < cap ? a->sinks : cap, chosen = 0;
    int64_t *out = a->out + head * a->cap;
    int64_t n = weigh_kept(h, head, sinks, n_parts);
    for (int64_t i = 0; i < sinks; i++)
        if (!is_taken(h, i) && in_reach(h, i)) out[chosen++] = i;
    int64_t wanted = cap - chosen, fewest = (a->fewest ? a->fewest[head / a->heads] : 0) - chosen;
    fewest = fewest < 0 ? 0 : fewest < wanted ? fewest : wanted;
    struct threshold t = {0, 0};
    if (!find_choice(h, n, fewest, &wanted, &t)) return 0;
    float next = h->seed < 0 ? float_of(t.prefix << 9) : find_next(h->keys, n, t, wanted);
    if (wanted && h->bound > 0 && next < h->bound * worst * 1.0001f) return 0;
    float *odds = h->seed < 0 ? NULL : a->odds + head * a->cap;
    if (a->seeds) memset(a->odds + head * a->cap, 0, a->cap * 4);
    if (wanted) take_kept(h, n, t, out + chosen, wanted, next, odds ? odds + chosen : NULL);
    if (a->counts) a->counts[head] = chosen + wanted;
    if (a->floors) a->floors[head] = float_of(t.prefix << 9) / (float)a->group;
    return 1;
}

static int is_cut_off(const struct head *h) {
    for (int64_t g = 0; g < h->args->group; g++)
        if (h->sums[g] >= 0x1p99) return 1;
    return 0;
}

/* After a failed choice: scan again with the sums of the last scan as guesses; the second time, keep every record. */
static void scan_again(struct head *h, int64_t attempt) {
    /* Where a reference was far below the largest logit, weights were clamped. */
    if (attempt || is_cut_off(h)) {
        keep_all(h);
        return;
    }
    h->bound *= 0.5f;
    for (int64_t g = 0; g < h->args->group; g++) {
        h->guess[g] = h->sums[g];
        h->inverse[g] = (float)(1 / h->guess[g]);
    }
    scan(h, 0, 1);
}

static void prepare_head(struct head *h, int64_t head) {
    const struct select_args *a = h->args;
    h->least = a->least ? a->least[head / a->heads] * (float)a->group : 0;
    h->seed = a->seeds ? a->seeds[head] : -1;
    h->codes = a->codes + head / a->heads * a->batch_stride + head % a->heads * a->head_stride;
    project(h, head);
    fill_tables(h, head);
    if (!is_small(a)) take_sample(h, head);
    if (a->n_taken) mark_taken(h, head);
}

/* Scan a part; where there are few records, the first part weighs all of them. */
static void scan_part(struct head *h, int64_t head, int64_t part, int64_t n_parts) {
    if (h->args->here && !is_small(h->args)) scan_pages(h, head);
    else if (!is_small(h->args)) scan(h, part, n_parts);
    else if (part == 0) keep_all(h);
    else h->n_kept[part] = 0;
}

static void finish_head(struct head *h, int64_t head, int64_t n_parts) {
    for (int64_t attempt = 0; !choose(h, head, n_parts) || (is_cut_off(h) && attempt < 2); attempt++) {
        scan_again(h, attempt);
        n_parts = 1;
    }
}

struct select_call {
    const struct select_args *args;
    struct head *heads;
    int64_t n_parts, scratch_bytes;
    _Atomic int status;
};

/* Allocate a task's own scratch; returns 0 where there is no memory. */
static int take_run(struct select_call *call, struct head *h, int64_t more_bytes) {
    uint8_t *at = farkv_scratch(SCRATCH_TASK, (size_t)(more_bytes + (int64_t)(uintptr_t)lay_out_run(call->args, h, NULL)));
    if (!at) {
        call->status = FARKV_NO_MEMORY;
        return 0;
    }
    at = lay_out_run(call->args, h, at);
    if (more_bytes) lay_out(call->args, h, at);
    return 1;
}

static void select_head(void *context, int64_t task) {
    struct select_call *call = context;
    struct head h = {.args = call->args};
    if (!take_run(call, &h, call->scratch_bytes)) return;
    prepare_head(&h, task);
    scan_part(&h, task, 0, 1);
    finish_head(&h, task, 1);
}

static void prepare_task(void *context, int64_t task) {
    struct select_call *call = context;
    if (take_run(call, &call->heads[task], 0)) prepare_head(&call->heads[task], task);
}

static void scan_task(void *context, int64_t task) {
    struct select_call *call = context;
    struct head *h = &call->heads[task / call->n_parts], own = *h;
    if (!take_run(call, &own, 0)) return;
    scan_part(&own, task / call->n_parts, task % call->n_parts, call->n_parts);
    /* Of few records one part knows that all are kept. */
    if (is_small(call->args) && task % call->n_parts == 0) h->bound = own.bound, h->coarse = own.coarse;
}

static void finish_task(void *context, int64_t task) {
    struct select_call *call = context;
    if (take_run(call, &call->heads[task], 0)) finish_head(&call->heads[task], task, call->n_parts);
}

static int select_records(const struct select_args *a) {
    int64_t n_heads = a->batch * a->heads, tiles = count_tiles(a);
    if (!are_stored(a->taken, n_heads * a->n_taken, a->n)) return FARKV_BAD_POSITION;
    struct head unused;
    struct select_call call = {a, NULL, 1, (int64_t)(uintptr_t)lay_out(a, &unused, NULL), FARKV_OK};
    if (!a->here && a->threads > 1 && n_heads % a->threads && n_heads < 4 * a->threads && tiles > 1)
        call.n_parts = tiles < a->threads ? tiles : a->threads;
    if (call.n_parts == 1) {
        farkv_parallel(a->threads, n_heads, select_head, &call);
        return call.status;
    }
    uint8_t *at = farkv_scratch(SCRATCH_CALL, (size_t)(n_heads * ((int64_t)sizeof(struct head) + 64 + call.scratch_bytes)));
    if (!at) return FARKV_NO_MEMORY;
    call.heads = carve(&at, n_heads * (int64_t)sizeof(struct head));
    for (int64_t i = 0; i < n_heads; i++) at = lay_out(a, &call.heads[i], at);
    farkv_parallel(a->threads, n_heads, prepare_task, &call);
    if (!call.status) farkv_parallel(a->threads, n_heads * call.n_parts, scan_task, &call);
    if (!call.status) farkv_parallel(a->threads, n_heads, finish_task, &call);
    return call.status;
}
