"""The passes' own result under verification, and a kernel that is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.config import OptimizeConfig
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import ops, registry
from attnopt.passes.pipeline import run_pipeline
from attnopt.verify import GraphPair, verify_and_repair
from tests.verify.pairs import decoder, example


def build(skip: frozenset[str] = frozenset()) -> GraphPair:
    result = run_pipeline(decoder(), OptimizeConfig(), skip_sites=skip)
    return GraphPair(result.reference, result.graph_module, result.outputs)


@pytest.fixture
def broken() -> Iterator[Callable[[Callable[..., Tensor]], None]]:
    """Puts something between the CPU's kernel and its caller."""

    backends = registry.backends()

    def install(change: Callable[..., Tensor]) -> None:
        for name in ("sdpa", "reference"):
            kernel = backends[name]

            def run(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, kernel: Any = kernel) -> Tensor:
                return change(lambda *x: kernel.run(*x, loads, sizes, spec), q, k, v)

            registry.register(replace(kernel, run=run))
        ops._prepare.cache_clear()

    yield install
    for backend in backends.values():
        registry.register(backend)
    ops._prepare.cache_clear()


def test_the_pipelines_result_holds() -> None:
    result = verify_and_repair(build, example(), {})
    assert result.verdict.passed and not result.reverted
    assert len(result.pair.outputs) == 2
    assert not any("not compared" in c.detail for c in result.verdict.checks)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda kernel, q, k, v: kernel(q * 1.01, k, v), id="scale"),
        pytest.param(lambda kernel, q, k, v: kernel(q, k, v.roll(1, 2)), id="values of other keys"),
        pytest.param(lambda kernel, q, k, v: kernel(q, k.flip(1), v.flip(1)), id="heads"),
        pytest.param(lambda kernel, q, k, v: kernel(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(v.dtype), id="bfloat16"),
        pytest.param(lambda kernel, q, k, v: kernel(q, k, v) if q.shape[2] % 8 == 0 else kernel(q, k, v) * 1.001, id="ragged blocks"),
    ],
)
def test_a_broken_kernel_is_put_back_everywhere(broken: Callable[..., None], change: Callable[..., Tensor]) -> None:
    broken(change)
    result = verify_and_repair(build, example(), {})
    assert set(result.reverted) == set(build().outputs) and len(result.reverted) == 2
    assert result.verdict.passed and not result.pair.outputs


def test_dropout_is_left_out_of_a_graph_captured_for_training() -> None:
    torch.manual_seed(0)
    from tests.verify.pairs import Decoder, capture

    model = Decoder().train()
    gm = capture(model, example())
    result = run_pipeline(gm, OptimizeConfig())
    assert any(s.spec is not None and s.spec.dropout for s in result.sites)
    repaired = verify_and_repair(lambda skip: GraphPair(result.reference, result.graph_module, result.outputs), example(), {}, training=True)
    assert repaired.verdict.passed and not repaired.reverted
