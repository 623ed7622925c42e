"""Law: what is not finite on one rank skips the same step on all, and copies that part are found and named.

The issue's figures: `pytest tests/laws/test_numerics_guard.py -k "at_random or random_bit" --times 50 -s`, and 100.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.builders import make_batch, make_engine, share_of, tiny_model_config
from tests.ranks import Ranks, mesh_here
from tests.registries import DISPATCHERS, LEARNED_ROUTERS
from trainer.checkpoint.replica_check import check_copies
from trainer.data.batches.batch import Batch
from trainer.data.batches.row_parts import own_part
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import Layout, format_ranks
from trainer.engine.native import NativeEngine
from trainer.errors import DivergedError, NumericsError
from trainer.parallel.config import ParallelConfig

ROWS, SEQ_LEN, STEPS = 7, 8, 6
LAYOUTS = {"2 ranks, ep 1": (2, 1), "2 ranks, ep 2": (2, 2), "4 ranks, ep 2": (4, 2), "3 ranks, ep 3": (3, 3)}
MOE = {
    "num_experts": 5,  # uneven over 2 and 3 ranks
    "router": {"kind": "bias_balanced", "bias_update_rate": 0.05},
    "balance": {"coef": 0.1, "counts": "previous_step"},
}
NAN, INF = float("nan"), float("inf")

Plant = Callable[[NativeEngine, float], Callable[[], None]]
"""Plants a value in an engine; returns what takes it out again."""


def _engine(mesh: Mesh, **parallel: Any) -> NativeEngine:
    section = ParallelConfig.model_validate(parallel)
    return make_engine(tiny_model_config(MOE), seed=5, grad_clip=0.5, mesh=mesh, parallel=section)


def _share(step: int, layout: Layout) -> list[Batch]:
    whole = make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step)
    return [own_part(batch, layout) for batch in share_of(whole, layout, 1)]


def _bits(engine: NativeEngine) -> dict[str, Any]:
    """Everything that the next step depends on, copied."""
    state = engine.state()
    tensors = {name: part.tensor.detach().clone() for name, part in state.slices.items()}
    steps = {float(engine.optimizer.state[p]["step"]) for p in engine.parameters.values()}
    return {**tensors, **state.values, "optimizer.step": steps}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, b[name]) if isinstance(x, Tensor) else x == b[name] for name, x in a.items()
    )


# --- a value that is not finite ---------------------------------------------------------------------------------------


def _in_loss(engine: NativeEngine, value: float) -> Callable[[], None]:
    return _patched_losses(engine, lambda row_loss: row_loss * value)


def _in_loss_alone(engine: NativeEngine, value: float) -> Callable[[], None]:
    """The gradient of a sum knows nothing of what is added."""
    return _patched_losses(engine, lambda row_loss: row_loss + value)


def _patched_losses(engine: NativeEngine, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    model, whole = engine.model, engine.model.losses

    def wrong(*args: Any) -> Any:
        row_loss, *others = whole(*args)
        return change(row_loss), *others

    model.losses = wrong  # type: ignore[method-assign]
    return lambda: model.__dict__.pop("losses")


def _in_router_logits(engine: NativeEngine, value: float) -> Callable[[], None]:
    gate = engine.model.moe_layers()[0].router.get_submodule("gate")
    return gate.register_forward_hook(lambda module, inputs, logits: logits * value).remove


def _in_gradient_of(name: str, element: int = 3) -> Plant:
    def plant(engine: NativeEngine, value: float) -> Callable[[], None]:
        def wrong(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[element % gradient.numel()] = value
            return gradient

        return engine.parameters[name].register_hook(wrong).remove

    return plant


DENSE, EXPERT = "blocks.1.attention.out.weight", "blocks.0.ffn.experts.w_out"
PLANTS: dict[str, Plant] = {
    "loss": _in_loss,
    "loss alone": _in_loss_alone,
    "router logits": _in_router_logits,
    "dense gradient": _in_gradient_of(DENSE),
    "expert gradient": _in_gradient_of(EXPERT),
}


def _plant(kind: str) -> Plant:
    if kind in PLANTS:
        return PLANTS[kind]
    name, element = kind.split("@")
    return _in_gradient_of(name, int(element))


def _poisoned(ep_size: int, data: str, kind: str, victim: int, planted: Mapping[int, float]) -> dict[str, Any]:
    """Train with values planted in some steps, beside a run that leaves those steps out."""
    mesh = mesh_here(ep_size=ep_size)
    engine, clean = _engine(mesh, data=data), _engine(mesh, data=data)
    skipped, reasons, untouched = [], [], []
    for step in range(STEPS):
        batches = _share(step, mesh.layout)
        before = _bits(engine)
        take_out = None
        if step in planted and mesh.layout.rank == victim:
            take_out = _plant(kind)(engine, planted[step])
        result = engine.train_step(batches, lr=3e-3)
        if take_out is not None:
            take_out()
        if result.skipped:
            skipped.append(step)
            reasons.append(result.not_finite)
            untouched.append(_same(before, _bits(engine)))
        if step not in planted:
            clean.train_step(batches, lr=3e-3)
    check_copies(engine.state(), mesh, step=STEPS, equal_at=None)
    moved = not _same(_bits(engine), _bits(_engine(mesh, data=data)))
    return {
        "skipped": skipped,
        "reasons": reasons,
        "untouched": all(untouched),
        "same as without": _same(_bits(engine), _bits(clean)),
        "moved": moved,
        "finite": all(bool(p.isfinite().all()) for p in engine.model.state_dict().values()),
    }


def _assert_skipped(answers: list[dict[str, Any]], steps: Sequence[int]) -> list[str]:
    """Every rank skipped these steps and no others, for the same reasons, which are returned."""
    for mine in answers:
        assert mine["skipped"] == list(steps)
        assert mine["untouched"], "a skipped step changes nothing that the next one depends on"
        assert mine["same as without"], "the steps after it are those of a run that never took it"
        assert mine["moved"] and mine["finite"]
        assert mine["reasons"] == answers[0]["reasons"]
    return answers[0]["reasons"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", PLANTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_one_rank_s_value_that_is_not_finite_skips_the_step_on_all(
    ranks: Ranks, layout: tuple[int, int], kind: str
) -> None:
    world_size, ep_size = layout
    victim = world_size - 1
    answers = ranks.run(world_size, _poisoned, ep_size, "replicate", kind, victim, {2: NAN, 3: INF})
    for reason in _assert_skipped(answers, [2, 3]):
        if "gradient" in kind:
            name = DENSE if "dense" in kind else EXPERT
            where = f"loss finite on every rank; it came from rank {victim}"
            assert reason == f"the gradient of {name} is not finite ({where})"
        elif kind == "loss alone":
            assert reason == f"the loss is not finite, though the gradient is (loss not finite on rank {victim})"
        else:
            assert reason.startswith("the gradient of embedding.weight and ")
            assert reason.endswith(f" more parameters is not finite (loss not finite on rank {victim})")


@pytest.mark.parametrize("kind", ["loss", "loss alone", "router logits"])
def test_weights_cut_over_the_ranks_skip_together_too(ranks: Ranks, kind: str) -> None:
    reasons = _assert_skipped(ranks.run(4, _poisoned, 2, "shard", kind, 1, {2: NAN, 3: NAN}), [2, 3])
    assert reasons[0].endswith("(loss not finite on rank 1)")


NAN_ROUTING = {
    "sigmoid": {"router": {"kind": "top_k", "score": "sigmoid", "jitter": 0.3}},
    "capacity by position": {"capacity": {"factor": 1.0, "min": 1}},
    "capacity by probability": {"capacity": {"factor": 1.0, "min": 1, "policy": "probability"}},
}
NAN_ROUTERS = {
    kind: {"router": {"kind": kind, **({"groups": 5} if kind == "group_limited" else {})}}
    for kind in LEARNED_ROUTERS
    if kind != "cosine"  # has no gate whose logits could be poisoned
}


def _nan_logits(moe: dict[str, Any], parallel: dict[str, Any]) -> list[str | None]:
    mesh = mesh_here(ep_size=2)
    config = tiny_model_config({**MOE, **moe})
    engine = make_engine(config, mesh=mesh, parallel=ParallelConfig.model_validate(parallel))
    said = []
    for step in range(3):
        take_out = _in_router_logits(engine, NAN) if step == 1 and mesh.layout.rank == 1 else None
        said.append(engine.train_step(_share(step, mesh.layout), lr=3e-3).not_finite)
        if take_out is not None:
            take_out()
    return said


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", [kind for kind in DISPATCHERS if kind != "local"])
@pytest.mark.parametrize("moe", NAN_ROUTING.values(), ids=NAN_ROUTING.keys())
def test_logits_that_are_not_finite_are_routed_somewhere_and_skipped(ranks: Ranks, moe: dict, kind: str) -> None:
    """Whatever expert a NaN chooses, rows must arrive, or ranks would wait for each other."""
    if kind == "padded_all_to_all":
        moe = {**moe, "capacity": {"factor": 1.0, "min": 1, **moe.get("capacity", {})}}
    first, second = ranks.run(2, _nan_logits, moe, {"dispatcher": {"kind": kind}})
    assert first == second and first[0] is first[2] is None
    assert first[1] is not None and first[1].endswith("(loss not finite on rank 1)")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("moe", NAN_ROUTERS.values(), ids=NAN_ROUTERS.keys())
def test_no_router_ends_a_rank_by_what_is_not_finite(ranks: Ranks, moe: dict) -> None:
    first, second = ranks.run(2, _nan_logits, moe, {})
    assert first == second and first[0] is first[2] is None
    assert first[1] is not None and first[1].endswith("(loss not finite on rank 1)")


def test_a_poisoned_batch_is_what_makes_the_difference(ranks: Ranks) -> None:
    """The control: without a planted value nothing is skipped, and a run that leaves two steps out is another one."""
    for mine in ranks.run(2, _poisoned, 2, "replicate", "loss", 1, {2: 1.0, 3: 1.0}):
        assert mine["skipped"] == [] and mine["moved"] and not mine["same as without"]


def test_a_value_that_is_not_finite_at_random_skips_the_same_steps(ranks: Ranks, times: int) -> None:
    names = [name for name, _ in _engine(Mesh.of_one()).model.named_parameters()]
    for seed in range(times):
        chance = random.Random(seed)
        world_size, ep_size = chance.choice(list(LAYOUTS.values()))
        kind = chance.choice([*PLANTS, *[f"{chance.choice(names)}@{chance.randrange(1 << 20)}" for _ in range(5)]])
        value, victim = chance.choice([NAN, INF, -INF]), chance.randrange(world_size)
        steps = sorted(chance.sample(range(STEPS - 1), chance.randint(1, 3)))
        planted = dict.fromkeys(steps, value)
        answers = ranks.run(world_size, _poisoned, ep_size, "replicate", kind, victim, planted)
        reasons = _assert_skipped(answers, steps)
        assert all(f"rank {victim})" in reason for reason in reasons)
        print(f"{seed}: {value} in {kind} of rank {victim} of {world_size}, ep {ep_size}, steps {steps}: {reasons[0]}")
    print(f"one-rank NaN or Inf: {times} of {times} times all ranks skipped the same steps")


# --- copies that part -------------------------------------------------------------------------------------------------


def _flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flip one bit of one number, in memory."""
    size = tensor.element_size()
    raw = tensor.detach().view(-1).view(torch.uint8)
    raw[element * size + bit // 8] ^= 1 << bit % 8


def _verdict(engine: NativeEngine, mesh: Mesh) -> str | None:
    try:
        check_copies(engine.held(), mesh, step=20, equal_at=10)
    except DivergedError as error:
        assert error.exit_code == 5
        return str(error)
    return None


def _really_differ(engine: NativeEngine, mesh: Mesh) -> bool:
    """Compare every byte, in the slow and obvious way."""
    mine = {}
    for name, part in engine.state().slices.items():
        mine[f"{name} {part.start} {len(part.tensor)}"] = (
            part.tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        )
    everyone = mesh.world.all_gather_objects({key: bytes(raw.numpy()).hex() for key, raw in mine.items()})
    return any(len({other[key] for other in everyone if key in other}) > 1 for there in everyone for key in there)


def _flips(seed: int, count: int, most_steps: int) -> list[dict[str, Any]]:
    """Flip random bits of random tensors on random ranks, one after the other, and look some steps later."""
    mesh = mesh_here(ep_size=2)
    engine = _engine(mesh)
    for step in range(3):
        engine.train_step(_share(step, mesh.layout), lr=3e-3)
    saved, steps_saved = _bits(engine), engine.optimizer_steps
    chance, found = random.Random(seed), []
    for _ in range(count):
        assert _verdict(engine, mesh) is None, "nothing was flipped"
        name, victim = chance.choice(list(saved)[:-2]), chance.randrange(mesh.world.size)
        place, bit, steps = chance.random(), chance.randrange(64), chance.randint(0, most_steps)
        tensor = engine.state().slices[name].tensor
        if mesh.layout.rank == victim:
            _flip(tensor, int(place * tensor.numel()), bit % (8 * tensor.element_size()))
        for step in range(steps):
            engine.train_step(_share(10 + step, mesh.layout), lr=3e-3)
        found.append(
            {
                "name": name,
                "victim": victim,
                "steps": steps,
                "differ": _really_differ(engine, mesh),
                "said": _verdict(engine, mesh),
            }
        )
        for key, part in engine.state().slices.items():
            part.tensor.detach().copy_(saved[key])
        engine.optimizer_steps = steps_saved
        for p in engine.parameters.values():
            engine.optimizer.state[p]["step"].fill_(steps_saved)
    return found


def _expected(name: str, victim: int) -> str:
    """What is said of a flip on one of 4 ranks with two copies of the experts (0 and 2, 1 and 3)."""
    name = name.removeprefix("model.")
    if "experts" in name:
        copies = format_ranks([victim % 2, victim % 2 + 2])
        return f"step 20: {copies} hold different copies of {name}, and which of them is wrong cannot be told; all"
    others = format_ranks([rank for rank in range(4) if rank != victim])
    return f"step 20: rank {victim} holds another copy of {name} than {others}; all copies were equal at step 10. "


def test_a_random_bit_of_a_copy_is_found_and_named_on_every_rank(ranks: Ranks, times: int) -> None:
    flips = [ranks.run(4, _flips, 20 * first, min(20, times - first), 0) for first in range(0, times, 20)]
    together = [list(on_all) for answers in flips for on_all in zip(*answers, strict=True)]
    for on_all in together:
        said = on_all[0]["said"]
        assert said is not None and said.startswith(_expected(on_all[0]["name"], on_all[0]["victim"])), on_all[0]
        assert all(mine["said"] == said for mine in on_all)
    print(f"random bits: {len(together)} of {times} found, with the right name and ranks; no false alarm before any")


def test_a_random_bit_is_found_some_steps_later_if_it_is_still_there(ranks: Ranks, times: int) -> None:
    """A low bit may be rounded away by the updates of the steps between: then the copies are equal again, and good."""
    flips = [ranks.run(4, _flips, 1000 + 20 * first, min(20, times - first), 3) for first in range(0, times, 20)]
    together = [list(on_all) for answers in flips for on_all in zip(*answers, strict=True)]
    for on_all in together:
        assert len({mine["said"] for mine in on_all}) == 1
        first = on_all[0]
        assert (first["said"] is not None) == first["differ"], first
        if first["said"] is not None:
            stem = first["name"].removeprefix("model.").removeprefix("optim.exp_avg_sq.").removeprefix("optim.exp_avg.")
            assert stem in first["said"] and str(first["victim"]) in first["said"], first
    there = sum(on_all[0]["differ"] for on_all in together)
    print(f"random bits, 0 to 3 steps later: {there} of {times} still there, {there} found; the others had healed")


NAMED_FLIPS = [
    "model.blocks.0.ffn.router.gate.weight",
    "model.blocks.1.ffn.router.bias",
    "model.embedding.weight",
    "model.blocks.1.ffn.experts.w_in",
    "optim.exp_avg_sq.norm.weight",
    "engine.previous_counts",
]


def _one_flip(
    name: str, victim: int, element: int, bit: int, ep_size: int, data: str, shard_size: int | None = None, tp: int = 1
) -> str | None:
    mesh = mesh_here(ep_size=ep_size, shard_size=shard_size, tp_size=tp)
    engine = _engine(mesh, data=data)
    for step in range(2):
        engine.train_step(_share(step, mesh.layout), lr=3e-3)
    assert _verdict(engine, mesh) is None, "nothing was flipped"
    if mesh.layout.rank == victim:
        _flip(engine.held().slices[name].tensor, element, bit)
    return _verdict(engine, mesh)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NAMED_FLIPS)
