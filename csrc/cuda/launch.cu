// The functions of namespace fastkd::cuda in kernels.h: they choose the kernels of a call by
// plan.cpp and launch them. The sums' order, and so the bits, follow from that choice
// (docs/maths.md, section 9).
#include <algorithm>
#include <map>
#include <mutex>

#include "launch.h"

namespace fastkd::cuda {

cudaError_t current_device(Device& device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int ordinal = 0, compiled = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = known.find(ordinal);
  if (entry != known.end()) {
    device = entry->second;
    return cudaSuccess;
  }
  error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, ordinal);
  if (error == cudaSuccess) error = compiled_major(compiled);
  if (error != cudaSuccess) return error;
  device.major = std::min(device.major, compiled);
  known[ordinal] = device;
  return cudaSuccess;
}

int reported(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

cudaError_t launch_scale(ForwardCall& call, const void* denominator, bool counts_inside,
                         cudaStream_t stream) {
  const ForwardArgs& args = call.args;
  call.denominator = denominator;
  if (args.reduction == Reduction::kMean) {
    if (denominator != nullptr) {
      call.scale_source = ScaleSource::kDenominator;
    } else if (args.labels == nullptr) {
      call.args.scale = 1.0 / static_cast<double>(args.rows > 0 ? args.rows : 1);
    } else {
      call.scale_source = ScaleSource::kCount;
    }
  }
  if (args.rows > 0 && (call.scale_source != ScaleSource::kCount || counts_inside))
    return cudaSuccess;
  const cudaError_t error = launch_count(call, stream);
  call.scale_source = ScaleSource::kStats;
  return error;
}

namespace {

template <class Args>
Args with_groups(Args args) {
  if (args.group_rows <= 0) args.group_rows = args.rows > 0 ? args.rows : 1;
  return args;
}

cudaError_t launch_family(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  switch (plan.family) {
    case Family::kTiny:
      return launch_tiny(call, plan, stream);
    case Family::kRegisters:
      return launch_registers(call, plan, stream);
    case Family::kStrided:
      return launch_strided(call, plan, stream);
    case Family::kStreaming:
    default:
      return launch_streaming(call, plan, stream);
  }
}

// A device (a MIG slice, for example) may not hold the planned cluster: `call` then finishes
// without one.
cudaError_t launch_rows(ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  const cudaError_t error = launch_family(call, plan, stream);
  if (!call.finish_inside || plan.cluster == 1 || !refuses_cluster(error)) return error;
  cudaGetLastError();
  call.finish_inside = false;
  return launch_family(call, plan, stream);
}

cudaError_t forward_on(const ForwardArgs& args, void* total, const void* denominator,
                       cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  ForwardCall call;
  call.args = with_groups(args);
  call.total = args.reduction == Reduction::kNone ? nullptr : total;
  call.constants = make_constants(args.divergence, args.mix);
  const Plan plan = make_plan(args.rows, args.classes, args.student_dtype, args.teacher_dtype,
                              device.limits(), !is_hot(args), is_strided(args));
  call.finish_inside = plan.finish_inside && call.total != nullptr && args.rows > 0;
  if (const cudaError_t error = launch_scale(call, denominator, args.rows <= kCountInside, stream))
    return error;
  if (args.rows > 0)
    if (const cudaError_t error = launch_rows(call, plan, stream)) return error;
  if (call.total == nullptr || call.finish_inside) return cudaSuccess;
  return launch_finish(call, stream);
}

}  // namespace

int forward(const ForwardArgs& args, void* total, const void* denominator, void* stream) {
  if (args.rows > kMostRows) return cudaErrorInvalidValue;
  return reported(forward_on(args, total, denominator, static_cast<cudaStream_t>(stream)));
}

int backward(const BackwardArgs& args, bool filled, void* stream) {
  if (args.rows > kMostRows) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.classes == 0) return cudaSuccess;
  return reported(launch_backward(with_groups(args), filled, static_cast<cudaStream_t>(stream)));
}

const char* describe(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace fastkd::cuda
