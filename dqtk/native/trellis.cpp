// Trellis codes: Viterbi's search for the states of a row, and numbers from their bits. numerics/trellis.py has the meaning.
//
// A step of the search takes the costs of all S = 2^L states to those of the next step. The A = 2^B states (B bits per step) that
// differ in their oldest bits alone are followed by the same A states, which differ in their newest bits. So the least of each A
// costs is found once, for Q = S / A suffixes, and every new state adds its own error to one of these:
//
//     best[q] = min over h of cost[h Q + q]            back[q] = the first h that has it
//     cost'[q A + c] = best[q] + error of state q A + c
//
// Both sides are read and written in order; S minima and S errors are all that a step costs. Sums are those of the reference, in
// its order, so that both find the same paths. A thread holds two rows of costs and one byte per suffix and step.
#include "few.h"

#include <limits>
#include <type_traits>

namespace dqtk {

// Mirrored by a ctypes structure in trellis.py.
struct Search {
    const float* x;       // [rows, steps * vector]
    const float* weight;  // rows ``weight_stride`` apart, or null
    const float* values;  // [vector, 2^state_bits]
    int32_t* states;      // [rows, steps]
    int64_t rows, steps, weight_stride;
    int32_t state_bits, step_bits, vector, threads;
};

namespace {

constexpr float FAR = std::numeric_limits<float>::infinity();

// One step of a search: V numbers, their weights or null, and the table of values, whose V planes have ``states`` each.
struct Step {
    const float* x;
    const float* weight;
    const float* values;
    int64_t states, suffixes;
};

template <int V, bool WEIGHTED>
inline float error_of(const Step& step, int64_t state) {
    float total = 0;
    for (int v = 0; v < V; v++) {
        const float d = step.x[v] - step.values[v * step.states + state];
        const float part = WEIGHTED ? d * d * step.weight[v] : d * d;
        total = v ? total + part : part;
    }
    return total;
}

#if defined(__AVX512F__)
constexpr int LANES = 16;
using Floats = __m512;
using Integers = __m512i;
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Integers all(int value) { return _mm512_set1_epi32(value); }
inline Integers counted(int first, int shift) {  // (first + lane) >> shift
    const Integers lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_srli_epi32(_mm512_add_epi32(lane, all(first)), shift);
}
inline Floats load(const float* in) { return _mm512_loadu_ps(in); }
inline void store(float* out, Floats values) { _mm512_storeu_ps(out, values); }
inline void store_bytes(uint8_t* out, Integers values) { _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(values)); }
inline Floats picked(Floats values, Integers from) { return _mm512_permutexvar_ps(from, values); }
inline void keep_less(Floats other, Integers its_place, Floats& least, Integers& place) {
    place = _mm512_mask_mov_epi32(place, _mm512_cmp_ps_mask(other, least, _CMP_LT_OQ), its_place);
    least = _mm512_min_ps(other, least);
}
#elif defined(__AVX2__)
constexpr int LANES = 8;
using Floats = __m256;
using Integers = __m256i;
inline Floats all(float value) { return _mm256_set1_ps(value); }
inline Integers all(int value) { return _mm256_set1_epi32(value); }
inline Integers counted(int first, int shift) {  // (first + lane) >> shift
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), all(first)), shift);
}
inline Floats load(const float* in) { return _mm256_loadu_ps(in); }
inline void store(float* out, Floats values) { _mm256_storeu_ps(out, values); }
inline void store_bytes(uint8_t* out, Integers values) {
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    _mm_storel_epi64((__m128i*)out, _mm_packus_epi16(shorts, shorts));
}
inline Floats picked(Floats values, Integers from) { return _mm256_permutevar8x32_ps(values, from); }
inline void keep_less(Floats other, Integers its_place, Floats& least, Integers& place) {
    const __m256 less = _mm256_cmp_ps(other, least, _CMP_LT_OQ);
    place = _mm256_blendv_epi8(place, its_place, _mm256_castps_si256(less));
    least = _mm256_min_ps(other, least);
}
#endif

