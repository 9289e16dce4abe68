"""The commands and their options. Other modules, such as ``cli.look``, do the work. They are imported when a command runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer

from barrier import InvalidSettings, Settings
from barrier.errors import RankgateError
from barrier.protocol.names import MAX_WORLD_SIZE
from planner import cli
from planner.cli.once import OnceTyper
from planner.cli.options import (
    DEFAULT_NAMESPACE,
    POSITIVE,
    AbsenceLimit,
    Address,
    AnyName,
    AnyNameOption,
    AnyWorldSize,
    BackoffBase,
    BackoffCap,
    CommandTimeout,
    ConnectStall,
    GenerateStall,
    Heartbeat,
    HoldBack,
    InstanceFile,
    LaunchedName,
    Layers,
    Lease,
    LoadStall,
    MaxTokens,
    Model,
    Name,
    NameOption,
    Namespace,
    PasswordFile,
    Ports,
    PrepareStall,
    Quiet,
    Redis,
    StateFile,
    Verbose,
    WaitForStore,
    WarmupStall,
    WorldSize,
    between,
    engine_name,
    given,
    held_back,
    needed_url,
    one_of,
    rank_range,
    text_or_file,
    times,
    with_ports,
)
from planner.policy import Policy

if TYPE_CHECKING:
    from planner.spec import InstanceSpec

__all__ = [
    "acl",
    "app",
    "explain",
    "generate",
    "health",
    "launch",
    "planner",
    "planner_health",
    "race",
    "run_app",
    "runner",
    "runner_health",
    "status",
    "stop",
    "up",
]


_PROMPT = "Why do all ranks have to wait for one another?"
_MOST_PROCESSES = 128
_USUAL = Policy()
_UP_TIMES = Settings(lease=3.0, heartbeat=0.5)  # shorter than usual, so that people see the layers move

app: OnceTyper = OnceTyper(
    name="rankgate",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it fits into 80 columns, and [brackets] stay
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Brings up model instances that are split over several ranks: no rank is told to load before every rank is connected.",
)

# The base class of all errors of typer's parser. Typer exports only a subclass, and the base class moves between versions.
_USAGE_ERROR: Any = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")


def run_app(arguments: list[str]) -> int:
    """Run one command line; returns the exit code. A wrong option is one sentence on stderr."""
    if not arguments:
        run_app(["--help"])
        return 2
    try:
        return int(app.run(arguments, "rankgate") or 0)
    except typer.Abort:
        return 130
    except RankgateError as error:  # several options contradict one another
        cli.process.complain(str(error))
        return 2
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", "rankgate")
        sentence = error.format_message().removeprefix("Invalid value: ").rstrip(".")
        cli.process.complain(f"{sentence}. See {path} --help")
        return 2


def _finish(code: int) -> NoReturn:
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from planner import __version__  # noqa: PLC0415 - slow, as it reads what is installed; only this option needs it

        print(f"rankgate {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(short_help="Bring everything up on this machine and generate a text.")
def up(
    context: typer.Context,
    world_size: WorldSize,
    redis: Redis = None,
    password_file: PasswordFile = None,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What to generate a text from.")] = _PROMPT,
    instance: NameOption = "demo",
    namespace: Namespace = DEFAULT_NAMESPACE,
    model: Model = "simulated",
    layers: Layers = 16,
    hold_back: HoldBack = None,
    ranks_per_process: Annotated[
        int,
        typer.Option(
            "--ranks-per-process",
            callback=between(1),
            metavar="K",
            help="1: every rank is a process, with its engine in a child process. More: K ranks and their engines share one process.",
        ),
    ] = 1,
    lease: Lease = _UP_TIMES.lease,
    heartbeat: Heartbeat = None,
    command_timeout: CommandTimeout = None,
    max_tokens: MaxTokens = 64,
    timeout: Annotated[
        float,
        typer.Option("--timeout", callback=between(POSITIVE), metavar="SECONDS", help="How long the text may take."),
    ] = 120.0,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="The same number gives the same simulated delays and texts.")
    ] = 0,
    engine_config: Annotated[
        str,
        typer.Option(
            "--engine-config",
            metavar="JSON",
            help="The simulated engines' delays and faults; @FILE reads it from a file.",
        ),
    ] = "{}",
    keep: Annotated[bool, typer.Option("--keep", help="Stay up after the text, until Ctrl-C.")] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Start server, runners and planner on this machine, generate a text, and end every process that was started.

    Without --redis, the command starts an embedded Valkey. The engines are simulated. A table shows every rank and what the barrier
    waits for. If stdout is not a terminal, each change is one line. At the end the command says how long each part took, and checks
    the event history independently of the planner. The exit code is 0 if the text is complete and no guarantee was broken.
    """
    if redis is None and given(context, "password_file"):
        raise typer.BadParameter(
            "--redis-password-file is the password of the server that --redis names, and --redis is not given: leave it out"
        )
    processes = -(-world_size // ranks_per_process)
    if processes > _MOST_PROCESSES:
        raise typer.BadParameter(
            f"this would start {processes:,} runner processes, and at most {_MOST_PROCESSES} are started on one machine: "
            f"pass --ranks-per-process {-(-world_size // _MOST_PROCESSES)} or more"
        )
    late = _held_back_from_connecting(hold_back, range(world_size))
    engines = {"seed": seed, **_json_object("--engine-config", text_or_file(engine_config))}
    # A wrong engine configuration is refused here, before anything starts.
    cli.runner_process.EngineChoice(config=engines, hold_back=late).host(0, world_size)
    options = cli.up.UpOptions(
        spec=_spec(instance, world_size, model, layers),
        url=needed_url(redis, password_file) if redis else None,
        namespace=namespace,
        settings=times(lease, heartbeat, command_timeout, usual=_UP_TIMES),
        prompt=prompt,
        max_tokens=max_tokens,
        timeout=timeout,
        hold_back=late,
        ranks_per_process=ranks_per_process,
        engine_config=engines,
        keep=keep,
        level=cli.process.log_level(verbose, quiet, "WARNING"),
    )
    _finish(cli.process.run(lambda interrupts: cli.up.up(options, interrupts), exit_at_sigterm=143))


@app.command(short_help="Run one rank of an instance, or several.")
def runner(
    context: typer.Context,
    instance: AnyNameOption = None,
    instance_file: InstanceFile = None,
    rank: Annotated[
        int | None, typer.Option("--rank", callback=between(0), metavar="R", help="Which rank this is.")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            "--world-size",
            callback=between(1),
            metavar="N",
            help="Number of ranks. Without --rank and --ranks, the runner takes any free rank.",
        ),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", metavar="A-B", help="Several ranks, both included, in this process.")
    ] = None,
    redis: Redis = None,
    password_file: PasswordFile = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            callback=engine_name,
            metavar="NAME",
            help="simulated, or module:factory of a callable that returns a runner.Engine.",
        ),
    ] = "simulated",
    engine_config: Annotated[
        str,
        typer.Option("--engine-config", metavar="JSON", help="The engine's configuration; @FILE reads it from a file."),
    ] = "{}",
    inline_engine: Annotated[
        bool,
        typer.Option("--inline-engine", help="Run the engine in this process. Then it cannot be killed if it blocks."),
    ] = False,
    hold_back: HoldBack = None,
    node: Annotated[
        str | None,
        typer.Option(
            "--node", metavar="NAME", help="The name of this machine, as people see it; by default its host name."
        ),
    ] = None,
    address: Address = "",
    ports: Ports = "",
    spare: Annotated[
        bool,
        typer.Option(
            "--spare/--no-spare",
            help="If another process holds the rank: wait without an end, or end after two leases.",
        ),
    ] = True,
    wait_for_store: WaitForStore = 0.0,
    state_file: StateFile = None,
    lease: Lease = None,
    heartbeat: Heartbeat = None,
    command_timeout: CommandTimeout = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    log: Annotated[str | None, typer.Option("--log", hidden=True)] = None,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True)] = None,
) -> None:
    """Run one rank of an instance, or several, until SIGTERM or Ctrl-C. Then the runner gives its ranks back.

    If another process holds the rank, the runner says so at once and waits as a spare. rankgate status shows spares.

    The engine runs in a child process, so that it can always be killed.
    """
    if parent is not None:
        from planner.launcher import leave_with_parent  # noqa: PLC0415 - only a launcher passes --parent

        leave_with_parent(parent)

    cli.process.configure_log(log or cli.process.log_level(verbose, quiet, "INFO"))
    if instance_file is not None and (instance is None or given(context, "instance_file")):
        spec = _named_spec(instance_file, "--instance")
        _agree(instance_file, "--instance", instance, "name", spec.name)
        _agree(instance_file, "--world-size", world_size, "world_size", spec.world_size)
        instance, world_size = spec.name, spec.world_size
    elif instance is None:
        raise typer.BadParameter("Missing option '--instance'")
    chosen = _chosen_ranks(rank, ranks, world_size)
    late = held_back(hold_back, chosen or range(world_size or 0))
    options = cli.runner_process.RunnerOptions(
        instance=instance,
        ranks=chosen,
        world_size=world_size,
        url=needed_url(redis, password_file),
        namespace=namespace,
        settings=times(lease, heartbeat, command_timeout, usual=Settings()),
        engine=cli.runner_process.EngineChoice(
            name=engine,
            config=with_ports(_json_object("--engine-config", text_or_file(engine_config)), ports),
            inline=inline_engine,
            hold_back=late,
        ),
        node=node,
        address=address,
        wait_for_store=wait_for_store,
        spare=spare,
        state_file=state_file,
    )
    # Engines inherit the environment, and do not need the server's password.
    os.environ.pop("RANKGATE_REDIS", None)
    os.environ.pop("RANKGATE_REDIS_PASSWORD_FILE", None)
    _finish(cli.process.run(lambda interrupts: cli.runner_process.serve_ranks(options, interrupts)))


