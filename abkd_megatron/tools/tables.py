"""Rows that a person reads: a table on a terminal, one plain line each elsewhere."""

import sys
from collections.abc import Mapping, Sequence


def show(titles: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str]) -> None:
    """Print rows to stdout.

    Args:
        titles: of the columns.
        rows: as many texts each: what was looked at, what was found, and more that plain lines name; last the verdict,
            which they begin with.
        styles: how rich shows a verdict, by its text.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # `env` has to say so
        pass
    else:
        if sys.stdout.isatty():
            table = Table(*titles)
            for *texts, verdict in rows:
                table.add_row(*map(Text, texts), Text(verdict, style=styles.get(verdict, "")))
            Console().print(table)
            return
    width = max(len(verdict) for *_, verdict in rows)
    for first, found, *rest, verdict in rows:
        named = [f"{title}: {text}" for title, text in zip(titles[2:-1], rest, strict=True) if text]
        print(f"{verdict:<{width}}  {first}: {'; '.join([found or '-', *named])}")
