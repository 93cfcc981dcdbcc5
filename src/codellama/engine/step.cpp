// One pass of some tokens through the whole model on the CPU.
//
// Decoding reads every weight for each token, so it is as fast as memory where nothing else costs
// time. Here a step is one call: no allocation, no dispatch, and threads that meet at barriers only.
// Numbers are rounded where the modules of PyTorch round them, so both ways give the same results up
// to the order of sums. A token's result does not depend on which others are in the pass: every sum
// runs over its inputs in the same order.
//
// Plain C++ with vectors (vectors.h); where there is a matrix unit, products and attention of many
// tokens go through it (tiles.h).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "threads.h"
#include "tiles.h"

namespace {

constexpr int kOutputs = 4;   // rows of a matrix of floats read at a time: their sums do not wait
constexpr int kPart = kWidth; // outputs that a thread works out before it looks for more
constexpr int kRows = 4;      // tokens that share one reading of them; more go through tiles
constexpr int kGroup = 4;     // query heads of a key head: with fewer, a tile of 16 is too empty
constexpr int kDraft = 16;    // tokens that are attended to as a single one is, bit for bit
constexpr int kShort = 16;    // tokens of a pass in which threads meet as seldom as possible
constexpr int kTokens = 8;    // of a sequence that share one reading of its keys and values

enum Kind : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

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
  void* keys;  // [L, Hkv, n_slots, Dh]
  void* values;
  float* key_scales;  // [L, Hkv, n_slots], for integers
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
  std::vector<float> x, q, k, v, attended, gated, cosines, sines;
  // The inputs of a matrix: normalised, and rounded by `round_row` for tiles, int4 or int8.
  struct Inputs {
    std::vector<float> normed, wanted;
    std::vector<int8_t> tiled, narrow, fine;
    std::vector<float> tile_scales, narrow_scales, sums, fine_scales;
    std::vector<integers::Inputs> of_int4, of_int8;
  };
  Inputs shared;
  struct Run {  // consecutive tokens of one sequence
    int64_t first, n;
    bool is_long;  // part of more than a draft
  };
  std::vector<Run> runs;
  int64_t n_bytes = 0, n_groups = 0;  // of a row
  bool has_tiles = false;
  bool is_short = false;  // each thread makes all inputs for itself, sooner than it meets the others
  bool is_one_run_each = false;

  // Keeps what it has allocated from one step to the next.
  void prepare(const Model& new_model, const Batch& new_batch) {
    model = new_model, batch = new_batch;
    const int64_t n = batch.n_rows, kv = model.n_kv_heads * model.head_width;
    x.resize(n * model.width), q.resize(n * model.width);
    k.resize(n * kv), v.resize(n * kv), attended.resize(n * model.width);
    gated.resize(n * model.ff_width);
    cosines.resize(n * model.head_width / 2), sines.resize(n * model.head_width / 2);
#ifdef CODELLAMA_AMX
    has_tiles = tiles::allow();
#endif
    n_bytes = integers::pairs(std::max(model.width, model.ff_width)) * integers::kPair;
    n_groups = n_bytes / 32 + 16, is_short = n <= kShort;
    if (!is_short) prepare(shared);
    [[maybe_unused]] const int64_t group = model.n_heads / model.n_kv_heads;
    [[maybe_unused]] const bool all_halves = model.kind == kBfloat16 && model.cache_kind != kFloat32;
    int64_t n_shared = kTokens;
#ifdef CODELLAMA_AMX
    if (has_tiles && all_halves) n_shared = std::max<int64_t>(1, tiles::kQueries / group);
#endif
    runs.clear();
    is_one_run_each = true;
    for (int64_t row = 0; row < n; ++row) {
      const bool goes_on = row && batch.sequences[row] == batch.sequences[row - 1];
      if (goes_on && runs.back().n < n_shared) runs.back().is_long |= ++runs.back().n > kDraft;
      else runs.push_back({row, 1, goes_on}), is_one_run_each &= !goes_on;
    }
  }

