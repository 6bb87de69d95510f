"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print rows below a header, as wide as they need.

    Args:
      header: names of the columns.
      rows: texts.
      numbers: the columns to align at the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 1000  # as wide as the table, which `print` does not fill up
    console.print(table)


def size(count: float) -> str:
    """A number of bytes in words: `1.5 MiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} B"


def shape(dims: Iterable[int]) -> str:
    """A shape in words: `8 x 16`."""
    return " x ".join(map(str, dims))
