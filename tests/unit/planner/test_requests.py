"""Both ends of the requests of one instance: what a client sends and reads, and what the planner in the lead hands out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from barrier import Barrier, EpochId, Leading, Opened, StoreUnavailable, TaskOutcome, Verdict, adopt
from barrier.store.keys import Keys
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank, scripted_ranks, wait_until
from planner.requests import GenerationFailed, RequestQueue
from runner.messages import Chunk, TaskKind, decode_chunk, decode_task, encode
from tests.unit.planner.cluster import text_of, write_request
from tests.unit.planner.pictures import spec

pytestmark = pytest.mark.anyio

SPEC = spec(2)


@dataclass
class Desk:
    """A planner that leads a group of two ranks which say that they are Ready, and a client."""

    store: FakeStore
    clock: ManualClock
    barrier: Barrier
    ranks: list[ScriptedRank]
    queue: RequestQueue
    client: RequestQueue
    raw: Any

    @property
    def keys(self) -> Keys:
        return self.barrier.keys

    async def serve(self) -> EpochId:
        """Open an attempt in which all ranks are Ready."""
        outcome = await self.barrier.open(2)
        assert isinstance(outcome, Opened)
        for rank in self.ranks:
            await rank.arrive("Ready")
        return outcome.epoch

    async def hand_out(self, limit: int = 16) -> tuple[int, int]:
        return await self.queue.hand_out(self.barrier, SPEC, await self.barrier.inspect(), limit)

    async def ask(self, request_id: str, *, seconds: float = 60, **fields: str) -> None:
        """What `generate` sends, without waiting for the answer."""
        await write_request(self.store, self.keys, request_id, seconds=seconds, fields=fields)

    async def sent(self) -> list[dict[str, str]]:
        """The requests that wait."""
        entries = await self.raw.xrange(self.keys.requests)
        return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]

    async def tasks(self) -> list[tuple[TaskKind, str]]:
        """Kind and id of the tasks in the log."""
        entries = await self.raw.xrange(self.keys.tasks)
        found = [decode_task(fields[b"task"]) for _, fields in entries if fields[b"kind"] == b"task"]
        return [(task.kind, task.task_id) for task in found]

    async def answers(self, request_id: str) -> list[Chunk]:
        """The chunks that a client finds."""
        return [decode_chunk(fields[b"chunk"]) for _, fields in await self.raw.xrange(self.keys.out(request_id))]

    async def answer(self, *chunks: Chunk | bytes) -> None:
        """Answer the request that waits, as rank 0 does."""
        request_id = (await self.sent())[0]["id"]
        raw = [
            one if isinstance(one, bytes) else encode(one.model_copy(update={"task_id": request_id})) for one in chunks
        ]
        await self.ranks[0].member.write_output(request_id, raw)

    async def done(self, request_id: str, result: Any = "done") -> None:
        """Rank 0 says what became of a generation."""
        await self.ranks[0].report(
            "Ready", outcome=TaskOutcome(task_id=request_id, step=f"generate {request_id}", n=9, result=result)
        )


@pytest.fixture
async def desk(store: FakeStore, clock: ManualClock) -> AsyncGenerator[Desk]:
    adopted, elsewhere, raw = adopt(store.client("planner")), adopt(store.client("client")), store.client("raw")
    barrier = Barrier(adopted, "demo", world_size=2, clock=clock, holder="planner")
    async with scripted_ranks(store, "demo", 2) as ranks:
        assert isinstance(await barrier.lead(), Leading)
        yield Desk(
            store,
            clock,
            barrier,
            ranks,
            RequestQueue(adopted, barrier.keys, clock),
            RequestQueue(elsewhere, barrier.keys, clock),
            raw,
        )
        await barrier.close()
    await raw.aclose()
    await adopted.close()
    await elsewhere.close()


def chunk(text: str = "", finish: Any = None, error: str | None = None, index: int = 0) -> Chunk:
    return Chunk(task_id="-", index=index, text=text, finish=finish, error=error)


# --- the client's end -----------------------------------------------------------------------------------------------------


async def asked(desk: Desk, **options: Any) -> asyncio.Task[str]:
    """A client that has asked and waits for the answer."""
    pieces = desk.client.generate("Why?", **({"max_tokens": 3, "seconds": 60} | options))
    task = asyncio.create_task(text_of(pieces))
    await desk.clock.advance(0)
    assert len(await desk.sent()) == 1
    return task


async def test_a_request_says_all_that_a_planner_needs_and_wakes_it(desk: Desk) -> None:
    hints = await desk.raw.xlen(desk.keys.signals)
    waiting = await asked(desk)
    (request,) = await desk.sent()
    assert (request["cancels"], request["prompt"], request["max_tokens"]) == ("", "Why?", "3")
    assert request["id"].startswith("gen.")
    assert int(request["until_ms"]) == 1_700_000_060_000
    assert await desk.raw.xlen(desk.keys.signals) == hints + 1
    await desk.answer(chunk("all of it", "stop"))
    assert await desk.clock.run(waiting) == "all of it"


async def test_the_answer_comes_in_order_and_the_request_is_taken_away(desk: Desk) -> None:
    waiting = await asked(desk)
    await desk.answer(chunk("one "), chunk("two ", index=1))
    await desk.answer(chunk("three", index=2), chunk(finish="length", index=3))
    assert await desk.clock.run(waiting) == "one two three"
    assert await desk.sent() == [], "a complete answer needs no cancellation"


async def test_a_piece_that_was_written_twice_is_given_once(desk: Desk) -> None:
    waiting = await asked(desk)
    await desk.answer(chunk("one "), chunk("one "), chunk("two", index=1))
    await desk.answer(chunk("two", index=1), chunk(finish="stop", index=2))
    assert await desk.clock.run(waiting) == "one two"


async def test_a_text_with_a_hole_is_an_error_and_cancels(desk: Desk) -> None:
    waiting = await asked(desk)
    await desk.answer(chunk("one "), chunk("three", index=2))
    with pytest.raises(GenerationFailed, match="piece 1 of the text is gone from the store; ask again"):
        await desk.clock.run(waiting)
    (cancellation,) = await desk.sent()
    assert cancellation["cancels"].startswith("gen.")


async def test_a_client_in_a_cancelled_scope_still_cancels_its_generation(desk: Desk) -> None:
    """anyio's scopes cancel every await of the clean-up as well."""
    with anyio.CancelScope() as scope:
        async with aclosing(desk.client.generate("Why?", max_tokens=3, seconds=60)) as pieces:
            first = asyncio.create_task(anext(pieces))
            await desk.clock.advance(0)
            await desk.answer(chunk("one "))
            assert await desk.clock.run(first) == "one "
            scope.cancel()
            await asyncio.sleep(0)

    async def cancelled() -> bool:
        return [request["cancels"][:4] for request in await desk.sent()] == ["gen."]

    await wait_until(cancelled, "the cancellation to be sent")


