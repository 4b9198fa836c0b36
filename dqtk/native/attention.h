// What kernels of attention have in common: vectors, exponentials, and products of rows with panels.
#pragma once

#include "base.h"

#include <type_traits>

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

template <class E>
constexpr int GROUP = 4 / sizeof(E);  // elements that a lane multiplies at once

#if defined(__AMX_BF16__)
template <class E>
constexpr bool IN_TILES = std::is_same_v<E, bfloat16>;
#else
template <class E>
constexpr bool IN_TILES = false;
#endif
template <class E>
constexpr int STEP = IN_TILES<E> ? 32 : GROUP<E>;  // elements of a row that a step of products takes

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

// A matrix in panels of ``LANES`` times some vectors: [elements / GROUP, lanes, GROUP]. The elements may lie in two parts.
template <class E>
struct Panel {
    const E* part[2];
    int64_t part_elements;  // of the first
};

// out [R, C * LANES] (+)= a [R, elements] times a panel.
template <class E, int R, int C, bool ADD>
void tile(const E* a, int64_t stride, const Panel<E>& panel, int64_t elements, float* out, int64_t out_stride) {
    Vector acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = ADD ? load(out + r * out_stride + c * LANES) : Vector{};
    for (int part = 0; part < 2; part++) {
        const E* b_part = panel.part[part];
        const int64_t count = part ? elements - panel.part_elements : std::min(elements, panel.part_elements);
        for (int64_t i = 0; i < count; i += GROUP<E>, a += GROUP<E>, b_part += C * LANES * GROUP<E>) {
            decltype(load_panel(b_part)) b[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) b[c] = load_panel(b_part + c * LANES * GROUP<E>);
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
void tiles(const E* a, int64_t stride, const Panel<E>& panel, int64_t elements, float* out, int64_t out_stride, int64_t rows) {
    constexpr int R = rows_for(C);
    for (int64_t r = 0; r < rows; r += R) tile<E, R, C, ADD>(a + r * stride, stride, panel, elements, out + r * out_stride, out_stride);
}

// What lies beyond ``rows``, up to a multiple of TALL, may be written too.
template <class E, bool ADD>
void tiles_of(
    int vectors, const E* a, int64_t stride, const Panel<E>& panel, int64_t elements, float* out, int64_t out_stride, int64_t rows
) {
    switch (vectors) {
        case 1: return tiles<E, 1, ADD>(a, stride, panel, elements, out, out_stride, rows);
        case 2: return tiles<E, 2, ADD>(a, stride, panel, elements, out, out_stride, rows);
        case 3: return tiles<E, 3, ADD>(a, stride, panel, elements, out, out_stride, rows);
        case 4: return tiles<E, std::min(4, MOST_VECTORS), ADD>(a, stride, panel, elements, out, out_stride, rows);
        case 5: return tiles<E, std::min(5, MOST_VECTORS), ADD>(a, stride, panel, elements, out, out_stride, rows);
        default: return tiles<E, MOST_VECTORS, ADD>(a, stride, panel, elements, out, out_stride, rows);
    }
}

}  // namespace dqtk
