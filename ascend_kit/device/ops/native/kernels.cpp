// The CPU's fused operators: decode-sized products that read each weight once, attention that reads the paged cache
// where it lies. Plain C interface, called through ctypes; activations are bf16 (dtype 0) or float32 (dtype 1), sums
// are float32. Letters as in ops/__init__.py; strides are in elements between rows, rows themselves are contiguous.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

typedef int64_t i64;
struct bf16 { uint16_t bits; };

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
inline void narrow(float x, float *out) { *out = x; }
inline void narrow(float x, bf16 *out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) { out->bits = 0x7fc0; return; }
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
template <class T> inline T rounded(float x) { T result; narrow(x, &result); return result; }

// --- dot products: MB rows of x against NB rows of w over K, one pass over both -------------------------------------
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
inline float widen(int8_t x) { return float(x); }

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
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 block = 0; block < blocks; block++) {
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
    }
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
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 block = 0; block < blocks; block++) {
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
    }
}

template <class X> void quantize(const X *x, int8_t *codes, float *scales, i64 M, i64 K, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && M > 8)
    for (i64 m = 0; m < M; m++) {
        const X *row = x + m * K;
        float most = 0;
        for (i64 k = 0; k < K; k++) most = std::max(most, std::fabs(widen(row[k])));
        float scale = most / 127.0f, divisor = scale == 0 ? 1.0f : scale;
        scales[m] = scale;
        for (i64 k = 0; k < K; k++) {
            float code = std::nearbyint(widen(row[k]) / divisor);
            codes[m * K + k] = int8_t(std::min(127.0f, std::max(-127.0f, code)));
        }
    }
}

// --- norms, rotary, swiglu ------------------------------------------------------------------------------------------
template <class X>
void rms_norm(const X *x, i64 stride, const X *residual, const X *weight, X *y, X *total, i64 rows, i64 heads, i64 D,
              float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * heads * D > 65536)
    for (i64 row = 0; row < rows; row++)
        for (i64 head = 0; head < heads; head++) {
            const X *in = x + row * stride + head * D;
            X *out = y + (row * heads + head) * D;
            if (residual) {
                X *sum = total + row * D;
                for (i64 d = 0; d < D; d++) sum[d] = rounded<X>(widen(in[d]) + widen(residual[row * D + d]));
                in = sum;
            }
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (i64 d = 0; d < D; d++) squares += widen(in[d]) * widen(in[d]);
            float inverse = 1.0f / std::sqrt(squares / float(D) + eps);
            // The normalised value is rounded before the weight is applied, as the models were trained.
            for (i64 d = 0; d < D; d++)
                out[d] = rounded<X>(widen(rounded<X>(widen(in[d]) * inverse)) * widen(weight[d]));
        }
}

template <class X>
void rotate(X *x, i64 stride, const X *cos, const X *sin, i64 T, i64 heads, i64 H, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && T * heads * H > 65536)
    for (i64 t = 0; t < T; t++)
        for (i64 head = 0; head < heads; head++) {
            X *row = x + t * stride + head * H;
            const X *c = cos + t * H, *s = sin + t * H;
            for (i64 h = 0; h < H / 2; h++) {
                float a = widen(row[h]), b = widen(row[h + H / 2]);
                // Each product is rounded before the sum, as the plain form does.
                row[h] = rounded<X>(widen(rounded<X>(a * widen(c[h]))) - widen(rounded<X>(b * widen(s[h]))));
                row[h + H / 2] = rounded<X>(widen(rounded<X>(b * widen(c[h + H / 2]))) +
                                            widen(rounded<X>(a * widen(s[h + H / 2]))));
            }
        }
}

template <class X> void swiglu(const X *x, X *out, i64 T, i64 F, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && T * F > 32768)
    for (i64 t = 0; t < T; t++)
        for (i64 f = 0; f < F; f++) {
            float gate = widen(x[t * 2 * F + f]);
            float silu = widen(rounded<X>(gate / (1.0f + std::exp(-gate))));
            out[t * F + f] = rounded<X>(silu * widen(x[t * 2 * F + F + f]));
        }
}

// --- attention of one new token a sequence over the paged cache -----------------------------------------------------
inline void weighted_add(float *acc, const float *row, float weight, i64 H) {
    for (i64 h = 0; h < H; h++) acc[h] += weight * row[h];
}
inline void weighted_add(float *acc, const bf16 *row, float weight, i64 H) {
    for (i64 h = 0; h < H; h++) acc[h] += weight * widen(row[h]);
}

