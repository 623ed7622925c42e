"""The MoE blocks by the config are those of the model built from it, and the page's attention is valid."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from tests.builders import tiny_model_config
from trainer.models.config import ModelConfig
from trainer.models.feed_forward import FeedForward
from trainer.models.gpt import GPT
from trainer.moe.layer import MoE


def test_moe_layers_are_those_named() -> None:
    config = tiny_model_config({"layers": [0, 3]}, num_layers=5)
    assert config.moe_layers == (0, 3)
    with torch.device("meta"):
        blocks = GPT(config, 32).blocks
    assert [isinstance(block.get_submodule("ffn"), MoE) for block in blocks] == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("num_layers", "first_dense_layers", "every", "expected"),
    [
        (4, 0, 1, (0, 1, 2, 3)),
        (4, 1, 1, (1, 2, 3)),
        (4, 3, 1, (3,)),
        (6, 0, 2, (1, 3, 5)),  # the second, fourth and so on
        (6, 1, 2, (2, 4)),  # of the blocks after the first
        (7, 2, 2, (3, 5)),
        (7, 0, 3, (2, 5)),
        (8, 1, 3, (3, 6)),
        (4, 1, 3, (3,)),
    ],
)
def test_moe_layers_are_every_nth_after_the_dense_ones(
    num_layers: int, first_dense_layers: int, every: int, expected: tuple[int, ...]
) -> None:
    moe = {"first_dense_layers": first_dense_layers, "every": every, "num_shared_experts": 2}
    config = tiny_model_config(moe, num_layers=num_layers)
    assert config.moe_layers == expected
    with torch.device("meta"):
        blocks = dict(enumerate(GPT(config, 32).blocks))
    for number, block in blocks.items():
        ffn = block.get_submodule("ffn")
        if isinstance(ffn, MoE):
            assert number in expected and ffn.layer == number
            assert getattr(ffn.router, "layer", number) == number
            assert isinstance(ffn.shared, FeedForward) and ffn.shared.w_out.weight.shape == (16, 2 * 12)
        else:
            assert number not in expected and ffn.get_parameter("w_out.weight").shape == (16, 24)


def test_attention_of_published_models_on_the_config_page_is_valid() -> None:
    page = (Path(__file__).parents[3] / "docs/config.md").read_text()
    section = page.partition("## Attention of published models")[2].partition("<!--")[0]
    rows = re.findall(r"^\| (.+?) \| `(\{.*\})` \|$", section, re.MULTILINE)
    assert len(rows) >= 9
    for name, keys in rows:
        values = yaml.load(keys, yaml.CSafeLoader)
        model = ModelConfig.model_validate({"d_model": 256, "num_heads": 8, **values})
        assert model.model_dump(exclude_defaults=True).keys() == values.keys(), f"{name} says a default"
