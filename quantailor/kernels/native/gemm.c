// int8 x int8 -> int32 on AMX tiles, with the scales applied while a tile's sums are still in the first cache:
//
//     y[t, o] = x_scale[t] * sum_G w_scale[o, G] * (sum_{n in G} x[t, n] * w[o, n] + x_sum[t, G] * shift[o, G]) + bias[o]
//
// in the order of kernels/ops.int_linear, each operation rounded to float32 by itself: the same bits. No 32-bit
// intermediate leaves the core. Weights come in tiles (pack_tiles): 16 outputs by `depth` inputs, four inputs to a word.
// Instruction reference: Intel 64 Architectures SDM, TDPBSSD; palette 1 has 8 tiles of 16 rows by 64 bytes.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
} __attribute__((packed)) tile_config;

// Linux hands out the tiles' state on request (arch_prctl: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). 0 if granted.
int32_t gemm_ready(void) { return (int32_t)syscall(SYS_arch_prctl, 0x1023, 18); }

// w [O, N] -> tiles [O/16][K/depth][depth/4][16][4]; outputs beyond O and inputs beyond N are 0. `depth` 32 or 64 divides
// the group, so that no tile spans two.
void pack_tiles(const int8_t *w, int64_t out, int64_t n, int64_t depth, int8_t *tiles) {
    int64_t blocks = (out + 15) / 16, steps = (n + depth - 1) / depth;
    _Pragma("omp parallel for schedule(static)") for (int64_t b = 0; b < blocks; b++) {
        for (int64_t k = 0; k < steps; k++) {
            int8_t *tile = tiles + (b * steps + k) * depth * 16;
            for (int64_t r = 0; r < depth / 4; r++) {
                for (int64_t c = 0; c < 16; c++) {
                    int64_t o = b * 16 + c, i = k * depth + r * 4;
                    uint32_t word = 0;
                    if (o < out && i + 4 <= n) memcpy(&word, w + o * n + i, 4);
                    else if (o < out && i < n) memcpy(&word, w + o * n + i, (size_t)(n - i));
                    memcpy(tile + (r * 16 + c) * 4, &word, 4);
                }
            }
        }
    }
}

static inline void store_row(void *y, int is_bf16, int64_t at, __m512 v, int64_t count) {
    __mmask16 mask = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
    if (!is_bf16) {
        _mm512_mask_storeu_ps((float *)y + at, mask, v);
        return;
    }
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16((bf16 *)y + at, mask, _mm512_cvtepi32_epi16(r));
}

