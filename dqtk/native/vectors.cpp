// Codes that name words of learned books: every few weights are the sum of a word of each book, times the scale of their row.
// The operations and the order of numerics/vectors.py: words_of, then the scale, then one rounding.
#include "few.h"
#include "weights.h"

#include <type_traits>

namespace dqtk {

// Mirrored by a ctypes structure in vectors.py. Codes of a row: those of one vector side by side, packed with ``bits``.
struct Vectors {
    const uint8_t* codes;
    const float* books;  // [count, words, length]
    const float* scale;  // of row n at n * scale_step
    int64_t stride, n, k, scale_step;
    int32_t bits, words, length, count, threads;
};

namespace {

// ``vectors`` sums of ``M`` words (0: of as many as there are books) of ``D`` numbers.
template <int D, int M>
void sums(const Vectors& w, const uint8_t* codes, float scale, float* out, int64_t vectors) {
    typedef float Word __attribute__((vector_size(4 * D)));
    const int64_t count = M ? M : w.count, size = int64_t(w.words) * D;
    const auto word = [&](int64_t book, uint8_t code) __attribute__((always_inline)) {
        Word found;
        std::memcpy(&found, w.books + book * size + code * D, sizeof found);
        return found;
    };
    for (int64_t i = 0; i < vectors; i++, codes += count, out += D) {
        Word total = word(0, codes[0]);
#pragma GCC unroll 4
        for (int64_t book = 1; book < count; book++) total += word(book, codes[book]);
        total *= scale;
        std::memcpy(out, &total, sizeof total);
    }
}

template <int D>
void sums(const Vectors& w, const uint8_t* codes, float scale, float* out, int64_t vectors) {
    switch (w.count) {
        case 1: return sums<D, 1>(w, codes, scale, out, vectors);
        case 2: return sums<D, 2>(w, codes, scale, out, vectors);
        case 3: return sums<D, 3>(w, codes, scale, out, vectors);
        case 4: return sums<D, 4>(w, codes, scale, out, vectors);
        default: return sums<D, 0>(w, codes, scale, out, vectors);
    }
}

void sums(const Vectors& w, const uint8_t* codes, float scale, float* out, int64_t vectors) {
    switch (w.length) {
        case 1: return sums<1>(w, codes, scale, out, vectors);
        case 2: return sums<2>(w, codes, scale, out, vectors);
        case 4: return sums<4>(w, codes, scale, out, vectors);
        case 8: return sums<8>(w, codes, scale, out, vectors);
        default: return sums<16>(w, codes, scale, out, vectors);
    }
}

// Row ``n`` as T [k].
template <class T>
void decode_words(const Vectors& w, int64_t n, T* out) {
    thread_local Scratch codes_room;
    const uint8_t* codes = w.codes + n * w.stride;
    const int64_t vectors = w.k / w.length;
    if (w.bits < 8) {
        uint8_t* room = codes_room.get<uint8_t>(vectors * w.count + 8);
        unpack(codes, w.bits, room, vectors * w.count);
        codes = room;
    }
    const float scale = w.scale[n * w.scale_step];
    if constexpr (std::is_same_v<T, float>) return sums(w, codes, scale, out, vectors);
    constexpr int64_t PART = 512;  // numbers that wait for their rounding
    float values[PART];
    for (int64_t i = 0; i < vectors; i += PART / w.length) {
        const int64_t length = std::min(PART / w.length, vectors - i);
        sums(w, codes + i * w.count, scale, values, length);
        narrow(values, out + i * w.length, length * w.length);
    }
}

}  // namespace
}  // namespace dqtk

// ``count`` rows from ``first`` to ``out`` [count, k].
EXPORT void dqtk_vectors_decode(const dqtk::Vectors* w, int64_t first, int64_t count, int32_t type, void* out) {
    dqtk::with_type(type, [&](auto element) {
        auto* rows = static_cast<decltype(element)*>(out);
        const int64_t grain = std::max<int64_t>(1, 16384 / w->k);
        dqtk::for_each(w->threads, count, grain, [&](int64_t i) { dqtk::decode_words(*w, first + i, rows + i * w->k); });
    });
}

// ``x`` [rows, k] and ``y`` [rows, n] of one type, up to two rows.
EXPORT void dqtk_vectors_few(const dqtk::Vectors* w, const void* x, int64_t rows, const float* bias, int32_t type, void* y) {
    dqtk::with_type(type, [&](auto element) {
        using T = decltype(element);
        const auto decode = [&](int64_t first, int64_t, int64_t, T* out) { dqtk::decode_words(*w, first, out); };
        dqtk::few::multiply(w->threads, w->n, w->k, 1, static_cast<const T*>(x), rows, bias, static_cast<T*>(y), decode);
    });
}
