"""What every command needs from its process: signals, the log, the connection, and errors in one sentence."""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from loguru import logger

import barrier
from barrier import InvalidSettings, Settings, StoreError, SystemClock, supervise
from barrier.backoff import Backoff
from barrier.errors import RankgateError
from barrier.log import prepare
from barrier.plain import number
from barrier.printable import printable
from planner.cli.streams import output

if TYPE_CHECKING:
    from loguru import Record

    from barrier import Store
    from barrier.store.fitness import Role

__all__ = [
    "Interrupts",
    "LineSink",
    "T",
    "agrees",
    "can_ask",
    "complain",
    "configure_log",
    "connect_store",
    "log_level",
    "outlasting",
    "redacted",
    "run",
]


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_FIRST_PAUSE = 0.2  # seconds before the store is asked again; doubled each time
_LONGEST_PAUSE = 2.0

_HURRY_AFTER = 2.5
"""Seconds that a command may take to end in order when its terminal or reader is gone. Then it hurries, without a second signal."""

_END_AFTER = 4.0
"""Seconds after which a command that hurries is killed, whatever it hangs in: a name look-up, an engine that blocks."""

# Runs all functions that are registered with atexit; it has no public name.
_run_exit_functions: Callable[[], None] = getattr(atexit, "_run_exitfuncs")  # noqa: B009 - as the comment above says
T = TypeVar("T")

LineSink: TypeAlias = Callable[[str], None]


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP while a command runs. The first signal asks it to end, each further one to hurry.

    By default the first signal cancels the command, which then cleans up, and a further signal cancels the cleaning up. `on_first` and
    `on_again` set something else.

    Attributes:
        received: the first signal.
        hurry: whether there was a further signal.
        expected: a command sets this if a signal is its usual end; then its own exit code counts.
    """

    def __init__(self, first: Callable[[], object]) -> None:
        self.received: signal.Signals | None = None
        self.hurry: bool = False
        self.expected = False
        self._first = first
        self._again: Callable[[], object] = first

    def on_first(self, callback: Callable[[], object]) -> None:
        """Set what the first signal does. If it has come already, do it now."""
        self._first = callback
        if self.received is not None:
            callback()

    def on_again(self, callback: Callable[[], object]) -> None:
        """Set what every further signal does."""
        self._again = callback

    def receive(self, number: signal.Signals) -> None:
        """Handle a signal."""
        if self.received is None:
            self.received = number
            self._first()
        else:
            self.hurry = True
            self._again()


def run(command: Callable[[Interrupts], Coroutine[Any, Any, int]], *, exit_at_sigterm: int = 0) -> int:
    """Run a command to its end; returns its exit code, or 130 after Ctrl-C, or `exit_at_sigterm` after SIGTERM and SIGHUP.

    An error of rankgate or of the operating system becomes one sentence on stderr, and the exit code is 1. The exit code is also 1 if
    stdout or stderr cannot be written any more; that ends a command as a closed terminal does.
    """
    last_resort = _LastResort()

    async def shell() -> int:
        task = asyncio.current_task()
        interrupts = Interrupts(lambda: task.cancel() if task else None)
        loop = asyncio.get_running_loop()
        supervise.hear_loop(loop)

        def receive(number: signal.Signals) -> None:
            interrupts.receive(number)
            if number is signal.SIGHUP and not interrupts.hurry:  # a closed terminal sends no second signal
                loop.call_later(_HURRY_AFTER, interrupts.receive, number)

        def lost() -> None:  # may run in any thread
            last_resort.within(_END_AFTER, 1)
            with suppress(RuntimeError):  # the loop is closed: the command is over
                loop.call_soon_threadsafe(receive, signal.SIGHUP)

        for one in _SIGNALS:
            if signal.getsignal(one) is signal.SIG_IGN and one is signal.SIGHUP:
                continue  # nohup asked for that
            loop.add_signal_handler(one, receive, one)
            signal.signal(one, last_resort.signalled)  # also works while the loop is blocked
        output.on_loss(lost)
        output.watch()
        code = await _carry_out(command, interrupts)
        if output.failure is not None:
            return 1
        if interrupts.received is not None and not interrupts.expected:
            return 130 if interrupts.received is signal.SIGINT else exit_at_sigterm
        return code

    try:
        return asyncio.run(shell())
    finally:
        last_resort.cancel()


async def _carry_out(command: Callable[[Interrupts], Coroutine[Any, Any, int]], interrupts: Interrupts) -> int:
    """The command's own exit code; 1 if it ended with an error (which is printed) or by a signal."""
    try:
        return await command(interrupts)
    except asyncio.CancelledError:
        if interrupts.received is None:
            raise
    except RankgateError as error:
        complain(str(error))
    except OSError as error:
        complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except Exception as mistake:  # noqa: BLE001  its text and its traceback may quote a prompt, so neither is printed
        supervise.tell_mistake("this command", mistake)
        complain(
            f"a mistake of ours ended this command ({supervise.described(mistake)}); please report what its log says"
        )
    return 1


