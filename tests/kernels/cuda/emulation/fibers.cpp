#include "fibers.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>

namespace emulation {
namespace {

constexpr size_t kCopyBytes = 16;
constexpr size_t kBufferAlignment = 16;

void enter_fiber() {
  machine().kernel();
  machine().current->done = true;
  _longjmp(machine().scheduler, 1);
}

// Lets a fiber run until it waits or is done.
void resume(Fiber& fiber) {
  machine().current = &fiber;
  if (_setjmp(machine().scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

void suspend(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(machine().scheduler, 1);
}

void start_block(Position block) {
  Machine& m = machine();
  const size_t threads = m.fibers.size(), warps = (threads + kLanes - 1) / kLanes;
  std::memset(m.shared, 0xff, sizeof m.shared);  // NaN in every format
  m.warps.assign(warps, {});
  m.block = {{}, threads};
  for (auto& slots : m.slots) slots.assign(warps * kLanes * kSlotBytes, 0);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    const unsigned plane = block.x * block.y, index = static_cast<unsigned>(i);
    fiber.thread = {index % block.x, index / block.x % block.y, index / plane};
    fiber.lane = static_cast<int>(i) % kLanes;
    fiber.warp = static_cast<int>(i) / kLanes;
    fiber.started = fiber.waiting = fiber.done = false;
    fiber.exchanges = 0;
    fiber.shared_bytes = 0;
    fiber.copies.assign(1, {});
    ++m.warps[fiber.warp].members;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
  }
}

void run_block() {
  Machine& m = machine();
  std::vector<size_t> order(m.fibers.size());
  std::iota(order.begin(), order.end(), 0);
  if (m.order == Order::kBackward) std::reverse(order.begin(), order.end());
  while (true) {
    if (m.order == Order::kRandom) std::shuffle(order.begin(), order.end(), m.random);
    bool progress = false, finished = true;
    for (const size_t i : order) {
      Fiber& fiber = m.fibers[i];
      finished = finished && fiber.done;
      if (fiber.done || fiber.waiting) continue;
      progress = true;
      resume(fiber);
    }
    if (finished) return;
    if (!progress) fail(kDeadlock);
  }
}

constexpr int kSignals[] = {SIGSEGV, SIGILL};

// A guard page was touched, or the alignment check of the compiler, which ends in an illegal instruction, failed.
void on_signal(int signal) { siglongjmp(machine().failure, signal == SIGSEGV ? kOutsideOfBuffer : kMisaligned); }

// Turns signals into a status while a launch runs; the handler needs a stack of its own, since that of a fiber is small.
class AccessGuard {
 public:
  AccessGuard() : stack_(SIGSTKSZ) {
    stack_t stack{};
    stack.ss_sp = stack_.data();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &previous_stack_);
    struct sigaction action {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &previous_actions_[i]);
  }
  ~AccessGuard() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &previous_actions_[i], nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  std::vector<char> stack_;
  stack_t previous_stack_;
  struct sigaction previous_actions_[2];
};

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

size_t mapped_bytes(size_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

void fail(int status) { siglongjmp(machine().failure, status); }

int run(Position grid, Position block, std::function<void()> kernel) {
  Machine& m = machine();
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads) return kTooManyThreads;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > kMaxGridSide || grid.z > kMaxGridSide) return kWrongGrid;
  const AccessGuard guard;
  m.kernel = std::move(kernel);
  m.grid_size = grid;
  m.block_size = block;
  m.fibers.resize(threads);
  if (const int status = sigsetjmp(m.failure, 1)) return status;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block_index = {x, y, z};
        start_block(block);
        run_block();
      }
    }
  }
  return 0;
}

void wait(Barrier& barrier) {
  Fiber* const self = machine().current;
  barrier.waiting.push_back(self);
  if (barrier.waiting.size() == barrier.members) {
    for (Fiber* fiber : barrier.waiting) fiber->waiting = false;
    barrier.waiting.clear();
    return;
  }
  self->waiting = true;
  suspend(*self);
}

const char* exchange(const void* value, size_t bytes) {
  Machine& m = machine();
  Fiber* const self = m.current;
  char* const slots = m.slots[self->exchanges++ % 2].data() + self->warp * kLanes * kSlotBytes;
  std::memcpy(slots + self->lane * kSlotBytes, value, bytes);
  wait(m.warps[self->warp]);
  return slots;
}

void* declare_shared(size_t bytes) {
  Machine& m = machine();
  void* const array = m.shared + m.current->shared_bytes;
  m.current->shared_bytes += (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
  if (m.current->shared_bytes > kSharedBytes) fail(kTooMuchSharedMemory);
  return array;
}

void copy_later(void* target, const void* source) {
  machine().current->copies.back().push_back({target, source});
}

void commit_copies() { machine().current->copies.emplace_back(); }

void finish_copies(size_t pending_groups) {
  auto& groups = machine().current->copies;
  while (groups.size() > pending_groups + 1) {
    for (const PendingCopy& copy : groups.front()) {
      if (copy.source == nullptr) {
        std::memset(copy.target, 0, kCopyBytes);
      } else {
        std::memcpy(copy.target, copy.source, kCopyBytes);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulation

#define EMULATION_EXPORT extern "C" __attribute__((visibility("default")))

EMULATION_EXPORT void emulation_set_order(int order, unsigned seed) {
  emulation::machine().order = static_cast<emulation::Order>(order);
  emulation::machine().random.seed(seed);
}

// A buffer between two pages that nobody may touch, as close to the second as its alignment allows.
EMULATION_EXPORT void* emulation_allocate(size_t bytes) {
  using namespace emulation;
  const size_t inner = mapped_bytes(bytes), page = page_bytes();
  void* const base = mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(base) + page;
  mprotect(begin, inner, PROT_READ | PROT_WRITE);
  return begin + (inner - bytes) / kBufferAlignment * kBufferAlignment;
}

EMULATION_EXPORT void emulation_free(void* buffer, size_t bytes) {
  using namespace emulation;
  const size_t inner = mapped_bytes(bytes), page = page_bytes();
  char* const begin = static_cast<char*>(buffer) - (inner - bytes) / kBufferAlignment * kBufferAlignment;
  munmap(begin - page, inner + 2 * page);
}
