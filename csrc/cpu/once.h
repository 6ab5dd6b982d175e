// The error of a second derivative.
#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

namespace unicode_fast::cpu {

inline void refuse_second_derivative(const char* name) {
  TORCH_CHECK(!at::GradMode::is_enabled(), name,
              " can be differentiated once on a CPU in float32; its gradient has no gradient (create_graph=True, "
              "gradient penalties and second-order methods need one). UNICODE_FAST_BACKEND=reference uses torch's "
              "operators instead.");
}

}  // namespace unicode_fast::cpu
