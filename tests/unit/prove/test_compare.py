"""Tests for comparing layouts: what counts as a difference, and its diagnosis."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.prove.cases import Case
from trainer.prove.compare import Comparison, compare
from trainer.prove.evidence import Evidence
from trainer.prove.report import TableRow
from trainer.prove.rounding import FLOORS, TOLERANCES

HEAD, GATE, BIAS = "head.weight", "blocks.0.ffn.router.gate.weight", "blocks.0.ffn.router.bias"
EXPERTS = "blocks.0.ffn.experts.w_in"


def weights(shift: float = 0.0) -> dict[str, Tensor]:
    names = {HEAD: (2, 2), GATE: (2, 2), EXPERTS: (2, 2, 2), BIAS: (2,)}
    return {name: torch.full(shape, 0.5 + shift, dtype=torch.float64) for name, shape in names.items()}


def gradients(scale: float = 1.0) -> dict[str, Tensor]:
    return {name: scale * torch.full_like(w, 0.3) for name, w in weights().items() if name != BIAS}


def evidence(**changes: Any) -> Evidence:
    """Return the evidence of three steps of one process in float64."""
    return replace(
        Evidence(
            losses=[2.0, 1.9, 1.8],
            balance_losses=[1.0, 1.0, 1.0],
            objectives=[2.01, 1.91, 1.81],
            grad_norms=[1.0, 1.0, 1.0],
            counts=[torch.tensor([[5, 3]])] * 3,
            start=weights(),
            gradients=gradients(),
            first_update=weights(0.001),
            last_update=weights(0.003),
            learning_rates=[1e-3] * 3,
            adam_eps=1e-8,
        ),
        **changes,
    )


def compared(mine: dict[str, Any], theirs: dict[str, Any] | None = None, *, dtype: str = "float64") -> Comparison:
    tolerance, floor = TOLERANCES[dtype], FLOORS[dtype]
    return compare(evidence(**mine), evidence(**(theirs or {})), tolerance=tolerance, floor=floor)


def with_gradient(name: str, value: float) -> dict[str, Tensor]:
    return gradients() | {name: torch.full_like(weights()[name], value)}


def with_weight(name: str, value: float) -> dict[str, Tensor]:
    return weights(0.001) | {name: torch.full_like(weights()[name], value)}


NOTHING = {"objectives": [1.2, 1.9, 1.8], "losses": [0.0, 1.9, 1.8]}
"""A step without targets under an even load: the gradient is only rounding error."""


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        pytest.param(
            {**NOTHING, "grad_norms": [2e-16, 1.0, 1.0], "gradients": gradients(1e-16)},
            {**NOTHING, "grad_norms": [1e-16, 1.0, 1.0], "gradients": gradients(-3e-16)},
            id="a step without targets",
        ),
        pytest.param(
            {"objectives": [2.0, 1.2, 2.0], "grad_norms": [1.0, 1e-16, 1.0]},
            {"objectives": [2.0, 1.2, 2.0], "grad_norms": [1.0, 2e-16, 1.0]},
            id="a later step without targets",
        ),
        pytest.param(
            {"gradients": with_gradient(GATE, 3e-17)}, {"gradients": with_gradient(GATE, -1e-16)}, id="one weight"
        ),
        pytest.param(
            {"extra_losses": [1e-17, 0.0, 3e-17]}, {"extra_losses": [3e-17, 1e-17, 0.0]}, id="a variation of 0"
        ),
        pytest.param({"losses": [2.0, 1e-6, 1e-6 + 1e-14]}, {"losses": [2.0, 1e-6, 1e-6]}, id="a text known by heart"),
        pytest.param(
            {**NOTHING, "gradients": gradients(1e-16), "first_update": with_weight(HEAD, 1e-10)},
            {**NOTHING, "gradients": gradients(1e-16), "first_update": with_weight(HEAD, 2e-10)},
            id="a weight of 0 that AdamW moves by rounding",
        ),
    ],
)
def test_rounding_alone_is_equal(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    found = compared(mine, theirs)
    assert found.is_equal, found


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_a_small_gradient_that_is_wrong_by_a_factor_of_two_is_a_difference(dtype: str, share: float) -> None:
    found = compared(
        {"gradients": with_gradient(GATE, 2 * share)}, {"gradients": with_gradient(GATE, share)}, dtype=dtype
    )
    assert found.first_different == f"gradient of {GATE}"
    assert found.cause is not None and "router gradients are 2 times those of one process" in found.cause


def test_a_small_gradient_that_one_layout_loses_is_a_difference() -> None:
    """Small, but far above the rounding of the step's norm."""
    small, lost = {"gradients": with_gradient(GATE, 1e-12)}, {"gradients": with_gradient(GATE, 0.0)}
    assert compared(lost, small).first_different == f"gradient of {GATE}"
    assert compared(small, lost).first_different == f"gradient of {GATE}"


