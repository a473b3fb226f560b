"""From what a user names on the command line to a model and inputs for it: ``model.py``, ``model.py:name``, or a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attnopt.capture.example_inputs import check_signature, describe_inputs, make_inputs, split_inputs
from attnopt.capture.tokenizer import Tokenizer, of_module
from attnopt.errors import LoadError

if TYPE_CHECKING:
    from torch import nn

_NOT_BUILDERS = ("main", "example_inputs")
_BUILDER_WORDS = ("model", "net", "build", "make", "create")


@dataclass(frozen=True)
class Loaded:
    """A model with inputs that fit its ``forward``, and a name for people. ``notes`` are things the user should know.

    ``tokenizer`` loads what makes token ids of text, None where there is none; ``stop_tokens`` are the ids with which the model says that a text ends.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    notes: tuple[str, ...] = field(default=())
    tokenizer: Callable[[], Tokenizer | None] = field(default=lambda: None)
    stop_tokens: tuple[int, ...] = field(default=())

    @property
    def inputs(self) -> str:
        return describe_inputs(self.args, self.kwargs)


def load(target: str, inputs: Sequence[str] = (), *, attn_implementation: str | None = None, generates: bool = False) -> Loaded:
    """The model that ``target`` names, and inputs for it.

    ``target`` is ``path/model.py`` (its ``model``, or the only module or builder in it), ``path/model.py:name`` (an
    ``nn.Module``, or a class or function without required arguments that builds one), or a local Hugging Face folder.
    ``inputs`` are descriptions such as ``input_ids=int64[2,128]``; without any, ``example_inputs`` of the same file is used
    (a value, or a function that returns one), or what the folder's configuration says.
    ``attn_implementation`` is for Hugging Face folders ("eager" unless given). ``generates``: a folder's model must have a head that gives logits; of a
    configuration that names no class it is the one for text that goes on.

    Raises LoadError, in one sentence, for everything that a user can get wrong.
    """
    path, name = _resolve(target)
    if path.is_dir():
        from attnopt.capture.loader_hf import load_folder

        return load_folder(path, inputs, attn_implementation or "eager", generates)
    if attn_implementation is not None:
        raise LoadError(f"An attention implementation can be chosen for a Hugging Face folder only, and {path} is a file.")
    module, name, model = _model_of_file(path, name)
    label = f"{path.name}:{name}"
    if inputs:
        args, kwargs = make_inputs(model, inputs)
    elif hasattr(module, "example_inputs"):
        given = module.example_inputs
        args, kwargs = split_inputs(_call(given, path, f"{path.name}:example_inputs") if callable(given) else given)
    elif not inspect.signature(model.forward).parameters:
        args, kwargs = (), {}
    else:
        raise LoadError(
            f"{path.name} has no example_inputs to run {name} on.",
            "Define example_inputs (a value, or a function that returns it) in the file, or describe them: --input input_ids=int64[2,128].",
        )
    check_signature(model, args, kwargs, label)
    return Loaded(model, args, kwargs, label, tokenizer=lambda: of_module(module, path, lambda f: _call(f, path, f"{path.name}:tokenizer")))


def load_model(target: str) -> nn.Module:
    """The model that ``target`` names, as ``load`` finds it, without inputs."""
    path, name = _resolve(target)
    if path.is_dir():
        from attnopt.capture.loader_hf import load_folder

        return load_folder(path).model
    return _model_of_file(path, name)[2]


def _resolve(target: str) -> tuple[Path, str]:
    """The existing Python file or folder of ``path`` or ``path:name``, and the name ("" for none)."""
    path_text, colon, name = target.rpartition(":")
    if not colon or Path(target).exists():
        path_text, name = target, ""
    path = Path(path_text)
    if not path.exists():
        hint = "A model of a hub has to be downloaded first; attnopt reads local files only." if path.suffix != ".py" and "/" in target else ""
        raise LoadError(f"{path_text} does not exist: expected a Python file, or a folder with a Hugging Face config.json.", hint)
    if path.is_dir() and name:
        raise LoadError(f"{target}: a name after ':' belongs to a Python file, and {path_text} is a folder.")
    if path.is_file() and path.suffix != ".py":
        hint = f"Of an ONNX file: attnopt optimize {path_text} -o optimized.onnx" if path.suffix.lower() == ".onnx" else ""
        raise LoadError(f"{path_text} is not a Python file: expected model.py, model.py:name, or a folder with a Hugging Face config.json.", hint)
    return path, name


def _model_of_file(path: Path, name: str) -> tuple[ModuleType, str, nn.Module]:
    module = _execute(path)
    name, value = _find(module, path, name)
    return module, name, _build(value, path, f"{path.name}:{name}")


