/* Attention of one query over stored records: float32 accumulation, online softmax, all queries of a group together.

   Records are processed in blocks (block.h); while one is computed, the next one's rows are prefetched. */
#include "block.h"

/* Find the rows of records [a, a + n): the chosen ones, then the newest. Returns 0 where a position is out of range. */
static int find_rows(const struct attend_head *h, int64_t a, int64_t n, const uint8_t **rows) {
    const struct attend_args *args = h->args;
    int64_t reach = args->n_rows - args->tail;
    for (int64_t j = 0; j < n; j++) {
        int64_t i = a + j, at = i;
        if (h->n_chosen >= 0) {
            at = i < h->n_chosen ? h->positions[i] : reach + i - h->n_chosen;
            if (at < 0 || (i < h->n_chosen && at >= reach)) return 0;
        }
        rows[j] = h->rows + at * args->row_stride;
    }
    return 1;
}

INLINE int attend_records(int form, const struct attend_head *h, int64_t from, int64_t to) {
    struct block b;
    int64_t steps = h->args->group * (BLOCK + 2 * h->v.n_chunks) / N_ACC;
    b.rate = BLOCK * DUE / (steps > 0 ? steps : 1) + 1;
    b.n = to - from < BLOCK ? to - from : BLOCK;
    if (!find_rows(h, from, b.n, b.rows)) return FARKV_BAD_POSITION;
    for (int64_t a = from; a < to; a += BLOCK) {
        int64_t left = to - a - b.n;
        b.n_next = left < BLOCK ? left : BLOCK;
        if (!find_rows(h, a + b.n, b.n_next, b.next)) return FARKV_BAD_POSITION;
        for (int64_t j = b.n; j < BLOCK; j++) b.rows[j] = b.rows[b.n - 1];
        for (int64_t j = 0; h->odds && j < b.n; j++) b.odds[j] = a + j < h->n_chosen ? h->odds[a + j] : 0;
        b.n_ahead = b.due = 0;
        int64_t g = 0, group = h->args->group;
        for (; g + 4 <= group; g += 4) attend_group(form, 4, h, g, &b);
        for (; g + 2 <= group; g += 2) attend_group(form, 2, h, g, &b);
        for (; g < group; g++) attend_group(form, 1, h, g, &b);
        memcpy(b.rows, b.next, sizeof b.rows);
        b.n = b.n_next;
    }
    return FARKV_OK;
}

/* The maximum logit of query head g, and the sum of its weights. */
static void read_sums(const struct attend_head *h, int64_t g, float *highest, float *sum) {
    int64_t left = h->args->group - g / 4 * 4, heads = left >= 4 ? 4 : left >= 2 && g % 4 < 2 ? 2 : 1;
    int64_t first = g / heads * heads;
    *highest = h->highest[first][g - first];
    *sum = 0;
    for (int64_t l = g - first; l < VL; l += heads) *sum += h->sums[first][l];
}

static int attend_f32(const struct attend_head *h, int64_t a, int64_t b) { return attend_records(FORM_F32, h, a, b); }
static int attend_bf16(const struct attend_head *h, int64_t a, int64_t b) { return attend_records(FORM_BF16, h, a, b); }
static int attend_f16(const struct attend_head *h, int64_t a, int64_t b) { return attend_records(FORM_F16, h, a, b); }
static int attend_int8(const struct attend_head *h, int64_t a, int64_t b) { return attend_records(FORM_INT8, h, a, b); }
static int attend_int4(const struct attend_head *h, int64_t a, int64_t b) { return attend_records(FORM_INT4, h, a, b); }

static int (*const attend_form[N_FORMS])(const struct attend_head *, int64_t, int64_t) = {
    attend_f32, attend_bf16, attend_f16, attend_int8, attend_int4};

struct attend_call {
    const struct attend_args *args;
    int64_t n, n_parts;
    float *parts; /* [batch * heads][n_parts][group][2 + v_dim]: highest logit, sum, weighted values; NULL: one part */
    _Atomic int status;
};

/* Divide by the sum, a sink's weight included; a sum of zero gives zeros. */
static void finish(const struct attend_args *args, int64_t head, float highest, float sum, float *out) {
    if (args->sinks) {
        float sink = args->sinks[head % (args->heads * args->group)], top = sink > highest ? sink : highest;
        float factor = sum > 0 ? expf(highest - top) : 0;
        sum = sum * factor + expf(sink - top);
        for (int64_t i = 0; i < args->v_dim; i++) out[i] *= factor;
    }
    float inverse = sum == 0 ? 0 : 1 / sum;
    for (int64_t i = 0; i < args->v_dim; i++) out[i] *= inverse;
}

static void put_in_order(const struct attend_head *h, const float *q) {
    int form = (int)h->args->form;
    float *to = (float *)h->q, scaling = (float)h->args->scaling;
    for (int64_t g = 0; g < h->args->group; g++, q += h->k.dim)
        for (int64_t c = 0; c < h->k.n_chunks; c++)
            for (int which = 0; which < 2; which++)
                for (int lane = 0; lane < VL; lane++) {
                    int64_t i = c * CHUNK + place(form, which, lane);
                    *to++ = i < h->k.dim ? q[i] * scaling : 0;
                }
}

