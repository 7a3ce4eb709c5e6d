// int8 x int8 -> int32 with AVX2, for processors without an int8 instruction of their own; scales, bias, activation
// function and the next layer's quantization are applied while the sums are in the first cache:
//
//     y[t, o] = f(x_scale[t] * sum_G w_scale[o, G] * (sum_{n in G} x[t, n] * w[o, n] + x_sum[t, G] * shift[o, G]) + bias[o])
//
// in the order of kernels/ops.int_linear, each operation rounded to float32 by itself: the same bits. Both sides are
// widened to 16 bits, and vpmaddwd multiplies pairs of inputs: 16 products an instruction, twice what a float
// multiply-add does, exact for any int8 (vpmaddubsw, with 32, saturates its 16-bit sums). Inputs are widened once a run
// of rows; weights, read as they are stored, a panel of 16 outputs by at most DEPTH inputs at a time, into the first cache.
// Axes: T tokens, N in, O out, G groups.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#include <omp.h>

#define ROWS 6      // rows by columns of sums: with two of weights, one of inputs and one of products, all 16 registers
#define COLUMNS 16
#define DEPTH 384   // inputs to a panel: its weights take 24 KiB of the first cache, and six rows of inputs 4.5
#define BLOCK_BYTES (256 * 1024)  // of widened inputs: half of the second cache

typedef struct {
    const float *w_scale, *shift, *x_sum, *x_scale, *bias;
    int64_t groups, out;
    int32_t one_scale, activation, kind;
    float inverse, low, high;  // of int8: v * inverse, rounded, between low and high
    void *y;
} ending;

// As kernels/panels.py numbers them.
enum { NONE, GELU, GELU_TANH, SILU, RELU };
enum { FLOAT32, BFLOAT16, INT8 };

int32_t panels_ready(void) { return 1; }

// One pair of inputs of a row times those of 16 outputs. Written out: compilers add the products of several pairs first,
// and run out of registers.
static inline __attribute__((always_inline)) void multiply(const int16_t *pair, __m256i left, __m256i right, __m256i *sum) {
    __m256i x, product;
    __asm__("vpbroadcastd %4, %2\n\t"
            "vpmaddwd %5, %2, %3\n\t"
            "vpaddd %3, %0, %0\n\t"
            "vpmaddwd %6, %2, %2\n\t"
            "vpaddd %2, %1, %1"
            : "+x"(sum[0]), "+x"(sum[1]), "=&x"(x), "=&x"(product)
            : "m"(*(const int32_t *)pair), "x"(left), "x"(right));
}

// Sums of R rows of inputs (`a`, a row each `stride`) with a panel [pairs][COLUMNS][2], a multiple of 4 pairs; `more` adds
// to what is in `sums`.
static inline __attribute__((always_inline)) void tile(const int R, const int16_t *a, int64_t stride, const int16_t *panel,
                                                       int64_t pairs, int32_t *sums, int more) {
    __m256i sum[ROWS][2];
    _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) {
        const __m256i *from = (const __m256i *)(sums + r * COLUMNS);
        sum[r][0] = more ? _mm256_load_si256(from) : _mm256_setzero_si256();
        sum[r][1] = more ? _mm256_load_si256(from + 1) : _mm256_setzero_si256();
    }
    const int16_t *row[ROWS];
    _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) {
        row[r] = a + r * stride;
        __asm__("" : "+r"(row[r]));  // in a register each
    }
    for (int64_t n = 0; n < 2 * pairs; n += 2 * 4, panel += 4 * 32) {
        _Pragma("GCC unroll 4") for (int p = 0; p < 4; p++) {
            __m256i left = _mm256_load_si256((const __m256i *)(panel + p * 32));
            __m256i right = _mm256_load_si256((const __m256i *)(panel + p * 32 + 16));
            _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) multiply(row[r] + n + 2 * p, left, right, sum[r]);
        }
    }
    _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) {
        _mm256_store_si256((__m256i *)(sums + r * COLUMNS), sum[r][0]);
        _mm256_store_si256((__m256i *)(sums + r * COLUMNS) + 1, sum[r][1]);
    }
}

