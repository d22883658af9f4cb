// csrc/cuda/hopper.cuh on a CPU: shared memory is an array of bytes, and mbarriers, TMA and wgmma do what the PTX ISA
// says, from its tables and not from csrc/cuda/fragments.h.
//
// A product in flight has NaN in its accumulators, and reads its operands, shared memory and registers, as late as its
// engine does it: whoever uses a result too early, or an operand's place again, is seen.

#pragma once

#include "emulator.h"

namespace r4b {

struct TensorMap {
  const uint16_t* data;
  int64_t sizes[3], strides[3];  // innermost first; in elements
};

namespace engine {

using emulator::fail;

constexpr uint32_t kBase = 1024;
inline std::vector<unsigned char> shared;
inline uint32_t limit;  // first address that the kernel may not use

struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void complete() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    phase ^= 1;
  }
};
inline std::map<uint32_t, Barrier> barriers;

inline Barrier& barrier_at(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("an mbarrier that is not initialised");
  return found->second;
}

// One product of a warpgroup.
struct Product {
  uint64_t a = 0, b = 0;
  std::array<const uint32_t*, 128> a_registers{};
  std::array<float*, 128> d{};
  int columns = 0, issued = 0;
  bool accumulate = false, executed = false;
};

struct Shadow {
  std::vector<float> values;
  int pending = 0;
};

struct Warpgroup {
  std::deque<Product> products;
  std::array<std::vector<unsigned>, 128> committed;  // per thread: products issued before each commit
  std::array<std::map<float*, Shadow>, 128> shadows;
};
inline std::map<unsigned, Warpgroup> warpgroups;

inline void reset() {
  shared.assign(1 << 18, 0xff);
  barriers.clear();
  warpgroups.clear();
}
inline const bool registered = (emulator::at_block_start.push_back(reset), true);

inline float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t round(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Swizzle mode 128B: bits 4..6 of an address are xored with bits 7..9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline float element(uint32_t address) {
  if (address < kBase || address + 2 > limit) fail("a product reads outside of shared memory");
  uint16_t half;
  std::memcpy(&half, &shared[swizzled(address)], 2);
  return widen(half);
}

struct Descriptor {
  uint32_t start, leading, stride;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1 || (bits >> 49 & 7) != 0) fail("a descriptor that is not of 128-byte swizzling, base offset 0");
  }
  // K-major: 8 x 64 atoms of lines of 128 bytes, `stride` apart along M or N.
  float k_major(int row, int k) const { return element(start + row / 8 * stride + row % 8 * 128 + k * 2); }
  // MN-major: lines of 64 columns; 8 lines `stride` apart along K, 64 columns `leading` apart along N.
  float mn_major(int column, int k) const {
    return element(start + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }
};

inline void execute(Warpgroup& group, Product& product) {
  if (product.executed) return;
  product.executed = true;
  const int n = product.columns;
  std::vector<float> a(64 * 16), b(16 * n), d(64 * n, 0.0f);
  const bool from_registers = product.a_registers[0] != nullptr;
  const Descriptor b_descriptor(product.b);
  if (from_registers) {
    for (int thread = 0; thread < 128; ++thread) {
      for (int r = 0; r < 4; ++r) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + (r & 1) * 8, k = thread % 4 * 2 + (r >> 1) * 8;
        a[row * 16 + k] = widen(static_cast<uint16_t>(product.a_registers[thread][r]));
        a[row * 16 + k + 1] = widen(static_cast<uint16_t>(product.a_registers[thread][r] >> 16));
      }
    }
  } else {
    const Descriptor a_descriptor(product.a);
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < 16; ++k) a[row * 16 + k] = a_descriptor.k_major(row, k);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < n; ++j) {
      b[k * n + j] = from_registers ? b_descriptor.mn_major(j, k) : b_descriptor.k_major(j, k);
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < n; ++j) d[row * n + j] += a[row * 16 + k] * b[k * n + j];
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    Shadow& shadow = group.shadows[thread].at(product.d[thread]);
    for (int i = 0; i < n / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      shadow.values[i] = (product.accumulate ? shadow.values[i] : 0.0f) + d[row * n + column];
    }
    --shadow.pending;
  }
}

inline Warpgroup& warpgroup() { return warpgroups[threadIdx.x / 128]; }

