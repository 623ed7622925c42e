"""Pipeline parallelism: micro-batches pass through stages of the model, one group of ranks after another.

Schedules are those of torch.distributed.pipelining: they decide in which order a rank runs the forward and backward
passes of its stages and micro-batches, and send the residual stream and its gradient. What is computed is decided here:
every rank of a column has the rows of its micro-batches, so nothing but the residual stream travels.

    hidden of the stage before -> layers of this stage -> hidden             + the losses of its MoE layers
    ...                                                -> cross-entropy      of the last stage

The objective is a sum over layers (moe/losses.py), so each stage has its share of it: its backward pass begins with the
gradient of its hidden output and with a 1 for its share.

Where exchanges of experts' rows overlap, a pass of the schedule is that of a pair of micro-batches: inside a stage one
is computed while rows of the other travel, as in the whole model (engine/passes.py).

# B rows of a micro-batch, S tokens in a row, D d_model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import pipelining

from trainer.data.batches.batch import Batch
from trainer.engine.passes import Gradients, RunLayers, Share, Take
from trainer.models.gpt import GPTOutput
from trainer.parallel.stage_relay import StageRelay


class Pipeline:
    """The stages of one rank, and the order in which it runs them."""

    def __init__(self, relay: StageRelay, *, at_once: int = 1) -> None:
        """Create the stages of a rank, which `relay` knows; a pass has `at_once` micro-batches: 2 if they overlap."""
        self.stages, self.mine, self.has_last = relay.stages, relay.mine, relay.has_last
        self._relay, self._group, self._width, self._dtype = relay, relay.group, relay.width, relay.dtype
        self._at_once = at_once
        self._recorder = self._group.recorder
        self._modules = {number: _Stage(self.stages.layers[number]) for number in self.mine}
        self._schedules: dict[tuple[int, int, int], Any] = {}

    def train(self, batches: Sequence[Batch], run: RunLayers, share: Share, gradients: Gradients) -> None:
        """Run all micro-batches forward and backward, in the order of the schedule."""
        passes = [batches[i : i + self._at_once] for i in range(0, len(batches), self._at_once)]
        num_backward = 0

        def begin() -> None:
            nonlocal num_backward
            num_backward += 1
            self._recorder.enter("backward")
            gradients.begin_backward(is_last=num_backward == len(passes) * len(self.mine))

        def forward(hidden: Tensor | None, number: int, layers: range) -> Tensor:
            self._recorder.enter("forward")
            outputs = self._run(passes[number], hidden, run, layers)
            parts = [share(*one, layers) for one in zip(outputs, passes[number], strict=True)]
            part = torch.stack(parts).sum()
            after = [output.hidden for output in outputs if output.hidden is not None]
            if not after:
                return _StageOutput.apply(part, part.new_zeros(()), _anchor(part), begin)
            assert after[0].dtype == self._dtype, f"the residual stream is {after[0].dtype}, not {self._dtype}"
            return _StageOutput.apply(self._joined(after), part, _anchor(part), begin)

        for module in self._modules.values():
            module.run = forward
        shapes = {batch.tokens.shape for batch in batches}
        assert len(shapes) == 1, f"micro-batches of a step have one shape, not {shapes}"
        [(B, S)] = shapes
        numbers = torch.arange(len(passes))  # on the host: each stage reads its own
        try:
            self._schedule(len(passes), B * self._at_once, S).step(
                number=numbers, target=torch.zeros(len(passes)), return_outputs=False
            )
        except RuntimeError as error:
            if error.__cause__ is not None:  # torch wraps what a stage raises
                raise error.__cause__ from None
            raise

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], run: RunLayers, take: Take) -> None:
        """Run all batches forward only, one stage of this rank after another."""
        for layers in self._relay.layers:
            for batch in batches:
                hidden = None if layers.start == 0 else self._relay.before(layers, batch.tokens.shape)
                output = run(batch, hidden, layers)
                take(output, batch, layers)
                if output.hidden is not None:
                    self._relay.after(layers, output.hidden)
        self._relay.finish()

    def _run(self, batches: Sequence[Batch], hidden: Tensor | None, run: RunLayers, layers: range) -> list[GPTOutput]:
        """Return what some layers give of the micro-batches of a pass, from the residual streams before them."""
        if len(batches) == 1:
            return [run(batches[0], None if hidden is None else hidden[: len(batches[0].tokens)], layers)]
        before = [None] * len(batches) if hidden is None else hidden.chunk(len(batches))
        return run.overlapped(batches, before, layers)

    def _joined(self, hidden: Sequence[Tensor]) -> Tensor:
        """Return the residual streams of a pass in one message; the last pass of an odd number sends zeros beside."""
        missing = [torch.zeros_like(hidden[0])] * (self._at_once - len(hidden))
        return torch.cat([*hidden, *missing]) if self._at_once > 1 else hidden[0]

    def _schedule(self, num_passes: int, B: int, S: int) -> Any:
        """Return the schedule of a step; its buffers are kept for the next one of this shape."""
        key = num_passes, B, S
        if key not in self._schedules:
            self._schedules = {key: self._new_schedule(*key)}
        return self._schedules[key]

    def _new_schedule(self, num_passes: int, B: int, S: int) -> Any:
        device = self._group.device
        hidden = torch.empty(B, S, self._width, dtype=self._dtype, device="meta", requires_grad=True)
        number = torch.empty((), dtype=self._dtype, device="meta")
        stages = [
            pipelining.PipelineStage(
                module,
                stage,
                self.stages.number,
                device,
                input_args=() if stage == 0 else (hidden,),
                output_args=(number,) if stage == self.stages.number - 1 else (hidden,),
                group=self._group.handle,
                # Experts' nodes compute the gradients of weights with those of their input: nothing is left for later.
                dw_builder=lambda: lambda: None,
            )
            for stage, module in self._modules.items()
        ]
        own = self.stages.schedule
        schedule = getattr(pipelining, own.torch_name)
        given = stages if own.takes_list else stages[0]
        return schedule(given, num_passes, loss_fn=lambda share, _: share, scale_grads=False)


def _anchor(like: Tensor) -> Tensor:
    """Return a number that requires a gradient, so that a stage whose weights are all frozen has a backward pass."""
    return torch.zeros((), device=like.device, requires_grad=True)


class _Stage(nn.Module):
    """Module that torch's schedules run."""

    run: Callable[[Tensor | None, int, range], Tensor]

    def __init__(self, layers: range) -> None:
        super().__init__()
        self._layers = layers

    def forward(self, *hidden: Tensor, number: Tensor) -> Tensor:
        """Run micro-batch `number` (1,)."""
        return self.run(hidden[0] if hidden else None, int(number), self._layers)


class _StageOutput(torch.autograd.Function):
    """A stage's output. Backward, its share of the objective has a gradient of 1, beside that of the output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, share: Tensor, anchor: Tensor, begin: Callable[[], None]) -> Tensor:
        ctx.begin, ctx.one = begin, torch.ones_like(share)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.begin()
        return grad, ctx.one, None, None
