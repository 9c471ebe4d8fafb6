// Colour of views on the CPU: the operations of colour.py (which says what they are), one view at a time, so that a
// view stays in a core's cache from the first operation to the last. Built and called by native.py.
//
// Layout: a view is 3 planes of `area` floats; parameters as columns in views.py.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

enum { FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, NUM_PARAMS };

constexpr float RED = 0.2989f, GREEN = 0.587f, BLUE = 0.114f;

inline float unit(float x) { return x < 0.f ? 0.f : (x > 1.f ? 1.f : x); }

// x * factor + offset, cut to [0, 1].
void scale(float* x, int64_t count, float factor, float offset) {
    for (int64_t i = 0; i < count; ++i) x[i] = unit(x[i] * factor + offset);
}

double mean_luma(const float* x, int64_t area) {
    double sum = 0;
    for (int64_t first = 0; first < area; first += 1024) {  // blocks in float: vectorised, and rounded as little
        const int64_t last = first + 1024 < area ? first + 1024 : area;
        float part = 0;
        for (int64_t i = first; i < last; ++i) part += RED * x[i] + GREEN * x[area + i] + BLUE * x[2 * area + i];
        sum += part;
    }
    return sum / area;
}

void saturate(float* x, int64_t area, float factor) {
    for (int64_t i = 0; i < area; ++i) {
        const float r = x[i], g = x[area + i], b = x[2 * area + i];
        const float luma = (1 - factor) * (RED * r + GREEN * g + BLUE * b);
        x[i] = unit(r * factor + luma);
        x[area + i] = unit(g * factor + luma);
        x[2 * area + i] = unit(b * factor + luma);
    }
}

inline float turned(float angle, float most, float chroma) {
    const float y = angle - 6.f * std::floor(angle * (1.f / 6.f));
    return most - chroma * unit(y < 4.f - y ? y : 4.f - y);
}

void turn_hue(float* x, int64_t area, float shift) {
    for (int64_t i = 0; i < area; ++i) {
        const float r = x[i], g = x[area + i], b = x[2 * area + i];
        const float most = r > g ? (r > b ? r : b) : (g > b ? g : b);
        const float least = r < g ? (r < b ? r : b) : (g < b ? g : b);
        const float chroma = most - least;
        const float inverse = 1.f / (chroma > 0.f ? chroma : 1.f);
        const float blue = (r - g) * inverse + 4.f, green = (b - r) * inverse + 2.f, red = (g - b) * inverse;
        const float angle = (most == r ? red : (most == g ? green : blue)) + 6.f * shift;
        x[i] = turned(angle + 5.f, most, chroma);
        x[area + i] = turned(angle + 3.f, most, chroma);
        x[2 * area + i] = turned(angle + 1.f, most, chroma);
    }
}

void make_grey(float* x, int64_t area) {
    for (int64_t i = 0; i < area; ++i)
        x[i] = x[area + i] = x[2 * area + i] = RED * x[i] + GREEN * x[area + i] + BLUE * x[2 * area + i];
}

// Separable Gaussian of an odd size, borders reflected without repeating the edge.
void blur(float* x, int64_t side, float sigma, int64_t size) {
    const int64_t pad = size / 2;
    std::vector<float> kernel(size), padded((side + 2 * pad) * side);
    float sum = 0;
    for (int64_t k = 0; k < size; ++k) sum += kernel[k] = std::exp(-0.5f * (k - pad) * (k - pad) / (sigma * sigma));
    for (float& weight : kernel) weight /= sum;
    auto reflected = [side](int64_t i) { return i < 0 ? -i : (i >= side ? 2 * side - 2 - i : i); };
    std::vector<float> row(side + 2 * pad);
    for (int64_t plane = 0; plane < 3; ++plane) {
        float* pixels = x + plane * side * side;
        for (int64_t y = 0; y < side; ++y) {  // along rows, into the middle of `padded`
            for (int64_t i = -pad; i < side + pad; ++i) row[i + pad] = pixels[y * side + reflected(i)];
            float* out = &padded[(y + pad) * side];
            for (int64_t i = 0; i < side; ++i) out[i] = 0;
            for (int64_t k = 0; k < size; ++k)
                for (int64_t i = 0; i < side; ++i) out[i] += kernel[k] * row[i + k];
        }
        for (int64_t y = -pad; y < side + pad; ++y)
            if (y < 0 || y >= side)
                for (int64_t i = 0; i < side; ++i) padded[(y + pad) * side + i] = padded[(reflected(y) + pad) * side + i];
        for (int64_t y = 0; y < side; ++y) {  // along columns
            float* out = pixels + y * side;
            for (int64_t i = 0; i < side; ++i) out[i] = 0;
            for (int64_t k = 0; k < size; ++k)
                for (int64_t i = 0; i < side; ++i) out[i] += kernel[k] * padded[(y + k) * side + i];
        }
    }
}

void load(const uint8_t* from, float* to, int64_t side, bool flipped) {
    if (!flipped) {
        for (int64_t i = 0; i < 3 * side * side; ++i) to[i] = from[i] * (1.f / 255.f);
        return;
    }
    for (int64_t row = 0; row < 3 * side; ++row)
        for (int64_t i = 0; i < side; ++i) to[row * side + i] = from[row * side + side - 1 - i] * (1.f / 255.f);
}

}  // namespace

// views uint8 [count, 3, side, side] -> out float32 of the same shape. params float32 [count, NUM_PARAMS]; orders int32
// [number of orders, 4]: columns in order, -1 where an operation is left out; scale and offset float32 [3] normalise.
extern "C" void colour(const uint8_t* views, float* out, const float* params, const int32_t* orders, int64_t count,
                       int64_t side, int64_t blur_size, const float* factors, const float* offsets) {
    const int64_t area = side * side;
    for (int64_t view = 0; view < count; ++view) {
        const float* p = params + view * NUM_PARAMS;
        float* x = out + view * 3 * area;
        load(views + view * 3 * area, x, side, p[FLIP] > 0);
        for (int64_t slot = 0; p[ORDER] >= 0 && slot < 4; ++slot) {
            const int32_t column = orders[static_cast<int64_t>(p[ORDER]) * 4 + slot];
            if (column == BRIGHTNESS) scale(x, 3 * area, p[BRIGHTNESS], 0.f);
            if (column == CONTRAST)
                scale(x, 3 * area, p[CONTRAST], static_cast<float>((1 - p[CONTRAST]) * mean_luma(x, area)));
            if (column == SATURATION) saturate(x, area, p[SATURATION]);
            if (column == HUE) turn_hue(x, area, p[HUE]);
        }
        if (p[GREY] > 0) make_grey(x, area);
        if (p[SIGMA] > 0 && blur_size > 1) blur(x, side, p[SIGMA], blur_size);
        for (int64_t plane = 0; plane < 3; ++plane)
            for (int64_t i = 0; i < area; ++i) x[plane * area + i] = x[plane * area + i] * factors[plane] - offsets[plane];
    }
}
