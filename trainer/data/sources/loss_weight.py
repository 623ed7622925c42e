"""Weight of a document in the training loss, read from a column of its record."""

from trainer.config.nodes import shown
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import WRONG_TYPE, Record, type_name

_LARGEST = 1e18  # sums of these are finite, and a weight times a loss is finite in float32


def loss_weight(record: Record, column: str) -> float:
    """Return the weight in a column; raise BadRecord if it is no finite number of at least 0."""
    value = record.value(column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        found, reason = type_name(value), WRONG_TYPE
    elif 0 <= value <= _LARGEST:
        return float(value)
    else:
        found, reason = shown(value), "of an impossible weight"
    raise BadRecord(
        f"{record.where}: {column!r} is {found}; the weight of a document is a number from 0 to {_LARGEST:g}; correct "
        "or remove the record",
        reason=reason,
    )
