r"""Every error a user can meet, in one tree, so that one `except LLMEmbedError` catches them all.

Each class is also a builtin error: what callers expect of that kind. Every message says what was
given, what is allowed, where, and what to do:

>>> str(ConfigError.unknown("fusion", "cooq", ["mean", "cooc"], "Pass one to --fusion."))
"fusion 'cooq' does not exist; did you mean 'cooc'? Known: mean, cooc. Pass one to --fusion."

Messages quote what comes from outside: names, labels, what a library said. So that none of it can
command a terminal or forges a line, every message is shown with its control characters escaped; and
passwords and signatures are taken out of its URLs.

>>> print(DataError("label " + chr(27) + "[2J" + chr(10) + " stands twice"))
label \x1b[2J\n stands twice
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Self

_MOST_NAMES = 20  # in a message
# Of a URL that was taken for a Path one of the slashes is left.
_LOGIN = re.compile(r"\b([a-z][\w+.-]+:/{1,2})[^/\s@]+@", re.IGNORECASE)
_SIGNED = re.compile(
    r"([?&][\w-]*(?:signature|token|secret|password|credential)=)[^&\s'\"]+", re.IGNORECASE
)


def shown(text: str, keep: str = "") -> str:
    r"""Escape control and formatting characters, all but those to keep, such as ends of lines.

    >>> print(shown(chr(27) + "[31mred" + chr(0x202E)))
    \x1b[31mred\u202e
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def hidden(text: str) -> str:
    """Take passwords, tokens and signatures out of the URLs in a text.

    >>> hidden("https://me:word@host/a?X-Amz-Signature=0f1e is gone")
    'https://***@host/a?X-Amz-Signature=*** is gone'
    """
    return _SIGNED.sub(r"\1***", _LOGIN.sub(r"\1***@", text)) if ":/" in text else text


def listed(names: Sequence[str]) -> str:
    """Name the first of many.

    >>> listed([str(number) for number in range(100_000)])
    '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19 and 99980 more'
    """
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


class _Shown:
    """A message on one line without passwords, whose control characters are escaped."""

    def __str__(self) -> str:
        return shown(hidden(super().__str__()))


class LLMEmbedError(_Shown, Exception):
    """Root of the tree: a known error, told in one sentence."""

    @classmethod
    def unknown(cls, kind: str, value: str, allowed: Iterable[str], remedy: str) -> Self:
        """Make the error for a name that is not among the allowed ones, with a close match."""
        known = list(allowed)
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        return cls(f"{kind} {value!r} does not exist{hint} Known: {listed(known)}. {remedy}")


class LLMEmbedWarning(_Shown, UserWarning):
    """Something a user should know that does not stop the work."""


def warn(message: str) -> None:
    """Warn with an `LLMEmbedWarning`, which points to the caller of who warns."""
    warnings.warn(message, LLMEmbedWarning, stacklevel=3)


class ConfigError(LLMEmbedError, ValueError):
    """An option has a value that is not allowed."""


class DataError(LLMEmbedError, ValueError):
    """Texts or labels cannot be used as they are."""


class DatasetNotFoundError(DataError, FileNotFoundError):
    """No data set by that name or path."""


class ModelError(LLMEmbedError, ValueError):
    """A backbone cannot be used as it is."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No backbone by that name or path."""


class MissingPackageError(LLMEmbedError, ImportError):
    """A package that only one feature needs is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> Self:
        """Make the error for a package of an extra.

        >>> print(MissingPackageError.of("onnx", "onnx", "--export onnx"))
        --export onnx needs onnx, which is not installed. Run pip install 'llmembed-cache[onnx]'.
        """
        return cls(
            f"{purpose} needs {package}, which is not installed. "
            f"Run pip install 'llmembed-cache[{extra}]'."
        )


class EngineError(LLMEmbedError, RuntimeError):
    """What hands out the work gave up."""


class ExtractionError(LLMEmbedError, RuntimeError):
    """Features came out that must not be stored."""


class RowError(ExtractionError):
    """Some rows have no feature that could be stored; all others have theirs."""


class CacheError(LLMEmbedError):
    """Something is wrong with a cache."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """There is no cache at that place."""


class CacheFormatError(CacheError, ValueError):
    """What lies there is not a cache, or one of a format this version cannot read."""


class CacheMismatchError(CacheError, ValueError):
    """A fingerprint contradicts what is asked for."""


class CacheIncompleteError(CacheError, RuntimeError):
    """Rows or arrays are asked for that were never committed."""


class CacheCorruptError(CacheError, ValueError):
    """Stored bytes are not those that were committed."""


class CacheLockedError(CacheError, RuntimeError):
    """Another writer holds the cache."""


class CacheStorageError(CacheError, OSError):
    """The disk or the object store failed, or refused access."""


class CacheSpaceError(CacheError, OSError):
    """The device has no room for what is to be written."""


class RunError(LLMEmbedError):
    """Something is wrong with a run's folder."""


class RunNotFoundError(RunError, FileNotFoundError):
    """There is no run at that place."""


class RunFormatError(RunError, ValueError):
    """A run's folder does not hold what it should."""


class RunLockedError(RunError, RuntimeError):
    """Another fit is making a run at the same place."""


class RunStorageError(RunError, OSError):
    """The disk failed or refused, where a run or its predictions are to be written."""
