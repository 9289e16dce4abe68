"""The command line as a user meets it before anything is started: options, the environment, errors, exit codes, the log."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from loguru import logger

from barrier import InvalidSettings, Settings
from barrier.errors import RankgateError
from planner.cli import main
from planner.cli.options import held_back, rank_range, rank_span, times
from planner.cli.process import Interrupts, configure_log, connect_store, log_level, redacted, run
from planner.launcher import own_environment
from tests.unit.mistakes import hearing, mistaken, mistaken_later

pytestmark = pytest.mark.anyio

NOWHERE = "redis://127.0.0.1:1"
COMMANDS = ["up", "runner", "planner", "launch", "stop", "generate", "status", "explain"]  # race has no server to name


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option comes from the environment of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("RANKGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Run a command that must fail; returns the one sentence that it says."""
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("rankgate: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err.removeprefix("rankgate: ").rstrip("\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_in_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: rankgate {command} ")
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "RANKGATE_NAMESPACE" in text


def test_without_a_command_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rankgate ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["up"], "Missing option '--world-size'"),
        (["up", "--world-size", "0"], "'--world-size': it is 0; it must be from 1 to 16,384"),
        (["up", "--world-size", "16385"], "'--world-size': it is 16,385; it must be from 1 to 16,384"),
        (["up", "--world-size", "many"], "'--world-size'"),
        (["up", "--world-size", "2", "--layers", "0"], "'--layers': it is 0; it must be from 1 to 10,000"),
        (["up", "--world-size", "2", "--max-tokens", "0"], "'--max-tokens': it is 0"),
        (["up", "--world-size", "2", "--timeout", "nan"], "'--timeout': it is nan"),
        (["up", "--world-size", "2", "--ranks-per-process", "0"], "'--ranks-per-process': it is 0"),
        (["up", "--world-size", "2", "--lease", "-1"], "lease is -1.0; it must be a finite number above 0"),
        (["up", "--world-size", "2", "--lease", "1", "--heartbeat", "2"], "heartbeat is 2 s and lease is 1 s"),
        (["up", "--world-size", "2", "--instance", "My Model"], "'My Model' is not a name"),
        (["up", "--world-size", "2", "--namespace", "a:b"], "'a:b' is not a name"),
        (["up", "--world-size", "2", "--model", ""], "--model has 0 characters; it must have at least 1"),
        (["up", "--world-size", "2", "--hold-back", "3:2"], "names rank 3; the ranks here are 0 to 1"),
        (["up", "--world-size", "2", "--hold-back", "1"], "'1' is not RANK:SECONDS, for example 3:2"),
        (["up", "--world-size", "2", "--hold-back", "1:-2"], "the seconds must be a finite number, 0 or more"),
        (["up", "--world-size", "1", "--hold-back", "0:2"], "a single rank has nobody to connect to"),
        (["up", "--world-size", "1000"], "would start 1,000 runner processes, and at most 128 are started"),
        (["up", "--world-size", "1000", "--ranks-per-process", "7"], "pass --ranks-per-process 8 or more"),
        (["up", "--world-size", "2", "--engine-config", "{"], "--engine-config is not JSON"),
        (["runner", "--rank", "0"], "Missing option '--instance'"),
        (["runner", "--instance", "demo"], "no rank is named"),
        (["runner", "--instance", "demo", "--rank", "-1"], "'--rank': it is -1; it must be at least 0"),
        (["runner", "--instance", "demo", "--rank", "1", "--ranks", "0-1"], "choose one of them"),
        (["runner", "--instance", "demo", "--ranks", "3-1"], "the first must not be above the last"),
        (["runner", "--instance", "demo", "--ranks", "a-b"], "is not FIRST-LAST, for example 0-15"),
        (
            ["runner", "--instance", "demo", "--rank", "2", "--world-size", "2"],
            "rank 2 is given; with --world-size 2 ranks are 0 to 1",
        ),
        (
            ["runner", "--instance", "demo", "--rank", "0"],
            "no server is given: pass --redis URL, or set RANKGATE_REDIS",
        ),
        (
            ["runner", "--instance", "demo", "--rank", "0", "--redis", NOWHERE, "--engine-config", "{"],
            "--engine-config is not JSON",
        ),
        (
            ["runner", "--instance", "demo", "--rank", "0", "--redis", NOWHERE, "--engine-config", "[]"],
            "--engine-config must be a JSON object",
        ),
        (
            ["runner", "--instance", "demo", "--rank", "0", "--redis", NOWHERE, "--engine-config", "@/no/such/file"],
            "/no/such/file cannot be read",
        ),
        (["planner"], "no server is given"),
        (["planner", "--redis", NOWHERE, "--max-failures", "-1"], "max_failures is -1"),
        (["launch", "Demo", "--world-size", "2"], "'Demo' is not a name"),
        (["launch", "demo", "--redis", NOWHERE], "Missing option '--world-size'"),
        (
            ["launch", "demo", "--world-size", "2", "--redis", NOWHERE, "--no-wait", "--prompt", "Hello"],
            "leave one of them out",
        ),
        (["stop", "demo"], "no server is given"),
        (["generate", "demo"], "Missing argument 'PROMPT'"),
        (["status", "DEMO", "--redis", NOWHERE], "'DEMO' is not a name"),
        (["status", "--redis", NOWHERE, "--watch", "--json"], "choose one of them"),
        (["status", "demo", "--redis", NOWHERE, "--all"], "--all is for the list of all instances, and demo names one"),
        (["explain", "--redis", NOWHERE], "Missing argument 'INSTANCE'"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(arguments, capsys, 2)
    assert sentence in said
    assert said.endswith(" --help")


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--world-size", "2"],
        ["runner", "--instance", "demo", "--rank", "0"],
        ["planner"],
        ["launch", "demo", "--world-size", "2"],
        ["stop", "demo"],
        ["generate", "demo", "Once upon a time"],
        ["status"],
        ["status", "demo"],
        ["explain", "demo"],
    ],
)
def test_a_server_that_nobody_runs_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint([*arguments, "--redis", NOWHERE], capsys, 1)
    assert "no answer from the store at 127.0.0.1:1" in said
    assert "Once upon a time" not in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--engine", "no.such.module:factory", "--inline-engine"],
            "engine 'no.such.module:factory' cannot be imported",
        ),
        (["--engine-config", '{"layer_seconds": -1}'], "the engine's configuration is wrong: "),
    ],
)
def test_a_wrong_engine_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(["runner", "--instance", "demo", "--rank", "0", "--redis", NOWHERE, *arguments], capsys, 1)
    assert sentence in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def make(config:", "SyntaxError: '(' was never closed"),
        ("import os; os.environ['SURELY_NOT_SET']", "KeyError: 'SURELY_NOT_SET'"),
        ("surely_not_defined", "NameError: name 'surely_not_defined' is not defined"),
    ],
)
def test_an_engine_whose_module_is_wrong_is_one_sentence(
    text: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a_wrong_engine.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    engine = ["--engine", "a_wrong_engine:make", "--inline-engine"]
    said = complaint(["runner", "--instance", "demo", "--rank", "0", "--redis", NOWHERE, *engine], capsys, 1)
    assert f"engine 'a_wrong_engine:make' cannot be imported: {sentence}" in said


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('{"layer_seconds": -1}', "the engine's configuration is wrong: "),
        ('{"faults": [{"phase": "load", "action": "refuse", "rank": 2}]}', "a simulated fault names rank 2"),
    ],
)
def test_up_refuses_a_wrong_engine_before_it_starts_anything(
    config: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in complaint(["up", "--world-size", "2", "--engine-config", config], capsys, 2)


def test_a_real_engine_cannot_be_held_back(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "runner",
        "--instance",
        "demo",
        "--rank",
        "0",
        "--redis",
        NOWHERE,
        "--engine",
        "a:b",
        "--hold-back",
        "0:1",
    ]
    assert complaint(arguments, capsys, 2) == "hold-back is for the simulated engine, and --engine is a:b"


def test_options_come_from_the_environment_and_the_command_line_beats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANKGATE_REDIS", NOWHERE)
    assert "127.0.0.1:1" in complaint(["status"], capsys, 1)
    assert "127.0.0.1:2" in complaint(["status", "--redis", "redis://127.0.0.1:2"], capsys, 1)

    monkeypatch.setenv("RANKGATE_LEASE", "-3")
    assert "lease is -3.0" in complaint(["planner"], capsys, 2)
    assert "127.0.0.1:1" in complaint(["planner", "--lease", "3"], capsys, 1)

    monkeypatch.setenv("RANKGATE_NAMESPACE", "NO")
    assert "env var: 'RANKGATE_NAMESPACE'" in complaint(["status"], capsys, 2)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_names_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from planner.cli import main; sys.exit(main(['up', '--world-size', '2']))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **own_environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert (
        ended.stderr
        == f"rankgate: the command line needs {missing}, which is not installed: run pip install 'rankgate[cli]'\n"
    )


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "planner.cli", "up", "--help"],
        env={**os.environ, **own_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


# --- what options mean ----------------------------------------------------------------------------------------------------


def test_a_heartbeat_follows_a_shorter_lease() -> None:
    assert times(None, None, None, usual=Settings()) == Settings()
    assert times(3.0, None, None, usual=Settings()).heartbeat == 1.0
    assert times(60.0, None, None, usual=Settings()).heartbeat == Settings().heartbeat
    assert times(60.0, 7.0, 0.5, usual=Settings()) == Settings(lease=60.0, heartbeat=7.0, command_timeout=0.5)


def test_ranks_are_read_and_told() -> None:
    assert rank_range("0-15") == range(16)
    assert rank_range("7") == range(7, 8)
    assert rank_span(range(4)) == "0 to 3"
    assert rank_span(range(3, 4)) == "3"


def test_a_later_hold_back_of_the_same_rank_wins() -> None:
    assert held_back(["3:2", "1:0.5", "3:4"], range(4)) == {3: 4.0, 1: 0.5}
    assert held_back(None, range(4)) == {}


def test_a_text_may_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "engine.json"
    config.write_text('{"layer_seconds": -5}')
    arguments = ["runner", "--instance", "demo", "--rank", "0", "--redis", NOWHERE, "--engine-config", f"@{config}"]
    assert "layer_seconds" in complaint(arguments, capsys, 1)


# --- secrets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:hunter2@store:6379/0", "redis://***@store:6379/0"),
        ("rediss://user:hunter2@store/1", "rediss://***@store/1"),
        ("redis://store:6379/0", "redis://store:6379/0"),
        ("unix://:hunter2@/run/store.sock", "unix://***@/run/store.sock"),
        ("redis+sentinel://u:hunter2@a:1,b:2/main/0?password=hunter2", "redis+sentinel://***@a:1,b:2/main/0"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize("url", ["redis://:hunter2/5@store:6379", "redis://[hunter2", "redis://:x@store:hunter2"])
async def test_a_url_that_is_wrong_is_not_quoted(url: str) -> None:
    """The part that is wrong may be the password, with a character that ends it too soon."""
    with pytest.raises(InvalidSettings, match="must be percent-encoded|percent-encoded") as caught:
        await connect_store(url, Settings())
    assert "hunter2" not in str(caught.value)


def test_the_log_holds_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("INFO")
    try:
        prompt = "the secret of the mountain"
        try:
            raise ValueError(f"{len(prompt)} characters")
        except ValueError:
            logger.exception("failed")
        said = capsys.readouterr().err
        assert "ValueError: 26 characters" in said
        assert prompt not in said
    finally:
        logger.remove()


def test_the_log_goes_line_by_line_to_a_sink_of_ours() -> None:
    lines: list[str] = []
    configure_log("INFO", lines.append)
    try:
        logger.info("one")
        logger.debug("hidden")
        logger.warning("two")
    finally:
        logger.remove()
    assert [line.split(maxsplit=1)[1] for line in lines] == ["INFO    one", "WARNING two"]


def test_the_levels_of_v_and_q() -> None:
    assert [log_level(count, False, "WARNING") for count in range(5)] == ["WARNING", "DEBUG", "TRACE", "TRACE", "TRACE"]
    assert log_level(0, False, "INFO") == "INFO"
    assert log_level(3, True, "INFO") == "ERROR"


# --- signals and exit codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)],
    ids=str,
)
def test_a_signal_cancels_the_command_which_cleans_up(number: signal.Signals, code: int) -> None:
    cleaned: list[str] = []

    async def command(_: Interrupts) -> int:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            cleaned.append("yes")
        return 0

    assert run(command, exit_at_sigterm=143) == code
    assert cleaned == ["yes"]


def test_a_command_may_end_in_its_own_way_at_a_signal() -> None:
    async def command(interrupts: Interrupts) -> int:
        asked = asyncio.Event()
        interrupts.on_first(asked.set)
        os.kill(os.getpid(), signal.SIGTERM)
        await asked.wait()
        return 7

    assert run(command) == 0


def test_a_signal_may_be_the_usual_end() -> None:
    async def command(interrupts: Interrupts) -> int:
        asked = asyncio.Event()
        interrupts.expected = True
        interrupts.on_first(asked.set)
        os.kill(os.getpid(), signal.SIGINT)
        await asked.wait()
        return 0

    assert run(command) == 0


def test_a_callback_that_comes_after_the_signal_is_called_at_once() -> None:
    async def command(interrupts: Interrupts) -> int:
        interrupts.on_first(lambda: None)
        interrupts.receive(signal.SIGINT)
        called: list[str] = []
        interrupts.on_first(lambda: called.append("late"))
        assert called == ["late"]
        return 0

    assert run(command) == 130


def test_further_signals_hurry() -> None:
    async def command(interrupts: Interrupts) -> int:
        hurried = asyncio.Event()
        interrupts.on_first(lambda: None)
        interrupts.on_again(hurried.set)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0)
        interrupts.receive(signal.SIGINT)
        interrupts.receive(signal.SIGINT)
        await hurried.wait()
        assert interrupts.hurry
        return 0

    assert run(command) == 130


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RankgateError("rank 3 is taken"), "rankgate: rank 3 is taken\n"),
        (OSError(28, "No space left on device", "/tmp/x"), "rankgate: No space left on device: /tmp/x\n"),
    ],
)
def test_an_error_is_told_in_one_sentence(error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def command(_: Interrupts) -> int:
        raise error

    assert run(command) == 1
    assert capsys.readouterr().err == sentence


def test_a_mistake_of_ours_is_not_hidden_and_its_text_is_told_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    async def command(_: Interrupts) -> int:
        asyncio.get_running_loop().call_soon(mistaken)
        await asyncio.sleep(0)
        await mistaken_later()
        return 0

    configure_log("WARNING")  # to the stderr of this test: that of an earlier one is closed
    with hearing() as heard:
        assert run(command) == 1
    heard.check("this command: ")
    heard.check("a callback or a forgotten task of the event loop: ")
    said = capsys.readouterr().err
    assert "rankgate: a mistake of ours ended this command (Injected at " in said
    assert "murderer" not in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("runner --instance a --instance b", "--instance is given 2 times: leave one of them out"),
        ("runner --instance a --rank 0 --rank 1", "--rank is given 2 times"),
        ("status --redis redis://a --redis redis://b", "--redis is given 2 times"),
        ("acl --instance a --instance b", "--instance is given 2 times"),
        ("health runner --state-file a --state-file b", "--state-file is given 2 times"),
        ("launch x --wait --no-wait", "--wait and --no-wait contradict each other"),
        ("runner --instance other --instance-file FILE", "--instance is other and FILE has name = demo"),
        ("runner --instance-file FILE --world-size 3", "--world-size is 3 and FILE has world_size = 2"),
        (
            "launch --file FILE --layers 3 --model m",
            "FILE already says this about the instance: leave --model and --layers out",
        ),
        ("runner --instance a --rank 0 --address foo", "'--address': it is 'foo', which this machine cannot resolve"),
        ("runner --instance a --rank 0 --address h:0", "give a host name or an IP address without a port"),
        ("runner --instance a --rank 0 --address :5000", "give a host name or an IP address without a port"),
        ("runner --instance a --rank 0 --ports 5-3", "'--ports': it is '5-3'; it must be FIRST-LAST"),
        ("runner --instance a --rank 0 --engine nomod", "it must be simulated, or module:factory"),
        ("runner --instance a --rank 0 --engine nomod:", "it must be simulated, or module:factory"),
        (
            "up --world-size 1 --redis-password-file FILE",
            "is the password of the server that --redis names, and --redis is not given",
        ),
        ("stop x --timeout -1e11", "it is -100,000,000,000; it must be at least 0.001"),
        ("stop x --timeout 1e-7", "it is 0.0000001; it must be at least 0.001"),
        ("stop x --timeout inf", "it is inf; it must be at least 0.001"),
        ("launch x --world-size 100000000000", "it is 100,000,000,000; it must be from 1 to 16,384"),
        (
            "up --world-size 1 --lease 1e11 --heartbeat 1e11",
            "heartbeat is 100000000000 s and lease is 100000000000 s",
        ),
        ("launch x --world-size 2 --model= --redis redis://x", "--model has 0 characters; it must have at least 1"),
        ("launch X --world-size 2", "'X' is not a name"),
    ],
)
def test_what_would_be_taken_in_silence_is_refused_where_it_is_typed(
    arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "i.toml"
    file.write_text('name = "demo"\nworld_size = 2\n')
    said = complaint([word.replace("FILE", str(file)) for word in arguments.split()], capsys, 2)
    assert sentence.replace("FILE", str(file)) in said
    assert "errors.pydantic.dev" not in said


def test_an_option_that_collects_or_counts_may_be_given_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--hold-back", "0:1", "--hold-back", "1:1", "-v", "-v", "-q", "-q"]
    said = complaint(["runner", "--instance", "a", "--world-size", "2", *words], capsys, 2)
    assert said.startswith("no server is given")


def test_an_option_beats_a_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANKGATE_INSTANCE_FILE", str(tmp_path / "no.toml"))
    said = complaint(["runner", "--instance", "other", "--world-size", "2"], capsys, 2)
    assert said.startswith("no server is given"), "the file is not read"
    assert "no.toml cannot be read" in complaint(["runner"], capsys, 2)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('{"seed": "x"}', 'seed is "x"; it must be a whole number'),
        ('{"jitter": 7}', "jitter is 7; it must be at most 1"),
        ('{"sed": 7}', "sed is not known; known are seed, connect_seconds"),
        ('{"layer_seconds": null}', "layer_seconds is null; it must be a number"),
        (
            '{"faults": [{"phase": "laod", "action": "die"}]}',
            'faults[0].phase is "laod"; it must be one of',
        ),
        ('{"faults": [{"phase": "load"}]}', "faults[0].action is missing"),
        ('{"faults": {}}', "faults is {}; it must be a list"),
        ('{"faults": [{"phase": "connect", "action": "die", "after_layers": 2}]}', "after_layers=2 has a meaning for"),
    ],
)
def test_a_wrong_engine_configuration_is_told_in_our_words(
    config: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["runner", "--instance", "a", "--rank", "0", "--redis", NOWHERE, "--engine-config", config]
    said = complaint(words, capsys, 1)
    assert sentence in said
    for pydantics in ("pydantic", "validation error", "input_value", "type=", "https://"):
        assert pydantics not in said


def test_options_out_of_range_are_refused_by_the_shared_callback() -> None:
    with pytest.raises(typer.BadParameter, match="names rank 9"):
        held_back(["9:1"], range(4))
