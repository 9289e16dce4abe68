"""The units of deploy/systemd: read and judged by systemd's own tools, and run by a real systemd with their whole sandbox.

Not run here: a boot of a whole machine, GPUs (the drop-in), and other versions of systemd than Debian's.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.machine import PROGRAM, ROOT, Machine, needed
from tests.integration.servers import RealServer

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

UNITS = ROOT / "deploy" / "systemd"
MOST_EXPOSED = {"rankgate-planner.service": 1.1, "rankgate-runner@.service": 1.2}
"""What systemd-analyze security says today, of 10: less is safer."""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program that exists; the runner also as rank 0."""
    program = needed("true", "coreutils")
    for unit in UNITS.glob("*.service"):
        for name in {unit.name, unit.name.replace("@.", "@0.")}:
            (tmp_path / name).write_text(unit.read_text().replace(PROGRAM, program))
    return tmp_path


def analyze(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = needed("systemd-analyze", "systemd")
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("unit", ["rankgate-planner.service", "rankgate-runner@0.service"])
def test_systemd_has_nothing_to_say_against_a_unit(units: Path, unit: str) -> None:
    done = analyze("verify", f"./{unit}", cwd=units)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_verify_does_complain_about_a_unit_that_is_wrong(units: Path) -> None:
    unit = units / "rankgate-planner.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSec=often"))
    assert "Failed to parse sec value" in analyze("verify", f"./{unit.name}", cwd=units).stderr


@pytest.mark.parametrize("unit", sorted(MOST_EXPOSED))
def test_a_unit_is_no_more_exposed_than_it_was(units: Path, unit: str) -> None:
    said = analyze("security", "--offline=true", "--no-pager", f"./{unit}", cwd=units).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+) OK", said)
    assert found, said
    assert float(found.group(1)) <= MOST_EXPOSED[unit], said


def test_every_variable_of_the_examples_is_one_that_rankgate_or_its_unit_reads() -> None:
    sources = "".join(path.read_text() for path in [*UNITS.glob("*.service"), ROOT / "planner" / "cli" / "options.py"])
    for example in UNITS.glob("*.env.example"):
        for name in re.findall(r"^#?(\w+)=", example.read_text(), re.MULTILINE):
            assert name in sources, f"{example.name}: {name}"


# --- with a real systemd --------------------------------------------------------------------------------------------------

PASSWORD = "not to be seen anywhere"
SERVICES = ("rankgate-planner", "rankgate-runner@0", "rankgate-runner@1")
HURRY = "[Service]\nWatchdogSec=3\nTimeoutAbortSec=1\nRestartSec=100ms\nStandardOutput=append:/run/%N.log\nStandardError=append:/run/%N.log\n"


@dataclass
class Site:
    """A planner and two runners as services, one server, and what a test wants to know of them."""

    machine: Machine
    server: RealServer

    def rankgate(self, *arguments: str, check: bool = True) -> str:
        environment = (
            f"RANKGATE_REDIS=redis://127.0.0.1:{self.server.port}/0",
            "RANKGATE_REDIS_PASSWORD_FILE=/etc/rankgate/planner.password",
        )
        return self.machine.run("env", *environment, PROGRAM, *arguments, check=check)

    def serves(self) -> bool:
        return "serving" in self.rankgate("status", "demo", check=False)

    def pids(self) -> dict[str, str]:
        return {service: self.machine.show(service, "MainPID")["MainPID"] for service in SERVICES}

    def restarts(self) -> dict[str, int]:
        return {service: int(self.machine.show(service, "NRestarts")["NRestarts"]) for service in SERVICES}


