"""Triton source that stands beside the forward over a paged cache: asking for memory early, and joining what programs that share keys have left."""

# _ask: L2 fetches what lies at addresses; _ask_rows: every 64 bytes of rows of WIDTH numbers that lie ``step`` apart; _touch: L1 too, and nobody waits for it.
ASK = '''
@triton.jit
def _ask(p):
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // dummy $0", "=r,l", [p], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _touch(p):
    tl.inline_asm_elementwise("ld.global.ca.b32 $0, [$1];", "=r,l", [p], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _ask_rows(p, WIDTH: tl.constexpr, step):
    EACH: tl.constexpr = 512 // p.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((WIDTH + EACH - 1) // EACH)
    line = tl.minimum(tl.arange(0, LINES) * EACH, WIDTH - 1)
    _ask(p[:, None] + line[None, :] * step)
'''

# ``empty``: what a row without a visible key gives.
JOIN = '''
@triton.jit
def _join(PART, LSE, p_o, O_s2, row, SPLITS, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, FOLDED: tl.constexpr):
    """One row of o, at p_o, from what each split left of it: PART [rows, SPLITS, DV] and LSE [rows, SPLITS], to base 2 where FOLDED."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_dv = tl.arange(0, BLOCK_DV)
    base = row.to(tl.int64) * SPLITS
    m_i = tl.full((), float("-inf"), tl.float32)
    l_i = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for start in tl.range(0, SPLITS, BLOCK_S):
        inside = start + offs_s < SPLITS
        lse = tl.load(LSE + base + start + offs_s, mask=inside, other=float("-inf"))
        part = tl.load(
            PART + (base + start + offs_s)[:, None] * DV + offs_dv[None, :], mask=inside[:, None] & (offs_dv[None, :] < DV), other=0.0
        )
        if not FOLDED:
            lse = lse * 1.4426950408889634
        # a split without a visible key left nothing that counts
        part = tl.where((lse != float("-inf"))[:, None], part, 0.0)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        m_use = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(lse - m_use)
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(part * p[:, None], 0)
        m_i = m_new
    o = tl.where(l_i == 0.0, {empty}, acc / tl.where(l_i == 0.0, 1.0, l_i))
    tl.store(p_o + offs_dv * O_s2, o.to(p_o.dtype.element_ty), mask=offs_dv < DV)
'''

REDUCE = '''
@triton.jit(do_not_specialize=["Hq", "SPLITS"])
def paged_reduce(
    PART, LSE, O, O_s0, O_s1, O_s2, Hq, SPLITS,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, FOLDED: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):
    """One row of o [T, Hq, DV] a program."""
    row = tl.program_id(0)
    if PDL:
        if EARLY:
            # what comes behind may ask for its keys while the forward ends: it waits for this kernel, and this one for the forward
            gdc_launch_dependents()
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    _join(PART, LSE, O + (row // Hq).to(tl.int64) * O_s0 + (row % Hq) * O_s1, O_s2, row, SPLITS, DV, BLOCK_DV, BLOCK_S, FOLDED)
'''
