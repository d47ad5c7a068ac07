/* Pages of a file: read into their places and verified by CRC-32 (the polynomial of zlib), with no Python per page. */
#include <errno.h>
#include <unistd.h>

#include "farkv.h"

#define EXPORT __attribute__((visibility("default")))
#define POLYNOMIAL 0xedb88320u /* bits in reversed order */

static uint32_t table[8][256]; /* table[k][b]: what byte b leaves, k bytes further on */

__attribute__((constructor)) static void make_table(void) {
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t x = b;
        for (int bit = 0; bit < 8; bit++) x = x >> 1 ^ (x & 1 ? POLYNOMIAL : 0);
        table[0][b] = x;
    }
    for (int k = 1; k < 8; k++)
        for (int b = 0; b < 256; b++) table[k][b] = table[k - 1][b] >> 8 ^ table[0][table[k - 1][b] & 255];
}

static uint32_t take_bytes(uint32_t crc, const uint8_t *p, int64_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t low = crc ^ (p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24);
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
              table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
    }
    for (; n > 0; n--, p++) crc = crc >> 8 ^ table[0][(crc ^ *p) & 255];
    return crc;
}

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_PRODUCTS __attribute__((target("sse2,pclmul")))

/* x moved on by as many bits as the pair of powers of x, modulo the polynomial, stands for; and the bytes there. */
static inline WITH_PRODUCTS __m128i move_on(__m128i x, __m128i powers, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(x, powers, 0x00), high = _mm_clmulepi64_si128(x, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* As take_bytes, of at least 64 bytes: 64 at a time, as products of polynomials without carries (Gopal et al., Fast CRC
   Computation for Generic Polynomials Using PCLMULQDQ, Intel 2009). What is left of them, 16 bytes, goes on as bytes. */
static WITH_PRODUCTS uint32_t take_products(uint32_t crc, const uint8_t *p, int64_t n) {
    const __m128i by_64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i x[4];
    for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128((const __m128i *)p + i);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64)
        for (int i = 0; i < 4; i++) x[i] = move_on(x[i], by_64, _mm_loadu_si128((const __m128i *)p + i));
    for (int i = 1; i < 4; i++) x[0] = move_on(x[0], by_16, x[i]);
    for (; n >= 16; p += 16, n -= 16) x[0] = move_on(x[0], by_16, _mm_loadu_si128((const __m128i *)p));
    uint8_t left[16];
    _mm_storeu_si128((__m128i *)left, x[0]);
    return take_bytes(take_bytes(0, left, 16), p, n);
}

static int can_multiply(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("pclmul");
}
#else
static uint32_t take_products(uint32_t crc, const uint8_t *p, int64_t n) { return take_bytes(crc, p, n); }
static int can_multiply(void) { return 0; }
#endif

EXPORT uint32_t farkv_crc32(const uint8_t *p, int64_t n) {
    static int fast = -1;
    if (fast < 0) fast = can_multiply();
    return ~(fast && n >= 64 ? take_products(~0u, p, n) : take_bytes(~0u, p, n));
}

struct page_call {
    const struct page_args *args;
    _Atomic int64_t failed;
};

static int read_page(const struct page_args *a, int64_t j) {
    uint8_t *to = a->out + a->at[j] * a->page_bytes;
    int64_t place = a->base + a->ids[j] * a->page_bytes, done = 0;
    while (done < a->page_bytes) {
        ssize_t got = pread((int)a->fd, to + done, (size_t)(a->page_bytes - done), place + done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0;
        done += got;
    }
    return farkv_crc32(to, a->page_bytes) == a->sums[j];
}

static void read_task(void *context, int64_t j) {
    struct page_call *call = context;
    if (!read_page(call->args, j)) call->failed = j;
}

/* Read page ids[j] to place at[j], and verify it; returns a j that fails, or n. */
EXPORT int64_t farkv_read_pages(const struct page_args *a) {
    struct page_call call = {a, a->n};
    farkv_wait_parallel(a->threads, a->n, read_task, &call);
    return call.failed;
}

/* Returns FARKV_BAD_POSITION where a row is of no page. */
EXPORT int farkv_locate(struct locate_args *a) {
    int status = FARKV_OK;
    a->n_found = 0;
    for (int64_t j = 0; j < a->n && !status; j++) {
        int64_t head = a->heads[j], at = a->positions[j];
        int64_t place = at / a->tokens, page = -1;
        if (head >= 0 && head < a->n_heads && at >= 0 && place < a->capacity) page = a->table[head * a->capacity + place];
        if (page < 0 || page >= a->n_pages) {
            status = FARKV_BAD_POSITION;
            break;
        }
        int32_t slot = a->slot_of[page];
        if (slot >= -1) { /* not met before */
            int64_t i = a->n_found++;
            a->pages[i] = page, a->slots[i] = slot, a->counts[i] = 0;
            a->slot_of[page] = slot = (int32_t)(-2 - i);
        }
        a->which[j] = -2 - slot, a->offsets[j] = at % a->tokens;
        a->counts[-2 - slot]++;
    }
    for (int64_t i = 0; i < a->n_found; i++) a->slot_of[a->pages[i]] = (int32_t)a->slots[i];
    return status;
}
