"""Pass residual streams from stage to stage, forward only: evaluation, counting passes and generation.

# B rows, S tokens in a row, D d_model.
"""

from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.distributed.collectives import Group, PendingOp
from trainer.parallel.pipeline_stages import PipelineStages


class StageRelay:
    """Sends what a stage of this rank gives to the rank of the next one, or keeps it if that is here too.

    Streams of a stage are received in the order in which the stage before handed them on.
    """

    def __init__(self, stages: PipelineStages, group: Group, *, width: int, dtype: torch.dtype) -> None:
        """Create the relay of a member of `group`, whose ranks hold one copy of the model together.

        `width` and `dtype` are those of the residual stream.
        """
        self.stages, self.group, self.width, self.dtype = stages, group, width, dtype
        self.mine = stages.of_rank(group.index)
        """Numbers of the stages here, in the order of the layers."""
        self.layers: Sequence[range] = [stages.layers[stage] for stage in self.mine]
        self.has_last = stages.number - 1 in self.mine
        self._kept: defaultdict[int, deque[Tensor]] = defaultdict(deque)
        self._sent: list[PendingOp] = []

    def before(self, layers: range, shape: torch.Size) -> Tensor:
        """Return the residual stream (B, S, D) before a stage here that is not the first; `shape` is (B, S)."""
        stage = self.stages.layers.index(layers)
        source = self.stages.rank_of(stage - 1)
        if source == self.group.index:
            return self._kept[stage].popleft()
        received = torch.empty((*shape, self.width), dtype=self.dtype, device=self.group.device)
        return self.group.receive(received, source=source)

    def after(self, layers: range, hidden: Tensor) -> None:
        """Hand on the residual stream after a stage here that is not the last."""
        assert hidden.dtype == self.dtype, f"the residual stream is {hidden.dtype}, not {self.dtype}"
        stage = self.stages.layers.index(layers) + 1
        target = self.stages.rank_of(stage)
        if target == self.group.index:
            self._kept[stage].append(hidden)
        else:
            self._sent.append(self.group.start_send(hidden.contiguous(), target=target))

    def shared(self, found: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return on all ranks what the one with the last layer has found; the others found None."""
        if found is None:
            found = torch.empty(shape, dtype=dtype, device=self.group.device)
        assert (found.shape, found.dtype) == (shape, dtype), f"found {found.dtype} {found.shape}, not {dtype} {shape}"
        is_bool = dtype is torch.bool  # which gloo does not send
        message = found.to(torch.uint8) if is_bool else found.contiguous()
        self.group.broadcast_(message, source=self.stages.rank_of(self.stages.number - 1))
        self.finish()
        return message.bool() if is_bool else message

    def finish(self) -> None:
        """Wait until all that was handed on has been sent."""
        while self._sent:
            self._sent.pop().wait()
