"""A command line that is taken whole: an option that is given twice is refused, where click would take the last one in silence."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand


class OnceCommand(TyperCommand):
    """A command whose options may be given once each, except for those that count or collect."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  click's, and where that lives differs between typer's versions
        """Parse, after a look at what is given several times. Raises typer.BadParameter with the option."""
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
    """Whether a second time would silently win over the first. A switch that is thrown twice is thrown."""
    if parameter.param_type_name != "option" or parameter.multiple or parameter.count:
        return False
    return not parameter.is_flag or bool(parameter.secondary_opts)


class OnceTyper(typer.Typer):
    """An app whose commands are all of that kind."""

    def command(self, name: str | None = None, **options: Any) -> Any:  # noqa: ANN401  typer's own has twenty of them
        """As typer's."""
        above: Any = super()
        return above.command(name, **({"cls": OnceCommand} | options))
