// Products with weights as the checkpoint has them, [N, K]: decode-sized, each weight read once. For float32, for widths
// that do not pack, and for processors without the tiles.
#pragma once
#include <algorithm>
#include "dots.h"
#include "pool.h"

namespace {

template <class X, class W, int NB>
void rows_of_x(const X *x, i64 xs, const W *w, i64 M, i64 K, float *out) {
    i64 m = 0;
    for (; m + 4 <= M; m += 4) Dots<X, W, 4, NB>::run(x + m * xs, xs, w, K, out + m * NB);
    if (M - m == 3) Dots<X, W, 3, NB>::run(x + m * xs, xs, w, K, out + m * NB);
    if (M - m == 2) Dots<X, W, 2, NB>::run(x + m * xs, xs, w, K, out + m * NB);
    if (M - m == 1) Dots<X, W, 1, NB>::run(x + m * xs, xs, w, K, out + m * NB);
}

// out [M, N] = x [M, K] times w [N, K] transposed, times scale [N], plus bias [N]. Every thread takes some rows of w.
template <class X, class W>
void product(const X *x, i64 xs, const W *w, const float *scale, const X *bias, X *out, i64 M, i64 N, i64 K, int threads) {
    const int NB = 6;
    i64 blocks = (N + NB - 1) / NB;
    parallel(threads, blocks, [&](i64 block) {
        i64 n0 = block * NB, count = std::min<i64>(NB, N - n0);
        float sums[256 * NB];
        for (i64 m0 = 0; m0 < M; m0 += 256) {
            i64 rows = std::min<i64>(256, M - m0);
            if (count == NB) rows_of_x<X, W, NB>(x + m0 * xs, xs, w + n0 * K, rows, K, sums);
            else
                for (i64 n = 0; n < count; n++) {
                    float column[256];
                    rows_of_x<X, W, 1>(x + m0 * xs, xs, w + (n0 + n) * K, rows, K, column);
                    for (i64 m = 0; m < rows; m++) sums[m * NB + n] = column[m];
                }
            for (i64 m = 0; m < rows; m++)
                for (i64 n = 0; n < count; n++) {
                    float value = sums[m * NB + n];
                    if (scale) value *= scale[n0 + n];
                    if (bias) value += widen(bias[n0 + n]);
                    narrow(value, out + (m0 + m) * N + n0 + n);
                }
        }
    });
}

// The same with 4-bit weights, two codes a byte [N, K/2], and scale and zero (may be null) [N, K/group]. The sum over a group
// is scaled as a whole; the zero point's share of it is the zero point times the sum of x. x is split into the inputs of lower
// and of upper halves first, so that bytes meet neighbours.
template <class X>
void product_w4a16(const X *x, i64 xs, const uint8_t *w, const float *scale, const float *zero, const X *bias, X *out, i64 M,
                   i64 N, i64 K, i64 group, int threads) {
    const i64 groups = K / group, half = K / 2, depth = group / 2;
    static thread_local Scratch<float> of_x;
    float *even = of_x.room(M * (K + groups)), *odd = even + M * half, *sum_of_x = odd + M * half;
    for (i64 m = 0; m < M; m++) {
        for (i64 k = 0; k < half; k++) {
            even[m * half + k] = widen(x[m * xs + 2 * k]);
            odd[m * half + k] = widen(x[m * xs + 2 * k + 1]);
        }
        for (i64 g = 0; g < groups; g++) {
            float sum = 0;
            for (i64 k = m * half + g * depth; k < m * half + (g + 1) * depth; k++) sum += even[k] + odd[k];
            sum_of_x[m * groups + g] = sum;
        }
    }
    const i64 rows = 8;
    parallel(threads, (N + rows - 1) / rows, [&](i64 block) {
        for (i64 n = block * rows; n < std::min(N, (block + 1) * rows); n++)
            for (i64 m = 0; m < M; m++) {
                float total = bias ? widen(bias[n]) : 0;
                for (i64 g = 0; g < groups; g++) {
                    const uint8_t *from = w + n * half + g * depth;
                    const float *lower = even + m * half + g * depth, *upper = odd + m * half + g * depth;
                    float part = 0;
                    for (i64 k = 0; k < depth; k++)
                        part += lower[k] * float(int8_t(from[k] << 4) >> 4) + upper[k] * float(int8_t(from[k]) >> 4);
                    if (zero) part -= zero[n * groups + g] * sum_of_x[m * groups + g];
                    total += scale[n * groups + g] * part;
                }
                narrow(total, out + m * N + n);
            }
    });
}

// --- int8 x int8 ----------------------------------------------------------------------------------------------------
template <int MB, int NB> void int_dots(const int8_t *x, const int8_t *w, i64 K, int32_t *out) {
#if defined(__AVX512VNNI__)
    // The instruction multiplies unsigned by signed: x + 128 is unsigned, and 128 * sum(w) is taken off again.
    __m512i acc[MB][NB], total[NB];
    const __m512i flip = _mm512_set1_epi8(char(0x80)), ones = _mm512_set1_epi8(1);
    for (int n = 0; n < NB; n++) {
        total[n] = _mm512_setzero_si512();
        for (int m = 0; m < MB; m++) acc[m][n] = _mm512_setzero_si512();
    }
    for (i64 k = 0; k < K; k += 64) {
        __mmask64 mask = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
        __m512i b[NB];
        for (int n = 0; n < NB; n++) {
            b[n] = _mm512_maskz_loadu_epi8(mask, w + n * K + k);
            __builtin_prefetch(w + (n + NB) * K + k);
            total[n] = _mm512_dpbusd_epi32(total[n], ones, b[n]);
        }
        for (int m = 0; m < MB; m++) {
            __m512i a = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x + m * K + k), flip);
            for (int n = 0; n < NB; n++) acc[m][n] = _mm512_dpbusd_epi32(acc[m][n], a, b[n]);
        }
    }
    for (int m = 0; m < MB; m++)
        for (int n = 0; n < NB; n++)
            out[m * NB + n] = _mm512_reduce_add_epi32(acc[m][n]) - 128 * _mm512_reduce_add_epi32(total[n]);
