"""The options that several commands share, and how their texts are read. Only this module and `app` read the environment."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias
from urllib.parse import quote, urlsplit, urlunsplit

import typer

from barrier import InvalidName, InvalidSettings, Settings
from barrier.plain import number
from barrier.protocol.names import MAX_WORLD_SIZE, shown, valid_name

__all__ = [
    "DEFAULT_NAMESPACE",
    "POSITIVE",
    "AbsenceLimit",
    "Address",
    "AnyName",
    "AnyNameOption",
    "AnyWorldSize",
    "BackoffBase",
    "BackoffCap",
    "CommandTimeout",
    "ConnectStall",
    "GenerateStall",
    "Heartbeat",
    "HoldBack",
    "InstanceFile",
    "LaunchedName",
    "Layers",
    "Lease",
    "LoadStall",
    "MaxTokens",
    "Model",
    "Name",
    "NameOption",
    "Namespace",
    "PasswordFile",
    "Ports",
    "PrepareStall",
    "Quiet",
    "Redis",
    "StateFile",
    "Verbose",
    "WaitForStore",
    "WarmupStall",
    "WorldSize",
    "between",
    "engine_name",
    "given",
    "held_back",
    "needed_url",
    "one_of",
    "rank_range",
    "rank_span",
    "text_or_file",
    "times",
    "with_ports",
]


DEFAULT_NAMESPACE = "rankgate"


def _name(value: str) -> str:
    try:
        return valid_name("this", value)
    except InvalidName as error:
        raise typer.BadParameter(str(error).removeprefix("this ")) from None


def between(least: float, most: float = float("inf")) -> Callable[[float | None], float | None]:
    """A callback that refuses a number out of range, and names it. ``None`` passes."""

    def check(value: float | None) -> float | None:
        if value is None or (least <= value <= most and value < float("inf")):
            return value
        limits = f"at least {number(least)}" if most == float("inf") else f"from {number(least)} to {number(most)}"
        raise typer.BadParameter(f"it is {number(value)}; it must be {limits}")

    return check


def one_of(*choices: str) -> Callable[[str], str]:
    """A callback that refuses a word that is none of these, and names them."""

    def check(value: str) -> str:
        if value in choices:
            return value
        raise typer.BadParameter(f"it is {shown(value)}; it must be one of {', '.join(choices)}")

    return check


def engine_name(value: str) -> str:
    """A callback that refuses what cannot be an engine's name. It does not look whether that engine exists."""
    if value == "simulated" or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", value):
        return value
    raise typer.BadParameter(
        f"it is {shown(value)}; it must be simulated, or module:factory, such as my.package:my_engine"
    )


