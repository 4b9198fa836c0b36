// Attention over live blocks with numbers rounded to codes: queries and keys, probabilities and values, or both. What is not rounded is
// multiplied as in attention.cpp. Nothing rounded at all: blocks that are smaller than the chunks of attention.cpp.
//
// Blocks of keys are packed once per head: rows picked up in its order, less the mean, rounded with a scale per block (values: and
// channel), turned into panels. A block of queries then goes through the blocks that are live for it. The softmax runs on: codes of
// probabilities are relative to the largest of their row in the tile, which is known at once, so that a later maximum changes only what
// their sums are multiplied with.
#include "attention.h"

#include <vector>

namespace dqtk {

// Mirrored by a ctypes structure in calls.py.
struct Rounded {
    Attention attention;
    int32_t qk_bits, pv_bits, smooth_keys, smooth_queries;
};

constexpr int ROWS = 128;       // of queries at a time
constexpr int MOST_KEYS = 256;  // of a block
#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
constexpr int OFFSET = 128;  // of codes of queries, taken away again through sums of those of keys
#else
constexpr int OFFSET = 0;
#endif
constexpr float LOG2E = 1.44269504088896341f;
constexpr int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Sizes and places of what is packed of a head.
template <class Q, class P>
struct Layout {
    int64_t depth, columns, block, wide, width, panels, vectors;  // wide: keys of a block, padded to chunks
    int64_t key_sums, values, key_scales, value_scales, key_mean, size;  // bytes, where they begin
    explicit Layout(const Attention& a) {
        depth = whole_steps<Q>(a.channels);
        block = a.block_k, wide = (block + CHUNK - 1) / CHUNK * CHUNK, columns = (a.keys + block - 1) / block;
        const int64_t most = IN_TILES<P> ? 2 : MOST_VECTORS, all = (a.value_channels + LANES - 1) / LANES;
        panels = (all + most - 1) / most, vectors = IN_TILES<P> ? 2 : (all + panels - 1) / panels;
        width = (IN_TILES<P> ? all : panels * vectors) * LANES;
        key_sums = lines(columns * wide * depth * int64_t(sizeof(Q)));
        values = key_sums + lines(columns * wide * 4);
        key_scales = values + lines(columns * wide * width * int64_t(sizeof(P)));
        value_scales = key_scales + lines(columns * 4);
        key_mean = value_scales + lines(columns * width * 4);
        size = key_mean + lines(a.channels * 4);
    }
    int64_t lanes(int64_t panel) const { return std::min(vectors * LANES, width - panel * vectors * LANES); }
};

// --- rounding -----------------------------------------------------------------------------------------------------------

// The scale of codes up to ``most``. Where the largest is no number the scale is none either, and shows.
inline float scale_of(float top, float most) {
    const float scale = top / most;
    return scale <= 1e-30f ? 1.0f : scale;
}
// To the nearest whole number, ``offset`` more; what is no number has a scale that is none.
#if defined(__AVX512VNNI__)
inline void put_rounded(Vector x, int offset, uint8_t* out) {
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(offset))));
}
inline void put_rounded(Vector x, int offset, int8_t* out) { put_rounded(x, offset, reinterpret_cast<uint8_t*>(out)); }
#endif
inline void put_rounded(Vector x, int, float* out) {
    constexpr float SHIFT = 0x1.8p23f;  // added and taken away again, it rounds to whole numbers
    store(out, (x + SHIFT) - SHIFT);
}
inline void put_rounded(Vector, int, bfloat16*) {}
// Whole vectors of them: up to LANES - 1 more than ``count``.
template <class E>
inline void round_to(const float* x, float scale, int offset, E* out, int64_t count) {
    const Vector by = all(scale);
    for (int64_t i = 0; i < count; i += LANES) put_rounded(load(x + i) / by, offset, out + i);
}
// As it is.
inline void convert(const float* x, float* out, int64_t count) { std::memcpy(out, x, count * sizeof(float)); }
inline void convert(const float* x, bfloat16* out, int64_t count) { narrow(x, out, count); }
inline void convert(const float*, uint8_t*, int64_t) {}
inline void convert(const float*, int8_t*, int64_t) {}

