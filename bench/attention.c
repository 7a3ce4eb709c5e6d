// Causal softmax attention of one thread for heads of 8 dimensions: o = softmax(s q k^T) v over the tokens up to one's
// own. Keys and values are turned to [8][T], so that a vector is W tokens. `lse` [B, H, T] is what backward needs to
// make the probabilities again. q, o, go, gq [B, H, T, 8]; k, v, gk, gv [B, K, T, 8], H = K * group.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define D 8
#ifdef __AVX512F__
#define W 16
#define EACH(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#define LANES {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
#define W 8
#define EACH(x) {x, x, x, x, x, x, x, x}
#define LANES {0, 1, 2, 3, 4, 5, 6, 7}
#endif
typedef float vf __attribute__((vector_size(4 * W)));
typedef int vi __attribute__((vector_size(4 * W)));
typedef float f8 __attribute__((vector_size(32)));
typedef int i8 __attribute__((vector_size(32)));

static inline vf pick(vi where, vf yes, vf no) { return (vf)((where & (vi)yes) | (~where & (vi)no)); }

static inline vf all(float x) { return (vf)EACH(x); }

// exp to 2 units of the last place for x <= 0; 0 below -87. Cody and Waite's reduction, Taylor to the sixth order.
static inline vf vexp(vf x) {
  const vf magic = all(12582912.0f);
  const vi kept = x > all(-87.0f);
  const vf n = (x * all(1.44269504f) + magic) - magic;
  const vf r = (x - n * all(0.693145752f)) - n * all(1.42860677e-6f);
  vf y = all(1.0f / 720) * r + all(1.0f / 120);
  y = y * r + all(1.0f / 24);
  y = y * r + all(1.0f / 6);
  y = y * r + all(0.5f);
  y = y * r + all(1.0f);
  y = y * r + all(1.0f);
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return (vf)((vi)(y * (vf)power) & kept);
}

// y[d] = the sum of x[d]'s lanes, all eight at once: pairs of vectors are woven into one, three times.
static inline void sums(const vf *x, float *y) {
  f8 a[D];
  for (int d = 0; d < D; d++) {
    f8 parts[W / 8];
    memcpy(parts, x + d, sizeof(vf));
    a[d] = W == 8 ? parts[0] : parts[0] + parts[W / 8 - 1];
  }
  for (int d = 0; d < 4; d++)
    a[d] = __builtin_shuffle(a[2 * d], a[2 * d + 1], (i8){0, 8, 2, 10, 4, 12, 6, 14}) +
           __builtin_shuffle(a[2 * d], a[2 * d + 1], (i8){1, 9, 3, 11, 5, 13, 7, 15});
  for (int d = 0; d < 2; d++)
    a[d] = __builtin_shuffle(a[2 * d], a[2 * d + 1], (i8){0, 1, 8, 9, 4, 5, 12, 13}) +
           __builtin_shuffle(a[2 * d], a[2 * d + 1], (i8){2, 3, 10, 11, 6, 7, 14, 15});
  a[0] = __builtin_shuffle(a[0], a[1], (i8){0, 1, 2, 3, 8, 9, 10, 11}) +
         __builtin_shuffle(a[0], a[1], (i8){4, 5, 6, 7, 12, 13, 14, 15});
  memcpy(y, a, sizeof a[0]);
}

static inline float sum(vf x) {
  float y[W];
  memcpy(y, &x, sizeof y);
  for (int half = W / 2; half; half /= 2)
    for (int e = 0; e < half; e++) y[e] += y[e + half];
  return y[0];
}

static inline float highest(vf x) {
  float y[W];
  memcpy(y, &x, sizeof y);
  for (int half = W / 2; half; half /= 2)
    for (int e = 0; e < half; e++) y[e] = y[e + half] > y[e] ? y[e + half] : y[e];
  return y[0];
}

static inline vf dots(const vf *a, const vf *bt, long j, long blocks) {
  vf s = a[0] * bt[j];
  for (int d = 1; d < D; d++) s += a[d] * bt[d * blocks + j];
  return s;
}

// Which of the W tokens of block j are at most i.
static inline vi seen(long j, long i) {
  const int at = (int)(i - W * j);
  return (vi)LANES <= (vi)EACH(at);
}

