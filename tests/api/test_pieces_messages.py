"""Conversations of the Pieces API and what was said in them: named, reworded, removed."""

from __future__ import annotations

import pytest


async def get(client, path: str) -> dict:
    response = await client.get(path)
    assert response.status == 200, await response.text()
    return await response.json()


async def post(client, path: str, body: dict | None = None) -> dict:
    response = await client.post(path, json=body)
    assert response.status == 200, await response.text()
    return await response.json()


@pytest.fixture
def chat(services):
    """A conversation of two turns that was never named."""
    chat = services.chats.create("New Conversation")
    for role, text in (("user", "one  two"), ("assistant", "three"), ("user", "x" * 100)):
        services.chats.say(chat.id, role, text, "m")
    return chat


async def test_ids_are_listed_in_their_order(client, services, chat):
    other = services.chats.create("other")
    listed = await get(client, "/conversations/identifiers")
    assert listed["iterable"] == [{"id": other.id}, {"id": chat.id}]
    assert listed["indices"] == {other.id: 0, chat.id: 1}


async def test_a_conversation_is_named_by_how_it_begins(client, services, chat):
    named = await post(client, f"/conversation/{chat.id}/rename")
    assert named["name"] == services.chats.get(chat.id).name == "one two"
    long = services.chats.create("New Conversation")
    assert (await post(client, f"/conversation/{long.id}/rename"))["name"] == "New Conversation"
    services.chats.say(long.id, "user", "y" * 100, "m")
    assert (await post(client, f"/conversation/{long.id}/rename"))["name"] == "y" * 59 + "…"
    refused = await client.post("/conversation/nobody/rename")
    assert refused.status == 500 and "not found" in await refused.text()


async def test_a_message_is_reworded_and_removed(client, services, chat):
    first, second, third = services.chats.messages(chat.id)
    async with client.ws_connect("/conversations/stream/identifiers") as changes:
        await changes.receive_json()
        shown = await get(client, f"/message/{second.id}")
        shown["fragment"]["string"]["raw"] = "four"
        assert await post(client, "/message/update/value", shown) == shown
        told = {"iterable": [{"conversation": {"id": chat.id}}]}
        assert await changes.receive_json() == told
        assert (await client.post(f"/messages/{first.id}/delete")).status == 204
        assert await changes.receive_json() == told
    assert [each.text for each in services.chats.messages(chat.id)] == ["four", third.text]
    left = (await get(client, f"/conversation/{chat.id}"))["messages"]
    assert left["indices"] == {second.id: 0, third.id: 1}
    assert (await client.get(f"/message/{first.id}")).status == 410
    for path, body in (
        (f"/messages/{first.id}/delete", None),
        ("/message/update/value", shown | {"id": "nobody"}),
        ("/message/update/value", {"id": second.id}),
    ):
        refused = await client.post(path, json=body)
        assert refused.status == 500 and refused.content_type == "text/plain"


async def test_all_conversations_are_listed_with_what_was_said_in_them(client, services, chat):
    empty = services.chats.create("empty")
    listed = await get(client, "/conversations")
    assert listed["indices"] == {empty.id: 0, chat.id: 1}
    alone = [await get(client, f"/conversation/{key}") for key in (empty.id, chat.id)]
    assert listed["iterable"] == alone
    said = [message.id for message in services.chats.messages(chat.id)]
    assert [each["id"] for each in alone[1]["messages"]["iterable"]] == said


async def test_a_question_may_name_what_was_said_before_it(client, add_model, services, chat):
    await add_model("tiny", tokenizer_chat_template="x")
    first, second, third = services.chats.messages(chat.id)
    services.chats.unsay(third)
    named = {"iterable": [{"id": second.id}, {"id": "nobody"}, {"id": first.id}]}
    asked = {"query": "!before", "relevant": {"iterable": []}, "messages": named}
    (answer,) = (await post(client, "/qgpt/question", asked))["answers"]["iterable"]
    assert answer["text"] == "user: one two; assistant: three; user: !before"
    async with client.ws_connect("/qgpt/stream") as socket:
        for turn, begins in (
            ({"question": asked}, "user: one two; assistant: three; user: !before"),
            ({"question": asked, "conversation": chat.id}, "user: one two; assistant: three; "),
        ):
            await socket.send_json(turn)
            text = ""
            while (frame := await socket.receive_json(timeout=20))["status"] == "IN-PROGRESS":
                text += frame["question"]["answers"]["iterable"][0]["text"]
            assert frame["status"] == "COMPLETED" and text.startswith(begins)
            assert text.count("three") == 1
