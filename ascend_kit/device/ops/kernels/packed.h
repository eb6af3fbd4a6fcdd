// Products with packed weights; see tiles.h for the layout. N is a multiple of 64 (in 4 bits any), K of 4 bytes.
#pragma once
#include <algorithm>
#include "pool.h"
#include "tiles.h"
#ifdef AK_TILES

namespace {

constexpr i64 ROWS = 48;  // rows whose sums exist at once: 48 * 64 * 4 B stay in the first cache

inline const char *panel(const void *w, i64 number, i64 K, i64 bytes) {
    return (const char *)w + number * PANEL * K * bytes;
}

// [N, K] of `bytes` each -> [N/64][K * bytes / 4][64] of 4 bytes.
inline void pack(const void *w, void *packed, i64 N, i64 K, i64 bytes, int threads) {
    const i64 steps = K * bytes / 4;
    parallel(threads, N / PANEL, [&](i64 number) {
        for (i64 k = 0; k < steps; k++) {
            char *to = (char *)panel(packed, number, K, bytes) + k * PANEL * 4;
            const char *from = panel(w, number, K, bytes) + k * 4;
            for (i64 n = 0; n < PANEL; n++) std::memcpy(to + 4 * n, from + n * K * bytes, 4);
        }
    });
}

// Rows `ids` of a packed table.
inline void gather(const void *packed, const int32_t *ids, void *out, i64 T, i64 row_bytes) {
    for (i64 t = 0; t < T; t++) {
        const char *from = panel(packed, ids[t] / PANEL, row_bytes, 1) + ids[t] % PANEL * 4;
        for (i64 b = 0; b < row_bytes; b += 4) std::memcpy((char *)out + t * row_bytes + b, from + b * PANEL, 4);
    }
}

inline void store(const float *sums, float *out) { std::memcpy(out, sums, PANEL * 4); }
inline void store(const float *sums, bf16 *out) {
    for (i64 n = 0; n < PANEL; n += 32) store_bf16(out + n, _mm512_loadu_ps(sums + n), _mm512_loadu_ps(sums + n + 16));
}

// `count` columns of one row, at most 64: sums times `scale`, plus bias, as bf16 or float.
template <class X>
inline void finish(const float *sums, const float *scale, const X *bias, X *out, i64 count = PANEL) {
    if (!scale && !bias && count == PANEL) return store(sums, out);
    for (i64 n = 0; n < count; n++) {
        float value = sums[n];
        if (scale) value *= scale[n];
        if (bias) value += widen(bias[n]);
        narrow(value, out + n);
    }
}

// M rows of x against one panel of weights in the type of x, finished into columns n0.. of out [M, N].
template <class X>
void panel_rows(const X *x, i64 xs, const char *weights, const char *next, const float *scale, const X *bias, X *out, i64 M,
                i64 N, i64 K, i64 n0) {
    alignas(64) float sums[ROWS * PANEL];
    for (i64 m0 = 0; m0 < M; m0 += ROWS) {
        const i64 rows = std::min(ROWS, M - m0);
        panel_product<typename StepOf<X>::type>((const char *)(x + m0 * xs), xs * sizeof(X), weights, PANEL * 4, rows,
                                                K * sizeof(X) / 4, sums, PANEL, m0 == 0 ? next : nullptr);
        for (i64 m = 0; m < rows; m++)
            finish<X>(sums + m * PANEL, scale ? scale + n0 : nullptr, bias ? bias + n0 : nullptr, out + (m0 + m) * N + n0);
    }
}

template <class X>
void packed_linear(const X *x, i64 xs, const void *w, const X *bias, X *out, i64 M, i64 N, i64 K, int threads) {
    parallel(threads, N / PANEL, [&](i64 number) {
        panel_rows<X>(x, xs, panel(w, number, K, sizeof(X)), panel(w, number + threads, K, sizeof(X)), nullptr, bias, out, M,
                      N, K, number * PANEL);
    });
}

// int8 codes of a panel, K of them a column, as floats or as bf16, in which every code is exact.
inline void expand(const char *from, float *to, i64 K) {
    for (i64 k = 0; k < K; k += 4)
        for (i64 n = 0; n < PANEL; n += 16)
            for (int i = 0; i < 4; i++) {
                const __m512i code = _mm512_srai_epi32(_mm512_slli_epi32(load(from + k * PANEL + 4 * n), 24 - 8 * i), 24);
                _mm512_storeu_ps(to + (k + i) * PANEL + n, _mm512_cvtepi32_ps(code));
            }
}
inline void expand(const char *from, bf16 *to, i64 K) {
    // The bytes of each code's bf16, by the code's lower 7 bits: the low one by the magnitude, which -128 shares with 0.
    struct Table { uint8_t low[128], positive[128], negative[128]; };
    static const Table table = [] {
        Table made;
        for (int i = 0; i < 128; i++) {
            made.low[i] = uint8_t(rounded<bf16>(float(i)).bits);
            made.positive[i] = uint8_t(rounded<bf16>(float(i)).bits >> 8);
            made.negative[i] = uint8_t(rounded<bf16>(float(i - 128)).bits >> 8);
        }
        return made;
    }();
    const auto find = [](const uint8_t *bytes, __m512i index) {
        return _mm512_permutex2var_epi8(load(bytes), index, load(bytes + 64));
    };
    // Of 4 columns with 4 codes each: the first two codes of each column, then the other two.
    const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    for (i64 k = 0; k < K; k += 4)
        for (i64 n = 0; n < PANEL; n += 16) {
            const __m512i codes = _mm512_shuffle_epi8(load(from + k * PANEL + 4 * n), halves);
            const __m512i low = find(table.low, _mm512_abs_epi8(codes));
            const __m512i high = _mm512_mask_mov_epi8(find(table.positive, codes), _mm512_movepi8_mask(codes),
                                                      find(table.negative, codes));
            _mm512_storeu_si512(to + k * PANEL + 2 * n, _mm512_unpacklo_epi8(low, high));
            _mm512_storeu_si512(to + (k + 2) * PANEL + 2 * n, _mm512_unpackhi_epi8(low, high));
        }
}

template <class X>
void packed_linear_w8a16(const X *x, i64 xs, const void *w, const float *scale, const X *bias, X *out, i64 M, i64 N, i64 K,
                         int threads) {
    typedef typename StepOf<X>::type Step;
    constexpr i64 DEPTH = 128, MANY = 4 * ROWS;  // codes are expanded 128 deep, which stays in the first cache
    parallel(threads, N / PANEL, [&](i64 number) {
        const i64 n0 = number * PANEL;
        alignas(64) X wide[DEPTH * PANEL];
        alignas(64) float sums[MANY * PANEL];
        for (i64 m0 = 0; m0 < M; m0 += MANY) {
            const i64 rows = std::min(MANY, M - m0);
            for (i64 k = 0; k < K; k += DEPTH) {
                const i64 depth = std::min(DEPTH, K - k);
                expand(panel(w, number, K, 1) + k * PANEL, wide, depth);
                const char *from = (const char *)(x + m0 * xs + k), *panel_of_x = (const char *)wide;
                const i64 steps = depth * sizeof(X) / 4;
                if (k == 0) panel_product<Step>(from, xs * sizeof(X), panel_of_x, PANEL * 4, rows, steps, sums, PANEL);
                else panel_product<Step, true>(from, xs * sizeof(X), panel_of_x, PANEL * 4, rows, steps, sums, PANEL);
            }
            for (i64 m = 0; m < rows; m++)
                finish<X>(sums + m * PANEL, scale + n0, bias ? bias + n0 : nullptr, out + (m0 + m) * N + n0);
        }
    });
}

// 4-bit codes of a panel as bf16 or floats, K of them a column. Stored as [K/2][64] bytes, the code of the even input below;
// byte 16 l + b of a step is column 16 (b / 4) + 4 l + b % 4, which is where two interleavings put it.
inline void expand4(const char *from, bf16 *to, i64 K) {
    // The bytes of the bf16 of -8..7, by the code's four bits in two's complement.
    const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(0, char(0x80), 0, 0x40, char(0x80), char(0xa0), char(0xc0),
        char(0xe0), 0, char(0xe0), char(0xc0), char(0xa0), char(0x80), 0x40, 0, char(0x80)));
    const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40, char(0xc1),
        char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xbf)));
    const __m512i mask = _mm512_set1_epi8(15);
    for (i64 k = 0; k < K; k += 2, from += PANEL, to += 2 * PANEL) {
        _mm_prefetch(from + 2048, _MM_HINT_T0);
        const __m512i codes = load(from), even = _mm512_and_si512(codes, mask);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
        const __m512i el = _mm512_shuffle_epi8(low, even), eh = _mm512_shuffle_epi8(high, even);
        const __m512i ol = _mm512_shuffle_epi8(low, odd), oh = _mm512_shuffle_epi8(high, odd);
        const __m512i e0 = _mm512_unpacklo_epi8(el, eh), e1 = _mm512_unpackhi_epi8(el, eh);
        const __m512i o0 = _mm512_unpacklo_epi8(ol, oh), o1 = _mm512_unpackhi_epi8(ol, oh);
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(e0, o0));
        _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi16(e0, o0));
        _mm512_storeu_si512(to + 64, _mm512_unpacklo_epi16(e1, o1));
        _mm512_storeu_si512(to + 96, _mm512_unpackhi_epi16(e1, o1));
    }
}
inline void expand4(const char *from, float *to, i64 K) {
    for (i64 k = 0; k < K; k += 2, from += PANEL, to += 2 * PANEL)
        for (i64 at = 0; at < PANEL; at++) {
            const i64 column = at % 16 / 4 * 16 + at / 16 * 4 + at % 4;
            to[column] = float(int8_t(from[at] << 4) >> 4);
            to[PANEL + column] = float(int8_t(from[at]) >> 4);
        }
}

