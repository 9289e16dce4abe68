"""Every decision of one life of one rank, a line each: a state and what was read go in, the next state and what it means come out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from barrier import EpochAnnounced, EpochId, LogId, NotPromised, Promised, TaskEntry, Verdict, VerdictAnnounced
from barrier.protocol.rank_state import RankState
from barrier.protocol.record import SeenRecord
from barrier.protocol.report import MAX_APPLIED

MINE, OTHER = "0" * 27 + "1", "0" * 27 + "2"
NONCE, TWIN = "a" * 32, "b" * 32
EPOCH = EpochId(5, NONCE)
VERDICT = Verdict.aborted("because")

FRESH = RankState(MINE)
IN = RankState(MINE, promised=EPOCH, floor=5, applied=3, read_to=LogId(5, 4))
SPENT = IN.retire()
SEEN = SeenRecord(EPOCH, world_size=3, named=MINE)


def task(n: int, previous: int, epoch: EpochId = EPOCH) -> TaskEntry:
    return TaskEntry(epoch, LogId(epoch.number, n), previous, "load", first=0, last=2, term=1, payload=b"{}")


# --- the log --------------------------------------------------------------------------------------------------------------


TAKEN = {
    "the next": (IN, task(4, 3), 4, False),
    "the next, whose forerunner was no task": (IN, task(7, 2), 7, False),
    "the one before it never came": (IN, task(6, 5), 6, True),
    "the next but for a few that came": (IN, task(6, 3), 6, False),
    "the same number of another nonce": (IN, task(9, 8, EpochId(5, TWIN)), 3, False),
    "another epoch": (IN, task(2, 1, EpochId(6, NONCE)), 3, False),
    "in no epoch": (SPENT, task(4, 3), 0, False),
}


@pytest.mark.parametrize(("state", "entry", "applied", "missed"), TAKEN.values(), ids=TAKEN)
def test_a_task_comes_out(state: RankState, entry: TaskEntry, applied: int, missed: bool) -> None:
    assert state.take(entry) == (state._replace(applied=applied), replace(entry, missed=missed))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_task_that_was_taken_does_not_come_out_again(n: int) -> None:
    assert IN.take(task(n, n - 1)) == (IN, None)


def test_what_was_read_is_remembered_by_its_place_and_nothing_else() -> None:
    assert IN.read(LogId(6, 1)) == IN._replace(read_to=LogId(6, 1))


AHEAD = IN._replace(read_to=LogId(6, 9))
ENDS = {
    "it has grown": (IN, LogId(5, 9), LogId(5, 4), LogId(5, 4)),
    "it ends where it was read to": (IN, LogId(5, 4), LogId(5, 4), LogId(5, 4)),
    "it went back, and an entry came meanwhile": (IN, LogId(5, 2), LogId(5, 3), LogId(5, 4)),
    "it went back": (AHEAD, LogId(4, 1), LogId(6, 9), LogId(4, 1)),
    "it went back, but not behind what was taken": (AHEAD, LogId(6, 2), LogId(6, 9), LogId(5, 3)),
    "it is lost": (AHEAD, LogId(0, 0), LogId(6, 9), LogId(0, 0)),
    "it went back, and this rank is in no epoch": (AHEAD.retire(), LogId(6, 2), LogId(6, 9), LogId(5, MAX_APPLIED)),
    "it went back, and this rank was in none": (
        FRESH.read(LogId(6, 9)),
        LogId(6, 2),
        LogId(6, 9),
        LogId(0, MAX_APPLIED),
    ),
}


@pytest.mark.parametrize(("state", "end", "read_to", "then"), ENDS.values(), ids=ENDS)
def test_the_end_of_the_log(state: RankState, end: LogId, read_to: LogId, then: LogId) -> None:
    assert state.find_end(end, read_to) == state._replace(read_to=then)


# --- the record -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "number", "above"),
    [(FRESH, 1, True), (IN, 6, True), (IN, 5, False), (IN, 4, False), (SPENT, 6, True), (SPENT, 5, False)],
)
def test_an_epoch_is_above(state: RankState, number: int, above: bool) -> None:
    assert state.is_above(EpochId(number, TWIN)) is above


HEARD = {
    "no record": (IN, None, None),
    "the promised epoch goes on": (IN, SEEN, None),
    "the promised epoch is over": (IN, SEEN._replace(verdict=VERDICT), VerdictAnnounced(EPOCH, VERDICT)),
    "its twin is over": (IN, SEEN._replace(epoch=EpochId(5, TWIN), verdict=VERDICT), None),
    "another epoch is over": (IN, SEEN._replace(epoch=EpochId(6, NONCE), verdict=VERDICT), None),
    "the spent epoch is over": (SPENT, SEEN._replace(verdict=VERDICT), None),
    "the spent epoch goes on": (SPENT, SEEN, None),
    "a higher epoch": (IN, SEEN._replace(epoch=EpochId(6, NONCE)), EpochAnnounced(EpochId(6, NONCE))),
    "a lower epoch": (IN, SEEN._replace(epoch=EpochId(4, NONCE)), None),
    "the first epoch": (FRESH, SEEN, EpochAnnounced(EPOCH)),
}


@pytest.mark.parametrize(("state", "seen", "news"), HEARD.values(), ids=HEARD)
def test_what_the_record_says(state: RankState, seen: SeenRecord | None, news: object) -> None:
    assert state.hear(seen) == news


# --- promises -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [FRESH, FRESH._replace(floor=4), FRESH.read(LogId(5, 7))])
def test_a_promise_raises_the_floor_and_counts_the_announcement_as_taken(state: RankState) -> None:
    then = state._replace(promised=EPOCH, floor=5, applied=1)
    assert state.promise(EPOCH, SEEN, 2) == (then, Promised(EPOCH, 3))


REFUSED = {
    "promised": (IN, SEEN, 0, f"still in epoch {EPOCH}: retire from it first"),
    "no record": (FRESH, None, 0, "epoch 5 is not current any more"),
    "another nonce": (FRESH, SEEN._replace(epoch=EpochId(5, TWIN)), 0, "epoch 5 is not current any more"),
    "a higher one": (FRESH, SEEN._replace(epoch=EpochId(6, NONCE)), 0, "epoch 5 is not current any more"),
    "over": (FRESH, SEEN._replace(verdict=VERDICT), 0, "epoch 5 is concluded"),
    "another version": (
        FRESH,
        SEEN._replace(refusal="has wire version 7"),
        0,
        "the record of epoch 5 has wire version 7",
    ),
    "spent": (SPENT, SEEN, 0, "epoch 5 is not above 5, which was promised before"),
    "lower": (SPENT._replace(floor=9), SEEN, 0, "epoch 5 is not above 9, which was promised before"),
    "no size": (
        FRESH,
        SEEN._replace(world_size=None),
        0,
        "the roster of epoch 5 cannot be used: the record does not say how many ranks it is for",
    ),
    "surplus": (FRESH, SEEN, 3, "the roster of epoch 5 names nobody for rank 3: it has 3 ranks"),
    "nobody": (FRESH, SEEN._replace(named=""), 1, "the roster of epoch 5 names nobody for rank 1, not this process"),
    "replaced": (
        FRESH,
        SEEN._replace(named=OTHER),
        1,
        f"the roster of epoch 5 names {OTHER} for rank 1, not this process",
    ),
}


@pytest.mark.parametrize(("state", "seen", "rank", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_promise_is_refused_and_changes_nothing(
    state: RankState, seen: SeenRecord | None, rank: int, reason: str
) -> None:
    assert state.promise(EPOCH, seen, rank) == (state, NotPromised(reason))


def test_whoever_is_in_an_epoch_need_not_read_the_record_to_refuse() -> None:
    assert (FRESH.refuses_any(), SPENT.refuses_any()) == (None, None)
    assert IN.refuses_any() == NotPromised(f"still in epoch {EPOCH}: retire from it first")


@pytest.mark.parametrize("state", [IN, SPENT])
def test_a_promise_is_spent_and_its_number_stays(state: RankState) -> None:
    assert state.retire() == RankState(MINE, floor=5, read_to=LogId(5, 4))
