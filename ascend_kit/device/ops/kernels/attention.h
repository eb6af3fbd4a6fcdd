// Attention over the paged cache where it lies: caches are [blocks, S, K, H], a table row lists a sequence's blocks.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>
#include "dots.h"
#include "pool.h"
#include "tiles.h"

namespace {

// A cache of int8 codes: each block holds its rows [S, K, H], then a float32 scale for every token and head [S, K].
inline i64 block_size_of(const int8_t *, i64 S, i64 K, i64 H) { return S * K * (H + 4); }
template <class X> inline i64 block_size_of(const X *, i64 S, i64 K, i64 H) { return S * K * H; }

// One KV head of one sequence in such a cache.
struct Int8Head {
    const int8_t *cache;
    const int32_t *table;
    i64 kv, K, H, S;
    const int8_t *block(i64 t) const { return cache + table[t / S] * S * K * (H + 4); }
    const int8_t *operator[](i64 t) const { return block(t) + (t % S * K + kv) * H; }
    float scale(i64 t) const { return ((const float *)(block(t) + S * K * H))[t % S * K + kv]; }
};

template <class X> struct PagedHead {  // one KV head of one sequence
    const X *cache;
    const int32_t *table;
    i64 kv, K, H, S;
    const X *operator[](i64 t) const { return cache + ((i64(table[t / S]) * S + t % S) * K + kv) * H; }
    float scale(i64) const { return 1.0f; }
};

inline void weighted_add(float *acc, const float *row, float weight, i64 H) {
    for (i64 h = 0; h < H; h++) acc[h] += weight * row[h];
}
inline void weighted_add(float *acc, const int8_t *row, float weight, i64 H) {
    for (i64 h = 0; h < H; h++) acc[h] += weight * row[h];
}
inline void weighted_add(float *acc, const bf16 *row, float weight, i64 H) {
    for (i64 h = 0; h < H; h++) acc[h] += weight * widen(row[h]);
}

// One query token, G heads [G, H] that share a KV head, over `length` keys; any dtype, size and processor.
template <class X, class W, class Head>
void attend_token(const X *query, Head keys, Head values, i64 length, X *out, i64 G, float scale) {
    const i64 H = keys.H;
    static thread_local Scratch<float> of_scores, of_acc;
    float *scores = of_scores.room(G * length), *acc = of_acc.room(G * H);
    std::fill(acc, acc + G * H, 0.0f);
    for (i64 t = 0; t < length; t++)
        for (i64 g = 0; g < G; g++) {
            float dot;
            Dots<X, W, 1, 1>::run(query + g * H, H, keys[t], H, &dot);
            scores[g * length + t] = dot * scale * keys.scale(t);
        }
    for (i64 g = 0; g < G; g++) {
        float *row = &scores[g * length], most = *std::max_element(row, row + length), sum = 0;
        for (i64 t = 0; t < length; t++) sum += row[t] = std::exp(row[t] - most);
        for (i64 t = 0; t < length; t++) row[t] /= sum;
    }
    for (i64 t = 0; t < length; t++)
        for (i64 g = 0; g < G; g++) weighted_add(&acc[g * H], values[t], scores[g * length + t] * values.scale(t), H);
    for (i64 i = 0; i < G * H; i++) narrow(acc[i], out + i);
}

#ifdef AK_TILES
inline void store32(bf16 *to, __m512 low, __m512 high) { store_bf16(to, low, high); }
inline void store32(float *to, __m512 low, __m512 high) { _mm512_storeu_ps(to, low), _mm512_storeu_ps(to + 16, high); }

// scores[t] -> 2^(scores[t] * scale - most) for t < count, then 0 up to a multiple of 32; `out` may be `scores`. `most`, the
// largest scaled score so far, and `sum` are carried on; returns what earlier results are to be multiplied by.
template <class X> float softmax_row(float *scores, i64 count, float scale, float &most, float &sum, X *out) {
    const i64 padded = (count + 31) / 32 * 32;
    for (i64 t = count; t < padded; t++) scores[t] = -INFINITY;
    __m512 best = _mm512_max_ps(_mm512_loadu_ps(scores), _mm512_loadu_ps(scores + 16));
    for (i64 t = 32; t < padded; t += 32)
        best = _mm512_max_ps(best, _mm512_max_ps(_mm512_loadu_ps(scores + t), _mm512_loadu_ps(scores + t + 16)));
    const float before = most;
    most = std::max(before, _mm512_reduce_max_ps(best) * scale);
    const __m512 shift = _mm512_set1_ps(most), factor = _mm512_set1_ps(scale);
    __m512 total = _mm512_setzero_ps();
    for (i64 t = 0; t < padded; t += 32) {
        const __m512 low = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(scores + t), factor, shift));
        const __m512 high = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(scores + t + 16), factor, shift));
        total = _mm512_add_ps(total, _mm512_add_ps(low, high));
        store32(out + t, low, high);
    }
    const float shrink = most == before ? 1.0f : std::exp2(before - most);
    sum = sum * shrink + _mm512_reduce_add_ps(total);
    return shrink;
}