inline void issue(float* d, int columns, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate) {
  Warpgroup& group = warpgroup();
  const unsigned member = threadIdx.x % 128, index = emulator::self().calls[2]++;
  if (group.products.size() <= index) group.products.resize(index + 1);
  Product& product = group.products[index];
  if (product.issued > 0 && (product.a != a || product.b != b || product.columns != columns)) {
    fail("the threads of a warpgroup issue different products");
  }
  product.a = a;
  product.b = b;
  product.columns = columns;
  product.accumulate = accumulate;
  product.d[member] = d;
  product.a_registers[member] = a_registers;
  auto [shadow, fresh] = group.shadows[member].try_emplace(d);
  if (fresh) {
    shadow->second.values.assign(d, d + columns / 2);
    std::fill(d, d + columns / 2, std::nanf(""));
  }
  ++shadow->second.pending;
  if (++product.issued < 128) return;
  // A warpgroup's products are done in order.
  emulator::asynchronously([&group, index] {
    for (unsigned i = 0; i <= index; ++i) execute(group, group.products[i]);
  });
}

inline void wait_for_products(unsigned allowed) {
  Warpgroup& group = warpgroup();
  const unsigned member = threadIdx.x % 128;
  const auto& commits = group.committed[member];
  if (commits.size() > allowed) {
    const unsigned stop = commits[commits.size() - 1 - allowed];
    emulator::wait_until([&group, stop] { return group.products[stop - 1].executed; });
  }
  for (auto shadow = group.shadows[member].begin(); shadow != group.shadows[member].end();) {
    if (shadow->second.pending > 0) {
      ++shadow;
      continue;
    }
    std::copy(shadow->second.values.begin(), shadow->second.values.end(), shadow->first);
    shadow = group.shadows[member].erase(shadow);
  }
}

}  // namespace engine

inline uint32_t dynamic_shared() { return engine::kBase; }

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  if (barrier % 8 != 0 || barrier + 8 > engine::limit) engine::fail("an mbarrier outside of shared memory");
  engine::barriers[barrier] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}
inline void barrier_init_fence() {}

inline void barrier_arrive(uint32_t address) {
  engine::Barrier& barrier = engine::barrier_at(address);
  if (barrier.pending == 0) engine::fail("more arrivals at an mbarrier than it expects");
  --barrier.pending;
  barrier.complete();
}

inline void barrier_arrive_expecting(uint32_t address, uint32_t bytes) {
  engine::barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}

inline void barrier_wait(uint32_t address, uint32_t parity) {
  const engine::Barrier& barrier = engine::barrier_at(address);
  emulator::wait_until([&barrier, parity] { return barrier.phase != parity; });
}

inline void tma_prefetch_map(const TensorMap*) {}

inline void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
  if (destination % 1024 != 0 || destination + 128 * 128 > engine::limit) engine::fail("a TMA load to a wrong place");
  emulator::asynchronously([=, map = *map] {
    for (int row = 0; row < 128; ++row) {
      for (int column = 0; column < 64; ++column) {
        const int64_t at[3] = {x + column, y, z + row};
        bool inside = true;
        for (int i = 0; i < 3; ++i) inside &= at[i] >= 0 && at[i] < map.sizes[i];
        const uint16_t value =
            inside ? map.data[at[0] * map.strides[0] + at[1] * map.strides[1] + at[2] * map.strides[2]] : 0;
        std::memcpy(&engine::shared[engine::swizzled(destination + row * 128 + column * 2)], &value, 2);
      }
    }
    engine::Barrier& full = engine::barriers.at(barrier);
    full.bytes -= 128 * 128;
    full.complete();
  });
}

inline void async_proxy_fence() {}
inline void shared_zero(uint32_t address) {
  if (address % 16 != 0 || address + 16 > engine::limit) engine::fail("a store outside of shared memory");
  std::memset(&engine::shared[address], 0, 16);
}

inline void named_barrier_sync(int barrier, int threads) { emulator::arrive(barrier, threads, true); }
inline void named_barrier_arrive(int barrier, int threads) { emulator::arrive(barrier, threads, false); }

template <int kRegisters>
void registers_raise() {}
template <int kRegisters>
void registers_lower() {}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  engine::warpgroup().committed[threadIdx.x % 128].push_back(emulator::self().calls[2]);
}
template <int kPending>
void wgmma_wait() {
  engine::wait_for_products(kPending);
}
template <class Registers>
void hold(Registers&) {}

inline void wgmma_ss(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  engine::issue(d, 128, nullptr, a, b, accumulate);
}
template <int kCount>
void wgmma_rs(float (&d)[kCount], const uint32_t* a, uint64_t b) {
  engine::issue(d, 2 * kCount, a, 0, b, true);
}

inline uint32_t bfloat16_pair(float lower, float upper) {
  return engine::round(lower) | static_cast<uint32_t>(engine::round(upper)) << 16;
}
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace r4b
