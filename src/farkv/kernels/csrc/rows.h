/* Stored values as float vectors, for every form of a record.

   Values are read in chunks of two vectors. The order within a chunk depends on the form (`place`): the query is put
   into that order once. Plain values are contiguous; for coded ones see store/far/quantize.py. */
#ifndef FARKV_ROWS_H
#define FARKV_ROWS_H

#include "farkv.h"
#include "simd.h"

#define CHUNK (2 * VL)
#define CODE_GROUP 32
#define PIECE_CHUNKS (CODE_GROUP / CHUNK) /* chunks per group of codes */

/* K or V of a record: its offsets in the row, and its number of chunks. */
struct half {
    int64_t dim, n_full, n_chunks; /* whole chunks; all chunks */
    int64_t codes, params, n_groups;
};

/* The index, within a chunk, of the value in lane `lane` of vector `which`. */
INLINE int place(int form, int which, int lane) { return form == FORM_BF16 ? 2 * lane + which : which * VL + lane; }

INLINE float read_bf16(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

INLINE void load_plain(int form, const uint8_t *p, vf *x) {
    if (form == FORM_F32) {
        x[0] = load((const float *)p);
        x[1] = load((const float *)p + VL);
    } else if (form == FORM_BF16) {
        vu bits = load_bits(p);
        x[0] = (vf)(bits << 16);
        x[1] = (vf)(bits & 0xffff0000u);
    } else {
        x[0] = widen_f16(p);
        x[1] = widen_f16(p + 2 * VL);
    }
}

INLINE int64_t element_bytes(int form) { return form == FORM_F32 ? 4 : 2; }

/* A chunk of codes, without step and low: `from` is where it starts in its group. */
INLINE void load_codes(int form, const uint8_t *row, const struct half *at, int64_t group, int from, vf *x) {
    UNROLL for (int i = 0; i < 2; i++) {
        int first = from + i * VL;
        if (form == FORM_INT8) {
            x[i] = __builtin_convertvector(widen_i8(row + at->codes + group * CODE_GROUP + first), vf);
        } else {
            vi bytes = widen_u8(row + at->codes + group * CODE_GROUP / 2 + first % (CODE_GROUP / 2));
            x[i] = __builtin_convertvector(first >= CODE_GROUP / 2 ? bytes >> 4 : bytes & 15, vf);
        }
    }
}

INLINE vf load_step(const uint8_t *row, const struct half *at, int64_t group) {
    return fill_bf16(row + at->params + 2 * group);
}

INLINE vf load_low(const uint8_t *row, const struct half *at, int64_t group) {
    return fill_bf16(row + at->params + 2 * (at->n_groups + group));
}

/* The chunk that starts at value `from` of a group; plain values are grouped the same way. */
INLINE void load_chunk(int form, const uint8_t *row, const struct half *at, int64_t group, int from, vf *x) {
    if (form < FORM_INT8) {
        load_plain(form, row + at->codes + (group * CODE_GROUP + from) * element_bytes(form), x);
        return;
    }
    vf step = load_step(row, at, group);
    load_codes(form, row, at, group, from, x);
    if (form == FORM_INT8) {
        UNROLL for (int i = 0; i < 2; i++) x[i] *= step;
    } else {
        vf low = load_low(row, at, group);
        UNROLL for (int i = 0; i < 2; i++) x[i] = x[i] * step + low;
    }
}

/* Value i of a coded row, for groups that are shorter than a chunk. */
static float decode(int form, const uint8_t *row, const struct half *at, int64_t i) {
    int64_t group = i / CODE_GROUP, first = group * CODE_GROUP, place = i - first;
    float step = read_bf16(row + at->params + 2 * group);
    if (form == FORM_INT8) return (float)(int8_t)row[at->codes + i] * step;
    int64_t size = at->dim - first < CODE_GROUP ? at->dim - first : CODE_GROUP, half = (size + 1) / 2;
    uint8_t byte = row[at->codes + first / 2 + place % half];
    return (float)(place >= half ? byte >> 4 : byte & 15) * step + read_bf16(row + at->params + 2 * (at->n_groups + group));
}

/* A chunk that reaches beyond the last value, padded with zeros. */
static __attribute__((noinline)) void load_end(int form, const uint8_t *row, const struct half *at, int64_t c, vf *x) {
    int64_t first = c * CHUNK, n = at->dim - first < CHUNK ? at->dim - first : CHUNK;
    float values[CHUNK] = {0};
    if (form < FORM_INT8) {
        int64_t size = element_bytes(form);
        memcpy(values, row + at->codes + first * size, n * size);
        load_plain(form, (const uint8_t *)values, x);
        return;
    }
    for (int64_t i = 0; i < n; i++) values[i] = decode(form, row, at, first + i);
    x[0] = load(values);
    x[1] = load(values + VL);
}

static struct half find_half(int form, int64_t dim, int64_t codes, int64_t params) {
    int64_t whole = form == FORM_INT4 ? dim / CODE_GROUP * CODE_GROUP : dim;
    return (struct half){dim, whole / CHUNK, (dim + CHUNK - 1) / CHUNK, codes, params, (dim + CODE_GROUP - 1) / CODE_GROUP};
}

/* Find K and V in a row. Returns the row's bytes. */
static int64_t find_halves(int form, int64_t k_dim, int64_t v_dim, struct half *k, struct half *v) {
    if (form < FORM_INT8) {
        *k = find_half(form, k_dim, 0, 0);
        *v = find_half(form, v_dim, k_dim * element_bytes(form), 0);
        return (k_dim + v_dim) * element_bytes(form);
    }
    int64_t bits = form == FORM_INT8 ? 8 : 4, kinds = form == FORM_INT8 ? 1 : 2;
    int64_t k_bytes = (k_dim * bits + 7) / 8, bytes = k_bytes + (v_dim * bits + 7) / 8;
    int64_t params = bytes + bytes % 2;
    *k = find_half(form, k_dim, 0, params);
    *v = find_half(form, v_dim, k_bytes, params + 2 * kinds * k->n_groups);
    return v->params + 2 * kinds * v->n_groups;
}

#endif
