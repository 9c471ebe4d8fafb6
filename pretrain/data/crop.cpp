// Crops of uint8 images, resized with an antialiasing triangle filter (the weights of crop.py), on the CPU.
// Built and called by native.py.
//
// LANES rows of output at a time: first along columns, into rows of floats; these are transposed, so that along rows
// the LANES rows stand side by side in a vector register; the bytes that come out are transposed back.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16, TILE = LANES * LANES;
typedef float Floats __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

// Which input pixels make output pixel i, and with which weights: [first[i], first[i] + count[i]), weight[i * most + k].
struct Filter {
    int64_t most;
    std::vector<int64_t> first, count;
    std::vector<float> weight;

    Filter(int64_t length, int64_t size) : first(size), count(size) {
        const double scale = static_cast<double>(length) / size, support = scale > 1 ? scale : 1;
        most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
        weight.assign(size * most, 0.f);
        for (int64_t i = 0; i < size; ++i) {
            const double centre = scale * (i + 0.5);
            int64_t low = static_cast<int64_t>(centre - support + 0.5), high = static_cast<int64_t>(centre + support + 0.5);
            low = low < 0 ? 0 : low;
            high = high > length ? length : high;
            double sum = 0;
            for (int64_t k = 0; k < high - low; ++k) {
                const double distance = std::fabs((low + k + 0.5 - centre) / support);
                const double value = distance < 1 ? 1 - distance : 0;
                weight[i * most + k] = static_cast<float>(value);
                sum += value;
            }
            for (int64_t k = 0; k < high - low; ++k) weight[i * most + k] /= static_cast<float>(sum);
            first[i] = low;
            count[i] = high - low;
        }
    }
};

void copy(const uint8_t* from, int64_t stride, int64_t size, uint8_t* out) {
    for (int64_t y = 0; y < size; ++y)
        for (int64_t c = 0; c < 3; ++c)
            for (int64_t x = 0; x < size; ++x) out[(c * size + y) * size + x] = from[y * stride + x * 3 + c];
}

// A LANES x LANES tile, in place: a perfect shuffle turns the bits of an index by one, four of them by half its length.
template <typename T>
void transpose(T* tile) {
    T other[TILE];
    T *from = tile, *to = other;
    for (int64_t round = 0; round < 4; ++round, std::swap(from, to))
        for (int64_t i = 0; i < TILE / 2; ++i) to[2 * i] = from[i], to[2 * i + 1] = from[i + TILE / 2];
}

// One row of output along columns: WIDTH bytes of the image -> floats.
template <int64_t WIDTH>
void along_columns(const uint8_t* pixels, int64_t stride, const float* weight, int64_t count, float* out) {
    float sum[WIDTH];
    for (int64_t i = 0; i < WIDTH; ++i) sum[i] = 0.5f;  // what makes the final cut to integers a rounding
    for (int64_t k = 0; k < count; ++k, pixels += stride)
        for (int64_t i = 0; i < WIDTH; ++i) sum[i] += weight[k] * pixels[i];
    for (int64_t i = 0; i < WIDTH; ++i) out[i] = sum[i];
}

// One column of output along rows: LANES rows of each channel, a tile apart.
void along_rows(const Floats* lanes, const Filter& columns, int64_t x, Floats* out) {
    Floats red = {}, green = {}, blue = {};
    const float* weight = &columns.weight[x * columns.most];
    const Floats* pixels = lanes + columns.first[x] * 3;
    for (int64_t k = 0; k < columns.count[x]; ++k, pixels += 3) {
        red += weight[k] * pixels[0];
        green += weight[k] * pixels[1];
        blue += weight[k] * pixels[2];
    }
    out[0] = red, out[LANES] = green, out[2 * LANES] = blue;
}

struct Resizer {
    const int64_t size, bytes, padded;  // side of the output; bytes in a row of the crop, and those filled up to lanes
    const Filter rows, columns;
    std::vector<float> row, lanes;  // [LANES][padded] and [padded][LANES]

