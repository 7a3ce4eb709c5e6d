// Causal softmax attention of one thread for heads of 8 dimensions: o = softmax(s q k^T) v over the tokens up to one's
// own. Keys and values are turned to [8][T], so that a vector is 8 tokens. `lse` [B, H, T] is what backward needs to
// make the probabilities again. q, o, go, gq [B, H, T, 8]; k, v, gk, gv [B, K, T, 8], H = K * group.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define D 8
typedef float v8 __attribute__((vector_size(32)));
typedef int i8 __attribute__((vector_size(32)));

static inline v8 pick(i8 where, v8 yes, v8 no) { return (v8)((where & (i8)yes) | (~where & (i8)no)); }

static inline v8 all(float x) { return (v8){x, x, x, x, x, x, x, x}; }

// exp to 2 units of the last place for x <= 0; 0 below -87. Cody and Waite's reduction, Taylor to the sixth order.
static inline v8 exp8(v8 x) {
  const v8 magic = all(12582912.0f);
  const i8 kept = x > all(-87.0f);
  const v8 n = (x * all(1.44269504f) + magic) - magic;
  const v8 r = (x - n * all(0.693145752f)) - n * all(1.42860677e-6f);
  v8 y = all(1.0f / 720) * r + all(1.0f / 120);
  y = y * r + all(1.0f / 24);
  y = y * r + all(1.0f / 6);
  y = y * r + all(0.5f);
  y = y * r + all(1.0f);
  y = y * r + all(1.0f);
  const i8 power = (__builtin_convertvector(n, i8) + 127) << 23;
  return (v8)((i8)(y * (v8)power) & kept);
}

static inline float sum8(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

static inline v8 dots(const v8 *a, const v8 *bt, long j, long blocks) {
  v8 s = a[0] * bt[j];
  for (int d = 1; d < D; d++) s += a[d] * bt[d * blocks + j];
  return s;
}

// Which of the 8 tokens of block j are at most i.
static inline i8 seen(long j, long i) {
  const int at = (int)(i - 8 * j);
  return (i8){0, 1, 2, 3, 4, 5, 6, 7} <= (i8){at, at, at, at, at, at, at, at};
}

static void turn(const float *x, float *y, long t, long blocks) {
  memset(y, 0, 8 * blocks * D * sizeof(float));
  for (long i = 0; i < t; i++)
    for (int d = 0; d < D; d++) y[d * 8 * blocks + i] = x[i * D + d];
}

static void turn_back(const float *x, float *y, long t, long blocks) {
  for (long i = 0; i < t; i++)
    for (int d = 0; d < D; d++) y[i * D + d] = x[d * 8 * blocks + i];
}

void forward_8(const float *q, const float *k, const float *v, float *o, float *lse, long heads, long group, long t,
               float scale) {
  const long blocks = (t + 7) / 8;
  v8 *work = aligned_alloc(32, (2 * D + 1) * blocks * sizeof(v8)), *kt = work, *vt = kt + D * blocks;
  v8 *p = vt + D * blocks;
  for (long h = 0; h < heads; h++) {
    if (h % group == 0) {
      turn(k + h / group * t * D, (float *)kt, t, blocks);
      turn(v + h / group * t * D, (float *)vt, t, blocks);
    }
    for (long i = 0; i < t; i++) {
      const long n = i / 8 + 1, at = (h * t + i) * D;
      v8 a[D], most = all(-INFINITY), sum = all(0), out[D];
      for (int d = 0; d < D; d++) a[d] = all(q[at + d] * scale), out[d] = all(0);
      for (long j = 0; j < n; j++) {
        v8 s = dots(a, kt, j, blocks);
        if (j == n - 1) s = pick(seen(j, i), s, all(-INFINITY));
        p[j] = s;
        most = pick(s > most, s, most);
      }
      float top = most[0];
      for (int e = 1; e < 8; e++) top = most[e] > top ? most[e] : top;
      for (long j = 0; j < n; j++) {
        const v8 e = exp8(p[j] - all(top));
        sum += e;
        for (int d = 0; d < D; d++) out[d] += e * vt[d * blocks + j];
      }
      const float total = sum8(sum);
      for (int d = 0; d < D; d++) o[at + d] = sum8(out[d]) / total;
      lse[h * t + i] = top + logf(total);
    }
  }
  free(work);
}

void backward_8(const float *q, const float *k, const float *v, const float *o, const float *lse, const float *go,
                float *gq, float *gk, float *gv, long heads, long group, long t, float scale) {
  const long blocks = (t + 7) / 8;
  v8 *work = aligned_alloc(32, 4 * D * blocks * sizeof(v8)), *kt = work, *vt = kt + D * blocks;
  v8 *gkt = vt + D * blocks, *gvt = gkt + D * blocks;
  for (long h = 0; h < heads; h++) {
    if (h % group == 0) {
      turn(k + h / group * t * D, (float *)kt, t, blocks);
      turn(v + h / group * t * D, (float *)vt, t, blocks);
      memset(gkt, 0, 2 * D * blocks * sizeof(v8));
    }
    for (long i = 0; i < t; i++) {
      const long n = i / 8 + 1, at = (h * t + i) * D;
      const v8 total = all(lse[h * t + i]);
      v8 a[D], b[D], turned[D];
      float delta = 0;
      for (int d = 0; d < D; d++) {
        a[d] = all(q[at + d] * scale), b[d] = all(go[at + d]), turned[d] = all(0);
        delta += go[at + d] * o[at + d];
      }
      for (long j = 0; j < n; j++) {
        v8 p = exp8(dots(a, kt, j, blocks) - total);
        if (j == n - 1) p = (v8)((i8)p & seen(j, i));
        const v8 g = p * (dots(b, vt, j, blocks) - all(delta));
        for (int d = 0; d < D; d++) {
          turned[d] += g * kt[d * blocks + j];
          gvt[d * blocks + j] += p * b[d];
          gkt[d * blocks + j] += g * a[d];
        }
      }
      for (int d = 0; d < D; d++) gq[at + d] = sum8(turned[d]) * scale;
    }
    if (h % group == group - 1) {
      turn_back((float *)gkt, gk + h / group * t * D, t, blocks);
      turn_back((float *)gvt, gv + h / group * t * D, t, blocks);
    }
  }
  free(work);
}
