// What the machine can do when nothing is in the way: bytes read per second, multiply-adds per second from registers.
// Built by ceilings.py with -O3 -march=native -fopenmp -shared.
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef int64_t wide __attribute__((vector_size(64), aligned(64)));

// Seconds to read `bytes` (a multiple of 512 per thread) once with `threads` threads. *sink keeps the loop alive.
double read_seconds(const char *buffer, int64_t bytes, int threads, int64_t *sink) {
    int64_t kept = 0;
    double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(| : kept)
    {
        int64_t share = bytes / threads / 512 * 512;
        const wide *from = (const wide *)(buffer + share * omp_get_thread_num());
        wide sum[8] = {0};
        for (int64_t i = 0; i < share / 64; i += 8)
#pragma GCC unroll 8
            for (int lane = 0; lane < 8; lane++) sum[lane] |= from[i + lane];
        for (int lane = 1; lane < 8; lane++) sum[0] |= sum[lane];
        for (int item = 0; item < 8; item++) kept |= sum[0][item];
    }
    *sink = kept;
    return omp_get_wtime() - start;
}

#if defined(__AMX_TILE__)
struct tiles { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; };

static int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
static void configure_tiles(void) {
    struct tiles config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) { config.row_bytes[tile] = 64; config.rows[tile] = 16; }
    // Some compilers drop the stores above when the intrinsic is used: its operand is only the address.
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
}
#endif

// Twelve independent sums, each its own variable: enough to hide the latency, few enough for the registers.
#define TWELVE_STEPS STEP(s0) STEP(s1) STEP(s2) STEP(s3) STEP(s4) STEP(s5) STEP(s6) STEP(s7) STEP(s8) STEP(s9) STEP(s10) STEP(s11)

static double bf16_round(int64_t loops) {  // multiply-adds times two of one thread
#if defined(__AMX_BF16__)
    configure_tiles();
    for (int64_t i = 0; i < loops; i++) {
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return loops * 4.0 * 16 * 16 * 32 * 2;
#elif defined(__AVX512BF16__)
    __m512bh a = (__m512bh)_mm512_setzero_si512(), b = a;
    __m512 z = _mm512_setzero_ps(), s0 = z, s1 = z, s2 = z, s3 = z, s4 = z, s5 = z, s6 = z, s7 = z, s8 = z, s9 = z, s10 = z,
           s11 = z;
#define STEP(s) s = _mm512_dpbf16_ps(s, a, b); __asm__ volatile("" : "+v"(s));
    for (int64_t i = 0; i < loops; i++) { TWELVE_STEPS }
#undef STEP
    return loops * 12.0 * 32 * 2;
#else
    (void)loops;
    return 0;
#endif
}

static double int8_round(int64_t loops) {
#if defined(__AMX_INT8__)
    configure_tiles();
    for (int64_t i = 0; i < loops; i++) {
        _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
    return loops * 4.0 * 16 * 16 * 64 * 2;
#elif defined(__AVX512VNNI__)
    __m512i a = _mm512_setzero_si512(), b = a, s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a,
            s10 = a, s11 = a;
#define STEP(s) s = _mm512_dpbusd_epi32(s, a, b); __asm__ volatile("" : "+v"(s));
    for (int64_t i = 0; i < loops; i++) { TWELVE_STEPS }
#undef STEP
    return loops * 12.0 * 64 * 2;
#else
    (void)loops;
    return 0;
#endif
}

// Operations per second of all threads together; 0 when this processor (or build) has no instruction for it.
static double rate(double (*round)(int64_t), int threads) {
    int64_t loops = 1 << 20;
    double work = 0, start;
#if defined(__AMX_TILE__)
    if (!tiles_allowed()) return 0;
#endif
    start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : work)
    work += round(loops);
    return work / (omp_get_wtime() - start);
}
double bf16_rate(int threads) { return rate(bf16_round, threads); }
double int8_rate(int threads) { return rate(int8_round, threads); }
