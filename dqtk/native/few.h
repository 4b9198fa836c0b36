// Products of one or two rows of inputs with a stored weight of any format: a decoded row of weights is used while the nearest cache
// still holds it, and never lies in memory.
#pragma once

#include "base.h"

namespace dqtk {
namespace few {

constexpr int MOST_ROWS = 2;  // from three on a matmul of decoded rows is as fast (measured on Zen 4)
#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int STEP = 32, PARTS = STEP / LANES;  // of a sum: as many chains of operations as hide their latency
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint32_t Integers __attribute__((vector_size(4 * LANES)));

inline Floats lanes(const float* in) {
    Floats out;
    std::memcpy(&out, in, sizeof out);
    return out;
}

inline Floats lanes(const bfloat16* in) {
    Shorts narrow;
    std::memcpy(&narrow, in, sizeof narrow);
    const Integers wide = __builtin_convertvector(narrow, Integers) << 16;
    Floats out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}

inline Floats lanes(const float16* in) {
    float out[LANES];
    widen(in, out, LANES);
    return lanes(out);
}

inline Floats multiply_add(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return a * b + sum;
#endif
}

// out [R] = x [R, k] times a row of weights; rows of x and the row of weights are followed by zeros up to whole steps.
template <int R, class T>
void dot(const T* weights, const float* x, int64_t stride, int64_t k, float* out) {
    Floats sums[R][PARTS] = {};
    for (int64_t i = 0; i < k; i += STEP) {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            const Floats w = lanes(weights + i + part * LANES);
#pragma GCC unroll 2
            for (int r = 0; r < R; r++)
                sums[r][part] = multiply_add(w, lanes(x + r * stride + i + part * LANES), sums[r][part]);
        }
    }
    for (int r = 0; r < R; r++) {
        Floats sum = sums[r][0];
        for (int part = 1; part < PARTS; part++) sum += sums[r][part];
        out[r] = 0;
        for (int j = 0; j < LANES; j++) out[r] += sum[j];
    }
}

// y [rows, n] = x [rows, k] W^T + bias, summed in float32. ``decode(first, count, stride, out)`` writes ``count`` rows of W as T,
// ``stride`` apart; they are asked for ``step`` at a time.
template <class T, class Decode>
void multiply(int threads, int64_t n, int64_t k, int64_t step, const T* x, int64_t rows, const float* bias, T* y, Decode&& decode) {
    thread_local Scratch inputs_room;
    const int64_t width = (k + STEP - 1) / STEP * STEP;
    float* inputs = inputs_room.get<float>(rows * width);
    for (int64_t r = 0; r < rows; r++) {
        widen(x + r * k, inputs + r * width, k);
        std::fill(inputs + r * width + k, inputs + (r + 1) * width, 0.0f);
    }
    for_each(threads, (n + step - 1) / step, std::max<int64_t>(1, 16384 / (k * step)), [&](int64_t part) {
        thread_local Scratch weights_room;
        const int64_t first = part * step, count = std::min(step, n - first);
        T* weights = weights_room.get<T>(count * width);
        decode(first, count, width, weights);
        for (int64_t i = 0; i < count; i++) {
            T* row = weights + i * width;
            std::memset(static_cast<void*>(row + k), 0, size_t(width - k) * sizeof(T));
            float out[MOST_ROWS];
            if (rows == 1) dot<1>(row, inputs, width, k, out);
            else dot<2>(row, inputs, width, k, out);
            for (int64_t r = 0; r < rows; r++)
                narrow(bias ? out[r] + bias[first + i] : out[r], y[r * n + first + i]);
        }
    });
}

}  // namespace few
}  // namespace dqtk
