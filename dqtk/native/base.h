// What every kernel here uses: number conversions that equal torch's bit for bit, reused memory, and torch's own threads.
//
// One library is built per level of the CPU: AMX, AVX512-VNNI (with BF16 or without), AVX2, or plain C++ ("generic"). Loops are written so that the compiler
// turns them into vectors; intrinsics stand where it would not. Float arithmetic must not be contracted into fused operations.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace dqtk {

// --- numbers ------------------------------------------------------------------------------------------------------------

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float widened(float value) { return value; }

inline float widened(bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }

inline float widened(float16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, exponent = (value.bits >> 10) & 31, mantissa = value.bits & 1023;
    if (exponent == 0) return float_of(bits_of(float(mantissa) * 0x1p-24f) | sign);
    return float_of(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}

inline void narrow(float value, float& out) { out = value; }

inline void narrow(float value, bfloat16& out) {  // to nearest, ties to even
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void narrow(float value, float16& out) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    uint32_t half;
    if (magnitude > 0x7f800000u) half = 0x7e00u;
    else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // from 65520 on: infinity
    else if (magnitude < 0x38800000u) half = uint32_t(std::rint(float_of(magnitude) * 0x1p24f));  // below 2^-14: multiples of 2^-24
    else half = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
    out.bits = uint16_t(sign | half);
}

template <class T>
inline void widen(const T* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = widened(in[i]);
}

template <class T>
inline void narrow(const float* in, T* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) narrow(in[i], out[i]);
}

#if defined(__F16C__) && defined(__AVX2__)
template <>
inline void widen(const float16* in, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
    for (; i < count; i++) out[i] = widened(in[i]);
}

template <>
inline void narrow(const float* in, float16* out, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < count; i++) narrow(in[i], out[i]);
}
#endif

#if defined(__AVX512BF16__)
template <>
inline void narrow(const float* in, bfloat16* out, int64_t count) {
    constexpr int ODD = 0x01 | 0x20 | 0x80;  // NaN and what is too small to be normal: the instruction treats them in its own way
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512 a = _mm512_loadu_ps(in + i), b = _mm512_loadu_ps(in + i + 16);
        if (_mm512_fpclass_ps_mask(a, ODD) | _mm512_fpclass_ps_mask(b, ODD))
            for (int j = 0; j < 32; j++) narrow(in[i + j], out[i + j]);
        else _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    for (; i < count; i++) narrow(in[i], out[i]);
}
#endif

// The largest magnitude as bits of a float. Bits of non-negative floats are ordered as the floats are, NaN above infinity.
template <class T>
inline uint32_t largest_bits(const T* in, int64_t count) {
    int32_t top = 0;
    for (int64_t i = 0; i < count; i++) top = std::max(top, int32_t(bits_of(widened(in[i])) & 0x7fffffffu));
    return uint32_t(top);
}

template <class T>
inline uint16_t largest_of_halves(const T* in, int64_t count) {
    int16_t top = 0;
    for (int64_t i = 0; i < count; i++) top = std::max(top, int16_t(in[i].bits & 0x7fff));
    return uint16_t(top);
}

template <>
inline uint32_t largest_bits(const float16* in, int64_t count) {
    return bits_of(widened(float16{largest_of_halves(in, count)}));
}

template <>
inline uint32_t largest_bits(const bfloat16* in, int64_t count) {
    return uint32_t(largest_of_halves(in, count)) << 16;
}

// Calls ``body`` with a value of the element type that ``type`` names.
template <class F>
inline void with_type(int32_t type, F&& body) {
    if (type == FLOAT32) body(float());
    else if (type == BFLOAT16) body(bfloat16());
    else body(float16());
}

// --- activations --------------------------------------------------------------------------------------------------------

enum Activation : int32_t { NONE = 0, GELU = 1, GELU_TANH = 2 };

// e^x to about one unit in the last place, as straight code that a compiler turns into vectors (Cephes' expf polynomial).
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = std::rint(x * 1.44269504088896341f);
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * float_of(uint32_t(int32_t(n) + 127) << 23);
}

