"""What happens before a rank is Idle in an attempt, and where its engine is connected to."""

from __future__ import annotations

import re

import pytest

from barrier import Settings, Verdict
from barrier.testing import FaultPlan
from runner.endpoints import check_endpoints
from runner.engine import EngineFailure
from runner.messages import RunnerFailed, RunnerStatusUpdated
from tests.unit.runner.rig import Rig, kinds, make_task, runner_rig

pytestmark = pytest.mark.anyio

OTHERS = ("10.0.0.1:5000", "10.0.0.2:5000")


async def failure(rig: Rig) -> str:
    """Why the rank failed."""
    status = rig.runner.status
    assert isinstance(status, RunnerFailed), status
    return status.error


async def test_a_rank_is_idle_in_the_attempt_only_when_its_engine_is_prepared() -> None:
    async with runner_rig() as rig:
        rig.engine.hold("prepare")
        await rig.open()
        assert rig.status == "Preparing"
        await rig.clock.advance(1.0)
        report = await rig.report()
        assert (report.status, report.epoch) == ("Preparing", rig.epoch)
        rig.engine.finish("prepare")
        told = await rig.tell()
        assert kinds(told)[-1] == "=> Idle"
        assert (await rig.report()).status == "Idle"


async def test_an_engine_that_is_ready_at_once_costs_no_report_of_its_own() -> None:
    async with runner_rig() as rig:
        await rig.tell()
        await rig.open()
        told = [event for event in await rig.tell() if isinstance(event, RunnerStatusUpdated)]
        assert [event.status.kind for event in told] == ["Idle"]


async def test_a_heartbeat_before_the_engine_is_prepared_does_not_say_idle() -> None:
    """Otherwise the gate of connect would open for an engine that has not bound its endpoint."""
    quick = Settings(lease=1.0, heartbeat=0.1)  # the heartbeat comes before the rank says by itself that it prepares
    async with runner_rig(settings=quick) as rig:
        rig.engine.hold("prepare")
        await rig.open()
        await rig.tell()
        await rig.clock.advance(quick.heartbeat + 0.01)
        assert await rig.tell() == [], "the runner itself has said nothing yet"
        report = await rig.report()
        assert report.epoch == rig.epoch
        assert report.status == "Preparing"


async def test_the_endpoint_goes_with_the_report_that_says_idle_and_with_no_later_attempt() -> None:
    async with runner_rig(address="10.0.0.1") as rig:
        rig.engine.endpoint = ":5000"
        await rig.open()
        report = await rig.report()
        assert (report.status, report.endpoint) == ("Idle", "10.0.0.1:5000")
        await rig.conclude()
        assert (await rig.report()).endpoint == ""
        rig.engine.endpoint = ":5001"
        await rig.open()
        assert (await rig.report()).endpoint == "10.0.0.1:5001"
        assert rig.journal.count("prepare") == 2, "a new endpoint for every attempt"


async def test_an_ipv6_address_is_written_in_brackets() -> None:
    async with runner_rig(address="fd00::1") as rig:
        rig.engine.endpoint = ":5000"
        await rig.open()
        assert (await rig.report()).endpoint == "[fd00::1]:5000"


async def test_a_failure_to_prepare_fails_the_attempt_and_not_the_runner() -> None:
    async with runner_rig() as rig:
        rig.engine.fail("prepare", "there is no such device", permanent=True)
        await rig.open()
        assert await failure(rig) == "there is no such device"
        assert (await rig.report()).permanent
        await rig.conclude()
        await rig.open()
        assert rig.status == "Idle"


async def test_what_is_prepared_when_an_attempt_ends_is_there_for_the_next_one() -> None:
    """Others failed: a long download goes on, and the engine's process stays."""
    async with runner_rig() as rig:
        rig.engine.hold("prepare")
        await rig.open()
        await rig.conclude("rank 1 failed")
        await rig.open()
        assert rig.engine.lives == 1
        rig.engine.release("prepare")
        await rig.tell()
        assert rig.status == "Idle"
        assert rig.engine.lives == 1


