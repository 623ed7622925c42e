"""Keys of a sweep's `over` that were given in parts, as by an override on the command line. Imports no torch."""

from collections.abc import Iterator
from dataclasses import replace

from trainer.config.nodes import Node
from trainer.sweep.sweep_config import RangeConfig


def with_dotted_keys(tree: Node) -> Node:
    """Return the tree of a sweep with dotted keys in `over`: {schedule: {peak_lr: [1]}} is {schedule.peak_lr: [1]}.

    Below a key that has dots, and in what has the name of a range ({uniform: [0, 1]}), there are no further keys. Of a
    key given twice the later values count, in the place of the earlier: overrides do not change the order.
    """
    over = tree.below("over")
    if over is None or not isinstance(over.value, dict):
        return tree
    return replace(tree, value={**tree.value, "over": replace(over, value=dict(_dotted("", over)))})


def _dotted(above: str, section: Node) -> Iterator[tuple[str, Node]]:
    for key, node in section.value.items():
        name = f"{above}.{key}" if above else str(key)
        is_section = isinstance(node.value, dict) and not node.value.keys() & RangeConfig.model_fields.keys()
        if is_section and "." not in str(key):
            yield from _dotted(name, node)
        else:
            yield name, node
