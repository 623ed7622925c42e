"""Draw which experts serve which domains: small heat maps, one for each MoE layer.

# L layers, G domains, E experts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trainer.console.glyphs import QUIET, glyphs_for
from trainer.console.layout import packed
from trainer.metrics.specialisation import domain_entropy_bits, mutual_information_bits

# Shares of a domain, in units of the even share 1/E. Blue to orange is safe for the colour-blind and on both black and
# white; the cell's own darkness says the same without any colour.
_BOUNDS = (0.5, 0.8, 1.25, 2.0)
_STYLES = ("blue", "blue", QUIET, "dark_orange", "dark_orange")
_LABEL_WIDTH = 14
_GAP = 3


def expert_by_domain(
    counts: Sequence[Sequence[Sequence[float]]],
    domains: Sequence[str],
    layer_names: Sequence[str],
    *,
    max_layers: int = 8,
) -> "ExpertByDomain":
    """Draw a heat map of each MoE layer: a row for each domain, a column for each expert, the share as shade.

    Over each map stands the mutual information of expert and domain. Maps stand side by side while they fit, and one
    that is wider than the screen goes on below itself.

    Args:
        counts: (L, G, E) assignments.
        domains: G names.
        layer_names: L names.
        max_layers: Most maps to draw; of more layers an even selection is shown.

    Returns:
        Something rich can print at any width from 40 columns.

    Raises:
        ValueError: if the shapes disagree.
    """
    table = np.asarray(counts, dtype=float)
    if table.ndim != 3 or table.shape[:2] != (len(layer_names), len(domains)) or table.shape[2] == 0:
        raise ValueError(
            f"counts: shape {table.shape}; (layers, domains, experts) is needed, with {len(layer_names)} layers and "
            f"{len(domains)} domains"
        )
    return ExpertByDomain(counts=table, domains=tuple(domains), layer_names=tuple(layer_names), max_layers=max_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertByDomain:
    """The rich renderable behind `expert_by_domain`."""

    counts: np.ndarray
    domains: tuple[str, ...]
    layer_names: tuple[str, ...]
    max_layers: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the maps out for the width at hand."""
        shades = glyphs_for(options.encoding).shades
        yield from self._legend(shades, options.max_width)
        shown = self._selection()
        if len(shown) < len(self.layer_names):
            yield Text(f"{len(shown)} of {len(self.layer_names)} MoE layers", style=QUIET)
        label_width = min(_LABEL_WIDTH, max((cell_len(name) for name in self.domains), default=0))
        room = max(8, options.max_width - label_width - 2)
        maps = [self._map(layer, shades, room) for layer in shown]
        map_width = max(line.cell_len for lines in maps for line in lines)
        per_row = max(1, (room + _GAP) // (map_width + _GAP))
        for start in range(0, len(maps), per_row):
            yield Text()
            yield from self._side_by_side(maps[start : start + per_row], label_width, map_width)

    def _selection(self) -> list[int]:
        num_layers = len(self.layer_names)
        num_shown = min(num_layers, max(1, self.max_layers))
        return sorted({round(i * (num_layers - 1) / max(1, num_shown - 1)) for i in range(num_shown)})

    def _legend(self, shades: str, width: int) -> Iterator[Text]:
        legend = [Text(f"share of a domain, even is 1/{self.counts.shape[2]}:", style=QUIET)]
        for shade, style, meaning in zip(shades, _STYLES, ("<0.5x", "<0.8x", "even", ">1.25x", ">2x"), strict=True):
            legend.append(Text(f"{shade * 2} ", style=style).append(meaning, style=QUIET))
        yield from packed(legend, width, gap=1)
        most = domain_entropy_bits(self.counts.sum(axis=0).tolist())
        yield Text(f"bits: how much the expert tells of a token's domain; 0 nothing, {most:.2f} all", style=QUIET)

    def _map(self, layer: int, shades: str, room: int) -> list[Text]:
        """Title line, then a line for each domain, once for every stretch of experts that fits in `room`."""
        counts = self.counts[layer]
        num_experts = counts.shape[1]
        cell_width = 2 if num_experts <= 16 else 1
        per_line = max(1, room // cell_width)
        # Even stretches: 64 experts in 50 columns are 32 and 32, not 50 and 14.
        num_stretches = math.ceil(num_experts / per_line)
        per_line = math.ceil(num_experts / num_stretches)
        bits = mutual_information_bits(counts.tolist())
        lines = [Text(self.layer_names[layer]).append(f"  {bits:.2f} bits", style="bold")]
        for start in range(0, num_experts, per_line):
            if num_stretches > 1:
                end = min(start + per_line, num_experts)
                lines.append(Text(f"experts {start} to {end - 1}", style=QUIET))
            lines += [self._row(row, shades, start, per_line, cell_width) for row in counts]
        return lines

    @staticmethod
    def _row(row: np.ndarray, shades: str, start: int, per_line: int, cell_width: int) -> Text:
        total = row.sum()
        if total == 0:
            return Text("no tokens", style=QUIET)
        line = Text()
        for share in (row * len(row) / total)[start : start + per_line]:
            level = sum(share >= bound for bound in _BOUNDS)
            line.append(shades[level] * cell_width, style=_STYLES[level])
        return line

    def _side_by_side(self, maps: list[list[Text]], label_width: int, map_width: int) -> Iterator[Text]:
        """Join maps line by line, with the domains' names on the left of every stretch."""
        num_lines = len(maps[0])
        stretch = len(self.domains) + (num_lines > len(self.domains) + 1)
        for index in range(num_lines):
            # Line 0 is the title; in a stretch with a heading the heading comes first.
            place = (index - 1) % stretch - (stretch - len(self.domains))
            name = self.domains[place] if index and place >= 0 else ""
            line = Text(set_cell_size(name, label_width) + "  ", no_wrap=True)
            for lines in maps:
                line.append_text(lines[index]).append(" " * (map_width + _GAP - lines[index].cell_len))
            line.rstrip()
            yield line
