"""How long two ranks with MLX engines are away when one engine's process is killed, and with what: `make bench-mlx`.

The store is a fake one in this process, and planner and runners share its event loop: what is measured is the engines. Medians are told,
since a machine that does other work as well makes single times worthless.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from barrier.testing import wait_until
from planner import InstanceSpec, Planner, Policy
from runner import Runner
from runner.messages import ModelSpec
from runner.session import Session
from tests.mlx.ranks import Ranks, ranks_of
from tests.mlx.tiny import LAYERS, make_model, reference_text

pytestmark = [pytest.mark.bench, pytest.mark.mlx, pytest.mark.anyio]

TRIALS = 7
PROMPT, TOKENS = "word17 word4 word8", 8
TIRELESS = Policy(backoff_base=0.001, backoff_cap=0.001, max_failures=10**6)
SECONDS = 180.0
PHASES = {
    "notice": "kill to Failed",
    "teardown": "to all ranks out of the attempt",
    "prepare": "to the first Connecting: the new attempt, and engines that are ready for it",
    "connect": "to all Connected",
    "load": "to all Loaded",
    "warm-up": "to all Ready",
}


@dataclass
class Watch:
    """Every status of every runner, and when it was taken on."""

    seen: list[tuple[float, int, str]]

    def first(self, kind: str, since: float) -> float:
        return min(when for when, _, said in self.seen if said == kind and when >= since)

    def by_all(self, kind: str, since: float) -> float:
        """When the last rank first said it."""
        firsts: dict[int, float] = {}
        for when, runner, said in self.seen:
            if said == kind and when >= since:
                firsts.setdefault(runner, when)
        assert len(firsts) == 2, (kind, firsts)
        return max(firsts.values())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch([])

    def take_on(runner: Runner, session: Session) -> None:
        before: Session | None = vars(runner).get("session now")
        vars(runner)["session now"] = session
        if before is None or session.status is not before.status:
            made.seen.append((time.monotonic(), id(runner), session.status.kind))

    def now(runner: Runner) -> Session:
        return vars(runner)["session now"]

    # The attribute, so that no status is missed, however short.
    monkeypatch.setattr(Runner, "_session", property(now, take_on), raising=False)
    return made


def spares_ready(ranks: Ranks) -> bool:
    """Whether every rank has its second engine, and that is prepared."""
    return all(
        host._spare is not None and host._preparing_spare.over  # pyright: ignore[reportPrivateUsage]
        for host in ranks.hosts
    )


@pytest.mark.parametrize("spares", [True, False], ids=["with spares", "without spares"])
async def test_recovery_from_a_killed_engine(tmp_path: Path, watch: Watch, spares: bool) -> None:
    folder = make_model(tmp_path / "tiny")
    expected = reference_text(folder, PROMPT, TOKENS)
    trials: list[dict[str, float]] = []
    async with (
        ranks_of(2, spares=spares) as ranks,
        Planner(ranks.store.client("planner"), policy=TIRELESS, rng=random.Random(1)) as planner,
    ):
        model = ModelSpec(model_id=str(folder), total_layers=LAYERS)
        instance = await planner.launch(InstanceSpec(name=ranks.name, world_size=2, model=model))
        for trial in range(TRIALS):
            if spares:
                await wait_until(lambda: spares_ready(ranks), "the spares to be prepared", SECONDS)
            # A generation has just ended; its ranks are Running until they have said so.
            await wait_until(lambda: ranks.statuses == ["Ready"] * 2, "all ranks to be ready", SECONDS)
            pid = ranks.hosts[trial % 2].pid
            assert pid is not None
            killed = time.monotonic()
            psutil.Process(pid).kill()
            await wait_until(lambda killed=killed: watch.seen[-1][0] > killed, "the death to be noticed", SECONDS)
            await wait_until(lambda: ranks.statuses == ["Ready"] * 2, "the next attempt to be ready", SECONDS)
            trials.append(phases_of(watch, killed))
            assert "".join([piece async for piece in instance.generate(PROMPT, max_tokens=TOKENS)]) == expected
    print(f"\n\nOf {TRIALS} recoveries, {'with spares' if spares else 'without spares'}, in seconds:\n{table(trials)}")


def phases_of(watch: Watch, killed: float) -> dict[str, float]:
    failed = watch.first("Failed", killed)
    out = watch.by_all("Idle", killed)
    connecting = watch.first("Connecting", killed)
    connected = watch.by_all("Connected", killed)
    loaded = watch.by_all("Loaded", killed)
    ready = watch.by_all("Ready", connected)
    ends = [killed, failed, out, connecting, connected, loaded, ready]
    return {name: after - before for name, before, after in zip(PHASES, ends[:-1], ends[1:], strict=True)}


def table(trials: list[dict[str, float]]) -> str:
    rows = [(name, what, [trial[name] for trial in trials]) for name, what in PHASES.items()]
    rows.append(("all", "kill to all Ready", [sum(trial.values()) for trial in trials]))
    return "\n".join(
        f"  {name:9} median {statistics.median(times):7.3f}   least {min(times):7.3f}   most {max(times):7.3f}   {what}"
        for name, what, times in rows
    )
