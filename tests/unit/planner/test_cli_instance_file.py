"""An instance as a TOML file says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from barrier import InvalidSettings
from planner.cli import main
from planner.cli.instance_file import MOST_BYTES, read_instance_file
from planner.spec import InstanceSpec
from runner.messages import ModelSpec


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "instance.toml"


def test_all_of_it_is_read(file: Path) -> None:
    file.write_text('name = "demo"\nworld_size = 4\nmodel_id = "llama"\nlayers = 80\n')
    assert read_instance_file(file) == InstanceSpec(
        name="demo", world_size=4, model=ModelSpec(model_id="llama", total_layers=80)
    )


def test_the_model_is_the_simulated_one_where_it_is_left_out(file: Path) -> None:
    file.write_text('name = "demo"\nworld_size = 2\n')
    assert read_instance_file(file).model == ModelSpec(model_id="simulated", total_layers=16)


def test_the_file_of_the_compose_cluster_is_one() -> None:
    spec = read_instance_file(Path(__file__).parents[3] / "deploy/config/instance.toml")
    assert (spec.name, spec.world_size) == ("demo", 4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name = ", "is not TOML"),
        ("world_size = 4", 'has no name; add a line such as name = "demo"'),
        ('name = "demo"', "has no world_size; add a line such as world_size = 4"),
        ('name = "demo"\nworld_size = 4\nworldsize = 5', "has the key 'worldsize'; an instance has name, world_size"),
        ('name = "De mo"\nworld_size = 4', "instance 'De mo' is not a name"),
        ("name = 5\nworld_size = 4", "name is 5; it must be text"),
        ('name = "demo"\nworld_size = 0', "world_size is 0; it must be a whole number"),
        ('name = "demo"\nworld_size = "4"', "world_size is '4'; it must be a whole number"),
        ('name = "demo"\nworld_size = 4\nlayers = 0', "layers is 0; it must be at least 1"),
        ('name = "demo"\nworld_size = 4\nlayers = "16"', "must be a whole number"),
        ('name = "demo"\nworld_size = 4\nmodel_id = ""', "model_id has 0 characters; it must have at least 1"),
        ("#" * (MOST_BYTES + 1), "is larger than 65,536 bytes"),
    ],
)
def test_what_is_wrong_is_named(file: Path, text: str, sentence: str) -> None:
    file.write_text(text)
    with pytest.raises(InvalidSettings) as caught:
        read_instance_file(file)
    assert str(file) in str(caught.value)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(file: Path) -> None:
    with pytest.raises(InvalidSettings, match="cannot be read: No such file"):
        read_instance_file(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSettings, match="is not TOML"):
        read_instance_file(file)


NOWHERE = "redis://127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["launch"], "Missing argument 'INSTANCE'"),
        (["launch", "demo", "--file", "FILE"], "demo and --file FILE are both given: choose one of them"),
        (["launch", "--file", "FILE"], "FILE cannot be read"),
        (["runner"], "Missing option '--instance'"),
        (["runner", "--instance-file", "FILE"], "FILE cannot be read"),
        (["planner", "--redis", NOWHERE, "--instance-file", "FILE"], "FILE cannot be read"),
    ],
)
def test_the_commands_say_what_is_wrong_with_it(
    arguments: list[str], sentence: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANKGATE_INSTANCE_FILE", raising=False)
    assert main([word.replace("FILE", str(file)) if word == "FILE" else word for word in arguments]) == 2
    assert sentence.replace("FILE", str(file)) in capsys.readouterr().err


def test_a_runner_takes_any_rank_of_the_files_instance(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gets as far as the server, which is not there."""
    file.write_text('name = "demo"\nworld_size = 2\n')
    monkeypatch.setenv("RANKGATE_INSTANCE_FILE", str(file))
    assert main(["runner", "--redis", NOWHERE]) == 1
    assert "no answer from the store" in capsys.readouterr().err
    assert main(["runner", "--redis", NOWHERE, "--rank", "2"]) == 2
    assert "with --world-size 2 ranks are 0 to 1" in capsys.readouterr().err
    assert main(["runner", "--redis", NOWHERE, "--instance", "other"]) == 2  # an option beats the environment
    assert "no rank is named" in capsys.readouterr().err
