"""Reads the event history of an instance from the store, and checks it against the rules of the design.

The store puts all events of a group into one order, the `events` stream: the planner's scripts and the ranks' reports append to it in
the same step in which they change something. `find_breaches` checks this order. It has the rules a second time and shares no code with
planner and runner, only the messages of `runner.messages`. So a mistake in their code cannot hide itself. The idea to check a recorded
history instead of the program comes from Jepsen (https://jepsen.io).

Missing events are never guessed. If the stream was cut, or events were lost, `History.oddities` says so, and the rules that need them
report nothing.
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
