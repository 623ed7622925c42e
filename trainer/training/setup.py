"""The composition root: from a config to everything a run needs. The only module that knows every implementation."""

from functools import partial
from typing import Any

import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import abridged
from trainer.checkpoint.find_checkpoint import find_newest
from trainer.checkpoint.identity import identify
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import check_given, fingerprint_in_use, save_tokenizer, tokenizer_of
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.shared_fs import check_shared
from trainer.config.dump import dump
from trainer.console.console import Console
from trainer.data.batches.stream import TrainStream
from trainer.data.corpus import build_corpus
from trainer.data.token_cache.skipped import summary
from trainer.data.tokenizers.sent import of_plain, to_plain
from trainer.distributed import runtime
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.consistency import differences_across_ranks
from trainer.distributed.mesh import Mesh
from trainer.distributed.version import turnout_version
from trainer.errors import ConfigError, DataError
from trainer.evaluation.tasks.load_tasks import load_tasks
from trainer.experiment import ExperimentConfig
from trainer.metrics.profiler import Profiler
from trainer.metrics.system_stats import Machine
from trainer.models.flops import model_size
from trainer.moe.causality import evaluation_warning, training_warning
from trainer.trackers.base import JsonlTracker, PluginTracker, Tracker, Trackers
from trainer.trackers.tensorboard import TensorBoardTracker
from trainer.trackers.wandb import WandbTracker
from trainer.training import out_of_memory
from trainer.training.model import build_model, check_memory, numerics, resolve_kernel, whole_model
from trainer.training.resume import resume
from trainer.training.run import Run
from trainer.training.spikes import SpikeWindow

_PLACE: Any = {"path": True, "data_files": True}
_OF_A_HOST: Any = {
    "runs_dir": True,
    "data": {"cache_dir": True, "sources": {"__all__": _PLACE}, "tokenizer": {"path": True}},
    "eval": {"tasks": {"__all__": {"rows": _PLACE, "candidates_file": True}}},
}
"""Keys of which hosts may have their own values: a file system can be mounted anywhere. Their content is compared."""


