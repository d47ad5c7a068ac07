/* One scan over the codes of a KV head, which keeps what may be chosen.

   A sample gives a reference logit, a guess of every query head's softmax sum, and a bound on the group mass that a few
   more than the wanted records reach (sample.h). The scan sums the softmax sums and keeps what reaches the bound. With
   the sums what was kept is weighed exactly; a histogram of the floats' bits finds the threshold (choose.h). A record
   that was not kept weighs less than bound * max(guess / sum): where the threshold lies below that, the scan is done
   again with the true sums, at last keeping everything.

   Where the processor multiplies bytes fast the scan is coarse: queries of 8 bits, a bound that is lower by all that
   their rounding can take, and what was kept is weighed again with queries of 16 bits. */
#include "sample.h"

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
static int64_t scan_run(struct head *h, int64_t first, int64_t n, float bound, vf *sums, int64_t at) {
    int64_t group = h->query.group, stride = h->args->n + VL;
    weigh_run(h, first, n, h->coarse);
    for (int64_t g = 0; g < group; g++) {
        float *e = h->run + g * RUN;
        vf sum = sums[g];
        int64_t i = 0;
        for (; i + VL <= n; i += VL) {
            vf x = exp2_of(load(e + i));
            store(e + i, x);
            sum += x;
        }
        if (i < n) {
            vf x = exp2_of(load(e + i));
            store(e + i, x);
            for (int64_t j = i; j < n; j++) sum[j - i] += x[j - i];
        }
        sums[g] = sum;
    }
    uint64_t bits = 0;
    for (int64_t i = 0; i < n; i += VL) bits |= (uint64_t)reach(h, h->run + i, bound) << i;
    if (n < RUN) bits &= ((uint64_t)1 << n) - 1;
    for (; bits; bits &= bits - 1, at++) {
        int64_t j = __builtin_ctzll(bits);
        h->kept[at] = (int32_t)(first + j);
        for (int64_t g = 0; g < group; g++) h->weights[g * stride + at] = h->run[g * RUN + j];
    }
    return at;
}

/* Weigh again, exactly, what a coarse scan kept at [from, to); the sums follow. */
static void refine(struct head *h, int64_t from, int64_t to, vf *sums) {
    const struct select_args *a = h->args;
    int64_t padded = padded_bytes(a), stride = a->n + VL;
    for (int64_t i = from; i < to; i += RUN) {
        int64_t n = to - i < RUN ? to - i : RUN;
        for (int64_t j = 0; j < n; j++) memcpy(h->copies + j * padded, h->codes + h->kept[i + j] * a->row_stride, a->code_bytes);
        form_exact4(&h->query, h->copies, padded, (n + VL - 1) / VL, h->run);
        for (int64_t g = 0; g < a->group; g++) {
            float *kept = h->weights + g * stride + i;
            vf sum = sums[g];
            for (int64_t j = 0; j < n; j += VL) {
                vf x = exp2_of(load(h->run + g * RUN + j)), change = x - load(kept + j);
                if (n - j < VL) { /* behind the last stands another part's */
                    for (int64_t l = 0; l < n - j; l++) kept[j + l] = x[l];
                    for (int64_t l = n - j; l < VL; l++) change[l] = 0;
                } else {
                    store(kept + j, x);
                }
                sum += change;
            }
            sums[g] = sum;
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
    float bound = h->coarse ? h->bound * exp2f(-h->margin) : h->bound;
    for (int64_t tile = from; tile < to; tile += TILE) {
        int64_t end = tile + TILE < to ? tile + TILE : to, before = at;
        memset(h->lane_sums, 0, a->group * VB);
        for (int64_t i = tile; i < end; i += RUN) at = scan_run(h, i, end - i < RUN ? end - i : RUN, bound, h->lane_sums, at);
        if (h->coarse) refine(h, before, at, h->lane_sums);
        for (int64_t g = 0; g < a->group; g++) h->tile_sums[tile / TILE * a->group + g] = sum_lanes(h->lane_sums[g]);
    }
    h->n_kept[part] = at - from;
}
