// Integer linear layers and convolutions: inputs rounded to 8-bit codes, exact integer products, scales and bias in one pass.
//
// A call works on chunks of rows (tokens, or output positions of some samples), as many as a few MiB of codes hold:
//   1. Threads round the inputs into codes. Convolutions store them channels last, padding included.
//   2. Threads take panels of outputs. A panel of weights is unpacked and interleaved once per chunk, into memory that stays in the
//      thread's cache, and multiplied with all rows of the chunk. Weights are never expanded as a whole.
// A row of a convolution is not gathered: it is a few runs of neighbouring codes (the taps of a kernel row, all channels of each),
// and the innermost loop goes over these runs. A linear layer has one run. Runs whose length is no multiple of a group of codes read
// a little beyond their end; there the panel holds zeros.
//
// VNNI multiplies unsigned with signed bytes, so codes are stored with an offset of 128, which is taken away again through the sums
// of the weights, as a zero point is. AMX multiplies signed bytes, the other levels 16-bit numbers, two at a time; they need none.
#include "weights.h"

namespace dqtk {

Parallel parallel = nullptr;

#if defined(__AMX_INT8__)
using Code = int8_t;
using Factor = int8_t;  // a weight in a panel
constexpr int OFFSET = 0, ROWS = 256, COLUMNS = 32, STEP = 64;
#elif defined(__AVX512VNNI__)
using Code = uint8_t;
using Factor = int8_t;
constexpr int OFFSET = 128, ROWS = 6, COLUMNS = 64, STEP = 4;
#elif defined(__AVX2__)
using Code = int16_t;
using Factor = int16_t;
constexpr int OFFSET = 0, ROWS = 6, COLUMNS = 16, STEP = 2;
#else
using Code = int16_t;
using Factor = int16_t;
constexpr int OFFSET = 0, ROWS = 4, COLUMNS = 16, STEP = 2;
#endif
constexpr int GROUP = 4 / int(sizeof(Code));  // codes that one lane of a vector multiplies and sums
constexpr int64_t groups_of(int64_t codes) { return (codes + STEP - 1) / STEP * (STEP / GROUP); }  // of whole steps
constexpr int SPARE_ROWS = STEP > GROUP ? 15 : 0;  // that a tile reads beyond the last

// Codes from row to row of a linear layer. Rows of a tile lie in different sets of the cache where this is an odd number of lines.
constexpr int64_t row_width(int64_t codes) { return STEP == 64 && codes / 64 % 2 == 0 ? codes + 64 : codes; }
constexpr int64_t CHUNK_BYTES = 8 << 20;
#if defined(__AMX_INT8__)
// Tiles multiply so fast that codes must come from the second cache: half a MiB of rows is multiplied with a MiB of panels, and of
// a panel so many steps at a time as leave room in the first cache (measured on Granite Rapids, as are ROWS).
constexpr int64_t NEAR_BYTES = 1 << 19, PANEL_BYTES = 1 << 20, NEAR_STEPS = 9;
#else
constexpr int64_t NEAR_BYTES = CHUNK_BYTES, PANEL_BYTES = 0;
#endif
constexpr int64_t FEW_ROWS = 2;  // up to so many, interleaving weights costs more than it saves (measured on Zen 4)

// Mirrored by ctypes structures in calls.py, which say what the fields are.
struct Input {
    const void* x;
    int64_t stride;
    int32_t type;
    int32_t threads;
    const float* smooth;
    const float* scale;
    const int32_t* zero;
};
struct Output {
    void* y;
    const float* scale;
    int64_t scale_step;
    const float* bias;
    int64_t active_from;
    int32_t activation;
};
struct Window {
    int64_t batch, channels;
    int64_t size[3], kernel[3], stride[3], padding[3], dilation[3], out[3];
    int32_t channels_last;
};

// --- 1. rounding inputs -------------------------------------------------------------------------------------------------

// ``within``: nothing is larger than 127 scales, and the scale is an ordinary number.
struct Rounding {
    float scale, zero, low, high;
    bool within;
};

constexpr float LEAST = 1e-30f, MOST = 1e30f;  // between them scales are ordinary numbers, and so are their reciprocals

// The scale of what has this largest magnitude (bits of a float), and how it is rounded. NaN and infinity become the scale.
inline Rounding rounding_of(const Input& in, uint32_t top_bits, float& scale) {
    const float top = float_of(top_bits);
    if (in.scale) {
        scale = std::isfinite(top) ? *in.scale : top;
        return {*in.scale, in.zero ? float(*in.zero) : 0.0f, -128, 127, false};
    }
    scale = top / 127;
    if (scale <= LEAST) scale = 1;
    return {scale, 0, -127, 127, scale > LEAST && scale < MOST};
}

#if defined(__AVX512VNNI__)
// x / scale, correctly rounded as a division is, in a third of its time: a quotient by the reciprocal, corrected once by its exact
// remainder (Markstein 1990). Beyond 1e30 a code saturates anyway; where the reciprocal is no ordinary number, it is a division.
struct Quotient {
    __m512 scale, reciprocal, large;
    bool divides;
    explicit Quotient(float by) : scale(_mm512_set1_ps(by)), reciprocal(_mm512_set1_ps(1 / by)), large(_mm512_set1_ps(MOST)) {
        divides = !(by > LEAST && by < MOST);
    }
    __m512 of(__m512 x) const {
        if (divides) return _mm512_div_ps(x, scale);
        const __m512 first = _mm512_mul_ps(x, reciprocal), rest = _mm512_fnmadd_ps(first, scale, x);
        const __mmask16 ordinary = _mm512_cmp_ps_mask(_mm512_abs_ps(first), large, _CMP_LT_OQ);
        return _mm512_mask3_fmadd_ps(rest, reciprocal, first, ordinary);
    }
};
#endif

#if defined(__AVX512VNNI__)
inline __m512 load_floats(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load_floats(const bfloat16* x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
}
inline __m512 load_floats(const float16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
#endif

// Rounds what is within 127 ordinary scales: nothing saturates, nothing is NaN.
template <class T>
inline void round_within(const T* x, float scale, Code* out, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512VNNI__)
    const __m512 by = _mm512_set1_ps(scale), reciprocal = _mm512_set1_ps(1 / scale);
    const __m512i offset = _mm512_set1_epi32(OFFSET);
    for (; i + 16 <= count; i += 16) {
        const __m512 values = load_floats(x + i), first = _mm512_mul_ps(values, reciprocal);
        const __m512 quotient = _mm512_fmadd_ps(_mm512_fnmadd_ps(first, by, values), reciprocal, first);
        const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(quotient), offset);
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(whole));
    }
#endif
    for (; i < count; i++) out[i] = Code(int32_t(std::rint(widened(x[i]) / scale)) + OFFSET);
}

