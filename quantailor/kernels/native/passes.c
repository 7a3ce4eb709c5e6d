// Passes over memory that training with integers needs, each in one go: torch would write a fresh tensor an operator.
// Every function computes what its namesake in numerics/ computes, bit for bit where it makes integers or scales; the
// tests hold that. Built with -ffp-contract=off: a fused multiply-add would round once where torch rounds twice.
// Axes: T tokens, O out, N in, G groups of `group` along N (the last may be short).

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float from_bf16(bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Half to even; NaN stays NaN.
static inline bf16 to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (bf16)(f != f ? 0x7fc0 : rounded);
}

static inline float clampf(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

// numerics.affine.scale_zero_point of a symmetric range.
static inline float symmetric_scale(float largest, int qmin, int qmax) {
    float scale = largest / ((float)(qmax - qmin) / 2);
    float most = (float)((double)FLT_MAX / ((qmax - qmin + 2) / 2));
    scale = scale > most ? most : scale;
    float inverse = 1.0f / scale;
    return isfinite(inverse) ? scale : 1.0f;
}

// numerics.affine.quantize_dynamic without groups: x [T, N] -> q [T, N], scale [T]. A row that is not finite gets the
// scale NaN, so that what follows is not finite either.
#define QUANTIZE_TOKENS(NAME, TYPE, LOAD)                                                               \
    void NAME(const TYPE *x, int64_t rows, int64_t n, int32_t qmin, int32_t qmax, int8_t *q, float *scale) { \
        _Pragma("omp parallel for schedule(static)") for (int64_t t = 0; t < rows; t++) {               \
            const TYPE *row = x + t * n;                                                                \
            int8_t *out = q + t * n;                                                                    \
            float largest = 0.0f;                                                                       \
            int32_t broken = 0;                                                                         \
            _Pragma("omp simd reduction(max : largest) reduction(| : broken)") for (int64_t i = 0; i < n; i++) { \
                float a = fabsf(LOAD(row[i]));                                                          \
                largest = a > largest ? a : largest;                                                    \
                broken |= !(a <= FLT_MAX);                                                              \
            }                                                                                           \
            float s = symmetric_scale(largest, qmin, qmax);                                             \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                       \
                float v = clampf(__builtin_rintf(LOAD(row[i]) / s), (float)qmin, (float)qmax);          \
                out[i] = (int8_t)(int32_t)v;                                                            \
            }                                                                                           \
            scale[t] = broken ? NAN : s;                                                                \
        }                                                                                               \
    }
#define SAME(v) (v)
QUANTIZE_TOKENS(quantize_tokens_f32, float, SAME)
QUANTIZE_TOKENS(quantize_tokens_bf16, bf16, from_bf16)

// numerics.affine.quantize on a symmetric grid of one scale, of which `inverse` is the reciprocal: x -> q.
void quantize_values_f32(const float *x, int64_t count, float inverse, int32_t qmin, int32_t qmax, int8_t *q) {
    int64_t run = 1 << 14;
    _Pragma("omp parallel for schedule(static)") for (int64_t start = 0; start < count; start += run) {
        int64_t end = start + run < count ? start + run : count;
        _Pragma("omp simd") for (int64_t i = start; i < end; i++) {
            q[i] = (int8_t)(int32_t)clampf(__builtin_rintf(x[i] * inverse), (float)qmin, (float)qmax);
        }
    }
}

// h = LayerNorm(y + residual) [T, N], and its integers q [T, N] for the next product: on the grid whose reciprocal
// `inverse` is, or with `inverse` 0 on one of each token's own, its scale to `scale` [T], as quantize_tokens finds it.
void add_norm_f32(const float *y, const float *residual, int64_t rows, int64_t n, const float *gamma, const float *beta,
                  float epsilon, float *h, int8_t *q, float *scale, float inverse, int32_t qmin, int32_t qmax) {
    _Pragma("omp parallel for schedule(static)") for (int64_t t = 0; t < rows; t++) {
        const float *a = y + t * n, *b = residual + t * n;
        float *to = h + t * n, sum = 0.0f, squares = 0.0f, largest = 0.0f;
        int8_t *out = q + t * n;
        int32_t broken = 0;
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) {
            to[i] = a[i] + b[i];
            sum += to[i];
        }
        float mean = sum / (float)n;
        _Pragma("omp simd reduction(+ : squares)") for (int64_t i = 0; i < n; i++) {
            float d = to[i] - mean;
            squares += d * d;
        }
        float by = 1.0f / sqrtf(squares / (float)n + epsilon);
        _Pragma("omp simd reduction(max : largest) reduction(| : broken)") for (int64_t i = 0; i < n; i++) {
            to[i] = (to[i] - mean) * by * gamma[i] + beta[i];
            float size = fabsf(to[i]);
            largest = size > largest ? size : largest;
            broken |= !(size <= FLT_MAX);
        }
        if (inverse != 0.0f) {
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {
                out[i] = (int8_t)(int32_t)clampf(__builtin_rintf(to[i] * inverse), (float)qmin, (float)qmax);
            }
            continue;
        }
        float s = symmetric_scale(largest, qmin, qmax);
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {
            out[i] = (int8_t)(int32_t)clampf(__builtin_rintf(to[i] / s), (float)qmin, (float)qmax);
        }
        scale[t] = broken ? NAN : s;
    }
}

