"""Properties of the `model.moe` section: static FLOPs and experts per token."""

from typing import Any

import pytest
from pydantic import ValidationError

from trainer.moe.config import MoEConfig


def moe(**options: Any) -> MoEConfig:
    return MoEConfig.model_validate(options)


@pytest.mark.parametrize(
    ("options", "is_known"),
    [
        ({}, True),
        ({"router": {"kind": "top_p"}}, False),
        ({"router": {"kind": "top_k", "top_k_choices": [1, 2]}}, False),
        ({"router": {"kind": "top_k", "null_experts": 8}}, True),
        ({"router": {"kind": "top_k", "null_experts": 8}, "balance": {"coef": 0}}, False),
        ({"router": {"kind": "bias_balanced", "null_experts": 8}, "balance": {"coef": 0}}, True),
        (
            {
                "router": {"kind": "bias_balanced", "null_experts": 8, "bias_update_rate": 0},
                "balance": {"coef": 0},
            },
            False,
        ),
    ],
    ids=str,
)
def test_work_is_known_where_something_holds_it(options: dict[str, Any], is_known: bool) -> None:
    assert moe(**options).has_static_flops == is_known


def test_diversity_needs_two_experts_in_some_step() -> None:
    one = {"kind": "top_k", "top_k": 1, "normalize": False}
    assert moe(router={**one, "top_k_choices": [1, 4]}, diversity_coef=0.1).router.most_experts(8) == 4
    with pytest.raises(ValidationError, match="at least two experts"):
        moe(router=one, diversity_coef=0.1)