    Resizer(int64_t height, int64_t width, int64_t size)
        : size(size), bytes(width * 3), padded((bytes + LANES - 1) / LANES * LANES), rows(height, size),
          columns(width, size), row(LANES * padded), lanes(padded * LANES) {}

    // Output rows y to y + filled, along columns.
    void shrink_columns(const uint8_t* from, int64_t stride, int64_t y, int64_t filled) {
        constexpr int64_t WIDE = 4 * LANES;
        for (int64_t lane = 0; lane < filled; ++lane) {
            const uint8_t* pixels = from + rows.first[y + lane] * stride;
            const float* weight = &rows.weight[(y + lane) * rows.most];
            const int64_t count = rows.count[y + lane];
            float* to = &row[lane * padded];
            int64_t i = 0;
            for (; i + WIDE <= bytes; i += WIDE) along_columns<WIDE>(pixels + i, stride, weight, count, to + i);
            for (; i + LANES <= bytes; i += LANES) along_columns<LANES>(pixels + i, stride, weight, count, to + i);
            for (; i < bytes; ++i) along_columns<1>(pixels + i, stride, weight, count, to + i);
        }
        for (int64_t i = 0; i < padded; i += LANES) {
            Floats* to = reinterpret_cast<Floats*>(&lanes[i * LANES]);
            for (int64_t lane = 0; lane < LANES; ++lane) to[lane] = *reinterpret_cast<Floats*>(&row[lane * padded + i]);
            transpose(&lanes[i * LANES]);
        }
    }

    // The same rows along rows, into the three planes of the output.
    void shrink_rows(int64_t y, int64_t filled, uint8_t* out) {
        Floats tile[3 * LANES] = {};
        uint8_t values[TILE];
        for (int64_t x = 0; x < size; x += LANES) {
            const int64_t across = std::min(LANES, size - x);
            for (int64_t i = 0; i < across; ++i)
                along_rows(reinterpret_cast<Floats*>(lanes.data()), columns, x + i, tile + i);
            for (int64_t c = 0; c < 3; ++c) {
                const float* sums = reinterpret_cast<float*>(tile + c * LANES);
                for (int64_t i = 0; i < TILE; ++i) values[i] = static_cast<uint8_t>(std::min(sums[i], 255.f));
                transpose(values);
                for (int64_t lane = 0; lane < filled; ++lane)
                    std::memcpy(out + (c * size + y + lane) * size + x, values + lane * LANES, across);
            }
        }
    }

    void run(const uint8_t* from, int64_t stride, uint8_t* out) {
        for (int64_t y = 0; y < size; y += LANES) {
            const int64_t filled = std::min(LANES, size - y);
            shrink_columns(from, stride, y, filled);
            shrink_rows(y, filled, out);
        }
    }
};

}  // namespace

// Crops of one image: `stride` bytes from row to row, boxes [count][top, left, height, width]; out uint8
// [count, 3, size, size].
extern "C" void crop(const uint8_t* image, int64_t stride, const int64_t* boxes, int64_t count, int64_t size,
                     uint8_t* out) {
    for (const int64_t* box = boxes; box < boxes + count * 4; box += 4, out += 3 * size * size) {
        const uint8_t* from = image + box[0] * stride + box[1] * 3;
        if (box[2] == size && box[3] == size)
            copy(from, stride, size, out);
        else
            Resizer(box[2], box[3], size).run(from, stride, out);
    }
}

// The same with an image for each crop: the address of its first byte, and its stride.
extern "C" void crops(const int64_t* images, const int64_t* strides, const int64_t* boxes, int64_t count, int64_t size,
                      uint8_t* out) {
    for (int64_t i = 0; i < count; ++i)
        crop(reinterpret_cast<const uint8_t*>(images[i]), strides[i], boxes + i * 4, 1, size, out + i * 3 * size * size);
}
