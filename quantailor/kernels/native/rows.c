// See rows.h.

#include "rows.h"

#include <math.h>
#include <string.h>

#define LARGEST 32512.0f  // 127 * 256: its upper plane still fits 8 bits
#define NF4_LARGEST 8191.0f  // a level as an integer: eight products of a lane still fit 32 bits

// Inputs to a step, and bytes of their weights.
static inline __attribute__((always_inline)) int inputs_of(int kind) {
    switch (kind) {
        case 1: return 256;
        case 2: return 128;
        case 4: case NF4: return 64;
        default: return 32;
    }
}
static inline __attribute__((always_inline)) int bytes_of(int kind) { return kind == 3 ? 12 : 32; }
static inline __attribute__((always_inline)) int in_words(int kind) { return kind == 8 || kind == UNSIGNED8 || kind == NF4; }

int parts_of(const weight *w) {
    const int v = inputs_of((int)w->kind);
    return w->kind == FLOAT32 || w->groups == 1 || w->group >= v ? 1 : (int)(v / w->group);
}

int same_token(const weight *a, const weight *b) {
    return a->kind == b->kind && a->c == b->c && parts_of(a) == parts_of(b) && !a->zeros == !b->zeros;
}

static inline int64_t steps_of(int64_t kind, int64_t n) { return (n + inputs_of((int)kind) - 1) / inputs_of((int)kind); }

int64_t token_bytes(int64_t kind, int64_t n) {
    if (kind == FLOAT32) return 0;
    return steps_of(kind, n) * (2 * inputs_of((int)kind) + 25 * (int64_t)sizeof(float)) + 96;
}

token token_at(void *memory, int64_t kind, int64_t n) {
    token t = {0};
    if (kind == FLOAT32) return t;
    int64_t steps = steps_of(kind, n), v = inputs_of((int)kind);
    t.high = memory;
    t.low = t.high + steps * v;
    t.sums = (float *)(t.high + 2 * steps * v);
    t.moved = t.sums + 8 * steps;
    t.group_scale = t.moved + 8 * steps + 8;
    t.x_scale = t.group_scale + 8 * steps + 8;
    return t;
}

// Bytes at even places, then those at odd ones: one such pass for 4 bits, two for 2 bits, three for 1 bit put a plane's
// inputs side by side.
static inline __attribute__((always_inline)) void evens_first(const int8_t *restrict in, int8_t *restrict out, int n) {
    for (int i = 0; i < n / 2; i++) out[i] = in[2 * i];
    for (int i = 0; i < n / 2; i++) out[n / 2 + i] = in[2 * i + 1];
}

