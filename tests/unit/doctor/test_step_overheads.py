"""What a step takes beyond its products, from what was measured."""

import pytest

from trainer.doctor.cluster.step_overheads import StepOverheads, TinySpeed
from trainer.doctor.cluster.timed_rounds import COLLECTIVES, CollectiveSpeed, Rounds

MESSAGE_S, OPERATION_S, SHARD_CALL_S, FIRST_S = 0.5, 0.25, 2.0, 7.0


def of_layers(num_layers: int, *, sharded: bool) -> TinySpeed:
    """Return a step with 10 operations, 2 gathers and a reduction in each layer, and some time before them."""
    calls = 3 * num_layers if sharded else 0
    seconds = FIRST_S + 10 * num_layers * OPERATION_S + calls * (SHARD_CALL_S + MESSAGE_S)
    return TinySpeed(
        operations=10 * num_layers,
        gathers=calls * 2 // 3,
        reductions=calls // 3,
        rounds=Rounds(seconds=[seconds, 9 * seconds, seconds]),
    )


def test_times_are_of_what_a_deep_model_has_more_than_a_shallow_one() -> None:
    whole = of_layers(2, sharded=False), of_layers(6, sharded=False)
    alone = StepOverheads(whole=whole)
    assert (alone.operation_s, alone.shard_call_s) == (OPERATION_S, 0)
    curves = {name: [CollectiveSpeed(num_bytes=1024, rounds=Rounds(seconds=[MESSAGE_S]))] for name in COLLECTIVES}
    several = StepOverheads(
        whole=whole, sharded=(of_layers(2, sharded=True), of_layers(6, sharded=True)), beside=curves
    )
    assert several.shard_call_s == pytest.approx(SHARD_CALL_S)
    assert several.record()["beside_computation"]["all_gather"] == [{"bytes": 1024, "seconds": MESSAGE_S}]
