"""Parses the command line and runs one command.

Exit status: 0 done, 1 the daemon refused or failed, 2 wrong usage or settings, 3 no daemon answers,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from daemon import __version__
from daemon.cli.client import INTERRUPTED, USAGE, Client, CommandError, find
from daemon.errors import ModeldError

Command = Callable[[argparse.Namespace, Client], None]


def _number(text: str) -> int:
    """Return a number of at least 1. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modeld", description="Manages and runs the machine-learning models of this computer."
    )
    parser.add_argument("--version", action="version", version=f"modeld {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    serve.add_argument("--data-dir", type=Path, help="where models and the catalog are kept")
    serve.add_argument(
        "--listen", action="append", metavar="ADDRESS", help="HOST:PORT or unix:/PATH; repeatable"
    )
    serve.add_argument("--config", type=Path, help="settings file (TOML)")

    for name, text in (
        ("list", "list all models"),
        ("ps", "list the models in memory"),
        ("backends", "show what each engine can do here"),
        ("doctor", "show what runs on this computer, and what would make it faster"),
    ):
        commands.add_parser(name, help=text).add_argument("--json", action="store_true")
    for name, text in (
        ("show", "show one model"),
        ("explain", "show which engine runs a model, and why"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("model")
        one.add_argument("--json", action="store_true")
    pull = commands.add_parser("pull", help="download a model")
    pull.add_argument("model", metavar="MODEL|SOURCE")
    pull.add_argument("--name", help="unique name for a SOURCE")
    pull.add_argument(
        "--dry-run", action="store_true", help="show what it would bring, and whether it will run"
    )
    pull.add_argument("--priority", choices=("high", "normal", "low"), help="place in the queue")
    pull.add_argument("--json", action="store_true", help="with --dry-run: for programs")
    downloads = commands.add_parser("downloads", help="list downloads and unfinished files")
    downloads.add_argument("--limit", metavar="SIZE", help="bandwidth a second: 5MB; 0: all")
    downloads.add_argument("--json", action="store_true")
    gc = commands.add_parser("gc", help="remove unfinished files that no download goes on with")
    gc.add_argument("--dry-run", action="store_true", help="only list them")
    cancel = commands.add_parser("cancel", help="end a download; what is here of it stays")
    cancel.add_argument("model")
    cancel.add_argument("--drop", action="store_true", help="remove what is here of it")
    take = commands.add_parser("import", help="take in a model that is on this machine")
    take.add_argument("path", metavar="FILE|FOLDER")
    take.add_argument("--name", help="unique name of the model")
    for name, text in (
        ("pause", "have a download wait"),
        ("resume", "go on with a download that is paused"),
        ("rm", "remove a model"),
        ("unload", "unload a model"),
        ("pin", "never unload a model to make room for another"),
        ("unpin", "let a model make room again"),
    ):
        commands.add_parser(name, help=text).add_argument("model")
    load = commands.add_parser("load", help="load a model into memory")
    load.add_argument("model")
    load.add_argument("--context", type=_number, help="tokens that one request may use, at least")
    load.add_argument("--keep-alive", metavar="TIME", help="how long it stays: 5m; -1: for ever")
    estimate = commands.add_parser("estimate", help="show what a load would take, and if it fits")
    estimate.add_argument("model", metavar="MODEL|SOURCE")
    estimate.add_argument("--context", type=_number, help="tokens that one request may use")
    estimate.add_argument("--slots", type=_number, help="requests at once")
    estimate.add_argument("--json", action="store_true")
    kill = commands.add_parser("kill", help="end a request (`modeld ps` lists them)")
    kill.add_argument("request")
    run = commands.add_parser("run", help="ask a model")
    run.add_argument("model")
    run.add_argument("prompt", nargs="*")
    run.add_argument("--max-tokens", type=int)
    run.add_argument("--temperature", type=float)
    run.add_argument("--seed", type=int)
    embed = commands.add_parser("embed", help="turn texts into vectors, one a line")
    embed.add_argument("model")
    embed.add_argument("text", nargs="*", help="a text; without any, each line of the input is one")
    embed.add_argument("--dimensions", type=_number, help="numbers of each vector to keep")
    return parser


def _commands() -> dict[str, Command]:
    from daemon.cli import commands, downloads, memory

    return {
        "list": commands.list_models,
        "ps": memory.ps,
        "show": commands.show,
        "explain": commands.explain,
        "backends": commands.backends,
        "pull": downloads.pull,
        "import": downloads.import_file,
        "downloads": downloads.list_downloads,
        "pause": downloads.pause,
        "resume": downloads.resume,
        "cancel": downloads.cancel,
        "gc": downloads.clean,
        "rm": commands.remove,
        "load": memory.load,
        "unload": memory.unload,
        "pin": memory.pin,
        "unpin": memory.unpin,
        "estimate": memory.estimate,
        "kill": memory.kill,
        "run": commands.run,
        "embed": commands.embed,
    }


def _serve(arguments: argparse.Namespace) -> None:
    # Only this command pays for importing the service.
    import asyncio

    from daemon import config, service

    flags: dict[str, dict[str, Any]] = {}
    if arguments.listen:
        flags["server"] = {"listen": arguments.listen}
    settings = config.load(arguments.config or config.default_file(), os.environ, flags)
    data_dir = arguments.data_dir or service.data_dir_default(os.environ)
    service.log_to_stderr(settings.server.log_level)
    asyncio.run(service.serve(settings, data_dir.resolve(), os.environ))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Exits with 2 and the usage if it is wrong."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse before Python 3.13 does not take `run MODEL --option 1 PROMPT`: it hands PROMPT back.
    words = {"run": "prompt", "embed": "text"}.get(parsed.command)
    if words and not any(word.startswith("-") for word in rest):
        getattr(parsed, words).extend(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parsed = _parse(arguments)
    try:
        if parsed.command == "serve":
            _serve(parsed)
        elif parsed.command == "doctor":
            from daemon.cli.doctor import doctor

            return doctor(parsed)
        else:
            _commands()[parsed.command](parsed, Client(find()))
    except CommandError as error:
        print(f"modeld: {error}", file=sys.stderr)
        return error.status
    except ModeldError as error:  # settings and start-up: the daemon's own come as CommandError
        print(f"modeld: {error.message}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    return 0
