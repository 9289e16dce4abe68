"""Mutation of the guards: the type of a mutation, the searches that may find its breach, and a copy of the tree in which they run.

A mutation is data: a file, the exact text of the guard in it, and the text without the guard. The text must be in the file exactly
once, so that an outdated list fails. The idea is mutation testing (DeMillo, Lipton and Sayward, 1978). Here people write the
mutations, one for each guard that the design names.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SENTENCE = 200
_COPIED = ("barrier", "runner", "planner", "tests", "pyproject.toml", "README.md")

PROPERTY_SEEDS = 6
"""How many hypothesis seeds a property search plays before it gives up; each seed is a whole run of the property tests."""

SIMULATED = (1_000, 2_000)
"""The seeds that a search by simulation plays: from the first up to, but not, the second."""

SEARCH_SECONDS = 300.0
"""The longest that one search may take; of one that takes longer the table says that it ran out of time."""


class Rotten(AssertionError):
    """A mutation that does not fit the source any more; the sentence says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One place in the source.

    Attributes:
        file: its path from the project's root.
        old: the guard, exactly as it stands there, once.
        new: the same without the guard.
    """

    file: str
    old: str
    new: str

    def applied_to(self, text: str, name: str) -> str:
        """The file's text without the guard; raises `Rotten` where the guard is not in it exactly once."""
        found = text.count(self.old)
        if found != 1:
            raise Rotten(
                f"mutation {name!r}: its text is {found} times in {self.file}, and must be there once. The guard has changed: "
                "bring the text in tests/mutants/catalogue.py up to date"
            )
        return text.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Search:
    """A way to look for a breach.

    Attributes:
        kind: ``property``, ``exhaustive`` or ``simulation``.
        what: for ``property`` the test files; for ``exhaustive`` the guards that are taken out in the search's own model of ranks and
            planners, where it does not run the product's code; otherwise empty.
    """

    kind: str
    what: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As the table shows it."""
        files = ", ".join(Path(one).stem.removeprefix("test_") for one in self.what)
        return f"property ({files})" if self.kind == "property" else self.kind


def _property(*files: str) -> Search:
    return Search("property", tuple(f"tests/{file}" for file in files))


PROPERTY = _property("property/test_reference.py", "property/test_servers.py")
"""Random calls of the verbs, against the reference."""
SPOILED = _property("property/test_spoiled_store.py")
"""Random calls of the verbs, on keys that somebody has spoiled."""
SPOILED_STREAMS = _property("unit/barrier/test_spoiled_streams.py")
"""Every verb and report, with a spoiled stream of hints or history."""
FORGOTTEN = _property("unit/barrier/test_forgotten_prompts.py")
"""What leaves the task log, and what must stay for ranks that have yet to read it."""
CLAIMS = _property("unit/barrier/test_member_claim.py")
"""Who holds a rank, and for how long."""
RANK = _property("property/test_rank.py")
"""One rank against a hostile store."""
WRONG_SERVER = _property("unit/barrier/test_standing.py", "setups/test_wrong_server.py")
"""A store whose address leads to another server, whose secrets are renewed, and whose balancer forgets."""
JUDGE = _property("property/test_judge.py")
"""What a runner's judge says of random tasks."""
DECISIONS = _property("property/test_decisions.py")
"""The planner's decisions, on random pictures."""
DECIDED = _property("unit/planner/test_decide.py")
"""The planner's decisions, picture by picture."""
RESTORES = _property("unit/barrier/test_restore_needs.py", "unit/barrier/test_absurd_floor.py")
"""What `restore` wants of every rank, requirement by requirement."""
BOUNDS = _property("property/test_bounds.py")
"""Streams that only a planner writes, and an outage of the store."""
SECOND_LINE = _property("fuzz/test_second_line.py")
"""One runner against a planner that checks nothing."""
MLX = _property("mlx/test_mlx_configuration.py")
"""What the MLX engine decides, with a stand-in for MLX."""
ATTEMPTS = _property(
    "unit/runner/test_host_waits.py",
    "unit/runner/test_ring.py",
    "unit/runner/test_runner_prepare.py",
    "unit/runner/test_host_prepared.py",
    "unit/runner/test_endpoints.py",
)
"""Whom an engine meets, and for how long it is waited for: the ring of simulated engines, endpoints in the record, engines that are prepared, what they leave behind."""
PRETENDED = _property("unit/runner/test_simulated.py")
"""In which order the simulated engine takes its calls."""
LIVES = _property("unit/runner/test_runner_guards.py", "unit/test_no_task_dies_silently.py")
"""A mistake in every part that runs by itself, and what a rank says when it fails."""
SIMULATION = Search("simulation")
EXHAUSTIVE = Search("exhaustive")


def exhaustive(guard: str) -> Search:
    """The exhaustive search with a guard taken out in its own model; see MUTATIONS in ``tests/exhaustive/model.py``."""
    return Search("exhaustive", (guard,))


