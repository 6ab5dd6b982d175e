// CLUB networks on CPUs: gradients of their likelihood, and the estimate of mutual information with its gradients. A
// thread takes some rows through all layers and back, so that they stay in its caches.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"
#include "once.h"

namespace unicode_fast::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Masks = std::vector<std::optional<at::Tensor>>;
using Places = std::vector<int64_t>;

// Rows that pass through the layers together, and rows whose gradients in parameters are added in one place.
constexpr int64_t kTile = 48, kChunk = 512;
// Most places for gradients in the parameters of a network.
constexpr int64_t kMostChunks = 16;

// A layer of a network, and the places of its weights and gradients among those of all layers.
struct Layer : Dense {
  int64_t prepared, gradients;

  int64_t weight_numbers() const { return outputs * padded(inputs); }
};

// A network and its rows.
struct Network {
  int64_t clips, length, width, specific_width;
  const float *semantic, *specific;
  const uint8_t* valid;              // (clips, length), or null where every row is
  std::vector<Layer> layers;         // of the mean, then of the log variance
  std::unique_ptr<float[]> weights;  // padded and transposed
  int64_t gradients = 0;             // numbers of the gradients in parameters, with padded columns
  int64_t scratch;                   // numbers that `pass` needs

  // The valid ones of the rows [first, last) that are `step` apart.
  Places places(int64_t first, int64_t last, int64_t step) const {
    Places found;
    for (int64_t place = first; place < last; place += step)
      if (valid == nullptr || valid[place]) found.push_back(place);
    return found;
  }
};

// Contiguous inputs, and the networks, which point to their memory.
struct Networks {
  std::vector<at::Tensor> semantic, specific, valid, parameters;
  std::vector<Network> all;
  int64_t layers;  // of each network

  Networks(at::TensorList given_semantic, at::TensorList given_specific, const Masks& masks,
           at::TensorList given_parameters) {
    for (const at::Tensor& tensor : given_semantic) semantic.push_back(tensor.contiguous());
    for (const at::Tensor& tensor : given_specific) specific.push_back(tensor.contiguous());
    for (const auto& mask : masks) valid.push_back(mask ? mask->contiguous() : at::Tensor());
    for (const at::Tensor& tensor : given_parameters) parameters.push_back(tensor.contiguous());
    all.resize(semantic.size());
    layers = static_cast<int64_t>(parameters.size() / (2 * all.size()));
    for (size_t n = 0; n < all.size(); ++n) {
      Network& network = all[n];
      network.clips = semantic[n].size(0), network.length = semantic[n].size(1), network.width = semantic[n].size(2);
      network.specific_width = specific[n].size(2);
      network.semantic = semantic[n].const_data_ptr<float>();
      network.specific = specific[n].const_data_ptr<float>();
      network.valid = valid[n].defined() ? static_cast<const uint8_t*>(valid[n].const_data_ptr()) : nullptr;
      network.scratch = 2 * kTile * padded(network.width);
      int64_t numbers = 0;
      for (int64_t layer = 0; layer < layers; ++layer) {
        const at::Tensor *weight = &parameters[2 * (n * layers + layer)], *bias = weight + 1;
        network.layers.push_back({{weight->size(1), weight->size(0), weight->const_data_ptr<float>(), nullptr,
                                   bias->const_data_ptr<float>()},
                                  numbers,
                                  network.gradients});
        const Layer& made = network.layers.back();
        network.gradients += made.weight_numbers() + padded(made.outputs);
        network.scratch += kTile * padded(made.outputs);
        numbers += made.weight_numbers() + made.inputs * padded(made.outputs);
      }
      network.weights.reset(new float[numbers]);
    }
    at::parallel_for(0, layers * static_cast<int64_t>(all.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) prepare(all[n / layers].layers[n % layers], all[n / layers].weights.get());
    });
  }

  static void prepare(Layer& layer, float* weights) {
    const float* given = layer.weight;
    const int64_t inputs = layer.inputs, outputs = layer.outputs, stride = padded(outputs);
    float *copied = weights + layer.prepared, *transposed = copied + layer.weight_numbers();
    if (padded(inputs) != inputs) {
      std::fill(copied, transposed, 0.f);
      for (int64_t i = 0; i < outputs; ++i) std::copy_n(given + i * inputs, inputs, copied + i * padded(inputs));
      layer.weight = copied;
    }
    // Some columns at a time, whose rows stay in the cache.
    for (int64_t start = 0; start < inputs; start += 16)
      for (int64_t i = 0; i < stride; ++i)
        for (int64_t k = start; k < std::min(start + 16, inputs); ++k)
          transposed[k * stride + i] = i < outputs ? given[i * inputs + k] : 0;
    layer.transposed = transposed;
  }
};