#else
    for (int m = 0; m < MB; m++)
        for (int n = 0; n < NB; n++) {
            int32_t sum = 0;
            for (i64 k = 0; k < K; k++) sum += int32_t(x[m * K + k]) * w[n * K + k];
            out[m * NB + n] = sum;
        }
#endif
}

template <int NB> void int_rows(const int8_t *x, const int8_t *w, i64 M, i64 K, int32_t *out) {
    i64 m = 0;
    for (; m + 4 <= M; m += 4) int_dots<4, NB>(x + m * K, w, K, out + m * NB);
    for (; m < M; m++) int_dots<1, NB>(x + m * K, w, K, out + m * NB);
}

template <class X>
void int_product(const int8_t *x, const float *act, const int8_t *w, const float *scale, const X *bias, X *out, i64 M,
                 i64 N, i64 K, int threads) {
    const int NB = 4;
    i64 blocks = (N + NB - 1) / NB;
    parallel(threads, blocks, [&](i64 block) {
        i64 n0 = block * NB, count = std::min<i64>(NB, N - n0);
        int32_t sums[256 * NB];
        for (i64 m0 = 0; m0 < M; m0 += 256) {
            i64 rows = std::min<i64>(256, M - m0);
            if (count == NB) int_rows<NB>(x + m0 * K, w + n0 * K, rows, K, sums);
            else
                for (i64 n = 0; n < count; n++) {
                    int32_t column[256];
                    int_rows<1>(x + m0 * K, w + (n0 + n) * K, rows, K, column);
                    for (i64 m = 0; m < rows; m++) sums[m * NB + n] = column[m];
                }
            for (i64 m = 0; m < rows; m++)
                for (i64 n = 0; n < count; n++) {
                    float value = float(sums[m * NB + n]) * act[m0 + m] * scale[n0 + n];
                    if (bias) value += widen(bias[n0 + n]);
                    narrow(value, out + (m0 + m) * N + n0 + n);
                }
        }
    });
}

}  // namespace
