"""Hugging Face: from `hf:owner/repo…` to a commit and the files to fetch from it.

Owns what is asked of the hub and which file of a repository is meant. The only module that knows
huggingface_hub, and imports it late, in the fetcher alone. Transfers nothing.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from daemon import __version__
from daemon.downloads import publish
from daemon.downloads.transfer import RemoteFile
from daemon.errors import DownloadFailed, InvalidRequest
from daemon.sources import HubSource

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.errors import HfHubHTTPError

DEFAULT_QUANTIZATION = "Q4_K_M"
_LISTED = 30  # names of files that an error quotes at most
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The files that a source means, as they are at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A hub at `endpoint`, an address; `token` is empty for a public reader."""

    endpoint: str
    token: str
    timeout_s: float

    @property
    def host(self) -> str:
        """The hub's host, for messages."""
        return urlsplit(self.endpoint).hostname or self.endpoint

    def resolve(self, source: HubSource) -> Resolved:
        """Ask the hub which file `source` means, and whether it may be read.

        Raises InvalidRequest when there is no such repository, revision or file or several could
        be meant, and DownloadFailed when the hub cannot be asked or refuses.
        """
        # The library would ask huggingface.co for a list of AI tools, to report which one runs it.
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            HTTPError,  # of the HTTP library that it uses, whichever that is
            OfflineModeIsEnabled,
        )

        if not self.token.isascii() or not self.token.isprintable():
            raise DownloadFailed("HF_TOKEN holds characters that no token has: set it again")
        try:
            return self._ask(source)
        except HfHubHTTPError as error:
            if missing := self._missing(error, source):
                raise InvalidRequest(missing) from error
            raise DownloadFailed(self._refusal(error, source.repo)) from error
        except OfflineModeIsEnabled as error:
            raise DownloadFailed(
                f"{source.repo}: HF_HUB_OFFLINE is set, so nothing is asked of {self.host}; "
                "unset it to download"
            ) from error
        except HFValidationError as error:
            raise InvalidRequest(f"{source.repo!r} is no name of a repository: {error}") from error
        except HTTPError as error:
            raise DownloadFailed(_unreachable(error, self.host, self.timeout_s)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DownloadFailed(
                f"{self.host} does not answer like a Hugging Face hub ({type(error).__name__})"
            ) from error

    def _ask(self, source: HubSource) -> Resolved:
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        token = self.token or False  # False: not one from the user's files either
        headers = build_hf_headers(token=token, user_agent=f"modeld/{__version__}")
        info = HfApi(endpoint=self.endpoint, token=token, headers=headers).model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=self.timeout_s
        )
        name = choose([sibling.rfilename for sibling in info.siblings or ()], source)
        commit = info.sha or source.revision
        url = hf_hub_url(source.repo, name, revision=commit, endpoint=self.endpoint)
        # A gated repository lists its files to everybody: only asking for one tells.
        facts = get_hf_file_metadata(
            url, token=token, headers=headers, timeout=self.timeout_s, endpoint=self.endpoint
        )
        size, sha256 = _listed_facts(info, name)
        file = RemoteFile(
            name=publish.file_name(name),
            url=url,
            size_bytes=facts.size if size is None else size,
            sha256=sha256,
            headers=headers,
        )
        return Resolved(commit=commit, files=(file,))

    def _missing(self, error: HfHubHTTPError, source: HubSource) -> str:
        """Return which part of `source` the hub does not have; empty if it has all of it."""
        from huggingface_hub import errors

        repo = source.repo
        match error:
            case errors.RevisionNotFoundError():
                return f"{repo} has no revision {source.revision!r}"
            case errors.RemoteEntryNotFoundError():
                return f"{repo} lists a file {source.file!r}, but does not have it"
            case errors.RepositoryNotFoundError() if not isinstance(error, errors.GatedRepoError):
                return (
                    f"{self.host} has no repository {repo} that you may see: check its name; "
                    f"if it is private or gated, {self._how_to_enter(repo)}"
                )
        return ""

    def _refusal(self, error: HfHubHTTPError, repo: str) -> str:
        """Return why the hub does not give what it has."""
        from huggingface_hub.errors import DisabledRepoError

        status = error.response.status_code
        if isinstance(error, DisabledRepoError):
            return f"{repo} has been disabled by {self.host}"
        if status in (401, 403):
            return (
                f"{self.host} refuses access to {repo} (HTTP {status}): {self._how_to_enter(repo)}"
            )
        if status == 429:
            return f"{self.host} limits how often it is asked: try again later"
        return f"{self.host} answered HTTP {status} for {repo}"

    def _how_to_enter(self, repo: str) -> str:
        advice = f"accept its licence at {self.endpoint}/{repo} and set HF_TOKEN to a token of the "
        if self.token:
            return advice + "account that did (the present one is not let in)"
        return advice + "account that did (it is not set)"


