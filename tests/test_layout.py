"""What the layout promises: layers, a light import, files of one idea, and rooms that know no architecture by name."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnopt"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Names of architectures and of the libraries that hold them. Analysis and passes recognise meaning, so none may appear there.
NAMES = frozenset(
    """transformers huggingface timm diffusers vllm sglang
    llama mistral mixtral gemma qwen gpt gptj nanogpt bert roberta deberta albert electra distilbert modernbert t5 bart whisper bloom falcon
    mpt vit swin deit siglip xlnet longformer bigbird performer mamba deepseek starcoder cohere olmo granite""".split()
)


def _names_in(line: str) -> set[str]:
    """The words of a line that are such names: in snake_case, CamelCase, and with a version at their end (gpt2)."""
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", line).lower())
    return NAMES & {*words, *(x + y for x, y in itertools.pairwise(words))}


@pytest.mark.parametrize("room", ["analysis", "passes"])
def test_no_architecture_or_library_is_named(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files, f"attnopt/{room} holds no Python file"
    lines = [(file.relative_to(ROOT), number, line) for file in files for number, line in enumerate(file.read_text().splitlines(), 1)]
    found = [f"{file}:{number}: {', '.join(sorted(names))}" for file, number, line in lines if (names := _names_in(line))]
    assert not found, "these rooms work by meaning, whatever the model is called:\n" + "\n".join(found)


@pytest.mark.parametrize("text", ["import transformers", "class LlamaMatcher:", "if kind == 'gpt2':", "# the way BERT writes it", "is_t5 = True", "big_bird"])
def test_the_check_for_names_sees_them(text: str) -> None:
    assert _names_in(text)


@pytest.mark.parametrize("text", ["def optimize(graph):", "kept 5 options", "class VerticalWindow:", "the transformed value"])
def test_the_check_for_names_leaves_words_alone(text: str) -> None:
    assert not _names_in(text)


def test_files_hold_one_idea() -> None:
    """About 350 lines, kernels about 500: these limits leave room to breathe."""
    limits = {path: 550 if "kernels" in path.parts else 400 for path in SOURCES}
    long = [f"{path.relative_to(ROOT)}: {n} lines, at most {limits[path]}" for path in SOURCES if (n := len(path.read_text().splitlines())) > limits[path]]
    assert not long, "\n".join(long)


def test_no_python_package_beside_attnopt_shadows_a_library() -> None:
    """A top-level ``kernels`` or ``passes`` on sys.path would be imported in place of the package of that name."""
    assert not [x for x in ("kernels", "passes", "ir", "verify") if (ROOT / x).exists()]


def _modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import attnopt", "import attnopt.cli.main"])
def test_import_starts_nothing_heavy(statement: str) -> None:
    heavy = _modules_after(statement) & {"torch", "triton", "transformers", "onnx", "sympy", "numpy", "rich"}
    assert not heavy, f"`{statement}` imports {sorted(heavy)}"


def test_importing_the_api_leaves_the_compilers_alone() -> None:
    heavy = _modules_after("import attnopt\nattnopt.optimize") & {"transformers", "onnx", "torch._inductor.compile_fx", "triton.compiler"}
    assert not heavy, f"`attnopt.optimize` imports {sorted(heavy)}"
