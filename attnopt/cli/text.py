"""The text of tokens that come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnopt.capture.tokenizer import Tokenizer

_HALF = "\ufffd"
"""What a decoder gives for the bytes of a character that is not whole yet."""


class Written:
    """Grows with its tokens and never takes back what it has said.

    A token's text depends on its neighbours, and a character may need several tokens. So tokens are decoded together with those of the piece before them, and
    a piece that ends within a character waits for the next. What may become one of ``stops`` waits too; with a whole one the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.text = ""
        self.stopped = False
        self._known = ""
        """With what waits."""
        self._piece, self._read = 0, 0
        """Where the last piece that was decoded begins and ends."""

    def add(self, ids: Sequence[int], last: bool = False) -> None:
        """``ids`` are all tokens so far; ``last``: no more will come."""
        if self.stopped:
            return
        before = self.tokenizer.decode(ids[self._piece : self._read]) if self._read else ""
        both = self.tokenizer.decode(ids[self._piece :]) if len(ids) > self._read else before
        if last or (len(both) > len(before) and not both.endswith(_HALF)):
            self._known += both[len(before) :]
            self._piece, self._read = self._read, len(ids)
        found = [i for i in (self._known.find(s) for s in self.stops) if i >= 0]
        if found:
            self.text, self.stopped = self._known[: min(found)], True
        else:
            self.text = self._known if last else self._known[: len(self._known) - self._waiting()]

    def _waiting(self) -> int:
        """How much of the end could be the beginning of a stop."""
        return max((n for s in self.stops for n in range(1, len(s)) if self._known.endswith(s[:n])), default=0)
