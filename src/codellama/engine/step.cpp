// One pass of a few tokens through the whole model on the CPU, for decoding.
//
// Decoding reads every weight for each token, so it is as fast as memory where nothing else costs
// time. Here a step is one call: no allocation, no dispatch, and threads that meet at barriers only.
// Numbers are rounded where the modules of PyTorch round them, so both ways give the same results up
// to the order of sums. A token's result does not depend on how many others are in the pass: every
// sum runs over its inputs in the same order.
//
// Plain C++ with the vector types of GCC and Clang, which become AVX-512, AVX2 or NEON.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "integers.h"

namespace {

constexpr int kWidth = 16;    // values of one vector
constexpr int kOutputs = 4;   // rows of a matrix read at a time: enough streams for the prefetcher
constexpr int kRows = 4;      // tokens that share one reading of them; more go through tiles

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef int16_t Shorts __attribute__((vector_size(2 * kWidth)));
typedef int8_t Bytes __attribute__((vector_size(kWidth)));

enum Kind : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // not a number
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Floats loaded(const float* x) {
  Floats values;
  std::memcpy(&values, x, sizeof values);
  return values;
}

template <Kind kind>
struct Stored;

template <>
struct Stored<kFloat32> {
  using Type = float;
  static float one(float x) { return x; }
  static Floats many(const float* x) { return loaded(x); }
};

template <>
struct Stored<kBfloat16> {
  using Type = uint16_t;
  static float one(uint16_t x) { return integers::widened(x); }
  static Floats many(const uint16_t* x) {
#ifdef __AVX512F__  // GCC 12 makes two halves of the vector
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
    return (Floats)_mm512_slli_epi32(words, 16);
#else
    Halves halves;
    std::memcpy(&halves, x, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    return (Floats)words;  // the same bits
#endif
  }
};

template <>
struct Stored<kInt8> {
  using Type = int8_t;
  static float one(int8_t x) { return x; }
  static Floats many(const int8_t* x) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
#else
    Bytes bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    // In two steps: of one, GCC 12 makes 72 instructions, value by value.
    const Shorts shorts = __builtin_convertvector(bytes, Shorts);
    return __builtin_convertvector(__builtin_convertvector(shorts, Ints), Floats);
#endif
  }
};

inline float total(Floats x) {  // in pairs: one after the other they would wait for each other
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float values[kWidth];
  std::memcpy(values, &x, sizeof x);
  for (int n = kWidth / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) values[i] += values[i + n];
  return values[0];
#endif
}

// To about the last bit between -87 and 88, where it stops. Source: the polynomial of Cephes' expf.
inline Floats exp_of(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  x = x > 88.0f ? Floats{} + 88.0f : x;
  const Floats powers = x * 1.44269504f;
  const Ints whole = __builtin_convertvector(powers < 0 ? powers - 0.5f : powers + 0.5f, Ints);
  const Floats n = __builtin_convertvector(whole, Floats);
  const Floats f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = f * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.0f;
  return y * (Floats)((whole + 127) << 23);  // a power of two, from its bits
}

float load(const void* data, int64_t at, int64_t kind) {
  if (kind == kFloat32) return static_cast<const float*>(data)[at];
  return Stored<kBfloat16>::one(static_cast<const uint16_t*>(data)[at]);
}

}  // namespace

extern "C" {

struct Layer {
  const void* input_norm;
  const void* output_norm;
  Matrix q, k, v, o, gate, up, down;
};

struct Model {
  int64_t n_layers, width, n_heads, n_kv_heads, head_width, ff_width, kind, cache_kind, n_slots;
  int64_t block_tokens;
  float eps;
  const float* frequencies;  // [Dh / 2]
  const void* embedding;
  const void* norm;
  Matrix head;
  const Layer* layers;
  void* keys;  // [L, n_slots, Hkv, Dh]
  void* values;
  float* key_scales;  // [L, n_slots, Hkv], for integers
  float* value_scales;
};

struct Batch {
  int64_t n_rows, n_wanted, table_width;
  const int64_t* tokens;     // [N]
  const int64_t* positions;  // [N]
  const int64_t* slots;      // [N] where keys and values go
  const int64_t* sequences;  // [N] row of the table
  const int32_t* table;      // [sequences, table_width] blocks
  const int64_t* wanted;     // rows whose logits are needed
  float* logits;             // [n_wanted, V]
};

}  // extern "C"

