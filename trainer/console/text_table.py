"""A table of plain lines for a terminal: columns are aligned, foreign text is made safe, nothing is wrapped."""

from collections.abc import Collection, Iterator, Sequence

from rich.cells import cell_len

from trainer.terminal import single_line


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> Iterator[str]:
    """Yield the lines of a table; the columns `left` are aligned left, the others right."""
    lines = [[single_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = []
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            cells.append(cell + space if column in left else space + cell)
        yield "  ".join(cells).rstrip()
