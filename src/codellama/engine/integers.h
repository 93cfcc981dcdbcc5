// Products of quantised matrices with inputs that are rounded to 8 bits on the fly.
//
// A few tokens go through the byte products of AVX-512 (VNNI), for int4 with inputs scaled in groups
// of 32. Sums are exact integers, so that a token's result depends on its own inputs only.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define CODELLAMA_VNNI 1
#include <immintrin.h>
#endif

extern "C" struct Matrix {  // [n_out, n_in]
  const void* weights;  // int4: [n_out, padded / 2] bytes, in chunks of 64 inputs (quantize.py)
  const void* scales;   // int8: [n_out]; int4: [n_out, 2, padded / group] bfloat16, scale and low
  int64_t n_out, n_in, kind, group;
};

namespace integers {

constexpr int kChunk = 64;   // inputs whose integers lie together
constexpr int kPair = 128;   // inputs of an int4 matrix in one vector of its bytes
constexpr int kAhead = 3584; // bytes of a matrix that are fetched before they are needed, measured

inline int64_t padded(int64_t n_in) { return (n_in + kChunk - 1) / kChunk * kChunk; }

inline int64_t pairs(int64_t n_in) { return (n_in + kPair - 1) / kPair; }

inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// One token's inputs, rounded for matrices that it meets without tiles.
struct Inputs {
  const int8_t* x;      // int4: in the order of its integers; int8: the high bytes, then the low ones
  const float* scales;  // int4: of each 32 inputs, zeros behind; int8: one
  const float* sums;    // int4: of each of the matrix's groups
  int32_t offsets[2];   // int8: 128 times the sums of both bytes
};

inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }  // ties to even, to 2^22

// For an int4 matrix: 8 bits, with a scale for each 32 inputs. Chunks stand in pairs, the halves of
// both that are in the low bits of the matrix before those in the high bits.
inline Inputs round_groups(const float* x, int64_t n_in, int64_t group, int8_t* to, float* scales,
                           float* sums) {
  const int64_t n_padded = padded(n_in), n_scales = (n_padded / 32 + 15) / 16 * 16;
  std::fill(sums, sums + n_padded / group, 0.0f);
  std::fill(scales + n_padded / 32, scales + n_scales, 0.0f);
  std::fill(to + n_padded, to + pairs(n_in) * kPair, 0);
  for (int64_t begin = 0; begin < n_padded; begin += 32) {
    float values[32] = {}, largest = 0, sum = 0;
    std::copy(x + begin, x + std::max(begin, std::min(begin + 32, n_in)), values);
    for (const float value : values) largest = std::max(largest, std::abs(value)), sum += value;
    const float inverse = largest > 0 ? 127 / largest : 0;
    int8_t whole[32];
    for (int i = 0; i < 32; ++i) whole[i] = static_cast<int8_t>(nearest(values[i] * inverse));
    const int64_t chunk = begin / kChunk;
    int8_t* own = to + chunk / 2 * kPair + chunk % 2 * 32 + begin % kChunk / 32 * 4;
    for (int i = 0; i < 8; ++i) std::memcpy(own + i / 4 * kChunk + i % 4 * 8, whole + 4 * i, 4);
    scales[begin / 32] = largest / 127;
    sums[begin / group] += sum;
  }
  return {to, scales, sums, {}};
}

#ifdef CODELLAMA_VNNI
inline __m512i count() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline __m512i nibbles(const uint8_t* packed) {  // the low ones of 32 bytes, then the high ones
  const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)packed));
  const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
  return _mm512_and_si512(_mm512_srlv_epi16(both, shifts), _mm512_set1_epi8(15));
}

inline __m512 widened_some(const uint16_t* halves, int64_t n) {  // up to 16, then zeros
  const __mmask16 some = n < 16 ? (1u << n) - 1 : 0xffff;
  const __m256i found = _mm256_maskz_loadu_epi16(some, halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(found), 16));
}

inline __m512 loaded_some(const float* x, int64_t n) {
  return _mm512_maskz_loadu_ps(n < 16 ? (1u << std::max<int64_t>(n, 0)) - 1 : 0xffff, x);
}

// The largest magnitude of a token's inputs; not a number where one of them is none.
inline float largest_of(const float* x, int64_t n_in) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 wrong = 0;
  for (int64_t i = 0; i < n_in; i += 16) {
    const __m512 values = loaded_some(x + i, n_in - i);
    most = _mm512_max_ps(most, _mm512_abs_ps(values));
    wrong |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  }
  return wrong ? std::nanf("") : _mm512_reduce_max_ps(most);
}