async def test_a_cancellation_is_seen_though_many_requests_wait_before_it(desk: Desk) -> None:
    await desk.serve()
    for number in range(100):
        await desk.ask(f"gen.{number}")
    await desk.hand_out(limit=1)
    await desk.ask("cancel.0", cancels="gen.0")
    await desk.hand_out(limit=1)
    assert (await desk.tasks())[-1] == ("CancelTask", "cancel.0.task")


@pytest.mark.parametrize(
    ("ending", "sentence"),
    [
        (chunk(finish="error", error="rank 0 failed: no memory"), "rank 0 failed: no memory"),
        (chunk(finish="error"), "the runner gave no reason"),
        (chunk(finish="cancelled"), "the generation was cancelled"),
    ],
)
async def test_an_answer_that_ends_badly_says_why(desk: Desk, ending: Chunk, sentence: str) -> None:
    waiting = await asked(desk)
    await desk.answer(chunk("one "), ending)
    with pytest.raises(GenerationFailed, match=sentence):
        await desk.clock.run(waiting)
    assert await desk.sent() == []


async def test_an_answer_that_is_not_readable_is_an_error_and_cancels(desk: Desk) -> None:
    waiting = await asked(desk)
    await desk.answer(b"\xff not a chunk")
    with pytest.raises(GenerationFailed, match="the answer is not readable: the message: not JSON"):
        await desk.clock.run(waiting)
    (cancellation,) = await desk.sent()
    assert cancellation["cancels"].startswith("gen.")


async def test_leaving_early_asks_for_a_cancellation_and_takes_the_request_away(desk: Desk) -> None:
    async with aclosing(desk.client.generate("Why?", max_tokens=3, seconds=60)) as pieces:
        first = asyncio.create_task(anext(pieces))
        await desk.clock.advance(0)
        (request,) = await desk.sent()
        await desk.answer(chunk("one "))
        assert await desk.clock.run(first) == "one "
    (cancellation,) = await desk.sent()
    assert (cancellation["cancels"], cancellation["prompt"]) == (request["id"], "")


