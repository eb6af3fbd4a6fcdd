// The CPU's fused operators behind a plain C interface, called through ctypes. Letters as in ops/__init__.py; strides are
// in elements between rows, rows themselves are contiguous.
#include "attention.h"
#include "linear.h"
#include "packed.h"

namespace {

// The plain forms below with vectors, where there are any for the type and size; false: use the plain form.
template <class X> inline bool quantize_vectors(const X *, int8_t *, float &, i64) { return false; }
#ifdef AK_TILES
inline bool quantize_vectors(const bf16 *x, int8_t *codes, float &scale, i64 K) {
    if (K % 16) return false;
    __m512i most = _mm512_setzero_si512();  // compared as whole numbers, see magnitude_bits
    for (i64 k = 0; k < K; k += 16)
        most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(widen16(load16(x + k)))));
    scale = from_bits(_mm512_reduce_max_epi32(most)) / 127.0f;
    const __m512 divisor = _mm512_set1_ps(scale == 0 ? 1.0f : scale);
    for (i64 k = 0; k < K; k += 16) {  // no code is beyond 127: the largest value divides to 127 but for rounding
        const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(widen16(load16(x + k)), divisor));
        _mm_storeu_si128((__m128i *)(codes + k), _mm512_cvtsepi32_epi8(code));
    }
    return true;
}
#endif

template <class X> void quantize_row(const X *row, int8_t *codes, float *scale, i64 K) {
    if (quantize_vectors(row, codes, *scale, K)) return;
    int32_t most = 0;
    for (i64 k = 0; k < K; k++) most = std::max(most, magnitude_bits(widen(row[k])));
    *scale = from_bits(most) / 127.0f;
    const float divisor = *scale == 0 ? 1.0f : *scale;
    for (i64 k = 0; k < K; k++) {
        float code = std::nearbyint(widen(row[k]) / divisor);
        codes[k] = int8_t(std::min(127.0f, std::max(-127.0f, code)));
    }
}

template <class X> void quantize(const X *x, int8_t *codes, float *scales, i64 M, i64 K, int threads) {
    parallel_rows(threads, M, K, [&](i64 m) { quantize_row(x + m * K, codes + m * K, scales + m, K); });
}

// --- norms, rotary, swiglu ------------------------------------------------------------------------------------------
template <class X> inline bool add_vectors(const X *, const X *, X *, i64) { return false; }
template <class X> inline bool norm_vectors(const X *, const X *, X *, i64, float) { return false; }
template <class X> inline float sum_of_squares(const X *x, i64 D) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (i64 d = 0; d < D; d++) squares += widen(x[d]) * widen(x[d]);
    return squares;
}
#ifdef AK_TILES
inline bool add_vectors(const bf16 *a, const bf16 *b, bf16 *sum, i64 D) {
    if (D % 16) return false;
    for (i64 d = 0; d < D; d += 16)
        store16(sum + d, narrow16(_mm512_add_ps(widen16(load16(a + d)), widen16(load16(b + d)))));
    return true;
}
inline float sum_of_squares(const bf16 *x, i64 D) {
    __m512 squares = _mm512_setzero_ps();
    i64 d = 0;
    for (; d + 32 <= D; d += 32) squares = _mm512_dpbf16_ps(squares, as_bh(load(x + d)), as_bh(load(x + d)));
    float sum = _mm512_reduce_add_ps(squares);
    for (; d < D; d++) sum += widen(x[d]) * widen(x[d]);
    return sum;
}
inline bool norm_vectors(const bf16 *x, const bf16 *weight, bf16 *out, i64 D, float by) {
    if (D % 16) return false;
    const __m512 inverse = _mm512_set1_ps(by);
    for (i64 d = 0; d < D; d += 16) {
        const __m512 normal = widen16(narrow16(_mm512_mul_ps(widen16(load16(x + d)), inverse)));
        store16(out + d, narrow16(_mm512_mul_ps(normal, widen16(load16(weight + d)))));
    }
    return true;
}
#endif

