"""``rankgate launch`` of an instance that is up with another spec: what is different is shown, and nothing is replaced unasked."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from loguru import logger

from barrier import Barrier, Member, Opened, Settings, Store, StoreRefused, adopt
from barrier.testing import FakeStore
from planner import InstanceFailed
from planner.cli import commands, look, process
from planner.cli.commands import ChangeRefused, Observer, launch_agreed, launch_unless_known
from planner.cli.look import Target
from planner.registry import InstanceRecord, OtherSpec
from planner.spec import InstanceSpec
from runner.messages import ModelSpec

pytestmark = pytest.mark.anyio

SPEC = InstanceSpec(name="demo", world_size=2, model=ModelSpec(model_id="llama", total_layers=16))
TYPO = SPEC.model_copy(update={"world_size": 20})
BIGGER = InstanceSpec(name="demo", world_size=4, model=ModelSpec(model_id="llama", total_layers=32))


@pytest.fixture
async def observer(store: FakeStore) -> AsyncGenerator[Observer]:
    """On an instance of which an attempt goes on."""
    async with Observer(adopt(store.client()), "rankgate") as made:
        await made.registry.launch(SPEC)
        yield made


async def begin(store: FakeStore, spec: InstanceSpec) -> None:
    """Open an attempt of a spec, as a planner does."""
    members = [Member(store.client(), spec.name, rank=rank) for rank in range(spec.world_size)]
    for member in members:
        await member.claim()
    async with Barrier(store.client(), spec.name) as barrier:
        assert isinstance(await barrier.open(spec.world_size, digest=spec.digest, timeout=5), Opened)
    for member in members:
        await member.close()


async def on_record(observer: Observer) -> InstanceRecord:
    found = await observer.registry.get("demo")
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def nobody_sits_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "can_ask", lambda: False)


def somebody_says(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[str]:
    questions: list[str] = []

    async def agrees(question: str) -> bool:
        questions.append(question)
        return answer

    monkeypatch.setattr(commands, "can_ask", lambda: True)
    monkeypatch.setattr(commands, "agrees", agrees)
    return questions


# --- what is different ----------------------------------------------------------------------------------------------------


def test_every_field_that_differs_is_named_with_both_values() -> None:
    assert SPEC.changes_to(SPEC) == []
    assert SPEC.changes_to(TYPO) == [("world_size", "2", "20")]
    other = InstanceSpec(name="demo", world_size=4, model=ModelSpec(model_id="a\x1b[2Jb", total_layers=32))
    assert SPEC.changes_to(other) == [
        ("world_size", "2", "4"),
        ("model.model_id", "'llama'", "'a\\x1b[2Jb'"),
        ("model.total_layers", "16", "32"),
    ]


# --- asking ---------------------------------------------------------------------------------------------------------------


async def test_without_a_terminal_a_change_is_refused_with_the_way_out(store: FakeStore, observer: Observer) -> None:
    await begin(store, SPEC)
    before = await on_record(observer)
    with pytest.raises(ChangeRefused) as refused:
        await launch_agreed(observer, TYPO, yes=False)
    assert str(refused.value) == (
        "demo is up with another spec (world_size 2 -> 20), and nothing was changed: a launch would end attempt 1 for all ranks. "
        "Pass --yes to replace it, or choose another name"
    )
    assert await on_record(observer) == before


async def test_the_same_spec_is_no_change(store: FakeStore, observer: Observer) -> None:
    await begin(store, SPEC)
    before = await on_record(observer)
    await launch_agreed(observer, SPEC, yes=False)
    assert await on_record(observer) == before


async def test_with_yes_it_is_replaced_and_shown(
    store: FakeStore, observer: Observer, capsys: pytest.CaptureFixture[str]
) -> None:
    await begin(store, SPEC)
    await launch_agreed(observer, BIGGER, yes=True)
    assert (await on_record(observer)).spec == BIGGER
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "demo is up with another spec (before connect, attempt 1, 2 ranks):",
        "  world_size          2 -> 4",
        "  model.total_layers  16 -> 32",
    ]


@pytest.mark.parametrize("answer", [True, False])
async def test_on_a_terminal_it_asks(
    store: FakeStore, observer: Observer, monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    await begin(store, SPEC)
    questions = somebody_says(monkeypatch, answer)
    if answer:
        await launch_agreed(observer, BIGGER, yes=False)
    else:
        with pytest.raises(ChangeRefused, match="demo stays as it is: nothing was changed"):
            await launch_agreed(observer, BIGGER, yes=False)
    assert questions == ["End attempt 1 for all ranks, and load again?"]
    assert (await on_record(observer)).spec == (BIGGER if answer else SPEC)


async def test_a_typo_of_which_no_attempt_ever_began_is_corrected_without_a_question(
    observer: Observer, capsys: pytest.CaptureFixture[str]
) -> None:
    await observer.registry.launch(TYPO)
    capsys.readouterr()
    await launch_agreed(observer, SPEC, yes=False)
    assert (await on_record(observer)).spec == SPEC
    assert "  world_size  20 -> 2\n" in capsys.readouterr().err


async def test_what_is_stopped_or_given_up_is_launched_without_a_question(store: FakeStore, observer: Observer) -> None:
    await begin(store, SPEC)
    await observer.registry.give_up(await on_record(observer), "rank 1 is broken")
    await launch_agreed(observer, BIGGER, yes=False)
    assert (await on_record(observer)).failure == ""
    await observer.registry.stop(await on_record(observer))
    await launch_agreed(observer, SPEC, yes=False)
    assert (await on_record(observer)).desired == "up"


async def test_agreed_is_what_was_shown_and_not_what_somebody_else_launches_meanwhile(
    store: FakeStore, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(store, SPEC)
    third = SPEC.model_copy(update={"world_size": 3})
    questions: list[str] = []

    async def agrees(question: str) -> bool:
        questions.append(question)
        if len(questions) == 1:
            await observer.registry.launch(third)
        return True

    monkeypatch.setattr(commands, "can_ask", lambda: True)
    monkeypatch.setattr(commands, "agrees", agrees)
    with pytest.raises(OtherSpec):
        await observer.registry.launch(BIGGER, over=[TYPO])
    await launch_agreed(observer, BIGGER, yes=False)
    assert (await on_record(observer)).spec == BIGGER
    assert len(questions) == 1, "of the third one no attempt began, so that it was only told"


@pytest.mark.parametrize(
    ("typed", "agreed"),
    [(b"y\n", True), (b"YES\n", True), (b"\n", False), (b"no\n", False), (b"yep\n", False), (b"", False)],
)
async def test_only_yes_is_yes(typed: bytes, agreed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, typed)
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert await process.agrees("Really?") is agreed


# --- the planner's own file -----------------------------------------------------------------------------------------------


async def test_a_planner_with_another_file_takes_nothing_down(observer: Observer) -> None:
    """Two planners with different files would take it down in turns."""
    said: list[str] = []
    sink = logger.add(lambda line: said.append(str(line)), format="{message}")
    try:
        await launch_unless_known(observer.registry, BIGGER)
    finally:
        logger.remove(sink)
    assert (await on_record(observer)).spec == SPEC
    assert said[0].startswith(
        "demo is up with another spec (world_size 2 -> 4; model.total_layers 16 -> 32): it stays as it is."
    )


def test_scripts_that_mean_it_say_so() -> None:
    script = (Path(__file__).parents[3] / "deploy" / "rolling-update.sh").read_text()
    assert "rankgate launch --yes --file" in script


# --- where no planner runs ------------------------------------------------------------------------------------------------

ALONE = "no planner looks after it: start one with rankgate planner"


@pytest.fixture
def target(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> Target:
    @asynccontextmanager
    async def connected(_: Target) -> AsyncGenerator[Store]:
        yield adopt(store.client())

    monkeypatch.setattr(Target, "store", connected)
    return Target(url="redis://nowhere", namespace="rankgate", settings=Settings())


async def test_a_launch_that_does_not_wait_says_that_no_planner_looks_after_it(
    target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await commands.launch(target, SPEC, wait=False, seconds=1) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"; {ALONE}")


async def test_a_launch_that_waits_says_so_when_it_ends(target: Target) -> None:
    with pytest.raises(InstanceFailed, match=f"; {ALONE}$"):
        await commands.launch(target, SPEC, wait=True, seconds=0.01)


async def test_a_text_that_nobody_hands_out_is_refused(
    store: FakeStore, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(*_: object) -> None:
        pass

    monkeypatch.setattr(commands, "_nobody_plans_for", nobody)
    await begin(store, SPEC)
    await commands.launch(target, SPEC, wait=False, seconds=1)
    with pytest.raises(InstanceFailed, match=f"demo does not answer: {ALONE}$"):
        await commands.generate(target, "demo", "x", max_tokens=1, seconds=5)


# --- spares ---------------------------------------------------------------------------------------------------------------


async def test_who_may_not_see_the_spares_sees_everything_else(
    store: FakeStore, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user of an ACL file from before there were spares."""

    async def refused(*_: object) -> None:
        raise StoreRefused("no permission")

    monkeypatch.setattr(look, "read_spares", refused)
    await begin(store, SPEC)
    (seen,) = await observer.look_at_all()
    assert (seen.name, seen.spares, seen.surplus) == ("demo", (), ())
