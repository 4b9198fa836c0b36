// Attention without the matrix of scores (Dao et al. 2022, arXiv 2205.14135): softmax(q k^T * scale + mask) v, blocks of queries
// against blocks of keys, with running maxima and sums in float32. Tokens may be taken in another order, and blocks left out.
//
// A call works on some heads at a time, as many as a few MiB of keys and values hold:
//   1. Threads pack chunks of keys and values into panels, so that one broadcast number of a query (or probability) meets a vector of
//      keys (or of channels). bfloat16 numbers are multiplied in pairs where the CPU can; all other types as float32. This is where
//      the order of the tokens is made: rows are picked up in it here, with the queries, and where outputs are put back.
//   2. Threads take blocks of queries of a head, and go through the chunks that are live for it, two at a time.
// With AMX, tiles multiply bfloat16 numbers, so fast that exponentials take as long: both are done at once (``Beside``).
// Probabilities are rounded to the type that is multiplied, as torch does.
#include "attention.h"

namespace dqtk {

constexpr int64_t NEAR_BYTES = 3 << 18;
constexpr int SIDE = 32;   // rows that tiles multiply at a time
template <class E>
constexpr int KEYS = IN_TILES<E> ? 256 : 128;  // of a step: some chunks, fewer in the last
template <class E>
constexpr int QUERIES = IN_TILES<E> ? 1024 : 96;  // at most, of a task
// Sizes of packed keys and values of a head.
template <class E>
struct Shape {
    int64_t depth;                  // channels of a query, padded to steps
    int64_t chunks;                 // of keys
    int vectors;                    // of a panel of channels; of the last of several, what is left
    int64_t panels, width, blocks;  // of channels, all of their lanes; of queries
    int64_t block_rows;             // of a block of queries
    explicit Shape(const Attention& a) {
        depth = whole_steps<E>(a.channels);
        chunks = (a.keys + CHUNK - 1) / CHUNK;
        const int64_t most = IN_TILES<E> ? 2 : MOST_VECTORS, all = (a.value_channels + LANES - 1) / LANES;
        panels = (all + most - 1) / most;
        vectors = IN_TILES<E> ? 2 : int((all + panels - 1) / panels);
        width = (IN_TILES<E> ? all : panels * vectors) * LANES;
        block_rows = a.live ? a.block_q : QUERIES<E>;
        // Packed keys and values that fill a core's cache are read as seldom as may be.
        const auto few = [&] { return a.queries / block_rows * a.heads * a.batch < 4 * a.threads; };
        while (!a.live && IN_TILES<E> && block_rows > 256 && (size() < (1 << 19) || few())) block_rows /= 2;
        blocks = (a.queries + block_rows - 1) / block_rows;
    }
    int64_t lanes(int64_t panel) const { return std::min<int64_t>(vectors * LANES, width - panel * vectors * LANES); }
    int64_t key_size() const { return chunks * CHUNK * depth; }
    int64_t size() const { return key_size() + chunks * CHUNK * width; }
};

// --- 1. packing ---------------------------------------------------------------------------------------------------------

// Chunk ``chunk`` of the keys of a head: panels of [depth / GROUP, PANEL_KEYS, GROUP]; zeros beyond the last key.
template <class T, class E>
void pack_keys(const Attention& a, const Shape<E>& s, int64_t b, int64_t h, const int32_t* order, int64_t chunk, E* out) {
    thread_local Scratch room;
    constexpr int64_t LINE = 16 * GROUP<E>;
    const int64_t groups = s.depth / GROUP<E>, stride = (s.depth + LINE - 1) / LINE * LINE;
    E* rows = room.get<E>(16 * stride);
    for (int64_t first = 0; first < CHUNK; first += 16) {
        for (int64_t j = 0; j < 16; j++) {
            const int64_t key = chunk * CHUNK + first + j, next = key + AHEAD;
            if (next < a.keys) fetch(at<T>(a.k, b, h, order ? order[next] : next), a.channels);
            take(key < a.keys ? at<T>(a.k, b, h, order ? order[key] : key) : nullptr, a.channels, rows + j * stride, stride);
        }
        E* panel = out + first / PANEL_KEYS<E> * PANEL_KEYS<E> * s.depth + first % PANEL_KEYS<E> * GROUP<E>;
        for (int64_t g = 0; g < groups; g += 16)
            turn(
                rows + g * GROUP<E>, stride * sizeof(E), std::min<int64_t>(16, groups - g), panel + g * PANEL_KEYS<E> * GROUP<E>,
                PANEL_KEYS<E> * 4
            );
    }
}

// Chunk ``chunk`` of the values of a head: panels of [CHUNK / GROUP, lanes, GROUP].
template <class T, class E>
void pack_values(const Attention& a, const Shape<E>& s, int64_t b, int64_t h, const int32_t* order, int64_t chunk, E* out) {
    thread_local Scratch room;
    E* rows = room.get<E>(GROUP<E> * s.width);
    for (int64_t j = 0; j < CHUNK; j += GROUP<E>) {
        for (int64_t g = 0; g < GROUP<E>; g++) {
            const int64_t key = chunk * CHUNK + j + g, next = key + AHEAD;
            if (next < a.keys) fetch(at<T>(a.v, b, h, order ? order[next] : next), a.value_channels);
            take(key < a.keys ? at<T>(a.v, b, h, order ? order[key] : key) : nullptr, a.value_channels, rows + g * s.width, s.width);
        }
        for (int64_t p = 0; p < s.panels; p++) {
            const int64_t lanes = s.lanes(p), first = p * s.vectors * LANES;
            weave(rows + first, s.width, out + first * CHUNK + j * lanes, lanes);
        }
    }
}

// --- 2. attending -------------------------------------------------------------------------------------------------------

// A block of queries of a head, and the state of its softmax. Scores become probabilities where they stand.
template <class E>
struct Block {
    static constexpr int64_t STRIDE = KEYS<E> * 4 / sizeof(E);  // of probabilities
    const Attention& a;
    const Shape<E>& s;
    int64_t b, h, first, rows;
    const int32_t* order;
    const E* packed;
    const int32_t* chunks;
    int64_t num_chunks, steps;
    float *scores, *out, *top, *shrink, *total;  // of rows: the running maximum, scaled; what earlier sums are multiplied with; the sum
    E* queries;
    float factor;  // of scores, log2(e) in it