def given(context: typer.Context, parameter: str) -> bool:
    """Whether this parameter was given on the command line. A value from the environment does not count: an option beats it."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


POSITIVE = 0.001
"""The shortest time that an option takes, in seconds."""


def _name_or_none(value: str | None) -> str | None:
    return None if value is None else _name(value)


Redis: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        envvar="RANKGATE_REDIS",
        help="The Redis or Valkey server: redis://[user:password@]host:port/0, rediss://…, unix:///path, "
        "redis+sentinel://host:port,…/service/0 or redis+cluster://host:port,…; ?password_file=PATH reads the password from a file.",
    ),
]
PasswordFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--redis-password-file",
        metavar="FILE",
        envvar="RANKGATE_REDIS_PASSWORD_FILE",
        help="A file whose first line is the server's password. The URL may then name a user, but no password.",
    ),
]
WaitForStore: TypeAlias = Annotated[
    float,
    typer.Option(
        "--wait-for-store",
        callback=between(0.0),
        metavar="SECONDS",
        envvar="RANKGATE_WAIT_FOR_STORE",
        help="How long to try again while the server cannot be used; with 0 the command ends at once.",
    ),
]
StateFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--state-file",
        metavar="FILE",
        envvar="RANKGATE_STATE_FILE",
        help="The file in which this process says who it is. rankgate health reads it.",
    ),
]
InstanceFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--instance-file",
        metavar="FILE",
        envvar="RANKGATE_INSTANCE_FILE",
        help="A TOML file with name, world_size, model_id, layers, absence_limit, stalls and pauses of the instance.",
    ),
]
Namespace: TypeAlias = Annotated[
    str,
    typer.Option(
        "--namespace",
        metavar="NAME",
        envvar="RANKGATE_NAMESPACE",
        callback=_name,
        help="The cluster's name. Clusters with different names can share one server.",
    ),
]
Lease: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--lease",
        metavar="SECONDS",
        envvar="RANKGATE_LEASE",
        help="A rank that does not report for so long counts as gone. Give all processes the same value.",
    ),
]
Heartbeat: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--heartbeat",
        metavar="SECONDS",
        envvar="RANKGATE_HEARTBEAT",
        help="How often a rank reports; at most a third of the lease.",
    ),
]
CommandTimeout: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--command-timeout",
        metavar="SECONDS",
        envvar="RANKGATE_COMMAND_TIMEOUT",
        help="The longest that one command to the server may take; a fifth of the lease by default.",
    ),
]
Verbose: TypeAlias = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        help="Log each decision and task. -vv also logs each look, wake-up, report and log entry. Prompts are never logged.",
    ),
]
Quiet: TypeAlias = Annotated[bool, typer.Option("-q", "--quiet", help="Log errors only.")]
Name: TypeAlias = Annotated[str, typer.Argument(metavar="INSTANCE", callback=_name, help="The instance's name.")]
AnyName: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="INSTANCE", callback=_name_or_none, help="Show the ranks of this instance. Without it: all instances."
    ),
]
LaunchedName: TypeAlias = Annotated[
    str | None,
    typer.Argument(metavar="INSTANCE", callback=_name_or_none, help="The instance's name. Or pass --file instead."),
]
NameOption: TypeAlias = Annotated[
    str, typer.Option("--instance", metavar="NAME", callback=_name, help="The instance's name.")
]
AnyNameOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--instance",
        metavar="NAME",
        callback=_name_or_none,
        help="The instance's name. Or pass --instance-file instead.",
    ),
]
AnyWorldSize: TypeAlias = Annotated[
    int | None, typer.Option("--world-size", callback=between(1, MAX_WORLD_SIZE), metavar="N", help="Number of ranks.")
]
WorldSize: TypeAlias = Annotated[
    int, typer.Option("--world-size", callback=between(1, MAX_WORLD_SIZE), metavar="N", help="Number of ranks.")
]
Model: TypeAlias = Annotated[
    str, typer.Option("--model", metavar="ID", help="The model's name, as the engine knows it.")
]
AbsenceLimit: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--absence-limit",
        callback=between(POSITIVE),
        metavar="SECONDS",
        help="Give the instance up when ranks have been away for so long. Without a limit the planner waits without an end.",
    ),
]


def _address(value: str) -> str:
    """A host that the other ranks can connect to; empty if none is given."""
    if not value:
        return value
    if value.count(":") == 1 or value.endswith("]"):
        raise typer.BadParameter(
            f"it is {shown(value)}; give a host name or an IP address without a port: each attempt binds a port of its own (see --ports)"
        )
    import socket  # noqa: PLC0415 - the other commands start sooner without it

    try:
        socket.getaddrinfo(value, None)
    except (OSError, UnicodeError):
        raise typer.BadParameter(
            f"it is {shown(value)}, which this machine cannot resolve; give a host name that the other ranks' machines know, or an IP address"
        ) from None
    return value


def _ports(value: str) -> str:
    first, dash, last = value.partition("-")
    numbers = [int(part) if part.isdecimal() else 0 for part in (first, last if dash else first)]
    if value and not 1 <= numbers[0] <= numbers[1] <= 65_535:
        raise typer.BadParameter(
            f"it is {shown(value)}; it must be FIRST-LAST, from 1 to 65535, for example 22000-22099"
        )
    return value


def with_ports(config: dict[str, Any], ports: str) -> dict[str, Any]:
    """An engine's configuration with the range of ports that ``--ports`` names.

    Raises:
        typer.BadParameter: the configuration has a range of its own.
    """
    if not ports:
        return config
    if "ports" in config:
        raise typer.BadParameter("--ports is given, and --engine-config has ports too: leave one of them out")
    first, _, last = ports.partition("-")
    return {**config, "ports": [int(first), int(last or first)]}


Address: TypeAlias = Annotated[
    str,
    typer.Option(
        "--address",
        callback=_address,
        metavar="HOST",
        help="The host name or IP address by which other ranks reach this machine; by default its address on the way to the server.",
    ),
]
Ports: TypeAlias = Annotated[
    str,
    typer.Option(
        "--ports",
        callback=_ports,
        metavar="FIRST-LAST",
        help="The ports at which the engine may wait for other ranks, for machines behind a firewall; by default any free port.",
    ),
]
PrepareStall: TypeAlias = Annotated[
    float,
    typer.Option(
        "--prepare-stall",
        callback=between(POSITIVE),
        metavar="SECONDS",
        help="How long a rank may show no progress while it prepares its engine (imports, a download).",
    ),
]
ConnectStall: TypeAlias = Annotated[
    float,
    typer.Option(
        "--connect-stall",
        callback=between(POSITIVE),
        metavar="SECONDS",
        help="How long a missing rank may show no progress until it is Connected. Engines stop connecting after 4/5 of this time.",
    ),
]
LoadStall: TypeAlias = Annotated[
    float,
    typer.Option(
        "--load-stall",
        callback=between(POSITIVE),
        metavar="SECONDS",
        help="How long a rank may load no further layer. A slow load that makes progress goes on.",
    ),
]
WarmupStall: TypeAlias = Annotated[
    float,
    typer.Option(
        "--warmup-stall",
        callback=between(POSITIVE),
        metavar="SECONDS",
        help="How long a rank may show no progress in the warm-up.",
    ),
]
GenerateStall: TypeAlias = Annotated[
    float,
    typer.Option(
        "--generate-stall",
        callback=between(POSITIVE),
        metavar="SECONDS",
        help="How long rank 0 may generate no further token.",
    ),
]
BackoffBase: TypeAlias = Annotated[
    float,
    typer.Option(
        "--backoff-base",
        callback=between(POSITIVE),
        metavar="SECONDS",
        help="The longest pause before the second attempt. It doubles with each further failure of the same rank.",
    ),
]
BackoffCap: TypeAlias = Annotated[
    float,
    typer.Option(
        "--backoff-cap", callback=between(POSITIVE), metavar="SECONDS", help="The longest pause between two attempts."
    ),
]
Layers: TypeAlias = Annotated[
    int, typer.Option("--layers", callback=between(1, 10_000), metavar="N", help="How many layers the model has.")
]
MaxTokens: TypeAlias = Annotated[
    int, typer.Option("--max-tokens", callback=between(1, 100_000), metavar="N", help="The longest text, in tokens.")
]
HoldBack: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--hold-back",
        metavar="RANK:SECONDS",
        help="The simulated engine of RANK takes SECONDS longer to connect. May be given several times.",
    ),
]


def times(lease: float | None, heartbeat: float | None, command_timeout: float | None, *, usual: Settings) -> Settings:
    """The times that the options ask for. A heartbeat that was not given follows the lease.

    Raises:
        typer.BadParameter: they contradict one another; with both values.
    """
    chosen = usual.lease if lease is None else lease
    try:
        return Settings(
            lease=chosen,
            heartbeat=min(usual.heartbeat, chosen / 3) if heartbeat is None else heartbeat,
            command_timeout=command_timeout,
        )
    except InvalidSettings as error:
        raise typer.BadParameter(str(error)) from None


def needed_url(url: str | None, password_file: Path | None = None) -> str:
    """The server's URL, with the password's file in it. Raises typer.BadParameter if no URL or two passwords are given."""
    if not url:
        raise typer.BadParameter("no server is given: pass --redis URL, or set RANKGATE_REDIS")
    return url if password_file is None else _with_password_file(url, password_file)


def _with_password_file(url: str, path: Path) -> str:
    """Put the file's name into the URL, and not the password: the password may be renewed while this process runs."""
    try:
        password = path.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--redis-password-file {path} cannot be read: {error}") from None
    if not password:
        raise typer.BadParameter(f"--redis-password-file {path} has an empty first line, where the password belongs")
    try:
        parts = urlsplit(url)
    except ValueError:
        return url  # connecting to it refuses it, without quoting it
    user = parts.netloc.rpartition("@")[0]
    if ":" in user or "password_file=" in parts.query:
        raise typer.BadParameter(
            "the URL has a password and --redis-password-file names another one: leave one of them out"
        )
    named = f"password_file={quote(str(path.absolute()), safe='')}"
    return urlunsplit(parts._replace(query=f"{parts.query}&{named}" if parts.query else named))