namespace {

struct Step {
  Model model;
  Batch batch;
  std::vector<float> x, normed, q, k, v, attended, gated, cosines, sines;
  // What `round_row` makes of the inputs of a matrix: for tiles, int4 or int8.
  std::vector<int8_t> tiles, narrow, fine;
  std::vector<float> tile_scales, narrow_scales, sums, fine_scales;
  std::vector<integers::Inputs> of_int4, of_int8;
  int64_t n_bytes = 0, n_groups = 0;  // of a row
  bool has_tiles = false;

  // Keeps what it has allocated from one step to the next.
  void prepare(const Model& new_model, const Batch& new_batch) {
    model = new_model, batch = new_batch;
    const int64_t n = batch.n_rows, kv = model.n_kv_heads * model.head_width;
    x.resize(n * model.width), normed.resize(n * model.width), q.resize(n * model.width);
    k.resize(n * kv), v.resize(n * kv), attended.resize(n * model.width);
    gated.resize(n * model.ff_width);
    cosines.resize(n * model.head_width / 2), sines.resize(n * model.head_width / 2);
#ifdef CODELLAMA_AMX
    has_tiles = integers::allow_tiles();
#endif
    const int64_t widest = std::max(model.width, model.ff_width);
    if (has_tiles && n > kRows) {
      tiles.resize((n + 31) / 32 * 32 * integers::padded(widest)), tile_scales.resize(n);
    }
    n_bytes = integers::pairs(widest) * integers::kPair, n_groups = n_bytes / 32 + 16;
    narrow.resize(n * n_bytes), narrow_scales.resize(n * n_groups), sums.resize(n * n_groups);
    fine.resize(2 * n * n_bytes), fine_scales.resize(n);
    of_int4.resize(n), of_int8.resize(n);
  }

  float rounded(float value) const {
    return model.kind == kBfloat16 ? Stored<kBfloat16>::one(to_bfloat16(value)) : value;
  }

  // With a number of rows that the compiler knows.
  template <class Dot>
  static void with_rows(int n_rows, Dot dot) {
    if (n_rows == 1) dot(std::integral_constant<int, 1>());
    else if (n_rows == 2) dot(std::integral_constant<int, 2>());
    else if (n_rows == 3) dot(std::integral_constant<int, 3>());
    else dot(std::integral_constant<int, 4>());
  }

  // sums[output][row] = weights[first + output] . x[row]
  template <Kind kind, int n_outputs, int n_rows>
  static void dot(const Matrix& m, int64_t first, const float* x, float (&sums)[kOutputs][kRows]) {
    using S = Stored<kind>;
    const auto* weights = static_cast<const typename S::Type*>(m.weights) + first * m.n_in;
    Floats parts[n_outputs][n_rows] = {};
    int64_t at = 0;
    for (; at + kWidth <= m.n_in; at += kWidth) {
      Floats inputs[n_rows];
      for (int r = 0; r < n_rows; ++r) inputs[r] = Stored<kFloat32>::many(x + r * m.n_in + at);
      for (int o = 0; o < n_outputs; ++o) {
        const auto* from = weights + o * m.n_in + at;
        __builtin_prefetch(from + n_outputs * m.n_in);  // pages end where rows do
        const Floats w = S::many(from);
        for (int r = 0; r < n_rows; ++r) parts[o][r] += w * inputs[r];
      }
    }
    for (int o = 0; o < n_outputs; ++o)
      for (int r = 0; r < n_rows; ++r) {
        float sum = total(parts[o][r]);
        for (int64_t i = at; i < m.n_in; ++i) sum += S::one(weights[o * m.n_in + i]) * x[r * m.n_in + i];
        sums[o][r] = sum;
      }
  }

  template <Kind kind>
  static void dot(const Matrix& m, int64_t first, int n_outputs, const float* x, int n_rows,
                  float (&sums)[kOutputs][kRows]) {
    with_rows(n_rows, [&](auto n) {
      if (n_outputs == kOutputs) return dot<kind, kOutputs, n()>(m, first, x, sums);
      for (int o = 0; o < n_outputs; ++o) {
        float one[kOutputs][kRows];
        dot<kind, 1, n()>(m, first + o, x, one);
        std::copy(one[0], one[0] + n_rows, sums[o]);
      }
    });
  }

  // Whether a matrix is multiplied by tiles, of integers that the inputs are rounded to.
  bool uses_tiles(const Matrix& m, int64_t n_rows) const {
    return has_tiles && n_rows > kRows && (m.kind == kInt8 || m.kind == kInt4);
  }

