"""Saving an optimized model, and reading it in a process that knows nothing of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import hf_inputs, hf_model, ids, tiny_gpt
from torch import Tensor, nn

import attnopt
from attnopt.config import OptimizeConfig
from attnopt.emit.pt2 import load_pt2, save_pt2
from attnopt.errors import AttnoptError, CaptureError, LoadError

QUICK = OptimizeConfig(verify=False)
# A backend that keeps the operator in the graph, so that the file needs it.
REFERENCE = OptimizeConfig(verify=False, backend="reference")


def test_saved_and_loaded_at_other_sizes(tmp_path: Path) -> None:
    model = tiny_gpt()
    fast = attnopt.optimize(model, (ids(),), config=REFERENCE)
    program = save_pt2(fast, tmp_path / "model.pt2")
    assert sum("attnopt.attention" in str(n.target) for n in program.graph.nodes) == 2
    again = load_pt2(tmp_path / "model.pt2")
    for batch, length in ((2, 12), (1, 12), (4, 31), (1, 1)):
        torch.testing.assert_close(again(ids(batch, length)), model(ids(batch, length)), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("first", ["import attnopt, torch", "import torch, attnopt"])
def test_a_fresh_process_needs_only_torch_and_attnopt(tmp_path: Path, first: str) -> None:
    model, inputs = hf_model("llama"), hf_inputs("llama", 3, 11)
    save_pt2(attnopt.optimize(model, hf_inputs("llama"), config=REFERENCE), tmp_path / "model.pt2")
    torch.save((inputs, model(**inputs).logits), tmp_path / "expected.pt")
    code = f"""
{first}
run = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(run(**inputs)["logits"], expected, rtol=1e-4, atol=1e-5)
import sys
print(sorted(m for m in ("transformers", "torch._inductor.compile_fx") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_another_call_and_static_shapes(tmp_path: Path) -> None:
    fast = attnopt.optimize(tiny_gpt(), (ids(),), config=QUICK)
    save_pt2(fast, tmp_path / "model.pt2", (ids(3, 5), torch.ones(3, 5)), dynamic_shapes="static")
    again = load_pt2(tmp_path / "model.pt2")
    assert again(ids(3, 5), torch.ones(3, 5)).shape == (3, 5, 61)
    with pytest.raises(Exception, match="size|shape"):
        again(ids(2, 5), torch.ones(2, 5))


def test_a_loaded_program_can_be_verified(tmp_path: Path) -> None:
    model = tiny_gpt()
    save_pt2(attnopt.optimize(model, (ids(),), config=QUICK), tmp_path / "model.pt2")
    assert attnopt.verify(model, load_pt2(tmp_path / "model.pt2"), (ids(),)).passed is True


def test_programs_are_called_as_the_example_was(tmp_path: Path) -> None:
    weights = torch.rand(2, 12)
    for given in (((ids(), weights), {}), ((ids(),), {"weights": weights}), ((), {"ids": ids(), "weights": weights})):
        fast = attnopt.optimize(tiny_gpt(), given[0], kwargs=given[1], config=QUICK)
        save_pt2(fast, tmp_path / "model.pt2")
        assert load_pt2(tmp_path / "model.pt2")(*given[0], **given[1]).shape == (2, 12, 61)


def test_what_cannot_be_saved_or_read(tmp_path: Path) -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    compiled = attnopt.optimize(Refuses(), (torch.ones(2, 3),), config=OptimizeConfig(verify=False, inductor=False))
    with pytest.raises(CaptureError, match=r"OptimizedRefuses goes through torch\.compile and holds no graph to save"):
        save_pt2(compiled, tmp_path / "model.pt2")
    with pytest.raises(AttnoptError, match=r"takes a module that attnopt\.optimize returned, got TinyGPT"):
        save_pt2(tiny_gpt(), tmp_path / "model.pt2")
    with pytest.raises(LoadError, match="does not exist"):
        load_pt2(tmp_path / "absent.pt2")
    (tmp_path / "text.pt2").write_text("no program")
    with pytest.raises(LoadError, match=r"text\.pt2 cannot be read as an exported program"):
        load_pt2(tmp_path / "text.pt2")
