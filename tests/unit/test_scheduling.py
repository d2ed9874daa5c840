"""Bugs of schedulers that others had, and the rules of this one, on the real manager."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest
from scheduling import MIB, World, at_once, virtually

from daemon.config import Memory, Models
from daemon.errors import (
    Conflict,
    ContextLengthExceeded,
    InsufficientMemory,
    LoadTimeout,
    ModeldError,
    QueueFull,
    RequestTimeout,
    WorkerCrashed,
)
from daemon.models import Terms


@pytest.fixture
def play(tmp_path):
    """Run a scenario: `play(scenario, **world)` gives it a World and closes that afterwards."""

    def run(scenario, **settings):
        async def whole():
            world = World(tmp_path, **settings)
            try:
                return await scenario(world)
            finally:
                await world.close()

        return virtually(whole())

    return run


# A busy or loading model killed to make room (llama.cpp #21678, #20137, #25528)


def test_a_busy_model_is_not_killed_to_make_room(play):
    async def scenario(world):
        world.add("one", weights_bytes=800 * MIB)
        world.add("two", weights_bytes=800 * MIB)
        answer = world.asking("one", 30)
        await asyncio.sleep(5)
        other = world.asking("two")
        await asyncio.sleep(20)
        assert world.in_memory() == {"one"} and not other.done()
        assert await answer == "stop"
        assert await other == "stop"
        assert world.in_memory() == {"two"}

    play(scenario)


def test_a_loading_model_is_not_killed_to_make_room(play):
    async def scenario(world):
        world.add("one", weights_bytes=800 * MIB, load_s=20)
        world.add("two", weights_bytes=800 * MIB)
        first = world.asking("one")
        await asyncio.sleep(5)
        second = world.asking("two")
        await asyncio.sleep(5)
        assert world.state("one") == "loading" and world.in_memory() == {"one"}
        assert await first == "stop" and await second == "stop"
        assert [worker.name for worker in world.started] == ["one", "two"]

    play(scenario)


# A request starved for ever (#28443)


def test_a_request_is_not_starved_by_a_model_that_is_always_asked(play):
    async def scenario(world):
        world.add("popular", weights_bytes=800 * MIB)
        world.add("rare", weights_bytes=800 * MIB)
        stop = asyncio.Event()

        async def go_on():
            while not stop.is_set():
                await world.ask("popular", 1)

        clients = [asyncio.ensure_future(go_on()) for _ in range(3)]
        await asyncio.sleep(10)
        before = asyncio.get_running_loop().time()
        assert await world.ask("rare") == "stop"
        assert asyncio.get_running_loop().time() - before < 15
        stop.set()
        await asyncio.gather(*clients)  # and they get their answers too

    play(scenario)


@pytest.mark.parametrize(
    ("clients", "answer_s", "load_s", "slots"), [(8, 5, 1, 1), (3, 30, 1, 1), (3, 1, 31, 1)]
)
def test_a_request_comes_in_the_end_however_long_the_others_take(
    play, clients, answer_s, load_s, slots
):
    async def scenario(world):
        world.add("popular", weights_bytes=800 * MIB, load_s=load_s, slots=slots)
        world.add("rare", weights_bytes=800 * MIB)
        stop = asyncio.Event()

        async def go_on():
            while not stop.is_set():
                try:
                    await world.ask("popular", answer_s)
                except InsufficientMemory as error:
                    await asyncio.sleep(error.retry_after_s)

        asking = [asyncio.ensure_future(go_on()) for _ in range(clients)]
        await asyncio.sleep(2 * answer_s + load_s + 5)
        before = asyncio.get_running_loop().time()
        while True:
            try:
                assert await world.ask("rare") == "stop"
                break
            except InsufficientMemory as error:  # who comes again keeps the place in the line
                await asyncio.sleep(error.retry_after_s)
        assert asyncio.get_running_loop().time() - before < 150
        stop.set()
        await asyncio.gather(*asking)

    play(scenario)


def test_small_models_that_pass_do_not_take_what_a_large_one_waits_for(play):
    async def scenario(world):
        world.add("busy", weights_bytes=300 * MIB)
        world.add("large", weights_bytes=800 * MIB)
        for name in ("one", "two", "three"):
            world.add(name, weights_bytes=200 * MIB)
        busy = world.asking("busy", 20)
        await asyncio.sleep(2)
        large = world.asking("large")
        await asyncio.sleep(1)
        small = [world.asking(name, 100) for name in ("one", "two", "three")]
        before = asyncio.get_running_loop().time()
        assert await large == "stop"
        assert asyncio.get_running_loop().time() - before < 30
        results = await asyncio.gather(*small, busy, return_exceptions=True)
        assert results[-1] == "stop"

    play(scenario)


def test_a_background_request_does_not_make_others_models_come_and_go(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=800 * MIB)
        stop = asyncio.Event()

        async def go_on():
            while not stop.is_set():
                await world.ask("one", 1)

        clients = [asyncio.ensure_future(go_on()) for _ in range(3)]
        await asyncio.sleep(10)
        assert await world.ask("two", priority="background") == "stop"
        stop.set()
        await asyncio.gather(*clients)
        assert [worker.name for worker in world.started] == ["one", "two", "one"]

    play(scenario)


def test_a_background_request_comes_after_others_and_yet_comes(play):
    async def scenario(world):
        world.add("one")
        order = []

        async def ask(name, priority):
            await world.ask("one", 4, priority=priority)
            order.append(name)

        running = asyncio.ensure_future(ask("running", "interactive"))
        await asyncio.sleep(2)
        background = asyncio.ensure_future(ask("background", "background"))
        await asyncio.sleep(0.1)
        later = [asyncio.ensure_future(ask(f"{i}", "interactive")) for i in range(3)]
        await asyncio.gather(running, background, *later)
        assert order == ["running", "0", "1", "2", "background"]
        # however many others keep coming, it is not put off for ever
        order.clear()
        background = asyncio.ensure_future(ask("background", "background"))
        for number in range(40):
            later.append(asyncio.ensure_future(ask(f"{number}", "interactive")))
            await asyncio.sleep(2)
        assert "background" in order and len(order) < 40
        await asyncio.gather(background, *later)

    play(scenario)


# A model evicted between its load and the request that asked for it (#28698)


def test_a_model_is_not_evicted_before_the_request_that_it_was_loaded_for(play):
    async def scenario(world):
        for name in ("one", "two", "three"):
            world.add(name, weights_bytes=800 * MIB)
        asked = [world.asking(name, 1) for name in ("one", "two", "three") for _ in range(4)]
        assert await asyncio.gather(*asked) == ["stop"] * 12
        # each was loaded once, for all of its requests
        assert [worker.name for worker in world.started] == ["one", "two", "three"]

    play(scenario)


# A deadlock until restart (#28829)


def test_two_models_that_want_each_other_s_memory_both_get_it(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=800 * MIB, slots=2)
        for _ in range(20):
            answers = await asyncio.gather(
                *(world.ask(name, 0.5) for name in ("one", "two", "two", "one"))
            )
            assert answers == ["stop"] * 4

    play(scenario)


# Stuck loading (#27351)


def test_a_load_that_never_ends_is_given_up_and_said_so(play):
    async def scenario(world):
        world.add("one", load_s=1e6)
        with pytest.raises(LoadTimeout) as error:
            await world.ask("one")
        assert "not loaded within 600 s" in str(error.value)
        assert world.state("one") == "failed" and not world.alive
        world.plans["one"].load_s = 1
        assert await world.ask("one") == "stop"

    play(scenario)


# A model stuck "Stopping" (ollama #7779, #12179, #14364)


def test_an_unload_does_not_wait_for_ever_for_a_request_that_never_ends(play):
    async def scenario(world):
        world.add("one")
        answer = world.asking("one", 1e6)
        await asyncio.sleep(5)
        before = asyncio.get_running_loop().time()
        await world.unload("one")
        assert asyncio.get_running_loop().time() - before < 10
        assert world.state("one") == "unloaded" and not world.alive
        with pytest.raises(Conflict) as error:
            await answer
        assert "was unloaded while it answered" in str(error.value)

    play(scenario)


def test_a_request_during_an_unload_waits_and_has_the_model_loaded_again(play):
    async def scenario(world):
        world.add("one")
        answer = world.asking("one", 3)
        await asyncio.sleep(2)
        unload = asyncio.ensure_future(world.unload("one"))
        await asyncio.sleep(0.1)
        assert world.state("one") == "unloading"
        assert await world.ask("one") == "stop"
        assert await answer == "stop"
        await unload
        assert len(world.started) == 2

    play(scenario)


# An unload that looks like a crash, or a crash like an unload (llama.cpp #23257)


def test_an_unload_is_no_crash_and_a_crash_is_no_unload(play):
    async def scenario(world):
        world.add("one")
        await world.ask("one")
        await world.unload("one")
        status = world.status("one")
        assert (status.state, status.last_error) == ("unloaded", "")
        answer = world.asking("one", 30)
        await asyncio.sleep(5)
        world.worker("one").crash()
        with pytest.raises(WorkerCrashed):
            await answer
        await asyncio.sleep(1)
        status = world.status("one")
        assert status.state == "failed" and "crashed" in status.last_error
        assert world.ledger.reservations == {}
        assert await world.ask("one") == "stop"

    play(scenario)


def test_a_crash_during_an_unload_ends_in_unloaded(play):
    async def scenario(world):
        world.add("one")
        answer = world.asking("one", 30)
        await asyncio.sleep(5)
        unload = asyncio.ensure_future(world.unload("one"))
        await asyncio.sleep(0.1)
        world.worker("one").crash()
        await unload
        assert world.state("one") == "unloaded"
        with pytest.raises(WorkerCrashed):
            await answer

    play(scenario)


# Two copies of one model (LM Studio #634)


def test_many_requestsat_once_load_one_copy(play):
    async def scenario(world):
        world.add("one", slots=4)
        assert await asyncio.gather(*(world.ask("one", 1) for _ in range(20))) == ["stop"] * 20
        assert len(world.started) == 1 and world.started[0].most_running == 4

    play(scenario)


def test_a_crash_while_others_wait_leaves_one_copy(play):
    async def scenario(world):
        world.add("one")
        running = world.asking("one", 30)
        waiting = [world.asking("one", 1) for _ in range(3)]
        await asyncio.sleep(5)
        world.worker("one").crash()
        assert await asyncio.gather(*waiting) == ["stop"] * 3
        assert len(world.started) == 2 and len(world.alive) == 1
        with pytest.raises(WorkerCrashed):
            await running

    play(scenario)


# Per-model settings ignored on demand loads (#1463)


def test_a_load_on_demand_heeds_the_model_s_own_settings(play):
    async def scenario(world):
        record = world.add("one")
        world.catalog.update(
            record.id, keep_alive="2s", options={"cache_type_k": "q8_0"}, backend="next"
        )
        await world.ask("one")
        assert world.worker("one").spec.engine == {"cache_type_k": "q8_0"}
        assert world.status("one").backend == "next"
        await asyncio.sleep(1)
        assert world.state("one") == "ready"
        await asyncio.sleep(3)
        assert world.state("one") == "unloaded"

    play(scenario, backends=2)


# Everything evicted at once on a CPU-only machine (ollama, until #13242)


def test_only_as_much_is_evicted_as_is_needed(play):
    async def scenario(world):
        for name in ("one", "two", "three"):
            world.add(name, weights_bytes=300 * MIB)
            await world.ask(name)
            await asyncio.sleep(10)
        world.add("four", weights_bytes=200 * MIB)
        await world.ask("four")
        assert world.in_memory() == {"two", "three", "four"}

    play(scenario)


# keep-alive, pins, explicit loads


def test_an_idle_model_leaves_after_its_keep_alive(play):
    async def scenario(world):
        world.add("one")
        await world.ask("one")
        await asyncio.sleep(299)
        assert world.state("one") == "ready"
        await asyncio.sleep(2)
        assert world.state("one") == "unloaded" and not world.alive

    play(scenario)


def test_a_request_says_how_long_its_model_stays(play):
    async def scenario(world):
        world.add("one")
        await world.ask("one", keep_alive_s=0.0)
        await asyncio.sleep(1)
        assert world.state("one") == "unloaded"
        await world.ask("one", keep_alive_s=3.0)
        await asyncio.sleep(2)
        assert world.state("one") == "ready"
        await asyncio.sleep(2)
        assert world.state("one") == "unloaded"
        await world.ask("one", keep_alive_s=float("inf"))
        await asyncio.sleep(1e6)
        assert world.state("one") == "ready"

    play(scenario)


def test_what_one_request_says_does_not_outlast_the_unload(play):
    async def scenario(world):
        record = world.add("one")
        await world.ask("one", keep_alive_s=0.0)
        await asyncio.sleep(10)
        await world.ask("one")  # says nothing: 5 minutes
        await asyncio.sleep(10)
        assert world.state("one") == "ready"
        await world.ask("one", keep_alive_s=math.inf)
        await world.unload("one")
        world.catalog.update(record.id, keep_alive="2s")
        await world.ask("one")
        await asyncio.sleep(10)
        assert world.state("one") == "unloaded"

    play(scenario)


def test_what_is_changed_in_a_model_countsat_once(play):
    async def scenario(world):
        record = world.add("one")
        await world.ask("one", keep_alive_s=math.inf)
        world.manager.changed(world.catalog.update(record.id, keep_alive="20s"))
        await asyncio.sleep(10)
        assert world.state("one") == "ready"
        await asyncio.sleep(15)
        assert world.state("one") == "unloaded"

    play(scenario)


def test_a_load_that_says_how_long_replaces_one_that_did_not(play):
    async def scenario(world):
        world.add("one")
        await world.load("one")
        await world.load("one", keep_alive_s=5.0)
        assert world.state("one") == "ready"
        await asyncio.sleep(10)
        assert world.state("one") == "unloaded"
        # the time counts from when it was said
        await world.ask("one", keep_alive_s=math.inf)
        await asyncio.sleep(1000)
        await world.load("one", keep_alive_s=300.0)
        await asyncio.sleep(200)
        assert world.state("one") == "ready"

    play(scenario)


def test_a_crash_ends_an_explicit_load(play):
    async def scenario(world):
        world.add("one")
        await world.load("one")
        world.worker("one").crash()
        await asyncio.sleep(1)
        await world.ask("one")
        await asyncio.sleep(400)
        assert world.state("one") == "unloaded"

    play(scenario)


def test_an_old_record_does_not_unpin(play):
    async def scenario(world):
        world.add("one", weights_bytes=600 * MIB)
        old = world.catalog.get("one")  # a handler that waits for the rest of a body has it
        await world.ask("one")
        world.pin("one")
        await world.manager.load(old, Terms(keep_alive_s=1.0))
        await asyncio.sleep(30)
        assert world.state("one") == "ready"

    play(scenario)


def test_a_load_of_a_busy_model_returnsat_once(play):
    async def scenario(world):
        world.add("one")
        answers = [world.asking("one", 50) for _ in range(2)]
        await asyncio.sleep(5)
        before = asyncio.get_running_loop().time()
        await world.load("one")
        assert asyncio.get_running_loop().time() - before < 1
        assert await asyncio.gather(*answers) == ["stop", "stop"]

    play(scenario)


def test_an_idle_model_is_unloadedat_once(play):
    async def scenario(world):
        world.add("one")
        await world.load("one")
        before = asyncio.get_running_loop().time()
        await world.unload("one")
        assert asyncio.get_running_loop().time() - before < 1

    play(scenario)


def test_a_keep_alive_of_nothing_waits_for_the_requests_that_are_there(play):
    async def scenario(world):
        world.add("one")
        first = world.asking("one", 5, keep_alive_s=0.0)
        second = world.asking("one", 5)
        assert await asyncio.gather(first, second) == ["stop", "stop"]
        assert len(world.started) == 1

    play(scenario)


def test_an_explicit_load_stays_until_it_is_unloaded_or_has_to_make_room(play):
    async def scenario(world):
        world.add("one", weights_bytes=600 * MIB)
        world.add("two", weights_bytes=600 * MIB)
        await world.load("one")
        await world.ask("one", keep_alive_s=5.0)
        await asyncio.sleep(1e5)
        assert world.state("one") == "ready"
        await world.ask("two")
        assert world.in_memory() == {"two"}
        await world.load("one", keep_alive_s=5.0)
        await asyncio.sleep(10)
        assert world.state("one") == "unloaded"

    play(scenario)


def test_a_pinned_model_never_leaves_by_itself(play):
    async def scenario(world):
        world.add("one", weights_bytes=600 * MIB)
        world.add("two", weights_bytes=600 * MIB)
        world.pin("one")
        await world.ask("one")
        await asyncio.sleep(1e5)
        with pytest.raises(InsufficientMemory) as error:
            await world.ask("two")
        assert "one has 600 MiB (pinned): unpin one (`modeld unpin one`)" in str(error.value)
        assert error.value.retry_after_s
        assert world.in_memory() == {"one"}
        await world.unload("one")
        assert await world.ask("two") == "stop"

    play(scenario)


def test_the_cheapest_to_lose_leaves_first(play):
    async def scenario(world):
        world.add("slow", weights_bytes=300 * MIB, load_s=60)
        world.add("quick", weights_bytes=300 * MIB, load_s=1)
        world.add("other", weights_bytes=600 * MIB)
        await world.ask("slow")
        await asyncio.sleep(20)
        await world.ask("quick")
        await asyncio.sleep(20)
        await world.ask("other")
        # the slow one was asked the longest ago, and yet it is the dearer one
        assert world.in_memory() == {"slow", "other"}

    play(scenario)


# less than the best


def test_a_model_gets_fewer_slots_and_then_a_shorter_context_for_want_of_memory(play):
    async def scenario(world):
        world.add("one", weights_bytes=100 * MIB, token_bytes=50_000, slots=4)  # 881 MiB
        await world.ask("one")
        status = world.status("one")
        assert (status.slots, status.context_length) == (2, 4096)
        assert status.reduced == "for want of memory it has room for 2 at once instead of 4"
        world.add("two", weights_bytes=100 * MIB, token_bytes=200_000, slots=1)
        await world.unload("one")
        await world.ask("two")
        status = world.status("two")
        assert (status.slots, status.context_length) == (1, 2048)
        assert "a context of 2048 tokens instead of 4096" in status.reduced

    play(scenario, budget_bytes=600 * MIB)


def test_what_the_settings_fix_is_not_made_smaller(play):
    async def scenario(world):
        world.add("one", weights_bytes=100 * MIB, token_bytes=200_000, slots=1)
        with pytest.raises(InsufficientMemory) as error:
            await world.ask("one")
        assert error.value.should_retry is False
        assert str(error.value) == (
            "one needs 881 MiB, but all models together may take 600 MiB ([memory] limit): use a "
            "smaller model or quantization, or a context_length of less than 4096"
        )

    play(scenario, budget_bytes=600 * MIB, models=Models(context_length=4096))


def test_a_model_that_can_never_fit_is_refusedat_once(play):
    async def scenario(world):
        world.add("one", weights_bytes=900 * MIB)
        world.add("giant", weights_bytes=5000 * MIB)
        await world.ask("one")
        before = asyncio.get_running_loop().time()
        with pytest.raises(InsufficientMemory) as error:
            await world.ask("giant")
        assert error.value.should_retry is False
        assert asyncio.get_running_loop().time() - before < 1
        assert world.in_memory() == {"one"}, "nothing is evicted for what can't be"

    play(scenario)


def test_who_waits_too_long_for_memory_is_told_when_to_come_again(play):
    async def scenario(world):
        world.add("one", weights_bytes=800 * MIB)
        world.add("two", weights_bytes=800 * MIB)
        answer = world.asking("one", 500)
        await asyncio.sleep(5)
        before = asyncio.get_running_loop().time()
        with pytest.raises(InsufficientMemory) as error:
            await world.ask("two")
        assert 59 < asyncio.get_running_loop().time() - before < 62
        assert error.value.retry_after_s
        assert str(error.value) == (
            "two needs 800 MiB, but only 200 MiB is left of the 1000 MiB for models ([memory] "
            "limit) after 60 s of waiting; one has 800 MiB (busy): unload a model"
        )
        assert await answer == "stop"

    play(scenario)


def test_without_a_wait_idle_models_still_make_room(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=800 * MIB)
        await world.ask("one")
        assert await world.ask("two") == "stop"
        busy = world.asking("two", 20)
        await asyncio.sleep(1)
        with pytest.raises(InsufficientMemory):
            await world.ask("one")
        assert await busy == "stop"

    play(scenario, memory=Memory(wait_s=0))


def test_one_wait_for_memory_covers_all_engines(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=800 * MIB)
        busy = world.asking("one", 500)
        await asyncio.sleep(5)
        before = asyncio.get_running_loop().time()
        with pytest.raises(InsufficientMemory) as error:
            await world.ask("two")
        assert 59 < asyncio.get_running_loop().time() - before < 62
        assert error.value.retry_after_s and "after 60 s of waiting" in str(error.value)
        assert await busy == "stop"

    play(scenario, backends=2)


def test_who_leaves_the_line_and_comes_againat_once_is_served(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=800 * MIB)
        busy = world.asking("one", 20)
        await asyncio.sleep(2)
        gone = world.asking("two")
        await asyncio.sleep(1)
        gone.cancel()
        again = world.asking("two")
        assert await again == "stop" and await busy == "stop"

    play(scenario)


def test_a_killed_request_leaves_the_line(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=800 * MIB)
        busy = world.asking("one", 20)
        await asyncio.sleep(2)
        waiting = world.asking("two")
        await asyncio.sleep(1)
        (request,) = (r for r in world.manager.requests() if r.model == "two")
        world.manager.kill(request.id)
        assert await busy == "stop"
        await asyncio.sleep(10)
        assert world.in_memory() == {"one"} and [w.name for w in world.started] == ["one"]
        with pytest.raises(Conflict):
            await waiting

    play(scenario)


def test_a_load_that_was_given_up_while_engines_are_asked_evicts_nobody(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=800 * MIB)
        await world.ask("one")
        world.probing_s = 1.0
        waiting = world.asking("two")
        await asyncio.sleep(0.5)
        before = asyncio.get_running_loop().time()
        await world.unload("two")
        assert asyncio.get_running_loop().time() - before < 5
        assert world.in_memory() == {"one"}
        with pytest.raises(Conflict):
            await waiting

    play(scenario)


def test_memory_that_others_free_is_seen_while_a_load_waits(play):
    async def scenario(world):
        world.add("busy", weights_bytes=300 * MIB)
        world.add("two", weights_bytes=400 * MIB)
        world.watchdog.begin()
        busy = world.asking("busy", 500)
        await asyncio.sleep(3)
        world.others_bytes = 500 * MIB
        before = asyncio.get_running_loop().time()
        waiting = world.asking("two")
        await asyncio.sleep(15)
        world.others_bytes = 0
        assert await waiting == "stop"
        assert asyncio.get_running_loop().time() - before < 20
        await world.unload("busy")
        with pytest.raises(Conflict):
            await busy

    play(scenario, ram_bytes=1000 * MIB)


def test_the_memory_of_a_load_that_goes_on_is_not_counted_twice(play):
    async def scenario(world):
        world.add("big", weights_bytes=400 * MIB, load_s=20)
        world.add("idle", weights_bytes=200 * MIB)
        world.add("small", weights_bytes=150 * MIB)
        world.watchdog.begin()
        await world.ask("idle")
        big = world.asking("big")
        await asyncio.sleep(10)
        world.worker("big").private_bytes = 390 * MIB  # it has them by now
        await asyncio.sleep(1)
        await world.ask("small")
        assert world.in_memory() == {"big", "idle", "small"}
        assert await big == "stop"

    play(scenario, ram_bytes=1000 * MIB)


def test_one_long_answer_does_not_keep_others_from_their_turns(play):
    async def scenario(world):
        world.add("one", weights_bytes=800 * MIB, slots=2)
        world.add("two", weights_bytes=800 * MIB)
        long = world.asking("one", 500)
        await asyncio.sleep(5)
        waiting = world.asking("two")
        await asyncio.sleep(3)  # from now on `one` takes nothing new, so as to make room
        before = asyncio.get_running_loop().time()
        assert await world.ask("one") == "stop"
        assert 15 < asyncio.get_running_loop().time() - before < 25
        assert await world.ask("one") == "stop"
        with pytest.raises(InsufficientMemory):
            await waiting
        assert await long == "stop"

    play(scenario)


def test_a_small_model_passes_one_that_waits_for_more(play):
    async def scenario(world):
        world.add("busy", weights_bytes=500 * MIB)
        world.add("large", weights_bytes=600 * MIB)
        world.add("small", weights_bytes=100 * MIB)
        busy = world.asking("busy", 30)
        await asyncio.sleep(2)
        large = world.asking("large")
        await asyncio.sleep(2)
        before = asyncio.get_running_loop().time()
        assert await world.ask("small") == "stop"
        assert asyncio.get_running_loop().time() - before < 3
        assert await large == "stop"
        assert await busy == "stop"

    play(scenario)


def test_memory_that_other_programs_use_is_not_there(play):
    async def scenario(world):
        world.add("one", weights_bytes=500 * MIB)
        world.others_bytes = 700 * MIB
        with pytest.raises(InsufficientMemory) as error:
            await world.ask("one")
        assert error.value.retry_after_s
        assert str(error.value) == (
            "one needs 500 MiB, but only 300 MiB of RAM is free; no model is loaded: close other "
            "programs"
        )
        world.others_bytes = 100 * MIB
        assert await world.ask("one") == "stop"

    play(scenario, ram_bytes=1000 * MIB)


def test_one_file_that_two_models_map_is_counted_once_and_handed_on(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=700 * MIB, file="shared", token_bytes=10_000)
        await world.ask("one")
        alone = world.ledger.reserved_bytes
        await world.ask("two")
        assert world.in_memory() == {"one", "two"}
        both = world.ledger.reserved_bytes
        assert both - alone == alone - 700 * MIB
        await world.unload("one")
        assert world.ledger.reserved_bytes == alone

    play(scenario)


# longer contexts


def test_a_request_that_needs_a_longer_context_gets_it_by_a_reload(play):
    async def scenario(world):
        world.add("one", token_bytes=20_000, longest_context=16_384)
        await world.ask("one")
        assert await world.ask("one", "tokens 5000") == "stop"
        status = world.status("one")
        assert status.context_length == 8192 and len(world.started) == 2
        # and keeps it for the rest of the conversation, also when it has left in the meantime
        await asyncio.sleep(400)
        assert world.state("one") == "unloaded"
        assert await world.ask("one", "tokens 7000") == "stop"
        assert len(world.started) == 3

    play(scenario)


def test_others_finish_before_a_model_is_loaded_anew_for_a_longer_context(play):
    async def scenario(world):
        world.add("one", token_bytes=5_000, longest_context=16_384, slots=2)
        running = world.asking("one", 20)
        await asyncio.sleep(2)
        longer = world.asking("one", "tokens 5000")
        await asyncio.sleep(1)
        later = world.asking("one", 1)
        assert await asyncio.gather(running, longer, later) == ["stop"] * 3
        assert len(world.started) == 2

    play(scenario)


def test_a_longer_context_that_does_not_fit_is_refused_with_both_numbers(play):
    async def scenario(world):
        world.add("one", token_bytes=200_000, longest_context=16_384)
        await world.ask("one")
        with pytest.raises(ContextLengthExceeded) as error:
            await world.ask("one", "tokens 5000")
        assert "5000" in str(error.value) and "4096" in str(error.value)
        assert "the model has 16384, but 5120 of them take 1.1 GiB" in str(error.value)
        assert "all models together may take 1000 MiB" in str(error.value)
        assert len(world.started) == 1, "what is there stays there"

    play(scenario)


def test_a_prompt_beyond_the_model_s_own_context_is_refused(play):
    async def scenario(world):
        world.add("one", longest_context=8192)
        with pytest.raises(ContextLengthExceeded) as error:
            await world.ask("one", "tokens 9000")
        assert "9000" in str(error.value) and "8192" in str(error.value)
        assert len(world.started) == 1

    play(scenario)


def test_a_longer_context_is_as_long_as_there_is_memory_for(play):
    async def scenario(world):
        world.add("one", token_bytes=100_000, longest_context=16_384)  # 8192: 881 MiB
        await world.ask("one")
        assert await world.ask("one", "tokens 5000") == "stop"
        assert 5000 < world.worker("one").loaded.context_length < 8192
        assert await world.ask("one", "tokens 5000") == "stop"
        assert len(world.started) == 2

    play(scenario, budget_bytes=700 * MIB)


def test_a_model_that_was_loaded_with_less_gets_more_once_there_is_memory(play):
    async def scenario(world):
        world.add("one", token_bytes=20_000, longest_context=16_384)
        await world.ask("one", "tokens 5000")
        await asyncio.sleep(400)
        assert world.state("one") == "unloaded"
        world.others_bytes = 800 * MIB  # 200 are left: enough for 4096
        await world.ask("one")
        assert world.status("one").context_length == 4096
        world.others_bytes = 0
        await world.ask("one", context_length=8192)
        assert world.status("one").context_length == 8192
        assert await world.ask("one", "tokens 5000") == "stop"

    play(scenario, ram_bytes=1000 * MIB)


def test_a_context_that_can_never_be_had_leaves_what_is_loaded(play):
    async def scenario(world):
        world.add("one", token_bytes=200_000, longest_context=16_384)
        await world.load("one")
        for _ in range(3):
            with pytest.raises(InsufficientMemory) as error:
                await world.ask("one", context_length=16_384)
            assert error.value.should_retry is False
            assert await world.ask("one") == "stop"
        assert len(world.started) == 1

    play(scenario)


def test_a_longer_context_that_has_to_wait_leaves_the_model_to_others(play):
    async def scenario(world):
        world.watchdog.begin()
        world.add("one", token_bytes=40_000, longest_context=16_384)  # 256 MiB; 8192: 412
        world.add("busy", weights_bytes=600 * MIB)
        busy = world.asking("busy", 500)
        await asyncio.sleep(3)
        await world.ask("one")
        longer = world.asking("one", "tokens 8000")
        await asyncio.sleep(0.1)
        before = asyncio.get_running_loop().time()
        assert await world.ask("one") == "stop"
        assert asyncio.get_running_loop().time() - before < 5
        with pytest.raises(InsufficientMemory) as error:
            await longer
        assert error.value.retry_after_s and "a context of 8192 tokens" in str(error.value)
        assert await busy == "stop"

    play(scenario)


def test_who_left_does_not_have_a_model_loaded_anew(play):
    async def scenario(world):
        world.add("one", longest_context=16_384, slots=2)
        long = world.asking("one", 300)
        await asyncio.sleep(5)
        gone = world.asking("one", context_length=16_384)
        await asyncio.sleep(1)
        gone.cancel()
        await asyncio.sleep(1)
        before = asyncio.get_running_loop().time()
        await world.ask("one", 1)
        assert asyncio.get_running_loop().time() - before < 3 and len(world.started) == 1
        assert await long == "stop"

    play(scenario)


def test_who_needs_a_longer_context_does_not_keep_others_from_a_free_slot_for_long(play):
    async def scenario(world):
        world.add("one", longest_context=16_384, slots=2)
        long = world.asking("one", 3000)
        await asyncio.sleep(5)
        longer = world.asking("one", context_length=16_384)
        await asyncio.sleep(1)
        before = asyncio.get_running_loop().time()
        await world.ask("one", 1)
        assert asyncio.get_running_loop().time() - before < 30
        assert await longer == "stop" and await long == "stop"

    play(scenario)


def test_an_explicit_load_outlasts_a_reload_but_not_an_unload(play):
    async def scenario(world):
        world.add("one", longest_context=16_384)
        await world.load("one")
        await world.ask("one", context_length=16_384)
        await asyncio.sleep(1e5)
        assert world.state("one") == "ready" and len(world.started) == 2
        longer = world.asking("one", context_length=16_384)
        await world.unload("one")
        await asyncio.wait([longer])
        await world.ask("one")
        await asyncio.sleep(400)
        assert world.state("one") == "unloaded"

    play(scenario)


# answers that the context cuts off


def test_an_answer_has_the_room_that_it_may_take(play):
    async def scenario(world):
        world.add("one", token_bytes=20_000, longest_context=16_384)
        done = await world.answer("one", "tokens 4000", max_tokens=1000)
        assert (done.usage.completion_tokens, done.notice) == (1000, "")
        assert world.worker("one").loaded.context_length >= 5000

    play(scenario)


def test_an_answer_that_can_t_have_its_room_says_so(play):
    async def scenario(world):
        world.add("one", longest_context=4096)
        done = await world.answer("one", "tokens 4000", max_tokens=1000)
        assert done.usage.completion_tokens == 96
        assert done.notice == (
            "the answer ends here since the context of 4096 tokens is full; the prompt has 4000"
        )
        assert len(world.started) == 1
        # what was cut at its own length is what was asked for
        assert (await world.answer("one", "tokens 4000", max_tokens=50)).notice == ""

    play(scenario)


def test_no_other_model_leaves_for_an_answer_that_may_be_long(play):
    async def scenario(world):
        world.add("other", weights_bytes=600 * MIB)
        world.add("one", token_bytes=40_000, longest_context=16_384)  # 256 MiB; 8192: 412
        await world.ask("other")
        done = await world.answer("one", "tokens 4000", max_tokens=4000)
        assert done.usage.completion_tokens == 96 and "context of 4096" in done.notice
        assert world.in_memory() == {"one", "other"} and len(world.started) == 2
        # but a prompt that does not fit is another matter
        assert await world.ask("one", "tokens 8000") == "stop"
        assert world.in_memory() == {"one"}

    play(scenario)


def test_a_context_that_the_settings_fix_is_not_made_longer_for_an_answer(play):
    async def scenario(world):
        world.add("one", longest_context=16_384)
        done = await world.answer("one", "tokens 1000", max_tokens=2000)
        assert done.usage.completion_tokens == 1048 and done.notice
        assert len(world.started) == 1

    play(scenario, models=Models(context_length=2048))


def test_a_model_that_has_less_says_so_with_each_answer(play):
    async def scenario(world):
        world.add("one", token_bytes=50_000, slots=4)
        done = await world.answer("one")
        assert done.notice == "for want of memory it has room for 2 at once instead of 4"

    play(scenario, budget_bytes=600 * MIB)


def test_a_request_may_ask_for_a_context(play):
    async def scenario(world):
        world.add("one", longest_context=16_384)
        await world.ask("one", context_length=16_384)
        assert world.worker("one").loaded.context_length == 16_384
        await world.ask("one", context_length=1000)
        assert len(world.started) == 1
        from daemon.errors import InvalidRequest

        with pytest.raises(InvalidRequest):
            await world.ask("one", context_length=20_000)

    play(scenario)


# killing


def test_a_request_can_be_listed_and_killed(play):
    async def scenario(world):
        world.add("one")
        running, waiting = world.asking("one", 1000), world.asking("one", 1)
        await asyncio.sleep(5)
        first, second = world.manager.requests()
        assert (first.state, second.state) == ("running", "waiting")
        assert first.model == "one" and first.age_s == pytest.approx(5) and first.pieces == 1
        world.manager.kill(second.id)
        world.manager.kill(first.id)
        for task in (running, waiting):
            with pytest.raises(Conflict) as error:
                await task
            assert "killed" in str(error.value) and error.value.should_retry is False
        assert world.manager.requests() == []
        assert await world.ask("one") == "stop" and len(world.started) == 1

    play(scenario)


def test_a_request_can_be_killed_while_a_longer_context_is_looked_for(play):
    async def scenario(world):
        world.add("one", longest_context=16_384)
        await world.ask("one")
        world.probing_s = 0.5
        asked = world.asking("one", "tokens 5000")
        await asyncio.sleep(0.2)
        (request,) = world.manager.requests()
        world.manager.kill(request.id)
        with pytest.raises(Conflict) as error:
            await asked
        assert "killed" in str(error.value) and len(world.started) == 1

    play(scenario)


def test_a_request_that_runs_too_long_is_ended(play):
    async def scenario(world):
        world.add("one")
        with pytest.raises(RequestTimeout) as error:
            await world.ask("one", 1000)
        assert "max_run_s" in str(error.value)
        assert await world.ask("one") == "stop"

    play(scenario, models=Models(max_run_s=60))


def test_who_comes_when_the_queue_is_full_is_told_when_to_come_again(play):
    async def scenario(world):
        world.add("one")
        asked = [world.asking("one", 1) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as error:
            await world.ask("one")
        assert error.value.retry_after_s
        assert await asyncio.gather(*asked) == ["stop"] * 4

    play(scenario, models=Models(queue_limit=4))


def test_a_load_that_nobody_waits_for_any_more_leaves_the_line(play):
    async def scenario(world):
        world.add("one", weights_bytes=800 * MIB)
        world.add("two", weights_bytes=800 * MIB)
        answer = world.asking("one", 20)
        await asyncio.sleep(2)
        gone = world.asking("two")
        await asyncio.sleep(1)
        gone.cancel()
        assert await answer == "stop"
        await asyncio.sleep(10)
        assert world.in_memory() == {"one"} and world.state("two") == "unloaded"

    play(scenario)


# every state ends, whatever goes wrong


async def _fails():
    raise RuntimeError("can't start new thread")


async def _hangs():
    await asyncio.Event().wait()


@pytest.mark.parametrize("measuring", [_fails, _hangs])
def test_an_unload_ends_although_the_model_can_t_be_measured(play, measuring):
    async def scenario(world):
        world.add("one")
        await world.ask("one")
        world.measuring = measuring
        before = asyncio.get_running_loop().time()
        await world.unload("one")
        assert asyncio.get_running_loop().time() - before < 10
        assert world.state("one") == "unloaded" and not world.alive

    play(scenario)


def test_a_load_that_can_t_be_measured_leaves_nothing_behind(play):
    async def scenario(world):
        world.add("one")
        world.measuring = _fails
        with pytest.raises(ModeldError):
            await world.ask("one")
        assert not world.alive and not world.ledger.reservations
        world.measuring = at_once
        assert await world.ask("one") == "stop" and len(world.alive) == 1

    play(scenario)


def test_engines_that_never_tell_what_they_can_do_do_not_hold_a_request_for_ever(play):
    async def scenario(world):
        world.add("one")
        world.watchdog.begin()
        world.probing_s = 1e9
        with pytest.raises(LoadTimeout):
            await world.ask("one")
        await asyncio.sleep(1)
        assert world.state("one") == "failed"
        world.probing_s = 0
        assert await world.ask("one") == "stop"

    play(scenario)


def test_an_unload_ends_a_load_whose_engines_never_answer(play):
    async def scenario(world):
        world.add("one")
        world.watchdog.begin()
        world.probing_s = 1e9
        asked = world.asking("one")
        await asyncio.sleep(1)
        await world.unload("one")
        assert world.state("one") == "unloaded"
        with pytest.raises(Conflict):
            await asked

    play(scenario)


# the watchdog


def test_the_watchdog_sees_models_that_came_after_it_began(play):
    async def scenario(world):
        world.watchdog.begin()
        world.add("one", weights_bytes=300 * MIB)
        world.probing_s = 1.0
        await asyncio.sleep(5)
        await world.ask("one")
        world.others_bytes = 1650 * MIB
        await asyncio.sleep(3)
        assert world.in_memory() == set()

    play(scenario, ram_bytes=2000 * MIB, watermark_bytes=200 * MIB)


def test_models_whose_requests_only_wait_leave_when_memory_is_critical(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=300 * MIB)
            await world.ask(name)
        world.watchdog.begin()
        served = Counter()
        stop = asyncio.Event()

        async def go_on(name):
            while not stop.is_set():
                try:
                    await world.ask(name, 5)
                    served[name] += 1
                except InsufficientMemory as error:
                    await asyncio.sleep(error.retry_after_s)

        clients = [asyncio.ensure_future(go_on(name)) for name in ("one", "two") * 4]
        await asyncio.sleep(30)
        world.others_bytes = 1350 * MIB  # of 2000, which leaves room for one of them
        await asyncio.sleep(60)
        served.clear()
        await asyncio.sleep(600)
        assert served["one"] > 10 and served["two"] > 10
        assert len(world.in_memory()) == 1
        stop.set()
        await asyncio.gather(*clients)

    play(scenario, ram_bytes=2000 * MIB, watermark_bytes=200 * MIB)


def test_a_moment_of_critical_memory_costs_nobody_the_place_in_the_queue(play):
    async def scenario(world):
        world.add("one", weights_bytes=300 * MIB)
        world.watchdog.begin()
        asked = [world.asking("one", 20) for _ in range(6)]
        await asyncio.sleep(70)
        world.others_bytes = 1650 * MIB
        await asyncio.sleep(0.6)
        world.others_bytes = 0
        assert await asyncio.gather(*asked) == ["stop"] * 6

    play(scenario, ram_bytes=2000 * MIB, watermark_bytes=200 * MIB)


def test_memory_is_not_critical_once_nothing_is_loaded(play):
    async def scenario(world):
        world.add("one", weights_bytes=300 * MIB)
        await world.ask("one")
        world.watchdog.begin()
        busy = world.asking("one", 100)
        await asyncio.sleep(1)
        world.others_bytes = 1650 * MIB
        await asyncio.sleep(2)
        assert world.manager.critical
        world.worker("one").crash()
        await asyncio.sleep(1)
        assert not world.manager.critical
        with pytest.raises(WorkerCrashed):
            await busy

    play(scenario, ram_bytes=2000 * MIB, watermark_bytes=200 * MIB)


def test_idle_models_leave_before_memory_runs_out(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=300 * MIB)
            await world.ask(name)
            await asyncio.sleep(5)
        world.watchdog.begin()
        busy = world.asking("two", 60)
        world.others_bytes = 1300 * MIB  # of 2000: 100 are left, and 200 should be
        await asyncio.sleep(2)
        assert world.in_memory() == {"two"}
        assert await busy == "stop"

    play(scenario, ram_bytes=2000 * MIB, watermark_bytes=200 * MIB)


def test_programs_that_wait_for_memory_make_idle_models_leave(play):
    async def scenario(world):
        world.add("one")
        await world.ask("one")
        world.watchdog.begin()
        await asyncio.sleep(5)
        assert world.state("one") == "ready"
        for _ in range(5):
            some, full = world.stalled_us
            world.stalled_us = some + 250_000, full
            await asyncio.sleep(0.5)
        assert world.state("one") == "unloaded"

    play(scenario)


def test_a_model_that_outgrows_its_booking_is_seen_and_others_leave(play):
    async def scenario(world):
        for name in ("one", "two"):
            world.add(name, weights_bytes=400 * MIB)
            await world.ask(name)
        world.watchdog.begin()
        busy = world.asking("two", 30)
        await asyncio.sleep(1)
        world.worker("two").private_bytes = 700 * MIB
        await asyncio.sleep(2)
        assert world.in_memory() == {"two"}
        status = world.status("two")
        assert status.reserved_bytes == 700 * MIB
        assert await busy == "stop"

    play(scenario)


def test_new_work_waits_while_memory_is_critical_and_is_refused_in_the_end(play):
    async def scenario(world):
        world.add("one", weights_bytes=300 * MIB, slots=2)
        await world.ask("one")
        world.watchdog.begin()
        busy = world.asking("one", 200)
        await asyncio.sleep(1)
        world.others_bytes = 1650 * MIB
        await asyncio.sleep(1)
        waiting = world.asking("one")
        await asyncio.sleep(5)
        assert not waiting.done() and world.manager.critical
        world.others_bytes = 0
        assert await waiting == "stop"
        world.others_bytes = 1650 * MIB
        await asyncio.sleep(1)
        with pytest.raises(InsufficientMemory) as error:
            await world.ask("one")
        assert error.value.retry_after_s
        assert await busy == "stop", "what runs is let be"

    play(scenario, ram_bytes=2000 * MIB, watermark_bytes=200 * MIB, memory=Memory(wait_s=20))
