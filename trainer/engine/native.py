"""Native engine: gradients in `.grad`, all-reduced during the backward pass, and a torch optimizer on each rank."""

from collections.abc import Sequence, Set
from typing import Literal

import torch
from torch import Tensor

from trainer.checkpoint.state import Slice, TrainState
from trainer.data.batches.batch import Batch
from trainer.distributed.mesh import Mesh
from trainer.distributed.sharded_tensor import is_sharded
from trainer.engine.nonfinite import Findings, is_finite
from trainer.engine.numerics import NumericsConfig
from trainer.engine.reduce import square_norm
from trainer.engine.step import Accumulated, StepEngine
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import is_decayed
from trainer.optim.create import MOMENTS, create_optimizer, scale_rates, set_rate
from trainer.optim.registry import OptimConfig
from trainer.parallel.accumulate import before_backward, before_forward, step_of
from trainer.parallel.replicate import GradientReducer
from trainer.parallel.shards import is_first_copy, local


class NativeEngine(StepEngine):
    """Accumulates, reduces, clips and applies gradients."""

    def __init__(
        self,
        model: GPT,
        optim: OptimConfig,
        numerics: NumericsConfig,
        mesh: Mesh | None = None,
    ) -> None:
        """Create the optimizer."""
        super().__init__(model, numerics, Mesh.of_one() if mesh is None else mesh)
        self.optimizer = create_optimizer(
            optim,
            decayed=[p for name, p in self.learning.items() if is_decayed(name, p)],
            not_decayed=[p for name, p in self.learning.items() if not is_decayed(name, p)],
        )
        scale_rates(self.optimizer, {p: self.rate_factors[name] for name, p in self.learning.items()})
        self._experts = [p for name, p in self.learning.items() if name in self.expert_numbers]
        self._cut = [p for name, p in self.learning.items() if name in self.cut_parameters]
        """Weights that tensor-parallel ranks hold together."""
        others = {*self.expert_numbers, *self.cut_parameters}
        self._dense = [p for name, p in self.learning.items() if name not in others]
        is_on_two_stages = model.config.tie_embeddings and self.mesh.tied.size > 1
        self._tied = self.learning.get("embedding.weight") if is_on_two_stages else None
        """Weight of the embedding here and of the head on another stage, or the other way round."""
        self.gradient_reducers = [
            GradientReducer([p for p in parameters if not is_sharded(p)], group)
            for parameters, group in (
                (self._dense, self.mesh.stage),
                (self._experts, self.mesh.edp),
                (self._cut, self.mesh.tdp),
            )
        ]

    def gradients(self) -> TrainState:
        """Return the gradients by name of a parameter that learns; zeros for parameters without one."""
        return TrainState(
            slices={
                name: self.slices.of(f"model.{name}", torch.zeros_like(p) if p.grad is None else p.grad)
                for name, p in self.learning.items()
            }
        )

    def accumulate(
        self, micro_batches: Sequence[Batch], *, return_experts: bool = False, with_router_norms: bool = True
    ) -> Accumulated:
        """Run the micro-batches forward and backward, and reduce the gradient over ranks; it is not clipped yet."""
        with step_of(self.model):
            return super().accumulate(micro_batches, return_experts=return_experts, with_router_norms=with_router_norms)

    def before_forward(self) -> None:
        """Choose what the next forward pass frees, if it saves activations."""
        if torch.is_grad_enabled():
            before_forward(self.model)

    def begin_backward(self, *, is_last: bool) -> None:
        """Prepare the next backward pass, during which gradients are reduced if it is the last one."""
        before_backward(self.model, is_last=is_last)
        if is_last:
            for gradient_reducer in self.gradient_reducers:
                gradient_reducer.expect()

    def backward(self, objective: Tensor) -> None:
        """Accumulate a gradient."""
        objective.backward()

    def _reduce_gradients(self) -> Tensor:
        """Finish the all-reduce over replicas; return this rank's part of the squared norm.

        The gradient of a local expert already includes the tokens of all expert-parallel ranks, through the backward
        of the all-to-all, and that of a cut the tokens of all tensor-parallel ranks. Sharded gradients were reduced by
        FSDP.
        """
        for gradient_reducer in self.gradient_reducers:
            gradient_reducer.finish()
        if self._tied is not None:
            assert self._tied.grad is not None, "embedding and head are always used"
            self.mesh.tied.all_reduce_(local(self._tied.grad))
        layout, square = self.mesh.layout, torch.zeros((), dtype=torch.float64, device=self.device)
        once = [p for p in self._dense if p is not self._tied or self.mesh.tied.index == 0]
        firsts = layout.is_first_of_stage, layout.edp_rank == 0, self.mesh.tdp.index == 0
        for mine, is_first in zip((once, self._experts, self._cut), firsts, strict=True):
            if gradients := _counted(mine, is_first=is_first):
                square = square + square_norm(gradients)
        return square

    def _counted_gradients(self, names: Set[str]) -> dict[str, list[Tensor]]:
        """Return this rank's gradients of some dense weights that count for a norm over all ranks."""
        is_first = self.mesh.layout.is_first_of_stage
        return {name: _counted([self.learning[name]], is_first=is_first) for name in names}

    def _update(self, lr: float, grad_norm: float) -> None:
        """Clip, update and discard the gradient."""
        clip = self.numerics.grad_clip
        if clip is not None and grad_norm > clip:
            gradients = [local(p.grad) for p in self.learning.values() if p.grad is not None]
            torch._foreach_mul_(gradients, clip / (grad_norm + 1e-6))
        set_rate(self.optimizer.param_groups, lr)
        self.optimizer.step()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _findings(self, local_objective: Tensor) -> Findings:
        dense, experts, cut = (gradient_reducer.local_is_finite for gradient_reducer in self.gradient_reducers)
        return Findings(
            gradients=[n for n, p in self.learning.items() if p.grad is not None and not is_finite(local(p.grad))],
            loss_is_finite=is_finite(local_objective),
            dense_share_is_finite=dense and cut,
            expert_share_is_finite=experts,
        )

    def wanted(self) -> TrainState:
        """Return the slices to load; of a tensor sharded inside its experts, all of these. Not collective."""
        return self._slices("wanted")

    def held(self) -> TrainState:
        """Return the state as this rank holds it, to compare copies. Not collective."""
        return self._slices("held")

    def _slices(self, purpose: Literal["held", "wanted"]) -> TrainState:
        tensors = {**self._tensors(), **self._averages(), **self._moment_tensors()}
        return TrainState(
            slices={name: self.slices.of(name, tensor, purpose=purpose) for name, tensor in tensors.items()}
        )

    def _moments(self) -> dict[str, Slice]:
        return {name: self.slices.of(name, tensor) for name, tensor in self._moment_tensors().items()}

    def _moment_tensors(self) -> dict[str, Tensor]:
        return {f"optim.{key}.{name}": self._state_of(p)[key] for name, p in self.learning.items() for key in MOMENTS}

    def _load_moments(self, state: TrainState, fresh: Set[str]) -> None:
        for name, p in self.learning.items():
            mine = self._state_of(p)
            mine["step"].fill_(self.optimizer_steps - self.moments_since.get(name, 0))
            for key in MOMENTS:
                if name in fresh:
                    local(mine[key]).zero_()
                else:
                    moment = f"optim.{key}.{name}"
                    self.slices.copy(moment, mine[key], state.slices[moment].tensor)

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer state of a parameter, created as torch does if there was no step yet."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter)
        return state


def _counted(parameters: Sequence[torch.nn.Parameter], *, is_first: bool) -> list[Tensor]:
    """Return the gradients here that count for a norm over all ranks, those of one copy of each weight.

    `is_first`: this rank has the first copy of what is not sharded.
    """
    counted = [p for p in parameters if (is_first_copy(p) if is_sharded(p) else is_first)]
    return [local(p.grad) for p in counted if p.grad is not None]
