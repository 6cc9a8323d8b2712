// The forward pass for one new token in each row, in C++. A reader may skip this file.
//
// model/compiled_step.py compiles it and calls `one_token`. It computes what `CausalLM` (model/transformer.py)
// computes, in the same order of steps. What Python starts as some hundred operations is one call here. All threads
// go through the layers together, and wait for each other five times in a layer (more often where adapters are in use).
//
// Shapes: B rows, C width, H heads, K key/value heads, D head dim, I intermediate size, V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) || defined(__AVXVNNI__)
#define HAS_VNNI  // the CPU adds up products of 8-bit whole numbers, four at a time
#include <immintrin.h>
#endif

// A register holds WIDTH numbers. With AVX-512 a CPU has 32 registers, else 16. A product keeps its sums in them:
// 4 * ROWS registers for floats, 8 * CODE_ROWS for codes. (With AVX-512 a register could hold 16 numbers. Whether this
// would be faster here was never measured.)
#if defined(__AVX512VL__)
constexpr int WIDTH = 8, ROWS = 5, CODE_ROWS = 3;
#elif defined(__AVX__)
constexpr int WIDTH = 8, ROWS = 3, CODE_ROWS = 1;
#else
constexpr int WIDTH = 4, ROWS = 3;
#endif
constexpr int BLOCK = 4 * WIDTH;  // outputs that are computed at once

// With VNNI four codes of an output lie side by side, and each is stored as code + 128.
#ifdef HAS_VNNI
constexpr int GROUP = 4;
#else
constexpr int GROUP = 1;
#endif

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

struct Linear {           // y = W x + b
    const void* weight;   // by blocks of outputs, padded with zeros: float (out / BLOCK, in, BLOCK), or int8 codes
                          // (out / BLOCK, in / GROUP, BLOCK, GROUP)
    const float* scale;   // of each output, (out,) padded likewise; null for float
    const float* bias;    // the same shape, or null
    int64_t in, out;
};

struct Update {           // what an adapter adds to some outputs of a linear layer: factor * B A x
    const float *a, *b;   // A (rank, in) and B as (rank, out); several of each where rows have several adapters
    const int64_t* places;  // (B,) the number of the A and B that each row takes; null: all rows take the first
    int64_t rank, begin, out;  // begin: the first of the outputs
    float factor;
};

struct Updates { const Update* first; int64_t count; };

struct Layer {
    Linear qkv, o, gate, up, down;
    const float *input_norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be null
    int64_t window;       // how many tokens a token sees; 0: all before it
};

struct Model {
    const Layer* layers;
    int64_t num_layers, width, heads, kv_heads, head_dim, intermediate_size;
    float eps;
    const float* embedding;  // (V, C)
    const float* norm;
    Linear head;
};

struct Cache {
    float *keys, *values;                      // (layers, B, K, S, D)
    int64_t layer_stride, row_stride, head_stride;  // how many numbers lie from one layer, row, head to the next
    const float *cos, *sin;                    // (positions, D), as `rope_tables` makes them
    int64_t length;                            // tokens that are stored: the new one comes to this place
    const int64_t* start;                      // (B,) where each row begins, or null
};

// --- products -------------------------------------------------------------------------------------------------------

static Vector load(const float* from) { Vector v; __builtin_memcpy(&v, from, sizeof v); return v; }
static void read_block(const float* from, Vector (&parts)[4]) {
    for (int part = 0; part < 4; part++) parts[part] = load(from + part * WIDTH);
}
static void read_block(const int8_t* from, Vector (&parts)[4]) {
    float numbers[BLOCK];  // compilers make a few wide instructions of this loop, and keep it in registers
    for (int i = 0; i < BLOCK; i++) numbers[i] = from[i];
    read_block(numbers, parts);
}

// y[place ...] becomes sum * scale + bias, or that is added to it.
static void store(const Linear& w, int64_t place, Vector sum, float* y, bool add) {
    const int64_t count = w.out - place;
    if (w.scale) sum *= load(w.scale + place);
    if (w.bias) sum += load(w.bias + place);
    if (count >= WIDTH) {
        if (add) sum += load(y + place);
        __builtin_memcpy(y + place, &sum, sizeof sum);
    } else {
        for (int64_t i = 0; i < count; i++) y[place + i] = add ? y[place + i] + sum[i] : sum[i];
    }
}

