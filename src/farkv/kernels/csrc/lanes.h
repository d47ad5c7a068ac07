/* Convert a lane mask to bits, and compress the lanes selected by bits. */
#ifndef FARKV_LANES_H
#define FARKV_LANES_H

#include "simd.h"

#define ALL_LANES ((1u << VL) - 1)

#if VL == 16
INLINE unsigned lane_bits(vi mask) { return _mm512_movepi32_mask((__m512i)mask); }
#elif VL == 8
INLINE unsigned lane_bits(vi mask) { return (unsigned)_mm256_movemask_ps((__m256)mask); }
#else
INLINE unsigned lane_bits(vi mask) {
    unsigned bits = 0;
    for (int i = 0; i < VL; i++) bits |= (unsigned)(mask[i] & 1) << i;
    return bits;
}
#endif

#if VL == 8
/* Row b, byte j: the index of the j-th set bit of b. */
#define PLACE(b, i) ((uint64_t)((b) >> i & 1) * i << 8 * __builtin_popcount((b) & ((1 << i) - 1)))
#define ROW_1(b) PLACE(b, 1) | PLACE(b, 2) | PLACE(b, 3) | PLACE(b, 4) | PLACE(b, 5) | PLACE(b, 6) | PLACE(b, 7)
#define ROW_4(b) ROW_1(b), ROW_1((b) + 1), ROW_1((b) + 2), ROW_1((b) + 3)
#define ROW_16(b) ROW_4(b), ROW_4((b) + 4), ROW_4((b) + 8), ROW_4((b) + 12)
#define ROW_64(b) ROW_16(b), ROW_16((b) + 16), ROW_16((b) + 32), ROW_16((b) + 48)
static const uint64_t places[256] = {ROW_64(0), ROW_64(64), ROW_64(128), ROW_64(192)};
#endif

/* Write the lanes selected by bits to `to`, contiguously (with room for VL); returns their number. */
INLINE int64_t keep_lanes(unsigned bits, vi x, int32_t *to) {
#if VL == 16
    x = (vi)_mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)x);
    memcpy(to, &x, VB);
#elif VL == 8
    x = (vi)_mm256_permutevar8x32_epi32((__m256i)x, (__m256i)widen_u8((const uint8_t *)&places[bits]));
    memcpy(to, &x, VB);
#else
    int64_t n = 0;
    for (int i = 0; i < VL; i++) {
        to[n] = x[i];
        n += bits >> i & 1;
    }
    return n;
#endif
    return __builtin_popcount(bits);
}

#endif
