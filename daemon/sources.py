"""Where a model's files come from: parsing and naming of sources. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from daemon.errors import InvalidRequest

UNIQUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_OWNER_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DISTRIBUTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WEB = ("https://", "http://")
FORMS = (
    "hf:owner/repo[:quant|/file|/folder/][@revision], https://host/file.gguf[#sha256=…], "
    "/path/to/file.gguf, "
    "/path/to/folder/, package:DISTRIBUTION/FILE or package:DISTRIBUTION/FOLDER/"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A model in a Hugging Face repository, by the path of its file or folder or a quantization."""

    repo: str
    file: str = ""
    quantization: str = ""
    revision: str = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlSource:
    """One file at an http(s) address, with the SHA-256 that it must have, or "" if nobody said."""

    url: str
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSource:
    """A file or a folder that is on this machine already; `path` is absolute."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSource:
    """A file inside an installed Python distribution, or all of a folder: `file` ends in `/`."""

    distribution: str
    file: str

    @property
    def is_folder(self) -> bool:
        """Whether a folder is meant."""
        return self.file.endswith("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSource:
    """A model that an upstream of the settings runs. Nobody adds these: upstreams list them."""

    upstream: str
    model: str

    def __str__(self) -> str:
        return f"remote:{self.upstream}/{self.model}"


Source = HubSource | UrlSource | PathSource | PackageSource


def _relative(path: str, whole: str) -> str:
    """Return `path` if it stays inside its folder. Raises InvalidRequest."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or any(p in ("..", ".") for p in parts):
        raise InvalidRequest(f"source {whole!r}: {path!r} is not a file path inside it")
    return path


def _parse_hub(text: str) -> HubSource:
    rest, _, revision = text.removeprefix("hf:").partition("@")
    match = _OWNER_REPO.match(rest)
    if match is None or ("@" in text and not revision):
        shown = public(text)
        raise InvalidRequest(f"source {shown!r} is not hf:owner/repo[:quant|/file][@revision]")
    repo, tail = match.group(), rest[match.end() :]
    if tail.startswith("/"):
        return HubSource(repo=repo, file=_relative(tail[1:], text), revision=revision or "main")
    if tail and not re.fullmatch(r":[\w.-]+", tail):
        raise InvalidRequest(f"source {text!r}: {tail!r} is neither :quantization nor /file")
    return HubSource(repo=repo, quantization=tail[1:], revision=revision or "main")


def _parse_url(text: str) -> UrlSource:
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and parts.port != 0
        text = parts.scheme + text[len(parts.scheme) :]  # which may be in capitals
    except ValueError:
        named = False
    if not named:
        raise InvalidRequest(f"source {public(text)!r} is not an http(s) address")
    url, _, fragment = text.partition("#")
    if not fragment.startswith("sha256="):
        return UrlSource(url=text)
    sha256 = fragment.removeprefix("sha256=").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InvalidRequest(
            f"source {public(text)!r}: what follows # must be sha256= and 64 hexadecimal digits"
        )
    return UrlSource(url=url, sha256=sha256)


def parse(text: str) -> Source:
    """Return the source that `text` names. Raises InvalidRequest with the forms that exist."""
    if text.startswith("hf:"):
        return _parse_hub(text)
    if text.lower().startswith(_WEB):
        return _parse_url(text)
    if text.startswith("/"):
        return PathSource(path=text)
    if text.startswith("package:"):
        distribution, _, file = text.removeprefix("package:").partition("/")
        if _DISTRIBUTION.fullmatch(distribution):
            return PackageSource(distribution=distribution, file=_relative(file, text))
    if text.startswith("remote:"):
        raise InvalidRequest(
            f"{text!r} can't be added: the models of an upstream are here once the settings have "
            "its [remote.NAME]"
        )
    raise InvalidRequest(f"{public(text)!r} is not a source; a source is {FORMS}")


def parse_remote(text: str) -> RemoteSource:
    """Return the source of a cloud model's record. Raises ValueError for any other."""
    name, slash, model = text.removeprefix("remote:").partition("/")
    if not text.startswith("remote:") or not slash:
        raise ValueError(f"{text!r} is not remote:NAME/MODEL")
    return RemoteSource(upstream=name, model=model)


def is_source(text: str) -> bool:
    """Say whether `text` means a source, well-formed or not, rather than a unique name."""
    return text.lower().startswith(_WEB) or text.startswith(("hf:", "package:", "remote:", "/"))


def public(text: str) -> str:
    """Return a source as it may be shown: without the user, password and query of an address.

    Of one that is mistyped, too.
    """
    if "://" not in text or text.startswith("/"):
        return text
    scheme, _, rest = text.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def name_for(source: Source) -> str:
    """Return the unique name of a model whose user gave none.

    It is the file's stem, or the folder's name where the source ends in `/`, in lower case.
    """
    match source:
        case HubSource(file=""):
            stem = source.repo.partition("/")[2]
            stem = f"{stem}:{source.quantization}" if source.quantization else stem
        case PathSource(path=path) | PackageSource(file=path) if path.endswith("/"):
            stem = PurePosixPath(path).name
        case HubSource() | PackageSource():
            stem = PurePosixPath(source.file).stem
        case UrlSource():
            stem = PurePosixPath(source.url.partition("?")[0].partition("#")[0]).stem
        case PathSource():
            stem = PurePosixPath(source.path).stem
    name = re.sub(r"[^a-z0-9._:-]+", "-", stem.lower()).lstrip("._:-")
    return name[:200] or "model"