// Takes rows through a network and back. `slopes` turns results into their gradients. With `back` gradients in
// parameters are added to `in_parameters`, those in the rows written to `in_semantic`; one of them may be null.
template <typename F>
void pass(const Network& network, const Places& places, const F& slopes, bool back, float* in_parameters,
          float* in_semantic, float* scratch) {
  const int64_t width = network.width, stride = padded(width);
  const auto last = static_cast<int64_t>(network.layers.size()) - 1, half = last / 2;
  for (size_t done = 0; done < places.size(); done += kTile) {
    const int64_t rows = std::min<int64_t>(kTile, places.size() - done);
    const int64_t* tile = places.data() + done;
    float *inputs = scratch, *in_inputs = inputs + rows * stride, *next = in_inputs + rows * stride;
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(network.semantic + tile[i] * width, width, inputs + i * stride);
      std::fill(inputs + i * stride + width, inputs + (i + 1) * stride, 0.f);
    }
    std::vector<float*> results;
    const auto given = [&](int64_t n) { return n % (half + 1) == 0 ? inputs : results[n - 1]; };
    for (int64_t n = 0; n <= last; ++n) {
      const Layer& layer = network.layers[n];
      kernels().dense(layer, given(n), rows, n == half || n == last ? Onto::kStore : Onto::kRectify, next);
      results.push_back(next);
      next += rows * padded(layer.outputs);
    }
    slopes(ClubRows{rows, network.specific_width, results[half], results[last], network.specific, tile});
    // Gradients in a layer's inputs replace the inputs, which are the results of the layer before.
    for (int64_t n = last; back && n >= 0; --n) {
      const Layer& layer = network.layers[n];
      if (in_parameters != nullptr) {
        float* place = in_parameters + layer.gradients;
        kernels().dense_parameters(layer, given(n), results[n], rows, place, place + layer.weight_numbers());
      }
      if (given(n) != inputs)
        kernels().dense_inputs(layer, results[n], rows, Onto::kMask, given(n));
      else if (in_semantic != nullptr)
        kernels().dense_inputs(layer, results[n], rows, n > 0 ? Onto::kStore : Onto::kAdd, in_inputs);
    }
    if (back && in_semantic != nullptr)
      for (int64_t i = 0; i < rows; ++i) std::copy_n(in_inputs + i * stride, width, in_semantic + tile[i] * width);
  }
}

// Gradients in parameters: sums over chunks of rows, whose number does not depend on that of threads.
struct ParameterGradients {
  const Networks& networks;
  const std::vector<int64_t>& chunks;  // of each network
  std::vector<at::Tensor> sums;

  ParameterGradients(const Networks& networks, const std::vector<int64_t>& chunks)
      : networks(networks), chunks(chunks) {
    for (size_t n = 0; n < chunks.size(); ++n) sums.push_back(at::empty({chunks[n], networks.all[n].gradients}));
  }

  // The place of a chunk, set to 0.
  float* start(size_t network, int64_t chunk) {
    const int64_t count = networks.all[network].gradients;
    float* place = sums[network].mutable_data_ptr<float>() + chunk * count;
    std::fill_n(place, count, 0.f);
    return place;
  }

  // Gradients in the order of the parameters, times a factor for each network.
  std::vector<at::Tensor> finish(const std::vector<float>& factors) const {
    std::vector<at::Tensor> found;
    for (const at::Tensor& parameter : networks.parameters) found.push_back(at::empty(parameter.sizes()));
    const auto count = static_cast<int64_t>(found.size() / 2);
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t number = first; number < last; ++number) {
        const int64_t n = number / networks.layers;
        const Layer& layer = networks.all[n].layers[number % networks.layers];
        const auto add = [&](int64_t from, int64_t numbers, float* to) {
          std::fill_n(to, numbers, 0.f);
          for (int64_t chunk = 0; chunk < chunks[n]; ++chunk) {
            const float* own = sums[n].const_data_ptr<float>() + chunk * networks.all[n].gradients + from;
            for (int64_t j = 0; j < numbers; ++j) to[j] += factors[n] * own[j];
          }
        };
        float* weight = found[2 * number].mutable_data_ptr<float>();
        for (int64_t i = 0; i < layer.outputs; ++i)
          add(layer.gradients + i * padded(layer.inputs), layer.inputs, weight + i * layer.inputs);
        add(layer.gradients + layer.weight_numbers(), layer.outputs, found[2 * number + 1].mutable_data_ptr<float>());
      }
    });
    return found;
  }
};