// [32, 8 / bits] -> [8 / bits, 32]
static inline __attribute__((always_inline)) void by_plane(const int8_t *in, int8_t *restrict out, int bits) {
    int8_t one[256], two[256];
    if (bits == 3) {
        memcpy(out, in, 32);
    } else if (bits == 4) {
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

// NF4: nibbles are unpacked to bytes and these interleaved with their upper halves, within 128 bits: inputs of even places
// of 0..15 and 32..47, of 16..31 and 48..63; then those of odd places.
static inline __attribute__((always_inline)) void by_pair(const int16_t *in, int16_t *restrict out) {
    for (int odd = 0; odd < 2; odd++) {
        for (int part = 0; part < 2; part++) {
            for (int half = 0; half < 2; half++) {
                for (int i = 0; i < 8; i++) out[odd * 32 + part * 16 + half * 8 + i] = in[half * 32 + part * 16 + 2 * i + odd];
            }
        }
    }
}

// Its loops are such that compilers find vectors in them: it is the part that every thread does by itself.
static inline __attribute__((always_inline)) void prepare(const float *x, int64_t n, int kind, float c, int parts, token *t) {
    const int v = inputs_of(kind), lane = v / 8;
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
        if (kind == NF4) {
            by_pair(k, (int16_t *)t->high + s * v);
        } else if (in_words(kind)) {
            memcpy(t->high + 2 * s * v, k, 2 * (size_t)v);
        } else {
            for (int i = 0; i < v; i++) lower[i] = (int8_t)(((k[i] + 128) & 255) - 128);
            for (int i = 0; i < v; i++) upper[i] = (int8_t)((k[i] - lower[i]) >> 8);
            by_plane(lower, t->low + s * v, kind);
            by_plane(upper, t->high + s * v, kind);
        }
        t->x_scale[s] = broken ? NAN : scale;
        for (int l = 0; l < 8; l++) {
            int32_t sum = 0;
            for (int i = 0; i < lane; i++) sum += k[l * lane + i];
            t->sums[s * 8 + l] = (float)sum;
            if (parts == 1) t->moved[s * 8 + l] = (float)sum * t->x_scale[s] * c;
        }
        for (int p = 0; parts > 1 && p < parts; p++) {
            float sum = 0;
            for (int l = p * 8 / parts; l < (p + 1) * 8 / parts; l++) sum += t->sums[s * 8 + l];
            t->moved[s * parts + p] = sum * t->x_scale[s] * c;
            t->group_scale[s * parts + p] = t->x_scale[s];
        }
    }
    if (parts > 1) {  // scales are taken eight at a time
        memset(t->moved + steps * parts, 0, 8 * sizeof(float));
        memset(t->group_scale + steps * parts, 0, 8 * sizeof(float));
    }
}

#define FOR_KIND(KIND, CALL)                                  \
    switch (KIND) {                                           \
        case 1: { enum { kind = 1 }; CALL; } break;           \
        case 2: { enum { kind = 2 }; CALL; } break;           \
        case 3: { enum { kind = 3 }; CALL; } break;           \
        case 4: { enum { kind = 4 }; CALL; } break;           \
        case 8: { enum { kind = 8 }; CALL; } break;           \
        case UNSIGNED8: { enum { kind = UNSIGNED8 }; CALL; } break; \
        case NF4: { enum { kind = NF4 }; CALL; } break;       \
    }

void prepare_token(const float *x, const weight *w, token *t) {
    t->x = x;
    FOR_KIND(w->kind, prepare(x, w->n, kind, w->zeros ? -1.0f : (float)w->c, parts_of(w), t));
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__BMI2__) && defined(__F16C__)
#include <immintrin.h>

int32_t decode_ready(void) { return 1; }

enum { ROWS = 4 };  // of weights at a time: they share what is loaded of the token
enum { AT_ONCE = 512 };  // groups whose scales are taken together: a multiple of what a step can hold, 8

typedef struct {
    int64_t steps, whole, many;  // steps; those that lie whole in a row; steps to a group
    int parts;                   // groups to a step
    __m256i order;
    __m256i low_levels, high_levels;
} layout;

static layout layout_of(const weight *w, int kind) {
    const int v = inputs_of(kind);
    layout f;
    f.steps = (w->n + v - 1) / v;
    f.whole = w->row_bytes / bytes_of(kind);
    if (f.whole > f.steps) f.whole = f.steps;
    f.parts = parts_of(w);
    f.many = w->groups == 1 ? f.steps : w->group >= v ? w->group / v : 1;
    int32_t index[8];
    for (int l = 0; l < 8; l++) {
        index[l] = f.parts == 2 ? l / 4 % 2 : l * f.parts / 8;
    }
    f.order = _mm256_loadu_si256((const __m256i *)index);
    if (kind == NF4) {
        int8_t low[16], high[16];
        for (int i = 0; i < 16; i++) {
            int level = (int)rintf(w->levels[i] * NF4_LARGEST);
            low[i] = (int8_t)(level & 255);
            high[i] = (int8_t)(level >> 8);
        }
        f.low_levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low));
        f.high_levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high));
    }
    return f;
}

#define LOAD(P) _mm256_loadu_si256((const __m256i *)(P))

// 24 bits to 8 bytes, four times.
static inline __m256i of_three_bits(const uint8_t *w) {
    const uint64_t fields = 0x0707070707070707ull;
    uint32_t a, b, c, d;
    memcpy(&a, w, 4), memcpy(&b, w + 3, 4), memcpy(&c, w + 6, 4), memcpy(&d, w + 8, 4);
    return _mm256_set_epi64x((long long)_pdep_u64(d >> 8, fields), (long long)_pdep_u64(c, fields),
                             (long long)_pdep_u64(b, fields), (long long)_pdep_u64(a, fields));
}

