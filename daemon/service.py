"""The daemon's lifetime: the one place that wires its parts together, starts and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import IO

from aiohttp import web

from backends import hardware
from backends.registry import Registry
from daemon import __version__, addresses
from daemon.api.app import build
from daemon.api.context import Services
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.catalog.seed import builtin
from daemon.chats import Chats
from daemon.config import Config
from daemon.downloads.jobs import Downloads
from daemon.downloads.peek import Peeker
from daemon.errors import ConfigError
from daemon.memory.ledger import Ledger, budget, watermark
from daemon.models import ModelManager
from daemon.models.choice import Choice
from daemon.models.conversations import Conversations
from daemon.models.loader import Loader
from daemon.models.residency import Residency
from daemon.models.watchdog import Watchdog
from daemon.store import Store
from daemon.upstreams import Upstreams
from daemon.workers.machine import Machine
from daemon.workers.prober import Probers

_SHUTDOWN_S = 5.0  # for answers that are being written; workers are ended after that
log = logging.getLogger(__name__)


def data_dir_default(environment: Mapping[str, str]) -> Path:
    """Return where models and the catalog are kept unless --data-dir says otherwise.

    systemd gives a service STATE_DIRECTORY.
    """
    if directory := environment.get("STATE_DIRECTORY"):
        return Path(directory)
    home = environment.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "modeld"


def lock(data_dir: Path) -> IO[str]:
    """Make this process the only daemon on `data_dir`, until it ends.

    Raises ConfigError if another one is there already or the directory can't be used.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (data_dir / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the data directory {data_dir}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        pid = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(
            f"another modeld (pid {pid}) uses the data directory {data_dir} already: use that one, "
            "stop it, or choose another directory with --data-dir"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def notify_systemd(state: str, environment: Mapping[str, str]) -> None:
    """Tell systemd about this service's state, if it asked to be told (sd_notify(3))."""
    address = environment.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, contextlib.suppress(OSError):
        notify.sendto(state.encode(), address)


async def _end_work(
    machine: Machine, probers: Probers, downloads: Downloads, models: ModelManager
) -> None:
    """End every child; whoever waits for one is told. May be called twice."""
    await machine.close()  # first, since a load may wait for it, or for a probe
    await probers.close()
    await downloads.close()
    await models.close()


@contextlib.asynccontextmanager
async def running_services(
    config: Config, data_dir: Path, registry: Registry
) -> AsyncIterator[Services]:
    """Give the daemon's parts, wired together; afterwards end all they started.

    Raises ConfigError.
    """
    catalog = Catalog(data_dir / "catalog.db")
    chats: Chats | None = None
    try:
        chats = Chats(data_dir / "chats.db")
        catalog.seed(builtin())
        store = Store(data_dir / "store")
        # What is being downloaded may be whole already, and only not recorded.
        pending = {kept.model_id for kept in catalog.downloads()}
        store.sweep(pending | {record.id for record in catalog.all() if record.downloaded})
        machine = Machine()
        memory, ram_bytes = config.memory, machine.known.ram_bytes
        ledger = Ledger(
            budget(memory.limit_bytes(), memory.reserve_bytes(), ram_bytes),
            hardware.available_bytes,
            watermark(memory.watermark_bytes(), ram_bytes),
            rule="[memory] limit" if memory.limit else "the RAM less [memory] reserve",
        )
        probers = Probers(registry, catalog, hardware.gpu_fingerprint)
        upstreams = Upstreams(config.remote, catalog)
        choice = Choice(
            settings=config.models,
            registry=registry,
            probers=probers,
            machine=machine,
            measurements=catalog,
        )
        conversations = Conversations(
            store.conversations,
            resume=config.models.resume,
            limit_bytes=config.models.resume_limit_bytes(),
        )
        loader = Loader(
            settings=config.models,
            registry=registry,
            probers=probers,
            choice=choice,
            measurements=catalog,
            ledger=ledger,
            store=store,
            conversations=conversations,
            upstreams=upstreams,
        )
        residency = Residency(
            models=config.models, memory=memory, catalog=catalog, ledger=ledger, loader=loader
        )
        models = ModelManager(
            settings=config.models,
            catalog=catalog,
            store=store,
            ledger=ledger,
            choice=choice,
            residency=residency,
        )
        watchdog = Watchdog(residency, ledger, hardware.stalled_us)
        downloads = Downloads(config.downloads, catalog, store, memory_bytes=ledger.budget_bytes)
        peeker = Peeker(config.downloads, memory_bytes=ledger.budget_bytes)

        async def no_longer_listed(record: ModelRecord) -> None:
            if models.status(record.id).in_flight:
                return  # it answers still; the next listing decides
            await models.unload(record.id)
            catalog.remove(record.id)
            models.forget(record.id)

        upstreams.begin(no_longer_listed)
        watchdog.begin()
        downloads.resume_all()
        try:
            yield Services(
                config=config,
                identity=catalog.identity(),
                catalog=catalog,
                store=store,
                downloads=downloads,
                models=models,
                ledger=ledger,
                registry=registry,
                probers=probers,
                machine=machine,
                peeker=peeker,
                conversations=conversations,
                chats=chats,
                stopping=asyncio.Event(),
            )
        finally:
            await upstreams.close()
            await watchdog.close()
            await peeker.close()
            await _end_work(machine, probers, downloads, models)
            conversations.close()
    finally:
        if chats is not None:
            chats.close()
        catalog.close()


async def serve(config: Config, data_dir: Path, environment: Mapping[str, str]) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError for what keeps the daemon from starting."""
    with lock(data_dir):
        sockets = addresses.bind(config.server.listen)
        async with running_services(config, data_dir, Registry.installed()) as services:
            runner = web.AppRunner(
                build(services),
                handle_signals=False,
                handler_cancellation=True,  # a client that leaves ends its work
                access_log=None,
                shutdown_timeout=_SHUTDOWN_S,
            )
            await runner.setup()
            try:
                for opened in sockets:
                    await web.SockSite(runner, opened).start()
                with _announced(sockets, environment):
                    await _until_told_to_stop()
                    notify_systemd("STOPPING=1", environment)
            finally:
                # Work ends before the connections do, so that every client hears how it ended.
                await _end_work(
                    services.machine, services.probers, services.downloads, services.models
                )
                services.stopping.set()
                await runner.cleanup()
    log.info("modeld stopped")


@contextlib.contextmanager
def _announced(sockets: list[socket.socket], environment: Mapping[str, str]) -> Iterator[None]:
    """Tell everyone where the daemon is, now that it can serve, and clean up after it."""
    where = [str(addresses.address_of(opened)) for opened in sockets]
    file = addresses.address_file(environment)
    text = "\n".join(where) + "\n"
    if file is not None:
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            log.warning("cannot write the address file %s: %s", file, error.strerror)
    log.info("modeld %s pid=%d listens on %s", __version__, os.getpid(), ", ".join(where))
    notify_systemd("READY=1", environment)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if file is not None and file.read_text(encoding="utf-8") == text:
                file.unlink()
        for address in map(addresses.address_of, sockets):
            if isinstance(address, addresses.UnixAddress):
                Path(address.path).unlink(missing_ok=True)


async def _until_told_to_stop() -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await told.wait()
    log.info("modeld is stopping")


def log_to_stderr(level: str) -> None:
    """Send the log to stderr, one plain line an entry."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
