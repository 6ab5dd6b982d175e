// The optimiser's loops. kernels_body.h includes this file once for each instruction set.

UNICODE_FAST_TARGET double sum_of_squares(const float* numbers, int64_t count) {
  // Sums that a compiler keeps in registers.
  constexpr int64_t kSums = 32;
  double sums[kSums] = {}, sum = 0;
  int64_t n = 0;
  for (; n + kSums <= count; n += kSums) {
    for (int64_t lane = 0; lane < kSums; ++lane) {
      const double number = numbers[n + lane];
      sums[lane] += number * number;
    }
  }
  for (; n < count; ++n) sum += static_cast<double>(numbers[n]) * numbers[n];
  for (const double one : sums) sum += one;
  return sum;
}

UNICODE_FAST_TARGET void adam(const AdamFactors& factors, const float* gradients, int64_t count, float* parameters,
                              float* means, float* squares) {
  for (int64_t n = 0; n < count; ++n) {
    const float gradient = gradients[n] * factors.clip;
    means[n] = factors.mean_decay * means[n] + factors.mean_share * gradient;
    squares[n] = factors.square_decay * squares[n] + factors.square_share * gradient * gradient;
    parameters[n] -= factors.rate * means[n] / (std::sqrt(squares[n]) * factors.root + factors.epsilon);
  }
}
