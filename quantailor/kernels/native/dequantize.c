// Rows of packed weights as floats: what many rows of inputs are multiplied with, a block at a time.
//
//     y[o, n] = (u[o, n] + c[o, G(n)]) * scale[o, G(n)],  or  levels[u[o, n]] * scale[o, G(n)]
//
// The sum is exact and the product rounds once, as in torch (numerics/grids.py): the same bits. Axes: O rows, N in,
// G groups.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// A row's integers, one a byte. `u` has room for a few more than n.
static void unpack(const uint8_t *row, int64_t row_bytes, int64_t n, int bits, uint8_t *restrict u) {
    if (bits == 8) {
        memcpy(u, row, (size_t)n);
    } else if (bits == 4) {
        for (int64_t b = 0; b < (n + 1) / 2; b++) u[2 * b] = row[b] & 15, u[2 * b + 1] = row[b] >> 4;
    } else if (bits == 2) {
        for (int64_t b = 0; b < (n + 3) / 4; b++) {
            u[4 * b] = row[b] & 3, u[4 * b + 1] = row[b] >> 2 & 3, u[4 * b + 2] = row[b] >> 4 & 3, u[4 * b + 3] = row[b] >> 6;
        }
    } else if (bits == 1) {
        for (int64_t b = 0; b < (n + 7) / 8; b++) {
            for (int i = 0; i < 8; i++) u[8 * b + i] = row[b] >> i & 1;
        }
    } else {  // these straddle bytes; a row ends with a whole word, so the byte after the last one is never needed
        for (int64_t i = 0; i < n; i++) {
            int64_t at = i * bits / 8;
            unsigned pair = row[at] | (at + 1 < row_bytes ? (unsigned)row[at + 1] << 8 : 0);
            u[i] = (uint8_t)(pair >> (i * bits % 8) & ((1u << bits) - 1));
        }
    }
}

// w [O, row_bytes]; `plain` 1: unsigned integers, 0: int8. scale [O, G], or one for all with `scale_stride` 0; zeros uint8
// [O, G] (c = -zeros) or NULL; levels [2^bits] or NULL. y [O, N]. Returns 1 where memory ran out.
int32_t dequantize_rows(const uint8_t *w, int64_t rows, int64_t n, int64_t row_bytes, int64_t bits, int64_t plain,
                        const float *scale, int64_t scale_stride, float c, const uint8_t *zeros, const float *levels,
                        int64_t groups, int64_t group, float *y) {
    int32_t failed = 0;
#pragma omp parallel
    {
        uint8_t *u = malloc((size_t)n + 16);
        if (!u) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t o = 0; o < rows; o++) {
            if (!u) continue;
            const uint8_t *row = w + o * row_bytes;
            unpack(row, row_bytes, n, (int)bits, u);
            for (int64_t g = 0; g < groups; g++) {
                int64_t start = g * group, stop = start + group < n ? start + group : n;
                float s = scale[scale_stride ? o * scale_stride + g : 0];
                float move = zeros ? -(float)zeros[o * groups + g] : c;
                float *out = y + o * n;
                if (levels) {
                    for (int64_t i = start; i < stop; i++) out[i] = levels[u[i]] * s;
                } else if (plain) {
                    for (int64_t i = start; i < stop; i++) out[i] = ((float)u[i] + move) * s;
                } else {
                    for (int64_t i = start; i < stop; i++) out[i] = ((float)(int8_t)u[i] + move) * s;
                }
            }
        }
        free(u);
    }
    return failed;
}
