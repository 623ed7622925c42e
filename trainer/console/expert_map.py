"""Draw which experts serve which domains on the terminal: a heat map for each MoE layer.

# L layers, G domains, E experts.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.console.style import QUIET, SHADES, packed
from trainer.metrics.specialisation import domain_entropy_bits, mutual_information_bits

# Shares of a domain, in units of the even share 1/E. Blue to orange is safe for the colour-blind and on both black and
# white; the shade carries the same information without colour.
_BOUNDS = (0.5, 0.8, 1.25, 2.0)
_STYLES = ("blue", "blue", QUIET, "dark_orange", "dark_orange")
_MAX_NAME = 14
_MAX_LAYERS = 8
_GAP = 2


def expert_map(
    counts: Sequence[Sequence[Sequence[float]]], domains: Sequence[str], layer_names: Sequence[str], *, width: int
) -> Group:
    """Return a heat map of each MoE layer: a row for each domain, a column for each expert, its share as shade.

    The title of a map has the mutual information of expert and domain. Maps stand side by side while they fit into
    `width`, 40 columns or more; a wider one continues below itself. Of more than 8 layers an even selection is shown.
    The assignments are (L, G, E).
    """
    array = np.asarray(counts, dtype=float)
    parts: list[RenderableType] = list(_legend(array, width))
    num_layers, num_experts = len(layer_names), array.shape[2]
    num_shown = min(num_layers, _MAX_LAYERS)
    shown = sorted({round(i * (num_layers - 1) / max(1, num_shown - 1)) for i in range(num_shown)})
    if len(shown) < num_layers:
        parts.append(Text(f"{len(shown)} of {num_layers} MoE layers", style=QUIET))
    name_width = min(_MAX_NAME, max(map(cell_len, domains)))
    available = max(8, width - name_width - _GAP)
    cell_width = 2 if num_experts <= 16 else 1
    # Blocks of equal size: 64 experts in 50 columns are 32 and 32, not 50 and 14.
    num_blocks = math.ceil(num_experts / max(1, available // cell_width))
    blocks = [block.tolist() for block in np.array_split(np.arange(num_experts), num_blocks)]
    maps = [_layer(array[layer], layer_names[layer], blocks, cell_width) for layer in shown]
    per_row = max(1, (available + _GAP) // (max(line.cell_len for lines in maps for line in lines) + _GAP))
    labels = [*([""] if num_blocks > 1 else []), *(set_cell_size(name, name_width) for name in domains)]
    names = Text("\n".join(["", *labels * num_blocks]))
    for start in range(0, len(maps), per_row):
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        for _ in range(1 + per_row):
            grid.add_column(no_wrap=True)
        grid.add_row(names, *(Text("\n").join(lines) for lines in maps[start : start + per_row]))
        parts += [Text(), grid]
    return Group(*parts)


def _legend(counts: np.ndarray, width: int) -> Iterator[Text]:
    legend = [Text(f"share of a domain, even is 1/{counts.shape[2]}:", style=QUIET)]
    for shade, style, label in zip(SHADES, _STYLES, ("<0.5x", "<0.8x", "even", ">1.25x", ">2x"), strict=True):
        legend.append(Text(f"{shade * 2} ", style=style).append(label, style=QUIET))
    yield from packed(legend, width, gap=1)
    maximum = domain_entropy_bits(counts.sum(axis=0).tolist())
    yield Text(f"bits: information about a token's domain in its expert, 0 to {maximum:.2f}", style=QUIET)


def _layer(counts: np.ndarray, name: str, blocks: Sequence[Sequence[int]], cell_width: int) -> list[Text]:
    """Return a title line, then for each block of experts a line per domain."""
    lines = [Text(name).append(f"  {mutual_information_bits(counts.tolist()):.2f} bits", style="bold")]
    for block in blocks:
        if len(blocks) > 1:
            lines.append(Text(f"experts {block[0]} to {block[-1]}", style=QUIET))
        lines += [_cells(of_domain, block, cell_width) for of_domain in counts]
    return lines


def _cells(counts: np.ndarray, block: Sequence[int], cell_width: int) -> Text:
    total = counts.sum()
    if total == 0:
        return Text("no tokens", style=QUIET)
    line = Text()
    for share in counts[block] * len(counts) / total:
        level = sum(share >= bound for bound in _BOUNDS)
        line.append(SHADES[level] * cell_width, style=_STYLES[level])
    return line