  // Rounds a row of x [n_rows, n_in] for the matrices that it goes through, where they need it.
  void round_row(int64_t row, const float* x, int64_t n_rows, std::initializer_list<Matrix> through) {
    bool is_tiled = false, is_narrow = false, is_fine = false;
    for (const Matrix& m : through) {
      const float* own = x + row * m.n_in;
      if (uses_tiles(m, n_rows)) {
#ifdef CODELLAMA_AMX
        if (!std::exchange(is_tiled, true))
          tile_scales[row] = integers::round_token(own, m.n_in, row, tiles.data());
#endif
      } else if (m.kind == kInt4 && !std::exchange(is_narrow, true)) {
        of_int4[row] = integers::round_groups(own, m.n_in, m.group, &narrow[row * n_bytes],
                                              &narrow_scales[row * n_groups], &sums[row * n_groups]);
#ifdef CODELLAMA_VNNI
      } else if (m.kind == kInt8 && !std::exchange(is_fine, true)) {
        of_int8[row] = integers::round_fine(own, m.n_in, &fine[2 * row * n_bytes], &fine_scales[row]);
#endif
      }
    }
  }

  // Calls store(row, output, value) for one part of the outputs, of all rows of x [n_rows, n_in].
  template <class Store>
  void multiply(const Matrix& m, int64_t part, const float* x, int64_t n_rows, Store store) const {
    const int64_t size = part_size(m, n_rows), first = part * size;
    const int n_outputs = static_cast<int>(std::min(size, m.n_out - first));
#ifdef CODELLAMA_AMX
    if (uses_tiles(m, n_rows))
      return integers::multiply_tiles(
          m, m.kind == kInt4, first, n_outputs, tiles.data(), tile_scales.data(), n_rows,
          [&](int64_t output) { return load(m.scales, output, model.kind); },
          [&](int64_t row, int64_t output, __m512 values, int n) {
            const Floats found = (Floats)values;
            for (int i = 0; i < n; ++i) store(row, output + i, rounded(found[i]));
          });
#endif
    for (int64_t row = 0; row < n_rows; row += kRows) {
      const int few = static_cast<int>(std::min<int64_t>(kRows, n_rows - row));
      float sums[kOutputs][kRows];
      if (m.kind == kInt8) dot_int8(m, first, n_outputs, x + row * m.n_in, row, few, sums);
      else if (m.kind == kInt4) dot_int4(m, first, n_outputs, &of_int4[row], few, sums);
      else if (m.kind == kBfloat16) dot<kBfloat16>(m, first, n_outputs, x + row * m.n_in, few, sums);
      else dot<kFloat32>(m, first, n_outputs, x + row * m.n_in, few, sums);
      for (int o = 0; o < n_outputs; ++o) {
        const float scale = m.kind == kInt8 ? load(m.scales, first + o, model.kind) : 1.0f;
        for (int r = 0; r < few; ++r) store(row + r, first + o, rounded(sums[o][r] * scale));
      }
    }
  }

  void dot_int8(const Matrix& m, int64_t first, int n_outputs, const float* x, int64_t row, int n_rows,
                float (&sums)[kOutputs][kRows]) const {
#ifdef CODELLAMA_VNNI
    with_rows(n_rows, [&](auto n) {
      int o = 0;  // two outputs at a time: more streams were slower at one row
      for (; o + 2 <= n_outputs; o += 2)
        integers::dot_int8<2, n()>(m, first + o, &of_int8[row], sums + o);
      if (o < n_outputs) integers::dot_int8<1, n()>(m, first + o, &of_int8[row], sums + o);
    });
#else
    dot<kInt8>(m, first, n_outputs, x, n_rows, sums);
#endif
  }

  static void dot_int4(const Matrix& m, int64_t first, int n_outputs, const integers::Inputs* x,
                       int n_rows, float (&sums)[kOutputs][kRows]) {
    with_rows(n_rows, [&](auto n) {
      for (int o = 0; o < n_outputs; ++o) integers::dot_int4<n()>(m, first + o, x, sums[o]);
    });
  }

  int64_t part_size(const Matrix& m, int64_t n_rows) const {
    return uses_tiles(m, n_rows) ? 32 : kOutputs;
  }

  int64_t n_parts(const Matrix& m, int64_t n_rows) const {
    const int64_t size = part_size(m, n_rows);
    return (m.n_out + size - 1) / size;
  }

