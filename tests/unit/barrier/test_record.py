"""What one rank reads of the epoch's record, field by field."""

from __future__ import annotations

import pytest

from barrier import EpochId, Verdict
from barrier.protocol.record import (
    SeenRecord,
    endpoint_fields,
    promise_fields,
    read_endpoints,
    read_for_promise,
    read_look,
)

MINE, OTHER = "0" * 27 + "1", "0" * 27 + "2"
NONCE, TWIN = "a" * 32, "b" * 32
EPOCH = EpochId(5, NONCE)
VERDICT = Verdict.aborted("because")


NO_RECORDS = {
    "nothing": (None, None),
    "half of it": (b"5", None),
    "the other half": (None, NONCE.encode()),
    "no number": (b"five", NONCE.encode()),
    "a number as nobody writes it": (b"05", NONCE.encode()),
    "no nonce": (b"5", b"x"),
    "no text": (b"5", b"\xff" * 32),
}


@pytest.mark.parametrize(("number", "nonce"), NO_RECORDS.values(), ids=NO_RECORDS)
def test_what_is_no_record_of_ours_counts_as_missing(number: bytes | None, nonce: bytes | None) -> None:
    assert read_look((number, nonce, None)) is None
    assert read_for_promise((number, nonce, None, b"3", MINE.encode(), b"1", None), 0) is None
    assert read_endpoints((number, nonce, b"a:1"), EPOCH, 1) is None


def test_a_look_reads_the_epoch_and_its_verdict() -> None:
    assert read_look((b"5", NONCE.encode(), None)) == SeenRecord(EPOCH)
    assert read_look((b"5", NONCE.encode(), VERDICT.model_dump_json().encode())) == SeenRecord(EPOCH, VERDICT)


def test_a_verdict_that_cannot_be_read_ends_the_epoch_all_the_same() -> None:
    seen = read_look((b"5", NONCE.encode(), b"\xff{"))
    assert seen is not None
    assert seen.verdict == Verdict.aborted("the stored verdict could not be read")


ROSTER = (OTHER + MINE).encode()
READ = {
    "rank 0": (0, b"3", ROSTER, b"2", (3, OTHER, 2)),
    "rank 1": (1, b"3", ROSTER, b"2", (3, MINE, 2)),
    "a rank beyond it": (2, b"3", ROSTER, b"2", (3, "", 2)),
    "the second rank of a later piece": (65, b"66", ROSTER, b"2", (66, MINE, 2)),
    "no size": (1, None, ROSTER, b"2", (None, MINE, 2)),
    "a size that is none": (1, b"-3", ROSTER, b"2", (None, MINE, 2)),
    "no roster": (1, b"3", None, b"2", (3, "", 2)),
    "no ordinal": (1, b"3", ROSTER, None, (3, MINE, None)),
    "an ordinal that is none": (1, b"3", ROSTER, b"x" * 30, (3, MINE, None)),
    "an ordinal too long for one": (1, b"3", ROSTER, b"9" * 5_000, (3, MINE, None)),
}


@pytest.mark.parametrize(("rank", "size", "roster", "ordinal", "read"), READ.values(), ids=READ)
def test_a_promise_reads_who_is_on_the_roster(
    rank: int, size: bytes | None, roster: bytes | None, ordinal: bytes | None, read: tuple[int | None, str, int | None]
) -> None:
    seen = read_for_promise((b"5", NONCE.encode(), None, size, roster, ordinal, None), rank)
    assert seen == SeenRecord(EPOCH, None, *read)


@pytest.mark.parametrize(("rank", "piece"), [(0, 0), (63, 0), (64, 1), (4_095, 63)])
def test_a_promise_reads_one_piece_of_the_roster(rank: int, piece: int) -> None:
    assert promise_fields(rank) == ("number", "nonce", "verdict", "world_size", f"roster:{piece}", "ordinal", "wire")


@pytest.mark.parametrize(("size", "pieces"), [(1, 1), (64, 1), (65, 2)])
def test_the_endpoints_are_in_so_many_pieces(size: int, pieces: int) -> None:
    assert endpoint_fields(size) == ("number", "nonce", *(f"endpoints:{piece}" for piece in range(pieces)))


ENDPOINTS = {
    "all": ((b"5", NONCE.encode(), b"a:1\n\nc:3", b"d:4"), EPOCH, 4, ("a:1", "", "c:3", "d:4")),
    "one piece is missing": ((b"5", NONCE.encode(), b"a:1", None), EPOCH, 2, None),
    "for other numbers of ranks": ((b"5", NONCE.encode(), b"a:1\nb:2"), EPOCH, 3, None),
    "of another epoch": ((b"6", NONCE.encode(), b"a:1"), EPOCH, 1, None),
    "of its twin": ((b"5", TWIN.encode(), b"a:1"), EPOCH, 1, None),
    "in no epoch": ((b"5", NONCE.encode(), b"a:1"), None, 1, None),
}


@pytest.mark.parametrize(("found", "promised", "size", "endpoints"), ENDPOINTS.values(), ids=ENDPOINTS)
def test_the_endpoints_of_the_promised_epoch(
    found: tuple[bytes | None, ...], promised: EpochId | None, size: int, endpoints: tuple[str, ...] | None
) -> None:
    assert read_endpoints(found, promised, size) == endpoints


@pytest.mark.parametrize(
    ("wire", "refusal"),
    [
        (None, ""),
        (b"1", ""),
        (b"7", "has wire version 7, and this version of rankgate reads 1"),
        (b"-1", "has a wire version that is not a number"),
        (b"9" * 5_000, "has a wire version that is not a number"),
        ("²".encode(), "has a wire version that is not a number"),
    ],
)
def test_the_records_version_is_read_for_a_promise(wire: bytes | None, refusal: str) -> None:
    seen = read_for_promise((b"5", NONCE.encode(), None, b"1", MINE.encode(), b"1", wire), 0)
    assert seen is not None
    assert seen.refusal.startswith(refusal)
    assert bool(seen.refusal) == bool(refusal)
