// SPDX-License-Identifier: Apache-2.0
// Decode the crop of a JPEG and resize it: each row while it lies in the processor's nearest cache, and nothing below
// the crop is decoded. The result is, bit for bit, that of decoding the whole image by libjpeg-turbo, cropping it, and
// torch's antialiased bilinear resize of uint8. __init__.py compiles this file and decode.py calls it. Both functions
// refuse unusual, truncated and doubtful images by their return value: decode.py leaves these to other libraries.

#if !__has_include(<jpeglib.h>)
#error ABSENT: the headers of libjpeg-turbo
#else
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000090
#error ABSENT: libjpeg-turbo 2.1; plain libjpeg decodes no part of a row, and older ones do so with errors
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#endif

enum { CHANNELS = 3, UNUSUAL = -1, SPARE = 64 }; // SPARE: bytes that vectors may read or write past a row

static unsigned two_bytes(const uint8_t *place) { return place[0] << 8 | place[1]; }

// Whether a marker may occur in compressed data; any other is another file's, written over a part of this one.
static int has_a_place(int marker)
{
    return marker == 0 || marker == 0xff || marker == 0xc4 || (marker >= 0xd0 && marker <= 0xd7) ||
           (marker >= 0xd9 && marker <= 0xdb) || marker == 0xdd || marker == 0xfe;
}

const int libjpeg_turbo = LIBJPEG_TURBO_VERSION_NUMBER;

// Return width << 16 | height of a sequential JPEG that has its end and no stray markers; else 0. Bit 32 is set where
// its header has a segment of Exif's kind.
uint64_t jpeg_size(const uint8_t *image, size_t length)
{
    uint64_t size = 0, exif = 0;
    size_t place = 2;
    if (length < 4 || memcmp(image, "\xff\xd8", 2) || memcmp(image + length - 2, "\xff\xd9", 2)) return 0;
    for (int marker = 0; marker != 0xda; place += 2 + two_bytes(image + place + 2)) { // the header's segments
        if (place + 9 > length || image[place] != 0xff) return 0;
        marker = image[place + 1];
        if (marker == 0xc0 || marker == 0xc1)
            size = (uint64_t)two_bytes(image + place + 7) << 16 | two_bytes(image + place + 5);
        else if (marker == 0xe1)
            exif = (uint64_t)1 << 32;
        else if (marker != 0xc4 && (marker < 0xda || marker == 0xff))
            return 0;
    }
    for (const uint8_t *at = image + place, *end = image + length - 1; at < end; at++) {
        if (!(at = memchr(at, 0xff, end - at))) break;
        if (!has_a_place(at[1])) return 0;
    }
    return size >> 16 && size & 0xffff ? size | exif : 0;
}

// Resizing. An output pixel is a weighted mean of the input pixels that a triangle over it covers; weights are integers
// of 16 bits, to as many binary places as the largest of them allows, and the mean is rounded to 8 bits after each of
// the two directions.

struct axis {
    int taps, places;  // weights of each output pixel, 2 or a multiple of 4; their binary places
    int *first, *count; // of the input pixels; weights beyond count are 0
    int16_t *weights;
};

static void *zeros(j_decompress_ptr cinfo, size_t bytes) // freed with cinfo
{
    return memset(cinfo->mem->alloc_large((j_common_ptr)cinfo, JPOOL_IMAGE, bytes), 0, bytes);
}

// Compute all weights in double precision, `most` per output pixel; return the largest.
static double triangle(const struct axis *axis, double *weights, int most, double scale, int size)
{
    double largest = 0, narrow = scale > 1 ? 1 / scale : 1;
    for (int i = 0; i < size; i++, weights += most) {
        double sum = 0, centre = scale * (i + 0.5);
        for (int j = 0; j < axis->count[i]; j++) {
            double distance = (j + axis->first[i] - centre + 0.5) * narrow;
            distance = distance < 0 ? -distance : distance;
            sum += weights[j] = distance < 1 ? 1 - distance : 0;
        }
        for (int j = 0; j < axis->count[i] && sum; j++)
            if ((weights[j] /= sum) > largest) largest = weights[j];
    }
    return largest;
}

