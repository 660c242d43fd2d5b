#include "pool.h"

#include <chrono>
#include <cstdlib>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace aerie {
namespace {

// Operations of one step follow each other within tens of microseconds, and waking a sleeping
// thread takes about as long. Spinning for longer would take CPU time from the HTTP process.
constexpr auto kSpin = std::chrono::microseconds(50);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether done() became true within kSpin.
template <class Done>
bool spin_until(const Done& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int k = 0; k < 16; ++k) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

Pool::Pool(int num_threads) {
  for (int k = 1; k < num_threads; ++k) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
  stopping_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::share(int64_t num_tasks, Call call, const void* body) {
  num_tasks_ = num_tasks;
  call_ = call;
  body_ = body;
  next_task_.store(0, std::memory_order_relaxed);
  gate_.fetch_sub(kClosed, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  claim_tasks();
  gate_.fetch_add(kClosed, std::memory_order_acq_rel);
  await_workers();
}

void Pool::claim_tasks() {
  for (;;) {
    const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= num_tasks_) return;
    call_(body_, task);
  }
}

void Pool::work() {
  uint32_t seen = 0;
  for (;;) {
    seen = await_epoch(seen);
    if (stopping_.load()) return;
    if (gate_.fetch_add(1, std::memory_order_acq_rel) >= 0) claim_tasks();
    if (gate_.fetch_sub(1, std::memory_order_acq_rel) - 1 == kClosed) gate_.notify_one();
  }
}

// A worker may lose its core in the middle of a task, for milliseconds: leave this one to others.
void Pool::await_workers() {
  if (spin_until([this] { return gate_.load(std::memory_order_acquire) == kClosed; })) return;
  for (int open; (open = gate_.load(std::memory_order_acquire)) != kClosed;)
    gate_.wait(open, std::memory_order_acquire);
}

uint32_t Pool::await_epoch(uint32_t seen) {
  if (!spin_until([&] { return epoch_.load(std::memory_order_acquire) != seen; }))
    epoch_.wait(seen, std::memory_order_acquire);
  return epoch_.load(std::memory_order_acquire);
}

void* Pool::scratch_bytes(int which, size_t bytes) {
  if (scratch_.size() <= static_cast<size_t>(which)) scratch_.resize(which + 1);
  Buffer& buffer = scratch_[which];
  if (buffer.bytes < bytes) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    buffer.memory.reset(std::aligned_alloc(64, rounded));
    if (!buffer.memory) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.memory.get();
}

void Pool::Free::operator()(void* p) const { std::free(p); }

}  // namespace aerie

extern "C" {

aerie::Pool* aerie_pool_create(int num_threads) { return new aerie::Pool(num_threads); }

void aerie_pool_destroy(aerie::Pool* pool) { delete pool; }

}  // extern "C"
