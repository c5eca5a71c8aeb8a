#include "pool.h"

#include <chrono>

namespace deeptalk {
namespace {

constexpr uint32_t kClosed = 0x80000000u;  // more chunks than any job has

uint32_t job_of(uint64_t ticket) { return uint32_t(ticket >> 32); }

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True when `ready` came within about 50 microseconds.
template <class Ready>
bool spin_until(Ready ready) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::microseconds(50);
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (Clock::now() < end);
    return false;
}

}  // namespace

Pool::Pool(int threads) {
    ticket_.store(kClosed);
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_.store(true);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::share(int chunks, Call call, void* work) {
    const uint64_t job = uint64_t(job_of(ticket_.load()) + 1) << 32;
    chunks_.store(chunks);
    call_.store(call);
    work_.store(work);
    done_.store(0);
    ticket_.store(job);  // from here on chunks can be taken
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    while (take_chunk()) {
    }
    // What is left is in the hands of workers at work; if one was preempted, let it have this core.
    while (!spin_until([&] { return done_.load() == chunks; })) std::this_thread::yield();
    ticket_.store(job | kClosed);
}

bool Pool::take_chunk() {
    uint64_t ticket = ticket_.load();
    for (;;) {
        const uint32_t chunk = uint32_t(ticket);
        const Call call = call_.load();
        void* const work = work_.load();
        if (chunk >= uint32_t(chunks_.load())) return false;
        // Fails if the job has changed since, and with it what was just read.
        if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
        call(work, int(chunk));
        done_.fetch_add(1);
        return true;
    }
}

void Pool::wait_for_work(uint32_t seen) {
    const auto ready = [&] { return stopping_.load() || job_of(ticket_.load()) != seen; };
    if (spin_until(ready)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, ready);
    sleepers_.fetch_sub(1);
}

void Pool::serve() {
    uint32_t seen = 0;
    while (!stopping_.load()) {
        wait_for_work(seen);
        seen = job_of(ticket_.load());
        while (take_chunk()) {
        }
    }
}

}  // namespace deeptalk
