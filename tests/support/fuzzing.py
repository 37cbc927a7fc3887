"""Inputs by the thousand, damaged on purpose, and what must follow: our sentence, or a value.

A module of targets has `TARGETS`: name -> a function that makes ready what the target needs, to be
closed by the stack, and gives one that tries a single input, drawn from the generator it is handed.
It tells whether the input was taken; refusing it is an error of our tree. All else ends the child
and is shown with the number of the input, which is tried alone again by

    PYTHONPATH=tests/support python -P tests/support/fuzzing.py MODULE TARGET SEED 1 NUMBER

The child has little memory beyond what it has at its start, and is ended, with the place where it
stands, if a batch does not end.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import little_memory

from llmembed.common.errors import LLMEmbedError

Try: TypeAlias = Callable[[random.Random], bool]
Targets: TypeAlias = Mapping[str, Callable[[ExitStack], Try]]
JSON: TypeAlias = Any

MEMORY_BYTES = 512 * 2**20
BATCH = 100
BATCH_S = 600
LONGEST_MESSAGE = 4_000
NUMBERS: Sequence[JSON] = (
    *(0, -1, 1, 2, 63, 255, 1024, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64),
    *(10**300, 10**399, -(2**63), 0.5, -0.0, 1e308, 5e-324, True, False),
)
TEXTS: Sequence[str] = (
    *(
        "",
        " ",
        "\0",
        "\n",
        "\x1b[2J",
        "\u202e",
        "\ud800",
        "\U0001f9ff",
        "..",
        "../x",
        "/etc/passwd",
    ),
    *("c", "zarr.json", "NaN", "1e999", "a" * 300, "{{7*7}}", "<script>", "%s%n", "layer_0008"),
)
VALUES: Sequence[JSON] = (*NUMBERS, *TEXTS, None, [], {}, [[]], {"": {}}, [None] * 40)
TOKENS: Sequence[bytes] = (
    *(
        b"",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\x1b[2J",
        b"\r\n",
        b"\r",
        b'"',
        b"'",
    ),
    *(b"{", b"}", b"[", b"]", b"[" * 200, b",", b":", b"NaN", b"Infinity", b"1e400", b"9" * 500),
    *(b"-1", b"0", b"null", b"true", b"\\ud800", b"\\u0000", b"\\", b"\x7f" * 8, b"\xff" * 8),
)


def mutated(rng: random.Random, data: bytes, others: Sequence[bytes] = (b"",)) -> bytes:
    """Damage one to four places: bits, lost and doubled parts, parts of others, numbers."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        stop = min(len(found), at + rng.choice((1, 1, 2, 4, 8, 64, 1024)))
        match rng.randrange(8):
            case 0 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(found):
                found[at] = rng.randrange(256)
            case 2:
                del found[at:stop]
            case 3:
                found[at:at] = found[at:stop]
            case 4:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                found[at:stop] = other[begin : begin + rng.choice((1, 4, 16, 256))]
            case 5:
                found[at : at if rng.random() < 0.5 else stop] = rng.choice(TOKENS)
            case 6:
                del found[at:]
            case _:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice((0, 1, -1, 2**31, 2**15, 127, 2**63)) % (1 << 8 * width)
                found[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
    return bytes(found)


def mutated_json(rng: random.Random, document: JSON) -> JSON:
    """Change a document in one to three of its places: values, keys, lengths, levels."""
    found = document
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = _changed(rng, found)
    return found


def _changed(rng: random.Random, value: JSON) -> JSON:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _changed_object(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        several = rng.choice((0, 2, 50, None, None, None))
        items = [_changed(rng, value[at])] if several is None else [value[at]] * several
        return value[:at] + items + value[at + 1 :]
    match rng.randrange(4):
        case 0 if isinstance(value, str):
            at = rng.randrange(len(value) + 1)
            return value[:at] + rng.choice(TEXTS) + value[at + rng.randrange(3) :]
        case 0 if isinstance(value, int):
            return value + rng.choice((-1, 1, 2**31, 10 ** rng.randrange(40)))
        case 1:
            deep: JSON = value
            for _ in range(rng.choice((1, 2, 70))):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            return deep
        case _:
            return rng.choice(VALUES)


def _changed_object(rng: random.Random, value: dict[str, JSON]) -> JSON:
    key = rng.choice(list(value))
    if rng.random() < 0.75:
        return {**value, key: _changed(rng, value[key])}
    rest = {name: one for name, one in value.items() if name != key}
    name = rng.choice(TEXTS)
    return rng.choice(
        (
            rest,
            {**rest, name: value[key]},
            {**value, name: value[key]},
            {**value, key: value[rng.choice(list(value))]},
        )
    )


def as_bytes(document: JSON) -> bytes:
    """Write JSON as hostile as it is, with NaN and lone surrogates."""
    return json.dumps(document).encode()


def fuzz(module: str, target: str, n: int, seed: int = 0) -> dict[str, int]:
    """Try so many inputs in a process of their own, of several targets (`a,b`) in turn.

    Give how many were taken and refused.
    """
    code = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-P", str(code), module, target, str(seed), str(n)],
        env=os.environ | {"PYTHONPATH": str(code.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{target} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert counts["taken"] + counts["refused"] == n
    return counts


def main(module: str, target: str, seed: int, n: int, first: int = 0) -> None:
    """Try inputs in this process, and print the counts."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable()
    counts = {"taken": 0, "refused": 0}
    rng = random.Random()
    with ExitStack() as stack:
        targets: Targets = importlib.import_module(module).TARGETS
        turns = [targets[name](stack) for name in target.split(",")]
        stack.enter_context(little_memory.limited(MEMORY_BYTES))
        for number in range(first, first + n):
            if (number - first) % BATCH == 0:
                faulthandler.dump_traceback_later(BATCH_S, exit=True)
            rng.seed(seed << 40 | number)
            try:
                counts["taken" if turns[number % len(turns)](rng) else "refused"] += 1
            except LLMEmbedError as error:
                check_sentence(str(error))
                counts["refused"] += 1
            except BaseException:
                print(f"{module} {target}: input {number} of seed {seed}", file=sys.stderr)  # noqa: T201
                raise
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(counts))  # noqa: T201


def check_sentence(said: str) -> None:
    """What we say is short, stands on one line, and commands no terminal."""
    assert said, "an error without words"
    assert len(said) < LONGEST_MESSAGE, f"{len(said)} characters: {said[:500]}"
    wrong = [c for c in said if not c.isprintable()]
    assert not wrong, f"{wrong[:3]!r} in {said[:500]!r}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
