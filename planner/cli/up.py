"""``rankgate up``: starts a whole cluster on this machine, generates one text, and ends everything."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from barrier import Barrier, Settings, Snapshot, StoreError, SystemClock, supervise
from barrier.errors import RankgateError
from barrier.log import logger
from barrier.printable import printable_text
from barrier.store.keys import Keys
from planner import GenerationFailed, Instance, InstanceFailed, InstanceSpec, Planner
from planner.cli.look import TICK, Observer, UnknownInstance, look_again
from planner.cli.options import DEFAULT_NAMESPACE, rank_span
from planner.cli.process import Interrupts, configure_log, connect_store, outlasting, redacted
from planner.cli.report import check_report, time_report
from planner.cli.screen import Picture
from planner.cli.show import Show, can_draw, make_show, people, tell
from planner.embedded import EmbeddedServer
from planner.history import NoSuchAttempt, read_history, timeline
from planner.launcher import Launcher, ProcessState, Program, own_command, own_environment
from runner.lifecycle import GENERATE

__all__ = ["Cluster", "UpFailed", "UpOptions", "programs", "up"]


_OUTLASTED = 15.0
"""Seconds for which the store may not answer while everything starts: the machine is busy then."""

_STOP_SECONDS = 10.0
"""How long the ranks may take to tear down, in seconds. Then their processes are ended anyway."""

_GENERATIONS = 3
"""How often the command asks for the text. If a rank dies meanwhile, the attempt ends, and the text with it."""


class UpFailed(RankgateError):
    """A necessary part of the cluster is gone."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What ``rankgate up`` was told."""

    spec: InstanceSpec
    url: str | None = field(repr=False)
    namespace: str
    settings: Settings
    prompt: str = field(repr=False)
    max_tokens: int
    timeout: float
    hold_back: dict[int, float]
    ranks_per_process: int
    engine_config: dict[str, Any]
    keep: bool
    level: str


def programs(options: UpOptions, url: str) -> list[Program]:
    """The runner processes: one for each rank, or one for several ranks."""
    size, each = options.spec.world_size, options.ranks_per_process
    return [_program(options, url, range(first, min(first + each, size))) for first in range(0, size, each)]


def _program(options: UpOptions, url: str, ranks: range) -> Program:
    settings = options.settings
    arguments = [
        *("--instance", options.spec.name),
        *("--ranks", f"{ranks[0]}-{ranks[-1]}"),
        *("--world-size", str(options.spec.world_size)),
        *("--namespace", options.namespace),
        *("--lease", repr(settings.lease)),
        *("--heartbeat", repr(settings.heartbeat)),
        *("--command-timeout", repr(settings.command_seconds)),
        *("--engine-config", json.dumps(options.engine_config)),
        *("--log", options.level),
        *("--parent", str(os.getpid())),
        "--no-spare",  # if another process holds the rank, end and do not wait
    ]
    if options.ranks_per_process > 1:
        arguments.append("--inline-engine")
    for rank in ranks:
        if rank in options.hold_back:
            arguments += ["--hold-back", f"{rank}:{options.hold_back[rank]!r}"]
    return Program(
        name=f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {rank_span(ranks)}",
        command=own_command("runner", *arguments),
        # In the environment and not an argument: the URL may hold a password.
        environment={**own_environment(), "RANKGATE_REDIS": url},
        ranks=ranks,
    )


async def up(options: UpOptions, interrupts: Interrupts) -> int:
    """Bring everything up, generate, report, and end every process; returns the exit code.

    Raises:
        RankgateError: a part could not be started, the instance was given up, or the text could not be generated.
    """
    console = people()
    cluster = Cluster(options, console, interrupts)
    # If the table and the log go to the same terminal, the log lines must go above the table.
    shared = can_draw(console) and Console(stderr=True).is_terminal
    configure_log(options.level, cluster.say if shared else None)
    try:
        async with AsyncExitStack() as stack:
            await cluster.start(stack)
            await _first_of(cluster.work(), cluster.trouble())
            if options.keep:
                await _first_of(cluster.keep(), cluster.trouble())
        return cluster.exit_code
    finally:
        configure_log(options.level)


