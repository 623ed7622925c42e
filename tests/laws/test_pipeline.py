"""Law: stages of a pipeline learn what one rank learns, under every schedule."""

from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_engine, share_of, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.data.batches.batch import Batch
from trainer.distributed.rank_layout import Layout
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

STEPS, ROWS, SEQ_LEN, PIECES = 4, 12, 8, 4

MODELS: dict[str, dict[str, Any]] = {
    "global balance": {"moe": {"balance": {"coef": 0.1}, "z_loss_coef": 0.01}, "vocab_z_loss_coef": 0.1},
    "tied, bias, noise, capacity, the step before": {
        "moe": {
            "router": {"kind": "bias_balanced", "jitter": 0.3, "bias_update_rate": 0.05},
            "balance": {"coef": 0.1, "counts": "previous_step"},
            "capacity": {"factor": 1.0, "min": 1},
        },
        "tie_embeddings": True,
    },
}


OPTIONS = ("data", "shard_keeps", "recompute", "overlap", "dispatcher")
"""Options of `parallel` in a layout that are no degrees."""


def _share(step: int, layout: Layout, num_pieces: int) -> list[Batch]:
    """This rank's rows of a step, in the same number of micro-batches on every rank."""
    whole = make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step, ragged=step % 2 == 1)
    return share_of(whole, layout, num_pieces)


def train(layout: dict[str, Any], model: dict[str, Any], num_pieces: int = PIECES) -> dict[str, Any]:
    """Train some steps; return the metrics of each, and on rank 0 gradients of the first, weights and moments."""
    mesh = mesh_here(**{key: value for key, value in layout.items() if key not in OPTIONS})
    config = tiny_model_config(
        {"num_experts": 8, **model["moe"]}, num_layers=4, **{k: v for k, v in model.items() if k != "moe"}
    )
    options = {key: layout[key] for key in OPTIONS if key in layout}
    parallel = ParallelConfig.model_validate({"ep_size": layout.get("ep_size", 1), **options})
    engine = make_engine(config, dtype=torch.float64, seed=5, grad_clip=0.5, mesh=mesh, parallel=parallel)
    curve, gradients = [], {}
    for step in range(STEPS):
        gradient = engine.accumulate(_share(step, mesh.layout, num_pieces))
        if step == 0:
            gradients = gather_state(engine.gradients(), mesh).slices
            gradients = {name: part.tensor.clone() for name, part in gradients.items()}
        result = engine.apply(gradient, lr=3e-3)
        routing = result.routing
        assert routing is not None and routing.router_squares is not None
        curve.append([result.loss, result.balance_loss or 0.0, result.z_loss or 0.0, result.grad_norm])
        curve[-1] += [result.extra_losses[name] for name in sorted(result.extra_losses)]
        curve[-1] += [*routing.router_squares.tolist(), *routing.counts.flatten().tolist(), *routing.dropped.tolist()]
    evaluated = engine.eval_loss(_share(99, mesh.layout, num_pieces)[0], dropless=True)
    assert evaluated.routing is not None
    state = {name: part.tensor.clone() for name, part in gather_state(engine.state(), mesh).slices.items()}
    mine = mesh.layout.rank == 0
    return {
        "curve": torch.tensor(curve, dtype=torch.float64),
        "evaluated": [evaluated.loss_sum, evaluated.target_tokens, *evaluated.routing.counts.flatten().tolist()],
        "gradients": gradients if mine else {},
        "state": state if mine else {},
    }


@pytest.mark.one_in(2)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"pp_size": 2}),
        (2, {"pp_size": 2, "pp_schedule": "gpipe", "recompute": "block"}),
        (2, {"pp_size": 2, "pp_schedule": "interleaved_1f1b"}),
        (2, {"pp_size": 2, "pp_schedule": "zbv"}),
        (2, {"pp_size": 2, "pp_schedule": "dualpipe_v"}),
        (4, {"pp_size": 2, "ep_size": 2}),
        (4, {"pp_size": 2, "data": "shard"}),
        (4, {"pp_size": 2, "ep_size": 2, "data": "shard", "pp_schedule": "interleaved_1f1b"}),
        (4, {"pp_size": 4}),
    ],
    ids=str,
)
def test_a_pipeline_learns_what_one_rank_learns(ranks: Ranks, world_size: int, layout: dict, model: dict) -> None:
    [alone] = ranks.run(1, train, {}, model)
    found = ranks.run(world_size, train, layout, model)
    for one in found:
        if world_size == layout["pp_size"]:  # otherwise other ranks have other rows
            torch.testing.assert_close(one["evaluated"], alone["evaluated"], rtol=0, atol=1e-9)
    check_same(found, alone)


def check_same(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Check that all ranks have the metrics of one process, and the first one its gradients, weights and moments."""
    for one in found:
        torch.testing.assert_close(one["curve"], alone["curve"], rtol=0, atol=1e-9)
    for kind in ("gradients", "state"):
        assert found[0][kind].keys() == alone[kind].keys()
        for name, tensor in alone[kind].items():
            torch.testing.assert_close(
                found[0][kind][name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
