"""The commands about models in memory: who is there, what fits, loading and unloading."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from daemon.cli.client import Client
from daemon.cli.output import as_json, known, table
from daemon.sources import is_source
from daemon.units import size

_ELSEWHERE = ("hf:", "https://", "http://")


def ps(arguments: Namespace, client: Client) -> None:
    """Print the models in memory or that crashed there, their requests, and who has the RAM."""
    models = client.call("GET", "/modeld/v1/models")["models"]
    memory = client.call("GET", "/modeld/v1/memory")
    requests = client.call("GET", "/modeld/v1/requests")["requests"]
    active = [model for model in models if model["state"] != "unloaded"]
    if arguments.json:
        print(as_json({"models": active, "memory": memory, "requests": requests}))
        return
    rows = [
        (
            model["unique"],
            model["state"],
            model["backend"] or "-",
            str(model["worker_pid"] or "-"),
            str(model["in_flight"]),
            known(model["measured_bytes"]),
            size(model["reserved_bytes"]),
            f"{model['context_length']} x {model['slots']}",
            _until(model),
        )
        for model in active
    ]
    header = ("MODEL", "STATE", "BACKEND", "PID", "REQUESTS", "RAM", "RESERVED", "CONTEXT", "UNTIL")
    print(table(header, rows))
    for model in active:
        waits = f"waits for {model['waits_for']}" if model["waits_for"] else None
        for note in (waits, model["last_error"], model["reduced"]):
            if note:
                print(f"{model['unique']}: {note}")
    if requests:
        print()
        print(table(("REQUEST", "MODEL", "KIND", "STATE", "AGE"), [_request(r) for r in requests]))
    print(_memory(memory))


def _until(model: dict[str, Any]) -> str:
    """Say how long a model stays."""
    if model["state"] != "ready" or model["in_flight"]:
        return "-"
    if model["pinned"]:
        return "pinned"
    left = model["unloads_in_s"]
    return "room is needed" if left is None else f"{left:.0f} s idle"


def _request(request: dict[str, Any]) -> tuple[str, ...]:
    return (
        request["id"],
        request["model"],
        request["kind"],
        request["state"],
        f"{request['age_s']:.0f} s",
    )


def _memory(memory: dict[str, Any]) -> str:
    booked = f"{size(memory['reserved_bytes'])} reserved of {size(memory['budget_bytes'])}"
    parts = (
        f"{size(memory['models_bytes'])} models",
        f"{size(memory['daemon_bytes'])} modeld",
        f"{size(max(0, memory['others_bytes']))} other programs",
        f"{size(memory['spare_bytes'])} spare",
    )
    lines = [
        f"models: {booked}, {size(memory['available_bytes'])} more could be loaded now",
        f"RAM: {', '.join(parts)}, of {size(memory['ram_bytes'])}",
    ]
    if memory["critical"]:
        lines.append("memory is critical: new requests wait")
    return "\n".join(lines)


def load(arguments: Namespace, client: Client) -> None:
    """Load a model into memory."""
    wanted = {"context_length": arguments.context, "keep_alive": arguments.keep_alive}
    body = {name: value for name, value in wanted.items() if value is not None}
    model = client.call("POST", f"{client.model_path(arguments.model)}/load", body)
    print(
        f"{model['unique']} is loaded by {model['backend']}: {size(model['measured_bytes'])} of "
        f"RAM, context {model['context_length']}, {_slots(model['slots'])}"
    )
    if model["reduced"]:
        print(model["reduced"])


def unload(arguments: Namespace, client: Client) -> None:
    """Unload a model."""
    client.call("POST", f"{client.model_path(arguments.model)}/unload")


def pin(arguments: Namespace, client: Client) -> None:
    """Have a model never make room for another."""
    client.call("PATCH", client.model_path(arguments.model), {"pinned": True})


def unpin(arguments: Namespace, client: Client) -> None:
    """Have a model make room for others again."""
    client.call("PATCH", client.model_path(arguments.model), {"pinned": False})


def kill(arguments: Namespace, client: Client) -> None:
    """End a request."""
    client.call("DELETE", f"/modeld/v1/requests/{quote(arguments.request, safe='')}")


def estimate(arguments: Namespace, client: Client) -> None:
    """Print what a load would take, also of a model that is not downloaded, and whether it fits."""
    wanted = {"context_length": arguments.context, "slots": arguments.slots}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    source = _source(arguments.model)
    if source is not None:
        answer = client.call("POST", "/modeld/v1/estimate", wanted | {"source": source})
    else:
        query = "&".join(f"{name}={value}" for name, value in wanted.items())
        path = f"{client.model_path(arguments.model)}/estimate"
        answer = client.call("GET", f"{path}?{query}" if query else path)
    if arguments.json:
        print(as_json(answer))
        return
    if answer["download"]:
        here = source is not None and not source.startswith(_ELSEWHERE)
        print(f"{'files' if here else 'to download'}: {size(answer['download']['size_bytes'])}")
    print_estimate(answer)


def print_estimate(answer: dict[str, Any]) -> None:
    """Print what a load would take, and whether it fits, of an answer of the daemon's."""
    settings = f"context {answer['context_length']}, {_slots(answer['slots'])}"
    print(f"{answer['model']} by {answer['backend']}, {settings}")
    rows = [(name, size(part)) for name, part in answer["parts"].items() if part]
    rows.append(("together", size(answer["estimate_bytes"])))
    for gpu, parts in answer["gpu_parts"].items():
        rows.append((f"on {gpu}", size(sum(parts.values()))))
    print(table(("RAM", ""), rows))
    print(answer["placement"])
    if answer["measured"]:
        print("corrected by what an earlier load was seen to use")
    print(_verdict(answer))


def _source(text: str) -> str | None:
    """Return the source that is meant, also by the path of what is here; None for a name."""
    if is_source(text):
        return text
    path = Path(text).expanduser()
    if os.sep not in text or not path.exists():
        return None
    return f"{path.resolve()}/" if path.is_dir() else str(path.resolve())


def _slots(count: int) -> str:
    return f"{count} slot{'s' if count > 1 else ''}"


def _verdict(answer: dict[str, Any]) -> str:
    budget, free = size(answer["budget_bytes"]), size(answer["available_bytes"])
    fits = {
        "now": "it fits now",
        "after others made room": "it fits once other models made room",
        "not now": "it does not fit now: pinned models or other programs have the memory",
        "no": "it does not fit",
    }.get(answer["fits"])
    if fits is None:
        smaller = answer["smaller"]
        when = "now" if answer["fits"].startswith("now") else "once other models made room"
        fits = (
            f"it fits {when} with a context of {smaller['context_length']} tokens and "
            f"{_slots(smaller['slots'])} ({size(smaller['estimate_bytes'])})"
        )
    return f"{fits}: models may take {budget}, and {free} is free"