inline void multiply(float *row, i64 count, float by) {
    for (i64 i = 0; i < count; i += 16)
        _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(by)));
}

// What one query token gathered from some of its keys: per head [N, H] weighted values, the largest score, the sum.
struct Partial {
    float *acc, *most, *sum;
};

// Tokens t0..end of the sequence with this row of the block table.
struct Span {
    const int32_t *table;
    i64 t0, end;
};

// Where some of a span's tokens lie, in elements from the start of a cache; past the last one its place again.
constexpr i64 GROUP = 32;
struct Rows {
    i64 at[GROUP], scale_at[GROUP], count;
    void find(Span span, i64 S, i64 row, i64 block_size, i64 K) {
        count = std::max<i64>(0, std::min(GROUP, span.end - span.t0));
        i64 block = span.t0 / S, within = span.t0 % S;  // once, not for every token: a division costs as much as 64 products
        for (i64 i = 0; i < count; i++) {
            at[i] = span.table[block] * block_size + within * row;
            scale_at[i] = span.table[block] * block_size + S * row + within * K * 4;
            if (++within == S) within = 0, block++;
        }
        for (i64 i = count; count > 0 && i < GROUP; i++) at[i] = at[count - 1], scale_at[i] = scale_at[count - 1];
    }
};

// Fetches rows of keys and values into the second cache, a few lines at a time.
template <class W> struct Ahead {
    const W *keys, *values;
    const Rows &rows;
    i64 size, row, offset;
    void fetch(i64 lines) {
        for (; lines > 0 && row < rows.count; lines -= 2) {
            _mm_prefetch((const char *)(keys + rows.at[row] + offset), _MM_HINT_T1);
            _mm_prefetch((const char *)(values + rows.at[row] + offset), _MM_HINT_T1);
            offset += 64 / sizeof(W);
            if (offset == size) offset = 0, row++;
        }
    }
};

// How an AVX-512 register of a cache's row is multiplied and summed: `code` is what queries and weights are then.
template <class W> struct Arithmetic;
template <> struct Arithmetic<bf16> {
    typedef bf16 code;
    static __m512i row(const bf16 *p) { return load(p); }
    static __m512i step(__m512i acc, __m512i a, __m512i b) { return Bf16Step::step(acc, a, b); }
    static __m512 floats(__m512i sums) { return (__m512)sums; }
    static __m512i begin(const float *acc) { return load(acc); }
    static void end(float *acc, __m512i total, float) { _mm512_storeu_si512(acc, total); }
};
// int8 codes are multiplied as integers of 16 bits, which costs half of making bf16 of them. Queries and weights are
// rounded to 16 bits of their largest, finer than bf16. A group's sum stays below 2^31: 32 * 32767 * 127.
template <> struct Arithmetic<int8_t> {
    typedef int16_t code;
    static __m512i row(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
    static __m512i step(__m512i acc, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(acc, a, b); }
    static __m512 floats(__m512i sums) { return _mm512_cvtepi32_ps(sums); }
    static __m512i begin(const float *) { return _mm512_setzero_si512(); }
    static void end(float *acc, __m512i total, float unit) {
        _mm512_storeu_ps(acc, _mm512_fmadd_ps(floats(total), _mm512_set1_ps(unit), _mm512_loadu_ps(acc)));
    }
};

inline __m512i codes_of(__m512 x, __m512 by) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, by)); }