inline void weave(const uint8_t* rows, int64_t stride, uint8_t* out, int64_t count) {
    for (int64_t c = 0; c < count; c++) {
        const uint32_t four =
            rows[c] | uint32_t(rows[stride + c]) << 8 | uint32_t(rows[2 * stride + c]) << 16 | uint32_t(rows[3 * stride + c]) << 24;
        std::memcpy(out + 4 * c, &four, 4);
    }
}

constexpr float most_of(int32_t bits) { return float((1 << (bits - 1)) - 1); }

template <class T, class Q, class P>
struct Packing {
    const Rounded& call;
    const Attention& a;
    const Layout<Q, P>& s;
    int64_t b, h;
    const int32_t* order;
    char* head;

    // Rows of a block in float32 [count, stride], zeros beyond the channels.
    int64_t rows_of(const Tensor4& from, int64_t column, int64_t channels, int64_t stride, float* out) const {
        const int64_t first = column * s.block, count = std::min(s.block, a.keys - first);
        for (int64_t r = 0; r < count; r++) {
            const int64_t next = first + r + AHEAD;
            if (next < a.keys) fetch(at<T>(from, b, h, order ? order[next] : next), channels);
            widen(at<T>(from, b, h, order ? order[first + r] : first + r), out + r * stride, channels);
            std::fill(out + r * stride + channels, out + (r + 1) * stride, 0.0f);
        }
        return count;
    }
    // Of the keys over all tokens, or zero.
    void mean() const {
        thread_local Scratch room;
        float *out = reinterpret_cast<float*>(head + s.key_mean), *row = room.get<float>(a.channels);
        std::vector<double> sums(a.channels);
        for (int64_t i = 0; i < a.keys && call.smooth_keys; i++) {
            if (i + AHEAD < a.keys) fetch(at<T>(a.k, b, h, i + AHEAD), a.channels);
            widen(at<T>(a.k, b, h, i), row, a.channels);
            for (int64_t c = 0; c < a.channels; c++) sums[c] += row[c];
        }
        for (int64_t c = 0; c < a.channels; c++) out[c] = float(sums[c] / double(a.keys));
    }
    void keys(int64_t column) const {
        thread_local Scratch floats_room, codes_room;
        constexpr int64_t LINE = 16 * GROUP<Q>;
        const int64_t stride = (s.depth + LINE - 1) / LINE * LINE;
        float* x = floats_room.get<float>(s.block * stride);
        Q* codes = codes_room.get<Q>(16 * stride);
        const int64_t count = rows_of(a.k, column, a.channels, stride, x);
        float most = 0;
        if (call.qk_bits < 16) {
            const float* mean = reinterpret_cast<const float*>(head + s.key_mean);
            uint32_t top = 0;
            for (int64_t r = 0; r < count; r++) {
                float* row = x + r * stride;
                for (int64_t d = 0; d < a.channels; d++) row[d] -= mean[d];
                top = std::max(top, largest_bits(row, a.channels));
            }
            most = most_of(call.qk_bits);
            reinterpret_cast<float*>(head + s.key_scales)[column] = scale_of(float_of(top), most);
        }
        const float scale = reinterpret_cast<float*>(head + s.key_scales)[column];
        Q* out = reinterpret_cast<Q*>(head) + column * s.wide * s.depth;
        int32_t* sums = reinterpret_cast<int32_t*>(head + s.key_sums) + column * s.wide;
        for (int64_t first = 0; first < s.wide; first += 16) {
            for (int64_t j = 0; j < 16; j++) {
                Q* to = codes + j * stride;
                if (first + j >= count) std::memset(static_cast<void*>(to), 0, stride * sizeof(Q));
                else if (most) round_to(x + (first + j) * stride, scale, 0, to, stride);
                else convert(x + (first + j) * stride, to, stride);
                if constexpr (OFFSET && IS_BYTE<Q>) {
                    int32_t sum = 0;
                    for (int64_t d = 0; d < stride; d++) sum += int8_t(to[d]);
                    sums[first + j] = sum * OFFSET;
                }
            }
            Q* panel = out + first / PANEL_KEYS<Q> * PANEL_KEYS<Q> * s.depth + first % PANEL_KEYS<Q> * GROUP<Q>;
            for (int64_t g = 0; g < s.depth / GROUP<Q>; g += 16)
                turn(
                    codes + g * GROUP<Q>, stride * sizeof(Q), std::min<int64_t>(16, s.depth / GROUP<Q> - g),
                    panel + g * PANEL_KEYS<Q> * GROUP<Q>, PANEL_KEYS<Q> * 4
                );
        }
    }
    void values(int64_t column) const {
        thread_local Scratch floats_room, codes_room;
        float* x = floats_room.get<float>(s.wide * s.width);
        P* codes = codes_room.get<P>(GROUP<P> * s.width);
        const int64_t count = rows_of(a.v, column, a.value_channels, s.width, x);
        std::fill(x + count * s.width, x + s.wide * s.width, 0.0f);
        float* scales = reinterpret_cast<float*>(head + s.value_scales) + column * s.width;
        const bool rounds = call.pv_bits < 16;
        if (rounds) {
            const float most = most_of(call.pv_bits);
            for (int64_t c = 0; c < s.width; c += LANES) {
                Integers top = {};
                for (int64_t r = 0; r < count; r++) {
                    Integers bits;
                    std::memcpy(&bits, x + r * s.width + c, sizeof bits);
                    bits &= 0x7fffffff;
                    top = bits > top ? bits : top;
                }
                for (int64_t i = 0; i < LANES; i++) scales[c + i] = scale_of(float_of(uint32_t(top[i])), most);
            }
        }
        P* out = reinterpret_cast<P*>(head + s.values) + column * s.wide * s.width;
        for (int64_t j = 0; j < s.wide; j += GROUP<P>) {
            for (int64_t g = 0; g < GROUP<P>; g++) {
                const float* row = x + (j + g) * s.width;
                P* to = codes + g * s.width;
                if (!rounds) convert(row, to, s.width);
                else
                    for (int64_t c = 0; c < s.width; c += LANES) put_rounded(load(row + c) / load(scales + c), 0, to + c);
            }
            for (int64_t p = 0; p < s.panels; p++) {
                const int64_t first = p * s.vectors * LANES, chunk = j / CHUNK * CHUNK;
                weave(codes + first, s.width, out + chunk * s.width + first * CHUNK + (j - chunk) * s.lanes(p), s.lanes(p));
            }
        }
    }
};

