"""What the service manager is told, read from a real socket of its kind."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Generator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from loguru import logger

from barrier.testing import FakeStore, ManualClock
from planner.cli.watchdog import Pulse, ServiceManager, Work, supervised
from tests.unit.planner.cluster import cluster

pytestmark = pytest.mark.anyio

WATCHDOG = 30.0


class Listener:
    """The service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def heard(self) -> list[dict[str, str]]:
        """What came since this was last asked."""
        found: list[dict[str, str]] = []
        while True:
            try:
                message = self._socket.recv(65_536).decode()
            except BlockingIOError:
                return found
            found.append(dict(line.split("=", 1) for line in message.splitlines()))

    def beats(self) -> int:
        return sum(one.get("WATCHDOG") == "1" for one in self.heard())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Generator[Listener]:
    directory = tempfile.mkdtemp(prefix="rankgate-")  # pytest's own paths may be too long for a socket
    made = Listener(str(Path(directory) / "notify"))
    yield made
    made.close()
    shutil.rmtree(directory)


class Job:
    """Something that is there to be tried."""

    def __init__(self) -> None:
        self.ready = True
        self.status = "demo rank 0: Ready"
        self.tries: dict[str, int] = {"a heartbeat": 0}

    def work(self, patience: float = 60.0) -> Work:
        return Work(lambda: self.ready, lambda: self.status, lambda: dict(self.tries), patience)

    def go_on(self) -> None:
        self.tries = {part: count + 1 for part, count in self.tries.items()}


@asynccontextmanager
async def told(job: Job, listener: Listener, clock: ManualClock, watchdog: float | None = WATCHDOG):
    async with supervised(job.work(), ServiceManager(listener.address, watchdog), clock=clock):
        await clock.advance(0)
        yield


async def test_it_says_ready_once_the_work_has_begun_and_stopping_at_the_end(
    listener: Listener, clock: ManualClock
) -> None:
    job = Job()
    job.ready = False
    async with told(job, listener, clock):
        await clock.advance(100)
        assert listener.heard() == []
        job.ready = True
        await clock.advance(1)
        first, second = listener.heard()
        assert first == {"READY": "1", "STATUS": "demo rank 0: Ready"}
        assert second["WATCHDOG"] == "1"
    assert listener.heard() == [{"STOPPING": "1", "STATUS": "stopped"}]


async def test_it_beats_three_times_in_the_time_that_is_waited_for_a_beat_and_says_what_it_does(
    listener: Listener, clock: ManualClock
) -> None:
    job = Job()
    async with told(job, listener, clock):
        listener.heard()
        for _ in range(20):
            job.go_on()
            await clock.advance(WATCHDOG)
            job.status = "demo rank 0: Running"
            assert [one["WATCHDOG"] for one in listener.heard()] == ["1"] * 3
        await clock.advance(WATCHDOG / 3)
        assert listener.heard() == [{"WATCHDOG": "1", "STATUS": "demo rank 0: Running"}]


async def test_without_a_watchdog_it_only_says_that_it_is_ready(listener: Listener, clock: ManualClock) -> None:
    async with told(Job(), listener, clock, watchdog=None):
        await clock.advance(1_000)
        assert [list(one) for one in listener.heard()] == [["READY", "STATUS"]]


async def test_work_that_is_not_tried_any_more_stops_the_beats_though_the_loop_turns(
    listener: Listener, clock: ManualClock
) -> None:
    """A heartbeat that waits for ever for a lock, for example: everything else in this process is well."""
    job, log = Job(), list[str]()
    job.tries = {"rank 0's heartbeat": 0, "rank 1's heartbeat": 0}
    sink = logger.add(log.append, format="{message}")
    async with told(job, listener, clock):
        for _ in range(60):
            job.tries["rank 0's heartbeat"] += 1
            await clock.advance(1)
        assert listener.beats() >= 6
        for _ in range(600):
            job.tries["rank 0's heartbeat"] += 1
            await clock.advance(1)
        assert listener.beats() <= 1
        complaints = [line for line in log if "no beat" in line]
        assert complaints == ["no beat is sent to the service manager: not tried for 60 s: rank 1's heartbeat\n"], (
            "said once"
        )
        job.tries["rank 1's heartbeat"] += 1
        await clock.advance(WATCHDOG)
        assert listener.beats() == 3, "it goes on if the work does"
    logger.remove(sink)


