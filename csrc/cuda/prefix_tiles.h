// What a block of prefix_attention works on: a tile of query rows and the blocks of keys it meets. Compiled for the
// device and, by the tests, for the host.
//
// Segments that follow each other with the same parent (or none) form a run. A tile is some consecutive rows of a run,
// so it may straddle responses of one prompt. All of its rows see the parent's tokens; a row sees those of its own
// segment up to itself. The list of tiles is that of r4b_kernels/_varlen_schedule.py.

#pragma once

#include "cuda/fragments.h"

namespace r4b {

constexpr int kTileRows = 128;
constexpr int kTileKeys = 128;

// Rows [row_begin, row_end) see the keys [parent_begin, parent_end) and, causally and within their segment, [own_begin,
// own_end). `segment` is the first of their run. A list ends with empty tiles.
struct alignas(16) PrefixTile {
  int row_begin, row_end;
  int parent_begin, parent_end;
  int own_begin, own_end;
  int flags;
  int segment;
};

constexpr int kTileInts = sizeof(PrefixTile) / sizeof(int);

// Flags: rows of several segments; rows of no segment (output 0); rows of a malformed layout (output NaN).
constexpr int kStraddles = 1;
constexpr int kPadding = 4;
constexpr int kBroken = 8;

R4B_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Places in the list: every run, and the padding, adds at most one tile that is not full.
R4B_HOST_DEVICE int64_t num_slots(int64_t num_tokens, int64_t num_segments, int64_t rows) {
  return num_tokens / rows + num_segments + 2;
}

// Keys [begin, end) of one block, at most 128: the parent's or the rows' own.
struct KeyBlock {
  int begin, end;
  bool own;
};

R4B_HOST_DEVICE int parent_blocks(const PrefixTile& tile) {
  return ceil_div(tile.parent_end - tile.parent_begin, kTileKeys);
}

R4B_HOST_DEVICE int key_blocks(const PrefixTile& tile) {
  return parent_blocks(tile) + ceil_div(tile.own_end - tile.own_begin, kTileKeys);
}

// Block `index` of key_blocks(tile): the parent's come first.
R4B_HOST_DEVICE KeyBlock key_block(const PrefixTile& tile, int index) {
  int before = parent_blocks(tile);
  bool own = index >= before;
  int begin = own ? tile.own_begin + (index - before) * kTileKeys : tile.parent_begin + index * kTileKeys;
  int stop = own ? tile.own_end : tile.parent_end;
  return {begin, begin + kTileKeys < stop ? begin + kTileKeys : stop, own};
}

// Whether a row of [first_row, ...) may not see a key of the block's 128.
R4B_HOST_DEVICE bool needs_mask(const PrefixTile& tile, const KeyBlock& block, int first_row) {
  if (!block.own) return block.end - block.begin < kTileKeys;
  return (tile.flags & kStraddles) != 0 || block.begin + kTileKeys - 1 > first_row;
}

// The keys a row sees in a block are those with key - first <= last - first as unsigned numbers.
struct Visible {
  int first, last;
};

// `segment_begin` is that of the row's segment. Rows beyond the tile see themselves: nothing of them is stored.
R4B_HOST_DEVICE Visible visible(const KeyBlock& block, int row, int segment_begin) {
  return block.own ? Visible{segment_begin, row} : Visible{block.begin, block.end - 1};
}

R4B_HOST_DEVICE bool sees(const Visible& range, int key) {
  return static_cast<unsigned>(key - range.first) <= static_cast<unsigned>(range.last - range.first);
}

// Where the segment of a row of the tile begins.
R4B_HOST_DEVICE int segment_begin(const PrefixTile& tile, const int* offsets, int num_segments, int row) {
  if (row >= tile.row_end) return row;
  if ((tile.flags & kStraddles) == 0) return tile.own_begin;
  int low = tile.segment, high = num_segments - 1;  // the last segment that begins at the row or before it
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (offsets[middle] <= row) low = middle;
    else high = middle - 1;
  }
  return offsets[low];
}

}  // namespace r4b
