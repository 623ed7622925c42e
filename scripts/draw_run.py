"""Draw the terminal of a real run as an SVG: `python -m scripts.draw_run docs/run.svg --step 400 -- train CONFIG`.

The run gets a pseudo-terminal, so it shows its live panel; the picture is the screen when that panel reaches a step.
"""

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

_PANEL = re.compile(r"step\s+([\d,]+) / [\d,]+  \S*━")
_STYLE = re.compile(r"\x1b\[[\d;]*m")
_CURSOR = re.compile(r"(\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh]|\r\n|\r|\n)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--step", type=int, required=True, help="draw the screen once the live panel shows this step")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("arguments", nargs="+", metavar="ARGUMENT", help="the command line after `python -m trainer`")
    options = parser.parse_args()
    frames = screens(run_in_terminal(options.arguments, options.columns))
    frame = next((lines for lines in frames if panel_step(lines) >= options.step), None)
    if frame is None:
        sys.exit(f"draw_run: the live panel never showed step {options.step}; use a longer run, or a smaller --step")
    options.output.write_text(draw(frame, options.columns, "python -m trainer " + " ".join(options.arguments)))


def run_in_terminal(arguments: list[str], columns: int) -> str:
    """Run Turnout on a pseudo-terminal of this width; return its output, escape sequences included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "trainer", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = bytearray()
        while chunk := _read(ours):
            written += chunk
    os.close(ours)
    if process.returncode:
        sys.exit(f"draw_run: the run ended with {process.returncode}:\n{written[-2000:].decode(errors='replace')}")
    return written.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux reports the end of a pseudo-terminal as EIO
        return b""


def screens(written: str) -> Iterator[list[str]]:
    """Yield the lines on the screen whenever the live panel is complete, as rich.live draws it."""
    lines, row = [""], 0
    for piece in _CURSOR.split(written):
        if piece in ("\r\n", "\n"):
            row += 1
            if row == len(lines):
                lines.append("")
        elif piece.endswith("A") and piece.startswith("\x1b["):
            row = max(0, row - int(piece[2:-1] or 1))
        elif piece == "\x1b[2K":
            yield lines
            lines = [*lines[:row], "", *lines[row + 1 :]]
        elif piece not in ("\r", "\x1b[?25l", "\x1b[?25h"):
            lines = [*lines[:row], lines[row] + piece, *lines[row + 1 :]]
    yield lines


def panel_step(lines: list[str]) -> int:
    """Return the step that the live panel shows, or -1 if it is not on the screen."""
    found = _PANEL.search("\n".join(_STYLE.sub("", line) for line in lines[-12:]))
    return int(found[1].replace(",", "")) if found else -1


def draw(lines: list[str], columns: int, title: str) -> str:
    """Return the screen as an SVG."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    while lines and not _STYLE.sub("", lines[-1]).strip():
        lines = lines[:-1]
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    svg = console.export_svg(title=title)
    # The web fonts would be loaded from a server; a picture shows nothing but itself.
    svg = re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


if __name__ == "__main__":
    main()
