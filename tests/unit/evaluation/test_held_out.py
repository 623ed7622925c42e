"""Tests for held-out evaluation."""

import math
from pathlib import Path

import pytest

from tests.builders import make_engine, tiny_model_config
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import build_corpus
from trainer.data.sources.registry import TextSourceConfig
from trainer.distributed.rank_layout import Layout
from trainer.evaluation.held_out import evaluate_held_out


def test_bits_per_byte_counts_predicted_bytes_only(tmp_path: Path) -> None:
    """Padding does not count: the row is longer than the five predicted bytes."""
    (tmp_path / "a.txt").write_text("abcdef" * 2)
    sources = [TextSourceConfig(path=str(tmp_path / "a.txt"), domain="a")]
    data = DataConfig(sources=[*sources], split=SplitConfig(fraction=0.5), cache_dir=str(tmp_path / "cache"))
    result = evaluate_held_out(
        make_engine(tiny_model_config(), vocab_size=256),
        build_corpus(data),
        packing="wrapped",
        batch_size=2,
        max_tokens_per_domain=None,
        at_capacity=False,
        layout=Layout(),
    )
    (domain,) = result.domains
    assert (domain.sums.target_tokens, domain.target_bytes) == (5, 5)
    assert domain.bits_per_byte == pytest.approx(result.record()["eval/a/loss"] / math.log(2))
    assert result.record()["eval/bits_per_byte"] == result.record()["eval/a/bits_per_byte"] == domain.bits_per_byte
