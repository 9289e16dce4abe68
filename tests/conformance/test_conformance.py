"""The same calls, the same answers: the store in memory, Valkey, Redis, and what a client in front of them may be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from barrier import Store, Verdict, adopt, connect
from barrier.protocol import outcomes
from barrier.store import script
from barrier.testing import FakeStore, ManualClock, conformance
from barrier.testing import reference as ref
from tests.integration.servers import RealCluster, RealServer

pytestmark = pytest.mark.anyio


@pytest.fixture(
    scope="module",
    params=[
        "fake",
        "fake with a clock of its own",
        "valkey",
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("cluster", marks=pytest.mark.slow),
    ],
)
async def store(request: pytest.FixtureRequest) -> AsyncGenerator[Store]:
    match request.param:
        case "fake" | "fake with a clock of its own":
            made = adopt(FakeStore(ManualClock() if "clock" in request.param else None).client())
            yield made
            await made.close()
        case "cluster":
            async with RealCluster(kind="valkey") as cluster:
                made = await connect(cluster.url)
                yield made
                await made.close()
        case kind:
            async with RealServer(kind=kind) as server:
                made = await connect(server.url)
                yield made
                await made.close()


@pytest.mark.parametrize("name", list(conformance.SEQUENCES))
async def test_the_store_does_what_the_reference_does(store: Store, name: str) -> None:
    await conformance.run(store, conformance.SEQUENCES[name])


async def test_nothing_is_left_behind(store: Store) -> None:
    twins = conformance.Twins(store)
    for call in conformance.SEQUENCES["what is repeatable is remembered across epochs"]:
        await twins.call(call)
    names = [twins.keys.epoch, twins.keys.tasks, twins.keys.once("generate gen.1")]
    assert await store.commands.exists(*names) == 3
    await twins.clean()
    assert await store.commands.exists(*names) == 0


async def test_the_histories_reach_every_answer_of_every_verb() -> None:
    """A suite that never sees an answer says nothing about it. What a verb may answer is in its script's header."""
    names = {
        outcomes.Leading: "LEADER",
        outcomes.Following: "FOLLOWER",
        outcomes.Opened: "OPENED",
        outcomes.NotReady: "NOT_READY",
        outcomes.Disagree: "DISAGREE",
        outcomes.Unconcluded: "UNCONCLUDED",
        outcomes.Fenced: "FENCED",
        outcomes.Restored: "RESTORED",
        outcomes.Superseded: "SUPERSEDED",
        outcomes.Released: "READY",
        outcomes.Dispatched: "DISPATCHED",
        outcomes.Already: "ALREADY",
        outcomes.Aborted: "ABORTED",
        outcomes.Unknown: "UNKNOWN",
        type(None): "RESIGNED",
    }
    seen: dict[str, set[str]] = defaultdict(set)
    store = adopt(FakeStore(ManualClock()).client())
    for calls in conformance.SEQUENCES.values():
        for call, answer in zip(calls, await conformance.run(store, calls), strict=True):
            if isinstance(answer, outcomes.Concluded):
                seen["conclude"].add("CONCLUDED" if answer.first else "ALREADY")
            else:
                seen["lead" if call.kind == "resign" else call.kind].add(names[type(answer)])
    await store.close()
    for verb in script.VERBS:
        if verb != "inspect":
            assert seen[verb] == set(script.script(verb).replies), verb


def wrong_dispatch(state: ref.ReferenceState, _: int, **__: Any) -> Any:
    return state, outcomes.Unknown("something else")


def wrong_conclude(state: ref.ReferenceState, *, verdict: Verdict, **_: Any) -> Any:
    return state, outcomes.Concluded(verdict, first=True)


def wrong_open(state: ref.ReferenceState, _: int, **__: Any) -> Any:
    return state, outcomes.NotReady((0,))


@pytest.mark.parametrize(
    ("verb", "wrong"), [("dispatch", wrong_dispatch), ("conclude", wrong_conclude), ("open_epoch", wrong_open)]
)
async def test_a_difference_is_found_and_told(monkeypatch: pytest.MonkeyPatch, verb: str, wrong: Any) -> None:
    """Here it is the reference that is wrong; what differs from the right one in a store is found in the same way."""
    store = adopt(FakeStore(ManualClock()).client())
    monkeypatch.setattr(ref, verb, wrong)
    with pytest.raises(conformance.Difference, match=r"the reference says .*, the store says .*, after\n  Call"):
        await conformance.check(store)
    await store.close()


async def test_a_state_that_differs_is_found_though_all_answers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ref.dispatch

    def forgets_the_step(state: ref.ReferenceState, now: int, **arguments: Any) -> Any:
        after, answer = real(state, now, **arguments)
        return replace(after, record=replace(after.record, steps=()) if after.record else None), answer

    store = adopt(FakeStore(ManualClock()).client())
    monkeypatch.setattr(ref, "dispatch", forgets_the_step)
    with pytest.raises(conformance.Difference, match="^steps: "):
        await conformance.check(store)
    await store.close()