// x Phi(x), Phi through the complementary error function of |x| / sqrt(2) (Abramowitz and Stegun 7.1.26): exact tails on both sides.
inline float gelu(float x) {
    const float z = std::fabs(x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * exponential(-z * z);
    return x * (x < 0 ? tail : 1.0f - tail);
}

// The tanh form: x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline float gelu_tanh(float x) { return x / (1.0f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }

inline void activate(int32_t activation, float* values, int64_t count) {
    if (activation == GELU)
        for (int64_t i = 0; i < count; i++) values[i] = gelu(values[i]);
    else if (activation == GELU_TANH)
        for (int64_t i = 0; i < count; i++) values[i] = gelu_tanh(values[i]);
}

// --- memory -------------------------------------------------------------------------------------------------------------

// Memory of a thread that its next call finds again: fresh pages can cost more than the work done in them.
class Scratch {
  public:
    template <class T>
    T* get(int64_t count) {
        const int64_t bytes = (count * int64_t(sizeof(T)) + 64 + 4095) / 4096 * 4096;  // and room for a vector past the end
        if (bytes > size_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(4096, size_t(bytes));
            size_ = memory_ ? bytes : 0;
            if (!memory_) std::abort();
        }
        return static_cast<T*>(memory_);
    }
    void keep_at_most(int64_t bytes) {
        if (size_ <= bytes) return;
        std::free(memory_);
        memory_ = nullptr;
        size_ = 0;
    }
    ~Scratch() { std::free(memory_); }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

constexpr int64_t KEPT_BYTES = 32 << 20;

// --- threads ------------------------------------------------------------------------------------------------------------

// The OpenMP runtime that torch has loaded, so that there is one pool of threads. Null: everything runs in the calling thread.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern Parallel parallel;

// Runs ``body(i)`` for i < count in up to ``threads`` threads, which take the next ``grain`` of them when they are free.
template <class F>
inline void for_each(int threads, int64_t count, int64_t grain, F&& body) {
    struct Shared {
        F& body;
        int64_t count, grain;
        std::atomic<int64_t> next{0};
    } shared{body, count, grain};
    auto work = [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        for (int64_t first; (first = s.next.fetch_add(s.grain)) < s.count;)
            for (int64_t i = first; i < std::min(first + s.grain, s.count); i++) s.body(i);
    };
    threads = int(std::min<int64_t>(threads, (count + grain - 1) / grain));
    if (threads <= 1 || !parallel) work(&shared);
    else parallel(work, &shared, unsigned(threads), 0);
}

// --- turning ------------------------------------------------------------------------------------------------------------

// 16 rows of up to 16 groups of four bytes become rows of groups: group g of row i goes to place i of line g. Strides in bytes; whole
// rows of 16 groups are read.
#if defined(__AVX512F__)
inline void turn(__m512i* a) {
    __m512i b[16];
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 groups within each quarter
        const __m512i p = _mm512_unpacklo_epi32(a[i], a[i + 1]), q = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        const __m512i r = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), s = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
        b[i] = _mm512_unpacklo_epi64(p, r), b[i + 1] = _mm512_unpackhi_epi64(p, r);
        b[i + 2] = _mm512_unpacklo_epi64(q, s), b[i + 3] = _mm512_unpackhi_epi64(q, s);
    }
    for (int i = 0; i < 4; i++) {  // and the quarters
        const __m512i p = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), q = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        const __m512i r = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88), s = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        a[i] = _mm512_shuffle_i32x4(p, r, 0x88), a[i + 8] = _mm512_shuffle_i32x4(p, r, 0xdd);
        a[i + 4] = _mm512_shuffle_i32x4(q, s, 0x88), a[i + 12] = _mm512_shuffle_i32x4(q, s, 0xdd);
    }
}
#endif
inline void turn(const void* rows, int64_t stride, int64_t groups, void* out, int64_t out_stride) {
    const char* in = static_cast<const char*>(rows);
    char* to = static_cast<char*>(out);
#if defined(__AVX512F__)
    __m512i a[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * stride);
    turn(a);
    for (int64_t g = 0; g < groups; g++) _mm512_storeu_si512(to + g * out_stride, a[g]);
#else
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < 16; i++) std::memcpy(to + g * out_stride + 4 * i, in + i * stride + 4 * g, 4);
#endif
}

// --- tiles --------------------------------------------------------------------------------------------------------------

// The shapes of a thread's tiles of AMX, 16 rows of 64 bytes, while there is one of these. Others in this thread set them anew for
// themselves.
#if defined(__AMX_TILE__)
struct Tiles {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Tiles() {
        static const Shapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};
#else
struct Tiles {
    Tiles() {}
};
#endif

}  // namespace dqtk