def held_back(texts: list[str] | None, ranks: range) -> dict[int, float]:
    """Read ``--hold-back``: extra seconds by rank. Raises typer.BadParameter for a wrong text or a rank that is not here."""
    extra: dict[int, float] = {}
    for text in texts or ():
        rank_text, _, seconds_text = text.partition(":")
        try:
            rank, seconds = int(rank_text), float(seconds_text)
        except ValueError:
            raise typer.BadParameter(f"--hold-back {text!r} is not RANK:SECONDS, for example 3:2") from None
        if rank not in ranks:
            raise typer.BadParameter(f"--hold-back {text!r} names rank {rank}; the ranks here are {rank_span(ranks)}")
        if not 0 <= seconds < float("inf"):
            raise typer.BadParameter(f"--hold-back {text!r}: the seconds must be a finite number, 0 or more")
        extra[rank] = seconds
    return extra


def rank_span(ranks: range) -> str:
    """Ranks for people: ``3``, or ``0 to 7``."""
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def rank_range(text: str) -> range:
    """Read ``A-B``, both included. Raises typer.BadParameter."""
    first_text, dash, last_text = text.partition("-")
    try:
        first, last = int(first_text), int(last_text if dash else first_text)
    except ValueError:
        raise typer.BadParameter(f"--ranks {text!r} is not FIRST-LAST, for example 0-15") from None
    if not 0 <= first <= last < MAX_WORLD_SIZE:
        raise typer.BadParameter(
            f"--ranks {text!r}: the first must not be above the last, and ranks are 0 to {MAX_WORLD_SIZE - 1}"
        )
    return range(first, last + 1)


def text_or_file(text: str) -> str:
    """The text itself, or for ``@path`` the text of that file. Raises typer.BadParameter if the file cannot be read."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{text[1:]} cannot be read: {error}") from None
