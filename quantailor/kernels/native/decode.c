// Products of few rows with packed weights of 1, 2, 4 or 8 bits: what decoding a token is made of. Weights are read as
// they are stored (numerics/packing.py), once, and never become floats:
//
//     y[t, o] = sum_s x_scale[t, s] * w_scale[o, G(s)] * sum_{n in s} (u[o, n] + c[o, G(s)]) * x[t, n] + bias[o]
//
// u are the stored integers, c moves them onto their grid. x are integers of 16 bits, one scale to a step s of 32 bytes
// of weights, split into two planes of 8 bits, x = 256 * high + low: so weights multiply as bytes (vpmaddubsw), and the
// sums of a lane are exact in 32 bits and as a float. Lane l of a step holds its inputs l * V/8 .. (l+1) * V/8 - 1, where
// V = 256 / bits: a group may be as small as a lane. Axes: T tokens, O out, N in, S steps of V inputs, G groups.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LARGEST 32512.0f  // 127 * 256: its upper plane still fits 8 bits

// Bytes at even places, then those at odd ones: one such pass for 4 bits, two for 2 bits, three for 1 bit put a plane's
// inputs side by side.
static inline __attribute__((always_inline)) void evens_first(const int8_t *restrict in, int8_t *restrict out, int n) {
    for (int i = 0; i < n / 2; i++) out[i] = in[2 * i];
    for (int i = 0; i < n / 2; i++) out[n / 2 + i] = in[2 * i + 1];
}

// [32, 8 / bits] -> [8 / bits, 32]
static inline __attribute__((always_inline)) void by_plane(const int8_t *in, int8_t *restrict out, int bits) {
    int8_t one[256], two[256];
    if (bits == 4) {
        evens_first(in, out, 64);
    } else if (bits == 2) {
        evens_first(in, one, 128);
        for (int half = 0; half < 2; half++) evens_first(one + half * 64, two + half * 64, 64);
        for (int plane = 0; plane < 4; plane++) memcpy(out + plane * 32, two + (plane % 2 * 2 + plane / 2) * 32, 32);
    } else {
        evens_first(in, one, 256);
        for (int half = 0; half < 2; half++) evens_first(one + half * 128, two + half * 128, 128);
        for (int part = 0; part < 4; part++) evens_first(two + part * 64, one + part * 64, 64);
        for (int plane = 0; plane < 8; plane++) {
            memcpy(out + plane * 32, one + (plane % 2 * 4 + plane / 2 % 2 * 2 + plane / 4) * 32, 32);
        }
    }
}

// x [N] float32 -> what the kernel multiplies with, of one token. `high`, `low` int8 [S, V] in the order in which weights
// are unpacked: all inputs whose weight lies in the lowest bits of a byte, then the next. At 8 bits int16 [S, V] in `high`
// and nothing in `low`. x_scale [S]; sums float32 [S, 8]: of each lane's integers. NaN where the token is not finite.
// Its loops are such that compilers find vectors in them: it is the part that only one thread works on.
static inline __attribute__((always_inline)) void prepare(const float *x, int64_t n, int bits, int8_t *high, int8_t *low,
                                                          float *x_scale, float *sums) {
    const int v = 256 / bits, lane = v / 8;
    const int64_t steps = (n + v - 1) / v;
    int32_t broken = 0;
    for (int64_t i = 0; i < n; i++) broken |= !(fabsf(x[i]) <= 3.402823466e38f);
    for (int64_t s = 0; s < steps; s++) {
        float padded[256];
        const float *part = x + s * v;
        int8_t upper[256], lower[256];
        int32_t bits_of_largest = 0;  // of floats that are not negative, the larger one has the larger integer
        float largest;
        if (broken || n - s * v < v) {
            memset(padded, 0, sizeof padded);
            if (!broken) memcpy(padded, part, sizeof(float) * (size_t)(n - s * v));
            part = padded;
        }
        for (int i = 0; i < v; i++) {
            int32_t as_int;
            memcpy(&as_int, part + i, 4);
            as_int &= 0x7fffffff;
            bits_of_largest = as_int > bits_of_largest ? as_int : bits_of_largest;
        }
        memcpy(&largest, &bits_of_largest, 4);
        float scale = largest / LARGEST, inverse = LARGEST / largest;
        if (!(largest > 0.0f) || !isfinite(inverse)) scale = inverse = 0.0f;  // nothing, or too little to divide by
        int16_t k[256];
        for (int i = 0; i < v; i++) {
            float r = rintf(part[i] * inverse);
            r = r > LARGEST ? LARGEST : r;
            k[i] = (int16_t)(int32_t)(r < -LARGEST ? -LARGEST : r);
        }
        if (bits == 8) {
            memcpy(high + 2 * s * v, k, 2 * (size_t)v);
        } else {
            for (int i = 0; i < v; i++) lower[i] = (int8_t)(((k[i] + 128) & 255) - 128);
            for (int i = 0; i < v; i++) upper[i] = (int8_t)((k[i] - lower[i]) >> 8);
            by_plane(lower, low + s * v, bits);
            by_plane(upper, high + s * v, bits);
        }
        x_scale[s] = broken ? NAN : scale;
        for (int l = 0; l < 8; l++) {
            int32_t sum = 0;
            for (int i = 0; i < lane; i++) sum += k[l * lane + i];
            sums[s * 8 + l] = (float)sum;
        }
    }
}

