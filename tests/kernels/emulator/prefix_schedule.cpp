// csrc/cuda/prefix_schedule.cu for ctypes.

#include "cuda/prefix_schedule.cu"

namespace {

constexpr int kThreads = 64;  // few, so that the loops over segments and tiles take several turns

}

extern "C" int num_slots(int tokens, int segments, int rows) {
  return static_cast<int>(r4b::num_slots(tokens, segments, rows));
}

extern "C" const char* prefix_schedule(
    const int* offsets, const int* parent, int segments, int tokens, int rows, int* tiles, int order) {
  emulator::order = static_cast<emulator::Order>(order);
  const int slots = num_slots(tokens, segments, rows);
  std::vector<r4b::PrefixTile> list(slots);
  std::memset(static_cast<void*>(list.data()), 0x55, list.size() * sizeof(r4b::PrefixTile));
  std::vector<int> scratch(2 * (segments + 1) + (1 + r4b::kTileInts) * slots, 0x55555555);
  const char* failure = emulator::launch({1}, kThreads, [&] {
    r4b::build_schedule<kThreads>({offsets, parent, segments, tokens}, rows, slots, list.data(), scratch.data());
  });
  std::memcpy(tiles, list.data(), list.size() * sizeof(r4b::PrefixTile));
  return failure;
}
