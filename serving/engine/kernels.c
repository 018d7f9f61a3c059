/* What torch has no fast way for on a CPU, in float32 and single-threaded; built by kernels.py.

   attend    one query row a sequence, its keys and values read where they lie in the paged pool. Gathering them first,
             as stock attention needs, took two to eight times as long.
   update    the low-rank updates of rows that belong to many adapters of any ranks: each matrix is read once, in place. */

#include <math.h>
#include <stdint.h>

static float dot(const float *a, const float *b, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* Of one vector with four, `stride` apart: four sums at once hide the time that each addition takes. */
static void dot4(const float *x, const float *a, int64_t stride, int64_t n, float *out) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < n; i++) {
    s0 += x[i] * a[i];
    s1 += x[i] * a[stride + i];
    s2 += x[i] * a[2 * stride + i];
    s3 += x[i] * a[3 * stride + i];
  }
  out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

/* `scores` [n] becomes its softmax; a soft cap of c turns a score s into c·tanh(s / c), 0 is none. */
static void softmax(float *scores, int64_t n, float cap) {
  float highest = -INFINITY, total = 0;
  if (cap > 0)
    for (int64_t i = 0; i < n; i++) scores[i] = cap * tanhf(scores[i] / cap);
  for (int64_t i = 0; i < n; i++) highest = scores[i] > highest ? scores[i] : highest;
  for (int64_t i = 0; i < n; i++) scores[i] = expf(scores[i] - highest);
  for (int64_t i = 0; i < n; i++) total += scores[i];
  for (int64_t i = 0; i < n; i++) scores[i] /= total;
}

/* query    [rows, kv_heads × group, dim], by strides in floats; the last is 1
   keys, values  [slots, kv_heads, dim], contiguous
   slots    [total]: the slots that row r sees are those from starts[r] to starts[r + 1]
   out      [rows, kv_heads × group, dim], contiguous
   scores   [kv_heads × group × the longest row]: room to work in */
void attend(float *out, const float *query, int64_t row_stride, int64_t head_stride, const float *keys,
            const float *values, const int64_t *slots, const int64_t *starts, int64_t rows, int64_t kv_heads,
            int64_t group, int64_t dim, float scaling, float cap, float *scores) {
  int64_t heads = kv_heads * group, width = kv_heads * dim;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t *mine = slots + starts[r], n = starts[r + 1] - starts[r];
    const float *q = query + r * row_stride;
    float *restrict o = out + r * heads * dim;
    for (int64_t p = 0; p < n; p++) { /* all heads of a position lie together, so memory is read in its own order */
      const float *key = keys + mine[p] * width;
      for (int64_t h = 0; h < heads; h++)
        scores[h * n + p] = scaling * dot(q + h * head_stride, key + h / group * dim, dim);
    }
    for (int64_t h = 0; h < heads; h++) softmax(scores + h * n, n, cap);
    for (int64_t i = 0; i < heads * dim; i++) o[i] = 0;
    for (int64_t p = 0; p < n; p++) {
      const float *value = values + mine[p] * width;
      for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < dim; i++) o[h * dim + i] += scores[h * n + p] * value[h / group * dim + i];
    }
  }
}

typedef struct {
  const float *a, *b; /* [rank, in] and [rank, out] */
  int64_t rank;       /* 0: this layer is left alone */
  const float *rescale; /* [2, out], or none */
} Adapter;

/* out[row] += (x[row] aT) b for the rows of each group, whose adapter is adapters[slots[g]]; before that, where there is
   a rescale, out[row] = out[row] rescale[0] + rescale[1].

   x, out   rows of in_features and out_features floats, one behind the other
   rows     group g has those from starts[g] to starts[g + 1]
   low      [the largest group × the highest rank]: room to work in */
void update(float *out, const float *x, int64_t in_features, int64_t out_features, const Adapter *adapters,
            int64_t groups, const int64_t *slots, const int64_t *starts, const int64_t *rows, float *low) {
  for (int64_t g = 0; g < groups; g++) {
    const Adapter *adapter = adapters + slots[g];
    const int64_t *mine = rows + starts[g], count = starts[g + 1] - starts[g], rank = adapter->rank;
    if (adapter->rescale) {
      const float *scale = adapter->rescale, *shift = scale + out_features;
      for (int64_t m = 0; m < count; m++) {
        float *y = out + mine[m] * out_features;
        for (int64_t i = 0; i < out_features; i++) y[i] = y[i] * scale[i] + shift[i];
      }
    }
    for (int64_t j = 0; j < rank; j += 4) {
      const float *a = adapter->a + j * in_features;
      for (int64_t m = 0; m < count; m++) {
        const float *row = x + mine[m] * in_features;
        float *l = low + m * rank + j;
        if (j + 4 <= rank)
          dot4(row, a, in_features, in_features, l);
        else
          for (int64_t k = 0; j + k < rank; k++) l[k] = dot(row, a + k * in_features, in_features);
      }
    }
    for (int64_t j = 0; j < rank; j += 4) { /* memory is read in its own order; four at a time, to store sums less often */
      const float *b = adapter->b + j * out_features;
      for (int64_t m = 0; m < count; m++) {
        float *y = out + mine[m] * out_features;
        const float *l = low + m * rank + j;
        if (j + 4 <= rank)
          for (int64_t i = 0; i < out_features; i++)
            y[i] += l[0] * b[i] + l[1] * b[out_features + i] + l[2] * b[2 * out_features + i] +
                    l[3] * b[3 * out_features + i];
        else
          for (int64_t k = 0; j + k < rank; k++)
            for (int64_t i = 0; i < out_features; i++) y[i] += l[k] * b[k * out_features + i];
      }
    }
  }
}
