"""Test tensors are tiny: a second thread costs more than it brings, and the cores are shared with other processes."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=int, default=1, help="how often to repeat what happens by chance")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> int:
    """How often to repeat what happens by chance: once in every run of the tests, more for a figure."""
    return int(request.config.getoption("--times"))