template <class X>
void rms_norm(const X *x, i64 stride, const X *residual, const X *weight, X *y, X *total, i64 rows, i64 heads, i64 D,
              float eps, int threads) {
    parallel_rows(threads, rows, heads * D, [&](i64 row) {
        const X *in = x + row * stride;
        if (residual) {  // then there is one head
            X *sum = total + row * D;
            if (!add_vectors(in, residual + row * D, sum, D))
                for (i64 d = 0; d < D; d++) sum[d] = rounded<X>(widen(in[d]) + widen(residual[row * D + d]));
            in = sum;
        }
        constexpr i64 SOME = 16;  // the factors of some heads before the first is used: a root takes long
        for (i64 first = 0; first < heads; first += SOME) {
            const i64 last = std::min(heads, first + SOME);
            float factors[SOME];
            for (i64 head = first; head < last; head++)
                factors[head - first] = 1.0f / std::sqrt(sum_of_squares(in + head * D, D) / float(D) + eps);
            for (i64 head = first; head < last; head++) {
                const X *from = in + head * D;
                X *out = y + (row * heads + head) * D;
                const float by = factors[head - first];
                if (norm_vectors(from, weight, out, D, by)) continue;
                // The normalised value is rounded before the weight is applied, as the models were trained.
                for (i64 d = 0; d < D; d++) out[d] = rounded<X>(widen(rounded<X>(widen(from[d]) * by)) * widen(weight[d]));
            }
        }
    });
}

template <class X>
void store_int8(const X *x, i64 stride, int8_t *cache, const int32_t *slots, i64 T, i64 K, i64 H, i64 S, bool are_codes,
                int threads) {
    parallel_rows(threads, T, K * H, [&](i64 t) {
        int8_t *block = cache + i64(slots[t] / S) * S * K * (H + 4);
        for (i64 kv = 0; kv < K; kv++) {
            const i64 row = slots[t] % S * K + kv;
            const X *from = x + t * stride + kv * H;
            float *scale = (float *)(block + S * K * H) + row;
            if (!are_codes) quantize_row(from, block + row * H, scale, H);
            for (i64 h = 0; are_codes && h < H; h++) block[row * H + h] = int8_t(widen(from[h]));
            if (are_codes) *scale = 1.0f;
        }
    });
}

template <class X> inline bool rotate_vectors(X *, const X *, const X *, i64) { return false; }
#ifdef AK_TILES
inline __m512 round_to_bf16(__m512 x) { return widen16(narrow16(x)); }
inline bool rotate_vectors(bf16 *row, const bf16 *cos, const bf16 *sin, i64 H) {
    const i64 half = H / 2;
    if (half % 16) return false;
    for (i64 h = 0; h < half; h += 16) {
        const auto times = [](__m512 x, const bf16 *by) { return round_to_bf16(_mm512_mul_ps(x, widen16(load16(by)))); };
        const __m512 a = widen16(load16(row + h)), b = widen16(load16(row + h + half));
        store16(row + h, narrow16(_mm512_sub_ps(times(a, cos + h), times(b, sin + h))));
        store16(row + h + half, narrow16(_mm512_add_ps(times(b, cos + h + half), times(a, sin + h + half))));
    }
    return true;
}
#endif

template <class X>
void rotate(X *x, i64 stride, const X *cos, const X *sin, i64 T, i64 heads, i64 H, int threads) {
    parallel_rows(threads, T, heads * H, [&](i64 t) {
        for (i64 head = 0; head < heads; head++) {
            X *row = x + t * stride + head * H;
            const X *c = cos + t * H, *s = sin + t * H;
            if (rotate_vectors(row, c, s, H)) continue;
            for (i64 h = 0; h < H / 2; h++) {
                float a = widen(row[h]), b = widen(row[h + H / 2]);
                // Each product is rounded before the sum, as the plain form does.
                row[h] = rounded<X>(widen(rounded<X>(a * widen(c[h]))) - widen(rounded<X>(b * widen(s[h]))));
                row[h + H / 2] = rounded<X>(widen(rounded<X>(b * widen(c[h + H / 2]))) +
                                            widen(rounded<X>(a * widen(s[h + H / 2]))));
            }
        }
    });
}