#if defined(__AVX2__)
template <int B, int V, bool WEIGHTED>
void advance(const Step& step, const float* cost, float* next, uint8_t* back) {
    constexpr int A = 1 << B;
    const int64_t states = step.states, suffixes = step.suffixes;
    const float* values = step.values;
    Floats x[V], w[V];
    for (int v = 0; v < V; v++) x[v] = all(step.x[v]), w[v] = all(WEIGHTED ? step.weight[v] : 1.0f);
    const auto error = [&](int64_t state) __attribute__((always_inline)) {
        Floats total = all(0.0f);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            const Floats d = x[v] - load(values + v * states + state);
            const Floats part = WEIGHTED ? d * d * w[v] : d * d;
            total = v ? total + part : part;
        }
        return total;
    };
    for (int64_t q = 0; q < suffixes; q += LANES) {
        // Two halves at a time: either is a chain of operations that wait for each other. Of equals the first is kept.
        Floats best[2];
        Integers which[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int first = half * A / 2;
            best[half] = load(cost + first * suffixes + q);
            which[half] = all(first);
#pragma GCC unroll 16
            for (int h = first + 1; h < first + A / 2; h++)
                keep_less(load(cost + h * suffixes + q), all(h), best[half], which[half]);
        }
        keep_less(best[1], which[1], best[0], which[0]);
        store_bytes(back + q, which[0]);
        const int64_t state = q << B;
        if constexpr (A < LANES) {
#pragma GCC unroll 8
            for (int j = 0; j < LANES << B; j += LANES)
                store(next + state + j, picked(best[0], counted(j, B)) + error(state + j));
        } else {
            float each[LANES];
            store(each, best[0]);
            for (int64_t j = 0; j < LANES << B; j += LANES) store(next + state + j, all(each[j >> B]) + error(state + j));
        }
    }
}
#endif

// One suffix after the other: where there are fewer than a vector has lanes, and at the generic level.
template <int B, int V, bool WEIGHTED>
void advance_plainly(const Step& step, const float* cost, float* next, uint8_t* back) {
    for (int64_t q = 0; q < step.suffixes; q++) {
        float best = cost[q];
        back[q] = 0;
        for (int h = 1; h < 1 << B; h++) {
            const float other = cost[h * step.suffixes + q];
            if (other < best) best = other, back[q] = uint8_t(h);
        }
        for (int64_t state = q << B; state < (q + 1) << B; state++) next[state] = best + error_of<V, WEIGHTED>(step, state);
    }
}

// The first of the least costs.
inline int64_t cheapest(const float* cost, int64_t count) {
    constexpr int GROUP = 16;
    float least[GROUP];
    std::fill(least, least + GROUP, FAR);
    int64_t i = 0;
    for (; i + GROUP <= count; i += GROUP)
        for (int j = 0; j < GROUP; j++) least[j] = cost[i + j] < least[j] ? cost[i + j] : least[j];
    for (; i < count; i++) least[0] = std::min(least[0], cost[i]);
    const float best = *std::min_element(least, least + GROUP);
    return std::find(cost, cost + count, best) - cost;
}

// States of the best path through ``x`` [steps * V]. ``seam``: the bits before the first step and at the end of the last; -1: any.
template <int B, int V, bool WEIGHTED>
void path(const Search& s, const float* x, const float* weight, int64_t seam, int32_t* states) {
    thread_local Scratch costs_room, back_room;
    const int64_t count = int64_t(1) << s.state_bits, suffixes = count >> B;
    float* cost = costs_room.get<float>(2 * count);
    float* next = cost + count;
    uint8_t* back = back_room.get<uint8_t>(s.steps * suffixes);
    auto advances = advance_plainly<B, V, WEIGHTED>;
#if defined(__AVX2__)
    if (suffixes >= LANES) advances = advance<B, V, WEIGHTED>;
#endif
    Step step{x, weight, s.values, count, suffixes};
    for (int64_t state = 0; state < count; state++)
        cost[state] = seam < 0 || state >> B == seam ? error_of<V, WEIGHTED>(step, state) : FAR;
    for (int64_t t = 1; t < s.steps; t++) {
        step.x += V;
        if (WEIGHTED) step.weight += V;
        advances(step, cost, next, back + t * suffixes);
        std::swap(cost, next);
    }
    int64_t at = seam;
    if (seam < 0) at = cheapest(cost, count);
    else
        for (int64_t state = seam; state < count; state += suffixes)
            if (cost[state] < cost[at]) at = state;
    for (int64_t t = s.steps - 1; t > 0; t--) {
        states[t] = int32_t(at);
        const int64_t suffix = at >> B;
        at = int64_t(back[t * suffixes + suffix]) * suffixes + suffix;
    }
    states[0] = int32_t(at);
    back_room.keep_at_most(KEPT_BYTES);
}

