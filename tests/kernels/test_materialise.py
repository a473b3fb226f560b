"""What PyTorch computes ahead of a kernel, and how large it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.errors import BackendError
from attnopt.ir import expr as E
from attnopt.kernels.materialise import QUERIES, materialise, part_tensor
from attnopt.kernels.triton.flash_forward import generate
from tests.kernels.cases import BY_NAME, CASES, bucket, dims, t5

SHAPE = (2, 3, 3, 5, 9, 4, 4)
D = dims(SHAPE)


def test_a_bucket_of_the_distance_becomes_a_table_over_distances() -> None:
    (score,), parts = materialise((t5(D, E.score()),), 1)
    (part,) = parts
    assert part.axes == "hd"
    distance = E.add(E.sub(D.k, D.q), E.sub(QUERIES, E.ONE))
    assert score is E.add(E.score(), E.load(1, (D.h, distance), "float"))
    table = torch.randn(8, 3)
    got = part.tensor({"b": 2, "h": 3, "q": 5, "k": 9}, [table], {}, torch.device("cpu"))
    assert got.shape == (3, 5 + 9 - 1)


class Calls(TorchDispatchMode):
    """The names of PyTorch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_buckets_are_computed_once_and_margins_are_real_values() -> None:
    _, (part,) = materialise((t5(D, E.score()),), 1)
    shape, cpu = {"b": 2, "h": 3, "q": 5, "k": 9}, torch.device("cpu")
    part_tensor(part, shape, [torch.randn(8, 3)], {}, cpu, margin=4)
    table = torch.randn(8, 3)
    with Calls() as calls:
        got = part_tensor(part, shape, [table], {}, cpu, margin=4)
    assert not {n for n in calls.names if n.startswith(("log", "abs", "where"))}
    assert got.stride(-1) == 1
    longer = part.tensor({**shape, "q": 9, "k": 13}, [table], {}, cpu)  # the same distances and 4 more at each end
    assert torch.equal(got, part.tensor(shape, [table], {}, cpu)) and torch.equal(got, longer[:, 4:-4])
    assert torch.equal(got.as_strided(longer.shape, got.stride(), got.storage_offset() - 4), longer)


def test_a_decision_in_the_mask_is_materialised_and_the_rest_is_not() -> None:
    near = E.lt(E.mul(E.const(0.37), E.as_float(D.q)), E.mul(E.const(0.11), E.as_float(D.k)))
    mask = E.all_of(E.le(D.k, D.q), near, E.load(0, (D.b, D.k), "bool"))
    (got,), parts = materialise((mask,), 1)
    assert [p.axes for p in parts] == ["qk"]
    assert E.le(D.k, D.q) in E.conjuncts(got)
    want = 0.37 * torch.arange(5)[:, None] < 0.11 * torch.arange(9)
    assert torch.equal(parts[0].tensor({"b": 2, "h": 3, "q": 5, "k": 9}, [], {}, torch.device("cpu")), want)


def test_integers_exact_floats_and_the_score_are_left_alone() -> None:
    s = E.score()
    programs = (
        E.where(E.lt(E.mul(E.const(0.3), s), E.const(1.0)), s, E.const(2.0)),
        E.all_of(E.le(D.k, D.q), E.gt(E.load(0, (D.b, D.k), "float"), E.const(0.5))),
        E.add(s, E.load(1, (E.minimum(D.k, E.const(3)), D.h), "float")),
    )
    assert materialise(programs, 2) == (programs, ())


def test_the_bucket_itself_where_the_load_needs_more_than_the_distance() -> None:
    score = E.add(E.score(), E.load(0, (D.b, bucket(E.sub(D.k, D.q)), D.h), "float"))
    _, parts = materialise((score,), 1)
    assert [(p.axes, p.kind) for p in parts] == [("d", "int")]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_generated_source_is_the_same_every_time(case: object) -> None:
    assert isinstance(case, type(CASES[0]))
    assert generate(case.spec()) == generate(case.spec())
    compile(generate(case.spec()).text, case.name, "exec")


def test_blocks_are_skipped_and_whole_blocks_have_no_mask() -> None:
    text = generate(BY_NAME["window-causal"].spec()).text
    loops = [line.strip() for line in text.splitlines() if "in tl.range(" in line]
    assert loops == [
        "for start in tl.range(lo, tl.minimum(whole_lo, hi), BLOCK_N):",
        "for start in tl.range(whole_lo, whole_hi, BLOCK_N):",
        "for start in tl.range(tl.maximum(whole_lo, whole_hi), hi, BLOCK_N):",
    ]
    whole = text.split("range(whole_lo, whole_hi")[1].split("for start")[0]
    assert "tl.where(m_new" in whole and ">= 0" not in whole and "key_inside" not in whole
    padded = generate(BY_NAME["padding-zero"].spec()).text
    assert [line.strip() for line in padded.splitlines() if "in tl.range(" in line] == ["for i in tl.range(0, n_cut):", "for i in tl.range(n_cut, n):"]
    cut, full = padded.split("range(0, n_cut)")[1].split("range(n_cut, n)")
    assert "tl.load(L0" in cut and "key_inside" in cut
    assert "tl.load(L0" not in full and "key_inside" not in full


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("attnopt.kernels.triton.launch", reason="triton is not installed")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"cannot be written to .*file/triton: Not a directory"):
        launch.import_source("x = 1  # never written\n")
