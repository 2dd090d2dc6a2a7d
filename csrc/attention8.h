// 8-bit attention as raw pointers and sizes, so that the code that computes sees no torch.
//   score = softmax_scale * q_scale * k_scale * (q . k)
//   out   = softmax over the keys (score) @ (v_scale * v) + v_mean          rounded to bf16, or
//   out   = that / out_step                                                 rounded to e4m3
// q, k and v are e4m3; products accumulate in fp32, probabilities meet v in e4m3.
// Shape letters: L queries, S keys, N heads; the head width is 128.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernel_info.h"

namespace cosmos_fast {

constexpr int kAttention8Width = 128;
// Keys of one k_scale, where there is not one for the head.
constexpr int kAttention8ScaleKeys = 128;
// v's columns come in this order within each group of 16 keys: column c holds key kAttention8Order[c], which
// makes the registers that leave the first product the operand of the second.
constexpr int kAttention8Order[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};

struct Attention8Args {
  const void* q;  // (L, N, 128) e4m3, unit stride along the width, other strides multiples of 16
  const void* k;  // (S, N, 128) likewise
  const void* v;  // (N, 128, v_row) e4m3, columns in kAttention8Order, zero from S to the next multiple of 16
  void* out;      // (L, N, 128) bf16, or e4m3 with an out_step
  float* lse;     // (N, L) natural log of the sum of exp(score), or null
  const float* q_scale;   // (N, blocks) or one for all: q_scale_head elements from head to head, 0 for one
  const float* k_scale;   // likewise, one per kAttention8ScaleKeys keys or one per head; null is 1, and then
                          // q_scale is one per head or one for all
  const float* v_scale;   // (N, 128)
  const float* v_mean;    // (N, 128) or null
  const float* out_step;  // one for all, or null for bf16
  const int*
      key_tiles;  // block-sparse: (N, query tiles, key_capacity) indices of key tiles, or null for all keys
  const int* key_counts;  // (N, query tiles), how many of them; may be 0, and then out is v_mean and lse -inf
  int64_t num_queries, num_keys;
  int64_t q_row, q_head, k_row, k_head, v_row, out_row, out_head;  // strides in elements
  int num_heads, q_scale_head, k_scale_head;
  int q_scale_rows;     // of one q_scale, a multiple of 64, or 0: one per head
  bool k_scale_blocks;  // one k_scale per kAttention8ScaleKeys keys, which a key tile must divide
  int key_capacity;
  float softmax_scale;
};

// One way to run it. Tiles: query tiles have queries rows, key tiles have keys rows.
struct Attention8Version {
  const char* name;
  int queries, keys;
  bool sparse;
};

// The versions built, by number; the number is what attention8_launch takes.
std::vector<Attention8Version> attention8_versions();

// Pointers 16-byte aligned. Current device.
cudaError_t attention8_launch(int version, const Attention8Args& args, cudaStream_t stream);
void attention8_kernels(std::vector<KernelInfo>& rows);

}  // namespace cosmos_fast