// For an int8 matrix: 16 bits with one scale, as a high and a low byte. That is as good as exact,
// and two products of bytes cost a third of making floats of the matrix.
inline Inputs round_fine(const float* x, int64_t n_in, int8_t* to, float* scale) {
  const int64_t n_padded = padded(n_in);
  const float largest = largest_of(x, n_in), most = 127 * 256;
  const __m512 inverse = _mm512_set1_ps(largest > 0 ? most / largest : 0);
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t i = 0; i < n_padded; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(loaded_some(x + i, n_in - i), inverse));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));  // -128 .. 127
    _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i*)(to + n_padded + i), _mm512_cvtepi32_epi8(low));
    sums[0] = _mm512_add_epi32(sums[0], high), sums[1] = _mm512_add_epi32(sums[1], low);
  }
  *scale = largest / most;
  return {to, scale, nullptr,
          {_mm512_reduce_add_epi32(sums[0]) * 128, _mm512_reduce_add_epi32(sums[1]) * 128}};
}

// One output of an int8 matrix for one to four tokens. The processor multiplies bytes without a sign
// by such with one, so 128 is added to the matrix, and `offsets` taken from the sums.
template <int n_rows>
void dot_int8(const Matrix& m, int64_t output, const Inputs* x, float* results) {
  const auto* weights = static_cast<const int8_t*>(m.weights) + output * m.n_in;
  const int64_t n_padded = padded(m.n_in);
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i high[n_rows], low[n_rows];
  for (int r = 0; r < n_rows; ++r) high[r] = low[r] = _mm512_setzero_si512();
  int64_t at = 0;
  for (; at + 2 * kChunk <= m.n_in; at += 2 * kChunk) {
    _mm_prefetch((const char*)(weights + at + kAhead), _MM_HINT_T0);
    _mm_prefetch((const char*)(weights + at + kAhead + kChunk), _MM_HINT_T0);
    const __m512i first = _mm512_xor_si512(flip, _mm512_loadu_si512(weights + at));
    const __m512i second = _mm512_xor_si512(flip, _mm512_loadu_si512(weights + at + kChunk));
    for (int r = 0; r < n_rows; ++r) {
      const int8_t* own = x[r].x + at;
      high[r] = _mm512_dpbusd_epi32(high[r], first, _mm512_loadu_si512(own));
      low[r] = _mm512_dpbusd_epi32(low[r], first, _mm512_loadu_si512(own + n_padded));
      high[r] = _mm512_dpbusd_epi32(high[r], second, _mm512_loadu_si512(own + kChunk));
      low[r] = _mm512_dpbusd_epi32(low[r], second, _mm512_loadu_si512(own + n_padded + kChunk));
    }
  }
  for (; at < m.n_in; at += kChunk) {
    const int64_t n_left = m.n_in - at;
    const __mmask64 some = n_left < kChunk ? (__mmask64{1} << n_left) - 1 : ~__mmask64{0};
    const __m512i bytes = _mm512_xor_si512(flip, _mm512_maskz_loadu_epi8(some, weights + at));
    for (int r = 0; r < n_rows; ++r) {
      const int8_t* own = x[r].x + at;
      high[r] = _mm512_dpbusd_epi32(high[r], bytes, _mm512_loadu_si512(own));
      low[r] = _mm512_dpbusd_epi32(low[r], bytes, _mm512_loadu_si512(own + n_padded));
    }
  }
  for (int r = 0; r < n_rows; ++r) {
    const int32_t whole = _mm512_reduce_add_epi32(high[r]) - x[r].offsets[0];
    const int32_t rest = _mm512_reduce_add_epi32(low[r]) - x[r].offsets[1];
    results[r] = (256.0f * static_cast<float>(whole) + static_cast<float>(rest)) * *x[r].scales;
  }
}
#endif

// One output of an int4 matrix for one to four tokens.
template <int n_rows>
void dot_int4(const Matrix& m, int64_t output, const Inputs* x, float* results) {
  const int64_t n_padded = padded(m.n_in), n_groups = n_padded / m.group;
  const auto* packed = static_cast<const uint8_t*>(m.weights) + output * n_padded / 2;
  const auto* scales = static_cast<const uint16_t*>(m.scales) + output * 2 * n_groups;
  const uint16_t* lows = scales + n_groups;
#ifdef CODELLAMA_VNNI
  constexpr int kSpan = 4 * kPair;  // inputs whose 16 scales make one vector
  const int64_t n_span = kSpan / m.group;
  const __m512i spread = _mm512_srl_epi32(count(), _mm_cvtsi32_si128(m.group / 64));
  // Lanes take turns between the halves of a chunk; the upper eight are of the second chunk.
  const __m512i turns = _mm512_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3);
  const __m512i low_bits = _mm512_set1_epi8(15);
  __m512 parts[n_rows];
  for (int r = 0; r < n_rows; ++r) parts[r] = _mm512_setzero_ps();
  for (int64_t begin = 0, g = 0; begin < n_padded; begin += kSpan, g += n_span) {
    _mm_prefetch((const char*)(scales + g + 2 * n_groups), _MM_HINT_T0);
    const __m512 scale = _mm512_permutexvar_ps(
        spread, widened_some(scales + g, std::min(n_span, n_groups - g)));
    __m512 both[n_rows];
    for (int r = 0; r < n_rows; ++r)
      both[r] = _mm512_mul_ps(scale, _mm512_loadu_ps(x[r].scales + begin / 32));
    for (int i = 0; i < 4; ++i) {
      const int64_t at = begin + i * kPair, n_left = n_padded - at;
      if (n_left <= 0) break;
      const __mmask64 some = n_left < kPair ? (__mmask64{1} << 32) - 1 : ~__mmask64{0};
      _mm_prefetch((const char*)(packed + at / 2 + kAhead), _MM_HINT_T0);
      const __m512i bytes = _mm512_maskz_loadu_epi8(some, packed + at / 2);
      const __m512i first = _mm512_and_si512(bytes, low_bits);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_bits);
      const __m512i lanes = _mm512_add_epi32(turns, _mm512_set1_epi32(4 * i));
      for (int r = 0; r < n_rows; ++r) {
        const int8_t* own = x[r].x + at;
        __m512i products = _mm512_setzero_si512();
        products = _mm512_dpbusd_epi32(products, first, _mm512_loadu_si512(own));
        products = _mm512_dpbusd_epi32(products, second, _mm512_loadu_si512(own + kChunk));
        const __m512 factor = _mm512_permutexvar_ps(lanes, both[r]);
        parts[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), factor, parts[r]);
      }
    }
  }
  for (int64_t g = 0; g < n_groups; g += 16) {
    const __m512 low = widened_some(lows + g, n_groups - g);
    for (int r = 0; r < n_rows; ++r)
      parts[r] = _mm512_fmadd_ps(low, loaded_some(x[r].sums + g, n_groups - g), parts[r]);
  }
  for (int r = 0; r < n_rows; ++r) results[r] = _mm512_reduce_add_ps(parts[r]);