// Chunks of all networks, as pairs of a network and its chunk.
std::vector<std::pair<size_t, int64_t>> pairs(const std::vector<int64_t>& chunks) {
  std::vector<std::pair<size_t, int64_t>> found;
  for (size_t n = 0; n < chunks.size(); ++n)
    for (int64_t chunk = 0; chunk < chunks[n]; ++chunk) found.emplace_back(n, chunk);
  return found;
}

// Runs `body` on all chunks with scratch memory.
template <typename F>
void for_each_chunk(const Networks& networks, const std::vector<int64_t>& chunks, const F& body) {
  const auto all = pairs(chunks);
  int64_t numbers = 0;
  for (const Network& network : networks.all) numbers = std::max(numbers, network.scratch);
  at::parallel_for(0, static_cast<int64_t>(all.size()), 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(new float[numbers]);
    for (int64_t number = first; number < last; ++number)
      body(all[number].first, all[number].second, number, scratch.get());
  });
}

void check(at::TensorList semantic, at::TensorList specific, const Masks& valid, at::TensorList parameters) {
  const size_t networks = semantic.size();
  TORCH_CHECK_VALUE(networks > 0 && specific.size() == networks && valid.size() == networks,
                    "semantic, specific and valid must have an entry for each network, got ", networks, ", ",
                    specific.size(), " and ", valid.size());
  TORCH_CHECK_VALUE(!parameters.empty() && parameters.size() % (4 * networks) == 0,
                    "parameters must have a weight and a bias for each layer of two perceptrons of each network, got ",
                    parameters.size(), " for ", networks, " networks");
  const size_t layers = parameters.size() / (4 * networks);
  for (size_t n = 0; n < networks; ++n) {
    const auto place = static_cast<int64_t>(n);
    for (const auto& [name, tensor] : {std::pair("semantic", semantic[n]), std::pair("specific", specific[n])}) {
      check_tensor({name, place}, tensor, at::kFloat);
      TORCH_CHECK_VALUE(tensor.device().is_cpu(), Name(name, place), " must be on a CPU, got ", tensor.device());
      TORCH_CHECK_VALUE(tensor.dim() == 3 && tensor.size(2) > 0 && tensor.numel() <= kMostNumbers, Name(name, place),
                        " must have shape (B, T, D), D at least 1, and at most 2^48 numbers, got ",
                        shape_name(tensor.sizes()));
    }
    const int64_t clips = semantic[n].size(0), length = semantic[n].size(1);
    check_like({"specific", place}, specific[n], at::kFloat, {clips, length, specific[n].size(2)},
               "the positions of semantic", semantic[n]);
    if (valid[n])
      check_like({"valid", place}, *valid[n], kBoolOnly, {clips, length}, "(B, T) of semantic", semantic[n]);
    for (size_t layer = 0; layer < 2 * layers; ++layer) {
      const size_t number = (n * 2 * layers + layer) * 2;
      const auto weight = static_cast<int64_t>(number);
      check_tensor({"parameters", weight}, parameters[number], at::kFloat);
      const int64_t inputs = layer % layers == 0 ? semantic[n].size(2) : parameters[number - 2].size(0);
      const bool is_last = (layer + 1) % layers == 0;
      const int64_t outputs = is_last                         ? specific[n].size(2)
                              : parameters[number].dim() == 2 ? parameters[number].size(0)
                                                              : 1;
      check_like({"parameters", weight}, parameters[number], at::kFloat, {outputs, inputs}, "a weight", semantic[n]);
      check_like({"parameters", weight + 1}, parameters[number + 1], at::kFloat, {outputs}, "a bias", semantic[n]);
    }
  }
}

