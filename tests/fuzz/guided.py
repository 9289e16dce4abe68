"""Coverage-guided fuzzing of one decoder with atheris: ``python -m tests.fuzz.guided NAME [libFuzzer options]``.

It ends with exit code 0 when its time is over, and otherwise with the input that breaks the decoder, which libFuzzer writes into the
present folder. `tests.fuzz` runs it for every decoder.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

atheris: Any = import_module("atheris")  # in an environment of its own: see `make fuzz`
with atheris.instrument_imports(include=["barrier", "runner", "planner"]):
    from tests.fuzz.decoders import DECODERS


def main(name: str, options: list[str]) -> None:
    """Fuzz until the options' time is over."""
    from loguru import logger

    logger.remove()  # what is dropped is logged, a million times here
    decoder = DECODERS[name]
    with tempfile.TemporaryDirectory(prefix="rankgate-fuzz-") as corpus:
        for number, sample in enumerate(decoder.samples):
            (Path(corpus) / f"sample-{number}").write_bytes(sample)

        def one_input(raw: bytes) -> None:
            decoder.try_out(raw)

        atheris.Setup([sys.argv[0], corpus, *options], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