async def test_an_engine_that_hangs_while_it_is_prepared_is_replaced_once_its_rank_is_blamed() -> None:
    async with runner_rig() as rig:
        rig.engine.hold("prepare")
        await rig.open()
        await rig.barrier.conclude(rig.epoch, Verdict.aborted("nothing moved", rig.rank))
        await rig.tell()
        rig.engine.release("prepare")
        await rig.open()
        assert rig.engine.lives == 2
        assert rig.status == "Idle"


async def test_an_engine_that_dies_while_its_rank_is_idle_is_noticed() -> None:
    async with runner_rig() as rig:
        await rig.open()
        assert rig.status == "Idle"
        rig.host.die()
        await rig.tell()
        assert "killed by the system" in await failure(rig)


async def test_connect_fails_where_the_record_does_not_say_where_the_ranks_are() -> None:
    async with runner_rig(address="10.0.0.1") as rig:
        rig.engine.endpoint = ":5000"
        await rig.open()
        await rig.ask(make_task("ConnectToGroup", rig.epoch))
        assert "does not say where the ranks are" in await failure(rig)
        assert not (await rig.report()).permanent
        assert "connect" not in rig.journal


async def test_a_connect_that_the_store_does_not_answer_ends_with_the_task_s_deadline() -> None:
    faults = FaultPlan()
    async with runner_rig(address="10.0.0.1", faults=faults) as rig:
        rig.engine.endpoint = ":5000"
        await rig.open()
        faults.answer("HMGET", "LOADING the store is loading", touching="epoch")
        faults.answer("HMGET", "LOADING the store is loading", nth=2, touching="epoch")
        await rig.ask(make_task("ConnectToGroup", rig.epoch, deadline=rig.member.settings.command_seconds))
        await rig.clock.advance(rig.member.settings.command_seconds)
        assert "could not be read within" in await failure(rig)
        faults.assert_fired()


@pytest.mark.parametrize(
    ("endpoints", "sentence"),
    [
        (None, "does not say where the ranks are"),
        (("10.0.0.1:6000", "10.0.0.2:5000"), "rank 0 waits at 10.0.0.1:6000, but it waits at 10.0.0.1:5000"),
        (("", "10.0.0.2:5000"), "rank 0 waits at no endpoint, but"),
        (("10.0.0.1:5000", "10.0.0.1:5000"), "ranks 0 and 1 both say that they wait at 10.0.0.1:5000"),
        *(
            (
                ("10.0.0.1:5000", "", f"{host}:5001"),
                f"rank 2 says that it waits at {re.escape(host)}:5001, where no other machine reaches it, and rank 0 at 10.0.0.1:5000",
            )
            for host in ("127.0.0.1", "127.0.1.1", "localhost", "[::1]")
        ),
    ],
)
def test_an_engine_is_not_connected_to_endpoints_that_cannot_be_those_of_its_attempt(
    endpoints: tuple[str, ...] | None, sentence: str
) -> None:
    with pytest.raises(EngineFailure, match=sentence) as caught:
        check_endpoints(endpoints, 0, "10.0.0.1:5000")
    assert not caught.value.permanent, "the next attempt binds others"


def test_endpoints_that_differ_are_taken() -> None:
    check_endpoints(OTHERS, 0, OTHERS[0])
    check_endpoints(("", ""), 1, "")
    check_endpoints(("127.0.0.1:5000", "", "localhost:5001"), 0, "127.0.0.1:5000")


@pytest.mark.parametrize("endpoint", ["node-0", "a b:5000", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:5000\n"])
async def test_an_endpoint_that_is_none_fails_the_attempt_and_not_the_runner(endpoint: str) -> None:
    """It is the engine's, or made of the runner's --address: the sentence says where to look."""
    async with runner_rig() as rig:
        rig.engine.endpoint = endpoint
        await rig.open()
        said = await failure(rig)
        assert "the engine cannot be reached" in said
        assert "is not host:port" in said
        assert "see the engine's prepare, and the runner's --address" in said
        assert not (await rig.report()).permanent
        await rig.conclude()
        rig.engine.endpoint = "10.0.0.1:5000"
        await rig.open()
        assert rig.status == "Idle"