def _execute(path: Path) -> ModuleType:
    """Run a file as a module of its own, with its folder importable as if it had been started with ``python path``."""
    key = f"attnopt_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} cannot be imported as a Python file.")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # it stays: a builder may import its neighbours later
    sys.modules[key] = module  # dataclasses and pickle look the module up by name
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise LoadError(f"{error.filename or path}:{error.lineno} is not valid Python: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        raise LoadError(f"{path} cannot be run: {_told(error, path)}") from error
    return module


def _find(module: ModuleType, path: Path, name: str) -> tuple[str, Any]:
    """The named value, else ``model``, else the only module, the only builder function or the only module class."""
    if name:
        if not hasattr(module, name):
            raise LoadError(f"{path.name} has no {name!r}{_candidates_text(module)}.")
        return name, getattr(module, name)
    if hasattr(module, "model"):
        return "model", module.model
    for found in _tiers(module):
        if len(found) > 1:
            raise LoadError(f"{path.name} holds several models: {', '.join(found)}.", f"Name one of them: {path}:{found[0]}")
        if found:
            return found[0], getattr(module, found[0])
    raise LoadError(
        f"{path.name} holds no model: expected an nn.Module, or a function or class without required arguments that builds one.",
        "Call it `model`, or name it after a colon: model.py:name.",
    )


def _tiers(module: ModuleType) -> list[list[str]]:
    """Names of what could be meant, best first: module instances, builder functions, module classes that need no arguments."""
    from torch import nn

    own = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    local = {n: v for n, v in own.items() if getattr(v, "__module__", None) == module.__name__ and n not in _NOT_BUILDERS}
    instances = [n for n, v in own.items() if isinstance(v, nn.Module)]
    functions = [n for n, v in local.items() if inspect.isfunction(v) and _looks_like_builder(n, v) and not _required(v)]
    classes = [n for n, v in local.items() if inspect.isclass(v) and issubclass(v, nn.Module) and not _required(v)]
    return [instances, functions, classes]


def _looks_like_builder(name: str, function: Callable[..., Any]) -> bool:
    """By its return annotation (an nn.Module), and without one by its name."""
    from torch import nn

    returns = inspect.signature(function).return_annotation
    if isinstance(returns, str):
        returns = _evaluate(returns, function)
    if returns is inspect.Signature.empty:
        return any(word in name.lower() for word in _BUILDER_WORDS)
    return inspect.isclass(returns) and issubclass(returns, nn.Module)


def _evaluate(annotation: str, function: Callable[..., Any]) -> Any:
    """What a postponed annotation names, None for what is no dotted name of the function's module."""
    first, *rest = annotation.split(".")
    value = getattr(function, "__globals__", {}).get(first)
    for part in rest:
        value = getattr(value, part, None)
    return value


def _required(value: Callable[..., Any]) -> list[str]:
    """Names of the parameters without a default."""
    parameters = inspect.signature(value).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _candidates_text(module: ModuleType) -> str:
    names = [name for tier in _tiers(module) for name in tier]
    return f"; it holds {', '.join(names)}" if names else ", nor anything else that is or builds an nn.Module"


def _build(value: Any, path: Path, label: str) -> nn.Module:
    from torch import nn

    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise LoadError(f"{label} is of type {type(value).__name__}: expected an nn.Module, or a function or class that builds one.")
    needed = _required(value)
    if needed:
        raise LoadError(f"{label} needs arguments ({', '.join(needed)}).", "Name a function without required arguments that builds the model.")
    model = _call(value, path, label)
    if not isinstance(model, nn.Module):
        raise LoadError(f"{label}() returned {type(model).__name__}: expected an nn.Module.")
    return model


def _call(function: Callable[[], Any], path: Path, label: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise LoadError(f"{label}() failed: {_told(error, path)}") from error


def _told(error: BaseException, path: Path) -> str:
    """An exception in one sentence, with the last line of the user's own file that it passed through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    where = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, ModuleNotFoundError):
        return f"{where}it needs the package {error.name!r}, which is not installed."
    message = " ".join(str(error).split())
    return f"{where}{type(error).__name__}{': ' + message if message else ''}"


def run_once(loaded: Loaded) -> None:
    """Run the model on its inputs, as it is, without gradients. Raises LoadError, with the user's own line, when it fails.

    Models whose weights are on the meta device are not run.
    """
    import torch

    if any(p.is_meta for p in loaded.model.parameters()):
        return
    try:
        with torch.no_grad():
            loaded.model(*loaded.args, **loaded.kwargs)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename and Path(f.filename).resolve() != Path(__file__).resolve()]
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        message = " ".join(str(error).split()) or "no message"
        raise LoadError(f"{loaded.name} fails on its inputs ({loaded.inputs}): {type(error).__name__}{where}: {message}") from error
