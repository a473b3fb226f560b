"""Two numbers of a quantized cache at once: what a 16-bit word of two neighbours means, as two tensors of the dtype of the query.

Tensor cores want operands of 16 bits, and a copy from shared memory that lays them out transposed moves 16 bits at a time too. So a cache of bytes is read as words of
two, laid out as words, and taken apart last, in registers. Taken apart one number at a time, by conversions at a quarter of the rate, a cache of
half the size takes longer than the whole one.

fp8 (e4m3): sign, 4 bits of exponent, 3 of mantissa are put where a wider dtype has its own, its further bits zero. The exponents differ by a constant factor, 2**-120 for bfloat16
and 2**-8 for float16, which callers multiply back; subnormal numbers come out right with it. A NaN becomes a number: the scale of a row with NaN is NaN.
int8: bits are put below those of a power of two, which is then subtracted: exact in both dtypes.
"""

HALF = {"fp8-half": "_halves_cvt", "int8-half": "_halves_int8"}
PACKED = ("fp8", "int8", *HALF)


def _fp8(left: int, right: int, mask: int) -> str:
    """PTX: of each byte, the sign stays at the top, and exponent and mantissa (``mask``) go ``left`` bits up from a lower byte, ``right`` bits down from a higher one."""
    return f"""
                {{
                    .reg .b32 a, b, s, t;
                    shl.b32 a, $2, {left};
                    shl.b32 s, $2, 8;
                    and.b32 s, s, 0x80008000;
                    lop3.b32 $0, a, {mask:#010x}, s, 0xea;
                    shr.u32 b, $2, {right};
                    and.b32 t, $2, 0x80008000;
                    lop3.b32 $1, b, {mask:#010x}, t, 0xea;
                }}
                """


# In each: w [..] int16 -> (lower, higher). With ASM two words at a time, in PTX of sm_90; without, the same steps in Triton, for the interpreter.
HALVES = '''
@triton.jit
def _halves_fp8(w, WIDE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if WIDE == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """<BFLOAT16>""",
                "=&r,=&r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                """<FLOAT16>""",
                "=&r,=&r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )
    else:
        bits = w.to(tl.int32)
        if WIDE == tl.bfloat16:
            lower = ((bits << 4) & 0x07F0) | ((bits << 8) & 0x8000)
            higher = ((bits >> 4) & 0x07F0) | (bits & 0x8000)
        else:
            lower = ((bits << 7) & 0x3F80) | ((bits << 8) & 0x8000)
            higher = ((bits >> 1) & 0x3F80) | (bits & 0x8000)
        return lower.to(tl.int16).to(WIDE, bitcast=True), higher.to(tl.int16).to(WIDE, bitcast=True)


@triton.jit
def _halves_int8(w, WIDE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if WIDE == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """
                {
                    .reg .b32 a, b, h, m;
                    mov.b32 m, 0x43004300;
                    shr.u32 h, $2, 8;
                    lop3.b32 a, $2, 0x007f007f, m, 0xea;
                    lop3.b32 b, $2, 0x00800080, m, 0xea;
                    sub.bf16x2 $0, a, b;
                    lop3.b32 a, h, 0x007f007f, m, 0xea;
                    lop3.b32 b, h, 0x00800080, m, 0xea;
                    sub.bf16x2 $1, a, b;
                }
                """,
                "=&r,=&r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )
        else:
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
        return lower.to(tl.float32).to(WIDE), higher.to(tl.float32).to(WIDE)


@triton.jit
def _halves_cvt(w, WIDE: tl.constexpr, ASM: tl.constexpr):
    tl.static_assert(WIDE == tl.float16)
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
        lower, higher = _halves_fp8(w, WIDE, ASM)
        return (lower.to(tl.float32) * 256.0).to(WIDE), (higher.to(tl.float32) * 256.0).to(WIDE)
'''.replace("<BFLOAT16>", _fp8(4, 4, 0x07F007F0)).replace("<FLOAT16>", _fp8(7, 1, 0x3F803F80))
