"""What becomes of roles that a chat template does not know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.contract import ChatRequest
from backends.ctransformers.templates import ChatTemplate
from backends.roles import Refused, joined, rendered, variants

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
TEXTS = st.text(st.characters(categories=("L",)), min_size=1, max_size=8)


def said(*messages):
    return [{"role": role, "content": content} for role, content in messages]


def calling(content=""):
    return {"role": "assistant", "content": content, "tool_calls": [CALL]}


def test_what_one_role_says_in_a_row_is_one_message():
    messages = [*said(("user", "a"), ("user", ""), ("user", "b")), calling("c"), calling()]
    merged = {"role": "assistant", "content": "c", "tool_calls": [CALL, CALL]}
    assert joined(messages) == [*said(("user", "a\nb")), merged]
    results = said(("tool", "a"), ("tool", "b"))
    assert joined(results) == results


def test_calls_and_results_stay_while_a_template_may_know_them():
    messages = [
        *said(("system", "a"), ("user", "b")),
        calling(),
        *said(("tool", "c"), ("system", "d"), ("user", "e")),
    ]
    _, milder, *fewer = variants(messages)
    assert milder == [
        *said(("system", "a"), ("user", "b")),
        calling(),
        *said(("tool", "c"), ("user", "d\ne")),
    ]
    turns = [("assistant", '{"name": "f", "arguments": {}}'), ("user", "c\nd\ne")]
    assert fewer == [
        said(("system", "a"), ("user", "b"), *turns),
        said(("user", "a\nb"), *turns),
    ]


def test_images_stay_where_they_are():
    assistant = {**calling([IMAGE]), "role": "assistant"}
    *_, turns = variants([*said(("system", "a"), ("user", [IMAGE]), ("user", "b")), assistant])
    text = [{"type": "text", "text": each} for each in ("a", "b", '{"name": "f", "arguments": {}}')]
    assert turns == said(("user", [text[0], IMAGE, text[1]]), ("assistant", [IMAGE, text[2]]))


@given(st.lists(st.tuples(ROLES, TEXTS), min_size=1))
def test_all_that_was_said_is_said_in_turns_and_in_its_order(messages):
    *_, turns = variants(said(*messages))
    assert [turn["role"] for turn in turns] == [
        "assistant" if number % 2 else "user" for number in range(len(turns))
    ]
    words = "\n".join(turn["content"] for turn in turns).split()
    assert words == [content for _, content in messages]


def test_a_template_gets_the_conversation_as_it_is_if_it_takes_that():
    messages = said(("system", "a"), ("user", "b"), ("user", "c"))
    assert rendered(lambda told: str(told == messages), messages) == "True"


def test_a_template_may_put_a_message_of_its_own_before_the_others():
    template = ChatTemplate(
        "{%- set messages = [{'role': 'system', 'content': 'a'}] + messages %}"
        "{%- for message in messages %}{{ message.content }}{% endfor %}"
    )
    assert template.render(ChatRequest(messages=tuple(said(("user", "b"))))) == "ab"


def test_the_first_refusal_is_told():
    tried = []

    def refuse(messages):
        tried.append(messages)
        raise ValueError(f"no. {len(tried)}")

    messages = said(("system", "a"), ("user", "b"), ("tool", "c"))
    with pytest.raises(Refused, match="the chat template refused: no. 1$") as error:
        rendered(refuse, messages)
    assert error.value.code == "invalid_request"
    assert tried == list(variants(messages)) and len(tried) == 3


def test_what_is_in_turns_already_is_asked_once():
    messages = said(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert list(variants(messages)) == [messages]