// 32 C numbers from x() -> codes; returns what a code of 1 stands for: NaN when one of them is, so that it is not lost.
template <int C, class Numbers> float to_codes(const Numbers &x, int16_t *codes) {
    __m512i most = _mm512_setzero_si512();  // bits of magnitudes order as numbers do, NaN above all
    for (int c = 0; c < 2 * C; c++)
        most = _mm512_max_epi32(most, _mm512_and_si512((__m512i)x(c), _mm512_set1_epi32(0x7fffffff)));
    const float largest = from_bits(_mm512_reduce_max_epi32(most));
    const __m512 by = _mm512_set1_ps(largest == 0 ? 0.0f : 32767 / largest);
    for (int c = 0; c < 2 * C; c++)
        _mm256_storeu_si256((__m256i *)(codes + 16 * c), _mm512_cvtepi32_epi16(codes_of(x(c), by)));
    return largest / 32767;
}

// All N heads [N, 32 C] of a query as they are multiplied with keys, and what their numbers stand for.
template <int C> const bf16 *query_codes(const bf16 *query, i64 N, std::vector<float> &units, const bf16 *) {
    units.assign(N, 1.0f);
    return query;
}
template <int C> const int16_t *query_codes(const bf16 *query, i64 N, std::vector<float> &units, const int8_t *) {
    static thread_local Scratch<int16_t> of_codes;
    int16_t *codes = of_codes.room(N * 32 * C);
    units.clear();
    for (i64 n = 0; n < N; n++) {
        const auto part = [&](int c) {
            const __m256i bits = _mm256_loadu_si256((const __m256i *)(query + (n * 2 * C + c) * 16));
            return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        };
        units.push_back(to_codes<C>(part, codes + n * 32 * C));
    }
    return codes;
}

// The scales of a group's tokens under one KV head; a cache of bf16 has none.
struct Scales {
    alignas(64) float of[GROUP];
    void find(const bf16 *, const Rows &, i64) {}
    void find(const int8_t *cache, const Rows &rows, i64 kv) {
        for (i64 i = 0; i < GROUP; i++) of[i] = ((const float *)(cache + rows.scale_at[i]))[kv];
    }
};

// A group's scores of one head -> its weights [32]; `unit` is what a weight of 1 stands for. Returns as softmax_row does.
inline float weigh(float *scores, i64 count, float scale, float &most, float &sum, const Scales &, const Scales &,
                   bf16 *weights, float &unit) {
    unit = 1.0f;
    return softmax_row(scores, count, scale, most, sum, weights);
}
inline float weigh(float *scores, i64 count, float scale, float &most, float &sum, const Scales &keys, const Scales &values,
                   int16_t *weights, float &unit) {
    for (i64 i = 0; i < GROUP; i += 16)
        _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), _mm512_load_ps(keys.of + i)));
    const float shrink = softmax_row(scores, count, scale, most, sum, scores);
    const auto part = [&](int c) { return _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * c), _mm512_load_ps(values.of + 16 * c)); };
    unit = to_codes<GROUP / 32>(part, weights);
    return shrink;
}

// 16 registers of 16 floats -> their 16 sums.
inline __m512 sums16(const __m512 r[16]) {
    __m512 quarter[4];
#pragma GCC unroll 4
    for (int e = 0; e < 4; e++) {  // registers e, 4 + e, 8 + e and 12 + e: a quarter of a register each
        const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(r[e], r[4 + e], 0x44), _mm512_shuffle_f32x4(r[e], r[4 + e], 0xee));
        const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(r[8 + e], r[12 + e], 0x44),
                                       _mm512_shuffle_f32x4(r[8 + e], r[12 + e], 0xee));
        quarter[e] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    __m512d half[2];
    for (int e = 0; e < 2; e++)
        half[e] = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(quarter[2 * e], quarter[2 * e + 1]),
                                         _mm512_unpackhi_ps(quarter[2 * e], quarter[2 * e + 1]));
    return _mm512_add_ps((__m512)_mm512_unpacklo_pd(half[0], half[1]), (__m512)_mm512_unpackhi_pd(half[0], half[1]));
}

