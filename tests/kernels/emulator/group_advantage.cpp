// csrc/cuda/group_advantage.cu for ctypes.

#include "cuda/group_advantage.cu"

extern "C" const char* group_advantage(
    const void* rewards, int wide_rewards, const void* group_offsets, const void* mode, const void* token_offsets,
    int wide_integers, int64_t rows, int64_t groups, int64_t tokens, int baseline, int std, double eps,
    float* advantage, float* token_advantage, bool* live, int* live_rows, int* num_live, int shares, int order) {
  emulator::order = static_cast<emulator::Order>(order);
  const bool wide = wide_integers != 0;
  *num_live = 0;
  const r4b::Arguments args{
      rewards, wide_rewards != 0, {group_offsets, wide}, {mode, wide}, {token_offsets, wide}, rows, groups, tokens,
      static_cast<r4b::Baseline>(baseline), std != 0, eps, advantage, token_advantage, live, live_rows, num_live};
  const unsigned blocks = groups > 0 ? static_cast<unsigned>(groups) : 1;
  return emulator::launch({blocks, static_cast<unsigned>(shares)}, r4b::kThreads, [&] { r4b::advantages(args); });
}