// --- attending ----------------------------------------------------------------------------------------------------------

inline Vector number(const float* sum, const int32_t*) { return load(sum); }
#if defined(__AVX512VNNI__)
inline Vector number(const int32_t* sum, const int32_t* shift) {
    const __m512i x = load(sum);
    return _mm512_cvtepi32_ps(OFFSET ? _mm512_sub_epi32(x, load(shift)) : x);
}
#endif
template <class P>
inline void put_pair(Vector low, Vector high, P* out) {
    if constexpr (!IS_BYTE<P>) put(low, high, out);
}

// A block of queries of a head, or a part of it, and the state of its softmax.
template <class T, class Q, class P>
struct Queries {
    const Rounded& call;
    const Attention& a;
    const Layout<Q, P>& s;
    int64_t b, h, first, rows;
    const int32_t* order;
    const char* head;
    float *scores, *out, *top, *shrink, *total, *weight;  // weight: of the sums of a tile
    Q* queries;
    int32_t* sums;  // of a tile's products with values
    float scale;    // of scores, log2(e) and what queries were rounded with in it
    float shift[1024];
    float extra[MOST_KEYS];

    int64_t row(int64_t i) const { return order ? order[i] : i; }

    // Queries from ``begin`` on, ``count`` of them, make up the block, whose rows from ``first`` on are these.
    void take_queries(int64_t begin, int64_t count, int64_t tall, float* room) {
        const int64_t d = a.channels;
        scale = a.scale * LOG2E;
        double* mean = reinterpret_cast<double*>(scores);
        if (call.qk_bits < 16 && call.smooth_queries) {
            std::fill(mean, mean + d, 0.0);
            for (int64_t i = 0; i < count; i++) {
                widen(at<T>(a.q, b, h, row(begin + i)), room, d);
                for (int64_t c = 0; c < d; c++) mean[c] += room[c];
            }
            for (int64_t c = 0; c < d; c++) shift[c] = float(mean[c] / double(count));
        } else std::fill(shift, shift + d, 0.0f);
        const float most = most_of(call.qk_bits);
        float step = 0;
        if (call.qk_bits < 16) {
            uint32_t largest = 0;
            for (int64_t i = 0; i < count; i++) {
                if (i + AHEAD < count) fetch(at<T>(a.q, b, h, row(begin + i + AHEAD)), d);
                less_shift(begin + i, room);
                largest = std::max(largest, largest_bits(room, d));
            }
            step = scale_of(float_of(largest), most), scale *= step;
        }
        for (int64_t r = 0; r < tall; r++) {
            Q* to = queries + r * s.depth;
            std::fill(room, room + s.depth + LANES, 0.0f);
            if (r < rows) less_shift(first + r, room);
            if (step) round_to(room, step, OFFSET, to, s.depth);
            else convert(room, to, s.depth);
            top[r] = -INFINITY, total[r] = 0;
        }
    }
    void less_shift(int64_t i, float* out) const {
        widen(at<T>(a.q, b, h, row(i)), out, a.channels);
        for (int64_t c = 0; c < a.channels; c++) out[c] -= shift[c];
    }

