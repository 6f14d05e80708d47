// The plain C interface: what the stages of the solvers work on, and the functions that Python loads with ctypes.
//
// Matrices are by rows. A launch is queued on a stream and not waited for; the answer of a function is 0, a cudaError_t
// or kUnsupported. What the stages compute is told where they are written in PyTorch, in `quantlab.solvers`.
#pragma once

#include <cstdint>

namespace quantlab {

// The answer of a function that does not implement the combination it was asked for.
constexpr int kUnsupported = -1;

// Structures are mirrored field by field in quantlab_kernels/solver_cuda_library.py.

// What codes select from: tables (levels and midpoints) or uniform grids (scale and zero).
struct Books {
  const float* levels;     // (at least rows, groups, count), ascending, or null
  const float* midpoints;  // (at least rows, groups, count - 1), or null
  const float* scale;      // (at least rows, groups), or null
  const float* zero;       // (at least rows, groups), or null
  int32_t groups;
  int32_t group_size;  // inputs that share a codebook
  int32_t count;       // levels
};

// The positions begin to end of a triangular sweep, last to first. A position is an input in the order of the factor.
struct Sweep {
  const float* weight;     // (rows, inputs)
  const int64_t* columns;  // (inputs), position to input
  const float* feedback;   // (inputs, feedback_pitch): (u, j) is how much the error at u moves the target at j < u;
                           // 16-byte aligned
  const float* energy;     // (inputs), by position: what the squared distance from target to level counts
  const float* shift;      // (inputs), by position: what a squared error counts
  const float* targets;    // (end - begin, rows): weights with the feedback of all positions from end; null: the weights
  float* behind;           // (inputs, behind_pitch): errors by position, written from begin to end; 16-byte aligned
  uint8_t* codes;          // (rows, inputs), written
  float* error;            // (rows, inputs), written
  double* loss;            // (rows), added to
  float* rounded;          // (rows, inputs), written: the final targets, up to rounding; or null
  int64_t feedback_pitch;  // a multiple of 4
  int64_t behind_pitch;    // rows, padded to a multiple of kBlockRows
  int32_t rows;
  int32_t inputs;
  int32_t begin;
  int32_t end;
};

enum class Mode : int32_t { kDescend = 0, kRound = 1, kRelax = 2 };

// Passes of coordinate descent. A position is an input in the order of visits.
struct Descent {
  const float* weight;            // (rows, inputs); not read to relax
  const float* hessian;           // (inputs, hessian_pitch), by position on both sides; 16-byte aligned
  const int64_t* order;           // (inputs), position to input
  const float* diagonal;          // (inputs), by position
  const float* inverse_diagonal;  // (inputs), by position; 0 for dead inputs
  float* error;                   // (inputs, error_pitch), by position, changed in place; 16-byte aligned
  uint8_t* codes;                 // (rows, inputs), changed to descend, written to round
  double* gain;                   // (rows), added to: how far the losses fell, to descend
  int64_t hessian_pitch;          // a multiple of 4
  int64_t error_pitch;            // rows, padded to a multiple of kBlockRows
  int32_t rows;
  int32_t inputs;
  int32_t passes;
  int32_t mode;  // Mode
  float closer;  // a new level must be nearer than the present one by this factor
};

constexpr int kMaxBlock = 64;

// One pass of block descent. Blocks of `size` inputs, the last may be smaller, follow each other in `order`; what belongs
// to one of them has kMaxBlock places, filled up with zeros.
struct Blocks {
  const float* weight;      // (rows, inputs)
  const float* hessian;     // (inputs, hessian_pitch): the columns of every block; 16-byte aligned
  const int64_t* order;     // (visited), position to input; within a block the last is rounded first
  const float* within;      // (blocks, kMaxBlock, kMaxBlock): the Hessian of a block
  const float* feedback;    // (blocks, kMaxBlock, kMaxBlock): its factor, unit lower triangular
  const float* upper;       // (blocks, kMaxBlock, kMaxBlock): the transposed factor
  const float* precision;   // (visited): 1 over the squares of the pivots
  float* error;             // (inputs, error_pitch), by input, changed in place; 16-byte aligned
  uint8_t* codes;           // (rows, inputs), changed in place
  double* gained;           // (rows), added to: the change of the losses
  int64_t hessian_pitch;    // blocks times kMaxBlock
  int64_t error_pitch;      // rows, padded to a multiple of kBlockRows
  int32_t rows;
  int32_t inputs;
  int32_t visited;
  int32_t size;
};

// Blocks of inputs to be factored, as in `Blocks`; but what belongs to one of them has `size` places.
struct Factors {
  const float* hessian;  // (inputs, inputs)
  const int64_t* order;  // (visited)
  float* within;         // (blocks, size, size), written
  float* feedback;       // (blocks, size, size), written
  float* upper;          // (blocks, size, size), written
  float* precision;      // (visited), written
  uint8_t* failed;       // (blocks), written: whether no damping was enough
  double damping;        // fraction of the mean diagonal to add
  int32_t inputs;
  int32_t visited;
  int32_t size;  // at most kMaxBlock
};

// Passes of joint descent.
struct Joint {
  const float* product;  // (rows, inputs): W H
  const float* hessian;  // (inputs, inputs)
  const int64_t* order;  // (visited): inputs with a positive diagonal
  const float* tables;   // (rows, levels)
  const double* loss;    // (rows)
  uint8_t* codes;        // (rows, inputs), changed in place
  float* sums;           // (rows, levels, inputs), memory
  float* gradient;       // (rows, inputs), memory
  double* matrices;      // (rows, 2, levels, levels), memory
  double ridge;          // of the codebook equations, scaled to a unit diagonal
  double threshold;      // share of the loss by which a move has to lower it
  int32_t rows;
  int32_t inputs;
  int32_t visited;
  int32_t levels;
  int32_t passes;
};

// k-means of every row.
struct Cluster {
  const double* values;   // (rows, size), ascending
  const double* weights;  // (rows, size)
  const double* mass;     // (rows, size + 1), prefix sums of the weights
  const double* moment;   // (rows, size + 1), prefix sums of the weighted values
  double* share;          // (rows, size), memory
  double* cumulative;     // (rows, size), memory
  int32_t* distinct;      // (rows, size), memory
  double* centers;        // (rows, levels), written
  int32_t rows;
  int32_t size;
  int32_t levels;
  int32_t iterations;
  int32_t greedy;         // whether to start at the costliest values, too
};

// Rows of a thread block of the sweep and of both descents.
constexpr int kBlockRows = 32;

// Inputs whose codes are sorted together (gram.cu).
constexpr int kSegment = 224;

}  // namespace quantlab

