"""What the sequences of a KV cache hold, which one a prompt goes on from, what a batch reads.

Pure: knows no engine. Lengths and positions are tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Image:
    """An image among a prompt's tokens.

    `chunk` is the engine's handle. It takes `tokens` cells of the KV cache and moves the text after
    it by `positions`, which may be fewer.
    """

    chunk: Any
    tokens: int
    positions: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text, as lists of tokens, and images between them. It ends with text."""

    parts: tuple[list[int] | Image, ...]

    @property
    def tokens(self) -> int:
        """The cells of the KV cache that it takes."""
        return sum(part.tokens if isinstance(part, Image) else len(part) for part in self.parts)

    @property
    def reusable(self) -> list[int]:
        """The tokens that an earlier prompt may have left in a KV cache: all but the last.

        The last one is always read, since what comes after it is computed with it.
        """
        head = self.parts[0]
        if isinstance(head, Image):
            return []
        return head if len(self.parts) > 1 else head[:-1]


@dataclass(slots=True)
class Slot:
    """One sequence of the KV cache.

    `tokens` is the text that it begins with; after an image, what else it holds is not known.
    `unread` is what its request still has to put into it: parts of the prompt, later the token that
    was chosen last.
    """

    sequence: int
    tokens: list[int] = field(default_factory=list)
    unread: deque[list[int] | Image] = field(default_factory=deque)
    position: int = 0
    used: int = 0
    last_used: int = 0
    _known: bool = True

    def begin(self, prompt: Prompt, kept: int) -> None:
        """Go on with `prompt`, of whose text the first `kept` tokens are there."""
        del self.tokens[kept:]
        self.position = self.used = kept
        self._known = True
        head, *rest = prompt.parts
        if not isinstance(head, Image):
            head = head[kept:]
        self.unread = deque([part for part in (head, *rest) if part])

    def take(self, room: int) -> tuple[list[int], int]:
        """Return at most `room` unread tokens and the position of the first: they are read now."""
        part = self.unread[0]
        assert not isinstance(part, Image)
        taken, position = part[:room], self.position
        if len(taken) == len(part):
            self.unread.popleft()
        else:
            self.unread[0] = part[room:]
        if self._known:
            self.tokens += taken
        self.position += len(taken)
        self.used += len(taken)
        return taken, position

    def take_image(self) -> tuple[Image, int] | None:
        """Return the image that is to be read next and its position, if there is one."""
        if not self.unread or not isinstance(image := self.unread[0], Image):
            return None
        self.unread.popleft()
        position = self.position
        self._known = False
        self.position += image.positions
        self.used += image.tokens
        return image, position

    @property
    def saveable(self) -> bool:
        """Whether there is something in it, and nothing but known text."""
        return self._known and bool(self.tokens)

    def resume(self, tokens: list[int], last_used: int) -> None:
        """Hold `tokens`, which are in the KV cache already."""
        self.clear()
        self.tokens = tokens
        self.position = self.used = len(tokens)
        self.last_used = last_used

    def clear(self) -> None:
        """Hold nothing."""
        self.tokens = []
        self.unread.clear()
        self.position = self.used = 0
        self._known = True


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens of one slot in a batch, the first one's position, and whether the last is answered."""

    slot: Slot
    tokens: list[int]
    position: int
    answered: bool


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    shorter = min(len(held), len(wanted))
    if held[:shorter] == wanted[:shorter]:
        return shorter
    return next(at for at in range(shorter) if held[at] != wanted[at])


def choose(free: Iterable[Slot], prompt: Prompt) -> tuple[Slot, int]:
    """Return the slot that `prompt` is to use, and how many tokens of it are there already.

    That is the slot with the longest common prefix, if it holds little else or all of the prompt:
    another conversation with the same system prompt is not worth losing. Otherwise it is the slot
    that has not been used for the longest time.
    """
    wanted = prompt.reusable
    shared = [(common_prefix(slot.tokens, wanted), slot) for slot in free]
    most, best = max(shared, key=lambda pair: (pair[0], -pair[1].last_used))
    if most and (most == len(wanted) or 2 * most >= len(best.tokens)):
        return best, most
    length, oldest = min(shared, key=lambda pair: pair[1].last_used)
    return oldest, length


def fill(slots: Iterable[Slot], room: int) -> list[Share]:
    """Return what a batch of at most `room` tokens reads; what it takes is marked as read.

    Answers come first, with a token each, then prompts in the order of `slots`. A slot that has an
    image to read next is left out.
    """
    waiting = [slot for slot in slots if slot.unread and not isinstance(slot.unread[0], Image)]
    waiting.sort(key=_is_reading)
    shares = []
    for slot in waiting:
        if room <= 0:
            break
        tokens, position = slot.take(room)
        room -= len(tokens)
        shares.append(Share(slot=slot, tokens=tokens, position=position, answered=not slot.unread))
    return shares


def _is_reading(slot: Slot) -> bool:
    part = slot.unread[0]
    return len(slot.unread) > 1 or isinstance(part, Image) or len(part) > 1