@app.command(short_help="Plan every instance that was launched.")
def planner(
    redis: Redis = None,
    password_file: PasswordFile = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    assemble_timeout: Annotated[
        float,
        typer.Option(
            "--assemble-timeout",
            metavar="SECONDS",
            help="The log warns when ranks have been away for so long. The planner still waits for them.",
        ),
    ] = _USUAL.assemble_timeout,
    absence_limit: AbsenceLimit = None,
    max_failures: Annotated[
        int,
        typer.Option(
            "--max-failures",
            metavar="N",
            help="How often the planner tries again after failures of one rank. After the next failure it gives the instance up.",
        ),
    ] = _USUAL.max_failures,
    prepare_stall: PrepareStall = _USUAL.prepare_stall,
    connect_stall: ConnectStall = _USUAL.connect_stall,
    load_stall: LoadStall = _USUAL.load_stall,
    warmup_stall: WarmupStall = _USUAL.warmup_stall,
    generate_stall: GenerateStall = _USUAL.generate_stall,
    backoff_base: BackoffBase = _USUAL.backoff_base,
    backoff_cap: BackoffCap = _USUAL.backoff_cap,
    instance_file: InstanceFile = None,
    wait_for_store: WaitForStore = 0.0,
    state_file: StateFile = None,
    lease: Lease = None,
    heartbeat: Heartbeat = None,
    command_timeout: CommandTimeout = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Plan every instance that was launched, until SIGTERM or Ctrl-C. Of several planners, one leads and the others stand by.

    With --instance-file, the planner also launches that instance. It does not if the instance was stopped or given up with the same
    spec, or is up with another spec; use rankgate launch --file then. The log says what an instance waits for when that changes.
    """
    cli.process.configure_log(cli.process.log_level(verbose, quiet, "INFO"))
    target = _target(
        redis, namespace, password_file, times(lease, heartbeat, command_timeout, usual=Settings()), wait=wait_for_store
    )
    try:
        policy = Policy(
            assemble_timeout=assemble_timeout,
            absence_limit=absence_limit,
            max_failures=max_failures,
            prepare_stall=prepare_stall,
            connect_stall=connect_stall,
            load_stall=load_stall,
            warmup_stall=warmup_stall,
            generate_stall=generate_stall,
            backoff_base=backoff_base,
            backoff_cap=backoff_cap,
        )
        policy.check(target.settings)
    except InvalidSettings as error:
        raise typer.BadParameter(str(error)) from None
    wanted = cli.instance_file.read_instance_file(instance_file) if instance_file is not None else None
    _finish(cli.process.run(lambda _: cli.commands.plan(target, policy, wanted=wanted, state_file=state_file)))


@app.command(short_help="Ask for an instance to be up.")
def launch(
    context: typer.Context,
    name: LaunchedName = None,
    world_size: AnyWorldSize = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="The instance as a TOML file, instead of NAME and options."),
    ] = None,
    redis: Redis = None,
    password_file: PasswordFile = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    model: Model = "simulated",
    layers: Layers = 16,
    absence_limit: AbsenceLimit = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until all ranks serve, or return at once.")
    ] = True,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", callback=between(POSITIVE), metavar="SECONDS", help="How long to wait until all ranks serve."
        ),
    ] = 300.0,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="Generate a text from this prompt when all ranks serve."),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", "-y", help="If the instance is up with another spec, replace it without asking; for scripts."
        ),
    ] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Ask for an instance to be up. A planner brings it up with the runners that are there.

    If the instance is up with another spec, the command shows the difference and asks before it replaces the instance. A
    replacement ends the attempt for all ranks.
    """
    cli.process.configure_log(cli.process.log_level(verbose, quiet, "WARNING"))
    if prompt is not None and not wait:
        raise typer.BadParameter(
            "--prompt needs an instance that serves, and --no-wait does not wait until it serves: leave one of them out"
        )
    if name is None:
        spec = _named_spec(file, "INSTANCE", "argument")
        if beside := [option for option, place in _OF_A_SPEC.items() if given(context, place)]:
            raise typer.BadParameter(
                f"--file {file} already says this about the instance: leave {' and '.join(beside)} out"
            )
        if absence_limit is not None:
            spec = spec.model_copy(update={"absence_limit": absence_limit})
    elif file is not None:
        raise typer.BadParameter(f"{name} and --file {file} are both given: choose one of them")
    elif world_size is None:
        raise typer.BadParameter("Missing option '--world-size'")
    else:
        spec = _spec(name, world_size, model, layers).model_copy(update={"absence_limit": absence_limit})
    target = _target(redis, namespace, password_file)
    _finish(
        cli.process.run(
            lambda _: cli.commands.launch(target, spec, wait=wait, seconds=timeout, prompt=prompt, yes=yes),
            exit_at_sigterm=143,
        )
    )


@app.command(short_help="Stop an instance; its runners stay.")
def stop(
    name: Name,
    redis: Redis = None,
    password_file: PasswordFile = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", callback=between(POSITIVE), metavar="SECONDS", help="How long the ranks may take to tear down."
        ),
    ] = 60.0,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Stop an instance: every rank tears its engine down. The runners stay, and can serve the next instance of that name."""
    cli.process.configure_log(cli.process.log_level(verbose, quiet, "WARNING"))
    target = _target(redis, namespace, password_file)
    _finish(cli.process.run(lambda _: cli.commands.stop(target, name, seconds=timeout), exit_at_sigterm=143))


@app.command(short_help="Generate a text with an instance that serves.")
def generate(
    name: Name,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT",
            help="What to generate a text from; - reads it from stdin, so it is not in the list of processes.",
        ),
    ],
    redis: Redis = None,
    password_file: PasswordFile = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    max_tokens: MaxTokens = 64,
    timeout: Annotated[
        float,
        typer.Option("--timeout", callback=between(POSITIVE), metavar="SECONDS", help="How long the text may take."),
    ] = 120.0,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Generate a text with an instance that serves. Ctrl-C cancels it."""
    cli.process.configure_log(cli.process.log_level(verbose, quiet, "WARNING"))
    target = _target(redis, namespace, password_file)
    asked = sys.stdin.read() if prompt == "-" else prompt
    _finish(
        cli.process.run(
            lambda _: cli.commands.generate(target, name, asked, max_tokens=max_tokens, seconds=timeout),
            exit_at_sigterm=143,
        )
    )