    static constexpr int64_t CHUNKS = KEYS<E> / CHUNK;  // of a step

    int64_t row(int64_t i) const { return order ? order[first + i] : first + i; }
    int64_t num_keys(int64_t step) const {
        const int64_t last = std::min((step + 1) * CHUNKS, num_chunks) - 1;
        return (last - step * CHUNKS) * CHUNK + std::min<int64_t>(CHUNK, a.keys - chunks[last] * CHUNK);
    }
    // Where the chunk of key ``key`` of a step lies.
    const E* keys(int64_t step, int64_t key) const { return packed + chunks[step * CHUNKS + key / CHUNK] * CHUNK * s.depth; }
    const E* values(int64_t step, int64_t key, int64_t panel) const {
        return packed + s.key_size() + chunks[step * CHUNKS + key / CHUNK] * CHUNK * s.width + panel * s.vectors * LANES * CHUNK;
    }

    // Scores of row ``i`` scaled, the mask added, minus infinity beyond the last key.
    void mask_scores(int64_t i, int64_t step, int64_t count, float* scores) const {
        constexpr float LOG2E = 1.44269504088896341f;
        if (a.mask) {
            const float* mask = a.mask + b * a.mask_batch + h * a.mask_head + row(i) * a.mask_row;
            for (int64_t j = 0; j < count; j++) {
                const int64_t key = chunks[step * CHUNKS + j / CHUNK] * CHUNK + j % CHUNK;
                scores[j] = scores[j] * factor + mask[(order ? order[key] : key) * a.mask_key] * LOG2E;
            }
        } else
            for (int64_t j = 0; j < count; j++) scores[j] *= factor;
        std::fill(scores + count, scores + KEYS<E>, -INFINITY);
    }

