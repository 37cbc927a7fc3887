"""Runs on the Hugging Face Hub: what goes there, and how one comes from there.

Five files of a run go, and a model card beside them: config.json, metrics.json, model.safetensors,
predictions.parquet, and model.onnx where there is one. Texts that `--store-texts` put into a run
stay, as do logs and the report, which may hold texts and paths; of places on this machine
config.json keeps the last part alone.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from llmembed.cache_format.stores import hub_said
from llmembed.common.errors import (
    ConfigError,
    RunFormatError,
    RunNotFoundError,
    RunStorageError,
    warn,
)
from llmembed.train.runs.record import CONFIG_FILE, read_json

CARD_FILE = "README.md"
MAX_DOCUMENT_BYTES = 64 * 2**20
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.+))?", re.ASCII)


def is_hub_name(text: str) -> bool:
    """Tell whether a text may name a run on the Hub: user/name, or user/name@revision.

    Where there is a folder `user` here, user/name is a run that is missing in it; with a revision
    it is on the Hub nevertheless.
    """
    match = _NAME.fullmatch(text)
    return match is not None and (match[2] is not None or not Path(text).parent.is_dir())


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Give config.json without the places of this machine.

    Paths and URLs of the fit keep their last part; the address of a cluster goes. A backbone in a
    local folder is `./folder`.
    """
    public = copy.deepcopy(dict(record))
    for name, value in public["fit"].items():
        if name == "address":
            public["fit"][name] = None
        elif isinstance(value, str) and (name in ("cache", "output") or _is_place(value)):
            public["fit"][name] = _last_part(value)
    known = public["cache"].get("provenance", {})
    if _is_place(str(known.get("origin"))):
        known["origin"] = _last_part(known["origin"])
    for stored in public["sources"].values():
        model = stored["recipe"].get("model")
        if isinstance(model, str) and (_is_place(model) or model.startswith((".", "~"))):
            stored["recipe"]["model"] = f"./{_last_part(model)}"
    return public


def push(
    repo_id: str,
    files: Mapping[str, bytes],
    *,
    may_hold: tuple[str, ...],
    private: bool,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Put files into a repository in one commit, and give the URL of its page.

    Args:
        repo_id: user/name; it is made if need be.
        files: contents by name.
        may_hold: names of files of a run; those that an earlier one left and this has not go.
        private: whether a repository that is made is private.
        token: what the Hub knows the user by; None is HF_TOKEN or that of `hf auth login`.
        revision: branch, made if need be; None is main.
        commit_message: of the commit.

    Raises:
        ConfigError: `repo_id` is no name.
        RunFormatError: what lies there is no run.
        RunStorageError: the Hub refuses or fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if "@" in repo_id or not _NAME.fullmatch(repo_id):
        raise ConfigError(
            f"{repo_id!r} names no repository. Pass user/name, and a branch as revision."
        )
    api, what = HfApi(token=token), f"model {repo_id!r}"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = api.model_info(repo_id, revision=revision)
        there = {file.rfilename for file in found.siblings or ()} & set(may_hold)
        if there and not _holds_run(api, repo_id, str(found.sha), there):
            raise RunFormatError(
                f"{what} on the Hub holds {', '.join(sorted(there))} and is no run, so it is not "
                "replaced. Push to another name."
            )
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in sorted(there - files.keys())),
        ]
        with warnings.catch_warnings():  # predictions.parquet belongs to the model
            warnings.filterwarnings("ignore", message="It seems that you are about to commit")
            api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message,
                revision=revision,
                parent_commit=found.sha,
            )
    except RunFormatError:
        raise
    except Exception as error:
        said = hub_said(error, what)
        raise RunStorageError(f"the run was not pushed to {repo_id}: {said}") from error
    return f"{api.endpoint}/{repo_id}" + ("" if revision is None else f"/tree/{revision}")


def fetch(name: str, files: Mapping[str, Callable[[Path], int]]) -> Path:
    """Download files of a run, or take those that are on this machine, and give their folder.

    All are of one commit. Where the Hub can't be reached or fails, the copy that is here does.

    Args:
        name: user/name or user/name@revision.
        files: names, in the order they come, config.json first; for each what tells the most bytes
            that it may have, given the folder with those before it; 0 where there is no such file.

    Raises:
        RunNotFoundError: there is no such repository or revision, it may not be read, or the Hub
            can't be reached and no copy is here.
        RunFormatError: it is no run, or a file is larger than it can be.
    """
    match = _NAME.fullmatch(name)
    assert match is not None
    repo_id, revision = match[1], match[2]
    folder = Path()
    for file, most_bytes in files.items():
        most = most_bytes(folder)
        if not most:
            continue
        folder = _download(repo_id, file, revision, most).parent
        revision = folder.name  # the commit
        if file == CONFIG_FILE and "llmembed_run" not in read_json(folder / CONFIG_FILE):
            raise RunFormatError(
                f"{name} on the Hub is no run of llmembed: its {CONFIG_FILE} has no llmembed_run. "
                "Pass the name that Run.push_to_hub was given."
            )
    return folder


def _download(repo_id: str, file: str, revision: str | None, most_bytes: int) -> Path:
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

    what = f"run {repo_id!r}"
    lasting = (401, 403, 404)  # answers that no copy may stand in for
    try:
        size_bytes = get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision)).size
    except EntryNotFoundError as error:
        raise RunFormatError(
            f"{repo_id} on the Hub has no {file}, so it is no run of llmembed. Pass the name that "
            "Run.push_to_hub was given."
        ) from error
    except Exception as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in lasting
        here = None if refused else try_to_load_from_cache(repo_id, file, revision=revision)
        if not isinstance(here, str):
            message = f"{repo_id} is neither a folder here nor can it be had from the Hub: "
            raise RunNotFoundError(message + hub_said(error, what)) from error
        path = Path(here)
        if not isinstance(error, OfflineModeIsEnabled) and file == CONFIG_FILE:
            warn(f"{hub_said(error, what)} Used is the copy on this machine, {path.parent.name}.")
        return path
    if size_bytes is None or size_bytes > most_bytes:
        raise RunFormatError(
            f"{repo_id} on the Hub has a {file} of {size_bytes} bytes, where a run has at most "
            f"{most_bytes:,}, so it is not downloaded. Pass another run."
        )
    try:
        return Path(hf_hub_download(repo_id, file, revision=revision))
    except Exception as error:
        message = f"{repo_id} could not be downloaded: {hub_said(error, what)}"
        raise RunNotFoundError(message) from error


def _holds_run(api: Any, repo_id: str, commit: str, there: set[str]) -> bool:
    if CONFIG_FILE not in there:
        return False
    place = api.hf_hub_download(repo_id, CONFIG_FILE, revision=commit)
    try:
        return "llmembed_run" in json.loads(Path(place).read_bytes())
    except ValueError:
        return False


def _is_place(text: str) -> bool:
    r"""Tell an absolute path of any system, or a URL.

    >>> [_is_place(text) for text in ("/a/b", "C:\\b", "s3://a/b", "org/name", "minilm")]
    [True, True, True, False, False]
    """
    absolute = PurePath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute or "://" in text


def _last_part(place: str) -> str:
    return re.split(r"[\\/]", place.rstrip("\\/"))[-1]