@pytest.mark.parametrize(
    ("mine", "first"),
    [
        pytest.param({"losses": [2.0 + 1e-8, 1.9, 1.8]}, "loss of step 1", id="loss"),
        pytest.param({"losses": [float("nan"), 1.9, 1.8]}, "loss of step 1", id="not a number"),
        pytest.param({"grad_norms": [1.0 + 1e-8, 1.0, 1.0]}, "norm of step 1", id="norm"),
        pytest.param({"gradients": gradients(1 + 1e-8)}, f"gradient of {EXPERTS}", id="gradient"),
        pytest.param({"gradients": gradients(0.0)}, f"gradient of {EXPERTS}", id="no gradient"),
        pytest.param(
            {"gradients": with_gradient(GATE, float("nan"))}, f"gradient of {GATE}", id="no number of one weight"
        ),
        pytest.param({"first_update": weights(0.001 + 1e-8)}, f"{HEAD} after step 1", id="update"),
        pytest.param({"last_update": weights(0.003 + 1e-8)}, f"{HEAD} after step 3", id="last update"),
    ],
)
def test_more_than_rounding_is_a_difference(mine: dict[str, Any], first: str) -> None:
    assert compared(mine).first_different == first
    assert compared({}).is_equal


@pytest.mark.parametrize(
    ("scale", "cause"),
    [
        (2.0, "expert gradients are 2 times those of one process: gradients are summed with a wrong factor"),
        (1.0 + 1e-6, "gradients of expert weights differ by less than a thousandth: something is rounded"),
    ],
)
def test_a_factor_of_ranks_and_a_rounding_are_told_apart(scale: float, cause: str) -> None:
    changed = gradients() | {EXPERTS: gradients(scale)[EXPERTS]}
    assert cause in str(compared({"gradients": changed}).cause)


def test_only_flips_counted_before_the_difference_are_named() -> None:
    later = {"losses": [2.0, 1.9, 1.7]}
    cause = compared(later).cause
    assert cause is not None and "near tie" not in cause and "no choice differs up to step 3" in cause
    flipped = [torch.tensor([[5, 3]]), torch.tensor([[3, 5]]), torch.tensor([[4, 4]])]
    cause = compared({**later, "counts": flipped}).cause
    assert cause is not None and "near tie" in cause and "2 choices in step 2" in cause
    after = {"grad_norms": [1.0, 1.1, 1.0], "counts": [torch.tensor([[5, 3]])] * 2 + [torch.tensor([[3, 5]])]}
    found = compared(after)
    assert found.flips == 2 and found.first_different == "norm of step 2"
    assert found.cause is not None and "near tie" not in found.cause and "up to step 2" in found.cause


def test_steps_that_adamw_takes_from_rounding_are_named() -> None:
    """In float32 rounding is as large as eps: weights take random steps, and losses differ from the second step on."""
    nothing = {**NOTHING, "gradients": gradients(1e-9), "grad_norms": [1e-9, 1.0, 1.0]}
    moved = weights(-0.0005) | {BIAS: weights(0.001)[BIAS]}
    mine = {**nothing, "gradients": gradients(-1e-9), "first_update": moved, "losses": [0.0, 1.8, 1.8]}
    found = compared(mine, nothing, dtype="float32")
    assert found.first_different == "loss of step 2"
    assert found.cause is not None and "only rounding error" in found.cause and "optim.eps 1e-08" in found.cause


