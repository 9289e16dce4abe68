"""A name that is mistyped in a test is an error where it stands: such a test used to be green, whatever the code did."""

from __future__ import annotations

from typing import Any

import pytest

from barrier.testing import FakeStore, FaultPlan
from runner.testing import ScriptedEngine, ScriptedRunner

pytestmark = pytest.mark.anyio

FAULTS = ["lose_reply", "refuse", "duplicate", "answer", "before", "after", "delay"]


@pytest.mark.parametrize("name", ["hold", "release", "finish", "active", "die"])
def test_a_phase_of_an_engine_is_one_of_those_there_are(name: str) -> None:
    with pytest.raises(
        ValueError, match="there is no phase 'conect'; did you mean 'connect'.* There are .*connect, load,"
    ):
        getattr(ScriptedEngine(), name)("conect")


async def test_a_phase_that_is_waited_for_or_fails_is_one_of_those_there_are() -> None:
    engine = ScriptedEngine()
    wrong: Any = "laod"
    with pytest.raises(ValueError, match="there is no phase 'laod'"):
        await engine.called(wrong)
    with pytest.raises(ValueError, match="there is no phase 'laod'"):
        engine.fail(wrong, "out of memory", times=None)


@pytest.mark.parametrize(
    ("call", "arguments", "sentence"),
    [
        ("hold", ["conect"], "there is no phase 'conect'"),
        ("let", ["conect"], "there is no phase 'conect'"),
        ("fail", ["conect", "no"], "there is no phase 'conect'"),
        ("reject", ["warmup"], "there is no phase 'warmup'; did you mean 'warm_up'"),
        ("ignore", ["close"], "there is no phase 'close'"),
    ],
)
async def test_what_a_scripted_runner_shall_do_is_something_that_it_can(
    call: str, arguments: list[str], sentence: str
) -> None:
    runner = ScriptedRunner(FakeStore(), "demo", 0)
    with pytest.raises(ValueError, match=sentence):
        getattr(runner, call)(*arguments)


async def test_a_code_and_a_status_are_those_there_are() -> None:
    runner = ScriptedRunner(FakeStore(), "demo", 0)
    wrong: Any = "Redy"
    with pytest.raises(ValueError, match="there is no code of a rejection 'Redy'"):
        runner.reject("load", code=wrong)
    with pytest.raises(ValueError, match="there is no status 'Redy'; did you mean 'Ready'"):
        await runner.until(wrong)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("wrong", ["dispach", "evalhsa", "xread block", ""])
def test_a_planned_fault_is_for_a_command_that_there_is(fault: str, wrong: str) -> None:
    more: list[Any] = {"answer": ["OOM"], "before": [print], "after": [print], "delay": [1.0]}.get(fault, [])
    with pytest.raises(ValueError, match=f"there is no command '{wrong}'"):
        getattr(FaultPlan(), fault)(wrong, *more)
    for right in ("dispatch", "EXEC", "xadd", "del", "info"):
        getattr(FaultPlan(), fault)(right, *more)


def test_a_client_that_is_cut_off_or_counted_is_one_of_those_there_are() -> None:
    store = FakeStore()
    store.client("rank 1")
    for call in (store.heal,):
        with pytest.raises(ValueError, match="there is no client called 'rnak 1'; did you mean 'rank 1'"):
            call("rnak 1")
    assert store.sent["rank 1"] == store.refused["rank 1"] == 0
    with pytest.raises(ValueError, match="there is no client called 'rnak 1'"):
        assert store.sent["rnak 1"] == 0
    with pytest.raises(ValueError, match="there is no server_type 'reddis'"):
        FakeStore(server_type="reddis")