template <class X>
void attend(const X *q, i64 qs, const X *keys, const X *values, const int32_t *table, i64 width, const int32_t *lens,
            X *out, i64 B, i64 N, i64 K, i64 H, i64 S, float scale, int threads) {
    const i64 G = N / K;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> scores, acc(G * H);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < B * K; task++) {
            i64 b = task / K, kv = task % K, length = lens[b];
            const X *query = q + b * qs + kv * G * H;
            scores.resize(G * length);
            std::fill(acc.begin(), acc.end(), 0.0f);
            for (i64 t = 0; t < length; t++) {
                const X *key = keys + ((i64(table[b * width + t / S]) * S + t % S) * K + kv) * H;
                i64 g = 0;
                for (; g + 2 <= G; g += 2) {
                    float pair[2];
                    Dots<X, X, 2, 1>::run(query + g * H, H, key, H, pair);
                    scores[g * length + t] = pair[0] * scale;
                    scores[(g + 1) * length + t] = pair[1] * scale;
                }
                if (g < G) {
                    Dots<X, X, 1, 1>::run(query + g * H, H, key, H, &scores[g * length + t]);
                    scores[g * length + t] *= scale;
                }
            }
            for (i64 g = 0; g < G; g++) {
                float *row = &scores[g * length], most = *std::max_element(row, row + length), sum = 0;
                for (i64 t = 0; t < length; t++) sum += row[t] = std::exp(row[t] - most);
                for (i64 t = 0; t < length; t++) row[t] /= sum;
            }
            for (i64 t = 0; t < length; t++) {
                const X *value = values + ((i64(table[b * width + t / S]) * S + t % S) * K + kv) * H;
                for (i64 g = 0; g < G; g++) weighted_add(&acc[g * H], value, scores[g * length + t], H);
            }
            for (i64 i = 0; i < G * H; i++) narrow(acc[i], out + (b * N + kv * G) * H + i);
        }
    }
}

}  // namespace

#define BY_DTYPE(call_bf16, call_float) \
    if (dtype == 0) { typedef bf16 X; call_bf16; } else { typedef float X; call_float; }
#define BOTH(call) BY_DTYPE(call, call)
#define AS(type, pointer) ((const type *)(pointer))

extern "C" {

void ak_linear(int dtype, const void *x, i64 xs, const void *w, const void *bias, void *out, i64 M, i64 N, i64 K, int threads) {
    BOTH((product<X, X>(AS(X, x), xs, AS(X, w), nullptr, AS(X, bias), (X *)out, M, N, K, threads)))
}
void ak_linear_w8a16(int dtype, const void *x, i64 xs, const void *w, const void *scale, const void *bias, void *out, i64 M,
                     i64 N, i64 K, int threads) {
    BOTH((product<X, int8_t>(AS(X, x), xs, AS(int8_t, w), AS(float, scale), AS(X, bias), (X *)out, M, N, K, threads)))
}
void ak_quantize(int dtype, const void *x, void *codes, void *scales, i64 M, i64 K, int threads) {
    BOTH((quantize<X>(AS(X, x), (int8_t *)codes, (float *)scales, M, K, threads)))
}
void ak_linear_w8a8(int dtype, const void *codes, const void *act, const void *w, const void *scale, const void *bias,
                    void *out, i64 M, i64 N, i64 K, int threads) {
    BOTH((int_product<X>(AS(int8_t, codes), AS(float, act), AS(int8_t, w), AS(float, scale), AS(X, bias), (X *)out, M, N, K,
                         threads)))
}
void ak_rms_norm(int dtype, const void *x, i64 stride, const void *residual, const void *weight, void *y, void *total,
                 i64 rows, i64 heads, i64 D, float eps, int threads) {
    BOTH((rms_norm<X>(AS(X, x), stride, AS(X, residual), AS(X, weight), (X *)y, (X *)total, rows, heads, D, eps, threads)))
}
void ak_rotary(int dtype, void *q, i64 qs, void *k, i64 ks, const void *cos, const void *sin, i64 T, i64 N, i64 K, i64 H,
               int threads) {
    BOTH((rotate<X>((X *)q, qs, AS(X, cos), AS(X, sin), T, N, H, threads),
          rotate<X>((X *)k, ks, AS(X, cos), AS(X, sin), T, K, H, threads)))
}
void ak_swiglu(int dtype, const void *x, void *out, i64 T, i64 F, int threads) {
    BOTH((swiglu<X>(AS(X, x), (X *)out, T, F, threads)))
}
void ak_store(const void *k, i64 ks, const void *v, i64 vs, void *k_cache, void *v_cache, const int32_t *slots, i64 T,
              i64 row_bytes, i64 item_bytes) {
    for (i64 t = 0; t < T; t++) {
        std::memcpy((char *)k_cache + i64(slots[t]) * row_bytes, (const char *)k + t * ks * item_bytes, row_bytes);
        std::memcpy((char *)v_cache + i64(slots[t]) * row_bytes, (const char *)v + t * vs * item_bytes, row_bytes);
    }
}
void ak_gather(const void *table, const int32_t *ids, void *out, i64 T, i64 row_bytes) {
    for (i64 t = 0; t < T; t++)
        std::memcpy((char *)out + t * row_bytes, (const char *)table + i64(ids[t]) * row_bytes, row_bytes);
}
void ak_attend(int dtype, const void *q, i64 qs, const void *keys, const void *values, const int32_t *table, i64 width,
               const int32_t *lens, void *out, i64 B, i64 N, i64 K, i64 H, i64 S, float scale, int threads) {
    BOTH((attend<X>(AS(X, q), qs, AS(X, keys), AS(X, values), table, width, lens, (X *)out, B, N, K, H, S, scale, threads)))
}
}