class _LastResort:
    """Ends this process if nothing else does: the event loop is blocked, or cleaning up hangs. No child process is left."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._signals = 0

    def signalled(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler for what must happen while the loop is blocked. The loop does the rest."""
        self._signals += 1
        if self._signals > 1 or number == signal.SIGHUP:
            self.within(_END_AFTER, 128 + number)
        output.hurry()  # last, since it may raise out of a write

    def within(self, seconds: float, code: int) -> None:
        """End this process with this exit code after so many seconds. Only the first call counts."""
        if self._timer is None:
            self._timer = threading.Timer(seconds, self._end, (code,))
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        """The command has ended by itself: stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    @staticmethod
    def _end(code: int) -> None:
        # The functions for an orderly exit end the embedded server and delete its folder. Other child processes end with their parent.
        # They run in a thread, since one of them may hang too.
        leaving = threading.Thread(target=_run_exit_functions, daemon=True)
        leaving.start()
        leaving.join(0.5)
        os._exit(code)


def complain(sentence: str) -> None:
    """Tell an error to the user."""
    sys.stdout.flush()
    print(f"rankgate: {printable(sentence)}", file=sys.stderr, flush=True)


def can_ask() -> bool:
    """Whether a person can be asked: stdin and stderr are terminals."""
    return sys.stdin.isatty() and sys.stderr.isatty()


async def agrees(question: str) -> bool:
    """Ask on the terminal. Only y or yes means yes; a closed terminal means no. Signals still work meanwhile."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()
    descriptor = sys.stdin.fileno()

    def read() -> None:
        loop.remove_reader(descriptor)
        try:
            line = os.read(descriptor, 1_000)
        except OSError:  # the terminal went away
            line = b""
        if not answer.done():
            answer.set_result(line)

    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    loop.add_reader(descriptor, read)
    try:
        return (await answer).strip().lower() in (b"y", b"yes")
    finally:
        loop.remove_reader(descriptor)


def configure_log(level: str, sink: LineSink | None = None) -> None:
    """Send the log to stderr, or to a sink that takes finished lines. Nothing else configures the log.

    Values of variables never enter the log: they may hold a prompt or a password. Control characters in foreign text are escaped.
    """
    for package in ("barrier", "runner", "planner"):
        logger.enable(package)
    logger.remove()
    logger.configure(patcher=prepare)  # escapes the log lines of engines and other code; ours do so by themselves
    if sink is not None:
        logger.add(
            lambda line: sink(str(line).rstrip("\n")), level=level, format=_line, diagnose=False, backtrace=False
        )
        return
    form = _coloured_line if sys.stderr.isatty() else _line
    logger.add(sys.stderr, level=level, format=form, diagnose=False, backtrace=False)


def _line(record: Record) -> str:
    return f"{{time:HH:mm:ss.SSS}} {{level:<8}}{_about(record)}{{message}}\n{{exception}}"


def _coloured_line(record: Record) -> str:
    return (
        "<dim>{time:HH:mm:ss.SSS}</dim> <level>{level:<8}</level>"
        f"<dim>{_about(record)}</dim>{{message}}\n{{exception}}"
    )


def _about(record: Record) -> str:
    """A template of what a line is about, by `barrier.log.LogContext`: ``[demo rank 2 attempt 1 demo-load] ``."""
    extra = record["extra"]
    words = ["{extra[instance]}"] if "instance" in extra else []
    words += [f"{name} {{extra[{name}]}}" for name in ("rank", "attempt") if name in extra]
    words += ["{extra[task]}"] if "task" in extra else []
    return f"[{' '.join(words)}] " if words else ""


def log_level(verbose: int, quiet: bool, usual: str) -> str:
    """The level that ``-v``, ``-vv`` and ``-q`` ask for."""
    if quiet:
        return "ERROR"
    return (usual, "DEBUG", "TRACE")[min(verbose, 2)]


def redacted(url: str) -> str:
    """A URL without user and password, for people."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    secret = "***@" if "@" in parts.netloc else ""
    return f"{parts.scheme}://{secret}{place}{parts.path}"


async def connect_store(url: str, settings: Settings, *, wait: float = 0.0, role: Role | None = None) -> Store:
    """Connect; raises as `barrier.connect` does. An error never quotes the URL: its wrong part may be the password.

    Args:
        url: see `barrier.connect`.
        settings: the times.
        wait: see `outlasting`.
        role: see `barrier.connect`.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme in ("redis", "rediss"):
            _ = parts.hostname, parts.port
    except ValueError:
        raise InvalidSettings(
            "the store URL is not readable: it must be redis://[user:password@]host:port/0, rediss://…, unix:///path or "
            "redis+sentinel://host:port,…/service/0, with special characters in the password percent-encoded"
        ) from None
    return await outlasting(lambda: barrier.connect(url, settings=settings, role=role), wait)


async def outlasting(ask: Callable[[], Awaitable[T]], wait: float) -> T:
    """Ask a store; for `wait` seconds, ask again after an error that may pass by itself, with backoff and jitter.

    Any other error (an evicting policy, a key of the wrong type) is raised at once.
    """
    clock = SystemClock()
    deadline, told = clock.now() + wait, ""
    backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE, rng=random.Random())  # noqa: S311 - jitter is no secret
    while True:
        try:
            return await ask()
        except StoreError as error:
            left = deadline - clock.now()
            if left <= 0 or not error.passes:
                if told and error.passes:
                    error.args = (f"{error} (tried again for {number(wait)} s)",)
                raise
            if str(error) != told:
                logger.info("waiting up to {} s for the store: {}", number(round(left, 1)), error)
                told = str(error)
        await clock.sleep(min(backoff.next_pause(), left))