async def test_a_text_that_is_late_is_not_told_as_an_outage(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the client's own deadline was taken for the driver's, with a healthy server."""

    async def late(awaitable: Coroutine[Any, Any, Any], seconds: float) -> None:
        awaitable.close()
        raise TimeoutError

    monkeypatch.setattr(desk.clock, "wait_for", late)
    with pytest.raises(GenerationFailed, match=r"the text was not complete within 7\.5 s"):
        await desk.clock.run(asyncio.create_task(text_of(desk.client.generate("Why?", max_tokens=3, seconds=7.5))))


async def test_the_deadline_is_the_clients_own_clock(desk: Desk) -> None:
    waiting = await asked(desk, seconds=7.5)
    await desk.clock.advance(7.4)
    assert not waiting.done()
    with pytest.raises(
        GenerationFailed, match=r"the text was not complete within 7\.5 s; ask again, or allow more time"
    ):
        await desk.clock.run(waiting)
    assert (await desk.sent())[0]["cancels"].startswith("gen.")


async def test_a_store_that_is_gone_is_told_as_it_is(desk: Desk) -> None:
    desk.store.partition("client")
    with pytest.raises(StoreUnavailable):
        await text_of(desk.client.generate("Why?", max_tokens=3, seconds=60))


async def test_a_request_whose_reply_was_lost_is_cancelled(desk: Desk) -> None:
    faults = FaultPlan().lose_reply("xadd", touching="requests")
    other = adopt(desk.store.client("unlucky", faults=faults))
    queue = RequestQueue(other, desk.keys, desk.clock)
    with pytest.raises(StoreUnavailable):
        await text_of(queue.generate("Why?", max_tokens=3, seconds=5))
    faults.assert_fired()
    request, cancellation = await desk.sent()
    assert cancellation["cancels"] == request["id"], "it may have been sent, and nobody waits for the answer"
    await other.close()


# --- the planner's end ----------------------------------------------------------------------------------------------------


async def test_what_waits_is_handed_out_oldest_first_and_once(desk: Desk) -> None:
    await desk.serve()
    for name in ("gen.a", "gen.b", "gen.c"):
        await desk.ask(name)
    assert await desk.hand_out() == (0, 0)
    assert await desk.hand_out() == (0, 0)
    assert await desk.tasks() == [("TextGeneration", f"gen.{name}") for name in "abc"]


async def test_no_more_than_the_limit_is_in_hand_and_the_rest_is_counted(desk: Desk) -> None:
    await desk.serve()
    for name in "abcde":
        await desk.ask(f"gen.{name}")
    assert await desk.hand_out(limit=2) == (0, 3)
    assert len(await desk.tasks()) == 2
    await desk.done("gen.a")
    assert await desk.hand_out(limit=2) == (1, 2), "one was seen complete, so one more could go out"
    assert await desk.tasks() == [("TextGeneration", f"gen.{name}") for name in "abc"]


async def test_a_generation_that_is_over_but_not_done_frees_its_place_and_is_no_success(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a")
    await desk.hand_out()
    await desk.done("gen.a", "cancelled")
    assert await desk.hand_out() == (0, 0)
    assert await desk.sent() == []


async def test_a_generation_that_is_running_keeps_its_place(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a")
    await desk.hand_out()
    await desk.done("gen.a", "running")
    await desk.ask("gen.b")
    assert await desk.hand_out(limit=1) == (0, 1)


async def test_nothing_is_handed_out_to_a_group_that_is_not_ready(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a")
    await desk.ranks[1].report("Loaded")
    assert await desk.hand_out() == (0, 1)
    assert await desk.tasks() == []
    await desk.ranks[1].report("Ready")
    assert await desk.hand_out() == (0, 0)
    assert len(await desk.tasks()) == 1


async def test_without_an_attempt_or_without_leadership_nothing_is_handed_out(desk: Desk) -> None:
    await desk.ask("gen.a")
    assert await desk.hand_out() == (0, 0)
    await desk.serve()
    desk.barrier.leadership = None
    assert await desk.hand_out() == (0, 0)
    assert await desk.tasks() == []
    assert len(await desk.sent()) == 1, "it waits for somebody who may"


async def test_a_planner_that_takes_over_does_not_dispatch_again_what_is_in_hand(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a")
    await desk.hand_out()
    successor = RequestQueue(desk.barrier.store, desk.keys, desk.clock)
    snapshot = await desk.barrier.inspect()
    assert await successor.hand_out(desk.barrier, SPEC, snapshot, 16) == (0, 0)
    assert len(await desk.tasks()) == 1
    await desk.done("gen.a")
    assert await successor.hand_out(desk.barrier, SPEC, await desk.barrier.inspect(), 16) == (1, 0)


@pytest.mark.parametrize("planner", ["the same", "a successor"])
async def test_a_generation_of_an_attempt_that_is_over_is_answered_and_never_done_twice(
    desk: Desk, planner: str
) -> None:
    epoch = await desk.serve()
    await desk.ask("gen.a")
    await desk.hand_out()
    await desk.barrier.conclude(epoch, Verdict.aborted("rank 1 fell silent", 1))
    for rank in desk.ranks:
        await rank.retire()
    await desk.serve()
    if planner == "a successor":
        desk.queue = RequestQueue(desk.barrier.store, desk.keys, desk.clock)
    assert await desk.hand_out() == (0, 0)
    (last,) = await desk.answers("gen.a")
    assert (last.finish, last.error) == (
        "error",
        "the attempt that generated this text ended before it was complete; ask again",
    )
    assert await desk.sent() == []
    assert len(await desk.tasks()) == 1


async def test_a_cancellation_goes_out_beyond_the_limit_and_names_what_it_cancels(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a")
    await desk.ask("gen.b")
    await desk.ask("cancel.1", prompt="", cancels="gen.a")
    assert await desk.hand_out(limit=1) == (0, 1)
    assert await desk.tasks() == [("TextGeneration", "gen.a"), ("CancelTask", "cancel.1.task")]
    assert [one["id"] for one in await desk.sent()] == ["gen.a", "gen.b"]


async def test_a_request_that_is_too_old_is_answered_with_an_error(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a", seconds=5)
    await desk.clock.advance(5.1)  # less than a lease
    assert await desk.hand_out() == (0, 0)
    (last,) = await desk.answers("gen.a")
    assert (last.finish, last.error) == ("error", "nobody could take the request in time")
    assert await desk.tasks() == []


async def test_a_request_in_hand_whose_client_has_given_up_frees_its_place(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a", seconds=2)
    await desk.hand_out(limit=1)
    await desk.ask("gen.b", seconds=60)
    assert await desk.hand_out(limit=1) == (0, 1)
    await desk.clock.advance(2.1)
    assert await desk.hand_out(limit=1) == (0, 0)
    assert [name for _, name in await desk.tasks()] == ["gen.a", "gen.b"]


async def test_a_request_whose_client_has_its_answer_frees_its_place(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a")
    await desk.hand_out(limit=1)
    await desk.raw.delete(desk.keys.requests)  # the client took it away
    await desk.ask("gen.b")
    await desk.hand_out(limit=1)
    assert await desk.hand_out(limit=1) == (0, 0)
    assert [name for _, name in await desk.tasks()] == ["gen.a", "gen.b"]


async def test_when_an_attempt_ends_what_is_in_hand_is_answered_and_the_rest_waits_on(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a")
    await desk.hand_out()
    await desk.ask("gen.b")
    await desk.queue.fail_in_hand("the attempt ended")
    assert [(one.finish, one.error) for one in await desk.answers("gen.a")] == [("error", "the attempt ended")]
    assert [one["id"] for one in await desk.sent()] == ["gen.b"]


async def test_when_the_instance_ends_everything_is_answered_however_much_it_is(desk: Desk) -> None:
    await desk.serve()
    names = [f"gen.{number}" for number in range(150)]
    for name in names:
        await desk.ask(name)
    await desk.hand_out(limit=3)
    await desk.queue.fail_all("the instance was stopped")
    assert await desk.sent() == []
    for name in names:
        assert [one.error for one in await desk.answers(name)] == ["the instance was stopped"]


async def test_every_key_of_a_generation_has_a_lifetime(desk: Desk) -> None:
    await desk.serve()
    await desk.ask("gen.a")
    await desk.hand_out()
    await desk.queue.fail_in_hand("over")
    assert desk.keys.out("gen.a") in desk.store.contents()
    assert desk.keys.once("generate gen.a") in desk.store.contents()
    assert desk.store.keys_without_lifetime() == []


async def test_a_dispatch_whose_reply_was_lost_is_not_repeated(desk: Desk) -> None:
    faults = FaultPlan().lose_reply("dispatch")
    barrier = Barrier(
        desk.store.client("unlucky", faults=faults), "demo", world_size=2, clock=desk.clock, holder="planner"
    )
    await barrier.lead()
    await desk.serve()
    await desk.ask("gen.a")
    queue = RequestQueue(barrier.store, desk.keys, desk.clock)
    with pytest.raises(StoreUnavailable):
        await queue.hand_out(barrier, SPEC, await barrier.inspect(), 16)
    assert await queue.hand_out(barrier, SPEC, await barrier.inspect(), 16) == (0, 0)
    faults.assert_fired()
    assert len(await desk.tasks()) == 1
    await barrier.close()


@pytest.mark.parametrize("prompt", ["x" * 200_000, "\u4e16" * 87_039, '"' * 130_559, "\n\t\x01" * 20_000])
async def test_whatever_the_client_lets_through_fits_into_a_task(desk: Desk, prompt: str) -> None:
    await desk.serve()
    waiting = asyncio.create_task(text_of(desk.client.generate(prompt, max_tokens=100_000, seconds=60)))
    await desk.clock.advance(0)
    assert await desk.hand_out() == (0, 0)
    ((kind, request_id),) = await desk.tasks()
    assert kind == "TextGeneration"
    assert json.dumps(prompt, ensure_ascii=False)
    await desk.ranks[0].member.write_output(request_id, [encode(chunk(finish="stop"))])
    assert await desk.clock.run(waiting) == ""
