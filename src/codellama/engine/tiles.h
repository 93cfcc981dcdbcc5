// Products of many tokens through the matrix unit (AMX): of integers with inputs that are rounded to
// 8 bits, one scale a token, or of bfloat16. The matrix is read as it lies, 16 of its rows are one
// tile, and 16 tokens the other. A token's sums run in the same order whatever other tokens there
// are, so that its result depends on its own inputs only.

#pragma once

#include "integers.h"
#include "vectors.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(CODELLAMA_VNNI) && defined(__linux__)
#define CODELLAMA_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace tiles {

using integers::kChunk, integers::padded;

constexpr int kTile = 16;    // rows of a tile, each of kChunk bytes
constexpr int kBlock = 128;  // outputs at a time, at most

inline bool allow() {  // the system has to be asked once
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}

// What is written before must be in memory: the compiler does not know that tiles are read from it.
inline void see(const void* written) { asm volatile("" ::"r"(written) : "memory"); }

inline void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int i = 0; i < 8; ++i) shape.columns[i] = kChunk, shape.rows[i] = kTile;
  see(&shape);
  _tile_loadconfig(&shape);
}

inline void release() { _tile_release(); }

// Four bytes each to a token's column of the tiles of 16 tokens.
template <int n>
void put_column(int8_t* to, const int32_t (&fours)[n]) {
  for (int i = 0; i < n; ++i) std::memcpy(to + i * kChunk, fours + i, 4);
}

// One token's inputs as integers; returns their scale.
inline float round_token(const float* x, int64_t n_in, int64_t token, int8_t* tiles) {
  const int64_t n_padded = padded(n_in);
  const float largest = integers::largest_of(x, n_in);
  const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
  int8_t* to = tiles + token / kTile * kTile * n_padded + token % kTile * 4;
  for (int64_t i = 0; i < n_padded; i += 16) {
    const __m512 values = integers::loaded_some(x + i, n_in - i);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
    alignas(16) int32_t fours[4];
    _mm_store_si128((__m128i*)fours, _mm512_cvtepi32_epi8(whole));
    put_column(to + i * kTile, fours);
  }
  return largest / 127;
}

