"""Put a whole folder in the place of an earlier one, so that no fault loses both.

    runs/r8-cooc-0                        the run, always a whole one
    runs/.r8-cooc-0.new-<owner>-<token>   what a living process writes, or a killed one left
    runs/.r8-cooc-0.old-<owner>-<token>   the earlier run, while a later one takes its place

Linux exchanges two folders in one step. Where that cannot be done (other systems, some network file
systems) there is a moment between two renames when nothing stands at the place. Who is killed there
leaves the earlier run under its hidden name: `standing` finds it, and `recover` puts it back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmembed.common.errors import ConfigError, RunStorageError
from llmembed.common.process import is_gone, owner

_NEW, _OLD = "new", "old"
_AT_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <linux/fs.h>


class _Hidden(NamedTuple):
    path: Path
    kind: str
    owner: str


def check_place(place: Path) -> None:
    """Refuse, by a `RunStorageError`, a place where no folder can be made, before one is needed."""
    try:
        place = _real(place)
        parent = next(folder for folder in place.parents if os.path.lexists(folder))
        if not os.access(parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
        with contextlib.suppress(FileNotFoundError):
            _hidden(place, _NEW).lstat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path, which may be long
        raise RunStorageError(
            f"nothing can be written to {str(place)[:200]}: {reason}. Pass another --output."
        ) from error


def make_beside(place: Path) -> Path:
    """Make an empty hidden folder beside a place, which this process owns."""
    place = _real(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = _hidden(place, _NEW)
    folder.mkdir()
    return folder


def put_in_place(folder: Path, place: Path) -> None:
    """Put a folder of `make_beside` in the place of what stands there, and remove that."""
    place = _real(place)
    _flush(folder)
    if not exchange(folder, place):
        _rename_in(folder, place, _hidden(place, _OLD))
    shutil.rmtree(folder, ignore_errors=True)  # what stood there; the next fit clears what is left


@contextlib.contextmanager
def placing(place: Path) -> Iterator[Path]:
    """Give a folder beside a place to write to; at the end it is put there, in place of what is.

    What killed processes left beside the place is finished or cleared first.
    """
    recover(place)
    folder = make_beside(place)
    try:
        yield folder
        put_in_place(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recover(place: Path) -> None:
    """Finish what killed processes began: put an earlier run back, and clear their folders."""
    place = _real(place)
    left = [hidden for hidden in _beside(place) if is_gone(hidden.owner)]
    earlier = [hidden.path for hidden in left if hidden.kind == _OLD]
    if earlier and not os.path.lexists(place):
        with contextlib.suppress(FileNotFoundError):  # another fit was quicker
            earlier[0].rename(place)
    for hidden in left:
        shutil.rmtree(hidden.path, ignore_errors=True)


def standing(place: Path) -> Path:
    """Tell where the run of a place is: there, or under a hidden name since its fit was killed."""
    real = _real(place)
    earlier = [] if os.path.lexists(real) else [h.path for h in _beside(real) if h.kind == _OLD]
    return earlier[0] if earlier else place


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where that cannot be done, and nothing is changed."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        import ctypes

        rename: Any = ctypes.CDLL(None).renameat2
    except (ImportError, OSError, AttributeError):
        return False
    here = _AT_WORKING_FOLDER
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE) == 0)


def _rename_in(folder: Path, place: Path, old: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            place.rename(old)
        folder.rename(place)
    except BaseException:
        with contextlib.suppress(OSError):
            old.rename(place)
        raise
    with contextlib.suppress(OSError):
        old.rename(folder)  # half removed under its own name, it would pass for the run


def _flush(folder: Path) -> None:
    """Write files to the disk, lest the loss of power leaves a new folder with empty files."""
    if os.name != "posix":
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _real(place: Path) -> Path:
    """Follow a link, so that what it points to is replaced."""
    try:
        return Path(os.path.realpath(place))
    except ValueError:  # what can be no path is refused where it is looked for
        return place


def _hidden(place: Path, kind: str) -> Path:
    token = uuid.uuid4().hex[:8]
    return place.with_name(f".{place.name}.{kind}-{owner(os.getpid())}-{token}")


def _beside(place: Path) -> Iterator[_Hidden]:
    pattern = re.compile(rf"\.{re.escape(place.name)}\.({_NEW}|{_OLD})-(.+)-[0-9a-f]{{8}}")
    try:
        paths = sorted(place.parent.iterdir())
    except OSError:
        return
    for path in paths:
        if match := pattern.fullmatch(path.name):
            yield _Hidden(path, match[1], match[2])


def check_file(path: Path) -> None:
    """Refuse, by a `ConfigError`, a file of --output that cannot be, before one is needed."""
    if os.path.isdir(path):  # noqa: PTH112 - False for a name that is too long
        raise ConfigError(f"--output {path} is a folder. Pass a file.")
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise ConfigError(f"--output {path}: the folder {path.parent} does not exist. Make it.")
    if "\0" in str(path):
        raise ConfigError(f"--output {path} holds a NUL character. Pass another name.")
    folder = _real(path.parent)
    is_other = os.path.exists(path) and not os.path.isfile(path)  # noqa: PTH110, PTH113
    if is_other or folder == Path("/dev") or folder.is_relative_to("/proc"):
        raise ConfigError(
            f"--output {path} is no regular file, which another could take the place of. Pass "
            "another place."
        )
    check_outside(path)


def check_outside(place: str | os.PathLike[str]) -> None:
    """Refuse, by a `ConfigError`, a place inside a cache or a run, whose files are not ours."""
    if "://" in os.fspath(place):
        return
    for folder in _real(Path(place)).parents:
        kind = _kind_of(folder)
        if kind:
            raise ConfigError(
                f"{place} lies inside the {kind} {folder}, which holds nothing but its "
                "own files. Pass another place."
            )


def _kind_of(folder: Path) -> str:
    """Tell what a folder is by the files that each has: a cache, a run or neither."""
    for kind, *names in (("cache", "zarr.json"), ("run", "config.json", "metrics.json")):
        if all(os.path.isfile(folder / name) for name in names):  # noqa: PTH113
            return kind
    return ""


def write_files(files: Mapping[Path, str]) -> None:
    """Write texts, each whole or not at all, and the folders they are in.

    Raises:
        RunStorageError: the disk failed or refused.
    """
    for path, content in files.items():
        with writing_told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_text(content, encoding="utf-8", newline="")


@contextlib.contextmanager
def writing_told(path: Path) -> Iterator[None]:
    """Raise what fails while a file is written as a `RunStorageError` that names it."""
    try:
        yield
    except OSError as error:
        raise RunStorageError(
            f"{path} could not be written: {error.strerror or error}. Make room or check the "
            "permissions, or pass another place."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a hidden name beside a file to write to; at the end what was written replaces the file.

    Whatever fails, the old file or the new one is there, whole; what a killed process leaves under
    a hidden name is cleared by the next that writes the file.
    """
    for hidden in _beside(path):
        if is_gone(hidden.owner):
            with contextlib.suppress(OSError):  # a folder, or gone meanwhile
                hidden.path.unlink()
    partial = _hidden(path, _NEW)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
