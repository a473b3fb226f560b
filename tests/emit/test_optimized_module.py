"""The optimized module keeps what modules are relied on for: names, parameters, modes, moves, copies, wrappers."""

from __future__ import annotations

import copy
import io
import logging
import re
import time
import timeit
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import Attention, TinyGPT, hf_inputs, hf_model, ids, tiny_gpt
from torch import Tensor, nn

import attnopt
from attnopt.config import OptimizeConfig
from attnopt.emit.module import OptimizedModule
from attnopt.errors import AttnoptError, CaptureError

QUICK = OptimizeConfig(verify=False)


def optimized(model: nn.Module, *args: Any, config: OptimizeConfig = QUICK, **options: Any) -> OptimizedModule:
    result = attnopt.optimize(model, args or None, config=config, **options)
    assert isinstance(result, OptimizedModule)
    return result


def codes(module: OptimizedModule) -> list[str]:
    return [r.code for r in module.attnopt_report.remarks]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.fixture
def model() -> TinyGPT:
    return tiny_gpt()


@pytest.fixture
def fast(model: TinyGPT) -> OptimizedModule:
    return optimized(model, ids())


# ---- names and state


def test_state_dict_keys_are_identical(model: TinyGPT, fast: OptimizedModule) -> None:
    assert list(fast.state_dict()) == list(model.state_dict())
    for what in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(fast, what)()] == [n for n, _ in getattr(model, what)()]
    assert "temperature" in fast.state_dict() and not any("mask" in k for k in fast.state_dict())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_state_dict_keys_of_transformers_models(kind: str) -> None:
    model = hf_model(kind)
    fast = optimized(model, kwargs=hf_inputs(kind))
    assert list(fast.state_dict()) == list(model.state_dict())
    assert isinstance(fast, type(model)) and fast.config is model.config  # type: ignore[attr-defined]
    assert len(fast.attnopt_report.replaced) == 2
    for batch, length in ((2, 24), (3, 9), (1, 1)):
        inputs = hf_inputs(kind, batch, length)
        got, expected = fast(**inputs), model(**inputs)
        assert type(got) is type(expected)
        close(got[0], expected[0])


def test_parameters_are_shared_and_ties_kept(model: TinyGPT, fast: OptimizedModule) -> None:
    assert all(a is b for a, b in zip(model.parameters(), fast.parameters(), strict=True))
    assert fast.head.weight is fast.tokens.weight


def test_parameters_can_be_copied_instead(model: TinyGPT) -> None:
    fast = optimized(model, ids(), copy=True)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in fast.parameters()}
    assert fast.head.weight is fast.tokens.weight
    expected = model(ids())
    with torch.no_grad():
        fast.tokens.weight.mul_(2)
    close(model(ids()), expected)


def test_the_input_model_is_unchanged(model: TinyGPT) -> None:
    state, attributes, classes = copy.deepcopy(model.state_dict()), dict(vars(model)), [type(m) for m in model.modules()]
    expected = model(ids())
    fast = optimized(model, ids())
    fast.train()
    fast(ids()).sum().backward()
    fast.eval().to(torch.float64)
    assert dict(vars(model)) == attributes and [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in model.state_dict().items())
    assert not model.training
    assert torch.equal(model(ids()), expected)


def test_results_are_the_originals_at_other_sizes(model: TinyGPT, fast: OptimizedModule) -> None:
    assert [s.status for s in fast.attnopt_report.sites] == ["replaced", "replaced"]
    for batch, length in ((2, 12), (1, 12), (5, 40), (1, 1)):
        close(fast(ids(batch, length)), model(ids(batch, length)))
    assert len(fast.attnopt_variants) == 1


def test_positional_named_and_defaulted_arguments_are_one_call(fast: OptimizedModule) -> None:
    fast(ids())
    fast(ids=ids())
    fast(ids(), None)
    fast(ids=ids(), weights=None)
    assert len(fast.attnopt_variants) == 1


# ---- gradients