    // What is added to scores: minus infinity beyond the last key; what smoothing took from queries times the keys.
    void make_extra(int64_t column, int64_t count) {
        std::fill(extra, extra + count, 0.0f);
        std::fill(extra + count, extra + s.wide, -INFINITY);
        if (call.qk_bits == 16 || !call.smooth_queries) return;
        float* x = reinterpret_cast<float*>(sums);
        const float* mean = reinterpret_cast<const float*>(head + s.key_mean);
        float constant = 0;
        for (int64_t c = 0; c < a.channels; c++) constant += shift[c] * mean[c];
        const int64_t wide = a.channels / LANES * LANES;
        for (int64_t j = 0; j < count; j++) {
            const int64_t key = column * s.block + j;
            if (j + AHEAD < count) fetch(at<T>(a.k, b, h, row(key + AHEAD)), a.channels);
            widen(at<T>(a.k, b, h, row(key)), x, a.channels);
            Vector partial = {};
            for (int64_t c = 0; c < wide; c += LANES) partial = fma(load(x + c), load(shift + c), partial);
            float dot = 0;
            for (int i = 0; i < LANES; i++) dot += partial[i];
            for (int64_t c = wide; c < a.channels; c++) dot += x[c] * shift[c];
            extra[j] = (dot - constant) * (a.scale * LOG2E);
        }
    }

    void add_mask(int64_t i, int64_t column, int64_t count, float* x) const {
        const float* mask = a.mask + b * a.mask_batch + h * a.mask_head + row(first + i) * a.mask_row;
        for (int64_t j = 0; j < count; j++) x[j] += mask[row(column * s.block + j) * a.mask_key] * LOG2E;
    }

    // Sixteen rows of products become probabilities: codes relative to the largest of the row in this tile, or numbers relative to
    // the running maximum.
    void soften(int64_t i, int64_t column, int64_t count, float by) {
        const int32_t* key_sums = reinterpret_cast<const int32_t*>(head + s.key_sums) + column * s.wide;
        const float most = float((1 << call.pv_bits) - 1);
        const Vector factor = all(by), levels = all(most);
        Vector tops[16], totals[16];
        for (int r = 0; r < 16; r++) {
            float* x = scores + (i + r) * s.wide;
            Vector largest = all(-INFINITY);
            for (int64_t j = 0; j < s.wide; j += LANES) {
                const Vector score = fma(number(reinterpret_cast<SumOf<Q>*>(x) + j, key_sums + j), factor, load(extra + j));
                store(x + j, score);
                largest = larger(score, largest);
            }
            if (a.mask && i + r < rows) {
                add_mask(i + r, column, count, x);
                largest = all(-INFINITY);
                for (int64_t j = 0; j < s.wide; j += LANES) largest = larger(load(x + j), largest);
            }
            tops[r] = largest;
        }
        float tile_top[16], minus[16], sum[16];
        reduce16<Largest>(tops, tile_top);
        const bool codes = call.pv_bits < 16;
        for (int r = 0; r < 16; r += LANES) {
            const Vector before = load(top + i + r), tile = load(tile_top + r), now = larger(tile, before);
            store(top + i + r, now);
            store(shrink + i + r, before == now ? all(1.0f) : power(before - now));
            store(weight + i + r, tile == now ? all(1.0f) : power(tile - now));
            const Vector from = codes ? tile : now;
            store(minus + r, from == -INFINITY ? Vector{} : -from);
        }
        for (int r = 0; r < 16; r++) {
            const float* x = scores + (i + r) * s.wide;
            P* p = reinterpret_cast<P*>(scores + (i + r) * s.wide);
            const Vector less = all(minus[r]);
            Vector even = {}, odd = {};
            for (int64_t j = 0; j < s.wide; j += 2 * LANES) {
                const Vector low = power(load(x + j) + less), high = power(load(x + j + LANES) + less);
                even += low, odd += high;
                if (codes) {
                    put_rounded(low * levels, 0, p + j);
                    put_rounded(high * levels, 0, p + j + LANES);
                } else put_pair(low, high, p + j);
            }
            totals[r] = even + odd;
        }
        reduce16<Sum>(totals, sum);
        for (int r = 0; r < 16; r += LANES) {
            const Vector found = codes ? load(sum + r) * load(weight + i + r) : load(sum + r);
            store(total + i + r, fma(load(total + i + r), load(shrink + i + r), found));
        }
    }

