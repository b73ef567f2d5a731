// The row engine in fp64 (fp64.h).
#include "fp64.h"
#include "rows.h"

namespace fastkd::cpu::baseline::fp64 {

void forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  forward_rows<double>(args, begin, end);
}
void backward(const BackwardArgs& args, int64_t begin, int64_t end) {
  backward_rows<double>(args, begin, end);
}
void scan(const ForwardArgs& args, int64_t row, int64_t segment, Statistics* result) {
  scan_segment<double>(args, row, segment, result);
}
void balance(const ForwardArgs& args, int64_t row, int64_t segment, const Statistics* of_row,
             Sums* of_segment) {
  balance_segment<double>(args, row, segment, of_row, of_segment);
}
void write(const ForwardArgs& args, int64_t row, int64_t segment, const Statistics* of_row,
           const Sums& of_balance, Sums* of_segment) {
  write_segment<double>(args, row, segment, of_row, of_balance, of_segment);
}
void close(const ForwardArgs& args, int64_t row, const Statistics* of_row,
           const Sums* of_segments) {
  close_row<double>(args, row, of_row, of_segments);
}

}  // namespace fastkd::cpu::baseline::fp64
