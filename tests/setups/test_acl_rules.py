"""The rules and the command that prints them, without a server."""

from __future__ import annotations

import hashlib
import io
import stat
import string
from pathlib import Path

import pytest
from loguru import logger

from barrier import InvalidName
from barrier.store.acl import NOBODY, acl_file, admin_user, all_users, hashed, observer_user, planner_user, rank_user
from barrier.store.keys import Keys
from planner.cli.app import run_app

KEYS = Keys("rankgate", "demo")


def test_a_users_name_needs_no_quoting_in_a_url_or_a_file() -> None:
    plain = set(string.ascii_lowercase + string.digits + ".-")
    users = [
        *all_users(KEYS, world_size=2),
        *all_users(KEYS),
        admin_user("rankgate"),
        observer_user("rankgate", "demo"),
    ]
    assert all(set(user.name) <= plain for user in users)
    assert len({user.name for user in users}) == len(users) - 2, "planner and observer are in both lists"


def test_a_line_is_one_line_and_holds_the_hash_only() -> None:
    line = rank_user(KEYS, 1).line(hashed("s3cret"))
    assert line.startswith(f"user rankgate.demo.rank-1 on resetpass #{hashlib.sha256(b's3cret').hexdigest()} ")
    assert "s3cret" not in line
    assert "\n" not in line
    assert "-@all" in line.split()


def test_a_user_without_a_password_can_not_be_used() -> None:
    line = rank_user(KEYS, 1).line(None)
    assert "resetpass" in line
    assert "nopass" not in line


def test_a_whole_file_turns_the_default_user_off() -> None:
    assert acl_file([(planner_user("rankgate"), None)]).splitlines()[0] == NOBODY
    assert NOBODY.startswith("user default off resetpass ")


def test_no_rank_has_a_command_that_runs_scripts_or_sees_the_whole_store() -> None:
    forbidden = {
        "eval",
        "evalsha",
        "fcall",
        "script",
        "keys",
        "scan",
        "config",
        "flushall",
        "time",
        "hset",
        "xtrim",
        "xdel",
    }
    for user in (rank_user(KEYS, 1), rank_user(KEYS, None)):
        assert not user.allowed & forbidden


def test_subcommands_that_redis_7_0_does_not_know_are_not_named() -> None:
    """One unknown name, and the server refuses the whole file; the tests on real servers load it."""
    users = [*all_users(KEYS, world_size=1), admin_user("rankgate")]
    assert not any("setinfo" in user.line(None) for user in users)


@pytest.mark.parametrize("wrong", ["*", "a b", "A", "", "a~*", "x\ny", "a}", "../x"])
def test_hostile_names_make_no_rule(wrong: str) -> None:
    with pytest.raises(InvalidName):
        planner_user(wrong)
    with pytest.raises(InvalidName):
        observer_user("rankgate", wrong)
    with pytest.raises(InvalidName):
        admin_user(wrong)
    with pytest.raises(InvalidName):
        rank_user(Keys("rankgate", wrong), 0)


@pytest.mark.parametrize("wrong", [-1, 16_384])
def test_a_rank_out_of_range_makes_no_rule(wrong: int) -> None:
    with pytest.raises(InvalidName, match="it must be from 0 to 16383"):
        rank_user(KEYS, wrong)


def test_an_empty_password_or_something_that_is_no_hash_is_refused() -> None:
    with pytest.raises(InvalidName, match="the server would take any"):
        hashed("")
    with pytest.raises(InvalidName, match="not 64 hexadecimal digits"):
        rank_user(KEYS, 0).line("s3cret ~* +@all")


