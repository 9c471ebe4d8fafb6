// Crops of uint8 images, resized with an antialiasing triangle filter (the weights of crop.py), on the CPU.
// Built and called by native.py.
//
// First along columns, LANES output rows at a time; then along rows, the LANES rows side by side in a vector register.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t LANES = 16;

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

// LANES rows of output, along columns only: lanes [bytes][LANES]. The last rows of an image fill fewer lanes.
template <int64_t WIDTH>
void along_columns(const uint8_t* from, int64_t stride, const Filter& rows, int64_t y, int64_t filled, float* lanes) {
    float sums[LANES][WIDTH] = {};
    for (int64_t lane = 0; lane < filled; ++lane) {
        float* sum = sums[lane];
        for (int64_t i = 0; i < WIDTH; ++i) sum[i] = 0.5f;  // what makes the final cut to integers a rounding
        const float* weight = &rows.weight[(y + lane) * rows.most];
        const uint8_t* pixels = from + rows.first[y + lane] * stride;
        for (int64_t k = 0; k < rows.count[y + lane]; ++k, pixels += stride)
            for (int64_t i = 0; i < WIDTH; ++i) sum[i] += weight[k] * pixels[i];
    }
    for (int64_t i = 0; i < WIDTH; ++i)
        for (int64_t lane = 0; lane < LANES; ++lane) lanes[i * LANES + lane] = sums[lane][i];
}

void resize(const uint8_t* from, int64_t stride, int64_t height, int64_t width, int64_t size, uint8_t* out) {
    constexpr int64_t TILE = 48;
    const Filter rows(height, size), columns(width, size);
    const int64_t bytes = width * 3;
    std::vector<float> lanes(bytes * LANES);
    for (int64_t block = 0; block < size; block += LANES) {
        const int64_t filled = size - block < LANES ? size - block : LANES;
        int64_t i = 0;
        for (; i + TILE <= bytes; i += TILE) along_columns<TILE>(from + i, stride, rows, block, filled, &lanes[i * LANES]);
        for (; i < bytes; i += 3) along_columns<3>(from + i, stride, rows, block, filled, &lanes[i * LANES]);
        for (int64_t x = 0; x < size; ++x) {
            const float* weight = &columns.weight[x * columns.most];
            for (int64_t c = 0; c < 3; ++c) {
                float sums[LANES] = {};
                const float* pixels = &lanes[(columns.first[x] * 3 + c) * LANES];
                for (int64_t k = 0; k < columns.count[x]; ++k)
                    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += weight[k] * pixels[k * 3 * LANES + lane];
                uint8_t values[LANES];
                for (int64_t lane = 0; lane < LANES; ++lane)
                    values[lane] = static_cast<uint8_t>(sums[lane] < 255.f ? sums[lane] : 255.f);
                for (int64_t lane = 0; lane < filled; ++lane) out[(c * size + block + lane) * size + x] = values[lane];
            }
        }
    }
}

}  // namespace

// For each crop: where its image is (address of the first byte), bytes from row to row, and its box (top, left, height,
// width). out uint8 [count, 3, size, size].
extern "C" void crops(const int64_t* images, const int64_t* strides, const int64_t* boxes, int64_t count, int64_t size,
                      uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* box = boxes + i * 4;
        const uint8_t* from = reinterpret_cast<const uint8_t*>(images[i]) + box[0] * strides[i] + box[1] * 3;
        uint8_t* to = out + i * 3 * size * size;
        if (box[2] == size && box[3] == size)
            copy(from, strides[i], size, to);
        else
            resize(from, strides[i], box[2], box[3], size, to);
    }
}
