/* The C interface of the native kernels: the arguments from native.py, and declarations shared within the library.

   Strides are bytes. Tensors are on the CPU and their last stride is one element. A function returns one of the status
   codes below; it writes only to its output and its own scratch. */
#ifndef FARKV_H
#define FARKV_H

#include <stddef.h>
#include <stdint.h>

enum { FARKV_OK = 0, FARKV_NO_MEMORY = 1, FARKV_BAD_POSITION = 2 };
enum { FORM_F32, FORM_BF16, FORM_F16, FORM_INT8, FORM_INT4, N_FORMS };
enum { ISA_GENERIC, ISA_AVX2, ISA_AVX512, ISA_AVX512VBMI, ISA_NEON, N_ISAS };

/* One-query attention over stored records, [k | v] each. */
struct attend_args {
    const float *q;           /* [batch, heads * group, k_dim] */
    const uint8_t *rows;      /* [batch, heads, capacity] records */
    const int64_t *positions; /* [batch, heads, n_chosen] */
    const int64_t *counts;    /* [batch, heads]: how many of a head's positions are read, or NULL: all */
    const float *sinks;       /* [heads * group] logits that only add to the denominator, or NULL */
    const float *odds;        /* [batch, heads, n_chosen]: added to the logits of chosen records, or NULL */
    float *out;               /* [batch, heads * group, v_dim] */
    int64_t batch_stride, head_stride, row_stride;
    int64_t batch, heads, group, k_dim, v_dim;
    int64_t n_chosen, n_rows, tail; /* n_chosen -1: all of the first n_rows */
    int64_t form, threads;
    double scaling, softcap; /* softcap 0: none */
};

/* The cap best records of an index, per sequence and KV head; with `least`, of those whose mean mass reaches it. */
struct select_args {
    const float *q;        /* [batch, heads * group, dim] */
    const float *query;    /* [batch or 1, heads, dim, columns] */
    const float *tables;   /* [batch, heads, 2 * code_bytes, 16, width]: nibble i is of the columns
                              [i % (columns / width) * width, ... + width) */
    const uint8_t *codes;  /* [batch, heads, capacity] rows of code_bytes */
    const int64_t *taken;  /* [batch, heads, n_taken], or NULL */
    int64_t *out;          /* [batch, heads, cap] */
    const int64_t *caps;   /* [batch]: each sequence's own cap, at most `cap`; NULL: all have `cap` */
    const float *least;    /* [batch]: only records whose mass, mean over the group, is at least this; NULL: any */
    const int64_t *fewest; /* [batch]: what a head chooses whatever `least` says, at most its cap; with `least` */
    int64_t *counts;       /* [batch, heads]: how many are chosen, or NULL: cap */
    float *floors;         /* [batch, heads]: the least mass that was chosen, sinks apart, or NULL */
    const int64_t *seeds;  /* [batch, heads]: of the draws of heads that are sampled, -1: the best are chosen; or NULL */
    float *odds;           /* [batch, heads, cap]: with seeds, -log of the probability of what was drawn; 0: certain */
    const uint8_t *here;   /* [batch, heads, pages]: pages that are in memory; or NULL: all records are in reach */
    int64_t batch_stride, head_stride, row_stride;
    int64_t batch, heads, group, dim, columns, code_bytes, width;
    int64_t query_batch; /* 1 where all sequences share the query side */
    int64_t n, cap, sinks, n_taken, threads;
    int64_t pages, page_tokens, more_pages; /* with `here`: so many pages more are in reach, of the largest mass */
    double scaling, softcap;
};

/* Copy rows of a tensor [n_heads, capacity, row_bytes]: runs of `run` contiguous rows, out_stride bytes apart. */
struct gather_args {
    const uint8_t *data;
    const int64_t *heads, *positions;
    uint8_t *out;
    int64_t n, row_bytes, n_heads, capacity, threads;
    int64_t run, out_stride;
};

/* Learn nibble tables from keys, or code keys by them. */
struct table_args {
    const float *keys;    /* [heads, n, columns] */
    const float *weights; /* [heads, n], where tables are learned */
    float *tables;        /* [heads, nibbles, 16, width] */
    uint8_t *codes;       /* [heads, n, nibbles / 2]; NULL: learn */
    int64_t heads, n, columns, width, nibbles, rounds, threads;
};

/* Pages of a file, and where they belong. */
struct page_args {
    const int64_t *ids, *at;
    const uint32_t *sums; /* [n] */
    uint8_t *out;
    int64_t n, fd, base, page_bytes, threads; /* page 0 begins `base` bytes into the file */
};

/* Rows on pages: in which slot of memory each one's page is, and which pages are in none. */
struct locate_args {
    const int64_t *table;           /* [heads, capacity]: numbers of pages */
    int32_t *slot_of;               /* [pages]: -1: in none; written to, and put back */
    const int64_t *heads, *positions; /* [n] */
    int64_t *which, *offsets;       /* [n]: a row's page is pages[which] */
    int64_t *pages, *slots, *counts; /* [n]: pages, each once; the slots that they are in; rows on them */
    int64_t n, n_heads, capacity, n_pages, tokens, n_found;
};

/* Rows as pairs of integers, or products of such pairs. */
struct halves_args {
    const float *rows; /* [n, width], to split */
    float *products;   /* [2 n, width]: the parts of rows, written; or products, the first n of which are written */
    float *unit;       /* [n] */
    const float *bias; /* [width], or NULL */
    int64_t n, width, threads;
};

struct kernels {
    int (*attend)(const struct attend_args *);
    int (*select)(const struct select_args *);
    int (*gather)(const struct gather_args *);
    int (*learn)(const struct table_args *);
    uint64_t (*read)(const uint8_t *data, int64_t n_bytes, int64_t threads);
    uint64_t (*read_rows)(const uint8_t *data, const int64_t *positions, int64_t n, int64_t row_bytes, int64_t threads);
    void (*split)(const struct halves_args *);
    void (*join)(const struct halves_args *);
};

/* Call work(context, task) for every task, on up to `threads` threads, this one included (pool.c). */
void farkv_parallel(int64_t threads, int64_t n_tasks, void (*work)(void *context, int64_t task), void *context);

/* The same by threads that spend their time waiting for files. */
void farkv_wait_parallel(int64_t threads, int64_t n_tasks, void (*work)(void *context, int64_t task), void *context);

/* Return memory of this thread, aligned to 64 bytes, valid until it requests more; NULL if out of memory (pool.c). */
enum { SCRATCH_CALL, SCRATCH_TASK, N_SCRATCH };
void *farkv_scratch(int slot, size_t n_bytes);

#endif
