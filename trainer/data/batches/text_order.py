"""Order of a run's text after its text has changed: which row of which domain comes at which position.

    positions   0 ............ 1199 | 1200 ............         numbers of rows in the run, never used twice
    text        the first           | another                   from `start` on
    mixture     0 ............ 1199 | 0 1 2 ...                 shares are exact from the change on
    visits      0 ..  of a domain   | first_visit ..            under `restart` from 0, under `continue` where it was

Imports no torch.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import count
from typing import Annotated

from pydantic import Field

from trainer.config.base import Config
from trainer.data.config import OnTextChange

_Count = Annotated[int, Field(ge=0, le=1 << 53)]


class DomainOrder(Config):
    """Order of one domain."""

    content: Annotated[str, Field(max_length=200)] = ""
    """Hash of its text."""
    key: Annotated[int, Field(ge=0, le=1 << 31)]
    """Number of the domain in the keys of its permutations; kept for as long as the domain is read."""
    first_visit: _Count = 0
    """Visits before the run's present text."""
    visits: _Count = 0
    """Visits at a checkpoint."""


class TextOrder(Config):
    """Where the present text of a run begins, and the order of its domains. Part of checkpoints."""

    start: _Count = 0
    """Position of the first row of this text."""
    domains: dict[str, DomainOrder] = Field(default_factory=dict)
    """By name. A missing one has its number in the corpus as key, and no visits before."""

    def of(self, name: str, index: int) -> DomainOrder:
        """Return the order of a domain, which is the corpus's number `index`."""
        return self.domains.get(name) or DomainOrder(key=index)


def restarted_order(*, position: int) -> TextOrder:
    """Return the order of a text that is read from its beginning: that of a new run on it."""
    return TextOrder(start=position)


def continued_order(
    saved: TextOrder, contents: Mapping[str, str], *, position: int, streams: Collection[str] = ()
) -> TextOrder:
    """Return the order of a new text in which every domain goes on where it was.

    Args:
        saved: the order of a checkpoint, with the visits of each domain.
        contents: hash of the text of each domain now, by name.
        position: number of the first row of the new text.
        streams: domains that are streams; one whose text changed begins again, since its blocks are others.
    """
    kept = {name: saved.domains[name] for name in contents if name in saved.domains}
    used = {domain.key for domain in kept.values()}
    free: Iterator[int] = (key for key in count() if key not in used)
    domains = {}
    for name, content in contents.items():
        before = kept.get(name) or DomainOrder(key=next(free))
        begins_again = name in streams and before.content != content
        domains[name] = DomainOrder(key=before.key, first_visit=0 if begins_again else before.visits)
    return TextOrder(start=position, domains=domains)


def describe_change(
    how: OnTextChange, saved: TextOrder, contents: Mapping[str, str], *, position: int, streams: Collection[str] = ()
) -> str:
    """Describe in one line what a change of text means for each domain."""
    where = f"data.changed: {how}: other text from row {position} of the run on"
    if how == "restart":
        return f"{where}, read from its beginning, in epochs from 0"
    both = [name for name in contents if name in saved.domains]
    changed = [name for name in both if saved.domains[name].content != contents[name]]
    partly = "of this epoch, some rows are read again and others left out"
    parts = (
        ("unchanged, goes on in its order", [name for name in both if name not in changed]),
        (
            f"changed, goes on in the order of the new text ({partly})",
            [name for name in changed if name not in streams],
        ),
        ("a changed stream, read from its beginning", [name for name in changed if name in streams]),
        ("new, read from its beginning", [name for name in contents if name not in saved.domains]),
        ("no longer read", [name for name in saved.domains if name not in contents]),
    )
    return "; ".join([where, *(f"{', '.join(names)}: {what}" for what, names in parts if names)])
