"""The process that runs one download: `python -P -m daemon.downloads.fetcher`.

Owns the order of a download's steps: find, fetch, verify, publish. Everything heavy is imported
after the process is tied to its parent.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from daemon import sources
from daemon.artifacts import InvalidModelFile, folder
from daemon.downloads import errand, local, publish
from daemon.downloads.messages import (
    Fetch,
    Fetched,
    FileProgress,
    Limit,
    Progress,
    ToFetcher,
)
from daemon.errors import InsufficientDisk
from daemon.store import discard

if TYPE_CHECKING:
    from daemon.downloads.hub import Resolved
    from daemon.downloads.ranged import Timeouts

# With the first frame, the first one that shows movement and the one that ends it, this makes at
# most five in any second.
_PROGRESS_INTERVAL_S = 1 / 3
_SILENCE_S = 1.0  # while nothing comes, too: what came last is told, and that the rate falls


class Reporter:
    """Tells the daemon how far the download is: often enough, not too often, never backwards."""

    def __init__(self, send: errand.Send, clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._sent_at = 0.0
        self._shown_bytes = 0
        self._files: dict[str, FileProgress] = {}
        self._waiting = ""
        self._note = ""
        self.done_bytes = 0
        self.total_bytes = 0

    def started(self) -> None:
        """Say that there is a download."""
        self.tell()

    def expect(self, sizes: Mapping[str, int], keys: Mapping[str, str] | None = None) -> None:
        """Take note of which files are wanted, their sizes (0 is not known), and their keys."""
        keys = keys or {}
        self._files = {
            name: FileProgress(name, 0, size, keys.get(name, "")) for name, size in sizes.items()
        }
        self._count()

    def file(self, name: str) -> publish.Report:
        """Return what takes note of one of the files."""

        def report(done_bytes: int, total_bytes: int) -> None:
            before = self._files[name]  # of a file that is fetched anew, less may be here than was
            done_bytes = max(before.done_bytes, done_bytes)
            total_bytes = max(total_bytes, done_bytes) if total_bytes else 0
            self._files[name] = FileProgress(name, done_bytes, total_bytes, before.key)
            self._count()
            first_movement = self.done_bytes > 0 and self._shown_bytes == 0
            if first_movement or self._clock() - self._sent_at >= _PROGRESS_INTERVAL_S:
                self.tell()

        return report

    async def keep_telling(self) -> None:
        """Say how it stands whenever that was not said for a while, until cancelled."""
        while True:
            await asyncio.sleep(_SILENCE_S)
            if self._clock() - self._sent_at >= _SILENCE_S:
                self.tell()

    def waiting(self, reason: str) -> None:
        """Say what it waits for, "" for nothing."""
        if reason != self._waiting:
            self._waiting = reason
            self.tell()

    def noted(self, note: str) -> None:
        """Say what happened."""
        self._note = note
        self.tell()

    def verifying(self) -> None:
        """Say that every byte is here."""
        self.total_bytes = self.done_bytes
        self.tell(verifying=True)

    def _count(self) -> None:
        files = self._files.values()
        self.done_bytes = max(self.done_bytes, sum(file.done_bytes for file in files))
        known = all(file.total_bytes for file in files)
        self.total_bytes = sum(file.total_bytes for file in files) if known else 0

    def tell(self, *, verifying: bool = False) -> None:
        """Say how it stands."""
        self._sent_at = self._clock()
        self._shown_bytes = self.done_bytes
        self._send(
            Progress(
                done_bytes=self.done_bytes,
                total_bytes=self.total_bytes,
                verifying=verifying,
                files=tuple(self._files.values()),
                waiting=self._waiting,
                note=self._note,
            )
        )


class Download:
    """One download, from its source to the store. `orders` are what the daemon says meanwhile."""

    def __init__(
        self, fetch: Fetch, report: Reporter, timeouts: Timeouts, token: str, orders: errand.Orders
    ) -> None:
        self._fetch = fetch
        self._report = report
        self._timeouts = timeouts
        self._orders = orders
        self._network = errand.Network(
            hub_endpoint=fetch.hub_endpoint,
            offline=fetch.offline,
            timeouts=timeouts,
            token=token,
            memory_bytes=fetch.memory_bytes,
        )
        self._to = publish.Destination(
            work_dir=Path(fetch.work_dir),
            blobs_dir=Path(fetch.blobs_dir),
            model_dir=Path(fetch.model_dir),
        )

    def run(self) -> Fetched:
        """Bring the source's files into the store. Raises ModeldError.

        What is here of files that are not whole stays for the next attempt.
        """
        self._report.started()
        try:
            return self._bring(sources.parse(self._fetch.source))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InsufficientDisk(self._full()) from error
        finally:
            self._to.discard()

    def _bring(self, source: sources.Source) -> Fetched:
        match source:
            case sources.PathSource():
                return self._import(source)
            case sources.PackageSource():
                return self._copy(source)
            case sources.UrlSource() | sources.HubSource():
                return asyncio.run(self._transfer(self._locate(source)))

    def _locate(self, source: sources.UrlSource | sources.HubSource) -> Resolved:
        """Return the files that `source` means. A hub that can't be asked now is asked again."""
        from daemon.downloads.network_errors import Unsteady, next_try
        from daemon.downloads.pace import Patience

        patience = Patience(
            self._timeouts.patience_s, self._timeouts.first_patience_s, began=self._fetch.began
        )
        while True:
            try:
                located = self._network.locate(source)
            except Unsteady as error:
                wait_s, words = next_try(error, patience)
                self._report.waiting(words)
                time.sleep(wait_s)
            else:
                self._report.waiting("")
                return located

    async def _transfer(self, located: Resolved) -> Fetched:
        from daemon.downloads.bringing import Bringer, key_of
        from daemon.downloads.pace import Bucket
        from daemon.downloads.transfer import Listener

        bucket = Bucket(self._fetch.bytes_per_s)
        self._heed(bucket.limit)
        bringer = Bringer(self._to, Path(self._fetch.partials_dir), self._timeouts, bucket)
        self._report.expect(
            {file.name: file.size_bytes or 0 for file in located.files},
            {file.name: key_of(file) for file in located.files},
        )
        try:
            bringer.require_room(located.files, located.repo)
        except InsufficientDisk:
            self._report.tell()  # for what there must be room
            raise
        telling = asyncio.create_task(self._report.keep_telling())  # ends with this loop
        hashes, partials = {}, []
        for file in sorted(located.files, key=lambda file: file.size_bytes or 0):
            listener = Listener(
                landed=self._report.file(file.name),
                waiting=self._report.waiting,
                noted=self._report.noted,
            )
            brought = await bringer.bring(file, located.repo, listener)
            hashes[file.name] = brought.sha256
            partials += [brought.partial] if brought.partial else []
        telling.cancel()
        try:
            fetched = self._finish(hashes, located.commit)
        except InvalidModelFile:  # another attempt would find the same
            for key in partials:
                discard(Path(self._fetch.partials_dir) / key, Path(self._fetch.work_dir))
            raise
        return structs.replace(fetched, partials=tuple(partials))

    def _heed(self, limit: Callable[[int], None]) -> None:
        """Call `limit` on this loop with every limit that the daemon sets from now on."""
        loop = asyncio.get_running_loop()

        def listen() -> None:
            while True:
                order = self._orders.get()
                if isinstance(order, Limit):
                    loop.call_soon_threadsafe(limit, order.bytes_per_s)

        threading.Thread(target=listen, name="limits", daemon=True).start()

    def _copy(self, source: sources.PackageSource) -> Fetched:
        package = local.find_in_package(source)
        model = folder.read(package.root, list(package.files), self._fetch.architecture)
        files = {name: package.files[name] for name, _ in model.roles}
        total_bytes = sum(file.size_bytes for file in files.values())
        self._report.expect({name: file.size_bytes for name, file in files.items()})
        hashes = {}
        for name, file in files.items():
            report = self._report.file(name)
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
        self._report.expect({name: seen[name].st_size for name, _ in model.roles})
        files = []
        for name, _ in model.roles:
            report = self._report.file(name)
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
        free = shutil.disk_usage(self._to.work_dir.parent).free
        return (
            f"the disk of {self._to.work_dir.parent} is full: {free:,} bytes are free, and "
            f"{self._report.total_bytes - self._report.done_bytes:,} were still to come"
        )


def main() -> None:
    """Run the one download that the daemon asks for."""

    def work(order: errand.Order[Fetch]) -> Fetched:
        report = Reporter(order.send)
        return Download(order.first, report, order.timeouts, order.token, order.later).run()

    errand.run(ToFetcher, work, what="the download")


if __name__ == "__main__":
    main()
