"""A report on the wire: it comes back as it was said, it counts for nothing else, and any other bytes are refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from barrier import EpochId, InvalidName, Report, TaskOutcome
from barrier.protocol.report import MAX_OUTCOMES, MAX_REPORT_BYTES, SCHEMA, UndecodableReport

hexadecimal = st.binary(min_size=14, max_size=14).map(bytes.hex)
epochs = st.builds(EpochId, st.integers(0, 10**16 - 1), st.binary(min_size=16, max_size=16).map(bytes.hex))
statuses = st.from_regex(r"[A-Za-z][A-Za-z0-9]{0,31}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
outcomes = st.builds(
    TaskOutcome,
    task_id=st.text(st.characters(exclude_categories=["Cs"]), max_size=64),
    step=st.text(st.characters(exclude_categories=["Cs"]), max_size=64),
    n=st.integers(0, 10**10 - 1),
    result=st.sampled_from(["running", "done", "cancelled", "rejected", "failed"]),
    code=st.sampled_from(["", "NotYet", "Stale", "Invalid"]),
    detail=texts,
    retryable=st.booleans(),
)
reports = st.builds(
    Report,
    rank=st.integers(0, 16_383),
    incarnation=hexadecimal,
    status=statuses,
    epoch=st.none() | epochs,
    applied=st.integers(0, 10**10 - 1),
    floor=st.integers(0, 10**16 - 1),
    digest=st.sampled_from(["", "ab12", "f" * 64]),
    seq=st.integers(0, 10**9),
    node=texts,
    endpoint=texts,
    signs=st.integers(0, 10**9),
    pid=st.integers(0, 2**22),
    world_size=st.none() | st.integers(1, 16_384),
    lease_ms=st.integers(0, 10**6),
    status_ms=st.integers(0, 10**9),
    progress=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 99)),
    error=texts,
    permanent=st.booleans(),
    outcomes=st.lists(outcomes, max_size=MAX_OUTCOMES).map(tuple),
)
REPORT = Report(rank=3, incarnation="1" * 28, status="Connected", epoch=EpochId(7, "a" * 32), applied=2, floor=7)


@given(reports)
def test_a_report_comes_back_as_it_was_said(report: Report) -> None:
    assert Report.decode(report.encode(), report.rank) == report


@given(st.binary(max_size=300) | st.text().map(str.encode))
def test_any_bytes_are_a_report_or_are_refused_by_name(raw: bytes) -> None:
    try:
        report = Report.decode(raw, 3)
    except UndecodableReport as refusal:
        said = str(refusal)
    else:
        said = f"rank {report.rank}: it is one"
    assert said.startswith("rank 3: ")


@given(reports, st.data())
def test_a_damaged_report_is_a_report_or_is_refused_by_name(report: Report, data: st.DataObject) -> None:
    raw = bytearray(report.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = Report.decode(bytes(raw[: data.draw(st.integers(0, len(raw)))]), report.rank)
    except UndecodableReport:
        return
    assert Report.decode(decoded.encode(), report.rank) == decoded


def _counted(epoch: EpochId | None, status: str, applied: int, incarnation: str) -> bytes:
    """What a report begins with that a script counts."""
    return f"{SCHEMA}|{epoch}|{status}|{applied:010d}|{incarnation}|".encode()


@given(reports, epochs, hexadecimal, statuses)
def test_a_report_counts_for_no_other_epoch_incarnation_or_status(
    report: Report, epoch: EpochId, incarnation: str, status: str
) -> None:
    """The scripts compare exactly this prefix."""
    wanted = _counted(epoch, status, report.applied, incarnation)
    same = (report.epoch, report.incarnation, report.status) == (epoch, incarnation, status)
    assert report.encode().startswith(wanted) == same


@given(reports.filter(lambda report: report.epoch is not None))
def test_a_report_counts_for_its_own_epoch_incarnation_and_status_only(report: Report) -> None:
    assert report.epoch is not None
    epoch, incarnation, status = report.epoch, report.incarnation, report.status
    raw = report.encode()
    assert raw.startswith(_counted(epoch, status, report.applied, incarnation))
    neighbours = [
        (EpochId(epoch.number + 1, epoch.nonce), incarnation, status),
        (EpochId(epoch.number // 10, epoch.nonce), incarnation, status) if epoch.number >= 10 else None,
        (EpochId(epoch.number, epoch.nonce[::-1]), incarnation, status) if epoch.nonce != epoch.nonce[::-1] else None,
        (epoch, incarnation, status[:-1]) if len(status) > 1 else None,
        (epoch, incarnation, status + "s"),
        (epoch, incarnation, status.swapcase()) if status.swapcase() != status else None,
    ]
    for other in neighbours:
        if other is not None:
            other_epoch, other_incarnation, other_status = other
            assert not raw.startswith(_counted(other_epoch, other_status, report.applied, other_incarnation))


def test_the_header_is_as_the_scripts_read_it() -> None:
    assert REPORT.header == f"2|7-{'a' * 32}|Connected|0000000002|{'1' * 28}|0000000000000007|-|"
    assert REPORT._replace(epoch=None, digest="ab").header == (
        f"2|-|Connected|0000000002|{'1' * 28}|0000000000000007|ab|"
    )


def test_a_status_that_would_break_the_header_cannot_be_written() -> None:
    with pytest.raises(InvalidName, match="is not a status name"):
        REPORT._replace(status="Idle|Connected").encode()


def test_texts_are_cut_to_what_a_report_may_hold() -> None:
    long = REPORT._replace(node="n" * 1_000, endpoint="a" * 1_000, error="e" * 10_000)
    read = Report.decode(long.encode(), 3)
    assert (len(read.node), len(read.endpoint), len(read.error)) == (255, 300, 2_000)


def test_only_the_last_outcomes_are_carried() -> None:
    many = tuple(TaskOutcome(task_id=str(n), step="load", n=n, result="done") for n in range(MAX_OUTCOMES + 3))
    read = Report.decode(REPORT._replace(outcomes=many).encode(), 3)
    assert read.outcomes == many[3:]


@pytest.mark.parametrize("worst", ["a", "\N{GRINNING FACE}", "\0"])
def test_the_largest_report_that_can_be_written_can_be_read(worst: str) -> None:
    """A character takes up to four bytes in UTF-8, and six where JSON escapes it."""
    outcome = TaskOutcome(
        task_id=worst * 128, step=worst * 96, n=10**9, result="rejected", code=worst * 64, detail=worst * 2_000
    )
    report = REPORT._replace(
        node=worst * 255, endpoint=worst * 300, error=worst * 2_000, outcomes=(outcome,) * MAX_OUTCOMES
    )
    raw = report.encode()
    assert len(raw) <= MAX_REPORT_BYTES
    assert Report.decode(raw, 3).status == report.status


def test_half_a_surrogate_pair_costs_one_character_and_not_the_report() -> None:
    """Python reads file names and other processes' words that are not UTF-8 into such halves."""
    read = Report.decode(REPORT._replace(node="n\udc80", error="no such file: \udcff.bin").encode(), 3)
    assert (read.node, read.error) == ("n?", "no such file: ?.bin")
    assert read.outcomes == REPORT.outcomes


