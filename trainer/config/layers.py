"""Read the layers of a configuration, a file and its base files, and merge them."""

import codecs
import difflib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Final

from trainer.atomic_io import NotRegular, open_regular
from trainer.config import slots
from trainer.config.base import expand_home
from trainer.config.nodes import UNUSABLE, Finding, Node, SourceLocation, Unreadable, shown, shown_path
from trainer.config.old_names import with_present_names
from trainer.config.slots import Slot
from trainer.config.yaml_nodes import compose

_MAX_BYTES: Final = 2**20
_ADDRESS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?!/)")


def merge(under: Node, over: Node, slot: Slot) -> Node:
    """Merge one value over another.

    Mappings merge key by key. Everything else replaces: scalars, lists, an explicit null, and a mapping whose `kind`
    selects another section, since kinds do not share options.
    """
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    section = slots.section_of(slot, slots.kind_of(under, slot))
    if "kind" in over.value:
        other = slots.section_of(slot, over.value["kind"].value)
        if other is not section or (other is None and len(slots.sections(slot.annotation)) > 1):
            return over
    value = dict(under.value)
    for key, node in over.value.items():
        value[key] = merge(value[key], node, slots.field(section, key)) if key in value else node
    return replace(over, value=value)


def with_default_kinds(node: Node, slot: Slot) -> Node:
    """Add the default `kind` of sections that do not state one."""
    if isinstance(node.value, list):
        return replace(node, value=[with_default_kinds(n, slots.entry(slot, i)) for i, n in enumerate(node.value)])
    if not isinstance(node.value, dict):
        return node
    value = {key: with_default_kinds(n, slots.below(slot, node, key)) for key, n in node.value.items()}
    kind = slots.kind_of(node, slot)
    if "kind" not in value and kind is not None and len(slots.sections(slot.annotation)) > 1:
        value["kind"] = Node(kind, node.place, node.key_place)
    return replace(node, value=value)


class ConfigFiles:
    """Reads a file and its bases."""

    def __init__(self, slot: Slot, findings: list[Finding]) -> None:
        """Create a reader for the schema in `slot`; `findings` collects problems that do not stop the reading."""
        self._slot = slot
        self._findings = findings
        self._reading: list[str] = []  # a file, the base it named, the base that one named...
        self._num_read = 0

    def read(self, name: str) -> Node:
        """Read a file with its bases under it.

        Args:
            name: path of the file, also used in messages.

        Raises:
            Unreadable: if it or one of its bases is not a readable YAML mapping, or bases form a cycle.
        """
        name = _as_address(expand_home(name)) or expand_home(name)
        rank, self._num_read = self._num_read, self._num_read + 1

        def locate(line: int, column: int) -> SourceLocation:
            return SourceLocation(rank, line, column, name)

        path = Path(name)
        tree = compose(_text(path, locate), locate, self._findings)
        if tree is None or tree.value is None:
            raise Unreadable(locate(0, 0), "the file is empty; a configuration is key: value pairs")
        if not isinstance(tree.value, dict):
            got = {list: "a list", str: "text"}.get(type(tree.value), "a single value")
            raise Unreadable(tree.place, f"expected key: value pairs, got {got}")
        tree = with_present_names(tree, self._slot, self._findings)
        base = tree.value.pop("base", None)
        if base is None:
            return tree
        self._reading.append(os.path.realpath(path))
        layers: list[Node] = []
        for node in base.value if isinstance(base.value, list) else [base]:
            if isinstance(node.value, str) and node.value:
                layers.append(self._read_base(path, node))
            elif node.value is not UNUSABLE:
                message = f"expected the path of a file or a list of them, got {node.written or shown(node.value)}"
                self._findings.append(Finding(node.place, ("base",), message))
        self._reading.pop()
        return reduce(lambda under, over: merge(under, over, self._slot), [*layers, tree])

    def _read_base(self, path: Path, node: Node) -> Node:
        name = _as_address(node.value) or os.path.normpath(path.parent / expand_home(node.value))
        try:
            real = os.path.realpath(name)
        except ValueError:  # invalid name; reported when the file is opened
            real = name
        if real in self._reading:
            chain = " -> ".join(os.path.relpath(p) for p in [*self._reading[self._reading.index(real) :], real])
            raise Unreadable(node.place, f"{shown_path(name)} is its own base: {chain}; remove one link", ("base",))
        try:
            return self.read(name)
        except _NotOpened as error:  # report the line that names the file
            raise Unreadable(node.place, f"{shown(name)[1:-1]}: {error.finding.message}", ("base",)) from None


class _NotOpened(Unreadable):
    """A file that cannot be opened."""


def _text(path: Path, locate: Callable[[int, int], SourceLocation]) -> str:
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY, through_links=True), "rb") as file:
            data = file.read(_MAX_BYTES + 1).removeprefix(codecs.BOM_UTF8)  # written by Windows editors
    except FileNotFoundError:
        raise _NotOpened(locate(0, 0), _missing(path)) from None
    except NotRegular:
        is_folder = "is a directory; name a .yaml file in it"
        message = is_folder if path.is_dir() else "is a pipe or a device; a configuration is a file"
        raise _NotOpened(locate(0, 0), message) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _NotOpened(locate(0, 0), f"cannot be read: {reason}") from None
    if len(data) > _MAX_BYTES:
        raise Unreadable(locate(0, 0), f"more than {_MAX_BYTES} bytes; a configuration has a few thousand")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        place = locate(before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise Unreadable(place, f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _as_address(name: str) -> str | None:
    """Return a URL with both slashes, of which `Path` keeps one; None if a name is not a URL."""
    match = _ADDRESS.match(name)
    return None if match is None else f"{match[1]}://{name[match.end() :]}"


def _missing(path: Path) -> str:
    if _as_address(str(path)) is not None:
        return "is a URL, and a configuration is a local file; download it, and name the file"
    try:
        stems = {p.stem: p.name for p in sorted(path.parent.iterdir()) if p.suffix in (".yaml", ".yml")}
    except OSError:
        return f"no such file; there is no folder {shown_path(path.parent)} either"
    near = difflib.get_close_matches(path.stem, stems, n=1)
    hint = f"did you mean {shown_path(path.with_name(stems[near[0]]))}?" if near else "check the path"
    return f"no such file; {hint}"
