// The numbers that every call has, in the order of the ops' schemas (library.cpp).
#pragma once
#include "../kernels.h"

namespace fastkd {

struct Options {
  double temperature;
  double teacher_temperature;
  double hard_weight;
  double soft_weight;
  double label_smoothing;
  int64_t ignore_index;
  int64_t divergence;
  double mix;
};

// `inputs` but for its numbers is complete.
inline void set_options(const Options& options, Inputs* inputs) {
  inputs->temperature = options.temperature;
  inputs->teacher_temperature = options.teacher_temperature;
  inputs->hard_weight = inputs->labels != nullptr ? options.hard_weight : 0.0;
  inputs->soft_weight = options.soft_weight;
  inputs->label_smoothing = options.label_smoothing;
  inputs->ignore_index = options.ignore_index;
  inputs->divergence = static_cast<Divergence>(options.divergence);
  inputs->mix = options.mix;
}

}  // namespace fastkd