static struct axis resizing(j_decompress_ptr cinfo, int from, int size)
{
    int padded = (size + 3) / 4 * 4, most = 0; // as many as vectors take at a time
    struct axis axis = {2, 0, zeros(cinfo, padded * sizeof(int)), zeros(cinfo, padded * sizeof(int)), NULL};
    double scale = (double)from / size, support = scale > 1 ? scale : 1;
    for (int i = 0; i < size; i++) {
        double centre = scale * (i + 0.5);
        int first = (int)(centre - support + 0.5), end = (int)(centre + support + 0.5);
        axis.first[i] = first < 0 ? 0 : first;
        axis.count[i] = (end < from ? end : from) - axis.first[i];
        most = axis.count[i] > most ? axis.count[i] : most;
    }
    double *exact = zeros(cinfo, (size_t)size * most * sizeof(double));
    double largest = triangle(&axis, exact, most, scale, size);
    while (axis.places < 22 && (int)(0.5 + largest * (2 << axis.places)) < 1 << 15) axis.places++;
    if (most > 2) axis.taps = (most + 3) / 4 * 4;
    axis.weights = zeros(cinfo, (size_t)padded * axis.taps * sizeof(int16_t));
    for (int i = 0; i < size; i++)
        for (int j = 0; j < axis.count[i]; j++)
            axis.weights[i * axis.taps + j] = (int16_t)(0.5 + exact[i * most + j] * (1 << axis.places));
    return axis;
}

// Resize two rows at a time, which share the weights.
static void resize_rows(const struct axis *axis, uint8_t *const in[2], uint8_t *const out[2], int size)
{
    for (int row = 0; row < 2; row++)
        for (int i = 0; i < size * CHANNELS; i++) {
            const int16_t *weights = axis->weights + i / CHANNELS * axis->taps;
            const uint8_t *pixel = in[row] + axis->first[i / CHANNELS] * CHANNELS + i % CHANNELS;
            int sum = 1 << (axis->places - 1);
            for (int j = 0; j < axis->count[i / CHANNELS]; j++) sum += weights[j] * pixel[j * CHANNELS];
            out[row][i] = (uint8_t)(sum >> axis->places);
        }
}

// Compute one row of the output from `taps` rows.
static void blend_rows(uint8_t *const rows[], const int16_t *weights, int taps, int places, int bytes, uint8_t *out)
{
    for (int i = 0; i < bytes; i++) {
        int sum = 1 << (places - 1);
        for (int j = 0; j < taps; j++) sum += weights[j] * rows[j][i];
        out[i] = (uint8_t)(sum >> places);
    }
}

#ifdef AVX2
AVX2 static inline __m256i two_weights(const int16_t *weights)
{
    int pair;
    memcpy(&pair, weights, sizeof pair);
    return _mm256_set1_epi32(pair);
}

AVX2 static inline __m256i both(const uint8_t *low, const uint8_t *high)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                                   _mm_loadu_si128((const __m128i *)high), 1);
}

// Return the means of one output pixel: red, green, blue and 0 of one row, then of the other.
AVX2 static inline __m256i mean(const uint8_t *one, const uint8_t *two, const int16_t *weights, int taps, int places)
{
    // Two neighbours as numbers of 16 bits: r r g g b b 0 0.
    const __m256i near = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i far = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    __m256i sum = _mm256_set1_epi32(1 << (places - 1));
    for (int j = 0; j < taps; j += 4, one += 4 * CHANNELS, two += 4 * CHANNELS) {
        __m256i pixels = both(one, two);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, near), two_weights(weights + j)));
        if (taps == 2) break;
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, far), two_weights(weights + j + 2)));
    }
    return _mm256_sra_epi32(sum, _mm_cvtsi32_si128(places));
}