// Row ``r``: a search of the row turned by half finds the state at the seam, a second one is bound to it.
template <int B, int V, bool WEIGHTED>
void row(const Search& s, int64_t r) {
    thread_local Scratch turned_room;
    const int64_t length = s.steps * V, half = (s.steps + 1) / 2, first = (s.steps - half) * V;
    const float* x = s.x + r * length;
    const float* weight = WEIGHTED ? s.weight + r * s.weight_stride : nullptr;
    int32_t* states = s.states + r * s.steps;
    float* turned = turned_room.get<float>(2 * length);
    std::rotate_copy(x, x + first, x + length, turned);
    if (WEIGHTED) std::rotate_copy(weight, weight + first, weight + length, turned + length);
    path<B, V, WEIGHTED>(s, turned, WEIGHTED ? turned + length : nullptr, -1, states);
    const int64_t suffixes = int64_t(1) << (s.state_bits - B);
    path<B, V, WEIGHTED>(s, x, weight, states[half - 1] & (suffixes - 1), states);
}

template <int B, int V>
void rows(const Search& s) {
    for_each(s.threads, s.rows, 1, [&](int64_t r) { (s.weight ? row<B, V, true> : row<B, V, false>)(s, r); });
}

}  // namespace

// --- decoding -----------------------------------------------------------------------------------------------------------

// Mirrored by a ctypes structure in trellis.py. A weight [n, k] in tiles of ``tile_rows`` by ``tile_columns``, a ring each, from
// left to right and then down; tiles that reach beyond the weight are cut off. Scales of rows: at ``row * scale_step``, or null.
struct Rings {
    const uint8_t* bits;
    const float* scale;
    int64_t stride, n, k, tile_rows, tile_columns, scale_step;
    float curve[4];
    int32_t multipliers[2];
    int32_t state_bits, step_bits, vector, threads;
};