@app.command(short_help="Show all instances, or the ranks of one.")
def status(
    name: AnyName = None,
    redis: Redis = None,
    password_file: PasswordFile = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    everything: Annotated[
        bool, typer.Option("--all", help="List the instances that were stopped lately, too.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs; times are in milliseconds.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again whenever it changes, until Ctrl-C.")] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show all instances, or the ranks of one: status, progress, the time left of each lease, and what the instance waits for."""
    cli.process.configure_log(cli.process.log_level(verbose, quiet, "WARNING"))
    target = _target(redis, namespace, password_file)
    if watch and as_json:
        raise typer.BadParameter("--watch is for people and --json for programs: choose one of them")
    if everything and name is not None:
        raise typer.BadParameter(f"--all is for the list of all instances, and {name} names one: leave one of them out")
    if watch:
        _finish(cli.process.run(lambda _: cli.look.watch(target, name, everything=everything)))
    _finish(
        cli.process.run(
            lambda _: cli.look.status(target, name, as_json=as_json, everything=everything), exit_at_sigterm=143
        )
    )


@app.command(short_help="Say in one sentence what an instance waits for.")
def explain(
    name: Name,
    redis: Redis = None,
    password_file: PasswordFile = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Say in one sentence what an instance waits for. It names each missing rank with node, status, lease and last error."""
    cli.process.configure_log(cli.process.log_level(verbose, quiet, "WARNING"))
    target = _target(redis, namespace, password_file)
    _finish(cli.process.run(lambda _: cli.look.explain(target, name), exit_at_sigterm=143))


@app.command(short_help="Print the users of the server, with the least rights that each needs.")
def acl(
    instance: NameOption,
    namespace: Namespace = DEFAULT_NAMESPACE,
    role: Annotated[
        str,
        typer.Option(
            "--role",
            callback=one_of("planner", "rank", "observer", "admin", "all"),
            metavar="ROLE",
            help="planner, rank, observer or admin for one line; all for a whole ACL file.",
        ),
    ] = "all",
    rank: Annotated[
        int | None, typer.Option("--rank", callback=between(0), metavar="R", help="The user of this rank only.")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            "--world-size",
            callback=between(1, MAX_WORLD_SIZE),
            metavar="N",
            help="Print one user for each of N ranks. Without --world-size and --rank, all ranks of the instance share one user.",
        ),
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="With --role all: add an administrator, who may do everything.")
    ] = False,
    passwords: Annotated[
        Path | None,
        typer.Option(
            "--passwords",
            metavar="FOLDER",
            help="A folder with one password file for each user. Missing files are made, with random passwords.",
        ),
    ] = None,
    password_file: Annotated[
        str | None,
        typer.Option(
            "--password-file",
            metavar="FILE",
            help="The password of a single user, on the first line; - reads it from stdin.",
        ),
    ] = None,
) -> None:
    """Print Redis ACL rules: lines for an aclfile or for redis.conf. They need Redis 7.0 or Valkey 7.2. No server is asked.

    A rank may write its own report and read its instance's task log. A planner may do what planning needs in its namespace. An
    observer may only read. A whole file turns the default user off. Passwords are printed only as hashes.
    """
    options = cli.acl.AclOptions(
        instance=instance,
        namespace=namespace,
        role=cli.acl.Role(role),
        rank=rank,
        world_size=world_size,
        admin=admin,
        password_file=password_file,
        passwords=passwords,
    )
    _finish(cli.acl.print_acl(options))


