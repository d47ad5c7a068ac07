/* One KV head of a selection: its scratch, and its queries' tables for the index's nibbles. */
#ifndef FARKV_HEAD_H
#define FARKV_HEAD_H
#include <math.h>
#include <stdlib.h>

#include "farkv.h"
#include "quads.h"

#define TILE 2048     /* records per partial sum; these are added in a fixed order for any number of threads */
#define LOG2E 1.44269504f
#define MOST_LOGIT 1e30f
#define MOST_MARGIN 1.5f /* a scan that may be off by more than 2^1.5 would keep too much, and its sums would show it */

struct head {
    const struct select_args *args;
    struct index_query query;
    const uint8_t *codes;
    float *exact, *step, *base, *fine_step, *fine_base, *offset; /* as in struct index_query */
    uint8_t *coarse_table, *fine_table;
    int32_t *fine_center;
    float *projected; /* [group][columns] */
    float *turned;    /* [columns][lanes] */
    float *lows;      /* [2 nibbles][4] */
    float margin;     /* most that 8 bits lower log2 of a weight */
    float furthest;   /* largest possible log2 of a coarse weight, before the offset */
    int coarse;       /* whether the scan is coarse */
    double *guess, *sums, *tile_sums; /* [group], [group], [tiles][group] */
    float *inverse;                   /* [group]: 1 / guess */
    float bound, least; /* least: mass of the group that is asked for; 0: any */
    int64_t seed;       /* of its draws; -1: nothing is drawn */
    int64_t *n_kept; /* [parts] */
    int32_t *kept;   /* [n + VL]: positions of candidates, each part's starting at its first record */
    float *weights;  /* [group][n + VL]: their weights, in the same places */
    uint32_t *keys;  /* [n + VL] */
    uint8_t *taken;  /* a bit per record */
    uint8_t *reach;  /* [pages]: whether a page's records may be chosen */
    float *page_sums;    /* [pages + 1][group]: a page's weights; the last is of what follows the pages */
    uint32_t *page_keys; /* [pages]: keys of the masses of pages that are not in memory */
    float *run;      /* [group][RUN] */
    vf *lane_sums;   /* [group], of the current tile */
    vc *planes;      /* [nibbles] */
    float *block;    /* [group][VB]: coarse weights */
};

/* Draws: record i of a head gets u = frac(i * golden ratio + seed) in (0, 1), in 23 bits: even over any stretch of
   records. Ranking by mass / u instead of mass is priority sampling (math/sampling.py). */
#define GOLDEN 2654435769u
INLINE float draw(int64_t seed, int32_t place) {
    return ((float)(int32_t)(((uint32_t)place * GOLDEN + (uint32_t)seed) >> 9) + 0.5f) * 0x1p-23f;
}
INLINE vf draw_lanes(int64_t seed, vi place) {
    vu x = (vu)place * GOLDEN + (uint32_t)seed;
    return (__builtin_convertvector((vi)(x >> 9), vf) + 0.5f) * 0x1p-23f;
}
INLINE vi count_from(int64_t first) {
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vi place;
    memcpy(&place, lanes, VB);
    return place + (int32_t)first;
}

static int64_t count_nibbles(const struct select_args *a) { return 2 * a->code_bytes; }
static int64_t count_tiles(const struct select_args *a) { return (a->n + TILE - 1) / TILE; }
static int64_t count_lanes(const struct select_args *a) { return a->group <= 4 ? 4 : (a->group + 7) / 8 * 8; }

static void *carve(uint8_t **at, int64_t n_bytes) {
    void *here = *at;
    *at += (n_bytes + 63) / 64 * 64;
    return here;
}

/* Lay a head's scratch out from `at` on; returns its end. */
static uint8_t *lay_out(const struct select_args *a, struct head *h, uint8_t *at) {
    int64_t group = a->group;
    h->args = a;
    h->exact = carve(&at, count_nibbles(a) * 16 * count_lanes(a) * 4);
    h->coarse_table = carve(&at, group * (count_nibbles(a) + 6) * 16);
    h->fine_table = carve(&at, group * FINE_BYTES * count_quads(a->code_bytes) * QUAD_BYTES);
    h->projected = carve(&at, group * a->columns * 4);
    h->turned = carve(&at, count_lanes(a) * a->columns * 4);
    h->lows = carve(&at, count_nibbles(a) * 32);
    h->step = carve(&at, group * 4);
    h->base = carve(&at, group * 4);
    h->fine_step = carve(&at, group * 4);
    h->fine_base = carve(&at, group * 4);
    h->fine_center = carve(&at, group * 4);
    h->offset = carve(&at, group * 4);
    h->inverse = carve(&at, group * 4);
    h->guess = carve(&at, group * 8);
    h->sums = carve(&at, group * 8);
    h->tile_sums = carve(&at, count_tiles(a) * group * 8);
    h->n_kept = carve(&at, (count_tiles(a) + 1) * 8);
    h->taken = carve(&at, a->n / 8 + 1);
    h->kept = carve(&at, (a->n + VL) * 4);
    h->weights = carve(&at, (a->n + VL) * group * 4);
    h->keys = carve(&at, (a->n + VL) * 4);
    h->reach = carve(&at, a->pages);
    h->page_sums = carve(&at, a->here ? (a->pages + 1) * group * 4 : 0);
    h->page_keys = carve(&at, a->pages * 4);
    return at;
}

/* Scratch of each task: a run's weights, and a block's nibbles and coarse weights. */
static uint8_t *lay_out_run(const struct select_args *a, struct head *h, uint8_t *at) {
    h->run = carve(&at, a->group * RUN * 4);
    h->lane_sums = carve(&at, a->group * VB);
    h->planes = carve(&at, count_nibbles(a) * VB);
    h->block = carve(&at, a->group * VB * 4);
    return at;
}

#endif
