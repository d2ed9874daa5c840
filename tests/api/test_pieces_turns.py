"""Turns of the Pieces chat that meet: stopped while they wait, before they begin, on two sockets."""

from __future__ import annotations

import asyncio

from aiohttp import WSCloseCode, WSMsgType

from daemon.api.pieces.turns import Turns, shorter

WAIT_S = 20.0


def relevance(query: str, **fields) -> dict:
    return {"relevance": {"query": query, "options": {"question": True}}, **fields}


async def ends(socket, number: int) -> list[tuple[str, str]]:
    """The next `number` frames that end a turn: of which request, and how."""
    found: list[tuple[str, str]] = []
    async with asyncio.timeout(WAIT_S):
        while len(found) < number:
            frame = await socket.receive_json()
            if frame["status"] != "IN-PROGRESS":
                found.append((frame["request"], frame["status"]))
    return found


async def idle(services) -> None:
    async with asyncio.timeout(WAIT_S):
        while services.models.requests():
            await asyncio.sleep(0.02)


async def conversation(client) -> str:
    response = await client.post("/conversations/create", json={"type": "COPILOT"})
    return str((await response.json())["id"])


async def test_a_stop_ends_the_turn_that_runs_and_those_that_wait_for_it(
    client, add_model, services
):
    await add_model("tiny", tokenizer_chat_template="x")
    key = await conversation(client)
    async with client.ws_connect("/qgpt/stream") as socket:
        await socket.send_json(relevance("!slow 5000", conversation=key, request="runs"))
        assert (await socket.receive_json())["status"] == "IN-PROGRESS"
        await socket.send_json(relevance("waits", conversation=key, request="waits"))
        await socket.send_json({"conversation": key, "stop": True})
        assert sorted(await ends(socket, 2)) == [("runs", "STOPPED"), ("waits", "STOPPED")]
        await idle(services)
        await socket.send_json(relevance("go on", conversation=key, request="next"))
        assert await ends(socket, 1) == [("next", "COMPLETED")]


async def test_a_stop_that_comes_with_its_question_is_answered(client, add_model, services):
    await add_model("tiny", tokenizer_chat_template="x")
    key = await conversation(client)
    async with client.ws_connect("/qgpt/stream") as socket:
        for number in range(20):
            asked = relevance("!slow 5000", conversation=key, request=str(number))
            await asyncio.gather(
                socket.send_json(asked), socket.send_json({"conversation": key, "stop": True})
            )
            assert await ends(socket, 1) == [(str(number), "STOPPED")]
    await idle(services)


async def test_turns_of_a_conversation_on_two_sockets_come_one_after_the_other(
    client, add_model, services
):
    await add_model("tiny", tokenizer_chat_template="x")
    key = await conversation(client)
    async with client.ws_connect("/qgpt/stream") as one, client.ws_connect("/qgpt/stream") as two:
        await one.send_json(relevance("!slow 20", conversation=key, request="1"))
        assert (await one.receive_json())["status"] == "IN-PROGRESS"
        await two.send_json(relevance("second", conversation=key, request="2"))
        assert await ends(two, 1) == [("2", "COMPLETED")]
    roles = [each.role for each in services.chats.messages(key)]
    assert roles == ["user", "assistant"] * 2


async def test_a_reset_ends_all_turns_of_its_socket(client, add_model, services):
    await add_model("tiny", tokenizer_chat_template="x")
    async with client.ws_connect("/qgpt/stream") as socket:
        for number in range(2):
            await socket.send_json(relevance("!slow 5000", request=str(number)))
        await socket.send_json({"reset": True})
        assert sorted(await ends(socket, 2)) == [("0", "STOPPED"), ("1", "STOPPED")]
    await idle(services)


async def test_a_turn_of_a_conversation_that_was_deleted_while_it_waited_fails(client, add_model):
    await add_model("tiny", tokenizer_chat_template="x")
    key = await conversation(client)
    async with client.ws_connect("/qgpt/stream") as socket:
        await socket.send_json(relevance("!slow 200", conversation=key, request="runs"))
        assert (await socket.receive_json())["status"] == "IN-PROGRESS"
        await socket.send_json(relevance("waits", conversation=key, request="waits"))
        assert (await client.post(f"/conversations/{key}/delete")).status == 204
        assert await ends(socket, 2) == [("runs", "COMPLETED"), ("waits", "FAILED")]
    assert (await client.get(f"/conversation/{key}")).status == 410


async def test_a_question_that_failed_is_no_part_of_the_next_one(client, add_model, services):
    await add_model("tiny", tokenizer_chat_template="x")
    key = await conversation(client)
    async with client.ws_connect("/qgpt/stream") as socket:
        await socket.send_json(relevance("!error one", conversation=key, request="fails"))
        assert await ends(socket, 1) == [("fails", "FAILED")]
        assert services.chats.messages(key) == []
        await socket.send_json(relevance("hello", conversation=key, request="next"))
        assert await ends(socket, 1) == [("next", "COMPLETED")]
    kept = [(message.role, message.text) for message in services.chats.messages(key)]
    assert kept == [("user", "hello"), ("assistant", "hello")]


