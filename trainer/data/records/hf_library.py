"""Calls to `datasets` and `huggingface_hub` that do not depend on the data set, their errors and their tables."""

import logging
import re
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trainer.data.records import json_lines
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import Record
from trainer.data.records.memory_limit import limit_memory
from trainer.errors import DataError

_SKIPPED_LINE = re.compile(r"line (\d+): (.+)")  # warning of pandas about a skipped CSV line
_MAX_REASON_CHARACTERS = 300
_TOO_MANY_FIELDS = "of too many fields"


def import_datasets() -> Any:
    """Import `datasets` and silence its logs, which only repeat its errors."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return datasets


def pin_commits(data_files: list[str]) -> list[str]:
    """Insert the current commit into hub addresses, since a branch can change between two reads."""
    from huggingface_hub import HfApi, HfFileSystem

    pinned = []
    for address in data_files:
        if address.startswith("hf://datasets/"):
            place: Any = HfFileSystem().resolve_path(address)
            commit = HfApi().dataset_info(place.repo_id, revision=place.revision).sha
            address = f"hf://datasets/{place.repo_id}@{commit}/{place.path_in_repo}"
        pinned.append(address)
    return pinned


@contextmanager
def library_errors(where: str, *, addresses: Sequence[str]) -> Iterator[None]:
    """Turn whatever a library raises into a one-line error, and limit its memory.

    Raises BadRecord for a CSV line with too many fields, and DataError for every other error. Messages name `where`, or
    `addresses` if the network is down.
    """
    try:
        limit = json_lines.MAX_RECORD_BYTES
        with limit_memory(where, f"a record has at most {limit} bytes: split those that have more, or the file"):
            yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # from any library that reads a format
        reason = _first_line(error) or type(error).__name__
        if _is_network_error(error):
            raise DataError(
                f"{', '.join(addresses)}: cannot be reached ({reason}); the hub or its cache is needed; check the "
                "network, or give local files"
            ) from error
        message = f"{where}: cannot be read ({reason}); correct the data or its options"
        if re.search(r"Expected \d+ fields in line \d+, saw \d+", reason):  # by pandas
            raise BadRecord(message, reason=_TOO_MANY_FIELDS) from error
        raise DataError(message) from error


def _is_network_error(error: BaseException | None) -> bool:
    """Return whether an error of any HTTP client was caused by a missing answer or an unknown host name."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            return True
        if {"TransportError", "ClientConnectionError"} & {kind.__name__ for kind in type(error).__mro__}:
            return True  # of httpx and its forks, and of aiohttp, which need not be installed
        error = error.__cause__ or error.__context__
    return False


def to_record(values: dict[str, Any] | Exception, place: str) -> Record | BadRecord:
    """Return a record, or its error if the library could not convert it or it is too large."""
    if isinstance(values, Exception):
        message = f"{place}: cannot be read ({_first_line(values)}); correct or remove the record"
        return BadRecord(message, reason="that cannot be read")
    return json_lines.too_large(place) if _is_too_large(values) else Record(place, values)


def table_values(table: Any) -> list[dict[str, Any] | Exception]:
    """Return the values of each record of a table, with an exception in place of each that cannot be converted."""
    converted = _try_convert(table)
    if not isinstance(converted, Exception):
        return [*converted]
    rows = (_try_convert(table.slice(i, 1)) for i in range(table.num_rows))
    return [row if isinstance(row, Exception) else row[0] for row in rows]


def _try_convert(table: Any) -> list[dict[str, Any]] | Exception:
    try:
        return table.to_pylist()
    except MemoryError:
        raise
    except Exception as error:
        return error


def _is_too_large(values: dict[str, Any]) -> bool:
    num_characters = sum(len(value) for value in values.values() if isinstance(value, str | bytes))
    if 4 * num_characters <= json_lines.MAX_RECORD_BYTES:
        return False
    num_bytes = sum(len(value.encode("utf-8", "surrogatepass")) for value in values.values() if isinstance(value, str))
    return num_bytes > json_lines.MAX_RECORD_BYTES


@contextmanager
def collect_skipped_lines(name: str) -> Iterator[list[BadRecord]]:
    """Collect the lines with too many fields that pandas skips in a CSV file inside the block."""
    skipped: list[BadRecord] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield skipped
    for warning in caught:
        for number, reason in _SKIPPED_LINE.findall(str(warning.message)):
            skipped.append(BadRecord(f"{name}:{number}: {reason}; correct or remove the line", reason=_TOO_MANY_FIELDS))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:_MAX_REASON_CHARACTERS] if lines else ""