static inline __attribute__((always_inline)) __m256i sums_of_step(const uint8_t *w, const int8_t *high, const int8_t *low,
                                                                   int kind, const layout *f) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << (kind > 4 ? 4 : kind)) - 1)), ones = _mm256_set1_epi16(1);
    const __m256i shift = _mm256_set1_epi16(256);
    if (kind == 8 || kind == UNSIGNED8) {
        __m128i a = _mm_loadu_si128((const __m128i *)w), b = _mm_loadu_si128((const __m128i *)(w + 16));
        __m256i first = kind == UNSIGNED8 ? _mm256_cvtepu8_epi16(a) : _mm256_cvtepi8_epi16(a);
        __m256i second = kind == UNSIGNED8 ? _mm256_cvtepu8_epi16(b) : _mm256_cvtepi8_epi16(b);
        return _mm256_add_epi32(_mm256_madd_epi16(first, LOAD(high)), _mm256_madd_epi16(second, LOAD(high + 32)));
    }
    if (kind == NF4) {
        __m256i packed = LOAD(w), sum = _mm256_setzero_si256();
        for (int odd = 0; odd < 2; odd++) {
            __m256i u = _mm256_and_si256(odd ? _mm256_srli_epi16(packed, 4) : packed, mask);
            __m256i l = _mm256_shuffle_epi8(f->low_levels, u), h = _mm256_shuffle_epi8(f->high_levels, u);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_unpacklo_epi8(l, h), LOAD(high + odd * 64)));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_unpackhi_epi8(l, h), LOAD(high + odd * 64 + 32)));
        }
        return sum;
    }
    // At most 15 * 127 * 2 in a sum of two, times two planes; 3 * 127 * 2 * 4 and 127 * 2 * 8 at fewer bits: within 16.
    __m256i h, l;
    if (kind == 3) {
        __m256i u = of_three_bits(w);
        h = _mm256_maddubs_epi16(u, LOAD(high)), l = _mm256_maddubs_epi16(u, LOAD(low));
    } else {
        __m256i packed = LOAD(w), u = _mm256_and_si256(packed, mask);
        h = _mm256_maddubs_epi16(u, LOAD(high)), l = _mm256_maddubs_epi16(u, LOAD(low));
#pragma GCC unroll 8
        for (int plane = 1; plane < 8 / kind; plane++) {
            u = _mm256_and_si256(_mm256_srli_epi16(packed, plane * kind), mask);
            h = _mm256_add_epi16(h, _mm256_maddubs_epi16(u, LOAD(high + plane * 32)));
            l = _mm256_add_epi16(l, _mm256_maddubs_epi16(u, LOAD(low + plane * 32)));
        }
    }
    return _mm256_add_epi32(_mm256_madd_epi16(h, shift), _mm256_madd_epi16(l, ones));
}

// Scales of a step's lanes from as many floats as it has groups: `parted` of them where that is 1 or 2.
static inline __attribute__((always_inline)) __m256 scales_of_lanes(const float *scales, int parted, const layout *f) {
    if (parted == 1) return _mm256_broadcast_ss(scales);
    if (parted == 2) return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_broadcast_sd((const double *)scales)), f->order);
    if (f->parts == 4) return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scales)), f->order);
    return _mm256_loadu_ps(scales);
}

// Of a row whose steps have several groups: scales of groups from .. from + count - 1 times the token's, zeros after them
// up to a multiple of 8; and what `moved` adds to the row, in `sum`: no step has to. `next`: bytes to the rows after
// these, whose scales are fetched.
static inline __attribute__((always_inline)) __m256 take_scales(const char *scales, int64_t next, const uint8_t *zeros,
                                                                 const token *t, int64_t from, int64_t count, int half,
                                                                 __m256 sum, float *to) {
    const int64_t size = half ? 2 : 4;
    for (int64_t g = 0; g < count; g += 8) {
        const char *at = scales + (from + g) * size;
        char some[32] = {0};
        if (g + 8 > count) at = memcpy(some, at, (size_t)((count - g) * size));
        else if (g % 16 == 0) _mm_prefetch(at + next, _MM_HINT_T0);
        __m256 of_w = half ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)) : _mm256_loadu_ps((const float *)at);
        __m256 moved = _mm256_loadu_ps(t->moved + from + g);
        if (zeros) {
            uint64_t eight = 0;
            memcpy(&eight, zeros + from + g, (size_t)(count - g < 8 ? count - g : 8));
            __m256 z = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)eight)));
            moved = _mm256_mul_ps(moved, z);
        }
        sum = _mm256_fmadd_ps(of_w, moved, sum);
        _mm256_storeu_ps(to + g, _mm256_mul_ps(of_w, _mm256_loadu_ps(t->group_scale + from + g)));
    }
    return sum;
}

