"""Runs the real fetcher for a test, as the daemon does: a child process and a socketpair."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from backends import wire
from daemon.downloads.messages import Fetch, Fetched, FromFetcher, Progress

ROOT = Path(__file__).resolve().parent.parent
_PATIENCE_S = 30.0
_NOT_INHERITED = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Directories of one model under `root`; none of them exists at first."""

    root: Path
    model: str = "one"

    @property
    def work_dir(self) -> Path:
        """A download's own folder."""
        return self.root / "work" / self.model

    @property
    def partials_dir(self) -> Path:
        """What is here of files that are not whole."""
        return self.root / "partial"

    @property
    def blobs_dir(self) -> Path:
        """Whole files by hash."""
        return self.root / "blobs"

    @property
    def model_dir(self) -> Path:
        """The model's links."""
        return self.root / "models" / self.model

    def stored(self) -> list[str]:
        """Return every name in the store."""
        found = [*self.blobs_dir.glob("*"), *self.model_dir.glob("*")]
        return sorted(path.relative_to(self.root).as_posix() for path in found)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """All that a fetcher said, with the times in seconds at which progress arrived."""

    answer: Fetched | wire.Error | None = None
    progress: list[Progress] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    status: int = 0
    stderr: str = ""

    @property
    def fetched(self) -> Fetched:
        """The answer of a download that worked."""
        assert isinstance(self.answer, Fetched), (self.answer, self.stderr)
        return self.answer

    @property
    def error(self) -> wire.Error:
        """The answer of one that did not."""
        assert isinstance(self.answer, wire.Error), (self.answer, self.stderr)
        return self.answer


class Fetcher:
    """A running fetcher child; leaving it ends the child."""

    def __init__(
        self,
        places: Places,
        *,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        self._places = places
        self._decoder: wire.Decoder[FromFetcher] = wire.Decoder(FromFetcher)  # type: ignore[arg-type]
        places.root.mkdir(parents=True, exist_ok=True)
        self._stderr = places.root / "stderr"
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(_PATIENCE_S)
        with self._stderr.open("wb") as stderr, theirs:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-P", "-m", "daemon.downloads.fetcher", *arguments]
                + [f"--channel-fd={theirs.fileno()}", f"--parent-pid={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=self._environment(environment or {}),
            )
        self._lines = self.channel.makefile("rb")

    def _environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(_NOT_INHERITED)}
        path = os.pathsep.join(filter(None, [str(ROOT), extra.get("PYTHONPATH")]))
        home = {"HF_HOME": str(self._places.root / "hf-home")}
        return {**kept, **home, **extra, "PYTHONPATH": path}

    def order(
        self,
        source: str,
        *,
        endpoint: str = "http://127.0.0.1:1",
        offline: bool = False,
        began: bool = False,
    ) -> None:
        """Send the Fetch."""
        message = Fetch(
            source=source,
            work_dir=str(self._places.work_dir),
            partials_dir=str(self._places.partials_dir),
            blobs_dir=str(self._places.blobs_dir),
            model_dir=str(self._places.model_dir),
            hub_endpoint=endpoint,
            offline=offline,
            began=began,
        )
        self.channel.sendall(wire.encode(message))

    def outcome(self) -> Outcome:
        """Listen until the child has ended."""
        result = Outcome()
        for line in self._lines:
            message = self._decoder.decode(line)
            match message:
                case Progress():
                    result.progress.append(message)
                    result.times.append(time.monotonic())
                case Fetched() | wire.Error():
                    assert result.answer is None, "two answers"
                    result.answer = message
        result.status = self.process.wait(_PATIENCE_S)
        result.stderr = self._stderr.read_text(errors="replace")
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait(_PATIENCE_S)
        self._lines.close()
        self.channel.close()


def fetch(
    places: Places,
    source: str,
    *,
    endpoint: str = "http://127.0.0.1:1",
    offline: bool = False,
    began: bool = False,
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    prefix: Sequence[str] = (),
) -> Outcome:
    """Run one download to its end."""
    with Fetcher(places, environment=environment, arguments=arguments, prefix=prefix) as child:
        child.order(source, endpoint=endpoint, offline=offline, began=began)
        return child.outcome()
