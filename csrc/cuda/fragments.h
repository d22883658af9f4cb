// Where things lie in a wgmma: index maps, compiled for the device and, by the tests, for the host.
//
// Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions": register fragments of
// wgmma .m64nNk16, matrix descriptor format, shared memory layouts with 128-byte swizzling.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define R4B_HOST_DEVICE __host__ __device__ constexpr
#else
#define R4B_HOST_DEVICE constexpr
#endif

namespace r4b {

// A tile in shared memory is a row of panels; a panel is rows x 64 bfloat16, so a row is one 128-byte swizzle line.
constexpr int kPanelColumns = 64;
constexpr int kPanelLine = 128;     // bytes
constexpr int kSwizzleAtom = 1024;  // bytes: eight lines, after which the swizzle repeats

// Row and column of accumulator register i of a thread (0..127) of the warpgroup, for any N.
R4B_HOST_DEVICE int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
R4B_HOST_DEVICE int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The accumulator of a 64 x N product, rounded to bfloat16 pairs, is the A operand of the next: register r (0..3) of
// k-step s holds the accumulator registers 8 s + 2 r and the one after it.
R4B_HOST_DEVICE int operand_source(int step, int r) { return 8 * step + 2 * r; }

// Matrix descriptor for a place `offset` bytes into a tile with 128-byte swizzling: start address, leading and stride
// byte offsets in units of 16 bytes at bits 0, 16 and 32, layout type 1 at bit 62; base offset 0, because panels begin
// at a multiple of 1024 bytes. The lower half is a sum, so that offsets known to the compiler cost one addition.
R4B_HOST_DEVICE uint64_t descriptor(uint32_t tile, uint32_t offset, uint32_t leading, uint32_t stride) {
  return uint64_t{(1u << 30) | (stride >> 4)} << 32 | uint64_t{(tile >> 4) + ((leading >> 4 << 16) + (offset >> 4))};
}

// K-major operand, 16 columns from `column` (Q and K of the scores): rows step by lines, eight rows are an atom. The
// leading offset has no meaning when 16 columns lie within a line. `first_row` is a multiple of 8.
R4B_HOST_DEVICE uint64_t k_major(uint32_t tile, int rows, int first_row, int column) {
  const int panel = column / kPanelColumns * rows * kPanelLine;
  return descriptor(tile + first_row * kPanelLine, panel + column % kPanelColumns * 2, 16, kSwizzleAtom);
}

// MN-major ("transposed") operand, 16 rows from `row` (V: its rows are the reduction): 64 columns lie in a line, the
// next 64 a panel further; eight rows are an atom.
R4B_HOST_DEVICE uint64_t mn_major(uint32_t tile, int rows, int row) {
  return descriptor(tile, row * kPanelLine, rows * kPanelLine, kSwizzleAtom);
}

}  // namespace r4b
