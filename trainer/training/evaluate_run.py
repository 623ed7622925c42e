"""Evaluate a run's model on held-out text and tasks, during training and by `eval`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from trainer.checkpoint.choice import CheckpointChoice
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.console.summary import RunSummary
from trainer.data.corpus import Corpus
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import Layout
from trainer.engine.base import Engine
from trainer.evaluation.context import EvalContext
from trainer.evaluation.eval_report import EvalReport, write_predictions
from trainer.evaluation.held_out import EvalResult, evaluate_held_out
from trainer.evaluation.run_summary import summarize_evaluation
from trainer.evaluation.tasks.base import Task
from trainer.evaluation.tasks.load_tasks import load_tasks
from trainer.evaluation.top_k_sweep import sweep_table
from trainer.experiment import ExperimentConfig
from trainer.models.flops import model_size
from trainer.moe.causality import evaluation_warning
from trainer.packages import importing
from trainer.routing_record.record_writer import RecordWriter, finish_record
from trainer.terminal import print_safe
from trainer.training import memory
from trainer.training.experts_picture import write_experts_picture
from trainer.training.load_trained import load_trained
from trainer.training.routing_recorder import facts_of
from trainer.training.run_text import corpus_of_run, warn_of_other_text


def evaluate_run(
    config: ExperimentConfig,
    engine: Engine,
    corpus: Corpus,
    tasks: Sequence[Task],
    mesh: Mesh,
    *,
    with_held_out: bool = True,
    record: RecordWriter | None = None,
) -> EvalReport:
    """Evaluate held-out text, with the options of the `eval` section, and tasks. Collective.

    Held-out text is evaluated a second time with the moving average of the weights, if there is one.
    `record` gets the experts of this rank's rows of held-out text.
    """
    held_out = average = None
    if with_held_out:
        held_out = _held_out(config, engine, corpus, mesh.layout, record=record)
        if engine.average is not None:
            with engine.average.in_use():
                average = _held_out(config, engine, corpus, mesh.layout)
    context = _context(config, engine, mesh)
    return EvalReport(held_out=held_out, tasks=[task.evaluate(context) for task in tasks], average=average)


def evaluate_checkpoint(
    config: ExperimentConfig,
    folder: RunFolder,
    *,
    choice: CheckpointChoice,
    only: Sequence[str] | None,
    screen: TextIO,
    record: Path | None = None,
) -> dict[str, float | str]:
    """Evaluate a checkpoint; show and return the metrics.

    The run folder gets predictions and the picture of the experts. With `only`, these tasks and no held-out text are
    evaluated. `record` is a new folder for the experts of held-out text.
    """
    console = Console(file=sys.stderr)
    engine, corpus, checkpoint = _with_text(config, folder, choice, console)
    selected = [task for task in config.eval.tasks if only is None or task.name in only]
    alone = Mesh.of_one()
    tasks = load_tasks(selected, corpus, seq_len=config.model.seq_len, world=alone.world, warn=console.warning)
    facts = writer = None
    if record is not None:
        step, domains = checkpoint.step, corpus.domains
        facts = facts_of(config, corpus.tokenizer, origin="eval", step=step, choice=choice, domains=domains)
        writer = RecordWriter(record, facts.model, vocab_size=facts.vocab_size)
    with memory.hint(config, "evaluating the model"):
        evaluation = evaluate_run(config, engine, corpus, tasks, alone, with_held_out=only is None, record=writer)
    if record is not None and facts is not None and writer is not None:
        writer.flush()
        finish_record(record, facts)
    layers, title = engine.model.config.moe_layers, f"{config.name} at {choice.said(checkpoint.step)}"
    summary = summarize_evaluation(evaluation, corpus, layers, title=title)
    written = _write_files(folder, evaluation, summary, choice, step=checkpoint.step, warn=console.warning)
    with closing(Console(file=screen)) as console:
        console.summary(replace(summary, written=written))
    signatures = {f"eval/{t.name}/{key}_signature": text for t in tasks for key, text in t.signatures.items()}
    return {**_read(choice, checkpoint), **evaluation.record(), **signatures}


def _read(choice: CheckpointChoice, checkpoint: CheckpointHandle) -> dict[str, Any]:
    """Return which weights were evaluated; the weights themselves are not named."""
    return {"step": checkpoint.step} | ({} if choice.weights == "raw" else {"weights": choice.weights})


def evaluate_top_ks(
    config: ExperimentConfig, folder: RunFolder, top_ks: Sequence[int], *, choice: CheckpointChoice, screen: TextIO
) -> dict[str, Any]:
    """Evaluate a checkpoint's held-out text at several numbers of experts per token; show and return the metrics.

    The router has the option `top_k` and allows all of `top_ks`.
    """
    engine, corpus, checkpoint = _with_text(config, folder, choice, Console(file=sys.stderr))
    records: dict[int, dict[str, float]] = {}
    with memory.hint(config, "evaluating the model"):
        for top_k in top_ks:
            size = model_size(engine.model, top_k=top_k)
            result = _held_out(config, engine, corpus, Layout(), top_k=top_k)
            records[top_k] = {"active_parameters": size.active_parameters, **result.record()}
    moe = config.model.moe
    trained = [] if moe is None else getattr(moe.router, "top_k_choices", None) or [getattr(moe.router, "top_k", 0)]
    title = f"{config.name} at {choice.said(checkpoint.step)}, held-out text"
    print_safe(f"{title}\n{sweep_table(records, trained=trained)}", file=screen)
    return {**_read(choice, checkpoint), "experts_per_token": {str(top_k): record for top_k, record in records.items()}}


def evaluate_by_lm_eval(
    config: ExperimentConfig,
    folder: RunFolder,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    limit: int | None,
    choice: CheckpointChoice,
    screen: TextIO,
) -> dict[str, Any]:
    """Evaluate a checkpoint on tasks of lm-eval, if it is installed; print its table and return its results."""
    with importing("lm_eval", user="--lm-eval"):
        from trainer.evaluation.lm_eval import LmEvalModel, run_lm_eval

    console = Console(file=sys.stderr)
    engine, tokenizer, checkpoint = load_trained(config, folder, choice, warn=console.warning)
    model = LmEvalModel(_context(config, engine, Mesh.of_one()), tokenizer)
    with memory.hint(config, "evaluating the model"):
        results, table = run_lm_eval(model, tasks, include_path=include_path, limit=limit)
    print_safe(table, file=screen)
    return {**_read(choice, checkpoint), "lm_eval": results}


def _with_text(
    config: ExperimentConfig, folder: RunFolder, choice: CheckpointChoice, console: Console
) -> tuple[Engine, Corpus, CheckpointHandle]:
    """Load a checkpoint and its text; warn about reasons not to trust a held-out loss."""
    engine, tokenizer, checkpoint = load_trained(config, folder, choice, warn=console.warning)
    with console.progress_bar("reading text") as bar:
        corpus = corpus_of_run(config, folder, tokenizer, progress=bar)
    warn_of_other_text(checkpoint, corpus, console.warning)
    if warning := evaluation_warning(engine.model.moe_layers()):
        console.warning(warning)
    return engine, corpus, checkpoint


def _held_out(
    config: ExperimentConfig,
    engine: Engine,
    corpus: Corpus,
    layout: Layout,
    *,
    top_k: int | None = None,
    record: RecordWriter | None = None,
) -> EvalResult:
    """Evaluate held-out text with the options of the `eval` section; with another `top_k` without capacity."""
    return evaluate_held_out(
        engine,
        corpus,
        packing=config.data.packing,
        batch_size=config.parallel.micro_batch_size,
        max_tokens_per_domain=config.eval.max_tokens_per_domain,
        at_capacity=config.eval.at_capacity and top_k is None,
        layout=layout,
        top_k=top_k,
        record=record,
    )


def _context(config: ExperimentConfig, engine: Engine, mesh: Mesh) -> EvalContext:
    """Build the context of tasks, with the token budget of a training micro-batch."""
    tokens_per_pass = config.parallel.micro_batch_size * config.model.seq_len
    return EvalContext(engine=engine, world=mesh.world, tp=mesh.tp, pp=mesh.pp, tokens_per_pass=tokens_per_pass)


def _write_files(
    folder: RunFolder,
    evaluation: EvalReport,
    summary: RunSummary,
    choice: CheckpointChoice,
    *,
    step: int,
    warn: Callable[[str], None],
) -> list[tuple[str, str]]:
    """Write predictions and the picture of the experts; return labels and paths of the files.

    Averaged weights have predictions of their own, and no picture: the one in the folder is of the run.
    """
    written: list[tuple[str, str]] = []
    try:
        for result in evaluation.tasks:
            path = write_predictions(folder.predictions, result, step=step, weights=choice.weights)
            if path is not None:
                written.append((result.name, str(path)))
        if choice.weights == "raw":
            written += write_experts_picture(folder, summary)
    except OSError as error:  # the metrics are still shown
        warn(f"{folder.path}: predictions and pictures are not written: {error.strerror or error}")
    return written
