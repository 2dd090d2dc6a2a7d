// One block of a Hopper GPU on the CPU, as far as the 8-bit attention kernel's pipeline goes: every warpgroup
// is a fiber with one thread, one of which runs at a time, drawn at random at every barrier, copy and
// product. Copies land at random times. A product reads its operands from where it is issued until it is
// waited for, and finds out if they change meanwhile. Scores come out as zeros, so that the softmax weighs
// all keys alike.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(n)
#define __builtin_assume(x) machine::require(x, "assumed: " #x)

struct CUtensorMap {
  char kind;
  int bytes;  // of a box
};
using cudaError_t = int;
using cudaStream_t = void*;
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct __nv_bfloat16 {
  float x;
};
struct __nv_bfloat162 {
  float x, y;
};
struct Place {
  int x = 0, y = 0;
};
inline Place threadIdx, blockIdx, gridDim;

using std::max;
using std::min;
inline float __log2f(float x) { return std::log2(x); }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint32_t __byte_perm(uint32_t a, uint32_t, uint32_t) { return a; }
inline int __float_as_int(float) { return 0; }
inline float __int_as_float(int) { return 0; }
inline int __vimax3_s32(int a, int, int) { return a; }
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __shfl_sync(unsigned, T x, int) {
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int) {
  return x;
}
inline bool __any_sync(unsigned, bool x) { return x; }

namespace machine {

inline void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}
inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

struct Box {
  char kind = '?';
  int x = 0, y = 0, z = 0;
  bool arriving = false;
  bool operator==(const Box&) const = default;
};

struct Product {
  uint32_t at[2];  // keys into boxes; of the first operand, or the second twice
  Box read[2];
  std::function<void()> result;
};

struct Scores {
  Box queries, keys;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 18);
  std::function<void()> body;
  std::function<bool()> ready = [] { return true; };
  bool done = false;
  int thread = 0;
  std::vector<std::vector<Product>> groups{1};  // committed ones, and an open one at the end
  std::vector<Scores> scores;
  std::vector<Box> values;
};

struct Barrier {
  int arrivals, left, bytes = 0, phase = 0;
  void settle() {
    if (left == 0 && bytes == 0) left = arrivals, ++phase;
  }
};

struct Named {
  int arrived = 0, generation = 0;
  bool awaited = false;
};

struct Copy {
  uint32_t to, barrier;
  int bytes;
};

struct Block {
  std::mt19937 draw;
  std::map<uint32_t, Box> boxes;
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Named> named;
  std::vector<Copy> copies;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* running = nullptr;
  ucontext_t scheduler;
};
inline Block* block = nullptr;

inline void wait_until(std::function<bool()> ready) {
  Fiber* self = block->running;
  self->ready = std::move(ready);
  swapcontext(&self->context, &block->scheduler);
}
inline void pause() {
  wait_until([] { return true; });
}

inline void enter() {
  block->running->body();
  block->running->done = true;
  swapcontext(&block->running->context, &block->scheduler);
}

inline void start(int thread, std::function<void()> body) {
  auto fiber = std::make_unique<Fiber>();
  fiber->thread = thread, fiber->body = std::move(body);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.data();
  fiber->context.uc_stack.ss_size = fiber->stack.size();
  makecontext(&fiber->context, reinterpret_cast<void (*)()>(enter), 0);
  block->fibers.push_back(std::move(fiber));
}

inline void land(size_t which) {
  const Copy copy = block->copies[which];
  block->copies.erase(block->copies.begin() + which);
  block->boxes.at(copy.to).arriving = false;
  Barrier& barrier = block->barriers.at(copy.barrier);
  barrier.bytes -= copy.bytes;
  require(barrier.bytes >= 0, "more bytes than a barrier expects");
  barrier.settle();
}

// Until all fibers have returned.
inline void run() {
  for (;;) {
    std::vector<Fiber*> ready;
    bool alive = false;
    for (auto& fiber : block->fibers)
      if (!fiber->done) {
        alive = true;
        if (fiber->ready()) ready.push_back(fiber.get());
      }
    if (!alive) break;
    const size_t choices = ready.size() + block->copies.size();
    if (choices == 0) fail("deadlock");
    const size_t chosen = block->draw() % choices;
    if (chosen >= ready.size()) {
      land(chosen - ready.size());
      continue;
    }
    block->running = ready[chosen];
    threadIdx.x = block->running->thread;
    swapcontext(&block->scheduler, &block->running->context);
  }
  require(block->copies.empty(), "a block ends with copies under way");
  for (auto& [id, named] : block->named) require(named.arrived == 0, "a turn passed that nobody awaits");
}

