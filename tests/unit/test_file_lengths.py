"""A file that is too long to be read at one sitting is told, or says here why it is one file."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ("barrier", "runner", "planner")
MOST = {**dict.fromkeys(PRODUCT, 500), "tests": 800}
"""Lines a file may have, by the folder that it is in."""

LONG = {
    "barrier/barrier.py": "`Barrier`: one class, whose calls share what this planner knows of the epoch and of its lead",
    "barrier/testing/conformance.py": "`Twins`, and the list of sequences that it carries out on a store and on the model",
    "planner/cli/app.py": "every command and its options: a list, which does nothing itself",
    "planner/cli/look.py": "every command that looks: they share the picture, and how it is followed",
    "planner/decide.py": "the whole policy, a pure function: one rule after the other, in the order in which they count",
    "planner/embedded.py": "one server's process from its start to its end, which every way of starting it shares",
    "planner/history/rules.py": "the rules of a history, one function each",
    "runner/engines/mlx.py": "`MlxEngine`: an engine is one module, which a runner names as MODULE:FACTORY",
    "tests/exhaustive/model.py": "the model of the whole protocol: its state, what may happen in it, and what each of that changes",
    "tests/mutants/catalogue.py": "a list: every guard, what it is without it, and which search misses it",
    "tests/unit/planner/test_decide.py": "one test for each branch of the policy",
    "tests/unit/planner/test_history.py": "one history for each rule, kept and broken",
    "tests/unit/planner/test_loop.py": "one test for each thing that the planner's shell does with a decision, on one rig",
    "tests/unit/runner/test_host.py": "one test for each way in which an engine's process lives and ends, on one rig",
    "tests/unit/test_no_task_dies_silently.py": "the lists of background tasks: who hears of the end of each, and which test puts a mistake into it",
}
"""Files that are longer, each with the reason."""


def test_a_long_file_is_in_the_list_with_its_reason_and_no_other_is() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines())
        for folder in MOST
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(lengths) > 300
    longer = {name for name, lines in lengths.items() if lines > MOST[name.partition("/")[0]]}
    assert sorted(longer - LONG.keys()) == [], "split it by what it is about, or say in LONG why it is one file"
    assert sorted(LONG.keys() - longer) == [], "these are short enough now: take them out of LONG"
