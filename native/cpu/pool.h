// Threads for short bursts of work. The caller works, too, and the others take the chunks of a late
// worker, so that it does not delay them.
//
// Every thread first takes the chunks of its own stretch in order, so that it reads memory
// sequentially; then it takes chunks of other stretches.
//
// If the system refuses threads, the pool has fewer. An exception in a chunk ends its job and is
// rethrown in the caller.
//
// Workers spin for about 50 microseconds after a job and then sleep, so that an idle pool takes no
// core from another one, such as ONNX Runtime's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace deeptalk {

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // The caller and the workers: the requested number, or as many as the system allows.
    int threads() const { return int(workers_.size()) + 1; }

    // Calls work(chunk) for every chunk below `chunks` and returns when all are done. Rethrows a
    // chunk's exception after all threads have stopped working.
    template <class Work>
    void run(int chunks, Work&& work) {
        if (workers_.empty() || chunks <= 1) {
            for (int i = 0; i < chunks; ++i) work(i);
            return;
        }
        share(chunks, [](void* w, int i) { (*static_cast<Work*>(w))(i); },
              const_cast<void*>(static_cast<const void*>(&work)));
    }

    // Calls work(begin, end) for parts of [0, n): one part for one thread, otherwise several per
    // thread.
    template <class Work>
    void run_ranges(int n, Work&& work) {
        const int parts = workers_.empty() ? 1 : kPartsPerThread * threads();
        const int chunks = n < parts ? n : parts;
        run(chunks, [&](int i) {
            work(int(int64_t(n) * i / chunks), int(int64_t(n) * (i + 1) / chunks));
        });
    }

  private:
    using Call = void (*)(void* work, int chunk);
    static constexpr int kPartsPerThread = 8;

    // High bits: the job's number; low bits: the next chunk. So a chunk is taken only from the job
    // that was read.
    struct alignas(64) Stretch {
        std::atomic<uint64_t> ticket;
    };

    void share(int chunks, Call call, void* work);
    void work_as(int thread);  // until no chunk is left
    bool take_chunk(int stretch);  // false when none is left
    void call_guarded(Call call, void* work, int chunk);
    int first_chunk(int stretch, int chunks) const;
    uint32_t job() const;
    void wait_for_work(uint32_t seen);
    void serve(int thread);

    std::vector<Stretch> stretches_;
    std::atomic<int> chunks_{0}, done_{0}, sleepers_{0};
    std::atomic<Call> call_{nullptr};
    std::atomic<void*> work_{nullptr};
    std::atomic<bool> stopping_{false};
    std::exception_ptr failure_;  // the first one of the present job, guarded by the mutex
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

}  // namespace deeptalk