// x [T, N], tiles of pack_tiles, w_scale and shift [O, G] (w_stride = G), x_sum [T, G], x_scale [T] or one, y [T, O].
// `group` is a multiple of `depth`; without groups it is N and G is 1. Returns 0, or 1 where memory ran out.
int32_t gemm(const int8_t *x, const int8_t *tiles, int64_t rows, int64_t n, int64_t out, int64_t depth, int64_t group,
             const float *w_scale, const float *shift, const float *x_sum, const float *x_scale, int32_t one_scale,
             const float *bias, void *y, int32_t y_is_bf16) {
    int64_t steps = (n + depth - 1) / depth, padded = steps * depth, groups = (n + group - 1) / group;
    int64_t steps_a_group = groups == 1 ? steps : group / depth;
    int64_t row_blocks = (rows + 31) / 32, col_blocks = (out + 31) / 32, tile_blocks = (out + 15) / 16;
    // Rows whose int8 values stay in the second cache while all the weights pass by.
    int64_t chunk = padded > 0 ? (768 * 1024) / (padded * 32) : 1;
    chunk = chunk < 1 ? 1 : chunk > 16 ? 16 : chunk;
    int32_t failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        tile_config config;
        memset(&config, 0, sizeof config);
        config.palette = 1;
        for (int i = 0; i < 4; i++) config.rows[i] = 16, config.bytes_a_row[i] = 64;                      // sums
        for (int i = 4; i < 6; i++) config.rows[i] = 16, config.bytes_a_row[i] = (uint16_t)depth;         // inputs
        for (int i = 6; i < 8; i++) config.rows[i] = (uint8_t)(depth / 4), config.bytes_a_row[i] = 64;    // weights
        _tile_loadconfig(&config);
        int8_t *block = aligned_alloc(64, (size_t)(chunk * 32 * padded + 64));
        int8_t *nothing = aligned_alloc(64, 4096);
        int32_t *sums = aligned_alloc(64, 4 * 256 * 4);
        float *y_block = aligned_alloc(64, 32 * 32 * 4);
        if (!block || !nothing || !sums || !y_block) failed = 1;
        else {
            memset(nothing, 0, 4096);
            int64_t units = (row_blocks + chunk - 1) / chunk;
            // Few rows: threads share the columns instead.
            int64_t parts = units >= 4 ? 1 : (col_blocks >= 8 ? 8 : col_blocks);
#pragma omp for schedule(dynamic, 1)
            for (int64_t job = 0; job < units * parts; job++) {
                int64_t unit = job / parts, part = job % parts;
                int64_t first = unit * chunk * 32, last = first + chunk * 32 < rows ? first + chunk * 32 : rows;
                int64_t here = (last - first + 31) / 32;
                const int8_t *a = x + first * n;
                int64_t stride = n;
                if (padded != n || (last - first) % 32) {
                    memset(block, 0, (size_t)(here * 32 * padded));
                    for (int64_t t = first; t < last; t++) memcpy(block + (t - first) * padded, x + t * n, (size_t)n);
                    a = block, stride = padded;
                }
                for (int64_t c = col_blocks * part / parts; c < col_blocks * (part + 1) / parts; c++) {
                    const int8_t *left = tiles + 2 * c * steps * depth * 16;
                    int both = 2 * c + 1 < tile_blocks;
                    const int8_t *right = both ? left + steps * depth * 16 : nothing;
                    int64_t right_step = both ? depth * 16 : 0;
                    for (int64_t r = 0; r < here; r++) {
                        const int8_t *top = a + r * 32 * stride, *low = top + 16 * stride;
                        for (int64_t g = 0; g < groups; g++) {
                            int64_t from = g * steps_a_group, to = g + 1 == groups ? steps : from + steps_a_group;
                            _tile_zero(0);
                            _tile_zero(1);
                            _tile_zero(2);
                            _tile_zero(3);
                            for (int64_t k = from; k < to; k++) {
                                _tile_loadd(4, top + k * depth, stride);
                                _tile_loadd(6, left + k * depth * 16, 64);
                                _tile_dpbssd(0, 4, 6);
                                _tile_loadd(7, right + k * right_step, 64);
                                _tile_dpbssd(1, 4, 7);
                                _tile_loadd(5, low + k * depth, stride);
                                _tile_dpbssd(2, 5, 6);
                                _tile_dpbssd(3, 5, 7);
                            }
                            _tile_stored(0, sums, 64);
                            _tile_stored(1, sums + 256, 64);
                            _tile_stored(2, sums + 512, 64);
                            _tile_stored(3, sums + 768, 64);
                            for (int64_t half = 0; half < 2; half++) {
                                int64_t o = c * 32 + half * 16, wide = out - o < 16 ? out - o : 16;
                                if (wide <= 0) continue;
                                __mmask16 mask = wide == 16 ? 0xffff : (__mmask16)((1u << wide) - 1);
                                __m512 ws, sh = _mm512_setzero_ps(), bi = _mm512_setzero_ps();
                                if (groups == 1) {
                                    ws = _mm512_maskz_loadu_ps(mask, w_scale + o);
                                    if (shift) sh = _mm512_maskz_loadu_ps(mask, shift + o);
                                } else {
                                    __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                      11, 12, 13, 14, 15),
                                                                    _mm512_set1_epi32((int)groups));
                                    ws = _mm512_mask_i32gather_ps(bi, mask, at, w_scale + o * groups + g, 4);
                                    if (shift) sh = _mm512_mask_i32gather_ps(bi, mask, at, shift + o * groups + g, 4);
                                }
                                if (bias) bi = _mm512_maskz_loadu_ps(mask, bias + o);
                                int64_t tall = last - first - r * 32 < 32 ? last - first - r * 32 : 32;
                                for (int64_t i = 0; i < tall; i++) {
                                    int64_t t = first + r * 32 + i;
                                    const int32_t *sum = sums + (i / 16) * 512 + half * 256 + (i % 16) * 16;
                                    __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(sum));
                                    if (shift)
                                        v = _mm512_add_ps(
                                            v, _mm512_mul_ps(_mm512_set1_ps(x_sum[t * groups + g]), sh));
                                    v = _mm512_mul_ps(v, ws);
                                    if (g) v = _mm512_add_ps(_mm512_load_ps(y_block + i * 32 + half * 16), v);
                                    if (g + 1 < groups) {
                                        _mm512_store_ps(y_block + i * 32 + half * 16, v);
                                        continue;
                                    }
                                    v = _mm512_mul_ps(v, _mm512_set1_ps(x_scale[one_scale ? 0 : t]));
                                    if (bias) v = _mm512_add_ps(v, bi);
                                    store_row(y, y_is_bf16, t * out + o, v, wide);
                                }
                            }
                        }
                    }
                }
            }
        }
        free(block);
        free(nothing);
        free(sums);
        free(y_block);
        _tile_release();
    }
    return failed;
}
#else
int32_t gemm_ready(void) { return -1; }
#endif