  void normalise(int64_t row, const void* weight) {
    const float* in = x.data() + row * model.width;
    Floats parts = {};
    int64_t at = 0;
    for (; at + kWidth <= model.width; at += kWidth) {
      const Floats values = Stored<kFloat32>::many(in + at);
      parts += values * values;
    }
    float squares = total(parts);
    for (; at < model.width; ++at) squares += in[at] * in[at];
    const float factor = 1.0f / std::sqrt(squares / model.width + model.eps);
    for (int64_t i = 0; i < model.width; ++i)
      normed[row * model.width + i] = rounded(rounded(in[i] * factor) * load(weight, i, model.kind));
  }

  void rotate(float* head, int64_t row) const {
    const int64_t half = model.head_width / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float c = cosines[row * half + i], s = sines[row * half + i];
      const float low = head[i], high = head[half + i];
      head[i] = rounded(rounded(low * c) + rounded(-high * s));
      head[half + i] = rounded(rounded(high * c) + rounded(low * s));
    }
  }

  void keep(void* store, float* scales, int64_t place, const float* values) const {
    const int64_t width = model.head_width;
    if (model.cache_kind == kFloat32) {
      std::copy(values, values + width, static_cast<float*>(store) + place * width);
    } else if (model.cache_kind == kBfloat16) {
      std::transform(values, values + width, static_cast<uint16_t*>(store) + place * width, to_bfloat16);
    } else {
      float largest = 0;
      for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::abs(values[i]));
      const float scale = std::max(largest / 127, 1e-20f);
      scales[place] = scale;
      for (int64_t i = 0; i < width; ++i)
        static_cast<int8_t*>(store)[place * width + i] =
            static_cast<int8_t>(std::nearbyint(values[i] / scale));
    }
  }

  // Some consecutive positions of one head as floats [n, Dh].
  template <Kind kind>
  void widen(const void* store, const float* scales, int64_t place, int64_t n, float* to) const {
    using S = Stored<kind>;
    const int64_t width = model.head_width;
    for (int64_t p = 0; p < n; ++p, place += model.n_kv_heads, to += width) {
      const auto* from = static_cast<const typename S::Type*>(store) + place * width;
      const float scale = kind == kInt8 ? scales[place] : 1.0f;
      int64_t i = 0;
      for (; i + kWidth <= width; i += kWidth) {
        const Floats values = S::many(from + i) * scale;
        std::memcpy(to + i, &values, sizeof values);
      }
      for (; i < width; ++i) to[i] = S::one(from[i]) * scale;
    }
  }

  // Attention of the query heads that share one key head, for one row.
  template <Kind kind>
  void attend(int64_t layer, int64_t row, int64_t kv_head, std::vector<float>& scores) {
    const int64_t width = model.head_width, group = model.n_heads / model.n_kv_heads;
    const int64_t length = batch.positions[row] + 1, size = model.block_tokens;
    const int32_t* blocks = batch.table + batch.sequences[row] * batch.table_width;
    const float* queries = q.data() + (row * model.n_heads + kv_head * group) * width;
    float* out = attended.data() + (row * model.n_heads + kv_head * group) * width;
    const float factor = 1.0f / std::sqrt(static_cast<float>(width));
    scores.resize(group * length + size * width);
    float* wide = scores.data() + group * length;
    const auto place = [&](int64_t at) {  // of the first position of a block
      const int64_t slot = blocks[at / size] * size;
      return (layer * model.n_slots + slot) * model.n_kv_heads + kv_head;
    };
    for (int64_t at = 0; at < length; at += size) {
      const int64_t n = std::min(size, length - at);
      widen<kind>(model.keys, model.key_scales, place(at), n, wide);
      for (int64_t p = 0; p < n; ++p)
        for (int64_t g = 0; g < group; ++g) {
          const float *key = wide + p * width, *query = queries + g * width;
          Floats parts = {};
          int64_t i = 0;
          for (; i + kWidth <= width; i += kWidth) parts += loaded(query + i) * loaded(key + i);
          float sum = total(parts);
          for (; i < width; ++i) sum += query[i] * key[i];
          scores[g * length + at + p] = sum * factor;
        }
    }
    for (int64_t g = 0; g < group; ++g) {
      float* weights = scores.data() + g * length;
      const float largest = *std::max_element(weights, weights + length);
      Floats sums = {};
      for (int64_t at = 0; at < length; at += kWidth) {
        Floats some = {};
        const int64_t n_bytes = 4 * std::min<int64_t>(kWidth, length - at);
        std::memcpy(&some, weights + at, n_bytes);
        const Floats powers = exp_of(some - largest);
        std::memcpy(weights + at, &powers, n_bytes);
        std::memcpy(&(some = Floats{}), &powers, n_bytes);
        sums += some;
      }
      const float inverse = 1 / total(sums);
      for (int64_t at = 0; at < length; ++at) weights[at] *= inverse;
    }
    std::fill(out, out + group * width, 0.0f);
    for (int64_t at = 0; at < length; at += size) {
      const int64_t n = std::min(size, length - at);
      widen<kind>(model.values, model.value_scales, place(at), n, wide);
      for (int64_t g = 0; g < group; ++g) {
        const float* weights = scores.data() + g * length + at;
        int64_t i = 0;
        for (; i + kWidth <= width; i += kWidth) {
          Floats sum = loaded(out + g * width + i);
          for (int64_t p = 0; p < n; ++p) sum += loaded(wide + p * width + i) * weights[p];
          std::memcpy(out + g * width + i, &sum, sizeof sum);
        }
        for (; i < width; ++i)
          for (int64_t p = 0; p < n; ++p) out[g * width + i] += wide[p * width + i] * weights[p];
      }
    }
    for (int64_t i = 0; i < group * width; ++i) out[i] = rounded(out[i]);
  }

  void begin(int64_t row) {
    for (int64_t i = 0; i < model.width; ++i)
      x[row * model.width + i] = load(model.embedding, batch.tokens[row] * model.width + i, model.kind);
    const int64_t half = model.head_width / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(batch.positions[row]) * model.frequencies[i];
      cosines[row * half + i] = rounded(std::cos(angle));
      sines[row * half + i] = rounded(std::sin(angle));
    }
  }

  void run_layer(int64_t number, std::vector<float>& scores) {
    const Layer& layer = model.layers[number];
    const int64_t n = batch.n_rows, kv = model.n_kv_heads * model.head_width;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
      normalise(row, layer.input_norm);
      round_row(row, normed.data(), n, {layer.q, layer.k, layer.v});
    }
    const int64_t n_q = n_parts(layer.q, n), n_k = n_parts(layer.k, n), n_v = n_parts(layer.v, n);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < n_q + n_k + n_v; ++part) {
      const int which = part < n_q ? 0 : part < n_q + n_k ? 1 : 2;
      const Matrix& m = which == 0 ? layer.q : which == 1 ? layer.k : layer.v;
      float* to = which == 0 ? q.data() : which == 1 ? k.data() : v.data();
      const int64_t own = which == 0 ? part : which == 1 ? part - n_q : part - n_q - n_k;
      multiply(m, own, normed.data(), n,
               [&](int64_t row, int64_t output, float value) { to[row * m.n_out + output] = value; });
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * model.n_kv_heads; ++item) {
      const int64_t row = item / model.n_kv_heads, head = item % model.n_kv_heads;
      const int64_t group = model.n_heads / model.n_kv_heads, width = model.head_width;
      for (int64_t g = 0; g < group; ++g)
        rotate(q.data() + (row * model.n_heads + head * group + g) * width, row);
      rotate(k.data() + row * kv + head * width, row);
      const int64_t place = (number * model.n_slots + batch.slots[row]) * model.n_kv_heads + head;
      keep(model.keys, model.key_scales, place, k.data() + row * kv + head * width);
      keep(model.values, model.value_scales, place, v.data() + row * kv + head * width);
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < n * model.n_kv_heads; ++item) {
      const int64_t row = item / model.n_kv_heads, head = item % model.n_kv_heads;
      if (model.cache_kind == kFloat32) attend<kFloat32>(number, row, head, scores);
      else if (model.cache_kind == kBfloat16) attend<kBfloat16>(number, row, head, scores);
      else attend<kInt8>(number, row, head, scores);
    }
    const auto add = [&](int64_t row, int64_t output, float value) {
      float& to = x[row * model.width + output];
      to = rounded(to + value);
    };
    if (layer.o.kind >= kInt8) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < n; ++row) round_row(row, attended.data(), n, {layer.o});
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < n_parts(layer.o, n); ++part)
      multiply(layer.o, part, attended.data(), n, add);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
      normalise(row, layer.output_norm);
      round_row(row, normed.data(), n, {layer.gate, layer.up});
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < n_parts(layer.gate, n); ++part) {
      const int64_t size = part_size(layer.gate, n), first = part * size;
      scores.assign(n * size + kWidth, 0.0f);
      const auto gate = [&](int64_t row, int64_t output, float value) {
        scores[row * size + output - first] = value;
      };
      const auto up = [&](int64_t row, int64_t output, float value) {
        const float gate = rounded(scores[row * size + output - first]);
        gated[row * model.ff_width + output] = rounded(gate * value);
      };
      multiply(layer.gate, part, normed.data(), n, gate);
      for (int64_t at = 0; at < n * size; at += kWidth) {
        Floats values = loaded(&scores[at]);
        values = values / (1.0f + exp_of(-values));
        std::memcpy(&scores[at], &values, sizeof values);
      }
      multiply(layer.up, part, normed.data(), n, up);
    }
    if (layer.down.kind >= kInt8) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < n; ++row) round_row(row, gated.data(), n, {layer.down});
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < n_parts(layer.down, n); ++part)
      multiply(layer.down, part, gated.data(), n, add);
  }

  void run(int n_threads) {
    (void)n_threads;
#pragma omp parallel num_threads(n_threads)
    {
      static thread_local std::vector<float> scores;
#ifdef CODELLAMA_AMX
      if (has_tiles) integers::configure_tiles();
#endif
#pragma omp for schedule(static)
      for (int64_t row = 0; row < batch.n_rows; ++row) begin(row);
      for (int64_t layer = 0; layer < model.n_layers; ++layer) run_layer(layer, scores);
      // The wanted rows move to the front of a buffer that is free by now.
#pragma omp for schedule(static)
      for (int64_t i = 0; i < batch.n_wanted; ++i) {
        normalise(batch.wanted[i], model.norm);
        const float* from = normed.data() + batch.wanted[i] * model.width;
        std::copy(from, from + model.width, q.data() + i * model.width);
        round_row(i, q.data(), batch.n_wanted, {model.head});
      }
#pragma omp for schedule(static)
      for (int64_t part = 0; part < n_parts(model.head, batch.n_wanted); ++part)
        multiply(model.head, part, q.data(), batch.n_wanted,
                 [&](int64_t row, int64_t output, float value) {
                   batch.logits[row * model.head.n_out + output] = value;
                 });
#ifdef CODELLAMA_AMX
      if (has_tiles) integers::release_tiles();
#endif
    }
  }
};

}  // namespace

