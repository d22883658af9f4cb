// Runs CUDA device code on a CPU: a fiber per thread, one block at a time, so that the very kernels are tested without
// a GPU. Force-included before a source of csrc/cuda; cuda/hopper.cuh beside this file replaces the one it includes.
//
// What an asynchronous engine does, it does at once, or as late as can be and then in an order to choose: `patience`.
// Fibers run in rising, falling or erratic order: `order`. Results must not depend on either. A block in which nothing
// can go on is a deadlock.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

enum class Patience { kNone, kOldestFirst, kNewestFirst, kRandom };
inline Patience patience = Patience::kOldestFirst;
enum class Order { kRising, kFalling, kErratic };
inline Order order = Order::kRising;
inline std::string failure;

constexpr size_t kStack = 64 * 1024;

inline uint32_t random_number() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::function<bool()> ready;  // empty: can run
  bool done = false;
  std::array<unsigned, 3> calls{};  // of warp exchanges, block votes and products
};

inline std::vector<Fiber> fibers;
inline unsigned current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::deque<std::function<void()>> late;  // what an asynchronous engine still has to do

inline Fiber& self() { return fibers[current]; }

inline void yield() {
  ucontext_t* context = &self().context;
  swapcontext(context, &scheduler);
}

[[noreturn]] inline void fail(const std::string& reason) {
  if (failure.empty()) {
    failure = reason + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
  }
  for (;;) yield();
}

inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  self().ready = std::move(ready);
  yield();
}

// Work of an engine beside the threads.
inline void asynchronously(std::function<void()> work) {
  if (patience == Patience::kNone) work();
  else late.push_back(std::move(work));
}

inline void do_late_work() {
  const size_t place = patience == Patience::kNewestFirst ? late.size() - 1
                       : patience == Patience::kRandom    ? random_number() % late.size()
                                                          : 0;
  const auto work = std::move(late[place]);
  late.erase(late.begin() + static_cast<std::ptrdiff_t>(place));
  work();
}

// Barriers by number; barrier 0 is __syncthreads().
struct NamedBarrier {
  int arrived = 0;
  unsigned generation = 0;
};
inline std::array<NamedBarrier, 16> named_barriers;

inline void arrive(int number, int threads, bool wait) {
  NamedBarrier& barrier = named_barriers.at(number);
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else if (wait) {
    wait_until([&barrier, generation] { return barrier.generation != generation; });
  }
}

// All-to-all within a group of threads. Two slots: who is in call n + 2 knows that everyone has read call n.
struct Exchange {
  std::array<std::vector<uint64_t>, 2> values;
  std::array<unsigned, 2> arrived{}, rounds{};
};
inline std::map<unsigned, Exchange> warps;
inline Exchange whole_block;

inline const std::vector<uint64_t>& exchange(
    Exchange& group, unsigned size, unsigned member, unsigned call, uint64_t x) {
  const unsigned slot = call % 2, round = call / 2 + 1;
  group.values[slot].resize(size);
  group.values[slot][member] = x;
  if (++group.arrived[slot] == size) {
    group.arrived[slot] = 0;
    ++group.rounds[slot];
  }
  wait_until([&group, slot, round] { return group.rounds[slot] >= round; });
  return group.values[slot];
}

inline const std::vector<uint64_t>& exchange_in_warp(uint64_t x) {
  const unsigned thread = threadIdx.x;
  return exchange(warps[thread / 32], 32, thread % 32, self().calls[0]++, x);
}

template <class T>
T take(const std::vector<uint64_t>& values, unsigned lane) {
  T result;
  std::memcpy(&result, &values[lane], sizeof(T));
  return result;
}

template <class T>
uint64_t bits(T value) {
  uint64_t result = 0;
  std::memcpy(&result, &value, sizeof(T));
  return result;
}

inline std::vector<std::function<void()>> at_block_start;  // what other headers reset

inline void start_fiber() {
  body();
  self().done = true;
  for (;;) yield();
}

inline void run_block() {
  fibers.clear();
  fibers.resize(blockDim.x);
  late.clear();
  named_barriers = {};
  warps.clear();
  whole_block = {};
  for (auto& reset : at_block_start) reset();
  for (Fiber& fiber : fibers) {
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, start_fiber, 0);
  }
  unsigned alive = blockDim.x, held = 0;
  for (unsigned pass = 0; alive > 0 && failure.empty(); ++pass) {
    bool progress = false;
    if (pass % 256 == 0) held = random_number() % (blockDim.x / 32);  // a warp that is held back, if order is erratic
    for (unsigned i = 0; i < blockDim.x && failure.empty(); ++i) {
      current = order == Order::kFalling ? blockDim.x - 1 - i : i;
      Fiber& fiber = self();
      threadIdx.x = current;
      if (fiber.done || (fiber.ready && !fiber.ready())) continue;
      progress = true;
      if (order == Order::kErratic && (current / 32 == held || random_number() % 2 != 0)) continue;
      fiber.ready = nullptr;
      swapcontext(&scheduler, &fiber.context);
      if (fiber.done) --alive;
    }
    if (progress) continue;
    if (late.empty()) failure = "deadlock in block " + std::to_string(blockIdx.x);
    else do_late_work();
  }
}

// A launch; empty, or what went wrong.
inline const char* launch(dim3 grid, unsigned threads, std::function<void()> kernel) {
  failure.clear();
  body = std::move(kernel);
  gridDim = grid;
  blockDim = {threads};
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x && failure.empty(); ++x) {
      blockIdx = {x, y};
      run_block();
    }
  }
  return failure.c_str();
}

}  // namespace emulator

inline void __syncthreads() { emulator::arrive(0, static_cast<int>(blockDim.x), true); }

inline int __syncthreads_or(int value) {
  const unsigned thread = threadIdx.x;
  const auto& values = emulator::exchange(
      emulator::whole_block, blockDim.x, thread, emulator::self().calls[1]++, static_cast<uint64_t>(value != 0));
  return std::any_of(values.begin(), values.end(), [](uint64_t x) { return x != 0; });
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::take<T>(emulator::exchange_in_warp(emulator::bits(value)), lane);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::take<T>(emulator::exchange_in_warp(emulator::bits(value)), lane ^ step);
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::take<T>(emulator::exchange_in_warp(emulator::bits(value)), lane >= step ? lane - step : lane);
}

inline unsigned __ballot_sync(unsigned, bool value) {
  const auto& values = emulator::exchange_in_warp(value);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(values[lane]) << lane;
  return votes;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

inline void __threadfence() {}
inline void __trap() { emulator::fail("a trap"); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
using std::min;
