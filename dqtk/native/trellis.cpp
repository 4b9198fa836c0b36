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
#include "base.h"

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

constexpr int WIDE = 16;  // suffixes at a time
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
template <int B, int V, bool WEIGHTED>
void advance(const Step& step, const float* cost, float* next, uint8_t* back) {
    constexpr int A = 1 << B;
    const int64_t states = step.states, suffixes = step.suffixes;
    const float* values = step.values;
    __m512 x[V], w[V];
    for (int v = 0; v < V; v++) x[v] = _mm512_set1_ps(step.x[v]), w[v] = _mm512_set1_ps(WEIGHTED ? step.weight[v] : 1.0f);
    const auto error = [&](int64_t state) __attribute__((always_inline)) {
        __m512 total;
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            const __m512 d = _mm512_sub_ps(x[v], _mm512_loadu_ps(values + v * states + state));
            const __m512 part = WEIGHTED ? _mm512_mul_ps(_mm512_mul_ps(d, d), w[v]) : _mm512_mul_ps(d, d);
            total = v ? _mm512_add_ps(total, part) : part;
        }
        return total;
    };
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t q = 0; q < suffixes; q += WIDE) {
        __m512 best = _mm512_load_ps(cost + q);
        __m512i which = _mm512_setzero_si512();
#pragma GCC unroll 15
        for (int h = 1; h < A; h++) {
            const __m512 other = _mm512_load_ps(cost + h * suffixes + q);
            which = _mm512_mask_mov_epi32(which, _mm512_cmp_ps_mask(other, best, _CMP_LT_OQ), _mm512_set1_epi32(h));
            best = _mm512_min_ps(other, best);
        }
        _mm_storeu_si128((__m128i*)(back + q), _mm512_cvtepi32_epi8(which));
        const int64_t first = q << B;
        if constexpr (B < 4) {
#pragma GCC unroll 8
            for (int j = 0; j < A; j++) {
                const __m512i from = _mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(WIDE * j)), B);
                const __m512 sum = _mm512_add_ps(_mm512_permutexvar_ps(from, best), error(first + WIDE * j));
                _mm512_store_ps(next + first + WIDE * j, sum);
            }
        } else {
            alignas(64) float each[WIDE];
            _mm512_store_ps(each, best);
            for (int64_t j = 0; j < WIDE << B; j += WIDE)
                _mm512_store_ps(next + first + j, _mm512_add_ps(_mm512_set1_ps(each[j >> B]), error(first + j)));
        }
    }
}
#else
template <int B, int V, bool WEIGHTED>
void advance(const Step& step, const float* cost, float* next, uint8_t* back) {
    constexpr int A = 1 << B, BLOCK = 2048 >> B;
    const int64_t suffixes = step.suffixes;
    float x[V], w[V], best[BLOCK], each[BLOCK * A];
    int32_t which[BLOCK];
    for (int v = 0; v < V; v++) x[v] = step.x[v], w[v] = WEIGHTED ? step.weight[v] : 1.0f;
    for (int64_t first = 0; first < suffixes; first += BLOCK) {
        const int count = int(std::min<int64_t>(BLOCK, suffixes - first));
        std::memcpy(best, cost + first, sizeof(float) * count);
        std::memset(which, 0, sizeof which);
        for (int h = 1; h < A; h++) {
            const float* other = cost + h * suffixes + first;
            for (int i = 0; i < count; i++) {
                const bool less = other[i] < best[i];
                which[i] = less ? h : which[i];
                best[i] = less ? other[i] : best[i];
            }
        }
        for (int i = 0; i < count; i++) back[first + i] = uint8_t(which[i]);
        for (int i = 0; i < count; i++)
            for (int c = 0; c < A; c++) each[i * A + c] = best[i];
        const float* values = step.values + (first << B);
        const float* seconds = values + (V - 1) * step.states;
        float* out = next + (first << B);
        for (int j = 0; j < count * A; j++) {
            float total = (x[0] - values[j]) * (x[0] - values[j]);
            if (WEIGHTED) total *= w[0];
            if (V == 2) {
                const float d = x[V - 1] - seconds[j];
                total += WEIGHTED ? d * d * w[V - 1] : d * d;
            }
            out[j] = each[j] + total;
        }
    }
}
#endif