// The outputs of one block for `rows` rows of x (rows, in): y (rows, out), or y += with `add`.
// A row's sums are made in the same order, however many rows go through at once.
template <int N, class Weight>
static void multiply_block(const Linear& w, int64_t block, const float* x, int64_t rows, float* y, bool add) {
    const int64_t begin = block * BLOCK;
    const Weight* const weight = static_cast<const Weight*>(w.weight) + begin * w.in;
    for (; rows >= N; rows -= N, x += N * w.in, y += N * w.out) {
        Vector sums[N][4] = {};
        for (int64_t i = 0; i < w.in; i++) {
            Vector parts[4];
            read_block(weight + i * BLOCK, parts);
            for (int part = 0; part < 4; part++)
                for (int row = 0; row < N; row++) sums[row][part] += parts[part] * x[row * w.in + i];
        }
        for (int row = 0; row < N; row++)
            for (int part = 0; part < 4; part++)
                store(w, begin + part * WIDTH, sums[row][part], y + row * w.out, add);
    }
    if constexpr (N > 1) multiply_block<N - 1, Weight>(w, block, x, rows, y, add);
}

// x (rows, in) as whole numbers, as `multiply_int8` in model/int8.py makes them: a row is about
// step * (first + second / 254).
struct WholeNumbers {
    int64_t groups;              // of GROUP numbers in a row
    std::vector<int8_t> parts;   // (rows, 2, groups * GROUP), the first and the second parts, padded with zeros
    std::vector<int32_t> correction;  // (rows, 2) for the 128 that is in each code: -128 times the sum of a part
    std::vector<float> step;     // (rows,)

    void convert(const float* x, int64_t rows, int64_t in) {
        groups = (in + GROUP - 1) / GROUP;
        parts.assign(2 * rows * groups * GROUP, 0);
        correction.resize(2 * rows);
        step.resize(rows);
        for (int64_t row = 0; row < rows; row++, x += in) {
            int8_t *const first = &parts[2 * row * groups * GROUP], *const second = first + groups * GROUP;
            float largest = 1e-30f, zero = 0;
            #pragma omp simd reduction(max : largest) reduction(+ : zero)
            for (int64_t i = 0; i < in; i++) largest = std::max(largest, std::abs(x[i])), zero += 0 * x[i];
            step[row] = largest / 127 + zero;  // where x holds NaN or infinity, zero is NaN, and so is y
            int32_t sum_first = 0, sum_second = 0;
            #pragma omp simd reduction(+ : sum_first, sum_second)
            for (int64_t i = 0; i < in; i++) {
                const float steps = x[i] / (largest / 127), whole = std::nearbyint(steps);
                first[i] = static_cast<int8_t>(static_cast<int32_t>(whole));
                second[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint((steps - whole) * 254)));
                sum_first += first[i], sum_second += second[i];
            }
            correction[2 * row] = -128 * sum_first, correction[2 * row + 1] = -128 * sum_second;
        }
    }
};

#ifdef HAS_VNNI
// sums[i] + the sum of weights[4 i + n] * x[4 i + n] for n = 0, ..., 3. The bytes of weights are from 0 to 255, those
// of x from -128 to 127.
static Ints add_products(Ints sums, Ints weights, Ints x) {
#ifdef __AVX512VNNI__
    return (Ints)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)weights, (__m256i)x);
#else
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)x);
#endif
}

