// Weights of every stored format as float32, bfloat16 or float16.
//
// weight = (level - zero) * step, in float32, then rounded: the operations and the order of packing.dequantize. A code of up to four
// bits has at most 16 weights in a group, so these are computed once per group and looked up.
#include "few.h"
#include "weights.h"

namespace dqtk {

// Mirrored by a ctypes structure in calls.py. Steps and zeros of group g of row n stand at n * row_step + g * group_step.
struct Decoding {
    Weight weight;  // its groups are those of the steps, or of two-level scales
    const float* steps;
    const uint8_t* zeros;  // or null
    int64_t row_step, group_step;
    const float* levels;      // of codes that are no integers [tables, 2^bits], or null
    const uint8_t* selector;  // table of each group, packed with ``selector_bits``, or null
    int64_t selector_stride;
    int32_t selector_bits;
    int32_t threads;
};

// How the codes of one group decode: (level - zero) * step. The level of an integer code is code - offset.
struct Group {
    const float* levels;  // of all codes; null for integers of more than four bits
    float step, zero;
    int offset;
};

template <class T>
void look_up(const T* table, const uint8_t* codes, T* out, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512VNNI__)
    if constexpr (sizeof(T) == 2) {
        const __m512i entries = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)table));
        for (; i + 32 <= count; i += 32) {
            const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + i)));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, entries));
        }
    } else {
        const __m512 entries = _mm512_loadu_ps((const float*)table);
        for (; i + 16 <= count; i += 16) {
            const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
            _mm512_storeu_ps((float*)out + i, _mm512_permutexvar_ps(index, entries));
        }
    }
#endif
    for (; i < count; i++) out[i] = table[codes[i]];
}

template <class T>
void decode_group(const Group& group, int bits, const uint8_t* codes, T* out, int64_t count) {
    const float step = group.step, zero = group.zero;
    if (bits <= 4) {
        float values[16];
        T table[16];
        for (int code = 0; code < 16; code++) values[code] = (group.levels[code] - zero) * step;
        narrow(values, table, 16);
        return look_up(table, codes, out, count);
    }
    float values[256];
    for (int64_t i = 0; i < count; i += 256) {
        const int64_t length = std::min<int64_t>(256, count - i);
        if (group.levels)
            for (int64_t j = 0; j < length; j++) values[j] = (group.levels[codes[i + j]] - zero) * step;
        else
            for (int64_t j = 0; j < length; j++) values[j] = (float(int(codes[i + j]) - group.offset) - zero) * step;
        narrow(values, out + i, length);
    }
}

// The integers of two-level groups are small numbers of their own: int8 as the integer kernels have them, with one step.
template <class T>
void decode_two_level_row(const Decoding& d, int64_t n, T* out) {
    thread_local Scratch room;
    const int8_t* row = integer_row(d.weight, n, room.get<int8_t>(d.weight.k + 8));
    const float step = d.steps[n * d.row_step];
    float values[256];
    for (int64_t i = 0; i < d.weight.k; i += 256) {
        const int64_t length = std::min<int64_t>(256, d.weight.k - i);
        for (int64_t j = 0; j < length; j++) values[j] = float(row[i + j]) * step;
        narrow(values, out + i, length);
    }
}

// Row ``n`` as T [k].
template <class T>
void decode_row(const Decoding& d, int64_t n, T* out) {
    thread_local Scratch codes_room, selector_room;
    const Weight& w = d.weight;
    // int8 is its own code; so are two-level numbers.
    if (w.group_scale || (w.bits == 0 && !d.levels && w.group_size == w.k)) return decode_two_level_row(d, n, out);
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + n * w.stride;
    const int bits = w.bits == 0 ? 8 : w.bits, offset = w.is_signed ? 1 << (bits - 1) : 0;
    const int64_t groups = w.k / w.group_size;
    if (w.bits == 0 && !d.levels) {  // int8 as bytes with an offset, as the others are
        uint8_t* room = codes_room.get<uint8_t>(w.k);
        for (int64_t i = 0; i < w.k; i++) room[i] = codes[i] ^ 0x80;
        codes = room;
    } else if (bits < 8) {
        uint8_t* room = codes_room.get<uint8_t>(w.k + 8);
        unpack(codes, bits, room, w.k);
        codes = room;
    }
    const uint8_t* tables = nullptr;
    if (d.selector) {
        uint8_t* room = selector_room.get<uint8_t>(groups + 8);
        unpack(d.selector + n * d.selector_stride, d.selector_bits, room, groups);
        tables = room;
    }
    float integers[16], padded[16] = {};
    for (int code = 0; code < 16; code++) integers[code] = float(code - offset);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t at = n * d.row_step + g * d.group_step;
        Group group{bits <= 4 ? integers : nullptr, d.steps[at], d.zeros ? float(d.zeros[at]) : 0.0f, offset};
        if (d.levels) {
            group.levels = d.levels + (tables ? int64_t(tables[g]) << bits : 0);
            if (bits < 4) group.levels = static_cast<float*>(std::memcpy(padded, group.levels, sizeof(float) << bits));
        }
        decode_group(group, bits, codes + g * w.group_size, out + g * w.group_size, w.group_size);
    }
}

template <class T>
void decode_rows(const Decoding& d, int64_t first, int64_t count, T* out) {
    const int64_t grain = std::max<int64_t>(1, 16384 / d.weight.k);
    for_each(d.threads, count, grain, [&](int64_t i) { decode_row(d, first + i, out + i * d.weight.k); });
}

}  // namespace dqtk

// ``x`` [rows, k] and ``y`` [rows, n] of one type, up to two rows.
EXPORT void dqtk_weight_few(const dqtk::Decoding* d, const void* x, int64_t rows, const float* bias, int32_t type, void* y) {
    dqtk::with_type(type, [&](auto element) {
        using T = decltype(element);
        const auto decode = [&](int64_t first, int64_t, int64_t, T* out) { dqtk::decode_row(*d, first, out); };
        dqtk::few::multiply(d->threads, d->weight.n, d->weight.k, 1, static_cast<const T*>(x), rows, bias, static_cast<T*>(y), decode);
    });
}

EXPORT void dqtk_weight_decode(const dqtk::Decoding* d, int64_t first, int64_t count, int32_t type, void* out) {
    dqtk::with_type(type, [&](auto element) { dqtk::decode_rows(*d, first, count, static_cast<decltype(element)*>(out)); });
}
