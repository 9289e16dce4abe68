"""Generations: in the log's order, one at a time, cancelled where asked, and no client is left waiting for an end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from barrier.testing import FaultPlan
from barrier.testing.waiting import settle
from runner.generations import pieces_of
from runner.messages import MAX_PROMPT_CHARS, Chunk, Task, TaskStatusUpdated, decode_chunk, encode
from runner.testing.scripted_engine import TEXT
from tests.unit.runner.rig import PROMPT, Rig, kinds, make_task, runner_rig

pytestmark = pytest.mark.anyio


def generation(rig: Rig, **fields: Any) -> Task:
    return make_task("TextGeneration", rig.epoch, **fields)


def cancel(rig: Rig, task: Task | str) -> Task:
    return make_task("CancelTask", rig.epoch, cancels=task if isinstance(task, str) else task.task_id)


async def text_of(rig: Rig, task: Task) -> str:
    """What a client reads, which must have no hole and one end."""
    chunks = await rig.chunks(task)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.finish for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    return "".join(chunk.text for chunk in chunks)


async def test_the_text_comes_piece_by_piece_and_ends() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = generation(rig)
        assert kinds(await rig.ask(task)) == ["Running", "=> Running", "ack"]
        rig.engine.say("Grüße, ")
        await settle()
        assert [chunk.text for chunk in await rig.chunks(task)] == ["Grüße, "], "before the next piece is made"
        rig.engine.say("", "🦉\n")
        rig.engine.finish("generate")
        assert kinds(await rig.tell()) == ["Complete", "=> Ready"]
        assert await text_of(rig, task) == "Grüße, 🦉\n"


async def test_the_engine_gets_the_whole_prompt_and_the_limit() -> None:
    async with runner_rig(auto=True) as rig:
        await rig.reach_by_itself()
        prompt = "ä" * (MAX_PROMPT_CHARS // 2)
        await rig.ask(generation(rig, prompt=prompt, max_tokens=7))
        [request] = rig.engine.requests
        assert (request.prompt, request.max_tokens) == (prompt, 7)
        assert prompt not in repr(request)


async def test_a_text_that_reaches_the_limit_says_so() -> None:
    async with runner_rig(auto=True) as rig:
        await rig.reach_by_itself()
        task = generation(rig, max_tokens=len(TEXT))
        await rig.ask(task)
        assert (await rig.chunks(task))[-1].finish == "length"


async def test_half_a_character_in_a_text_is_replaced() -> None:
    """Regression: it failed the generation, and with it the whole attempt."""
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = generation(rig)
        await rig.ask(task)
        rig.engine.say("\ud83e", " owl").finish("generate")
        await settle()
        assert await text_of(rig, task) == "? owl"
        assert rig.status == "Ready"


async def test_other_ranks_take_part_and_write_nothing() -> None:
    async with runner_rig(rank=1) as rig:
        await rig.reach("Ready")
        task = generation(rig)
        await rig.ask(task)
        rig.engine.finish("generate")
        assert kinds(await rig.tell()) == ["Complete", "=> Ready"]
        assert rig.engine.calls[-1] == "generate"
        assert await rig.chunks(task) == []


async def test_other_ranks_too_tell_a_client_why_there_is_no_text() -> None:
    async with runner_rig(rank=1) as rig:
        await rig.reach("Ready")
        failing = generation(rig)
        await rig.ask(failing)
        rig.engine.fail("generate", "out of memory")
        await rig.tell()
        refused = generation(rig)
        await rig.ask(refused)
        assert [chunk.error for chunk in await rig.chunks(failing)] == ["rank 1 failed: out of memory"]
        [end] = await rig.chunks(refused)
        assert end.error is not None
        assert end.error.startswith("rank 1 rejected the request: TextGeneration after a failure")


async def test_several_are_done_in_the_log_s_order_and_running_ends_with_the_last() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        tasks = [generation(rig, prompt=f"{PROMPT} {number}") for number in range(4)]
        for task in tasks:
            assert kinds(await rig.ask(task)) == ["Running", "=> Running", "ack"]
        assert rig.engine.calls.count("generate") == 1, "one at a time: a collective has one order"
        for number, task in enumerate(tasks):
            assert rig.engine.requests[-1].task_id == task.task_id
            rig.engine.say(f"text {number}").finish("generate")
            told = await rig.tell()
            assert kinds(told) == ["Complete", "=> Ready" if number == 3 else "=> Running"]
            assert getattr(told[0], "task_id", "") == task.task_id
            assert await text_of(rig, task) == f"text {number}"


async def test_beyond_a_bound_no_more_are_taken_and_the_same_may_be_asked_again() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        tasks = [generation(rig) for _ in range(66)]
        await rig.put_all(tasks[:65])
        assert kinds(await rig.tell()).count("ack") == 65
        told = await rig.ask(tasks[65])
        assert kinds(told) == ["ack", "Failed"]
        assert isinstance(told[1], TaskStatusUpdated)
        assert told[1].rejection is not None
        assert (told[1].rejection.code, told[1].rejection.status) == ("NotYet", "Running")
        assert "64 generations wait at this rank already" in told[1].rejection.hint
        assert [chunk.finish for chunk in await rig.chunks(tasks[65])] == ["error"]

        rig.engine.finish("generate")
        await rig.tell()
        assert kinds(await rig.ask(tasks[65])) == ["Running", "=> Running", "ack"]
        rig.engine.release()
        await rig.tell()
        assert rig.engine.calls.count("generate") == 66
        assert rig.status == "Ready"


async def test_what_one_attempt_had_no_time_for_the_next_one_does() -> None:
    """A generation keeps its id from one attempt to the next; what became of it in the first does not count in the second."""
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = generation(rig)
        await rig.ask(task)
        await rig.conclude()
        rig.engine.release()
        await rig.reach_by_itself()
        again = generation(rig, task_id=task.task_id)
        assert kinds(await rig.ask(again)) == ["Running", "=> Running", "ack", "Complete", "=> Ready"]


# --- cancelling -----------------------------------------------------------------------------------------------------------


async def test_cancelling_the_one_that_runs_keeps_model_and_engine() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = generation(rig)
        await rig.ask(task)
        rig.engine.say("Half a ")
        await settle()
        told = await rig.ask(cancel(rig, task))
        assert sorted(kinds(told)) == sorted(
            ["Running", "=> Running", "ack", "Complete", "=> Running", "Cancelled", "=> Ready"]
        )
        assert kinds(told)[-2:] == ["Cancelled", "=> Ready"]
        assert [(chunk.text, chunk.finish) for chunk in await rig.chunks(task)] == [
            ("Half a ", None),
            ("", "cancelled"),
        ]
        assert (await rig.outcome(task)).result == "cancelled"
        assert "host kill" not in rig.journal

        following = generation(rig)
        await rig.ask(following)
        rig.engine.finish("generate")
        await rig.tell()
        assert await text_of(rig, following) == "".join(TEXT)


async def test_cancelling_one_that_waits_keeps_it_from_the_engine() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        first, second, third = (generation(rig) for _ in range(3))
        for task in (first, second, third, cancel(rig, second)):
            await rig.ask(task)
        assert await rig.chunks(second) == [], "nobody is told before it is its turn"
        rig.engine.finish("generate").finish("generate")
        told = await rig.tell()
        assert kinds(told) == ["Complete", "=> Running", "Cancelled", "=> Running", "Complete", "=> Ready"]
        assert [request.task_id for request in rig.engine.requests] == [first.task_id, third.task_id]
        assert [chunk.finish for chunk in await rig.chunks(second)] == ["cancelled"]


async def test_cancelling_what_is_over_or_unknown_changes_nothing() -> None:
    async with runner_rig(auto=True) as rig:
        await rig.reach_by_itself()
        task = generation(rig)
        await rig.ask(task)
        calls, text = len(rig.journal), await rig.chunks(task)
        for what in (task.task_id, "never-heard-of", task.task_id):
            told = await rig.ask(cancel(rig, what))
            assert kinds(told) == ["Running", "=> Ready", "ack", "Complete", "=> Ready"]
        assert rig.journal[calls:] == []
        assert await rig.chunks(task) == text
        assert (await rig.outcome(task)).result == "done"


async def test_a_cancel_does_not_reach_a_later_attempt_of_the_same_generation() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = generation(rig)
        await rig.ask(cancel(rig, task))  # before it was asked: there is nothing to cancel
        await rig.ask(task)
        rig.engine.finish("generate")
        await rig.tell()
        assert await text_of(rig, task) == "".join(TEXT)


async def test_cancelling_works_however_many_were_cancelled_before() -> None:
    """Regression: cancels were remembered for good, and after 256 of them one for a waiting generation was ignored."""
    async with runner_rig() as rig:
        await rig.reach("Ready")
        running, waiting = generation(rig), generation(rig)
        await rig.ask(running)
        await rig.put_all([cancel(rig, f"old-{number}") for number in range(300)])
        await rig.ask(waiting)
        await rig.ask(cancel(rig, waiting))
        rig.engine.release()
        await rig.tell()
        assert [chunk.finish for chunk in await rig.chunks(waiting)] == ["cancelled"]
        assert rig.engine.calls.count("generate") == 1


# --- ends ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["verdict", "stop", "shutdown", "cancelled process"])
async def test_whatever_ends_the_attempt_ends_the_streams_of_all_who_wait(way: str) -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        done, running, waiting = (generation(rig) for _ in range(3))
        await rig.ask(done)
        rig.engine.finish("generate")
        await rig.ask(running)
        await rig.ask(waiting)
        match way:
            case "verdict":
                await rig.conclude()
            case "stop":
                rig.runner.stop()
                await rig.ended()
            case "shutdown":
                await rig.put(make_task("Shutdown", rig.epoch))
                await rig.ended()
            case _:
                assert rig.running is not None
                rig.running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await rig.ended()
        assert await text_of(rig, done) == "".join(TEXT)
        for task in (running, waiting):
            [end] = await rig.chunks(task)
            assert end.finish == "error"
            assert end.error == "the attempt ended before the text was complete; ask again"


async def test_an_outage_puts_a_text_off_and_makes_no_hole() -> None:
    """Regression: a piece that the store did not take was dropped, and the client put the rest together."""
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = generation(rig)
        await rig.ask(task)
        rig.engine.say("one ")
        await settle()
        rig.store.partition("runner")
        rig.engine.say("two ", "three").finish("generate")
        await rig.clock.advance(2.0)
        rig.store.heal()
        await rig.clock.advance(4.0)
        assert await text_of(rig, task) == "one two three"
        assert rig.status == "Ready"
        assert len([line for line in rig.log if "text is not written yet" in line]) == 1, "once, not at every try"


async def test_an_end_that_the_store_did_not_take_goes_with_the_next_report() -> None:
    plan = FaultPlan()
    async with runner_rig(faults=plan) as rig:
        await rig.reach("Ready")
        plan.refuse("exec", touching=":out:")
        failing = generation(rig)
        await rig.ask(failing)
        rig.engine.fail("generate", "out of memory")
        await rig.tell()
        plan.assert_fired()
        assert await rig.chunks(failing) == []
        await rig.conclude()
        assert [chunk.error for chunk in await rig.chunks(failing)] == ["rank 0 failed: out of memory"]


async def test_a_stream_that_cannot_be_written_costs_its_client_the_text_and_nobody_else_anything() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task, following = generation(rig), generation(rig)
        await rig.barrier.store.commands.set(rig.barrier.keys.out(task.task_id), "somebody else's", px=60_000)
        rig.engine.release()
        assert kinds(await rig.ask(task)) == ["Running", "=> Running", "ack", "Complete", "=> Ready"]
        await rig.ask(following)
        assert await text_of(rig, following) == "".join(TEXT)


@pytest.mark.parametrize("character", ["a", "\0", "\N{GRINNING FACE}"])
def test_the_longest_text_of_an_engine_comes_in_pieces_that_a_client_reads(character: str) -> None:
    text = character * 300_000
    pieces = pieces_of(text)
    assert "".join(pieces) == text
    chunks = [encode(Chunk(task_id="t" * 128, index=10**9, text=piece)) for piece in pieces]
    assert [decode_chunk(chunk).text for chunk in chunks] == pieces
    assert pieces_of("") == [""]
