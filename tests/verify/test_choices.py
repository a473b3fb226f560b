"""Models that choose experts: one that chooses otherwise by a rounding is right, one that computes something else is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.kernels import paged_batched
from attnopt.report import Verdict
from attnopt.serving import ServingModel
from attnopt.verify.choices import Choices, PackedChoices, Unlike, finite, same_choices
from attnopt.verify.packed import verify_packed
from tests.serving.models import VOCABULARY, HandWritten, sharpened

IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


class Routed(HandWritten):
    """Two of four experts for each token. They come in pairs with nearly the same scores, and are far apart; ``largest`` False takes the other two."""

    largest = True

    def __init__(self, near: float = 1e-3) -> None:
        torch.manual_seed(1)
        super().__init__()
        self.router = nn.Linear(32, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, 32, 32))
        sharpened(self)
        with torch.no_grad():
            self.router.weight[2:] = self.router.weight[:2] + near * torch.randn(2, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        taken, which = self.router(x).topk(1, dim=-1, largest=self.largest)
        every = torch.einsum("bsc,ecd->bsed", x, self.experts)
        return self.head(x + every.gather(2, which[..., None].expand(-1, -1, -1, 32)).squeeze(2) * taken.sigmoid())


def served(model: nn.Module) -> ServingModel:
    made = attnopt.optimize(model, IDS, config=attnopt.OptimizeConfig(kv_cache="paged", verify=False))
    assert isinstance(made, ServingModel)
    return made


def compared(model: nn.Module, serving: ServingModel) -> Verdict:
    form = serving.original
    assert form is not None
    return verify_packed(model, serving._call, serving.plan, IDS, lambda ids, r: form.call(ids, serving.plan, r), lambda out: form.logits(out, serving.plan))


@pytest.fixture(scope="module")
def routed() -> nn.Module:
    return Routed().eval().to(torch.bfloat16)


def test_another_choice_by_a_rounding_is_not_an_error(routed: nn.Module) -> None:
    verdict = compared(routed, served(routed))
    said = [c for c in verdict.checks if "given the original's choices" in c.detail]
    assert verdict.passed and said, [str(c) for c in verdict.checks]
    assert all(0 < int(c.detail.split("choices: ")[1].split(" of ")[0]) < 77 for c in said)


def test_a_wrong_attention_is_noticed_all_the_same(routed: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    right = paged_batched.attention

    def wrong(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, ends: Tensor, lengths: Tensor, *rest: Any) -> Tensor:
        out = right(q, k_cache, v_cache, table, ends, lengths, *rest)
        return torch.where((lengths > 20).any(), 1.3 * out, out)

    monkeypatch.setattr(paged_batched, "attention", wrong)
    assert not compared(routed, served(routed)).passed


@pytest.mark.parametrize("what", ["scores", "experts", "the least in place of the greatest"])
def test_what_is_another_model_is_noticed(routed: nn.Module, what: str) -> None:
    other = copy.deepcopy(routed)
    with torch.no_grad():
        if what == "scores":
            other.router.weight[1] *= -1.0
        elif what == "experts":
            other.experts[3] *= 1.5
        else:
            other.largest = False
    assert not compared(routed, served(other)).passed


def test_choices_are_noted_and_made_again() -> None:
    x, y = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    with Choices() as first:
        x.topk(1)
        x.topk(1, dim=0)  # not along the last axis
        torch.tensor([[1, 2]]).topk(1)  # no scores
    assert first.kinds == [(1, True)] and first.taken[0].tolist() == [[1]]
    with Choices(same_choices(first)) as again:
        values, which = y.topk(1)
    assert (values.tolist(), which.tolist(), again.differ) == ([[2.0]], [[1]], 1)
    with Choices(same_choices(first)) as same:
        x.topk(1)
    assert same.differ == 0
    with pytest.raises(Unlike), Choices(same_choices(first)):
        x.topk(1)
        x.topk(1)
    with pytest.raises(Unlike), Choices(same_choices(first)):
        x.topk(2)


def test_choices_of_packed_tokens() -> None:
    recorded = []
    for n in (2, 3):
        with Choices() as mode:
            torch.arange(4.0 * n).view(1, n, 4).topk(2)
        recorded.append(mode)
    packed = PackedChoices(recorded, [2, 3])
    scores = -torch.arange(12.0).view(3, 4)
    out = packed.run(lambda: scores.topk(2).indices, torch.tensor([1, 1, 0]), torch.tensor([0, 2, 1]))
    assert out.tolist() == [[3, 2]] * 3 and packed.differ == packed.rows == 3
    assert packed.scores[1][0][2, 0].tolist() == scores[1].tolist() and packed.scores[1][0][1].isnan().all()
    with pytest.raises(Unlike):
        packed.run(lambda: scores.topk(2, largest=False).indices, torch.tensor([1, 1, 0]), torch.tensor([0, 2, 1]))
    with pytest.raises(Unlike):
        packed.run(lambda: scores, torch.tensor([1, 1, 0]), torch.tensor([0, 2, 1]))


def test_what_was_left_out_everywhere_is_no_difference() -> None:
    a, b = finite(torch.tensor([-torch.inf, 1.0, -torch.inf]), torch.tensor([-torch.inf, 2.0, 3.0]))
    assert a.tolist() == [0.0, 1.0, -torch.inf] and b.tolist() == [0.0, 2.0, 3.0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3, 4, 5])
def test_a_library_model_in_bfloat16(seed: int) -> None:
    """Each was refused when outputs alone were compared."""
    from tests.serving.models import transformers_model

    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(seed))
    made = attnopt.optimize(transformers_model("gpt_oss").to(torch.bfloat16), kwargs={"input_ids": ids, "use_cache": False}, config=attnopt.OptimizeConfig(kv_cache="paged"))
    verdict = made.attnopt_report.verdict
    assert verdict.passed and all("given the original's choices" in c.detail for c in verdict.checks)
