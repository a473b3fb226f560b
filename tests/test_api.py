"""``optimize``, ``inspect`` and ``verify``: what goes in, what comes back, and what is said about it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import LENGTH, TinyGPT, hf_inputs, hf_model, ids, tiny_gpt
from torch import Tensor, nn

import attnopt
from attnopt import api
from attnopt.config import OptimizeConfig
from attnopt.emit.module import OptimizedModule
from attnopt.errors import AttnoptError, CaptureError, VerificationError
from attnopt.passes.pipeline import PipelineResult, run_pipeline

QUICK = OptimizeConfig(verify=False)
EAGER = OptimizeConfig(verify=False, inductor=False)


def report_of(module: nn.Module) -> attnopt.Report:
    assert isinstance(module, OptimizedModule)
    return module.attnopt_report


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


class Branches(nn.Module):
    """torch.export refuses the branch on data; the attention in it is an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = tiny_gpt()

    def forward(self, ids: Tensor) -> Tensor:
        return self.gpt(ids) if ids.sum() > 0 else self.gpt(ids) * 2


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).softmax(-1)


# ---- optimize


@pytest.mark.parametrize("given", [(ids(),), [ids()], ids(), {"ids": ids()}], ids=["tuple", "list", "tensor", "mapping"])
def test_forms_of_example_inputs(given: Any) -> None:
    model = tiny_gpt()
    fast = attnopt.optimize(model, given, config=QUICK)
    close(fast(ids(3, 7)), model(ids(3, 7)))
    assert [s.status for s in report_of(fast).sites] == ["replaced"] * 2


def test_the_report_tells_all() -> None:
    report = report_of(attnopt.optimize(tiny_gpt(), (ids(),)))
    assert [s.name for s in report.sites] == ["blocks.0.attention", "blocks.1.attention"]
    for site in report.sites:
        assert "tiny_models.py:" in site.source and site.kernel
        assert site.spec is not None and site.spec.causal == "top_left"
    assert report.verdict.passed is True and report.verdict.checks
    assert set(report.seconds) == {"capture", "passes", "verify"} and all(s > 0 for s in report.seconds.values())
    assert report.remarks == []


def test_without_verification_it_says_unverified() -> None:
    report = report_of(attnopt.optimize(tiny_gpt(), (ids(),), config=QUICK))
    assert report.verdict.passed is None
    assert [(r.code, r.message) for r in report.remarks] == [("AO304", "Not compared with the original: verify=False.")]


def test_progress_is_told_by_stage() -> None:
    seen: list[tuple[str, int, int]] = []
    attnopt.optimize(tiny_gpt(), (ids(),), progress=lambda *x: seen.append(x))
    assert list(dict.fromkeys(stage for stage, *_ in seen)) == ["capture", "passes", "verify"]
    assert seen[0] == ("capture", 0, 1) and seen[-1][1] == seen[-1][2] > 0


def test_user_shapes_are_for_the_first_call() -> None:
    fast = attnopt.optimize(tiny_gpt(), (ids(),), dynamic_shapes="static", config=QUICK)
    fast(ids(2, 12))
    assert isinstance(fast, OptimizedModule) and len(fast.attnopt_variants) == 1
    fast(ids(3, 7))
    fast(ids(4, 9))
    assert len(fast.attnopt_variants) == 2


def test_models_on_the_meta_device_are_unverified_until_weights_arrive() -> None:
    with torch.device("meta"):
        model = TinyGPT().eval()
    fast = attnopt.optimize(model, (ids(),))
    report = report_of(fast)
    assert report.verdict.passed is None and "meta device" in report.remarks[-1].message
    assert len(report.replaced) == 2
    real = tiny_gpt()
    fast.to_empty(device="cpu")
    fast.load_state_dict(real.state_dict())
    for name, buffer in real.named_buffers():
        fast.get_buffer(name).copy_(buffer)  # non-persistent ones are in no state_dict
    close(fast(ids()), real(ids()))
    assert report_of(fast).verdict.passed is True
    assert model.tokens.weight.is_meta