def choose(names: Sequence[str], source: HubSource) -> str:
    """Return which of a repository's files `source` means.

    In this order: the file it names, the quantization it names, the only GGUF there is, Q4_K_M.
    Projectors for images (mmproj) count only when named. Raises InvalidRequest with the choices.
    """
    if source.file:
        if source.file not in names:
            raise InvalidRequest(
                f"{source.repo} has no file {source.file!r}; {_listing(_models(names))}"
            )
        return _whole(source.file, source)
    models = _models(names)
    if source.quantization:
        return _single(models, source.quantization, source)
    if len(models) == 1:
        return _whole(models[0], source)
    return _single(models, DEFAULT_QUANTIZATION, source)


def _single(models: Sequence[str], quantization: str, source: HubSource) -> str:
    # The name's tokens end at anything but a letter, a digit or "_": Q4_K is not Q4_K_M.
    token = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quantization)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [name for name in models if token.search(PurePosixPath(name).name)]
    if len(found) == 1:
        return _whole(found[0], source)
    many = "several files" if found else "no file"
    raise InvalidRequest(
        f"{source.repo} has {many} of quantization {quantization}: choose one with "
        f"hf:{source.repo}:QUANTIZATION or hf:{source.repo}/FILE; {_listing(found or models)}"
    )


def _models(names: Iterable[str]) -> list[str]:
    """Return the GGUFs that are models, a split one by its first part only."""
    found = []
    for name in sorted(names):
        split = _SPLIT.search(name)
        if not name.lower().endswith(".gguf") or "mmproj" in PurePosixPath(name).name.lower():
            continue
        if split is None or int(split[1]) == 1:
            found.append(name)
    return found


def _whole(name: str, source: HubSource) -> str:
    split = _SPLIT.search(name)
    if split is not None and int(split[2]) > 1:
        raise InvalidRequest(
            f"{source.repo}: {name} is one of {int(split[2])} parts of a model, and split models "
            "are not supported yet: choose a smaller quantization that is one file"
        )
    return name


def _listing(names: Sequence[str]) -> str:
    if not names:
        return "it has no GGUF files"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"it has {', '.join(names[:_LISTED])}{more}"


def _listed_facts(info: ModelInfo, name: str) -> tuple[int | None, str | None]:
    """Return the size in bytes and the SHA-256 (of LFS files) that the listing gives for `name`."""
    sibling = next(s for s in info.siblings or () if s.rfilename == name)
    if sibling.lfs is None:
        return sibling.size, None
    if not _SHA256.fullmatch(sibling.lfs.sha256):
        raise ValueError("an LFS file without a SHA-256")
    return sibling.lfs.size, sibling.lfs.sha256


def _unreachable(error: Exception, host: str, timeout_s: float) -> str:
    """Return why the hub could not be asked; the library says it in an exception's cause."""
    if "Timeout" in type(error).__name__:
        return f"{host} did not answer within {timeout_s:g} s"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"the host {host} is not known; is this computer online?"
    return f"cannot reach {host} ({error or type(error).__name__})"
