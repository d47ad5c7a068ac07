/* Copy and read rows, with prefetching. */
#include "simd.h"
#include "farkv.h"

#define AHEAD 16
#define ROWS_PER_TASK 256

struct gather_call {
    const struct gather_args *args;
    _Atomic int status;
};

static void gather_rows(void *context, int64_t task) {
    struct gather_call *call = context;
    const struct gather_args *a = call->args;
    int64_t from = task * ROWS_PER_TASK, to = from + ROWS_PER_TASK < a->n ? from + ROWS_PER_TASK : a->n;
    for (int64_t i = from; i < to; i++) {
        if (a->heads[i] < 0 || a->heads[i] >= a->n_heads || a->positions[i] < 0 || a->positions[i] >= a->capacity) {
            call->status = FARKV_BAD_POSITION;
            return;
        }
    }
    for (int64_t i = from; i < to; i++) {
        if (i + AHEAD < to)
            prefetch_row(a->data + (a->heads[i + AHEAD] * a->capacity + a->positions[i + AHEAD]) * a->row_bytes, a->row_bytes);
        uint8_t *out = a->out + i / a->run * a->out_stride + i % a->run * a->row_bytes;
        memcpy(out, a->data + (a->heads[i] * a->capacity + a->positions[i]) * a->row_bytes, a->row_bytes);
    }
}

static int gather(const struct gather_args *a) {
    struct gather_call call = {a, FARKV_OK};
    farkv_parallel(a->threads, (a->n + ROWS_PER_TASK - 1) / ROWS_PER_TASK, gather_rows, &call);
    return call.status;
}

struct read_call {
    const uint8_t *data;
    const int64_t *positions;
    int64_t n, row_bytes;
    _Atomic uint64_t sum;
};

#define PART_BYTES (1 << 20)

INLINE uint64_t add_bytes(const uint8_t *p, int64_t n_bytes) {
    vu a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = 0;
    for (; i + 4 * VB <= n_bytes; i += 4 * VB) {
        a += load_bits(p + i);
        b += load_bits(p + i + VB);
        c += load_bits(p + i + 2 * VB);
        d += load_bits(p + i + 3 * VB);
    }
    a += b + c + d;
    uint64_t sum = 0;
    for (; i < n_bytes; i++) sum += p[i];
    for (int l = 0; l < VL; l++) sum += a[l];
    return sum;
}

static void read_part(void *context, int64_t task) {
    struct read_call *call = context;
    int64_t from = task * PART_BYTES, n = call->n - from < PART_BYTES ? call->n - from : PART_BYTES;
    call->sum += add_bytes(call->data + from, n);
}

/* A sum over all bytes, to time the read: the value is not used. */
static uint64_t read_all(const uint8_t *data, int64_t n_bytes, int64_t threads) {
    struct read_call call = {data, NULL, n_bytes, 0, 0};
    farkv_parallel(threads, (n_bytes + PART_BYTES - 1) / PART_BYTES, read_part, &call);
    return call.sum;
}

static void read_rows_part(void *context, int64_t task) {
    struct read_call *call = context;
    int64_t from = task * ROWS_PER_TASK, to = from + ROWS_PER_TASK < call->n ? from + ROWS_PER_TASK : call->n;
    uint64_t sum = 0;
    for (int64_t i = from; i < to; i++) {
        if (i + AHEAD < call->n) prefetch_row(call->data + call->positions[i + AHEAD] * call->row_bytes, call->row_bytes);
        sum += add_bytes(call->data + call->positions[i] * call->row_bytes, call->row_bytes);
    }
    call->sum += sum;
}

static uint64_t read_rows(const uint8_t *data, const int64_t *positions, int64_t n, int64_t row_bytes, int64_t threads) {
    struct read_call call = {data, positions, n, row_bytes, 0};
    farkv_parallel(threads, (n + ROWS_PER_TASK - 1) / ROWS_PER_TASK, read_rows_part, &call);
    return call.sum;
}
