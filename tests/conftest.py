"""Fixtures and settings of all tests. One thread: test tensors are tiny, and tests share the cores."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import rewritten_asserts, samples, shared_fork_server
from tests.ranks import Ranks
from trainer.prove.pool import LocalRanks

torch.set_num_threads(1)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes, and each imports torch
settings.register_profile("turnout", deadline=None)  # times mean nothing on shared cores
settings.load_profile("turnout")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # runs that the tests start inherit it

_FORKS = pytest.StashKey[dict[str, Any]]()
_SLOW_FOLDERS = {"end_to_end", "chaos"}


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Do once what each worker of pytest-xdist would do; tell it where the server of forks is."""
    if _FORKS not in node.config.stash:
        import tests.imported_once  # noqa: F401 - says what the server imports

        node.config.stash[_FORKS] = shared_fork_server.start()
        rewritten_asserts.write_all(node.config)  # while the server imports
    node.workerinput["fork_server"] = node.config.stash[_FORKS]


def pytest_configure(config: pytest.Config) -> None:
    """Use that server in a worker."""
    server = getattr(config, "workerinput", {}).get("fork_server")
    if server is not None:
        shared_fork_server.adopt(server)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Let what is imported and collected be no garbage: looking through it takes a second, again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of folders that start runs as slow, and cases beyond a sample as nightly; others mark themselves."""
    for item in items:
        if _SLOW_FOLDERS & set(item.path.parts):
            item.add_marker(pytest.mark.slow)
    samples.mark_nightly(items)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=int, default=1, help="how often to repeat tests with a random part")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> int:
    """Number of repetitions of tests with a random part: once by default, more to measure a rate."""
    return int(request.config.getoption("--times"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Processes that run a function together, shared by the tests of a module."""
    processes = Ranks()
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def local_ranks() -> Iterator[LocalRanks]:
    """Processes that run layouts of a proof, shared by the tests of a module."""
    with closing(LocalRanks()) as processes:
        yield processes


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """Without it, memory that nobody has written is often zeros."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is on by default"
    yield
    torch.use_deterministic_algorithms(False)
