"""Describes what an engine raised, in a sentence for a status and a log. The sentence never quotes a prompt."""

from __future__ import annotations

import asyncio
import json
import re
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.engine import EngineDied, EngineFailure
from runner.host.work import Work

if TYPE_CHECKING:
    from loguru import Logger

__all__ = [
    "MAX_FAILURE_CHARS",
    "UNFIT",
    "Failure",
    "engine_log",
    "is_permanent",
    "sentence_of",
    "was_cancelled",
    "without_prompt",
]


MAX_FAILURE_CHARS = 1_900
"""The longest sentence about a failure, in characters. It must fit into a runner's Failed status, which holds 2,000."""

_TRACEBACK_CHARS = 4_000

UNFIT = (TypeError, ValueError, LookupError, AttributeError, NameError, ImportError, SyntaxError)
"""Errors of a module or factory that cannot be used, or cannot use its configuration. Every attempt would fail."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What an engine raised, without the prompt. It is plain text, because no object of the engine leaves its process."""

    sentence: str
    permanent: bool
    traceback_tail: str

    @classmethod
    def of(cls, error: BaseException, work: Work, rank: int) -> Failure:
        """Describe what was raised while an engine did some work."""
        sentence = sentence_of(error)
        if type(error) not in (EngineFailure, EngineDied):
            sentence = f"engine of rank {rank} failed while {work.doing}: {sentence}"
        return cls(
            sentence=without_prompt(sentence, work.prompt)[:MAX_FAILURE_CHARS],
            permanent=is_permanent(error),
            traceback_tail=without_prompt("".join(traceback.format_exception(error)), work.prompt)[-_TRACEBACK_CHARS:],
        )

    def as_exception(self) -> EngineFailure:
        """The exception that the runner gets."""
        return EngineFailure(self.sentence, permanent=self.permanent)

    def log(self, rank: int, work: Work) -> None:
        """Leave the end of the traceback in the log, at debug level."""
        engine_log().debug(
            "engine of rank {} failed while {}; traceback ends:\n{}", rank, work.doing, self.traceback_tail
        )


def sentence_of(error: BaseException) -> str:
    """Describe an exception in one sentence. An `EngineFailure` is its own sentence."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a foreign error may not even be able to say what it is
        text = ""
    if type(error) in (EngineFailure, EngineDied) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_permanent(error: BaseException) -> bool:
    """Whether another attempt would fail too."""
    return isinstance(error, EngineFailure) and error.permanent


def was_cancelled(error: BaseException) -> bool:
    """Whether the running task was asked to stop; an engine may also raise CancelledError of its own accord."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


_RUN = 12


def without_prompt(text: str, prompt: str) -> str:
    """Replace every part of the prompt by ``<prompt>``, in a text for a log or a status.

    A part is any run of 12 or more characters of the prompt, as it is or escaped by Python's ``repr`` or by JSON. A shorter prompt is
    replaced only as a whole, and only if no letter or digit is next to it.
    """
    forms = {prompt, repr(prompt)[1:-1], json.dumps(prompt)[1:-1]}
    for form in (form.strip() for form in forms if len(form) < _RUN):
        if form:
            text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", "<prompt>", text)
    # The time is linear in both lengths, because an exception's text can hold the whole of a long prompt.
    runs = {form[at : at + _RUN] for form in forms for at in range(len(form) - _RUN + 1)}
    parts: list[str] = []
    kept_to = 0
    for at in range(len(text) - _RUN + 1):
        if text[at : at + _RUN] in runs:
            if at > kept_to or not parts:
                parts += [text[kept_to:at], "<prompt>"]
            kept_to = at + _RUN
    return "".join(parts) + text[kept_to:]


def engine_log() -> Logger:
    """The log, imported when it is first needed."""
    from barrier.log import logger  # noqa: PLC0415 - the child shares this module, never logs, and starts sooner without it

    return logger
