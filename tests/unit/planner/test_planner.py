"""The planner as a library, against real runners: launch, generate, stop, and every way in which a launch can go wrong."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Generator
from contextlib import aclosing
from typing import Any

import pytest
from loguru import logger
from redis.asyncio import Redis

from barrier import InvalidName, InvalidSettings, Settings, StoreCorrupt, StoreUnavailable
from barrier.store.keys import Keys, NamespaceKeys
from barrier.testing import FakeStore, FaultPlan, ManualClock
from planner import GenerationFailed, Instance, InstanceFailed, InstanceSpec, ModelSpec, Planner, Policy
from planner.registry import OtherVersion
from runner.admission import Invalid, Stale
from tests.unit.planner.cluster import WORDS, cluster, text_of, write_request

pytestmark = pytest.mark.anyio

TEXT = "".join(WORDS)


@pytest.fixture
def log_lines() -> Generator[list[str]]:
    """Everything that anybody logs, at every level, with every value."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), level=0, diagnose=True, backtrace=True)
    yield lines
    logger.remove(sink)


# --- the life of an instance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 8])
async def test_launch_generate_and_stop(store: FakeStore, clock: ManualClock, world_size: int) -> None:
    async with cluster(store, clock, world_size) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        assert made.statuses == ["Ready"] * world_size
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT
        await made.run(instance.stop())
        assert made.statuses == ["Idle"] * world_size
        kinds = [one.kind for one in made.dispatched()]
        connect, warm_ups = ["ConnectToGroup"] * (world_size > 1), 1 + (world_size > 1)
        assert kinds == [*connect, "LoadModel", *["StartWarmup"] * warm_ups, "TextGeneration"]
        assert made.rejections() == 0
        assert len(made.epochs()) == 1


async def test_an_instance_can_be_launched_again_after_it_was_stopped(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        for attempt in range(1, 4):
            instance = await made.run(planner.launch(made.spec))
            assert made.loads_per_epoch() == [1] * attempt
            await made.run(instance.stop())
        assert len(made.epochs()) == 3


async def test_to_launch_what_is_up_already_joins_it(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        first = await made.run(planner.launch(made.spec))
        again = await made.run(planner.launch(made.spec))
        assert again.state is first.state
        assert made.loads_per_epoch() == [1]


async def test_the_runners_may_come_after_the_launch(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2, started=False) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec, wait=False))
        await made.until(lambda: "rank 0, rank 1" in instance.state.reason, "both ranks to be waited for")
        made.start(0)
        await made.until(lambda: "waiting for rank 1 to come" in instance.state.reason, "rank 1 to be waited for")
        made.start(1)
        await made.run(instance.ready())
        assert made.loads_per_epoch() == [1]


