// regions.cuh - tokens that stand in regions of a grid: where a token lies, which regions are there.   Definition: src/ops/regions/mod.rs
#pragma once
#include "common.cuh"

// Row and column of token p inside its region, and the inverse: cells of cell x cell tokens in raster order, and so the tokens of a cell.
__device__ __forceinline__ constexpr int row_of(int p, int side, int cell) {
  return p / (cell * cell) / (side / cell) * cell + p % (cell * cell) / cell;
}
__device__ __forceinline__ constexpr int column_of(int p, int side, int cell) { return p / (cell * cell) % (side / cell) * cell + p % cell; }
__device__ __forceinline__ constexpr int token_of(int row, int column, int side, int cell) {
  return (row / cell * (side / cell) + column / cell) * (cell * cell) + row % cell * cell + column % cell;
}

// The regions of a grid of down x across. kept [B, K]: those that are there, in their order, null for all in raster order; places [B, L]: at which place of
// kept a region stands, K or more where it does not; hidden [B, L], or null: 1 where a region counts as 0.
struct Grid {
  int down, across, present;
  const int* kept;
  const unsigned* places;
  const float* hidden;

  // The region at place i, counted through all images.
  __device__ __forceinline__ int region(int i, unsigned* fault) const {
    const int region = kept ? kept[i] : i % present;
    return in_range(region, down * across, fault) ? region : 0;
  }
  __device__ __forceinline__ bool is_hidden(int image, int region) const { return hidden && hidden[(size_t)image * (down * across) + region] != 0.f; }
  // The place of the region at (row, column), or -1 if it is outside the grid, not there or hidden.
  __device__ __forceinline__ int place(int image, int row, int column) const {
    if (row < 0 || row >= down || column < 0 || column >= across) return -1;
    const int region = row * across + column;
    if (is_hidden(image, region)) return -1;
    if (!places) return region;
    const unsigned at = places[(size_t)image * (down * across) + region];
    return at < (unsigned)present ? (int)at : -1;
  }
};