static void turn(const float *x, float *y, long t, long blocks) {
  memset(y, 0, W * blocks * D * sizeof(float));
  for (long i = 0; i < t; i++)
    for (int d = 0; d < D; d++) y[d * W * blocks + i] = x[i * D + d];
}

static void turn_back(const float *x, float *y, long t, long blocks) {
  for (long i = 0; i < t; i++)
    for (int d = 0; d < D; d++) y[i * D + d] = x[d * W * blocks + i];
}

void forward_8(const float *q, const float *k, const float *v, float *o, float *lse, long heads, long group, long t,
               float scale) {
  const long blocks = (t + W - 1) / W;
  vf *work = aligned_alloc(4 * W, (2 * D + 1) * blocks * sizeof(vf)), *kt = work, *vt = kt + D * blocks;
  vf *p = vt + D * blocks;
  for (long h = 0; h < heads; h++) {
    if (h % group == 0) {
      turn(k + h / group * t * D, (float *)kt, t, blocks);
      turn(v + h / group * t * D, (float *)vt, t, blocks);
    }
    for (long i = 0; i < t; i++) {
      const long n = i / W + 1, at = (h * t + i) * D;
      vf a[D], most = all(-INFINITY), weight = all(0), out[D];
      for (int d = 0; d < D; d++) a[d] = all(q[at + d] * scale), out[d] = all(0);
      for (long j = 0; j < n; j++) {
        vf s = dots(a, kt, j, blocks);
        if (j == n - 1) s = pick(seen(j, i), s, all(-INFINITY));
        p[j] = s;
        most = pick(s > most, s, most);
      }
      const float top = highest(most);
      for (long j = 0; j < n; j++) {
        const vf e = vexp(p[j] - all(top));
        weight += e;
        for (int d = 0; d < D; d++) out[d] += e * vt[d * blocks + j];
      }
      const float total = sum(weight);
      sums(out, o + at);
      for (int d = 0; d < D; d++) o[at + d] /= total;
      lse[h * t + i] = top + logf(total);
    }
  }
  free(work);
}

void backward_8(const float *q, const float *k, const float *v, const float *o, const float *lse, const float *go,
                float *gq, float *gk, float *gv, long heads, long group, long t, float scale) {
  const long blocks = (t + W - 1) / W;
  vf *work = aligned_alloc(4 * W, 4 * D * blocks * sizeof(vf)), *kt = work, *vt = kt + D * blocks;
  vf *gkt = vt + D * blocks, *gvt = gkt + D * blocks;
  for (long h = 0; h < heads; h++) {
    if (h % group == 0) {
      turn(k + h / group * t * D, (float *)kt, t, blocks);
      turn(v + h / group * t * D, (float *)vt, t, blocks);
      memset(gkt, 0, 2 * D * blocks * sizeof(vf));
    }
    for (long i = 0; i < t; i++) {
      const long n = i / W + 1, at = (h * t + i) * D;
      const vf total = all(lse[h * t + i]);
      vf a[D], b[D], turned[D];
      float delta = 0;
      for (int d = 0; d < D; d++) {
        a[d] = all(q[at + d] * scale), b[d] = all(go[at + d]), turned[d] = all(0);
        delta += go[at + d] * o[at + d];
      }
      for (long j = 0; j < n; j++) {
        vf p = vexp(dots(a, kt, j, blocks) - total);
        if (j == n - 1) p = (vf)((vi)p & seen(j, i));
        const vf g = p * (dots(b, vt, j, blocks) - all(delta));
        for (int d = 0; d < D; d++) {
          turned[d] += g * kt[d * blocks + j];
          gvt[d * blocks + j] += p * b[d];
          gkt[d * blocks + j] += g * a[d];
        }
      }
      sums(turned, gq + at);
      for (int d = 0; d < D; d++) gq[at + d] *= scale;
    }
    if (h % group == group - 1) {
      turn_back((float *)gkt, gk + h / group * t * D, t, blocks);
      turn_back((float *)gvt, gv + h / group * t * D, t, blocks);
    }
  }
  free(work);
}
