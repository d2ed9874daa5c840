"""The process that runs one download: `python -P -m daemon.downloads.fetcher`.

Owns the conversation with the daemon and the order of a download's steps: find, fetch, verify,
publish. Everything heavy is imported after the process is tied to its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import queue
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from backends import child, wire
from daemon import sources
from daemon.artifacts import folder
from daemon.downloads import local, publish
from daemon.downloads.messages import Fetch, Fetched, Progress, ToFetcher
from daemon.errors import DownloadFailed, InsufficientDisk, InvalidRequest, ModeldError

if TYPE_CHECKING:
    from daemon.downloads.transfer import RemoteFile, Timeouts

# With the first frame, the first one that shows movement and the one that ends it, this makes at
# most five in any second.
_PROGRESS_INTERVAL_S = 1 / 3

Send = Callable[[msgspec.Struct], None]


class Reporter:
    """Tells the daemon how far the download is: often enough, not too often, never backwards."""

    def __init__(self, send: Send, clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._sent_at = 0.0
        self._shown_bytes = 0
        self._before_bytes = 0
        self.done_bytes = 0
        self.total_bytes = 0

    def started(self) -> None:
        """Say that there is a download."""
        self._tell()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Take note of what is here, of `total_bytes` (0 is not known)."""
        self.done_bytes = max(self.done_bytes, done_bytes)
        self.total_bytes = total_bytes
        first_movement = self.done_bytes > 0 and self._shown_bytes == 0
        if first_movement or self._clock() - self._sent_at >= _PROGRESS_INTERVAL_S:
            self._tell()

    def part(self, part_bytes: int, total_bytes: int) -> publish.Report:
        """Return what takes note of one file of several, the next after those before it."""
        before_bytes, self._before_bytes = self._before_bytes, self._before_bytes + part_bytes

        def report(done_bytes: int, _: int) -> None:
            self(before_bytes + min(done_bytes, part_bytes), total_bytes)

        return report

    def verifying(self) -> None:
        """Say that every byte is here."""
        self.total_bytes = self.done_bytes
        self._tell(verifying=True)

    def _tell(self, *, verifying: bool = False) -> None:
        self._sent_at = self._clock()
        self._shown_bytes = self.done_bytes
        self._send(
            Progress(done_bytes=self.done_bytes, total_bytes=self.total_bytes, verifying=verifying)
        )


class Download:
    """One download, from its source to the store."""

    def __init__(self, fetch: Fetch, report: Reporter, timeouts: Timeouts, token: str) -> None:
        self._fetch = fetch
        self._report = report
        self._timeouts = timeouts
        self._token = token
        self._to = publish.Destination(
            partial_dir=Path(fetch.partial_dir),
            blobs_dir=Path(fetch.blobs_dir),
            model_dir=Path(fetch.model_dir),
        )

    def run(self) -> Fetched:
        """Bring the source's files into the store. Raises ModeldError.

        What is left of a failed attempt stays for the next one, unless it is worth nothing.
        """
        self._report.started()
        try:
            fetched = self._bring(sources.parse(self._fetch.source))
        except (publish.VerificationFailed, InvalidRequest, InsufficientDisk):
            self._to.discard_partial()
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._to.discard_partial()
            raise InsufficientDisk(self._full()) from error
        self._to.discard_partial()
        return fetched

    def _bring(self, source: sources.Source) -> Fetched:
        match source:
            case sources.PathSource():
                return self._import(source)
            case sources.PackageSource():
                return self._copy(source)
            case _ if self._fetch.offline:
                raise DownloadFailed(
                    "modeld is set to stay offline, so nothing is downloaded; "
                    "files on this machine can still be imported"
                )
            case sources.UrlSource():
                from daemon.downloads import transfer

                return self._transfer(transfer.from_url(source.url), revision="")
            case sources.HubSource():
                from daemon.downloads import hub

                where = hub.Hub(
                    endpoint=self._fetch.hub_endpoint.rstrip("/"),
                    token=self._token,
                    timeout_s=self._timeouts.connect_s,
                )
                resolved = where.resolve(source)
                (file,) = resolved.files
                return self._transfer(file, revision=resolved.commit)

    def _transfer(self, remote: RemoteFile, *, revision: str) -> Fetched:
        from daemon.downloads import transfer

        if remote.sha256 and publish.take_blob(self._to, remote.sha256, remote.name):
            size_bytes = self._to.staged(remote.name).stat().st_size
            self._report(size_bytes, size_bytes)
            return self._finish({remote.name: remote.sha256}, revision)
        sha256 = asyncio.run(transfer.download(self._to, remote, self._timeouts, self._report))
        return self._finish({remote.name: sha256}, revision)

    def _copy(self, source: sources.PackageSource) -> Fetched:
        package = local.find_in_package(source)
        model = folder.read(package.root, list(package.files), self._fetch.architecture)
        files = {name: package.files[name] for name, _ in model.roles}
        total_bytes = sum(file.size_bytes for file in files.values())
        hashes = {}
        for name, file in files.items():
            report = self._report.part(file.size_bytes, total_bytes)
            if file.sha256 and publish.take_blob(self._to, file.sha256, name):
                hashes[name] = file.sha256
                report(file.size_bytes, file.size_bytes)
            else:
                hashes[name] = local.copy_from_package(
                    self._to, name, file, report, total_bytes - self._report.done_bytes
                )
        return self._finish(hashes, "")

    def _import(self, source: sources.PathSource) -> Fetched:
        root, seen = local.find(Path(source.path))
        model = folder.read(root, list(seen), self._fetch.architecture)
        total_bytes = sum(seen[name].st_size for name, _ in model.roles)
        files = []
        for name, _ in model.roles:
            report = self._report.part(seen[name].st_size, total_bytes)
            files.append(local.hash_local(root, name, seen[name], report))
        self._report.verifying()
        return Fetched(artifact=model.describe(local.import_local(self._to, files, model.roles)))

    def _finish(self, hashes: Mapping[str, str], revision: str) -> Fetched:
        """Take the files that are staged, with these SHA-256s, if they are a model."""
        self._report.verifying()
        model = folder.read(self._to.staging_dir, sorted(hashes), self._fetch.architecture)
        files = publish.publish(self._to, hashes, model.roles)
        return Fetched(artifact=model.describe(files), revision=revision)

    def _full(self) -> str:
        free = shutil.disk_usage(self._to.partial_dir.parent).free
        return (
            f"the disk of {self._to.partial_dir.parent} is full: {free:,} bytes are free, and "
            f"{self._report.total_bytes - self._report.done_bytes:,} were still to come"
        )