static void tile_of(int64_t rows, const int16_t *a, int64_t stride, const int16_t *panel, int64_t pairs, int32_t *sums,
                    int more) {
    switch (rows) {
        case 1: tile(1, a, stride, panel, pairs, sums, more); break;
        case 2: tile(2, a, stride, panel, pairs, sums, more); break;
        case 3: tile(3, a, stride, panel, pairs, sums, more); break;
        case 4: tile(4, a, stride, panel, pairs, sums, more); break;
        case 5: tile(5, a, stride, panel, pairs, sums, more); break;
        default: tile(6, a, stride, panel, pairs, sums, more);
    }
}

// 16 rows of 16 bytes, `stride` apart -> [8 pairs][16 rows][2] int16.
static inline void widen_square(const int8_t *w, int64_t stride, int16_t *panel) {
    __m256i a[8], b[8];
    for (int r = 0; r < 8; r++) {
        __m128i low = _mm_loadu_si128((const __m128i *)(w + r * stride));
        a[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i *)(w + (r + 8) * stride)), 1);
    }
    // The transpose of 8 x 8 pairs of bytes, rows 0 to 7 in the lower lanes, 8 to 15 in the upper.
    for (int r = 0; r < 4; r++) {
        b[2 * r] = _mm256_unpacklo_epi16(a[2 * r], a[2 * r + 1]);
        b[2 * r + 1] = _mm256_unpackhi_epi16(a[2 * r], a[2 * r + 1]);
    }
    for (int half = 0; half < 2; half++) {
        for (int r = 0; r < 2; r++) {
            a[half * 4 + 2 * r] = _mm256_unpacklo_epi32(b[half * 4 + r], b[half * 4 + r + 2]);
            a[half * 4 + 2 * r + 1] = _mm256_unpackhi_epi32(b[half * 4 + r], b[half * 4 + r + 2]);
        }
    }
    for (int r = 0; r < 4; r++) {
        b[2 * r] = _mm256_unpacklo_epi64(a[r], a[r + 4]);
        b[2 * r + 1] = _mm256_unpackhi_epi64(a[r], a[r + 4]);
    }
    for (int p = 0; p < 8; p++) {
        __m256i *to = (__m256i *)(panel + p * 32);
        _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(b[p])));
        _mm256_store_si256(to + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(b[p], 1)));
    }
}

// w [rows up to 16, n], `stride` apart -> [ceil(n / 16) * 8][16][2]; beyond the edges 0.
static void widen_panel(const int8_t *w, int64_t stride, int64_t rows, int64_t n, int16_t *panel) {
    for (int64_t i = 0; i < n; i += 16) {
        if (rows == COLUMNS && n - i >= 16) {
            widen_square(w + i, stride, panel + i * COLUMNS);
            continue;
        }
        int8_t square[16][16];
        memset(square, 0, sizeof square);
        for (int64_t r = 0; r < rows; r++) memcpy(square[r], w + r * stride + i, (size_t)(n - i < 16 ? n - i : 16));
        widen_square(square[0], 16, panel + i * COLUMNS);
    }
}

// x [rows, n], `stride` apart -> [rows, ceil(n / 16) * 16]; beyond the edge 0.
static void widen_rows(const int8_t *x, int64_t stride, int64_t rows, int64_t n, int16_t *wide) {
    int64_t padded = (n + 15) / 16 * 16;
    for (int64_t t = 0; t < rows; t++) {
        const int8_t *from = x + t * stride;
        __m256i *to = (__m256i *)(wide + t * padded);
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) _mm256_store_si256(to++, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + i))));
        if (i < n) {
            int8_t rest[16] = {0};
            memcpy(rest, from + i, (size_t)(n - i));
            _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)rest)));
        }
    }
}

// Functions of V vectors at once: each is a chain of operations that wait for one another, and four chains fill the time.
#define V 4
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < V; i++)
#define ALL(number) _mm256_set1_ps(number)