    void add_values(int64_t column) {
        constexpr int64_t UNIT = 4 / int64_t(sizeof(P));
        const P* values = reinterpret_cast<const P*>(head + s.values) + column * s.wide * s.width;
        const P* p = reinterpret_cast<const P*>(scores);
        const bool codes = call.pv_bits < 16;
        if (!codes)
            for (int64_t r = 0; r < rows; r++)
                if (shrink[r] != 1.0f)
                    for (int64_t c = 0; c < s.width; c += LANES) store(out + r * s.width + c, load(out + r * s.width + c) * shrink[r]);
        for (int64_t i = 0; i < s.panels; i++) {
            const int64_t begin = i * s.vectors * LANES;
            Panel<P> panel{{}, CHUNK};
            for (int64_t c = 0; c < s.wide / CHUNK; c++) panel.part[c] = values + c * CHUNK * s.width + begin * CHUNK;
            const int vectors = int(s.lanes(i) / LANES);
            if (codes) {
                SumOf<P>* to = reinterpret_cast<SumOf<P>*>(sums) + begin;
                tiles_of<P, false>(vectors, p, s.wide * UNIT, panel, s.wide, to, s.width, rows);
            } else if constexpr (!IS_BYTE<P>) tiles_of<P, true>(vectors, p, s.wide * UNIT, panel, s.wide, out + begin, s.width, rows);
        }
        if (!codes) return;
        const float* scales = reinterpret_cast<const float*>(head + s.value_scales) + column * s.width;
        const float step = 1.0f / float((1 << call.pv_bits) - 1);
        for (int64_t r = 0; r < rows; r++) {
            const Vector by = all(weight[r] * step), earlier = all(shrink[r]);
            const SumOf<P>* found = reinterpret_cast<const SumOf<P>*>(sums) + r * s.width;
            float* to = out + r * s.width;
            for (int64_t c = 0; c < s.width; c += LANES)
                store(to + c, fma(whole(found + c) * load(scales + c), by, load(to + c) * earlier));
        }
    }
    static Vector whole(const float* x) { return load(x); }
#if defined(__AVX512VNNI__)
    static Vector whole(const int32_t* x) { return _mm512_cvtepi32_ps(load(x)); }
#endif

    void attend(const uint8_t* live) {
        const Tiles shapes;
        const float* key_scales = reinterpret_cast<const float*>(head + s.key_scales);
        for (int64_t column = 0; column < s.columns; column++) {
            if (live && !(live[column / 8] >> column % 8 & 1)) continue;
            const int64_t count = std::min(s.block, a.keys - column * s.block);
            const Q* keys = reinterpret_cast<const Q*>(head) + column * s.wide * s.depth;
            for (int64_t j = 0; j < s.wide; j += PANEL_KEYS<Q>)
                tiles_of<Q, false>(
                    KEY_VECTORS<Q>, queries, s.depth, {{keys + j * s.depth}, s.depth}, s.depth, reinterpret_cast<SumOf<Q>*>(scores) + j,
                    s.wide, rows
                );
            make_extra(column, count);
            const float by = call.qk_bits < 16 ? scale * key_scales[column] : scale;
            for (int64_t r = 0; r < rows; r += 16) soften(r, column, count, by);
            add_values(column);
        }
    }
    void end() const {
        for (int64_t r = 0; r < rows; r++) {
            const float by = total[r] == 0 ? 0.0f : 1 / total[r];
            float* line = out + r * s.width;
            for (int64_t c = 0; c < s.width; c += LANES) store(line + c, load(line + c) * by);
            narrow(line, const_cast<T*>(at<T>(a.out, b, h, row(first + r))), a.value_channels);
        }
    }
};

