"""The chat of the Pieces API against real workers."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import WSServerHandshakeError
from running import SAMPLE

from daemon.config import Config, Models, Server

WAIT_S = 20.0


def relevance(query: str, **fields) -> dict:
    return {"relevance": {"query": query, "options": {"question": True}, **fields}}


async def turn(socket, message: dict) -> tuple[str, list[dict]]:
    """The text of an answer, and all frames."""
    await socket.send_json(message)
    frames = []
    async with asyncio.timeout(WAIT_S):
        while not frames or frames[-1]["status"] == "IN-PROGRESS":
            frames.append(await socket.receive_json())
    pieces = [frame["question"]["answers"]["iterable"][0]["text"] for frame in frames[:-1]]
    return "".join(pieces), frames


async def get(client, path: str) -> dict:
    response = await client.get(path)
    assert response.status == 200, await response.text()
    return await response.json()


async def test_an_app_connects_as_a_local_user(client, services):
    body = {"application": {"name": "OPEN_SOURCE", "platform": "LINUX", "version": "1.2.3"}}
    answer = await (await client.post("/connect", json=body)).json()
    application = answer["application"]
    assert application.items() >= {"name": "OPEN_SOURCE", "onboarded": True}.items()
    assert answer["os"] == answer["health"]["os"]["id"] == services.identity
    again = await (await client.post("/connect", json=body)).json()
    assert again["application"]["id"] == application["id"]
    strange = {"application": {"name": "MINE", "platform": "AMIGA", "version": "1", "x": 1}}
    other = (await (await client.post("/connect", json=strange)).json())["application"]
    assert (other["name"], other["platform"]) == ("UNKNOWN", "UNKNOWN")
    assert len((await get(client, "/applications"))["iterable"]) == 2
    user = (await get(client, "/user"))["user"]
    async with client.ws_connect("/user/stream") as socket:
        assert await socket.receive_json() == user
    refused = await client.post("/connect", json={})
    assert refused.status == 500 and "application" in await refused.text()


async def test_a_turn_is_streamed_and_kept(client, add_model):
    model_id = await add_model()
    async with (
        client.ws_connect("/conversations/stream/identifiers") as changes,
        client.ws_connect("/qgpt/stream") as socket,
    ):
        assert await changes.receive_json() == {"iterable": []}
        asked = relevance("one two three", model=model_id, application="x") | {"request": "r1"}
        text, frames = await turn(socket, asked)
        assert text == "one two three" and frames[-1]["status"] == "COMPLETED"
        assert {frame["request"] for frame in frames} == {"r1"}
        assert {frame["statusCode"] for frame in frames} == {200}
        (key,) = {frame["conversation"] for frame in frames}
        told = await changes.receive_json()
        assert told == {"iterable": [{"conversation": {"id": key}}]}
        shown = await get(client, f"/conversation/{key}")
        assert (shown["name"], shown["type"]) == ("one two three", "COPILOT")
        assert shown["model"] == {"id": model_id}
        said = (await get(client, f"/conversation/{key}/messages"))["iterable"]
        assert [(each["role"], each["fragment"]["string"]["raw"]) for each in said] == [
            ("USER", "one two three"),
            ("ASSISTANT", "one two three"),
        ]
        assert list(shown["messages"]["indices"]) == [each["id"] for each in said]
        assert await get(client, f"/message/{said[0]['id']}") == said[0]
        form = {"question": {"query": "four", "relevant": {"iterable": []}, "model": model_id}}
        text, frames = await turn(socket, form | {"conversation": key})
        assert text == "four" and frames[-1]["conversation"] == key
    assert [each["id"] for each in (await get(client, "/conversations"))["iterable"]] == [key]


async def test_earlier_turns_go_with_a_question(client, add_model, services):
    await add_model("tiny", tokenizer_chat_template="x")
    async with client.ws_connect("/qgpt/stream") as socket:
        _, frames = await turn(socket, relevance("one two"))
        key = frames[-1]["conversation"]
        await turn(socket, relevance("three") | {"conversation": key})
        text, _ = await turn(socket, relevance("!shape") | {"conversation": key})
        assert text
        messages = services.chats.messages(key)
    assert [each.role for each in messages] == ["user", "assistant"] * 3
    counted = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    usage = (await (await client.post("/v1/chat/completions", json=counted)).json())["usage"]
    assert usage["prompt_tokens"] == 1


async def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns(client, add_model):
    await add_model("tiny", tokenizer_chat_template="x")  # it has 2048 tokens
    long = " ".join(["word"] * 300)
    async with client.ws_connect("/qgpt/stream") as socket:
        _, frames = await turn(socket, relevance(long))
        key = frames[-1]["conversation"]
        for _ in range(3):  # all of it is 2400 words then
            await turn(socket, relevance(long) | {"conversation": key})
        text, frames = await turn(socket, relevance("!fill it") | {"conversation": key})
        assert frames[-1]["status"] == "COMPLETED" and len(text.split()) > 100
        _, frames = await turn(socket, relevance("!fill " + long * 10))
        assert (frames[-1]["status"], frames[-1]["statusCode"]) == ("FAILED", 400)
        assert "2048" in frames[-1]["errorMessage"]


async def test_a_stop_ends_the_turn_of_its_conversation_and_keeps_what_was_said(
    client, add_model, services
):
    await add_model("tiny", tokenizer_chat_template="x")
    async with client.ws_connect("/qgpt/stream") as socket:
        await socket.send_json(relevance("!slow 5000"))
        first = await socket.receive_json()
        key = first["conversation"]
        await socket.send_json({"conversation": "another", "stop": True})
        await socket.send_json({"conversation": key, "stop": True})
        async with asyncio.timeout(WAIT_S):
            while (frame := await socket.receive_json())["status"] == "IN-PROGRESS":
                pass
        assert (frame["status"], frame["conversation"]) == ("STOPPED", key)
        async with asyncio.timeout(WAIT_S):
            while services.models.requests():
                await asyncio.sleep(0.02)
        said = services.chats.messages(key)
        assert [each.role for each in said] == ["user", "assistant"] and said[1].text
        text, frames = await turn(socket, relevance("go on") | {"conversation": key})
        assert text == "go on" and frames[-1]["status"] == "COMPLETED"


async def test_turns_of_one_socket_run_at_once_and_end_with_it(client, add_model, services):
    await add_model("tiny", tokenizer_chat_template="x")
    async with client.ws_connect("/qgpt/stream") as socket:
        for number in range(2):
            await socket.send_json(relevance("!slow 5000") | {"request": str(number)})
        seen = set()
        async with asyncio.timeout(WAIT_S):
            while len(seen) < 2:
                seen.add((await socket.receive_json())["request"])
    async with asyncio.timeout(WAIT_S):
        while services.models.requests():
            await asyncio.sleep(0.02)
    assert all(len(services.chats.messages(chat.id)) == 2 for chat in services.chats.all())


async def test_two_questions_in_one_conversation_come_one_after_the_other(
    client, add_model, services
):
    await add_model("tiny", tokenizer_chat_template="x")
    async with client.ws_connect("/qgpt/stream") as socket:
        _, frames = await turn(socket, relevance("zero"))
        key = frames[-1]["conversation"]
        for words in ("!slow 20", "second"):
            await socket.send_json(relevance(words) | {"conversation": key, "request": words})
        ended = []
        async with asyncio.timeout(WAIT_S):
            while len(ended) < 2:
                frame = await socket.receive_json()
                if frame["status"] != "IN-PROGRESS":
                    ended.append((frame["request"], frame["status"]))
        assert ended == [("!slow 20", "COMPLETED"), ("second", "COMPLETED")]
    roles = [each.role for each in services.chats.messages(key)]
    assert roles == ["user", "assistant"] * 3


async def test_what_goes_wrong_is_a_frame(client, add_model):
    model_id = await add_model()
    async with client.ws_connect("/qgpt/stream") as socket:
        for message, status, words in (
            (relevance("!error", model=model_id), 400, "made to fail"),
            (relevance("x", model="nobody"), 404, "nobody"),
            (relevance("x") | {"conversation": "gone"}, 400, "conversation was not found"),
            ({"request": "r"}, 400, "neither"),
            ({"relevance": {"query": 5}}, 400, "query"),
            (relevance("!crash", model=model_id), 502, "tiny"),
        ):
            _, frames = await turn(socket, message)
            assert (frames[-1]["status"], frames[-1]["statusCode"]) == ("FAILED", status)
            assert words in frames[-1]["errorMessage"]
        await socket.send_str("{no json")
        assert (await socket.receive_json())["status"] == "FAILED"
        text, _ = await turn(socket, relevance("still there", model=model_id))
        assert text == "still there"
    plain = await client.get("/qgpt/stream")
    assert plain.status == 500 and "WebSocket" in await plain.text()
    for path in ("/conversation/nobody", "/conversation/nobody/messages", "/message/nobody"):
        assert (await client.get(path)).status == 410


async def test_a_question_alone_with_what_it_is_about(client, add_model, services):
    model_id = await add_model()
    fragment = {"fragment": {"string": {"raw": "def f(): pass"}}}
    seed = {"seed": {"type": "SEEDED_ASSET", "asset": {"format": fragment}}}
    body = {"query": "what is it", "relevant": {"iterable": [seed]}, "model": model_id}
    answer = await (await client.post("/qgpt/question", json=body)).json()
    text = answer["answers"]["iterable"][0]["text"]
    assert "def f(): pass" in text and text.endswith("what is it")
    assert services.chats.all() == []
    refused = await client.post("/qgpt/question", json={"relevant": {"iterable": []}})
    assert refused.status == 500 and "query" in await refused.text()


async def test_conversations_are_begun_renamed_and_deleted(client):
    begun = await (await client.post("/conversations/create", json={"type": "COPILOT"})).json()
    assert begun["name"] == "New Conversation" and begun["messages"]["iterable"] == []
    changed = begun | {"name": "mine"}
    renamed = await (await client.post("/conversation/update", json=changed)).json()
    assert renamed["name"] == "mine"
    async with client.ws_connect("/conversations/stream/identifiers") as changes:
        await changes.receive_json()
        assert (await client.post(f"/conversations/{begun['id']}/delete")).status == 204
        (gone,) = (await changes.receive_json())["iterable"]
        assert gone == {"conversation": {"id": begun["id"]}, "deleted": True}
    assert (await client.get(f"/conversation/{begun['id']}")).status == 410
    again = await client.post(f"/conversations/{begun['id']}/delete")
    assert again.status == 500 and "not found" in await again.text()


async def test_streams_of_what_modeld_has_nothing_of_say_so(client):
    for kind in ("assets", "anchors", "ranges"):
        async with client.ws_connect(f"/{kind}/stream/identifiers") as socket:
            assert await socket.receive_json() == {"iterable": []}
    with pytest.raises(WSServerHandshakeError):
        await client.ws_connect("/persons/stream/identifiers")


class TestAliases:
    @staticmethod
    async def aliases(client) -> dict[str, dict]:
        models = (await get(client, "/models"))["iterable"]
        return {m["name"]: m for m in models if "alias" in m.get("description", "").lower()}

    async def test_they_stand_for_the_default_chat_model(self, client, add_model, services):
        before = await self.aliases(client)
        assert set(before) == {
            "GPT-3.5-turbo Chat Model",
            "GPT-4o Chat Model",
            "Gemini 2.0 Flash Lite Chat Model",
        }
        alias = before["GPT-4o Chat Model"]
        assert alias["cloud"] and f"modeld pull {SAMPLE}" in alias["description"]
        async with client.ws_connect("/qgpt/stream") as socket:
            _, frames = await turn(socket, relevance("hi", model=alias["id"]))
            assert frames[-1]["status"] == "FAILED" and SAMPLE in frames[-1]["errorMessage"]
        target = await add_model("mine", tokenizer_chat_template="x")
        after = (await self.aliases(client))["GPT-4o Chat Model"]
        assert after["id"] == alias["id"] and after["downloaded"] and not after["cloud"]
        assert "mine" in after["description"]
        async with client.ws_connect("/qgpt/stream") as socket:
            text, _ = await turn(socket, relevance("hello there", model=alias["id"]))
            assert text == "hello there"
        path = f"/model/{alias['id']}"
        assert (await get(client, path))["loaded"] is True
        unloaded = await (await client.post(f"{path}/unload")).json()
        assert unloaded["loaded"] is False and unloaded["id"] == alias["id"]
        assert (await get(client, f"/model/{target}"))["loaded"] is False
        for refused in (
            client.post(f"/models/{alias['id']}/delete"),
            client.post(f"/models/{alias['id']}/delete/cache", json={}),
            client.post("/model/update", json=alias),
        ):
            response = await refused
            assert response.status == 500 and "an alias of mine" in await response.text()
        assert services.catalog.get("mine").downloaded

    async def test_no_other_surface_lists_them(self, client, add_model):
        await add_model("mine", tokenizer_chat_template="x")
        for path in ("/v1/models", "/api/tags", "/modeld/v1/models"):
            assert "GPT-3.5" not in await (await client.get(path)).text()


class TestSettings:
    @pytest.fixture
    def config(self) -> Config:
        return Config(server=Server(pieces_aliases=False), models=Models(default="second"))

    async def test_aliases_can_be_turned_off_and_the_default_fixed(self, client, add_model):
        for name in ("first", "second"):
            await add_model(name, tokenizer_chat_template="x")
        models = (await get(client, "/models"))["iterable"]
        assert not any("alias" in model.get("description", "").lower() for model in models)
        async with client.ws_connect("/qgpt/stream") as socket:
            await turn(socket, relevance("hi"))
        loaded = [
            model["unique"]
            for model in (await get(client, "/models"))["iterable"]
            if model["loaded"]
        ]
        assert loaded == ["second"]