// One token's inputs, which are bfloat16 already.
inline void keep_token(const float* x, int64_t n_in, int64_t token, int8_t* tiles) {
  const int64_t n_bytes = padded(2 * n_in);
  int8_t* to = tiles + token / kTile * kTile * n_bytes + token % kTile * 4;
  for (int64_t i = 0; i < n_bytes / 2; i += 16) {
    const __m512i words = _mm512_castps_si512(integers::loaded_some(x + i, n_in - i));
    alignas(32) int32_t fours[8];
    _mm256_store_si256((__m256i*)fours, _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
    put_column(to + i * 2 * kTile, fours);
  }
}

// 16 outputs of 16 tokens each become 16 tokens of 16 outputs.
inline void transpose(const int32_t* from, __m512i (&to)[kTile]) {
  __m512i quads[4][4];  // [outputs / 4][token % 4]
  for (int i = 0; i < 4; ++i) {
    __m512i row[4], pairs[4];
    for (int j = 0; j < 4; ++j) row[j] = _mm512_load_si512(from + (4 * i + j) * kTile);
    for (int j = 0; j < 2; ++j) {
      pairs[2 * j] = _mm512_unpacklo_epi32(row[2 * j], row[2 * j + 1]);
      pairs[2 * j + 1] = _mm512_unpackhi_epi32(row[2 * j], row[2 * j + 1]);
    }
    for (int j = 0; j < 2; ++j) {
      quads[i][2 * j] = _mm512_unpacklo_epi64(pairs[j], pairs[j + 2]);
      quads[i][2 * j + 1] = _mm512_unpackhi_epi64(pairs[j], pairs[j + 2]);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even[2] = {_mm512_shuffle_i32x4(quads[0][j], quads[1][j], 0x88),
                             _mm512_shuffle_i32x4(quads[2][j], quads[3][j], 0x88)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(quads[0][j], quads[1][j], 0xdd),
                            _mm512_shuffle_i32x4(quads[2][j], quads[3][j], 0xdd)};
    to[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
    to[j + 4] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    to[j + 8] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
    to[j + 12] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
  }
}

enum Form { kInt8, kInt4, kHalf };

// Adds a tile of 16 rows times one of 16 tokens to the sums in a third.
#define CODELLAMA_ADD(sums, rows, tokens)                      \
  if constexpr (form == kHalf) _tile_dpbf16ps(sums, rows, tokens); \
  else _tile_dpbssd(sums, rows, tokens)

// Some outputs for all tokens. store(token, output, values, n): n outputs of a token.
template <Form form, class Scale, class Store>
void multiply(const Matrix& m, int64_t first, int64_t n_block, const int8_t* tokens,
              const float* token_scales, int64_t n_tokens, Scale scale_of, Store store) {
  static thread_local std::vector<int8_t> copy;
  const int64_t n_bytes = form == kHalf ? 2 * m.n_in : m.n_in, n_padded = padded(n_bytes);
  const int64_t n_whole = (n_block + 31) / 32 * 32;
  const int8_t* weights = static_cast<const int8_t*>(m.weights) + first * n_bytes;
  int64_t stride = n_bytes;
  float scales[kBlock] = {};
  if (form == kInt4 || n_whole != n_block || n_bytes != n_padded) {
    stride = n_padded + kChunk;  // a power of two would put all rows into the same lines of the cache
    copy.resize(kBlock * stride);
    for (int64_t i = 0; i < n_whole; ++i) {
      int8_t* to = copy.data() + i * stride;
      std::memset(to, 0, n_padded);
      if (i >= n_block) continue;
      if (form == kInt4) scales[i] = integers::widen_int4(m, first + i, to);
      else std::memcpy(to, weights + i * n_bytes, n_bytes);
    }
    weights = copy.data();
    see(weights);
  }
  if (form == kInt8)
    for (int64_t i = 0; i < n_block; ++i) scales[i] = scale_of(first + i);
  see(tokens);
  for (int64_t token = 0; token < n_tokens; token += 2 * kTile) {
    const int8_t* inputs = tokens + token * n_padded;
    const bool both = token + kTile < n_tokens;
    const int8_t* more = both ? inputs + kTile * n_padded : inputs;
    for (int64_t own = 0; own < n_whole; own += 2 * kTile) {
      const int8_t* rows = weights + own * stride;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t at = 0; at < n_padded; at += kChunk) {
        _tile_loadd(4, rows + at, stride);
        _tile_loadd(5, rows + kTile * stride + at, stride);
        _tile_loadd(6, inputs + at * kTile, kChunk);
        CODELLAMA_ADD(0, 4, 6);
        CODELLAMA_ADD(1, 5, 6);
        if (!both) continue;
        _tile_loadd(7, more + at * kTile, kChunk);
        CODELLAMA_ADD(2, 4, 7);
        CODELLAMA_ADD(3, 5, 7);
      }
      alignas(64) int32_t sums[4][kTile * kTile];
      _tile_stored(0, sums[0], kChunk);
      _tile_stored(1, sums[1], kChunk);
      _tile_stored(2, sums[2], kChunk);
      _tile_stored(3, sums[3], kChunk);
      for (int part = 0; part < 4; ++part) {
        const int64_t begin = token + part / 2 * kTile, output = own + part % 2 * kTile;
        if (begin >= n_tokens || output >= n_block) continue;
        __m512i columns[kTile];
        transpose(sums[part], columns);
        for (int64_t t = 0; t < std::min<int64_t>(kTile, n_tokens - begin); ++t) {
          __m512 values = _mm512_castsi512_ps(columns[t]);
          if constexpr (form != kHalf) {
            const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales + output),
                                               _mm512_set1_ps(token_scales[begin + t]));
            values = _mm512_mul_ps(_mm512_cvtepi32_ps(columns[t]), scale);
          }
          store(begin + t, first + output, values,
                static_cast<int>(std::min<int64_t>(kTile, n_block - output)));
        }
      }
    }
  }
}

#undef CODELLAMA_ADD

// A query head of one token, and how many positions it sees.
struct Query {
  const float* x;
  int64_t n_seen;
};

// Where a position's key and value are.
struct Row {
  const uint16_t *key, *value;
};

constexpr int kQueries = 256;  // at most, that share one reading of keys and values
constexpr int kSegment = 64;   // positions whose keys and values are packed at a time: they stay in L1

inline __m512 power_of_two(__m512 x) {  // of 0 and less, to 2e-6; not below 2^-100
  x = _mm512_max_ps(_mm512_set1_ps(-100.0f), x);  // what is no number stays none
  const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.33335581e-3f);  // ln(2)^n / n!
  for (const float factor : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, whole);
}

inline __m512i pairs_of(__m512 first, __m512 second) {  // as bfloat16, the first ones below
#ifdef __AVX512BF16__
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512i low = integers::count(), high = _mm512_add_epi32(low, _mm512_set1_epi32(16));
  return _mm512_permutexvar_epi16(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)), both);
#else
  const Words low = (Words)rounded_to_bfloat16((Floats)first) >> 16;
  return (__m512i)(low | (Words)rounded_to_bfloat16((Floats)second));
#endif
}

