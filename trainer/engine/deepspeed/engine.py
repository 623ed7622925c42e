"""Optimizer steps by DeepSpeed's ZeRO 1 and 2 (arXiv 1910.02054), on our model, objective and checkpoint format.

DeepSpeed shards moments (stage 1) and gradients (stage 2) over the replicas of a weight, reduces gradients and runs the
optimizer. Its own decisions are overridden here: gradients are summed, not averaged (`gradient_allreduce_op: sum`, no
division by micro-batches); the norm is that of `StepEngine`, which counts each element once; and `StepEngine` decides
whether to update. bfloat16 is torch's autocast over float32 weights, as in the native engine: DeepSpeed's `bf16`
section would round the router, and its `torch_autocast` section would also accumulate gradients in bfloat16.
"""

from collections.abc import Mapping, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.state import Slice, TrainState
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.mesh import Mesh
from trainer.engine.deepspeed.optimizer import build_optimizer, moments_of, parameter_groups, set_steps
from trainer.engine.deepspeed.partition import ParameterSpan, Partition
from trainer.engine.deepspeed.start import expert_markers, load_deepspeed, release, single_process_group, start_engine
from trainer.engine.nonfinite import Findings, is_finite
from trainer.engine.numerics import NumericsConfig
from trainer.engine.reduce import square_norm
from trainer.engine.step import StepEngine
from trainer.errors import CheckpointError
from trainer.models.gpt import GPT
from trainer.optim.create import MOMENTS, set_rate
from trainer.optim.registry import OptimConfig

_MAX_BUCKET_SIZE = 500_000_000
"""Maximum elements of a bucket, for which a buffer is allocated; DeepSpeed's default."""