extern "C" void codellama_step(const Model* model, const Batch* batch, int n_threads) {
  static thread_local Step step;
  step.prepare(*model, *batch);
  step.run(n_threads);
}

// The product of many rows of x [n_rows, n_in] with a matrix of integers, both in the model's type,
// to out [n_rows, n_out]. False where there are no tiles.
extern "C" bool codellama_multiply(const Matrix* m, int64_t kind, const void* x, int64_t n_rows,
                                   void* out, int n_threads) {
  (void)n_threads;
#ifdef CODELLAMA_AMX
  using namespace integers;
  if (!allow_tiles()) return false;
  std::vector<int8_t> tiles((n_rows + 31) / 32 * 32 * padded(m->n_in));
  std::vector<float> scales(n_rows);
#pragma omp parallel num_threads(n_threads)
  {
    static thread_local std::vector<float> row;
    row.resize(m->n_in);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n_rows; ++t) {
      for (int64_t i = 0; i < m->n_in; ++i) row[i] = load(x, t * m->n_in + i, kind);
      scales[t] = round_token(row.data(), m->n_in, t, tiles.data());
    }
    configure_tiles();
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < m->n_out; first += kBlock)
      multiply_tiles(
          *m, m->kind == kInt4, first, std::min<int64_t>(kBlock, m->n_out - first), tiles.data(),
          scales.data(), n_rows, [&](int64_t output) { return load(m->scales, output, kind); },
          [&](int64_t token, int64_t output, __m512 values, int n) {
            const int64_t at = token * m->n_out + output;
            const __mmask16 some = (1u << n) - 1;
            if (kind == kFloat32) return _mm512_mask_storeu_ps(static_cast<float*>(out) + at, some, values);
            const Words bits = (Words)values;  // to nearest, ties to even; no product is infinite
            const __m512i halves = (__m512i)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
            _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(out) + at, some, halves);
          });
    release_tiles();
  }
  return true;
#else
  return false;
#endif
}
