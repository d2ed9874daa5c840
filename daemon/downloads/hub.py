"""Hugging Face: from `hf:owner/repo…` to a commit and the files to fetch from it.

Owns what is asked of the hub; which files of a repository are meant is `selection`. The only module
that knows huggingface_hub, and imports it late, in fetchers and peekers alone. Transfers nothing.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from daemon import __version__
from daemon.artifacts.folder import relative_name
from daemon.downloads.network_errors import (
    Unsteady,
    may_pass,
    proxy_for,
    told_to_wait_s,
    wants_credentials,
)
from daemon.downloads.ranged import RemoteFile
from daemon.downloads.selection import select
from daemon.errors import DownloadFailed, InvalidRequest
from daemon.sources import HubSource, public

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

PUBLIC = "https://huggingface.co"
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LICENSE_CHARS = 100  # of a licence's name, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The files that a source means, as they are at one commit of `repo`; "" is not known.

    `license` is what the repository says of itself, such as `apache-2.0`.
    """

    commit: str
    files: tuple[RemoteFile, ...]
    license: str = ""
    repo: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A hub at `endpoint`, an address; `token` is empty for a public reader.

    `memory_bytes` is what models may take here, which decides where a source leaves a choice; 0 is
    not known.
    """

    endpoint: str
    token: str
    timeout_s: float
    memory_bytes: int = 0

    @property
    def host(self) -> str:
        """The hub's host, for messages."""
        return urlsplit(self.endpoint).hostname or public(self.endpoint)

    def resolve(self, source: HubSource) -> Resolved:
        """Ask the hub which files `source` means, and whether they may be read.

        Raises InvalidRequest when there is no such repository, revision or file or several could
        be meant, and DownloadFailed when the hub cannot be asked or refuses: Unsteady if that may
        pass.
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
            raise self._refused(error, source.repo) from error
        except OfflineModeIsEnabled as error:
            raise DownloadFailed(
                f"{source.repo}: HF_HUB_OFFLINE is set, so nothing is asked of {self.host}; "
                "unset it to download"
            ) from error
        except HFValidationError as error:
            raise InvalidRequest(f"{source.repo!r} is no name of a repository: {error}") from error
        except HTTPError as error:
            raise self._unreachable(error) from error
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
        listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        sizes = {path: _size(sibling) for path, sibling in listed.items()}
        chosen = select(sizes, source, self.memory_bytes)
        commit = info.sha or source.revision

        def address(path: str) -> str:
            return str(hf_hub_url(source.repo, path, revision=commit, endpoint=self.endpoint))

        # A gated repository lists its files to everybody: only asking for one tells.
        facts = get_hf_file_metadata(
            address(chosen[0].path),
            token=token,
            headers=headers,
            timeout=self.timeout_s,
            endpoint=self.endpoint,
        )
        if sizes[chosen[0].path] is None:
            sizes[chosen[0].path] = facts.size
        files = tuple(
            RemoteFile(
                name=relative_name(each.name),
                url=address(each.path),
                size_bytes=sizes[each.path],
                sha256=_sha256(listed[each.path]),
                git_sha1=_git_sha1(listed[each.path]),
                headers=headers,
            )
            for each in chosen
        )
        return Resolved(commit=commit, files=files, license=_license(info), repo=source.repo)

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

    def _refused(self, error: HfHubHTTPError, repo: str) -> DownloadFailed:
        """Return the error for an answer that is none; one that may pass says so."""
        text, response = self._refusal(error, repo), error.response
        if not may_pass(response.status_code):
            return DownloadFailed(text)
        return Unsteady(text, after_s=told_to_wait_s(response.headers))

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
        if status == 407:
            return f"{repo}: {wants_credentials(self.endpoint)}"
        if status == 429:
            return f"{self.host} limits how often it is asked: try again later"
        return f"{self.host} answered HTTP {status} for {repo}"

    def _unreachable(self, error: Exception) -> DownloadFailed:
        """Return why the hub could not be asked; the library says it in an exception's cause."""
        proxy, causes = proxy_for(self.endpoint), [error, *_causes(error)]
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return DownloadFailed(f"no trusted TLS connection to {self.host} ({cause})")
        if type(error).__name__ == "ProxyError":  # its text is the proxy's answer
            status = str(error)[:3]
            if status == "407":
                return DownloadFailed(wants_credentials(self.endpoint))
            text = f"the proxy {proxy} refused: HTTP {error}"
            passes = status.isdecimal() and may_pass(int(status))
            return Unsteady(text) if passes else DownloadFailed(text)
        if proxy and type(error).__name__ in ("ConnectError", "ConnectTimeout"):
            return Unsteady(f"the proxy {proxy} does not answer ({error})")
        if "Timeout" in type(error).__name__:
            return Unsteady(f"{self.host} did not answer within {self.timeout_s:g} s")
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return Unsteady(f"the host {self.host} is not known; is this computer online?")
        return Unsteady(f"cannot reach {self.host} ({error or type(error).__name__})")

    def _how_to_enter(self, repo: str) -> str:
        page = f"{public(self.endpoint)}/{repo}"
        advice = f"accept its licence at {page} and set HF_TOKEN to a token of the "
        if self.token:
            return advice + "account that did (the present one is not let in)"
        return advice + "account that did (it is not set)"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _size(listed: RepoSibling) -> int | None:
    size: int | None = listed.size if listed.lfs is None else listed.lfs.size
    return size


def _sha256(listed: RepoSibling) -> str | None:
    """Return the SHA-256 that the listing gives, as it does for files in LFS."""
    if listed.lfs is None:
        return None
    sha256: str = listed.lfs.sha256
    if not _SHA256.fullmatch(sha256):
        raise ValueError("an LFS file without a SHA-256")
    return sha256


def _git_sha1(listed: RepoSibling) -> str | None:
    """Return the id that Git gives the content of a file outside LFS."""
    sha1: str = listed.blob_id or ""
    return sha1 if listed.lfs is None and _SHA1.fullmatch(sha1) else None


def _license(info: ModelInfo) -> str:
    """Return the licence that a repository's card or tags name; empty if they name none."""
    tags = [tag for tag in info.tags or () if isinstance(tag, str)]
    said = [getattr(info.card_data, "license", None)]
    said += [tag.removeprefix("license:") for tag in tags if tag.startswith("license:")]
    if "other" in said[:2]:  # the hub's word for a licence that it has no name for
        said.insert(0, getattr(info.card_data, "license_name", None))
    for name in said:
        if isinstance(name, str) and name.isprintable() and 0 < len(name) <= _LICENSE_CHARS:
            return name
    return ""