// One span of one sequence for all N heads of its query token, bf16 and H = 32 C. All KV heads take their turn at a
// group of tokens before the next, so that memory is read in order; the next group, or the first one of the span that this
// thread is likely to get next, is fetched meanwhile.
template <int C, class W>
void attend_span(const bf16 *query, const W *keys, const W *values, Span span, Span next, Partial part, i64 N, i64 K,
                 i64 S, float scale) {
    typedef Arithmetic<W> With;
    constexpr i64 H = 32 * C;
    const i64 G = N / K, pairs = (G + 1) / 2;
    alignas(64) typename With::code weights[2 * GROUP];
    alignas(64) float scores[2 * GROUP];
    static thread_local std::vector<float> units;
    const typename With::code *codes = query_codes<C>(query, N, units, keys);
    std::fill(part.acc, part.acc + N * H, 0.0f);
    std::fill(part.most, part.most + N, -INFINITY);
    std::fill(part.sum, part.sum + N, 0.0f);
    Rows group[2];
    Scales key_scales, value_scales;
    const i64 block_size = block_size_of(keys, S, K, H);
    group[0].find(span, S, K * H, block_size, K);
    for (int turn = 0; span.t0 < span.end; turn ^= 1) {
        const Rows &rows = group[turn];
        span.t0 += GROUP;
        group[turn ^ 1].find(span.t0 < span.end ? span : next, S, K * H, block_size, K);
        Ahead<W> ahead{keys, values, group[turn ^ 1], K * H, 0, 0};
        const i64 lines = ahead.rows.count * C * i64(sizeof(W)) / (pairs * ((rows.count + 1) / 2) * 3 / 2) + 1;  // at every fetch below
        for (i64 kv = 0; kv < K; kv++) {
            const W *key = keys + kv * H, *value = values + kv * H;
            key_scales.find(keys, rows, kv), value_scales.find(values, rows, kv);
            for (i64 pair = 0; pair < pairs; pair++) {  // two heads at a time fit the registers; a last one alone runs twice
                const i64 head = kv * G + 2 * pair, other = std::min(head + 1, kv * G + G - 1);
                __m512i q[2][C];
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) {
                    q[0][c] = load(codes + head * H + 32 * c);
                    q[1][c] = load(codes + other * H + 32 * c);
                }
                for (i64 i0 = 0; i0 < rows.count; i0 += 8) {
                    ahead.fetch(2 * lines);
                    __m512 dots[16];
#pragma GCC unroll 8
                    for (int i = 0; i < 8; i++) {
                        __m512i first = _mm512_setzero_si512(), second = first;
#pragma GCC unroll 4
                        for (int c = 0; c < C; c++) {
                            const __m512i part_of_key = With::row(key + rows.at[i0 + i] + 32 * c);
                            first = With::step(first, q[0][c], part_of_key);
                            second = With::step(second, q[1][c], part_of_key);
                        }
                        dots[i] = With::floats(first), dots[8 + i] = With::floats(second);
                    }
                    const __m512 sums = sums16(dots);
                    _mm256_storeu_ps(scores + i0, _mm512_castps512_ps256(sums));
                    _mm256_storeu_ps(scores + GROUP + i0, _mm512_extractf32x8_ps(sums, 1));
                }
                float unit[2];
                for (int j = 0; j < 1 + (other != head); j++) {
                    const float shrink =
                        weigh(scores + j * GROUP, rows.count, scale * LOG2_E * units[head + j], part.most[head + j],
                              part.sum[head + j], key_scales, value_scales, weights + j * GROUP, unit[j]);
                    if (shrink != 1.0f) multiply(part.acc + (head + j) * H, H, shrink);
                }
                float *acc[2] = {part.acc + head * H, part.acc + other * H};
                __m512i total[2][2 * C];
#pragma GCC unroll 8
                for (int c = 0; c < 2 * C; c++) {
                    total[0][c] = With::begin(acc[0] + 16 * c);
                    total[1][c] = With::begin(acc[1] + 16 * c);
                }
                for (i64 i = 0; i < rows.count; i += 2) {
                    ahead.fetch(lines);
                    int32_t weight[2];
                    std::memcpy(&weight[0], &weights[i], 4);
                    std::memcpy(&weight[1], &weights[GROUP + i], 4);
                    const __m512i first = _mm512_set1_epi32(weight[0]), second = _mm512_set1_epi32(weight[1]);
#pragma GCC unroll 4
                    for (int c = 0; c < C; c++) {
                        const __m512i a = With::row(value + rows.at[i] + 32 * c);
                        const __m512i b = With::row(value + rows.at[i + 1] + 32 * c);
                        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
                        total[0][2 * c] = With::step(total[0][2 * c], low, first);
                        total[0][2 * c + 1] = With::step(total[0][2 * c + 1], high, first);
                        total[1][2 * c] = With::step(total[1][2 * c], low, second);
                        total[1][2 * c + 1] = With::step(total[1][2 * c + 1], high, second);
                    }
                }
#pragma GCC unroll 8
                for (int c = 0; c < 2 * C; c++) {
                    if (other != head) With::end(acc[1] + 16 * c, total[1][c], unit[1]);
                    With::end(acc[0] + 16 * c, total[0][c], unit[0]);
                }
            }
        }
    }
}

