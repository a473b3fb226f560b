"""What turns text into token ids and back: ``tokenizer`` of the user's file, or the one in a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from attnopt.errors import LoadError


class Tokenizer(Protocol):
    """Text to token ids, with whatever special tokens a prompt begins with, and ids to text."""

    def encode(self, text: str, /) -> Sequence[int]: ...
    def decode(self, ids: Sequence[int], /) -> str: ...


def of_module(module: ModuleType, path: Path, call: Callable[[Callable[[], Any]], Any]) -> Tokenizer | None:
    """``tokenizer`` of a file: an object with ``encode`` and ``decode``, or a function or class without arguments that gives one; None where it has none.

    ``call`` calls what the user wrote and tells its errors. Raises LoadError for anything else of that name.
    """
    found = getattr(module, "tokenizer", None)
    if found is None:
        return None
    if isinstance(found, type) or (not _fits(found) and callable(found)):
        found = call(found)
    if not _fits(found):
        raise LoadError(
            f"{path.name}:tokenizer is of type {type(found).__name__}: expected an object with encode(text) and decode(ids), or a function that returns one."
        )
    return cast("Tokenizer", found)


def _fits(value: Any) -> bool:
    return callable(getattr(value, "encode", None)) and callable(getattr(value, "decode", None))