@asynccontextmanager
async def site() -> AsyncGenerator[Site]:
    async with RealServer(transport="tcp", password=PASSWORD) as server, Machine() as machine:
        machine.install()
        for name in ("planner", "runner"):
            machine.put(f"/etc/rankgate/{name}.password", f"{PASSWORD}\n", "600")
            lines = [f"RANKGATE_REDIS=redis://127.0.0.1:{server.port}/0", "RANKGATE_LEASE=3", "RANKGATE_HEARTBEAT=1"]
            if name == "planner":
                lines.append("RANKGATE_INSTANCE_FILE=/etc/rankgate/instance.toml")
            machine.put(f"/etc/rankgate/{name}.env", "\n".join(lines) + "\n")
        machine.put("/etc/rankgate/instance.toml", 'name = "demo"\nworld_size = 2\nlayers = 4\n')
        for unit in MOST_EXPOSED:
            machine.put(f"/etc/rankgate-units/{unit}.d/hurry.conf", HURRY)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", *SERVICES)
        made = Site(machine, server)
        await machine.until(made.serves, "the instance to serve")
        yield made


async def test_the_services_bring_an_instance_up_and_no_password_can_be_seen() -> None:
    async with site() as here:
        machine = here.machine
        assert here.restarts() == dict.fromkeys(SERVICES, 0)
        for service in SERVICES:
            told = machine.show(service, "ActiveState", "StatusText", "Type")
            assert (told["ActiveState"], told["Type"]) == ("active", "notify")
        await machine.until(
            lambda: machine.show("rankgate-runner@1", "StatusText")["StatusText"] == "demo rank 1: Ready",
            "the status to be told",
        )
        for service, pid in here.pids().items():
            owner = machine.run("stat", "-c", "%U", f"/proc/{pid}").strip()
            assert owner.startswith("rankgat"), f"{service} runs as {owner}"
            open_to_see = machine.run("sh", "-c", f"tr '\\0' '\\n' </proc/{pid}/environ; cat /proc/{pid}/cmdline")
            assert PASSWORD not in open_to_see
            assert "RANKGATE_STATE_FILE" in open_to_see
        assert PASSWORD not in machine.run("sh", "-c", "cat /run/rankgate*.log; systemctl show 'rankgate*'")
        state = "/run/rankgate-runner-1/state"
        assert "demo rank 1: Ready" in here.rankgate("health", "runner", "--state-file", state)
        assert "led by" in here.rankgate("health", "planner", "--state-file", "/run/rankgate-planner/state")

        machine.run("systemctl", "stop", *SERVICES)
        for service in SERVICES:
            told = machine.show(service, "ActiveState", "Result")
            assert (told["ActiveState"], told["Result"]) == ("inactive", "success"), "it ended when it was asked to"
        assert machine.run("pgrep", "-f", "planner.cli|engine-of-rank", check=False) == "", "nobody is left behind"


@pytest.mark.parametrize("hung", ["rankgate-runner@1", "rankgate-planner"])
async def test_a_process_that_hangs_is_restarted_and_nobody_else(hung: str) -> None:
    async with site() as here:
        before = here.pids()
        here.machine.run("kill", "-STOP", before[hung])
        await here.machine.until(lambda: here.restarts()[hung] == 1, "the hung process to be restarted")
        await here.machine.until(
            lambda: here.machine.show(hung, "ActiveState")["ActiveState"] == "active", "it to be ready again"
        )
        await here.machine.until(here.serves, "the instance to serve again")
        after = here.pids()
        assert {service for service in SERVICES if before[service] != after[service]} == {hung}
        assert here.restarts() == {service: int(service == hung) for service in SERVICES}


async def test_a_store_that_is_away_for_long_restarts_nobody() -> None:
    """Twice as long as the watchdog waits for a beat: what is loaded is worth more."""
    async with site() as here:
        before = here.pids()
        here.server.pause()
        began = here.machine.run("cut", "-d ", "-f1", "/proc/uptime")
        await here.machine.until(
            lambda: float(here.machine.run("cut", "-d ", "-f1", "/proc/uptime")) - float(began) > 10, "10 s to pass"
        )
        here.server.resume()
        await here.machine.until(here.serves, "the instance to serve again")
        assert here.pids() == before
        assert here.restarts() == dict.fromkeys(SERVICES, 0)
