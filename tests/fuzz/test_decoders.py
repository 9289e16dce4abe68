"""Each decoder, given any bytes, returns a value or raises its one named error, in a limited time.

``make fuzz`` plays many more examples; ``RANKGATE_FUZZ_EXAMPLES`` says how many each decoder gets.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

from tests.depth import examples
from tests.fuzz.decoders import DECODERS, Decoder

EXAMPLES = int(os.environ.get("RANKGATE_FUZZ_EXAMPLES") or examples(80))

DEEP = 100_000
"""More brackets than any parser's stack has room for, in less than any limit on size."""

SNIPPETS = (
    b"\0", b"|", b"-", b"0", b"1e999", b"NaN", b"null", b"true", b'"', b"{}", b"[]", b"\xff", b"\xed\xa0\x80", b"\\ud800",
    b"9" * 25, b"9" * 5_000, b"-1", b"1.5", b"kind", b'{"kind":"', b"[" * 200, b'{"a":' * 200, "ſKK".encode(), b" ", b"\r\n",
    b"%s%n", b"../..", b"{x}", b"*",
)  # fmt: skip


@st.composite
def mangled(draw: st.DrawFn, samples: tuple[bytes, ...]) -> bytes:
    """Something that was right once: cut, doubled, with snippets in the wrong places."""
    raw = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        end = draw(st.integers(start, min(len(raw), start + 40)))
        what = draw(st.sampled_from(SNIPPETS) | st.binary(max_size=12) | st.just(raw[start:end] * 2))
        raw = raw[:start] + what + raw[end:]
    return raw


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """What is dropped is logged, thousands of times here."""
    logger.disable("planner")
    yield
    logger.enable("planner")


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=list(DECODERS))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_bytes_are_read_or_refused_by_name(decoder: Decoder, data: st.DataObject) -> None:
    decoder.try_out(data.draw(mangled(decoder.samples) | st.binary(max_size=300)))


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=list(DECODERS))
def test_the_samples_are_read(decoder: Decoder) -> None:
    """Otherwise the mangled ones would only show that nothing at all is accepted."""
    for sample in decoder.samples:
        assert decoder.try_out(sample) is not None, sample


HOSTILE = {
    "nothing": b"",
    "zeros": b"\0" * 1_000,
    "lists without end": b"[" * DEEP,
    "objects without end": b'{"a":' * DEEP,
    "a long number": b"9" * DEEP,
    "a long number in an object": b'{"charges": {"0": ' + b"9" * DEEP + b"}}",
    "charges without end": b'{"charges": ' + b"[" * DEEP,
    "a megabyte of spaces": b" " * 1_000_000,
    "a megabyte of one letter": b"a" * 1_000_000,
    "half a surrogate pair": b"\xed\xa0\x80",
    "half a surrogate pair, escaped": b'{"kind": "\\ud800", "task_id": "\\udfff"}',
    "a frame of a deep list": (DEEP).to_bytes(4, "big") + b"[" * DEEP,
    "a frame of deep objects": (5 * DEEP).to_bytes(4, "big") + b'{"a":' * DEEP,
    "a frame that is too long": b"\xff\xff\xff\xff",
    "infinities": b'{"charges": {"0": 1e999, "1": -1e999, "2": NaN}}',
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=list(DECODERS))
def test_hostile_bytes_are_read_or_refused_by_name(decoder: Decoder, raw: bytes) -> None:
    decoder.try_out(raw)


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=list(DECODERS))
@settings(
    max_examples=EXAMPLES // 4 or 1,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(value=json_values)
def test_any_json_is_read_or_refused_by_name(decoder: Decoder, value: Any) -> None:
    decoder.try_out(json.dumps(value).encode())