def test_backward(model: TinyGPT, fast: OptimizedModule) -> None:
    model(ids()).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fast(ids()).square().mean().backward()
    assert set(expected) == {n for n, _ in model.named_parameters()}
    for n, p in fast.named_parameters():
        assert p.grad is not None
        close(p.grad, expected[n])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(model: TinyGPT, mode: Any) -> None:
    with mode():
        fast = optimized(model, ids())
        result = fast(ids())
        close(result, model(ids()))
        assert not result.requires_grad
    assert fast(ids()).requires_grad
    assert len(fast.attnopt_variants) == 1


def test_frozen_parameters_stay_frozen(model: TinyGPT) -> None:
    model.tokens.requires_grad_(False)
    fast = optimized(model, ids())
    fast.to(torch.float64)
    assert [p.requires_grad for p in fast.parameters()] == [p.requires_grad for p in model.parameters()]


# ---- modes and moves


def test_to_dtype_captures_again_and_leaves_the_original(model: TinyGPT, fast: OptimizedModule) -> None:
    expected = copy.deepcopy(model).to(torch.float64)(ids())
    assert fast.to(torch.float64) is fast
    got = fast(ids())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected)
    assert codes(fast)[0] == "AO305"
    assert fast.attnopt_report.remarks[0].message == "Captured again for the dtype or device of the parameters: float64 on cpu, where float32 on cpu was captured."
    assert len(fast.attnopt_report.replaced) == 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert fast.head.weight is fast.tokens.weight


def test_to_the_same_dtype_shares_on(model: TinyGPT, fast: OptimizedModule) -> None:
    fast.to(torch.float32).to("cpu")
    assert fast.tokens.weight is model.tokens.weight
    fast(ids())
    assert len(fast.attnopt_variants) == 1


def test_half_precision(fast: OptimizedModule) -> None:
    fast.bfloat16()
    assert fast(ids()).dtype == torch.bfloat16
    fast.float()
    assert fast(ids()).dtype == torch.float32
    assert len(fast.attnopt_variants) == 2


def test_to_empty_does_not_lose_the_originals_weights(model: TinyGPT, fast: OptimizedModule) -> None:
    before = copy.deepcopy(model.state_dict())
    fast.to_empty(device="cpu")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_train_and_eval_with_dropout() -> None:
    model = tiny_gpt(dropout=0.5, attention_dropout=0.5)
    fast = optimized(model, ids())
    expected = model(ids())
    close(fast(ids()), expected)
    fast.train()
    assert not torch.equal(fast(ids()), fast(ids()))
    assert codes(fast)[0] == "AO305"
    assert fast.attnopt_report.remarks[0].message == "Captured again for the mode (train or eval): train, where eval was captured."
    assert fast.attnopt_report.replaced[0].spec.dropout == 0.5  # type: ignore[union-attr]
    fast.eval()
    close(fast(ids()), expected)
    assert len(fast.attnopt_variants) == 2 and not model.training


def test_dropout_outside_of_attention_draws_the_same_numbers() -> None:
    model = tiny_gpt(dropout=0.3).train()
    fast = optimized(model, ids())
    torch.manual_seed(5)
    expected = model(ids())
    torch.manual_seed(5)
    close(fast(ids()), expected)


def test_attention_dropout_has_the_right_mean() -> None:
    torch.manual_seed(0)
    attention = Attention(dropout=0.5)
    x = torch.randn(1, 6, 32)
    expected = attention.eval()(x)
    fast = optimized(attention.train(), x)
    samples = torch.stack([fast(x) for _ in range(400)])
    error = (samples.mean(0) - expected) / (samples.std(0) / 20).clamp_min(1e-6)
    assert samples.std(0).mean() > 1e-3  # dropout is on
    assert error.abs().mean() < 1.6  # in standard errors; 0.8 is expected of a normal distribution
    assert error.abs().max() < 6


def test_the_mode_of_one_submodule_counts(model: TinyGPT, fast: OptimizedModule) -> None:
    fast.blocks[0].dropout.train()
    fast(ids())
    assert len(fast.attnopt_variants) == 2


def test_batch_norm_moves_its_own_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    twin, fast, x = copy.deepcopy(model), optimized(model, torch.randn(4, 8)), torch.randn(6, 8)
    close(fast(x), twin(x))
    for name, value in twin.named_buffers():
        close(fast.get_buffer(name).float(), value.float())
    assert int(model[1].num_batches_tracked) == 0