inline void round_codes(const float* x, const Rounding& by, Code* out, int64_t count) {
    const Rounding r = by;
    int64_t i = 0;
#if defined(__AVX512VNNI__)
    const Quotient quotient(r.scale);
    const __m512 zero = _mm512_set1_ps(r.zero), low = _mm512_set1_ps(r.low), high = _mm512_set1_ps(r.high);
    const __m512i offset = _mm512_set1_epi32(OFFSET);
    for (; i + 16 <= count; i += 16) {
        __m512 code = quotient.of(_mm512_loadu_ps(x + i));
        code = _mm512_add_ps(_mm512_roundscale_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), zero);
        const __mmask16 number = _mm512_cmp_ps_mask(code, code, _CMP_ORD_Q);
        code = _mm512_min_ps(_mm512_max_ps(code, low), high);
        const __m512i whole = _mm512_add_epi32(_mm512_maskz_cvtps_epi32(number, code), offset);
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(whole));
    }
#endif
    for (; i < count; i++) {
        float code = std::rint(x[i] / r.scale) + r.zero;
        code = code < r.low ? r.low : code;
        code = code > r.high ? r.high : code;
        code = code == code ? code : 0.0f;
        out[i] = Code(int32_t(code) + OFFSET);
    }
}

// Rounds elements of any type, through a small buffer if need be.
template <class T>
inline void round_elements(const T* x, const Rounding& by, Code* out, int64_t count) {
    if (by.within) return round_within(x, by.scale, out, count);
    float values[256];
    for (int64_t i = 0; i < count; i += 256) {
        const int64_t length = std::min<int64_t>(256, count - i);
        widen(x + i, values, length);
        round_codes(values, by, out + i, length);
    }
}

// One token: smoothed, then rounded as its own dtype, as an unfused layer would have it.
template <class T>
void round_row(const Input& in, const T* x, int64_t k, Code* out, float& scale) {
    if (!in.smooth) return round_elements(x, rounding_of(in, largest_bits(x, k), scale), out, k);
    thread_local Scratch room;
    float* values = room.get<float>(k);
    T rounded[64];
    for (int64_t i = 0; i < k; i += 64) {
        const int64_t length = std::min<int64_t>(64, k - i);
        widen(x + i, values + i, length);
        for (int64_t j = 0; j < length; j++) values[i + j] *= in.smooth[i + j];
        narrow(values + i, rounded, length);
        widen(rounded, values + i, length);
    }
    round_elements(values, rounding_of(in, largest_bits(values, k), scale), out, k);
}

// --- 2. panels of weights -----------------------------------------------------------------------------------------------

// Where the codes of a row lie: ``count`` runs of ``length`` codes, ``groups`` groups of codes each. Behind the last row there is
// room for ``SPARE_ROWS`` more, ``spare`` codes apart.
struct Runs {
    const int64_t* offsets;
    int64_t count, length, groups, spare;
};

