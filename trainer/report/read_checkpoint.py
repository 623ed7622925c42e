"""A checkpoint of a run in this process, with the held-out text that a report is measured on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint.choice import CheckpointChoice
from trainer.data.batches.batch import Batch
from trainer.data.batches.evaluation import batches_of_all_domains
from trainer.data.corpus import Corpus
from trainer.engine.base import Engine
from trainer.experiment import ExperimentConfig
from trainer.report.measure_layer import domain_counts
from trainer.report.measure_options import MeasureOptions
from trainer.report.routed_text import Routed, TextRows
from trainer.runs.recorded_run import RecordedRun
from trainer.training.load_trained import load_trained
from trainer.training.run_text import corpus_of_run, warn_of_other_text


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredRun:
    """A loaded checkpoint with held-out text, and what was found so far."""

    run: RecordedRun
    config: ExperimentConfig
    engine: Engine
    corpus: Corpus
    batches: Sequence[Batch]
    text: TextRows
    step: int
    warn: Callable[[str], None]

    @property
    def num_experts(self) -> int:
        """E; 0 for a dense model."""
        return 0 if self.config.model.moe is None else self.config.model.moe.num_experts

    def counts(self, routed: Routed, layer: int) -> NDArray[np.int64]:
        """Return (G, E) the assignments of a layer, counted from 0 among the MoE layers."""
        domains = len(self.text.domains)
        return domain_counts(
            routed.choices[layer], self.text.token_domain, num_domains=domains, num_experts=self.num_experts
        )


def read_checkpoint(
    run: RecordedRun, config: ExperimentConfig, options: MeasureOptions, warn: Callable[[str], None]
) -> MeasuredRun:
    """Load a checkpoint and its held-out text."""
    engine, tokenizer, checkpoint = load_trained(config, run.folder, CheckpointChoice(step=options.step), warn=warn)
    corpus = corpus_of_run(config, run.folder, tokenizer)
    warn_of_other_text(checkpoint, corpus, warn)
    budget = max(1, options.max_tokens // len(corpus.domains))
    if config.eval.max_tokens_per_domain is not None:  # then the rows are those that the run evaluates
        budget = min(budget, config.eval.max_tokens_per_domain)
    batches = list(
        batches_of_all_domains(
            corpus,
            packing=config.data.packing,
            seq_len=config.model.seq_len,
            batch_size=config.parallel.micro_batch_size,
            max_tokens=budget,
        )
    )
    return MeasuredRun(
        run=run,
        config=config,
        engine=engine,
        corpus=corpus,
        batches=batches,
        text=TextRows.of(batches, corpus.domains),
        step=checkpoint.step,
        warn=warn,
    )
