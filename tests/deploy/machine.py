"""A machine of its own for a test: a real systemd as the first process of its own namespaces, with this machine's programs.

Processes, mounts and ``/run`` are its own; ``/etc`` and ``/opt`` are layers over this machine's, which stay as they were. The network is
this machine's loopback and all. It ends with the process that started it. Needs root, and Debian's systemd and util-linux.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

SYSTEMD = Path("/lib/systemd/systemd")
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "/opt/rankgate/bin/rankgate"
PATIENCE = 60.0
"""Seconds; a bound for hangs, not a measure."""

_TARGETS = ("basic", "default", "multi-user", "network-online", "shutdown", "sysinit")
"""Targets that units refer to. They are empty here: nothing of this machine's own services is started."""

_BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs none {room}
mkdir {room}/etc {room}/etc.work {room}/opt {room}/opt.work
mount -t overlay -o lowerdir=/etc,upperdir={room}/etc,workdir={room}/etc.work none /etc
mount -t overlay -o lowerdir=/opt,upperdir={room}/opt,workdir={room}/opt.work none /opt
mount -t tmpfs none /run
mkdir -p /run/systemd /etc/rankgate /etc/rankgate-units /opt/rankgate/bin /opt/rankgate/python /opt/rankgate/site /opt/rankgate/source
mount --bind {python} /opt/rankgate/python
mount --bind {site} /opt/rankgate/site
mount --bind {source} /opt/rankgate/source
mount --make-rshared /  # within these namespaces, as systemd does where it is not in a container: it hands credentials over so
for target in {targets}; do printf '[Unit]\nDefaultDependencies=no\n' >/etc/rankgate-units/$target.target; done
export container=rankgate SYSTEMD_UNIT_PATH=/etc/rankgate-units
exec {systemd} --system --unit=default.target --log-target=console --show-status=no
"""


class MachineError(AssertionError):
    """The machine cannot be had; the sentence says what it takes."""


def needed(program: str, package: str) -> str:
    """A program's path; raises `MachineError` with what to install."""
    found = shutil.which(program)
    if found is None:
        raise MachineError(
            f"This test needs {program} on the PATH: apt-get install {package}, or leave it out with -m 'not slow'."
        )
    return found


class Machine:
    """See the module. `run` runs a command on it, `put` writes a file."""

    def __init__(self) -> None:
        if not SYSTEMD.exists():
            raise MachineError(
                f"This test needs {SYSTEMD}: apt-get install systemd, or leave it out with -m 'not slow'."
            )
        if os.geteuid() != 0:
            raise MachineError(
                "This test makes namespaces and so needs root: run it as root, or leave it out with -m 'not slow'."
            )
        self._unshare = needed("unshare", "util-linux")
        self._nsenter = needed("nsenter", "util-linux")
        self._room = Path(tempfile.mkdtemp(prefix="rankgate-machine-"))
        self._log = self._room.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        """The first process, as this machine numbers it."""

    def _boot(self) -> None:
        script = _BOOT.format(
            room=self._room,
            systemd=SYSTEMD,
            targets=" ".join(_TARGETS),
            python=shlex.quote(sys.base_prefix),
            site=shlex.quote(sysconfig.get_path("purelib")),
            source=shlex.quote(str(ROOT)),
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(self._unshare, "--fork", "--pid", "--mount", "--ipc", "--uts", "--mount-proc"),
                    *("--kill-child", "sh", "-c", script),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    async def __aenter__(self) -> Machine:
        self._boot()
        try:
            await self.until(self._booted, "systemd to start")
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _booted(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise MachineError(f"systemd ended at once; it wrote: {self._log.read_text(errors='replace')[-2_000:]}")
        children = psutil.Process(self._process.pid).children()
        if not children or children[0].name() != "systemd":
            return False
        self.pid = children[0].pid
        return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")

    def _end(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)  # the first process goes with it, and all others with that one
        self._process.wait()
        shutil.rmtree(self._room, ignore_errors=True)
        self._log.unlink(missing_ok=True)

    def run(self, *command: str, check: bool = True, stdin: str = "") -> str:
        """Run a command on the machine; what it wrote, errors included. With `check`, a failure is an `AssertionError`."""
        done = subprocess.run(
            [self._nsenter, "--target", str(self.pid), "--mount", "--pid", "--ipc", "--uts", "--", *command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def put(self, path: str, text: str, mode: str = "644") -> None:
        """Write a file on the machine."""
        self.run("sh", "-c", f'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod {mode} "$1"', "sh", path, stdin=text)

    def install(self) -> None:
        """Put the units and the program in place, as deploy/ROLLOUT.md says."""
        units = ROOT / "deploy" / "systemd"
        for unit in units.glob("*.service"):
            self.put(f"/etc/rankgate-units/{unit.name}", unit.read_text())
        # The interpreter and the packages that run this test, where any user of the machine can read them.
        python = f"/opt/rankgate/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        path = (
            "LD_LIBRARY_PATH=/opt/rankgate/python/lib PYTHONPATH=/opt/rankgate/source:/opt/rankgate/site "
            "PYTHONDONTWRITEBYTECODE=1"
        )
        self.put(PROGRAM, f'#!/bin/sh\n{path} exec {python} -m planner.cli "$@"\n', "755")
        self.run("systemctl", "daemon-reload")

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        told = self.run("systemctl", "show", unit, *(f"--property={name}" for name in properties))
        return dict(line.split("=", 1) for line in told.splitlines())

    async def until(self, predicate: Callable[[], object], what: str) -> None:
        """Look again and again until it is true."""
        end = time.monotonic() + PATIENCE
        while not predicate():
            if time.monotonic() > end:
                raise AssertionError(
                    f"waited {PATIENCE:g} s for {what}; {self._log.read_text(errors='replace')[-2_000:]}"
                )
            await asyncio.sleep(0.05)
