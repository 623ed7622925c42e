"""Law: a changed bit of the token cache is never trained or evaluated on."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.corruption import CORRUPTIONS
from tests.chaos.token_cache import corrupt, make_cache, small_blocks
from trainer.data.config import DataConfig
from trainer.data.token_cache.checksums import CheckedArray

FLIP = {"bit flip": CORRUPTIONS["bit flip"]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataConfig]:
    before = Path.cwd()
    with small_blocks():
        yield make_cache(tmp_path_factory.mktemp("text"))
    os.chdir(before)


@pytest.mark.parametrize("kind", ["tokens", "documents", "answers"])
def test_every_flipped_bit_is_an_error_that_names_the_file(config: DataConfig, kind: str) -> None:
    result = corrupt(config, 34, seed=0, corruptions=FLIP, only=f".{kind}")
    assert result.not_noticed == [] and result.refused == 34, result


def test_whatever_happens_to_a_file_is_noticed_and_not_learned(config: DataConfig) -> None:
    result = corrupt(config, 40, seed=0, corruptions=CORRUPTIONS)
    assert result.not_noticed == [], result
    assert result.by_harm.keys() == CORRUPTIONS.keys()
    assert {Path(name).suffix for name in result.by_file} == {
        ".tokens",
        ".documents",
        ".answers",
        ".checksums",
        ".json",
    }


def test_without_the_checksums_of_blocks_flipped_bits_are_learned(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: without the comparison, corruptions are missed."""
    monkeypatch.setattr(CheckedArray, "_check", lambda self, blocks: None)
    assert len(corrupt(config, 20, seed=0, corruptions=FLIP, only="train.tokens").not_noticed) > 10
