"""Test tensors are tiny: a second thread costs more than it brings, and the cores are shared with other processes."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.ranks import Ranks

torch.set_num_threads(1)
settings.register_profile("turnout", deadline=None)  # how long an example takes says nothing on shared cores
settings.load_profile("turnout")


_SLOW_FOLDERS = {"end_to_end", "chaos"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts runs; elsewhere a test or file says so itself."""
    for item in items:
        if _SLOW_FOLDERS & set(item.path.parts):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=int, default=1, help="how often to repeat what happens by chance")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> int:
    """How often to repeat what happens by chance: once in every run of the tests, more for a figure."""
    return int(request.config.getoption("--times"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Processes that run a function together; those of a module's tests stay for the next one."""
    processes = Ranks()
    yield processes
    processes.close()


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """Without it, memory that nobody has written is often zeros."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is on by default"
    yield
    torch.use_deterministic_algorithms(False)
