// Loops over several threads. Unlike an OpenMP region a loop does not wait for helpers that never got to run: on a machine
// that others use too, the caller then does the work itself, where a barrier would cost a time slice per kernel.
#pragma once
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include "scalars.h"

namespace {

class Pool {
  public:
    // body(context, i) for all i below count, on the calling thread and at most `threads` - 1 others.
    void run(int threads, i64 count, void (*body)(void *, i64), void *context) {
        std::unique_lock<std::mutex> only(caller, std::try_to_lock);
        if (threads < 2 || count < 2 || !only.owns_lock()) {  // somebody else's loop has the helpers
            for (i64 i = 0; i < count; i++) body(context, i);
            return;
        }
        while (helpers < threads - 1) std::thread(&Pool::help, this, helpers++).detach();
        job = {body, context, count, threads - 1};
        next.store(0);
        number.fetch_add(1);  // odd: open
        if (sleeping.load() > 0) {
            std::lock_guard<std::mutex> guard(bed);
            wake.notify_all();
        }
        work();
        number.fetch_add(1);  // even: nobody may enter any more
        for (int spins = 0; inside.load() > 0; spins++) spins < SPINS ? pause() : std::this_thread::yield();
    }

  private:
    struct Job {
        void (*body)(void *, i64);
        void *context;
        i64 count;
        int helpers;
    };

    void work() {
        for (i64 i; (i = next.fetch_add(1)) < job.count;) job.body(job.context, i);
    }

    void help(int place) {
        uint64_t seen = 0;
        for (;;) {
            uint64_t now = number.load();
            for (int spins = 0; (now == seen || now % 2 == 0) && spins < SPINS; spins++) {
                pause();
                now = number.load();
            }
            if (now == seen || now % 2 == 0) {
                std::unique_lock<std::mutex> guard(bed);
                sleeping.fetch_add(1);
                wake.wait(guard, [&] { return (now = number.load()) != seen && now % 2 == 1; });
                sleeping.fetch_sub(1);
            }
            seen = now;
            inside.fetch_add(1);
            if (number.load() == now && place < job.helpers) work();  // else the loop is over: its state may be changing
            inside.fetch_sub(1);
        }
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    static constexpr int SPINS = 2000;  // some 50 us: the kernels of a step follow one another faster than that
    std::mutex caller, bed;
    std::condition_variable wake;
    std::atomic<uint64_t> number{0};
    std::atomic<i64> next{0};
    std::atomic<int> inside{0}, sleeping{0};
    Job job{};
    int helpers = 0;
};

// The process's pool. Never destroyed, because its threads never end; a forked child, which has no threads, gets its own.
inline Pool &pool() {
    static Pool *current = nullptr;
    static pid_t owner = 0;
    static std::mutex guard;
    std::lock_guard<std::mutex> hold(guard);
    if (owner != getpid()) current = new Pool, owner = getpid();
    return *current;
}

template <class Body> void parallel(int threads, i64 count, Body body) {
    pool().run(threads, count, [](void *context, i64 i) { (*(Body *)context)(i); }, &body);
}

// For work on single rows of `width` elements: handed out in blocks, and not at all when there is little of it.
template <class Body> void parallel_rows(int threads, i64 rows, i64 width, Body body) {
    constexpr i64 LITTLE = 32768;
    const i64 block = std::max<i64>(1, LITTLE / 2 / std::max<i64>(1, width));
    parallel(rows * width > LITTLE ? threads : 1, (rows + block - 1) / block, [&](i64 number) {
        for (i64 row = number * block; row < std::min(rows, (number + 1) * block); row++) body(row);
    });
}

}  // namespace
