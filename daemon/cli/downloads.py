"""The commands about downloads: start, watch, pause, cancel, and clean up after them."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from daemon.cli.client import FAILED, INTERRUPTED, Client, CommandError
from daemon.cli.memory import print_estimate
from daemon.cli.output import as_json, known, table
from daemon.sources import is_source
from daemon.units import size

_POLL_S = 0.2
_LINE_S = 5.0  # between lines where nobody watches a bar
_ENDED = ("completed", "failed", "canceled")


def pull(arguments: Namespace, client: Client) -> None:
    """Download a model, by name or by source, and show how far it is."""
    name = arguments.model
    if arguments.dry_run:
        _would_pull(name, arguments, client)
        return
    if is_source(name):
        body = {"source": name} | ({"unique": arguments.name} if arguments.name else {})
        name = client.call("POST", "/modeld/v1/models", body)["unique"]
    bring(name, client, arguments.priority)
    print(f"{name} is downloaded")


def _would_pull(name: str, arguments: Namespace, client: Client) -> None:
    """Print what a download would bring, and whether it will run here."""
    if is_source(name):
        answer = client.call("POST", "/modeld/v1/estimate", {"source": name})
    else:
        answer = client.call("GET", f"{client.model_path(name)}/estimate")
    if arguments.json:
        print(as_json(answer))
        return
    download = answer["download"]
    if download is None:
        print(f"{answer['model']} is downloaded already")
    else:
        rows = [(file["name"], size(file["size_bytes"])) for file in download["files"]]
        print(table(("FILE", "SIZE"), [*rows, ("together", size(download["size_bytes"]))]))
        print(f"licence: {download['license'] or 'not told'}")
        room = "enough" if download["fits_disk"] else "NOT ENOUGH"
        print(f"disk: {size(download['disk_free_bytes'])} free, {room}")
    print_estimate(answer)


def import_file(arguments: Namespace, client: Client) -> None:
    """Take a file or a folder that is on this machine already into the catalog."""
    path = Path(arguments.path).expanduser().resolve()
    if not path.is_file() and not path.is_dir():
        raise CommandError(f"there is no file {path}")
    body = {"source": f"{path}/" if path.is_dir() else str(path)} | (
        {"unique": arguments.name} if arguments.name else {}
    )
    before = {model["id"] for model in client.call("GET", "/modeld/v1/models")["models"]}
    model = client.call("POST", "/modeld/v1/models", body)
    try:
        bring(model["unique"], client)
    except CommandError as error:
        # The record of a file that is no model is of no use to anyone.
        if error.status == FAILED and model["id"] not in before:
            client.call("DELETE", client.model_path(model["unique"]))
        raise
    print(f"{model['unique']} is downloaded")


def bring(name: str, client: Client, priority: str | None = None) -> None:
    """Download a model and show how far it is, on stderr: what a command answers is on stdout.

    Raises CommandError if it fails, is cancelled or is paused.
    """
    body = {"priority": priority} if priority else None
    job = client.call("POST", f"{client.model_path(name)}/download", body)
    show = _Bar(name) if sys.stderr.isatty() else _Lines(name)
    try:
        with show:
            show.see(job)
            while job["state"] not in _ENDED and not job["paused"]:
                time.sleep(_POLL_S)
                job = client.call("GET", client.download_path(name))
                show.see(job)
    except KeyboardInterrupt:
        raise CommandError(
            f"the download goes on without you; `modeld cancel {name}` ends it, and "
            f"`modeld pull {name}` watches it again",
            INTERRUPTED,
        ) from None
    if job["paused"]:
        why = job["error"]["message"] if job["error"] else f"`modeld resume {name}` goes on with it"
        raise CommandError(f"{name}: the download is paused: {why}")
    if job["state"] == "canceled":
        raise CommandError(f"{name}: the download was canceled")
    if job["state"] == "failed":
        raise CommandError(f"{name}: {job['error']['message']}")


class _Lines:
    """Progress for a pipe or a log: a line now and then, and one for whatever happens."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0.0
        self._said = ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def see(self, job: dict[str, Any]) -> None:
        """Show a job as it is now."""
        said = job["waiting"] or job["note"] or ""
        if said and said != self._said:
            print(f"{self._name}: {said}", file=sys.stderr, flush=True)
        self._said = said
        if time.monotonic() >= self._next or job["state"] in _ENDED:
            self._next = time.monotonic() + _LINE_S
            print(f"{self._name}: {_words(job)}", file=sys.stderr, flush=True)


