"""Descriptions of a loss or gradient that is not finite."""

import pytest

from trainer.engine.nonfinite import Findings, describe_findings

NAMES = ["a", "b", "c", "d"]


def _found(*gradients: str, loss: bool = True, dense: bool = True, experts: bool = True) -> Findings:
    return Findings(
        gradients=list(gradients), loss_is_finite=loss, dense_share_is_finite=dense, expert_share_is_finite=experts
    )


CASES = {
    "one parameter": (
        [_found("b"), _found("b", loss=False)],
        "the gradient of b is not finite (loss not finite on rank 1)",
    ),
    "the first in the order of the model, wherever it was found": (
        [_found("d", loss=False), _found("c"), _found("b", loss=False)],
        "the gradient of b and 2 more parameters is not finite (loss not finite on ranks 0 and 2)",
    ),
    "two": (
        [_found("a", "b", loss=False), _found()],
        "the gradient of a and 1 more parameter is not finite (loss not finite on rank 0)",
    ),
    "a dense share before the experts' it reached": (
        [_found("a", experts=False), _found("a", dense=False)],
        "the gradient of a is not finite (loss finite on every rank; it came from rank 1)",
    ),
    "an experts' share": (
        [_found("d", experts=False), _found("d")],
        "the gradient of d is not finite (loss finite on every rank; it came from rank 0)",
    ),
    "where it came from is not known": (
        [_found("a"), _found()],
        "the gradient of a is not finite (loss finite on every rank)",
    ),
    "the loss alone": (
        [_found(), _found(loss=False)],
        "the loss is not finite, though the gradient is (loss not finite on rank 1)",
    ),
    "a norm that is too large": (
        [_found(), _found()],
        "the gradient norm is inf, though every element is finite (loss finite on every rank)",
    ),
    "one process": ([_found("c", loss=False)], "the gradient of c is not finite (loss not finite)"),
    "one process, its gradient": ([_found("c")], "the gradient of c is not finite (loss finite)"),
}


@pytest.mark.parametrize(("everyone", "text"), CASES.values(), ids=CASES.keys())
def test_what_is_not_finite_is_said_with_where_it_came_from(everyone: list[Findings], text: str) -> None:
    assert describe_findings(everyone, NAMES, grad_norm=float("inf")) == text