// One step of `many` rows, whose weights start at `at` and stand `apart` bytes from each other, with scales as
// `take_scales` leaves them where there are several to a step. `parted` as layout.parts where that is 1 or 2, and 3 for
// more; `last`: the step may be short, and nothing is fetched beforehand.
static inline __attribute__((always_inline)) void one_step(const layout *f, const token *t, int64_t s, const uint8_t *at,
                                                            int64_t apart, const float *scales, int64_t scales_apart,
                                                            const uint8_t *zero, int64_t groups, int many, int kind,
                                                            int parted, int has_zeros, int last, __m256 *sum) {
    const int width = in_words(kind) ? 2 * inputs_of(kind) : inputs_of(kind);
    const int8_t *high = t->high + s * width, *low = t->low + s * width;
    const __m256 x_scale = _mm256_broadcast_ss(t->x_scale + s);
    const __m256 moved = _mm256_loadu_ps(t->moved + (parted == 1 ? s * 8 : 0));
#pragma GCC unroll 4
    for (int r = 0; r < many; r++) {
        if (!last) _mm_prefetch((const char *)(at + (many + r) * apart), _MM_HINT_T0);
        __m256 d = _mm256_cvtepi32_ps(sums_of_step(at + r * apart, high, low, kind, f));
        if (parted == 1 && has_zeros) {
            __m256 move = _mm256_set1_ps(-(float)zero[r * groups]);
            d = _mm256_mul_ps(_mm256_fmadd_ps(move, _mm256_loadu_ps(t->sums + s * 8), d), x_scale);
        } else if (parted == 1) {
            d = _mm256_fmadd_ps(d, x_scale, moved);
        }
        sum[r] = _mm256_fmadd_ps(d, scales_of_lanes(scales + r * scales_apart, parted, f), sum[r]);
    }
}

static inline __attribute__((always_inline)) void some_rows(const weight *w, const layout *f, const token *t, int64_t from,
                                                             int many, int kind, int parted, int has_zeros,
                                                             const float *bias, float *y) {
    const int size = bytes_of(kind);
    const int64_t before_last = f->steps - 1, apart = w->row_bytes, groups = w->groups;
    const uint8_t *row = (const uint8_t *)w->w + from * apart, *zero = has_zeros ? w->zeros + from * groups : 0;
    const token local = *t;
    __m256 sum[ROWS];
    for (int r = 0; r < many; r++) sum[r] = _mm256_setzero_ps();
    uint8_t tails[ROWS * 32] = {0};
    const uint8_t *rest = row + before_last * size;
    int64_t rest_apart = apart;
    if (before_last >= f->whole) {  // a step that the row holds in part
        for (int r = 0; r < many; r++) memcpy(tails + r * 32, rest + r * apart, (size_t)(apart - before_last * size));
        rest = tails, rest_apart = 32;
    }
#define STEP(AT, APART, SCALES, SCALES_APART, LAST) \
    one_step(f, &local, s, AT, APART, SCALES, SCALES_APART, zero, groups, many, kind, parted, has_zeros, LAST, sum)
    int64_t s = 0;
    if (parted > 1) {
        float scales[ROWS * AT_ONCE];
        const int parts = parted == 2 ? 2 : f->parts;
        const int64_t stride = w->scale_stride * (w->half ? 2 : 4);
        const char *scale = (const char *)w->scale + from * stride;
        for (int64_t g = 0; g < groups; g += AT_ONCE) {
            const int64_t count = groups - g < AT_ONCE ? groups - g : AT_ONCE;
#pragma GCC unroll 4
            for (int r = 0; r < many; r++) {
                const char *at = scale + r * stride;
                const uint8_t *z = has_zeros ? zero + r * groups : 0;
                float *to = scales + r * AT_ONCE;
                if (w->half) sum[r] = take_scales(at, many * stride, z, &local, g, count, 1, sum[r], to);
                else sum[r] = take_scales(at, many * stride, z, &local, g, count, 0, sum[r], to);
            }
            for (int64_t i = 0; i < count && s < before_last; i += parts, s++) {
                STEP(row + s * size, apart, scales + i, AT_ONCE, 0);
            }
        }
        STEP(rest, rest_apart, scales + s * parts % AT_ONCE, AT_ONCE, 1);
    } else {
        const float *scale = (const float *)w->scale + from * w->scale_stride;
        if (f->many == 1) {
            for (; s < before_last; s++) {
                STEP(row + s * size, apart, scale, w->scale_stride, 0);
                scale++;
                if (has_zeros) zero++;
            }
        } else {
            for (int64_t until = f->many; s < before_last; until += f->many) {
                for (; s < until && s < before_last; s++) STEP(row + s * size, apart, scale, w->scale_stride, 0);
                if (s == until) {
                    scale++;
                    if (has_zeros) zero++;
                }
            }
        }
        STEP(rest, rest_apart, scale, w->scale_stride, 1);
    }
#undef STEP
    const float unit = kind == NF4 ? 1.0f / NF4_LARGEST : 1.0f;
    for (int r = 0; r < many; r++) y[from + r] = total(sum[r]) * unit + (bias ? bias[from + r] : 0.0f);
}

