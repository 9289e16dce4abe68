"""Random histories against the reference and a store side by side: in memory, Valkey and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from barrier import Settings, Store, adopt, connect
from barrier.protocol.outcomes import Dispatched, Opened
from barrier.testing import FakeStore, ManualClock
from barrier.testing.conformance import NONCES, REQUIREMENTS, WORLD_SIZE, Call, Twins
from tests.integration.servers import Kind, RealServer

RANKS = st.sampled_from((None, None, 0, 1))
MOSTLY_NOW = st.sampled_from((0, 0, 0, 0, 0, 0, 1, 2))
SMALL = st.sampled_from((0, 0, 0, 1, 2, 3, 2**43))
STATUSES = st.sampled_from(("Idle", "Connected"))
DIGESTS = st.sampled_from(("", "", "", "", "cafe"))

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Histories(RuleBasedStateMachine):
    """Every rule is one call on both; the arguments are often, but not always, the right ones."""

    def __init__(self, run: Run, store: Store) -> None:
        super().__init__()
        self._run = run
        self.twins = Twins(store)
        self.opened = False
        self.dispatched = False

    def _call(self, *arguments: Any, **named: Any) -> Any:
        return self._run(self.twins.call(Call(*arguments, **named)))

    @rule(rank=RANKS, status=STATUSES, bound=st.booleans(), life=MOSTLY_NOW, epoch=MOSTLY_NOW, n=SMALL, digest=DIGESTS)
    def say(self, life: int, n: int, bound: bool, **arguments: Any) -> None:
        place = min(n, 4) if bound else n  # in an epoch it is a place in the log, otherwise a floor
        self._call("say", life=min(life, 1), n=place, bound=bound, **arguments)

    @rule(status=STATUSES)
    def arrive(self, status: str) -> None:
        self._call("say", status=status, bound=True)

    @rule(holder=st.sampled_from("aaab"), n=SMALL)
    def lead(self, **arguments: Any) -> None:
        self._call("lead", **arguments)

    @rule(kind=st.sampled_from(("resign", "unlead", "lapse", "flush", "forget")), rank=RANKS)
    def lose(self, kind: Any, rank: int | None) -> None:
        self._call(kind, rank=rank)

    @rule(nonce=st.integers(0, len(NONCES) - 1), n=SMALL, digest=DIGESTS, term=MOSTLY_NOW)
    def open(self, **arguments: Any) -> None:
        self.opened |= isinstance(self._call("open", **arguments), Opened)

    @rule(nonce=st.integers(0, len(NONCES) - 1), depth=st.integers(0, 3))
    def begin(self, nonce: int, depth: int) -> None:
        """The way in that random calls seldom find, or a part of it."""
        self._call("say")
        self._call("lead")
        self._call("conclude")
        self.opened |= isinstance(self._call("open", nonce=nonce), Opened)
        if depth > 0:
            self._call("say", status="Connected", bound=True)
        for step in ("connect", "load")[: max(depth - 1, 0)]:
            self.dispatched |= isinstance(self._call("dispatch", step=step), Dispatched)

    @rule(epoch=MOSTLY_NOW, term=MOSTLY_NOW, status=STATUSES, n=SMALL, digest=DIGESTS)
    def restore(self, **arguments: Any) -> None:
        self._call("restore", **arguments)

    @rule(epoch=MOSTLY_NOW, needs=st.sampled_from(REQUIREMENTS))
    def check(self, **arguments: Any) -> None:
        self._call("check", **arguments)

    @precondition(lambda self: self.opened)
    @rule(
        epoch=MOSTLY_NOW,
        term=MOSTLY_NOW,
        needs=st.sampled_from(REQUIREMENTS),
        step=st.sampled_from(("connect", "load")),
        after=st.sampled_from(("", "", "connect")),
        attempt=st.sampled_from((1, 1, 2)),
        repeatable=st.booleans(),
        n=st.integers(0, 4),
    )
    def dispatch(self, **arguments: Any) -> None:
        self.dispatched |= isinstance(self._call("dispatch", **arguments), Dispatched)

    @precondition(lambda self: self.opened)
    @rule(epoch=MOSTLY_NOW, term=MOSTLY_NOW, rank=st.integers(0, WORLD_SIZE - 1), n=st.integers(0, 4))
    def conclude(self, **arguments: Any) -> None:
        self._call("conclude", **arguments)

    def teardown(self) -> None:
        self._run(self.twins.clean())


def play(make: Callable[[], Coroutine[Any, Any, Store]], examples: int, steps: int) -> tuple[int, int]:
    """Play many histories on one store; how many opened an epoch, and how many dispatched."""
    opened = dispatched = 0
    with asyncio.Runner() as runner:
        store = runner.run(make())

        class Counted(Histories):
            def __init__(self) -> None:
                super().__init__(runner.run, store)

            def teardown(self) -> None:
                nonlocal opened, dispatched
                opened += self.opened
                dispatched += self.dispatched
                super().teardown()

        try:
            run_state_machine_as_test(
                Counted,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=steps,
                    deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                ),
            )
        finally:
            runner.run(store.close())
    return opened, dispatched


def play_on_server(kind: Kind, examples: int, steps: int) -> tuple[int, int]:
    with asyncio.Runner() as runner:
        server = RealServer(kind=kind)
        runner.run(server.__aenter__())
        try:
            return play(lambda: connect(server.url, settings=Settings()), examples, steps)
        finally:
            runner.run(server.__aexit__(None, None, None))


async def in_memory() -> Store:
    return adopt(FakeStore(ManualClock()).client())


def play_until_deep(play_some: Callable[[], tuple[int, int]]) -> None:
    """What chance draws is not always deep: play more, until some histories have opened an epoch and one has dispatched."""
    opened = dispatched = 0
    for _ in range(10):
        more_opened, more_dispatched = play_some()
        opened, dispatched = opened + more_opened, dispatched + more_dispatched
        if opened > 5 and dispatched:
            return
    raise AssertionError(
        f"in ten rounds only {opened} opened an epoch and {dispatched} dispatched: the rules draw nothing"
    )


def test_random_histories_in_memory() -> None:
    play_until_deep(lambda: play(in_memory, 25, 20))


def test_random_histories_on_valkey() -> None:
    play_until_deep(lambda: play_on_server("valkey", 25, 20))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["valkey", pytest.param("redis", marks=pytest.mark.redis)])
def test_many_random_histories_on_real_servers(kind: Kind) -> None:
    play_until_deep(lambda: play_on_server(kind, 200, 30))
