// Dot products of rows, one pass over both: what products with unpacked weights and attention of any size are made of.
#pragma once
#include "scalars.h"
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

// X is the activation type, W the weight type (bf16, float or int8). The generic form is left to the compiler.
template <class X, class W, int MB, int NB> struct Dots {
    static void run(const X *x, i64 xs, const W *w, i64 K, float *out) {
        float acc[MB][NB] = {};
        for (i64 k = 0; k < K; k++)
            for (int m = 0; m < MB; m++)
                for (int n = 0; n < NB; n++) acc[m][n] += widen(x[m * xs + k]) * float(widen(w[n * K + k]));
        for (int m = 0; m < MB; m++)
            for (int n = 0; n < NB; n++) out[m * NB + n] = acc[m][n];
    }
};

#if defined(__AVX512BF16__)
inline __m512bh load32(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load32(const int8_t *p) {  // every int8 is exact in bf16
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16))));
    return _mm512_cvtne2ps_pbh(high, low);
}
template <class W, int MB, int NB> struct Dots<bf16, W, MB, NB> {
    static void run(const bf16 *x, i64 xs, const W *w, i64 K, float *out) {
        __m512 acc[MB][NB];
        for (int m = 0; m < MB; m++)
            for (int n = 0; n < NB; n++) acc[m][n] = _mm512_setzero_ps();
        i64 k = 0;
        for (; k + 32 <= K; k += 32) {
            __m512bh b[NB];
            for (int n = 0; n < NB; n++) {
                b[n] = load32(w + n * K + k);
                // The next block of rows: rows are too short for the hardware to find the pattern in time.
                __builtin_prefetch(w + (n + NB) * K + k);
            }
            for (int m = 0; m < MB; m++) {
                __m512bh a = load32(x + m * xs + k);
                for (int n = 0; n < NB; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], a, b[n]);
            }
        }
        for (int m = 0; m < MB; m++)
            for (int n = 0; n < NB; n++) {
                float sum = _mm512_reduce_add_ps(acc[m][n]);
                for (i64 t = k; t < K; t++) sum += widen(x[m * xs + t]) * widen(w[n * K + t]);
                out[m * NB + n] = sum;
            }
    }
};
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
template <int MB, int NB> struct Dots<float, float, MB, NB> {
    static void run(const float *x, i64 xs, const float *w, i64 K, float *out) {
        __m512 acc[MB][NB];
        for (int m = 0; m < MB; m++)
            for (int n = 0; n < NB; n++) acc[m][n] = _mm512_setzero_ps();
        i64 k = 0;
        for (; k + 16 <= K; k += 16) {
            __m512 b[NB];
            for (int n = 0; n < NB; n++) b[n] = _mm512_loadu_ps(w + n * K + k);
            for (int m = 0; m < MB; m++) {
                __m512 a = _mm512_loadu_ps(x + m * xs + k);
                for (int n = 0; n < NB; n++) acc[m][n] = _mm512_fmadd_ps(a, b[n], acc[m][n]);
            }
        }
        for (int m = 0; m < MB; m++)
            for (int n = 0; n < NB; n++) {
                float sum = _mm512_reduce_add_ps(acc[m][n]);
                for (i64 t = k; t < K; t++) sum += x[m * xs + t] * w[n * K + t];
                out[m * NB + n] = sum;
            }
    }
};
#endif

}  // namespace