// What four rows at a time leave over, any kind and layout: a function for all, since compilers take a second for each.
static __attribute__((noinline)) void last_rows(const weight *w, const layout *f, const token *t, const float *bias,
                                                int64_t o, int64_t to, float *y) {
    const int parted = f->parts < 3 ? f->parts : 3;
    for (; o < to; o++) some_rows(w, f, t, o, 1, (int)w->kind, parted, w->zeros != 0, bias, y);
}

// A function for each kind and layout, so that each has the registers to itself.
#define VARIANT(KIND, PARTED, ZEROS)                                                                              \
    static __attribute__((noinline)) void rows_##KIND##_##PARTED##_##ZEROS(                                       \
        const weight *w, const layout *f, const token *t, const float *bias, int64_t o, int64_t to, float *y) {   \
        for (; o + ROWS <= to; o += ROWS) some_rows(w, f, t, o, ROWS, KIND, PARTED, ZEROS, bias, y);              \
        last_rows(w, f, t, bias, o, to, y);                                                                       \
    }
#define OF_LAYOUT(KIND, ZEROS)                              \
    (f.parts == 1   ? rows_##KIND##_1_##ZEROS               \
     : f.parts == 2 ? rows_##KIND##_2_##ZEROS               \
                    : rows_##KIND##_3_##ZEROS)(w, &f, t, bias, from, to, y)
#define KINDS(KIND)                                                                                               \
    VARIANT(KIND, 1, 0) VARIANT(KIND, 2, 0) VARIANT(KIND, 3, 0)                                                   \
    VARIANT(KIND, 1, 1) VARIANT(KIND, 2, 1) VARIANT(KIND, 3, 1)                                                   \
    static void rows_of_##KIND(const weight *w, const token *t, const float *bias, int64_t from, int64_t to, float *y) { \
        const layout f = layout_of(w, KIND);                                                                      \
        w->zeros ? OF_LAYOUT(KIND, 1) : OF_LAYOUT(KIND, 0);                                                       \
    }
KINDS(1) KINDS(2) KINDS(3) KINDS(4) KINDS(8) KINDS(UNSIGNED8) KINDS(NF4)

static void float_rows(const weight *w, const float *x, const float *bias, int64_t from, int64_t to, float *y) {
    for (int64_t o = from; o < to; o++) {
        const float *row = (const float *)w->w + o * w->n;
        __m256 a = _mm256_setzero_ps(), b = a;
        int64_t i = 0;
        for (; i + 16 <= w->n; i += 16) {
            a = _mm256_fmadd_ps(_mm256_loadu_ps(row + i), _mm256_loadu_ps(x + i), a);
            b = _mm256_fmadd_ps(_mm256_loadu_ps(row + i + 8), _mm256_loadu_ps(x + i + 8), b);
        }
        float sum = total(_mm256_add_ps(a, b));
        for (; i < w->n; i++) sum += row[i] * x[i];
        y[o] = sum + (bias ? bias[o] : 0.0f);
    }
}

void times_rows(const weight *w, const token *t, const float *bias, int64_t from, int64_t to, float *y) {
    switch (w->kind) {
        case 1: rows_of_1(w, t, bias, from, to, y); break;
        case 2: rows_of_2(w, t, bias, from, to, y); break;
        case 3: rows_of_3(w, t, bias, from, to, y); break;
        case 4: rows_of_4(w, t, bias, from, to, y); break;
        case 8: rows_of_8(w, t, bias, from, to, y); break;
        case UNSIGNED8: rows_of_UNSIGNED8(w, t, bias, from, to, y); break;
        case NF4: rows_of_NF4(w, t, bias, from, to, y); break;
        default: float_rows(w, t->x, bias, from, to, y);
    }
}

#else

int32_t decode_ready(void) { return 0; }

void times_rows(const weight *w, const token *t, const float *bias, int64_t from, int64_t to, float *y) { (void)w, (void)t, (void)bias, (void)from, (void)to, (void)y; }

#endif
