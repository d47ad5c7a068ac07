/* One scan over the codes of a KV head, which keeps candidates for the choice.

   A sample gives a reference logit, a guess of every query head's softmax sum, and a bound on the group mass that
   slightly more than the wanted records reach (sample.h). The scan computes the softmax sums and keeps the records that
   reach the bound. With these sums the candidates are weighed exactly; counting finds the threshold (choose.h). A
   record that was not kept weighs less than bound * max(guess / sum): where the threshold is below that, the scan is
   repeated with the true sums, finally keeping every record.

   Where the CPU has fast byte products the scan is coarse: it uses 8-bit queries and a bound lowered by their largest
   rounding error, and the candidates are weighed again with 16-bit queries. */
#include "lanes.h"
#include "sample.h"

/* Lanes that weigh less than the bound; NaN counts as heavy. */
INLINE vi find_light(vf mass, float bound) { return (vi)(mass < fill(bound)); }

/* Weigh the records [first, first + n), n <= RUN, and keep those that reach the bound, from `at` on; returns the new
   `at`. Adds their weights to the sums; a coarse scan adds only those of records that are not kept. */
static int64_t scan_run(struct head *h, int64_t first, int64_t n, float bound, vf *sums, int64_t at) {
    int64_t group = h->query.group, stride = h->args->n + VL;
    uint64_t bits = 0;
    weigh_run(h, first, n, h->coarse);
    for (int64_t i = 0; i < n; i += VL) {
        vf mass = {0};
        for (int64_t g = 0; g < group; g++) {
            vf x = exp2_of(load(h->run + g * RUN + i));
            store(h->run + g * RUN + i, x);
            mass += x * h->inverse[g];
        }
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

/* As a coarse `scan_run`, for n_vectors * VL records and all `heads` queries of a group: only the positions of
   candidates leave the registers. */
INLINE int64_t scan_fused(int heads, struct head *h, int64_t first, int64_t n_vectors, float bound, vf *sums,
                          int64_t at) {
    const struct select_args *a = h->args;
    const int64_t row_stride = a->row_stride;
    const uint8_t *rows = h->codes + first * row_stride;
    const vi *table = h->coarse_table;
    int32_t *kept = h->kept;
    vf sum[MOST_FUSED], step[MOST_FUSED], offset[MOST_FUSED], inverse[MOST_FUSED];
    vi place = count_from((int32_t)first);
    UNROLL for (int g = 0; g < heads; g++) {
        sum[g] = sums[g], step[g] = fill(h->coarse_step[g]), inverse[g] = fill(h->inverse[g]);
        offset[g] = fill(h->coarse_bias[g] + h->offset[g]);
    }
    for (int64_t v = 0; v < n_vectors; v++, rows += VL * row_stride, place += VL) {
        vi acc[MOST_FUSED];
        vf e[MOST_FUSED], mass = {0};
        multiply_coarsely(heads, table, PIECE / 4, rows, row_stride, acc);
        UNROLL for (int g = 0; g < heads; g++) {
            e[g] = exp2_roughly(__builtin_convertvector(acc[g], vf) * step[g] - offset[g]);
            mass += e[g] * inverse[g];
        }
        vi light = find_light(mass, bound);
        UNROLL for (int g = 0; g < heads; g++) sum[g] += (vf)((vi)e[g] & light);
        at += keep_lanes(lane_bits(light) ^ ALL_LANES, place, kept + at);
    }
    UNROLL for (int g = 0; g < heads; g++) sums[g] = sum[g];
    return at;
}

/* Scan as many of the n records from `first` on as `scan_fused` can, and return their number; *at grows by those
   kept. */
static __attribute__((noinline)) int64_t scan_ahead(struct head *h, int64_t first, int64_t n, float bound, vf *sums,
                                                    int64_t *at) {
    const struct select_args *a = h->args;
    if (!COARSE_BYTES || !h->fused || a->row_stride < a->code_bytes) return 0;
    /* Pieces of the last rows may reach beyond readable memory. */
    int64_t readable = a->n - (PIECE - 1) / a->code_bytes - first;
    n = (n < readable ? n : readable) / VL;
    if (n <= 0) return 0;
    if (a->group == 8) *at = scan_fused(8, h, first, n, bound, sums, *at);
    else if (a->group == 4) *at = scan_fused(4, h, first, n, bound, sums, *at);
    else if (a->group == 2) *at = scan_fused(2, h, first, n, bound, sums, *at);
    else *at = scan_fused(1, h, first, n, bound, sums, *at);
    return n * VL;
}

/* Weigh exactly the candidates [from, to) of a coarse scan, and add to the sums. */
static void refine(struct head *h, int64_t from, int64_t to, vf *sums) {
    const struct select_args *a = h->args;
    int64_t padded = padded_bytes(a), stride = a->n + VL;
    for (int64_t i = from; i < to; i += RUN) {
        int64_t n = to - i < RUN ? to - i : RUN;
        if (n % VL || h->kept[i + n - 1] * a->row_stride + padded > (a->n - 1) * a->row_stride + a->code_bytes) {
            for (int64_t j = 0; j < n; j++)
                memcpy(h->copies + j * padded, h->codes + h->kept[i + j] * a->row_stride, a->code_bytes);
            form_exact4(&h->query, h->copies, padded, (n + VL - 1) / VL, h->run);
        } else {
            form_exact4_at(&h->query, h->codes, a->row_stride, h->kept + i, n / VL, h->run);
        }
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