#define QUANTLAB_EXPORT extern "C" __attribute__((visibility("default")))

QUANTLAB_EXPORT int quantlab_solver_sweep(const quantlab::Sweep* sweep, const quantlab::Books* books, int32_t device,
                                          void* stream);

// `books` may be null to relax.
QUANTLAB_EXPORT int quantlab_solver_descend(const quantlab::Descent* descent, const quantlab::Books* books,
                                            int32_t device, void* stream);

QUANTLAB_EXPORT int quantlab_solver_factor_blocks(const quantlab::Factors* factors, int32_t device, void* stream);

QUANTLAB_EXPORT int quantlab_solver_descend_in_blocks(const quantlab::Blocks* blocks, const quantlab::Books* books,
                                                      int32_t device, void* stream);

QUANTLAB_EXPORT int quantlab_solver_descend_jointly(const quantlab::Joint* joint, int32_t device, void* stream);

// The inputs of every segment of every row by code: `lists` and `starts` are described in gram.cu.
QUANTLAB_EXPORT int quantlab_solver_sort_codes(const uint8_t* codes, int32_t rows, int32_t inputs, int32_t levels,
                                               uint32_t* lists, uint16_t* starts, int32_t device, void* stream);

// sums[row][code][column] of the upper triangle of a Hessian with half its diagonal: (rows, levels, inputs).
QUANTLAB_EXPORT int quantlab_solver_sum_hessian_rows(const float* hessian, const uint32_t* lists, const uint16_t* starts,
                                                     int32_t rows, int32_t inputs, int32_t levels, float* sums,
                                                     int32_t device, void* stream);

// sums[row][i][code] of values (rows, repeats, inputs) over inputs with the same code: (rows, repeats, levels).
QUANTLAB_EXPORT int quantlab_solver_sums_by_code(const uint8_t* codes, const float* values, int32_t rows,
                                                 int32_t repeats, int32_t inputs, int32_t levels, double* sums,
                                                 int32_t device, void* stream);

// Solves gram x = right for every row; `solution` holds the right sides and is overwritten. `scratch` holds
// levels (levels + 1) doubles for each row. failed[row] becomes whether no attempt succeeded.
QUANTLAB_EXPORT int quantlab_solver_solve(const float* gram, int32_t rows, int32_t levels, double ridge, double growth,
                                          int32_t attempts, double* solution, double* scratch, uint8_t* failed,
                                          int32_t device, void* stream);

// found[row][j] = table[row][codes[row][j]] for elements of 1 or 4 bytes.
QUANTLAB_EXPORT int quantlab_solver_look_up(const uint8_t* codes, const void* table, int32_t rows, int32_t inputs,
                                            int32_t levels, int32_t element_bytes, void* found, int32_t device,
                                            void* stream);

QUANTLAB_EXPORT int quantlab_solver_cluster(const quantlab::Cluster* cluster, int32_t device, void* stream);

// A histogram of every row of values (rows, size), ready to be clustered. `weights` are null, or those of a row are
// `weight_stride` behind those of the one before. means, masses: (rows, cells); mass, moment: (rows, cells + 1).
QUANTLAB_EXPORT int quantlab_solver_fill_cells(const float* values, const float* weights, int64_t weight_stride,
                                               int32_t rows, int32_t size, int32_t cells, double* means, double* masses,
                                               double* mass, double* moment, int32_t device, void* stream);

// Whether the library can work with the driver.
QUANTLAB_EXPORT int quantlab_solver_probe();

// What a positive status means.
QUANTLAB_EXPORT const char* quantlab_solver_error(int status);
