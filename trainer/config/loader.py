"""Load an experiment file with its overrides: return a typed configuration, or report every problem at its place."""

import os
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError

from trainer.config.base import Config
from trainer.config.explain import explain
from trainer.config.layers import ConfigFiles, with_default_kinds
from trainer.config.nodes import Finding, Node, Unreadable, report
from trainer.config.old_names import with_present_names
from trainer.config.overrides import apply
from trainer.config.slots import Slot

C = TypeVar("C", bound=Config)


def load(path: str | os.PathLike[str], overrides: Sequence[str], root: type[C]) -> C:
    """Load a YAML file, its base files and overrides (`a.b=c`, see `trainer.config.overrides`) under a schema.

    Raises:
        ConfigError: with one line for each problem, in the order of the file.

    Warns:
        OldNameWarning: for each former name of a key or a value.
    """
    findings: list[Finding] = []
    return validate(read_tree(path, overrides, root, findings), root, findings)


def read_tree(
    path: str | os.PathLike[str], overrides: Sequence[str], root: type[Config], findings: list[Finding]
) -> Node:
    """Read a YAML file, its base files and overrides: values with their places, which are not yet checked.

    Args:
        path: the file.
        overrides: as typed.
        root: the schema.
        findings: collects problems that do not stop the reading.

    Raises:
        ConfigError: if it cannot be read to its end.
    """
    slot = Slot(root)
    try:
        tree = ConfigFiles(slot, findings).read(os.fspath(path))
    except Unreadable as error:
        raise report([*findings, error.finding]) from None
    tree = with_present_names(apply(tree, overrides, slot, findings), slot, findings)
    return with_default_kinds(tree, slot)


def validate(tree: Node, root: type[C], findings: Sequence[Finding]) -> C:
    """Return the checked configuration of a tree.

    Raises:
        ConfigError: with `findings`, which are earlier problems, and those of the schema.
    """
    try:
        config = root.model_validate(tree.plain())
    except ValidationError as error:
        raise report([*findings, *explain(error, tree, root)]) from None
    if findings:
        raise report(findings)
    return config
