"""Text that grows token by token says in the end what all tokens say, takes nothing back, and ends before a stop."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from attnopt.cli.text import Written


class Bytes:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Words:
    """A word is written with a space before it, but for the first."""

    def encode(self, text: str) -> list[int]:
        return [ord(x) for x in text]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(chr(x) for x in ids)


def grown(written: Written, ids: list[int], step: int = 1) -> list[str]:
    """The text after each token, or after so many at a time."""
    texts = []
    for n in range(step, len(ids) + step, step):
        written.add(ids[:n], last=n >= len(ids))
        texts.append(written.text)
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts)), "something that was said was taken back"
    return texts


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("text", ["plain", "für 12 €, 😀😀 und weiter", "ends in half a 😀"])
def test_characters_of_several_tokens_wait_until_they_are_whole(text: str, step: int) -> None:
    ids = Bytes().encode(text)
    texts = grown(Written(Bytes()), ids, step)
    assert texts[-1] == text and not any("\ufffd" in x for x in texts)
    cut = Bytes().encode(text)[:-1]
    assert grown(Written(Bytes()), cut, step)[-1] == Bytes().decode(cut), "at the end what is not whole is said as the tokenizer says it"


def test_a_token_s_text_depends_on_the_one_before() -> None:
    assert grown(Written(Words()), [ord(x) for x in "abc"]) == ["a", "a b", "a b c"]


@pytest.mark.parametrize("stops", [["END"], ["xx", "END"], ["END", "ND"]])
def test_a_stop_ends_the_text_before_it_and_what_may_become_one_waits(stops: list[str]) -> None:
    written = Written(Bytes(), stops)
    texts = grown(written, Bytes().encode("oneE twoEN threeENDfour"))
    assert written.stopped and texts[-1] == "oneE twoEN threeE"[: -1 if "END" in stops else None]
    assert texts[3] == "one", "an E may be the beginning of a stop"


def test_without_its_stop_all_is_said_in_the_end() -> None:
    written = Written(Bytes(), ["END"])
    assert grown(written, Bytes().encode("theEN"))[-1] == "theEN" and not written.stopped


def test_random_texts_and_stops_are_cut_where_the_stop_first_stands() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("abé€") for _ in range(rng.randint(1, 14)))
        stops = ["".join(rng.choice("abé€") for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(0, 2))]
        written = Written(Bytes(), stops)
        grown(written, Bytes().encode(text))
        ends = [text.find(s) for s in stops if s in text]
        assert written.stopped == bool(ends)
        if not ends:
            assert written.text == text
        else:
            # the stop that is whole first, not the one that begins first, is noticed first
            first = min(text.find(s) + len(s) for s in stops if s in text)
            assert written.text == text[: min(text.find(s) for s in stops if 0 <= text.find(s) <= first - len(s))]