namespace {

// The 16 bits of a ring of ``count`` bits that stand before its first.
inline uint32_t history(const uint8_t* ring, int64_t count) {
    if (count % 8 == 0 && count >= 16) return uint32_t(ring[count / 8 - 2]) << 8 | ring[count / 8 - 1];
    uint32_t bits = 0;
    for (int64_t i = 16; i > 0; i--) {
        const int64_t at = ((count - i) % count + count) % count;
        bits = bits << 1 | (ring[at >> 3] >> (7 - (at & 7)) & 1);
    }
    return bits;
}

// Calls ``found(t, states)`` with the states of steps t to t + STEPS of a ring, the last time of some behind its end too. Eight steps
// (4 of 8 bits) and the 16 bits before them lie in one word.
template <int B, class Found>
void windows(const uint8_t* ring, int64_t steps, uint32_t mask, uint8_t* room, Found&& found) {
    constexpr int STEPS = B == 8 ? 4 : 8, BYTES = STEPS * B / 8;
    const int64_t bytes = (steps * B + 7) / 8;
    const uint32_t before = history(ring, steps * B);
    room[0] = uint8_t(before >> 8), room[1] = uint8_t(before);
    std::memcpy(room + 2, ring, size_t(bytes));
    std::memset(room + 2 + bytes, 0, 16);
    for (int64_t t = 0; t < steps; t += STEPS, room += BYTES) {
        uint64_t word;
        std::memcpy(&word, room, 8);
        word = __builtin_bswap64(word);
        uint32_t states[STEPS];
        for (int i = 0; i < STEPS; i++) states[i] = uint32_t(word >> (48 - (i + 1) * B)) & mask;
        found(t, states);
    }
}

// What states stand for: the operations of trellis.values_of, in its order. Up to a multiple of 16 of them are written.
template <int V>
void values_of(const Rings& r, const int32_t* states, float* out, int64_t count) {
    constexpr int GROUP = 16;
    uint32_t multiplier[GROUP];
    for (int i = 0; i < GROUP; i++) multiplier[i] = uint32_t(r.multipliers[i % V]);
    const uint32_t mask = (uint32_t(1) << r.state_bits) - 1;
    const float unit = 1.0f / float(mask + 1), a_0 = r.curve[0], a_1 = r.curve[1], b_1 = r.curve[2], b_2 = r.curve[3];
    for (int64_t first = 0; first < count; first += GROUP)
        for (int i = 0; i < GROUP; i++) {
            const int32_t u = int32_t(uint32_t(states[first + i]) * multiplier[i] & mask);
            const float p = float(2 * u - int32_t(mask)) * unit, q = p * p;
            out[first + i] = p * (a_0 + q * a_1) / (1.0f + q * (b_1 + q * b_2));
        }
}

// Of states whose values are looked up: the nearest cache holds so many. AVX512 computes sixteen at a time, which is left as it was
// until somebody has timed a table there.
#if defined(__AVX512F__)
constexpr int TABLE_BITS = 0;
#else
constexpr int TABLE_BITS = 12;
#endif

// The values of all states, [2^state_bits, V]; null where there are too many.
template <int V>
const float* table_of(const Rings& r) {
    thread_local Scratch values_room, states_room;
    if (r.state_bits > TABLE_BITS) return nullptr;
    const int64_t count = int64_t(V) << r.state_bits;
    float* values = values_room.get<float>(count + 16);
    int32_t* states = states_room.get<int32_t>(count + 16);
    for (int64_t i = 0; i < count; i++) states[i] = int32_t(i / V);
    values_of<V>(r, states, values, count);
    return values;
}

// The ``length`` numbers of a ring, and some of no meaning behind them.
template <int B, int V>
void decode_ring(const Rings& r, const float* table, const uint8_t* ring, int64_t length, float* out) {
    thread_local Scratch states_room, bits_room;
    uint8_t* bits = bits_room.get<uint8_t>(r.stride + 32);
    const uint32_t mask = (uint32_t(1) << r.state_bits) - 1;
    constexpr int STEPS = B == 8 ? 4 : 8;
    if (table)
        return windows<B>(ring, length / V, mask, bits, [&](int64_t t, const uint32_t* states) __attribute__((always_inline)) {
            for (int i = 0; i < STEPS; i++) std::memcpy(out + (t + i) * V, table + states[i] * V, V * sizeof(float));
        });
    int32_t* found = states_room.get<int32_t>(length + 32);
    windows<B>(ring, length / V, mask, bits, [&](int64_t t, const uint32_t* states) __attribute__((always_inline)) {
        for (int i = 0; i < STEPS * V; i++) found[t * V + i] = int32_t(states[i / V]);
    });
    values_of<V>(r, found, out, length);
}

// The tiles of tile row ``i`` to ``out``, where the weight's row ``first`` stands, rows ``pitch`` apart; those from ``end`` on are
// left out. Narrow tiles are joined before they are written: whole lines of the cache at a time.
template <int B, int V, class T>
void decode_tiles(const Rings& r, const float* table, int64_t i, int64_t first, int64_t end, int64_t pitch, T* out) {
    thread_local Scratch numbers_room, joined_room;
    const int64_t columns = r.tile_columns, length = r.tile_rows * columns, across = (r.k + columns - 1) / columns;
    const int64_t group = std::max<int64_t>(1, 32 / columns), width = group * columns, top = i * r.tile_rows;
    float* numbers = numbers_room.get<float>(length + 32);
    float* joined = joined_room.get<float>(length * group + 32);
    for (int64_t j = 0; j < across; j += group) {
        const int64_t parts = std::min(group, across - j), column = j * columns, count = std::min(parts * columns, r.k - column);
        for (int64_t part = 0; part < parts; part++) {
            const uint8_t* ring = r.bits + (i * across + j + part) * r.stride;
            decode_ring<B, V>(r, table, ring, length, group == 1 ? joined : numbers);
            float* to = joined + part * columns;
            if (columns == 4)
                for (int64_t row = 0; row < r.tile_rows; row++) std::memcpy(to + row * width, numbers + row * 4, 16);
            else if (group > 1)
                for (int64_t row = 0; row < r.tile_rows; row++)
                    std::copy_n(numbers + row * columns, columns, to + row * width);
        }
        for (int64_t row = top; row < std::min(top + r.tile_rows, end); row++) {
            float* from = joined + (row - top) * width;
            const float scale = r.scale ? r.scale[row * r.scale_step] : 1.0f;
            for (int64_t c = 0; c < count; c++) from[c] *= scale;
            narrow(from, out + (row - first) * pitch + column, count);
        }
    }
}

template <int B, int V>
void decode_rings(const Rings& r, int64_t first, int64_t count, int32_t type, void* out) {
    const int64_t top = first / r.tile_rows, tiles = (count + r.tile_rows - 1) / r.tile_rows;
    const float* table = table_of<V>(r);
    with_type(type, [&](auto element) {
        using T = decltype(element);
        const int64_t grain = std::max<int64_t>(1, 16384 / (r.k * r.tile_rows));
        for_each(r.threads, tiles, grain, [&](int64_t i) {
            decode_tiles<B, V>(r, table, top + i, first, first + count, r.k, static_cast<T*>(out));
        });
    });
}

// A row of tiles at a time: its rows share their rings.
template <int B, int V>
void multiply_few(const Rings& r, const void* x, int64_t rows, const float* bias, int32_t type, void* y) {
    const float* table = table_of<V>(r);
    with_type(type, [&](auto element) {
        using T = decltype(element);
        const auto decode = [&](int64_t first, int64_t count, int64_t pitch, T* out) {
            decode_tiles<B, V>(r, table, first / r.tile_rows, first, first + count, pitch, out);
        };
        few::multiply(r.threads, r.n, r.k, r.tile_rows, static_cast<const T*>(x), rows, bias, static_cast<T*>(y), decode);
    });
}

// Calls ``body`` with the bits and the numbers of a step as constants.
template <class F>
void with_step(int step_bits, int vector, F&& body) {
    using std::integral_constant;
    const auto is = [&](auto bits, auto numbers) {
        if (step_bits == bits && vector == numbers) body(bits, numbers);
    };
    constexpr integral_constant<int, 1> one;
    constexpr integral_constant<int, 2> two;
    is(one, one), is(two, one), is(integral_constant<int, 3>(), one), is(integral_constant<int, 4>(), one);
    is(two, two), is(integral_constant<int, 4>(), two), is(integral_constant<int, 6>(), two), is(integral_constant<int, 8>(), two);
}

}  // namespace
}  // namespace dqtk

EXPORT void dqtk_trellis_search(const dqtk::Search* s) {
    dqtk::with_step(s->step_bits, s->vector, [&](auto bits, auto numbers) { dqtk::rows<bits, numbers>(*s); });
}

// ``count`` rows from ``first``, a multiple of the tiles' rows, to ``out`` [count, k].
EXPORT void dqtk_trellis_decode(const dqtk::Rings* r, int64_t first, int64_t count, int32_t type, void* out) {
    dqtk::with_step(r->step_bits, r->vector, [&](auto bits, auto numbers) {
        dqtk::decode_rings<bits, numbers>(*r, first, count, type, out);
    });
}

// ``x`` [rows, k] and ``y`` [rows, n] of one type, up to two rows.
EXPORT void dqtk_trellis_few(const dqtk::Rings* r, const void* x, int64_t rows, const float* bias, int32_t type, void* y) {
    dqtk::with_step(r->step_bits, r->vector, [&](auto bits, auto numbers) {
        dqtk::multiply_few<bits, numbers>(*r, x, rows, bias, type, y);
    });
}