#else
  for (int r = 0; r < n_rows; ++r) {
    results[r] = 0;
    for (int64_t at = 0; at < n_padded; at += kChunk) {
      const int8_t* own = x[r].x + at / kPair * kPair + at % kPair / 2;
      int32_t dots[2] = {};
      for (int i = 0; i < 32; ++i) {
        const int byte = packed[at / 2 + i];
        dots[i / 4 % 2] += (byte & 15) * own[i] + (byte >> 4) * own[kChunk + i];
      }
      for (int64_t i = 0; i < 2; ++i)
        results[r] += dots[i] * x[r].scales[at / 32 + i] * widened(scales[(at + 32 * i) / m.group]);
    }
    for (int64_t g = 0; g < n_groups; ++g) results[r] += widened(lows[g]) * x[r].sums[g];
  }
#endif
}

#ifdef CODELLAMA_VNNI

// One output of an int4 matrix in 8 bits; returns their scale.
inline float widen_int4(const Matrix& m, int64_t output, int8_t* to) {
  static thread_local std::vector<int16_t> fixed;  // factors and offsets, 8 bits behind the point
  const int64_t n_padded = padded(m.n_in), n_groups = n_padded / m.group;
  const auto* packed = static_cast<const uint8_t*>(m.weights) + output * n_padded / 2;
  const auto* scales = static_cast<const uint16_t*>(m.scales) + output * 2 * n_groups;
  const uint16_t* lows = scales + n_groups;
  const int64_t n_room = (n_groups + 15) / 16 * 16;
  fixed.resize(2 * n_room);
  __m512 most = _mm512_set1_ps(1e-30f);
  for (int64_t g = 0; g < n_groups; g += 16) {
    const __m512 low = widened_some(lows + g, n_groups - g);
    const __m512 scale = widened_some(scales + g, n_groups - g);
    const __m512 high = _mm512_fmadd_ps(scale, _mm512_set1_ps(15), low);
    most = _mm512_max_ps(most, _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 inverse = _mm512_set1_ps(127 / largest * 256);
  for (int64_t g = 0; g < n_groups; g += 16) {
    const __m512 low = _mm512_mul_ps(widened_some(lows + g, n_groups - g), inverse);
    const __m512 scale = _mm512_mul_ps(widened_some(scales + g, n_groups - g), inverse);
    const auto round = [](__m512 x) { return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)); };
    _mm256_storeu_si256((__m256i*)&fixed[g], round(scale));
    _mm256_storeu_si256((__m256i*)&fixed[n_room + g], round(_mm512_add_ps(low, _mm512_set1_ps(128))));
  }
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const int shift = m.group == 32 ? 5 : m.group == 64 ? 6 : 7;
  for (int64_t at = 0; at < n_padded; at += kChunk) {
    const __m512i levels = _mm512_permutexvar_epi32(order, nibbles(packed + at / 2));
    for (int i = 0; i < 2; ++i) {
      const __m256i half = i ? _mm512_extracti64x4_epi64(levels, 1) : _mm512_castsi512_si256(levels);
      const int16_t* own = &fixed[(at + 32 * i) >> shift];
      __m512i wide = _mm512_mullo_epi16(_mm512_cvtepu8_epi16(half), _mm512_set1_epi16(own[0]));
      wide = _mm512_srai_epi16(_mm512_add_epi16(wide, _mm512_set1_epi16(own[n_room])), 8);
      _mm256_storeu_si256((__m256i*)(to + at + 32 * i), _mm512_cvtepi16_epi8(wide));
    }
  }
  return largest / 127;
}

#endif

}  // namespace integers
