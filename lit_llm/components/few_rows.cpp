// Functions of few rows, as decoding computes them. Products are bound by reading the matrix from memory, which general
// libraries do at a fraction of the memory's bandwidth where there is one row; norms and rotations by the number of calls.
// Sums are in float32. `int64_t` is the type of all sizes, which count entries.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float number(float value) { return value; }

inline float number(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void store(float* place, float value) { *place = value; }

inline void store(bfloat16* place, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // To the nearest, ties to even. Rounding a NaN could make an infinity of it.
    place->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Threads for that many multiplications: fewer than asked for where starting them would take longer than they save.
inline int threads_for(int64_t products, int threads) {
    int64_t most = 1 + products / 32768;
    return most < threads ? int(most) : threads;
}

// y[r] = sum over i of w[i] x[r][i], for N rows of x, `step` entries of y apart.
template <int N, typename T>
inline void dot(const T* w, const T* x, T* y, int64_t inputs, int64_t step) {
    const T *x0 = x, *x1 = x + (N > 1) * inputs, *x2 = x + 2 * (N > 2) * inputs, *x3 = x + 3 * (N > 3) * inputs;
    float y0 = 0, y1 = 0, y2 = 0, y3 = 0;
#pragma omp simd reduction(+ : y0, y1, y2, y3)
    for (int64_t i = 0; i < inputs; ++i) {
        float entry = number(w[i]);
        y0 += entry * number(x0[i]);
        if (N > 1) y1 += entry * number(x1[i]);
        if (N > 2) y2 += entry * number(x2[i]);
        if (N > 3) y3 += entry * number(x3[i]);
    }
    store(y, y0);
    if (N > 1) store(y + step, y1);
    if (N > 2) store(y + 2 * step, y2);
    if (N > 3) store(y + 3 * step, y3);
}

// y[r][o] = sum over i of weight[o][i] x[r][i]. One row of the weight after the other: several at once are several
// streams from memory, and took twice as long.
template <typename T>
void product(const T* weight, const T* x, T* y, int64_t outputs, int64_t inputs, int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads_for(outputs * inputs * rows, threads)) schedule(static)
    for (int64_t o = 0; o < outputs; ++o) {
        const T* w = weight + o * inputs;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) dot<4>(w, x + r * inputs, y + r * outputs + o, inputs, outputs);
        for (; r + 2 <= rows; r += 2) dot<2>(w, x + r * inputs, y + r * outputs + o, inputs, outputs);
        if (r < rows) dot<1>(w, x + r * inputs, y + r * outputs + o, inputs, outputs);
    }
}

// Softmax of a query's scores over `keys` keys, which follow each other in memory, times their values. SIZE: entries of a
// head where the compiler knows them, so that sums stay in registers; else 0.
template <int64_t SIZE, typename T>
void attend(const T* q, const T* k, const T* v, T* out, int64_t keys, int64_t any_size, float scale, float* scores) {
    const int64_t size = SIZE ? SIZE : any_size;
    float* sums = scores + keys;
    float fixed[SIZE ? SIZE : 1];
    if (SIZE) sums = fixed;
    float largest = -INFINITY, total = 0;
    for (int64_t t = 0; t < keys; ++t) {
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int64_t i = 0; i < size; ++i) score += number(q[i]) * number(k[t * size + i]);
        scores[t] = score * scale;
        largest = scores[t] > largest ? scores[t] : largest;
    }
    for (int64_t t = 0; t < keys; ++t) total += scores[t] = std::exp(scores[t] - largest);
    for (int64_t i = 0; i < size; ++i) sums[i] = 0;
    for (int64_t t = 0; t < keys; ++t) {
        float weight = scores[t];
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) sums[i] += weight * number(v[t * size + i]);
    }
    for (int64_t i = 0; i < size; ++i) store(out + i, sums[i] / total);
}

