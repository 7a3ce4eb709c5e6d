// One token through a decoder block, in one call: what is small between the products costs more in calls than in
// arithmetic. Threads part the rows of each weight and meet four times; what takes less time than a meeting (the norm, the
// token as integers) each does for itself.
//
//     x = x + o(attention(rope(q(n)), keys, values)),   n = norm(x)          norm: x / sqrt(mean(x^2) + eps) * gain
//     x = x + down(act(gate(m)) * up(m)),               m = norm(x)
//
// Axes: H heads, K heads of keys and values, L places in the cache, D channels of a head.

#include "rows.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__BMI2__)
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <string.h>

typedef struct {
    weight weights[7];      // q, k, v, o, gate, up, down
    const float *biases[7]; // each [O] or NULL
    const float *first_gain, *second_gain, *q_gain, *k_gain;  // [N]; of heads [D], or NULL
    double eps, head_eps, scaling;
    int64_t width, heads, kv_heads, head_dim, activation;     // activation: 0 SiLU, 1 GELU by tanh
} block;

// What one token meets. Keys and values float32 [K, L, D], or int8 with a scale a place, float32 [K, L].
typedef struct {
    float *x;               // [N], in and out
    const float *cos, *sin; // [D]
    void *keys, *values;
    float *key_scales, *value_scales;  // NULL: keys and values are floats
    const uint8_t *visible; // [L], 0 where the token must not look; or NULL
    int64_t length, position;
    void *room;             // block_bytes
} place;

enum { Q, K, V, O, GATE, UP, DOWN };

static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t inner(const block *b) { return b->weights[GATE].out; }
static int64_t all_heads(const block *b) { return b->heads * b->head_dim; }

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Of a thread: a normed token, one as integers, and scores.
static int64_t thread_bytes(const block *b, int64_t length) {
    int64_t tokens = 0;
    for (int i = 0; i < 7; i++) tokens = most(tokens, token_bytes(b->weights[i].kind, b->weights[i].n));
    return rounded(4 * b->width) + rounded(tokens) + rounded(4 * (length + 8)) + rounded(4 * b->head_dim);
}

static int64_t shared_bytes(const block *b) {
    return rounded(4 * all_heads(b)) + 2 * rounded(4 * b->kv_heads * b->head_dim) + rounded(4 * all_heads(b)) +
           2 * rounded(4 * inner(b)) + rounded(4 * b->width);
}

int64_t block_bytes(const block *b, int64_t length) {
    return shared_bytes(b) + omp_get_max_threads() * thread_bytes(b, length);
}

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2; e^r by its series up to r^7: within 2 units of the last place.
static inline __m256 exponential(__m256 x) {
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(_mm256_set1_ps(-87.0f), x));  // NaN stays: it comes second
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.442695041f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.0f / 5040);
    const float factors[7] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 7
    for (int i = 0; i < 7; i++) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(factors[i]));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

// x / sqrt(mean(x^2) + eps) * gain, n a multiple of 8.
static void norm(const float *x, const float *gain, int64_t n, double eps, float *y) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        sum = _mm256_fmadd_ps(v, v, sum);
    }
    const __m256 factor = _mm256_set1_ps(1.0f / sqrtf(total(sum) / (float)n + (float)eps));
    for (int64_t i = 0; i < n; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(gain + i), _mm256_mul_ps(_mm256_loadu_ps(x + i), factor)));
    }
}

// Two halves of a head turned by the angle of its position.
static void rope(float *x, const float *cos, const float *sin, int64_t d) {
    for (int64_t i = 0; i < d / 2; i++) {
        float a = x[i], b = x[i + d / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + d / 2] = b * cos[i + d / 2] + a * sin[i + d / 2];
    }
}

// A row of the cache as integers: scale = largest / 127, or NaN where the row is not finite.
static float store(const float *x, int64_t d, int8_t *q) {
    float largest = 0;
    int32_t broken = 0;
    for (int64_t i = 0; i < d; i++) {
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        broken |= !(fabsf(x[i]) <= 3.402823466e38f);
    }
    const float inverse = broken || !(largest > 0) ? 0 : 127.0f / largest;
    for (int64_t i = 0; i < d; i++) q[i] = broken ? 0 : (int8_t)(int32_t)rintf(x[i] * inverse);
    return broken ? NAN : largest / 127.0f;
}

