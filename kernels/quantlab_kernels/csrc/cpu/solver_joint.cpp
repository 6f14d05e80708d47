// Joint descent (`quantlab.solvers.joint`): one code at a time, judged by the loss after the table has been refitted.
//
// With g = e H, u = S H_j, P = M^-1 and d = 1_b - 1_a, moving input j from level a to b changes the loss by
//
//     -2 delta g_j + delta^2 H_jj - q^T M'^-1 q,    delta = t_b - t_a,   q = c d - delta u,   c = g_j - delta H_jj,
//     M' = M + [u d] C [u d]^T,    C = (0 1; 1 H_jj),
//
// so that with G = [u d]^T P [u d] only systems of two equations are left (Woodbury).
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "solver_vector.h"

namespace solver {
namespace {

struct Joint {
    const float* product;  // (rows, inputs): W H
    const float* hessian;  // (inputs, inputs)
    const int64_t* order;  // (visited,): inputs with a positive diagonal
    int64_t rows;
    int64_t inputs;
    int64_t visited;
    int64_t levels;
    int64_t passes;
    double ridge;      // of the codebook equations, scaled to a unit diagonal
    double threshold;  // share of the loss by which a move has to lower it
};

struct Row {
    const float* product;
    uint8_t* codes;
    double loss;
    float* sums;      // (levels, inputs): S H
    float* gradient;  // (inputs,): g
    double* inverse;  // (levels, levels): P
    double* gram;     // (levels, levels): M
    double table[256], change[256], coupling[256], solved[256], along[256];
    int64_t counts[256];

