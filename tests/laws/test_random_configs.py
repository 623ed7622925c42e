"""Law: any config learns on any ranks what one process learns, in text full of repeated tokens too (the short form)."""

import random
from pathlib import Path

import pytest

from tests.random_configs import ROUTERS, TOLERANCE, compared, draw, router_options
from trainer.moe.routers.registry import ROUTER_MODULES
from trainer.prove.pool import LocalRanks

NUMBERS = (0, 4, 5, 6, 7, 8, 12, 13, 21, 63, 73, 135)
"""Twelve of the 200 that `python -m tests.random_configs` compares: most that decide a row together, 63 and 135 by
a transport plan that is even; 6 weighs its documents, 21 replays experts, 73 sums the z-loss of logits over stages."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_random_config_learns_the_same_on_random_ranks(number: int, folder: Path, local_ranks: LocalRanks) -> None:
    trial = draw(number, folder)
    found = compared(trial, local_ranks)
    assert found.is_equal, f"{trial.name}: {found.first_different}: {found.cause}"
    assert max(found.worst.values()) <= TOLERANCE and found.flips == 0


def test_a_number_is_one_config(folder: Path) -> None:
    assert [draw(number, folder) for number in (3, 4)] == [draw(number, folder) for number in (3, 4)]
    drawn = [draw(number, folder) for number in range(2 * len(ROUTERS))]
    moe = [trial.config.model.moe for trial in drawn]
    assert {section.router.kind for section in moe if section is not None} == set(ROUTERS)
    assert len({trial.text for trial in drawn}) > 6 and {trial.case.world_size for trial in drawn} == {2, 3, 4}


def test_every_option_of_every_router_is_drawn() -> None:
    """Or no test covers an added option under every layout; routers that are one file are drawn with defaults."""
    options = router_options(random.Random(0), 4)
    for kind in ROUTERS.keys() - ROUTER_MODULES.keys():
        router = ROUTERS[kind]
        assert router.model_fields.keys() - {"kind"} <= options.keys(), kind
