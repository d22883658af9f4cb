// What the host side of every CUDA source needs: argument checks, the device and its current stream.

#pragma once

#include <cuda_runtime.h>

#include <string>

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/core/ScalarType.h>

#include "stable.h"

namespace r4b {

using torch::headeronly::ScalarType;

inline void check(bool holds, const char* rule) { STD_TORCH_CHECK(holds, rule); }

inline void check_tensor(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* rule) {
  check(tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous(), rule);
}

// Makes a tensor's GPU the current one for its lifetime, and knows torch's current stream on it.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : device_(tensor.get_device_index()) {
    STD_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device_ != previous_) STD_CUDA_CHECK(cudaSetDevice(device_));
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "torch knows no current stream of this GPU");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  int device_, previous_ = 0;
  cudaStream_t stream_ = nullptr;
};

}  // namespace r4b
