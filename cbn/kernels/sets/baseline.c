/* baseline.c: the loops for what every processor of the architecture has (x86-64: SSE2; others: 16 bytes). */
#define ISA baseline
#define TARGET
#define VEC_BYTES 16
#include "set.h"
