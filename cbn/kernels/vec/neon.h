/* neon.h: what the AdvSIMD instructions of every 64-bit Arm do better than vec.h and sums.h. */

/* ---- vec.h ---- */

#define HAVE_UNPACK (BYTE || (HALF && !WIDENS))
#if HAVE_UNPACK
INLINE vec unpack(packed e)
{
#if BYTE
    uint32_t bytes;
    memcpy(&bytes, &e, sizeof bytes);
#if X_KIND == U8
    return (vec)vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes)))));
#else
    return (vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes)))));
#endif
#elif HALF == F16
    return (vec)vcvt_f32_f16((float16x4_t)e);
#else
    return (vec)vshll_n_u16((uint16x4_t)e, 16);
#endif
}
#endif

#define HAVE_PACK (HALF && !WIDENS)
#if HAVE_PACK
INLINE packed_out pack(vec v)
{
#if HALF == F16
    return (packed_out)vcvt_f16_f32((float32x4_t)v);
#else
    return (packed_out)vshrn_n_u32((uint32x4_t)rounded(v), 16);
#endif
}
#endif

#define HAVE_ANY_NAN 1
INLINE int any_nan(vec v)
{
    return vmaxvq_u32((uint32x4_t)(v != v)) != 0;
}

/* ---- sums.h ---- */

#define HAVE_LOAD_R HALF
#if SUMS && HAVE_LOAD_R
INLINE rvec load_r(const elem *p)
{
    uint32_t two;
    memcpy(&two, p, sizeof two);
#if HALF == F16
    return (rvec)vget_low_f32(vcvt_f32_f16(vcreate_f16(two)));
#else
    return (rvec)vget_low_u32(vshll_n_u16(vcreate_u16(two), 16));
#endif
}
#endif

#define HAVE_ROOTS 1
#if SUMS
INLINE dvec roots(dvec v)
{
    return (dvec)vsqrtq_f64((float64x2_t)v);
}
#endif

#define HAVE_WIDENED (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_WIDENED
INLINE dvec widened(rvec v)
{
    return (dvec)vcvt_f64_f32((float32x2_t)v);
}

INLINE dvec_bits widened_bits(rvec_bits b)
{
    return (dvec_bits)vmovl_s32((int32x2_t)b);
}

INLINE rvec narrowed(dvec v)
{
    return (rvec)vcvt_f32_f64((float64x2_t)v);
}
#endif

#define HAVE_JOINED (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_JOINED
INLINE vec joined(rvec low, rvec high)
{
    return (vec)vcombine_f32((float32x2_t)low, (float32x2_t)high);
}
#endif

#define HAVE_LOWER_D 1
#if SUMS && HALF
INLINE dvec lower_d(vec v)
{
    return (dvec)vcvt_f64_f32(vget_low_f32((float32x4_t)v));
}

INLINE dvec upper_d(vec v)
{
    return (dvec)vcvt_high_f64_f32((float32x4_t)v);
}
#endif

#define HAVE_PACK_D (HALF == F16)
#if SUMS && HAVE_PACK_D
INLINE packed_r pack_r(rvec v)
{
    const uint16x4_t bits = (uint16x4_t)vcvt_f16_f32(vcombine_f32((float32x2_t)v, (float32x2_t)v));
    packed_r e;
    memcpy(&e, &bits, sizeof e);
    return e;
}

INLINE packed_r pack_d(dvec v)
{
    return pack_r(narrowed(v));
}
#endif
