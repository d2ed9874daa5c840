"""What clients ask and what they are answered, as the Pieces API has it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from daemon.chats import Chats
from daemon.errors import InternalError, ModeldError


class Seeds(msgspec.Struct):
    """What a question is about: texts, in the wrappings that clients have for them."""

    iterable: list[Any] = []


class NamedMessage(msgspec.Struct):
    """Something that was said in a conversation, by its id."""

    id: str


class NamedMessages(msgspec.Struct):
    """What was said before a question, in any order."""

    iterable: Annotated[list[NamedMessage], msgspec.Meta(max_length=10_000)] = []


class Question(msgspec.Struct):
    """Body of POST /qgpt/question, and of a turn. What else clients send is of no interest here.

    `messages` come before the question, as far as they are there.
    """

    query: str
    messages: NamedMessages | None = None
    relevant: Seeds | None = None
    seeds: Seeds | None = None
    model: str | None = None


class Turn(msgspec.Struct):
    """What comes over the socket: a question in one of two forms, or the wish to stop."""

    conversation: str | None = None
    request: str | None = None
    stop: bool | None = None
    reset: bool | None = None
    question: Question | None = None
    relevance: Question | None = None


class Answer(TypedDict):
    """A piece of an answer, or all of it."""

    score: int
    text: str


class Answers(TypedDict):
    """The only answer."""

    iterable: list[Answer]


class Answered(TypedDict):
    """An answer to a question."""

    answers: Answers


class Frame(TypedDict):
    """What is sent over the socket: pieces of an answer, and then how it ended."""

    request: str
    conversation: str
    status: Literal["IN-PROGRESS", "COMPLETED", "STOPPED", "FAILED"]
    statusCode: int
    question: NotRequired[Answered]
    errorMessage: NotRequired[str]


def before(asked: Question, chats: Chats, chat_id: str = "") -> list[dict[str, Any]]:
    """Return what comes before a question: the messages that it names, and its conversation's."""
    named = [message.id for message in (asked.messages or NamedMessages()).iterable]
    said = [m for m in chats.named(named) if m.chat != chat_id] if named else []
    said += chats.messages(chat_id) if chat_id else []
    return [{"role": message.role, "content": message.text} for message in said]


def prompt(asked: Question) -> str:
    """Return a question with the texts that it is about before it. Pure."""
    seeds = [*(asked.relevant or Seeds()).iterable, *(asked.seeds or Seeds()).iterable]
    texts = [text for seed in seeds if (text := _text(seed))]
    return "\n\n".join([*(f"```\n{text}\n```" for text in texts), asked.query])


def _text(seed: Any) -> str:
    """Return the text in a seed, "" if it has none: it may be wrapped as a relevant one."""
    for path in (
        ("seed", "asset", "format", "fragment", "string", "raw"),
        ("asset", "format", "fragment", "string", "raw"),
    ):
        found = seed
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, str):
            return found.strip()
    return ""


def answered(text: str) -> Answered:
    """Return an answer, or a piece of one."""
    return {"answers": {"iterable": [{"score": 1, "text": text}]}}


def frame(
    key: str, chat_id: str, status: Literal["IN-PROGRESS", "COMPLETED", "STOPPED", "FAILED"]
) -> Frame:
    """Return what is sent of a turn, without what it says."""
    return {"request": key, "conversation": chat_id, "status": status, "statusCode": 200}


def failed(key: str, chat_id: str, error: ModeldError) -> Frame:
    """Return how a turn ended that failed."""
    shown = frame(key, chat_id, "FAILED")
    shown["statusCode"] = 500 if isinstance(error, InternalError) else error.status
    shown["errorMessage"] = error.message
    return shown
