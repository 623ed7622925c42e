"""Evaluate a run's model on held-out text and tasks, during training and by `eval`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from trainer.atomic_io import replace_file
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.console.expert_map_svg import expert_map_svg
from trainer.console.summary import RunSummary
from trainer.data.corpus import Corpus, build_corpus
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine
from trainer.evaluation.context import EvalContext
from trainer.evaluation.eval_report import EvalReport, write_predictions
from trainer.evaluation.held_out import evaluate_held_out
from trainer.evaluation.run_summary import summarize_evaluation
from trainer.evaluation.tasks.base import Task
from trainer.evaluation.tasks.load_tasks import load_tasks
from trainer.evaluation.top_k_sweep import sweep_table, sweep_top_k
from trainer.experiment import ExperimentConfig
from trainer.moe.causality import evaluation_warning
from trainer.packages import importing
from trainer.terminal import print_safe
from trainer.training import out_of_memory
from trainer.training.resume import load_trained


def examine(
    config: ExperimentConfig,
    engine: Engine,
    corpus: Corpus,
    tasks: Sequence[Task],
    mesh: Mesh,
    *,
    with_held_out: bool = True,
) -> EvalReport:
    """Evaluate held-out text as the `eval` section says, and these tasks, spread over all ranks."""
    held_out = None
    if with_held_out:
        held_out = evaluate_held_out(
            engine,
            corpus,
            packing=config.data.packing,
            batch_size=config.parallel.micro_batch_size,
            max_tokens_per_domain=config.eval.max_tokens_per_domain,
            at_capacity=config.eval.at_capacity,
            layout=mesh.layout,
        )
    subject = _subject(config, engine, mesh)
    return EvalReport(held_out=held_out, tasks=[task.evaluate(subject) for task in tasks])


def evaluate_checkpoint(
    config: ExperimentConfig, folder: RunFolder, *, step: int | None, only: Sequence[str] | None, screen: TextIO
) -> dict[str, float | str]:
    """Evaluate a checkpoint as the `eval` section says, show it on `screen` and return its numbers.

    Args:
        config: of the run.
        folder: where its checkpoints are; gets predictions, and the picture of its experts.
        step: which checkpoint; None: the newest.
        only: evaluate only these tasks, and no held-out text; None: everything.
        screen: where to show it.
    """
    console = Console(file=sys.stderr)
    engine, corpus, found = _with_text(config, folder, step, console)
    chosen = [task for task in config.eval.tasks if only is None or task.name in only]
    alone = Mesh.of_one()
    tasks = load_tasks(chosen, corpus, seq_len=config.model.seq_len, world=alone.world, warn=console.warning)
    with out_of_memory.evaluating(config):
        examination = examine(config, engine, corpus, tasks, alone, with_held_out=only is None)
    layers, title = engine.model.config.moe_layers, f"{config.name} at step {found.step}"
    summary = summarize_evaluation(examination, corpus, layers, title=title)
    written = _write_findings(folder, examination, summary, step=found.step, warn=console.warning)
    with closing(Console(file=screen)) as shown:
        shown.summary(replace(summary, written=written))
    signatures = {f"eval/{t.name}/{key}_signature": text for t in tasks for key, text in t.signatures.items()}
    return {"step": found.step, **examination.record(), **signatures}


def evaluate_top_ks(
    config: ExperimentConfig, folder: RunFolder, top_ks: Sequence[int], *, step: int | None, screen: TextIO
) -> dict[str, Any]:
    """Evaluate a checkpoint's held-out text at several numbers of experts for a token; show and return the numbers.

    Args:
        config: of a run whose router has the option `top_k`.
        folder: where its checkpoints are.
        top_ks: numbers that the router can give.
        step: which checkpoint; None: the newest.
        screen: where to show it.
    """
    engine, corpus, found = _with_text(config, folder, step, Console(file=sys.stderr))
    with out_of_memory.evaluating(config):
        results = sweep_top_k(
            engine,
            corpus,
            top_ks,
            packing=config.data.packing,
            batch_size=config.parallel.micro_batch_size,
            max_tokens_per_domain=config.eval.max_tokens_per_domain,
        )
    moe = config.model.moe
    trained = [] if moe is None else getattr(moe.router, "top_k_choices", None) or [getattr(moe.router, "top_k", 0)]
    print_safe(
        f"{config.name} at step {found.step}, held-out text\n{sweep_table(results, trained=trained)}", file=screen
    )
    return {"step": found.step, "experts_per_token": {str(at.top_k): at.record() for at in results}}


def evaluate_by_lm_eval(
    config: ExperimentConfig,
    folder: RunFolder,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    limit: int | None,
    step: int | None,
    screen: TextIO,
) -> dict[str, Any]:
    """Evaluate a checkpoint on tasks of lm-eval, show its table on `screen` and return its numbers.

    Raises:
        ConfigError: if lm-eval is not installed, or does not know a task.
    """
    with importing("lm_eval", user="--lm-eval"):
        from trainer.evaluation.lm_eval import LmEvalModel, run_lm_eval

    console = Console(file=sys.stderr)
    engine, tokenizer, found = load_trained(config, folder, step=step, warn=console.warning)
    model = LmEvalModel(_subject(config, engine, Mesh.of_one()), tokenizer)
    with out_of_memory.evaluating(config):
        results, table = run_lm_eval(model, tasks, include_path=include_path, limit=limit)
    print_safe(table, file=screen)
    return {"step": found.step, "lm_eval": results}


def _with_text(
    config: ExperimentConfig, folder: RunFolder, step: int | None, console: Console
) -> tuple[Engine, Corpus, CheckpointHandle]:
    """Load a checkpoint and the text of its config; say what keeps a held-out loss from being trusted."""
    engine, tokenizer, found = load_trained(config, folder, step=step, warn=console.warning)
    with console.progress_bar("reading text") as bar:
        corpus = build_corpus(config.data, tokenizer=tokenizer, progress=bar)
    if found.run["data_fingerprint"] != corpus.fingerprint:
        console.warning(
            "this is not the text the run was trained on: some of what is held out now may have been learned"
        )
    if said := evaluation_warning(engine.model.moe_layers()):
        console.warning(said)
    return engine, corpus, found


def _subject(config: ExperimentConfig, engine: Engine, mesh: Mesh) -> EvalContext:
    """Return who is asked; a forward pass may cost what one of training does."""
    tokens_per_pass = config.parallel.micro_batch_size * config.model.seq_len
    return EvalContext(engine=engine, world=mesh.world, tokens_per_pass=tokens_per_pass)


def _write_findings(
    folder: RunFolder, examination: EvalReport, summary: RunSummary, *, step: int, warn: Callable[[str], None]
) -> list[tuple[str, str]]:
    """Write predictions and the picture of the experts; return what was written, by label."""
    written: list[tuple[str, str]] = []
    try:
        for result in examination.tasks:
            path = write_predictions(folder.predictions, result, step=step)
            if path is not None:
                written.append((result.name, str(path)))
        if summary.experts is not None:
            experts, title = summary.experts, f"{summary.title}: experts by domain"
            picture = expert_map_svg(experts.counts, experts.domains, experts.layer_names, title=title)
            replace_file(folder.experts_picture, picture)
            written.append(("experts", str(folder.experts_picture)))
    except OSError as error:  # the numbers are what was asked for
        warn(f"{folder.path}: predictions and pictures are not written: {error.strerror or error}")
    return written