def build_run(config: ExperimentConfig, folder: RunFolder, console: Console, mesh: Mesh, device: torch.device) -> Run:
    """Make a run, resumed from the newest undamaged checkpoint of its folder if there is one. The folder is locked.

    Rank 0 reads the text first and alone writes files.

    Raises:
        ConfigError: if the ranks were not given the same config, versions and run folder.
        DataError: if the text is unusable, not the same on all ranks, or not the one the run was started with.
        CheckpointError: if checkpoints exist and none can be used.
    """
    recorder = mesh.world.recorder
    recorder.enter("comparing ranks")
    _check_alike(config, mesh)
    check_shared(folder, mesh.world)
    if config.profile is not None:
        config.profile.check_ranks(mesh.layout.world_size)
    with raise_together(mesh.world):  # hosts may differ
        check_memory(config, mesh.layout, device)
    config = resolve_kernel(config, device)
    is_writer = mesh.layout.rank == 0
    tokenizer = corpus = None
    recorder.enter("reading text")
    with raise_together(mesh.world):
        if is_writer:
            with console.progress_bar("reading text") as bar:
                in_use = fingerprint_in_use(folder)
                tokenizer = tokenizer_of(folder, config.data, fingerprint=in_use, progress=bar)
                check_given(folder, config.data, tokenizer)
                with out_of_memory.reading_text():
                    corpus = build_corpus(config.data, tokenizer=tokenizer, progress=bar)
    sent = mesh.world.broadcast_object(None if tokenizer is None else to_plain(tokenizer))
    if corpus is None:  # what rank 0 has made of it is on the disk now
        corpus = build_corpus(config.data, tokenizer=of_plain(sent, config.data))
    different = differences_across_ranks(mesh.world, {"data": {"fingerprint": abridged(corpus.fingerprint)}})
    if different:
        raise DataError(f"{different[0]}; all ranks must read the same text (data.sources)")
    tasks = load_tasks(config.eval.tasks, corpus, seq_len=config.model.seq_len, world=mesh.world, warn=console.warning)
    recorder.enter("building the model")
    stream = TrainStream(corpus, packing=config.data.packing, seq_len=config.model.seq_len, seed=config.seed)
    size = model_size(whole_model(config, corpus.tokenizer))
    lines = None
    with raise_together(mesh.world):
        if is_writer:
            lines = JsonlTracker(folder.metrics, folder.routing, warn=console.warning)
    with out_of_memory.making_weights(config, num_parameters=size.total_parameters):
        model = build_model(config, corpus.tokenizer, mesh, device, warn=console.warning)
    if config.model.moe is not None:
        for said in (
            training_warning(config.model.moe, model.moe_layers()),
            evaluation_warning(model.moe_layers()),
        ):
            if said is not None:
                console.warning(said)
    with out_of_memory.making_optimizer(config):
        engine = config.engine.build(model, config.optim, numerics(config), mesh, folder=folder.deepspeed)
    run = Run(
        mesh=mesh,
        config=config,
        folder=folder,
        corpus=corpus,
        stream=stream,
        tasks=tasks,
        engine=engine,
        schedule=config.schedule.build(total_steps=config.train.steps),
        saver=Saver(
            CheckpointFolder(folder.checkpoints, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every),
            mesh,
            copies=config.checkpoint.asynchronous,
        ),
        console=console,
        trackers=Trackers([] if lines is None else [lines]),
        logs=lines,
        machine=Machine(folder.path, device),
        profiler=Profiler(config.profile, folder.profile, mesh, device, say=console.message, warn=console.warning),
        size=size,
        spikes=SpikeWindow(
            sigmas=config.train.spikes.sigmas,
            size=config.train.spikes.window,
            patience=config.train.max_consecutive_skips,
        ),
    )
    recorder.enter("finding a checkpoint")
    with raise_together(mesh.world):
        if is_writer:
            run.saver.folder.clean()
    found = find_newest(run.saver.folder, mesh.world, warn=console.warning)
    if found is not None:
        with raise_together(mesh.world), out_of_memory.reading_checkpoint(config):
            resume(run, found)
    has_no_logs = False
    recorder.enter("writing the run folder")
    with raise_together(mesh.world):
        if is_writer:
            save_tokenizer(folder, corpus.tokenizer)
            identity = identify(
                folder,
                name=config.name,
                found=None if found is None else found.run,
                step=run.start_step,
            )
            run.id, run.parent = identity.id, identity.parent
            # A branch by a checkpoint alone: the lines that this remembers are in the folder that it was copied from.
            has_no_logs = identity.said is not None and not folder.metrics.stat().st_size
            if identity.said is not None:
                console.warning(identity.said)
            folder.write(folder.config, dump(config))
            run.list_skipped_rows()
            for remark in corpus.remarks:
                console.message(remark)
            if corpus.skipped:
                console.warning(f"{summary(corpus.skipped)}: {folder.skipped_rows}")
            recorder.enter("recording the environment")
            folder.write_environment(
                {
                    **runtime.environment_info(),
                    "device": str(device),
                    "world_size": mesh.layout.world_size,
                    "data_fingerprint": corpus.fingerprint,
                    "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
                    "tasks": {task.name: {"fingerprint": task.fingerprint, **task.signatures} for task in tasks},
                }
            )
    recorder.enter("resuming the logs")
    if lines is not None:
        lines.resume_at(run.start_step, None if found is None or has_no_logs else found.run.get("logs"))
    return run


def track(run: Run) -> Trackers:
    """Let everybody who was asked to keep records beside metrics.jsonl begin; return all of them, to be closed."""
    config, others = run.config.metrics, list[Tracker]()
    if run.mesh.layout.rank != 0:
        return run.trackers
    if config.tensorboard:
        others.append(
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
        others.append(
            WandbTracker(
                config,
                folder=run.folder.path,
                run_id=run.id,
                name=run.config.name,
                start_step=run.start_step,
                moe_layers=run.config.model.moe_layers,
                described={
                    **run.config.model_dump(mode="json"),
                    "layout": run.layout(),
                    "parameters": size,
                    **({} if run.parent is None else {"parent": run.parent_record()}),
                },
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
        others.append(PluginTracker(section.kind, build, warn=run.console.warning))
    run.trackers.add(others)
    return run.trackers


def _check_alike(config: ExperimentConfig, mesh: Mesh) -> None:
    """Compare what the ranks were started with, before `experts_kernel: auto` becomes what is best on each host.

    Raises:
        ConfigError: with each key that differs, its values and who has them.
    """
    versions = {"turnout": turnout_version(), "torch": torch.__version__}
    values = {"version": versions, **config.model_dump(exclude=_OF_A_HOST)}
    different = differences_across_ranks(mesh.world, values)
    if different:
        raise ConfigError("\n".join(f"{line}; all ranks need the same config and versions" for line in different))
