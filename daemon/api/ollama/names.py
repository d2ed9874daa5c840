"""Models by the names that Ollama's clients give them: `name:tag`, where `latest` is no tag."""

from __future__ import annotations

import re

from aiohttp import web

from daemon.api.context import asked_model, services
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.errors import ModelNotDownloaded, ModelNotFound

_LATEST = ":latest"
_HUB = re.compile(r"(?:https?://)?(?:hf\.co|huggingface\.co)/([\w.-]+/[\w.-]+)(:[\w.-]+)?")


def shown(unique: str) -> str:
    """Return a unique name as Ollama shows names: they have a tag, always."""
    return unique if ":" in unique else unique + _LATEST


def source_of(name: str) -> str:
    """Return a name; that of a hub, such as hf.co/owner/repo:Q4_K_M, as a source. Pure."""
    if match := _HUB.fullmatch(name.removesuffix(_LATEST)):
        return f"hf:{match[1]}{match[2] or ''}"
    return name


def resolve(catalog: Catalog, name: str, *, exact: bool = False) -> ModelRecord:
    """Return the model of this name, with or without `:latest`.

    A name without a tag also means the one model of that name which is downloaded, whatever its
    tag, unless it is to be `exact`; and what was pulled by its source has that for a name too.
    Raises ModelNotFound.
    """
    found = catalog.find(name) or catalog.find(name.removesuffix(_LATEST))
    if found is not None:
        return found
    source = source_of(name)
    for each in catalog.all():
        if each.source and each.source.lower() == source.lower():
            return each
    bare = name.removesuffix(_LATEST).lower()
    tagged = [each for each in catalog.all() if each.unique.lower().partition(":")[0] == bare]
    here = [each for each in tagged if each.downloaded]
    if len(here) == 1 and not exact:
        return here[0]
    advice = "`modeld list` shows all models"
    if tagged:
        advice = "its tags are " + ", ".join(each.unique.partition(":")[2] for each in tagged)
    raise ModelNotFound(f"model {name!r} not found; {advice}")


def named(request: web.Request, name: str, *, exact: bool = False) -> ModelRecord:
    """Return the model that a request names. See resolve and asked_model. Raises ModelNotFound."""
    return asked_model(request, resolve(services(request).catalog, name, exact=exact).id)


def here(record: ModelRecord) -> ModelRecord:
    """Return the model. Raises ModelNotDownloaded: at that, Ollama's clients pull it."""
    if not record.downloaded:
        raise ModelNotDownloaded(
            f"model {record.unique!r} not found: it is not downloaded; pull it first"
        )
    return record
