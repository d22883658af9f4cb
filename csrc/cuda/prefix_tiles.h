// What a block of prefix_attention works on: a tile of query rows and the blocks of keys it meets. Compiled for the
// device and, by the tests, for the host.
//
// Segments that follow each other with the same parent form a run; a segment without a parent is a run by itself. A tile
// is 128 consecutive rows of a run (its last tile may be shorter), so it may straddle responses of one prompt. All of
// its rows see the parent's tokens; a row sees those of its own segment up to itself.

#pragma once

#include "cuda/fragments.h"

namespace r4b {

constexpr int kTileRows = 128;
constexpr int kTileKeys = 128;

// Rows [row_begin, row_end) lie in the segments [first_segment, end_segment) and see the keys [parent_begin, parent_end)
// and, causally and within their segment, [own_begin, row_end). No keys: the rows are padding. Malformed: they are NaN.
struct alignas(16) PrefixTile {
  int row_begin, row_end;
  int first_segment, end_segment;
  int parent_begin, parent_end;
  int own_begin;
  int malformed;
};

constexpr int kTileInts = sizeof(PrefixTile) / sizeof(int);

R4B_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// No layout of S segments over T tokens has more tiles: every run, and the padding, adds at most one that is not full.
R4B_HOST_DEVICE int64_t most_tiles(int64_t num_tokens, int64_t num_segments) {
  return (num_tokens + kTileRows - 1) / kTileRows + num_segments + 1;
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
  return parent_blocks(tile) + ceil_div(tile.row_end - tile.own_begin, kTileKeys);
}

// Block `index` of key_blocks(tile): the parent's come first.
R4B_HOST_DEVICE KeyBlock key_block(const PrefixTile& tile, int index) {
  int before = parent_blocks(tile);
  bool own = index >= before;
  int begin = own ? tile.own_begin + (index - before) * kTileKeys : tile.parent_begin + index * kTileKeys;
  int stop = own ? tile.row_end : tile.parent_end;
  return {begin, begin + kTileKeys < stop ? begin + kTileKeys : stop, own};
}

// Whether a row of [first_row, ...) may not see a key of the block's 128.
R4B_HOST_DEVICE bool needs_mask(const PrefixTile& tile, const KeyBlock& block, int first_row) {
  if (!block.own) return block.end - block.begin < kTileKeys;
  return tile.end_segment - tile.first_segment > 1 || block.begin + kTileKeys - 1 > first_row;
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
R4B_HOST_DEVICE int segment_begin(const PrefixTile& tile, const int* offsets, int row) {
  if (row >= tile.row_end) return row;
  int segment = tile.first_segment;
  while (segment + 1 < tile.end_segment && offsets[segment + 1] <= row) ++segment;
  return offsets[segment];
}

}  // namespace r4b
