"""Attention over a paged cache: the reference and the generated kernels, against each request alone in float64."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnopt.errors import AttnoptError, BackendError
from attnopt.ir import expr as E
from attnopt.kernels import paged_batched
from attnopt.kernels.paged_choice import CacheSetting, choose
from attnopt.kernels.registry import BackendRefusal
from attnopt.kernels.tiling import Bounds
from tests.kernels.conftest import Run
from tests.kernels.paged import BY_CASE, CASES, MIXED, Paged, call, loads_of, one_by_one, paged, slots_of


@pytest.mark.parametrize("page_size", [16, 64, 5])
@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_reference(name: str, page_size: int) -> None:
    case = BY_CASE[name]
    p = paged(MIXED, page_size, Hkv=case.shape[2], loads=loads_of(case))
    torch.testing.assert_close(call(case, p).double(), one_by_one(case, p), atol=5e-6, rtol=5e-6)


UNEVEN = ((1, 70), (1, 3), (0, 0), (1, 33), (1, 1), (1, 40), (1, 64))
"""One query each, of requests too uneven to be read side by side; one that has none."""


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_batched(name: str) -> None:
    case = BY_CASE[name]
    for page_size, lengths in ((16, MIXED), (5, UNEVEN), (16, UNEVEN), (16, ((1, 32),) * 7)):
        p = paged(lengths, page_size, Hkv=case.shape[2], loads=loads_of(case))
        if name in ("by-request-padding-zero", "bottom-right"):
            with pytest.raises(BackendRefusal, match="a query may see no key"):
                call(case, p, "batched")
        else:
            torch.testing.assert_close(call(case, p, "batched").double(), one_by_one(case, p), atol=5e-6, rtol=5e-6)


def test_batched_is_what_auto_takes_on_a_cpu() -> None:
    case = BY_CASE["softcap-window-sinks"]
    setting = CacheSetting("cpu", torch.float32, 16, 16, 16)
    assert choose(case.spec(), setting)[0] == "batched"
    assert choose(case.spec(), replace(setting, device="cuda", page_size=24))[0] == "reference"
    with pytest.raises(BackendRefusal, match="it reads lengths on the host, and the tensors are on cuda"):
        choose(case.spec(), replace(setting, device="cuda"), "batched")


def test_a_plan_is_for_its_lengths_and_pages() -> None:
    case = BY_CASE["window"]
    p = paged(((1, 40), (1, 64)), 16)
    for _ in range(2):  # what is kept of a call is not what the next one reads
        torch.testing.assert_close(call(case, p, "batched").double(), one_by_one(case, p), atol=5e-6, rtol=5e-6)
    want = call(case, p)
    p.seqlens_k[1] -= 3
    shorter = call(case, p, "batched")
    torch.testing.assert_close(shorter, call(case, p), atol=5e-6, rtol=5e-6)
    assert not torch.allclose(shorter[1], want[1], atol=1e-3)
    p.seqlens_k[1] += 3
    p.block_table[0], p.block_table[1] = p.block_table[1].clone(), p.block_table[0].clone()  # 40 keys of the second, 64 slots of which the first has 40
    p.seqlens_k[1] = 40
    swapped = call(case, p, "batched")
    torch.testing.assert_close(swapped, call(case, p), atol=5e-6, rtol=5e-6)
    assert not torch.allclose(swapped, want, atol=1e-3)


def test_only_a_few_plans_are_kept() -> None:
    memos = [paged_batched.Memo() for _ in range(2 * paged_batched.Memo.MOST)]
    for memo in memos:
        memo.keep(None)  # type: ignore[arg-type]
        memo.plan = memo  # type: ignore[assignment]
    paged_batched.Memo().keep(None)  # type: ignore[arg-type]
    assert sum(m.plan is not None for m in memos) < paged_batched.Memo.MOST


@pytest.mark.parametrize("backend", ["reference", "batched"])
def test_float64_and_half(backend: str) -> None:
    case = BY_CASE["window"]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        p = paged(MIXED, 16, dtype)
        o = call(case, p, backend)
        assert o.dtype == dtype
        torch.testing.assert_close(o.double(), one_by_one(case, p), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "batched"])
def test_pages_before_a_window_are_not_read(backend: str) -> None:
    case = BY_CASE["window"]  # 20 keys to the left
    p = paged(((1, 65), (3, 70), (1, 66)), 16)
    want = call(case, p, backend)
    p.give_away(2)  # keys 0..31: the query at 64 sees keys from 44 on
    assert torch.equal(call(case, p, backend), want)


@pytest.mark.parametrize("backend", ["reference", "batched"])
def test_tokens_of_no_request_are_zero(backend: str) -> None:
    case = BY_CASE["causal"]
    p = paged(MIXED, 16)
    more = Paged(torch.cat([p.q, torch.full_like(p.q[:3], torch.nan)]), *p.arguments[1:], p.loads, p.keys, p.values)
    o = call(case, more, backend)
    assert not o[-3:].any() and torch.equal(o[:-3], call(case, p, backend))


@pytest.mark.parametrize("backend", ["reference", "batched"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_quantized_cache(dtype: torch.dtype, backend: str) -> None:
    case = BY_CASE["causal"]
    p = paged(MIXED, 16)
    k8, v8 = (torch.zeros(x.shape, dtype=torch.uint8).view(dtype) for x in (p.k_cache, p.v_cache))
    ks, vs = (torch.full(p.k_cache.shape[:3], torch.nan) for _ in range(2))
    slots = slots_of(p)
    torch.ops.attnopt.cache_write(torch.cat(p.keys), torch.cat(p.values), k8, v8, slots, ks, vs)
    o: Tensor = torch.ops.attnopt.paged_attention(p.q, k8, v8, *p.arguments[3:], p.loads, [], case.spec().to_json(), backend, ks, vs)
    # exact for what the cache holds; its numbers are within half a step of the originals
    wide = [(x.float() * s.unsqueeze(-1)) for x, s in ((k8, ks), (v8, vs))]
    again: Tensor = torch.ops.attnopt.paged_attention(p.q, *wide, *p.arguments[3:], p.loads, [], case.spec().to_json(), "reference")
    torch.testing.assert_close(o, again, atol=1e-6, rtol=1e-6)
    step = 0.5 / 127 if dtype == torch.int8 else 1 / 16
    held, given = wide[0].flatten(0, 1)[slots], torch.cat(p.keys)
    most = given.abs().amax(-1, keepdim=True)
    assert bool(((held - given).abs() <= (most if dtype == torch.int8 else given.abs() + most / 448) * step * 1.001).all())


def test_cache_write_leaves_out_negative_slots() -> None:
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 4)
    k_cache, v_cache = torch.full((3, 16, 2, 8), 7.0), torch.full((3, 16, 2, 4), 7.0)
    torch.ops.attnopt.cache_write(k, v, k_cache, v_cache, torch.tensor([33, -1, 0, 17]))
    for x, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[[33, 0, 17]], x[[0, 2, 3]])
        assert int((flat == 7.0).all(-1).all(-1).sum()) == 45


def test_operators_are_registered_as_they_behave() -> None:
    case = BY_CASE["causal"]
    p = paged(MIXED, 16)
    for backend in ("reference", "batched"):
        torch.library.opcheck(torch.ops.attnopt.paged_attention.default, (*p.arguments, [], [], case.spec().to_json(), backend))
    k, v = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    slots = torch.tensor([1, -1, 20])
    torch.library.opcheck(torch.ops.attnopt.cache_write.default, (k, v, p.k_cache.zero_(), p.v_cache.zero_(), slots))


def test_a_request_longer_than_what_is_read_by_position() -> None:
    case = BY_CASE["bias-by-key"]
    p = paged(((1, 71), (1, 5)), 16, loads=loads_of(case))
    for backend in ("reference", "batched"):
        with pytest.raises(AttnoptError, match=r"A request has 71 keys, and load0 \(70,\), which is read by position, has 70 positions"):
            call(case, p, backend)


def test_what_does_not_fit_is_named() -> None:
    case = BY_CASE["by-request-prefix"]
    p = paged(MIXED, 16, loads=loads_of(case))
    spec = case.spec().to_json()
    attend = torch.ops.attnopt.paged_attention
    with pytest.raises(AttnoptError, match=r"block_table \(7, 7\), cu_seqlens_q \(8,\) and seqlens_k \(6,\) do not fit"):
        attend(*p.arguments[:5], p.seqlens_k[:6], p.loads, [], spec)
    with pytest.raises(AttnoptError, match="block_table is int64; it must be int32"):
        attend(*p.arguments[:3], p.block_table.long(), *p.arguments[4:], p.loads, [], spec)
    with pytest.raises(AttnoptError, match=r"is read by request, of which there are 7"):
        attend(*p.arguments, [p.loads[0][:6]], [], spec)
    with pytest.raises(AttnoptError, match="reads 1 tensors beside q, k and v, and was given 0"):
        attend(*p.arguments, [], [], spec)
    with pytest.raises(AttnoptError, match="q is float16 and the caches without scales are float32"):
        attend(p.q.half(), *p.arguments[1:], p.loads, [], spec)
    with pytest.raises(AttnoptError, match="needs k_scale and v_scale"):
        attend(p.q, p.k_cache.to(torch.int8), p.v_cache.to(torch.int8), *p.arguments[3:], p.loads, [], spec)
    with pytest.raises(BackendError, match="There is no backend 'flash' for a paged cache; the backends are triton, batched, reference, and 'auto'"):
        attend(*p.arguments, p.loads, [], spec, "flash")
    with pytest.raises(AttnoptError, match=r"each token has one slot"):
        torch.ops.attnopt.cache_write(p.keys[0], p.values[0], p.k_cache, p.v_cache, torch.tensor([0]))


# ------------------------------------------------------------------------------------------------ how the generated kernels cut their work


def test_splits_fill_the_device() -> None:
    launch_paged = pytest.importorskip("attnopt.kernels.triton.launch_paged", reason="triton is not installed")
    processors, room = 132, 132 * 3
    for programs, blocks in ((8, 2048), (8, 256), (128, 128), (200, 32), (300, 32), (512, 128), (1024, 32), (1, 1), (1, 100_000), (3, 17)):
        n = launch_paged.splits(programs, blocks, room, processors)
        each = -(-blocks // n)
        assert 1 <= n <= max(1, blocks // 2)
        assert (n - 1) * each < blocks, "a split without a block"
        # nobody waits for a last round that is nearly empty, as far as whole blocks allow
        assert programs * n / room / -(-programs * n // room) >= 0.85 or programs >= 2 * room or each <= 3, (programs, blocks, n)
    assert launch_paged.splits(1024, 128, room, processors) == 1
    assert launch_paged.splits(128, 128, room, processors) == 3
    # little for each: one program on each multiprocessor, and less to join
    assert launch_paged.splits(8, 128, room, processors) == 16
    assert launch_paged.splits(8, 16, room, processors) == 8
    assert launch_paged.splits(128, 8, room, processors) == 1
    # not where a program has much to compute
    assert launch_paged.splits(8, 128, room, 0) == 43


def test_a_contiguous_cache_is_read_by_one_program_on_each_multiprocessor() -> None:
    launch_paged = pytest.importorskip("attnopt.kernels.triton.launch_paged", reason="triton is not installed")

    def found(programs: int, blocks: int, contiguous: bool = True) -> int:
        n: int = launch_paged.splits(programs, blocks, 132 * 3, 132, contiguous)
        return n

    assert [found(n, 2048) for n in (8, 16, 64, 128)] == [16, 8, 2, 1]
    assert found(128, 128) == found(104, 128) == 1 and found(8, 128) == 16
    # not where a third of the multiprocessors would have none, nor where there are more tiles than multiprocessors
    assert found(80, 128) == found(80, 128, False) > 1 and found(136, 128) == found(136, 128, False) > 1
    assert found(8, 2048, False) > 16


def test_blocks_of_many_long_tiles() -> None:
    launch_paged = pytest.importorskip("attnopt.kernels.triton.launch_paged", reason="triton is not installed")
    memory = 227 * 1024

    def rows(D: int, groups: int, queries: int, dtype: torch.dtype, keys: int, memory: int = memory) -> int:
        c = launch_paged.config(D, D, groups, queries, dtype, memory)
        large = launch_paged.for_many_tiles(c, D, D, dtype.itemsize, keys, memory)
        if large.BLOCK_N == 128:  # one program fills a multiprocessor: from two tiles on each none are split
            assert launch_paged.programs_each(large, D, D, 2, memory) == 1 and launch_paged.splits(264, 64, 132, 132, True) == 1
        n: int = large.BLOCK_N
        return n

    assert rows(128, 4, 1, torch.bfloat16, 8192) == rows(128, 1, 1, torch.float16, 2048) == 128
    assert rows(128, 4, 1, torch.bfloat16, 2047) == rows(128, 4, 5, torch.bfloat16, 8192) == rows(64, 4, 1, torch.bfloat16, 8192) == 64
    assert rows(128, 4, 1, torch.bfloat16, 8192, 163 * 1024) == 64 and rows(128, 4, 1, torch.float32, 8192) == 32


def test_blocks_of_bytes() -> None:
    launch_paged = pytest.importorskip("attnopt.kernels.triton.launch_paged", reason="triton is not installed")
    memory = 227 * 1024

    def found(D: int, queries: int, memory: int = memory, tiles: float = 1) -> tuple[int, int]:
        c = launch_paged.for_bytes(launch_paged.config(D, D, 4, queries, torch.bfloat16, memory), D, D, tiles, memory)
        return c.BLOCK_N, launch_paged.programs_each(c, D, D, 1, memory)

    assert found(128, 1) == (128, 2)
    assert found(64, 1)[0] == found(128, 40)[0] == found(128, 1, 163 * 1024)[0] == found(128, 1, tiles=4)[0] == 64
    # two to a tile though its tiles alone would fill two rounds, one where it fills more
    assert launch_paged.splits(128, 64, 264, 0, least=1) == launch_paged.splits(512, 64, 264, 0, least=2) == 2
    assert launch_paged.splits(512, 64, 264, 0) == launch_paged.splits(1024, 16, 264, 0, least=2) == 1
    assert launch_paged.splits(300, 1, 264, 0, least=2) == 1


def test_room_for_programs() -> None:
    launch_paged = pytest.importorskip("attnopt.kernels.triton.launch_paged", reason="triton is not installed")
    c = launch_paged.config(128, 128, 4, 1, torch.bfloat16, 227 * 1024)
    assert c.one_query and c.BLOCK_Q == 1 and c.BLOCK_M == 16
    assert launch_paged.programs_each(c, 128, 128, 2, 227 * 1024) == 3
    assert launch_paged.programs_each(c, 128, 128, 1, 227 * 1024) == 3
    assert launch_paged.programs_each(c, 256, 256, 2, 64 * 1024) == 1
    latents = launch_paged.config(576, 512, 128, 1, torch.bfloat16, 227 * 1024, True)
    assert launch_paged.programs_each(latents, 576, 0, 2, 227 * 1024) == 1
    assert launch_paged.config(128, 128, 4, 5, torch.bfloat16, 227 * 1024).BLOCK_Q == 8


@pytest.mark.parametrize(
    ("D", "parts"), [(16, (16, 0)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (192, (128, 64)), (576, (512, 64)), (8, (16, 0)), (40, (32, 16))]
)
def test_a_head_is_made_up_of_two_blocks(D: int, parts: tuple[int, int]) -> None:
    launch_paged = pytest.importorskip("attnopt.kernels.triton.launch_paged", reason="triton is not installed")
    assert launch_paged.head_parts(D) == parts and sum(parts) >= D


def test_a_window_bounds_what_a_tile_reads() -> None:
    launch_paged = pytest.importorskip("attnopt.kernels.triton.launch_paged", reason="triton is not installed")
    assert launch_paged.reach(Bounds(None, 0, E.TRUE), None, 4, 4096) == 4096
    assert launch_paged.reach(Bounds(127, 0, E.TRUE), None, 4, 4096) == 131
    assert launch_paged.reach(Bounds(None, 0, E.TRUE), 256, 4, 4096) == 260
    assert launch_paged.reach(Bounds(127, None, E.TRUE), None, 4, 4096) == 4096


# ------------------------------------------------------------------------------------------------ the generated kernels, interpreted

WIDE_PAGES = ("window", "by-request-padding-zero")
"""Cases that are also tried where a block of keys is a part of a page."""


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_triton(interpreted: Run, name: str) -> None:
    interpreted("paged", "case", name, "float32", "16")


@pytest.mark.parametrize("name", WIDE_PAGES)
def test_triton_with_wide_pages(interpreted: Run, name: str) -> None:
    interpreted("paged", "case", name, "float32", "64")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_triton_in_half_precision(interpreted: Run, dtype: str) -> None:
    interpreted("paged", "case", "softcap-window-sinks", dtype, "16")


@pytest.mark.parametrize("name", ["sinks-causal-GQA", "bias-by-key"])
def test_any_number_of_splits(interpreted: Run, name: str) -> None:
    interpreted("paged", "splits", name)


@pytest.mark.parametrize("heads", ["4-4-16-16", "6-2-24-40", "5-1-80-16", "34-1-16-16"])
def test_any_heads(interpreted: Run, heads: str) -> None:
    interpreted("paged", "heads", *heads.split("-"), "16")


def test_latents(interpreted: Run) -> None:
    interpreted("paged", "latents", "")


@pytest.mark.parametrize("name", ["softcap-window-sinks"])
def test_chunks(interpreted: Run, name: str) -> None:
    interpreted("paged", "chunks", name)


def test_more_queries_than_keys(interpreted: Run) -> None:
    interpreted("paged", "more-queries-than-keys", "")


def test_refusals(interpreted: Run) -> None:
    interpreted("paged", "refusals", "")


def test_nothing_else_is_read(interpreted: Run) -> None:
    interpreted("paged", "nothing-else-is-read", "")


@pytest.mark.parametrize("cache", ["int8-float16", "float8_e4m3fn-float32"])
def test_quantized(interpreted: Run, cache: str) -> None:
    interpreted("paged", "quantized", *cache.split("-"))


@pytest.mark.parametrize("cache", ["int8-float16-64-40", "int8-bfloat16-32-32", "float8_e4m3fn-float16-32-32", "float8_e4m3fn-bfloat16-64-40"])
def test_quantized_in_words_of_two(interpreted: Run, cache: str) -> None:
    interpreted("paged", "quantized", *cache.split("-"))


@pytest.mark.parametrize("cache", ["int8-bfloat16-window", "float8_e4m3fn-float16-sinks-causal-GQA", "float8_e4m3fn-bfloat16-sinks-causal-GQA"])
def test_quantized_in_float16(interpreted: Run, cache: str) -> None:
    interpreted("paged", "in-float16", *cache.split("-", 2))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_words_are_taken_apart_exactly(kind: str) -> None:
    """The PTX in ``halves``, step by step, on every word of two numbers: what the cache's dtype means."""
    halves = pytest.importorskip("attnopt.kernels.triton.halves", reason="triton is not installed")
    words = torch.arange(1 << 16).to(torch.uint16)
    pairs = words.view(torch.float8_e4m3fn if kind == "fp8" else torch.int8).view(-1, 2).double()
    for place, found in enumerate(emulate(halves.HALVES, kind, words)):
        want = pairs[:, place]
        known = ~want.isnan()  # a NaN has a scale of NaN
        assert torch.equal(found.double()[known], want[known])