def test_a_flipped_bit_is_found_and_named(ranks: Ranks, name: str) -> None:
    for victim, element, bit in ((0, 0, 0), (3, 4, 31)):
        for said in ranks.run(4, _one_flip, name, victim, element, bit, 2, "replicate"):
            assert said is not None and said.startswith(_expected(name, victim))


def test_of_two_ranks_nobody_can_tell_which_is_wrong(ranks: Ranks) -> None:
    said = ranks.run(2, _one_flip, "model.blocks.0.ffn.router.bias", 1, 2, 30, 1, "replicate")
    assert said[0] == said[1]
    assert said[0] == (
        "step 20: ranks 0 and 1 hold different copies of blocks.0.ffn.router.bias, and which of them is wrong cannot "
        "be told; all copies were equal at step 10. Nothing has been saved since: start the run again; it continues "
        "from the last checkpoint; if it happens again, suspect the memory of the host of ranks 0 and 1"
    )


def test_experts_without_a_copy_are_not_compared_with_others(ranks: Ranks) -> None:
    assert ranks.run(2, _one_flip, "model.blocks.0.ffn.experts.w_in", 1, 2, 30, 2, "replicate") == [None, None]


@pytest.mark.parametrize("ep_size", [1, 2])
def test_weights_cut_over_the_ranks_raise_no_alarm_and_their_buffers_do(ranks: Ranks, ep_size: int) -> None:
    assert ranks.run(4, _one_flip, "model.embedding.weight", 1, 2, 30, ep_size, "shard") == [None] * 4
    for said in ranks.run(4, _one_flip, "model.blocks.1.ffn.router.bias", 1, 2, 30, ep_size, "shard"):
        assert said is not None and "rank 1 holds another copy of blocks.1.ffn.router.bias than ranks 0, 2" in said