/* Write what query head g of a task has: into its part, or finished into the output. */
static void write_out(const struct attend_call *call, const struct attend_head *h, int64_t task, int64_t g) {
    const struct attend_args *args = call->args;
    int64_t wide = call->parts ? 2 + args->v_dim : args->v_dim, at_head = task * args->group + g;
    float *out = (call->parts ? call->parts : args->out) + at_head * wide, highest, sum;
    read_sums(h, g, &highest, &sum);
    if (call->parts) *out++ = highest, *out++ = sum;
    const float *values = (const float *)(h->out + g * h->v.n_chunks * 2);
    for (int64_t at = 0; at < h->v.n_chunks * CHUNK; at++) {
        int64_t in = at % CHUNK, i = at - in + place((int)args->form, (int)(in / VL), (int)(in % VL));
        if (i < args->v_dim) out[i] = values[at];
    }
    if (!call->parts) finish(args, at_head, highest, sum, out);
}

static void attend_part(void *context, int64_t task) {
    struct attend_call *call = context;
    const struct attend_args *args = call->args;
    int64_t head = task / call->n_parts, part = task % call->n_parts, group = args->group;
    struct attend_head h = {.args = args};
    h.row_bytes = find_halves((int)args->form, args->k_dim, args->v_dim, &h.k, &h.v);
    int64_t n_q = group * h.k.n_chunks * 2, n_out = group * h.v.n_chunks * 2;
    h.q = farkv_scratch(SCRATCH_TASK, (n_q + n_out + 2 * group) * sizeof(vf));
    if (!h.q) {
        call->status = FARKV_NO_MEMORY;
        return;
    }
    h.out = h.q + n_q;
    h.sums = h.out + n_out;
    h.highest = h.sums + group;
    memset(h.out, 0, (n_out + group) * sizeof(vf));
    for (int64_t g = 0; g < group; g++) h.highest[g] = fill(LOWEST);
    h.rows = args->rows + head / args->heads * args->batch_stride + head % args->heads * args->head_stride;
    h.positions = args->n_chosen > 0 ? args->positions + head * args->n_chosen : NULL;
    h.odds = args->odds ? args->odds + head * args->n_chosen : NULL;
    h.n_chosen = args->counts ? args->counts[head] : args->n_chosen;
    int64_t n = h.n_chosen >= 0 ? h.n_chosen + args->tail : args->n_rows;
    if (args->counts && (h.n_chosen < 0 || h.n_chosen > args->n_chosen)) {
        call->status = FARKV_BAD_POSITION;
        return;
    }
    put_in_order(&h, args->q + head * group * args->k_dim);
    int64_t from = n * part / call->n_parts, to = n * (part + 1) / call->n_parts;
    int status = from < to ? attend_form[args->form](&h, from, to) : FARKV_OK;
    if (status) {
        call->status = status;
        return;
    }
    for (int64_t g = 0; g < group; g++) write_out(call, &h, task, g);
}

/* Join the parts of one query head. */
static void join_parts(const struct attend_call *call, int64_t head, int64_t g) {
    const struct attend_args *args = call->args;
    int64_t wide = 2 + args->v_dim;
    float *out = args->out + (head * args->group + g) * args->v_dim, highest = LOWEST, sum = 0;
    memset(out, 0, args->v_dim * sizeof(float));
    for (int64_t p = 0; p < call->n_parts; p++)
        highest = fmaxf(highest, call->parts[((head * call->n_parts + p) * args->group + g) * wide]);
    for (int64_t p = 0; p < call->n_parts; p++) {
        const float *part = call->parts + ((head * call->n_parts + p) * args->group + g) * wide;
        float factor = expf(part[0] - highest);
        sum += part[1] * factor;
        for (int64_t i = 0; i < args->v_dim; i++) out[i] += part[2 + i] * factor;
    }
    finish(args, head * args->group + g, highest, sum, out);
}

static int attend(const struct attend_args *args) {
    int64_t heads = args->batch * args->heads, threads = args->threads;
    struct attend_call call = {args, args->n_chosen >= 0 ? args->n_chosen + args->tail : args->n_rows, 1, NULL, FARKV_OK};
    if (threads > 1 && heads % threads && heads < 4 * threads) {
        /* Too few heads to keep all threads busy: each head is split into up to as many parts as there are threads. */
        call.n_parts = call.n / (4 * BLOCK) < threads ? call.n / (4 * BLOCK) : threads;
        if (call.n_parts < 2) call.n_parts = 1;
    }
    if (call.n_parts > 1) {
        call.parts = farkv_scratch(SCRATCH_CALL, heads * call.n_parts * args->group * (2 + args->v_dim) * sizeof(float));
        if (!call.parts) return FARKV_NO_MEMORY;
    }
    farkv_parallel(threads, heads * call.n_parts, attend_part, &call);
    if (call.parts && call.status == FARKV_OK)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t g = 0; g < args->group; g++) join_parts(&call, head, g);
    return call.status;
}