// numerics.grids.encode on uniform grids: w [O, N], scale [O, G], zero_point [O, G] or NULL -> q [O, N].
void quantize_weight_f32(const float *w, int64_t out, int64_t n, int64_t group, const float *scale,
                         const int32_t *zero_point, float offset, int32_t qmin, int32_t qmax, int8_t *q) {
    int64_t groups = (n + group - 1) / group;
    _Pragma("omp parallel for schedule(static)") for (int64_t o = 0; o < out; o++) {
        for (int64_t g = 0; g < groups; g++) {
            int64_t start = g * group, end = start + group < n ? start + group : n;
            float inverse = 1.0f / scale[o * groups + g];
            float zero = zero_point ? (float)zero_point[o * groups + g] : 0.0f;
            _Pragma("omp simd") for (int64_t i = start; i < end; i++) {
                float level = __builtin_rintf(w[o * n + i] * inverse - offset) + zero;
                q[o * n + i] = (int8_t)(int32_t)clampf(level, (float)qmin, (float)qmax);
            }
        }
    }
}

// The same, and back: numerics.lsq forwards. w_hat [O, N] may not be `w`.
void fake_quantize_f32(const float *w, int64_t out, int64_t n, int64_t group, const float *scale,
                       const int32_t *zero_point, float offset, int32_t qmin, int32_t qmax, float *w_hat) {
    int64_t groups = (n + group - 1) / group;
    _Pragma("omp parallel for schedule(static)") for (int64_t o = 0; o < out; o++) {
        for (int64_t g = 0; g < groups; g++) {
            int64_t start = g * group, end = start + group < n ? start + group : n;
            float s = scale[o * groups + g], inverse = 1.0f / s;
            float zero = zero_point ? (float)zero_point[o * groups + g] : 0.0f;
            float shift = zero - offset;
            _Pragma("omp simd") for (int64_t i = start; i < end; i++) {
                float level = __builtin_rintf(w[o * n + i] * inverse - offset) + zero;
                w_hat[o * n + i] = (clampf(level, (float)qmin, (float)qmax) - shift) * s;
            }
        }
    }
}

// numerics.lsq backwards: the gradient of the dequantized weight `grad` [O, N] becomes that of the weight, and, scaled
// by g, that of the scale [O, G]. `grad_w` may be `grad` itself.
#define LSQ_BACKWARD(NAME, TYPE, LOAD)                                                                         \
    void NAME(const float *w, const TYPE *grad, int64_t out, int64_t n, int64_t group, const float *scale,     \
              const int32_t *zero_point, float offset, float stretch, float g, int32_t qmin, int32_t qmax,     \
              float *grad_w, float *grad_scale) {                                                              \
        int64_t groups = (n + group - 1) / group;                                                              \
        float low = (float)qmin - stretch, high = (float)qmax + stretch;                                       \
        _Pragma("omp parallel for schedule(static)") for (int64_t o = 0; o < out; o++) {                       \
            for (int64_t k = 0; k < groups; k++) {                                                             \
                int64_t start = k * group, end = start + group < n ? start + group : n;                        \
                float inverse = 1.0f / scale[o * groups + k];                                                  \
                float zero = zero_point ? (float)zero_point[o * groups + k] : 0.0f;                            \
                float shift = zero - offset, sum = 0.0f;                                                       \
                _Pragma("omp simd reduction(+ : sum)") for (int64_t i = start; i < end; i++) {                 \
                    float steps = w[o * n + i] * inverse, v = steps + shift, d = LOAD(grad[o * n + i]);        \
                    float level = clampf(__builtin_rintf(steps - offset) + zero, (float)qmin, (float)qmax) - shift; \
                    int inside = v > low && v < high;                                                          \
                    grad_w[o * n + i] = inside ? d : 0.0f;                                                     \
                    sum += d * (inside ? level - steps : level);                                               \
                }                                                                                              \
                grad_scale[o * groups + k] = sum * g;                                                          \
            }                                                                                                  \
        }                                                                                                      \
    }
LSQ_BACKWARD(lsq_backward_f32, float, SAME)
LSQ_BACKWARD(lsq_backward_bf16, bf16, from_bf16)

