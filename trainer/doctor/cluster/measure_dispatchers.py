"""Measure dispatchers with the rows of a config: tokens to experts and back, forward and backward, and whether exactly.

# T tokens of a rank, k experts per token, E experts, D d_model.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from trainer.config.build_plugin import build_plugin
from trainer.config.check_packages import check_packages
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import even_slice
from trainer.doctor.cluster.cluster_work import Piece
from trainer.doctor.cluster.dispatch_evidence import DispatcherSpeed, DispatchEvidence
from trainer.doctor.cluster.measure_cluster import timed
from trainer.doctor.cluster.timed_rounds import slowest
from trainer.errors import ConfigError, first_line
from trainer.experiment import ExperimentConfig
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.config import MoEConfig
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.dispatch.registry import DispatcherConfig, DispatcherOptions
from trainer.moe.dispatch.row_budget import RowBudget
from trainer.moe.routing import RoutingContext, RoutingDecision
from trainer.ops.oracle_difference import rounding_tolerance
from trainer.parallel.canary import row_dtypes
from trainer.parallel.dispatcher_canary import dispatcher_fault

_BUDGET_S = 30.0


def measure_dispatchers(
    config: ExperimentConfig, mesh: Mesh, device: torch.device, *, budget_s: float = _BUDGET_S
) -> DispatchEvidence:
    """Measure each dispatcher that this config could have here. Collective; the result is the same on every rank."""
    moe = config.model.moe
    assert moe is not None and mesh.ep.size > 1
    rows, possible, refused = _Rows.of(config, moe, mesh, device), {}, {}
    for options in possible_dispatchers(config):
        problem = refusal(config, options, mesh, device)
        if problem is None:
            possible[options.kind] = options
        else:
            refused[options.kind] = problem
    trials = {kind: _Trial(options, rows, mesh) for kind, options in possible.items()}
    faults = {kind: _of_any(trial.fault(), mesh) for kind, trial in trials.items()}
    work: list[Piece] = [([("dispatcher", kind)], trial.run) for kind, trial in trials.items() if faults[kind] is None]
    times = timed(work, budget_s, mesh, device)
    return DispatchEvidence(
        own=config.parallel.dispatcher.kind,
        ep_size=mesh.ep.size,
        tokens=len(rows.x),
        top_k=rows.top_k,
        num_experts=moe.num_experts,
        d_model=config.model.d_model,
        dtype=config.train.dtype,
        speeds=[
            DispatcherSpeed(
                kind=kind,
                options=_given(possible[kind]),
                rounds=slowest(times["dispatcher", kind]) if faults[kind] is None else None,
                fault=faults[kind],
            )
            for kind in trials
        ],
        refused=refused,
    )


def possible_dispatchers(config: ExperimentConfig) -> Iterator[DispatcherOptions]:
    """Yield the config's own dispatcher, and every other kind with the options that they share."""
    own = config.parallel.dispatcher
    yield own
    tokens = config.parallel.micro_batch_size * config.model.seq_len // config.parallel.row_size
    shared = {name: getattr(own, name, None) for name in ("wire", "row_budget")} | {"tokens_per_rank": tokens}
    for section in get_args(get_args(DispatcherConfig)[0]):
        fields = section.model_fields
        if fields["kind"].default not in ("local", own.kind):
            yield section(**{name: value for name, value in shared.items() if name in fields and value is not None})


def refusal(config: ExperimentConfig, options: DispatcherOptions, mesh: Mesh, device: torch.device) -> str | None:
    """Return why a dispatcher cannot serve here; None if it can."""
    if options.needs_gpus and device.type == "cpu":
        return "it needs GPUs"
    if options.kind == "hierarchical" and mesh.layout.nodes_of_ep == 1:
        return "the ranks that share experts are on one machine"
    try:
        check_packages(options, at="parallel.dispatcher")
    except ConfigError as error:
        return first_line(error)
    parallel = config.parallel.model_copy(update={"dispatcher": options, "device": device.type})
    changed = config.model_copy(update={"parallel": parallel})
    return next((one.message for one in changed.problems() if one.key.startswith("parallel.dispatcher")), None)


def _given(options: DispatcherOptions) -> Mapping[str, Any]:
    """Return the options as a config has them: the kind, and what is not the default."""
    return {"kind": options.kind, **options.model_dump(exclude_defaults=True, exclude={"kind"})}


