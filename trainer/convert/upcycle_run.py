"""Upcycle: start a run of a mixture of experts from the weights of a trained dense run."""

import sys
from contextlib import closing
from dataclasses import asdict

from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.convert.changed_run import ChangedRun, open_text, write_changed
from trainer.convert.first_record import check_is_new
from trainer.convert.loaded_run import LoadedRun, WeightSource, load_weights, new_engine
from trainer.convert.preservation import held_out_batches, logit_difference
from trainer.convert.upcycle_plan import UpcycleOptions, plan_upcycle
from trainer.convert.upcycle_weights import upcycle_weights
from trainer.data.corpus import build_tokenizer
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig

_UNEXPECTED = "by definition they should not; are scores of the router equal but for rounding?"


def upcycle(
    dense_config: ExperimentConfig,
    dense_folder: RunFolder,
    config: ExperimentConfig,
    options: UpcycleOptions,
    *,
    step: int | None,
    allow_change: bool,
) -> ChangedRun:
    """Write the run of `config` with experts made from a dense run's checkpoint, the newest without a `step`.

    Raises:
        ConfigError: if `config` does not fit the dense run, or its folder exists.
        CheckpointError: if the checkpoint is damaged, or the new model computes something else without `allow_change`.
    """
    plan = plan_upcycle(dense_config.model, config.model, options)
    check_is_new(config)
    with closing(Console(file=sys.stderr)) as console:
        source = WeightSource.find(dense_config, dense_folder, step=step, warn=console.warning)
        dense = load_weights(source, warn=console.warning, seq_len=config.model.seq_len)
        check_same_tokenizer(dense, config)
        corpus = open_text(config, dense.tokenizer, console)
        engine = new_engine(config, dense.tokenizer, console.warning)
        upcycle_weights(dense.model, engine.model, plan, seed=config.seed)
        difference = logit_difference(dense.model, engine.model, held_out_batches(config, corpus))
        why = "; ".join(plan.reasons) or _UNEXPECTED
        said = difference.check(config.name, why, is_allowed=allow_change)
        made_from = {
            "command": "upcycle",
            **asdict(options),
            "granularity": plan.granularity,
            "factor": plan.factor,
            "largest_logit_difference": difference.largest,
        }
        return write_changed(
            config, engine, corpus, before=dense.engine, parents=[source], made_from=made_from, notes=[said]
        )


def check_same_tokenizer(run: LoadedRun, config: ExperimentConfig) -> None:
    """Refuse a config with another tokenizer than a run's. The same BPE section stands for the BPE of the run."""
    theirs, ours = run.source.config.data.tokenizer, config.data.tokenizer
    if theirs == ours:
        return
    if build_tokenizer(config.data).fingerprint != run.tokenizer.fingerprint:
        raise ConfigError(
            f"data.tokenizer: kind {ours.kind} of {config.name} gives other tokens than that of "
            f"{run.source.config.name} (kind {theirs.kind}), whose weights are used; use the same"
        )
