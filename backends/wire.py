"""The channel's codec: one JSON object a line, UTF-8, at most 64 MiB a line.

Owns the messages between the daemon and its workers and probers, and how a line becomes one. No
I/O. A line that does not decode is a ProtocolError: the peer is broken and is not to be trusted
with the next line either.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from backends import contract

PROTOCOL = 1
MAX_LINE_BYTES = 64 * 1024 * 1024

M = TypeVar("M")


class ProtocolError(Exception):
    """A line that is no message: too long, not JSON, or of no known type."""


class Message(msgspec.Struct, tag_field="type", tag=str.lower):
    """Base of all messages; the JSON field `type` names the class in lower case."""


class Hello(Message):
    """First line of every child."""

    pid: int
    protocol: int = PROTOCOL


class Error(Message):
    """Something failed: a request if `id` is set, else the load or the child as a whole.

    `tokens` is how many a prompt has that is too long, if that is known.
    """

    code: str
    message: str
    id: int | None = None
    tokens: int | None = None


# daemon → worker


class Load(Message):
    """Load this model; answered by Progress… and Loaded or Error."""

    spec: contract.LoadSpec


class Chat(Message):
    """Start a generation; answered by Delta… and Done or Error with the same id."""

    id: int
    request: contract.ChatRequest


class Complete(Message):
    """Start a generation from bare text; answered like Chat."""

    id: int
    request: contract.CompleteRequest


class Embed(Message):
    """Turn texts into vectors; answered by Embedded or Error with the same id."""

    id: int
    request: contract.EmbedRequest


class Rerank(Message):
    """Score documents; answered by Reranked or Error with the same id."""

    id: int
    request: contract.RerankRequest


class Classify(Message):
    """Label texts; answered by Classified or Error with the same id."""

    id: int
    request: contract.ClassifyRequest


class Count(Message):
    """Count the tokens of a prompt; answered by Counted or Error with the same id."""

    id: int
    request: contract.CountRequest


class Cancel(Message):
    """End request `id` soon; it still gets its last answer."""

    id: int


class SaveState(Message):
    """Write the conversations into `folder`, at most `limit_bytes` of them, while nothing runs.

    Answered by StateSaved or Error with the same id.
    """

    id: int
    folder: str
    limit_bytes: int


class Ping(Message):
    """Are you there? Answered by Pong with the same id."""

    id: int


class Shutdown(Message):
    """Give everything back and exit."""


# worker → daemon


class Progress(Message):
    """How much of the load is done, from 0 to 1."""

    fraction: float


class Loaded(Message):
    """The model is ready for requests."""

    model: contract.LoadedModel


class Delta(Message):
    """The next piece of answer `id`."""

    id: int
    delta: contract.Delta


class Done(Message):
    """Request `id` has ended, and its slot is free."""

    id: int
    result: contract.Done


class Embedded(Message):
    """Request `id` has ended with these vectors (base64 of little-endian float32 in the JSON)."""

    id: int
    result: contract.Embeddings


class Reranked(Message):
    """Request `id` has ended with these scores."""

    id: int
    result: contract.Scores


class Classified(Message):
    """Request `id` has ended with these labels."""

    id: int
    result: contract.Classes


class Counted(Message):
    """Request `id` has ended with this number of tokens."""

    id: int
    result: contract.Count


class StateSaved(Message):
    """Answer to SaveState: these files are in its folder."""

    id: int
    conversations: tuple[contract.SavedConversation, ...]


class Pong(Message):
    """Answer to Ping."""

    id: int


# prober → daemon


class Probed(Message):
    """What the backend can do here."""

    probe: contract.Probe


class Detected(Message):
    """What this computer is, with all that its GPUs' libraries tell of them."""

    hardware: contract.Hardware


Ask = Chat | Complete | Embed | Rerank | Classify | Count
Result = Done | Embedded | Reranked | Classified | Counted
ToWorker = Load | Ask | Cancel | SaveState | Ping | Shutdown
FromWorker = Hello | Error | Progress | Loaded | Delta | Result | StateSaved | Pong
FromProber = Hello | Error | Probed | Detected


def encode(message: msgspec.Struct) -> bytes:
    """Return the line for `message`, newline included.

    Raises ProtocolError if it would be longer than MAX_LINE_BYTES, or has half a character in it.
    """
    try:
        line = msgspec.json.encode(message) + b"\n"
    except (UnicodeEncodeError, TypeError, OverflowError) as error:
        raise ProtocolError(f"message cannot be said in JSON: {error}") from error
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"message of {len(line)} bytes is over {MAX_LINE_BYTES}")
    return line


class Decoder(Generic[M]):
    """Turns lines into messages of the union type it was made for."""

    def __init__(self, union: type[M]) -> None:
        self._decoder = msgspec.json.Decoder(union)

    def decode(self, line: bytes) -> M:
        """Return the message in `line`. Raises ProtocolError."""
        try:
            return self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"{error}: {line[:200]!r}") from error
