// csrc/cuda/prefix_attention.cu for ctypes.

#include "cuda/prefix_attention.cu"

namespace {

template <int kHeadDim>
const char* run(const r4b::TensorMap (&maps)[3], const r4b::Arguments& args, int blocks) {
  r4b::engine::limit = r4b::engine::kBase + r4b::Shared<kHeadDim>::kBytes;
  return emulator::launch({static_cast<unsigned>(blocks)}, r4b::kThreads, [&] {
    r4b::attention_forward<kHeadDim>(maps[0], maps[1], maps[2], args);
  });
}

}  // namespace

// bfloat16 as bits, all contiguous; an empty string, or what went wrong.
extern "C" const char* prefix_attention(
    const uint16_t* q, const uint16_t* k, const uint16_t* v, const int* offsets, const int* tiles, uint16_t* out,
    float* lse, int tokens, int heads, int key_heads, int head_dim, int segments, int slots, float scale, int blocks,
    int patience, int order) {
  emulator::patience = static_cast<emulator::Patience>(patience);
  emulator::order = static_cast<emulator::Order>(order);
  const auto map = [&](const uint16_t* data, int count) {
    return r4b::TensorMap{data, {head_dim, count, tokens}, {1, head_dim, static_cast<int64_t>(count) * head_dim}};
  };
  const r4b::TensorMap maps[3] = {map(q, heads), map(k, key_heads), map(v, key_heads)};
  std::vector<r4b::PrefixTile> list(slots);
  std::memcpy(list.data(), tiles, list.size() * sizeof(r4b::PrefixTile));
  const r4b::Arguments args{list.data(), offsets, out, lse, slots, segments, heads, heads / key_heads, scale};
  return head_dim == 64 ? run<64>(maps, args, blocks) : run<128>(maps, args, blocks);
}
