#include "pool.h"

#include <chrono>
#include <system_error>
#include <utility>

namespace deeptalk {
namespace {

constexpr uint32_t kClosed = 0x80000000u;  // more chunks than any job has

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True if `ready` became true within about 50 microseconds.
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

Pool::Pool(int threads) : stretches_(size_t(threads)) {
    for (Stretch& stretch : stretches_) stretch.ticket.store(kClosed);
    workers_.reserve(size_t(threads - 1));  // no later line may throw once a worker has started
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {  // the system refuses: the started ones do all work
    }
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
    const uint64_t number = uint64_t(job() + 1) << 32;
    chunks_.store(chunks);
    call_.store(call);
    work_.store(work);
    done_.store(0);
    // From here on workers can take chunks. They watch the first stretch's number.
    for (int i = int(stretches_.size()) - 1; i >= 0; --i) {
        stretches_[size_t(i)].ticket.store(number | uint64_t(first_chunk(i, chunks)));
    }
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    work_as(0);
    // Workers are computing the remaining chunks; yield this core in case one was preempted.
    while (!spin_until([&] { return done_.load() == chunks; })) std::this_thread::yield();
    for (Stretch& stretch : stretches_) stretch.ticket.store(number | kClosed);
    std::exception_ptr failure;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        std::swap(failure, failure_);
    }
    if (failure) std::rethrow_exception(failure);
}

void Pool::call_guarded(Call call, void* work, int chunk) {
    try {
        call(work, chunk);
    } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
    }
}

void Pool::work_as(int thread) {
    const int threads = int(stretches_.size());
    for (int i = 0; i < threads; ++i) {
        while (take_chunk((thread + i) % threads)) {
        }
    }
}

int Pool::first_chunk(int stretch, int chunks) const {
    return int(int64_t(chunks) * stretch / int64_t(stretches_.size()));
}

uint32_t Pool::job() const { return uint32_t(stretches_[0].ticket.load() >> 32); }

bool Pool::take_chunk(int stretch) {
    std::atomic<uint64_t>& place = stretches_[size_t(stretch)].ticket;
    uint64_t ticket = place.load();
    for (;;) {
        const uint32_t chunk = uint32_t(ticket);
        const Call call = call_.load();
        void* const work = work_.load();
        if (chunk >= uint32_t(first_chunk(stretch + 1, chunks_.load()))) return false;
        // Fails if the job has changed since the read above.
        if (!place.compare_exchange_weak(ticket, ticket + 1)) continue;
        call_guarded(call, work, int(chunk));
        done_.fetch_add(1);
        return true;
    }
}

void Pool::wait_for_work(uint32_t seen) {
    const auto ready = [&] { return stopping_.load() || job() != seen; };
    if (spin_until(ready)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, ready);
    sleepers_.fetch_sub(1);
}

void Pool::serve(int thread) {
    uint32_t seen = 0;
    while (!stopping_.load()) {
        wait_for_work(seen);
        seen = job();
        work_as(thread);
    }
}

}  // namespace deeptalk
