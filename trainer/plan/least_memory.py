"""The memory that a layout surely needs, and what it probably needs as far as measured ones tell. Imports no torch.

# L layers, n micro-batches.
"""

import math
from typing import Final

from trainer.distributed.rank_layout import Degrees
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.parallel.pipeline_stages import PipelineStages, pipeline_stages
from trainer.plan.kept_passes import received_buffers
from trainer.plan.layout_estimates import GATHERED_BYTES, WEIGHT_BYTES, kept_share, least_row_bytes, least_state_bytes
from trainer.plan.layouts import Cluster, PlannedLayout
from trainer.plan.step_cost import StepCost

_OF_ROWS: Final = 2.0
"""Memory that rows need, over what they surely keep: 1.9 to 2.6 in layouts of 30 and 235 billion weights."""
_OF_MORE_ROWS: Final = 1.6
"""The same of rows beside those of a measured layout: 1.7 there, where a row is shared by 4, 2 and no ranks."""


class LeastMemory:
    """Memory of layouts: a bound by arithmetic, raised by those that were measured."""

    def __init__(self, config: ExperimentConfig, cluster: Cluster, num_ids: int) -> None:
        self.config, self.cluster, self.num_ids = config, cluster, num_ids
        self._measured: dict[tuple[str, bool, bool], list[tuple[float, float]]] = {}
        """By kind of layouts: bytes that rows surely keep, and bytes that they needed."""
        self._stages: dict[tuple[int, str], PipelineStages | None] = {}

    def learn(self, layout: PlannedLayout, cost: StepCost) -> None:
        """Take in a measurement."""
        beyond = max(0.0, cost.peak - max(self._held(layout), cost.resident))
        self._measured.setdefault(self._kind(layout), []).append((self._rows(layout), beyond))

    def is_hopeless(self, layout: PlannedLayout) -> bool:
        """Return whether a layout would need more than there is, as far as others tell."""
        return self.probable(layout) > self.cluster.usable

    def probable(self, layout: PlannedLayout) -> float:
        """Return the bytes that a layout probably needs at least, as those of its kind that needed least beyond theirs.

        Some of that does not depend on rows, so fewer rows need a share of it, and more less than in proportion.
        """
        rows = self._rows(layout)
        beyond = (
            needed + _OF_MORE_ROWS * (rows - kept) if rows > kept else needed * rows / kept
            for kept, needed in self._measured.get(self._kind(layout), ())
        )
        return max(self.surely(layout), self._held(layout) + min(beyond, default=0.0))

    def expected(self, layout: PlannedLayout) -> float:
        """Return about the bytes that a layout needs: twice what its rows surely keep, until one of its kind tells."""
        needed = self._held(layout) + self._gathered(layout) + _OF_ROWS * self._rows(layout)
        return self.probable(layout) if self._kind(layout) in self._measured else max(needed, self.surely(layout))

    def surely(self, layout: PlannedLayout) -> float:
        """Return the bytes that a layout needs at least."""
        held, rows, L = self._held(layout), self._rows(layout), self.config.model.num_layers
        state = least_state_bytes(self.config, layout, self.cluster.world_size, self.num_ids) + self._buffers(layout)
        if layout.micro_batches(self.config, self.cluster.world_size) == 1:
            return max(state, held + rows)  # gradients come as what rows keep goes
        # As the last block's gradients are reduced, all others keep their rows, and have gradients of those before.
        return state + max(rows, rows * (L - 1) / L + self._gathered(layout))

    def _kind(self, layout: PlannedLayout) -> tuple[str, bool, bool]:
        """Return what is computed again, whether rows arrive from other ranks, and whether there are stages."""
        return layout.recompute, layout.ep_size > 1, layout.pp_size > 1

    def _held(self, layout: PlannedLayout) -> float:
        """Return the bytes that a rank holds beside what rows keep, while most of it is there."""
        state = least_state_bytes(self.config, layout, self.cluster.world_size, self.num_ids)
        if layout.micro_batches(self.config, self.cluster.world_size) == 1:
            state = state * 3 // 4  # without gradients
        return state + self._buffers(layout)

    def _gathered(self, layout: PlannedLayout) -> float:
        """Return the bytes of a layer's experts that are gathered, and of their gradients while they are reduced."""
        config, moe, own = self.config, self.config.model.moe, layout
        shards = own.shard_size or self.cluster.world_size // own.pp_size
        if moe is None or own.data == "replicate" or own.engine == "deepspeed" or shards <= own.ep_size:
            return 0.0
        if own.shard_keeps != "nothing" or config.train.freeze or config.model.lora is not None:
            return 0.0
        experts = config.model.weights(vocab_size=self.num_ids).expert * moe.num_experts / own.ep_size
        low = GATHERED_BYTES[config.train.dtype]
        return experts / len(config.model.moe_layers) * (low + WEIGHT_BYTES[config.train.dtype])

    def _buffers(self, layout: PlannedLayout) -> int:
        """Return the bytes of what a pipeline's first rank receives in a step, whose buffers are there all the time.

        Of two stages on a rank torch keeps what they sent, too; of about 2 P passes that is still to come.
        """
        if layout.pp_size == 1:
            return 0
        passes = layout.passes(self.config, self.cluster.world_size)
        buffers = received_buffers(layout.stages_per_rank, num_neighbours=1)
        sent = max(0, passes - 2 * layout.pp_size) if layout.stages_per_rank > 1 else 0
        return (passes + sent) * buffers * self._message(layout)

    def _message(self, layout: PlannedLayout) -> int:
        model = self.config.model
        rows = self._size(layout) * layout.at_once(self.config)
        return rows * (model.seq_len // layout.cp_size) * model.d_model * WEIGHT_BYTES[self.config.train.dtype]

    def _size(self, layout: PlannedLayout) -> int:
        """Return the rows of a micro-batch."""
        config, world = self.config, self.cluster.world_size
        return -(-layout.rows(config, world) // layout.micro_batches(config, world))

    def _rows(self, layout: PlannedLayout) -> float:
        """Return the bytes that the rows of a rank surely keep at once."""
        return least_row_bytes(self.config, layout) * self._size(layout) * self._kept_share(layout)

    def largest_share(self, layout: PlannedLayout) -> float:
        """Return the layers of the rank of a pipeline that has most, by the mean."""
        stages = self._stages_of(layout) if layout.pp_size > 1 else None
        if stages is None:
            return 1.0
        layers = [len(stages.layers_of(rank)) for rank in range(stages.num_ranks)]
        return max(layers) * len(layers) / sum(layers)

    def _kept_share(self, layout: PlannedLayout) -> float:
        if layout.pp_size == 1:
            return 1.0
        stages = self._stages_of(layout)
        return math.inf if stages is None else kept_share(self.config, layout, self.cluster.world_size, stages)

    def _stages_of(self, layout: PlannedLayout) -> PipelineStages | None:
        """Return the stages of a pipeline; None if there are too few layers."""
        key = layout.pp_size, layout.pp_schedule
        if key not in self._stages:
            degrees = Degrees(pp_size=layout.pp_size, pp_schedule=layout.pp_schedule)
            try:
                self._stages[key] = pipeline_stages(self.config.model, self.num_ids, degrees)
            except ConfigError:
                self._stages[key] = None
        return self._stages[key]