std::vector<at::Tensor> club_likelihood_gradients(at::TensorList semantic, at::TensorList specific, const Masks& valid,
                                                  at::TensorList parameters) {
  check(semantic, specific, valid, parameters);
  const at::NoGradGuard guard;
  const Networks networks(semantic, specific, valid, parameters);
  std::vector<Places> places;
  std::vector<int64_t> chunks;
  for (const Network& network : networks.all) {
    places.push_back(network.places(0, network.clips * network.length, 1));
    chunks.push_back(std::clamp<int64_t>((places.back().size() + kChunk - 1) / kChunk, 1, kMostChunks));
  }
  ParameterGradients gradients(networks, chunks);
  for_each_chunk(networks, chunks, [&](size_t n, int64_t chunk, int64_t, float* scratch) {
    const auto count = static_cast<int64_t>(places[n].size());
    const Places own(places[n].begin() + count * chunk / chunks[n],
                     places[n].begin() + count * (chunk + 1) / chunks[n]);
    const float share = 1 / static_cast<float>(std::max<int64_t>(count, 1));
    const auto slopes = [&](ClubRows batch) {
      batch.share = share;
      kernels().club_likelihood(batch);
    };
    pass(networks.all[n], own, slopes, true, gradients.start(n, chunk), nullptr, scratch);
  });
  return gradients.finish(std::vector<float>(networks.all.size(), 1));
}

// The estimates of all networks, (networks,), and their gradients in features and parameters where these are defined.
struct Estimate {
  at::Tensor values;
  std::vector<at::Tensor> in_semantic, in_specific;
};

// At one position of the clips: the sum of terms, and gradients.
double estimate_at(const Network& network, int64_t position, float share, float* in_parameters, float* in_semantic,
                   float* in_specific, float* scratch) {
  const int64_t width = network.specific_width;
  const Places places = network.places(position, network.clips * network.length, network.length);
  std::vector<double> centre(width), spread(width);
  const double count = std::max<double>(places.size(), 1);
  for (const int64_t place : places)
    for (int64_t j = 0; j < width; ++j) centre[j] += network.specific[place * width + j];
  for (double& number : centre) number /= count;
  for (const int64_t place : places)
    for (int64_t j = 0; j < width; ++j) {
      const double difference = network.specific[place * width + j] - centre[j];
      spread[j] += difference * difference;
    }
  std::vector<float> rounded(4 * padded(width));
  float *centres = rounded.data(), *spreads = centres + padded(width), *precisions = spreads + padded(width);
  float* differences = precisions + padded(width);
  for (int64_t j = 0; j < width; ++j) {
    centres[j] = static_cast<float>(centre[j]);
    spreads[j] = static_cast<float>(spread[j] / count);
  }
  double total = 0;
  const ClubMoments moments{centres, spreads, in_specific, precisions, differences};
  const auto slopes = [&](ClubRows batch) {
    batch.share = share;
    total += kernels().club_estimate(batch, moments);
  };
  pass(network, places, slopes, in_specific != nullptr, in_parameters, in_semantic, scratch);
  if (in_specific == nullptr) return total;
  // Through the moments.
  const auto factor = static_cast<float>(share / count);
  for (const int64_t place : places)
    for (int64_t j = 0; j < width; ++j)
      in_specific[place * width + j] +=
          factor * (precisions[j] * (network.specific[place * width + j] - centres[j]) - differences[j]);
  return total;
}

// Estimates; with their gradients in features where `back` is set, and in parameters unless `gradients` is null.
Estimate estimate(const Networks& networks, const std::vector<int64_t>& chunks, bool mean, bool back,
                  ParameterGradients* gradients) {
  Estimate found{at::empty({static_cast<int64_t>(networks.all.size())}), {}, {}};
  std::vector<float> shares;
  for (size_t n = 0; n < networks.all.size(); ++n) {
    const Network& network = networks.all[n];
    const int64_t rows = network.clips * network.length;
    const auto valid = static_cast<int64_t>(network.places(0, rows, 1).size());
    const int64_t count = networks.valid[n].defined() ? std::max<int64_t>(valid, 1) : rows;
    shares.push_back(1 / static_cast<float>(count * (mean ? network.specific_width : 1)));
    if (!back) continue;
    // What is not valid has gradient 0.
    for (auto [given, made] :
         {std::pair(&networks.semantic[n], &found.in_semantic), std::pair(&networks.specific[n], &found.in_specific)})
      made->push_back(valid == rows ? at::empty(given->sizes()) : at::zeros(given->sizes()));
  }
  std::vector<double> sums(pairs(chunks).size());
  for_each_chunk(networks, chunks, [&](size_t n, int64_t chunk, int64_t number, float* scratch) {
    const Network& network = networks.all[n];
    float* in_parameters = gradients == nullptr ? nullptr : gradients->start(n, chunk);
    float* in_semantic = back ? found.in_semantic[n].mutable_data_ptr<float>() : nullptr;
    float* in_specific = back ? found.in_specific[n].mutable_data_ptr<float>() : nullptr;
    const int64_t last = network.length * (chunk + 1) / chunks[n];
    for (int64_t position = network.length * chunk / chunks[n]; position < last; ++position)
      sums[number] += estimate_at(network, position, shares[n], in_parameters, in_semantic, in_specific, scratch);
  });
  float* values = found.values.mutable_data_ptr<float>();
  const double* next = sums.data();
  for (size_t n = 0; n < chunks.size(); ++n) {
    // Without rows the mean is not a number.
    double total = shares[n] * 0.0;
    for (int64_t chunk = 0; chunk < chunks[n]; ++chunk) total += *next++;
    values[n] = static_cast<float>(total);
  }
  return found;
}