health: OnceTyper = OnceTyper(
    help="Ask the store whether a process of this machine does its work. The exit code is 0 if it does, otherwise 1.",
    rich_markup_mode=None,
)
app.add_typer(health, name="health", short_help="Ask whether a runner or planner does its work.")


@health.command("runner", short_help="Does the runner hold its rank, with a live lease and no failure?")
def runner_health(
    state_file: StateFile = None,
    redis: Redis = None,
    password_file: PasswordFile = None,
    command_timeout: CommandTimeout = None,
) -> None:
    """Ask whether the runner with that state file has a live report for each of its ranks, and none of them says Failed."""
    _health("runner", state_file, redis, password_file, command_timeout)


@health.command("planner", short_help="Does the planner run, and has every instance a planner?")
def planner_health(
    state_file: StateFile = None,
    redis: Redis = None,
    password_file: PasswordFile = None,
    command_timeout: CommandTimeout = None,
) -> None:
    """Ask whether the planner with that state file runs, and whether every instance that shall be up has some planner."""
    _health("planner", state_file, redis, password_file, command_timeout)


@app.command(short_help="Show the race that the barrier prevents, with real processes.")
def race(verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Show the race that the barrier prevents. It takes about 20 seconds.

    The command plays one scenario three times, with real processes on an embedded Valkey. First: a planner that decides from old
    statuses, and a runner that crashes when a task comes out of state. Second: the same planner, and a runner that refuses such a
    task. Third: the barrier. The exit code is 0 if, with the barrier, no process died, no task was refused, and all ranks became Ready.
    """
    cli.process.configure_log(cli.process.log_level(verbose, quiet, "ERROR"))
    _finish(cli.process.run(lambda _: cli.commands.race(), exit_at_sigterm=143))


# --- what the options mean together ---------------------------------------------------------------------------------------


def _health(
    kind: Literal["runner", "planner"],
    state_file: Path | None,
    redis: str | None,
    password_file: Path | None,
    command_timeout: float | None,
) -> NoReturn:

    cli.process.configure_log("ERROR")
    if state_file is None:
        raise typer.BadParameter(
            "no process is named: pass the --state-file that it was started with, or set RANKGATE_STATE_FILE"
        )
    url = needed_url(redis, password_file)
    settings = times(None, None, command_timeout, usual=Settings())
    _finish(cli.process.run(lambda _: cli.health.health(kind, state_file, url, settings), exit_at_sigterm=143))


def _target(
    redis: str | None,
    namespace: str,
    password_file: Path | None,
    settings: Settings | None = None,
    *,
    wait: float = 0.0,
) -> cli.look.Target:

    url = needed_url(redis, password_file)
    return cli.look.Target(url=url, namespace=namespace, settings=settings or Settings(), wait=wait)


def _named_spec(path: Path | None, instead_of: str, kind: str = "option") -> InstanceSpec:

    if path is None:
        raise typer.BadParameter(f"Missing {kind} '{instead_of}'")
    return cli.instance_file.read_instance_file(path)


_OF_A_SPEC = {"--world-size": "world_size", "--model": "model", "--layers": "layers"}
"""Options that an instance file replaces, and their parameters."""


def _agree(path: Path, option: str, value: object, key: str, in_file: object) -> None:
    """Refuse an option that contradicts the file."""
    if value is not None and value != in_file:
        raise typer.BadParameter(f"{option} is {value} and {path} has {key} = {in_file}: leave one of them out")


def _spec(name: str, world_size: int, model: str, layers: int) -> InstanceSpec:
    from planner import InstanceSpec, ModelSpec  # noqa: PLC0415 - pydantic comes with them

    try:
        return InstanceSpec(name=name, world_size=world_size, model=ModelSpec(model_id=model, total_layers=layers))
    except InvalidSettings as error:
        raise typer.BadParameter(
            str(error).replace("model_id", "--model").replace("total_layers", "--layers")
        ) from None


def _held_back_from_connecting(texts: list[str] | None, ranks: range) -> dict[int, float]:
    if texts and len(ranks) == 1:
        raise typer.BadParameter("--hold-back: a single rank has nobody to connect to, so it cannot be late")
    return held_back(texts, ranks)


def _chosen_ranks(rank: int | None, ranks: str | None, world_size: int | None) -> range | None:
    if rank is not None and ranks is not None:
        raise typer.BadParameter("--rank and --ranks are both given: choose one of them")
    if rank is None and ranks is None:
        if world_size is None:
            raise typer.BadParameter(
                "no rank is named: pass --rank R, --ranks A-B, or --world-size N for any free rank"
            )
        return None
    chosen = rank_range(ranks) if ranks is not None else range(cast("int", rank), cast("int", rank) + 1)
    if world_size is not None and chosen[-1] >= world_size:
        raise typer.BadParameter(
            f"rank {chosen[-1]} is given; with --world-size {world_size} ranks are 0 to {world_size - 1}"
        )
    return chosen


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{option} must be a JSON object, such as {{}}")
    return cast("dict[str, Any]", found)
