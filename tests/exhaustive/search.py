"""Searches all states breadth-first, so that the first breach found has the shortest history. Then searches for dead ends."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field

from tests.exhaustive.model import Bounds, Model, State


@dataclass(frozen=True, slots=True)
class Found:
    """Something that must not be, and how it came to that: one sentence per move."""

    what: str
    history: tuple[str, ...]


@dataclass
class Result:
    """What a search saw.

    Attributes:
        states: different states reached.
        transitions: moves from one to another.
        depth: the longest of the shortest histories.
        goals: states in which all ranks serve.
        terminal: states in which nothing can happen any more unless something goes wrong.
        exhausted: whether nothing was left out for want of time or memory.
        found: a breach, or a state with no way out.
        seconds: how long it took.
    """

    states: int = 0
    transitions: int = 0
    depth: int = 0
    goals: int = 0
    terminal: int = 0
    exhausted: bool = True
    found: Found | None = None
    seconds: float = 0.0
    prefix: tuple[str, ...] = field(default=())


class Search:
    """One search.

    Args:
        bounds: how far.
        limit: how many states at most.
        seconds: how long at most.
    """

    def __init__(self, bounds: Bounds, *, limit: int = 20_000_000, seconds: float = float("inf")) -> None:
        self.bounds = bounds
        self._limit = limit
        self._until = time.monotonic() + seconds
        self._model = Model(bounds)
        self._states: list[State] = []
        self._numbers: dict[State, int] = {}
        self._parents = array("q")
        self._labels: dict[str, int] = {}
        self._by = array("q")
        self._began = time.monotonic()
        self._prefix: tuple[str, ...] = ()

    def run(self) -> Result:
        """Search until the end, the first breach, or the limit."""
        result = Result()
        start = self._model.initial()
        if self.bounds.start != "Idle":
            start = self._bring_up(start)
        result.prefix = self._prefix
        edges, offsets = self._explore(start, result)
        if result.found is None and result.exhausted:
            result.found = self._dead_end(edges, offsets, result)
        result.states, result.seconds = len(self._states), time.monotonic() - self._began
        return result

    def _bring_up(self, start: State) -> State:
        """The shortest history without a fault in which all ranks come to the wanted status."""
        model, frontier = self._model, [start]
        histories: dict[State, tuple[str, ...]] = {start: ()}
        while frontier:
            following: list[State] = []
            for state in frontier:
                for label, fault, then, _ in model.moves(state):
                    if fault or then in histories:
                        continue
                    histories[then] = (*histories[state], label)
                    if model.all_are(then, self.bounds.start):
                        self._prefix = histories[then]
                        return then
                    following.append(then)
            frontier = following
        raise ValueError(f"no history leads to a state in which all ranks are {self.bounds.start}")

    def _explore(self, start: State, result: Result) -> tuple[array[int], array[int]]:
        model, states, numbers, parents, by = self._model, self._states, self._numbers, self._parents, self._by
        labels = self._labels
        edges, offsets = array("I"), array("Q", [0])
        states.append(start)
        numbers[start] = 0
        parents.append(-1)
        by.append(-1)
        level_end, here = 1, 0
        while here < len(states):
            if here == level_end:
                result.depth += 1
                level_end = len(states)
            state = states[here]
            calm = 0
            for label, fault, then, breach in model.moves(state):
                if breach is not None:
                    result.found = Found(breach, (*self._history(here), label))
                    return edges, offsets
                result.transitions += 1
                number = numbers.get(then)
                if number is None:
                    number = numbers[then] = len(states)
                    states.append(then)
                    parents.append(here)
                    by.append(labels.setdefault(label, len(labels)))
                    wrong = model.breach(then)
                    if wrong is not None:
                        result.found = Found(wrong, self._history(number))
                        return edges, offsets
                if not fault and number != here:
                    calm += 1
                    edges.append(number)
            result.terminal += calm == 0
            offsets.append(len(edges))
            here += 1
            if len(states) > self._limit or (here & 1023 == 0 and time.monotonic() > self._until):
                result.exhausted = False
                break
        return edges, offsets

    def _dead_end(self, edges: array[int], offsets: array[int], result: Result) -> Found | None:
        """A state from which no further moves lead to the goal, though the bound on epochs leaves room."""
        model, states = self._model, self._states
        saved = bytearray(len(states))
        for number, state in enumerate(states):
            if model.serves(state):
                saved[number] = 1
        result.goals = sum(saved)
        changed = True
        while changed:  # most moves lead to later states, so that going backwards needs few rounds
            changed = False
            for number in range(len(states) - 1, -1, -1):
                if saved[number]:
                    continue
                for at in range(offsets[number], offsets[number + 1]):
                    if saved[edges[at]]:
                        saved[number] = 1
                        changed = True
                        break
        for number, state in enumerate(states):
            if not saved[number] and model.may_open(state):
                stands = offsets[number] == offsets[number + 1]
                what = "nothing can happen any more" if stands else "no way leads to serving any more"
                return Found(f"L4: {what}", self._history(number))
        return None

    def _history(self, number: int) -> tuple[str, ...]:
        labels = list(self._labels)
        told: list[str] = []
        while self._parents[number] >= 0:
            told.append(labels[self._by[number]])
            number = self._parents[number]
        return (*self._prefix, *reversed(told))