# --- rankgate acl ---------------------------------------------------------------------------------------------------------


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run_app(["acl", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def names(lines: list[str]) -> list[str]:
    return [line.split()[1] for line in lines]


@pytest.mark.parametrize(
    ("arguments", "users"),
    [
        ("", "default rankgate.planner rankgate.observer rankgate.demo.ranks"),
        ("--world-size 2", "default rankgate.planner rankgate.observer rankgate.demo.rank-0 rankgate.demo.rank-1"),
        ("--admin", "default rankgate.admin rankgate.planner rankgate.observer rankgate.demo.ranks"),
        ("--rank 3", "rankgate.demo.rank-3"),
        ("--role rank --rank 3 --world-size 4", "rankgate.demo.rank-3"),
        ("--role rank", "rankgate.demo.ranks"),
        ("--role rank --world-size 2", "rankgate.demo.rank-0 rankgate.demo.rank-1"),
        ("--role planner", "rankgate.planner"),
        ("--role observer --namespace blue", "blue.observer"),
        ("--role admin", "rankgate.admin"),
    ],
)
def test_the_options_choose_the_users(capsys: pytest.CaptureFixture[str], arguments: str, users: str) -> None:
    assert names(lines_of(capsys, "--instance", "demo", *arguments.split())) == users.split()


def test_passwords_are_made_once_kept_for_their_owner_and_never_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logged = io.StringIO()
    sink = logger.add(logged, level="TRACE")
    folder = tmp_path / "passwords"
    arguments = ["acl", "--instance", "demo", "--world-size", "2", "--passwords", str(folder)]
    try:
        assert run_app(arguments) == 0
        first = capfd.readouterr()
        assert run_app(arguments) == 0
        again = capfd.readouterr()
    finally:
        logger.remove(sink)
    assert again.out == first.out, "what is there is used, so that a second run changes no password"
    made = {path.name: path.read_text().strip() for path in folder.iterdir()}
    assert set(made) == {"rankgate.planner", "rankgate.observer", "rankgate.demo.rank-0", "rankgate.demo.rank-1"}
    assert len(set(made.values())) == 4
    assert all(len(secret) >= 43 for secret in made.values())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    everything = first.out + first.err + logged.getvalue()
    assert not any(secret in everything for secret in made.values())
    assert all(f"#{hashed(secret)}" in first.out for secret in made.values())


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o701, 0o770, 0o720])
def test_a_folder_of_passwords_that_others_may_reach_is_refused_with_what_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    folder = tmp_path / "the passwords"
    folder.mkdir()
    folder.chmod(mode)
    arguments = ["acl", "--instance", "demo", "--passwords", str(folder)]
    assert run_app(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"mode {mode:04o}" in said.err
    assert f"chmod 700 '{folder}'" in said.err
    assert list(folder.iterdir()) == [], "no password was made in it"
    folder.chmod(0o700)
    assert run_app(arguments) == 0


@pytest.mark.parametrize("mode", [0o666, 0o602, 0o620, 0o777])
def test_a_password_that_others_may_write_is_refused_with_what_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    folder = tmp_path / "passwords"
    folder.mkdir(mode=0o700)
    file = folder / "rankgate.planner"
    file.write_text("known-to-all\n")
    file.chmod(mode)
    arguments = ["acl", "--instance", "demo", "--passwords", str(folder)]
    assert run_app(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"mode {mode:04o}" in said.err
    assert f"chmod go-w {file}" in said.err
    assert "known-to-all" not in said.err
    file.chmod(mode & ~0o022)
    assert run_app(arguments) == 0


def test_a_file_for_containers_in_a_closed_folder_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As deploy/secrets.sh leaves them: the folder keeps others of this machine out, and containers run as users of their own."""
    folder = tmp_path / "passwords"
    arguments = ["acl", "--instance", "demo", "--passwords", str(folder)]
    assert run_app(arguments) == 0
    first = capsys.readouterr().out
    for file in folder.iterdir():
        file.chmod(0o444)
    assert run_app(arguments) == 0
    assert capsys.readouterr().out == first


def test_one_password_comes_from_a_file_or_from_stdin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p"
    file.write_text("s3cret\n")
    [from_file] = lines_of(capsys, "--instance", "demo", "--rank", "0", "--password-file", str(file))
    monkeypatch.setattr("sys.stdin", io.StringIO("s3cret\r\nmore"))
    [from_stdin] = lines_of(capsys, "--instance", "demo", "--rank", "0", "--password-file", "-")
    assert from_file == from_stdin == rank_user(KEYS, 0).line(hashed("s3cret"))


def test_without_passwords_it_says_that_nobody_can_log_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["acl", "--instance", "demo", "--rank", "0"]) == 0
    assert "no password yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--rank 4 --world-size 4", "with --world-size 4 ranks are 0 to 3"),
        ("--rank 1 --role planner", "--rank is for --role rank"),
        ("--role king", "it must be one of planner, rank, observer, admin, all"),
        ("--password-file x", "holds one password, and there are 3 users"),
        ("--rank 0 --password-file x --passwords y", "choose one of them"),
        ("--rank 0 --password-file /no/such", "/no/such cannot be read: No such file or directory"),
        ("--rank 0 --password-file /dev/null", "the password in /dev/null has 0 characters"),
        ("--rank -1", "must be at least 0"),
    ],
)
def test_a_wrong_option_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: str, sentence: str) -> None:
    assert run_app(["acl", "--instance", "demo", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1
