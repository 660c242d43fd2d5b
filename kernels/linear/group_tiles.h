// Products with grouped weights on the byte tiles of Intel AMX, for sixteen rows at a time: the same
// integers as by dot products of bytes, scaled and added up in the same order, so the same bits.
#pragma once

#include "../native/tiles.h"
#include "group_kernel.h"

namespace aerie {

#if AERIE_HAS_AMX

// One group of a panel for sixteen rows. Tiles: 0 and 1 sum the products of the upper and the lower
// bytes, 2 and 3 hold these bytes of the inputs, 4 the codes, a quad of sixteen outputs per row.
template <class Kind, int Bytes>
struct TileGroup {
  alignas(64) int32_t high[kTileRows][kPanel];
  alignas(64) int32_t low[Bytes == 2 ? kTileRows : 1][kPanel];

  void multiply(const uint8_t* group, const GroupInputs& x, int64_t row, int64_t g) {
    const int64_t at = row * x.K + g * Kind::kGroup;
    load_codes(group);
    _tile_zero(0);
    _tile_loadd(2, x.high + at, x.K);
    _tile_dpbsud(0, 2, 4);
    _tile_stored(0, high, kLine);
    if constexpr (Bytes == 2) {
      _tile_zero(1);
      _tile_loadd(3, x.low + at, x.K);
      _tile_dpbsud(1, 3, 4);
      _tile_stored(1, low, kLine);
    }
  }

  AERIE_INLINE I16 total(int row) const {
    const I16 upper = load_line(reinterpret_cast<const uint8_t*>(high[row]));
    if constexpr (Bytes == 1) return upper;
    I16 sum = load_line(reinterpret_cast<const uint8_t*>(low[row]));
    AERIE_EACH_PART sum.part[i] += upper.part[i] << 8;
    return sum;
  }

 private:
  static void load_codes(const uint8_t* group) {
    if constexpr (Kind::kBits == 8) {
      _tile_loadd(4, group, kLine);
      return;
    }
    alignas(64) uint8_t codes[Kind::kQuads * kLine];
    AERIE_UNROLL for (int j = 0; j < Kind::kLines; ++j) {
      const I16 line = load_line(group + j * kLine);
      store_line(codes + j * kLine, lower_codes(line));
      store_line(codes + (j + Kind::kLines) * kLine, upper_codes(line));
    }
    _tile_loadd(4, codes, kLine);
  }
};

template <class Kind>
void configure_group_tiles() {
  TileConfig config;
  for (int t = 0; t < 5; ++t) {
    config.rows[t] = t == 4 ? Kind::kQuads : kTileRows;
    config.column_bytes[t] = t == 2 || t == 3 ? Kind::kGroup : kLine;
  }
  _tile_loadconfig(&config);
}

// Multiply sixteen rows from `row` on by one panel. While the tiles multiply one group, the products
// of the group before are scaled.
template <class Kind, int Bytes>
void multiply_panel_on_tiles(const GroupProduct& p, int64_t row, int64_t panel) {
  const uint8_t* group = p.weight + panel * Kind::panel_bytes(p.shape.K);
  TileGroup<Kind, Bytes> products[2];
  ScaledSums<Kind, kTileRows> sums{};
  products[0].multiply(group, p.x, row, 0);
  for (int64_t g = 0; g < p.x.groups; ++g, group += Kind::kBytes) {
    if (g + 1 < p.x.groups) products[(g + 1) % 2].multiply(group + Kind::kBytes, p.x, row, g + 1);
    const TileGroup<Kind, Bytes>& own = products[g % 2];
    const int64_t at = row * p.x.groups + g;
    sums.add(group, p.x, at, [&](int r) {
      I16 total = own.total(r);
      AERIE_EACH_PART total.part[i] -= Kind::kZero * p.x.sums[at + r * p.x.groups];
      return total;
    });
  }
  sums.write(p, row, panel);
}

// Multiply whole blocks of sixteen rows by the panels first .. last-1; returns how many rows.
template <class Kind, int Bytes>
int64_t multiply_on_tiles(const GroupProduct& p, int64_t first, int64_t last) {
  const int64_t rows = p.shape.M / kTileRows * kTileRows;
  if (rows == 0 || !amx_permitted()) return 0;
  configure_group_tiles<Kind>();
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t row = 0; row < rows; row += kTileRows) multiply_panel_on_tiles<Kind, Bytes>(p, row, panel);
  _tile_release();
  return rows;
}

#endif

}  // namespace aerie
