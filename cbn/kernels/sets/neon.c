/* neon.c: the loops for AdvSIMD, which every 64-bit Arm has. */
#include <arm_neon.h>
#define ISA neon
#define TARGET
#define VEC_BYTES 16
#define VEC_HEADER "vec/neon.h"
#include "set.h"