// The spans of one sequence put together, as bf16 [N, H].
template <int C> void combine(const Partial *parts, i64 spans, bf16 *out, i64 N) {
    constexpr i64 H = 32 * C;
    // unpack took 4 neighbours of each 8 into the first half of 32 and the other 4 into the second.
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (i64 n = 0; n < N; n++) {
        float most = -INFINITY, sum = 0;
        for (i64 s = 0; s < spans; s++) most = std::max(most, parts[s].most[n]);
        for (i64 s = 0; s < spans; s++) sum += parts[s].sum[n] * std::exp2(parts[s].most[n] - most);
        for (int c = 0; c < C; c++) {
            __m512 low = _mm512_setzero_ps(), high = low;
            for (i64 s = 0; s < spans; s++) {
                const float *from = parts[s].acc + n * H + 32 * c;
                const __m512 by = _mm512_set1_ps(std::exp2(parts[s].most[n] - most) / sum);
                low = _mm512_fmadd_ps(_mm512_loadu_ps(from), by, low);
                high = _mm512_fmadd_ps(_mm512_loadu_ps(from + 16), by, high);
            }
            store_bf16(out + n * H + 32 * c, _mm512_permutex2var_ps(low, first, high),
                       _mm512_permutex2var_ps(low, second, high));
        }
    }
}

// attend_tokens for bf16 and H = 32 C. A sequence is cut into spans of a fixed length, so that neither the batch nor the
// number of threads changes a result.
template <int C, class W>
void attend_spans(const bf16 *q, i64 qs, const W *keys, const W *values, const int32_t *table, i64 width,
                  const int32_t *lens, bf16 *out, i64 B, i64 N, i64 K, i64 S, float scale, int threads) {
    constexpr i64 H = 32 * C, SPAN = 512;
    static thread_local Scratch<float> of_parts;
    static thread_local std::vector<Partial> parts;
    static thread_local std::vector<std::pair<i64, i64>> tasks;  // sequence, first token
    static thread_local std::vector<i64> first;
    tasks.clear(), first.clear();
    for (i64 b = 0; b < B; b++) {
        first.push_back(tasks.size());
        for (i64 t = 0; t < lens[b]; t += SPAN) tasks.emplace_back(b, t);
    }
    first.push_back(tasks.size());
    const i64 one = (N * (H + 2) + 15) / 16 * 16, count = tasks.size();
    float *room = of_parts.room(count * one);
    parts.clear();
    for (i64 i = 0; i < count; i++) {
        float *at = room + i * one;
        parts.push_back({at, at + N * H, at + N * H + N});
    }
    Partial *all = parts.data();  // a thread of the team has thread_local vectors of its own
    const auto *task = tasks.data();
    const i64 *start = first.data();
    const auto span = [&](i64 i) {
        const i64 b = task[i].first, t0 = task[i].second;
        return Span{table + b * width, t0, std::min<i64>(lens[b], t0 + SPAN)};
    };
    parallel(threads, count, [&](i64 i) {
        const Span next = i + threads < count ? span(i + threads) : Span{table, 0, 0};
        attend_span<C, W>(q + task[i].first * qs, keys, values, span(i), next, all[i], N, K, S, scale);
    });
    parallel(threads, B, [&](i64 b) { combine<C>(all + start[b], start[b + 1] - start[b], out + b * N * H, N); });
}

