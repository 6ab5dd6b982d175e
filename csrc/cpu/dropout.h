// Dropout on CPUs: the numbers that torch draws from its generator, several at a time.
#pragma once

#include <ATen/core/Tensor.h>

namespace unicode_fast::cpu {

// Checks an argument of float32 on a CPU, and the probability.
void check_dropout(const char* name, const at::Tensor& tensor, double p);

// 0 with probability p, else 1 / (1 - p): float32 numbers in the shape of `like`.
at::Tensor dropout_factors(const at::Tensor& like, double p);

}  // namespace unicode_fast::cpu