inline __m512i halves_of(const uint16_t* from, int64_t n) {  // up to 32, then zeros
  return _mm512_maskz_loadu_epi16(n < 32 ? (__mmask32{1} << n) - 1 : ~__mmask32{0}, from);
}

// The scores [n][16] of 16 queries for some positions, those of a query in a column, become weights:
// tiles of 16 queries with 32 positions in a row. `seen` of the positions, of each query, count.
// Returns what the earlier sums are multiplied by.
inline __m512 soften(const float* scores, float scale, int64_t n, const int32_t* seen, bool all_seen,
                     float* most, float* totals, uint16_t* weights) {
  const __m512i limits = _mm512_loadu_si512(seen);
  const auto counts = [&](int64_t at) {
    const __m512i place = _mm512_set1_epi32(static_cast<int32_t>(at));
    return all_seen ? __mmask16(0xffff) : _mm512_cmpgt_epi32_mask(limits, place);
  };
  const __m512 before = _mm512_loadu_ps(most), scales = _mm512_set1_ps(scale * 1.44269504f);
  __m512 peaks = before, sums = _mm512_setzero_ps();
  for (int64_t at = 0; at < n; ++at)
    peaks = _mm512_mask_max_ps(peaks, counts(at), peaks, _mm512_load_ps(scores + at * kTile));
  const __m512 offsets = _mm512_mul_ps(peaks, scales);
  const auto power = [&](int64_t at) {
    const __m512 score = _mm512_load_ps(scores + at * kTile);
    return _mm512_maskz_mov_ps(counts(at), power_of_two(_mm512_fmsub_ps(score, scales, offsets)));
  };
  for (int64_t begin = 0; begin < n; begin += 2 * kTile) {
    alignas(64) int32_t pairs[kTile * kTile];
    for (int i = 0; i < kTile; ++i) {
      const __m512 first = power(begin + 2 * i), second = power(begin + 2 * i + 1);
      sums = _mm512_add_ps(sums, _mm512_add_ps(first, second));
      _mm512_store_si512(pairs + i * kTile, pairs_of(first, second));
    }
    __m512i rows[kTile];
    transpose(pairs, rows);
    for (int i = 0; i < kTile; ++i) _mm512_store_si512(weights + begin * kTile + i * 2 * kTile, rows[i]);
  }
  const __m512 factor = power_of_two(_mm512_mul_ps(_mm512_sub_ps(before, peaks), scales));  // 1 if equal
  _mm512_storeu_ps(most, peaks);
  _mm512_storeu_ps(totals, _mm512_fmadd_ps(_mm512_loadu_ps(totals), factor, sums));
  return factor;
}

// Tiles have to be named by numbers that the compiler's macros see.
#define CODELLAMA_EACH(use)   \
  do {                        \
    use(0);                   \
    if (n_blocks > 1) use(1); \
    if (n_blocks > 2) use(2); \
    if (n_blocks > 3) use(3); \
  } while (false)

