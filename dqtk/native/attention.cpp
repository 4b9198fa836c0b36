// Attention without the matrix of scores (Dao et al. 2022, arXiv 2205.14135): softmax(q k^T * scale + mask) v, blocks of queries
// against blocks of keys, with running maxima and sums in float32.
//
// A call works on some heads at a time, as many as a few MiB of keys and values hold:
//   1. Threads pack keys and values into panels, so that one broadcast number of a query (or probability) meets a vector of keys (or
//      of channels). bfloat16 numbers are multiplied in pairs where the CPU can; all other types as float32.
//   2. Threads take blocks of queries of a head.
// With AMX, tiles multiply bfloat16 numbers; everything else is as for pairs of them.
// Probabilities are rounded to the type that is multiplied, as torch does.
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
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }  // b where either is NaN
inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512VNNI__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}
inline float sum(Vector v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}
inline float largest(Vector v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}
// 2^x for x <= 0, or NaN; 0 below the least normal number.
inline Vector power(Vector x) {
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

// --- tiles --------------------------------------------------------------------------------------------------------------

// out [R, C * LANES] (+)= a [R, groups] times a panel [groups, C * LANES], in groups of ``GROUP`` elements.
template <class E, int R, int C, bool ADD>
void tile(const E* a, int64_t stride, const E* panel, int64_t groups, float* out, int64_t out_stride) {
    constexpr int GROUP = 4 / sizeof(E);
    Vector acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = ADD ? load(out + r * out_stride + c * LANES) : Vector{};
    for (int64_t g = 0; g < groups; g++, panel += C * LANES * GROUP) {
        decltype(load_panel(panel)) b[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) b[c] = load_panel(panel + c * LANES * GROUP);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) acc[r][c] = multiply(a + r * stride + g * GROUP, b[c], acc[r][c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store(out + r * out_stride + c * LANES, acc[r][c]);
}

#if defined(__AMX_BF16__)
// The same for up to 2 x 2 tiles of 16 x 16 outputs, 32 elements of a row at a time. 0 to 3: outputs; 4 and 5: a; 6 and 7: the panel.
template <bool BELOW, bool BESIDE, bool ADD>
void amx_tile(const bfloat16* a, int64_t stride, const bfloat16* panel, int64_t lanes, int64_t groups, float* out, int64_t out_stride) {
    float* below = out + 16 * out_stride;
    if constexpr (ADD) {
        _tile_loadd(0, out, out_stride * 4);
        if constexpr (BESIDE) _tile_loadd(1, out + 16, out_stride * 4);
        if constexpr (BELOW) _tile_loadd(2, below, out_stride * 4);
        if constexpr (BELOW && BESIDE) _tile_loadd(3, below + 16, out_stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t g = 0; g < groups; g += 16, a += 32, panel += 32 * lanes) {
        _tile_loadd(4, a, stride * 2);
        _tile_loadd(6, panel, lanes * 4);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (BELOW) {
            _tile_loadd(5, a + 16 * stride, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (BESIDE) {
            _tile_loadd(7, panel + 32, lanes * 4);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (BELOW) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, out_stride * 4);
    if constexpr (BESIDE) _tile_stored(1, out + 16, out_stride * 4);
    if constexpr (BELOW) _tile_stored(2, below, out_stride * 4);
    if constexpr (BELOW && BESIDE) _tile_stored(3, below + 16, out_stride * 4);
}

template <bool ADD>
void amx_tiles(
    int vectors, const bfloat16* a, int64_t stride, const bfloat16* panel, int64_t groups, float* out, int64_t out_stride, int64_t rows
) {
    const int64_t lanes = vectors * LANES;
    for (int c = 0; c < vectors; c += 2)
        for (int64_t r = 0; r < rows; r += 32) {
            const bfloat16 *from = a + r * stride, *with = panel + c * LANES * 2;
            float* to = out + r * out_stride + c * LANES;
            const bool beside = c + 1 < vectors, below = r + 16 < rows;
            if (beside && below) amx_tile<true, true, ADD>(from, stride, with, lanes, groups, to, out_stride);
            else if (beside) amx_tile<false, true, ADD>(from, stride, with, lanes, groups, to, out_stride);
            else if (below) amx_tile<true, false, ADD>(from, stride, with, lanes, groups, to, out_stride);
            else amx_tile<false, false, ADD>(from, stride, with, lanes, groups, to, out_stride);
        }
}
#endif

// Elements that a step of products takes from a row, and rows that a block has a multiple of.
#if defined(__AMX_BF16__)
template <class E>
constexpr int STEP = std::is_same_v<E, bfloat16> ? 32 : 1;
template <class E>
constexpr int TALL = std::is_same_v<E, bfloat16> ? 16 : 24;
constexpr int QUERIES = 96;  // of a block
#else
template <class E>
constexpr int STEP = 4 / sizeof(E);
template <class E>
constexpr int TALL = 24;
constexpr int QUERIES = 48;
#endif
#if defined(__AVX512VNNI__)
constexpr int KEY_VECTORS = 4, MOST_VECTORS = 6;  // of a panel of keys; of a panel of channels
constexpr int rows_for(int vectors) { return vectors <= 3 ? 8 : vectors == 4 ? 6 : 4; }
#else
constexpr int KEY_VECTORS = 2, MOST_VECTORS = 3;
constexpr int rows_for(int vectors) { return vectors <= 2 ? 4 : 3; }
#endif
constexpr int PANEL_KEYS = KEY_VECTORS * LANES;
constexpr int KEYS = 128;  // of a block

template <class E>
constexpr int64_t whole_steps(int64_t elements) {
    return (elements + STEP<E> - 1) / STEP<E> * STEP<E>;
}

template <class E, int C, bool ADD>
void tiles(const E* a, int64_t stride, const E* panel, int64_t groups, float* out, int64_t out_stride, int64_t rows) {
    constexpr int R = rows_for(C);
    for (int64_t r = 0; r < rows; r += R) tile<E, R, C, ADD>(a + r * stride, stride, panel, groups, out + r * out_stride, out_stride);
}

template <class E, bool ADD>
void tiles_of(int vectors, const E* a, int64_t stride, const E* panel, int64_t groups, float* out, int64_t out_stride, int64_t rows) {
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<E, bfloat16>) return amx_tiles<ADD>(vectors, a, stride, panel, groups, out, out_stride, rows);
#endif
    switch (vectors) {
        case 1: return tiles<E, 1, ADD>(a, stride, panel, groups, out, out_stride, rows);
        case 2: return tiles<E, 2, ADD>(a, stride, panel, groups, out, out_stride, rows);
        case 3: return tiles<E, 3, ADD>(a, stride, panel, groups, out, out_stride, rows);
        case 4: return tiles<E, std::min(4, MOST_VECTORS), ADD>(a, stride, panel, groups, out, out_stride, rows);
        case 5: return tiles<E, std::min(5, MOST_VECTORS), ADD>(a, stride, panel, groups, out, out_stride, rows);
        default: return tiles<E, MOST_VECTORS, ADD>(a, stride, panel, groups, out, out_stride, rows);
    }
}

// --- attention ----------------------------------------------------------------------------------------------------------

// Mirrored by a ctypes structure in calls.py. Strides of batch, head and row, in elements; channels are neighbours.
struct Tensor4 {
    const void* data;
    int64_t batch, head, row;
};
struct Attention {
    Tensor4 q, k, v, out;
    const float* mask;  // added to scaled scores, or null
    int64_t mask_batch, mask_head, mask_row, mask_key;
    int64_t batch, heads, key_heads, queries, keys, channels, value_channels;
    float scale;
    int32_t type, threads;
};

template <class T>
const T* at(const Tensor4& t, int64_t b, int64_t h, int64_t row) {
    return static_cast<const T*>(t.data) + b * t.batch + h * t.head + row * t.row;
}

// Sizes of packed keys and values of a head.
template <class E>
struct Shape {
    static constexpr int64_t GROUP = 4 / sizeof(E);
    int64_t depth;             // channels of a query, padded to steps
    int64_t keys;              // padded to blocks
    int vectors;               // of a panel of channels
    int64_t panels, width;     // of channels, and all of their lanes
    explicit Shape(const Attention& a) {
        depth = whole_steps<E>(a.channels);
        keys = (a.keys + KEYS - 1) / KEYS * KEYS;
        const int64_t all = (a.value_channels + LANES - 1) / LANES;
        panels = (all + MOST_VECTORS - 1) / MOST_VECTORS;
        vectors = int((all + panels - 1) / panels);
        width = panels * vectors * LANES;
    }
    int64_t key_size() const { return keys * depth; }
    int64_t size() const { return key_size() + keys * width; }
};

inline void put(float x, float& out) { out = x; }
inline void put(float x, bfloat16& out) { narrow(x, out); }

// Keys [first, first + PANEL_KEYS) of a head: [depth / GROUP, PANEL_KEYS, GROUP]; zeros beyond the last.
template <class T, class E>
void pack_keys(const Attention& a, const Shape<E>& s, int64_t b, int64_t h, int64_t first, E* out) {
    constexpr int64_t GROUP = Shape<E>::GROUP;
    for (int64_t j = 0; j < PANEL_KEYS; j++) {
        const T* row = first + j < a.keys ? at<T>(a.k, b, h, first + j) : nullptr;
        for (int64_t d = 0; d < s.depth; d++)
            put(row && d < a.channels ? widened(row[d]) : 0.0f, out[(d / GROUP * PANEL_KEYS + j) * GROUP + d % GROUP]);
    }
}

// Values of a group of keys: a line of every panel of channels [width, GROUP].
template <class T, class E>
void pack_values(const Attention& a, const Shape<E>& s, int64_t b, int64_t h, int64_t key, E* out) {
    constexpr int64_t GROUP = Shape<E>::GROUP;
    const int64_t lanes = s.vectors * LANES;
    for (int64_t g = 0; g < GROUP; g++) {
        const T* row = key + g < a.keys ? at<T>(a.v, b, h, key + g) : nullptr;
        for (int64_t c = 0; c < s.width; c++)  // panels of a block of keys follow each other
            put(row && c < a.value_channels ? widened(row[c]) : 0.0f, out[c / lanes * lanes * KEYS + (c % lanes) * GROUP + g]);
    }
}

#if defined(__AVX512BF16__)
inline void round_probabilities(const float* in, bfloat16* out) {
    for (int64_t j = 0; j < KEYS; j += 2 * LANES)
        _mm512_storeu_si512(out + j, (__m512i)_mm512_cvtne2ps_pbh(load(in + j + LANES), load(in + j)));
}
#endif
inline void round_probabilities(const float* in, float* out) { std::memcpy(out, in, KEYS * sizeof(float)); }

// Scores times log2(e), the mask added, minus infinity beyond the last key; returns the largest.
inline float scale_scores(float* scores, const float* mask, int64_t mask_step, int64_t live, float scale) {
    constexpr float LOG2E = 1.44269504088896341f;
    const int64_t full = mask && mask_step != 1 ? 0 : live / LANES * LANES;
    const Vector factor = all(scale * LOG2E), log2e = all(LOG2E);
    Vector most = all(-INFINITY);
    for (int64_t j = 0; j < full; j += LANES) {
        Vector x = load(scores + j) * factor;
        if (mask) x = fma(load(mask + j), log2e, x);
        store(scores + j, x);
        most = larger(most, x);
    }
    for (int64_t j = full; j < live; j++) scores[j] = scores[j] * (scale * LOG2E) + (mask ? mask[j * mask_step] * LOG2E : 0.0f);
    std::fill(scores + live, scores + KEYS, -INFINITY);
    for (int64_t j = full; j < live; j += LANES) most = larger(most, load(scores + j));
    return largest(most);
}

// One row of scores becomes probabilities relative to the running maximum; returns what earlier sums are multiplied with.
template <class E>
float soften(float* scores, const float* mask, int64_t mask_step, int64_t live, float scale, float& top, float& total, E* out) {
    const float before = top, now = std::max(before, scale_scores(scores, mask, mask_step, live, scale));
    top = now;
    const Vector minus = all(now == -INFINITY ? 0.0f : -now);
    Vector sums = Vector{};
    for (int64_t j = 0; j < KEYS; j += LANES) {
        const Vector p = power(load(scores + j) + minus);
        sums += p;
        store(scores + j, p);
    }
    round_probabilities(scores, out);
    if (before == now) {
        total += sum(sums);
        return 1;
    }
    float shrink[LANES];
    store(shrink, power(all(before - now)));
    total = total * shrink[0] + sum(sums);
    return shrink[0];
}

template <class T, class E>
void attend(const Attention& a, const Shape<E>& s, const E* packed, int64_t b, int64_t h, int64_t first, float* room) {
    constexpr int64_t GROUP = Shape<E>::GROUP;
    const int64_t rows = std::min<int64_t>(QUERIES, a.queries - first), lanes = s.vectors * LANES;
    float* scores = room;                                            // [QUERIES, KEYS]
    float* out = scores + QUERIES * KEYS;                            // [QUERIES, width]
    E* queries = reinterpret_cast<E*>(out + QUERIES * s.width);      // [QUERIES, depth]
    E* probabilities = queries + QUERIES * s.depth;                  // [QUERIES, KEYS]
    float top[QUERIES], total[QUERIES];
    for (int64_t r = 0; r < QUERIES; r++) {
        const T* row = r < rows ? at<T>(a.q, b, h, first + r) : nullptr;
        for (int64_t d = 0; d < s.depth; d++) put(row && d < a.channels ? widened(row[d]) : 0.0f, queries[r * s.depth + d]);
        top[r] = -INFINITY, total[r] = 0;
    }
    std::fill(out, out + QUERIES * s.width, 0.0f);
    const int64_t tall = (rows + TALL<E> - 1) / TALL<E> * TALL<E>;  // a multiple of the rows of every tile
    const Tiles shapes;
    const E* values = packed + s.key_size();
    for (int64_t key = 0; key < a.keys; key += KEYS) {
        const int64_t live = std::min<int64_t>(KEYS, a.keys - key);
        for (int64_t j = 0; j < live; j += PANEL_KEYS)
            tiles_of<E, false>(
                KEY_VECTORS, queries, s.depth, packed + (key + j) * s.depth, s.depth / GROUP, scores + j, KEYS, tall
            );
        for (int64_t r = 0; r < rows; r++) {
            const float* mask = a.mask ? a.mask + b * a.mask_batch + h * a.mask_head + (first + r) * a.mask_row + key * a.mask_key : nullptr;
            const float shrink =
                soften(scores + r * KEYS, mask, a.mask_key, live, a.scale, top[r], total[r], probabilities + r * KEYS);
            if (shrink != 1.0f)
                for (int64_t c = 0; c < s.width; c += LANES) store(out + r * s.width + c, load(out + r * s.width + c) * shrink);
        }
        const int64_t groups = (whole_steps<E>(live) + GROUP - 1) / GROUP;
        for (int64_t panel = 0; panel < s.panels; panel++)
            tiles_of<E, true>(
                s.vectors, probabilities, KEYS, values + key * s.width + panel * lanes * KEYS, groups, out + panel * lanes, s.width, tall
            );
    }
    for (int64_t r = 0; r < rows; r++) {
        const float factor = total[r] == 0 ? 0.0f : 1 / total[r];  // a query that sees no key: 0, as torch has it
        T* y = const_cast<T*>(at<T>(a.out, b, h, first + r));
        float* line = out + r * s.width;
        for (int64_t c = 0; c < s.width; c += LANES) store(line + c, load(line + c) * factor);
        narrow(line, y, a.value_channels);
    }
}

constexpr int64_t PACKED_BYTES = 16 << 20;

template <class T>
void attention(const Attention& a) {
    using E = Element<T>;
    constexpr int64_t GROUP = Shape<E>::GROUP;
    const Shape<E> s(a);
    thread_local Scratch packed_room;
    const int64_t pairs = a.batch * a.key_heads, sharing = a.heads / a.key_heads, blocks = (a.queries + QUERIES - 1) / QUERIES;
    const int64_t chunk = std::min(pairs, std::max<int64_t>(a.threads, PACKED_BYTES / int64_t(s.size() * sizeof(E))));
    E* packed = packed_room.get<E>(chunk * s.size());
    const int64_t key_panels = s.keys / PANEL_KEYS, value_blocks = s.keys / KEYS;
    for (int64_t first = 0; first < pairs; first += chunk) {
        const int64_t count = std::min(chunk, pairs - first);
        for_each(a.threads, count * (key_panels + value_blocks), 4, [&](int64_t task) {
            const int64_t pair = task / (key_panels + value_blocks), part = task % (key_panels + value_blocks);
            const int64_t b = (first + pair) / a.key_heads, h = (first + pair) % a.key_heads;
            E* head = packed + pair * s.size();
            if (part < key_panels) return pack_keys<T>(a, s, b, h, part * PANEL_KEYS, head + part * PANEL_KEYS * s.depth);
            const int64_t key = (part - key_panels) * KEYS;
            E* values = head + s.key_size() + key * s.width;
            for (int64_t g = 0; g < KEYS; g += GROUP) pack_values<T>(a, s, b, h, key + g, values + g * s.vectors * LANES);
        });
        for_each(a.threads, count * sharing * blocks, 1, [&](int64_t task) {
            thread_local Scratch room;
            const int64_t pair = task / (sharing * blocks), inner = task % (sharing * blocks);
            const int64_t b = (first + pair) / a.key_heads, h = (first + pair) % a.key_heads * sharing + inner / blocks;
            float* memory = room.get<float>(QUERIES * (2 * KEYS + s.width + s.depth));
            attend<T>(a, s, packed + pair * s.size(), b, h, inner % blocks * QUERIES, memory);
        });
    }
    packed_room.keep_at_most(KEPT_BYTES);
}

}  // namespace dqtk

EXPORT void dqtk_attention(const dqtk::Attention* a) {
    dqtk::with_type(a->type, [&](auto element) { dqtk::attention<decltype(element)>(*a); });
}
