"""A real cluster of docker-compose.yml, in containers that the tests kill, pause and cut off.

Everything is done to containers of this project's own name, by their ids. The store is published on a free port of the loopback
interface, where the tests look at it as its administrator; runners and planners know nothing of that.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from barrier import Settings, Store, StoreError, SystemClock, connect
from barrier.protocol.ids import EpochId
from barrier.store.keys import Keys
from planner.cli.look import Observer, Seen, UnknownInstance
from planner.history import History, RankSaid, find_breaches, read_history
from planner.requests import RequestQueue
from runner.messages import TaskStatusUpdated

ROOT = Path(__file__).parents[2]
CONTEXT = (
    ".dockerignore",
    ".env",
    "LICENSE",
    "README.md",
    "barrier",
    "deploy",
    "docker-compose.yml",
    "docs",
    "planner",
    "pyproject.toml",
    "runner",
)
"""What a checkout needs for a cluster."""

LEASE = 4.0
HEARTBEAT = 1.0
NAMESPACE = "rankgate"
INSTANCE = "demo"
RANKS = 4
BOUND = 120.0
"""Seconds after which a test gives up waiting; a bound for hangs, not a measure."""


class NoDocker(Exception):
    """What is missing, and how to get it."""


def run(*command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, stdin: str | None = None) -> str:
    """Run a command; its stdout. One that fails is a failure of the test, with what it said."""
    done = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, (
        f"{shlex.join(command)[:300]} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.stdout


def docker(*arguments: str, stdin: str | None = None) -> str:
    return run("docker", *arguments, stdin=stdin).strip()


def compose_command() -> list[str]:
    """How Compose is called here: COMPOSE from the environment, Compose v2, or docker-compose.

    Raises:
        NoDocker: there is no Docker, no daemon, or no Compose.
    """
    if shutil.which("docker") is None:
        raise NoDocker("the compose tests need docker, which is not on the PATH: install it (on Debian: docker.io)")
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        raise NoDocker(
            "the compose tests need a Docker daemon that answers: start one, or set DOCKER_HOST; .ci/compose does both"
        )
    candidates = [shlex.split(os.environ["COMPOSE"])] if os.environ.get("COMPOSE") else []
    for command in (*candidates, ["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and not subprocess.run([*command, "version"], capture_output=True, check=False).returncode
        ):
            return command
    raise NoDocker("the compose tests need Compose: install docker-compose-v2, or docker-compose on Debian")


def checkout(folder: Path, version: str | None = None) -> Path:
    """A checkout of what is to be built, under another version number where one is given."""
    for name in CONTEXT:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns(
                "__pycache__", "rankgate.*", "store-users", "store-ca", "store-cert", "store-key", "*.whl", ".new.*"
            )
            shutil.copytree(
                source, folder / name, ignore=ignored if name == "deploy" else shutil.ignore_patterns("__pycache__")
            )
            if name == "deploy":  # its name is like those of the users' secrets
                shutil.copy2(source / "nixos" / "rankgate.nix", folder / name / "nixos" / "rankgate.nix")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    if version is not None:
        path = folder / "pyproject.toml"
        text = path.read_text()
        changed = re.sub(r'^version = ".*"$', f'version = "{version}"', text, flags=re.MULTILINE)
        assert changed != text
        path.write_text(changed)
    return folder


class Figures:
    """What was measured, told at the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, what: str, value: str) -> None:
        self.lines.append(f"{what:<74} {value}")

    def step(self, what: str, began: float) -> None:
        self.add(what, f"{time.monotonic() - began:6.1f} s")

    def recovery(self, what: str, seconds: float) -> None:
        self.add(what, f"{seconds / LEASE:6.2f} leases of {LEASE:g} s")


