/* half.h: the 16-bit types, an element at a time. Vectors of them are in vec.h.
 *
 * bfloat16 is the upper half of a float32. float16 (IEEE 754 binary16) has 5 bits of exponent and 10 of mantissa; its
 * numbers below 2^-14 are multiples of 2^-24. Rounding is to nearest, ties to even; NaN stays NaN and becomes quiet.
 */
#ifndef CBN_HALF_H
#define CBN_HALF_H
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float cbn_float_of(uint32_t bits)
{
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
}

static inline uint32_t cbn_bits_of(float a)
{
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}

static inline float cbn_from_bf16(uint16_t e)
{
    return cbn_float_of((uint32_t)e << 16);
}

static inline uint16_t cbn_to_bf16(float a)
{
    const uint32_t bits = cbn_bits_of(a);
    if (a != a)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float cbn_from_f16(uint16_t e)
{
    const uint32_t sign = (uint32_t)(e & 0x8000) << 16, exponent = e >> 10 & 0x1f, mantissa = e & 0x3ff;
    float a;
    if (exponent == 0)
        a = (float)mantissa * 0x1p-24f;
    else if (exponent == 0x1f)
        a = cbn_float_of(0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
    else
        a = cbn_float_of((exponent + 127 - 15) << 23 | mantissa << 13);
    return cbn_float_of(cbn_bits_of(a) | sign);
}

/* The same of finite numbers, without branches: 0 of all others. */
static inline float cbn_finite_f16(uint16_t e)
{
    const uint32_t above = e & 0x7fff, keep = -(uint32_t)(above < 0x7c00);
    return cbn_float_of(((uint32_t)(e & 0x8000) << 16 | above << 13) & keep) * 0x1p112f;
}

/* The nearest number with the digits of a float16, whatever its exponent. */
static inline float cbn_with_digits_of_f16(float a)
{
    const uint32_t bits = cbn_bits_of(a);
    return cbn_float_of((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

static inline uint16_t cbn_to_f16(float a)
{
    const uint32_t bits = cbn_bits_of(a), sign = bits >> 16 & 0x8000, above = bits & 0x7fffffff;
    if (a != a)
        return (uint16_t)(sign | 0x7e00 | (above >> 13 & 0x1ff));
    if (above >= 0x477ff000) /* 65520, halfway from the largest number to 65536 */
        return (uint16_t)(sign | 0x7c00);
    if (above < 0x38800000) /* 2^-14: counted in 2^-24, which is what 0.5 + a rounds to */
        return (uint16_t)(sign | (cbn_bits_of(0.5f + cbn_float_of(above)) - cbn_bits_of(0.5f)));
    return (uint16_t)(sign | ((above - ((uint32_t)(127 - 15) << 23) + 0xfff + (above >> 13 & 1)) >> 13));
}

#endif
