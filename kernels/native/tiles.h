// The tile registers of Intel AMX: eight matrices of sixteen rows of 64 bytes. With AERIE_SOFTWARE_TILES
// plain C++ takes their place, bit for bit for bytes, so that tests reach this code on any CPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define AERIE_HAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(AERIE_SOFTWARE_TILES) && defined(__AVX512F__)
#define AERIE_HAS_AMX 1
#include "software_tiles.h"
#else
#define AERIE_HAS_AMX 0
#endif

namespace aerie {

#if AERIE_HAS_AMX

// Linux grants the tile registers to a process on request (Documentation/arch/x86/xstate.rst).
inline bool amx_permitted() {
#if defined(AERIE_SOFTWARE_TILES)
  return true;
#else
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#endif
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

#endif

}  // namespace aerie
