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

// Eight codes of ``BITS`` bits from as many bytes, which are the low ones of ``word``; one code per byte of the result. For one
// word or a vector of words.
template <int BITS, class Word>
inline Word eight_codes(Word word) {
    Word codes = word & 0;
    int low = 0;
    if constexpr (BITS & 4) {
        codes = (word & 0x0f0f0f0full) | (word >> 4 & 0x0f0f0f0full) << 32;
        word = word >> 32, low = 4;
    }
    if constexpr (BITS & 2) {
        codes |= ((word & 0x0303) | (word >> 2 & 0x0303) << 16 | (word >> 4 & 0x0303) << 32 | (word >> 6 & 0x0303) << 48) << low;
        word = word >> 16, low += 2;
    }
    if constexpr (BITS & 1) {
        word &= 0xff;  // to every byte; then byte j keeps bit j
        word |= word << 8, word |= word << 16, word |= word << 32;
        codes |= ((word & 0x8040201008040201ull) + 0x7f7f7f7f7f7f7f7full >> 7 & 0x0101010101010101ull) << low;
    }
    return codes;
}

typedef uint64_t Words __attribute__((vector_size(64)));
typedef uint32_t Halves __attribute__((vector_size(32)));

// Rows are padded to a multiple of eight codes, so ``out`` needs room for as many.
template <int BITS>
inline void unpack(const uint8_t* in, uint8_t* out, int64_t k) {
    const int64_t count = (k + 7) / 8;
    int64_t i = 0;
    for (; i + 8 < count; i += 8) {  // not the last ones: eight bytes are read of each word
        Words words;
        if constexpr (BITS == 4) {
            Halves halves;
            std::memcpy(&halves, in + i * BITS, 32);
            words = __builtin_convertvector(halves, Words);
        } else
            for (int j = 0; j < 8; j++) std::memcpy(reinterpret_cast<uint64_t*>(&words) + j, in + (i + j) * BITS, 8);
        words = eight_codes<BITS>(words);
        std::memcpy(out + 8 * i, &words, 64);
    }
    for (; i < count; i++) {
        uint64_t word = 0;
        std::memcpy(&word, in + i * BITS, BITS);
        word = eight_codes<BITS>(word);
        std::memcpy(out + 8 * i, &word, 8);
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

// Codes of 9 to 16 bits: of every eight their low bytes, then ``HIGH`` bytes of the bits above. ``out`` as above.
template <int HIGH>
inline void unpack_wide(const uint8_t* in, uint16_t* out, int64_t k) {
    for (int64_t i = 0; i < (k + 7) / 8; i++, in += 8 + HIGH, out += 8) {
        uint64_t word = 0;
        std::memcpy(&word, in + 8, HIGH);
        if constexpr (HIGH < 8) word = eight_codes<HIGH>(word);
        uint8_t high[8];
        std::memcpy(high, &word, 8);
        for (int j = 0; j < 8; j++) out[j] = uint16_t(in[j] | high[j] << 8);
    }
}

inline void unpack(const uint8_t* in, int bits, uint16_t* out, int64_t k) {
    switch (bits) {
        case 9: return unpack_wide<1>(in, out, k);
        case 10: return unpack_wide<2>(in, out, k);
        case 11: return unpack_wide<3>(in, out, k);
        case 12: return unpack_wide<4>(in, out, k);
        case 13: return unpack_wide<5>(in, out, k);
        case 14: return unpack_wide<6>(in, out, k);
        case 15: return unpack_wide<7>(in, out, k);
        default: return unpack_wide<8>(in, out, k);
    }
}

// Codes of a group become int8 numbers (code - offset) * scale.
inline void scale_group(const uint8_t* codes, int offset, int scale, int8_t* out, int64_t count) {
#if defined(__AVX512VNNI__)
    if (offset <= 8) {  // up to 16 codes: look the products up, 64 at a time
        alignas(16) int8_t products[16];
        for (int code = 0; code < 16; code++) products[code] = int8_t((code - offset) * scale);
        const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)products));
        for (int64_t i = 0; i < count; i += 64) {
            const __mmask64 mask = count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1;
            _mm512_mask_storeu_epi8(out + i, mask, _mm512_shuffle_epi8(table, _mm512_maskz_loadu_epi8(mask, codes + i)));
        }
        return;
    }
#endif
    const int16_t factor = int16_t(scale), shift = int16_t(offset * scale);
    for (int64_t i = 0; i < count; i++) out[i] = int8_t(int16_t(codes[i]) * factor - shift);
}

// Row ``n`` as int8 [k], group scales multiplied in. ``room`` holds k + 8 bytes; rows that are int8 already are not copied.
inline const int8_t* integer_row(const Weight& w, int64_t n, int8_t* room) {
    const uint8_t* row = static_cast<const uint8_t*>(w.codes) + n * w.stride;
    if (w.bits == 0 && !w.group_scale) return reinterpret_cast<const int8_t*>(row);
    uint8_t* codes = reinterpret_cast<uint8_t*>(room);
    if (w.bits != 0) unpack(row, w.bits, codes, w.k);
    else  // int8 as bytes with an offset, as the others are
        for (int64_t i = 0; i < w.k; i++) codes[i] = row[i] ^ 0x80;
    const int offset = w.bits == 0 ? 128 : 1 << (w.bits - 1);
    if (!w.group_scale) {
        scale_group(codes, offset, 1, room, w.k);
        return room;
    }
    const int64_t groups = w.k / w.group_size;
    const uint8_t* scales = w.group_scale + n * groups;
    for (int64_t g = 0; g < groups; g++)
        scale_group(codes + g * w.group_size, offset, int8_t(scales[g]), room + g * w.group_size, w.group_size);
    return room;
}

}  // namespace dqtk
