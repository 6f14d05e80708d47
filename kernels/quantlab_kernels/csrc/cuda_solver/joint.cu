// Joint descent (`quantlab.solvers.joint`): one code at a time, judged by the loss after the table has been refitted.
//
// With g = e H, u = S H_j, P = M^-1 and d = 1_b - 1_a, moving input j from level a to b changes the loss by
//
//     -2 delta g_j + delta^2 H_jj - q^T M'^-1 q,    delta = t_b - t_a,   q = c d - delta u,   c = g_j - delta H_jj,
//     M' = M + [u d] C [u d]^T,    C = (0 1; 1 H_jj),
//
// so that with G = [u d]^T P [u d] only systems of two equations are left (Woodbury).
//
// A block of threads takes one row through all passes. A thread owns one level, and every kThreads-th input; what all of
// them need to know to decide on a move, they compute alike.

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"

namespace quantlab {
namespace {

constexpr int kMostLevels = kThreads;  // a thread per level

// By level, in shared memory.
struct ByLevel {
  double* table;
  double* change;    // of the table
  double* coupling;  // u
  double* solved;    // P u
  double* along;     // P d
  double* right;     // of a system with P
  int* counts;       // live inputs
};

// A move of one input to another level.
struct Move {
  int level;
  double step;    // delta
  double slope;   // c
  double cross;   // G_12
  double square;  // G_22
  double change;  // of the loss
};

class JointRow {
 public:
  __device__ __forceinline__ JointRow(const Joint& joint, int row, const ByLevel& by_level)
      : joint_(joint),
        levels_(joint.levels),
        inputs_(joint.inputs),
        thread_(threadIdx.y * kWarpLanes + threadIdx.x),
        product_(joint.product + static_cast<size_t>(row) * joint.inputs),
        codes_(joint.codes + static_cast<size_t>(row) * joint.inputs),
        sums_(joint.sums + static_cast<size_t>(row) * joint.levels * joint.inputs),
        gradient_(joint.gradient + static_cast<size_t>(row) * joint.inputs),
        inverse_(joint.matrices + static_cast<size_t>(row) * 2 * joint.levels * joint.levels),
        gram_(inverse_ + joint.levels * joint.levels),
        by_(by_level),
        loss_(joint.loss[row]) {
    if (thread_ < levels_) by_.table[thread_] = joint.tables[static_cast<size_t>(row) * levels_ + thread_];
    __syncthreads();
  }

  // Everything that a pass keeps up to date, from the codes; the table is at its optimum then. False if M is indefinite.
  __device__ __forceinline__ bool begin_pass() {
    for (int i = thread_; i < inputs_; i += kThreads) {
      for (int k = 0; k < levels_; ++k) sums_[k * inputs_ + i] = 0.f;
      for (int v = 0; v < joint_.visited; ++v) {
        const int64_t input = joint_.order[v];
        sums_[codes_[input] * inputs_ + i] += joint_.hessian[input * inputs_ + i];
      }
    }
    __syncthreads();
    if (thread_ < levels_) {
      int count = 0;
      double* const gram = gram_ + thread_ * levels_;
      for (int k = 0; k < levels_; ++k) gram[k] = 0.0;
      for (int v = 0; v < joint_.visited; ++v) {
        const int64_t input = joint_.order[v];
        const int code = codes_[input];
        count += code == thread_;
        gram[code] += sums_[thread_ * inputs_ + input];
      }
      by_.counts[thread_] = count;
      by_.along[thread_] = count > 0 && gram[thread_] > 0 ? 1 / sqrt(gram[thread_]) : 0.0;  // to a unit diagonal
    }
    __syncthreads();
    if (!invert()) return false;

    for (int i = thread_; i < inputs_; i += kThreads) {
      float gradient = product_[i];
      for (int k = 0; k < levels_; ++k) gradient += -static_cast<float>(by_.table[k]) * sums_[k * inputs_ + i];
      gradient_[i] = gradient;
    }
    __syncthreads();
    if (thread_ < levels_) {
      double sum = 0.0;
      for (int v = 0; v < joint_.visited; ++v) {
        const int64_t input = joint_.order[v];
        if (codes_[input] == thread_) sum += gradient_[input];
      }
      by_.right[thread_] = sum;
    }
    __syncthreads();
    if (thread_ < levels_) by_.change[thread_] = times_inverse(by_.right);
    __syncthreads();
    move_table();
    __syncthreads();
    return true;
  }