def attempt(download: Download, token: str) -> Fetched | wire.Error:
    """Return what became of the download. Never raises; no message or trace shows `token`."""

    def hidden(text: str) -> str:
        return text.replace(token, "[HF_TOKEN]") if token else text

    try:
        return download.run()
    except ModeldError as error:
        return wire.Error(code=error.code, message=hidden(error.message))
    except Exception as error:  # noqa: BLE001 - whatever it is, the daemon is owed an answer
        # The daemon's log gets the trace; the user gets what the system said.
        sys.stderr.write(hidden(traceback.format_exc()))
        reason = str(error) or type(error).__name__
        return wire.Error(code="download_failed", message=hidden(f"the download stopped: {reason}"))


def _listen(channel: child.Channel, inbox: queue.SimpleQueue[Fetch]) -> None:
    """Take the order, and end the process as soon as nobody waits for it any more."""
    status = 0
    try:
        for message in channel.receive():
            inbox.put(message)
    except (OSError, wire.ProtocolError):
        traceback.print_exc()
        status = 1
    os._exit(status)


def _sender(channel: child.Channel) -> Send:
    def send(message: msgspec.Struct) -> None:
        try:
            channel.send(message)
        except OSError:
            os._exit(0)  # the daemon is gone, or has ended this download

    return send


def _timeouts(arguments: Sequence[str]) -> Timeouts:
    from daemon.downloads.transfer import Timeouts

    parser = argparse.ArgumentParser()
    parser.add_argument("--connect-timeout-s", type=float, default=Timeouts().connect_s)
    parser.add_argument("--stall-timeout-s", type=float, default=Timeouts().stall_s)
    options = parser.parse_args(arguments)
    return Timeouts(connect_s=options.connect_timeout_s, stall_s=options.stall_timeout_s)


def main() -> None:
    """Run the one download that the daemon asks for, answer, and exit."""
    channel, arguments = child.attach(ToFetcher)
    os.umask(0o077)
    # Only HF_TOKEN and what stands in a URL authorise: a netrc entry would go out as well, to
    # every host that a redirect leads to.
    os.environ["NETRC"] = os.devnull
    inbox: queue.SimpleQueue[Fetch] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    send = _sender(channel)
    fetch = inbox.get()
    token = os.environ.get("HF_TOKEN", "").strip()
    send(attempt(Download(fetch, Reporter(send), _timeouts(arguments), token), token))
    sys.stderr.flush()
    os._exit(0)  # the listening thread is inside a read, which a normal exit would wait for


if __name__ == "__main__":
    main()
