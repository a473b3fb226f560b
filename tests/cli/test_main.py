"""The command line as a user meets it: what is printed where, and exit codes. The API stands behind a small fake here;
``test_end_to_end.py`` runs the real one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.cli.main import app, run
from attnopt.errors import CaptureError
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Traits
from attnopt.kernels import registry
from attnopt.remarks import PAGES, NodeInfo, Remark
from attnopt.report import Check, Report, Site, Verdict

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(4, 4)
    def forward(self, x):
        return self.out(self.drop(x))

model = Net()
example_inputs = torch.ones(2, 4)
"""


def spec() -> AttentionSpec:
    B, S = E.sym("B"), E.sym("S")
    d = Dims(B, E.const(8), E.const(2), S, S, E.const(16), E.const(16))
    return AttentionSpec(dims=d, score=E.mul(E.const(0.25), E.score()), mask=E.le(d.k, d.q), traits=Traits(scale=0.25, causal="top_left"))


def sites(n: int) -> list[Site]:
    return [Site(f"layers.{i}.attn", "model.py:9", "replaced", spec(), "sdpa", "CPU flash", [Remark("AO101", "replaced")]) for i in range(n)]


class FakeApi(ModuleType):
    """``attnopt.api`` that returns a prepared report and remembers how it was called."""

    def __init__(self, report: Report) -> None:
        super().__init__("attnopt.api")
        self.report, self.calls = report, []
        self.error: Exception | None = None

    def optimize(self, model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if self.error is not None:
            raise self.error
        self.calls.append((model, args, options))
        options["progress"]("verify", 1, 2)
        model.attnopt_report = self.report  # type: ignore[assignment]
        return model

    def inspect(self, model: nn.Module, *args: Any, **options: Any) -> Report:
        self.calls.append((model, args, options))
        return self.report


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    import attnopt

    good = Report(sites(3), [], Verdict(True, [Check("output", 1e-7, 4e-7, True)]), {"capture": 1.0, "passes": 0.25})
    fake = FakeApi(good)
    monkeypatch.setitem(sys.modules, "attnopt.api", fake)
    monkeypatch.setattr(attnopt, "api", fake, raising=False)
    return fake


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return "model.py"


# ---- optimize


def test_optimize_shows_sites_verdict_speed_and_a_summary_last(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", model]) == 0
    out, err = capsys.readouterr()
    assert "layers.0-2.attn (3)" in out and "causal, GQA 8/2" in out and "sdpa" in out
    assert "peak memory" in out and "capture 1.0 s, passes 0.2 s" in out
    assert out.splitlines()[-1].startswith("Done: 3 of 3 attentions replaced, verified: 1 checks, worst error 1.00e-07 of budget 4.00e-07, ")
    assert err == ""


def test_optimize_hands_model_inputs_and_options_on(api: FakeApi, model: str) -> None:
    assert run(["optimize", model, "--no-benchmark", "--no-verify", "--disable-pass", "cleanup", "--print-ir-after", "all", "--backend", "reference", "--capture", "export", "--merge-kv-heads", "2"]) == 0
    net, args, options = api.calls[0]
    config = options["config"]
    assert not net.training and len(args[0]) == 1 and options["kwargs"] == {}
    assert config.merge_kv_heads == 2
    assert (config.verify, config.disable_passes, config.print_ir_after, config.backend, config.capture) == (False, ("cleanup",), ("all",), "reference", "export")


def test_train_dtype_and_input_reach_the_model(api: FakeApi, model: str) -> None:
    assert run(["optimize", model, "--train", "--dtype", "float64", "--input", "x=float32[3,4]", "--no-benchmark"]) == 0
    net, args, options = api.calls[0]
    assert net.training and net.out.weight.dtype == torch.float64 and args[0] == ()
    assert options["kwargs"]["x"].shape == (3, 4) and options["kwargs"]["x"].dtype == torch.float64


def test_json_is_all_that_stands_on_stdout(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["exit_code"] == 0 and facts["inputs"] == "float32[2,4]" and len(facts["sites"]) == 3
    assert facts["benchmark"]["original"]["seconds"] > 0 and facts["verdict"]["passed"] is True


def test_failed_verification_exits_with_1(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    api.report.verdict = Verdict(False, [Check("output", 1e-3, 4e-7, False)])
    assert run(["optimize", model, "--no-benchmark"]) == 1
    out = capsys.readouterr().out
    assert "attnopt verify model.py" in out and out.splitlines()[-1].startswith("Not done: 3 of 3 attentions replaced, FAILED: ")


def test_require_all_names_what_was_missed(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    remark = Remark("AO203", "the probabilities are returned", "layers.3.attn", "model.py:9")
    api.report.sites.append(Site("layers.3.attn", "model.py:9", "missed", None, "", "its probabilities are returned", [remark]))
    assert run(["optimize", model, "--no-benchmark"]) == 0
    out = capsys.readouterr().out
    assert "AO203" in out and PAGES["AO203"].hint in out and "attnopt explain model.py: on which line and why" in out and "(missed)" in out
    assert run(["optimize", model, "--no-benchmark", "--require-all"]) == 1
    assert "1 of 4 were not replaced: layers.3.attn" in capsys.readouterr().out


def test_unverified_is_said(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    api.report.verdict = Verdict()
    assert run(["optimize", model, "--no-benchmark", "--no-verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Done: 3 of 3 attentions replaced, unverified"


def test_sentences_are_one_line_on_a_narrow_terminal(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run(["optimize", model, "--no-benchmark"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("Done: 3 of 3") and lines[-1].endswith("of budget 4.00e-07")
    assert all(len(x) <= 60 for x in lines if x.startswith(("│", "┃", "┏", "└")))


def test_model_without_attention(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    api.report.sites.clear()
    assert run(["optimize", model, "--no-benchmark"]) == 0
    assert "No attention was found" in capsys.readouterr().out


def test_inspect_changes_nothing_and_says_so(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", model]) == 0
    assert "3 of 3 attentions can be replaced. Nothing was changed" in " ".join(capsys.readouterr().out.split())


# ---- what goes wrong


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error of a command line that must end with exit code 2, one sentence and no traceback."""
    assert run(list(argv)) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert "Traceback" not in out + err
    assert lines[0].startswith("error: ") and all(x.startswith("hint: ") for x in lines[1:]) and len(lines) <= 2
    return lines[0]


def test_missing_file(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.py does not exist" in refusal(capsys, "optimize", "nothing.py")


def test_no_model_in_the_file(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.py").write_text("x = 1")
    assert "holds no model" in refusal(capsys, "optimize", "empty.py")


def test_inputs_that_do_not_fit(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "do not fit" in refusal(capsys, "optimize", model, "--input", "y=float32[2,4]")


def test_input_that_cannot_be_read(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in refusal(capsys, "optimize", model, "--input", "y:float32")


def test_autotune_is_handed_on(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", model, "--no-benchmark", "--autotune"]) == 0
    assert api.calls[0][2]["config"].autotune is True
    assert "autotune chooses the backend, and backend is 'reference'" in refusal(capsys, "optimize", model, "--autotune", "--backend", "reference")


def test_unknown_backend(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no backend 'flahs'" in refusal(capsys, "optimize", model, "--backend", "flahs")


def test_backend_that_is_switched_off(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_DISABLE", "reference")
    assert "switched off by ATTNOPT_DISABLE" in refusal(capsys, "optimize", model, "--backend", "reference")


def test_backend_whose_package_is_not_installed(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "triton" else found(name, package))
    assert "'triton' cannot be used here: the package triton is not installed" in refusal(capsys, "optimize", model, "--backend", "triton")


@pytest.mark.parametrize(("device", "part"), [("nowhere", "'nowhere' is no device"), ("cuda:99", "CUDA devices that PyTorch can use")])
def test_device_that_is_not_there(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str], device: str, part: str) -> None:
    assert part in refusal(capsys, "optimize", model, "--device", device)


def test_output_folder_that_is_not_there(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the folder nowhere does not exist" in refusal(capsys, "optimize", model, "--output", "nowhere/model.pt2")


def test_error_in_json(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", "nothing.py", "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["exit_code"] == 2 and "does not exist" in facts["error"]


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize"]) == 2
    assert run(["optimise", "model.py"]) == 2
    assert run(["optimize", "model.py", "--dtype", "float7"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_traceback_only_when_asked_for(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    api.error = CaptureError("The model branches on a value.")
    assert "branches on a value" in refusal(capsys, "optimize", model)
    assert run(["optimize", model, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_of_ours_exits_with_101(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    api.error = KeyError("node_7")
    assert run(["optimize", model]) == 101
    err = capsys.readouterr().err
    assert "This is a bug in attnopt: KeyError: 'node_7'" in err and "report" in err and "Traceback" not in err


# ---- explain, env, help


def test_explain_prints_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "ao203"]) == 0
    out = capsys.readouterr().out
    assert PAGES["AO203"].title in out and "What to do:" in out


def test_explain_lists_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain"]) == 0
    out = capsys.readouterr().out
    assert all(code in out for code in PAGES)


@pytest.mark.parametrize("code", ["AO999", "ao20", "AO2031"])
def test_explain_of_an_unknown_code_names_near_ones(capsys: pytest.CaptureFixture[str], code: str) -> None:
    assert re.search(f"no remark '{code}'; near it are AO", refusal(capsys, "explain", code))


def test_explain_of_a_code_in_json_has_the_whole_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "AO203", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"code": "AO203", **vars(PAGES["AO203"])} and "class Attention" in facts["example"]


@pytest.mark.parametrize(("argv", "part"), [(["AO203", "--site", "a"], "--site needs a MODEL to explain, and AO203 is a remark"), (["--dtype", "float32"], "--dtype needs a MODEL to explain, and none was given")])
def test_explain_of_a_code_takes_no_options_of_a_model(capsys: pytest.CaptureFixture[str], argv: list[str], part: str) -> None:
    assert run(["explain", *argv]) == 2
    assert part in capsys.readouterr().err


def missed(n: int) -> list[Site]:
    node = NodeInfo("aten::mean", "mean", ("s0", "4"), "float32", "model.py:11", (2, 4))
    why = "the probabilities are also read by aten::mean."
    return [Site(f"layers.{i}.attn", "model.py:10", "missed", None, "", why, [Remark("AO203", why, f"layers.{i}.attn", "model.py:10", node=node)]) for i in range(n)]


def test_explain_of_a_model_tells_where_what_why_and_what_to_do_once_for_all_that_are_alike(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    api.report.sites += [Site(s.name.replace("layers", "other"), *list(vars(s).values())[1:]) for s in missed(2)]
    assert run(["explain", model]) == 0
    out, err = capsys.readouterr()
    assert out.count("other.0-1.attn (2): missed") == 1 and "layers.0" not in out and err == ""
    lines = [" ".join(x.split()) for x in out.splitlines()]
    page = PAGES["AO203"]
    assert lines[1:] == [
        "other.0-1.attn (2): missed",
        "at model.py:10",
        "9 | def forward(self, x):",
        "> 10 | return self.out(self.drop(x))",
        "",
        f"AO203 {page.title}",
        "actual the probabilities are also read by aten::mean.",
        "node aten::mean 'mean', float32[s0, 4], in the example [2, 4], at model.py:11",
        "10 | return self.out(self.drop(x))",
        "> 11 |",
        "12 | model = Net()",
        f"supported {page.supported}",
        f"because {page.cause}",
        f"change {page.hint}",
        "",
        "3 of 5 attentions can be replaced. Nothing was changed or compared.",
    ]


def test_explain_compares_nothing(api: FakeApi, model: str) -> None:
    assert run(["explain", model, "--backend", "reference"]) == 0
    assert api.calls[0][2]["config"].verify is False and api.calls[0][2]["config"].backend == "reference"


def test_explain_of_one_replaced_site(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", model, "--site", "layers.1.attn"]) == 0
    out = capsys.readouterr().out
    assert "layers.1.attn: replaced: causal, GQA 8/2" in out and "layers.0" not in out
    lines = [" ".join(x.split()) for x in out.splitlines()]
    assert "score 0.25 * s" in lines and "mask query q sees key k where k <= q" in lines and "kernel sdpa: CPU flash" in lines
    assert "sizes batch B, 8 query heads, 2 KV heads, S queries, S keys, head size 16" in lines


def test_explain_says_so_when_nothing_is_missed(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    api.report.remarks.append(Remark("AO301", "Dimension 1 of x was fixed to 4 while capturing.", source="model.py:10"))
    assert run(["explain", model]) == 0
    out = capsys.readouterr().out
    assert "Every attention was replaced, and none is weak. To see what one was proven to be, name it: layers.0-2.attn (3)." in out
    assert "the whole model" in out and "AO301" in out and "> 10 |" in out and out.splitlines()[-1].startswith("3 of 3 attentions can be replaced.")


def test_explain_of_a_site_that_is_not_there_names_those_that_are(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", model, "--site", "layers.1"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: There is no site 'layers.1'; the sites of this model are layers.0-2.attn (3).", "hint: Close to it: layers.1.attn, layers.2.attn, layers.0.attn."]
    assert "no site 'zzz'; the sites of this model are layers.0-2.attn (3)." in refusal(capsys, "explain", model, "--site", "zzz")
    api.report.sites.clear()
    assert "no site 'zzz': no attention was found in this model." in refusal(capsys, "explain", model, "--site", "zzz")


def test_explain_of_a_model_in_json(api: FakeApi, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    api.report.sites[:] = missed(2)
    assert run(["explain", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (site,) = facts["sites"]
    assert (site["name"], site["alike"], site["status"]) == ("layers.0.attn", ["layers.0.attn", "layers.1.attn"], "missed")
    assert site["lines"]["text"] == "return self.out(self.drop(x))" and facts["known_sites"] == site["alike"]
    (remark,) = site["remarks"]
    assert (remark["code"], remark["node"]["operator"], remark["change"], remark["supported"]) == ("AO203", "aten::mean", PAGES["AO203"].hint, PAGES["AO203"].supported)


def test_explain_of_a_file_that_is_not_there(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.py does not exist" in refusal(capsys, "explain", "nothing.py")


def test_env_gives_each_backend_or_its_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_DISABLE", "sdpa")
    assert run(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] and facts["backends"]["reference"] is None and "ATTNOPT_DISABLE" in facts["backends"]["sdpa"]
    assert run(["env"]) == 0
    text = capsys.readouterr().out
    assert all(f"backend {name}" in text for name in registry.backends())


def test_the_help_names_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in registry.backends()) and "--autotune" in text


def test_the_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    lines = [x.split(maxsplit=1) for x in capsys.readouterr().out.partition("Commands:")[2].splitlines() if x.strip()]
    assert [x[0] for x in lines] == sorted(app.commands) and {"bench", "generate"} < set(app.commands)
    assert all(len(x) == 2 and x[1] for x in lines)


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in app.commands:
        assert run([name, "--help"]) == 0
        assert "Usage: attnopt" in capsys.readouterr().out