AVX2 static inline void resize_with(const struct axis axis, uint8_t *const in[2], uint8_t *const out[2], int size,
                                    int taps)
{
    const __m256i pack = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const uint8_t *one = in[0], *two = in[1];
    uint8_t *to_one = out[0], *to_two = out[1];
    const int16_t *weights = axis.weights;
    for (int i = 0; i < size; i += 4, to_one += 4 * CHANNELS, to_two += 4 * CHANNELS) {
        __m256i means[4];
        for (int k = 0; k < 4; k++, weights += taps) {
            const int place = axis.first[i + k] * CHANNELS;
            means[k] = mean(one + place, two + place, weights, taps, axis.places);
        }
        __m256i front = _mm256_packs_epi32(means[0], means[1]), back = _mm256_packs_epi32(means[2], means[3]);
        __m256i four = _mm256_shuffle_epi8(_mm256_packus_epi16(front, back), pack);
        _mm_storeu_si128((__m128i *)to_one, _mm256_castsi256_si128(four));
        _mm_storeu_si128((__m128i *)to_two, _mm256_extracti128_si256(four, 1));
    }
}

AVX2 static void resize_rows_avx2(const struct axis *axis, uint8_t *const in[2], uint8_t *const out[2], int size)
{
    if (axis->taps == 2) // the compiler unrolls the usual numbers
        resize_with(*axis, in, out, size, 2);
    else if (axis->taps == 4)
        resize_with(*axis, in, out, size, 4);
    else
        resize_with(*axis, in, out, size, axis->taps);
}

