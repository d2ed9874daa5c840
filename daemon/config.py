"""Settings: TOML file, then environment, then flags. Frozen once read; every value has a default.

`configs/modeld.toml` shows every key with its default. An unknown key is an error that names it.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from backends.contract import Upstream
from daemon.errors import ConfigError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_DURATION_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_UPSTREAM_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_TAKEN_NAMES = frozenset({"hf", "http", "https", "package", "remote"})  # a source begins so
_API_KEY = re.compile(r"[^\x00-\x20\x7f-\U0010ffff\"'\\]*")  # what no escaping can disguise


class Server(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the daemon listens and whom it answers."""

    listen: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    pieces_version: str = "12.0.0"
    pieces_aliases: bool = True
    log_level: str = "info"


class Resume(StrEnum):
    """For how long the conversations of models that are unloaded are kept."""

    SESSION = "session"
    KEEP = "keep"
    OFF = "off"


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much RAM models may take. "" goes by the machine."""

    limit: int | str = ""
    reserve: int | str = ""
    watermark: int | str = ""
    wait_s: int = 60

    def limit_bytes(self) -> int | None:
        """Return the explicit limit, or None to go by the machine."""
        return parse_size(self.limit, "memory.limit") if self.limit != "" else None

    def reserve_bytes(self) -> int | None:
        """Return what is left to everything else when there is no explicit limit."""
        return parse_size(self.reserve, "memory.reserve") if self.reserve != "" else None

    def watermark_bytes(self) -> int | None:
        """Return the available RAM below which idle models leave."""
        return parse_size(self.watermark, "memory.watermark") if self.watermark != "" else None


class Models(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models are loaded, asked and unloaded. 0 and "" leave a choice to modeld.

    `default` is the chat model that is meant where none is named. Without `load_on_demand` requests
    are answered by models that are in memory, and by no others.
    """

    default: str = ""
    backend: str = ""
    context_length: int = 0
    slots: int = 0
    queue_limit: int = 128
    load_timeout_s: int = 600
    load_on_demand: bool = True
    keep_alive: int | float | str = "5m"
    max_run_s: int = 3600
    resume: Resume = Resume.SESSION
    resume_limit: int | str = "4GiB"

    def keep_alive_s(self) -> float:
        """Return how long an idle model stays, in seconds; `math.inf` for ever."""
        return parse_duration(self.keep_alive, "models.keep_alive")

    def resume_limit_bytes(self) -> int:
        """Return how much may be kept of conversations."""
        return parse_size(self.resume_limit, "models.resume_limit")


class Downloads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models are fetched. An empty `hub_endpoint` is the Hugging Face hub."""

    max_active: int = 2
    bandwidth_limit: int | str = ""
    hub_endpoint: str = ""
    offline: bool = False

    def bandwidth_bytes_per_s(self) -> int:
        """Return what all downloads together may use; 0 is all there is."""
        limit = self.bandwidth_limit
        return parse_size(limit, "downloads.bandwidth_limit") if limit != "" else 0


class Remote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An upstream: an OpenAI-compatible API elsewhere. `url` ends before its `/v1`.

    `api_key_file` holds the key instead of `api_key`; once loaded, settings have it in `api_key`.
    No `models` means all that it lists.
    """

    url: str = ""
    api_key: str = ""
    api_key_file: str = ""
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 120.0
    models: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Remote(url={self.url!r})"  # a key must not get into a log

    def allows(self, model: str) -> bool:
        """Say whether the model of this name there is wanted here."""
        return not self.models or model in self.models

    def upstream(self, model: str = "") -> Upstream:
        """Return what a child needs to reach `model` there."""
        return Upstream(
            url=self.url,
            model=model,
            api_key=self.api_key,
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
        )


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. `remote` holds the upstreams by name."""

    server: Server = Server()
    memory: Memory = Memory()
    models: Models = Models()
    downloads: Downloads = Downloads()
    remote: dict[str, Remote] = {}


def parse_size(value: int | str, key: str) -> int:
    """Return bytes for 123, "2GiB" or "1.5 GB". Raises ConfigError that names `key`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B?)", str(value).strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f'{key} = {value!r} is not a size; write bytes or a size such as "2GiB"')
    return int(float(match[1]) * _UNITS[match[2]])


def parse_duration(value: float | str, key: str) -> float:
    """Return the seconds of 300, "300", "5m" or "1h30m"; `math.inf` for what is negative.

    Numbers are seconds, texts as Go and Ollama write durations. Raises ConfigError that names
    `key`.
    """
    text = value.strip() if isinstance(value, str) else f"{value:f}"
    negative = text.startswith("-")
    digits = text[1:] if text[:1] in ("+", "-") else text
    parts = _DURATION_PART.findall(digits)
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", digits):
        seconds = float(digits)
    elif parts and "".join(number + unit for number, unit in parts) == digits:
        seconds = sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)
    else:
        raise ConfigError(
            f'{key} = {value!r} is not a duration; write seconds, or "5m", "1h30m", or -1 for ever'
        )
    return math.inf if negative and seconds else seconds


def _items(text: str) -> list[str]:
    return [item for part in text.split(",") if (item := part.strip())]


