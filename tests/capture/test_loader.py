"""Loading what a user names: every mistake is one clear sentence, and the inputs that come out fit the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from attnopt.capture.example_inputs import describe_inputs, make_inputs, parse_input, split_inputs
from attnopt.capture.loader import load, run_once
from attnopt.errors import LoadError

HEAD = "import torch\nfrom torch import nn\n"


def write(folder: Path, text: str, name: str = "model.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(target: object, inputs: list[str] | None = None) -> str:
    """The sentence with which loading (or the first run) fails."""
    with pytest.raises(LoadError) as caught:
        run_once(load(str(target), inputs or []))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what is found in a file


def test_model_instance_with_tensor_input(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "model = nn.Linear(4, 4)\nother = nn.Linear(2, 2)\nexample_inputs = torch.ones(2, 4)")
    loaded = load(str(path))
    assert loaded.name == "model.py:model"
    assert loaded.inputs == "float32[2,4]"
    run_once(loaded)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("net = nn.Linear(4, 4)", "net"),
        ("def build() -> nn.Linear:\n    return nn.Linear(4, 4)", "build"),
        ("from __future__ import annotations\nimport torch\nfrom torch import nn\ndef thing() -> nn.Module:\n    return nn.Linear(4, 4)", "thing"),
        ("def make_net():\n    return nn.Linear(4, 4)\ndef helper():\n    return 3", "make_net"),
        ("class Net(nn.Linear):\n    def __init__(self, d: int = 4) -> None:\n        super().__init__(d, d)\nclass Block(nn.Module):\n    def __init__(self, d): ...", "Net"),
    ],
    ids=["instance", "annotated-builder", "postponed-annotation", "builder-by-name", "class-without-required-arguments"],
)
def test_the_only_candidate_is_taken(tmp_path: Path, body: str, name: str) -> None:
    head = "" if body.startswith("from __future__") else HEAD
    path = write(tmp_path, head + body + "\ndef example_inputs():\n    return (torch.ones(2, 4),)\ndef main(): ...")
    assert load(str(path)).name == f"model.py:{name}"


def test_named_builder_and_neighbour_import(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 4", "neighbour_of_model.py")
    path = write(tmp_path, HEAD + "def a() -> nn.Module:\n    import neighbour_of_model as n\n    return nn.Linear(n.WIDTH, 4)\ndef b() -> nn.Module:\n    return nn.ReLU()\nexample_inputs = torch.ones(1, 4)")
    assert isinstance(load(f"{path}:a").model, nn.Linear)
    assert isinstance(load(f"{path}:b").model, nn.ReLU)


def test_the_file_is_seen_by_pickle_and_dataclasses(tmp_path: Path) -> None:
    body = "from dataclasses import dataclass\n@dataclass\nclass Config:\n    d: int = 4\nmodel = nn.ReLU()\nexample_inputs = torch.ones(1)"
    path = write(tmp_path, "from __future__ import annotations\n" + HEAD + body)
    assert isinstance(load(str(path)).model, nn.ReLU)


# ---- what is refused


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.py")


def test_folder_without_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


def test_not_a_python_file(tmp_path: Path) -> None:
    assert "not a Python file" in refusal(write(tmp_path, "", "weights.bin"))


def test_no_model_in_it(tmp_path: Path) -> None:
    assert "holds no model" in refusal(write(tmp_path, "x = 3"))


def test_ambiguity_lists_the_candidates(tmp_path: Path) -> None:
    assert "several models: first, second" in refusal(write(tmp_path, HEAD + "first = nn.ReLU()\nsecond = nn.ReLU()"))


def test_unknown_name_lists_what_is_there(tmp_path: Path) -> None:
    message = refusal(f"{write(tmp_path, HEAD + 'first = nn.ReLU()')}:secnod")
    assert "'secnod'" in message and "it holds first" in message


def test_the_name_is_no_model(tmp_path: Path) -> None:
    assert "of type int" in refusal(f"{write(tmp_path, 'x = 3')}:x")


def test_builder_that_needs_arguments(tmp_path: Path) -> None:
    assert "needs arguments (config)" in refusal(f"{write(tmp_path, HEAD + 'def build(config): ...')}:build")


def test_builder_that_fails_names_the_line(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, HEAD + "def model():\n    raise RuntimeError('no such\\nthing')"))
    assert "line 4: RuntimeError: no such thing" in message


def test_builder_that_returns_something_else(tmp_path: Path) -> None:
    assert "returned int" in refusal(write(tmp_path, "def model():\n    return 3"))


def test_file_that_raises_names_the_line(tmp_path: Path) -> None:
    assert "line 2: ValueError: bad" in refusal(write(tmp_path, "x = 1\nraise ValueError('bad')"))


def test_file_that_exits(tmp_path: Path) -> None:
    assert "SystemExit" in refusal(write(tmp_path, "raise SystemExit(0)"))


def test_syntax_error_names_the_line(tmp_path: Path) -> None:
    assert "model.py:2 is not valid Python" in refusal(write(tmp_path, "x = 1\ndef ("))


def test_missing_package_is_named(tmp_path: Path) -> None:
    assert "needs the package 'no_such_package_at_all'" in refusal(write(tmp_path, "import no_such_package_at_all"))


def test_no_example_inputs(tmp_path: Path) -> None:
    assert "has no example_inputs" in refusal(write(tmp_path, HEAD + "model = nn.ReLU()"))


def test_inputs_that_do_not_fit_the_signature(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, HEAD + "model = nn.ReLU()"), ["ids=int64[2,3]"])
    assert "do not fit model.py:model" in message and "(input)" in message


def test_model_that_fails_names_the_line_and_the_inputs(tmp_path: Path) -> None:
    body = "class M(nn.Module):\n    def forward(self, x):\n        return x @ torch.ones(3, 3)\nmodel = M()\nexample_inputs = torch.ones(2, 4)"
    message = refusal(write(tmp_path, HEAD + body))
    assert "model.py:5" in message and "float32[2,4]" in message and "RuntimeError" in message


# ---- --input


@pytest.mark.parametrize(
    ("text", "part"),
    [("ids", "cannot be read"), ("ids=int64", "cannot be read"), ("x=int65[2]", "no dtype 'int65'"), ("x=int64[2,-1]", "positive"), ("x=int64[2,]", "positive"), ("x=int64[0]", "positive")],
)
def test_bad_input_descriptions(text: str, part: str) -> None:
    with pytest.raises(LoadError, match="--input"):
        parse_input(text)
    with pytest.raises(LoadError) as caught:
        parse_input(text)
    assert part in str(caught.value)


def test_the_same_input_twice() -> None:
    with pytest.raises(LoadError, match="x more than once"):
        make_inputs(nn.ReLU(), ["x=int64[2]", "x=int64[2]"])


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.types = nn.Embedding(50, 4), nn.Embedding(40, 4), nn.Embedding(2, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(input_ids) + self.positions(position_ids) + self.types(token_type_ids) * attention_mask[..., None]


def test_made_inputs_lie_within_the_embeddings() -> None:
    names = ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
    args, kwargs = make_inputs(Embedder(), [f"{name}=int64[2,32]" for name in names])
    assert args == () and list(kwargs) == names
    assert 16 < kwargs["input_ids"].max() < 40
    assert set(kwargs["token_type_ids"].unique().tolist()) == {0, 1}
    assert kwargs["attention_mask"].eq(1).all()
    assert kwargs["position_ids"][1].tolist() == list(range(32))
    Embedder()(**kwargs)
    again = make_inputs(Embedder(), [f"{name}=int64[2,32]" for name in names])[1]
    assert torch.equal(again["input_ids"], kwargs["input_ids"])


def test_positional_descriptions_and_scalars() -> None:
    args, kwargs = make_inputs(nn.ReLU(), ["float32[2, 3]", "bool[2]", "mask=float32[2]", "n=int64[]"])
    assert describe_inputs(args, kwargs) == "float32[2,3], bool[2], mask=float32[2], n=int64[]"
    assert args[1].all() and kwargs["mask"].eq(1).all()


@pytest.mark.parametrize(
    ("value", "args", "kwargs"),
    [(1, (1,), {}), ((1, 2), (1, 2), {}), ([1, 2], (1, 2), {}), ({"x": 1}, (), {"x": 1}), (((1,), {"x": 2}), (1,), {"x": 2})],
    ids=["one", "tuple", "list", "dict", "both"],
)
def test_forms_of_example_inputs(value: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    assert split_inputs(value) == (args, kwargs)


# ---- Hugging Face folders


def folder(tmp_path: Path, **config: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 40}


def test_folder_without_weights(tmp_path: Path) -> None:
    loaded = load(str(folder(tmp_path, **GPT2)))
    assert type(loaded.model).__name__ == "GPT2LMHeadModel" and not loaded.model.training
    assert loaded.model.config._attn_implementation == "eager"
    assert "random" in loaded.notes[0]
    assert loaded.inputs == "input_ids=int64[2,38], attention_mask=int64[2,38]"
    run_once(loaded)


def test_folder_with_weights(tmp_path: Path) -> None:
    import transformers

    saved = transformers.BertModel(transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64))
    saved.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), ["input_ids=int64[3,7]"])
    assert loaded.notes == () and loaded.inputs == "input_ids=int64[3,7]"
    assert all(torch.equal(p, q) for p, q in zip(saved.state_dict().values(), loaded.model.state_dict().values(), strict=True))
    run_once(loaded)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 8},
        {"model_type": "t5", "architectures": ["T5Model"], "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64, "decoder_start_token_id": 0},
        {"model_type": "whisper", "architectures": ["WhisperModel"], "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 64, "max_source_positions": 20, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        {"model_type": "roberta", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 64, "max_position_embeddings": 34},
    ],
    ids=lambda c: str(c["model_type"]),
)  # fmt: skip
def test_inputs_of_each_kind_of_folder(tmp_path: Path, config: dict[str, object]) -> None:
    run_once(load(str(folder(tmp_path, **config))))


def test_broken_and_unknown_configurations(tmp_path: Path) -> None:
    assert "cannot be loaded" in refusal(folder(tmp_path, model_type="no_such_model"))
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path)