class ComposeCluster:
    """One project.

    Args:
        project: its name.
        folder: a checkout.
        secrets: where its secrets are.
        environment: more variables for Compose.
        files: the compose files.
        figures: where to say what was measured.
    """

    def __init__(
        self,
        project: str,
        folder: Path,
        secrets: Path,
        environment: Mapping[str, str],
        figures: Figures,
        *,
        files: tuple[str, ...] = (),
        profile: str = "plain",
    ) -> None:
        self.project = project
        self.folder = folder
        self.secrets = secrets
        self.figures = figures
        self.store_service = "redis" if profile == "plain" else "redis-tls"
        self._compose = compose_command()
        loopback = str(ROOT / "tests" / "compose" / "loopback.yml")
        self.environment = {
            "COMPOSE_PROJECT_NAME": project,
            "COMPOSE_FILE": os.pathsep.join(["docker-compose.yml", *files, loopback]),
            "COMPOSE_PROFILES": profile,
            "COMPOSE": shlex.join(self._compose),
            "DOCKER_BUILDKIT": "0",  # the classic builder is everywhere; BuildKit is a plugin of its own on some systems
            "COMPOSE_DOCKER_CLI_BUILD": "0",
            "RANKGATE_SECRETS": str(secrets),
            "RANKGATE_LEASE": f"{LEASE:g}",
            "RANKGATE_HEARTBEAT": f"{HEARTBEAT:g}",
            "RANKGATE_HEALTH_INTERVAL": "20s",
            **environment,
        }

    # --- containers ---------------------------------------------------------------------------------------------------

    def compose(self, *arguments: str) -> str:
        return run(*self._compose, *arguments, env=self.environment, cwd=self.folder)

    def up(self, *, runners: int = RANKS, planners: int = 2, build: bool = False) -> None:
        """Start what is missing. No service is named: Compose v2 refuses to scale one that is not."""
        self.compose(
            "up",
            "-d",
            *(["--build"] if build else ["--no-build", "--no-recreate"]),
            *("--scale", f"runner={runners}", "--scale", f"planner={planners}"),
        )

    def containers(self, service: str | None = None, *, every: bool = False) -> list[str]:
        """Ids of the project's containers, oldest first; those that are stopped too with `every`."""
        filters = ["--filter", f"label=com.docker.compose.project={self.project}"]
        if service:
            filters += ["--filter", f"label=com.docker.compose.service={service}"]
        return docker("ps", "-q", "--no-trunc", *(["-a"] if every else []), *filters).split()[::-1]

    def services(self) -> Counter[str]:
        """How many containers there are of each service, whatever their state."""
        form = '{{.Label "com.docker.compose.service"}} {{.State}}'
        lines = docker(
            "ps", "-a", "--format", form, "--filter", f"label=com.docker.compose.project={self.project}"
        ).splitlines()
        return Counter(lines)

    def in_container(self, container: str, *command: str, stdin: str | None = None) -> str:
        return docker("exec", *(["-i"] if stdin is not None else []), container, *command, stdin=stdin)

    def kill_process(self, container: str) -> None:
        """SIGKILL for the runner or planner itself, by the pid that it has in its container. Docker's own kill would count as a
        stop that was asked for, and nothing would be restarted.
        """
        program = "import json, os; os.kill(json.load(open('/run/rankgate/state'))['pid'], 9)"
        done = subprocess.run(
            ["docker", "exec", container, "python3", "-c", program], capture_output=True, text=True, check=False
        )
        # 137: the container ended with the process, and took this one along.
        assert done.returncode in (0, 137), done.stdout + done.stderr

    def down(self) -> None:
        run(
            *(*self._compose, "down", "--volumes", "--remove-orphans", "--timeout", "10"),
            # By the variable: in Compose v2 the option --profile would replace the one that the store belongs to.
            env={**self.environment, "COMPOSE_PROFILES": f"{self.environment['COMPOSE_PROFILES']},tool"},
            cwd=self.folder,
        )

    def leftovers(self) -> list[str]:
        """What is left of the project: containers, volumes, networks."""
        label = f"label=com.docker.compose.project={self.project}"
        return [
            *docker("ps", "-aq", "--filter", label).split(),
            *docker("volume", "ls", "-q", "--filter", label).split(),
            *docker("network", "ls", "-q", "--filter", label).split(),
        ]

    # --- the store ----------------------------------------------------------------------------------------------------

    def password(self, user: str) -> str:
        return (self.secrets / f"{NAMESPACE}.{user}").read_text().strip()

    def url(self) -> str:
        (container,) = self.containers(self.store_service)
        port = docker("port", container, "6379").splitlines()[0].rpartition(":")[2]
        scheme, query = (
            ("redis", "") if self.store_service == "redis" else ("rediss", f"?ssl_ca_certs={self.secrets}/store-ca")
        )
        return f"{scheme}://{NAMESPACE}.admin:{self.password('admin')}@127.0.0.1:{port}/0{query}"

    @asynccontextmanager
    async def store(self, bound: float = BOUND) -> AsyncGenerator[Store]:
        """The store as its administrator; waits for one that is starting."""
        deadline = time.monotonic() + bound
        while True:
            try:
                # The URL is asked anew: a container that was replaced has another port.
                store = await connect(self.url(), settings=Settings(lease=LEASE, heartbeat=HEARTBEAT))
                break
            except (StoreError, AssertionError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"the store did not come up within {bound:g} s: {error}") from error
            await asyncio.sleep(0.1)
        try:
            yield store
        finally:
            await store.close()

    async def look(self) -> Seen:
        async with self.store() as store, Observer(store, NAMESPACE) as observer:
            return await observer.look(INSTANCE)

    async def until(self, what: str, reached: Callable[[Seen], bool], bound: float = BOUND) -> tuple[Seen, float]:
        """Look at the instance until it is where it shall be; returns that picture, and the seconds that it took."""
        began = time.monotonic()
        last = "nothing was seen"
        while time.monotonic() - began < bound:
            with suppress(StoreError, UnknownInstance):
                async with self.store() as store, Observer(store, NAMESPACE) as observer:
                    while time.monotonic() - began < bound:
                        seen = await observer.look(INSTANCE)
                        last = f"{seen.state}: {seen.explanation}"
                        if reached(seen):
                            return seen, time.monotonic() - began
                        await asyncio.sleep(0.05)
            await asyncio.sleep(0.05)
        raise AssertionError(f"not {what} within {bound:g} s: {last}\n{self.logs()}")

    async def serving(self, *, after: EpochId | None = None, bound: float = BOUND) -> tuple[Seen, float]:
        """Wait until all ranks serve, in another epoch than `after`."""
        return await self.until(
            "serving" if after is None else f"serving after {after}",
            lambda seen: seen.serving and (after is None or epoch_of(seen) != after),
            bound,
        )

    async def generates(self) -> None:
        """Generate a text, as a client does."""
        async with self.store() as store:
            requests = RequestQueue(store, Keys(NAMESPACE, INSTANCE), SystemClock())
            pieces = [piece async for piece in requests.generate("Why?", max_tokens=8, seconds=BOUND)]
        assert pieces

    async def history(self) -> History:
        async with self.store() as store:
            return await read_history(store, Keys(NAMESPACE, INSTANCE))

    async def check(self, *, runners: int = RANKS, others: Mapping[str, int] | None = None) -> None:
        """No promise was broken so far, each rank loaded at most once in each epoch, and nothing is left lying about."""
        history = await self.history()
        breaches = find_breaches(history)
        assert not breaches, "\n".join(breach.sentence for breach in breaches)
        loads = loads_of(history)
        assert loads, "the history holds no load at all"
        assert max(loads.values()) == 1, f"loaded more than once: {loads.most_common(4)}"
        expected = Counter(
            {"runner running": runners, "planner running": 2, f"{self.store_service} running": 1, **(others or {})}
        )
        assert self.services() == +expected, docker("ps", "-a")
        async with self.store() as store:
            keys = [key.decode() async for key in store.commands.scan_iter()]
            lives = {key: await store.commands.pttl(key) for key in keys}
        assert [key for key, left in lives.items() if left == -1] == [], "a key without a lifetime"
        known = re.compile(
            rf"\{{{NAMESPACE}:{INSTANCE}\}}:(epoch|leader|tasks|signals|events|requests|rank:[0-3]|claims:[0-3]|(out|once):.+)"
            rf"|\{{{NAMESPACE}:-\}}:(instances|changes)"
        )
        assert [key for key in keys if known.fullmatch(key) is None] == []

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail=15")[-12_000:]