    // Sixteen rows of scores, from row ``i`` on, become probabilities relative to the running maxima. ``between`` is called often.
    template <class F>
    void soften(int64_t i, int64_t step, int64_t count, float* scores, F&& between) {
        constexpr int VECTORS = KEYS<E> / LANES;
        const bool plain = !a.mask && count == KEYS<E> && factor > 0;
        const Vector by = all(plain ? factor : 1.0f);
        if (!plain)
            for (int64_t r = 0; r < std::min<int64_t>(16, rows - i); r++) mask_scores(i + r, step, count, scores + r * KEYS<E>);
        Vector most[16], sums[16];
        for (int r = 0; r < 16; r++) {
            const float* x = scores + r * KEYS<E>;
            Vector even = load(x), odd = load(x + LANES);
#pragma GCC unroll 16
            for (int j = 2; j < VECTORS; j += 2) {
                even = larger(load(x + j * LANES), even);
                odd = larger(load(x + (j + 1) * LANES), odd);
            }
            most[r] = larger(even, odd);
        }
        float largest[16], minus[16], sum[16];
        reduce16<Largest>(most, largest);
        for (int r = 0; r < 16; r += LANES) {
            const Vector before = load(top + i + r), now = larger(load(largest + r) * by, before);
            store(top + i + r, now);
            store(minus + r, now == -INFINITY ? Vector{} : -now);
            store(shrink + i + r, before == now ? all(1.0f) : power(before - now));
        }
        for (int r = 0; r < 16; r++) {
            const float* x = scores + r * KEYS<E>;
            E* p = reinterpret_cast<E*>(scores + r * KEYS<E>);
            const Vector less = all(minus[r]);
            Vector even = {}, odd = {};
#pragma GCC unroll 16
            for (int j = 0; j < VECTORS; j += 2) {
                const Vector low = power(fma(load(x + j * LANES), by, less)), high = power(fma(load(x + (j + 1) * LANES), by, less));
                even += low, odd += high;
                put(low, high, p + j * LANES);
                if (j % 8 == 6) between();
            }
            sums[r] = even + odd;
        }
        reduce16<Sum>(sums, sum);
        for (int r = 0; r < 16; r += LANES) store(total + i + r, fma(load(total + i + r), load(shrink + i + r), load(sum + r)));
    }

    void rescale(int64_t i) const {
        if (shrink[i] == 1.0f) return;
        for (int64_t c = 0; c < s.width; c += LANES) store(out + i * s.width + c, load(out + i * s.width + c) * shrink[i]);
    }

