"""Two numbers of a quantized cache at once: what a 16-bit word of two neighbours means, as two tensors of float16.

Tensor cores want operands of 16 bits, and a copy from shared memory that lays them out transposed moves 16 bits at a time too. So a cache of bytes is read as words of
two, laid out as words, and taken apart last, in registers. Taken apart one number at a time, by conversions at a quarter of the rate, a cache of
half the size takes longer than the whole one. Both kinds are exact: float16 has every number of either.

fp8 (e4m3): an instruction of sm_89 takes two neighbours at once. Without it, sign, 4 bits of exponent and 3 of mantissa are put where float16 has its own, and multiplied by 256, by which
the exponents differ; subnormal numbers come out right with it. A NaN may become a number: the scale of a row with NaN is NaN.
int8: bits are put below those of a power of two, which is then subtracted.
"""

PACKED = ("fp8", "int8")

# In each: w [..] int16 -> (lower, higher). With ASM two words at a time, in PTX of sm_90; without, the same in Triton, for the interpreter and older devices.
HALVES = '''
@triton.jit
def _halves_fp8(w, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 a;
                .reg .b16 l, h;
                prmt.b32 a, $2, 0, 0x3120;
                mov.b32 {l, h}, a;
                cvt.rn.f16x2.e4m3x2 $0, l;
                cvt.rn.f16x2.e4m3x2 $1, h;
            }
            """,
            "=&r,=&r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )
    else:
        bits = w.to(tl.int32)
        lower = ((bits << 7) & 0x3F80) | ((bits << 8) & 0x8000)
        higher = ((bits >> 1) & 0x3F80) | (bits & 0x8000)
        lower = lower.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        higher = higher.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return lower.to(tl.float16), higher.to(tl.float16)


@triton.jit
def _halves_int8(w, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 a, b, m;
                mov.b32 m, 0x64806480;
                shr.u32 b, $2, 8;
                lop3.b32 a, $2, 0x00ff00ff, m, 0x6a;
                lop3.b32 b, b, 0x00ff00ff, m, 0x6a;
                sub.f16x2 $0, a, m;
                sub.f16x2 $1, b, m;
            }
            """,
            "=&r,=&r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )
    else:
        higher = w.to(tl.int32) >> 8
        lower = (w.to(tl.int32) << 24) >> 24
        return lower.to(tl.float16), higher.to(tl.float16)
'''
