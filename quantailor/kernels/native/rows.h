// One token times rows of a packed weight, read as they are stored (numerics/packing.py): what decode.c and block.c share.
//
//     y[o] = sum_s x_scale[s] * w_scale[o, G(s)] * sum_{n in s} (u[o, n] + c[o, G(s)]) * x[n] + bias[o]
//
// u are the stored integers, c moves them onto their grid. x are integers of 16 bits, one scale to a step s of weights.
// At 1 to 4 bits they are split into two planes of 8 bits, x = 256 * high + low, so that weights multiply as bytes
// (vpmaddubsw); at 8 bits and NF4 weights become 16 bits (vpmaddwd). Sums of a lane are exact in 32 bits and as a float.
// Axes: T tokens, O out, N in, S steps, G groups.

#ifndef QUANTAILOR_ROWS_H
#define QUANTAILOR_ROWS_H

#include <stdint.h>

enum { NF4 = 40, UNSIGNED8 = 80, FLOAT32 = 320 };  // beside 1, 2, 3, 4 and 8 (signed): how a weight is stored

// A weight [O, N] as it is stored, and what moves it onto its grid.
typedef struct {
    const void *w;        // rows of `row_bytes` bytes
    const void *scale;    // float32 [O, G]; or one for all with `scale_stride` 0; float16 [O, G] where `half`, several to a step
    const uint8_t *zeros; // [O, G] or NULL: c is then the same everywhere
    const float *levels;  // NF4: [16]
    int64_t kind, out, n, row_bytes, scale_stride, groups, group, half;
    double c;
} weight;

// A token as integers, for one kind of weight; memory of `token_bytes`.
typedef struct {
    int8_t *high, *low;    // int8 [S, V] each, in the order in which weights are unpacked; int16 [S, V] in `high` alone
    float *x_scale;        // [S]; NaN where the token is not finite
    float *sums;           // [S, 8]: of each lane's integers
    float *moved;          // the same times x_scale and c; where a step has P > 1 groups, [S, P]: of each group's, with
                           // c = -1, for zero points to multiply, where there are any
    float *group_scale;    // [S, P]: x_scale again, where P > 1
    const float *x;        // [N], for FLOAT32
} token;

int64_t token_bytes(int64_t kind, int64_t n);
int parts_of(const weight *w);  // groups to a step
int same_token(const weight *a, const weight *b);  // of weights as long
token token_at(void *memory, int64_t kind, int64_t n);
void prepare_token(const float *x, const weight *w, token *t);
// y[o] for rows from .. to - 1 of the weight; y is of the whole token, bias [O] or NULL.
void times_rows(const weight *w, const token *t, const float *bias, int64_t from, int64_t to, float *y);

#if defined(__AVX2__)
#include <immintrin.h>

static inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

#endif
