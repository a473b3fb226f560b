"""A local Hugging Face folder (config.json, with or without weights) as a model with inputs. Nothing is ever downloaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.capture.example_inputs import check_signature, make_inputs
from attnopt.capture.loader import Loaded
from attnopt.capture.tokenizer import Tokenizer
from attnopt.errors import LoadError

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_BATCH, _LENGTH = 2, 128


def load_folder(folder: Path, inputs: Sequence[str] = (), attn_implementation: str = "eager", generates: bool = False) -> Loaded:
    """The model that ``config.json`` describes, in eval mode, without a KV cache, and inputs for it.

    Weights are read when the folder has them; otherwise they are random, and a note says so. Code that lies in the
    folder is not run. Raises LoadError for anything that transformers cannot load, and with ``generates`` for a model without a head.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise LoadError(f"{folder} holds no config.json: expected a Hugging Face folder, or a Python file.")
    try:
        import transformers
    except ImportError as error:
        raise LoadError(f"{folder} is a Hugging Face folder, and the package 'transformers' is not installed.", "pip install 'attnopt[hf]'") from error
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise LoadError(f"{file}:{error.lineno} is not valid JSON: {error.msg}.") from error
    has_weights = any((folder / name).is_file() for name in _WEIGHTS)
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config.use_cache = False
            kind = _model_class(transformers, raw, generates)
            if has_weights:
                model = kind.from_pretrained(folder, config=config, local_files_only=True, attn_implementation=attn_implementation, dtype="auto")
            else:
                build = getattr(kind, "_from_config", None) or kind.from_config
                model = build(config, attn_implementation=attn_implementation)
        except Exception as error:
            raise LoadError(f"{folder} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}") from error
    model.eval()
    notes = () if has_weights else (f"{folder} holds no weights ({', '.join(_WEIGHTS[::2])}): they are random.",)
    name = f"{folder.name} ({type(model).__name__})"
    args, kwargs = make_inputs(model, inputs) if inputs else ((), _inputs(model))
    check_signature(model, args, kwargs, name)
    if generates and model.get_output_embeddings() is None:
        raise LoadError(f"{name} has no head that gives logits of tokens; a model that generates needs one.", f"Name a class with a head under \"architectures\" in {file}.")
    return Loaded(model, args, kwargs, name, notes, lambda: _tokenizer(transformers, folder), _ends(model))


def _ends(model: Any) -> tuple[int, ...]:
    """The tokens with which a text ends, as the folder's generation config says, else its config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


class _Text:
    """A tokenizer of the library, of which generated text leaves special tokens out."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def encode(self, text: str, /) -> list[int]:
        found: list[int] = self.inner.encode(text)
        return found

    def decode(self, ids: Sequence[int], /) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))


def _tokenizer(transformers: Any, folder: Path) -> Tokenizer | None:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    with _quiet(transformers):
        try:
            return _Text(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        except Exception as error:
            raise LoadError(f"The tokenizer in {folder} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _model_class(transformers: Any, raw: dict[str, Any], generates: bool) -> Any:
    """The class that the configuration names, else the bare model of its type, or the one that ``generates``."""
    for name in raw.get("architectures") or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM if generates else transformers.AutoModel


def _inputs(model: nn.Module) -> dict[str, Any]:
    """Random inputs by the name of the model's main input; what the model itself offers where that name is a new one."""
    config: Any = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    # Position tables of some models start behind the padding index, so two rows of them are not for tokens.
    length = min(_LENGTH, positions - 2) if isinstance(positions, int) and positions > 2 else _LENGTH
    tokens = f"int64[{_BATCH},{length}]"
    if main == "input_ids":
        descriptions = [f"input_ids={tokens}", f"attention_mask={tokens}"]
    elif main == "pixel_values":
        sizes = _pair(getattr(config, "image_size", 224))
        descriptions = [f"pixel_values=float32[{_BATCH},{getattr(config, 'num_channels', 3)},{sizes[0]},{sizes[1]}]"]
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)  # the encoder's convolution halves them
        descriptions = [f"input_features=float32[{_BATCH},{getattr(config, 'num_mel_bins', 80)},{frames}]"]
    elif main == "input_values":
        descriptions = [f"input_values=float32[{_BATCH},16000]"]
    else:
        return dict(model.dummy_inputs)  # type: ignore[arg-type]
    if getattr(config, "is_encoder_decoder", False):
        descriptions.append(f"decoder_input_ids=int64[{_BATCH},{min(length, 32)}]")
    kwargs = make_inputs(model, descriptions)[1]
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)
    return {k: v.to(dtype) if dtype is not None and v.is_floating_point() else v for k, v in kwargs.items()}


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) else (int(size), int(size))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own bars and advice while it loads; its settings are put back."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
