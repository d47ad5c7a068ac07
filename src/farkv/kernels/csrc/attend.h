/* Attention of one query over stored records: float32 accumulation, online softmax, a query group at once.

   Records are taken in blocks. Per block and up to four query heads: logits, softmax, weighted values. Logits stand
   record by record, query heads side by side, so that every vector holds each query head in the same lanes. */
#include <math.h>
#include <stdlib.h>

#include "rows.h"

#define BLOCK 16 /* two blocks of 512-byte rows, this one and the next, are half of a first-level cache */
#define LOWEST (-1e30f)

/* One part of the records of one KV head. */
struct attend_head {
    const struct attend_args *args;
    struct half k, v;
    const uint8_t *rows;
    const int64_t *positions;
    vf *q;   /* [group][k chunks][2], in the order of the form */
    vf *out; /* [group][v chunks][2] */
    float *highest, *sums; /* [group] */
};

struct block {
    const uint8_t *rows[BLOCK], *next[BLOCK];
    int64_t n, n_next;
};

/* s[record][query head] of up to BLOCK records. */
INLINE void form_logits(int form, int heads, const struct attend_head *h, int64_t first, const struct block *b, float *s) {
    const int records = N_ACC / heads;
    const vf *q = h->q + first * h->k.n_chunks * 2;
    for (int64_t j = 0; j < b->n; j += records) {
        vf acc[N_ACC] = {0};
        for (int64_t c = 0; c < h->k.n_chunks; c++) {
            vf x[N_ACC][2];
            if (__builtin_expect(c < h->k.n_full, 1)) {
                if (first == 0 && starts_line(form, c))
                    UNROLL for (int r = 0; r < records; r++) prefetch(b->next[j + r] + chunk_at(form, &h->k, c));
                if (first == 0 && form >= FORM_INT8 && c == 0)
                    UNROLL for (int r = 0; r < records; r++) prefetch(b->next[j + r] + h->k.marks);
                UNROLL for (int r = 0; r < records; r++) load_chunk(form, b->rows[j + r], &h->k, c, x[r]);
            } else {
                for (int r = 0; r < records; r++) load_end(form, b->rows[j + r], &h->k, c, x[r]);
            }
            UNROLL for (int g = 0; g < heads; g++) {
                vf q0 = q[(g * h->k.n_chunks + c) * 2], q1 = q[(g * h->k.n_chunks + c) * 2 + 1];
                UNROLL for (int r = 0; r < records; r++) acc[r * heads + g] += x[r][0] * q0;
                UNROLL for (int r = 0; r < records; r++) acc[r * heads + g] += x[r][1] * q1;
            }
        }
        sum_each(acc, s + j * heads);
    }
}

/* Turn logits into weights below the running maximum; earlier sums follow it. */
INLINE void weigh(int heads, const struct attend_head *h, int64_t first, int64_t n, float *s) {
    float softcap = (float)h->args->softcap, high[VL], sums[VL];
    int64_t used = n * heads, end = (used + VL - 1) / VL * VL;
    for (int64_t i = used; i < end; i++) s[i] = -INFINITY;
    vf top = fill(LOWEST);
    for (int64_t i = 0; i < end; i += VL) {
        vf x = load(s + i);
        if (softcap != 0) {
            x = cap_softly(x, softcap);
            if (i + VL > used)
                for (int64_t l = used - i; l < VL; l++) x[l] = -INFINITY;
            store(s + i, x);
        }
        top = max_of(x, top);
    }
    store(high, top);
    for (int g = 0; g < heads; g++) {
        float highest = high[g];
        for (int l = g + heads; l < VL; l += heads) highest = high[l] > highest ? high[l] : highest;
        float before = h->highest[first + g];
        if (highest > before) {
            float factor = expf(before - highest);
            vf *out = h->out + (first + g) * h->v.n_chunks * 2;
            for (int64_t i = 0; i < h->v.n_chunks * 2; i++) out[i] *= factor;
            h->sums[first + g] *= factor;
            h->highest[first + g] = highest;
        }
        for (int l = g; l < VL; l += heads) high[l] = h->highest[first + g];
    }
    top = load(high);
    vf sum = {0};
    for (int64_t i = 0; i < end; i += VL) {
        vf p = exp_of(load(s + i) - top);
        sum += p;
        store(s + i, p);
    }
    store(sums, sum);
    for (int l = 0; l < VL; l++) h->sums[first + l % heads] += sums[l];
}

/* out += weights * V, `wide` chunks from c on, in registers. */
INLINE void add_chunks(int form, int heads, int wide, int whole, const struct attend_head *h, int64_t first, int64_t c,
                       const struct block *b, const float *p) {
    vf *out = h->out + first * h->v.n_chunks * 2;
    vf acc[N_ACC];
    UNROLL for (int g = 0; g < heads; g++) UNROLL for (int i = 0; i < 2 * wide; i++)
        acc[g * 2 * wide + i] = out[(g * h->v.n_chunks + c) * 2 + i];
    for (int64_t j = 0; j < b->n; j++) {
        UNROLL for (int w = 0; w < wide; w++) {
            vf x[2];
            if (first == 0 && whole && starts_line(form, c + w)) prefetch(b->next[j] + chunk_at(form, &h->v, c + w));
            if (whole) load_chunk(form, b->rows[j], &h->v, c + w, x);
            else load_end(form, b->rows[j], &h->v, c + w, x);
            UNROLL for (int g = 0; g < heads; g++) {
                acc[(g * wide + w) * 2] += x[0] * p[j * heads + g];
                acc[(g * wide + w) * 2 + 1] += x[1] * p[j * heads + g];
            }
        }
    }
    UNROLL for (int g = 0; g < heads; g++) UNROLL for (int i = 0; i < 2 * wide; i++)
        out[(g * h->v.n_chunks + c) * 2 + i] = acc[g * 2 * wide + i];
}