    static int64_t bytes(int64_t inputs, int64_t levels) {
        const int64_t all = 4 * (levels + 1) * inputs + 16 * levels * levels;
        return (all + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }

    Row(char* memory, int64_t inputs, int64_t levels) {
        inverse = reinterpret_cast<double*>(memory);
        gram = inverse + levels * levels;
        sums = reinterpret_cast<float*>(gram + levels * levels);
        gradient = sums + levels * inputs;
    }
};

void add_scaled(const float* source, float factor, int64_t size, float* target) {
    for (int64_t i = 0; i < size; ++i) target[i] += factor * source[i];
}

// table += change, and the gradient with it.
void move_table(const Joint& joint, Row& row) {
    for (int64_t k = 0; k < joint.levels; ++k) {
        row.table[k] += row.change[k];
        if (row.change[k] != 0)
            add_scaled(row.sums + k * joint.inputs, -static_cast<float>(row.change[k]), joint.inputs, row.gradient);
    }
}

// P, with zeros for levels without live inputs; false if M is indefinite.
bool invert(const Joint& joint, Row& row) {
    const int64_t levels = joint.levels;
    double *gram = row.gram, *inverse = row.inverse, *scale = row.along;
    std::fill(gram, gram + levels * levels, 0.0);
    for (int64_t k = 0; k < levels; ++k)
        for (int64_t i = 0; i < joint.visited; ++i)
            gram[k * levels + row.codes[joint.order[i]]] += row.sums[k * joint.inputs + joint.order[i]];
    for (int64_t k = 0; k < levels; ++k) {
        const double energy = gram[k * levels + k];
        scale[k] = row.counts[k] > 0 && energy > 0 ? 1 / std::sqrt(energy) : 0;
    }
    for (int64_t a = 0; a < levels; ++a)
        for (int64_t b = 0; b < levels; ++b)
            inverse[a * levels + b] = a == b ? (scale[a] > 0 ? 1 + joint.ridge : 1)
                                             : scale[a] * (gram[a * levels + b] + gram[b * levels + a]) / 2 * scale[b];
    for (int64_t k = 0; k < levels; ++k) {  // Gauss and Jordan; a positive definite matrix needs no pivoting
        double* pivot = inverse + k * levels;
        if (!(pivot[k] > 0)) return false;
        const double reciprocal = 1 / pivot[k];
        pivot[k] = 1;
        for (int64_t b = 0; b < levels; ++b) pivot[b] *= reciprocal;
        for (int64_t a = 0; a < levels; ++a) {
            if (a == k) continue;
            double* other = inverse + a * levels;
            const double factor = other[k];
            other[k] = 0;
            for (int64_t b = 0; b < levels; ++b) other[b] -= factor * pivot[b];
        }
    }
    for (int64_t a = 0; a < levels; ++a)
        for (int64_t b = 0; b < levels; ++b) inverse[a * levels + b] *= scale[a] * scale[b];
    return true;
}

void times_inverse(const Row& row, int64_t levels, const double* vector, double* result) {
    std::fill(result, result + levels, 0.0);
    for (int64_t k = 0; k < levels; ++k)
        for (int64_t b = 0; b < levels; ++b) result[b] += vector[k] * row.inverse[k * levels + b];
}

// Everything that a pass keeps up to date, from the codes; the table is at its optimum then.
bool begin_pass(const Joint& joint, Row& row) {
    std::fill(row.sums, row.sums + joint.levels * joint.inputs, 0.0f);
    std::fill(row.counts, row.counts + joint.levels, 0);
    for (int64_t i = 0; i < joint.visited; ++i) {
        const int64_t j = joint.order[i];
        add_scaled(joint.hessian + j * joint.inputs, 1, joint.inputs, row.sums + row.codes[j] * joint.inputs);
        ++row.counts[row.codes[j]];
    }
    if (!invert(joint, row)) return false;
    std::copy(row.product, row.product + joint.inputs, row.gradient);
    for (int64_t k = 0; k < joint.levels; ++k)
        add_scaled(row.sums + k * joint.inputs, -static_cast<float>(row.table[k]), joint.inputs, row.gradient);
    double right[256] = {};
    for (int64_t i = 0; i < joint.visited; ++i) right[row.codes[joint.order[i]]] += row.gradient[joint.order[i]];
    times_inverse(row, joint.levels, right, row.change);
    move_table(joint, row);
    return true;
}

// A move of one input to another level.
struct Move {
    int64_t level;
    double step;    // delta
    double slope;   // c
    double cross;   // G_12
    double square;  // G_22
    double change;  // of the loss
};

Move consider(const Row& row, int64_t levels, int64_t from, int64_t to, double gradient, double energy, double own) {
    Move move{to, row.table[to] - row.table[from], 0, row.solved[to] - row.solved[from], 0, 0};
    const double* inverse = row.inverse;
    move.slope = gradient - move.step * energy;
    move.square = inverse[to * levels + to] - 2 * inverse[from * levels + to] + inverse[from * levels + from];
    const double upper = own + energy * move.cross, lower = 1 + move.cross + energy * move.square;
    const double determinant = (1 + move.cross) * lower - upper * move.square;
    const double first = move.cross * move.slope - own * move.step;
    const double second = move.square * move.slope - move.cross * move.step;
    const double gain = (-move.step * (lower * first - upper * second) +
                         move.slope * ((1 + move.cross) * second - move.square * first)) / determinant;
    move.change = determinant > 0 ? move.step * (move.step * energy - 2 * gradient) - gain : HUGE_VAL;
    return move;
}

// The two levels nearest to a target that have live inputs, `from` left out; -1 where there is none.
void nearest_others(const Row& row, int64_t levels, int64_t from, double target, int64_t* nearest) {
    double distance[2] = {HUGE_VAL, HUGE_VAL};
    nearest[0] = nearest[1] = -1;
    for (int64_t k = 0; k < levels; ++k) {
        const double away = std::fabs(row.table[k] - target);
        if (k == from || row.counts[k] == 0 || away >= distance[1]) continue;
        const bool first = away < distance[0];
        distance[1] = first ? distance[0] : away;
        nearest[1] = first ? nearest[0] : k;
        if (first) distance[0] = away, nearest[0] = k;
    }
}

void make(const Joint& joint, Row& row, int64_t input, double energy, double own, const Move& move) {
    const int64_t levels = joint.levels, from = row.codes[input];
    // P' = P - [z p] N^-1 [z p]^T with z = P u, p = P d and N = C^-1 + G.
    const double n11 = own - energy, n12 = 1 + move.cross, n22 = move.square;
    const double determinant = n11 * n22 - n12 * n12;
    for (int64_t k = 0; k < levels; ++k)
        row.along[k] = row.inverse[move.level * levels + k] - row.inverse[from * levels + k];
    for (int64_t a = 0; a < levels; ++a) {
        const double left = (n22 * row.solved[a] - n12 * row.along[a]) / determinant;
        const double right = (n11 * row.along[a] - n12 * row.solved[a]) / determinant;
        for (int64_t b = 0; b < levels; ++b)
            row.inverse[a * levels + b] -= left * row.solved[b] + right * row.along[b];
    }
    double q[256];
    for (int64_t k = 0; k < levels; ++k) q[k] = -move.step * row.coupling[k];
    q[move.level] += move.slope, q[from] -= move.slope;
    times_inverse(row, levels, q, row.change);
    const float* coupled = joint.hessian + input * joint.inputs;
    add_scaled(coupled, -1, joint.inputs, row.sums + from * joint.inputs);
    add_scaled(coupled, 1, joint.inputs, row.sums + move.level * joint.inputs);
    add_scaled(coupled, -static_cast<float>(move.step), joint.inputs, row.gradient);
    move_table(joint, row);
    row.codes[input] = static_cast<uint8_t>(move.level);
    row.loss += move.change;
    --row.counts[from], ++row.counts[move.level];
}

// Whether a code changed.
bool pass(const Joint& joint, Row& row) {
    bool changed = false;
    for (int64_t i = 0; i < joint.visited; ++i) {
        const int64_t input = joint.order[i], from = row.codes[input], levels = joint.levels;
        if (row.counts[from] == 1) continue;  // an empty level has no place in P
        const double energy = joint.hessian[input * joint.inputs + input], gradient = row.gradient[input];
        int64_t nearest[2];
        nearest_others(row, levels, from, row.table[from] + gradient / energy, nearest);
        if (nearest[0] < 0) continue;
        double own = 0;
        for (int64_t k = 0; k < levels; ++k) row.coupling[k] = row.sums[k * joint.inputs + input];
        times_inverse(row, levels, row.coupling, row.solved);
        for (int64_t k = 0; k < levels; ++k) own += row.coupling[k] * row.solved[k];
        Move best = consider(row, levels, from, nearest[0], gradient, energy, own);
        if (nearest[1] >= 0) {
            const Move other = consider(row, levels, from, nearest[1], gradient, energy, own);
            if (other.change < best.change) best = other;
        }
        if (best.change < -joint.threshold * row.loss) {
            make(joint, row, input, energy, own, best);
            changed = true;
        }
    }
    return changed;
}

}  // namespace
}  // namespace solver

using namespace solver;

// Bytes of scratch memory for each thread.
SOLVER_API int64_t solver_joint_scratch(int64_t inputs, int64_t levels) { return Row::bytes(inputs, levels); }

// Changes `codes` (rows, inputs) in place. tables: (rows, levels); loss: (rows,), of these codes and tables.
SOLVER_API void solver_descend_jointly(const Joint* joint, const float* tables, const double* loss, uint8_t* codes,
                                       char* scratch, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t r = 0; r < joint->rows; ++r) {
        Row row(scratch + omp_get_thread_num() * Row::bytes(joint->inputs, joint->levels), joint->inputs, joint->levels);
        row.product = joint->product + r * joint->inputs;
        row.codes = codes + r * joint->inputs;
        row.loss = loss[r];
        std::copy(tables + r * joint->levels, tables + (r + 1) * joint->levels, row.table);
        for (int64_t i = 0; i < joint->passes && begin_pass(*joint, row) && pass(*joint, row); ++i) {}
    }
}