inline std::pair<const uint32_t, Box>* find(uint32_t at) {
  auto next = block->boxes.upper_bound(at);
  return next == block->boxes.begin() ? nullptr : &*std::prev(next);
}

inline Product reading(uint32_t a, uint32_t b, std::function<void()> result) {
  Product product{{a, b}, {}, std::move(result)};
  for (int i = 0; i < 2; ++i)
    if (auto* found = find(product.at[i])) product.at[i] = found->first, product.read[i] = found->second;
  return product;
}

}  // namespace machine

namespace cosmos_fast {
struct KernelInfo {};
inline uint32_t e4m3x4(float, float, float, float) { return 0; }
}  // namespace cosmos_fast

namespace cosmos_fast::hopper {

using machine::block;

// Values of a tile; what the output of an item is the mean of.
inline float value_of(int head, int tile) { return float((head * 37 + tile * 11) % 64); }

inline uint32_t cluster_rank() { return 0; }
inline float exp2_unit(float x) { return std::exp2(x); }

inline machine::Barrier& arrived_at(uint32_t barrier) {
  machine::pause();
  machine::Barrier& found = block->barriers.at(barrier);
  machine::require(found.left > 0, "more arrivals than a barrier takes");
  --found.left;
  return found;
}
inline void barrier_arrive(uint32_t barrier) { arrived_at(barrier).settle(); }
inline void barrier_arrive_at(uint32_t barrier, uint32_t) { barrier_arrive(barrier); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  machine::Barrier& found = arrived_at(barrier);
  found.bytes += int(bytes);
  found.settle();
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  machine::wait_until([=] { return uint32_t(block->barriers.at(barrier).phase & 1) != parity; });
}

inline bool arrive(int id, int threads) {
  machine::Named& named = block->named[id];
  named.arrived += 128;
  if (named.arrived < threads) return false;
  machine::require(named.awaited, "a turn passed twice");
  named.arrived = 0, named.awaited = false, ++named.generation;
  return true;
}
inline void named_arrive(int id, int threads) {
  machine::pause();
  arrive(id, threads);
}
inline void named_sync(int id, int threads) {
  machine::pause();
  machine::Named& named = block->named[id];
  const int generation = named.generation;
  named.awaited = true;
  if (!arrive(id, threads)) machine::wait_until([=] { return block->named[id].generation != generation; });
}

inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z) {
  machine::pause();
  for (auto& fiber : block->fibers)
    for (auto& group : fiber->groups)
      for (auto& product : group)
        machine::require(product.at[0] != to && product.at[1] != to, "a copy into what a product reads");
  block->boxes[to] = {map->kind, x, y, z, true};
  block->copies.push_back({to, barrier, map->bytes});
}
inline void copy_box_to(uint16_t, uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y,
                        int z) {
  copy_box(to, map, barrier, x, y, z);
}

template <int kRowBytes>
uint64_t operand(uint32_t address) {
  return address / 16;
}
inline void product_fence() { machine::pause(); }
inline void product_commit() { block->running->groups.emplace_back(); }
template <int kCount>
void pin(float (&)[kCount]) {}
template <int kPending, int kCount>
void product_wait(float (&)[kCount]) {
  machine::pause();
  auto& groups = block->running->groups;  // the last is open
  while (groups.size() > kPending + 1) {
    for (auto& product : groups.front()) {
      for (int i = 0; i < 2; ++i)
        if (auto* now = machine::find(product.at[i]))
          machine::require(now->second == product.read[i], "operands that changed under a product");
      product.result();
    }
    groups.erase(groups.begin());
  }
}

// Scores: a product of queries and keys.
inline void first_product(float (&d)[48], uint64_t a, uint64_t b) {
  auto product = machine::reading(a * 16, b * 16, [&d] { std::fill(d, d + 48, 0.0f); });
  block->running->scores.push_back({product.read[0], product.read[1]});
  block->running->groups.back().push_back(product);
}
inline void product(float (&)[48], uint64_t a, uint64_t b) {
  block->running->groups.back().push_back(machine::reading(a * 16, b * 16, [] {}));
}
// Output: weights of 2^8 times 32 keys.
inline void product(float (&d)[64], const uint32_t*, uint64_t b) {
  auto product = machine::reading(b * 16, b * 16, {});
  const machine::Box box = product.read[0];
  product.result = [&d, box] {
    for (float& x : d) x += 32 * 256 * value_of(box.z, box.x / 96);
  };
  block->running->values.push_back(box);
  block->running->groups.back().push_back(product);
}
// Queries in registers: of versions that this machine does not run.
inline void first_product(float (&)[48], const uint32_t*, uint64_t) {}
inline void product(float (&)[48], const uint32_t*, uint64_t) {}

}  // namespace cosmos_fast::hopper
