// What kernels of attention have in common: vectors, exponentials, and products of rows with panels.
#pragma once

#include "base.h"

#include <type_traits>
#include <utility>

namespace dqtk {

// --- vectors ------------------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Vector all(float x) { return Vector{} + x; }
inline Vector load(const float* in) {
    Vector v;
    std::memcpy(&v, in, sizeof v);
    return v;
}
inline void store(float* out, Vector v) { std::memcpy(out, &v, sizeof v); }
inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512VNNI__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}
inline Vector larger(Vector a, Vector b) {  // b where either is NaN
#if defined(__AVX512VNNI__)
    return _mm512_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
struct Sum {
    static Vector of(Vector a, Vector b) { return a + b; }
};
struct Largest {
    static Vector of(Vector a, Vector b) { return larger(a, b); }
};
// 16 vectors become 16 numbers, their sums or largest lanes.
template <class By>
inline void reduce16(Vector* v, float* out) {
#if defined(__AVX512VNNI__)
    for (int i = 0; i < 8; i++) v[i] = By::of(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = (__m512d)v[2 * i], b = (__m512d)v[2 * i + 1];
        v[i] = By::of((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    for (int i = 0; i < 2; i++)
        v[i] = By::of(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
    store(out, By::of(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd)));
#else
    for (int i = 0; i < 16; i++) {
        for (int width = LANES / 2; width > 0; width /= 2)
            for (int j = 0; j < width; j++) v[i][j] = By::of(all(v[i][j]), all(v[i][j + width]))[0];
        out[i] = v[i][0];
    }
#endif
}
// 2^x for x <= 0, or NaN; 0 where it is not a normal number, or nearly so. Relative error below 3e-7.
inline Vector power(Vector x) {
#if defined(__AVX512VNNI__)
    const Vector f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // what is above the next whole number below
    Vector p = all(1.87757774e-3f);
    p = fma(p, f, all(8.98933783e-3f));
    p = fma(p, f, all(5.58263212e-2f));
    p = fma(p, f, all(2.40153611e-1f));
    p = fma(p, f, all(6.93153083e-1f));
    p = fma(p, f, all(9.9999994e-1f));
    return _mm512_scalef_ps(p, x);
#else
    constexpr float SHIFT = 0x1.8p23f;  // added and taken away again, it rounds to whole numbers
    const Vector n = (x + SHIFT) - SHIFT, f = x - n;
    Vector p = all(1.33335581e-3f);
    p = fma(p, f, all(9.61812911e-3f));
    p = fma(p, f, all(5.55041087e-2f));
    p = fma(p, f, all(2.40226507e-1f));
    p = fma(p, f, all(6.93147182e-1f));
    p = fma(p, f, all(1.0f));
    const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return x < -126.0f ? Vector{} : p * scale;
#endif
}

// What is multiplied: float, or pairs of bfloat16 where one instruction takes them.
#if defined(__AVX512BF16__)
template <class T>
using Element = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;
inline Vector multiply(const bfloat16* a, __m512bh b, Vector acc) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), b);
}
inline __m512bh load_panel(const bfloat16* b) { return (__m512bh)_mm512_loadu_si512(b); }
#else
template <class T>
using Element = float;
#endif
inline Vector multiply(const float* a, Vector b, Vector acc) { return fma(all(*a), b, acc); }
inline Vector load_panel(const float* b) { return load(b); }

#if defined(__AVX512VNNI__)
inline __m512i multiply(const uint8_t* a, __m512i b, __m512i acc) {
    int32_t four;
    std::memcpy(&four, a, 4);
    return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(four), b);
}
inline __m512i load_panel(const uint8_t* b) { return _mm512_loadu_si512(b); }
inline __m512i load(const int32_t* in) { return _mm512_loadu_si512(in); }
inline void store(int32_t* out, __m512i v) { _mm512_storeu_si512(out, v); }
#endif

// Codes of a query's row and of probabilities. The others of a product are signed; where no instruction multiplies bytes, whole
// numbers are floats, and their sums exact.
#if defined(__AMX_INT8__)
using QueryCode = int8_t;
using WeightCode = uint8_t;
#elif defined(__AVX512VNNI__)
using QueryCode = uint8_t;  // 128 more
using WeightCode = uint8_t;
#else
using QueryCode = float;
using WeightCode = float;
#endif
template <class E>
constexpr bool IS_BYTE = sizeof(E) == 1;
template <class E>
using SumOf = std::conditional_t<IS_BYTE<E>, int32_t, float>;  // of products

template <class E>
constexpr int GROUP = 4 / sizeof(E);  // elements that a lane multiplies at once