std::vector<int64_t> chunks_of_positions(const Networks& networks) {
  std::vector<int64_t> chunks;
  for (const Network& network : networks.all) chunks.push_back(std::min(network.length, kMostChunks));
  return chunks;
}

// Gradients in features are computed with the values. Those in parameters take a second pass where they are asked for.
class ClubEstimate : public torch::autograd::Function<ClubEstimate> {
 public:
  // `tensors` are semantic and specific features and parameters.
  static at::Tensor forward(AutogradContext* context, at::TensorList tensors, const Masks& valid, bool mean,
                            bool back) {
    const size_t count = valid.size();
    const Networks networks(tensors.slice(0, count), tensors.slice(count, count), valid, tensors.slice(2 * count));
    Estimate found = estimate(networks, chunks_of_positions(networks), mean, back, nullptr);
    variable_list kept(tensors.begin(), tensors.end());
    for (const auto& list : {networks.valid, found.in_semantic, found.in_specific})
      kept.insert(kept.end(), list.begin(), list.end());
    context->save_for_backward(kept);
    context->saved_data["networks"] = static_cast<int64_t>(count);
    context->saved_data["tensors"] = static_cast<int64_t>(tensors.size());
    context->saved_data["mean"] = mean;
    return found.values;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative("the estimate of CLUB");
    const variable_list saved = context->get_saved_variables();
    const auto count = static_cast<size_t>(context->saved_data["networks"].toInt());
    const auto tensors = static_cast<size_t>(context->saved_data["tensors"].toInt());
    const at::Tensor gradient = gradients[0].contiguous();
    const float* factors = gradient.const_data_ptr<float>();
    variable_list found(tensors + 3);
    for (size_t n = 0; n < 2 * count; ++n)
      if (context->needs_input_grad(n)) found[n] = saved[tensors + count + n] * factors[n % count];
    if (context->needs_input_grad({{2 * count, tensors}})) {
      const at::TensorList given(saved);
      const Masks valid = masks(given.slice(tensors, count));
      const Networks networks(given.slice(0, count), given.slice(count, count), valid,
                              given.slice(2 * count, tensors - 2 * count));
      const std::vector<int64_t> chunks = chunks_of_positions(networks);
      ParameterGradients sums(networks, chunks);
      estimate(networks, chunks, context->saved_data["mean"].toBool(), true, &sums);
      const std::vector<at::Tensor> in_parameters = sums.finish({factors, factors + count});
      std::copy(in_parameters.begin(), in_parameters.end(), found.begin() + 2 * count);
    }
    return found;
  }

 private:
  static Masks masks(at::TensorList saved) {
    Masks valid;
    for (const at::Tensor& mask : saved) valid.push_back(mask.defined() ? std::optional(mask) : std::nullopt);
    return valid;
  }
};

at::Tensor club_estimate(at::TensorList semantic, at::TensorList specific, const Masks& valid,
                         at::TensorList parameters, bool mean) {
  check(semantic, specific, valid, parameters);
  std::vector<at::Tensor> tensors;
  for (const at::TensorList list : {semantic, specific, parameters})
    tensors.insert(tensors.end(), list.begin(), list.end());
  const auto wants = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  const bool back =
      at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.begin() + 2 * valid.size(), wants);
  return ClubEstimate::apply(at::TensorList(tensors), valid, mean, back);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unicode_fast_layers, library) {
  library.def(
      "club_likelihood_gradients(Tensor[] semantic, Tensor[] specific, Tensor?[] valid, Tensor[] parameters) -> "
      "Tensor[]",
      &club_likelihood_gradients);
  library.def(
      "club_estimate(Tensor[] semantic, Tensor[] specific, Tensor?[] valid, Tensor[] parameters, bool mean) -> Tensor",
      &club_estimate);
}

}  // namespace unicode_fast::cpu
