"""What really happened to an instance: its history, read from the store and judged without trusting anybody's word for it.

The group's `events` stream is one total order, made by the store: the planner's scripts append to it in the very step that
changes something, and so do the ranks' reports. `find_breaches` holds that order against the rules of the design, written down
once more in here: it shares no code with the planner or the runner, only the words of `runner.messages`, so that a mistake in
theirs cannot hide itself. The idea of checking a recorded history instead of the program is Jepsen's (https://jepsen.io).

What is missing is never guessed: where the stream was cut, or events were lost, `History.oddities` says so, and the rules that
would need what is missing stay silent.
"""

from planner.history.events import (
    EpochConcluded,
    EpochOpened,
    EpochRestored,
    History,
    HistoryEvent,
    Oddity,
    RankSaid,
    StepDispatched,
    read_history,
)
from planner.history.rules import Breach, Rule, find_breaches, kind_of
from planner.history.timeline import NoSuchAttempt, Timeline, timeline

__all__ = [
    "Breach",
    "EpochConcluded",
    "EpochOpened",
    "EpochRestored",
    "History",
    "HistoryEvent",
    "NoSuchAttempt",
    "Oddity",
    "RankSaid",
    "Rule",
    "StepDispatched",
    "Timeline",
    "find_breaches",
    "kind_of",
    "read_history",
    "timeline",
]