// A prompt's new tokens (Q of them, the last ones of C) under one KV head: causal, in tiles of queries and keys with a
// running maximum. q and out point at the first of the G heads; rows are `qs` and `os` apart. H is a multiple of 64.
inline void attend_prompt(const bf16 *q, i64 qs, PagedHead<bf16> keys, PagedHead<bf16> values, bf16 *out, i64 os, i64 Q,
                          i64 C, i64 G, float scale) {
    constexpr i64 KEYS = 256;
    const i64 H = keys.H, past = C - Q, padded = (C + KEYS - 1) / KEYS * KEYS;
    const i64 most_queries = std::max<i64>(1, 24 / G), tiles = (Q + most_queries - 1) / most_queries;
    const i64 queries = (Q + tiles - 1) / tiles;  // a tile; all of like size
    const i64 all = queries * G;
    static thread_local Scratch<bf16> of_keys, of_values, of_block, of_weights;
    static thread_local Scratch<float> of_scores, of_acc, of_most, of_sum;
    bf16 *packed_keys = of_keys.room(padded * H), *packed_values = of_values.room(padded * H);
    bf16 *block = of_block.room(all * H), *weights = of_weights.room(all * KEYS);
    float *scores = of_scores.room(all * KEYS), *acc = of_acc.room(all * H);
    float *most = of_most.room(all), *sum = of_sum.room(all);
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
    for (i64 t0 = 0; t0 < padded; t0 += 16) {
        const bf16 *key[16], *value[16];  // none past the end: zeros there
        for (i64 i = 0; i < 16; i++) {
            key[i] = t0 + i < C ? keys[t0 + i] : nullptr;
            value[i] = t0 + i < C ? values[t0 + i] : nullptr;
        }
        const auto part = [](const bf16 *row, i64 h) { return row ? load(row + h) : _mm512_setzero_si512(); };
        for (i64 h = 0; h < H; h += 32) {  // keys: panels of 64, [H/2][64][2]
            __m512i parts[16];
            for (i64 i = 0; i < 16; i++) parts[i] = part(key[i], h);
            transpose16(parts);
            bf16 *to = &packed_keys[t0 / PANEL * PANEL * H + h * PANEL + t0 % PANEL * 2];
            for (i64 i = 0; i < 16; i++) _mm512_storeu_si512(to + i * PANEL * 2, parts[i]);
        }
        for (i64 i = 0; i < 16; i += 2)  // values: panels of 64, [C/2][64][2]
            for (i64 h = 0; h < H; h += 32) {
                const __m512i a = part(value[i], h), b = part(value[i + 1], h);
                const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
                bf16 *to = &packed_values[h / PANEL * PANEL * padded + (t0 + i) * PANEL + h % PANEL * 2];
                _mm512_storeu_si512(to, _mm512_permutex2var_epi32(low, even, high));
                _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi32(low, odd, high));
            }
    }
    for (i64 q0 = 0; q0 < Q; q0 += queries) {
        const i64 count = std::min(queries, Q - q0), rows = count * G, limit = past + q0 + count;
        for (i64 i = 0; i < count; i++) std::memcpy(&block[i * G * H], q + (q0 + i) * qs, G * H * sizeof(bf16));
        std::fill(acc, acc + rows * H, 0.0f);
        std::fill(most, most + rows, -INFINITY);
        std::fill(sum, sum + rows, 0.0f);
        for (i64 t0 = 0; t0 < limit; t0 += KEYS) {
            const i64 here = std::min(KEYS, limit - t0);
            for (i64 p = 0; p < here; p += PANEL)
                panel_product<Bf16Step>((const char *)block, 2 * H, (const char *)&packed_keys[(t0 + p) * H],
                                        PANEL * 4, rows, H / 2, &scores[p], KEYS);
            for (i64 r = 0; r < rows; r++) {
                const i64 visible = std::min(here, past + q0 + r / G + 1 - t0);
                bf16 *to = &weights[r * KEYS];
                if (visible < here) std::memset(to, 0, KEYS * sizeof(bf16));
                if (visible <= 0) continue;
                const float shrink = softmax_row(&scores[r * KEYS], visible, scale * LOG2_E, most[r], sum[r], to);
                if (shrink != 1.0f) multiply(&acc[r * H], H, shrink);
            }
            for (i64 h = 0; h < H; h += PANEL)
                panel_product<Bf16Step, true>((const char *)weights, 2 * KEYS, (const char *)&packed_values[h * padded + t0 * PANEL],
                                        PANEL * 4, rows, (here + 1) / 2, &acc[h], H);
        }
        for (i64 r = 0; r < rows; r++) {
            const __m512 by = _mm512_set1_ps(1.0f / sum[r]);
            bf16 *to = out + (q0 + r / G) * os + r % G * H;
            for (i64 h = 0; h < H; h += 32)
                store_bf16(to + h, _mm512_mul_ps(_mm512_loadu_ps(&acc[r * H + h]), by),
                           _mm512_mul_ps(_mm512_loadu_ps(&acc[r * H + h + 16]), by));
        }
    }
}