// Attention of one query of each row and head: q and out are rows x heads x size. The keys of a row and of one of the
// `kv_heads` follow each other; rows are `row_step` apart, heads `head_step`. lengths: keys of each row; where it is null,
// all have `keys`.
template <typename T>
void attention(
    const T* q, const T* k, const T* v, T* out, const int64_t* lengths, int64_t keys, int64_t rows, int64_t heads,
    int64_t kv_heads, int64_t size, int64_t row_step, int64_t head_step, float scale, int threads
) {
#pragma omp parallel num_threads(threads_for(2 * rows * heads * keys * size, threads))
    {
        std::vector<float> work(keys + size);
#pragma omp for schedule(static)
        for (int64_t index = 0; index < rows * heads; ++index) {
            int64_t row = index / heads, head = index % heads / (heads / kv_heads);
            int64_t place = row * row_step + head * head_step;
            int64_t seen = lengths && lengths[row] < keys ? lengths[row] : keys;
            const T *query = q + index * size, *key = k + place, *value = v + place;
            T* result = out + index * size;
            if (size == 64) attend<64>(query, key, value, result, seen, size, scale, work.data());
            else if (size == 128) attend<128>(query, key, value, result, seen, size, scale, work.data());
            else attend<0>(query, key, value, result, seen, size, scale, work.data());
        }
    }
}

// y = x / sqrt(mean(x^2) + eps), times a scale where there is one.
template <typename T>
void rms_norm(const T* x, const T* scale, T* y, int64_t rows, int64_t width, double eps) {
    for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += number(x[i]) * number(x[i]);
        float factor = 1 / std::sqrt(squares / float(width) + float(eps));
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(y + i, number(x[i]) * factor * (scale ? number(scale[i]) : 1.0f));
    }
}

// Rotate the pairs (i, i + half) of each row. Every `sharing` rows have the same cosines and sines.
template <typename T>
void rotate(const T* x, const T* cosine, const T* sine, T* y, int64_t rows, int64_t half, int64_t sharing) {
    for (int64_t row = 0; row < rows; ++row, x += 2 * half, y += 2 * half) {
        const T *c = cosine + row / sharing * half, *s = sine + row / sharing * half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            float first = number(x[i]), second = number(x[half + i]);
            store(y + i, first * number(c[i]) - second * number(s[i]));
            store(y + half + i, second * number(c[i]) + first * number(s[i]));
        }
    }
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                              \
    void product_##NAME(                                                                                               \
        const void* weight, const void* x, void* y, int64_t outputs, int64_t inputs, int64_t rows, int threads         \
    ) {                                                                                                                \
        product((const T*)weight, (const T*)x, (T*)y, outputs, inputs, rows, threads);                                 \
    }                                                                                                                  \
    void rms_norm_##NAME(const void* x, const void* scale, void* y, int64_t rows, int64_t width, double eps) {         \
        rms_norm((const T*)x, (const T*)scale, (T*)y, rows, width, eps);                                               \
    }                                                                                                                  \
    void attention_##NAME(                                                                                             \
        const void* q, const void* k, const void* v, void* out, const int64_t* lengths, int64_t keys, int64_t rows,    \
        int64_t heads, int64_t kv_heads, int64_t size, int64_t row_step, int64_t head_step, float scale, int threads   \
    ) {                                                                                                                \
        attention(                                                                                                     \
            (const T*)q, (const T*)k, (const T*)v, (T*)out, lengths, keys, rows, heads, kv_heads, size, row_step,      \
            head_step, scale, threads                                                                                  \
        );                                                                                                             \
    }                                                                                                                  \
    void rotate_##NAME(                                                                                                \
        const void* x, const void* cosine, const void* sine, void* y, int64_t rows, int64_t half, int64_t sharing      \
    ) {                                                                                                                \
        rotate((const T*)x, (const T*)cosine, (const T*)sine, (T*)y, rows, half, sharing);                             \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(bfloat16, bfloat16)
}