// scale and zero [K/group, N]; zero may be null; N need not be a multiple of 64, the last panel is padded. The sum over a group is scaled as a whole; the zero point's share of it is
// the zero point times the sum of x.
template <class X>
void packed_linear_w4a16(const X *x, i64 xs, const void *w, const float *scale, const float *zero, const X *bias, X *out,
                         i64 M, i64 N, i64 K, i64 group, int threads) {
    typedef typename StepOf<X>::type Step;
    constexpr i64 DEPTH = 128;
    const i64 groups = K / group;
    static thread_local Scratch<float> of_x;
    float *sum_of_x = zero ? of_x.room(M * groups) : nullptr;
    for (i64 m = 0; zero && m < M; m++)
        for (i64 g = 0; g < groups; g++) {
            float sum = 0;
            for (i64 k = g * group; k < (g + 1) * group; k++) sum += widen(x[m * xs + k]);
            sum_of_x[m * groups + g] = sum;
        }
    parallel(threads, (N + PANEL - 1) / PANEL, [&](i64 number) {
        const i64 n0 = number * PANEL, columns = std::min(PANEL, N - n0);
        alignas(64) X wide[DEPTH * PANEL];
        alignas(64) float sums[ROWS * PANEL], part[ROWS * PANEL];
        for (i64 m0 = 0; m0 < M; m0 += ROWS) {
            const i64 rows = std::min(ROWS, M - m0);
            std::fill(sums, sums + rows * PANEL, 0.0f);
            for (i64 g = 0; g < groups; g++) {
                for (i64 k = g * group, end = k + group; k < end; k += DEPTH) {
                    const i64 depth = std::min(DEPTH, end - k);
                    expand4((const char *)w + n0 * K / 2 + k * PANEL / 2, wide, depth);
                    const char *from = (const char *)(x + m0 * xs + k);
                    const i64 steps = depth * sizeof(X) / 4;
                    if (k == g * group) panel_product<Step>(from, xs * sizeof(X), (const char *)wide, PANEL * 4, rows, steps, part, PANEL);
                    else panel_product<Step, true>(from, xs * sizeof(X), (const char *)wide, PANEL * 4, rows, steps, part, PANEL);
                }
                const float *s = scale + g * N + n0, *z = zero ? zero + g * N + n0 : nullptr;
                for (i64 m = 0; m < rows; m++) {
                    float *to = sums + m * PANEL;
                    const float *add = part + m * PANEL;
                    const float share = zero ? sum_of_x[(m0 + m) * groups + g] : 0;
                    if (z) for (i64 n = 0; n < columns; n++) to[n] += s[n] * (add[n] - z[n] * share);
                    else for (i64 n = 0; n < columns; n++) to[n] += s[n] * add[n];
                }
            }
            for (i64 m = 0; m < rows; m++)
                finish<X>(sums + m * PANEL, nullptr, bias ? bias + n0 : nullptr, out + (m0 + m) * N + n0, columns);
        }
    });
}