INLINE void attend_group(int form, int heads, const struct attend_head *h, int64_t first, const struct block *b) {
    const int wide = N_ACC / (2 * heads);
    float s[BLOCK * 4] __attribute__((aligned(64)));
    form_logits(form, heads, h, first, b, s);
    weigh(heads, h, first, b->n, s);
    int64_t c = 0;
    for (; c + wide <= h->v.n_full; c += wide) add_chunks(form, heads, wide, 1, h, first, c, b, s);
    for (; c < h->v.n_full; c++) add_chunks(form, heads, 1, 1, h, first, c, b, s);
    for (; c < h->v.n_chunks; c++) add_chunks(form, heads, 1, 0, h, first, c, b, s);
}

/* Rows of the records [a, a + n): the chosen ones, then the newest. Returns 0 where a position is out of reach. */
static int find_rows(const struct attend_head *h, int64_t a, int64_t n, const uint8_t **rows) {
    const struct attend_args *args = h->args;
    int64_t reach = args->n_rows - args->tail;
    for (int64_t j = 0; j < n; j++) {
        int64_t i = a + j, at = i;
        if (args->n_chosen >= 0) {
            at = i < args->n_chosen ? h->positions[i] : reach + i - args->n_chosen;
            if (at < 0 || (i < args->n_chosen && at >= reach)) return 0;
        }
        rows[j] = h->rows + at * args->row_stride;
    }
    return 1;
}

INLINE int attend_records(int form, const struct attend_head *h, int64_t from, int64_t to) {
    struct block b;
    b.n = to - from < BLOCK ? to - from : BLOCK;
    if (!find_rows(h, from, b.n, b.rows)) return FARKV_BAD_POSITION;
    for (int64_t a = from; a < to; a += BLOCK) {
        int64_t left = to - a - b.n;
        b.n_next = left < BLOCK ? left : BLOCK;
        if (!find_rows(h, a + b.n, b.n_next, b.next)) return FARKV_BAD_POSITION;
        for (int64_t j = b.n; j < BLOCK; j++) b.rows[j] = b.rows[b.n - 1];
        for (int64_t j = b.n_next; j < BLOCK; j++) b.next[j] = b.rows[j];
        int64_t g = 0, group = h->args->group;
        for (; g + 4 <= group; g += 4) attend_group(form, 4, h, g, &b);
        for (; g + 2 <= group; g += 2) attend_group(form, 2, h, g, &b);
        for (; g < group; g++) attend_group(form, 1, h, g, &b);
        memcpy(b.rows, b.next, sizeof b.rows);
        b.n = b.n_next;
    }
    return FARKV_OK;
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

/* Divide by the sum, with a sink's logit in it; an empty sum gives zeros. */
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

static void attend_part(void *context, int64_t task) {
    struct attend_call *call = context;
    const struct attend_args *args = call->args;
    int64_t head = task / call->n_parts, part = task % call->n_parts, group = args->group;
    struct attend_head h = {.args = args};
    find_halves((int)args->form, args->k_dim, args->v_dim, &h.k, &h.v);
    int64_t n_q = group * h.k.n_chunks * 2, n_out = group * h.v.n_chunks * 2;
    h.q = farkv_scratch(SCRATCH_TASK, (n_q + n_out) * sizeof(vf) + 2 * group * sizeof(float));
    if (!h.q) {
        call->status = FARKV_NO_MEMORY;
        return;
    }
    h.out = h.q + n_q;
    h.highest = (float *)(h.out + n_out);
    h.sums = h.highest + group;
    memset(h.out, 0, n_out * sizeof(vf) + 2 * group * sizeof(float));
    for (int64_t g = 0; g < group; g++) h.highest[g] = LOWEST;
    h.rows = args->rows + head / args->heads * args->batch_stride + head % args->heads * args->head_stride;
    h.positions = args->n_chosen > 0 ? args->positions + head * args->n_chosen : NULL;
    put_in_order(&h, args->q + head * group * args->k_dim);
    int64_t from = call->n * part / call->n_parts, to = call->n * (part + 1) / call->n_parts;
    int status = from < to ? attend_form[args->form](&h, from, to) : FARKV_OK;
    if (status) {
        call->status = status;
        return;
    }
    int64_t wide = call->parts ? 2 + args->v_dim : args->v_dim;
    for (int64_t g = 0; g < group; g++) {
        float *out = call->parts ? call->parts + (task * group + g) * wide : args->out + (head * group + g) * wide;
        if (call->parts) *out++ = h.highest[g], *out++ = h.sums[g];
        const float *values = (const float *)(h.out + g * h.v.n_chunks * 2);
        for (int64_t at = 0; at < h.v.n_chunks * CHUNK; at++) {
            int64_t in = at % CHUNK, i = at - in + place((int)args->form, (int)(in / VL), (int)(in % VL));
            if (i < args->v_dim) out[i] = values[at];
        }
        if (!call->parts) finish(args, head * group + g, h.highest[g], h.sums[g], out);
    }
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
        /* Fewer heads than keep all threads busy: each head is cut into as many parts as there are threads. */
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