    template <class T>
    void begin(int64_t tall) {
        for (int64_t r = 0; r < tall; r++) {
            if (r + AHEAD < rows) fetch(at<T>(a.q, b, h, row(r + AHEAD)), a.channels);
            take(r < rows ? at<T>(a.q, b, h, row(r)) : nullptr, a.channels, queries + r * s.depth, s.depth);
            top[r] = -INFINITY, total[r] = 0;
        }
    }
    template <class T>
    void end() const {
        for (int64_t r = 0; r < rows; r++) {
            const float by = total[r] == 0 ? 0.0f : 1 / total[r];  // a query that sees no key: 0, as torch has it
            T* y = const_cast<T*>(at<T>(a.out, b, h, row(r)));
            float* line = out + r * s.width;
            for (int64_t c = 0; c < s.width; c += LANES) store(line + c, load(line + c) * by);
            narrow(line, y, a.value_channels);
        }
    }
};

// In vectors: products, then probabilities, then products.
template <class E>
void attend_in_vectors(Block<E>& q) {
    for (int64_t step = 0; step < q.steps; step++) {
        const int64_t count = q.num_keys(step);
        for (int64_t j = 0; j < count; j += PANEL_KEYS<E>) {
            const E* keys = q.keys(step, j) + j % CHUNK * q.s.depth;
            tiles_of<E, false>(KEY_VECTORS<E>, q.queries, q.s.depth, {{keys}, q.s.depth}, q.s.depth, q.scores + j, KEYS<E>, q.rows);
        }
        for (int64_t r = 0; r < q.rows; r += 16) q.soften(r, step, count, q.scores + r * KEYS<E>, [] {});
        for (int64_t r = 0; r < q.rows; r++) q.rescale(r);
        for (int64_t p = 0; p < q.s.panels; p++) {
            const Panel<E> panel{{q.values(step, 0, p), q.values(step, count > CHUNK ? CHUNK : 0, p)}, CHUNK};
            tiles_of<E, true>(
                q.s.vectors, reinterpret_cast<E*>(q.scores), q.STRIDE, panel, whole_steps<E>(count), q.out + p * q.s.vectors * LANES,
                q.s.width, q.rows
            );
        }
    }
}

#if defined(__AMX_BF16__)
// Products in tiles, to be made step by step while vectors do something else: first probabilities of SIDE rows times values, then
// the next SIDE rows of queries times keys. A step multiplies 32 elements of two tiles of rows with two of a panel, in tiles 4 to 7;
// sums are in tiles 0 to 3.
class Beside {
  public:
    // Of probabilities: ``count`` keys of a step. The first step begins with zero.
    void add_values(const Block<bfloat16>& q, int64_t step, int64_t first, const float* scores) {
        block = &q, p_step = step, p = reinterpret_cast<const bfloat16*>(scores), out = q.out + first * q.s.width;
        p_steps = (q.num_keys(step) + 31) / 32, p_panels = q.s.panels;
    }
    void add_keys(const Block<bfloat16>& q, int64_t step, int64_t first, float* scores) {
        block = &q, k_step = step, queries = q.queries + first * q.s.depth, to = scores;
        k_panels = (q.num_keys(step) + 31) / 32;
    }
    int64_t start() {
        job = done = 0;
        if (!block) return 0;
        begin_job();
        return p_panels * p_steps + k_panels * (block->s.depth / 32);
    }
    void run(int64_t until) {
        for (; done < until; done++) one();
    }

    int64_t done = 0;