def test_copies_of_a_shard_are_compared(ranks: Ranks) -> None:
    """Of whole rows, and of parts of each of three experts."""
    for name in ("embedding.weight", "blocks.0.ffn.experts.w_in"):
        for said in ranks.run(4, _one_flip, f"model.{name}", 1, 2, 30, 1, "shard", 2):
            assert said is not None and f"ranks 1 and 3 hold different copies of {name}" in said


def test_copies_of_a_cut_are_compared(ranks: Ranks) -> None:
    """Of rows and of columns, which ranks 1 and 3 hold; heads without a copy are not compared with others."""
    for name in ("qkv", "out"):
        for said in ranks.run(
            4, _one_flip, f"model.blocks.0.attention.{name}.weight", 1, 2, 30, 2, "replicate", None, 2
        ):
            assert (
                said is not None and f"ranks 1 and 3 hold different copies of blocks.0.attention.{name}.weight" in said
            )
    alone = ranks.run(2, _one_flip, "model.blocks.0.attention.out.weight", 1, 2, 30, 1, "replicate", None, 2)
    assert alone == [None, None]


def _starts_apart() -> str | None:
    mesh = mesh_here()
    engine = make_engine(tiny_model_config(MOE), seed=dist.get_rank(), mesh=mesh)
    try:
        check_copies(engine.state(), mesh, step=0, equal_at=None)
    except NumericsError as error:
        return str(error)
    return None


def test_ranks_that_start_from_other_values_are_told_so(ranks: Ranks) -> None:
    said = ranks.run(2, _starts_apart)
    assert said[0] is not None and said[0] == said[1]
    assert said[0].startswith("step 0: ranks 0 and 1 hold different copies of embedding.weight, ")
    assert said[0].endswith("; all ranks must start from the same values: use one torch and one config everywhere")
