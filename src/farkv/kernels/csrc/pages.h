/* Records on pages: those that are in memory can be chosen, and those of the `more_pages` others of the largest mass.

   Every record is weighed once for its page's mass, coarsely where that is possible; then those in reach are weighed
   exactly, and chosen from. Softmax sums are of the first weighing. */
#include "select.h"

static int64_t count_pages(const struct select_args *a) {
    int64_t pages = (a->n + a->page_tokens - 1) / a->page_tokens;
    return pages < a->pages ? pages : a->pages;
}

static int64_t end_page(const struct select_args *a, int64_t page) {
    int64_t end = (page + 1) * a->page_tokens;
    return page < count_pages(a) && end < a->n ? end : a->n;
}

/* Whether a record may be chosen, once reach is known. */
static int in_reach(const struct head *h, int64_t at) {
    int64_t page = h->args->here ? at / h->args->page_tokens : 0;
    return !h->args->here || page >= h->args->pages || h->reach[page];
}

/* Find which pages are in reach by masses[page]; a page of sinks weighs most. */
static void find_reach(struct head *h, int64_t head, int64_t sinks) {
    const struct select_args *a = h->args;
    int64_t pages = count_pages(a), missing = 0;
    memcpy(h->reach, a->here + head * a->pages, a->pages);
    for (int64_t p = 0; p < pages; p++) {
        float mass = p * a->page_tokens < sinks ? 1e30f : 0;
        for (int64_t g = 0; g < a->group; g++) {
            float x = h->page_sums[p * a->group + g] * h->inverse[g];
            if (x == x) mass += x;
        }
        memcpy(&h->page_keys[p], &mass, 4);
        h->page_keys[p] = h->reach[p] ? 0 : h->page_keys[p] | (h->page_keys[p] == 0);
        missing += !h->reach[p];
    }
    int64_t more = a->more_pages < missing ? a->more_pages : missing;
    if (more == 0) return;
    struct threshold t = find_threshold(h->page_keys, pages, more);
    for (int64_t p = 0; p < pages; p++) {
        uint32_t prefix = PREFIX(h->page_keys[p]);
        if (h->page_keys[p] == 0 || prefix < t.prefix || (prefix == t.prefix && t.n_equal-- <= 0)) continue;
        h->reach[p] = 1;
    }
}

/* Add to sums[group] the weights of the records [first, end). */
static void sum_page(struct head *h, int64_t first, int64_t end, float *sums) {
    const struct select_args *a = h->args;
    int64_t over = (PIECE - a->code_bytes % PIECE) % PIECE, readable = a->n - (over + a->row_stride - 1) / a->row_stride;
    for (; h->coarse && first + VB <= end && first + VB <= readable; first += VB) {
        const uint8_t *runs[VB / 16], *rows = h->codes + first * a->row_stride;
        for (int lane = 0; lane < VB / 16; lane++) runs[lane] = rows + 16 * lane * a->row_stride;
        form_block(h, runs);
        for (int64_t g = 0; g < a->group; g++) {
            vf sum = {0}, offset = fill(h->offset[g]);
            UNROLL for (int i = 0; i < 4; i++) sum += exp2_roughly(load(h->block + g * VB + i * VL) - offset);
            sums[g] += sum_lanes(sum);
        }
    }
    for (; first < end; first += RUN) {
        int64_t n = end - first < RUN ? end - first : RUN;
        weigh_run(h, first, n);
        for (int64_t g = 0; g < a->group; g++)
            for (int64_t i = 0; i < n; i += VL) {
                vf x = exp2_of(load(h->run + g * RUN + i));
                for (int64_t l = 0; l < VL && i + l < n; l++) sums[g] += x[l];
            }
    }
}

/* Keep the records [first, end), weighed exactly, from `at` on; returns the new `at`. */
static int64_t keep_page(struct head *h, int64_t first, int64_t end, int64_t at) {
    int64_t stride = h->args->n + VL;
    for (int64_t n; first < end; first += n, at += n) {
        n = end - first < RUN ? end - first : RUN;
        weigh_run(h, first, n);
        for (int64_t g = 0; g < h->args->group; g++)
            for (int64_t i = 0; i < n; i += VL) {
                float x[VL];
                store(x, exp2_of(load(h->run + g * RUN + i)));
                memcpy(h->weights + g * stride + at + i, x, (n - i < VL ? n - i : VL) * 4);
            }
        for (int64_t i = 0; i < n; i++) h->kept[at + i] = (int32_t)(first + i);
    }
    return at;
}

/* Weigh all records for their pages, then those in reach. */
static void scan_pages(struct head *h, int64_t head) {
    const struct select_args *a = h->args;
    int64_t pages = count_pages(a), at = 0;
    memset(h->page_sums, 0, (a->pages + 1) * a->group * 4);
    memset(h->tile_sums, 0, count_tiles(a) * a->group * 8);
    for (int64_t p = 0; p <= pages; p++) {
        float *sums = h->page_sums + p * a->group;
        sum_page(h, p * a->page_tokens, end_page(a, p), sums);
        for (int64_t g = 0; g < a->group; g++) h->tile_sums[g] += sums[g];
    }
    for (int64_t g = 0; g < a->group; g++) h->guess[g] = 1, h->inverse[g] = (float)(1 / h->tile_sums[g]);
    int64_t cap = a->caps ? a->caps[head / a->heads] : a->cap;
    find_reach(h, head, a->sinks < cap ? a->sinks : cap);
    for (int64_t p = 0; p <= pages; p++)
        if (p == pages || h->reach[p]) at = keep_page(h, p * a->page_tokens, end_page(a, p), at);
    h->bound = 0, h->n_kept[0] = at;
}

/* Where all records are kept: those out of reach get key 0. */
static void limit_keys(struct head *h, int64_t head, int64_t sinks) {
    const struct select_args *a = h->args;
    memset(h->page_sums, 0, a->pages * a->group * 4);
    for (int64_t p = 0; p < count_pages(a); p++)
        for (int64_t g = 0; g < a->group; g++) {
            const float *weights = h->weights + g * (a->n + VL);
            for (int64_t i = p * a->page_tokens; i < end_page(a, p); i++) h->page_sums[p * a->group + g] += weights[i];
        }
    find_reach(h, head, sinks);
    for (int64_t i = 0; i < a->n; i++)
        if (!in_reach(h, i)) h->keys[i] = 0;
}