async def test_stop_returns_once_every_rank_has_torn_down(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        await made.run(instance.stop())
        snapshot = await made.run(instance.inspect())
        assert [view.report.epoch for view in snapshot.ranks if view.report] == [None, None]
        assert instance.state.stopped


async def test_stop_says_which_ranks_do_not_let_go(
    store: FakeStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        blocked = asyncio.Event()
        monkeypatch.setattr(made.ranks[1].runner, "_leave_epoch", blocked.wait)  # an engine that does not let go
        with pytest.raises(InstanceFailed, match=r"^demo: rank 1 did not tear down within 5 s$"):
            await made.run(instance.stop(timeout=5))
        monkeypatch.undo()
        blocked.set()


async def test_a_mistake_of_ours_ends_every_wait_and_its_text_stays_out_of_what_is_told(
    store: FakeStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    def mistaken(*_: object) -> None:
        raise RuntimeError("with a prompt in its text")

    async with cluster(store, clock, 2) as made, made.planner() as planner:
        monkeypatch.setattr("planner.loop.decide", mistaken)
        with pytest.raises(InstanceFailed, match=r"^demo: the planner failed \(RuntimeError\); see its log$"):
            await made.run(planner.launch(made.spec))
        monkeypatch.undo()
        await made.run(planner.launch(made.spec))
    assert not [line for line in log_lines if "with a prompt in its text" in line]


async def test_to_stop_twice_does_no_harm(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        await made.run(instance.stop())
        before = store.contents()["{rankgate:-}:instances"]
        await made.run(instance.stop())
        assert store.contents()["{rankgate:-}:instances"] == before


async def test_a_stop_while_it_waits_for_ranks_takes_effect_at_once(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2, started=False) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec, wait=False))
        launching = asyncio.create_task(instance.ready())
        began = clock.now()
        await made.run(instance.stop())
        assert clock.now() == began
        with pytest.raises(InstanceFailed, match="demo was stopped before it was ready"):
            await made.run(launching)


async def test_explain_and_inspect_say_what_is_waited_for(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        made.scripts[1].hold("connect")
        instance = await made.run(planner.launch(made.spec, wait=False))
        await made.until(lambda: made.statuses == ["Connected", "Connecting", "Connected"], "two ranks to connect")
        sentence = await made.run(instance.explain())
        assert sentence.startswith("demo, attempt 1: waiting for 1 of 3 ranks: rank 1 on node-1 (Connecting for ")
        assert "wanted Connected" in sentence
        made.scripts[1].let("connect")
        await made.run(instance.ready())
        assert await made.run(instance.explain()) == "demo, attempt 1: all 3 ranks are Ready or Running"


async def test_the_first_line_no_model_is_loaded_before_every_rank_is_connected(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        made.scripts[2].hold("connect")
        instance = await made.run(planner.launch(made.spec, wait=False))
        await made.until(lambda: made.statuses == ["Connected", "Connected", "Connecting"], "two ranks to connect")
        await clock.advance(50)
        assert made.dispatched("LoadModel") == []
        made.scripts[2].let("connect")
        await made.run(instance.ready())
        assert made.loads_per_epoch() == [1]
        assert made.rejections() == 0


async def test_what_is_waited_for_is_logged_when_it_changes_and_not_at_every_look(
    store: FakeStore, clock: ManualClock, log_lines: list[str]
) -> None:
    async with cluster(store, clock, 2) as made, made.planner(policy=Policy(connect_stall=10**6)) as planner:
        made.scripts[1].hold("connect")
        instance = await made.run(planner.launch(made.spec, wait=False))
        await clock.advance(300)
        looks = instance.state.snapshot
        assert looks is not None
        said = [
            re.sub(r"\d+\.\d s", "", line.split("demo, ")[1]) for line in log_lines if "rank 1 on node-1 (Conn" in line
        ]
        assert "attempt 1: waiting for 1 of 2 ranks" in said[-1]
        assert len(said) == len(set(said)) <= 2, "one look every few seconds, and a line only for what is new"
        made.scripts[1].let("connect")
        await made.run(instance.ready())


async def test_a_timeout_of_the_launch_says_what_it_waited_for(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        made.scripts[1].hold("connect")
        with pytest.raises(InstanceFailed, match=r"^demo was not ready within 10 s: .*rank 1 on node-1 \(Connecting"):
            await made.run(planner.launch(made.spec, timeout=10))
        made.scripts[1].let("connect")
        await made.run(planner.launch(made.spec))


async def test_the_planner_that_ends_wakes_who_still_waits(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2, started=False) as made:
        async with made.planner() as planner:
            instance = await made.run(planner.launch(made.spec, wait=False))
            waiting = asyncio.create_task(instance.ready())
            await asyncio.sleep(0)
        with pytest.raises(InstanceFailed, match="demo: this planner does not look after it any more"):
            await made.run(waiting)


async def test_instances_that_are_up_stay_up_when_the_planner_ends(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made:
        async with made.planner("first") as planner:
            await made.run(planner.launch(made.spec))
        began = clock.now()
        async with made.planner("second") as planner:
            instance = await made.run(planner.launch(made.spec))
            assert clock.now() == began, "leadership was given back, so nobody waits for it to lapse"
            assert await made.run(text_of(instance.generate("Why?"))) == TEXT
        assert made.loads_per_epoch() == [1]


async def test_a_launch_with_another_spec_replaces_the_one_before(store: FakeStore, clock: ManualClock) -> None:
    faults = FaultPlan().delay("conclude", 1.0, clock=clock)  # the earlier attempt serves for a moment longer
    async with cluster(store, clock, 2, told=False) as made, made.planner(faults=faults) as planner:
        old = await made.run(planner.launch(made.spec))
        other = made.spec.model_copy(update={"model": ModelSpec(model_id="another", total_layers=2)})

        async def launch() -> tuple[Instance, list[int]]:
            return await planner.launch(other), [script.calls.count("load") for script in made.scripts]

        new, loads = await made.run(launch())
        faults.assert_fired()
        assert loads == [2, 2], "it does not take the attempt of the spec before for its own"
        assert new.spec.model.model_id == "another"
        assert made.loads_per_epoch() == [1, 1]
        assert "another spec" in made.verdicts()[0]
        with pytest.raises(InstanceFailed, match="this planner does not look after it any more"):
            await made.run(old.ready())
        await made.run(old.stop())
        assert new.state.serving, "the handle of the earlier launch has no power over the later one"


async def test_a_launch_with_fewer_ranks_replaces_the_one_before(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2, told=False) as made, made.planner() as planner:
        await made.run(planner.launch(made.spec))
        alone = made.spec.model_copy(update={"world_size": 1})
        await made.run(planner.launch(alone), limit=60)
        assert made.loads_per_epoch() == [1, 1]
        assert made.statuses == ["Ready", "Idle"]


# --- generating -----------------------------------------------------------------------------------------------------------


async def test_text_arrives_piece_by_piece(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].pace = 1.0
        began, arrivals = clock.now(), list[tuple[float, str]]()

        async def read() -> None:
            async for piece in instance.generate("Why?", max_tokens=3):
                arrivals.append((clock.now() - began, piece))

        await made.run(read())
        assert [piece for _, piece in arrivals] == list(WORDS[:3])
        assert [seconds for seconds, _ in arrivals] == [1.0, 2.0, 3.0]


async def test_many_generations_at_once_are_answered_each_with_its_own_text(
    store: FakeStore, clock: ManualClock
) -> None:
    policy = Policy(generations=3)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        lengths = [1, 2, 3, 4] * 5
        texts = await made.run(asyncio.gather(*(text_of(instance.generate("x", max_tokens=n)) for n in lengths)))
        assert texts == ["".join(WORDS[:n]) for n in lengths]
        assert len(made.dispatched("TextGeneration")) == 20


async def test_no_more_generations_are_in_the_runners_hands_than_allowed(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner(policy=Policy(generations=2)) as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].hold("generate")
        texts = [asyncio.create_task(text_of(instance.generate("x"))) for _ in range(5)]
        await clock.advance(20)
        assert len(made.dispatched("TextGeneration")) == 2
        made.scripts[0].let("generate")
        assert await made.run(asyncio.gather(*texts)) == [TEXT] * 5


async def test_a_client_that_leaves_early_cancels_its_generation(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].pace = 1.0

        async def read_one() -> None:
            async with aclosing(instance.generate("Why?")) as pieces:
                async for _ in pieces:
                    return

        await made.run(read_one())
        await made.until(lambda: made.dispatched("CancelTask"), "the cancellation", limit=10)
        generation = made.dispatched("TextGeneration")[0]
        await made.until(lambda: made.statuses == ["Ready", "Ready"], "the ranks to be done", limit=1)
        assert made.rejections() == 0
        assert generation.task_id.startswith("gen.")
        assert await made.run(text_of(instance.generate("Again?"))) == TEXT, "the next one is not harmed"


async def test_a_generation_that_is_not_complete_in_time_says_so_and_is_cancelled(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].hold("generate")
        with pytest.raises(GenerationFailed, match=r"not complete within 5 s; ask again, or allow more time"):
            await made.run(text_of(instance.generate("Why?", timeout=5)))
        await made.until(lambda: made.dispatched("CancelTask"), "the cancellation", limit=10)


async def test_a_request_that_nobody_takes_in_time_is_answered_and_dropped(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].hold("generate")
        policy = planner.policy
        blocking = [asyncio.create_task(text_of(instance.generate("x"))) for _ in range(policy.generations)]
        await made.until(lambda: len(made.dispatched("TextGeneration")) == policy.generations, "all places to be taken")
        with pytest.raises(GenerationFailed, match="nobody could take the request in time|not complete within 8 s"):
            await made.run(text_of(instance.generate("late", timeout=8)))
        made.scripts[0].let("generate")
        assert await made.run(asyncio.gather(*blocking)) == [TEXT] * policy.generations
        assert len(made.dispatched("TextGeneration")) == policy.generations


async def test_a_client_that_vanishes_does_not_keep_its_place_for_ever(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner(policy=Policy(generations=1)) as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].hold("generate")
        await write_request(store, made.keys, "gen.vanished", seconds=10)  # by a client that is killed at once
        await made.until(lambda: made.dispatched("TextGeneration"), "the first to be in hand")
        waiting = asyncio.create_task(text_of(instance.generate("y")))
        await clock.advance(30)
        made.scripts[0].let("generate")
        assert await made.run(waiting) == TEXT


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_generation_that_fails_in_the_engine_ends_with_the_reason(
    store: FakeStore, clock: ManualClock, rank: int
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[rank].fail("generate", "the engine coughs")
        if rank == 1:
            made.scripts[0].hold("generate")
        with pytest.raises(GenerationFailed, match=rf"rank {rank}.*the engine coughs"):
            await made.run(text_of(instance.generate("Why?")))
        if rank == 1:
            made.scripts[0].let("generate")
        await made.run(instance.ready())
        assert await made.run(text_of(instance.generate("Again?"))) == TEXT
        assert made.loads_per_epoch() == [1, 1]


async def test_a_long_generation_is_not_a_stall(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(generate_stall=20)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].pace, made.scripts[0].words = 9.0, WORDS * 3
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT * 3
        assert made.verdicts() == []


async def test_a_generation_in_which_no_word_comes_is_a_stall(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(generate_stall=20)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].hold("generate")
        with pytest.raises(GenerationFailed, match="rank 0 generated nothing for 20 s"):
            await made.run(text_of(instance.generate("Why?")))
        made.scripts[0].let("generate")
        await made.run(instance.ready())


async def test_a_generation_that_all_ranks_refuse_ends_with_the_reason(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        for refusals in made.refusals:
            refusals.refuse("TextGeneration", 1, Stale("not in the mood"))
        with pytest.raises(GenerationFailed, match=r"rank \d rejected the request: not in the mood"):
            await made.run(text_of(instance.generate("Why?")))
        assert await made.run(text_of(instance.generate("Again?"))) == TEXT
        assert made.loads_per_epoch() == [1], "a refusal by all harms nobody"


async def test_a_generation_that_one_rank_refuses_ends_the_attempt_because_the_others_hang(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        made.refusals[1].refuse("TextGeneration", 1, Stale("not in the mood"))
        made.scripts[0].hold("generate")  # it waits for rank 1, which never comes
        with pytest.raises(GenerationFailed, match="not in the mood"):
            await made.run(text_of(instance.generate("Why?")))
        await made.until(lambda: len(made.epochs()) == 2, "the next attempt")
        made.scripts[0].let("generate")
        await made.run(instance.ready())
        assert '"culprit":1' in made.verdicts()[0]


async def test_a_generation_whose_attempt_ends_ends_with_an_error(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].hold("generate")
        text = asyncio.create_task(text_of(instance.generate("Why?")))
        await made.until(lambda: made.statuses[0] == "Running", "the generation to begin")
        await made.kill(1)
        with pytest.raises(GenerationFailed, match=r"the attempt ended.*ask again"):
            await made.run(text)
        made.scripts[0].let("generate")
        made.start(1)
        await made.run(instance.ready())
        assert await made.run(text_of(instance.generate("Again?"))) == TEXT


async def test_a_generation_in_the_hands_of_a_rank_0_that_dies_is_answered_by_the_planner(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].hold("generate")
        text = asyncio.create_task(text_of(instance.generate("Why?")))
        await made.until(lambda: made.statuses[0] == "Running", "the generation to begin")
        await made.kill(0)
        began = clock.now()
        with pytest.raises(GenerationFailed, match="the attempt ended.*rank 0 fell silent"):
            await made.run(text)
        assert clock.now() - began <= Settings().lease + Settings().heartbeat


async def test_what_is_asked_of_an_instance_that_is_over_is_refused_at_once(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        await made.run(instance.stop())
        began = clock.now()
        with pytest.raises(GenerationFailed, match="demo does not generate any more: it was stopped"):
            await made.run(text_of(instance.generate("Why?")))
        assert clock.now() == began


async def test_requests_that_wait_when_the_instance_is_stopped_are_answered(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner(policy=Policy(generations=1)) as planner:
        instance = await made.run(planner.launch(made.spec))
        made.scripts[0].hold("generate")
        texts = [asyncio.create_task(text_of(instance.generate("x"))) for _ in range(100)]
        await made.until(lambda: made.statuses[0] == "Running", "the first to begin")
        await made.run(instance.stop())
        found = await made.run(asyncio.gather(*texts, return_exceptions=True))
        assert {type(one) for one in found} == {GenerationFailed}
        assert {str(one) for one in found[1:]} == {"instance demo was stopped"}
        made.scripts[0].let("generate")


async def test_the_prompt_is_in_no_log_line_whatever_happens(
    store: FakeStore, clock: ManualClock, log_lines: list[str]
) -> None:
    secret = "xyzzy-my-secret-prompt"
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        assert await made.run(text_of(instance.generate(secret))) == TEXT
        for refusals in made.refusals:
            refusals.refuse("TextGeneration", 1, Invalid("never"))
        made.scripts[1].failures.clear()
        with pytest.raises(GenerationFailed) as refused:
            await made.run(text_of(instance.generate(secret)))
        made.scripts[1].fail("generate", "the engine coughs")
        with pytest.raises(GenerationFailed) as failed:
            await made.run(text_of(instance.generate(secret)))
        with pytest.raises(InvalidName) as too_long:
            await made.run(text_of(instance.generate(secret * 100_000)))
        await write_request(store, made.keys, "gen with spaces", seconds=10, fields={"prompt": secret})
        await clock.advance(20)
    for traced in (
        "looks: 2 × Ready",
        "wake-up on",
        "rank 1 reports Connected",
        "report 1 is written: Idle",
        "log entry: ",
    ):
        assert any(traced in line for line in log_lines), f"-vv does not tell {traced!r}"
    assert any(" for ranks 0 to 1" in line and "generate" in line for line in log_lines), "the text's entry is told"
    assert not [line for line in log_lines if "xyzzy" in line]
    assert "xyzzy" not in f"{refused.value} {failed.value} {too_long.value}"


# --- requests that no runner would take -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("an id with spaces", {"id": "gen one two"}),
        ("an id that is too long for a step", {"id": "g" * 96}),
        ("too many tokens", {"max_tokens": "100001"}),
        ("a prompt that no task can carry", {"prompt": "\u4e16" * 100_000}),
        ("a prompt that is too long", {"prompt": "x" * 200_001}),
        ("a cancellation of nothing that could be", {"cancels": "c" * 129}),
        ("not a number", {"max_tokens": "many"}),
        ("an id that is not one", {"id": "}{*"}),
        ("another schema", {"id": "-"}),
    ],
)
async def test_a_request_that_no_runner_takes_does_not_end_the_planner(
    store: FakeStore, clock: ManualClock, what: str, fields: dict[str, str]
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        await write_request(store, made.keys, "gen.1", fields=fields)
        assert await made.run(text_of(instance.generate("Why?")), limit=60) == TEXT, what
        assert made.keys.requests not in store.contents() or not store.contents()[made.keys.requests], "it was dropped"
        assert made.rejections() == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "sentence"),
    [
        ("x" * 200_001, 1, "the prompt has 200,001 characters; at most 200,000 are accepted"),
        ("\u4e16" * 100_000, 1, "the prompt takes 300,002 bytes as JSON; at most 261,120 are accepted: shorten it"),
        ('"' * 150_000, 1, "the prompt takes 300,002 bytes as JSON"),
        ("half a pair: \ud83d", 1, "the prompt is not valid text"),
        ("x", 0, "max_tokens is 0; it must be from 1 to 100,000"),
        ("x", -1, "max_tokens is -1"),
        ("x", 100_001, "max_tokens is 100001"),
    ],
)
async def test_what_cannot_be_generated_is_refused_before_anything_is_sent(
    store: FakeStore, clock: ManualClock, prompt: str, max_tokens: int, sentence: str
) -> None:
    async with cluster(store, clock, 1) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        with pytest.raises(InvalidName, match=sentence):
            await made.run(text_of(instance.generate(prompt, max_tokens=max_tokens)))
        assert made.keys.requests not in store.contents()


async def test_the_longest_prompt_that_is_accepted_is_carried(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        for prompt in ("x" * 200_000, "\u4e16" * 87_039, '"' * 130_559):
            assert await made.run(text_of(instance.generate(prompt)), limit=60) == TEXT


# --- launches that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "}", "{demo}", "a*", "a b", "ä", "A", "-a", "a" * 64, "a\n", "a:b", "../a"])
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidSettings, match="is not a name: use 1 to 63 of a-z, 0-9 and '-'"):
        InstanceSpec(name=name, world_size=1)


@pytest.mark.parametrize("name", ["", "}", "a b", "A" * 64])
def test_hostile_namespaces_are_refused(store: FakeStore, name: str) -> None:
    with pytest.raises(InvalidName, match="namespace .* is not a name"):
        Planner(store.client(), namespace=name)
    assert store.keys() == []


@pytest.mark.parametrize("world_size", [0, -1, 16_385, 1.5, True, "four"])
def test_impossible_world_sizes_are_refused_with_the_value_and_the_limit(world_size: Any) -> None:
    with pytest.raises(InvalidSettings, match=r"world_size is .*; it must be a whole number from 1 to 16,384"):
        InstanceSpec(name="demo", world_size=world_size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, -1.0) for name in Policy.__dataclass_fields__],
        *[(name, float("nan")) for name in Policy.__dataclass_fields__],
        *[(name, float("inf")) for name in Policy.__dataclass_fields__],
        *[(name, 0) for name in Policy.__dataclass_fields__ if not name.startswith("max_")],
    ],
)
def test_impossible_policies_are_refused_with_the_value(field: str, value: Any) -> None:
    with pytest.raises(InvalidSettings, match=rf"^{field} is {value!r}; it must be a finite number, and at least"):
        Policy(**{field: value})


def test_a_cap_below_the_base_is_refused_with_both_values() -> None:
    with pytest.raises(InvalidSettings, match=r"backoff_cap is 1 s and backoff_base is 2 s"):
        Policy(backoff_base=2, backoff_cap=1)


async def test_a_store_that_cannot_be_reached_is_one_clear_error(store: FakeStore, clock: ManualClock) -> None:
    store.partition("planner")
    with pytest.raises(StoreUnavailable, match="no answer from the store at fakestore:6379"):
        async with Planner(store.client("planner"), clock=clock):
            pytest.fail("it entered")


async def test_a_port_that_nobody_listens_on_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    with pytest.raises(StoreUnavailable, match=f"no answer from the store at 127.0.0.1:{port}"):
        async with Planner(Redis(host="127.0.0.1", port=port)):
            pytest.fail("it entered")


GROUP = Keys("rankgate", "demo")
WRONG = ["epoch", "leader", "tasks", "requests"]  # hints and history heal by themselves


@pytest.mark.parametrize("key", [*[getattr(GROUP, name) for name in WRONG], "{rankgate:-}:instances"])
async def test_a_key_of_the_wrong_type_refuses_the_launch_and_nothing_is_written(
    store: FakeStore, clock: ManualClock, key: str
) -> None:
    other = store.client("somebody else")
    await other.set(key, "not yours", px=10**9)
    async with cluster(store, clock, 1, started=False) as made, made.planner() as planner:
        before = store.contents()
        with pytest.raises(StoreCorrupt, match="holds a string where a (hash|stream) belongs; move or delete that key"):
            await made.run(planner.launch(made.spec))
        assert store.contents() == before
    assert store.contents() == before
    await other.aclose()


async def test_the_changes_of_the_wrong_type_refuse_the_planner_itself(store: FakeStore, clock: ManualClock) -> None:
    other = store.client("somebody else")
    await other.set("{rankgate:-}:changes", "not yours", px=10**9)
    before = store.contents()
    with pytest.raises(StoreCorrupt):
        async with Planner(store.client("planner"), clock=clock):
            pytest.fail("it entered")
    assert store.contents() == before
    await other.aclose()


async def test_a_key_that_turns_wrong_later_ends_the_instance_with_one_clear_error(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 1) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        other = store.client("somebody else")
        await other.set(made.keys.leader, "not yours", px=10**9)
        await made.until(lambda: instance.state.over, "the planner to notice", limit=60)
        with pytest.raises(StoreCorrupt, match="leader holds a string where a hash belongs"):
            await made.run(instance.ready())
        with pytest.raises(GenerationFailed, match="leader holds a string where a hash belongs"):
            await made.run(text_of(instance.generate("Why?")))
        await other.delete(made.keys.leader)
        await other.aclose()


async def test_a_desired_state_of_another_version_ends_the_planning_in_words_and_stays(
    store: FakeStore, clock: ManualClock
) -> None:
    """Not as a mistake of ours: the planner of another version goes on."""
    other = store.client("somebody else")
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        instances = NamespaceKeys("rankgate").instances
        theirs = json.dumps(json.loads(await other.hget(instances, "demo") or "") | {"wire": 7})
        await other.hset(instances, "demo", theirs)
        made.scripts[1].fail("load", "no such model", permanent=True)
        await made.kill(1)
        await made.until(lambda: not instance.state.serving, "the death to be noticed")
        made.start(1)
        await made.until(lambda: instance.state.over, "the planner to notice", limit=60)
        assert isinstance(instance.state.error, OtherVersion)
        assert "instance 'demo' has wire version 7, and this version of rankgate reads 1" in str(instance.state.error)
        assert await other.hget(instances, "demo") == theirs.encode()
    await other.aclose()


async def test_ranks_that_never_come_end_the_launch_and_are_named(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(assemble_timeout=30)
    async with cluster(store, clock, 3, started=False) as made, made.planner(policy=policy) as planner:
        made.start(1)
        with pytest.raises(InstanceFailed, match="demo: rank 0, rank 2 did not come within 30 s. Start the missing"):
            await made.run(planner.launch(made.spec))
        assert made.dispatched() == []
        assert made.epochs() == []


async def test_runners_that_were_started_for_another_world_size_are_named(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        wrong = made.spec.model_copy(update={"world_size": 1})
        with pytest.raises(
            InstanceFailed, match="rank 0 on node-0 was started for world_size 2, demo has world_size 1"
        ):
            await made.run(planner.launch(wrong))
        assert made.dispatched() == []


# --- several instances ----------------------------------------------------------------------------------------------------


async def test_an_instance_that_waits_for_ever_delays_no_other(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner(policy=Policy(assemble_timeout=10**6)) as planner:
        ghosts = [
            await made.run(planner.launch(InstanceSpec(name=f"ghost-{n}", world_size=64), wait=False)) for n in range(3)
        ]
        await clock.advance(100)
        began = clock.now()
        instance = await made.run(planner.launch(made.spec))
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT
        launched = clock.now()
        made.scripts[0].pace = 1.0

        async def leave_early() -> None:
            async with aclosing(instance.generate("x")) as pieces:
                await anext(pieces)

        await made.run(leave_early())
        await made.until(lambda: made.statuses == ["Ready", "Ready"], "the cancellation", limit=1)
        stopping = clock.now()
        await made.run(instance.stop())
        assert (launched - began, clock.now() - stopping) == (0, 0), "no tick was waited for"
        await made.run(ghosts[0].stop())
        assert clock.now() == stopping
        assert [ghost.state.over for ghost in ghosts] == [True, False, False]


async def test_two_instances_on_one_store_know_nothing_of_each_other(store: FakeStore, clock: ManualClock) -> None:
    async with (
        cluster(store, clock, 2, "one") as one,
        cluster(store, clock, 2, "two") as two,
        one.planner() as planner,
    ):
        first = await one.run(planner.launch(one.spec))
        second = await two.run(planner.launch(two.spec))
        await one.kill(1)
        await one.until(lambda: not first.state.serving, "one to notice")
        assert await two.run(text_of(second.generate("Why?"))) == TEXT
        one.start(1)
        await one.run(first.ready())
        assert (one.loads_per_epoch(), two.loads_per_epoch()) == ([1, 1], [1])
        assert planner.instances.keys() == {"one", "two"}


async def test_two_namespaces_on_one_store_know_nothing_of_each_other(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 1) as made, made.planner() as planner:
        async with Planner(store.client("other"), namespace="other", clock=clock) as other:
            await made.run(planner.launch(made.spec))
            elsewhere = await made.run(other.launch(made.spec, wait=False))
            assert "rank 0" in elsewhere.state.reason or elsewhere.state.snapshot is None
            await made.run(elsewhere.stop())
            assert planner.instances["demo"].serving
