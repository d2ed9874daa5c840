"""Models that some Pieces clients insist on: names that stand for the default chat model.

This surface lists them, and no other: their descriptions say what they are.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from aiohttp import web

from daemon.api.context import Services, asked_model, services
from daemon.api.pieces.answers import Model
from daemon.api.pieces.schema import model_view
from daemon.catalog.record import ModelRecord
from daemon.errors import InvalidRequest, ModelNotFound
from daemon.models import ModelState

_NAMESPACE = uuid.UUID("3f6f4b1e-6f27-4b5e-8d0c-7069656365ff")
_SAMPLE = "smollm2:135m-instruct-q4_1"  # which is there without a network
_CHAT = "CODE_CONVERSATION"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A name that clients look for, and the unique name that some go by."""

    name: str
    unique: str

    @property
    def id(self) -> str:
        """Its id, the same for ever and everywhere."""
        return str(uuid.uuid5(_NAMESPACE, self.unique))


# Which client needs which: pieces-os-client's PiecesClient the first, Neovim's and C#'s the second,
# pieces-cli the first and the third.
_ALIASES = (
    Alias(name="GPT-3.5-turbo Chat Model", unique="gpt-3.5-turbo"),
    Alias(name="GPT-4o Chat Model", unique="gpt-4o"),
    Alias(name="Gemini 2.0 Flash Lite Chat Model", unique="gemini-2.0-flash-lite-001"),
)


def default_model(parts: Services) -> ModelRecord | None:
    """Return the model that is meant where none is named.

    The settings' own; else a model that can answer in a conversation: one that is in memory, else
    of those that fit into it the one used most, the largest; else the sample model, which may not
    be downloaded.
    """
    if name := parts.config.models.default:
        return parts.catalog.find(name)
    chatting = [record for record in parts.catalog.all() if _can_chat(record)]

    def rank(record: ModelRecord) -> tuple[bool, bool, int, int]:
        loaded = parts.models.status(record.id).state is ModelState.READY
        fits = loaded or parts.models.could_ever(parts.models.ram_bytes(record), record.id)
        return loaded, fits, record.uses, record.size_bytes

    return max(chatting, key=rank, default=parts.catalog.find(_SAMPLE))


def _can_chat(record: ModelRecord) -> bool:
    if not record.downloaded or record.usage != _CHAT:
        return False
    has_template = record.artifact is not None and record.artifact.chat_template
    return bool(record.cloud or has_template or record.chat_template)


def views(parts: Services) -> list[Model]:
    """Return the aliases as clients see them."""
    target = default_model(parts) if parts.config.server.pieces_aliases else None
    return [] if target is None else [_view(parts, alias, target) for alias in _ALIASES]


def view(parts: Services, key: str) -> Model:
    """Return the model or the alias of this id as clients see it. Raises ModelNotFound."""
    alias = _find(parts, key)
    return model_view(parts, parts.catalog.get(key)) if alias is None else _view(parts, *alias)


def meant(request: web.Request, key: str) -> ModelRecord:
    """Return the model of this id, or what an alias stands for. See asked_model."""
    alias = _find(services(request), key)
    return asked_model(request, key if alias is None else alias[1].id)


def chosen(request: web.Request, key: str | None) -> ModelRecord:
    """Return the model of this id, or the default one if none is named. Raises ModelNotFound."""
    if key:
        return meant(request, key)
    record = default_model(services(request))
    if record is None:
        raise ModelNotFound("no model is named, and there is no default one ([models] default)")
    return record


def no_alias(request: web.Request, key: str) -> ModelRecord:
    """Return the model of this id. Raises InvalidRequest for an alias, which can't be changed."""
    if (found := _find(services(request), key)) is not None:
        alias, target = found
        raise InvalidRequest(
            f"{alias.name!r} is an alias of {target.unique}: change that one, or turn aliases off "
            "([server] pieces_aliases)"
        )
    return asked_model(request, key)


def _find(parts: Services, key: str) -> tuple[Alias, ModelRecord] | None:
    alias = next((alias for alias in _ALIASES if key == alias.id), None)
    if alias is None or not parts.config.server.pieces_aliases:
        return None
    target = default_model(parts)
    if target is None:
        raise ModelNotFound(
            f"{alias.name!r} stands for the default chat model, and there is none: [models] default"
            " names no model"
        )
    return alias, target


def _view(parts: Services, alias: Alias, target: ModelRecord) -> Model:
    shown = model_view(parts, target)
    words = f"An alias of {target.unique}, the default chat model of this computer"
    if not target.downloaded:
        words += f", which is not downloaded yet: `modeld pull {target.unique}`"
    return {
        **shown,
        "id": alias.id,
        "name": alias.name,
        "unique": alias.unique,
        "description": f"{words}. Some apps start only if there is a model of this name.",
        # Clients take models that are here or elsewhere, and some start only with this one: when
        # it is asked, its answer says what to do.
        "cloud": target.cloud or not target.downloaded,
        "custom": False,
    }
