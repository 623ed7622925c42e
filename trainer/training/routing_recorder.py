"""Record the experts of a training run, and open the record that it replays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from trainer.checkpoint.choice import NEWEST, CheckpointChoice
from trainer.checkpoint.identity import recorded_id
from trainer.checkpoint.run_folder import RunFolder
from trainer.data.batches.batch import Batch
from trainer.data.corpus import Corpus
from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.models.generation import ReadTokens
from trainer.parallel.shared_rows import SharedRows
from trainer.routing_record.record_batches import record_rows
from trainer.routing_record.record_manifest import ModelFacts, Origin, RecordFacts, TrainedRows
from trainer.routing_record.record_reader import RoutingRecord
from trainer.routing_record.record_writer import (
    RecordWriter,
    RoutedSequence,
    claim_record_folder,
    finish_record,
    keep_recorded_steps,
)
from trainer.routing_record.replayed_rows import ReplayedRows, check_same_model
from trainer.routing_record.sequence_rows import RecordedSequences


class RoutingRecorder:
    """Records the experts of this rank's rows, in files that end where checkpoints are saved."""

    def __init__(self, folder: Path, run: RunFolder, facts: RecordFacts, mesh: Mesh, *, every: int) -> None:
        self._folder, self._run, self._facts, self._mesh, self._every = folder, run, facts, mesh, every
        self._shared = SharedRows(mesh.rows)
        rank = mesh.layout.rank
        self._writer = RecordWriter(folder, facts.model, vocab_size=facts.vocab_size, rank=rank)

    @classmethod
    def of(cls, config: ExperimentConfig, folder: RunFolder, corpus: Corpus, mesh: Mesh) -> "RoutingRecorder | None":
        """Return the recorder that a config asks for; None: it asks for none."""
        section = config.metrics.routing_record
        if section is None:
            return None
        path = folder.routing_record if section.path is None else Path(section.path)
        facts = facts_of(config, corpus.tokenizer, origin="train", domains=corpus.domains)
        facts = facts.model_copy(update={"rows": trained_rows(config, corpus)})
        return cls(path, folder, facts, mesh, every=section.every)

    def begin(self, start_step: int) -> None:
        """Remove what was recorded after the step that the run goes on from. Collective.

        Raises:
            ConfigError: if another run records into the folder.
        """
        with raise_together(self._mesh.world):
            if self._mesh.layout.rank == 0:
                is_in_run = self._folder.absolute() == self._run.routing_record.absolute()
                claim_record_folder(self._folder, recorded_id(self._run) or "", is_in_run=is_in_run)
                keep_recorded_steps(self._folder, up_to=start_step)

    def is_due(self, done: int) -> bool:
        """Return whether the step that makes `done` completed ones is recorded."""
        return done % self._every == 0

    def add(self, done: int, batches: Sequence[Batch], experts: Sequence[Tensor]) -> None:
        """Record a step's micro-batches and their experts (B, S, L, k). Collective; waits for the device."""
        self._writer.step = done
        if self._mesh.rows.size > 1:  # the first of the ranks that share rows records them
            experts = [self._shared.whole(chosen) for chosen in experts]
            batches = [self._shared.whole_batch(batch) for batch in batches]
        with raise_together(self._mesh.world):
            for batch, chosen in zip(batches, experts, strict=True):
                if self._mesh.rows.index == 0:
                    record_rows(self._writer, batch, chosen)

    def flush(self) -> None:
        """Write what is recorded so far. Collective."""
        with raise_together(self._mesh.world):
            self._writer.flush()

    def finish(self) -> None:
        """Make the folder a complete record. Collective."""
        self.flush()
        with raise_together(self._mesh.world):
            if self._mesh.layout.rank == 0:
                finish_record(self._folder, self._facts)


def open_replay(config: ExperimentConfig, corpus: Corpus, world: Group) -> ReplayedRows | RecordedSequences | None:
    """Open the record that a config replays; None: it replays none. Collective; rank 0 verifies the hashes.

    Raises:
        DataError: if the record is damaged, or of another model, tokenizer or text.
    """
    section = config.train.routing_replay
    if section is None:
        return None
    opened: list[ReplayedRows | RecordedSequences] = []
    with raise_together(world):
        record = RoutingRecord(Path(section.path), verify=world.index == 0)
        tokenizer = corpus.tokenizer
        check_same_model(
            record,
            ModelFacts.of(config.model),
            tokenizer=tokenizer.fingerprint,
            vocab_size=config.model.vocab_size or tokenizer.vocab_size,
        )
        if section.rows == "recorded":
            opened.append(ReplayedRows(record, trained_rows(config, corpus)))
        else:
            opened.append(RecordedSequences(record, seq_len=config.model.seq_len, seed=config.seed))
    return opened[0]


def trained_rows(config: ExperimentConfig, corpus: Corpus) -> TrainedRows:
    """Return what the training rows of a run depend on."""
    section = config.metrics.routing_record
    return TrainedRows(
        seed=config.seed,
        seq_len=config.model.seq_len,
        packing=config.data.packing,
        data_fingerprint=corpus.fingerprint,
        every=1 if section is None else section.every,
    )


def facts_of(
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    *,
    origin: Origin,
    step: int | None = None,
    choice: CheckpointChoice = NEWEST,
    domains: Sequence[str] = (),
) -> RecordFacts:
    """Return the facts of a record of a run's model, at a step if it is trained, of the chosen weights."""
    return RecordFacts(
        origin=origin,
        made_by=config.name if step is None else f"{config.name} at {choice.said(step)}",
        model=ModelFacts.of(config.model),
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        domains=list(domains),
    )


def sequence_of(read: ReadTokens, number: int) -> RoutedSequence:
    """Return tokens that were generated, and read, as a sequence; those that were written here are learned."""
    return RoutedSequence(
        tokens=np.array(read.tokens, np.int64),
        experts=read.experts.numpy(),
        is_learned=np.arange(len(read.tokens)) >= read.num_given,
        sample_id=number,
    )
