"""Surgery: start a run from the weights of another one, whose experts are changed, or from an average of several."""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.convert.average_weights import average_weights
from trainer.convert.change_experts import change_experts
from trainer.convert.changed_run import ChangedRun, open_text, write_changed
from trainer.convert.first_record import check_is_new
from trainer.convert.gone_weights import without_gone_weights
from trainer.convert.layer_traces import trace_layers, training_text
from trainer.convert.loaded_run import WeightSource, load_weights, new_engine
from trainer.convert.merge_adapters import merge_adapters
from trainer.convert.preservation import held_out_batches, logit_difference
from trainer.convert.surgery_plan import AverageRuns, MergeAdapters, SplitExperts, Surgery
from trainer.experiment import ExperimentConfig

_ROUNDED = "sums of weights and adapters were rounded more than that"
_TOGETHER = "the two take more than one of a token's top_k places, or more of the sum of its scores"


def operate(
    runs: Sequence[tuple[RunFolder, int | None]],
    old_config: ExperimentConfig,
    config: ExperimentConfig,
    surgery: Surgery,
    *,
    num_tokens: int,
    allow_change: bool,
) -> ChangedRun:
    """Write the run of `config` from checkpoints of others; all but an average take one.

    Experts are compared on `num_tokens` of training text, losses on held-out text.

    Args:
        runs: folder of each, and the step of its checkpoint; None: the newest. The loss before is that of the newest
            of the first folder.
        old_config: of the first run; the others have the same model.
        config: of the new run.
        surgery: the operation.
        num_tokens: of the text on which experts are compared.
        allow_change: write the run although an operation that should preserve the model does not.

    Raises:
        ConfigError: if the folder of `config` exists.
        CheckpointError: if a checkpoint is damaged or of another model, or the model is not preserved.
    """
    check_is_new(config)
    with closing(Console(file=sys.stderr)) as console:
        sources = [WeightSource.find(old_config, folder, step=step, warn=console.warning) for folder, step in runs]
        newest = max((s for s in sources if s.folder is runs[0][0]), key=lambda source: source.checkpoint.step)
        run = load_weights(newest, warn=console.warning)
        config, gone = without_gone_weights(config, run.model)
        corpus = open_text(config, run.tokenizer, console)
        engine = new_engine(config, run.tokenizer, console.warning)
        if isinstance(surgery, AverageRuns):
            notes = average_weights(sources, engine.model, surgery.shares(len(sources)))
        elif isinstance(surgery, MergeAdapters):
            notes = merge_adapters(run.model, engine.model)
        else:
            traces = trace_layers(run.model, training_text(config, corpus, num_tokens))
            by_layer = dict(zip(old_config.model.moe_layers, traces, strict=True))
            notes = change_experts(run.model, engine.model, surgery, by_layer, seed=config.seed)
        if isinstance(surgery, SplitExperts | MergeAdapters):
            difference = logit_difference(run.model, engine.model, held_out_batches(config, corpus))
            reason = _TOGETHER if isinstance(surgery, SplitExperts) else _ROUNDED
            notes = [*notes, difference.check(config.name, reason, is_allowed=allow_change)]
        parents = [newest, *(source for source in sources if source is not newest)]
        made_from = {"command": f"surgery {surgery.verb}", "options": asdict(surgery), "tokens": num_tokens}
        return write_changed(
            config, engine, corpus, before=run.engine, parents=parents, made_from=made_from, notes=[*notes, *gone]
        )