template <class T, class Q, class P>
void attend_rows(const Rounded& call, const Layout<Q, P>& s, const char* head, int64_t b, int64_t h, int64_t block, int64_t part) {
    thread_local Scratch room;
    const Attention& a = call.attention;
    const int64_t begin = block * a.block_q, count = std::min(a.block_q, a.queries - begin), first = begin + part * ROWS;
    if (first >= begin + count) return;
    const int64_t rows = std::min<int64_t>(ROWS, begin + count - first), tall = (rows + TALL - 1) / TALL * TALL;
    Queries<T, Q, P> q{call, a, s, b, h, first, rows, a.order ? a.order + h * a.keys : nullptr, head};
    const int64_t longest = std::max<int64_t>(s.depth + 16, 2 * a.channels);
    float* memory = room.get<float>(tall * (s.wide + 2 * s.width + 4 + s.depth) + 3 * longest);
    const auto take = [&](int64_t floats) { return std::exchange(memory, memory + floats); };
    float* line = take(longest);
    q.scores = take(std::max(tall * s.wide, longest)), q.out = take(tall * s.width), q.top = take(tall), q.shrink = take(tall);
    q.total = take(tall), q.weight = take(tall);
    q.queries = reinterpret_cast<Q*>(take(tall * s.depth)), q.sums = reinterpret_cast<int32_t*>(take(std::max(tall * s.width, longest)));
    q.take_queries(begin, count, tall, line);
    std::fill(q.out, q.out + tall * s.width, 0.0f);
    const int64_t blocks = (a.queries + a.block_q - 1) / a.block_q;
    q.attend(a.live ? a.live + (h * blocks + block) * ((s.columns + 7) / 8) : nullptr);
    q.end();
}

constexpr int64_t PACKED_BYTES = 16 << 20;

template <class T, class Q, class P>
void attention(const Rounded& call) {
    thread_local Scratch packed_room;
    const Attention& a = call.attention;
    const Layout<Q, P> s(a);
    const int64_t pairs = a.batch * a.heads, blocks = (a.queries + a.block_q - 1) / a.block_q, parts = (a.block_q + ROWS - 1) / ROWS;
    const int64_t chunk = std::min(pairs, std::max<int64_t>(a.threads, PACKED_BYTES / s.size));
    char* packed = packed_room.get<char>(chunk * s.size);
    for (int64_t first = 0; first < pairs; first += chunk) {
        const int64_t count = std::min(chunk, pairs - first);
        const auto packing = [&](int64_t pair) {
            const int64_t b = (first + pair) / a.heads, h = (first + pair) % a.heads;
            return Packing<T, Q, P>{call, a, s, b, h, a.order ? a.order + h * a.keys : nullptr, packed + pair * s.size};
        };
        for_each(a.threads, count, 1, [&](int64_t pair) { packing(pair).mean(); });
        for_each(a.threads, count * s.columns, 1, [&](int64_t task) {
            packing(task / s.columns).keys(task % s.columns);
            packing(task / s.columns).values(task % s.columns);
        });
        for_each(a.threads, count * blocks * parts, 1, [&](int64_t task) {
            const int64_t pair = task / parts / blocks, b = (first + pair) / a.heads, h = (first + pair) % a.heads;
            attend_rows<T, Q, P>(call, s, packed + pair * s.size, b, h, task / parts % blocks, task % parts);
        });
    }
    packed_room.keep_at_most(KEPT_BYTES);
}

}  // namespace dqtk

EXPORT void dqtk_rounded_attention(const dqtk::Rounded* call) {
    using namespace dqtk;
    with_type(call->attention.type, [&](auto element) {
        using T = decltype(element);
        using E = Element<T>;
        if (call->qk_bits == 16 && call->pv_bits == 16) attention<T, E, E>(*call);
        else if (call->qk_bits == 16) attention<T, E, WeightCode>(*call);
        else if (call->pv_bits == 16) attention<T, QueryCode, E>(*call);
        else attention<T, QueryCode, WeightCode>(*call);
    });
}