class DeepSpeedEngine(StepEngine):
    """ZeRO 1 or 2 around the model."""

    def __init__(
        self,
        model: GPT,
        optim: OptimConfig,
        numerics: NumericsConfig,
        mesh: Mesh,
        *,
        config: Mapping[str, Any],
        adam: str,
    ) -> None:
        """Start DeepSpeed. Collective: every rank must call it."""
        super().__init__(model, numerics, mesh)
        with ExitStack() as stack:
            stack.enter_context(single_process_group(mesh, self.device))
            with raise_together(mesh.world):  # DeepSpeed or a compiler may be missing on one host alone
                deepspeed = load_deepspeed(self.device)
                groups = parameter_groups(optim, self.learning, self.expert_numbers, self.rate_factors, mesh)
                optimizer = build_optimizer(deepspeed, groups, optim, adam=adam, config=config, device=self.device)
            experts = [self.parameters[name] for name in self.expert_numbers]
            stack.enter_context(expert_markers(model, experts, mesh))
            self._deepspeed = start_engine(
                deepspeed, model, optimizer, self._with_bucket_size(config), mesh, self.device
            )
            stack.callback(release, self._deepspeed)
            self._open = stack.pop_all()
        self._zero = self._deepspeed.optimizer
        self._partitions = self._find_partitions()
        self._norm: float | None = None
        """Gradient norm of the current step; None if it is skipped. Answers two of DeepSpeed's queries."""
        self._zero.scaled_global_norm = self._report_norm
        self._zero.check_overflow = self._report_overflow
        self._zero.check_grad_overflow = True
        self._zero._update_scale = lambda has_overflow=False: None  # no loss scale, and no log line about overflow

    def gradients(self) -> TrainState:
        """Return the unclipped gradients of the whole step, by parameter name. Collective."""
        slices = {}
        for i, partition in enumerate(self._partitions):
            for name, (first, rows) in partition.rows(self._flat_gradient(i)).items():
                slices[name] = self._rows_of(name, first, rows)
        return TrainState(slices={name: slices[name] for name in self.learning})

    def _moments(self) -> dict[str, Slice]:
        cut: dict[str, Slice] = {}
        for partition, flat in zip(self._partitions, self._zero.single_partition_of_fp32_groups, strict=True):
            for key, moment in moments_of(self._zero.optimizer, flat).items():
                for name, (first, rows) in partition.rows(moment).items():
                    cut[f"optim.{key}.{name}"] = self._rows_of(name, first, rows)
        names = [f"optim.{key}.{name}" for name in self.learning for key in MOMENTS]  # in the order of the model
        return {name: cut[name] for name in names}

    def wanted(self) -> TrainState:
        """Return the slices to load: of moments, every row of which this rank holds an element."""
        moments = {}
        for partition in self._partitions:
            for name, (first, last) in partition.wanted().items():
                shape = (last - first, *self.parameters[name].shape[1:])
                rows = torch.empty(shape, dtype=torch.float32, device="meta")
                moments |= {f"optim.{key}.{name}": self._rows_of(name, first, rows) for key in MOMENTS}
        return self._with_moments(moments)

    def _load_moments(self, state: TrainState, fresh: Set[str]) -> None:
        self._zero.refresh_fp32_params()  # from the weights
        for partition, flat in zip(self._partitions, self._zero.single_partition_of_fp32_groups, strict=True):
            since = self._first_steps(partition)
            for key, moment in moments_of(self._zero.optimizer, flat).items():
                if fresh:
                    moment.zero_()
                for name in partition.wanted():
                    if name not in fresh:
                        partition.fill(moment, name, state.slices[f"optim.{key}.{name}"].tensor)
            set_steps(self._zero.optimizer, flat, self.optimizer_steps - since)

    def _first_steps(self, partition: Partition) -> int:
        """Return the optimizer steps before the first one of a partition's moments, which have one count together."""
        since = {span.name: self.moments_since.get(span.name, 0) for span in partition.parameters}
        if len(set(since.values())) == 1:
            return next(iter(since.values()))
        late = max(since, key=lambda name: since[name])
        raise CheckpointError(
            f"{late} has moments since step {since[late]} and other weights for longer (train.freeze, init_from): "
            "DeepSpeed has one step count for all weights of a group; use engine.kind native, the same train.freeze or "
            "init_from.parts: weights"
        )

    def close(self) -> None:
        """Remove DeepSpeed's hooks and markers from the model, which is otherwise unchanged."""
        self._open.close()

    def begin_backward(self, *, is_last: bool) -> None:
        """Announce the next backward pass to DeepSpeed."""
        # Done by DeepSpeed's own forward pass, which is not used.
        self._zero.clear_backward_seen_flag()
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        self._deepspeed._backward_prologue()

    def backward(self, objective: Tensor) -> None:
        """Accumulate a gradient."""
        self._deepspeed.backward(objective, scale_wrt_gas=False)

    def _reduce_gradients(self) -> Tensor:
        """Return this rank's part of the squared norm; every element is in exactly one rank's partition."""
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(len(self._partitions)):
            square = square + square_norm(self._gradient_pieces(i)).to(self.device)
        return square

    def _counted_gradients(self, names: Set[str]) -> dict[str, list[Tensor]]:
        """Return this rank's pieces of some gradients; every element is in exactly one rank's partition."""
        found = dict[str, list[Tensor]]()
        for i, partition in enumerate(self._partitions):
            found |= partition.pieces_of(names, self._gradient_pieces(i))
        return found

    def _update(self, lr: float, grad_norm: float) -> None:
        set_rate(self._zero.param_groups, lr)
        self._norm = grad_norm
        self._deepspeed.step()

    def _drop_gradients(self) -> None:
        self._norm = None
        self._deepspeed.step()  # which discards the gradients if it skips

    def _findings(self, local_objective: Tensor) -> Findings:
        names = [
            name
            for i, partition in enumerate(self._partitions)
            for name, part in partition.fragments(self._flat_gradient(i)).items()
            if not is_finite(part)
        ]
        return Findings(
            gradients=names,
            loss_is_finite=is_finite(local_objective),
            dense_share_is_finite=True,  # unknown: DeepSpeed reduces in place
            expert_share_is_finite=True,
        )

    def _find_partitions(self) -> list[Partition]:
        """Return the position of each parameter in DeepSpeed's flat partitions."""
        name_of = {parameter: name for name, parameter in self.parameters.items()}
        partitions = []
        for i, parameters in enumerate(self._zero.round_robin_bit16_groups):
            offsets = self._zero.round_robin_bit16_offsets[i]
            spans = [ParameterSpan(name_of[p], tuple(p.shape), at) for p, at in zip(parameters, offsets, strict=True)]
            group = self.mesh.edp if spans[0].name in self.expert_numbers else self.mesh.world
            partitions.append(Partition(spans, int(self._zero.partition_size[i]), group))
        return partitions

    def _with_bucket_size(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config with a bucket size of at most the model, unless it is set.

        DeepSpeed reduces a bucket when the next gradient does not fit. Ranks with different numbers of experts would do
        so at different points and deadlock, so there a bucket holds the whole model.
        """
        bucket_size, moe = sum(p.numel() for p in self.learning.values()), self.moe_config
        if moe is None or moe.num_experts % self.mesh.layout.ep_size == 0:
            bucket_size = min(bucket_size, _MAX_BUCKET_SIZE)
        return {**config, "zero_optimization": {"reduce_bucket_size": bucket_size, **config["zero_optimization"]}}

    def _rows_of(self, name: str, first: int, rows: Tensor) -> Slice:
        """Return rows of a local parameter as a slice of the global tensor."""
        whole = self.slices.of(f"model.{name}", self.parameters[name])
        return whole.part(first, rows)

    def _gradient_pieces(self, group: int) -> list[Tensor]:
        """Return this rank's pieces of the reduced gradient of a group, in order."""
        if self._zero.cpu_offload:
            self._zero._wait_for_offload_copies()  # started after the backward pass
            return [self._zero.single_partition_of_fp32_groups[group].grad]
        return list(self._zero.averaged_gradients[group])

    def _flat_gradient(self, group: int) -> Tensor:
        """Return the pieces as one tensor, padded to the size of the partition."""
        flat = torch.cat([piece.reshape(-1) for piece in self._gradient_pieces(group)])
        missing = self._partitions[group].size - len(flat)
        return torch.cat([flat, flat.new_zeros(missing)]) if missing > 0 else flat

    def _report_norm(self, norm_type: int = 2) -> Tensor:
        """Return our norm to DeepSpeed, which would compute it again in float32."""
        return torch.tensor(self._norm, dtype=torch.float32, device=self._zero.device)

    def _report_overflow(self, partition_gradients: bool = True) -> None:
        """Set DeepSpeed's overflow flag by our decision instead of its own check."""
        self._zero.overflow = self._norm is None