// `multiply_block` for codes. Whole numbers are added without rounding.
template <int N>
static void multiply_codes(const Linear& w, int64_t block, const WholeNumbers& x, int64_t row, int64_t end, float* y,
                           bool add) {
    const int64_t begin = block * BLOCK, size = x.groups * GROUP;
    const uint8_t* const weight = static_cast<const uint8_t*>(w.weight) + begin * size;
    for (; row + N <= end; row += N) {
        Ints sums[2 * N][4] = {};  // of each part of each row
        const int8_t* const numbers = &x.parts[2 * row * size];
        for (int64_t i = 0; i < size; i += GROUP) {
            Ints codes[4];
            for (int part = 0; part < 4; part++)
                __builtin_memcpy(&codes[part], weight + i * BLOCK + part * sizeof(Ints), sizeof(Ints));
            for (int n = 0; n < 2 * N; n++) {
                int32_t four;  // four numbers of x, which all outputs are multiplied with
                __builtin_memcpy(&four, numbers + n * size + i, sizeof four);
                for (int part = 0; part < 4; part++)
                    sums[n][part] = add_products(sums[n][part], codes[part], Ints{} + four);
            }
        }
        for (int n = 0; n < N; n++)
            for (int part = 0; part < 4; part++) {
                const int32_t* const correction = &x.correction[2 * (row + n)];
                const Vector first = __builtin_convertvector(sums[2 * n][part] + correction[0], Vector);
                const Vector second = __builtin_convertvector(sums[2 * n + 1][part] + correction[1], Vector);
                store(w, begin + part * WIDTH, (first + second / 254) * x.step[row + n], y + (row + n) * w.out, add);
            }
    }
    if constexpr (N > 1) multiply_codes<N - 1>(w, block, x, row, end, y, add);
}
#endif

// What a product reads: x (rows, in), where codes are multiplied also as whole numbers. Each thread has its own.
struct Input {
    const float* x;
    int64_t rows;
    WholeNumbers whole;

    void set(const Linear& w, const float* from, int64_t count) {
        x = from, rows = count;
#ifdef HAS_VNNI
        if (w.scale) whole.convert(x, rows, w.in);
#endif
    }
};

static void multiply(const Linear& w, int64_t block, const Input& input, float* y, bool add = false) {
#ifdef HAS_VNNI
    if (w.scale) multiply_codes<CODE_ROWS>(w, block, input.whole, 0, input.rows, y, add);
#else
    if (w.scale) multiply_block<ROWS, int8_t>(w, block, input.x, input.rows, y, add);
#endif
    else multiply_block<ROWS, float>(w, block, input.x, input.rows, y, add);
}

static int64_t blocks(const Linear& w) { return (w.out + BLOCK - 1) / BLOCK; }

static float dot(const float* a, const float* b, int64_t count) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

// --- adapters -------------------------------------------------------------------------------------------------------

static int64_t ranks(const Updates& updates) {
    int64_t sum = 0;
    for (int64_t n = 0; n < updates.count; n++) sum += updates.first[n].rank;
    return sum;
}

// One row of x (rows, in) -> A x of each update, times its factor: low (rows, ranks).
static void project(const Updates& updates, const float* x, int64_t in, int64_t row, float* low) {
    low += row * ranks(updates);
    for (int64_t n = 0; n < updates.count; n++) {
        const Update& u = updates.first[n];
        const float* a = u.a + (u.places ? u.places[row] : 0) * u.rank * in;
        for (int64_t i = 0; i < u.rank; i++, a += in) *low++ = u.factor * dot(a, x + row * in, in);
    }
}

// The outputs of one block: y (rows, out) += B low.
static void expand(const Updates& updates, const Linear& w, int64_t block, const float* low, int64_t rows, float* y) {
    for (int64_t row = 0; row < rows; row++, y += w.out)
        for (int64_t n = 0; n < updates.count; n++) {
            const Update& u = updates.first[n];
            const int64_t begin = std::max(block * BLOCK, u.begin);
            const int64_t end = std::min((block + 1) * BLOCK, u.begin + u.out);
            const float* b = u.b + (u.places ? u.places[row] : 0) * u.rank * u.out - u.begin;
            for (int64_t rank = 0; rank < u.rank; rank++, b += u.out, low++)
                for (int64_t i = begin; i < end; i++) y[i] += *low * b[i];
        }
}

// --- the parts of a layer -------------------------------------------------------------------------------------------

// RMSNorm of a vector of `count` numbers; y may be x.
static void normalize(const float* x, const float* weight, int64_t count, float eps, float* y) {
    const float factor = 1 / std::sqrt(dot(x, x, count) / count + eps);
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * factor * weight[i];
}

