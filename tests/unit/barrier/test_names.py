"""What may be part of a key, and what epochs, log positions and incarnations look like."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barrier import EpochId, InvalidName, LogId
from barrier.protocol.ids import INCARNATION_WIDTH, new_incarnation, new_nonce
from barrier.protocol.names import MAX_WORLD_SIZE, shown, valid_status, valid_step, valid_world_size
from barrier.store.keys import Keys

HOSTILE = [
    "",
    "}",
    "{",
    "a}b",
    "{a}",
    "*",
    "a*",
    "a:b",
    "a b",
    "a\nb",
    "a\n",
    "\na",
    "a\x00",
    "Upper",
    "-a",
    "größe",
    "а",  # Cyrillic
    "１",  # a digit, in Unicode's opinion
    "..",
    "a/b",
    "a" * 64,
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("what", ["namespace", "group"])
def test_hostile_names_are_refused_with_the_value_and_what_may_be(what: str, name: str) -> None:
    names = {"namespace": "rankgate", "group": "demo"} | {what: name}
    with pytest.raises(InvalidName) as refusal:
        Keys(**names)
    assert str(refusal.value).startswith(f"{what} {shown(name)} is not a name: use 1 to 63 of a-z, 0-9 and '-'")
    assert "\n" not in str(refusal.value), "a hostile value must not break a log line"


@pytest.mark.parametrize("name", ["a", "0", "a-b", "a" * 63, "9-9-"])
def test_plain_names_are_taken(name: str) -> None:
    assert Keys(name, name).tag == f"{{{name}:{name}}}"


@given(st.text(), st.text())
def test_whatever_is_accepted_keeps_all_keys_of_a_group_in_one_slot_of_its_own(namespace: str, group: str) -> None:
    try:
        keys = Keys(namespace, group)
    except InvalidName:
        return
    tag = f"{{{namespace}:{group}}}"
    every = [keys.epoch, keys.leader, keys.tasks, keys.signals, keys.events, keys.rank(0), keys.claim(0)]
    assert all(key.startswith(tag) and key.count("{") == 1 and key.count("}") == 1 for key in every)


def test_no_two_keys_of_a_group_are_the_same() -> None:
    keys = Keys("rankgate", "demo")
    every = [
        keys.epoch, keys.leader, keys.tasks, keys.signals, keys.events, keys.rank(1), keys.rank(11), keys.claim(1),
        keys.out("load"), keys.once("load"),
    ]  # fmt: skip
    assert len(set(every)) == len(every)


def test_namespaces_and_groups_cannot_be_confused() -> None:
    assert Keys("a", "b-c").tag != Keys("a-b", "c").tag


def test_the_rank_keys_come_in_order() -> None:
    keys = Keys("rankgate", "demo")
    assert keys.ranks(3) == [keys.rank(0), keys.rank(1), keys.rank(2)]


@pytest.mark.parametrize("status", ["", "Not Ready", "Conn|ected", "Conn,ected", "1st", "Ünder", "a" * 33, "Idle\n"])
def test_a_status_that_could_break_the_header_is_refused(status: str) -> None:
    with pytest.raises(InvalidName, match="is not a status name: use 1 to 32 letters and digits"):
        valid_status(status)


def test_statuses_have_letters_and_digits() -> None:
    assert valid_status("WarmingUp2") == "WarmingUp2"


@pytest.mark.parametrize("step", ["", "}", "a,b", "a\nb", " a", ":a", "é", "a" * 97])
def test_a_step_that_could_break_a_key_or_a_list_is_refused(step: str) -> None:
    keys = Keys("rankgate", "demo")
    for use in (valid_step, keys.out, keys.once):
        with pytest.raises(InvalidName, match="is not a step name"):
            use(step)


@pytest.mark.parametrize("size", [0, -1, MAX_WORLD_SIZE + 1, True, False])
def test_impossible_world_sizes_are_refused_with_the_value_and_the_limit(size: Any) -> None:
    with pytest.raises(InvalidName) as refusal:
        valid_world_size(size)
    assert str(refusal.value) == f"world_size is {size!r}; it must be a whole number from 1 to 16,384"


@pytest.mark.parametrize("size", ["3", 3.0, None])
def test_a_world_size_that_is_no_whole_number_is_refused_clearly(size: Any) -> None:
    with pytest.raises(InvalidName, match="must be a whole number"):
        valid_world_size(size)


def test_a_long_hostile_value_is_cut_in_messages() -> None:
    assert len(shown("x" * 10_000)) < 100


# --- ids ----------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**16 - 1), st.binary(min_size=16, max_size=16))
def test_an_epoch_survives_the_wire(number: int, random: bytes) -> None:
    epoch = EpochId(number, random.hex())
    assert EpochId.parse(str(epoch)) == epoch


@given(st.text() | st.from_regex("[0-9]{1,17}-[0-9a-f]{31,33}"))
def test_anything_is_an_epoch_or_a_named_refusal(text: str) -> None:
    if re.fullmatch("[0-9]{1,16}-[0-9a-f]{32}", text):
        assert str(EpochId.parse(text)) == str(int(text.partition("-")[0])) + text[-33:]
        return
    with pytest.raises(InvalidName, match="is not an epoch"):
        EpochId.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1-",
        f"1-{'0' * 31}",
        f"1-{'0' * 33}",
        f"1-{'F' * 32}",
        f"-1-{'0' * 32}",
        f"1-{'0' * 32}\n",
        f"١-{'0' * 32}",
    ],
)
def test_almost_epochs_are_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        EpochId.parse(text)


def test_epochs_are_the_same_only_as_a_pair() -> None:
    assert EpochId(5, "a" * 32) != EpochId(5, "b" * 32)
    assert EpochId(5, "a" * 32) != EpochId(6, "a" * 32)


@given(st.integers(0, 10**16), st.integers(0, 10**16))
def test_a_log_id_survives_the_wire_and_sorts_by_epoch_first(number: int, n: int) -> None:
    assert LogId.parse(str(LogId(number, n))) == LogId(number, n)
    assert LogId(number, n) < LogId(number + 1, 0)
    assert LogId(number, n) < LogId(number, n + 1)


@given(st.text() | st.from_regex("[0-9]{1,21}-[0-9]{1,21}"))
def test_anything_is_a_log_id_or_a_named_refusal(text: str) -> None:
    if re.fullmatch("[0-9]{1,20}-[0-9]{1,20}", text):
        assert LogId.parse(text).n == int(text.partition("-")[2])
        return
    with pytest.raises(InvalidName, match="is not a log id"):
        LogId.parse(text)


def test_nonces_are_128_random_bits() -> None:
    nonces = {new_nonce() for _ in range(100)}
    assert len(nonces) == 100
    assert all(len(bytes.fromhex(nonce)) == 16 for nonce in nonces)


def test_incarnations_have_one_width_and_sort_by_time() -> None:
    earlier, later = new_incarnation(1_700_000_000_000), new_incarnation(1_700_000_000_001)
    assert len(earlier) == len(later) == INCARNATION_WIDTH
    assert earlier < later
    assert len(new_incarnation(2**60)) == INCARNATION_WIDTH
