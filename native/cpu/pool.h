// Threads for short bursts of work: the caller works too, and a worker that is late misses its chunks
// instead of holding up the others.
//
// Every thread has a stretch of chunks of its own, taken in order, so that it reads memory as it lies;
// then it helps the others with theirs.
//
// Where the system refuses threads there are fewer, and the others do their work. An exception in a chunk
// ends its job and reaches the caller.
//
// Workers look for work for about 50 microseconds after the last of it, then sleep: beside another
// pool, ONNX Runtime's say, no core is burnt while nothing is to be done.
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

    // The caller and the workers: as many as were asked for, or as the system gave.
    int threads() const { return int(workers_.size()) + 1; }

    // Call work(chunk) for every chunk below `chunks` and return when all are done. What a chunk throws
    // is thrown here, once no thread is at work any more.
    template <class Work>
    void run(int chunks, Work&& work) {
        if (workers_.empty() || chunks <= 1) {
            for (int i = 0; i < chunks; ++i) work(i);
            return;
        }
        share(chunks, [](void* w, int i) { (*static_cast<Work*>(w))(i); },
              const_cast<void*>(static_cast<const void*>(&work)));
    }

    // Call work(begin, end) for parts of [0, n): one part for one thread, else several for each.
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

    // The job's number above, the next chunk below: a chunk is taken only from the job that was read.
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
    std::exception_ptr failure_;  // the first one of the job at hand, under the mutex
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

}  // namespace deeptalk