// Fewer suffixes than a vector has lanes.
template <int B, int V, bool WEIGHTED>
void advance_few(const Step& step, const float* cost, float* next, uint8_t* back) {
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
    float least[WIDE];
    std::fill(least, least + WIDE, FAR);
    int64_t i = 0;
    for (; i + WIDE <= count; i += WIDE)
        for (int j = 0; j < WIDE; j++) least[j] = cost[i + j] < least[j] ? cost[i + j] : least[j];
    for (; i < count; i++) least[0] = std::min(least[0], cost[i]);
    const float best = *std::min_element(least, least + WIDE);
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
    const auto advances = suffixes < WIDE ? advance_few<B, V, WEIGHTED> : advance<B, V, WEIGHTED>;
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

// States of ``steps`` steps, each V times, and of up to seven more. 8 steps (4 of 8 bits) and the 16 bits before lie in one word.
template <int B, int V>
void windows(const uint8_t* ring, int64_t steps, uint32_t mask, uint8_t* room, int32_t* states) {
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
        int32_t found[STEPS];
        for (int i = 0; i < STEPS; i++) found[i] = int32_t(uint32_t(word >> (48 - (i + 1) * B)) & mask);
        for (int i = 0; i < STEPS * V; i++) states[t * V + i] = found[i / V];
    }
}

// What states stand for: the operations of trellis.values_of, in its order.
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

// The tiles of tile row ``i`` to ``out``, where the weight's row ``first`` stands; rows from ``end`` on are left out.
template <int B, int V, class T>
void decode_tiles(const Rings& r, int64_t i, int64_t first, int64_t end, T* out) {
    thread_local Scratch states_room, values_room, rounded_room, bits_room;
    const int64_t length = r.tile_rows * r.tile_columns, across = (r.k + r.tile_columns - 1) / r.tile_columns;
    int32_t* states = states_room.get<int32_t>(length + 32);
    float* numbers = values_room.get<float>(length + 32);
    T* rounded = rounded_room.get<T>(length);
    uint8_t* bits = bits_room.get<uint8_t>(r.stride + 32);
    for (int64_t j = 0; j < across; j++) {
        windows<B, V>(r.bits + (i * across + j) * r.stride, length / V, (uint32_t(1) << r.state_bits) - 1, bits, states);
        values_of<V>(r, states, numbers, length);
        const int64_t column = j * r.tile_columns, columns = std::min(r.tile_columns, r.k - column), top = i * r.tile_rows;
        for (int64_t row = top; r.scale && row < std::min(top + r.tile_rows, end); row++) {
            const float scale = r.scale[row * r.scale_step];
            float* part = numbers + (row - top) * r.tile_columns;
            for (int64_t c = 0; c < r.tile_columns; c++) part[c] *= scale;
        }
        narrow(numbers, rounded, length);
        for (int64_t row = top; row < std::min(top + r.tile_rows, end); row++)
            std::memcpy(out + (row - first) * r.k + column, rounded + (row - top) * r.tile_columns, size_t(columns) * sizeof(T));
    }
}

template <int B, int V>
void decode_rings(const Rings& r, int64_t first, int64_t count, int32_t type, void* out) {
    const int64_t top = first / r.tile_rows, tiles = (count + r.tile_rows - 1) / r.tile_rows;
    with_type(type, [&](auto element) {
        using T = decltype(element);
        const int64_t grain = std::max<int64_t>(1, 16384 / (r.k * r.tile_rows));
        const auto decode = [&](int64_t i) { decode_tiles<B, V>(r, top + i, first, first + count, static_cast<T*>(out)); };
        for_each(r.threads, tiles, grain, decode);
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
