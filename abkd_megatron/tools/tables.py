"""Tables on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 10_000  # columns: no line is wrapped in a pipe or a file


def console() -> "Console":
    """Return rich's console for stdout. It wraps lines on a terminal only."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_WIDE)


def show(titles: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str]) -> None:
    """Print rows to stdout: a table on a terminal, else one plain line per row, which begins with the verdict.

    Args:
        titles: of the columns.
        rows: one text per column: the name, the finding, details (labeled with their column's title), and the verdict.
        styles: rich's style of each verdict.
    """
    if sys.stdout.isatty():
        try:
            from rich.table import Table
            from rich.text import Text
        except ImportError:  # `env` reports this
            pass
        else:
            table = Table(*titles)
            for *texts, verdict in rows:
                table.add_row(*map(Text, texts), Text(verdict, style=styles.get(verdict, "")))
            console().print(table)
            return
    width = max(len(verdict) for *_, verdict in rows)
    for first, found, *rest, verdict in rows:
        named = [f"{title}: {text}" for title, text in zip(titles[2:-1], rest, strict=True) if text]
        print(f"{verdict:<{width}}  {first}: {'; '.join([found or '-', *named])}")