def test_a_loss_that_is_0_in_one_process_is_named_without_a_factor() -> None:
    found = compared({"extra_losses": [0.5, 0.5, 0.5]}, {"extra_losses": [0.0, 0.5, 0.5]})
    assert found.cause is not None and "the sum of other losses is 0.5, and 0 in one process" in found.cause


def test_a_label_excuses_losses_but_not_differing_replicas_or_initial_values() -> None:
    labelled = ["model.moe.balance.scope: micro_batch (balance_loss)"]

    def is_sound(**mine: Any) -> bool:
        return TableRow(case=Case(micro_batch_size=1), comparison=compared(mine)).is_accepted(labelled)

    assert is_sound(balance_losses=[1.1, 1.1, 1.1]) and is_sound()
    assert not is_sound(balance_losses=[1.1, 1.1, 1.1], disagreements=[HEAD])
    assert not is_sound(balance_losses=[1.1, 1.1, 1.1], start=weights(0.1))
    assert not TableRow(case=Case(micro_batch_size=1), comparison=None, error="lost").is_accepted(labelled)
    unlabelled = TableRow(case=Case(micro_batch_size=1), comparison=compared({"balance_losses": [1.1, 1.1, 1.1]}))
    assert not unlabelled.is_accepted([]) and replace(unlabelled, comparison=compared({})).is_accepted([])


def test_a_weight_of_another_shape_is_a_difference() -> None:
    other = weights(0.001) | {HEAD: weights(0.001)[HEAD].T[:1].contiguous()}
    assert not compared({"first_update": other}).is_equal


def test_a_weight_that_started_at_zero_is_measured_by_what_its_gradients_say() -> None:
    """Rounding can turn steps of small gradients around, but not those of large ones, and not a layout's share."""
    start = {"start": weights() | {HEAD: torch.zeros(2, 2, dtype=torch.float64)}}
    steps, gradient = torch.full((100,), 1e-3, dtype=torch.float64), torch.ones(100, dtype=torch.float64)
    gradient[:10] = 1e-3
    turned, wrong, lost = steps.clone(), steps.clone(), steps.clone()
    turned[:10] = -1e-3
    wrong[20:23] = -1e-3
    lost[50:] = 0

    def stepped(values: Tensor, **more: Any) -> dict[str, Any]:
        found = {name: weights() | {HEAD: values} for name in ("first_update", "last_update")}
        return {**found, "gradients": gradients() | {HEAD: gradient}, **more}

    reference = stepped(steps, **start)
    assert compared(stepped(turned, **start), reference, dtype="bfloat16").is_equal
    assert not compared(stepped(turned, **start), reference).is_equal, "not in float64"
    assert not compared(stepped(wrong, **start), reference, dtype="bfloat16").is_equal
    assert not compared(stepped(lost, **start), reference, dtype="bfloat16").is_equal
    assert not compared(stepped(wrong), stepped(steps), dtype="bfloat16").is_equal, "nor in one that started elsewhere"


def test_an_element_may_differ_as_far_as_rounding_of_its_gradient_moves_it() -> None:
    """Its gradient of 4e-7 is 1e-7 less in the other, which makes a quarter of its step uncertain."""

    def stepped(row: int, shift: float, rounding: float = 1e-7) -> dict[str, Any]:
        gradient = torch.tensor([[0.3, 0.3], [0.3, 4e-7 - rounding]], dtype=torch.float64)
        moved = weights(0.001)[HEAD]
        moved[row, row] += shift
        return {"gradients": gradients() | {HEAD: gradient}, "first_update": weights(0.001) | {HEAD: moved}}

    reference = stepped(1, 0.0, rounding=0.0)
    assert compared(stepped(1, 3e-4), reference, dtype="float32").is_equal
    assert not compared(stepped(1, 5e-4), reference, dtype="float32").is_equal, "further than that"
    assert not compared(stepped(0, 1e-5), reference, dtype="float32").is_equal, "its gradient is large"
    assert not compared(stepped(1, 3e-4, rounding=0.0), reference, dtype="float32").is_equal, "equal gradients"
    assert not compared(stepped(1, 3e-4), reference).is_equal, "not in float64"
