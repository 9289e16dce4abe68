"""Makes foreign text safe to show in terminals, logs and pages. No other module does.

Foreign text is text that another process wrote: names of machines, errors, the output of engines, the text of models.
Unchanged, it can move the cursor, change colours, write from right to left, or forge a line of a log. Programs get it
unchanged (``--json``).
"""

from __future__ import annotations

import re

__all__ = ["printable", "printable_text"]


# Controls (C0 without tab and line feed, DEL, C1), characters that change the direction of writing, and halves of
# surrogate pairs.
_NOT_IN_TEXTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, most: int | None = None) -> str:
    r"""One line that shows every character: a character that cannot be printed is escaped, as ``\x1b`` or ``\u202e``.

    Args:
        text: foreign.
        most: the greatest length in characters; a longer text is cut and ends in ``…``. None if the caller limits it.
    """
    if most is not None and len(text) > most:
        text = text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def printable_text(text: str) -> str:
    """A model's text for a terminal: line breaks and tabs stay, controls are left out. Pieces can be given one by one."""
    return _NOT_IN_TEXTS.sub("", text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
