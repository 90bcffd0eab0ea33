// Steps of the sums over rows: see sums_over_rows.h. Plain loops, whose vectors the compiler finds.

// sum + rest grows by part, which becomes 0: `rest` is what the additions to `sum` round away (Knuth's TwoSum).
static void settle(float* __restrict part, float* __restrict sum, float* __restrict rest, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float total = sum[i] + part[i], taken = total - sum[i];
    rest[i] += (sum[i] - (total - taken)) + (part[i] - taken);
    sum[i] = total;
    part[i] = 0.0f;
  }
}

// The first n of sums = all blocks' sums and rests, which are n long each and follow one another; one block at least.
static void add_blocks(float* sums, int64_t blocks, int64_t n) {
  float *sum = sums, *rest = sums + n;
  for (int64_t block = 1; block < blocks; ++block) {
    const float* lost = sums + (2 * block + 1) * n;
    settle(sums + 2 * block * n, sum, rest, n);
    for (int64_t i = 0; i < n; ++i) rest[i] += lost[i];
  }
  for (int64_t i = 0; i < n; ++i) sum[i] += rest[i];
}
