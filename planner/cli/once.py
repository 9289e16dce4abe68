"""What typer does not do: refuse an option that is given twice, and build the options of only the command that runs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand
from typer.models import CommandInfo

__all__ = ["OnceTyper"]


_T = TypeVar("_T")


class _OnceCommand(TyperCommand):
    """A command whose options may be given once each, except those that count or collect values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  click's type; its module differs between typer's versions
        """Refuse options that are given several times, then parse. Raises typer.BadParameter with the option."""
        untyped: Any = self
        order: list[Any] = untyped.make_parser(ctx).parse_args(args=list(args))[2]
        for parameter, times in Counter(order).items():
            if times > 1 and _once(parameter):
                names = " and ".join((*parameter.opts[:1], *parameter.secondary_opts[:1]))
                verb = "contradict each other" if parameter.secondary_opts else f"is given {times} times"
                raise typer.BadParameter(f"{names} {verb}: leave one of them out", ctx=ctx)
        above: Any = super()
        parsed: list[str] = above.parse_args(ctx, args)
        return parsed


def _once(parameter: Any) -> bool:  # noqa: ANN401  as above
    """Whether a second value would silently replace the first. A plain switch may be given twice: it is on."""
    if parameter.param_type_name != "option" or parameter.multiple or parameter.count:
        return False
    return not parameter.is_flag or bool(parameter.secondary_opts)


class OnceTyper(typer.Typer):
    """An app whose commands are built by `_OnceCommand`."""

    def command(self, name: str | None = None, **options: Any) -> Any:  # noqa: ANN401  typer's own has twenty of them
        """As typer's."""
        above: Any = super()
        return above.command(name, **({"cls": _OnceCommand} | options))

    def run(self, arguments: Sequence[str], name: str) -> Any:  # noqa: ANN401  as above
        """Run one command line. Of the other commands only the name and the short help are built, for the list of commands.

        Typer builds every option of every command. That takes longer than some commands run.
        """
        wanted = next((one for one in arguments if not one.startswith("-")), None)
        whole = copy.copy(self)
        whole.registered_commands = [
            one if _name(one) == wanted else _listed(one, name=_name(one), callback=_nothing)
            for one in self.registered_commands
        ]
        whole.registered_groups = [
            one if one.name == wanted else _listed(one, typer_instance=OnceTyper()) for one in self.registered_groups
        ]
        return whole(arguments, prog_name=name, standalone_mode=False)


def _name(command: CommandInfo) -> str:
    return command.name or getattr(command.callback, "__name__", "")


def _listed(what: _T, **without: object) -> _T:
    listed = copy.copy(what)
    for name, value in without.items():
        setattr(listed, name, value)
    return listed


def _nothing() -> None:
    """The function of a command that is only listed."""