// A row of weights as factors, each run padded with zeros to whole groups. Null ``row``: zeros.
inline const Factor* padded_row(const int8_t* row, const Runs& runs, Factor* room) {
    const int64_t width = runs.groups * GROUP;
    if constexpr (sizeof(Factor) == 1)
        if (row && runs.length == width) return reinterpret_cast<const Factor*>(row);
    for (int64_t run = 0; run < runs.count; run++) {
        Factor* out = room + run * width;
        for (int64_t i = 0; i < width; i++) out[i] = row && i < runs.length ? Factor(row[run * runs.length + i]) : Factor(0);
    }
    return room;
}

// 16 rows of ``groups`` groups become groups of 16 lanes, COLUMNS lanes apart. Sums of each row are added up on the way.
#if defined(__AVX512VNNI__)
void interleave(const Factor* const* rows, int64_t groups, Factor* panel, int32_t* sums) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t g = 0; g < groups; g += 16) {
        const int live = int(std::min<int64_t>(16, groups - g));
        const __mmask16 mask = __mmask16((1u << live) - 1);
        __m512i a[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi32(mask, rows[i] + g * GROUP);
        turn(a);
        for (int i = 0; i < live; i++) {
            _mm512_storeu_si512(panel + (g + i) * COLUMNS * GROUP, a[i]);
            sum = _mm512_dpbusd_epi32(sum, ones, a[i]);
        }
    }
    _mm512_storeu_si512(sums, sum);
}
#else
void interleave(const Factor* const* rows, int64_t groups, Factor* panel, int32_t* sums) {
    for (int i = 0; i < 16; i++) {
        int32_t sum = 0;
        for (int64_t g = 0; g < groups; g++) std::memcpy(panel + (g * COLUMNS + i) * GROUP, rows[i] + g * GROUP, 4);
        for (int64_t j = 0; j < groups * GROUP; j++) sum += rows[i][j];
        sums[i] = sum;
    }
}
#endif

void make_panel(const Weight& w, int64_t first, const Runs& runs, Factor* panel, int32_t* sums) {
    thread_local Scratch integers_room, factors_room;
    const int64_t groups = runs.count * runs.groups, width = (w.k + 7) / 8 * 8;
    int8_t* integers = integers_room.get<int8_t>(16 * width);
    Factor* factors = factors_room.get<Factor>(16 * groups * GROUP);
    for (int column = 0; column < COLUMNS; column += 16) {
        const Factor* rows[16];
        for (int i = 0; i < 16; i++) {
            const int64_t n = first + column + i;
            const int8_t* row = n < w.n ? integer_row(w, n, integers + i * width) : nullptr;
            rows[i] = padded_row(row, runs, factors + i * groups * GROUP);
        }
        interleave(rows, groups, panel + column * GROUP, sums + column);
    }
}

// --- 3. products --------------------------------------------------------------------------------------------------------

// acc [count, COLUMNS] = codes of up to ROWS rows times a panel.
#if defined(__AMX_INT8__)
// The codes that a step of tiles reads begin at ``offset`` of their row.
struct Steps {
    const Runs& runs;
    int64_t per_run, run, code;
    Steps(const Runs& runs, int64_t first) : runs(runs), per_run(runs.groups * GROUP / STEP) {
        run = first / per_run, code = first % per_run * STEP;
    }
    int64_t offset() const { return runs.offsets[run] + code; }
    void next() {
        code += STEP;
        if (code == per_run * STEP) run++, code = 0;
    }
};

// Sixteen rows of codes as tiles read them. Where rows do not lie at equal distances, their steps are copied: [steps, 16, STEP].
struct TileRows {
    const Code* codes;
    int64_t stride;
    bool copied;
    TileRows(int count, const Code* const* rows, Steps steps, int64_t num_steps, Code* room)
        : codes(rows[0]), stride(count > 1 ? rows[1] - rows[0] : 0) {
        copied = count < 16 && stride > steps.runs.spare;
        for (int r = 2; r < count; r++) copied |= rows[r] - rows[r - 1] != stride;
        if (!copied) return;
        codes = room, stride = STEP;
        for (int64_t step = 0; step < num_steps; step++, steps.next(), room += 16 * STEP)
            for (int r = 0; r < count; r++) _mm512_store_si512(room + r * STEP, _mm512_loadu_si512(rows[r] + steps.offset()));
    }
    const Code* at(int64_t step, const Steps& steps) const { return codes + (copied ? step * 16 * STEP : steps.offset()); }
};