def emulate(text: str, kind: str, words: Tensor) -> list[Tensor]:
    """Runs the PTX of one of the functions, with another word in the upper half of a register; both results, lower halves."""
    body = text.split(f"def _halves_{kind}(")[1].split("@triton.jit")[0]
    steps = body.split('"""')[1]
    value = words.to(torch.int64)
    other = (value * 40503 + 77) & 0xFFFF  # takes every value too
    registers: dict[str, Tensor] = {"$2": value | other << 16}
    for line in (x.strip().rstrip(";") for x in steps.splitlines()):
        if not line or line in "{}" or line.startswith(".reg"):
            continue
        name, rest = line.split(None, 1)
        if name == "mov.b32" and rest.startswith("{"):
            low, high, source = re.fullmatch(r"\{(\w+), (\w+)\}, (\w+)", rest).groups()  # type: ignore[union-attr]
            registers |= {low: registers[source] & 0xFFFF, high: registers[source] >> 16}
            continue
        into, *given = (x.strip() for x in rest.split(","))
        a, *more = (registers[x] if x in registers else torch.tensor(int(x, 0)) for x in given)
        if name == "mov.b32":
            out = a.expand_as(value)
        elif name == "shr.u32":
            out = a >> more[0]
        elif name == "lop3.b32":
            b, c, table = more
            assert int(table) == 0x6A
            out = (a & b) ^ c
        elif name == "prmt.b32":  # of each byte of the result, which of the eight of a and b it is
            bytes_ = [(a >> 8 * n) & 0xFF for n in range(4)] + [(more[0] >> 8 * n) & 0xFF for n in range(4)]
            out = sum((bytes_[(int(more[1]) >> 4 * n) & 7] << 8 * n for n in range(4)), torch.zeros_like(value))
        elif name == "cvt.rn.f16x2.e4m3x2":
            pair = a.to(torch.uint16).view(torch.float8_e4m3fn).view(-1, 2)
            out = _bits(pair[:, 0]) | _bits(pair[:, 1]) << 16
        else:
            assert name == "sub.f16x2", name
            out = _bits(_low(a) - _low(more[0])) | _bits(_low(a >> 16) - _low(more[0] >> 16)) << 16
        registers[into] = out
    for name in ("$0", "$1"):
        # the upper half is made of the other word as the lower is of this one
        order = torch.empty(1 << 16, dtype=torch.int64)
        order[value] = registers[name] & 0xFFFF
        assert torch.equal(registers[name] >> 16, order[other]), "a word reaches into its neighbour"
    return [_low(registers[n]) for n in ("$0", "$1")]


def _low(x: Tensor) -> Tensor:
    return (x & 0xFFFF).to(torch.uint16).view(torch.float16)


def _bits(x: Tensor) -> Tensor:
    return x.to(torch.float16).view(torch.uint16).to(torch.int64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write(interpreted: Run, dtype: str) -> None:
    interpreted("paged", "write", dtype)
