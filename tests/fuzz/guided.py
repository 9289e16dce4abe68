"""Coverage-guided fuzzing of one decoder with atheris: ``python -m tests.fuzz.guided NAME CORPUS [libFuzzer options]``.

CORPUS is a folder, which the caller removes. libFuzzer ends the process by itself: with exit code 0 when its time is over. If an input
breaks the decoder, it writes that input into the present folder and ends with another code. `tests.fuzz` runs it for every decoder.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

atheris: Any = import_module("atheris")  # in an environment of its own: see `make fuzz`
with atheris.instrument_imports(include=["barrier", "runner", "planner"]):
    from tests.fuzz.decoders import DECODERS


def main(name: str, corpus: Path, options: list[str]) -> None:
    """Fuzz from the decoder's samples, which are put into the corpus, until the options' time is over. Does not return."""
    from loguru import logger

    logger.remove()  # what is dropped is logged, a million times here
    decoder = DECODERS[name]
    for number, sample in enumerate(decoder.samples):
        (corpus / f"sample-{number}").write_bytes(sample)

    def one_input(raw: bytes) -> None:
        decoder.try_out(raw)

    atheris.Setup([sys.argv[0], str(corpus), *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