// Adds products of some steps to acc, or begins with zero. Tiles 0 to 3: sums of 16 x 16 outputs; 4 and 5: codes; 6 and 7: weights.
template <bool BOTH, bool ADD>
void multiply_tiles(const TileRows& a, const TileRows& b, Steps steps, int64_t num_steps, const Factor* panel, int32_t* acc) {
    int32_t* below = acc + 16 * COLUMNS;
    if constexpr (ADD) {
        _tile_loadd(0, acc, COLUMNS * 4);
        _tile_loadd(1, acc + 16, COLUMNS * 4);
        if constexpr (BOTH) {
            _tile_loadd(2, below, COLUMNS * 4);
            _tile_loadd(3, below + 16, COLUMNS * 4);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < num_steps; step++, steps.next(), panel += STEP * COLUMNS) {
        _tile_loadd(6, panel, COLUMNS * GROUP);
        _tile_loadd(4, a.at(step, steps), a.stride);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, panel + 16 * GROUP, COLUMNS * GROUP);
        _tile_dpbssd(1, 4, 7);
        if constexpr (BOTH) {
            _tile_loadd(5, b.at(step, steps), b.stride);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, acc, COLUMNS * 4);
    _tile_stored(1, acc + 16, COLUMNS * 4);
    if constexpr (!BOTH) return;
    _tile_stored(2, below, COLUMNS * 4);
    _tile_stored(3, below + 16, COLUMNS * 4);
}

template <bool ADD>
void multiply_steps(
    int count, const Code* const* rows, const Runs& runs, int64_t first, int64_t num_steps, const Factor* panel, int32_t* acc
) {
    alignas(64) Code room[2][NEAR_STEPS * 16 * STEP];
    const Steps steps(runs, first);
    const TileRows a(std::min(count, 16), rows, steps, num_steps, room[0]);
    panel += first * STEP * COLUMNS;
    if (count <= 16) return multiply_tiles<false, ADD>(a, a, steps, num_steps, panel, acc);
    multiply_tiles<true, ADD>(a, TileRows(count - 16, rows + 16, steps, num_steps, room[1]), steps, num_steps, panel, acc);
}

// Some steps for all rows, then the next ones: that part of the panel stays in the first cache.
void multiply_rows(int count, const Code* const* rows, const Runs& runs, const Factor* panel, int32_t* acc) {
    const int64_t num_steps = runs.count * runs.groups * GROUP / STEP;
    const int64_t parts = (num_steps + NEAR_STEPS - 1) / NEAR_STEPS, length = (num_steps + parts - 1) / parts;
    for (int64_t first = 0; first < num_steps; first += length)
        for (int r = 0; r < count; r += 32) {
            const int live = std::min(32, count - r);
            const int64_t some = std::min(length, num_steps - first);
            int32_t* sums = acc + r * COLUMNS;
            if (first == 0) multiply_steps<false>(live, rows + r, runs, first, some, panel, sums);
            else multiply_steps<true>(live, rows + r, runs, first, some, panel, sums);
        }
}

#elif defined(__AVX512VNNI__)
template <int R>
void multiply_tile(const Code* const* rows, const Runs& runs, const Factor* panel, int32_t* acc) {
    __m512i c[R][4];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++) c[r][j] = _mm512_setzero_si512();
    for (int64_t run = 0; run < runs.count; run++) {
        const Code* a[R];
        for (int r = 0; r < R; r++) a[r] = rows[r] + runs.offsets[run];
        for (int64_t g = 0; g < runs.groups; g++, panel += COLUMNS * GROUP) {
            const __m512i b0 = _mm512_loadu_si512(panel), b1 = _mm512_loadu_si512(panel + 64);
            const __m512i b2 = _mm512_loadu_si512(panel + 128), b3 = _mm512_loadu_si512(panel + 192);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                int32_t four;
                std::memcpy(&four, a[r] + g * GROUP, 4);
                const __m512i v = _mm512_set1_epi32(four);
                c[r][0] = _mm512_dpbusd_epi32(c[r][0], v, b0);
                c[r][1] = _mm512_dpbusd_epi32(c[r][1], v, b1);
                c[r][2] = _mm512_dpbusd_epi32(c[r][2], v, b2);
                c[r][3] = _mm512_dpbusd_epi32(c[r][3], v, b3);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++) _mm512_storeu_si512(acc + r * COLUMNS + 16 * j, c[r][j]);
}
#elif defined(__AVX2__)
template <int R>
void multiply_tile(const Code* const* rows, const Runs& runs, const Factor* panel, int32_t* acc) {
    __m256i c[R][2];
    for (int r = 0; r < R; r++) c[r][0] = c[r][1] = _mm256_setzero_si256();
    for (int64_t run = 0; run < runs.count; run++) {
        const Code* a[R];
        for (int r = 0; r < R; r++) a[r] = rows[r] + runs.offsets[run];
        for (int64_t g = 0; g < runs.groups; g++, panel += COLUMNS * GROUP) {
            const __m256i b0 = _mm256_loadu_si256((const __m256i*)panel), b1 = _mm256_loadu_si256((const __m256i*)(panel + 16));
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                int32_t two;
                std::memcpy(&two, a[r] + g * GROUP, 4);
                const __m256i v = _mm256_set1_epi32(two);
                c[r][0] = _mm256_add_epi32(c[r][0], _mm256_madd_epi16(v, b0));
                c[r][1] = _mm256_add_epi32(c[r][1], _mm256_madd_epi16(v, b1));
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) _mm256_storeu_si256((__m256i*)(acc + r * COLUMNS + 8 * j), c[r][j]);
}
#else
template <int R>
void multiply_tile(const Code* const* rows, const Runs& runs, const Factor* panel, int32_t* acc) {
    int32_t c[R][COLUMNS] = {};
    for (int64_t run = 0; run < runs.count; run++)
        for (int64_t g = 0; g < runs.groups; g++, panel += COLUMNS * GROUP)
            for (int r = 0; r < R; r++) {
                const Code* a = rows[r] + runs.offsets[run] + g * GROUP;
                for (int j = 0; j < COLUMNS; j++) c[r][j] += a[0] * panel[2 * j] + a[1] * panel[2 * j + 1];
            }
    std::memcpy(acc, c, sizeof c);
}
#endif

#if !defined(__AMX_INT8__)
void multiply_rows(int count, const Code* const* rows, const Runs& runs, const Factor* panel, int32_t* acc) {
    switch (count) {
        case 1: return multiply_tile<1>(rows, runs, panel, acc);
        case 2: return multiply_tile<2>(rows, runs, panel, acc);
        case 3: return multiply_tile<3>(rows, runs, panel, acc);
        case 4: return multiply_tile<4>(rows, runs, panel, acc);
        case 5: return multiply_tile<std::min(5, ROWS)>(rows, runs, panel, acc);
        default: return multiply_tile<ROWS>(rows, runs, panel, acc);
    }
}
#endif

// Rows of a chunk: where their codes begin, and their scales, each of ``per_scale`` neighbouring rows.
struct Rows {
    const Code* codes;
    const int64_t* offsets;
    int64_t count;
    const float* scale;
    int64_t per_scale;
};

// What turns sums of products of one panel into outputs.
struct Finish {
    int32_t shift[COLUMNS];
    float scale[COLUMNS], bias[COLUMNS];
    bool has_bias;
    int32_t activation;
    int64_t active_from;  // of the columns of this panel
    Finish(const Output& out, const int32_t* sums, int32_t shift_by, int64_t first, int count)
        : has_bias(out.bias), activation(out.activation), active_from(std::max<int64_t>(out.active_from - first, 0)) {
        for (int j = 0; j < COLUMNS; j++) {
            const bool live = j < count;
            shift[j] = live ? int32_t(uint32_t(shift_by) * uint32_t(sums[j])) : 0;
            scale[j] = live ? out.scale[(first + j) * out.scale_step] : 0.0f;
            bias[j] = live && out.bias ? out.bias[first + j] : 0.0f;
        }
    }
};

// y[n] = x_scale * w_scale[n] * (acc[n] - shift[n]) + bias[n], rounded to T. The order of operations is the reference's. An
// activation is of y as it was rounded, and rounded again, as if it were a layer of its own.
template <class T>
inline void finish(const Finish& by, const int32_t* acc, float x_scale, T* y, int count) {
    float values[COLUMNS];
    if (by.has_bias)
        for (int j = 0; j < COLUMNS; j++)
            values[j] = float(int32_t(uint32_t(acc[j]) - uint32_t(by.shift[j]))) * x_scale * by.scale[j] + by.bias[j];
    else
        for (int j = 0; j < COLUMNS; j++)
            values[j] = float(int32_t(uint32_t(acc[j]) - uint32_t(by.shift[j]))) * x_scale * by.scale[j];
    if (by.activation != NONE && by.active_from < COLUMNS) {
        T rounded[COLUMNS];
        narrow(values, rounded, COLUMNS);
        widen(rounded, values, COLUMNS);
        if (by.active_from == 0) activate(by.activation, values, COLUMNS);
        else activate(by.activation, values + by.active_from, COLUMNS - by.active_from);
    }
    if (count == COLUMNS) narrow(values, y, COLUMNS);  // a constant makes straight vector code
    else narrow(values, y, count);
}

template <class T>
void multiply_panel(
    const Rows& rows, int64_t begin, int64_t end, const Runs& runs, const Factor* panel, const Finish& by, T* y, int64_t n, int count
) {
    alignas(64) int32_t acc[ROWS * COLUMNS];
    const Tiles tiles;
    for (int64_t m = begin; m < end; m += ROWS) {
        const int live = int(std::min<int64_t>(ROWS, end - m));
        const Code* starts[ROWS];
        for (int r = 0; r < live; r++) starts[r] = rows.codes + rows.offsets[m + r];
        multiply_rows(live, starts, runs, panel, acc);
        for (int r = 0; r < live; r++)
            finish(by, acc + r * COLUMNS, rows.scale[(m + r) / rows.per_scale], y + (m + r) * n, count);
    }
}

// In how many parts to cut the rows so that all threads have work to the end; each part interleaves its panels again, which
// costs about as much as eight rows.
int64_t count_parts(int64_t panels, int64_t rows, int threads) {
    int64_t best = 1, best_cost = INT64_MAX;
    for (int64_t parts = 1; parts <= std::max<int64_t>(1, std::min<int64_t>(2 * threads, rows / 32)); parts++) {
        const int64_t rounds = (panels * parts + threads - 1) / threads, cost = rounds * ((rows + parts - 1) / parts + 8);
        if (cost < best_cost) best = parts, best_cost = cost;
    }
    return best;
}

// A task makes some panels and multiplies each with its rows, as many rows at a time as stay in a core's cache meanwhile.
template <class T>
void multiply_chunk(const Rows& rows, const Runs& runs, const Weight& w, const Output& out, int32_t shift, int threads, T* y) {
    const int64_t size = runs.count * runs.groups * GROUP, panels = (w.n + COLUMNS - 1) / COLUMNS;  // of a row or column
    const int64_t near = std::max<int64_t>(ROWS, NEAR_BYTES / int64_t(size * sizeof(Code)) / ROWS * ROWS);
    const int64_t most = rows.count <= near ? 1 : std::max<int64_t>(1, PANEL_BYTES / int64_t(size * COLUMNS * sizeof(Factor)));
    const int64_t groups = (panels + most - 1) / most, parts = count_parts(groups, rows.count, threads);
    const int64_t length = ((rows.count + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
    for_each(threads, groups * parts, 1, [&](int64_t task) {
        thread_local Scratch room, sums_room;
        const int64_t first = task / parts * panels / groups, last = (task / parts + 1) * panels / groups;
        const int64_t begin = task % parts * length, end = std::min(begin + length, rows.count);
        if (begin >= end) return;
        Factor* factors = room.get<Factor>((last - first) * size * COLUMNS);
        int32_t* sums = sums_room.get<int32_t>((last - first) * COLUMNS);
        for (int64_t m = begin; m < end; m += near)
            for (int64_t i = first; i < last; i++) {
                Factor* panel = factors + (i - first) * size * COLUMNS;
                if (m == begin) make_panel(w, i * COLUMNS, runs, panel, sums + (i - first) * COLUMNS);
                const int count = int(std::min<int64_t>(COLUMNS, w.n - i * COLUMNS));
                const Finish by(out, sums + (i - first) * COLUMNS, shift, i * COLUMNS, count);
                multiply_panel(rows, m, std::min(m + near, end), runs, panel, by, y + i * COLUMNS, w.n, count);
            }
    });
}

#if defined(__AVX512VNNI__)
constexpr int FEW_OFFSET = 128;  // of the codes here, at every level

// acc [R, 4] = codes of R rows times four rows of weights as they lie in memory, and the sums of the weights.
template <int R>
void multiply_few(const Code* codes, int64_t stride, const int8_t* const* w, int64_t k, int32_t (*acc)[COLUMNS], int32_t* sums) {
    const __m512i ones = _mm512_set1_epi8(1), offset = _mm512_set1_epi8(char(FEW_OFFSET - OFFSET));
    __m512i c[R][4], s[4];
    for (int j = 0; j < 4; j++) {
        s[j] = _mm512_setzero_si512();
        for (int r = 0; r < R; r++) c[r][j] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < k; i += 64) {
        const __mmask64 mask = k - i >= 64 ? ~0ull : (1ull << (k - i)) - 1;
        for (int j = 0; j < 4; j++) {
            const __m512i b = _mm512_maskz_loadu_epi8(mask, w[j] + i);
            s[j] = _mm512_dpbusd_epi32(s[j], ones, b);
            for (int r = 0; r < R; r++) {
                const __m512i a = _mm512_add_epi8(_mm512_loadu_si512(codes + r * stride + i), offset);
                c[r][j] = _mm512_dpbusd_epi32(c[r][j], a, b);
            }
        }
    }
    for (int j = 0; j < 4; j++) {
        sums[j] = _mm512_reduce_add_epi32(s[j]);
        for (int r = 0; r < R; r++) acc[r][j] = _mm512_reduce_add_epi32(c[r][j]);
    }
}

template <class T>
void multiply_few_rows(const Rows& rows, int64_t stride, const Weight& w, const Output& out, int32_t shift, int threads, T* y) {
    for_each(threads, (w.n + COLUMNS - 1) / COLUMNS, 1, [&](int64_t task) {
        thread_local Scratch room;
        const int64_t width = (w.k + 7) / 8 * 8, first = task * COLUMNS;
        const int count = int(std::min<int64_t>(COLUMNS, w.n - first));
        int8_t* integers = room.get<int8_t>(4 * width);
        int32_t acc[FEW_ROWS][COLUMNS], sums[COLUMNS];
        for (int column = 0; column < count; column += 4) {
            const int8_t* row[4];
            for (int j = 0; j < 4; j++)
                row[j] = column + j < count ? integer_row(w, first + column + j, integers + j * width) : row[0];
            if (rows.count == 1) multiply_few<1>(rows.codes, stride, row, w.k, (int32_t(*)[COLUMNS])(acc[0] + column), sums + column);
            else multiply_few<2>(rows.codes, stride, row, w.k, (int32_t(*)[COLUMNS])(acc[0] + column), sums + column);
        }
        const Finish by(out, sums, shift, first, count);
        for (int64_t m = 0; m < rows.count; m++) finish(by, acc[m], rows.scale[m], y + m * w.n + first, count);
    });
}
#endif

// --- linear -------------------------------------------------------------------------------------------------------------

// Layers of one input, which is rounded once: chunk by chunk, so that its codes stay near for all of them.
template <class T>
void linear(const Input& in, const Weight* weights, const Output* outputs, int64_t layers, int64_t rows) {
    thread_local Scratch codes_room, offsets_room, scales_room;
    const int64_t k = weights->k, start = 0, groups = groups_of(k), width = row_width(groups * GROUP);
    const Runs runs{&start, 1, k, groups, width};
    const int32_t shift = OFFSET + (in.zero ? *in.zero : 0);
    const int64_t chunk = std::max<int64_t>(64, CHUNK_BYTES / int64_t(width * sizeof(Code))), most = std::min(rows, chunk);
    Code* codes = codes_room.get<Code>((most + SPARE_ROWS) * width);
    int64_t* offsets = offsets_room.get<int64_t>(most);
    float* scales = scales_room.get<float>(most);
    for (int64_t m = 0; m < rows; m += chunk) {
        const int64_t count = std::min(chunk, rows - m);
        const T* x = static_cast<const T*>(in.x) + m * in.stride;
        for_each(count * k < 16384 ? 1 : in.threads, count, 8, [&](int64_t i) {
            round_row(in, x + i * in.stride, k, codes + i * width, scales[i]);
            offsets[i] = i * width;
        });
        const Rows these{codes, offsets, count, scales, 1};
        for (int64_t i = 0; i < layers; i++) {
            const Weight& w = weights[i];
            T* y = static_cast<T*>(outputs[i].y) + m * w.n;
            const int threads = count * k * w.n < (1 << 18) ? 1 : in.threads;
#if defined(__AVX512VNNI__)
            if (count <= FEW_ROWS) {
                multiply_few_rows(these, width, w, outputs[i], shift + FEW_OFFSET - OFFSET, threads, y);
                continue;
            }
#endif
            multiply_chunk(these, runs, w, outputs[i], shift, threads, y);
        }
    }
    codes_room.keep_at_most(KEPT_BYTES);
}

// --- convolution --------------------------------------------------------------------------------------------------------

// Codes of a chunk of samples, channels last, with the padding around them.
struct Padded {
    int64_t d, h, w, channels;
    explicit Padded(const Window& o)
        : d(o.size[0] + 2 * o.padding[0]), h(o.size[1] + 2 * o.padding[1]), w(o.size[2] + 2 * o.padding[2]), channels(o.channels) {}
    int64_t at(int64_t sample, int64_t z, int64_t y, int64_t x) const { return (((sample * d + z) * h + y) * w + x) * channels; }
};

// Line (z, y) of a padded sample.
template <class T>
void round_line(const Window& o, const Padded& p, const T* sample, const Rounding& by, int64_t z, int64_t y, Code* out) {
    const Code zero = Code(OFFSET + int32_t(by.zero));
    const int64_t c = o.channels, d = z - o.padding[0], h = y - o.padding[1], pad = o.padding[2], size = o.size[2];
    const bool inside = d >= 0 && d < o.size[0] && h >= 0 && h < o.size[1];
    std::fill_n(out, (inside ? pad : p.w) * c, zero);
    if (!inside) return;
    std::fill_n(out + (pad + size) * c, pad * c, zero);
    out += pad * c;
    const int64_t line = d * o.size[1] + h;
    if (o.channels_last) return round_elements(sample + line * size * c, by, out, size * c);
    Code codes[64];
    for (int64_t i = 0; i < c; i++) {
        const T* row = sample + (i * o.size[0] * o.size[1] + line) * size;
        for (int64_t first = 0; first < size; first += 64) {
            const int64_t length = std::min<int64_t>(64, size - first);
            round_elements(row + first, by, codes, length);
            for (int64_t j = 0; j < length; j++) out[(first + j) * c + i] = codes[j];
        }
    }
}

template <class T>
void find_scales(const Input& in, const T* x, int64_t samples, int64_t elements, float* scales, Rounding* by) {
    thread_local Scratch tops_room;
    constexpr int64_t PIECE = 1 << 15;
    const int64_t pieces = (elements + PIECE - 1) / PIECE;
    uint32_t* tops = tops_room.get<uint32_t>(samples * pieces);
    for_each(in.threads, samples * pieces, 1, [&](int64_t task) {
        const int64_t first = task % pieces * PIECE;
        tops[task] = largest_bits(x + task / pieces * in.stride + first, std::min(PIECE, elements - first));
    });
    for (int64_t i = 0; i < samples; i++)
        by[i] = rounding_of(in, *std::max_element(tops + i * pieces, tops + (i + 1) * pieces), scales[i]);
}

template <class T>
void conv(const Input& in, const Weight& w, const Output& out, const Window& o) {
    thread_local Scratch codes_room, offsets_room, scales_room, rounding_room, runs_room;
    const Padded p(o);
    // Taps of a kernel row are neighbours unless they are dilated; then each tap is a run of its own.
    const int64_t joined = o.dilation[2] == 1 ? o.kernel[2] : 1, per_row = o.kernel[2] / joined;
    const int64_t length = joined * o.channels, num_runs = o.kernel[0] * o.kernel[1] * per_row;
    int64_t* starts = runs_room.get<int64_t>(num_runs);
    for (int64_t i = 0; i < num_runs; i++) {
        const int64_t tap = i % per_row, y = i / per_row % o.kernel[1], z = i / per_row / o.kernel[1];
        starts[i] = p.at(0, z * o.dilation[0], y * o.dilation[1], tap * o.dilation[2]);
    }
    const Runs runs{starts, num_runs, length, groups_of(length), o.stride[2] * o.channels};
    const int32_t shift = OFFSET + (in.zero ? *in.zero : 0);
    const int64_t elements = o.channels * o.size[0] * o.size[1] * o.size[2], sample_codes = p.at(1, 0, 0, 0);
    const int64_t positions = o.out[0] * o.out[1] * o.out[2];
    const int64_t chunk = std::min(o.batch, std::max<int64_t>(1, CHUNK_BYTES / int64_t(sample_codes * sizeof(Code))));
    Code* codes = codes_room.get<Code>(chunk * sample_codes + SPARE_ROWS * o.stride[2] * o.channels + STEP);
    int64_t* offsets = offsets_room.get<int64_t>(chunk * positions);
    float* scales = scales_room.get<float>(chunk);
    Rounding* by = rounding_room.get<Rounding>(chunk);
    for (int64_t b = 0; b < o.batch; b += chunk) {
        const int64_t samples = std::min(chunk, o.batch - b);
        const T* x = static_cast<const T*>(in.x) + b * in.stride;
        find_scales(in, x, samples, elements, scales, by);
        for_each(in.threads, samples * p.d * p.h, 4, [&](int64_t task) {
            const int64_t sample = task / (p.d * p.h), z = task / p.h % p.d, y = task % p.h;
            round_line(o, p, x + sample * in.stride, by[sample], z, y, codes + p.at(sample, z, y, 0));
        });
        for_each(in.threads, samples * o.out[0] * o.out[1], 16, [&](int64_t line) {
            const int64_t sample = line / (o.out[0] * o.out[1]), z = line / o.out[1] % o.out[0], y = line % o.out[1];
            const int64_t first = p.at(sample, z * o.stride[0], y * o.stride[1], 0);
            for (int64_t i = 0; i < o.out[2]; i++) offsets[line * o.out[2] + i] = first + i * o.stride[2] * o.channels;
        });
        const Rows rows{codes, offsets, samples * positions, scales, positions};
        multiply_chunk(rows, runs, w, out, shift, in.threads, static_cast<T*>(out.y) + b * positions * w.n);
    }
    codes_room.keep_at_most(KEPT_BYTES);
    offsets_room.keep_at_most(KEPT_BYTES);
}

}  // namespace dqtk

EXPORT const char* dqtk_level() {
#if defined(__AMX_INT8__)
    return "amx";
#elif defined(__AVX512BF16__)
    return "avx512-bf16";
#elif defined(__AVX512VNNI__)
    return "avx512-vnni";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "generic";
#endif
}

EXPORT void dqtk_use_threads_of(void* gomp_parallel) { dqtk::parallel = reinterpret_cast<dqtk::Parallel>(gomp_parallel); }

EXPORT void dqtk_linear_int8(const dqtk::Input* in, const dqtk::Weight* w, const dqtk::Output* out, int64_t layers, int64_t rows) {
    dqtk::with_type(in->type, [&](auto element) { dqtk::linear<decltype(element)>(*in, w, out, layers, rows); });
}

EXPORT void dqtk_conv_int8(const dqtk::Input* in, const dqtk::Weight* w, const dqtk::Output* out, const dqtk::Window* window) {
    dqtk::with_type(in->type, [&](auto element) { dqtk::conv<decltype(element)>(*in, *w, *out, *window); });
}
