/* Rows as two integers of 7 bits each, whose products a library makes, and these products put together again:
   x = (high + low / STEPS) / unit, unit = HALF / max |x|. Plain twin: math/halves.py. */
#include "farkv.h"
#include "simd.h"

#define HALF 63.0f
#define STEPS 126.0f
#define LEAST_TOP 1e-30f /* its inverse is finite */

struct halves_call {
    const struct halves_args *args;
};

static void split_row(void *context, int64_t i) {
    const struct halves_args *a = ((struct halves_call *)context)->args;
    const float *x = a->rows + i * a->width;
    float *high = a->products + i * a->width, *low = high + a->n * a->width, top = LEAST_TOP, odd = 0;
    vf tops = {0}, odds = {0};
    int64_t j = 0;
    for (; j + VL <= a->width; j += VL) {
        vf v = load(x + j);
        tops = max_of(tops, (vf)((vu)v & 0x7fffffffu));
        odds += v * 0;
    }
    for (; j < a->width; j++) {
        float v = x[j] < 0 ? -x[j] : x[j];
        top = v > top ? v : top;
        odd += v * 0;
    }
    float largest = largest_lane(tops);
    top = largest > top ? largest : top;
    /* Not a number where any of the row is not finite. */
    float unit = HALF / top + odd + sum_lanes(odds);
    a->unit[i] = unit;
    for (j = 0; j + VL <= a->width; j += VL) {
        vf t = load(x + j) * unit, h = (t + 12582912.0f) - 12582912.0f;
        store(high + j, h);
        store(low + j, (t - h) * STEPS);
    }
    for (; j < a->width; j++) {
        float t = x[j] * unit, h = (t + 12582912.0f) - 12582912.0f;
        high[j] = h, low[j] = (t - h) * STEPS;
    }
}

static void join_row(void *context, int64_t i) {
    const struct halves_args *a = ((struct halves_call *)context)->args;
    float *high = a->products + i * a->width, unit = 1 / a->unit[i];
    const float *low = high + a->n * a->width;
    int64_t j = 0;
    for (; j + VL <= a->width; j += VL) {
        vf y = (load(high + j) + load(low + j) * (1 / STEPS)) * unit;
        store(high + j, a->bias ? y + load(a->bias + j) : y);
    }
    for (; j < a->width; j++) high[j] = (high[j] + low[j] * (1 / STEPS)) * unit + (a->bias ? a->bias[j] : 0);
}

static void split_halves(const struct halves_args *a) {
    struct halves_call call = {a};
    farkv_parallel(a->threads, a->n, split_row, &call);
}

static void join_halves(const struct halves_args *a) {
    struct halves_call call = {a};
    farkv_parallel(a->threads, a->n, join_row, &call);
}