// The instruction multiplies unsigned by signed: x + 128 is unsigned, and 128 times the column's sum is taken off again.
// The column's sum comes from a row of ones in front of x.
template <class X>
void packed_linear_w8a8(const int8_t *x, const float *act, const void *w, const float *scale, const X *bias, X *out, i64 M,
                        i64 N, i64 K, int threads) {
    static thread_local Scratch<uint8_t> of_shifted;
    uint8_t *shifted = of_shifted.room((M + 1) * K);
    std::fill(shifted, shifted + K, 1);
    for (i64 i = 0; i < M * K; i++) shifted[K + i] = uint8_t(x[i]) ^ 0x80;
    const char *rows_of_x = (const char *)shifted;
    parallel(threads, N / PANEL, [&](i64 number) {
        alignas(64) int32_t sums[ROWS * PANEL], column[PANEL];
        for (i64 m0 = 0; m0 <= M; m0 += ROWS) {
            i64 rows = std::min(ROWS, M + 1 - m0);
            panel_product<Int8Step>(rows_of_x + m0 * K, K, panel(w, number, K, 1), PANEL * 4, rows, K / 4, sums, PANEL,
                                    m0 == 0 ? panel(w, number + threads, K, 1) : nullptr);
            if (m0 == 0) std::copy(sums, sums + PANEL, column);
            for (i64 m = m0 == 0; m < rows; m++) {
                alignas(64) float wide[PANEL];
                for (i64 n = 0; n < PANEL; n++)
                    wide[n] = float(sums[m * PANEL + n] - 128 * column[n]) * act[m0 + m - 1];
                finish<X>(wide, scale + number * PANEL, bias ? bias + number * PANEL : nullptr,
                          out + (m0 + m - 1) * N + number * PANEL);
            }
        }
    });
}

}  // namespace
#endif
