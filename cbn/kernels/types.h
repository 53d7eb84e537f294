/* types.h: the element types. A type is one word, TYPE, and a row of the table; every other macro follows from the two.
 *
 * To add one: its row, a line in TYPES, its inclusion at the end of this file; a member of cbn_isa in kernels.h and
 * kernels.pxd. A new kind of number also needs `unpack` and `pack` in vec/, and above the loops its Element: CONTRIBUTING.md
 * has every place.
 */

/* The kinds of number, and their types in C. A 16-bit number is handled as its bits. */
#define F32 1
#define C_TYPE_1 float
#define F64 2
#define C_TYPE_2 double
#define BF16 3
#define C_TYPE_3 uint16_t
#define F16 4
#define C_TYPE_4 uint16_t
#define U8 5
#define C_TYPE_5 uint8_t
#define I8 6
#define C_TYPE_6 int8_t

/*                       x     arithmetic  y and z */
#define TYPE_f32         F32,  F32,        F32
#define TYPE_f32_in_f64  F32,  F64,        F32
#define TYPE_f64         F64,  F64,        F64
#define TYPE_bf16        BF16, F32,        BF16
#define TYPE_bf16_in_f64 BF16, F64,        BF16
#define TYPE_f16         F16,  F32,        F16
#define TYPE_f16_in_f64  F16,  F64,        F16
#define TYPE_u8_f32      U8,   F32,        F32
#define TYPE_u8_bf16     U8,   F32,        BF16
#define TYPE_i8_f32      I8,   F32,        F32
#define TYPE_i8_bf16     I8,   F32,        BF16

/* All of them: `shared(type)` for those without bfloat16 arithmetic, whose loops a set may take from its BASE, and
 * `own(type)` for the others. */
#define TYPES(shared, own)                                                                                      \
    shared(f32) shared(f32_in_f64) shared(f64) shared(bf16_in_f64) shared(f16) shared(f16_in_f64) shared(u8_f32) \
    shared(i8_f32) own(bf16) own(u8_bf16) own(i8_bf16) shared(sums_u8) shared(sums_i8) shared(sums_u16)          \
    shared(sums_i16) shared(sums_i32)

#define ROW_(type) TYPE_##type
#define ROW(type) ROW_(type)
#define COLUMN_1_(x, arithmetic, y) x
#define COLUMN_2_(x, arithmetic, y) arithmetic
#define COLUMN_3_(x, arithmetic, y) y
#define COLUMN_1(row) COLUMN_1_(row)
#define COLUMN_2(row) COLUMN_2_(row)
#define COLUMN_3(row) COLUMN_3_(row)
#define C_TYPE_(kind) C_TYPE_##kind
#define C_TYPE(kind) C_TYPE_(kind)

/* What follows from TYPE. */
#define X_KIND COLUMN_1(ROW(TYPE))
#define REAL_KIND COLUMN_2(ROW(TYPE))
#define Y_KIND COLUMN_3(ROW(TYPE))
#define ELEM C_TYPE(X_KIND)    /* an element of x in memory */
#define REAL C_TYPE(REAL_KIND) /* the arithmetic of apply */
#define OUT C_TYPE(Y_KIND)     /* an element of y and of the residual in memory */
#define ELEM_IS_DOUBLE (X_KIND == F64)
#define BYTE (X_KIND == U8 || X_KIND == I8)                   /* forward apply alone */
#define HALF (Y_KIND == BF16 || Y_KIND == F16 ? Y_KIND : 0)   /* the 16-bit kind that y is; or 0 */
#define WIDENS (REAL_KIND == F64 && X_KIND != F64)            /* float64 arithmetic on smaller elements: apply alone */
#define SUMS (!BYTE && !WIDENS)                               /* the reductions too */

#ifndef BASE
#define TYPE f32
#include "loops/loops.h"
#define TYPE f32_in_f64
#include "loops/loops.h"
#define TYPE f64
#include "loops/loops.h"
#define TYPE bf16_in_f64
#include "loops/loops.h"
#define TYPE f16
#include "loops/loops.h"
#define TYPE f16_in_f64
#include "loops/loops.h"
#define TYPE u8_f32
#include "loops/loops.h"
#define TYPE i8_f32
#include "loops/loops.h"
#endif
#define TYPE bf16
#include "loops/loops.h"
#define TYPE u8_bf16
#include "loops/loops.h"
#define TYPE i8_bf16
#include "loops/loops.h"

/* The integers, for exact sums alone; see loops/integers.h. */
#ifndef BASE
#define TYPE sums_u8
#define INT uint8_t
#define SUM uint16_t
#define SQUARE uint16_t
#define MANY int32_t
#define SQUARES uint32_t
#include "loops/integers.h"
#define TYPE sums_i8
#define INT int8_t
#define SUM int16_t
#define SQUARE uint16_t
#define MANY int32_t
#define SQUARES uint32_t
#include "loops/integers.h"
#define TYPE sums_u16
#define INT uint16_t
#define SUM uint32_t
#define SQUARE uint32_t
#define MANY int64_t
#define SQUARES uint64_t
#include "loops/integers.h"
#define TYPE sums_i16
#define INT int16_t
#define SUM int32_t
#define SQUARE uint32_t
#define MANY int64_t
#define SQUARES uint64_t
#include "loops/integers.h"
#define TYPE sums_i32
#define INT int32_t
#define SUM int64_t
#define SQUARE uint32_t
#define MANY int64_t
#define SQUARES uint64_t
#include "loops/integers.h"
#endif
