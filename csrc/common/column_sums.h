// The last step of the sums over rows: see rows_per_block in tensor.h. Written as loops are, see variants.h.

// total[i] = sum of parts[block][i] over blocks, in order; parts are `stride` apart.
static void add_blocks(const float* parts, int64_t blocks, int64_t stride, float* total, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] = 0.0f;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < n; ++i) total[i] += parts[block * stride + i];
}