static inline __m256 eight(const void *values, int64_t i, int in_bytes) {
    if (!in_bytes) return _mm256_loadu_ps((const float *)values + i);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)values + i))));
}

// One head over the places it may see: scores, softmax, the mean of values. q is scaled already.
static inline __attribute__((always_inline)) void attend(const place *p, const float *q, const void *keys, const void *values,
                                                         const float *key_scales, const float *value_scales, int64_t d,
                                                         float *scores, float *out, int in_bytes) {
    const int64_t seen = p->position + 1;
    const size_t size = in_bytes ? 1 : 4;
    float largest = -INFINITY;
    for (int64_t i = 0; i < seen; i++) {
        const char *key = (const char *)keys + (size_t)(i * d) * size;
        __m256 sum = _mm256_setzero_ps();
        for (int64_t c = 0; c < d; c += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(q + c), eight(key, c, in_bytes), sum);
        float score = total(sum) * (in_bytes ? key_scales[i] : 1.0f);
        if (p->visible && !p->visible[i]) score = -INFINITY;
        scores[i] = score;
        largest = score > largest ? score : largest;
    }
    for (int64_t i = seen; i < (seen + 7) / 8 * 8; i++) scores[i] = -INFINITY;
    const __m256 top = _mm256_set1_ps(largest);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < seen; i += 8) {
        __m256 score = _mm256_loadu_ps(scores + i);
        __m256 hidden = _mm256_cmp_ps(score, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ);
        __m256 e = _mm256_andnot_ps(hidden, exponential(_mm256_sub_ps(score, top)));
        _mm256_storeu_ps(scores + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    const float whole = total(sum);
    for (int64_t c = 0; c < d; c += 8) _mm256_storeu_ps(out + c, _mm256_setzero_ps());
    for (int64_t i = 0; i < seen; i++) {
        if (scores[i] == 0.0f) continue;
        const char *value = (const char *)values + (size_t)(i * d) * size;
        const __m256 share = _mm256_set1_ps(scores[i] / whole * (in_bytes ? value_scales[i] : 1.0f));
        for (int64_t c = 0; c < d; c += 8) {
            _mm256_storeu_ps(out + c, _mm256_fmadd_ps(share, eight(value, c, in_bytes), _mm256_loadu_ps(out + c)));
        }
    }
}

// Rows that thread `me` of `of` takes, in steps of four.
static void share(int64_t rows, int me, int of, int64_t *from, int64_t *to) {
    int64_t fours = (rows + 3) / 4;
    *from = fours * me / of * 4;
    *to = fours * (me + 1) / of * 4;
    if (*to > rows) *to = rows;
}

// The token of weight `i`, unless that of `before` is the same.
static token as_token(const block *b, int i, int before, const float *x, void *memory, const token *last) {
    const weight *w = b->weights + i;
    if (before >= 0 && same_token(w, b->weights + before)) return *last;
    token t = token_at(memory, w->kind, w->n);
    prepare_token(x, w, &t);
    return t;
}

void run_block(const block *b, const place *p) {
    const int64_t d = b->head_dim, shared_heads = b->heads / b->kv_heads, kv = b->kv_heads * d;
    char *room = p->room;
    float *q = (float *)room, *k = (float *)(room += rounded(4 * all_heads(b))), *v = (float *)(room += rounded(4 * kv));
    float *mixed = (float *)(room += rounded(4 * kv)), *gate = (float *)(room += rounded(4 * all_heads(b)));
    float *up = (float *)(room += rounded(4 * inner(b))), *y = (float *)(room += rounded(4 * inner(b)));
    char *threads = room + rounded(4 * b->width);
#pragma omp parallel
    {
        const int me = omp_get_thread_num(), of = omp_get_num_threads();
        int64_t from, to;
        char *mine = threads + me * thread_bytes(b, p->length);
        float *normed = (float *)mine, *scores = (float *)(mine += rounded(4 * b->width));
        float *turned = (float *)(mine += rounded(4 * (p->length + 8)));
        void *memory = mine + rounded(4 * d);

        norm(p->x, b->first_gain, b->width, b->eps, normed);
        float *into[3] = {q, k, v};
        token t = {0};
        for (int i = Q; i <= V; i++) {
            t = as_token(b, i, i - 1, normed, memory, &t);
            share(b->weights[i].out, me, of, &from, &to);
            times_rows(b->weights + i, &t, b->biases[i], from, to, into[i]);
        }
#pragma omp barrier
        for (int64_t g = me; g < b->kv_heads; g += of) {
            const int64_t at = g * p->length + p->position;
            memcpy(turned, k + g * d, sizeof(float) * (size_t)d);
            if (b->k_gain) norm(turned, b->k_gain, d, b->head_eps, turned);
            rope(turned, p->cos, p->sin, d);
            if (p->key_scales) {
                p->key_scales[at] = store(turned, d, (int8_t *)p->keys + at * d);
                p->value_scales[at] = store(v + g * d, d, (int8_t *)p->values + at * d);
            } else {
                memcpy((float *)p->keys + at * d, turned, sizeof(float) * (size_t)d);
                memcpy((float *)p->values + at * d, v + g * d, sizeof(float) * (size_t)d);
            }
            for (int64_t h = g * shared_heads; h < (g + 1) * shared_heads; h++) {
                memcpy(turned, q + h * d, sizeof(float) * (size_t)d);
                if (b->q_gain) norm(turned, b->q_gain, d, b->head_eps, turned);
                rope(turned, p->cos, p->sin, d);
                for (int64_t i = 0; i < d; i++) turned[i] *= (float)b->scaling;
                const int64_t first = g * p->length;
                if (p->key_scales) {
                    attend(p, turned, (int8_t *)p->keys + first * d, (int8_t *)p->values + first * d, p->key_scales + first,
                           p->value_scales + first, d, scores, mixed + h * d, 1);
                } else {
                    attend(p, turned, (float *)p->keys + first * d, (float *)p->values + first * d, 0, 0, d, scores,
                           mixed + h * d, 0);
                }
            }
        }
#pragma omp barrier
        t = as_token(b, O, -1, mixed, memory, 0);
        share(b->weights[O].out, me, of, &from, &to);
        times_rows(b->weights + O, &t, b->biases[O], from, to, y);
        for (int64_t i = from; i < to; i++) p->x[i] += y[i];
#pragma omp barrier
        norm(p->x, b->second_gain, b->width, b->eps, normed);
        share(inner(b), me, of, &from, &to);
        t = as_token(b, GATE, -1, normed, memory, 0);
        times_rows(b->weights + GATE, &t, b->biases[GATE], from, to, gate);
        t = as_token(b, UP, GATE, normed, memory, &t);
        times_rows(b->weights + UP, &t, b->biases[UP], from, to, up);
        for (int64_t i = from; i < to; i += 8) {
            float part[8] = {0}, of_up[8] = {0};
            int64_t count = to - i < 8 ? to - i : 8;
            memcpy(part, gate + i, sizeof(float) * (size_t)count);
            memcpy(of_up, up + i, sizeof(float) * (size_t)count);
            __m256 g = _mm256_loadu_ps(part), z = g;
            if (b->activation == 1) {  // x sigmoid(2 u) = x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)
                __m256 cube = _mm256_mul_ps(_mm256_mul_ps(g, g), g);
                z = _mm256_mul_ps(_mm256_set1_ps(1.5957691216f), _mm256_fmadd_ps(_mm256_set1_ps(0.044715f), cube, g));
            }
            __m256 one = _mm256_set1_ps(1.0f);
            __m256 below = _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), z)));
            _mm256_storeu_ps(part, _mm256_mul_ps(_mm256_div_ps(g, below), _mm256_loadu_ps(of_up)));
            memcpy(gate + i, part, sizeof(float) * (size_t)count);
        }
#pragma omp barrier
        t = as_token(b, DOWN, -1, gate, memory, 0);
        share(b->weights[DOWN].out, me, of, &from, &to);
        times_rows(b->weights + DOWN, &t, b->biases[DOWN], from, to, y);
        for (int64_t i = from; i < to; i++) p->x[i] += y[i];
    }
}

#else

typedef struct { int64_t none; } block;
typedef struct { int64_t none; } place;
int64_t block_bytes(const block *b, int64_t length) { (void)b; return length; }
void run_block(const block *b, const place *p) { (void)b, (void)p; }

#endif