@dataclass(frozen=True, slots=True)
class Mutation:
    """One guard, taken out.

    Attributes:
        name: short, for the command line.
        guard: what is taken out, for the table.
        guarantee: what it serves, by the names of the design (S1 to S10, L1 to L7).
        edit: the place in the product.
        searches: which searches to try, in this order, until one finds a breach.
        model: the same guard in the reference model, which the exhaustive search plays instead of the scripts; ``None`` for guards
            that are not the scripts'.
    """

    name: str
    guard: str
    guarantee: str
    edit: Edit
    searches: tuple[Search, ...]
    model: Edit | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What one search said of one mutant.

    Attributes:
        found: whether it found a breach.
        search: which search.
        seed: the seed or the example that finds it; empty where the search has none.
        seconds: how long it took.
        sentence: the breach in its own words, or why nothing was found.
    """

    found: bool
    search: Search
    seed: str
    seconds: float
    sentence: str


class Broken(RuntimeError):
    """A search could not be run at all: that is no finding."""


@contextmanager
def copy_of_the_tree(edits: Sequence[Edit] = (), name: str = "") -> Generator[Path]:
    """A copy of the source in a temporary directory, with some edits applied, that goes away afterwards."""
    with tempfile.TemporaryDirectory(prefix="rankgate-mutant-") as room:
        tree = Path(room) / "tree"
        tree.mkdir()
        for one in _COPIED:
            source = ROOT / one
            if source.is_dir():  # compiled files of an unchanged source stay valid: they know it by its time and size
                shutil.copytree(source, tree / one)
            else:
                shutil.copy2(source, tree / one)
        for edit in edits:
            place = tree / edit.file
            place.write_text(edit.applied_to(place.read_text("utf-8"), name), "utf-8")
            for compiled in place.parent.glob(f"__pycache__/{place.stem}.*.pyc"):
                compiled.unlink()
        yield tree


def run_search(search: Search, mutation: Mutation | None, seconds: float = SEARCH_SECONDS) -> Finding:
    """Run one search on one mutant, or on the unchanged source where there is no mutation.

    Raises:
        Broken: the search did not run: its own mistake, a missing module, a mutant that does not even import.
    """
    edits = [mutation.edit] if mutation else []
    if mutation and mutation.model and search.kind == "exhaustive":  # it alone plays the model instead of the scripts
        edits.append(mutation.model)
    began = time.monotonic()
    with copy_of_the_tree(edits, mutation.name if mutation else "") as tree:
        for seed, command in _commands(search, mutated=mutation is not None):
            left = seconds - (time.monotonic() - began)
            code, output = _run(command, tree, left) if left > 0 else (_OUT_OF_TIME, "")
            if code == _OUT_OF_TIME:
                return Finding(False, search, "", time.monotonic() - began, "out of time")
            if code == 1 and search.kind in ("simulation", "exhaustive") and "BREACH" not in output:
                raise Broken(f"{search} ended with an error of its own:\n{output[-2_000:]}")
            if code == 1:
                told_seed, sentence = _told(output)
                return Finding(True, search, seed or told_seed, time.monotonic() - began, sentence)
            if code != 0:
                raise Broken(f"{search} ended with code {code} instead of an answer:\n{output[-2_000:]}")
    return Finding(False, search, "", time.monotonic() - began, "no breach found")


def _commands(search: Search, *, mutated: bool) -> Sequence[tuple[str, list[str]]]:
    """The commands of a search, each with its seed: all of them are run until one finds something (exit code 1)."""
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    hasty = [*pytest, "-p", "tests.mutants.hasty", "-m", "not redis and not slow and not bench and not mlx"]
    match search.kind:
        case "property":
            seeds = range(1, PROPERTY_SEEDS + 1)
            return [(str(seed), [*hasty, f"--hypothesis-seed={seed}", *search.what]) for seed in seeds]
        case "exhaustive":
            guards = ["--mutate", ",".join(search.what)] if search.what and mutated else []
            return [("", [sys.executable, "-m", "tests.exhaustive", "--jobs", "1", *guards])]
        case "simulation":
            first, end = map(str, SIMULATED)
            return [("", [sys.executable, "-m", "tests.mutants.simulate", first, end])]
        case _:
            raise LookupError(f"there is no search {search.kind!r}")


_OUT_OF_TIME = 124
_running: set[subprocess.Popen[bytes]] = set()
_ended = threading.Event()


def end_searches() -> None:
    """End every search that runs now, and begin no other: each is a process group, which no signal to this process reaches."""
    _ended.set()
    for process in list(_running):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _run(command: Sequence[str], tree: Path, seconds: float) -> tuple[int, str]:
    """Exit code and output; `_OUT_OF_TIME` for a search that did not end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "RANKGATE"))}
    environment |= {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    if _ended.is_set():
        raise Broken("ended before it began")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        _running.add(process)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = _OUT_OF_TIME
        finally:
            _running.discard(process)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def _told(output: str) -> tuple[str, str]:
    """The seed, where a search tells one itself, and the sentence that says what went wrong."""
    lines = [line.strip() for line in output.splitlines()]
    for line, following in pairwise([*lines, ""]):
        if line.startswith("BREACH: seed "):  # a simulation's
            seed, _, sentence = line.removeprefix("BREACH: seed ").partition(":")
            return seed, sentence.strip()[:_SENTENCE]
        if line.endswith("BREACH"):  # an exhaustive search's: its name and figures, then what was found
            return line.partition(":")[0], following.removesuffix(", after")[:_SENTENCE]
    errors = [line[2:].strip() for line in lines if line.startswith("E  ")]
    return "", next(iter(errors or reversed([line for line in lines if line])), "")[:_SENTENCE]
