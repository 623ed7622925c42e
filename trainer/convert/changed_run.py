"""The end of every conversion: loss before and after on held-out text, then the new run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.console.console import Console
from trainer.convert.loaded_run import WeightSource
from trainer.convert.new_run import NewRun
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine
from trainer.experiment import ExperimentConfig
from trainer.training import memory
from trainer.training.evaluate_run import evaluate_run


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedRun:
    """A new run, made from others, and what the change did."""

    path: Path
    """Its first checkpoint."""
    loss_before: float
    """Loss of the first parent, on the new run's held-out text, in nats per target token."""
    loss_after: float
    notes: Sequence[str]
    """Lines about the change and its measurements."""


def open_text(config: ExperimentConfig, tokenizer: Tokenizer, console: Console) -> Corpus:
    """Return the text of a config as tokens of a given tokenizer."""
    with console.progress_bar("reading text") as bar, memory.hint(config, "reading text"):
        return build_corpus(config.data, tokenizer=tokenizer, seq_len=config.model.seq_len, progress=bar)


def held_out_loss(config: ExperimentConfig, engine: Engine, corpus: Corpus) -> float:
    """Return the loss on held-out text, with the options of the `eval` section."""
    with memory.hint(config, "evaluating the model"):
        return evaluate_run(config, engine, corpus, [], Mesh.of_one()).record()["eval/loss"]


def write_changed(
    config: ExperimentConfig,
    engine: Engine,
    corpus: Corpus,
    *,
    before: Engine,
    parents: Sequence[WeightSource],
    made_from: dict[str, Any],
    notes: Sequence[str],
) -> ChangedRun:
    """Measure the loss `before`, of the first parent, and after; write the run with both in its record."""
    loss_before, loss_after = (held_out_loss(config, e, corpus) for e in (before, engine))
    of = [parent for source in parents if (parent := source.as_parent()) is not None]
    record = {
        **made_from,
        "parents": [asdict(parent) for parent in of],
        "loss_before": loss_before,
        "loss_after": loss_after,
        "notes": list(notes),
    }
    new = NewRun(config=config, engine=engine, corpus=corpus, parent=of[0] if of else None, made_from=record)
    return ChangedRun(path=new.write(), loss_before=loss_before, loss_after=loss_after, notes=notes)
