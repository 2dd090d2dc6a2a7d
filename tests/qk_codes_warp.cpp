// qk_codes_kernel on the host: 32 lanes of csrc/qk_codes_lane.h in turn, shuffles and products of the tensor
// cores by the layouts of their instructions. For tests/test_qk_codes.py.
#include "qk_codes_lane.h"

using namespace cosmos_fast::qk_codes;

namespace {

float value(uint32_t word, int half) { return half ? high_of(word) : low_of(word); }

// m16n8k16 of a warp: D = A B. Lane 4 g + t holds of A rows g, g + 8 at columns 2 t, 2 t + 1 and 8 further,
// of B rows 2 t, 2 t + 1 and 8 further at column g, of D rows g, g + 8 at columns 2 t, 2 t + 1.
void product(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*d)[4]) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i)
      left[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = value(a[lane][i / 2], i % 2);
    for (int i = 0; i < 4; ++i) right[2 * t + i % 2 + i / 2 * 8][g] = value(b[lane][i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
      d[lane][i] = sum;
    }
}

// 16 heads (16, 128) of a token; angles (64,); mean (16, 128); out: where each head's codes go.
template <bool kKeys>
void token_codes(const uint16_t* x, const float* gain, const float* cos, const float* sin, const float* mean,
                 float step, float eps, uint8_t* const (&out)[16]) {
  Four tables[3][32], means[512];
  for (int i = 0; i < 128; ++i) tables[0][i / 4].v[i % 4] = gain[i];
  for (int i = 0; i < 64; ++i) tables[1][i / 4].v[i % 4] = cos[i], tables[2][i / 4].v[i % 4] = sin[i];
  for (int i = 0; i < 16 * 128; ++i) means[mean_place(i / 128, i % 128 / 4)].v[i % 4] = mean[i];
  uint32_t own[32][2][4][4], a[32][8][4], sign[2][32][2];
  float sums[32][2];
  for (int lane = 0; lane < 32; ++lane)
    for (int head = 0; head < 2; ++head) {
      for (int c = 0; c < 4; ++c)
        std::memcpy(own[lane][head][c], x + (lane / 4 + 8 * head) * 128 + 32 * c + lane % 4 * 8, 16);
      sums[lane][head] = squares(own[lane][head]);
    }
  for (int lane = 0; lane < 32; ++lane) {
    float rstd[2];
    for (int head = 0; head < 2; ++head) {
      const float near = sums[lane][head] + sums[lane ^ 1][head],
                  far = sums[lane ^ 2][head] + sums[lane ^ 3][head];
      rstd[head] = 1.0f / std::sqrt((near + far) / 128 + eps);
    }
    rotated<kKeys>(own[lane], rstd, {tables[0], tables[1], tables[2], means}, lane, a[lane]);
    for (int b = 0; b < 2; ++b) signs(lane, b, sign[b][lane]);
  }
  for (int b = 0; b < 2; ++b) {
    float y[32][8][4];
    for (int j = 0; j < 8; ++j) {
      uint32_t left[32][4];
      float d[32][4];
      for (int lane = 0; lane < 32; ++lane) std::memcpy(left[lane], a[lane][j], 16);
      product(left, sign[b], d);
      for (int lane = 0; lane < 32; ++lane) std::memcpy(y[lane][j], d[lane], 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t words[2][4];
      coded(y[lane], 1.0f / (kRoot * step), words);
      for (int head = 0; head < 2; ++head)
        std::memcpy(out[lane / 4 + 8 * head] + 64 * b + lane % 4 * 16, words[head], 16);
    }
  }
}

// place: (token, head, 0 for q or 1 for k) -> where its codes go.
template <typename PlaceOf>
void all_codes(const uint16_t* qkv, const float* q_gain, const float* k_gain, const float* cos,
               const float* sin, const float* mean, const float* steps, float eps, int64_t L, int64_t N,
               PlaceOf place) {
  for (int64_t token = 0; token < L; ++token)
    for (int64_t head = 0; head < N; head += 16) {
      const uint16_t* x = qkv + (token * 3 * N + head) * 128;
      uint8_t* to[2][16];
      for (int which = 0; which < 2; ++which)
        for (int i = 0; i < 16; ++i) to[which][i] = place(token, head + i, which);
      token_codes<false>(x, q_gain, cos + token * 64, sin + token * 64, mean, steps[0], eps, to[0]);
      token_codes<true>(x + N * 128, k_gain, cos + token * 64, sin + token * 64, mean + head * 128, steps[1],
                        eps, to[1]);
    }
}

}  // namespace

// qkv (L, 3 * N * 128) bf16; gains (128,); cos, sin (L, 64); mean (N, 128); steps (2,); q, k (L, N, 128)
// e4m3.
extern "C" void qk_codes(const uint16_t* qkv, const float* q_gain, const float* k_gain, const float* cos,
                         const float* sin, const float* mean, const float* steps, float eps, int64_t L,
                         int64_t N, uint8_t* q, uint8_t* k) {
  all_codes(
      qkv, q_gain, k_gain, cos, sin, mean, steps, eps, L, N,
      [=](int64_t token, int64_t head, int which) { return (which ? k : q) + (token * N + head) * 128; });
}

// The same to where codes travel from: packed (L * 3 * N * 128,).
extern "C" void qk_codes_packed(const uint16_t* qkv, const float* q_gain, const float* k_gain,
                                const float* cos, const float* sin, const float* mean, const float* steps,
                                float eps, int64_t L, int64_t N, int columns, int parts, uint8_t* packed) {
  all_codes(qkv, q_gain, k_gain, cos, sin, mean, steps, eps, L, N,
            [=](int64_t token, int64_t head, int which) {
              const Place place = place_of(static_cast<int>(head), L, static_cast<int>(N), columns, parts);
              return packed + place.first + (3 * token + which) * place.apart;
            });
}

extern "C" void qk_place(int head, int64_t num_rows, int num_heads, int columns, int parts, int64_t* found) {
  const Place place = place_of(head, num_rows, num_heads, columns, parts);
  found[0] = place.first;
  found[1] = place.apart;
}
