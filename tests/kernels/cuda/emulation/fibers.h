// A GPU on one thread of the host: every thread of a block is a fiber that runs until it waits for others.
//
// Blocks run one after the other. What a real device leaves open is made as unpleasant as possible: the order of
// threads can be forward, backward or random, shared memory starts as NaN, copies to shared memory in the background
// arrive only when they are waited for, and an access outside of a guarded buffer, a barrier that some thread never
// reaches and too much shared memory end the launch with a status of their own.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

namespace emulation {

enum class Order : int { kForward = 0, kBackward = 1, kRandom = 2 };

// Statuses of a launch, apart from those of CUDA.
constexpr int kOutsideOfBuffer = 9001;
constexpr int kDeadlock = 9002;
constexpr int kTooMuchSharedMemory = 9003;
constexpr int kTooManyThreads = 9004;
constexpr int kMisaligned = 9005;
constexpr int kWrongGrid = 9006;

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned kMaxGridSide = 65535;  // in y and z
constexpr size_t kSharedBytes = 48 << 10;  // what a kernel may declare without asking
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSlotBytes = 32;          // what a lane can hand to its warp at once

struct Position {
  unsigned x = 0, y = 0, z = 0;
};

struct PendingCopy {
  void* target;
  const void* source;  // null: zeros
};

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on; unlike swapcontext, a jump makes no system call
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Position thread;
  int lane, warp;
  bool started, waiting, done;
  unsigned exchanges;   // collectives of the warp so far
  size_t shared_bytes;  // declared so far: all threads declare the same arrays in the same order
  std::vector<std::vector<PendingCopy>> copies;  // by group; the last one is open
};

struct Barrier {
  std::vector<Fiber*> waiting;
  size_t members = 0;
};

struct Machine {
  Order order = Order::kForward;
  std::mt19937 random;
  Position grid_size, block_index, block_size;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier block;
  // By parity of the exchange, warp, lane: a lane is at most one exchange ahead of the slowest of its warp.
  std::vector<char> slots[2];
  alignas(128) char shared[kSharedBytes];
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::function<void()> kernel;
  sigjmp_buf failure;
};

Machine& machine();

// Runs a kernel over a grid; the answer is 0 or one of the statuses above.
int run(Position grid, Position block, std::function<void()> kernel);

[[noreturn]] void fail(int status);

void wait(Barrier& barrier);

inline void wait_for_block() { wait(machine().block); }

// Hands a value to the warp and returns where all lanes have put theirs, kSlotBytes apart.
const char* exchange(const void* value, size_t bytes);

void* declare_shared(size_t bytes);

void copy_later(void* target, const void* source);
void commit_copies();
void finish_copies(size_t pending_groups);

}  // namespace emulation