def epoch_of(seen: Seen) -> EpochId:
    """The epoch in a picture that has one."""
    assert seen.snapshot.epoch is not None
    return seen.snapshot.epoch.id


def loads_of(history: History) -> Counter[tuple[EpochId | None, int]]:
    """How often each rank began to load in each epoch."""
    return Counter(
        (event.epoch, event.rank)
        for event in history.events
        if isinstance(event, RankSaid)
        and isinstance(event.event, TaskStatusUpdated)
        and event.event.state == "Running"
        and event.event.task_id.startswith("load.")
    )


def prepare(folder: Path, figures: Figures) -> dict[str, str]:
    """Make base images and wheels without a registry; returns the variables that name the bases."""
    began = time.monotonic()
    bases = {
        "BASE": "rankgate-base:bookworm",
        "BUILD_BASE": "rankgate-build-base:bookworm",
        "STORE_IMAGE": "rankgate-store:bookworm",
    }
    there = docker("images", "--format", "{{.Repository}}:{{.Tag}}").splitlines()
    if not set(bases.values()) <= set(there):
        if os.geteuid() != 0 or shutil.which("debootstrap") is None:
            raise NoDocker(
                "the compose tests make their base images with deploy/airgap/bases.sh, which needs root and debootstrap: run "
                "that script first, or the tests as root with debootstrap installed"
            )
        run(str(folder / "deploy/airgap/bases.sh"))
        figures.step("base images from Debian packages", began)
    began = time.monotonic()
    run(str(folder / "deploy/airgap/wheels.sh"), env={"PYTHON": sys.executable})
    figures.step("wheels from PyPI, hashes checked", began)
    return bases
