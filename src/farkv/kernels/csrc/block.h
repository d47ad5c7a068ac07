/* Attention of a block of records for one KV head: logits, softmax below a running maximum, weighted values.

   Up to four query heads at once. Logits are stored [record][query head], so that every vector has each query head in
   the same lanes. A block is always computed in full: a short one is padded with its last record, with weight 0. */
#ifndef FARKV_BLOCK_H
#define FARKV_BLOCK_H

#include <float.h>
#include <math.h>

#include "rows.h"

#define BLOCK 16 /* two blocks of 512-byte rows, this one and the next, fill half of an L1 cache */
#define DUE 1024 /* fractions of a row, the unit of `due` */
#define LOWEST (-FLT_MAX) /* no finite logit is below: what is read weighs something */

/* One part of the records of one KV head. */
struct attend_head {
    const struct attend_args *args;
    struct half k, v;
    const uint8_t *rows;
    const int64_t *positions;
    const float *odds; /* [n_chosen], or NULL */
    int64_t n_chosen;
    int64_t row_bytes;
    vf *q;   /* [group][k chunks][2], in the form's order of values */
    vf *out; /* [group][v chunks][2] */
    /* [group], at the first of the query heads that are processed together: lane l is query head first + l % heads. */
    vf *highest, *sums;
};

struct block {
    const uint8_t *rows[BLOCK], *next[BLOCK];
    float odds[BLOCK]; /* added to its logits, where there are odds */
    int64_t n, n_next;
    int64_t n_ahead, due, rate; /* rows of next already prefetched; rows * DUE that should be; its growth per step */
};

/* Called at every step of the arithmetic: prefetch the rows of the next block that are due, to keep memory busy. */
INLINE void reach_ahead(const struct attend_head *h, struct block *b) {
    b->due += b->rate;
    for (; b->n_ahead < b->n_next && b->n_ahead * DUE < b->due; b->n_ahead++)
        prefetch_row(b->next[b->n_ahead], h->row_bytes);
}

/* acc[record][query head] += the products of one chunk. */
INLINE void multiply_chunk(int form, int heads, const struct attend_head *h, const vf *q, const uint8_t *const *rows,
                           int64_t group, int from, vf *acc) {
    const int records = N_ACC / heads;
    vf x[N_ACC][2];
    UNROLL for (int r = 0; r < records; r++) load_chunk(form, rows[r], &h->k, group, from, x[r]);
    UNROLL for (int i = 0; i < 2; i++) UNROLL for (int g = 0; g < heads; g++) {
        vf q_i = q[g * h->k.n_chunks * 2 + i];
        UNROLL for (int r = 0; r < records; r++) acc[r * heads + g] += x[r][i] * q_i;
    }
}

/* s[record][query head] of a block. */
INLINE void form_logits(int form, int heads, const struct attend_head *h, int64_t first, struct block *b, float *s) {
    const int records = N_ACC / heads;
    const int64_t n_chunks = h->k.n_chunks, n_full = h->k.n_full;
    const vf *q = h->q + first * n_chunks * 2;
    for (int64_t j = 0; j < BLOCK; j += records) {
        reach_ahead(h, b);
        const uint8_t *const *rows = b->rows + j;
        vf acc[N_ACC];
        UNROLL for (int i = 0; i < N_ACC; i++) acc[i] = (vf){0};
        int64_t c = 0;
        for (; c + PIECE_CHUNKS <= n_full; c += PIECE_CHUNKS)
            UNROLL for (int i = 0; i < PIECE_CHUNKS; i++)
                multiply_chunk(form, heads, h, q + 2 * (c + i), rows, c / PIECE_CHUNKS, i * CHUNK, acc);
        for (int from = 0; c < n_full; c++, from += CHUNK)
            multiply_chunk(form, heads, h, q + 2 * c, rows, c / PIECE_CHUNKS, from, acc);
        for (; c < n_chunks; c++)
            UNROLL for (int r = 0; r < records; r++) {
                vf x[2];
                load_end(form, rows[r], &h->k, c, x);
                UNROLL for (int g = 0; g < heads; g++)
                    acc[r * heads + g] += x[0] * q[(g * n_chunks + c) * 2] + x[1] * q[(g * n_chunks + c) * 2 + 1];
            }
        sum_each(acc, s + j * heads);
    }
}

/* Raise the running maximum to new logits, and rescale the sums. */
static __attribute__((noinline)) void raise_highest(int heads, const struct attend_head *h, int64_t first, vf top) {
    float *highest = (float *)(h->highest + first), *sums = (float *)(h->sums + first);
    for (int g = 0; g < heads; g++) {
        float high = highest[g];
        for (int l = g; l < VL; l += heads) high = top[l] > high ? top[l] : high;
        if (!(high > highest[g])) continue;
        float factor = expf(highest[g] - high);
        vf *out = h->out + (first + g) * h->v.n_chunks * 2;
        for (int64_t i = 0; i < h->v.n_chunks * 2; i++) out[i] *= factor;
        for (int l = g; l < VL; l += heads) sums[l] *= factor, highest[l] = high;
    }
}

