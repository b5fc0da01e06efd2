// SPDX-License-Identifier: Apache-2.0
// Calls crop_jpeg.c, which is compiled into this program, with images and calls from standard input; tests/fuzz.py
// compiles it with AddressSanitizer and UBSan, writes its input and reads what it prints: a line an image.

#include <sanitizer/asan_interface.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

size_t __sanitizer_get_current_allocated_bytes(void); // GCC ships no header that declares it

// Make any access beside what crop_jpeg.c allocates an error: libjpeg puts its own header before it and padding behind.
static void *zeros_alone(void *place, int value, size_t bytes)
{
    char name[1], *start, *end = (char *)place + bytes;
    size_t size;
    __asan_locate_address(place, name, sizeof name, (void **)&start, &size);
    __asan_poison_memory_region(start, (char *)place - start);
    __asan_poison_memory_region(end, start + size - end);
    return memset(place, value, bytes);
}

static int with_avx2; // where the processor has it; else both runs of a call are portable C
#define __builtin_cpu_supports(feature) (with_avx2 && __builtin_cpu_supports(feature))
#define memset zeros_alone // crop_jpeg.c calls it once, in zeros()
#include SOURCE
#undef memset

struct call {
    int32_t left, top, right, bottom, scale, size;
};

static void require(int holds, const char *what)
{
    if (holds) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

static void *read_exactly(size_t bytes) // into a buffer of its own, so that an access past its end is seen
{
    void *buffer = malloc(bytes);
    require(!bytes || fread(buffer, bytes, 1, stdin) == 1, "the input ends early");
    return buffer;
}

static uint32_t adler32(const uint8_t *bytes, size_t length)
{
    uint32_t sum = 1, sums = 0;
    for (size_t i = 0; i < length; i++) sum = (sum + bytes[i]) % 65521, sums = (sums + sum) % 65521;
    return sums << 16 | sum;
}

// Print what crop_jpeg returns and, where that is 0, the checksum of the pixels. AVX2 and portable C write over
// different bytes and must agree: so each byte of the output was written.
static void try_call(const uint8_t *image, size_t length, const struct call *call)
{
    size_t bytes = call->size > 0 ? (size_t)call->size * call->size * 3 : 0;
    uint8_t *out[2] = {malloc(bytes), malloc(bytes)};
    int results[2];
    for (with_avx2 = 0; with_avx2 < 2; with_avx2++) {
        memset(out[with_avx2], with_avx2 ? 0xff : 0, bytes);
        size_t before = __sanitizer_get_current_allocated_bytes();
        results[with_avx2] = crop_jpeg(image, length, call->left, call->top, call->right, call->bottom, call->scale,
                                       call->size, out[with_avx2]);
        require(__sanitizer_get_current_allocated_bytes() == before, "crop_jpeg did not free all that it allocated");
    }
    require(results[0] == results[1], "AVX2 and portable C return different results");
    require(results[0] || !memcmp(out[0], out[1], bytes), "AVX2 and portable C give different pixels");
    printf(" %d:%u", results[0], results[0] ? 0 : adler32(out[0], bytes));
    free(out[0]), free(out[1]);
}

int main(void)
{
    uint32_t head[2]; // bytes of the image, number of calls
    while (fread(head, sizeof head, 1, stdin) == 1) {
        uint8_t *image = read_exactly(head[0]);
        struct call *calls = read_exactly(head[1] * sizeof *calls);
        printf("%llu", (unsigned long long)jpeg_size(image, head[0]));
        for (uint32_t i = 0; i < head[1]; i++) try_call(image, head[0], calls + i);
        puts("");
        fflush(stdout); // after an error the number of lines tells which image it was
        free(image), free(calls);
    }
}