def _of_any(fault: str | None, mesh: Mesh) -> str | None:
    """Return the fault of the first rank that has one. Collective."""
    found = mesh.host.all_gather_objects(fault)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Tokens of this rank and where they go: as many for each expert, but for chance."""

    x: Tensor
    """(T, D)."""
    decision: RoutingDecision
    share: Tensor
    """(T, 1) sum of the combine weights of what is dispatched: experts that copy give a token so many times itself."""
    top_k: int

    @classmethod
    def of(cls, config: ExperimentConfig, moe: MoEConfig, mesh: Mesh, device: torch.device) -> "_Rows":
        """Draw a micro-batch."""
        num_rows, draw = config.parallel.micro_batch_size, torch.Generator().manual_seed(mesh.layout.rank)
        tokens = num_rows * (config.model.seq_len // config.parallel.row_size)
        top_k = min(moe.num_experts, max(1, round(moe.experts_per_token)))
        dtype = getattr(torch, config.train.dtype)
        scores = torch.rand(tokens, moe.num_experts, generator=draw)
        weight = torch.rand(tokens, top_k, generator=draw, dtype=torch.promote_types(dtype, torch.float32)).to(device)
        chosen, valid = scores.topk(top_k).indices.to(device), torch.ones(tokens, dtype=torch.bool, device=device)
        decision = RoutingDecision.from_top_k(chosen, weight, num_experts=moe.num_experts, valid=valid)
        position = torch.arange(tokens, device=device)
        context = RoutingContext(
            token_ids=torch.zeros_like(position),
            valid=valid,
            position=position % (tokens // num_rows),
            sequence_index=position // (tokens // num_rows),
            num_sequences=num_rows,
            num_valid=tokens,
        )
        decision = limit_to_capacity(decision, moe.capacity, context)
        share = (decision.combine_weight * decision.kept).view(tokens, top_k).sum(1, keepdim=True)
        x = torch.randn(tokens, config.model.d_model, generator=draw).to(device, dtype)
        return cls(x=x, decision=decision, share=share, top_k=top_k)


class _Trial:
    """A dispatcher between experts that copy what they get."""

    def __init__(self, options: DispatcherOptions, rows: _Rows, mesh: Mesh) -> None:
        self.options, self.rows, self.mesh = options, rows, mesh
        self.dispatcher: Dispatcher | None = None

    def fault(self) -> str | None:
        """Return what is wrong on this rank: by the canary of a start, then with the config's rows. Collective."""
        rows, num_experts = self.rows, self.rows.decision.num_experts
        dtypes = row_dtypes(self.options, rows.x.dtype)
        try:
            self.dispatcher = build_plugin(self.options, Dispatcher, "parallel.dispatcher", self.mesh, num_experts)
        except ConfigError as error:
            return first_line(error)
        found = dispatcher_fault(self.dispatcher, self.mesh, num_experts, dtypes, rows.x.device)
        if _of_any(found, self.mesh) is not None:
            return found
        tolerance = rounding_tolerance(dtypes.wire, rows.top_k)
        for name, copied, given in zip(
            ("outputs", "gradients"), self._pass(), (rows.x, torch.ones_like(rows.x)), strict=True
        ):
            expected = rows.share * given
            if not float((copied - expected).norm()) <= tolerance * float(expected.norm()):  # NaN is wrong too
                return f"{name} of {len(rows.x)} tokens are wrong"
        return None

    def run(self) -> None:
        """Send the tokens there and back, forward and backward, as in training."""
        budget = self.dispatcher.static_sizes() if isinstance(self.dispatcher, RowBudget) else contextlib.nullcontext()
        with budget:
            self._pass()

    def _pass(self) -> tuple[Tensor, Tensor]:
        """Return the outputs (T, D) and the gradient of their sum."""
        assert self.dispatcher is not None
        x = self.rows.x.detach().requires_grad_()
        y = self.dispatcher.forward(x, self.rows.decision, self._copy)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        return y.detach(), gradient

    def _copy(
        self,
        x: Tensor,
        expert_index: Tensor,
        weight: Tensor,
        *,
        num_rows: int | None = None,
        part: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return each token as many times as the weights of its experts here say."""
        first, end = part or even_slice(self.rows.decision.num_experts, self.mesh.ep.size, self.mesh.ep.index)
        return (x * (weight * (expert_index < end - first)).sum(1, keepdim=True)).to(x.dtype)
