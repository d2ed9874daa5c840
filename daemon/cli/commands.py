"""The commands that ask a running daemon. Each takes the parsed arguments and a client."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from daemon.cli.client import Client
from daemon.cli.downloads import bring
from daemon.cli.output import as_json, count, known, table

_TEXTS = 256  # of one request


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
            known(model["size_bytes"]),
            count(model["parameters"]),
            model["quantization"] or "-",
            model["state"],
        )
        for model in answer["models"]
    ]
    print(table(("MODEL", "DOWNLOADED", "SIZE", "PARAMS", "QUANT", "STATE"), rows))


def show(arguments: Namespace, client: Client) -> None:
    """Print all that is known of one model."""
    model = client.call("GET", client.model_path(arguments.model))
    if arguments.json:
        print(as_json(model))
        return
    for key, value in model.items():
        if value in (None, "", []):
            continue
        text = known(value) if key.endswith("_bytes") else value
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


def remove(arguments: Namespace, client: Client) -> None:
    """Remove a model: its files, and its record unless it is a built-in one."""
    client.call("DELETE", client.model_path(arguments.model))


def run(arguments: Namespace, client: Client) -> None:
    """Ask a model and print its answer as it comes; without a prompt, have a conversation."""
    _have(arguments.model, client)
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


def _have(model: str, client: Client) -> None:
    """Download a model that is not here."""
    shown = client.call("GET", client.model_path(model))
    if not shown["downloaded"]:
        bring(shown["unique"], client)


def embed(arguments: Namespace, client: Client) -> None:
    """Print the vector of each text, as a JSON array a line."""
    texts = arguments.text or [line for line in sys.stdin.read().splitlines() if line.strip()]
    _have(arguments.model, client)
    for start in range(0, len(texts), _TEXTS):
        body = {"model": arguments.model, "input": texts[start : start + _TEXTS]}
        if arguments.dimensions is not None:
            body["dimensions"] = arguments.dimensions
        for entry in client.call("POST", "/v1/embeddings", body)["data"]:
            print(json.dumps(entry["embedding"]))


def _ask(arguments: Namespace, client: Client, messages: list[dict[str, str]]) -> str:
    body: dict[str, Any] = {"model": arguments.model, "messages": messages, "stream": True}
    for option in ("max_tokens", "temperature", "seed"):
        if (value := getattr(arguments, option)) is not None:
            body[option] = value
    pieces = []
    notice = ""
    for event in client.events("/v1/chat/completions", body):
        notice = event.get("notice", notice)
        for choice in event["choices"]:
            text = choice["delta"].get("content") or ""
            pieces.append(text)
            print(text, end="", flush=True)
    print()
    if notice:
        print(f"modeld: {notice}", file=sys.stderr)
    return "".join(pieces)
