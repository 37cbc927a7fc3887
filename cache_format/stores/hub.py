"""A cache in a data set on the Hugging Face Hub: read file by file, written whole.

A commit there takes seconds and is counted, so nothing is written piece by piece. `put_all` uploads
contents first, which no reader sees, and then commits them together, some thousand files at a time
and the last of them, the root, in the last commit. What was uploaded before an interruption is
known to the Hub by its hash and is not sent again. Reading is of one commit, whatever comes after.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn
from urllib.parse import unquote

from llmembed.cache_format.stores.remote import FsspecStore
from llmembed.common.errors import (
    CacheNotFoundError,
    CacheStorageError,
    ConfigError,
    LLMEmbedError,
)

SCHEME = "hf://"
_PLACE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/@]+))?/(.+)")
_UPLOAD_BYTES, _UPLOAD_FILES = 256 * 2**20, 256
_COMMIT_FILES = 4096
_log = logging.getLogger(__name__)


class HubStore(FsspecStore):
    """A folder of a data set on the Hub, at the commit that its branch has when it is opened."""

    _may_change = False

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfApi, HfFileSystem, constants
        from huggingface_hub.errors import EntryNotFoundError

        self._absences = (FileNotFoundError, EntryNotFoundError)  # the latter by clients of 1.5
        self.location = url.rstrip("/")
        match = _PLACE.fullmatch(self.location)
        if match is None:
            raise ConfigError(
                f"{url} names no cache on the Hub. Pass hf://datasets/USER/NAME/FOLDER, such as "
                "hf://datasets/me/features/r8.zarr, with @REVISION behind NAME if need be."
            )
        self._repository, revision, self._folder = match.groups()
        self._revision = unquote(revision) if revision else constants.DEFAULT_REVISION
        self._api = HfApi()
        self._fs = HfFileSystem(endpoint=self._api.endpoint, skip_instance_cache=True)
        self._commit: str | None = None
        self._why_absent: str | None = None
        self._find()

    def is_folder(self) -> bool | None:
        """Tell whether anything lies there.

        Raises:
            CacheNotFoundError: the Hub shows no such data set.
        """
        if self._why_absent is not None:
            raise CacheNotFoundError(self._why_absent)
        return super().is_folder()

    def walk(self, prefix: str = "") -> Iterator[str]:
        """Yield all keys below a prefix, sorted; none where the data set does not exist yet."""
        found: list[str] = []
        if self._commit is not None:
            with self._translated(prefix), suppress(*self._absences):
                found = self._fs.find(self._key(prefix))
        yield from sorted(path[len(self._root) :].lstrip("/") for path in found)

    def put_all(self, values: Iterable[tuple[str, bytes]]) -> None:
        """Upload values, then commit them; a data set that is not there is made, a private one."""
        from huggingface_hub import CommitOperationAdd

        with self._translated(""):
            if self._commit is None:
                self._api.create_repo(
                    self._repository, repo_type="dataset", private=True, exist_ok=True
                )
                _log.info(
                    "The data set %s did not exist and was made, a private one.", self._repository
                )
                self._find()
            uploaded: list[Any] = []
            waiting: list[Any] = []
            for key, value in values:
                waiting.append(CommitOperationAdd(f"{self._folder}/{key}", value))
                is_full = sum(one.upload_info.size for one in waiting) >= _UPLOAD_BYTES
                if is_full or len(waiting) >= _UPLOAD_FILES:
                    uploaded += self._upload(waiting)
                    waiting = []
                if len(uploaded) >= _COMMIT_FILES:
                    self._put_commit(uploaded)
                    uploaded = []
            self._put_commit(uploaded + self._upload(waiting))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        refuse_pieces(self.location)

    put = create = delete = _refuse

    def open_zarr(self, key: str) -> Any:
        """Open an array with zarr-python."""
        from llmembed.cache_format.stores.bounded import open_array

        place = f"{SCHEME}{self._root}/{key}"
        options = {"endpoint": self._api.endpoint}
        return open_array(place, storage_options=options)

    def _find(self) -> None:
        """Look for the commit that the revision names now."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            found = self._api.dataset_info(self._repository, revision=self._revision)
        except RepositoryNotFoundError as error:
            self._why_absent = hub_said(error, f"data set {self._repository!r}")
        except Exception as error:
            raise self._failed("", error) from error
        else:
            self._at(str(found.sha))

    def _at(self, commit: str) -> None:
        self._commit, self._why_absent = commit, None
        self._root = f"datasets/{self._repository}@{commit}/{self._folder}"

    def _upload(self, additions: list[Any]) -> list[Any]:
        self._api.preupload_lfs_files(
            self._repository, additions, repo_type="dataset", revision=self._revision
        )
        return additions

    def _put_commit(self, additions: list[Any]) -> None:
        done = self._api.create_commit(
            self._repository,
            additions,
            commit_message=f"Add {self._folder}",
            repo_type="dataset",
            revision=self._revision,
            parent_commit=self._commit,
        )
        self._at(done.oid)

    def _failed(self, key: str, error: Exception) -> CacheStorageError:
        place = f"{self.location}/{key}".rstrip("/")
        said = hub_said(error, f"data set {self._repository!r}")
        return CacheStorageError(f"{place} could not be read or written: {said}")

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except LLMEmbedError:
            raise
        except Exception as error:
            raise self._failed(key, error) from error


def refuse_pieces(location: str) -> NoReturn:
    """Refuse to write to the Hub otherwise than by copying a cache there.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"{location} is on the Hub, where a cache is put whole and not written piece by piece. "
        f"Write it to a local folder, then run llmembed-cache copy FOLDER {location}."
    )


def hub_said(error: BaseException, what: str) -> str:
    """Say in a sentence or two why the Hub gave or took nothing, and what to do.

    Args:
        error: what its client raised.
        what: what was asked for, such as "data set 'me/r8'".
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        return hub_said(error.__cause__, what)
    if isinstance(error, GatedRepoError):
        return (
            f"{what} is gated. Accept its terms on its page at {constants.ENDPOINT}, then set "
            "HF_TOKEN (or run `hf auth login`)."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub shows no {what}. Check the name; for a private one set HF_TOKEN (or run `hf "
            "auth login`) to a token that may read it."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{what} has no such revision. Pass a commit, branch or tag of it behind the @."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{what} lacks the file {str(error.response.url).rpartition('/')[2]}."
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {what} is not on this machine. Unset it to connect."
    if not isinstance(error, HfHubHTTPError):
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        return f"the Hub could not be asked for {what}: {reason[:200]}. Check the network."
    return _answered(error.response.status_code, what)


def _answered(status: int, what: str) -> str:
    if status in (401, 403):
        return (
            f"the Hub refuses {what} (status {status}). Set HF_TOKEN to a token with the right to "
            "do this."
        )
    if status == 412:
        return f"{what} was changed by somebody else meanwhile. Run the same again."
    if status == 429:
        return (
            "the Hub was asked too often (status 429). Wait some minutes, and run the same again."
        )
    return f"the Hub failed with status {status} for {what}. Run the same again later."
