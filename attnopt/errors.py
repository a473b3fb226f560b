"""Errors that a user can act on. Everything else that escapes is a bug of ours."""

from __future__ import annotations


class AttnoptError(Exception):
    """Something the user can mend: one clear sentence with the actual and the supported values, and perhaps a hint.

    The command line prints it without a traceback and exits with ``exit_code`` (2: bad usage or input).
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class LoadError(AttnoptError):
    """A model file, folder or input description that cannot be used."""


class CaptureError(AttnoptError):
    """A model that runs but that could not be captured as a graph, or one that does not run.

    ``source`` is the file:line of the model's code where capture stopped; empty when that is not known.
    """

    def __init__(self, message: str, hint: str = "", source: str = "") -> None:
        super().__init__(message, hint)
        self.source = source


class BackendError(AttnoptError):
    """An unknown backend, one that is not installed, or one that cannot compute what was asked of it by name."""


class PassError(Exception):
    """A pass raised or left an invalid graph: a bug of ours. Names the pass and those that ran before it."""


class VerificationError(AttnoptError):
    """A policy was not met: the optimized model differs from the original by more than the budget."""

    exit_code = 1


class ServingError(AttnoptError):
    """A model that cannot be served from a KV cache, or a request that a serving model cannot take."""


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of an error's message that has text, cut to ``most`` characters; the name of its type where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:most]


def named(error: BaseException, most: int | None = None) -> str:
    """The type of an error and ``first_line``: ``ValueError: no such size``; the type alone where the error says nothing."""
    return f"{type(error).__name__}: {first_line(error, most)}" if str(error).strip() else type(error).__name__
