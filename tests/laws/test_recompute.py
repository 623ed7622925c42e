"""Law: recomputation changes what is in memory, and nothing else: the same bits, the same messages."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.builders import latent_attention, make_batch, make_engine, rows_of, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.distributed.mesh import Mesh
from trainer.engine.native import NativeEngine
from trainer.moe.routing import RoutingOptions
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

SETTINGS: list[Any] = ["experts", "norms_and_activations", "block", {"every": 2}]

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "dense and shared, gelu": ({"num_shared_experts": 1, "first_dense_layers": 1}, {"activation": "gelu"}),
    "norms of heads, documents, tied": ({}, {"qk_norm": True, "document_mask": True, "tie_embeddings": True}),
    "latent attention": ({}, latent_attention()),
    "biases, norms over all heads, clipped, windows": (
        {},
        {
            "qk_norm": True,
            "attention": {"qkv_bias": True, "qk_norm_over": "all_heads", "clip_qkv": 0.1, "window": 3, "sinks": True},
        },
    ),
    "noise, drops, a bias and a global balance": (
        {
            "router": {"kind": "bias_balanced", "jitter": 0.3, "bias_update_rate": 0.05},
            "capacity": {"factor": 0.6, "min": 1, "policy": "random"},
            "balance": {"coef": 0.1, "scope": "global_batch", "counts": "exact"},
        },
        {},
    ),
    "importance and similarity": (
        {"router": {"kind": "noisy_top_k"}, "cv_squared": {"importance_coef": 0.3}, "diversity_coef": 0.5},
        {},
    ),
}


def _trained(
    recompute: Any,
    moe: dict[str, Any],
    fields: dict[str, Any],
    *,
    mesh: Mesh | None = None,
    dtype: torch.dtype = torch.float64,
    kernel: str = "fused",
    **parallel: Any,
) -> dict[str, Tensor]:
    """Return the losses and the gradients of the second of two steps of two micro-batches."""
    mesh = mesh or Mesh.of_one()
    config = tiny_model_config(moe, num_layers=3, **fields)
    section = ParallelConfig.model_validate({"recompute": recompute, **parallel})
    engine = make_engine(config, dtype=dtype, kernel=kernel, mesh=mesh, parallel=section)
    losses = []
    for step in range(2):
        batch = make_batch(3, 8, seed=step + 10 * mesh.layout.rank, first_sample=3 * mesh.layout.rank, ragged=True)
        accumulated = engine.accumulate([rows_of(batch, 0, 2), rows_of(batch, 2, 3)])
        state = gather_state(engine.gradients(), mesh)
        gradients = {name: part.tensor.clone() for name, part in state.slices.items()}
        result = engine.apply(accumulated, lr=1e-2)
        losses.append([result.loss, result.balance_loss or 0.0, result.grad_norm])
    return {"losses": torch.tensor(losses, dtype=torch.float64), **gradients}


def _same_bits(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("recompute", SETTINGS, ids=str)
@pytest.mark.parametrize(("moe", "fields"), MODELS.values(), ids=MODELS.keys())
def test_gradients_are_the_same_bits(moe: dict[str, Any], fields: dict[str, Any], recompute: Any) -> None:
    """The same kernels run on the same numbers again."""
    _same_bits(_trained(recompute, moe, fields), _trained("none", moe, fields))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("recompute", SETTINGS, ids=str)
@pytest.mark.parametrize("kernel", ["loop", "padded", "fused"])
def test_they_are_in_bfloat16_with_every_kernel(kernel: str, recompute: Any) -> None:
    """A part that runs again does so under the autocast of its first time."""
    moe = {"num_shared_experts": 1}
    runs = [_trained(one, moe, {"qk_norm": True}, dtype=torch.bfloat16, kernel=kernel) for one in (recompute, "none")]
    _same_bits(*runs)


LAYOUTS: dict[str, tuple[int, int, torch.dtype, dict[str, Any]]] = {
    "all_to_all in chunks": (2, 2, torch.float64, {"dispatcher": {"kind": "all_to_all", "chunks": 2}}),
    "all_gather": (2, 2, torch.bfloat16, {"dispatcher": {"kind": "all_gather"}}),
    "each token once": (2, 2, torch.float64, {"dispatcher": {"kind": "deduplicated_all_to_all"}}),
    "shard": (2, 1, torch.float64, {"data": "shard"}),
    "shard in bfloat16, the experts too": (4, 2, torch.bfloat16, {"data": "shard"}),
    "shard and keep the weights": (2, 1, torch.bfloat16, {"data": "shard", "shard_keeps": "weights"}),
}


class _Messages(TorchDispatchMode):
    """Counts messages by kind, those of FSDP and of backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.sent[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _on_ranks(
    recompute: Any, ep_size: int, dtype: torch.dtype, parallel: dict[str, Any]
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Return what was trained, and the number of messages of each kind."""
    moe = {"num_shared_experts": 1, "capacity": {"factor": 0.8, "min": 1}, "balance": {"coef": 0.1}}
    mesh = mesh_here(ep_size=ep_size)
    with _Messages() as messages:
        trained = _trained(recompute, moe, {"qk_norm": True}, mesh=mesh, dtype=dtype, ep_size=ep_size, **parallel)
    return trained, messages.sent


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("world_size", "ep_size", "dtype", "parallel"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_nothing_is_sent_twice(
    ranks: Ranks, world_size: int, ep_size: int, dtype: torch.dtype, parallel: dict[str, Any]
) -> None:
    whole, sent = ranks.run(world_size, _on_ranks, "none", ep_size, dtype, parallel)[0]
    assert sum(sent.values()) > 20, "the count sees messages"
    for recompute in ("norms_and_activations", "block"):
        again, sent_again = ranks.run(world_size, _on_ranks, recompute, ep_size, dtype, parallel)[0]
        assert sent_again == sent, recompute
        _same_bits(again, whole)


def _saved_bytes(engine: NativeEngine, num_rows: int) -> float:
    """Bytes of a token in tensors that are saved for the backward pass, parameters apart."""
    weights = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # or another tensor might get the memory, and not be counted

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
        kept.append(tensor)
        return tensor

    batch = make_batch(num_rows, engine.model.config.seq_len)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), engine.autocast():
        engine.model(batch, RoutingOptions())
    return sum(saved.values()) / batch.tokens.numel()


MOE = {"num_experts": 8, "d_ff": 64}
SIZES = {"num_layers": 4, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "d_ff": 128, "seq_len": 32}
"""X and H of a layer are 4 D + 4 * 2 * 2 F = 1280 bytes a token in float32; `block` saves X and its own input, 512."""


@pytest.mark.parametrize(
    ("dtype", "kind", "most"),
    [
        (torch.float32, "plain", {"none": 14160, "norms_and_activations": 13120, "experts": 10060, "block": 3310}),
        (torch.float32, "qk_norm", {"none": 14250, "norms_and_activations": 13120, "experts": 10160, "block": 3310}),
        (torch.bfloat16, "qk_norm", {"none": 12970, "norms_and_activations": 11840, "experts": 10930, "block": 3820}),
        (torch.float32, "latents", {"none": 15030, "norms_and_activations": 13610, "experts": 10930, "block": 2930}),
        (torch.float32, "dense", {"none": 17560, "experts": 17560, "norms_and_activations": 12430, "block": 1590}),
    ],
    ids=str,
)
def test_each_setting_saves_less_than_the_one_before(dtype: torch.dtype, kind: str, most: dict[str, int]) -> None:
    found = {}
    for recompute in most:
        section = ParallelConfig.model_validate({"recompute": recompute})
        fields = SIZES | (latent_attention() if kind == "latents" else {"qk_norm": kind == "qk_norm"})
        config = tiny_model_config(MOE, **fields)
        if kind == "dense":
            config = config.model_copy(update={"moe": None})
        engine = make_engine(config, dtype=dtype, kernel="fused", parallel=section)
        found[recompute] = _saved_bytes(engine, num_rows=4)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(found[name] <= bytes_ for name, bytes_ in most.items()), found
