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

// A word of ``D`` numbers: a vector of the compiler's where there is one of that size.
template <int D, bool = (D & (D - 1)) == 0>
struct WordOf {
    typedef float type __attribute__((vector_size(4 * D)));
};
template <int D>
struct WordOf<D, false> {
    struct type {
        float numbers[D];
        void operator+=(const type& other) {
            for (int i = 0; i < D; i++) numbers[i] += other.numbers[i];
        }
        void operator*=(float scale) {
            for (int i = 0; i < D; i++) numbers[i] *= scale;
        }
    };
};

// ``vectors`` sums of ``M`` words (0: of as many as there are books) of ``D`` numbers.
template <int D, int M, class Code>
void sums(const Vectors& w, const Code* codes, float scale, float* out, int64_t vectors) {
    using Word = typename WordOf<D>::type;
    const int64_t count = M ? M : w.count, size = int64_t(w.words) * D;
    const auto word = [&](int64_t book, Code code) __attribute__((always_inline)) {
        Word found;
        std::memcpy(&found, w.books + book * size + int64_t(code) * D, sizeof found);
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

template <int D, class Code>
void sums(const Vectors& w, const Code* codes, float scale, float* out, int64_t vectors) {
    switch (w.count) {
        case 1: return sums<D, 1>(w, codes, scale, out, vectors);
        case 2: return sums<D, 2>(w, codes, scale, out, vectors);
        case 3: return sums<D, 3>(w, codes, scale, out, vectors);
        case 4: return sums<D, 4>(w, codes, scale, out, vectors);
        default: return sums<D, 0>(w, codes, scale, out, vectors);
    }
}

template <class Code>
void sums(const Vectors& w, const Code* codes, float scale, float* out, int64_t vectors) {
    switch (w.length) {
        case 1: return sums<1>(w, codes, scale, out, vectors);
        case 2: return sums<2>(w, codes, scale, out, vectors);
        case 3: return sums<3>(w, codes, scale, out, vectors);
        case 4: return sums<4>(w, codes, scale, out, vectors);
        case 6: return sums<6>(w, codes, scale, out, vectors);
        case 8: return sums<8>(w, codes, scale, out, vectors);
        case 12: return sums<12>(w, codes, scale, out, vectors);
        default: return sums<16>(w, codes, scale, out, vectors);
    }
}

// Row ``n`` as T [k], from its codes.
template <class Code, class T>
void decode_codes(const Vectors& w, const Code* codes, int64_t n, T* out) {
    const int64_t vectors = w.k / w.length;
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

// Row ``n`` as T [k].
template <class T>
void decode_words(const Vectors& w, int64_t n, T* out) {
    thread_local Scratch codes_room;
    const uint8_t* codes = w.codes + n * w.stride;
    const int64_t count = w.k / w.length * w.count;
    if (w.bits == 8) return decode_codes(w, codes, n, out);
    if (w.bits < 8) {
        uint8_t* room = codes_room.get<uint8_t>(count + 8);
        unpack(codes, w.bits, room, count);
        return decode_codes(w, room, n, out);
    }
    uint16_t* room = codes_room.get<uint16_t>(count + 8);
    unpack(codes, w.bits, room, count);
    decode_codes(w, room, n, out);
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
