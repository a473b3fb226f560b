"""What a user wants continued: ``--prompt`` and the lines of ``--prompts``, each read on its own, so that a bad one is told and the others run."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli.sources import KEYS, Source, source_of
from attnopt.errors import AttnoptError, LoadError, ServingError
from attnopt.runtime import SamplingParams

if TYPE_CHECKING:
    from attnopt.capture.tokenizer import Tokenizer

_IDS = re.compile(r"\s*\[?\s*-?\d+(?:[\s,]+-?\d+)*\s*,?\s*\]?\s*")
_NUMBERS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}
"""What a line may say of its own continuation, beside ``prompt`` and ``stop``."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: ``ids`` to run, or the ``error`` that kept it from becoming ids. ``name`` says where it stands."""

    name: str
    given: str | list[int]
    ids: tuple[int, ...] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_texts: tuple[str, ...] = ()
    source: Source | None = None
    """What its other sequence is made of, for a model that reads one."""
    error: str = ""


@dataclass(frozen=True)
class Reader:
    """Makes prompts of what was given. ``params``, ``stops`` and ``sources`` (one for all, or one for each ``--prompt``) hold where a line says nothing else, with the seed counted up prompt by prompt;
    ``plain_ids``: ``--prompt`` holds ids, whatever tokenizer there is."""

    tokenizer: Tokenizer | None
    params: SamplingParams
    stops: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    plain_ids: bool = False
    sources: tuple[dict[str, str], ...] = ()
    folder: Path = Path()
    """Where the files that lines name are."""

    def all(self, arguments: Sequence[str], lines: Sequence[tuple[str, str]]) -> list[Prompt]:
        """Those of the command line, then one for each line. Raises LoadError for a stop that holds for all of them and is none, and for sources that are not one for each."""
        if len(self.sources) > 1 and len(self.sources) != len(arguments):
            raise LoadError(f"There are {len(self.sources)} sources and {len(arguments)} of --prompt; give one for all, or one for each.")
        for stop in self.stops:
            self._stop(stop)
        found = [self.argument(text, i) for i, text in enumerate(arguments)]
        return found + [self.line(text, len(found) + i, place) for i, (text, place) in enumerate(lines)]

    def argument(self, text: str, index: int) -> Prompt:
        """One ``--prompt``: text where there is a tokenizer, otherwise ids such as ``1 2 3``."""
        name = f"prompt {index}"
        return self._made(name, text, lambda: self._prompt(name, index, text, {}, self.plain_ids, self._source(index)))

    def line(self, text: str, index: int, place: str) -> Prompt:
        """One line of a file: a text, a list of ids, or an object with ``prompt`` and what holds for it alone."""
        name = f"prompt {index} ({place})"

        def read() -> Prompt:
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise LoadError(f"The line is not valid JSON: {error.msg} (column {error.colno}).") from error
            own = value if isinstance(value, dict) else {"prompt": value}
            unknown = sorted(set(own) - {"prompt", "stop", *KEYS, *_NUMBERS})
            if unknown:
                raise LoadError(f"The line has the key {unknown[0]!r}; supported are {', '.join(['prompt', 'stop', *KEYS, *_NUMBERS])}.")
            given = own.get("prompt")
            if not isinstance(given, str) and not (isinstance(given, list) and all(type(x) is int for x in given)):
                raise LoadError('The line has no prompt; expected "text", [1, 2, 3], or {"prompt": ...} with one of these.')
            source = source_of(own, lambda x: self._ids(x, False), self.folder) or (self._source(0) if len(self.sources) == 1 else None)
            return self._prompt(name, index, given, own, False, source)

        return self._made(name, text.strip(), read)

    def _source(self, index: int) -> Source | None:
        """What the command line says of a prompt's other sequence."""
        if not self.sources:
            return None
        return source_of(dict(self.sources[index if len(self.sources) > 1 else 0]), lambda x: self._ids(x, self.plain_ids), Path())

    def _made(self, name: str, given: str, read: Callable[[], Prompt]) -> Prompt:
        try:
            return read()
        except AttnoptError as error:
            return Prompt(name, given, error=error.message)

    def _prompt(self, name: str, index: int, given: str | list[int], own: dict[str, Any], plain_ids: bool, source: Source | None) -> Prompt:
        seed = None if self.params.seed is None else self.params.seed + index
        params = replace(self.params, **{"seed": seed} | {k: _number(k, kind, own[k]) for k, kind in _NUMBERS.items() if k in own})
        tokens: list[int] = list(self.ends)
        texts: list[str] = []
        for stop in _strings(own["stop"]) if "stop" in own else self.stops:
            found = self._stop(stop)
            if isinstance(found, int):
                tokens.append(found)
            else:
                texts.append(found)
        ids = given if isinstance(given, list) else self._ids(given, plain_ids)
        return Prompt(name, given, tuple(ids), replace(params, stop_tokens=tuple(dict.fromkeys(tokens))), tuple(texts), source)

    def _ids(self, text: str, plain_ids: bool) -> Sequence[int]:
        if self.tokenizer is None or plain_ids:
            if _IDS.fullmatch(text):
                return [int(x) for x in re.findall(r"-?\d+", text)]
            raise LoadError(f"{_short(text)} is text, and the model has no tokenizer; token ids such as '1 2 3' can be given, or `tokenizer` in the model's file."
                            if self.tokenizer is None else f"{_short(text)} is text, and --ids says that prompts are token ids such as '1 2 3'.")  # fmt: skip
        with tokenizing():
            return list(self.tokenizer.encode(text))

    def _stop(self, stop: str | int) -> int | str:
        """A token id, or a text that ends the generated one."""
        if isinstance(stop, int):
            return stop
        if re.fullmatch(r"-?\d+", stop):
            return int(stop)
        if self.tokenizer is None:
            raise LoadError(f"The stop {_short(stop)} is text, and the model has no tokenizer; a token id can be given.")
        if not stop:
            raise LoadError("The stop is an empty text; it must have at least one character.")
        return stop


def given_lines(arguments: Sequence[str], file: str | None) -> list[tuple[str, str]]:
    """The lines of ``file`` (``-``: standard input) that are not empty, each with its place. Raises LoadError where it cannot be read, or nothing was given at all."""
    if file is None:
        if not arguments:
            raise LoadError("There is nothing to continue: give --prompt or --prompts FILE.jsonl.")
        return []
    name = "standard input" if file == "-" else Path(file).name
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise LoadError(f"--prompts {file} cannot be read: {why}.") from error
    found = [(line, f"{name}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not found and not arguments:
        raise LoadError(f"{name} holds no prompts: expected one a line.")
    return found


@contextlib.contextmanager
def tokenizing() -> Iterator[None]:
    """Around calls of the user's tokenizer: what it raises becomes one sentence, a LoadError."""
    try:
        yield
    except Exception as error:
        raise LoadError(f"The tokenizer failed: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _number(key: str, kind: type, value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole or (kind is float and isinstance(value, float)) or (value is None and key in ("top_k", "seed"))
    if not fits:
        raise ServingError(f"{key} is {json.dumps(value)}; it must be {'a whole number' if kind is int else 'a number'}.")
    return value


def _strings(value: Any) -> list[str | int]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(x, str) or type(x) is int for x in values):
        raise ServingError(f"stop is {json.dumps(value)}; it must be a text, a token id, or a list of these.")
    return values


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