// e^v within 1 unit of the last place; v is kept between -87 and 88, so that the result is a normal number.
static inline __attribute__((always_inline)) void exponential(__m256 *v) {
    static const float over_factorial[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    __m256 n[V], p[V];
    EACH {
        v[i] = _mm256_min_ps(_mm256_max_ps(v[i], ALL(-87.0f)), ALL(88.0f));
        n[i] = _mm256_round_ps(_mm256_mul_ps(v[i], ALL(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        v[i] = _mm256_fnmadd_ps(n[i], ALL(0.693359375f), v[i]);  // ln 2 in two parts: n times the first is exact
        v[i] = _mm256_fnmadd_ps(n[i], ALL(-2.12194440e-4f), v[i]);
        p[i] = ALL(1.0f / 5040);
    }
    _Pragma("GCC unroll 7") for (int k = 0; k < 7; k++) EACH p[i] = _mm256_fmadd_ps(p[i], v[i], ALL(over_factorial[k]));
    EACH {
        __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n[i]), _mm256_set1_epi32(127)), 23);
        v[i] = _mm256_mul_ps(p[i], _mm256_castsi256_ps(power));
    }
}

// erf within 6e-8: 1 - erfc(a) for a = |v|, erfc(a) = exp(a * P(a)) up to a = 4. P is our own fit of ln(erfc(a)) / a,
// degree 8, weighted such that the largest error of erfc is least (2.3e-9 before it is rounded).
static inline __attribute__((always_inline)) void error_function(__m256 *v) {
    static const float fit[] = {-1.0602774e-4f, 5.8795471e-4f,  -1.5767677e-3f, 5.8789639e-5f,
                                1.9217137e-2f,  -1.0279921e-1f, -6.3661611e-1f, -1.1283793f};
    __m256 sign[V], a[V], p[V];
    EACH {
        sign[i] = _mm256_and_ps(v[i], ALL(-0.0f));
        a[i] = _mm256_min_ps(_mm256_xor_ps(v[i], sign[i]), ALL(4.0f));
        p[i] = ALL(8.0439431e-6f);
    }
    _Pragma("GCC unroll 8") for (int k = 0; k < 8; k++) EACH p[i] = _mm256_fmadd_ps(p[i], a[i], ALL(fit[k]));
    EACH p[i] = _mm256_mul_ps(p[i], a[i]);
    exponential(p);
    EACH v[i] = _mm256_or_ps(_mm256_sub_ps(ALL(1.0f), p[i]), sign[i]);
}

static inline __attribute__((always_inline)) void activate(__m256 *v, int32_t activation) {
    __m256 f[V];
    if (activation == GELU) {
        EACH f[i] = _mm256_mul_ps(v[i], ALL(0.70710678f));
        error_function(f);
        EACH v[i] = _mm256_mul_ps(_mm256_mul_ps(v[i], ALL(0.5f)), _mm256_add_ps(ALL(1.0f), f[i]));
    } else if (activation == GELU_TANH) {
        EACH {
            __m256 cube = _mm256_mul_ps(_mm256_mul_ps(v[i], v[i]), v[i]);
            f[i] = _mm256_mul_ps(ALL(0.79788456f), _mm256_add_ps(v[i], _mm256_mul_ps(ALL(0.044715f), cube)));
            f[i] = _mm256_add_ps(f[i], f[i]);
        }
        exponential(f);  // tanh(u) = 1 - 2 / (e^2u + 1)
        EACH {
            __m256 tanh = _mm256_sub_ps(ALL(1.0f), _mm256_div_ps(ALL(2.0f), _mm256_add_ps(f[i], ALL(1.0f))));
            v[i] = _mm256_mul_ps(_mm256_mul_ps(v[i], ALL(0.5f)), _mm256_add_ps(ALL(1.0f), tanh));
        }
    } else if (activation == SILU) {
        EACH f[i] = _mm256_xor_ps(v[i], ALL(-0.0f));
        exponential(f);
        EACH v[i] = _mm256_div_ps(v[i], _mm256_add_ps(ALL(1.0f), f[i]));
    } else if (activation == RELU) {
        EACH v[i] = _mm256_max_ps(_mm256_setzero_ps(), v[i]);  // in this order NaN stays NaN
    }
}

static inline __m256i bf16_bits(__m256 v) {
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}

static inline __m256i as_int8(__m256 v, const ending *e) {
    v = _mm256_round_ps(_mm256_mul_ps(v, _mm256_set1_ps(e->inverse)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    v = _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(e->low)), _mm256_set1_ps(e->high));
    return _mm256_cvtps_epi32(v);
}

// 16 values of a row to y, of which `wide` exist.
static inline void store(const ending *e, __m256 left, __m256 right, int64_t at, int64_t wide) {
    char whole[64];
    char *place = (char *)e->y + at * (e->kind == FLOAT32 ? 4 : e->kind == BFLOAT16 ? 2 : 1);
    char *to = wide == COLUMNS ? place : whole;
    int64_t size = wide * 4;
    if (e->kind == FLOAT32) {
        _mm256_storeu_ps((float *)to, left);
        _mm256_storeu_ps((float *)to + 8, right);
    } else if (e->kind == BFLOAT16) {
        __m256i packed = _mm256_packus_epi32(bf16_bits(left), bf16_bits(right));
        _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(packed, 0xd8));
        size = wide * 2;
    } else {
        __m256i packed = _mm256_packs_epi32(as_int8(left, e), as_int8(right, e));
        packed = _mm256_permute4x64_epi64(packed, 0xd8);
        _mm_storeu_si128((__m128i *)to, _mm_packs_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
        size = wide;
    }
    if (to == whole) memcpy(place, whole, (size_t)size);
}

// What one panel's columns have in one group.
typedef struct {
    float w_scale[COLUMNS], shift[COLUMNS], bias[COLUMNS];
} of_columns;

static void take_columns(const ending *e, int64_t first, int64_t wide, int64_t group, of_columns *c) {
    memset(c, 0, sizeof *c);
    for (int64_t o = 0; o < wide; o++) {
        c->w_scale[o] = e->w_scale[(first + o) * e->groups + group];
        if (e->shift) c->shift[o] = e->shift[(first + o) * e->groups + group];
        if (e->bias) c->bias[o] = e->bias[first + o];
    }
}

// The sums of one group of two rows from t on become floats, are added to those of groups before, and in the last one to
// y. Of a single row, `rows` 1, the second is worked out and not stored.
static inline void end_rows(const ending *e, const of_columns *c, const int32_t *sums, float *before, int64_t t, int64_t rows,
                            int64_t group, int64_t first, int64_t wide) {
    __m256 v[V];
    EACH {
        const int64_t row = t + (i / 2 < rows ? i / 2 : 0), half = i % 2 * 8;
        v[i] = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)sums + i));
        if (e->shift) {
            __m256 x_sum = ALL(e->x_sum[row * e->groups + group]);
            v[i] = _mm256_add_ps(v[i], _mm256_mul_ps(x_sum, _mm256_loadu_ps(c->shift + half)));
        }
        v[i] = _mm256_mul_ps(v[i], _mm256_loadu_ps(c->w_scale + half));
        if (group) v[i] = _mm256_add_ps(_mm256_load_ps(before + i * 8), v[i]);
        if (group + 1 < e->groups) _mm256_store_ps(before + i * 8, v[i]);
        v[i] = _mm256_mul_ps(v[i], ALL(e->x_scale[e->one_scale ? 0 : row]));
        if (e->bias) v[i] = _mm256_add_ps(v[i], _mm256_loadu_ps(c->bias + half));
    }
    if (group + 1 < e->groups) return;
    activate(v, e->activation);
    store(e, v[0], v[1], t * e->out + first, wide);
    if (rows > 1) store(e, v[2], v[3], (t + 1) * e->out + first, wide);
}