#if defined(__AVX2__)
#include <immintrin.h>

int32_t decode_ready(void) { return 1; }

// c of a step's eight lanes from `count` zero points.
static inline __m256 moves_of_lanes(const uint8_t *group, int64_t count, __m256i order) {
    uint64_t bytes = 0;
    if (count == 1) return _mm256_set1_ps(-(float)group[0]);
    memcpy(&bytes, group, (size_t)count);
    __m256 all = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)));
    return _mm256_sub_ps(_mm256_setzero_ps(), _mm256_permutevar8x32_ps(all, order));
}

static inline __m256i sums_of_step(__m256i w, const int8_t *high, const int8_t *low, int bits, int unsigned8) {
    if (bits == 8) {
        const int16_t *x = (const int16_t *)high;
        __m128i a = _mm256_castsi256_si128(w), b = _mm256_extracti128_si256(w, 1);
        __m256i first = unsigned8 ? _mm256_cvtepu8_epi16(a) : _mm256_cvtepi8_epi16(a);
        __m256i second = unsigned8 ? _mm256_cvtepu8_epi16(b) : _mm256_cvtepi8_epi16(b);
        first = _mm256_madd_epi16(first, _mm256_loadu_si256((const __m256i *)x));
        return _mm256_add_epi32(first, _mm256_madd_epi16(second, _mm256_loadu_si256((const __m256i *)(x + 16))));
    }
    // At most 15 * 127 * 2 in a sum of two, times two planes; 3 * 127 * 2 * 4 and 127 * 2 * 8 at fewer bits: within 16.
    __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1)), ones = _mm256_set1_epi16(1);
    __m256i h = _mm256_setzero_si256(), l = _mm256_setzero_si256();
    for (int plane = 0; plane < 8 / bits; plane++) {
        __m256i u = _mm256_and_si256(plane ? _mm256_srli_epi16(w, plane * bits) : w, mask);
        h = _mm256_add_epi16(h, _mm256_maddubs_epi16(u, _mm256_loadu_si256((const __m256i *)(high + plane * 32))));
        l = _mm256_add_epi16(l, _mm256_maddubs_epi16(u, _mm256_loadu_si256((const __m256i *)(low + plane * 32))));
    }
    return _mm256_add_epi32(_mm256_madd_epi16(h, _mm256_set1_epi16(256)), _mm256_madd_epi16(l, ones));
}

// a + b * c, rounded once where the processor can: no other path has to give the same bits.
static inline __m256 plus_product(__m256 a, __m256 b, __m256 c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(b, c, a);
#else
    return _mm256_add_ps(a, _mm256_mul_ps(b, c));
#endif
}

static inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

typedef struct {
    const uint8_t *w, *zeros;
    const float *w_scale, *x_scale, *sums, *bias;
    const int8_t *high, *low;
    float *y, c;
    int64_t row_bytes, scale_stride, rows, out, groups, steps;
    int64_t many, left;  // steps to a group; groups in the last step, where `parts` > 1
    int parts;           // groups to a step
    __m256i order, mask, last_mask;
} job;

// All tokens with one row of weights, which stays in the first cache meanwhile.
static inline __attribute__((always_inline)) void one_row(const job *j, int64_t o, int bits, int unsigned8, int parted,
                                                           int has_zeros) {
    const int64_t v = 256 / bits, width = bits == 8 ? 2 * v : v;
    const uint8_t *row = j->w + o * j->row_bytes;
    const int64_t whole = j->row_bytes / 32, steps = j->steps;
    uint8_t tail[32] = {0};
    if (steps > whole) memcpy(tail, row + whole * 32, (size_t)(j->row_bytes - whole * 32));
    for (int64_t t = 0; t < j->rows; t++) {
        const int8_t *high = j->high + t * steps * width, *low = j->low + (bits == 8 ? 0 : t * steps * width);
        const float *x_scale = j->x_scale + t * steps, *sums = j->sums + t * steps * 8;
        const float *scale = j->w_scale + o * j->scale_stride;
        const uint8_t *zero = has_zeros ? j->zeros + o * j->groups : 0;
        __m256 sum = _mm256_setzero_ps(), of_w, move = _mm256_set1_ps(j->c);
        int64_t within = 0;
        for (int64_t s = 0; s < steps; s++, high += width, low += width) {
            __m256i packed = _mm256_loadu_si256((const __m256i *)(s < whole ? row + s * 32 : tail));
            __m256 d = _mm256_cvtepi32_ps(sums_of_step(packed, high, low, bits, unsigned8));
            if (parted) {
                int last = s + 1 == steps;
                if (last) of_w = _mm256_maskload_ps(scale, j->last_mask);
                else if (parted == 2) of_w = _mm256_castpd_ps(_mm256_broadcast_sd((const double *)scale));
                else of_w = _mm256_maskload_ps(scale, j->mask);
                of_w = _mm256_permutevar8x32_ps(of_w, j->order);
                if (has_zeros) move = moves_of_lanes(zero, last ? j->left : j->parts, j->order);
                scale += j->parts;
                zero += has_zeros ? j->parts : 0;
            } else {
                of_w = _mm256_broadcast_ss(scale);
                if (has_zeros) move = _mm256_set1_ps(-(float)*zero);
                if (++within == j->many) within = 0, scale++, zero += has_zeros;
            }
            d = plus_product(d, move, _mm256_loadu_ps(sums + s * 8));
            sum = plus_product(sum, d, _mm256_mul_ps(of_w, _mm256_broadcast_ss(x_scale + s)));
        }
        j->y[t * j->out + o] = total(sum) + (j->bias ? j->bias[o] : 0.0f);
    }
}