async def test_a_planner_without_any_instance_has_nothing_to_try_and_beats(
    listener: Listener, clock: ManualClock
) -> None:
    job = Job()
    job.tries = {}
    async with told(job, listener, clock):
        await clock.advance(2 * WATCHDOG)
        assert listener.beats() == 7


async def test_a_part_that_comes_back_is_given_its_time_again() -> None:
    pulse = Pulse(patience=10)
    assert pulse.hung({"a look at demo": 5}, now=0) == []
    assert pulse.hung({"a look at demo": 5}, now=11) == ["a look at demo"]
    assert pulse.hung({}, now=12) == [], "it was stopped"
    assert pulse.hung({"a look at demo": 5}, now=13) == [], "it was launched anew"


async def test_a_loop_that_hangs_sends_nothing(listener: Listener, clock: ManualClock) -> None:
    """All that is sent is sent by the event loop itself: no thread, no timer of the kernel's."""
    job = Job()
    async with told(job, listener, clock):
        listener.heard()
        job.go_on()
        clock.jump(100 * WATCHDOG)  # time passes, and this loop does not turn
        assert listener.heard() == []


async def test_a_manager_that_is_gone_or_does_not_read_harms_nobody(listener: Listener, clock: ManualClock) -> None:
    job, log = Job(), list[str]()
    sink = logger.add(log.append, format="{message}")
    async with told(job, listener, clock):
        for _ in range(1_000):  # more than a socket takes
            job.go_on()
            await clock.advance(WATCHDOG / 3)
        assert len([line for line in log if "cannot be reached" in line]) == 1
        assert listener.beats() > 0
        job.go_on()
        await clock.advance(WATCHDOG)
        assert listener.beats() == 3, "what it reads again comes again"
        os.unlink(listener.address)
        await clock.advance(WATCHDOG)
    logger.remove(sink)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has an abstract namespace")
async def test_a_name_in_the_abstract_namespace_is_an_address_too(clock: ManualClock) -> None:
    listener = Listener(f"@rankgate-test-{os.getpid()}")
    async with told(Job(), listener, clock):
        assert listener.heard()[0]["READY"] == "1"
    listener.close()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
async def test_the_environment_says_who_waits_for_beats_and_for_how_long(
    listener: Listener, environment: dict[str, str], seconds: float | None
) -> None:
    environment |= {"NOTIFY_SOCKET": listener.address, "HOME": "/"}
    manager = ServiceManager.of(environment)
    assert manager is not None
    assert manager.watchdog_seconds == seconds
    assert environment == {"HOME": "/"}, "an engine must not inherit the right to speak for its runner"
    manager.close()


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
async def test_without_a_manager_there_is_nothing_to_tell(environment: dict[str, str]) -> None:
    assert ServiceManager.of(environment) is None


async def test_a_status_is_one_short_line(listener: Listener, clock: ManualClock) -> None:
    job = Job()
    job.status = "demo: waiting\nREADY=0\n" + "x" * 10_000
    async with told(job, listener, clock):
        first, _ = listener.heard()
    assert first["STATUS"].startswith("demo: waiting READY=0 xxx")
    assert len(first["STATUS"]) <= 200


async def test_ranks_and_planners_count_their_tries_also_while_the_store_does_not_answer(
    store: FakeStore, clock: ManualClock
) -> None:
    """To be restarted for the store's sake would only lose what is loaded."""
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        await made.run(planner.launch(made.spec))
        members = [made.ranks[rank].member for rank in (0, 1)]

        async def tries_in(seconds: float) -> list[int]:
            before = [*(member.beats for member in members), planner.looks["demo"]]
            await clock.advance(seconds)
            after = [*(member.beats for member in members), planner.looks["demo"]]
            return [one - other for one, other in zip(after, before, strict=True)]

        patience = 2 * members[0].settings.lease
        assert min(await tries_in(patience)) > 0
        store.partition()
        assert min(await tries_in(patience)) > 0
        assert min(await tries_in(patience)) > 0
        store.heal()
        await clock.advance(20)
        assert planner.instances["demo"].serving


async def test_an_instance_that_is_over_is_not_looked_at_and_not_missed(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        assert list(planner.looks) == ["demo"]
        await made.run(instance.stop())
        assert planner.looks == {}