def _of_upstream(variable: str, rest: str, text: str) -> tuple[str, str, Any]:
    """Return the upstream, the key and the value of MODELD_REMOTE_<NAME>_<KEY>.

    Names have no `_`, and variables no `-`: a `_` of the variable's name part stands for a `-`.
    """
    for key in (field.name for field in msgspec.structs.fields(Remote)):
        if rest.endswith(f"_{key}"):
            name = rest.removesuffix(f"_{key}").replace("_", "-")
            return name, key, _items(text) if key == "models" else text
    keys = ", ".join(field.name.upper() for field in msgspec.structs.fields(Remote))
    raise ConfigError(f"{variable}: it must be MODELD_REMOTE_<NAME>_<KEY>, with a KEY of {keys}")


def _from_environment(environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the settings in variables named MODELD_<SECTION>_<KEY>. Raises ConfigError."""
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    found: dict[str, dict[str, Any]] = {}
    for variable, text in environment.items():
        _, _, rest = variable.lower().partition("modeld_")
        section, _, key = rest.partition("_")
        if not variable.startswith("MODELD_") or section not in sections:
            continue
        if section == "remote":
            name, key, value = _of_upstream(variable, key, text)
            found.setdefault(section, {}).setdefault(name, {})[key] = value
            continue
        types = {field.name: field.type for field in msgspec.structs.fields(sections[section])}
        if key not in types:
            raise ConfigError(f"{variable}: there is no setting {key!r} in [{section}]")
        is_list = types[key] == tuple[str, ...]
        found.setdefault(section, {})[key] = _items(text) if is_list else text
    if endpoint := environment.get("HF_ENDPOINT"):
        found.setdefault("downloads", {}).setdefault("hub_endpoint", endpoint)
    return found


def _merge(tables: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for table in tables:
        for section, keys in table.items():
            if isinstance(keys, dict) and isinstance(merged.get(section, {}), dict):
                merged[section] = _merge([merged.get(section, {}), keys])
            else:
                merged[section] = keys  # not a section: the conversion will say so
    return merged


def _check(config: Config) -> Config:
    config.memory.limit_bytes()
    config.memory.reserve_bytes()
    config.memory.watermark_bytes()
    config.models.keep_alive_s()
    config.models.resume_limit_bytes()
    for section, key, least in (
        ("models", "context_length", 0),
        ("models", "slots", 0),
        ("models", "queue_limit", 1),
        ("models", "load_timeout_s", 1),
        ("models", "max_run_s", 0),
        ("memory", "wait_s", 0),
        ("downloads", "max_active", 1),
    ):
        value = getattr(getattr(config, section), key)
        if value < least:
            raise ConfigError(f"{section}.{key} = {value}: must be at least {least}")
    if config.server.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(
            f"server.log_level = {config.server.log_level!r}: use debug, info, warning or error"
        )
    remote = {name: _checked_upstream(name, entry) for name, entry in config.remote.items()}
    return msgspec.structs.replace(config, remote=remote)


def _checked_upstream(name: str, remote: Remote) -> Remote:
    """Return the upstream with its key in place. Raises ConfigError, which never shows values."""
    where = f"remote.{name}"
    if not _UPSTREAM_NAME.fullmatch(name) or name in _TAKEN_NAMES:
        raise ConfigError(
            f"{where}: a name is lower-case letters, digits and -, the first of them no -, and not "
            f"one of {', '.join(sorted(_TAKEN_NAMES))}"
        )
    for key in ("connect_timeout_s", "read_timeout_s"):
        if not 0 < getattr(remote, key) < math.inf:
            raise ConfigError(f"{where}.{key} = {getattr(remote, key)}: must be more than 0")
    key, key_name = remote.api_key, "api_key"
    if remote.api_key_file:
        if key:
            raise ConfigError(f"{where}: give it an api_key or an api_key_file, not both")
        key_name = "api_key_file"
        try:
            key = Path(remote.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "is not text"
            raise ConfigError(f"{where}.api_key_file: {remote.api_key_file}: {reason}") from error
        if not key:
            raise ConfigError(f"{where}.api_key_file: {remote.api_key_file}: is empty")
    if not _API_KEY.fullmatch(key):
        raise ConfigError(
            f"{where}.{key_name}: a key is letters, digits and signs, without spaces, quotes and \\"
        )
    url = _upstream_url(where, remote.url)
    return msgspec.structs.replace(remote, url=url, api_key=key)


def _upstream_url(where: str, url: str) -> str:
    """Return the base URL without a `/v1` or `/` at its end. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        well_formed = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed or re.search(r"[^!-~]", url):
        raise ConfigError(f'{where}.url: an address such as "https://host:8000" is needed')
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{where}.url: no user, password, ? or # in it; a key goes into {where}.api_key"
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def load(
    file: Path | None, environment: Mapping[str, str], flags: dict[str, dict[str, Any]]
) -> Config:
    """Return the settings of `file`, overridden by `environment`, overridden by `flags`.

    Raises ConfigError for a file that can't be read and for a wrong key or value, by name.
    """
    table: dict[str, Any] = {}
    if file is not None:
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config file {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {file} is not TOML: {error}") from error
    merged = _merge([table, _from_environment(environment), flags])
    try:
        return _check(msgspec.convert(merged, Config, strict=False))
    except msgspec.ValidationError as error:
        where = f"config file {file}" if file else "settings"
        words = f"; it is one of {', '.join(Resume)}" if "enum value" in str(error) else ""
        raise ConfigError(f"{where}: {error}{words}") from error


def default_file() -> Path | None:
    """Return the user's config file, else the system's, else None."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    candidates = (home / "modeld" / "modeld.toml", Path("/etc/modeld/modeld.toml"))
    return next((path for path in candidates if path.is_file()), None)