// Memory of a thread, kept for the next product: fresh pages for each would cost as much as a small layer.
static _Thread_local char *held;
static _Thread_local size_t held_size;
static char *memory(size_t size) {
    if (size > held_size) {
        free(held);
        held = aligned_alloc(64, (size + 63) / 64 * 64);
        held_size = held ? size : 0;
    }
    return held;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// x [T, N] and w [O, N], a row each `x_stride` and `w_stride`; w_scale and shift [O, G], x_sum [T, G], x_scale [T] or one,
// bias [O]; y [T, O]. `shift`, `bias` may be NULL. Without groups `group` is N. Returns 0, or 1 where memory ran out.
int32_t panels(const int8_t *x, int64_t x_stride, const int8_t *w, int64_t w_stride, int64_t rows, int64_t n, int64_t out,
               int64_t group, const float *w_scale, const float *shift, const float *x_sum, const float *x_scale,
               int32_t one_scale, const float *bias, int32_t activation, int32_t kind, float inverse, float low, float high,
               void *y) {
    if (rows < 1 || out < 1) return 0;
    const int64_t groups = (n + group - 1) / group, threads = omp_get_max_threads();
    const ending e = {w_scale, shift, x_sum, x_scale, bias, groups, out, one_scale, activation, kind, inverse, low, high, y};
    // Blocks of inputs: even parts of a group, at most DEPTH, of a whole number of 16.
    const int64_t parts = (group + DEPTH - 1) / DEPTH, depth = ((group + parts - 1) / parts + 15) / 16 * 16;
    const int64_t blocks = (group + depth - 1) / depth, padded = groups * blocks * depth;
    int64_t tall = BLOCK_BYTES / (2 * padded) / ROWS * ROWS;
    tall = least(tall < 48 ? 48 : tall, (rows + ROWS - 1) / ROWS * ROWS);
    const int64_t units = (rows + tall - 1) / tall, panels_of = (out + COLUMNS - 1) / COLUMNS;
    // Few rows: threads share the columns instead. More jobs than threads, since one of them may be held up.
    int64_t shares = units >= 4 * threads ? 1 : least(panels_of, (4 * threads + units - 1) / units);
    int32_t failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        const size_t wide_size = (size_t)(2 * tall * padded), panel_size = (size_t)(4 * depth * COLUMNS / 2);
        const size_t sums_size = (size_t)(4 * tall * COLUMNS);
        char *own = memory(wide_size + panel_size + 2 * sums_size);
        int16_t *wide = (int16_t *)own, *panel = (int16_t *)(own + wide_size);
        int32_t *sums = (int32_t *)(own + wide_size + panel_size);
        float *before = (float *)(own + wide_size + panel_size + sums_size);
        int64_t widened = -1;
        failed |= !own;
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < units * shares; job++) {
            if (!own) continue;
            const int64_t unit = job / shares, share = job % shares;
            const int64_t top = unit * tall, high_rows = least(tall, rows - top);
            for (int64_t b = 0; b < groups * blocks && widened != unit; b++) {
                int64_t start = b / blocks * group + b % blocks * depth, end = least(start + depth, least(n, (b / blocks + 1) * group));
                if (end > start) widen_rows(x + top * x_stride + start, x_stride, high_rows, end - start, wide + b * tall * depth);
            }
            widened = unit;
            for (int64_t column = panels_of * share / shares; column < panels_of * (share + 1) / shares; column++) {
                const int64_t first = column * COLUMNS, here = least(COLUMNS, out - first);
                for (int64_t b = 0; b < groups * blocks; b++) {
                    const int64_t g = b / blocks, start = g * group + b % blocks * depth;
                    const int64_t end = least(start + depth, least(n, (g + 1) * group));
                    if (end <= start) continue;  // the last group is short
                    const int64_t stride = (end - start + 15) / 16 * 16, is_last = end == least(n, (g + 1) * group);
                    of_columns c;
                    if (is_last) take_columns(&e, first, here, g, &c);
                    widen_panel(w + first * w_stride + start, w_stride, here, end - start, panel);
                    for (int64_t t = 0; t < high_rows; t += ROWS) {
                        const int64_t count = least(ROWS, high_rows - t);
                        const int16_t *a = wide + b * tall * depth + t * stride;
                        tile_of(count, a, stride, panel, stride / 2, sums + t * COLUMNS, b % blocks != 0);
                        for (int64_t r = t; r < t + count && is_last; r += 2) {
                            const int64_t two = least(2, t + count - r);
                            end_rows(&e, &c, sums + r * COLUMNS, before + r * COLUMNS, top + r, two, g, first, here);
                        }
                    }
                }
            }
        }
    }
    return failed;
}

// f of `count` floats, to y as its kind says; y may be x where it takes floats. For products that machines with an int8
// instruction have of their own.
void finish(const float *x, int64_t count, int32_t activation, int32_t kind, float inverse, float low, float high, void *y) {
    const ending e = {.activation = activation, .kind = kind, .inverse = inverse, .low = low, .high = high, .y = y};
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < count; start += V * 8) {
        const int64_t here = least(V * 8, count - start);
        float rest[V * 8] = {0};
        const float *from = x + start;
        if (here < V * 8) from = memcpy(rest, from, (size_t)(4 * here));
        __m256 v[V];
        EACH v[i] = _mm256_loadu_ps(from + i * 8);
        activate(v, activation);
        store(&e, v[0], v[1], start, least(here, COLUMNS));
        if (here > COLUMNS) store(&e, v[2], v[3], start + COLUMNS, here - COLUMNS);
    }
}
#else
int32_t panels_ready(void) { return 0; }
#endif
