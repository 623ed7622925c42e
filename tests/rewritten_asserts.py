"""Rewrite the asserts of all tests once, before pytest-xdist starts workers: each would rewrite all of them itself.

In a new clone nothing is rewritten yet, and workers that start together find nothing of each other's.
"""

import sys
from pathlib import Path

import pytest
from _pytest.assertion import rewrite


def write_all(config: pytest.Config) -> None:
    """Write what is missing beside the tests, where pytest looks for it."""
    if sys.dont_write_bytecode or config.getoption("assertmode") != "rewrite":
        return
    for path in Path(__file__).parent.rglob("test_*.py"):
        folder = rewrite.get_cache_dir(path)
        written = folder / f"{path.stem}{rewrite.PYC_TAIL}"
        if rewrite._read_pyc(path, written) is None and rewrite.try_makedirs(folder):
            source_hash, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, source_hash, written)
