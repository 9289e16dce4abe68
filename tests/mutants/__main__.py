"""Take out each guard in turn and search for the breach: ``python -m tests.mutants [NAME…]``, or ``make mutants [MUTANT=NAME]``.

First the command runs every search on the unchanged source, where it must find nothing. Then, for each guard, it makes a copy of the
tree without the guard, and runs the guard's searches one after the other until one finds a breach. It prints a table with one row per
guard: guard, place, search, seed, time. Exit code 1 if no search finds a guard's breach, or if a search finds one in the unchanged source.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from tests.mutants.catalogue import MUTATIONS, searches_of
from tests.mutants.harness import (
    EXHAUSTIVE,
    SEARCH_SECONDS,
    Broken,
    Finding,
    Mutation,
    Search,
    end_searches,
    run_search,
)


@dataclass
class Verdict:
    """What became of one guard: the finding that missed it, if any, and those that did not."""

    mutation: Mutation
    finding: Finding | None = None
    vain: list[Finding] = field(default_factory=list[Finding])
    broken: str = ""

    def row(self) -> str:
        """One row of the table."""
        where = Path(self.mutation.edit.file).name
        guard = f"{self.mutation.guard} ({self.mutation.guarantee})"
        vain = ", ".join(f"{one.search} {one.seconds:.0f} s, {one.sentence}" for one in self.vain)
        if self.broken:
            return f"| {self.mutation.name} | {guard} | {where} | **could not be searched** | | | {self.broken} |"
        if self.finding is None:
            return f"| {self.mutation.name} | {guard} | {where} | **nothing** | | | in vain: {vain} |"
        sentence = self.finding.sentence.replace("|", "¦")
        note = sentence if not vain else f"{sentence} (in vain: {vain})"
        return f"| {self.mutation.name} | {guard} | {where} | {self.finding.search} | {self.finding.seed} | {self.finding.seconds:.1f} s | {note} |"


HEAD = "| mutant | guard taken out | where | found by | seed | after | breach |\n|---|---|---|---|---|---|---|"


def look_for(mutation: Mutation, only: str = "", seconds: float = SEARCH_SECONDS) -> Verdict:
    """Try a guard's searches, one after the other, until one finds a breach."""
    verdict = Verdict(mutation)
    for search in mutation.searches:
        if only and search.kind != only:
            continue
        try:
            finding = run_search(search, mutation, seconds)
        except Broken as error:
            verdict.broken = str(error).splitlines()[-1][:200]
            return verdict
        if finding.found:
            verdict.finding = finding
            return verdict
        verdict.vain.append(finding)
    return verdict


def control(mutations: Sequence[Mutation], jobs: int, only: str = "") -> list[str]:
    """Run every search on the unchanged source; returns what is wrong with them."""
    wrong: list[str] = []
    wanted = [EXHAUSTIVE if one.kind == "exhaustive" else one for one in searches_of(tuple(mutations))]
    searches = [one for one in dict.fromkeys(wanted) if not only or one.kind == only]
    with ThreadPoolExecutor(jobs) as pool:
        for search, finding in zip(searches, pool.map(_without_mutation, searches), strict=True):
            if isinstance(finding, str):
                wrong.append(f"{search}: {finding}")
            elif finding.found:
                wrong.append(
                    f"{search} finds a breach in the unchanged source (seed {finding.seed}): {finding.sentence}"
                )
            else:
                print(f"unchanged source: {search} finds nothing ({finding.seconds:.0f} s)", flush=True)
    return wrong


def _without_mutation(search: Search) -> Finding | str:
    try:
        return run_search(search, None)
    except Broken as error:
        return str(error)


def main(arguments: Sequence[str]) -> int:
    """Search for the mutants that are named, or for all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to search for (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of searches at once (default: 1)")
    parser.add_argument("--search", default="", metavar="KIND", help="run only searches of this kind")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SEARCH_SECONDS,
        help=f"the most seconds that one search may take (default: {SEARCH_SECONDS:g})",
    )
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument(
        "--no-control", action="store_true", help="do not run the searches on the unchanged source first"
    )
    chosen = parser.parse_args(arguments)
    known = {mutation.name: mutation for mutation in MUTATIONS}
    unknown = [name for name in chosen.names if name not in known]
    if unknown:
        parser.error(f"there is no mutant {unknown[0]!r}; --list shows all {len(known)}")
    mutations = [known[name] for name in chosen.names] or list(MUTATIONS)
    if chosen.list:
        for mutation in mutations:
            print(f"{mutation.name:24} {mutation.guarantee}  {mutation.guard}")
        return 0
    began = time.monotonic()
    wrong = [] if chosen.no_control else control(mutations, chosen.jobs, chosen.search)
    if wrong:
        print("\n".join(wrong))
        return 1
    print(HEAD, flush=True)
    found = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for verdict in pool.map(partial(look_for, only=chosen.search, seconds=chosen.seconds), mutations):
            found += verdict.finding is not None
            print(verdict.row(), flush=True)
    print(f"\n{found} of {len(mutations)} mutants found in {time.monotonic() - began:.0f} s")
    return 0 if found == len(mutations) else 1


def _leave(number: int, _: object) -> NoReturn:
    end_searches()
    sys.exit(128 + number)


if __name__ == "__main__":
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, _leave)
    sys.exit(main(sys.argv[1:]))
