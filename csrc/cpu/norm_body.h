// Layer norm of a sum, and batch norm. kernels_body.h includes this file once for each instruction set.

UNICODE_FAST_TARGET void add_norm(const AddNorm& layer, const float* first, const float* second, const float* factors,
                                  float* normal, float* scale, float* result) {
  const int64_t width = layer.width;
  Floats sums = {}, squares = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    Floats added = load_some(second + d, width - d, 0.f);
    if (factors != nullptr) added *= load_some(factors + d, width - d, 0.f);
    const Floats sum = load_some(first + d, width - d, 0.f) + added;
    store_some<float>(normal + d, sum, width - d);
    sums += sum;
  }
  const float mean = sum_of_lanes<float>(sums) / static_cast<float>(width);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Floats centred = load_some(normal + d, width - d, mean) - mean;
    squares += centred * centred;
  }
  *scale = 1 / std::sqrt(sum_of_lanes<float>(squares) / static_cast<float>(width) + layer.epsilon);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Floats own = (load_some(normal + d, width - d, 0.f) - mean) * *scale;
    store_some<float>(normal + d, own, width - d);
    const Floats weight = load_some(layer.weight + d, width - d, 0.f), bias = load_some(layer.bias + d, width - d, 0.f);
    store_some<float>(result + d, own * weight + bias, width - d);
  }
}

UNICODE_FAST_TARGET void add_norm_backward(const AddNorm& layer, const float* gradient, const float* normal,
                                           float scale, const float* factors, float* in_first, float* in_second,
                                           float* in_weight, float* in_bias) {
  const int64_t width = layer.width;
  Floats sums = {}, products = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Floats given = load_some(gradient + d, width - d, 0.f), own = load_some(normal + d, width - d, 0.f);
    const Floats in_normal = given * load_some(layer.weight + d, width - d, 0.f);
    sums += in_normal;
    products += in_normal * own;
    store_some<float>(in_weight + d, load_some(in_weight + d, width - d, 0.f) + given * own, width - d);
    store_some<float>(in_bias + d, load_some(in_bias + d, width - d, 0.f) + given, width - d);
  }
  const float mean = sum_of_lanes<float>(sums) / static_cast<float>(width);
  const float product = sum_of_lanes<float>(products) / static_cast<float>(width);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Floats given = load_some(gradient + d, width - d, 0.f), own = load_some(normal + d, width - d, 0.f);
    const Floats in_normal = given * load_some(layer.weight + d, width - d, 0.f);
    const Floats in_sum = (in_normal - mean - own * product) * scale;
    store_some<float>(in_first + d, in_sum, width - d);
    if (factors != nullptr)
      store_some<float>(in_second + d, in_sum * load_some(factors + d, width - d, 0.f), width - d);
  }
}

UNICODE_FAST_TARGET void batch_norm(const BatchNorm& batch, int64_t first, int64_t last, float* mean, float* variance,
                                    float* result, double* sums) {
  const int64_t columns = last - first;
  const double share = 1 / static_cast<double>(batch.count);
  const auto start = [&] { std::fill(sums, sums + columns, 0.); };
  start();
  for (int64_t i = 0; i < batch.rows; ++i) {
    if (batch.valid != nullptr && !batch.valid[i]) continue;
    const float* row = batch.values + i * batch.width + first;
    for (int64_t d = 0; d < columns; ++d) sums[d] += row[d];
  }
  for (int64_t d = 0; d < columns; ++d) mean[first + d] = static_cast<float>(sums[d] * share);
  start();
  for (int64_t i = 0; i < batch.rows; ++i) {
    if (batch.valid != nullptr && !batch.valid[i]) continue;
    const float* row = batch.values + i * batch.width + first;
    for (int64_t d = 0; d < columns; ++d) {
      const double error = row[d] - mean[first + d];
      sums[d] += error * error;
    }
  }
  for (int64_t d = 0; d < columns; ++d) variance[first + d] = static_cast<float>(sums[d] * share);
  float* scale = reinterpret_cast<float*>(sums);
  for (int64_t d = 0; d < columns; ++d) scale[d] = 1 / std::sqrt(variance[first + d] + batch.epsilon);
  for (int64_t i = 0; i < batch.rows; ++i) {
    const float* row = batch.values + i * batch.width + first;
    float* to = result + i * batch.width + first;
    for (int64_t d = 0; d < columns; ++d) to[d] = (row[d] - mean[first + d]) * scale[d];
  }
}

UNICODE_FAST_TARGET void batch_norm_backward(const BatchNorm& batch, int64_t first, int64_t last, const float* variance,
                                             const float* gradient, float* in_values, double* sums) {
  const int64_t columns = last - first;
  double* products = sums + columns;
  std::fill(sums, sums + 2 * columns, 0.);
  // Every row has the batch's moments, and has a share in them only if it is valid.
  for (int64_t i = 0; i < batch.rows; ++i) {
    const float *row = batch.values + i * batch.width + first, *given = gradient + i * batch.width + first;
    for (int64_t d = 0; d < columns; ++d) {
      sums[d] += given[d];
      products[d] += static_cast<double>(given[d]) * row[d];
    }
  }
  std::vector<float> mean(columns), product(columns), scale(columns);
  for (int64_t d = 0; d < columns; ++d) {
    mean[d] = static_cast<float>(sums[d] / static_cast<double>(batch.count));
    product[d] = static_cast<float>(products[d] / static_cast<double>(batch.count));
    scale[d] = 1 / std::sqrt(variance[first + d] + batch.epsilon);
  }
  for (int64_t i = 0; i < batch.rows; ++i) {
    const float *row = batch.values + i * batch.width + first, *given = gradient + i * batch.width + first;
    float* to = in_values + i * batch.width + first;
    if (batch.valid == nullptr || batch.valid[i]) {
      for (int64_t d = 0; d < columns; ++d) to[d] = scale[d] * (given[d] - mean[d] - row[d] * product[d]);
    } else {
      for (int64_t d = 0; d < columns; ++d) to[d] = scale[d] * given[d];
    }
  }
}