// Attention of up to kQueries query heads over the keys and values of one sequence, in bfloat16,
// summed in float. rows_of(at, room) tells where the key and the value of a position are, if need be
// in that room; store(query, dim, results, n) takes n results.
template <class Rows, class Store>
void attend(const std::vector<Query>& queries, int64_t width, Rows rows_of, Store store) {
  struct alignas(64) Scratch {
    float scores[kSegment * kTile], found[4][kTile * kTile];
    uint16_t weights[kSegment * kTile];
    std::vector<int8_t> packed;
    std::vector<uint16_t> keys, values, rooms;
    std::vector<float> sums;
  };
  static thread_local Scratch one;
  Scratch& scratch = one;  // looking for what is of a thread takes a call
  const int n_queries = static_cast<int>(queries.size()), n_tiles = (n_queries + kTile - 1) / kTile;
  const int64_t length = queries.back().n_seen, n_bytes = padded(2 * width), n_wide = n_bytes / 2;
  const int64_t n_dims = (width + kTile - 1) / kTile * kTile, n_room = n_wide + 2 * kTile;
  const float factor = 1.0f / std::sqrt(static_cast<float>(width));
  scratch.packed.assign(n_tiles * kTile * n_bytes, 0), scratch.sums.assign(n_tiles * kTile * n_dims, 0.0f);
  scratch.keys.resize(kSegment * n_wide), scratch.values.resize(kSegment * n_dims);
  scratch.rooms.assign(5 * n_room, 0);
  int8_t* const packed = scratch.packed.data();
  float* const sums = scratch.sums.data();
  uint16_t *const own_keys = scratch.keys.data(), *const own_values = scratch.values.data();
  uint16_t* const rooms = scratch.rooms.data();
  const Row none = {rooms + 4 * n_room, rooms + 4 * n_room};  // behind the end there may be anything
  float most[kQueries], totals[kQueries] = {}, factors[kTile];
  int32_t seen[kQueries];
  std::fill(std::begin(most), std::end(most), -1e30f);
  for (int i = 0; i < n_queries; ++i) keep_token(queries[i].x, width, i, packed);
  for (int64_t begin = 0; begin < length; begin += kSegment) {
    const int64_t n = (std::min<int64_t>(kSegment, length - begin) + 31) / 32 * 32;
    bool all_seen = true;
    for (int i = 0; i < n_tiles * kTile; ++i) {
      const int64_t n_seen = i < n_queries ? queries[i].n_seen - begin : n;
      seen[i] = static_cast<int32_t>(std::clamp<int64_t>(n_seen, 0, n));
      all_seen &= seen[i] == n;
    }
    for (int64_t at = 0; at < n; at += 2) {  // two values side by side
      Row rows[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t place = begin + at + i;
        rows[i] = place < length ? rows_of(place, rooms + 2 * i * n_room) : none;
        for (int64_t dim = 0; dim < n_wide; dim += 32) {  // blocks often follow one another
          _mm_prefetch((const char*)(rows[i].key + dim) + integers::kAhead, _MM_HINT_T0);
          _mm_prefetch((const char*)(rows[i].value + dim) + integers::kAhead, _MM_HINT_T0);
          const __m512i halves = halves_of(rows[i].key + dim, width - dim);
          _mm512_storeu_si512(own_keys + (at + i) * n_wide + dim, halves);
        }
      }
      for (int64_t dim = 0; dim < n_dims; dim += kTile) {
        const __mmask16 some = width - dim < kTile ? (1u << (width - dim)) - 1 : 0xffff;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, rows[0].value + dim));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, rows[1].value + dim));
        _mm512_storeu_si512(own_values + at * n_dims + 2 * dim,
                            _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
    see(own_keys), see(own_values);
    for (int t = 0; t < n_tiles; ++t) {
      for (int64_t at = 0; at < n; at += 2 * kTile) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t dim = 0; dim < n_wide; dim += 32) {
          const uint16_t* from = own_keys + at * n_wide + dim;
          _tile_loadd(4, packed + t * kTile * n_bytes + dim * 2 * kTile, kChunk);
          _tile_loadd(5, from, n_bytes);
          _tile_loadd(6, from + kTile * n_wide, n_bytes);
          _tile_dpbf16ps(0, 5, 4);
          _tile_dpbf16ps(1, 6, 4);
        }
        _tile_stored(0, scratch.scores + at * kTile, kChunk);
        _tile_stored(1, scratch.scores + (at + kTile) * kTile, kChunk);
      }
      see(scratch.scores);
      _mm512_storeu_ps(factors, soften(scratch.scores, factor, n, seen + t * kTile, all_seen,
                                       most + t * kTile, totals + t * kTile, scratch.weights));
      see(scratch.weights);
      for (int64_t dim = 0; dim < n_dims; dim += 4 * kTile) {
        const int n_blocks = static_cast<int>(std::min<int64_t>(4, (n_dims - dim) / kTile));
#define CODELLAMA_STORE(j) _tile_stored(j, scratch.found[j], kChunk)
#define CODELLAMA_USE(j)                             \
  _tile_loadd(5, from + 2 * j * kTile, 4 * n_dims); \
  _tile_dpbf16ps(j, 4, 5)
        CODELLAMA_EACH(_tile_zero);
        for (int64_t at = 0; at < n; at += 2 * kTile) {
          const uint16_t* from = own_values + at * n_dims + 2 * dim;
          _tile_loadd(4, scratch.weights + at * kTile, kChunk);
          CODELLAMA_EACH(CODELLAMA_USE);
        }
        CODELLAMA_EACH(CODELLAMA_STORE);
        see(scratch.found);
        for (int i = 0; i < std::min(kTile, n_queries - t * kTile); ++i)
          for (int j = 0; j < n_blocks; ++j) {
            float* to = &sums[(t * kTile + i) * n_dims + dim + j * kTile];
            keep(loaded(to) * factors[i] + loaded(scratch.found[j] + i * kTile), to);
          }
#undef CODELLAMA_USE
#undef CODELLAMA_STORE
      }
    }
  }
  for (int i = 0; i < n_queries; ++i)
    for (int64_t dim = 0; dim < width; dim += kTile)
      store(i, dim, loaded(&sums[i * n_dims + dim]) / totals[i],
            static_cast<int>(std::min<int64_t>(kTile, width - dim)));
}

#undef CODELLAMA_EACH

}  // namespace tiles

#endif
