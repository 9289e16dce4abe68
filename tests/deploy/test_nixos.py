"""The NixOS module, evaluated by nix with a stand-in for NixOS's module system: NixOS itself is not here, and no system was built."""

from __future__ import annotations

import json
import os
import re
import subprocess
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.machine import ROOT, needed

pytestmark = pytest.mark.slow

MODULE = ROOT / "deploy" / "nixos" / "rankgate.nix"
STAND_IN = ROOT / "tests" / "deploy" / "module-system.nix"

PLANNER = '{ enable = true; passwordFile = "/run/secrets/planner"; }'
RUNNER = '{ enable = true; ranks = [ 0 1 ]; passwordFile = "/run/secrets/demo"; }'
INSTANCE = '{ name = "demo"; worldSize = 4; }'


class Nix:
    """``nix-instantiate`` with a store of its own."""

    def __init__(self, directory: Path) -> None:
        self._program = needed("nix-instantiate", "nix-bin")
        self.store = directory / "store"
        self._environment = {
            **os.environ,
            "NIX_REMOTE": "",
            "NIX_STORE_DIR": str(self.store),
            "NIX_STATE_DIR": str(directory / "state"),
            "NIX_LOG_DIR": str(directory / "log"),
            "NIX_CONF_DIR": str(directory),
            "HOME": str(directory),
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, "--option", "build-users-group", "", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def evaluate(self, settings: str) -> dict[str, Any]:
        """What the module makes of settings; a refusal by a type is a `ValueError`."""
        arguments = ["--eval", "--read-write-mode", "--strict", "--json", str(STAND_IN), "--arg", "module", str(MODULE)]
        done = self.run(*arguments, "--arg", "settings", settings)
        if done.returncode:
            raise ValueError(done.stderr)
        return json.loads(done.stdout)


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    return Nix(tmp_path)


def settings(**options: str) -> str:
    """Settings that work, and what a test says otherwise. An option given as an empty string is left out."""
    chosen = {
        "package": '"/opt/rankgate"',
        "redis.host": '"store.example"',
        "instance": INSTANCE,
        "planner": PLANNER,
        "runner": RUNNER,
    } | {name.replace("__", "."): value for name, value in options.items()}
    return "{ " + " ".join(f"{name} = {value};" for name, value in chosen.items() if value) + " }"


def test_the_module_is_read_by_nix(nix: Nix) -> None:
    done = nix.run("--parse", str(MODULE))
    assert done.returncode == 0, done.stderr


def test_it_makes_one_service_for_the_planner_and_one_for_each_rank(nix: Nix) -> None:
    made = nix.evaluate(settings())
    assert made["failed"] == []
    assert sorted(made["services"]) == ["rankgate-planner", "rankgate-runner-0", "rankgate-runner-1"]
    runner = made["services"]["rankgate-runner-1"]
    assert runner["wantedBy"] == ["multi-user.target"]
    assert runner["serviceConfig"]["ExecStart"] == (
        '"/opt/rankgate/bin/rankgate" "runner" "--rank" "1" "--address" "" "--engine" "simulated" "--engine-config" "{}"'
    )
    assert runner["serviceConfig"]["LoadCredential"] == "redis-password:/run/secrets/demo"
    assert runner["environment"]["RANKGATE_REDIS"] == "redis://rankgate.demo.ranks@store.example:6379/0"
    instance = Path(runner["environment"]["RANKGATE_INSTANCE_FILE"])
    from planner.cli.instance_file import read_instance_file

    spec = read_instance_file(instance)
    assert (spec.name, spec.world_size, spec.model.total_layers) == ("demo", 4, 16)


def test_what_is_not_enabled_is_not_there(nix: Nix) -> None:
    assert sorted(nix.evaluate(settings(runner=""))["services"]) == ["rankgate-planner"]
    assert "rankgate-planner" not in nix.evaluate(settings(planner=""))["services"]
    assert nix.evaluate(settings(planner="", runner="", instance=""))["services"] == {}


def unit(name: str) -> dict[str, list[str]]:
    """The [Service] section of a unit in deploy/systemd, all lines of each name."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (ROOT / "deploy" / "systemd" / name).read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append({"yes": "true", "no": "false"}.get(value, value))
    return found


@pytest.mark.parametrize(
    ("service", "file"),
    [("rankgate-planner", "rankgate-planner.service"), ("rankgate-runner-0", "rankgate-runner@.service")],
)
def test_a_service_is_the_same_as_the_unit_of_other_systems(nix: Nix, service: str, file: str) -> None:
    made = nix.evaluate(settings())["services"][service]["serviceConfig"]
    theirs, own = unit(file), {"ExecStart", "Environment", "EnvironmentFile", "LoadCredential", "RuntimeDirectory"}
    assert set(made) - own == set(theirs) - own
    for key in set(made) - own:
        value = made[key] if isinstance(made[key], list) else [made[key]]
        assert [str(one).lower() if isinstance(one, bool) else str(one) for one in value] == theirs[key], key


def test_an_engine_on_a_gpu_opens_the_sandbox_as_the_drop_in_does(nix: Nix) -> None:
    devices = '[ "char-nvidia rw" "char-nvidia-uvm rw" "char-drm rw" ]'
    runner = RUNNER.replace("}", f"deviceAllow = {devices}; }}")
    made = nix.evaluate(settings(runner=runner))["services"]["rankgate-runner-0"]["serviceConfig"]
    drop_in = RawConfigParser(strict=False)
    drop_in.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]  configparser's own way to keep the case
    drop_in.read(ROOT / "deploy" / "systemd" / "rankgate-runner@.service.d" / "gpu.conf.example")
    for key, value in drop_in["Service"].items():
        if key == "DeviceAllow":
            assert value in made[key]
        else:
            said: Any = made[key]
            said = " ".join(said) if key == "SupplementaryGroups" else {False: "no"}.get(said, said)
            assert said == value


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heartbeat": "3"}, "heartbeat is 3 s and lease is 6 s; the heartbeat must be at most a third"),
        ({"waitForStore": "101"}, "waitForStore is 101 s; systemd gives a start 120 s"),
        ({"redis__host": '"planner:secret@store"'}, "it must be a host name or an address alone"),
        ({"planner": "{ enable = true; }"}, r"planner.passwordFile is not set; it must be an absolute path outside"),
        (
            {"runner": RUNNER.replace("/run/secrets/demo", "secrets/demo")},
            "runner.passwordFile is secrets/demo; it must",
        ),
        ({"instance": ""}, "runner is enabled and services.rankgate.instance is not set"),
        ({"runner": RUNNER.replace("[ 0 1 ]", "[ ]")}, "runner.ranks is empty"),
        ({"runner": RUNNER.replace("[ 0 1 ]", "[ 0 1 0 ]")}, "names a rank twice"),
        ({"runner": RUNNER.replace("[ 0 1 ]", "[ 4 ]")}, "has a rank that is not below instance.worldSize"),
    ],
)
def test_a_wrong_combination_is_refused_with_one_sentence(nix: Nix, options: dict[str, str], sentence: str) -> None:
    [said] = nix.evaluate(settings(**options))["failed"]
    assert re.search(sentence, said), said


def test_a_password_in_the_nix_store_is_refused(nix: Nix) -> None:
    stored = PLANNER.replace("/run/secrets/planner", f"{nix.store}/0123-password")
    [said] = nix.evaluate(settings(planner=stored))["failed"]
    assert "outside the Nix store, which every user can read" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"namespace": '"Rank Gate"'}, "is not of type `strMatching"),
        ({"instance": '{ name = "demo"; worldSize = 0; }'}, "not of type `int from 1 to 16384'"),
        ({"instance": '{ name = "demo"; }'}, "`services.rankgate.instance.worldSize' is used but not defined"),
        ({"lease": '"6"'}, "`services.rankgate.lease' is not of type `positive number'"),
        ({"password": '"secret"'}, "`services.rankgate.password' does not exist"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(nix: Nix, options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        nix.evaluate(settings(**options))


def test_nothing_in_a_setting_is_read_by_systemd_as_a_specifier_or_a_variable(nix: Nix) -> None:
    runner = RUNNER.replace("}", 'environment.A = "100%"; engineConfig.b = "$HOME 5%"; }')
    made = nix.evaluate(settings(runner=runner, redis__query='"?x=%2Fy"'))["services"]["rankgate-runner-0"]
    assert made["environment"]["A"] == "100%%"
    assert made["environment"]["RANKGATE_REDIS"].endswith("?x=%%2Fy")
    assert made["serviceConfig"]["ExecStart"].endswith(r'"{\"b\":\"$$HOME 5%%\"}"')
    assert made["environment"]["RANKGATE_REDIS_PASSWORD_FILE"] == "%d/redis-password", "this one is meant"