// `rotate` in model/transformer.py: x * cos + (x with its halves swapped) * sin.
static void rotate(float* x, const float* cos, const float* sin, int64_t count) {
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] + second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

// e^x to float32's precision: 2^n e^r with x = n ln 2 + r, and the first terms of the series of e^r. std::exp does
// the same for one number at a time; this is computed for a register full of them.
static inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 87.0f);  // beyond it the result is no ordinary float
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;  // 2^n as a float
    float power;
    __builtin_memcpy(&power, &bits, sizeof power);
    return e * power;
}

// One key/value head of one row, in layer `number`: q, k, v (of qkv) -> attended, for the H / K query heads that
// share the head.
static void attend(const Model& m, const Layer& layer, const Cache& cache, int64_t number, int64_t row, int64_t head,
                   float* qkv, float* attended, std::vector<float>& scores) {
    const int64_t size = m.head_dim, group = m.heads / m.kv_heads;
    const int64_t last = cache.length;
    const int64_t start = cache.start ? std::min(cache.start[row], last) : 0;  // a pad sees itself
    const int64_t position = last - start;
    const float *cos = cache.cos + position * size, *sin = cache.sin + position * size;
    const int64_t place = number * cache.layer_stride + row * cache.row_stride + head * cache.head_stride;
    float *keys = cache.keys + place, *values = cache.values + place;

    float* k = qkv + (m.heads + head) * size;
    if (layer.k_norm) normalize(k, layer.k_norm, size, m.eps, k);
    rotate(k, cos, sin, size);
    std::copy_n(k, size, keys + last * size);
    std::copy_n(qkv + (m.heads + m.kv_heads + head) * size, size, values + last * size);

    const int64_t first = layer.window ? std::max(start, last - layer.window + 1) : start;
    const int64_t count = last + 1 - first;
    scores.resize(std::max<size_t>(scores.size(), count));
    for (int64_t n = head * group; n < (head + 1) * group; n++) {
        float *q = qkv + n * size, *y = attended + n * size;
        if (layer.q_norm) normalize(q, layer.q_norm, size, m.eps, q);
        rotate(q, cos, sin, size);
        const float factor = 1 / std::sqrt(static_cast<float>(size));
        float highest = -INFINITY, sum = 0;
        for (int64_t s = 0; s < count; s++) {
            scores[s] = dot(q, keys + (first + s) * size, size) * factor;
            highest = std::max(highest, scores[s]);
        }
        float* p = scores.data();
        #pragma omp simd reduction(+ : sum)
        for (int64_t s = 0; s < count; s++) sum += p[s] = exponential(p[s] - highest);
        std::fill_n(y, size, 0.0f);
        for (int64_t s = 0; s < count; s++) {
            const float *v = values + (first + s) * size, weight = p[s] / sum;
            for (int64_t i = 0; i < size; i++) y[i] += weight * v[i];
        }
    }
}

