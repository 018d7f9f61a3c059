/* Decode attention on a CPU: one query row a sequence, its keys and values read where they lie in the paged pool.

   Gathering them first, as stock attention needs, took two to eight times as long. Built by kernels.py; single-threaded,
   float32. For each row and key head, the query heads that share it are done together, so that keys are read once. */

#include <math.h>
#include <stdint.h>

static float dot(const float *a, const float *b, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
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
   scores   [group × the longest row]: room to work in */
void attend(float *out, const float *query, int64_t row_stride, int64_t head_stride, const float *keys,
            const float *values, const int64_t *slots, const int64_t *starts, int64_t rows, int64_t kv_heads,
            int64_t group, int64_t dim, float scaling, float cap, float *scores) {
  for (int64_t r = 0; r < rows; r++) {
    const int64_t *mine = slots + starts[r], n = starts[r + 1] - starts[r];
    for (int64_t h = 0; h < kv_heads; h++) {
      const float *q = query + r * row_stride + h * group * head_stride;
      float *o = out + (r * kv_heads + h) * group * dim;
      for (int64_t p = 0; p < n; p++) {
        const float *key = keys + (mine[p] * kv_heads + h) * dim;
        for (int64_t g = 0; g < group; g++) scores[g * n + p] = scaling * dot(q + g * head_stride, key, dim);
      }
      for (int64_t g = 0; g < group; g++) softmax(scores + g * n, n, cap);
      for (int64_t i = 0; i < group * dim; i++) o[i] = 0;
      for (int64_t p = 0; p < n; p++) {
        const float *value = values + (mine[p] * kv_heads + h) * dim;
        for (int64_t g = 0; g < group; g++)
          for (int64_t i = 0; i < dim; i++) o[g * dim + i] += scores[g * n + p] * value[i];
      }
    }
  }
}