  // Whether a code changed.
  __device__ __forceinline__ bool pass() {
    bool changed = false;
    for (int v = 0; v < joint_.visited; ++v) {
      const int64_t input = joint_.order[v];
      const int from = codes_[input];
      if (by_.counts[from] == 1) continue;  // an empty level has no place in P
      const double energy = joint_.hessian[input * inputs_ + input], gradient = gradient_[input];
      int nearest[2];
      find_nearest(from, by_.table[from] + gradient / energy, nearest);
      if (nearest[0] < 0) continue;
      __syncthreads();  // until nobody needs the last coupling any more
      if (thread_ < levels_) by_.coupling[thread_] = sums_[thread_ * inputs_ + input];
      __syncthreads();
      if (thread_ < levels_) by_.solved[thread_] = times_inverse(by_.coupling);
      __syncthreads();
      double own = 0.0;
      for (int k = 0; k < levels_; ++k) own += by_.coupling[k] * by_.solved[k];
      Move best = consider(from, nearest[0], gradient, energy, own);
      if (nearest[1] >= 0) {
        const Move other = consider(from, nearest[1], gradient, energy, own);
        if (other.change < best.change) best = other;
      }
      if (best.change < -joint_.threshold * loss_) {
        make(input, from, energy, own, best);
        changed = true;
      }
    }
    return changed;
  }

 private:
  // P, with zeros for levels without live inputs, by Gauss and Jordan: a positive definite matrix needs no pivoting.
  __device__ __forceinline__ bool invert() {
    const double* const scale = by_.along;
    for (int at = thread_; at < levels_ * levels_; at += kThreads) {
      const int a = at / levels_, b = at % levels_;
      const double mean = (gram_[at] + gram_[b * levels_ + a]) / 2;
      const double diagonal = scale[a] > 0 ? 1 + joint_.ridge : 1.0;
      inverse_[at] = a == b ? diagonal : scale[a] * mean * scale[b];
    }
    __syncthreads();
    for (int k = 0; k < levels_; ++k) {
      const double pivot = inverse_[k * levels_ + k];
      if (!(pivot > 0)) return false;
      __syncthreads();
      if (thread_ < levels_) {
        double* const entry = inverse_ + k * levels_ + thread_;
        *entry = (thread_ == k ? 1.0 : *entry) * (1 / pivot);
      }
      __syncthreads();
      if (thread_ < levels_ && thread_ != k) {
        double* const other = inverse_ + thread_ * levels_;
        const double factor = other[k];
        other[k] = 0.0;
        for (int b = 0; b < levels_; ++b) other[b] -= factor * inverse_[k * levels_ + b];
      }
      __syncthreads();
    }
    for (int at = thread_; at < levels_ * levels_; at += kThreads) {
      inverse_[at] *= scale[at / levels_] * scale[at % levels_];
    }
    __syncthreads();
    return true;
  }

  // The level of this thread in P times a vector.
  __device__ __forceinline__ double times_inverse(const double* vector) const {
    double result = 0.0;
    for (int k = 0; k < levels_; ++k) result += vector[k] * inverse_[k * levels_ + thread_];
    return result;
  }

  // table += change, and the gradient with it. The table of all levels is there after the next barrier.
  __device__ __forceinline__ void move_table() {
    if (thread_ < levels_) by_.table[thread_] += by_.change[thread_];
    for (int i = thread_; i < inputs_; i += kThreads) {
      float gradient = gradient_[i];
      for (int k = 0; k < levels_; ++k) gradient += -static_cast<float>(by_.change[k]) * sums_[k * inputs_ + i];
      gradient_[i] = gradient;
    }
  }

  // The two levels nearest to a target that have live inputs, `from` left out; -1 where there is none.
  __device__ __forceinline__ void find_nearest(int from, double target, int (&nearest)[2]) const {
    double distance[2] = {INFINITY, INFINITY};
    nearest[0] = nearest[1] = -1;
    for (int k = 0; k < levels_; ++k) {
      const double away = fabs(by_.table[k] - target);
      if (k == from || by_.counts[k] == 0 || away >= distance[1]) continue;
      const bool first = away < distance[0];
      distance[1] = first ? distance[0] : away;
      nearest[1] = first ? nearest[0] : k;
      if (first) distance[0] = away, nearest[0] = k;
    }
  }