class Cluster:
    """Server, runners and planner of one ``up``."""

    def __init__(self, options: UpOptions, console: Console, interrupts: Interrupts) -> None:
        self._options = options
        self._console = console
        self._interrupts = interrupts
        self._show: Show = make_show(console)
        self._clock = SystemClock()
        self._began = self._clock.now()
        self._server: EmbeddedServer | None = None
        self._url = ""
        self._text = ""
        self._job = asyncio.current_task()
        self._let_go = False
        self.exit_code: int = 1

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything. When the stack is left, everything is ended in the opposite order."""
        options, spec = self._options, self._options.spec
        if options.url is None:
            self._server = await stack.enter_async_context(EmbeddedServer())
        self._url = self._server.url if self._server else options.url or ""
        # If the user's own server does not answer, that is an error at once. The server that was started here may only be late.
        patience = _OUTLASTED if self._server else 0.0
        self._store = await connect_store(self._url, options.settings, wait=patience)
        stack.push_async_callback(self._store.close)
        await outlasting(self._make_sure_that_nobody_else_has_it, _OUTLASTED)
        self._launcher = Launcher(
            programs(options, self._url), on_change=self._process_changed, on_line=self._runner_said
        )
        await stack.enter_async_context(self._launcher)
        self._interrupts.on_again(self._hurry)
        self._interrupts.on_first(self._end)
        planner = await stack.enter_async_context(Planner(self._store, namespace=options.namespace))
        self._instance: Instance = await outlasting(lambda: planner.launch(spec, wait=False), _OUTLASTED)
        stack.push_async_callback(self._stop_instance)

    async def _make_sure_that_nobody_else_has_it(self) -> None:
        """Raise if the instance is up already. One whose ``up`` was killed stays on record; it is free when its leases have lapsed."""
        name, settings = self._options.spec.name, self._options.settings
        deadline = self._clock.now() + settings.lease + settings.command_seconds
        async with Observer(self._store, self._options.namespace) as observer:
            while True:
                try:
                    seen = await observer.look(name)
                except UnknownInstance:
                    return
                if seen.record is None or seen.record.desired != "up" or seen.record.failure or not seen.attended:
                    return
                if self._clock.now() >= deadline:
                    raise UpFailed(
                        f"instance {name} is up on this server already: stop it with rankgate stop {name}, or choose another "
                        "name with --instance"
                    )
                await observer.wait(seen, TICK)

    def say(self, line: str) -> None:
        """Print a line, above the table if there is one."""
        self._show.say(line)

    async def work(self) -> None:
        """The job itself: wait until all ranks serve, generate, and report."""
        with self._show:
            async with self._looking() as look_now:
                await self._instance.ready()
                await look_now()  # say that all ranks serve before the text begins
                await self._generate()
        if can_draw(self._console):
            self._console.print("", Text(printable_text(self._text)), sep="\n")
        self._text = ""
        keys = Keys(self._options.namespace, self._instance.name)
        history = await outlasting(lambda: read_history(self._store, keys), _OUTLASTED)
        try:
            lines, breaches = check_report(history)
            tell(self._console, ["", *time_report(timeline(history)), *lines])
        except NoSuchAttempt:
            limit, ranks = self._store.settings.event_entries, self._options.spec.world_size
            tell(
                self._console,
                [
                    f"Not checked: the history keeps only {limit:,} events, and {ranks:,} ranks wrote more, so its beginning is lost."
                ],
            )
            breaches = []
        self.exit_code = 1 if breaches else 0

    async def keep(self) -> None:
        """Stay up until asked to end, or until the instance is stopped or given up."""
        name, namespace = self._instance.name, self._options.namespace
        tell(self._console, ["", f"{name} serves until Ctrl-C. From another terminal:"])
        if "@" not in self._url:  # otherwise it holds a password; the user knows the URL
            self._console.out(f"  export RANKGATE_REDIS={shlex.quote(self._url)}", highlight=False)
        if namespace != DEFAULT_NAMESPACE:
            self._console.out(f"  export RANKGATE_NAMESPACE={namespace}", highlight=False)
        tell(self._console, [f"  rankgate status {name} --watch", f"  rankgate generate {name} 'a prompt'", ""])
        self._interrupts.expected = True
        if can_draw(self._console):
            self._show = make_show(self._console)  # a new table, below the lines above
        with self._show:
            async with self._looking():
                while not self._let_go and not self._instance.state.over:
                    await self._clock.sleep(TICK / 5)
        state = self._instance.state
        if state.over and not state.stopped:
            raise InstanceFailed(state.failure or state.left or f"{name}: {state.error}")

    async def trouble(self) -> None:
        """Wait until a necessary part ends, and raise."""
        async with supervise.alongside(self._launcher.given_up()) as giving_up:
            while not giving_up.done():
                if self._server is not None and not self._server.running:
                    raise UpFailed(f"the embedded server ended; its last output: {self._server.last_words()}")
                await asyncio.wait({giving_up}, timeout=TICK)
            state = giving_up.result()
        raise UpFailed(
            f"the process of {state.program.name} died {state.restarts + 1} times in a row ({state.last_exit}); "
            f"its last output: {state.last_words or '(none)'}"
        )

    # --- the parts of the job -----------------------------------------------------------------------------------------

    async def _generate(self) -> None:
        options = self._options
        for ordinal in range(1, _GENERATIONS + 1):
            self._text = ""
            pieces = self._instance.generate(options.prompt, max_tokens=options.max_tokens, timeout=options.timeout)
            try:
                async with aclosing(pieces) as open_pieces:
                    async for piece in open_pieces:
                        self._text += piece
                        self._show.text(piece)
                return
            except GenerationFailed as error:
                if ordinal == _GENERATIONS or self._instance.state.over:
                    raise
                self._show.say(f"asking for the text again: {error}")
                await self._instance.ready()

    async def _stop_instance(self) -> None:
        """Tear every rank down and give it back. An error is only logged, so that the rest is still ended."""
        if self._interrupts.hurry or self._instance.state.over:
            return
        try:
            await self._instance.stop(_STOP_SECONDS)
        except (StoreError, InstanceFailed) as error:
            logger.warning("{}", error)

    def _end(self) -> None:
        """At the first signal: cancel the job, and end everything in order."""
        if self._interrupts.expected:
            self._let_go = True
        elif self._job is not None:
            self._job.cancel()
        self.say("ending everything; press Ctrl-C again to end at once")

    def _hurry(self) -> None:
        """At every further signal: kill the processes, and wait for nothing."""
        self._launcher.kill()
        if self._job is not None:
            self._job.cancel()

    # --- looking ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _looking(self) -> AsyncGenerator[Callable[[], Awaitable[None]]]:
        """Show what goes on inside the block, and the last picture at its end. Yields a function that shows the picture now."""
        spec = self._options.spec
        async with Barrier(
            self._store, spec.name, world_size=spec.world_size, namespace=self._options.namespace
        ) as barrier:
            looking = supervise.restarted(
                lambda: self._look(barrier), "the picture of the cluster", clock=self._clock, longest_pause=TICK
            )

            async def look_now() -> None:
                self._show.update(self._compose(await barrier.inspect(), self._instance.state.reason))

            try:
                yield look_now
                last = self._compose(await self._at_rest(barrier), self._instance.state.reason)
                self._show.update(replace(last, text=""))
            finally:
                await supervise.end(looking)

    async def _look(self, barrier: Barrier) -> None:
        """Show the picture whenever something changes, and at every tick for the leases and the layers."""
        tick = min(self._options.settings.heartbeat / 2, TICK)
        while True:
            try:
                snapshot = await barrier.inspect()
            except StoreError as error:
                self._show.update(self._compose(None, str(error)))
                await self._clock.sleep(TICK)
                continue
            self._show.update(self._compose(snapshot, self._instance.state.reason))
            await look_again(barrier, snapshot, tick, self._clock)

    async def _at_rest(self, barrier: Barrier) -> Snapshot:
        """The picture when the ranks have noticed that the text is complete; they take a moment."""
        deadline = self._clock.now() + TICK
        while True:
            snapshot = await barrier.inspect()
            busy = any(view.report and view.report.status == GENERATE.during for view in snapshot.ranks)
            left = deadline - self._clock.now()
            if not busy or left <= 0:
                return snapshot
            await look_again(barrier, snapshot, left, self._clock)

    def _compose(self, snapshot: Snapshot | None, reason: str) -> Picture:
        spec = self._options.spec
        where = f"embedded Valkey, pid {self._server.pid}" if self._server else redacted(self._url)
        return Picture(
            instance=spec.name,
            world_size=spec.world_size,
            layers=spec.model.total_layers,
            title=(f"{spec.model.model_id}, {spec.model.total_layers} layers", where),
            snapshot=snapshot,
            processes=self._launcher.states,
            elapsed=self._clock.now() - self._began,
            reason=reason,
            text=self._text,
        )

    def _process_changed(self, state: ProcessState) -> None:
        if state.phase == "pausing" and state.last_exit:
            words = f"; its last output: {state.last_words}" if state.last_words else ""
            self._show.say(f"the process of {state.program.name} ended ({state.last_exit}{words}) and is started again")

    def _runner_said(self, program: str, line: str) -> None:
        self._show.say(f"[{program}] {line}")


async def _first_of(work: Coroutine[Any, Any, None], trouble: Coroutine[Any, Any, None]) -> None:
    """Do the work. If `trouble` ends first, raise its error."""
    async with supervise.alongside(work) as working, supervise.alongside(trouble) as watching:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done() and not working.done():
            watching.result()
        else:
            working.result()
