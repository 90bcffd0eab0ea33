#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_runtime.h"

cuda_on_cpu::Index threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 << 10;  // bytes: pages that are not touched cost nothing

[[noreturn]] void undefined(const char* what) {
  std::fprintf(
      stderr, "CUDA on a CPU: %s, in block (%u, %u) of (%u, %u), %u x %u threads\n", what, blockIdx.x, blockIdx.y,
      gridDim.x, gridDim.y, blockDim.x, blockDim.y);
  std::abort();
}

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber;

struct Thread {
  Index index;
  State state;
  unsigned shuffles;  // how many it has done
  int offset;         // of the last
  Fiber* fiber;
};

// A stack on which threads run, one after the other: a thread that never waits leaves it to the next.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  void* stack;

  Fiber() {
    stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) undefined("no memory for a stack");
  }
};

std::array<Thread, kMostThreads> threads;
std::array<float, kMostThreads> given[2];  // to a shuffle: successive ones use different pieces
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
const std::function<void()>* body;
Thread* running;
jmp_buf scheduler;
std::mt19937 generator{0};
std::mutex device;  // one kernel runs at a time

void fiber_loop() {
  for (;;) {
    (*body)();
    running->state = State::kDone;
    if (_setjmp(running->fiber->place) == 0) _longjmp(scheduler, 1);
  }
}

// Runs a thread until it waits or ends.
void resume(Thread& thread) {
  if (thread.fiber == nullptr) {
    if (idle.empty()) {
      fibers.push_back(std::make_unique<Fiber>());
      idle.push_back(fibers.back().get());
    }
    thread.fiber = idle.back();
    idle.pop_back();
  }
  running = &thread;
  threadIdx = thread.index;
  Fiber& fiber = *thread.fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_loop, 0);
    setcontext(&fiber.context);
  }
  if (running->state == State::kDone) {
    idle.push_back(running->fiber);
    running->fiber = nullptr;
  }
}

void wait(State state) {
  running->state = state;
  if (_setjmp(running->fiber->place) == 0) _longjmp(scheduler, 1);
}

void run_block(unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    threads[i] = {{i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y}, State::kReady, 0, 0, nullptr};
  }
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  const auto all_at = [&](unsigned begin, unsigned end, State state) {
    for (unsigned i = begin; i < end; ++i)
      if (threads[i].state != state) return false;
    return true;
  };
  const auto release = [&](unsigned begin, unsigned end) {
    for (unsigned i = begin; i < end; ++i) threads[i].state = State::kReady;
  };
  // Some warps run ahead of the others, for a while: so far that they meet what is still in use.
  std::array<bool, kMostThreads / kWarp> ahead{};
  for (int passes = 0; !all_at(0, count, State::kDone); --passes) {
    std::shuffle(order.begin(), order.end(), generator);
    bool moved = false;
    for (const bool everybody : {false, true}) {
      for (const unsigned i : order) {
        if (threads[i].state != State::kReady || !(everybody || ahead[i / kWarp])) continue;
        resume(threads[i]);
        moved = true;
      }
      if (moved) break;
    }
    if (passes <= 0) {
      passes = static_cast<int>(generator() % 64);
      for (bool& warp : ahead) warp = generator() % 2 == 0;
    }
    for (unsigned warp = 0; warp + kWarp <= count; warp += kWarp) {
      if (!all_at(warp, warp + kWarp, State::kAtWarp)) continue;
      for (unsigned i = warp; i < warp + kWarp; ++i)
        if (threads[i].offset != threads[warp].offset) undefined("lanes of a warp are at different shuffles");
      release(warp, warp + kWarp);
    }
    if (all_at(0, count, State::kAtBlock)) release(0, count);
    if (!moved) undefined("threads wait for others that don't come");
  }
}

}  // namespace

void wait_for_block() { wait(State::kAtBlock); }

float from_lane(float mine, int offset) {
  const auto number = static_cast<unsigned>(running - threads.data());
  auto& values = given[running->shuffles++ % 2];
  values[number] = mine;
  running->offset = offset;
  wait(State::kAtWarp);
  return values[number ^ static_cast<unsigned>(offset)];
}

Launch::Launch(dim3 blocks, dim3 threads, size_t, void*) : blocks_(blocks), threads_(threads) {}

void Launch::run_threads(const std::function<void()>& thread) const {
  const std::lock_guard<std::mutex> guard(device);
  gridDim = blocks_;
  blockDim = threads_;
  const unsigned count = threads_.x * threads_.y * threads_.z;
  if (count == 0 || count > kMostThreads) undefined("a block has 1 to 1024 threads");
  if (blocks_.x == 0 || blocks_.y == 0 || blocks_.z != 1 || blocks_.x > 0x7FFFFFFF || blocks_.y > 65535) {
    undefined("no grid has so many blocks");
  }
  body = &thread;
  std::vector<uint64_t> order(uint64_t{blocks_.x} * blocks_.y);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), generator);
  for (const uint64_t block : order) {
    blockIdx = {static_cast<unsigned>(block % blocks_.x), static_cast<unsigned>(block / blocks_.x), 0};
    run_block(count);
  }
}

}  // namespace cuda_on_cpu

// What torch's headers ask of a torch with CUDA.
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}
}