  __device__ __forceinline__ Move consider(int from, int to, double gradient, double energy, double own) const {
    Move move{to, by_.table[to] - by_.table[from], 0.0, by_.solved[to] - by_.solved[from], 0.0, 0.0};
    move.slope = gradient - move.step * energy;
    move.square = inverse_[to * levels_ + to] - 2 * inverse_[from * levels_ + to] + inverse_[from * levels_ + from];
    const double upper = own + energy * move.cross, lower = 1 + move.cross + energy * move.square;
    const double determinant = (1 + move.cross) * lower - upper * move.square;
    const double first = move.cross * move.slope - own * move.step;
    const double second = move.square * move.slope - move.cross * move.step;
    const double gain = (-move.step * (lower * first - upper * second) +
                         move.slope * ((1 + move.cross) * second - move.square * first)) /
                        determinant;
    move.change = determinant > 0 ? move.step * (move.step * energy - 2 * gradient) - gain : INFINITY;
    return move;
  }

  // P' = P - [z p] N^-1 [z p]^T with z = P u, p = P d and N = C^-1 + G.
  __device__ __forceinline__ void make(int64_t input, int from, double energy, double own, const Move& move) {
    const double n11 = own - energy, n12 = 1 + move.cross, n22 = move.square;
    const double determinant = n11 * n22 - n12 * n12;
    if (thread_ < levels_) {
      by_.along[thread_] = inverse_[move.level * levels_ + thread_] - inverse_[from * levels_ + thread_];
      const double sign = (thread_ == move.level) - (thread_ == from);
      by_.right[thread_] = sign * move.slope - move.step * by_.coupling[thread_];
    }
    __syncthreads();
    if (thread_ < levels_) {
      const double z = by_.solved[thread_], p = by_.along[thread_];
      const double left = (n22 * z - n12 * p) / determinant, right = (n11 * p - n12 * z) / determinant;
      for (int b = 0; b < levels_; ++b) {
        inverse_[thread_ * levels_ + b] -= left * by_.solved[b] + right * by_.along[b];
      }
    }
    for (int i = thread_; i < inputs_; i += kThreads) {
      const float coupled = joint_.hessian[input * inputs_ + i];
      sums_[from * inputs_ + i] -= coupled;
      sums_[move.level * inputs_ + i] += coupled;
      gradient_[i] += -static_cast<float>(move.step) * coupled;
    }
    __syncthreads();
    if (thread_ < levels_) by_.change[thread_] = times_inverse(by_.right);
    if (thread_ == 0) {
      codes_[input] = static_cast<uint8_t>(move.level);
      --by_.counts[from], ++by_.counts[move.level];
    }
    __syncthreads();
    move_table();
    loss_ += move.change;
    __syncthreads();
  }

  const Joint& joint_;
  const int levels_, inputs_, thread_;
  const float* const product_;
  uint8_t* const codes_;
  float* const sums_;      // (levels, inputs): S H
  float* const gradient_;  // (inputs): g
  double* const inverse_;  // (levels, levels): P
  double* const gram_;     // (levels, levels): M
  const ByLevel by_;
  double loss_;
};

__global__ void __launch_bounds__(kThreads, 2) descend_jointly(const Joint joint) {
  QUANTLAB_SHARED(double, numbers, 6 * kMostLevels);
  QUANTLAB_SHARED(int, counts, kMostLevels);
  double* const of[6] = {numbers,
                         numbers + kMostLevels,
                         numbers + 2 * kMostLevels,
                         numbers + 3 * kMostLevels,
                         numbers + 4 * kMostLevels,
                         numbers + 5 * kMostLevels};
  JointRow row(joint, blockIdx.x, {of[0], of[1], of[2], of[3], of[4], of[5], counts});
  for (int pass = 0; pass < joint.passes && row.begin_pass() && row.pass(); ++pass) {
  }
}

}  // namespace
}  // namespace quantlab

QUANTLAB_EXPORT int quantlab_solver_descend_jointly(const quantlab::Joint* joint, int32_t device, void* stream) {
  using namespace quantlab;
  if (joint->rows == 0 || joint->visited == 0) return 0;
  if (joint->levels > kMostLevels) return kUnsupported;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return launch(descend_jointly, dim3(joint->rows), dim3(kWarpLanes, kWarps), stream, *joint);
}
