"""The map of blocks as an operator: shapes and strides, compilers and files, and its way into a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.block_map_op import mask_alone
from tests.kernels.by_blocks import ByBlocks, install
from tests.kernels.mask_cases import MASKS

block_map = torch.ops.attnopt.block_map


def alone(name: str) -> tuple[AttentionSpec, list[Tensor]]:
    case = MASKS[name]
    spec = mask_alone(case.spec(), {i: i for i in range(len(case.spec().loads))})
    assert spec is not None
    return spec, case.tensors(torch.float32)[3]


def arguments(name: str) -> tuple[object, ...]:
    spec, loads = alone(name)
    B, Hq, _, Sq, Skv, _, _ = MASKS[name].shape
    return loads[0], loads, [], B, Hq, Sq, Skv, spec.to_json(), 16, 8


def test_schema() -> None:
    assert str(block_map.default._schema) == (
        "attnopt::block_map(Tensor like, Tensor[] loads, SymInt[] sizes, SymInt B, SymInt Hq, SymInt Sq, SymInt Skv, str spec, "
        "int block_m, int block_n, bool transposed=False) -> (Tensor counts, Tensor indices)"
    )


@pytest.mark.parametrize(("name", "transposed"), [("documents", False), ("dense-mask", True)])
def test_the_operator_keeps_its_promises(name: str, transposed: bool) -> None:
    torch.library.opcheck(block_map.default, (*arguments(name), transposed))


def test_a_float_with_a_gradient_may_be_read() -> None:
    like, loads, *rest = arguments("threshold-of-a-float")
    assert isinstance(loads, list)
    loads = [loads[0].clone().requires_grad_()]
    counts, indices = block_map(like, loads, *rest)
    assert not counts.requires_grad and not indices.requires_grad


def test_equal_masks_are_equal_whatever_else_the_specs_say() -> None:
    spec = MASKS["documents"].spec()
    other = spec.replace(score=spec.bias or spec.score, empty_rows="zero", dropout=0.5)
    assert mask_alone(spec, {0: 0}) == mask_alone(other, {0: 0})
    assert mask_alone(spec, {0: 0}) != mask_alone(MASKS["padding-by-lengths"].spec(), {0: 0})


def test_slots_are_renamed_also_inside_of_an_index() -> None:
    from attnopt.ir import expr as E
    from attnopt.ir.spec import Load

    spec = MASKS["documents"].spec()
    d = spec.dims
    inner = E.load(2, (E.load(0, (d.q,), "int"),), "bool")
    found = mask_alone(spec.replace(mask=inner, loads=(Load("a", "int"), Load("b", "float"), Load("c", "bool"))), {0: 1, 2: 0})
    assert found is not None
    assert found.mask is E.load(0, (E.load(1, (d.q,), "int"),), "bool")
    assert [x.kind for x in found.loads] == ["bool", "int"]


def test_a_mask_that_reads_a_size_nobody_gives_is_not_set_alone() -> None:
    from attnopt.ir import expr as E

    spec = MASKS["documents"].spec()
    mask = E.lt(spec.dims.k, E.sym("window"))
    assert mask_alone(spec.replace(mask=mask), {}) is None
    found = mask_alone(spec.replace(mask=mask, sizes=("other", "window")), {})
    assert found is not None and found.sizes == ("window",)


class Masked(torch.nn.Module):
    """One map for two attentions, as the pass writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = MASKS["padding-by-lengths"].spec().to_json()
        self.mask = alone("padding-by-lengths")[0].to_json()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        counts, indices = block_map(lengths, [lengths], [], q.shape[0], 4, q.shape[2], k.shape[2], self.mask, 4, 2)
        o = torch.zeros_like(q)
        for scale in (1.0, 2.0):
            o = o + torch.ops.attnopt.attention(q * scale, k, v, [lengths], [], self.spec, "by-blocks", counts, indices, [4, 2])
        return o


def tensors(B: int, Sq: int, Skv: int) -> tuple[Tensor, ...]:
    return torch.randn(B, 4, Sq, 16), torch.randn(B, 2, Skv, 16), torch.randn(B, 2, Skv, 16), torch.randint(1, Skv, (B,))


def truth(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    case = MASKS["padding-by-lengths"]
    return sum((case.naive(q * scale, k, v, [lengths], q.dtype)[0] for scale in (1.0, 2.0)), torch.zeros(()))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ByBlocks:
    return install(monkeypatch)


def test_symbolic_tracing_and_files(kernel: ByBlocks, tmp_path: Path) -> None:
    model = Masked()
    traced = make_fx(model, tracing_mode="symbolic")(*tensors(2, 9, 14))
    dims = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},) * 3 + ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model, tensors(2, 9, 14), dynamic_shapes=dims, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for sizes in ((2, 9, 14), (3, 5, 31)):
        args = tensors(*sizes)
        for f in (model, traced, loaded):
            kernel.calls.clear()
            torch.testing.assert_close(f(*args), truth(*args))
            assert len(kernel.calls) == 2


def test_compiled_with_gradients(kernel: ByBlocks) -> None:
    model = Masked()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ((2, 9, 14), (3, 5, 31)):
        args = tensors(*sizes)
        leaves = [x.requires_grad_() for x in args[:3]]
        want, got = truth(*args), compiled(*args)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
