/* One scan over the codes of a KV head, which keeps candidates for the choice.

   A sample gives a reference logit, a guess of every query head's softmax sum, and a bound on the group mass that
   slightly more than the wanted records reach (sample.h). The scan computes the softmax sums and keeps the records that
   reach the bound. With these sums the candidates are weighed exactly; counting finds the threshold (choose.h). A
   record that was not kept weighs less than bound * max(guess / sum): where the threshold is below that, the scan is
   repeated with the true sums, finally keeping every record.

   Where the CPU shuffles bytes the scan is coarse: it uses tables of 8 bits and a bound lowered by their largest rounding
   error, and the candidates are weighed again exactly. Few records are all weighed exactly, and kept (keep_all). */
#include "lanes.h"
#include "sample.h"

/* Lanes that weigh less than the bound; NaN counts as heavy. */
INLINE vi find_light(vf mass, float bound) { return (vi)(mass < fill(bound)); }

/* Weigh the records [first, first + n), n <= RUN, exactly, and keep those that reach the bound, from `at` on; returns the
   new `at`. Adds their weights to the sums; before a coarse scan's `refine`, only those of records that are not kept. */
static int64_t scan_run(struct head *h, int64_t first, int64_t n, float bound, vf *sums, int64_t at) {
    int64_t group = h->query.group, stride = h->args->n + VL;
    uint64_t bits = 0;
    weigh_run(h, first, n);
    for (int64_t i = 0; i < n; i += VL) {
        vf mass = {0};
        for (int64_t g = 0; g < group; g++) {
            vf x = exp2_of(load(h->run + g * RUN + i));
            store(h->run + g * RUN + i, x);
            mass += x * h->inverse[g];
        }
        if (h->seed >= 0) mass /= draw_lanes(h->seed, count_from(first + i));
        bits |= (uint64_t)(lane_bits(find_light(mass, bound)) ^ ALL_LANES) << i;
    }
    if (n < RUN) bits &= ((uint64_t)1 << n) - 1;
    for (; bits; bits &= bits - 1, at++) {
        int64_t j = __builtin_ctzll(bits);
        h->kept[at] = (int32_t)(first + j);
        for (int64_t g = 0; g < group; g++) {
            h->weights[g * stride + at] = h->run[g * RUN + j];
            if (h->coarse) h->run[g * RUN + j] = 0;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *e = h->run + g * RUN;
        for (int64_t j = n; j % VL; j++) e[j] = 0;
        for (int64_t i = 0; i < n; i += VL) sums[g] += load(e + i);
    }
    return at;
}

#define BLOCKS_AHEAD 4 /* whose rows are fetched meanwhile: a core alone does not run so far ahead of a scan this fast */

/* Where, in a block, lane l of its first vector is: of vector i 4 i further on. */
INLINE vi order_of_block(void) {
    vi lane = count_from(0);
    return (lane & 3) + (lane >> 2 << 4);
}

/* Weigh VB records coarsely: only the positions of candidates leave, from `at` on; returns the new `at`. */
static __attribute__((noinline)) int64_t scan_block(struct head *h, int64_t first, float bound, vf *sums, int64_t at) {
    const struct select_args *a = h->args;
    vf mass[4] = {{0}}, limit[4];
    const uint8_t *runs[VB / 16], *rows = h->codes + first * a->row_stride;
    for (int lane = 0; lane < VB / 16; lane++) runs[lane] = rows + 16 * lane * a->row_stride;
    prefetch_row(rows + BLOCKS_AHEAD * VB * a->row_stride, VB * a->row_stride);
    form_block(h, runs);
    UNROLL for (int i = 0; i < 4; i++) {
        limit[i] = fill(bound);
        if (h->seed >= 0) limit[i] *= draw_lanes(h->seed, order_of_block() + (int32_t)(first + 4 * i));
    }
    for (int64_t g = 0; g < a->group; g++) {
        vf offset = fill(h->offset[g]), inverse = fill(h->inverse[g]);
        UNROLL for (int i = 0; i < 4; i++) {
            vf x = exp2_roughly(load(h->block + g * VB + i * VL) - offset);
            store(h->block + g * VB + i * VL, x);
            mass[i] += x * inverse;
        }
    }
    vi light[4];
    uint64_t bits = 0;
    UNROLL for (int i = 0; i < 4; i++) {
        light[i] = (vi)(mass[i] < limit[i]); /* NaN counts as heavy */
        unsigned heavy = lane_bits(light[i]) ^ ALL_LANES;
        for (int lane = 0; lane < VB / 16; lane++) bits |= (uint64_t)(heavy >> 4 * lane & 15) << (16 * lane + 4 * i);
    }
    for (int64_t g = 0; g < a->group; g++)
        UNROLL for (int i = 0; i < 4; i++) sums[g] += (vf)((vi)load(h->block + g * VB + i * VL) & light[i]);
    for (; bits; bits &= bits - 1) h->kept[at++] = (int32_t)(first + __builtin_ctzll(bits));
    return at;
}

/* Scan as many of the n records from `first` on as a coarse scan can, and return their number; *at grows by those
   kept. */
static int64_t scan_ahead(struct head *h, int64_t first, int64_t n, float bound, vf *sums, int64_t *at) {
    const struct select_args *a = h->args;
    if (!h->coarse) return 0;
    /* Pieces of the last rows may reach beyond readable memory. */
    int64_t over = (PIECE - a->code_bytes % PIECE) % PIECE, stride = a->row_stride;
    int64_t readable = a->n - (over + stride - 1) / stride - first, done = 0;
    n = n < readable ? n : readable;
    for (; done + VB <= n; done += VB) *at = scan_block(h, first + done, bound, sums, *at);
    return done;
}

/* Weigh exactly the candidates [from, to) of a coarse scan, and add to the sums. */
static void refine(struct head *h, int64_t from, int64_t to, vf *sums) {
    const struct select_args *a = h->args;
    int64_t stride = a->n + VL;
    for (int64_t i = from; i < to; i += RUN) {
        int64_t n = to - i < RUN ? to - i : RUN;
        form_exponents(&h->query, h->codes, a->row_stride, h->kept + i, n, h->run);
        for (int64_t g = 0; g < a->group; g++) {
            float *kept = h->weights + g * stride + i;
            int64_t j = 0;
            for (; j + VL <= n; j += VL) {
                vf x = exp2_of(load(h->run + g * RUN + j));
                store(kept + j, x);
                sums[g] += x;
            }
            if (j == n) continue;
            vf x = exp2_of(load(h->run + g * RUN + j)); /* beyond the last are another part's */
            for (int64_t l = 0; l < n - j; l++) kept[j + l] = x[l], sums[g][l] += x[l];
        }
    }
}

/* Weigh and keep every record exactly, by the largest exponents as references. */
static void keep_all(struct head *h) {
    const struct select_args *a = h->args;
    int64_t stride = a->n + VL;
    for (int64_t g = 0; g < a->group; g++) h->offset[g] = 0, h->inverse[g] = -3e38f;
    for (int64_t i = 0; i < a->n; i += RUN) {
        int64_t n = a->n - i < RUN ? a->n - i : RUN;
        weigh_run(h, i, n);
        for (int64_t g = 0; g < a->group; g++) {
            memcpy(h->weights + g * stride + i, h->run + g * RUN, n * 4);
            for (int64_t j = 0; j < n; j++) h->inverse[g] = fmaxf(h->inverse[g], h->run[g * RUN + j]);
        }
    }
    memset(h->tile_sums, 0, count_tiles(a) * a->group * 8);
    for (int64_t g = 0; g < a->group; g++) {
        float *weights = h->weights + g * stride;
        double sum = 0;
        h->offset[g] = h->inverse[g];
        for (int64_t i = 0; i < a->n; i += VL) {
            vf x = exp2_of(load(weights + i) - h->offset[g]);
            store(weights + i, x);
            for (int64_t l = a->n - i; l < VL; l++) x[l] = 0;
            sum += sum_lanes(x);
        }
        h->tile_sums[g] = sum, h->guess[g] = 1;
    }
    for (int64_t i = 0; i < a->n; i++) h->kept[i] = (int32_t)i;
    h->bound = 0, h->coarse = 0, h->n_kept[0] = a->n;
}

static int64_t find_part(const struct select_args *a, int64_t part, int64_t n_parts) {
    int64_t at = count_tiles(a) * part / n_parts * TILE;
    return at < a->n ? at : a->n;
}

/* Scan the tiles of one part. */
static void scan(struct head *h, int64_t part, int64_t n_parts) {
    const struct select_args *a = h->args;
    int64_t from = find_part(a, part, n_parts), to = find_part(a, part + 1, n_parts), at = from;
    float bound = h->coarse ? h->bound * exp2f(-h->margin - ROUGHLY) : h->bound;
    for (int64_t tile = from; tile < to; tile += TILE) {
        int64_t end = tile + TILE < to ? tile + TILE : to, before = at;
        memset(h->lane_sums, 0, a->group * VB);
        int64_t i = tile + scan_ahead(h, tile, end - tile, bound, h->lane_sums, &at);
        for (; i < end; i += RUN) at = scan_run(h, i, end - i < RUN ? end - i : RUN, bound, h->lane_sums, at);
        if (h->coarse) refine(h, before, at, h->lane_sums);
        for (int64_t g = 0; g < a->group; g++) h->tile_sums[tile / TILE * a->group + g] = sum_lanes(h->lane_sums[g]);
    }
    h->n_kept[part] = at - from;
}
