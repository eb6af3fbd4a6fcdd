// Register tiles over packed weights, for processors with AVX-512 BF16, VNNI and VBMI. Weights [N, K] are packed as
// [N/64][K/p][64][p] with p = 1 for float32, 2 for bf16 and 4 for int8: the instructions multiply p neighbours along K
// for 16 columns at once, one row of x is broadcast against 64 columns, and a product of any number of rows reads the
// weights as one sequential stream. Processors with AMX do not use this: torch's products use their matrix unit.
#pragma once
#include "scalars.h"
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && !defined(__AMX_BF16__)
#define AK_TILES 1
#include <immintrin.h>

namespace {

constexpr i64 PANEL = 64;  // columns of a panel: 4 registers

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }
inline __m512bh as_bh(__m512i x) { return (__m512bh)x; }

// 2^x to a relative error below 3e-6, a thousandth of a bf16 step: split at the nearest whole number, then the series of
// 2^r up to r^5. Below 2^-126 it is 0.
inline __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
    const __m512 whole = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, whole);
}
constexpr float LOG2_E = 1.44269504f;

// One step along K for 16 columns: 4 bytes of a row of `a` are broadcast, b comes from the panel.
struct FloatStep {
    typedef float sum;
    static __m512i step(__m512i acc, __m512i a, __m512i b) {
        return (__m512i)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
    }
};
struct Bf16Step {
    typedef float sum;
    static __m512i step(__m512i acc, __m512i a, __m512i b) {
        return (__m512i)_mm512_dpbf16_ps((__m512)acc, as_bh(a), as_bh(b));
    }
};
struct Int8Step {  // a unsigned, b signed
    typedef int32_t sum;
    static __m512i step(__m512i acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }
};
template <class X> struct StepOf { typedef FloatStep type; };
template <> struct StepOf<bf16> { typedef Bf16Step type; };

// out [MR, 16 NR] (+)= MR rows of a times a panel. Strides in bytes: `as` between rows of a, `bs` between steps of b;
// `os` in numbers between rows of out. Meanwhile LINES cache lines a step are fetched from `ahead` on: all 4 that the panel
// has into the first cache, fewer into the second.
template <class Step, int MR, int NR, bool ADD, int LINES>
__attribute__((noinline)) void tile(const char *a, i64 as, const char *b, i64 bs, i64 steps, typename Step::sum *out, i64 os,
                                    const char *ahead) {
    __m512i acc[MR][NR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NR; n++) acc[m][n] = ADD ? load(out + m * os + n * 16) : _mm512_setzero_si512();
    for (i64 k = 0; k < steps; k++) {
        __m512i column[NR];
#pragma GCC unroll 8
        for (int n = 0; n < NR; n++) column[n] = load(b + k * bs + n * 64);
#pragma GCC unroll 8
        for (int line = 0; line < LINES; line++)
            _mm_prefetch(ahead + (k * LINES + line) * 64, LINES == 4 ? _MM_HINT_T0 : _MM_HINT_T1);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            int32_t pair;
            std::memcpy(&pair, a + m * as + 4 * k, 4);
            __m512i row = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++) acc[m][n] = Step::step(acc[m][n], row, column[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NR; n++) _mm512_storeu_si512(out + m * os + n * 16, acc[m][n]);
}

template <class Step, bool ADD, int LINES>
inline void tile_of(i64 rows, const char *a, i64 as, const char *b, i64 bs, i64 steps, typename Step::sum *out, i64 os,
                    const char *ahead) {
    switch (rows) {
        case 1: return tile<Step, 1, 4, ADD, LINES>(a, as, b, bs, steps, out, os, ahead);
        case 2: return tile<Step, 2, 4, ADD, LINES>(a, as, b, bs, steps, out, os, ahead);
        case 3: return tile<Step, 3, 4, ADD, LINES>(a, as, b, bs, steps, out, os, ahead);
        case 4: return tile<Step, 4, 4, ADD, LINES>(a, as, b, bs, steps, out, os, ahead);
        case 5: return tile<Step, 5, 4, ADD, LINES>(a, as, b, bs, steps, out, os, ahead);
        default: return tile<Step, 6, 4, ADD, LINES>(a, as, b, bs, steps, out, os, ahead);
    }
}

// The same for any number of rows, in tiles of at most 6 and of like height: a tile of one row costs most. With few rows
// memory is what is waited for: up to 4 fetch their own panel 4 KB ahead; several tiles fetch `next`, the panel that follows,
// between them, so that the first one does not wait for memory while memory waits for the others.
template <class Step, bool ADD = false>
inline void panel_product(const char *a, i64 as, const char *b, i64 bs, i64 M, i64 steps, typename Step::sum *out, i64 os,
                          const char *next = nullptr) {
    if (M <= 4) return tile_of<Step, ADD, 4>(M, a, as, b, bs, steps, out, os, b + 4096);
    const i64 all = (M + 5) / 6, lines = all == 1 || !next ? 0 : all < 4 ? 2 : 1;
    for (i64 m = 0, number = 0, left; (left = M - m) > 0; number++) {
        const i64 tiles = (left + 5) / 6, rows = (left + tiles - 1) / tiles;
        const char *from = a + m * as, *ahead = next + number * lines * 64 * steps;
        typename Step::sum *to = out + m * os;
        if (number * lines >= 4 || lines == 0) tile_of<Step, ADD, 0>(rows, from, as, b, bs, steps, to, os, nullptr);
        else if (lines == 1) tile_of<Step, ADD, 1>(rows, from, as, b, bs, steps, to, os, ahead);
        else tile_of<Step, ADD, 2>(rows, from, as, b, bs, steps, to, os, ahead);
        m += rows;
    }
}

// 16 registers of 16 dwords, transposed in place.
inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
        t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
        t[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
        t[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

inline __m256i load16(const bf16 *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline void store16(bf16 *p, __m256i x) { _mm256_storeu_si256((__m256i *)p, x); }
inline __m512 widen16(__m256i x) {  // each into the upper half of a float: one shuffle, where convert and shift are three
    const __m512i places = _mm512_setr_epi32(0, 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x60000, 0x70000, 0x80000, 0x90000,
                                             0xa0000, 0xb0000, 0xc0000, 0xd0000, 0xe0000, 0xf0000);
    return (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, _mm512_castsi256_si512(x));
}
inline __m256i narrow16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// 32 bf16 from two registers of floats.
inline void store_bf16(bf16 *out, __m512 low, __m512 high) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace
#endif
