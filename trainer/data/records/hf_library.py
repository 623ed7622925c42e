"""Dealings with `datasets` and `huggingface_hub` that do not concern any one data set."""

import logging
import socket
from typing import Any


def import_datasets() -> Any:
    """Import `datasets`, silenced: what it logs before an error is in the error as well."""
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


def is_network_error(error: BaseException | None) -> bool:
    """Return whether an error of any HTTP client was caused by a missing answer or an unknown host name."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            return True
        if {"TransportError", "ClientConnectionError"} & {kind.__name__ for kind in type(error).__mro__}:
            return True  # of httpx and its forks, and of aiohttp, which need not be installed
        error = error.__cause__ or error.__context__
    return False
