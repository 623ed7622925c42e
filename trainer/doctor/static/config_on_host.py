"""A config and the machine that it shall be trained on: what static checks look at. Imports no torch."""

from dataclasses import dataclass, field

from trainer.doctor.finding import Check
from trainer.doctor.host_facts import HostFacts
from trainer.experiment import ExperimentConfig

_PER_WEIGHT = 12
"""Bytes in a checkpoint: float32 weight and two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigOnHost:
    """A config on a machine."""

    config: ExperimentConfig
    host: HostFacts = field(default_factory=HostFacts)

    @property
    def on_gpu(self) -> bool:
        """Whether it trains on GPUs."""
        device = self.config.parallel.device
        return device == "cuda" or (device == "auto" and self.host.has_gpu)

    @property
    def num_ids(self) -> int | None:
        """Ids of the tokenizer, if they are known without reading a file."""
        tokenizer = self.config.data.tokenizer
        return getattr(tokenizer, "vocab_size", 256 if tokenizer.kind == "byte" else None)

    @property
    def rows_per_expert(self) -> float:
        """Rows of an expert in a micro-batch under an even load."""
        config, moe = self.config, self.config.model.moe
        if moe is None:
            return 0.0
        tokens = config.parallel.micro_batch_size * config.model.seq_len * config.parallel.ep_size
        return tokens * moe.experts_per_token / moe.num_experts

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint."""
        model = self.config.model
        weights = model.weights(vocab_size=self.num_ids or 256)
        num_experts = 0 if model.moe is None else model.moe.num_experts
        total = weights.dense + num_experts * weights.expert
        return total * (2 * _PER_WEIGHT if self.config.train.dtype == "float64" else _PER_WEIGHT)


ConfigCheck = Check[ConfigOnHost]
