"""Plan of an import, decided and checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.coverage import WEIGHT
from trainer.checkpoint.manifest import DType
from trainer.checkpoint.streamed import GlobalTensor
from trainer.config.loader import load
from trainer.config.nodes import shown_path
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.foreign_model import ForeignModel
from trainer.convert.foreign_tensors import check_foreign_tensors
from trainer.convert.import_config import (
    check_is_theirs,
    check_rows,
    default_name,
    with_own_tokenizer,
    with_their_rows,
    written_config,
)
from trainer.convert.import_tokenizer import tokenizer_for
from trainer.convert.safetensors_folder import SafetensorsFolder
from trainer.data.tokenizers.base import Tokenizer
from trainer.engine.base import COUNTS
from trainer.experiment import ExperimentConfig
from trainer.families.link import Link, coverage_problems
from trainer.models.gpt import GPT
from trainer.models.initialize import expert_parameters
from trainer.training.model import meta_model, single_process


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    """An import: the published model, and the run that it becomes."""

    foreign: ForeignModel
    config: ExperimentConfig
    tokenizer: Tokenizer
    source: SafetensorsFolder
    model: GPT
    """On the meta device, in one process."""
    links: Sequence[Link]

    @property
    def tensors(self) -> dict[str, GlobalTensor]:
        """All tensors of the checkpoint, by name."""
        experts = expert_parameters(self.model)
        held = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        found = {
            WEIGHT + name: GlobalTensor(shape=tuple(t.shape), dtype=_dtype(t), is_of_experts=name in experts)
            for name, t in held.items()
        }
        return found | {name: GlobalTensor(shape=tuple(t.shape), dtype=_dtype(t)) for name, t in self.initial.items()}

    @property
    def initial(self) -> dict[str, Tensor]:
        """Tensors that are not theirs, as they are before the first step."""
        linked, moe = {link.ours for link in self.links}, self.config.model.moe
        columns = 0 if moe is None else moe.num_experts + (moe.router.num_null_experts > 0)
        counts = torch.ones((len(self.model.moe_layers()), columns), dtype=torch.int64)
        buffers = {name: b for name, b in self.model.named_buffers() if name not in linked}
        zeros = {WEIGHT + name: torch.zeros_like(b, device="cpu") for name, b in buffers.items()}
        return zeros | {COUNTS: counts}

    @property
    def num_parameters(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def size_bytes(self) -> int:
        """Bytes of the checkpoint."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def plan_import(
    folder: ForeignFolder,
    foreign: ForeignModel,
    source: SafetensorsFolder,
    config_path: Path | None,
    overrides: Sequence[str],
) -> ImportPlan:
    """Check that everything fits together: config, tokenizer, names, shapes and dtypes.

    Args:
        folder: the published folder.
        foreign: its config.json.
        source: its weights.
        config_path: experiment file; None: a config is written.
        overrides: changes of it.

    Raises:
        ConfigError: if the experiment is of another model.
        DataError: if the tokenizer is unusable.
        CheckpointError: if the weights are not those of config.json.
    """
    is_written = config_path is None
    if is_written:
        name, is_bfloat16 = default_name(folder.path), torch.bfloat16 in source.dtypes
        config = written_config(folder, foreign, overrides, name=name, is_bfloat16=is_bfloat16)
    else:
        config = load(config_path, overrides, ExperimentConfig)
    check_is_theirs(config, "the overrides" if is_written else shown_path(config_path), folder, foreign)
    tokenizer = tokenizer_for(config, folder)
    if is_written:
        config = with_own_tokenizer(with_their_rows(config, tokenizer.vocab_size, folder, foreign.vocab_size))
    else:  # as it is: the run goes on under this file
        check_rows(config, tokenizer.vocab_size, folder, foreign.vocab_size)
    links = check_foreign_tensors(source, foreign.family.links(config.model, foreign.vocab_size), foreign)
    model = plain_model(config, tokenizer.vocab_size)  # of no more layers than there are tensors
    linked = {link.ours for link in links}
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ours |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in linked}
    problems = list(coverage_problems(links, ours))
    assert not problems, problems[0]
    return ImportPlan(foreign=foreign, config=config, tokenizer=tokenizer, source=source, model=model, links=links)


def plain_model(config: ExperimentConfig, num_ids: int) -> GPT:
    """Return the whole model on the meta device, with the kernel that computes in every dtype."""
    alone = single_process(config)
    parallel = alone.parallel.model_copy(update={"experts_kernel": "loop"})
    return meta_model(alone.model_copy(update={"parallel": parallel}), num_ids)


def _dtype(tensor: Tensor) -> DType:
    return str(tensor.dtype).removeprefix("torch.")  # type: ignore[return-value]