class _Bar:
    """Progress for a person at a terminal, also a narrow one."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._name = name
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.completed:>3}%"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=100.0)
        self._said = ""

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def see(self, job: dict[str, Any]) -> None:
        """Show a job as it is now."""
        said = job["waiting"] or job["note"] or ""
        if said and said != self._said:
            self._console.print(f"{self._name}: {said}", markup=False, highlight=False)
        self._said = said
        self._progress.update(self._task, completed=_percent(job), description=_amounts(job))


def _words(job: dict[str, Any]) -> str:
    amounts = _amounts(job)
    return f"{_percent(job)}% {job['state'] if amounts != job['state'] else ''} {amounts}"


def _percent(job: dict[str, Any]) -> int:
    """How much is here; rounded, 99.9 would be 100."""
    return int(job["percentage"])


def _amounts(job: dict[str, Any]) -> str:
    if job["state"] in ("queued", "verifying"):
        return str(job["state"])
    if job["state"] != "running":
        return size(job["total_bytes"]) if job["total_bytes"] else ""
    total = size(job["total_bytes"]) if job["total_bytes"] else "?"
    parts = [f"{size(job['done_bytes'])}/{total}"]
    if job["bytes_per_s"]:
        parts.append(f"{size(job['bytes_per_s'])}/s")
    if job["eta_s"] is not None:
        parts.append(_duration(job["eta_s"]))
    return " ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def list_downloads(arguments: Namespace, client: Client) -> None:
    """Print downloads and unfinished files; change the bandwidth that all of them may use."""
    if arguments.limit is not None:
        client.call("PATCH", "/modeld/v1/downloads", {"bandwidth_limit": arguments.limit})
    answer = client.call("GET", "/modeld/v1/downloads")
    if arguments.json:
        print(as_json(answer))
        return
    rows = [
        (
            job["unique"],
            f"paused ({job['paused']})" if job["paused"] else job["state"],
            f"{_percent(job)} %",
            known(job["total_bytes"]),
            f"{size(job['bytes_per_s'])}/s" if job["bytes_per_s"] else "-",
            job["waiting"] or (job["error"] or {}).get("message") or job["note"] or "",
        )
        for job in answer["downloads"]
    ]
    print(table(("MODEL", "STATE", "DONE", "SIZE", "RATE", "NOTES"), rows))
    if answer["bandwidth_limit"]:
        print(f"all together may use {size(answer['bandwidth_limit'])}/s")
    left = [partial for partial in answer["partials"] if not partial["wanted"]]
    if left:
        total = size(sum(partial["bytes"] for partial in left))
        print(f"{len(left)} unfinished files of no download take {total}: `modeld gc` removes them")


def pause(arguments: Namespace, client: Client) -> None:
    """Have a download wait until it is resumed."""
    client.call("POST", f"{client.model_path(arguments.model)}/download/pause")


def resume(arguments: Namespace, client: Client) -> None:
    """Go on with a download that is paused."""
    client.call("POST", f"{client.model_path(arguments.model)}/download/resume")


def cancel(arguments: Namespace, client: Client) -> None:
    """End a download."""
    path = f"{client.model_path(arguments.model)}/download/cancel"
    client.call("POST", path, {"drop": arguments.drop})


def clean(arguments: Namespace, client: Client) -> None:
    """Remove unfinished files that no download goes on with."""
    partials = client.call("GET", "/modeld/v1/downloads")["partials"]
    left = [partial for partial in partials if not partial["wanted"]]
    rows = [(known(p["bytes"]), known(p["total_bytes"]), p["address"] or p["key"]) for p in left]
    if not left:
        print("there is nothing to remove")
        return
    print(table(("BYTES", "OF", "FILE"), rows))
    if not arguments.dry_run:
        keys = [partial["key"] for partial in left]
        freed = client.call("POST", "/modeld/v1/downloads/clean", {"keys": keys})["freed_bytes"]
        print(f"{size(freed)} are free again")
