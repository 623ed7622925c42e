"""Start the trackers that a config asks for, in addition to metrics.jsonl."""

from functools import partial

from trainer.checkpoint.ancestors import ancestors
from trainer.config.dump import dump
from trainer.trackers.base import PluginTracker, Tracker, Trackers
from trainer.trackers.tensorboard import TensorBoardTracker
from trainer.trackers.wandb import WandbTracker
from trainer.training.run import RunState


def start_trackers(run: RunState) -> Trackers:
    """Start TensorBoard, wandb and plug-in trackers on rank 0; return all trackers, for the caller to close."""
    config, started = run.config.metrics, list[Tracker]()
    if run.mesh.layout.rank != 0:
        return run.trackers
    if config.tensorboard:
        started.append(
            TensorBoardTracker(
                run.folder.tensorboard,
                start_step=run.start_step,
                heatmap_every=config.heatmap_every,
                moe_layers=run.config.model.moe_layers,
                config_text=dump(run.config),
                warn=run.console.warning,
            )
        )
    if config.wandb.mode != "disabled":
        size = {"total": run.size.total_parameters, "active": run.size.active_parameters}
        size["learning"] = run.size.learning_parameters
        recorded = {**run.config.model_dump(mode="json"), "layout": run.layout_record(), "parameters": size}
        if run.parent is not None:
            recorded["parent"] = run.parent_record()
        if chain := ancestors(run.folder, run.parent):
            recorded["ancestors"] = [ancestor.record() for ancestor in chain]
        labels = config.wandb.model_dump(mode="json", exclude={"mode"}) | {"name": config.wandb.name or run.config.name}
        started.append(
            WandbTracker(
                run.folder.path,
                mode=config.wandb.mode,
                run_id=run.id,
                start_step=run.start_step,
                heatmap_every=config.heatmap_every,
                moe_layers=run.config.model.moe_layers,
                labels=labels,
                config=recorded,
                say=run.console.message,
                warn=run.console.warning,
            )
        )
    for section in config.trackers:
        build = partial(
            section.build,  # type: ignore[attr-defined] - every plug-in has it
            run.folder.path,
            start_step=run.start_step,
            config=run.config.model_dump(mode="json"),
        )
        started.append(PluginTracker(section.kind, build, warn=run.console.warning))
    run.trackers.add(started)
    return run.trackers
