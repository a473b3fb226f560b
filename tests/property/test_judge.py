"""The judge can say no: a spec that claims too much, or a graph that computes something else, does not pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.pipeline import PipelineResult
from property import judge
from property.biases import Slopes
from property.emit import Sizes
from property.masks import Chunk, Diagonal, Document, Joined, Padding, Window
from property.program import Program
from property.steps import Add, Hide, Scale, Softcap


def claims(**traits: object) -> Callable[[AttentionSpec], AttentionSpec]:
    return lambda spec: spec.replace(traits=replace(spec.traits, **traits))


FULL = Program(steps=(Scale(0.5),))
CAUSAL = Program(steps=(Scale(0.5), Hide(Diagonal())))
LIES: dict[str, tuple[Program, Callable[[AttentionSpec], AttentionSpec], str]] = {
    "causal of a full mask": (FULL, claims(causal="top_left"), "claim"),
    "the other corner": (Program(sizes=Sizes(2, 5, 8), steps=(Hide(Diagonal()),)), claims(causal="bottom_right"), "claim"),
    "a window that is too narrow": (Program(steps=(Hide(Window(2, 1)),)), claims(window=(1, 1)), "claim"),
    "a window that is too wide": (Program(steps=(Hide(Window(2, 1)),)), claims(window=(3, 1)), "claim"),
    "key padding of a causal mask": (CAUSAL, claims(key_padding=True), "claim"),
    "documents that are two tensors": (Program(steps=(Hide(Document("two tensors")),)), claims(document=True, mask_rest=E.TRUE), "claim"),
    "chunks of another length": (Program(steps=(Hide(Chunk(2)),)), claims(chunk=3, mask_rest=E.TRUE), "claim"),
    "nothing left of a mask": (Program(steps=(Hide(Joined("or", Diagonal(), Padding())),)), claims(prefix=False, mask_rest=E.TRUE), "claim"),
    "another scale": (CAUSAL, claims(scale=0.505), "claim"),
    "another softcap": (Program(steps=(Softcap(5.0),)), claims(softcap=5.1), "claim"),
    "no bias": (Program(steps=(Add(Slopes("distance")),)), claims(bias=None), "claim"),
    "ALiBi of a distance": (Program(steps=(Add(Slopes("distance")),)), claims(alibi=True), "claim"),
    "a mask that hides more": (FULL, lambda s: s.replace(mask=E.le(s.dims.k, s.dims.q)), "mask"),
    "a mask that hides less": (CAUSAL, lambda s: s.replace(mask=E.TRUE), "mask"),
    "another score": (FULL, lambda s: s.replace(score=E.mul(E.const(0.51), E.score())), "score"),
    "a sink": (FULL, lambda s: s.replace(sink=E.FZERO), "sink"),
}


@pytest.mark.parametrize("name", LIES)
def test_the_judge_finds_a_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, lie, kind = LIES[name]
    judge.check(program)
    honest = judge.lifted

    def lying(*args: object) -> PipelineResult:
        result = honest(*args)  # type: ignore[arg-type]
        spec = result.sites[0].spec
        assert spec is not None
        result.sites[0].spec = lie(spec)
        return result

    monkeypatch.setattr(judge, "lifted", lying)
    with pytest.raises(judge.Wrong) as found:
        judge.check(program)
    assert found.value.kind == kind


def test_the_judge_finds_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = judge.lifted
    strict = replace(CAUSAL, steps=(Scale(0.5), Hide(Diagonal("<", 1), "smallest")))  # k < q + 1 is causal again
    judge.check(strict)
    other = replace(CAUSAL, steps=(Scale(0.5), Hide(Diagonal("<", 0), "smallest")))
    monkeypatch.setattr(judge, "lifted", lambda program, module, inputs: honest(other, other.module(), inputs))
    with pytest.raises(judge.Wrong) as found:
        judge.check(CAUSAL)
    assert found.value.kind == "output"


def test_a_refused_program_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = judge.lifted

    def none(*args: object) -> PipelineResult:
        result = honest(*args)  # type: ignore[arg-type]
        result.sites[0].status = "missed"
        return result

    monkeypatch.setattr(judge, "lifted", none)
    with pytest.raises(judge.Wrong) as found:
        judge.check(FULL)
    assert found.value.kind == "refused"


def test_a_program_prints_as_what_it_runs() -> None:
    text = str(CAUSAL)
    assert "class Program(nn.Module):" in text and "w = w * 0.5" in text and text.startswith("Program(steps=(Scale(")
