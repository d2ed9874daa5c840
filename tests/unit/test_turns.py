"""Conversations in turns: what becomes of the roles that a chat template does not know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.turns import Refused, alternating, rendered, variants

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
TEXTS = st.text(st.characters(categories=("L",)), min_size=1, max_size=8)


def said(*messages):
    return tuple({"role": role, "content": content} for role, content in messages)


def test_what_the_system_says_first_may_stay():
    messages = said(("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"))
    assert alternating(messages, system=True) == said(("system", "a\nb"), ("user", "c\nd"))
    assert alternating(messages) == said(("user", "a\nb\nc\nd"))


def test_images_stay_where_they_are():
    messages = said(("system", "a"), ("user", [IMAGE]), ("user", "b"))
    text = [{"type": "text", "text": each} for each in "ab"]
    assert alternating(messages) == said(("user", [text[0], IMAGE, text[1]]))


@given(st.lists(st.tuples(ROLES, TEXTS), min_size=1))
def test_all_that_was_said_is_said_in_turns_and_in_its_order(messages):
    turns = alternating(said(*messages))
    assert [turn["role"] for turn in turns] == [
        "assistant" if number % 2 else "user" for number in range(len(turns))
    ]
    words = "\n".join(turn["content"] for turn in turns).split()
    assert words == [content for _, content in messages]


def test_a_template_gets_the_conversation_as_it_is_if_it_takes_that():
    messages = said(("system", "a"), ("user", "b"), ("user", "c"))
    assert rendered(lambda told: str(told == messages), messages) == "True"


def test_the_first_refusal_is_told():
    tried = []

    def refuse(messages):
        tried.append(messages)
        raise ValueError(f"no. {len(tried)}")

    messages = said(("system", "a"), ("user", "b"), ("user", "c"))
    with pytest.raises(Refused, match="the chat template refused: no. 1$") as error:
        rendered(refuse, messages)
    assert error.value.code == "invalid_request"
    assert tried == list(variants(messages)) and len(tried) == 3


def test_what_is_in_turns_already_is_asked_once():
    assert list(variants(said(("user", "a"), ("assistant", "b"), ("user", "c")))) == [
        said(("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