def test_long_sentences_do_not_push_the_outcomes_out() -> None:
    long = tuple(
        TaskOutcome(task_id=str(n), step="load", n=n, result="rejected", code="NotYet", detail="d" * 2_000)
        for n in range(MAX_OUTCOMES)
    )
    read = Report.decode(REPORT._replace(outcomes=long).encode(), 3)
    assert [one.task_id for one in read.outcomes] == [one.task_id for one in long]
    assert {one.code for one in read.outcomes} == {"NotYet"}


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "not a report"),
        (b"hello", "not a report"),
        (b"\xff|" * 8, "not a report"),
        (b"1" + REPORT.encode()[1:], "schema '1'; this version reads 2"),
        (REPORT.encode().replace(b"1" * 28, b"1" * 27), "malformed header"),
        (REPORT.encode().replace(b"1" * 28, b"G" * 28), "malformed header"),
        (REPORT.encode().replace(b"0000000002", b"2"), "malformed header"),
        (REPORT.encode().replace(b"|-|{", b"|xyz|{"), "malformed digest"),
        (REPORT.encode().replace(b"|Connected|", b"|Con nected|"), "malformed report"),
        (REPORT.encode().replace(b"|7-a", b"|x-a"), "malformed report"),
        (REPORT.encode()[:-1], "malformed report"),
        (REPORT.encode() + b"}", "malformed report"),
        (REPORT.encode().replace(b'"rank":3', b'"rank":"a"'), "malformed report"),
        (REPORT.encode().replace(b'"rank":3', b'"rank":4'), "the report says rank 4"),
        (REPORT.encode() + b" " * MAX_REPORT_BYTES, "16,384 are read"),
        (REPORT.encode().replace(b"0000000002", "٠".encode() * 10), "malformed header"),
    ],
)
def test_what_is_not_a_report_is_refused_with_the_reason(raw: bytes, what: str) -> None:
    with pytest.raises(UndecodableReport) as refusal:
        Report.decode(raw, 3)
    assert what in str(refusal.value)


def test_fields_of_a_later_version_are_passed_over() -> None:
    raw = REPORT.encode().replace(b'"rank":3', b'"rank":3,"colour":"green"')
    assert Report.decode(raw, 3) == REPORT


def test_an_outcome_has_limits() -> None:
    with pytest.raises(ValidationError):
        TaskOutcome(task_id="t" * 129, step="load", n=0, result="done")
    with pytest.raises(ValidationError):
        TaskOutcome(task_id="t", step="load", n=-1, result="done")