// gate becomes silu(gate) * up, with silu(x) = x / (1 + e^-x).
static void activate(float* gate, const float* up, int64_t count) {
    #pragma omp simd
    for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

// --- the whole model ------------------------------------------------------------------------------------------------

extern "C" int block_size() { return BLOCK; }
extern "C" int group_size() { return GROUP; }

// The logits (B, V) after ids (B,); their keys and values are written into the cache. updates: those of qkv, o, gate,
// up and down in each layer, then of the head; null where no adapter is in use. Returns 0, or 1 where an id is not in
// the vocabulary, and then nothing is computed.
extern "C" int one_token(const Model* model, const Cache* cache, const Updates* updates, const int64_t* ids,
                         int64_t rows, float* logits, int64_t num_threads) {
    const Model& m = *model;
    for (int64_t row = 0; row < rows; row++)
        if (ids[row] < 0 || ids[row] >= m.head.out) return 1;
    const int64_t qkv_size = (m.heads + 2 * m.kv_heads) * m.head_dim, attended_size = m.heads * m.head_dim;
    int64_t low_size = 0;
    for (int64_t n = 0; updates && n <= 5 * m.num_layers; n++) low_size = std::max(low_size, ranks(updates[n]));
    static thread_local std::vector<float> memory;
    memory.resize(rows * (m.width + qkv_size + attended_size + 2 * m.intermediate_size + 2 * low_size));
    float* const x = memory.data();  // (B, C)
    float* const qkv = x + rows * m.width;  // (B, (H + 2 K) D)
    float* const attended = qkv + rows * qkv_size;  // (B, H D)
    float* const gate = attended + rows * attended_size;  // (B, I)
    float* const up = gate + rows * m.intermediate_size;  // (B, I)
    float* const low = up + rows * m.intermediate_size;  // (B, ranks), what adapters make of x
    float* const low_up = low + rows * low_size;
    for (int64_t row = 0; row < rows; row++) std::copy_n(m.embedding + ids[row] * m.width, m.width, x + row * m.width);

    #pragma omp parallel num_threads(num_threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
        const int64_t thread = 0, threads = 1;
#endif
        static thread_local std::vector<float> normed_memory, scores;
        static thread_local Input input;
        normed_memory.resize(rows * m.width);
        float* const normed = normed_memory.data();  // (B, C); each thread has its own
        // Calls work(n) for this thread's share of 0, 1, ..., count - 1, then waits for the other threads.
        auto share = [&](int64_t count, auto work) {
            for (int64_t n = count * thread / threads; n < count * (thread + 1) / threads; n++) work(n);
            #pragma omp barrier
        };
        auto norm_rows = [&](const float* weight) {
            for (int64_t row = 0; row < rows; row++)
                normalize(x + row * m.width, weight, m.width, m.eps, normed + row * m.width);
        };
        // What adapters add to linear layer `number` of all, in two parts: `low` becomes A x, then y += B low.
        auto begin_update = [&](int64_t number, const Linear& w, const float* from, float* to) {
            if (updates && updates[number].count)
                share(rows, [&](int64_t row) { project(updates[number], from, w.in, row, to); });
        };
        auto finish_update = [&](int64_t number, const Linear& w, int64_t block, const float* from, float* y) {
            if (updates) expand(updates[number], w, block, from, rows, y);
        };
        auto product = [&](int64_t number, const Linear& w, const float* from, float* to, bool add = false) {
            begin_update(number, w, from, low);
            input.set(w, from, rows);
            share(blocks(w), [&](int64_t block) {
                multiply(w, block, input, to, add);
                finish_update(number, w, block, low, to);
            });
        };
        for (int64_t number = 0; number < m.num_layers; number++) {
            const Layer& layer = m.layers[number];
            norm_rows(layer.input_norm);
            product(5 * number, layer.qkv, normed, qkv);
            share(rows * m.kv_heads, [&](int64_t n) {
                const int64_t row = n / m.kv_heads, head = n % m.kv_heads;
                attend(m, layer, *cache, number, row, head, qkv + row * qkv_size, attended + row * attended_size,
                       scores);
            });
            product(5 * number + 1, layer.o, attended, x, true);
            norm_rows(layer.mlp_norm);
            begin_update(5 * number + 2, layer.gate, normed, low);
            begin_update(5 * number + 3, layer.up, normed, low_up);
            input.set(layer.gate, normed, rows);
            share(blocks(layer.gate), [&](int64_t block) {
                multiply(layer.gate, block, input, gate);
                multiply(layer.up, block, input, up);
                finish_update(5 * number + 2, layer.gate, block, low, gate);
                finish_update(5 * number + 3, layer.up, block, low_up, up);
                const int64_t begin = block * BLOCK, count = std::min<int64_t>(BLOCK, m.intermediate_size - begin);
                for (int64_t row = 0; row < rows; row++) {
                    const int64_t place = row * m.intermediate_size + begin;
                    activate(gate + place, up + place, count);
                }
            });
            product(5 * number + 4, layer.down, gate, x, true);
        }
        norm_rows(m.norm);
        product(5 * m.num_layers, m.head, normed, logits);
    }
    return 0;
}
