// Threads that share the tasks of one operation. The caller works too. Threads claim tasks one by
// one, so a core that is busy with something else does not delay the others for long.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace aerie {

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Call body(task) for every task in 0 .. num_tasks-1, in any order, and wait for all of them.
  // Not reentrant: one operation at a time.
  template <class Body>
  void run(int64_t num_tasks, const Body& body) {
    if (workers_.empty() || num_tasks <= 1) {
      for (int64_t task = 0; task < num_tasks; ++task) body(task);
      return;
    }
    share(num_tasks, [](const void* b, int64_t task) { (*static_cast<const Body*>(b))(task); },
          &body);
  }

  // Scratch memory of the running operation, aligned to 64 bytes; `which` is the buffer's number.
  // Call it outside of run().
  template <class T>
  T* scratch(int which, size_t count) {
    return static_cast<T*>(scratch_bytes(which, count * sizeof(T)));
  }

 private:
  using Call = void (*)(const void* body, int64_t task);

  void share(int64_t num_tasks, Call call, const void* body);
  void* scratch_bytes(int which, size_t bytes);
  void work();
  void claim_tasks();
  uint32_t await_epoch(uint32_t seen);
  void await_workers();

  // The gate counts the workers inside the current job; it is far below zero between jobs. A worker
  // that comes late finds it closed and never touches the job.
  static constexpr int kClosed = -(1 << 30);
  alignas(64) std::atomic<int> gate_{kClosed};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int64_t> next_task_{0};
  int64_t num_tasks_ = 0;
  Call call_ = nullptr;
  const void* body_ = nullptr;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
  struct Free {
    void operator()(void* p) const;
  };
  struct Buffer {
    std::unique_ptr<void, Free> memory;
    size_t bytes = 0;
  };
  std::vector<Buffer> scratch_;
};

}  // namespace aerie