// The first elements of a row, as many as vectors take; the plain form does the rest.
template <class X> inline i64 swiglu_vectors(const X *, const X *, X *, i64) { return 0; }
#ifdef AK_TILES
inline i64 swiglu_vectors(const bf16 *gate, const bf16 *up, bf16 *out, i64 F) {
    const __m512 one = _mm512_set1_ps(1.0f);
    i64 f = 0;
    for (; f + 16 <= F; f += 16) {
        const __m512 x = widen16(load16(gate + f)), e = exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
        const __m512 silu = widen16(narrow16(_mm512_div_ps(x, _mm512_add_ps(one, e))));
        store16(out + f, narrow16(_mm512_mul_ps(silu, widen16(load16(up + f)))));
    }
    return f;
}
#endif

template <class X> void swiglu(const X *x, X *out, i64 T, i64 F, int threads) {
    parallel_rows(threads, T, F, [&](i64 t) {
        const X *gates = x + t * 2 * F, *ups = gates + F;
        for (i64 f = swiglu_vectors(gates, ups, out + t * F, F); f < F; f++) {
            float gate = widen(gates[f]), silu = widen(rounded<X>(gate / (1.0f + std::exp(-gate))));
            out[t * F + f] = rounded<X>(silu * widen(ups[f]));
        }
    });
}

