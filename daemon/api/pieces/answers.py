"""What the model endpoints of the Pieces API answer, as its clients read it."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict


class Bytes(TypedDict):
    """A size."""

    value: int
    readable: str


class Created(TypedDict):
    """When: an ISO 8601 time in UTC."""

    value: str


class MaxTokens(TypedDict):
    """How many tokens a model takes."""

    total: int


class Model(TypedDict):
    """A model; what is not known of it is left out."""

    id: str
    version: str
    created: Created
    name: str
    unique: str
    cloud: bool
    cpu: bool
    custom: bool
    type: str
    usage: str
    downloaded: bool
    downloading: bool
    loaded: bool
    description: NotRequired[str]
    quantization: NotRequired[str]
    foundation: NotRequired[str]
    provider: NotRequired[str]
    bytes: NotRequired[Bytes]
    ram: NotRequired[Bytes]
    parameters: NotRequired[float]
    maxTokens: NotRequired[MaxTokens]


class Models(TypedDict):
    """All models."""

    iterable: list[Model]


class Reference(TypedDict):
    """What names a model."""

    id: str


class ModelReference(TypedDict):
    """The model whose files were removed."""

    model: Reference


class Frame(TypedDict):
    """How far a download is."""

    status: Literal["UNKNOWN", "INITIALIZED", "IN-PROGRESS", "COMPLETED", "FAILED", "CANCELED"]
    percentage: NotRequired[float]