AVX2 static void blend_rows_avx2(uint8_t *const rows[], const int16_t *weights, int taps, int places, int bytes,
                                 uint8_t *out)
{
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (places - 1));
    const __m128i shift = _mm_cvtsi32_si128(places);
    for (int i = 0; i < bytes; i += 32) {
        __m256i sum[4] = {half, half, half, half};
        for (int j = 0; j < taps; j += 2) {
            __m256i one = _mm256_loadu_si256((const __m256i *)(rows[j] + i));
            __m256i two = _mm256_loadu_si256((const __m256i *)(rows[j + 1] + i)), pair = two_weights(weights + j);
            __m256i low = _mm256_unpacklo_epi8(one, two), high = _mm256_unpackhi_epi8(one, two);
            sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
            sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
            sum[2] = _mm256_add_epi32(sum[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
            sum[3] = _mm256_add_epi32(sum[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
        }
        for (int k = 0; k < 4; k++) sum[k] = _mm256_sra_epi32(sum[k], shift);
        __m256i low = _mm256_packs_epi32(sum[0], sum[1]), high = _mm256_packs_epi32(sum[2], sum[3]);
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_packus_epi16(low, high));
    }
}
#endif

// Decoding

struct failure { // libjpeg's error manager, and where an error jumps to
    struct jpeg_error_mgr manager;
    jmp_buf exit;
};

static void leave(j_common_ptr cinfo) { longjmp(((struct failure *)cinfo->err)->exit, 1); }

static void leave_at_warning(j_common_ptr cinfo, int level)
{
    if (level < 0) leave(cinfo);
}

// Whether libjpeg's partial decoding was found to be exact for this sampling.
static int is_usual(j_decompress_ptr cinfo)
{
    const jpeg_component_info *part = cinfo->comp_info;
    if (jpeg_has_multiple_scans(cinfo)) return 0;
    if (cinfo->jpeg_color_space == JCS_GRAYSCALE) return cinfo->num_components == 1;
    return cinfo->num_components == 3 && part[0].h_samp_factor <= 2 && part[0].v_samp_factor <= 2 &&
           part[1].h_samp_factor * part[1].v_samp_factor * part[2].h_samp_factor * part[2].v_samp_factor == 1 &&
           (cinfo->jpeg_color_space == JCS_YCbCr || cinfo->jpeg_color_space == JCS_RGB);
}

struct crop {
    int left, top, right, bottom; // in pixels of the image after its division by scale
};

// Start at the crop's first row, with rows of its columns and of those beside them that interpolating colours needs.
// Return the column in which the rows begin.
static unsigned begin(j_decompress_ptr cinfo, const struct crop *crop)
{
    JDIMENSION left = crop->left > 2 ? crop->left - 2 : 0;
    JDIMENSION right = crop->right + 2, width;
    width = (right < cinfo->output_width ? right : cinfo->output_width) - left;
    jpeg_crop_scanline(cinfo, &left, &width);
    if (crop->top) jpeg_skip_scanlines(cinfo, crop->top);
    return left;
}

static void read_rows(j_decompress_ptr cinfo, uint8_t *rows[], int number)
{
    for (int done = 0; done < number;) done += jpeg_read_scanlines(cinfo, rows + done, number - done);
}

static void resize(j_decompress_ptr cinfo, const struct crop *crop, int size, uint8_t *out)
{
    const int height = crop->bottom - crop->top, stride = size * CHANNELS;
    const struct axis across = resizing(cinfo, crop->right - crop->left, size), down = resizing(cinfo, height, size);
    void (*resize_two)(const struct axis *, uint8_t *const[2], uint8_t *const[2], int) = resize_rows;
    void (*blend)(uint8_t *const[], const int16_t *, int, int, int, uint8_t *) = blend_rows;
#ifdef AVX2
    if (__builtin_cpu_supports("avx2")) resize_two = resize_rows_avx2, blend = blend_rows_avx2;
#endif
    const unsigned skip = (crop->left - begin(cinfo, crop)) * CHANNELS;
    const size_t wide = (cinfo->output_width + across.taps) * CHANNELS + SPARE, narrow = stride + SPARE;
    // Off by a byte: libjpeg-turbo writes a row at a multiple of 32 bytes past the caches.
    uint8_t *in[2] = {(uint8_t *)zeros(cinfo, wide) + 1, (uint8_t *)zeros(cinfo, wide) + 1}, *crops[2] = {in[0] + skip, in[1] + skip};
    // Rows that were resized across: as many as one row of the output needs, and two more.
    const int kept = down.taps + 2;
    uint8_t *ring = zeros(cinfo, kept * narrow), *finished = zeros(cinfo, narrow);
    uint8_t **rows = zeros(cinfo, kept * sizeof(uint8_t *));
    for (int y = 0, ready = 0; y < size; y++) {
        for (; ready < down.first[y] + down.count[y]; ready += 2) {
            uint8_t *two[2] = {ring + ready % kept * narrow, ring + (ready + 1) % kept * narrow};
            read_rows(cinfo, in, ready + 1 < height ? 2 : 1);
            resize_two(&across, crops, two, size);
        }
        for (int j = 0; j < down.taps; j++) rows[j] = ring + (down.first[y] + j) % kept * narrow;
        blend(rows, down.weights + y * down.taps, down.taps, down.places, stride, finished);
        memcpy(out + (size_t)y * stride, finished, stride);
    }
}

// Write the crop of an image, first divided by scale (1, 2, 4 or 8), into out, (size, size, 3). Return 0, or another
// number where anything is wrong or unusual: then out is undefined.
int crop_jpeg(const uint8_t *image, size_t length, int left, int top, int right, int bottom, int scale, int size,
              uint8_t *out)
{
    const struct crop crop = {left, top, right, bottom};
    struct jpeg_decompress_struct cinfo;
    struct failure failure;
    cinfo.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = leave;
    failure.manager.emit_message = leave_at_warning;
    if (setjmp(failure.exit)) {
        jpeg_destroy_decompress(&cinfo);
        return failure.manager.msg_code ? failure.manager.msg_code : UNUSUAL;
    }
    jpeg_create_decompress(&cinfo);
    jpeg_mem_src(&cinfo, image, length);
    jpeg_read_header(&cinfo, TRUE);
    cinfo.scale_num = 1, cinfo.scale_denom = scale;
    cinfo.out_color_space = JCS_RGB;
    int result = UNUSUAL;
    if (is_usual(&cinfo)) {
        jpeg_start_decompress(&cinfo);
        if (0 <= left && left < right && right <= (int)cinfo.output_width && 0 <= top && top < bottom &&
            bottom <= (int)cinfo.output_height && size > 0) {
            resize(&cinfo, &crop, size, out);
            result = 0;
        }
    }
    jpeg_destroy_decompress(&cinfo);
    return result;
}
#endif