#if defined(__AMX_BF16__)
template <class E>
constexpr bool IN_TILES = !std::is_same_v<E, float>;
#else
template <class E>
constexpr bool IN_TILES = false;
#endif
template <class E>
constexpr int STEP = IN_TILES<E> ? 16 * GROUP<E> : GROUP<E>;  // elements of a row that a step of products takes

template <class E>
constexpr int64_t whole_steps(int64_t elements) {
    return (elements + STEP<E> - 1) / STEP<E> * STEP<E>;
}

// --- products in vectors ------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int MOST_VECTORS = 6;  // of a panel
constexpr int rows_for(int vectors) { return vectors <= 3 ? 8 : vectors == 4 ? 6 : 4; }
#else
constexpr int MOST_VECTORS = 3;
constexpr int rows_for(int vectors) { return vectors <= 2 ? 4 : 3; }
#endif
constexpr int TALL = 48;  // a multiple of the rows of all of these

constexpr int CHUNK = 64;  // keys that are packed together; blocks of keys have a multiple of it

// A matrix in panels of ``LANES`` times some vectors: [elements / GROUP, lanes, GROUP]. Long ones lie in parts.
template <class E>
struct Panel {
    const E* part[4];
    int64_t part_elements;
};

// out [R, C * LANES] (+)= a [R, elements] times a panel.
template <class E, int R, int C, bool ADD>
void tile(const E* a, int64_t stride, const Panel<E>& panel, int64_t elements, SumOf<E>* out, int64_t out_stride) {
    using Sums = decltype(load(out));
    Sums acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            if constexpr (ADD) acc[r][c] = load(out + r * out_stride + c * LANES);
            else acc[r][c] = Sums{};
        }
    for (int64_t first = 0; first < elements; first += panel.part_elements) {
        const E* from = panel.part[first / panel.part_elements];
        const int64_t count = std::min(elements - first, panel.part_elements);
        for (int64_t i = 0; i < count; i += GROUP<E>, a += GROUP<E>, from += C * LANES * GROUP<E>) {
            decltype(load_panel(from)) b[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) b[c] = load_panel(from + c * LANES * GROUP<E>);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) acc[r][c] = multiply(a + r * stride, b[c], acc[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store(out + r * out_stride + c * LANES, acc[r][c]);
}

template <class E, int C, bool ADD>
void tiles(const E* a, int64_t stride, const Panel<E>& panel, int64_t elements, SumOf<E>* out, int64_t out_stride, int64_t rows) {
    constexpr int R = rows_for(C);
    for (int64_t r = 0; r < rows; r += R) tile<E, R, C, ADD>(a + r * stride, stride, panel, elements, out + r * out_stride, out_stride);
}

#if defined(__AMX_BF16__)
// The same in tiles of 16 x 16 outputs, 2 x 2 of them where there are. 0 to 3: outputs; 4 and 5: a; 6 and 7: the panel.
template <class E>
inline void multiply_tiles(bool below, bool beside) {
    if constexpr (std::is_same_v<E, bfloat16>) {
        _tile_dpbf16ps(0, 4, 6);
        if (beside) _tile_dpbf16ps(1, 4, 7);
        if (below) _tile_dpbf16ps(2, 5, 6);
        if (below && beside) _tile_dpbf16ps(3, 5, 7);
    } else if constexpr (std::is_same_v<E, int8_t>) {
        _tile_dpbssd(0, 4, 6);
        if (beside) _tile_dpbssd(1, 4, 7);
        if (below) _tile_dpbssd(2, 5, 6);
        if (below && beside) _tile_dpbssd(3, 5, 7);
    } else {
        _tile_dpbusd(0, 4, 6);
        if (beside) _tile_dpbusd(1, 4, 7);
        if (below) _tile_dpbusd(2, 5, 6);
        if (below && beside) _tile_dpbusd(3, 5, 7);
    }
}

template <class E, bool ADD>
void amx_tiles(
    int vectors, const E* a, int64_t stride, const Panel<E>& panel, int64_t elements, SumOf<E>* out, int64_t out_stride, int64_t rows
) {
    const bool beside = vectors > 1;
    for (int64_t r = 0; r < rows; r += 32) {
        const bool below = r + 16 < rows;
        const E *upper = a + r * stride, *lower = upper + 16 * stride;
        SumOf<E>*to = out + r * out_stride, *under = to + 16 * out_stride;
        if constexpr (ADD) {
            _tile_loadd(0, to, out_stride * 4);
            if (beside) _tile_loadd(1, to + 16, out_stride * 4);
            if (below) _tile_loadd(2, under, out_stride * 4);
            if (below && beside) _tile_loadd(3, under + 16, out_stride * 4);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t i = 0; i < elements; i += STEP<E>) {
            const E* from = panel.part[i / panel.part_elements] + i % panel.part_elements * vectors * LANES;
            _tile_loadd(6, from, vectors * LANES * 4);
            if (beside) _tile_loadd(7, from + 16 * GROUP<E>, vectors * LANES * 4);
            _tile_loadd(4, upper + i, stride * int64_t(sizeof(E)));
            if (below) _tile_loadd(5, lower + i, stride * int64_t(sizeof(E)));
            multiply_tiles<E>(below, beside);
        }
        _tile_stored(0, to, out_stride * 4);
        if (beside) _tile_stored(1, to + 16, out_stride * 4);
        if (below) _tile_stored(2, under, out_stride * 4);
        if (below && beside) _tile_stored(3, under + 16, out_stride * 4);
    }
}
#endif

// What lies beyond ``rows``, up to a multiple of TALL, may be written too. In tiles, ``Tiles`` must be there.
template <class E, bool ADD>
void tiles_of(
    int vectors, const E* a, int64_t stride, const Panel<E>& panel, int64_t elements, SumOf<E>* out, int64_t out_stride, int64_t rows
) {
#if defined(__AMX_BF16__)
    if constexpr (IN_TILES<E>) return amx_tiles<E, ADD>(vectors, a, stride, panel, elements, out, out_stride, rows);
    else
#endif
    switch (vectors) {
        case 1: return tiles<E, 1, ADD>(a, stride, panel, elements, out, out_stride, rows);
        case 2: return tiles<E, 2, ADD>(a, stride, panel, elements, out, out_stride, rows);
        case 3: return tiles<E, 3, ADD>(a, stride, panel, elements, out, out_stride, rows);
        case 4: return tiles<E, std::min(4, MOST_VECTORS), ADD>(a, stride, panel, elements, out, out_stride, rows);
        case 5: return tiles<E, std::min(5, MOST_VECTORS), ADD>(a, stride, panel, elements, out, out_stride, rows);
        default: return tiles<E, MOST_VECTORS, ADD>(a, stride, panel, elements, out, out_stride, rows);
    }
}

// --- arguments ----------------------------------------------------------------------------------------------------------

// Mirrored by a ctypes structure in calls.py. Strides of batch, head and row, in elements; channels are neighbours.
struct Tensor4 {
    const void* data;
    int64_t batch, head, row;
};
struct Attention {
    Tensor4 q, k, v, out;
    const float* mask;  // added to scaled scores, or null; of tokens as they lie
    int64_t mask_batch, mask_head, mask_row, mask_key;
    int64_t batch, heads, key_heads, queries, keys, channels, value_channels;
    const int32_t* order;  // [heads, keys], or null
    const uint8_t* live;   // bits [heads, blocks of queries, blocks of keys], rows padded to bytes, or null
    int64_t block_q, block_k;
    float scale;
    int32_t type, threads;
};

template <class E>
constexpr int KEY_VECTORS = LANES == 8 || IN_TILES<E> ? 2 : 4;  // of a panel of keys
template <class E>
constexpr int PANEL_KEYS = KEY_VECTORS<E>* LANES;


template <class T>
const T* at(const Tensor4& t, int64_t b, int64_t h, int64_t row) {
    return static_cast<const T*>(t.data) + b * t.batch + h * t.head + row * t.row;
}

// --- packing ------------------------------------------------------------------------------------------------------------

// Rows of a head lie far apart, where no hardware sees the next one coming.
template <class T>
inline void fetch(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
}
constexpr int64_t AHEAD = 16;  // rows

// A row as elements, zeros beyond ``count``; a null row: zeros.
template <class T, class E>
inline void take(const T* row, int64_t count, E* out, int64_t width) {
    if (!row) count = 0;
    if constexpr (std::is_same_v<T, E>) {
        if (count) std::memcpy(out, row, count * sizeof(E));
    } else widen(row, out, count);
    std::memset(static_cast<void*>(out + count), 0, (width - count) * sizeof(E));
}

// A group of rows becomes groups of neighbours.
inline void weave(const float* rows, int64_t, float* out, int64_t count) { std::memcpy(out, rows, count * sizeof(float)); }
inline void weave(const bfloat16* rows, int64_t stride, bfloat16* out, int64_t count) {
    for (int64_t c = 0; c < count; c++) {
        const uint32_t pair = rows[c].bits | uint32_t(rows[stride + c].bits) << 16;
        std::memcpy(out + 2 * c, &pair, 4);
    }
}

// --- probabilities ------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
inline void put(Vector low, Vector high, bfloat16* out) { _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }
#endif
inline void put(Vector low, Vector high, float* out) {
    store(out, low);
    store(out + LANES, high);
}

}  // namespace dqtk