async def test_a_question_that_cannot_be_kept_is_answered(client, add_model, services):
    await add_model("tiny", tokenizer_chat_template="x")
    key = await conversation(client)
    services.chats._db.execute("PRAGMA query_only = ON")  # as a full disk: nothing can be written
    async with client.ws_connect("/qgpt/stream") as socket:
        await socket.send_json(relevance("one two", conversation=key))
        text = ""
        async with asyncio.timeout(WAIT_S):
            while (frame := await socket.receive_json())["status"] == "IN-PROGRESS":
                text += frame["question"]["answers"]["iterable"][0]["text"]
    assert (text, frame["status"]) == ("one two", "COMPLETED")
    services.chats._db.execute("PRAGMA query_only = OFF")
    assert services.chats.messages(key) == []


async def test_a_conversation_that_cannot_be_begun_is_an_error_that_says_why(
    client, add_model, services
):
    await add_model("tiny", tokenizer_chat_template="x")
    services.chats._db.execute("PRAGMA query_only = ON")
    async with client.ws_connect("/qgpt/stream") as socket:
        await socket.send_json(relevance("one", request="lost"))
        frame = await socket.receive_json()
        assert (frame["status"], frame["request"], frame["statusCode"]) == ("FAILED", "lost", 507)
        assert "see that its disk has room" in frame["errorMessage"]
        refused = await client.post("/conversations/create", json={"type": "COPILOT"})
        assert refused.status == 500 and "see that its disk has room" in await refused.text()
        services.chats._db.execute("PRAGMA query_only = OFF")
        await socket.send_json(relevance("one", request="again"))
        assert await ends(socket, 1) == [("again", "COMPLETED")]


async def test_a_question_to_no_model_leaves_no_conversation(client, add_model, services):
    await add_model("tiny", tokenizer_chat_template="x")
    async with client.ws_connect("/qgpt/stream") as socket:
        asked = relevance("one", request="lost")
        asked["relevance"]["model"] = "nobody"
        await socket.send_json(asked)
        frame = await socket.receive_json()
        assert (frame["status"], frame["request"]) == ("FAILED", "lost")
        assert "nobody" in frame["errorMessage"]
    assert services.chats.all() == []


async def test_questions_that_wait_have_a_bound(client, add_model, services):
    await add_model("tiny", tokenizer_chat_template="x")
    limit = services.config.models.queue_limit
    key = await conversation(client)
    url = "/qgpt/stream"
    async with client.ws_connect(url) as socket, client.ws_connect(url) as other:
        for number in range(limit):
            await socket.send_json(relevance("!slow 5000", conversation=key, request=str(number)))
        assert (await socket.receive_json())["status"] == "IN-PROGRESS"
        for late in (socket, other):
            await late.send_json(relevance("late", request="late"))
        async with asyncio.timeout(WAIT_S):
            while (frame := await socket.receive_json())["status"] == "IN-PROGRESS":
                pass
        for told in (frame, await other.receive_json()):
            assert (told["status"], told["request"], told["statusCode"]) == ("FAILED", "late", 429)
            assert "queue_limit" in told["errorMessage"]
        await socket.send_json({"conversation": key, "stop": True})
        found = await ends(socket, limit)
        assert sorted(found) == sorted((str(number), "STOPPED") for number in range(limit))
        await other.send_json(relevance("hello", request="next"))
        assert await ends(other, 1) == [("next", "COMPLETED")]


async def test_what_fails_here_closes_the_socket_and_says_so(client, monkeypatch, caplog):
    def broken(*_) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Turns, "_take", broken)
    async with client.ws_connect("/qgpt/stream") as socket:
        await socket.send_json(relevance("one"))
        message = await socket.receive(timeout=WAIT_S)
    assert (message.type, message.data) == (WSMsgType.CLOSE, WSCloseCode.INTERNAL_ERROR)
    assert message.extra == "modeld failed; its log says why"
    assert "the WebSocket /qgpt/stream failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_the_default_model_is_one_that_fits(client, add_model):
    await add_model("large", tokenizer_chat_template="x" * 99, test_slot_bytes=10**15)
    await add_model("small", tokenizer_chat_template="x")
    models = (await (await client.get("/models")).json())["iterable"]
    (alias,) = (model for model in models if model["name"] == "GPT-4o Chat Model")
    assert alias["description"].startswith("An alias of small,")


def test_a_long_conversation_is_shortened_at_once():
    history = [
        {"role": role, "content": f"{number}" * 100}
        for number in range(9)
        for role in ("user", "assistant")
    ] + [{"role": "user", "content": "last"}]
    by_one = shorter(history, None, 0)
    assert by_one == history[2:]
    assert shorter(history, 900, 1000) == history[2:]  # numbers that say nothing
    rest = shorter(history, 1800, 1000)
    assert rest == history[12:] and rest[0]["role"] == "user"
    assert shorter(history, 10**6, 1000) == history[-1:]
