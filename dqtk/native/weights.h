// Stored weights and how a row of them becomes small integers. numerics/packing.py draws the plane layouts.
#pragma once

#include "base.h"

namespace dqtk {

// A stored integer weight [n, k]. ``bits`` 0: int8 as it is; else codes of so many bits, signed ones with an offset.
struct Weight {
    const void* codes;
    int64_t stride;  // bytes per row
    int64_t n, k;
    int32_t bits;
    int32_t is_signed;
    const uint8_t* group_scale;  // of two-level groups [n, k / group_size], or null
    int64_t group_size;
};

// Eight codes of ``bits`` bits from ``bits`` bytes, one code per byte of the result.
template <int BITS>
inline uint64_t eight_codes(const uint8_t* in) {
    uint64_t codes = 0;
    int low = 0;
    if constexpr (BITS & 4) {
        uint32_t word;
        std::memcpy(&word, in, 4);
        codes = (uint64_t(word) & 0x0f0f0f0full) | (uint64_t(word) >> 4 & 0x0f0f0f0full) << 32;
        in += 4, low += 4;
    }
    if constexpr (BITS & 2) {
        uint16_t half;
        std::memcpy(&half, in, 2);
        const uint64_t word = half;
        codes |= ((word & 0x0303) | (word >> 2 & 0x0303) << 16 | (word >> 4 & 0x0303) << 32 | (word >> 6 & 0x0303) << 48) << low;
        in += 2, low += 2;
    }
    if constexpr (BITS & 1) {
        const uint64_t bit = (uint64_t(*in) * 0x0101010101010101ull) & 0x8040201008040201ull;  // byte j keeps bit j
        codes |= ((bit + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull) << low;
    }
    return codes;
}

// Rows are padded to a multiple of eight codes, so ``out`` needs room for as many.
template <int BITS>
inline void unpack(const uint8_t* in, uint8_t* out, int64_t k) {
    for (int64_t i = 0; i < (k + 7) / 8; i++) {
        const uint64_t codes = eight_codes<BITS>(in + i * BITS);
        std::memcpy(out + 8 * i, &codes, 8);
    }
}

inline void unpack(const uint8_t* in, int bits, uint8_t* out, int64_t k) {
    switch (bits) {
        case 1: return unpack<1>(in, out, k);
        case 2: return unpack<2>(in, out, k);
        case 3: return unpack<3>(in, out, k);
        case 4: return unpack<4>(in, out, k);
        case 5: return unpack<5>(in, out, k);
        case 6: return unpack<6>(in, out, k);
        case 7: return unpack<7>(in, out, k);
        default: std::memcpy(out, in, size_t(k));
    }
}

// Row ``n`` as int8 [k], group scales multiplied in. ``room`` holds k + 8 bytes; rows that are int8 already are not copied.
inline const int8_t* integer_row(const Weight& w, int64_t n, int8_t* room) {
    const uint8_t* row = static_cast<const uint8_t*>(w.codes) + n * w.stride;
    if (w.bits == 0 && !w.group_scale) return reinterpret_cast<const int8_t*>(row);
    if (w.bits == 0) std::memcpy(room, row, size_t(w.k));
    else unpack(row, w.bits, reinterpret_cast<uint8_t*>(room), w.k);
    const int offset = w.bits == 0 ? 0 : 1 << (w.bits - 1);
    if (!w.group_scale) {
        for (int64_t i = 0; i < w.k; i++) room[i] = int8_t(uint8_t(room[i]) - offset);
        return room;
    }
    const int64_t groups = w.k / w.group_size;
    for (int64_t g = 0; g < groups; g++) {
        const int16_t scale = int8_t(w.group_scale[n * groups + g]);
        int8_t* group = room + g * w.group_size;
        const int16_t shift = int16_t(offset * scale);
        for (int64_t i = 0; i < w.group_size; i++)
            group[i] = int8_t((w.bits == 0 ? int16_t(group[i]) : int16_t(uint8_t(group[i]))) * scale - shift);
    }
    return room;
}

}  // namespace dqtk