  void prepare(Inputs& in) {
    const int64_t n = batch.n_rows, widest = std::max(model.width, model.ff_width);
    in.normed.resize(n * model.width), in.wanted.resize(n * model.width);
    if (has_tiles)
      in.tiled.resize((n + 31) / 32 * 32 * integers::padded(2 * widest)), in.tile_scales.resize(n);
    in.narrow.resize(n * n_bytes), in.narrow_scales.resize(n * n_groups), in.sums.resize(n * n_groups);
    in.fine.resize(2 * n * n_bytes), in.fine_scales.resize(n);
    in.of_int4.resize(n), in.of_int8.resize(n);
  }

  // Calls make(row) for all rows: each thread for itself, or all together.
  template <class Make>
  void for_rows(int thread, int64_t n, Make make) const {
    if (!is_short) return team().each(thread, n, make);
    for (int64_t row = 0; row < n; ++row) make(row);
  }

  float rounded(float value) const {
    return model.kind == kBfloat16 ? Stored<kBfloat16>::one(to_bfloat16(value)) : value;
  }

  Floats rounded(Floats values) const {
    if (model.kind != kBfloat16) return values;
    return rounded_to_bfloat16(values);
  }

  // to[i] = change(to[i], values[i]) for n of them, as one vector where n is one.
  template <class Change>
  static void update(float* to, Floats values, int n, Change change) {
    if (n == kWidth) {
      const Floats changed = change(loaded(to), values);
      std::memcpy(to, &changed, sizeof changed);
    } else {
      for (int i = 0; i < n; ++i) to[i] = change(to[i], values[i]);
    }
  }