class ReturnsWeights(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = (x @ x.mT).softmax(-1)
        return p @ x, p


def test_require_all_raises_with_the_names() -> None:
    config = OptimizeConfig(verify=False, require_all=True)
    with pytest.raises(VerificationError, match="1 of 1 attentions were not replaced: model"):
        attnopt.optimize(ReturnsWeights(), (torch.randn(2, 5, 4),), config=config)
    attnopt.optimize(NoAttention(), (torch.randn(2, 4),), config=config)  # a softmax that is no attention was not missed
    attnopt.optimize(tiny_gpt(), (ids(),), config=config)


# ---- through torch.compile


def test_without_inputs_it_is_optimized_when_it_runs() -> None:
    model = tiny_gpt()
    fast = attnopt.optimize(model, config=EAGER)
    report = report_of(fast)
    assert [r.code for r in report.remarks] == ["AO302", "AO304"] and report.sites == []
    assert list(fast.state_dict()) == list(model.state_dict())
    close(fast(ids()), model(ids()))
    assert [s.status for s in report_of(fast).sites] == ["replaced"] * 2
    fast(ids()).sum().backward()
    assert model.tokens.weight.grad is not None
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        twin.get_parameter("tokens.weight").zero_()
    assert not twin(ids()).any() and fast(ids()).any()
    assert fast.train()(ids()).shape == (2, 12, 61)


def test_a_model_that_export_refuses_goes_through_torch_compile() -> None:
    model = Branches()
    fast = attnopt.optimize(model, (ids(),), config=OptimizeConfig(inductor=False))
    report = report_of(fast)
    assert report.remarks[0].code == "AO302" and "torch.export cannot capture Branches" in report.remarks[0].message
    assert [s.status for s in report.sites] == ["replaced"] * len(report.sites) and report.sites
    assert report.verdict.passed is True
    close(fast(ids()), model(ids()))
    assert list(fast.state_dict()) == list(model.state_dict())


def test_capture_by_name() -> None:
    with pytest.raises(CaptureError, match=r"torch\.export cannot capture Branches"):
        attnopt.optimize(Branches(), (ids(),), config=OptimizeConfig(capture="export"))
    fast = attnopt.optimize(tiny_gpt(), (ids(),), config=OptimizeConfig(capture="dynamo", inductor=False, verify=False))
    assert report_of(fast).remarks[0].message.startswith("capture='dynamo' was asked for")
    assert len(report_of(fast).replaced) == 2


# ---- what cannot be used


def test_bad_input_gives_one_sentence() -> None:
    model: Any
    for model, given, options, message in (
        ("a path", ids(), {}, "The model has to be a torch.nn.Module, got str."),
        (tiny_gpt(), 7, {}, "example_inputs has to be a tuple, a tensor or a mapping of keyword arguments, got int."),
        (tiny_gpt(), {"ids": ids()}, {"kwargs": {"ids": ids()}}, "ids is given in example_inputs and in kwargs."),
        (tiny_gpt(), ids(2, LENGTH + 1), {}, "TinyGPT itself fails with these inputs: IndexError: index out of range in self"),
        (tiny_gpt(), {"idz": ids()}, {}, "TinyGPT does not take these inputs: missing a required argument: 'ids'"),
        (tiny_gpt(), ids(), {"config": OptimizeConfig(disable_passes=("polish",))}, "there is no pass 'polish'"),
        (torch.jit.script(nn.Linear(2, 2)), torch.ones(1, 2), {}, "RecursiveScriptModule is a TorchScript module"),
    ):
        with pytest.raises(AttnoptError) as error:
            attnopt.optimize(model, given, **options)
        assert error.value.message.startswith(message) and "\n" not in error.value.message
    with pytest.raises(AttnoptError, match="inspect needs example_inputs"):
        attnopt.inspect(tiny_gpt(), None)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(AttnoptError, match="warp"):
        attnopt.optimize(tiny_gpt(), (ids(),), config=OptimizeConfig(backend="warp"))


# ---- a kernel that is wrong


def _spoiled(name: str) -> Any:
    """A pipeline that makes the site ``name`` 2% too large."""

    def run(graph: Any, config: Any, *, skip_sites: frozenset[str] = frozenset()) -> PipelineResult:
        result = run_pipeline(graph, config, skip_sites=skip_sites)
        if name in result.outputs:
            original, optimized = result.outputs[name]
            nodes = {n.name: n for n in result.graph_module.graph.nodes}
            node = nodes[optimized]
            with result.graph_module.graph.inserting_after(node):
                wrong = result.graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.02))
            wrong.meta = dict(node.meta)
            node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
            result.graph_module.recompile()
            result.outputs[name] = (original, wrong.name)
        return result

    return run


def test_a_wrong_site_is_put_back_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "run_pipeline", _spoiled("blocks.1.attention"))
    model = tiny_gpt()
    fast = attnopt.optimize(model, (ids(),))
    report = report_of(fast)
    assert {s.name: s.status for s in report.sites} == {"blocks.0.attention": "replaced", "blocks.1.attention": "reverted"}
    (remark,) = [r for r in report.sites[1].remarks if r.code == "AO901"]
    assert "error" in remark.message and "budget" in remark.message
    assert report.verdict.passed is True
    close(fast(ids()), model(ids()))


# ---- inspect and verify


def test_inspect_finds_and_changes_nothing() -> None:
    model = tiny_gpt()
    state, attributes = copy.deepcopy(model.state_dict()), dict(vars(model))
    report = attnopt.inspect(model, (ids(),))
    assert [(s.name, s.status) for s in report.sites] == [(f"blocks.{i}.attention", "replaced") for i in range(2)]
    assert report.verdict.passed is None and set(report.seconds) == {"capture", "passes"}
    assert dict(vars(model)) == attributes and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_inspect_goes_through_torch_compile_where_export_does_not() -> None:
    report = attnopt.inspect(Branches(), (ids(),))
    assert report.remarks[0].code == "AO302"
    assert {s.status for s in report.sites} == {"replaced"}


def test_verify_says_yes_and_no() -> None:
    model = tiny_gpt()
    fast = attnopt.optimize(model, (ids(),), config=QUICK)
    assert attnopt.verify(model, fast, (ids(),)).passed is True
    wrong = tiny_gpt()
    with torch.no_grad():
        wrong.blocks[0].attention.out.weight.mul_(1.01)
    verdict = attnopt.verify(model, wrong, (ids(),))
    assert verdict.passed is False and verdict.error > verdict.budget


def test_verify_is_the_function_whatever_was_imported() -> None:
    import attnopt.verify.budget
    from attnopt.verify import verify_modules

    assert callable(attnopt.verify) and callable(verify_modules)


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "bart", "whisper"])
def test_transformers_models_end_to_end(kind: str) -> None:
    model = hf_model(kind)
    fast = attnopt.optimize(model, kwargs=hf_inputs(kind))
    report = report_of(fast)
    assert report.verdict.passed is True
    assert report.sites and {s.status for s in report.sites} == {"replaced"}
    for batch, length in ((1, 24), (3, 17)):
        inputs = hf_inputs(kind, batch, length)
        with torch.no_grad():
            torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert isinstance(fast, OptimizedModule) and len(fast.attnopt_variants) == 1
