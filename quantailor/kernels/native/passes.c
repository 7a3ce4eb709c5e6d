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

// A gradient [T, O] twice in bfloat16, once times the weight's scale [O], once times the input's [T], read once.
// Either scale may be NULL for 1; with `one_scale` the input's is a single number.
#define FOLD(NAME, TYPE, LOAD)                                                                              \
    void NAME(const TYPE *grad, int64_t rows, int64_t out, const float *w_scale, const float *x_scale,      \
              int32_t one_scale, bf16 *for_x, bf16 *for_w) {                                                \
        _Pragma("omp parallel for schedule(static)") for (int64_t t = 0; t < rows; t++) {                   \
            float xs = !x_scale ? 1.0f : one_scale ? x_scale[0] : x_scale[t];                               \
            const TYPE *row = grad + t * out;                                                               \
            _Pragma("omp simd") for (int64_t o = 0; o < out; o++) {                                         \
                float d = LOAD(row[o]);                                                                     \
                for_x[t * out + o] = to_bf16(w_scale ? d * w_scale[o] : d);                                 \
                for_w[t * out + o] = to_bf16(d * xs);                                                       \
            }                                                                                               \
        }                                                                                                   \
    }
FOLD(fold_f32, float, SAME)
FOLD(fold_bf16, bf16, from_bf16)

// int8 -> bfloat16, exact.
void int8_to_bf16(const int8_t *q, int64_t count, bf16 *out) {
    int64_t run = 1 << 16;
    _Pragma("omp parallel for schedule(static)") for (int64_t start = 0; start < count; start += run) {
        int64_t end = start + run < count ? start + run : count;
        _Pragma("omp simd") for (int64_t i = start; i < end; i++) out[i] = to_bf16((float)q[i]);
    }
}