// The loops over rows are apart, so that every one knows its number of bits: a parallel region is cut out of a function
// before constants reach it.
#define LOOP(BITS, UNSIGNED8, PARTED, ZEROS) \
    _Pragma("omp parallel for schedule(static)") for (int64_t o = 0; o < j->out; o++) one_row(j, o, BITS, UNSIGNED8, PARTED, ZEROS)
#define LOOPS(NAME, BITS, UNSIGNED8)                      \
    static void NAME(const job *j) {                      \
        if (j->parts > 1 && j->zeros) {                   \
            LOOP(BITS, UNSIGNED8, 1, 1);                  \
        } else if (j->parts == 2) {                       \
            LOOP(BITS, UNSIGNED8, 2, 0);                  \
        } else if (j->parts > 1) {                        \
            LOOP(BITS, UNSIGNED8, 1, 0);                  \
        } else if (j->zeros) {                            \
            LOOP(BITS, UNSIGNED8, 0, 1);                  \
        } else {                                          \
            LOOP(BITS, UNSIGNED8, 0, 0);                  \
        }                                                 \
    }

LOOPS(rows_of_1, 1, 0)
LOOPS(rows_of_2, 2, 0)
LOOPS(rows_of_4, 4, 0)
LOOPS(rows_of_8, 8, 0)
LOOPS(rows_of_u8, 8, 1)

// x [T, N]; w [O, row_bytes] as stored; w_scale [O, G], or one for all with `scale_stride` 0; zeros uint8 [O, G] or NULL:
// c is then the same everywhere. `group` inputs to a group (N if G is 1): a divisor of V that is V/8 or more
// (at 8 bits V, whose lanes are mixed), or a multiple of V. y [T, O]. Returns 0, or 1 where memory ran out.
int32_t decode(const float *x, int64_t rows, int64_t n, const uint8_t *w, int64_t row_bytes, int64_t bits, int64_t unsigned8,
               const float *w_scale, int64_t scale_stride, float c, const uint8_t *zeros, int64_t groups, int64_t group,
               const float *bias, float *y, int64_t out) {
    int64_t v = 256 / bits, steps = (n + v - 1) / v, width = bits == 8 ? 2 * v : v;
    int8_t *memory = malloc((size_t)(rows * steps * (2 * width + 9 * (int64_t)sizeof(float))));
    if (!memory) return 1;
    float *x_scale = (float *)memory, *sums = x_scale + rows * steps;
    int8_t *high = (int8_t *)(sums + rows * steps * 8), *low = high + rows * steps * width;
    for (int64_t t = 0; t < rows; t++) {
        int64_t at = t * steps;
        if (bits == 4) prepare(x + t * n, n, 4, high + at * v, low + at * v, x_scale + at, sums + at * 8);
        else if (bits == 2) prepare(x + t * n, n, 2, high + at * v, low + at * v, x_scale + at, sums + at * 8);
        else if (bits == 1) prepare(x + t * n, n, 1, high + at * v, low + at * v, x_scale + at, sums + at * 8);
        else prepare(x + t * n, n, 8, high + at * width, 0, x_scale + at, sums + at * 8);
    }
    int one = groups == 1 || group >= v;
    int parts = one ? 1 : (int)(v / group);
    int64_t left = groups - (steps - 1) * parts;
    int32_t index[8], all[8], some[8];
    for (int l = 0; l < 8; l++) {
        index[l] = l * parts / 8;
        all[l] = l < parts ? -1 : 0;
        some[l] = l < left ? all[l] : 0;
    }
    job j = {w, zeros, w_scale, x_scale, sums, bias, high, low, y, c, row_bytes, scale_stride, rows, out, groups, steps,
             groups == 1 ? steps : group >= v ? group / v : 1, left, parts, _mm256_loadu_si256((const __m256i *)index),
             _mm256_loadu_si256((const __m256i *)all), _mm256_loadu_si256((const __m256i *)some)};
    if (bits == 4) rows_of_4(&j);
    else if (bits == 2) rows_of_2(&j);
    else if (bits == 1) rows_of_1(&j);
    else if (unsigned8) rows_of_u8(&j);
    else rows_of_8(&j);
    free(memory);
    return 0;
}

#else

int32_t decode_ready(void) { return 0; }

int32_t decode(void) { return 2; }

#endif