// A gradient [T, O] twice in bfloat16, read once: times the weight's scale [O] as for_x [T, O], and times the input's [T]
// as for_w [O, T], turned, since a product with a turned left side runs at half the speed. Either scale may be NULL for 1;
// with `one_scale` the input's is a single number. Two rows make a word, so that 32 x 16 values are turned as 16 x 16
// words in the first cache; a strip of 512 columns keeps the pages being written within reach of the address cache.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
static inline __m512i bf16_bits(__m512 v) {
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}
static inline __m512 load16_f32(const float *p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
static inline __m512 load16_bf16(const bf16 *p, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
#define FOLD_BLOCK(LOAD16)                                                                                  \
    __mmask16 mask = wide == 16 ? 0xffff : (__mmask16)((1u << wide) - 1);                                   \
    __m512 ws = w_scale ? _mm512_maskz_loadu_ps(mask, w_scale + left) : _mm512_set1_ps(1.0f);               \
    for (int64_t i = 0; i < tall; i += 2) {                                                                 \
        __m512i word = _mm512_setzero_si512();                                                              \
        for (int64_t j = i; j < i + 2 && j < tall; j++) {                                                   \
            int64_t t = first + j;                                                                          \
            float xs = !x_scale ? 1.0f : one_scale ? x_scale[0] : x_scale[t];                               \
            __m512 d = LOAD16(grad + t * out + left, mask);                                                 \
            __m512i x = bf16_bits(_mm512_mul_ps(d, ws)), w = bf16_bits(_mm512_mul_ps(d, _mm512_set1_ps(xs))); \
            _mm256_mask_storeu_epi16(for_x + t * out + left, mask, _mm512_cvtepi32_epi16(x));               \
            word = _mm512_or_si512(word, j == i ? w : _mm512_slli_epi32(w, 16));                            \
        }                                                                                                   \
        _mm512_storeu_si512(block[i / 2], word);                                                            \
    }                                                                                                       \
    __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), \
                                    _mm512_set1_epi32(16));                                                 \
    for (int64_t o = 0; o < wide; o++) {                                                                    \
        __m512i column = _mm512_i32gather_epi32(at, &block[0][o], 4);                                       \
        __mmask32 there = tall == 32 ? 0xffffffff : (1u << tall) - 1;                                       \
        bf16 *to = for_w + (left + o) * rows + first;                                                       \
        if (tall == 32 && ((uintptr_t)to & 63) == 0) _mm512_stream_si512((void *)to, column);               \
        else _mm512_mask_storeu_epi16(to, there, column);                                                   \
    }
#else
#define load16_f32 SAME
#define load16_bf16 from_bf16
#define FOLD_BLOCK(LOAD)                                                                                    \
    for (int64_t i = 0; i < tall; i++) {                                                                    \
        int64_t t = first + i;                                                                              \
        float xs = !x_scale ? 1.0f : one_scale ? x_scale[0] : x_scale[t];                                   \
        for (int64_t o = 0; o < wide; o++) {                                                                \
            float d = LOAD(grad[t * out + left + o]);                                                       \
            for_x[t * out + left + o] = to_bf16(w_scale ? d * w_scale[left + o] : d);                       \
            for_w[(left + o) * rows + t] = to_bf16(d * xs);                                                 \
        }                                                                                                   \
    }
#endif
#define FOLD(NAME, TYPE, LOAD16)                                                                            \
    void NAME(const TYPE *grad, int64_t rows, int64_t out, const float *w_scale, const float *x_scale,      \
              int32_t one_scale, bf16 *for_x, bf16 *for_w) {                                                \
        int64_t strips = (out + 511) / 512, bands = (rows + 511) / 512;                                     \
        _Pragma("omp parallel for schedule(dynamic, 1)") for (int64_t job = 0; job < strips * bands; job++) { \
            int64_t strip = job / bands * 512, band = job % bands * 512;                                    \
            int64_t right = strip + 512 < out ? strip + 512 : out, low = band + 512 < rows ? band + 512 : rows; \
            uint32_t block[16][16];                                                                         \
            (void)block;                                                                                    \
            for (int64_t first = band; first < low; first += 32) {                                          \
                int64_t tall = low - first < 32 ? low - first : 32;                                         \
                for (int64_t left = strip; left < right; left += 16) {                                      \
                    int64_t wide = right - left < 16 ? right - left : 16;                                   \
                    FOLD_BLOCK(LOAD16)                                                                      \
                }                                                                                           \
            }                                                                                               \
        }                                                                                                   \
    }
FOLD(fold_f32, float, load16_f32)
FOLD(fold_bf16, bf16, load16_bf16)

// int8 -> bfloat16, exact.
void int8_to_bf16(const int8_t *q, int64_t count, bf16 *out) {
    int64_t run = 1 << 16;
    _Pragma("omp parallel for schedule(static)") for (int64_t start = 0; start < count; start += run) {
        int64_t end = start + run < count ? start + run : count;
        _Pragma("omp simd") for (int64_t i = start; i < end; i++) out[i] = to_bf16((float)q[i]);
    }
}