// Prompts of one step, each KV head of each prompt a task of its own.
inline void attend_prompts(const bf16 *q, i64 qs, const bf16 *keys, const bf16 *values, const int32_t *table, i64 width,
                           const int32_t *starts, const int32_t *lens, bf16 *out, i64 P, i64 N, i64 K, i64 H, i64 S,
                           float scale, int threads) {
    const i64 G = N / K;
    parallel(threads, P * K, [&](i64 task) {
        const i64 p = task / K, kv = task % K, first = starts[p];
        PagedHead<bf16> key{keys, table + p * width, kv, K, H, S}, value{values, table + p * width, kv, K, H, S};
        attend_prompt(q + first * qs + kv * G * H, qs, key, value, out + (first * N + kv * G) * H, N * H, starts[p + 1] - first,
                      lens[p], G, scale);
    });
}
#endif

// One new token a sequence: q [B, N, H] with rows `qs` apart, lens [B] with this token included.
template <class X, class W>
void attend_tokens(const X *q, i64 qs, const W *keys, const W *values, const int32_t *table, i64 width, const int32_t *lens,
                   X *out, i64 B, i64 N, i64 K, i64 H, i64 S, float scale, int threads) {
    const i64 G = N / K;
#ifdef AK_TILES
    if constexpr (std::is_same<X, bf16>::value) {
        if (H == 128) return attend_spans<4, W>(q, qs, keys, values, table, width, lens, out, B, N, K, S, scale, threads);
        if (H == 64) return attend_spans<2, W>(q, qs, keys, values, table, width, lens, out, B, N, K, S, scale, threads);
    }
#endif
    typedef typename std::conditional<std::is_same<W, int8_t>::value, Int8Head, PagedHead<X>>::type Head;
    parallel(threads, B * K, [&](i64 task) {
        const i64 b = task / K, kv = task % K;
        Head key{keys, table + b * width, kv, K, H, S}, value{values, table + b * width, kv, K, H, S};
        attend_token<X, W>(q + b * qs + kv * G * H, key, value, lens[b], out + (b * N + kv * G) * H, G, scale);
    });
}

}  // namespace
