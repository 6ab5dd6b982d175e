// The functions of csrc/cuda/arrivals.cuh on the host.
#pragma once

#include "device_on_host.h"

namespace on_host {

int count_block(int* count, const Site& site);
void wait_for_count(const int* count, int least, const Site& site);

}  // namespace on_host

namespace unicode_fast::cuda {

inline int count_block(int* count, on_host::Site site = on_host::Site::current()) {
  return on_host::count_block(count, site);
}
inline void wait_for_count(const int* count, int least, on_host::Site site = on_host::Site::current()) {
  on_host::wait_for_count(count, least, site);
}

}  // namespace unicode_fast::cuda