  private:
    void begin_job() {
        step = 0;
        if (job < p_panels) {
            beside = block->s.lanes(job) > LANES, add = p_step > 0;
            a = p, a_stride = block->STRIDE * 2, steps = p_steps;
            b_stride = block->s.lanes(job) * 4;
            sums = out + job * 2 * LANES, sums_stride = block->s.width * 4;
        } else if (job < p_panels + k_panels) {
            const int64_t key = (job - p_panels) * 32;
            beside = true, add = false;
            a = queries, a_stride = block->s.depth * 2, steps = block->s.depth / 32;
            b = block->keys(k_step, key) + key % CHUNK * block->s.depth, b_stride = 128;
            sums = to + key, sums_stride = KEYS<bfloat16> * 4;
        }
    }
    void one() {
        char *upper = reinterpret_cast<char*>(sums), *lower = upper + 16 * sums_stride;
        if (step == 0) {
            if (add) {
                _tile_loadd(0, upper, sums_stride);
                _tile_loadd(2, lower, sums_stride);
                if (beside) {
                    _tile_loadd(1, upper + 64, sums_stride);
                    _tile_loadd(3, lower + 64, sums_stride);
                }
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
        }
        if (job < p_panels && step % (CHUNK / 32) == 0) b = block->values(p_step, step * 32, job);
        _tile_loadd(6, b, b_stride);
        _tile_loadd(4, a, a_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, reinterpret_cast<const char*>(a) + 16 * a_stride, a_stride);
        _tile_dpbf16ps(2, 5, 6);
        if (beside) {
            _tile_loadd(7, b + 32, b_stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        a += 32, b += 8 * b_stride;
        if (++step < steps) return;
        _tile_stored(0, upper, sums_stride);
        _tile_stored(2, lower, sums_stride);
        if (beside) {
            _tile_stored(1, upper + 64, sums_stride);
            _tile_stored(3, lower + 64, sums_stride);
        }
        job++;
        begin_job();
    }

    const Block<bfloat16>* block = nullptr;
    int64_t p_step = 0, p_steps = 0, p_panels = 0, k_step = 0, k_panels = 0;
    const bfloat16 *p = nullptr, *queries = nullptr;
    float *out = nullptr, *to = nullptr;
    int64_t job = 0, step = 0, steps = 0, a_stride = 0, b_stride = 0, sums_stride = 0;
    const bfloat16 *a = nullptr, *b = nullptr;
    float* sums = nullptr;
    bool beside = true, add = false;
};

// A unit is SIDE rows and the keys of a step. While its scores become probabilities, tiles multiply those of the unit before with
// values, and make the scores of the next. Units of the same rows follow each other for as many keys as stay in a core's cache.
void attend_in_tiles(Block<bfloat16>& q) {
    const Tiles shapes;
    const int64_t sides = (q.rows + SIDE - 1) / SIDE, units = q.steps * sides;
    const int64_t near = std::max<int64_t>(1, NEAR_BYTES / ((q.s.depth + q.s.width) * KEYS<bfloat16> * int64_t(sizeof(bfloat16))));
    float* scores[2] = {q.scores, q.scores + SIDE * KEYS<bfloat16>};
    struct Unit {
        int64_t step, first;
    };
    const auto unit_of = [&](int64_t unit) -> Unit {
        const int64_t begin = unit / (near * sides) * near, length = std::min(near, q.steps - begin), rest = unit - begin * sides;
        return {begin + rest % length, rest / length * SIDE};
    };
    for (int64_t unit = -1; unit <= units; unit++) {
        Beside beside;
        if (unit > 0) {
            const auto [step, first] = unit_of(unit - 1);
            if (step > 0)
                for (int64_t r = first; r < std::min(first + SIDE, q.rows); r++) q.rescale(r);
            beside.add_values(q, step, first, scores[(unit - 1) % 2]);
        }
        if (unit + 1 < units) {
            const auto [step, first] = unit_of(unit + 1);
            beside.add_keys(q, step, first, scores[(unit + 1) % 2]);
        }
        const int64_t all_steps = beside.start();
        if (unit >= 0 && unit < units) {
            const auto [step, first] = unit_of(unit);
            const int64_t count = q.num_keys(step), live = std::min<int64_t>(SIDE, q.rows - first);
            const int64_t moments = (live + 15) / 16 * 16 * (KEYS<bfloat16> / LANES / 8);
            const int64_t at_once = (all_steps + moments - 1) / moments, pause = all_steps ? std::max<int64_t>(1, moments / all_steps) : 1;
            int64_t moment = pause;
            const auto between = [&] {
                if (--moment > 0) return;
                moment = pause;
                beside.run(std::min(beside.done + at_once, all_steps));
            };
            for (int64_t r = 0; r < live; r += 16) q.soften(first + r, step, count, scores[unit % 2] + r * KEYS<bfloat16>, between);
        }
        beside.run(all_steps);
    }
}
#endif

// Chunks of keys that a block of queries sees.
template <class E>
int64_t list_chunks(const Attention& a, const Shape<E>& s, int64_t h, int64_t block, int32_t* chunks) {
    int64_t count = 0;
    if (!a.live) {
        for (; count < s.chunks; count++) chunks[count] = int32_t(count);
        return count;
    }
    const int64_t columns = (a.keys + a.block_k - 1) / a.block_k, per_block = a.block_k / CHUNK;
    const uint8_t* bits = a.live + (h * s.blocks + block) * ((columns + 7) / 8);
    for (int64_t j = 0; j < columns; j++)
        if (bits[j / 8] >> j % 8 & 1)
            for (int64_t c = j * per_block; c < std::min((j + 1) * per_block, s.chunks); c++) chunks[count++] = int32_t(c);
    return count;
}

template <class T, class E>
void attend(const Attention& a, const Shape<E>& s, const E* packed, int64_t b, int64_t h, int64_t first, int64_t rows) {
    thread_local Scratch room, chunks_room;
    int32_t* chunks = chunks_room.get<int32_t>(s.chunks);
    const int64_t num_chunks = list_chunks(a, s, h, first / s.block_rows, chunks);
    constexpr int64_t ROUND = IN_TILES<E> ? SIDE : TALL;  // also of 16 rows of a softmax
    const int64_t tall = (rows + ROUND - 1) / ROUND * ROUND, scored = IN_TILES<E> ? 2 * SIDE : tall;
    float* scores = room.get<float>(scored * KEYS<E> + tall * (s.width + 3 + s.depth));
    float *out = scores + scored * KEYS<E>, *top = out + tall * s.width, *shrink = top + tall, *total = shrink + tall;
    E* queries = reinterpret_cast<E*>(total + tall);
    constexpr float LOG2E = 1.44269504088896341f;
    Block<E> block{a, s, b, h, first, rows, a.order ? a.order + h * a.keys : nullptr, packed, chunks, num_chunks};
    block.steps = (num_chunks + block.CHUNKS - 1) / block.CHUNKS;
    block.scores = scores, block.out = out, block.top = top, block.shrink = shrink, block.total = total, block.queries = queries;
    block.factor = a.scale * LOG2E;
    block.template begin<T>(tall);
    if (!IN_TILES<E> || num_chunks == 0) std::fill(out, out + tall * s.width, 0.0f);
#if defined(__AMX_BF16__)
    if constexpr (IN_TILES<E>) attend_in_tiles(block);
    else
#endif
        attend_in_vectors(block);
    block.template end<T>();
}

constexpr int64_t PACKED_BYTES = 16 << 20;

template <class T>
void attention(const Attention& a) {
    using E = Element<T>;
    const Shape<E> s(a);
    thread_local Scratch packed_room;
    const int64_t pairs = a.batch * a.key_heads, sharing = a.heads / a.key_heads;
    const int64_t parts = (s.block_rows + QUERIES<E> - 1) / QUERIES<E>, height = (s.block_rows + parts - 1) / parts;
    const int64_t chunk = std::min(pairs, std::max<int64_t>(a.threads, PACKED_BYTES / int64_t(s.size() * sizeof(E))));
    E* packed = packed_room.get<E>(chunk * s.size());
    for (int64_t first = 0; first < pairs; first += chunk) {
        const int64_t count = std::min(chunk, pairs - first);
        for_each(a.threads, count * s.chunks, 2, [&](int64_t task) {
            const int64_t pair = task / s.chunks, i = task % s.chunks;
            const int64_t b = (first + pair) / a.key_heads, h = (first + pair) % a.key_heads;
            const int32_t* order = a.order ? a.order + h * a.keys : nullptr;
            E* head = packed + pair * s.size();
            pack_keys<T>(a, s, b, h, order, i, head + i * CHUNK * s.depth);
            pack_values<T>(a, s, b, h, order, i, head + s.key_size() + i * CHUNK * s.width);
        });
        for_each(a.threads, count * sharing * s.blocks * parts, 1, [&](int64_t task) {
            const int64_t part = task % parts, block = task / parts % s.blocks, inner = task / parts / s.blocks;
            const int64_t pair = inner / sharing, b = (first + pair) / a.key_heads;
            const int64_t h = (first + pair) % a.key_heads * sharing + inner % sharing;
            const int64_t begin = block * s.block_rows + part * height;
            const int64_t end = std::min({begin + height, (block + 1) * s.block_rows, a.queries});
            if (begin < end) attend<T>(a, s, packed + pair * s.size(), b, h, begin, end - begin);
        });
    }
    packed_room.keep_at_most(KEPT_BYTES);
}

}  // namespace dqtk

EXPORT void dqtk_attention(const dqtk::Attention* a) {
    dqtk::with_type(a->type, [&](auto element) { dqtk::attention<decltype(element)>(*a); });
}