/* Turn logits into weights relative to the running maximum, to which earlier sums are rescaled. */
INLINE void weigh(int heads, const struct attend_head *h, int64_t first, const struct block *b, float *s) {
    const int n_vectors = BLOCK * heads / VL;
    int64_t n = b->n;
    float softcap = (float)h->args->softcap;
    if (softcap != 0)
        for (int i = 0; i < n_vectors; i++) store(s + i * VL, cap_softly(load(s + i * VL), softcap));
    if (h->odds)
        for (int64_t i = 0; i < n * heads; i++) s[i] += b->odds[i / heads];
    for (int64_t i = n * heads; i < BLOCK * heads; i++) s[i] = -INFINITY;
    vf top = fill(LOWEST), sum = {0};
    for (int i = 0; i < n_vectors; i++) top = max_of(load(s + i * VL), top);
    if (__builtin_expect(any_of(top > h->highest[first]), 0)) raise_highest(heads, h, first, top);
    vf highest = h->highest[first];
    for (int i = 0; i < n_vectors; i++) {
        vf p = exp_of(load(s + i * VL) - highest);
        sum += p;
        store(s + i * VL, p);
    }
    h->sums[first] += sum;
}

/* out += weights * V, for `wide` chunks from c on, in registers; `from` is where they start in
   their group; low[query head] is added to every value. */
INLINE void add_chunks(int form, int heads, int wide, int whole, const struct attend_head *h, int64_t first, int64_t c,
                       int from, struct block *b, const float *p, const float *low) {
    vf *out = h->out + first * h->v.n_chunks * 2;
    vf acc[N_ACC];
    reach_ahead(h, b);
    UNROLL for (int g = 0; g < heads; g++) UNROLL for (int i = 0; i < 2 * wide; i++) {
        acc[g * 2 * wide + i] = out[(g * h->v.n_chunks + c) * 2 + i];
        if (form == FORM_INT4 && whole) acc[g * 2 * wide + i] += low[g];
    }
    int64_t group = c / PIECE_CHUNKS;
    _Pragma("GCC unroll 4") for (int64_t j = 0; j < BLOCK; j++) {
        UNROLL for (int w = 0; w < wide; w++) {
            vf x[2];
            if (!whole) load_end(form, b->rows[j], &h->v, c + w, x);
            else if (form < FORM_INT8) load_chunk(form, b->rows[j], &h->v, 0, (int)(c + w) * CHUNK, x);
            else load_codes(form, b->rows[j], &h->v, group, from + w * CHUNK, x);
            UNROLL for (int g = 0; g < heads; g++) {
                acc[(g * wide + w) * 2] += x[0] * p[j * heads + g];
                acc[(g * wide + w) * 2 + 1] += x[1] * p[j * heads + g];
            }
        }
    }
    UNROLL for (int g = 0; g < heads; g++) UNROLL for (int i = 0; i < 2 * wide; i++)
        out[(g * h->v.n_chunks + c) * 2 + i] = acc[g * 2 * wide + i];
}

/* Multiply the weights by the steps of one group of V, to sum codes directly. low: the sum of weight * low. */
INLINE void scale_weights(int form, int heads, const struct attend_head *h, const struct block *b, int64_t group,
                          const float *p, float *scaled, float *low) {
    vf sum = {0};
    for (int64_t j = 0; j < BLOCK; j++) {
        vf x = load(p + j * heads);
        if (form == FORM_INT4) sum += x * load_low(b->rows[j], &h->v, group);
        /* Lanes beyond this record's are overwritten by the next. */
        store(scaled + j * heads, x * load_step(b->rows[j], &h->v, group));
    }
    store(low, sum);
}

INLINE void add_plain(int form, int heads, const struct attend_head *h, int64_t first, struct block *b, const float *p) {
    const int wide = N_ACC / (2 * heads);
    int64_t c = 0;
    for (; c + wide <= h->v.n_full; c += wide) add_chunks(form, heads, wide, 1, h, first, c, 0, b, p, NULL);
    for (; wide > 1 && c < h->v.n_full; c++) add_chunks(form, heads, 1, 1, h, first, c, 0, b, p, NULL);
}

INLINE void add_coded(int form, int heads, const struct attend_head *h, int64_t first, struct block *b, const float *p) {
    const int most = N_ACC / (2 * heads), wide = most < PIECE_CHUNKS ? most : PIECE_CHUNKS;
    float scaled[BLOCK * 4 + VL] __attribute__((aligned(64))), low[VL];
    for (int64_t c = 0; c < h->v.n_full; c += PIECE_CHUNKS) {
        scale_weights(form, heads, h, b, c / PIECE_CHUNKS, p, scaled, low);
        if (c + PIECE_CHUNKS <= h->v.n_full)
            UNROLL for (int i = 0; i < PIECE_CHUNKS; i += wide)
                add_chunks(form, heads, wide, 1, h, first, c + i, i * CHUNK, b, scaled, low);
        else
            for (int i = 0; c + i < h->v.n_full; i++)
                add_chunks(form, heads, 1, 1, h, first, c + i, i * CHUNK, b, scaled, low);
    }
}

INLINE void attend_group(int form, int heads, const struct attend_head *h, int64_t first, struct block *b) {
    float s[BLOCK * 4 + VL] __attribute__((aligned(64)));
    form_logits(form, heads, h, first, b, s);
    weigh(heads, h, first, b, s);
    if (form < FORM_INT8) add_plain(form, heads, h, first, b, s);
    else add_coded(form, heads, h, first, b, s);
    for (int64_t c = h->v.n_full; c < h->v.n_chunks; c++) add_chunks(form, heads, 1, 0, h, first, c, 0, b, s, NULL);
}

#endif
