"""The commands that ask a running daemon. Each takes the parsed arguments and a client."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from daemon.cli.client import FAILED, INTERRUPTED, Client, CommandError
from daemon.cli.output import as_json, count, size, table
from daemon.sources import is_source

_POLL_S = 0.2
_ENDED = ("completed", "failed", "canceled")


def list_models(arguments: Namespace, client: Client) -> None:
    """Print every model of the catalog."""
    answer = client.call("GET", "/modeld/v1/models")
    if arguments.json:
        print(as_json(answer))
        return
    rows = [
        (
            model["unique"],
            "yes" if model["downloaded"] else "…" if model["downloading"] else "no",
            size(model["size_bytes"]),
            count(model["parameters"]),
            model["quantization"] or "-",
            model["state"],
        )
        for model in answer["models"]
    ]
    print(table(("MODEL", "DOWNLOADED", "SIZE", "PARAMS", "QUANT", "STATE"), rows))


def ps(arguments: Namespace, client: Client) -> None:
    """Print the models that are in memory, or that were and crashed, and what RAM is left."""
    models = client.call("GET", "/modeld/v1/models")["models"]
    memory = client.call("GET", "/modeld/v1/memory")
    active = [model for model in models if model["state"] != "unloaded"]
    if arguments.json:
        print(as_json({"models": active, "memory": memory}))
        return
    rows = [
        (
            model["unique"],
            model["state"],
            model["backend"] or "-",
            str(model["worker_pid"] or "-"),
            str(model["in_flight"]),
            size(model["measured_bytes"]),
            size(model["reserved_bytes"]),
            str(model["context_length"]),
        )
        for model in active
    ]
    header = ("MODEL", "STATE", "BACKEND", "PID", "REQUESTS", "RAM", "RESERVED", "CONTEXT")
    print(table(header, rows))
    for model in active:
        if model["last_error"]:
            print(f"{model['unique']}: {model['last_error']}")
    print(
        f"memory: {size(memory['reserved_bytes'])} reserved of {size(memory['budget_bytes'])}, "
        f"{size(memory['available_bytes'])} available to models"
    )


def show(arguments: Namespace, client: Client) -> None:
    """Print all that is known of one model."""
    model = client.call("GET", client.model_path(arguments.model))
    if arguments.json:
        print(as_json(model))
        return
    for key, value in model.items():
        if value in (None, "", []):
            continue
        text = size(value) if key.endswith("_bytes") else value
        print(f"{key:16} {', '.join(value) if isinstance(value, list) else text}")


def backends(arguments: Namespace, client: Client) -> None:
    """Print what each backend can do here, or why it can do nothing."""
    answer = client.call("GET", "/modeld/v1/backends")
    if arguments.json:
        print(as_json(answer))
        return
    rows = [
        (
            probe["backend"],
            "yes" if probe["available"] else "no",
            probe["version"] or "-",
            ", ".join(probe["devices"]) or "-",
            probe["reason"] or ", ".join(probe["features"]),
        )
        for probe in answer["backends"]
    ]
    print(table(("BACKEND", "AVAILABLE", "VERSION", "DEVICES", "NOTES"), rows))


def explain(arguments: Namespace, client: Client) -> None:
    """Print what each backend makes of a model, which one runs it, and why."""
    answer = client.call("GET", f"{client.model_path(arguments.model)}/explain")
    if arguments.json:
        print(as_json(answer))
        return
    rows = [
        (
            "→" if candidate["backend"] == answer["chosen"] else "",
            candidate["backend"],
            str(candidate["score"]),
            candidate["reason"],
        )
        for candidate in answer["candidates"]
    ]
    print(table(("", "BACKEND", "SCORE", "REASON"), rows))
    if answer["fixed"]:
        print(answer["fixed"])
    if not answer["chosen"]:
        print("no backend can run this model here")
    if answer["last_error"]:
        print(f"the last load failed: {answer['last_error']}")
    for reason in answer["passed_over"]:
        print(f"tried before the one that runs it: {reason}")


def pull(arguments: Namespace, client: Client) -> None:
    """Download a model, by name or by source, and show how far it is."""
    name = arguments.model
    if is_source(name):
        body = {"source": name} | ({"unique": arguments.name} if arguments.name else {})
        name = client.call("POST", "/modeld/v1/models", body)["unique"]
    _pull(name, client)
    print(f"{name} is downloaded")


def import_file(arguments: Namespace, client: Client) -> None:
    """Take a file or a folder that is on this machine already into the catalog."""
    path = Path(arguments.path).expanduser().resolve()
    if not path.is_file() and not path.is_dir():
        raise CommandError(f"there is no file {path}")
    body = {"source": f"{path}/" if path.is_dir() else str(path)} | (
        {"unique": arguments.name} if arguments.name else {}
    )
    known = {model["id"] for model in client.call("GET", "/modeld/v1/models")["models"]}
    model = client.call("POST", "/modeld/v1/models", body)
    try:
        _pull(model["unique"], client)
    except CommandError as error:
        # The record of a file that is no model is of no use to anyone.
        if error.status == FAILED and model["id"] not in known:
            client.call("DELETE", client.model_path(model["unique"]))
        raise
    print(f"{model['unique']} is downloaded")


def _pull(name: str, client: Client) -> None:
    """Download a model and show how far it is, on stderr: the answer of `run` goes to stdout."""
    job = client.call("POST", f"{client.model_path(name)}/download")
    with tqdm(total=job["total_bytes"] or None, unit="B", unit_scale=True, desc=name) as bar:
        try:
            while job["state"] not in _ENDED:
                time.sleep(_POLL_S)
                job = _job(name, client)
                bar.total = job["total_bytes"] or None
                bar.update(job["done_bytes"] - bar.n)
                if job["state"] in ("queued", "verifying"):
                    bar.set_postfix_str(job["state"])
        except KeyboardInterrupt:
            bar.close()
            raise CommandError(
                f"the download goes on without you; `modeld cancel {name}` ends it", INTERRUPTED
            ) from None
    if job["state"] == "canceled":
        raise CommandError(f"{name}: the download was canceled")
    if job["state"] == "failed":
        raise CommandError(f"{name}: {job['error']['message']}")


def _job(name: str, client: Client) -> dict[str, Any]:
    jobs = client.call("GET", "/modeld/v1/downloads")["downloads"]
    for job in jobs:
        if name.lower() in (job["unique"].lower(), job["model"]):
            return dict(job)
    raise CommandError(f"{name}: its download is gone; was modeld started again?")


def cancel(arguments: Namespace, client: Client) -> None:
    """End a download."""
    client.call("POST", f"{client.model_path(arguments.model)}/download/cancel")


def remove(arguments: Namespace, client: Client) -> None:
    """Remove a model: its files, and its record unless it is a built-in one."""
    client.call("DELETE", client.model_path(arguments.model))


def load(arguments: Namespace, client: Client) -> None:
    """Load a model into memory."""
    model = client.call("POST", f"{client.model_path(arguments.model)}/load")
    print(
        f"{model['unique']} is loaded by {model['backend']}: {size(model['measured_bytes'])} of "
        f"RAM, context {model['context_length']}, {model['slots']} slots"
    )


def unload(arguments: Namespace, client: Client) -> None:
    """Unload a model."""
    client.call("POST", f"{client.model_path(arguments.model)}/unload")


def run(arguments: Namespace, client: Client) -> None:
    """Ask a model and print its answer as it comes; without a prompt, have a conversation."""
    model = client.call("GET", client.model_path(arguments.model))
    if not model["downloaded"]:
        _pull(model["unique"], client)
    prompt = " ".join(arguments.prompt)
    if prompt or not sys.stdin.isatty():
        _ask(arguments, client, [{"role": "user", "content": prompt or sys.stdin.read()}])
        return
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input(">>> ")
        except EOFError:
            print()
            return
        if line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _ask(arguments, client, messages)})


def _ask(arguments: Namespace, client: Client, messages: list[dict[str, str]]) -> str:
    body: dict[str, Any] = {"model": arguments.model, "messages": messages, "stream": True}
    for option in ("max_tokens", "temperature", "seed"):
        if (value := getattr(arguments, option)) is not None:
            body[option] = value
    pieces = []
    for event in client.events("/v1/chat/completions", body):
        for choice in event["choices"]:
            text = choice["delta"].get("content") or ""
            pieces.append(text)
            print(text, end="", flush=True)
    print()
    return "".join(pieces)