// Index of the first largest number of each row.
template <class X> void argmax(const X *x, i64 stride, i64 *out, i64 rows, i64 width, int threads) {
    parallel(threads, rows, [&](i64 row) {
        const X *from = x + row * stride;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (i64 i = 0; i < width; i++) most = std::max(most, widen(from[i]));
        i64 place = 0;
        while (place < width && widen(from[place]) != most) place++;
        out[row] = place < width ? place : 0;
    });
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
void ak_linear_w4a16(int dtype, const void *x, i64 xs, const void *w, const void *scale, const void *zero, const void *bias,
                     void *out, i64 M, i64 N, i64 K, i64 group, int threads) {
    BOTH((product_w4a16<X>(AS(X, x), xs, AS(uint8_t, w), AS(float, scale), AS(float, zero), AS(X, bias), (X *)out, M, N, K,
                           group, threads)))
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
void ak_argmax(int dtype, const void *x, i64 stride, void *out, i64 rows, i64 width, int threads) {
    BOTH((argmax<X>(AS(X, x), stride, (i64 *)out, rows, width, threads)))
}
void ak_store(const void *k, i64 ks, const void *v, i64 vs, void *k_cache, void *v_cache, const int32_t *slots, i64 T,
              i64 row_bytes, i64 item_bytes, int threads) {
    parallel_rows(threads, T, row_bytes, [&](i64 t) {
        std::memcpy((char *)k_cache + i64(slots[t]) * row_bytes, (const char *)k + t * ks * item_bytes, row_bytes);
        std::memcpy((char *)v_cache + i64(slots[t]) * row_bytes, (const char *)v + t * vs * item_bytes, row_bytes);
    });
}
// Keys or values [T, K, H] as int8 codes with a scale for every token and head, into a cache of such blocks; numbers that are
// codes already have the scale 1.
void ak_store_int8(int dtype, const void *x, i64 xs, void *cache, const int32_t *slots, i64 T, i64 K, i64 H, i64 S,
                   int are_codes, int threads) {
    BOTH((store_int8<X>(AS(X, x), xs, (int8_t *)cache, slots, T, K, H, S, are_codes, threads)))
}
void ak_attend_int8(int dtype, const void *q, i64 qs, const void *keys, const void *values, const int32_t *table, i64 width,
                    const int32_t *lens, void *out, i64 B, i64 N, i64 K, i64 H, i64 S, float scale, int threads) {
    BOTH((attend_tokens<X, int8_t>(AS(X, q), qs, AS(int8_t, keys), AS(int8_t, values), table, width, lens, (X *)out, B, N, K,
                                   H, S, scale, threads)))
}
void ak_gather(const void *table, const int32_t *ids, void *out, i64 T, i64 row_bytes) {
    for (i64 t = 0; t < T; t++)
        std::memcpy((char *)out + t * row_bytes, (const char *)table + i64(ids[t]) * row_bytes, row_bytes);
}
void ak_attend(int dtype, const void *q, i64 qs, const void *keys, const void *values, const int32_t *table, i64 width,
               const int32_t *lens, void *out, i64 B, i64 N, i64 K, i64 H, i64 S, float scale, int threads) {
    BOTH((attend_tokens<X, X>(AS(X, q), qs, AS(X, keys), AS(X, values), table, width, lens, (X *)out, B, N, K, H, S, scale,
                           threads)))
}

// 1 where the functions below do something: the packed forms need instructions that not every processor has.
int ak_packs() {
#ifdef AK_TILES
    return 1;
#else
    return 0;
#endif
}
#ifdef AK_TILES
void ak_pack(const void *w, void *packed, i64 N, i64 K, i64 item_bytes, int threads) {
    pack(w, packed, N, K, item_bytes, threads);
}
void ak_gather_packed(const void *table, const int32_t *ids, void *out, i64 T, i64 row_bytes) {
    gather(table, ids, out, T, row_bytes);
}
void ak_packed_linear(int dtype, const void *x, i64 xs, const void *w, const void *bias, void *out, i64 M, i64 N, i64 K,
                      int threads) {
    BOTH((packed_linear<X>(AS(X, x), xs, w, AS(X, bias), (X *)out, M, N, K, threads)))
}
void ak_packed_linear_w8a16(int dtype, const void *x, i64 xs, const void *w, const void *scale, const void *bias, void *out,
                            i64 M, i64 N, i64 K, int threads) {
    BOTH((packed_linear_w8a16<X>(AS(X, x), xs, w, AS(float, scale), AS(X, bias), (X *)out, M, N, K, threads)))
}
void ak_packed_linear_w4a16(int dtype, const void *x, i64 xs, const void *w, const void *scale, const void *zero,
                            const void *bias, void *out, i64 M, i64 N, i64 K, i64 group, int threads) {
    BOTH((packed_linear_w4a16<X>(AS(X, x), xs, w, AS(float, scale), AS(float, zero), AS(X, bias), (X *)out, M, N, K, group,
                                 threads)))
}
void ak_packed_linear_w8a8(int dtype, const void *codes, const void *act, const void *w, const void *scale, const void *bias,
                           void *out, i64 M, i64 N, i64 K, int threads) {
    BOTH((packed_linear_w8a8<X>(AS(int8_t, codes), AS(float, act), w, AS(float, scale), AS(X, bias), (X *)out, M, N, K,
                                threads)))
}
// bf16 prompts: rows starts[p]..starts[p + 1] of q [T, N, H] are the last tokens of a context of lens[p]; H % 64 == 0.
void ak_attend_prompts(const void *q, i64 qs, const void *keys, const void *values, const int32_t *table, i64 width,
                       const int32_t *starts, const int32_t *lens, void *out, i64 P, i64 N, i64 K, i64 H, i64 S, float scale,
                       int threads) {
    attend_prompts(AS(bf16, q), qs, AS(bf16, keys), AS(bf16, values), table, width, starts, lens, (bf16 *)out, P, N, K, H, S,
                   scale, threads);
}
#endif
}