  static void put(float* to, Floats values, int n) {
    update(to, values, n, [](auto, auto value) { return value; });
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
  static void dot(const Matrix& m, int64_t first, const float* x, float (*sums)[kRows]) {
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
                  float (*sums)[kRows]) {
    with_rows(n_rows, [&](auto n) {
      int o = 0;
      for (; o + kOutputs <= n_outputs; o += kOutputs) dot<kind, kOutputs, n()>(m, first + o, x, sums + o);
      for (; o < n_outputs; ++o) dot<kind, 1, n()>(m, first + o, x, sums + o);
    });
  }

  // Whether a matrix is multiplied by tiles: always in bfloat16, and integers where many tokens pay
  // for inputs that are rounded more.
  bool uses_tiles(const Matrix& m, int64_t n_rows) const {
    return has_tiles && (m.kind == kBfloat16 || (n_rows > kRows && m.kind != kFloat32));
  }

  // Rounds a row of x [n_rows, n_in] for the matrices that it goes through, where they need it.
  void round_row(Inputs& in, int64_t row, const float* x, int64_t n_rows,
                 std::initializer_list<Matrix> through) const {
    [[maybe_unused]] bool is_tiled = false, is_narrow = false, is_fine = false;
    for (const Matrix& m : through) {
      const float* own = x + row * m.n_in;
      if (uses_tiles(m, n_rows)) {
#ifdef CODELLAMA_AMX
        if (std::exchange(is_tiled, true)) continue;
        if (m.kind == kBfloat16) tiles::keep_token(own, m.n_in, row, in.tiled.data());
        else in.tile_scales[row] = tiles::round_token(own, m.n_in, row, in.tiled.data());
#endif
      } else if (m.kind == kInt4 && !std::exchange(is_narrow, true)) {
        in.of_int4[row] =
            integers::round_groups(own, m.n_in, m.group, &in.narrow[row * n_bytes],
                                   &in.narrow_scales[row * n_groups], &in.sums[row * n_groups]);
#ifdef CODELLAMA_VNNI
      } else if (m.kind == kInt8 && !std::exchange(is_fine, true)) {
        in.of_int8[row] =
            integers::round_fine(own, m.n_in, &in.fine[2 * row * n_bytes], &in.fine_scales[row]);
#endif
      }
    }
  }

  // Calls store(row, output, values, n), n values from an output on, for one part of the outputs, of
  // all rows of x [n_rows, n_in].
  template <class Store>
  void multiply(const Matrix& m, const Inputs& in, int64_t part, const float* x, int64_t n_rows,
                Store store) const {
    const int64_t size = part_size(m, n_rows), first = part * size;
    const int n_outputs = static_cast<int>(std::min(size, m.n_out - first));
#ifdef CODELLAMA_AMX
    const auto through = [&](auto form) {
      tiles::multiply<form()>(
          m, first, n_outputs, in.tiled.data(), in.tile_scales.data(), n_rows,
          [&](int64_t output) { return load(m.scales, output, model.kind); },
          [&](int64_t row, int64_t output, __m512 values, int n) {
            store(row, output, rounded((Floats)values), n);
          });
    };
    if (uses_tiles(m, n_rows)) {
      if (m.kind == kInt8) through(std::integral_constant<tiles::Form, tiles::kInt8>());
      else if (m.kind == kInt4) through(std::integral_constant<tiles::Form, tiles::kInt4>());
      else through(std::integral_constant<tiles::Form, tiles::kHalf>());
      return;
    }
#endif
    for (int64_t row = 0; row < n_rows; row += kRows) {
      const int few = static_cast<int>(std::min<int64_t>(kRows, n_rows - row));
      float sums[kPart][kRows];
      if (m.kind == kInt8) dot_int8(m, first, n_outputs, x + row * m.n_in, &in.of_int8[row], few, sums);
      else if (m.kind == kInt4) dot_int4(m, first, n_outputs, &in.of_int4[row], few, sums);
      else if (m.kind == kBfloat16) dot<kBfloat16>(m, first, n_outputs, x + row * m.n_in, few, sums);
      else dot<kFloat32>(m, first, n_outputs, x + row * m.n_in, few, sums);
      Floats found[kRows] = {};
      for (int o = 0; o < n_outputs; ++o) {
        const float scale = m.kind == kInt8 ? load(m.scales, first + o, model.kind) : 1.0f;
        for (int r = 0; r < few; ++r) found[r][o] = rounded(sums[o][r] * scale);
      }
      for (int r = 0; r < few; ++r) store(row + r, first, found[r], n_outputs);
    }
  }

  static void dot_int8(const Matrix& m, int64_t first, int n_outputs, [[maybe_unused]] const float* x,
                       [[maybe_unused]] const integers::Inputs* fine, int n_rows,
                       float (*sums)[kRows]) {
#ifdef CODELLAMA_VNNI
    with_rows(n_rows, [&](auto n) {
      for (int o = 0; o < n_outputs; ++o) integers::dot_int8<n()>(m, first + o, fine, sums[o]);
    });
#else
    dot<kInt8>(m, first, n_outputs, x, n_rows, sums);
#endif
  }

  static void dot_int4(const Matrix& m, int64_t first, int n_outputs, const integers::Inputs* x,
                       int n_rows, float (*sums)[kRows]) {
    with_rows(n_rows, [&](auto n) {
      for (int o = 0; o < n_outputs; ++o) integers::dot_int4<n()>(m, first + o, x, sums[o]);
    });
  }

  int64_t part_size(const Matrix& m, int64_t n_rows) const {
    return uses_tiles(m, n_rows) ? 32 : kPart;
  }

  int64_t n_parts(const Matrix& m, int64_t n_rows) const {
    const int64_t size = part_size(m, n_rows);
    return (m.n_out + size - 1) / size;
  }

  void normalise(int64_t row, const void* weight, float* to) const {
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
      to[i] = rounded(rounded(in[i] * factor) * load(weight, i, model.kind));
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

  // Up to 16 consecutive positions of one head as floats [16, Dh], zeros behind them.
  template <Kind kind>
  void widen(const void* store, const float* scales, int64_t place, int64_t n, float* to) const {
    using S = Stored<kind>;
    const int64_t width = model.head_width;
    std::fill(to + n * width, to + kWidth * width, 0.0f);
    for (int64_t p = 0; p < n; ++p, ++place, to += width) {
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

#ifdef CODELLAMA_AMX
  // As `attend`, through tiles.
  template <Kind kind>
  void attend_tiles(int64_t layer, const Run& run, int64_t kv_head) {
    using S = Stored<kind>;
    static thread_local std::vector<tiles::Query> queries;
    const int64_t width = model.head_width, group = model.n_heads / model.n_kv_heads;
    const int64_t size = model.block_tokens;
    const int32_t* blocks = batch.table + batch.sequences[run.first] * batch.table_width;
    const auto at_head = [&](int64_t query) {
      return ((run.first + query / group) * model.n_heads + kv_head * group + query % group) * width;
    };
    queries.clear();
    for (int64_t i = 0; i < run.n * group; ++i)
      queries.push_back({q.data() + at_head(i), batch.positions[run.first + i / group] + 1});
    const int64_t first = (layer * model.n_kv_heads + kv_head) * model.n_slots;
    const auto row = [&](const void* store, const float* scales, int64_t place, uint16_t* room) {
      const auto* from = static_cast<const typename S::Type*>(store) + place * width;
      if constexpr (kind != kInt8) return from;
      else {
        for (int64_t dim = 0; dim < width; dim += kWidth) {
          const __mmask16 some = (1u << std::min<int64_t>(width - dim, kWidth)) - 1;
          const __m512i whole = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, from + dim));
          const Floats values = (Floats)_mm512_cvtepi32_ps(whole) * scales[place];
          const __m512i words = (__m512i)((Words)rounded_to_bfloat16(values) >> 16);
          _mm256_storeu_si256((__m256i*)(room + dim), _mm512_cvtepi32_epi16(words));
        }
        return static_cast<const uint16_t*>(room);
      }
    };
    tiles::attend(
        queries, width,
        [&](int64_t at, uint16_t* room) {
          const uint32_t short_at = static_cast<uint32_t>(at), short_size = static_cast<uint32_t>(size);
          const int64_t place = first + blocks[short_at / short_size] * size + short_at % short_size;
          return tiles::Row{row(model.keys, model.key_scales, place, room),
                            row(model.values, model.value_scales, place, room + width + kWidth)};
        },
        [&](int64_t query, int64_t dim, Floats values, int n) {
          put(attended.data() + at_head(query) + dim, rounded_to_bfloat16(values), n);
        });
  }
#endif

  // Attention of the query heads that share one key head, for consecutive tokens of a sequence.
  template <Kind kind>
  void attend(int64_t layer, const Run& run, int64_t kv_head, std::vector<float>& scores) {
    const int64_t width = model.head_width, group = model.n_heads / model.n_kv_heads;
    const int64_t *positions = batch.positions + run.first, size = model.block_tokens;
    const int64_t length = positions[run.n - 1] + 1, n_queries = run.n * group;
    const int64_t room = (length + size + kWidth) / kWidth * kWidth;  // of a query's scores
    const int32_t* blocks = batch.table + batch.sequences[run.first] * batch.table_width;
    const auto head = [&](std::vector<float>& of, int64_t query) {
      const int64_t row = run.first + query / group;
      return of.data() + (row * model.n_heads + kv_head * group + query % group) * width;
    };
#ifdef CODELLAMA_AMX
    if constexpr (kind != kFloat32)
      if (has_tiles && model.kind == kBfloat16 && (group >= kGroup || run.is_long) && n_queries <= tiles::kQueries)
        return attend_tiles<kind>(layer, run, kv_head);
#endif
    const float factor = 1.0f / std::sqrt(static_cast<float>(width));
    scores.resize(n_queries * room + kWidth * width);
    float* wide = scores.data() + n_queries * room;
    // Calls use(at) for up to 16 positions at a time of a block, which are in `wide` by then.
    const auto each = [&](const void* store, const float* scales, auto use) {
      for (int64_t begin = 0; begin < length; begin += size)
        for (int64_t at = begin; at < std::min(begin + size, length); at += kWidth) {
          const int64_t slot = blocks[begin / size] * size + at - begin;
          const int64_t n = std::min<int64_t>({kWidth, begin + size - at, length - at});
          widen<kind>(store, scales, (layer * model.n_kv_heads + kv_head) * model.n_slots + slot, n, wide);
          use(at);
        }
    };
    each(model.keys, model.key_scales, [&](int64_t at) {
      for (int64_t query = 0; query < n_queries; ++query) {
        const float* x = head(q, query);
        Floats parts[kWidth] = {};
        int64_t i = 0;
        for (; i + kWidth <= width; i += kWidth) {
          const Floats own = loaded(x + i);
          for (int p = 0; p < kWidth; ++p) parts[p] += own * loaded(wide + p * width + i);
        }
        Floats sums = totals(parts);
        for (; i < width; ++i)
          for (int p = 0; p < kWidth; ++p) sums[p] += x[i] * wide[p * width + i];
        put(&scores[query * room + at], sums * factor, kWidth);
      }
    });
    for (int64_t query = 0; query < n_queries; ++query) {
      float* weights = scores.data() + query * room;
      const int64_t n_seen = positions[query / group] + 1;
      std::fill(weights + n_seen, weights + room, -INFINITY);
      Floats most = loaded(weights), sums = {};
      for (int64_t at = kWidth; at < n_seen; at += kWidth) {
        const Floats some = loaded(weights + at);
        most = some > most ? some : most;
      }
      const float largest = *std::max_element(&most[0], &most[0] + kWidth);
      for (int64_t at = 0; at < n_seen; at += kWidth) {
        const Floats some = loaded(weights + at);
        const Floats powers = some == -INFINITY ? Floats{} : exp_of(some - largest);
        put(weights + at, powers, kWidth);
        sums += powers;
      }
      const float inverse = 1 / total(sums);
      for (int64_t at = 0; at < n_seen; at += kWidth) put(weights + at, loaded(weights + at) * inverse, kWidth);
      std::replace(weights + n_seen, weights + room, -INFINITY, 0.0f);
      std::fill(head(attended, query), head(attended, query) + width, 0.0f);
    }
    each(model.values, model.value_scales, [&](int64_t at) {
      int64_t i = 0;
      for (; i + kWidth <= width; i += kWidth) {
        Floats values[kWidth];
        for (int p = 0; p < kWidth; ++p) values[p] = loaded(wide + p * width + i);
        for (int64_t query = 0; query < n_queries; ++query) {
          const float* weights = scores.data() + query * room + at;
          float* out = head(attended, query) + i;
          Floats sums[4] = {};  // one would wait for itself
          for (int p = 0; p < kWidth; ++p) sums[p % 4] += values[p] * weights[p];
          put(out, loaded(out) + (sums[0] + sums[1]) + (sums[2] + sums[3]), kWidth);
        }
      }
      for (; i < width; ++i)
        for (int64_t query = 0; query < n_queries; ++query)
          for (int p = 0; p < kWidth; ++p)
            head(attended, query)[i] += wide[p * width + i] * scores[query * room + at + p];
    });
    for (int64_t query = 0; query < n_queries; ++query) {
      float* out = head(attended, query);
      for (int64_t i = 0; i < width; ++i) out[i] = rounded(out[i]);
    }
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

  void run_layer(int thread, int64_t number, Inputs& in, std::vector<float>& scores) {
    const Layer& layer = model.layers[number];
    const int64_t n = batch.n_rows, kv = model.n_kv_heads * model.head_width;
    for_rows(thread, n, [&](int64_t row) {
      normalise(row, layer.input_norm, &in.normed[row * model.width]);
      round_row(in, row, in.normed.data(), n, {layer.q, layer.k, layer.v});
    });
    const int64_t n_q = n_parts(layer.q, n), n_k = n_parts(layer.k, n), n_v = n_parts(layer.v, n);
    team().each(thread, n_q + n_k + n_v, [&](int64_t part) {
      const int which = part < n_q ? 0 : part < n_q + n_k ? 1 : 2;
      const Matrix& m = which == 0 ? layer.q : which == 1 ? layer.k : layer.v;
      float* to = which == 0 ? q.data() : which == 1 ? k.data() : v.data();
      const int64_t own = which == 0 ? part : which == 1 ? part - n_q : part - n_q - n_k;
      multiply(m, in, own, in.normed.data(), n, [&](int64_t row, int64_t output, Floats values, int some) {
        put(to + row * m.n_out + output, values, some);
      });
    });
    const auto place_keys = [&](int64_t row, int64_t head) {
      const int64_t group = model.n_heads / model.n_kv_heads, width = model.head_width;
      for (int64_t g = 0; g < group; ++g)
        rotate(q.data() + (row * model.n_heads + head * group + g) * width, row);
      rotate(k.data() + row * kv + head * width, row);
      const int64_t place = (number * model.n_kv_heads + head) * model.n_slots + batch.slots[row];
      keep(model.keys, model.key_scales, place, k.data() + row * kv + head * width);
      keep(model.values, model.value_scales, place, v.data() + row * kv + head * width);
    };
    if (!is_one_run_each)  // else nobody else needs them
      team().each(thread, n * model.n_kv_heads, [&](int64_t item) {
        place_keys(item / model.n_kv_heads, item % model.n_kv_heads);
      });
    team().each_in_turn(static_cast<int64_t>(runs.size()) * model.n_kv_heads, [&](int64_t item) {
      const Run& run = runs[item / model.n_kv_heads];
      const int64_t head = item % model.n_kv_heads;
      for (int64_t i = 0; is_one_run_each && i < run.n; ++i) place_keys(run.first + i, head);
      if (model.cache_kind == kFloat32) attend<kFloat32>(number, run, head, scores);
      else if (model.cache_kind == kBfloat16) attend<kBfloat16>(number, run, head, scores);
      else attend<kInt8>(number, run, head, scores);
    });
    const auto add = [&](int64_t row, int64_t output, Floats values, int some) {
      update(&x[row * model.width + output], values, some,
             [&](auto to, auto value) { return rounded(to + value); });
    };
    for_rows(thread, n, [&](int64_t row) { round_row(in, row, attended.data(), n, {layer.o}); });
    team().each(thread, n_parts(layer.o, n), [&](int64_t part) {
      multiply(layer.o, in, part, attended.data(), n, add);
    });
    for_rows(thread, n, [&](int64_t row) {
      normalise(row, layer.output_norm, &in.normed[row * model.width]);
      round_row(in, row, in.normed.data(), n, {layer.gate, layer.up});
    });
    team().each(thread, n_parts(layer.gate, n), [&](int64_t part) {
      const int64_t size = part_size(layer.gate, n), first = part * size;
      scores.assign(n * size + kWidth, 0.0f);
      const auto gate = [&](int64_t row, int64_t output, Floats values, int some) {
        put(&scores[row * size + output - first], values, some);
      };
      const auto up = [&](int64_t row, int64_t output, Floats values, int some) {
        float* gate = &scores[row * size + output - first];
        update(gate, values, some, [&](auto x, auto value) { return rounded(rounded(x) * value); });
        std::copy(gate, gate + some, &gated[row * model.ff_width + output]);
      };
      multiply(layer.gate, in, part, in.normed.data(), n, gate);
      for (int64_t at = 0; at < n * size; at += kWidth) {
        Floats values = loaded(&scores[at]);
        values = values / (1.0f + exp_of(-values));
        std::memcpy(&scores[at], &values, sizeof values);
      }
      multiply(layer.up, in, part, in.normed.data(), n, up);
    });
    for_rows(thread, n, [&](int64_t row) { round_row(in, row, gated.data(), n, {layer.down}); });
    team().each(thread, n_parts(layer.down, n), [&](int64_t part) {
      multiply(layer.down, in, part, gated.data(), n, add);
    });
  }

  void run(int n_threads) {
    team().run(n_threads, [&](int thread) {
      static thread_local std::vector<float> scores;
      static thread_local Inputs own;
      if (is_short) prepare(own);
      Inputs& in = is_short ? own : shared;
#ifdef CODELLAMA_AMX
      if (has_tiles) tiles::configure();
#endif
      team().each(thread, batch.n_rows, [&](int64_t row) { begin(row); });
      for (int64_t layer = 0; layer < model.n_layers; ++layer) run_layer(thread, layer, in, scores);
      for_rows(thread, batch.n_wanted, [&](int64_t i) {
        normalise(batch.wanted[i], model.norm, &in.wanted[i * model.width]);
        round_row(in, i, in.wanted.data(), batch.n_wanted, {model.head});
      });
      team().each(thread, n_parts(model.head, batch.n_wanted), [&](int64_t part) {
        multiply(model.head, in, part, in.wanted.data(), batch.n_wanted,
                 [&](int64_t row, int64_t output, Floats values, int some) {
                   put(batch.logits + row * model.head.n_out + output, values, some);
                 });
      });
#ifdef CODELLAMA_AMX
      if (has_tiles) tiles::release();
#endif
    });
  }
};

}  // namespace

// Whether there are tiles.
extern "C" bool codellama_has_tiles() {
#ifdef CODELLAMA_AMX
  return tiles::allow();
#else
  return false;
#endif
}

extern "C" void codellama_step(const Model* model, const Batch* batch, int n_threads) {
  static thread_local Step step;
  step.prepare(*model, *batch);
  step.run(n_threads);
}

// What a token is drawn by, a row each. Source of the nucleus: see `sample` in runner.py.
struct Draw {
  float temperature, top_p, min_p, number;
  int64_t top_k;
};

// Draws a token of each row of logits [n_rows, n_tokens], as `sample` in runner.py does it.
extern "C" void codellama_sample(const float* logits, const Draw* draws, int64_t n_rows, int64_t n_tokens,
                                 int64_t* tokens, int n_threads) {
  const auto draw_one = [&](int64_t row) {
    static thread_local std::vector<float> powers;
    static thread_local std::vector<uint64_t> likely;  // the bits of a power, and a low token first
    const float* own = logits + row * n_tokens;
    const Draw& draw = draws[row];
    const int64_t n_whole = (n_tokens + kWidth - 1) / kWidth * kWidth;
    powers.resize(n_whole);
    std::copy(own, own + n_tokens, powers.data());
    std::fill(powers.data() + n_tokens, powers.data() + n_whole, -INFINITY);
    const float most = *std::max_element(own, own + n_tokens);
    Floats sums = {};
    for (int64_t i = 0; i < n_whole; i += kWidth) {
      const Floats x = (loaded(&powers[i]) - most) / draw.temperature;
      const Floats found = x < -87.0f ? Floats{} : exp_of(x);
      keep(found, &powers[i]);
      sums += found;
    }
    const double sum = total(sums);
    if (!(sum > 0)) {  // what is no number shows itself by being chosen
      const auto is_wrong = [](float x) { return !(x < INFINITY); };
      const int64_t at = std::find_if(own, own + n_tokens, is_wrong) - own;
      tokens[row] = at < n_tokens ? at : 0;
      return;
    }
    const bool is_free = draw.top_p >= 1 && draw.top_k >= n_tokens && draw.min_p <= 0;
    const double needed = (is_free ? draw.number : draw.top_p) * sum;
    // Only those that can matter are sorted: nearly always a few.
    for (float least = 1.0f / 64;; least = least > 1e-30f ? least / 16 : 0) {
      likely.clear();
      double mass = 0;
      for (int64_t i = 0; i < n_tokens; ++i)
        if (powers[i] >= least) {
          uint32_t bits;
          std::memcpy(&bits, &powers[i], 4);
          likely.push_back(uint64_t{bits} << 32 | (0xffffffff - static_cast<uint32_t>(i)));
          mass += powers[i];
        }
      const bool is_enough = static_cast<int64_t>(likely.size()) >= draw.top_k || least <= draw.min_p;
      if (mass > needed || is_enough || least == 0) break;
    }
    std::sort(likely.begin(), likely.end(), std::greater<>());
    const auto power = [&](size_t at) {
      const uint32_t bits = static_cast<uint32_t>(likely[at] >> 32);
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    };
    double kept = 0;  // the first stays in any case
    size_t n_kept = 0;
    for (; n_kept < likely.size(); ++n_kept) {
      if (n_kept && (kept > draw.top_p * sum || static_cast<int64_t>(n_kept) >= draw.top_k ||
                     power(n_kept) < draw.min_p * power(0)))
        break;
      kept += power(n_kept);
    }
    const double target = draw.number * (is_free ? sum : kept);
    size_t at = 0;
    for (double so_far = 0; at < n_kept; ++at)
      if ((so_far += power(at)) > target) break;
    at = std::min(at, n_kept ? n_kept - 1 : 0);
    tokens[row] = likely.empty() ? 0 : 0xffffffff - static_cast<uint32_t>(likely[at]);
  };
  team().run(n_threads, [&](int) { team().each_in_turn(n_rows, draw_one); });
}

// The product of many rows of x [n_rows, n_in] with a matrix of integers, both in the model's type,
// to out [n_rows, n_out]. False where there are no tiles.
extern "C" bool codellama_multiply([[maybe_unused]] const Matrix* m, [[maybe_unused]] int64_t kind,
                                   [[maybe_unused]] const void* x, [[maybe_unused]] int64_t n_rows,
                                   [[maybe_unused]] void* out, [[maybe_unused]] int n_threads) {
#ifdef CODELLAMA_AMX
  if (!tiles::allow()) return false;
  std::vector<int8_t> tiled((n_rows + 31) / 32 * 32 * integers::padded(m->n_in));
  std::vector<float> scales(n_rows);
  team().run(n_threads, [&](int thread) {
    static thread_local std::vector<float> row;
    row.resize(m->n_in);
    team().each(thread, n_rows, [&](int64_t t) {
      for (int64_t i = 0; i < m->n_in; ++i) row[i] = load(x, t * m->n_in + i, kind);
      scales[t] = tiles::round_token(row.data(), m->n_in, t, tiled.data());
    });
    const auto through = [&](auto form, int64_t first) {
      tiles::multiply<form()>(
          *m, first, std::min<int64_t>(tiles::kBlock, m->n_out - first), tiled.data(), scales.data(),
          n_rows, [&](int64_t output) { return load(m->scales, output, kind); },
          [&](int64_t token, int64_t output, __m512 values, int n) {
            const int64_t at = token * m->n_out + output;
            const __mmask16 some = (1u << n) - 1;
            if (kind == kFloat32) return _mm512_mask_storeu_ps(static_cast<float*>(out) + at, some, values);
            const Words bits = (Words)values;  // to nearest, ties to even; no product is infinite
            const __m512i halves = (__m512i)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
            _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(out) + at, some, halves);
          });
    };
    tiles::configure();
    team().each_in_turn((m->n_out + tiles::kBlock - 1) / tiles::kBlock, [&](int64_t block) {
      const int64_t first = block * tiles::kBlock;
      if (m->kind == kInt4) through(std::integral_constant<tiles::Form, tiles::kInt4>(), first);
      else through(std::integral_constant<tiles::Form, tiles::kInt8>(), first);
    });
    tiles::release();
  });
  return true;
#else
  return false;
#endif
}
