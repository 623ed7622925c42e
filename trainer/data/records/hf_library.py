"""Calls to `datasets` and `huggingface_hub` that do not depend on the data set, and their errors."""

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trainer.data.records import json_lines
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.memory_limit import limit_memory
from trainer.data.records.tables import TOO_MANY_FIELDS, first_line_of, has_too_many_fields
from trainer.errors import DataError


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

    Args:
        where: place for messages.
        addresses: what cannot be reached if the network is down.

    Raises:
        BadRecord: for a CSV line with too many fields.
        DataError: for every other error.
    """
    try:
        with limit_memory(
            where, f"a record has at most {json_lines.MAX_RECORD_BYTES} bytes: split those that have more, or the file"
        ):
            yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # from any library that reads a format
        reason = first_line_of(error) or type(error).__name__
        if _is_network_error(error):
            raise DataError(
                f"{', '.join(addresses)}: cannot be reached ({reason}); the hub or its cache is needed; check the "
                "network, or give local files"
            ) from error
        message = f"{where}: cannot be read ({reason}); correct the data or its options"
        if has_too_many_fields(reason):
            raise BadRecord(message, reason=TOO_MANY_FIELDS) from error
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