def test_autocast_is_a_variant_of_its_own(model: TinyGPT, fast: OptimizedModule) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fast(ids()), model(ids())
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    assert "autocast: bfloat16 on cpu, where off was captured" in fast.attnopt_report.remarks[0].message
    assert fast(ids()).dtype == torch.float32


# ---- other calls


class EightOrMore(nn.Module):
    """Holds for the length that it was captured with only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        n = int(x.shape[1])
        if n < 4:
            raise ValueError("too short")
        y = self.attention(x) * (n if n > 8 else 1)
        return -y if flag else y


def test_a_fixed_size_is_captured_again(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = EightOrMore()
    fast = optimized(model, torch.randn(2, 8, 32))
    assert codes(fast)[:1] == ["AO301"]
    with caplog.at_level(logging.INFO, logger="attnopt"):
        x = torch.randn(2, 12, 32)
        close(fast(x), model(x))
    assert "EightOrMore: Captured again for other sizes: [2, 12, 32] for x, where [s0, 8, 32] was captured." in [re.sub(r"\bs\d+", "s0", m) for m in caplog.messages]
    assert codes(fast)[0] == "AO305"
    close(fast(x, flag=True), model(x, flag=True))
    assert "the arguments: x, flag, where x was captured" in fast.attnopt_report.remarks[0].message
    assert len(fast.attnopt_variants) == 3


def test_a_call_that_the_model_refuses_raises_the_models_own_error() -> None:
    fast = optimized(EightOrMore(), torch.randn(2, 8, 32))
    with pytest.raises(ValueError, match="^too short$"):
        fast(torch.randn(2, 3, 32))
    with pytest.raises(TypeError, match="unexpected"):
        fast(torch.randn(2, 8, 32), unexpected=1)
    assert len(fast.attnopt_variants) == 1


def test_variants_are_limited() -> None:
    fast = optimized(EightOrMore(), torch.randn(2, 8, 32), config=OptimizeConfig(verify=False, max_variants=2))
    fast(torch.randn(2, 9, 32))
    with pytest.raises(CaptureError, match=r"captured 2 times \(max_variants=2\).*other sizes"):
        fast(torch.randn(2, 10, 32))


def test_hooks_of_the_root_run_once_a_call(model: TinyGPT) -> None:
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("original"))
    fast = optimized(model, ids())
    fast.register_forward_hook(lambda *_: seen.append("fast"))
    assert seen == []
    fast(ids())
    assert seen == ["original", "fast"]
    fast.train()(ids())
    assert seen == ["original", "fast"] * 2


def test_a_forward_set_on_the_instance_is_the_one_that_counts(model: TinyGPT) -> None:
    plain = model.forward
    model.forward = lambda ids: plain(ids) * 2  # type: ignore[method-assign]
    fast = optimized(model, ids())
    close(fast(ids()), 2 * tiny_gpt()(ids()))


def test_constants_of_the_graph_are_not_state(model: TinyGPT) -> None:
    class WithConstant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor([1.0, 2.0, 3.0])

    fast = optimized(WithConstant(), torch.zeros(2, 3))
    assert list(fast.state_dict()) == []
    close(fast(torch.zeros(1, 3)), torch.tensor([[1.0, 2.0, 3.0]]))


def test_attributes_and_methods_pass_through(model: TinyGPT, fast: OptimizedModule) -> None:
    assert fast.settings is model.settings
    assert type(fast).__name__ == "OptimizedTinyGPT"
    assert fast.attnopt_reference(ids()).shape == fast(ids()).shape
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = fast.nothing_of_this_name


def test_an_optimized_module_is_not_optimized_again(fast: OptimizedModule) -> None:
    with pytest.raises(AttnoptError, match="already optimized"):
        attnopt.optimize(fast, (ids(),))


# ---- copies and files


def test_deepcopy_is_independent(model: TinyGPT, fast: OptimizedModule) -> None:
    twin = copy.deepcopy(fast)
    assert not {id(p) for p in fast.parameters()} & {id(p) for p in twin.parameters()}
    assert twin.head.weight is twin.tokens.weight
    close(twin(ids()), model(ids()))
    assert len(twin.attnopt_variants) == 1
    with torch.no_grad():
        twin.tokens.weight.zero_()
    assert not twin(ids()).any() and fast(ids()).any()
    twin.to(torch.float64)
    twin.train()
    assert twin(ids()).dtype == torch.float64 and fast(ids()).dtype == torch.float32
    assert len(fast.attnopt_variants) == 1 and not fast.training


def test_state_dict_goes_through_a_file(model: TinyGPT, fast: OptimizedModule) -> None:
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    fresh = TinyGPT().eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    close(fresh(ids()), fast(ids()))
    other = optimized(TinyGPT().eval(), ids())
    other.load_state_dict(model.state_dict())
    close(other(ids()), model(ids()))


def test_load_state_dict_with_assign_may_change_the_dtype(model: TinyGPT, fast: OptimizedModule) -> None:
    fast.load_state_dict({k: v.double() for k, v in model.state_dict().items()}, assign=True)
    assert fast(ids()).dtype == torch.float64
    assert model.tokens.weight.dtype == torch.float32


def test_the_whole_module_goes_through_a_file(fast: OptimizedModule) -> None:
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert isinstance(again, OptimizedModule) and again.attnopt_variants == []
    close(again(ids()), fast(ids()))
    assert len(again.attnopt_report.replaced) == 2


# ---- wrappers


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_in_one_graph(model: TinyGPT, fast: OptimizedModule, backend: str) -> None:
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    close(compiled(ids()), model(ids()))
    close(compiled(ids(3, 20)), model(ids(3, 20)))
    compiled(ids()).sum().backward()
    assert model.tokens.weight.grad is not None


def test_torch_compile_captures_what_is_missing_first(model: TinyGPT, fast: OptimizedModule) -> None:
    fast.double()
    close(torch.compile(fast, backend="eager")(ids()), copy.deepcopy(model).double()(ids()))


def test_torch_export(model: TinyGPT, fast: OptimizedModule) -> None:
    program = torch.export.export(fast, (ids(),), dynamic_shapes={"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}})
    assert not [n for n in program.graph.nodes if "softmax" in str(n.target)]
    assert set(program.state_dict) == set(model.state_dict())
    close(program.module()(ids(4, 9)), model(ids(4, 9)))


def test_torch_export_of_another_call_says_what_to_do(fast: OptimizedModule) -> None:
    with pytest.raises(CaptureError, match="call it once with such inputs first"):
        torch.export.export(fast, (ids(), torch.ones(2, 12)))


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(model: TinyGPT, fast: OptimizedModule) -> None:
    model(ids()).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(fast)
    assert [k.removeprefix("module.") for k in parallel.state_dict()] == list(model.state_dict())
    parallel(ids()).square().mean().backward()
    for n, p in fast.named_parameters():
        close(p.grad, expected[n])  # type: ignore[arg-type]


def test_choosing_a_variant_takes_microseconds(fast: OptimizedModule) -> None:
    from attnopt.emit.module import _key

    state, x = fast._attnopt, ids()

    def dispatch() -> bool:
        args, kwargs = state.form.normalise((x,), {})
        leaves, key = _key(state, args, kwargs)
        return any(v.holds(leaves) for v in state.variants[key])

    assert dispatch()
    assert min(timeit.repeat(dispatch, timer=time.process_time, number=200, repeat=5)) / 200 < 100e-6  # whatever else the machine does


def test_many_modules_of_one_class_go_through_the_compiler() -> None:
    """torch.compile stops at eight entries for one forward, and says nothing."""

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:  # no export: a branch on a value
                return x
            return (x @ x.mT).softmax(-1) @ x

    x = torch.randn(2, 5, 8)
    for _ in range(10):
        optimized = attnopt.optimize(Branches(), (x,), config=attnopt.OptimizeConfig(verify=False, inductor=False))
        assert [s.status for s in optimized.attnopt_report.attentions] == ["replaced"]
