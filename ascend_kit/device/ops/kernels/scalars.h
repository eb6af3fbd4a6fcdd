// Numbers of the kernels: activations are bf16 (dtype 0) or float32 (dtype 1), sums are float32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

typedef int64_t i64;
struct bf16 { uint16_t bits; };

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return float(x); }
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
    uint16_t nearest = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
    out->bits = x != x ? 0x7fc0 : nearest;
}
template <class T> inline T rounded(float x) { T result; narrow(x, &result); return result; }

// The bits of |x| order as the numbers do, with NaN above all: a maximum of floats would pass over it.
inline int32_t magnitude_bits(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}
inline float from_bits(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// A thread's scratch memory: grows, is never cleared, and starts on a cache line, because a vector load that crosses two
// costs twice.
template <class T> class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch &) = delete;
    ~Scratch() { std::free(memory); }
    T *room(i64 count) {
        if (count > size) {
            std::free(memory);
            size = (count * i64(sizeof(T)) + 63) / 64 * 64 / i64(sizeof(T));
            memory = (T *)std::aligned_alloc(64, size * sizeof(T));
        }
        return memory;
    }

  private:
    T *memory = nullptr;
    i64 size = 0;
};

}  // namespace
