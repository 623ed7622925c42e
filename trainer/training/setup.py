"""The composition root: build everything that a run needs from its config. The only module with all implementations."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import abridged
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find_newest
from trainer.checkpoint.identity import identify
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import check_given, fingerprint_in_use, save_tokenizer, tokenizer_of
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.shared_fs import check_shared
from trainer.config.build_plugin import build_plugin
from trainer.config.dump import dump
from trainer.console.console import Console
from trainer.data.batches.copy_ahead import CopyAhead
from trainer.data.batches.stream import TrainStream
from trainer.data.broadcast_tokenizer import tokenizer_from_plain, tokenizer_to_plain
from trainer.data.corpus import Corpus
from trainer.data.token_cache.skipped import summarize_skipped
from trainer.distributed import runtime
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.consistency import differences_across_ranks
from trainer.distributed.mesh import Mesh
from trainer.distributed.version import turnout_version
from trainer.errors import ConfigError, DataError
from trainer.evaluation.tasks.base import Task
from trainer.evaluation.tasks.load_tasks import load_tasks
from trainer.experiment import ExperimentConfig
from trainer.metrics.profiler import Profiler
from trainer.metrics.system_stats import SystemStats
from trainer.models.flops import model_size
from trainer.models.freeze import frozen_router_warning
from trainer.moe.causality import evaluation_warning, training_warning
from trainer.parallel.expert_placement import ExpertPlacement
from trainer.parallel.pipeline_stages import check_micro_batches
from trainer.routing_record.replayed_rows import ReplayedRows
from trainer.routing_record.sequence_rows import RecordedSequences
from trainer.trackers.base import JsonlTracker, Trackers
from trainer.training import memory
from trainer.training.best_so_far import BestSoFar
from trainer.training.early_stopping import EarlyStopping
from trainer.training.first_weights import FirstWeights, save_first_weights
from trainer.training.model import build_parallel_model, check_kernel, meta_model, numerics, resolve_kernel
from trainer.training.place_experts import place_experts
from trainer.training.resume import check_best, resume
from trainer.training.routing_recorder import RoutingRecorder, open_replay
from trainer.training.run import RunState
from trainer.training.run_template import MIXED_CONVERSATIONS, save_template
from trainer.training.run_text import corpus_of_run
from trainer.training.spikes import SpikeWindow
from trainer.training.watch_alarms import AlarmWatch

_PATHS: Any = {"path": True, "data_files": True}
_HOST_SPECIFIC: Any = {
    "runs_dir": True,
    "init_from": {"run": True, "checkpoint": True, "hf": True},
    "data": {"cache_dir": True, "sources": {"__all__": _PATHS}, "tokenizer": {"path": True}},
    "eval": {"tasks": {"__all__": {"rows": _PATHS, "candidates_file": True}}},
}
"""Keys that may differ between hosts, which may mount a file system elsewhere. The files' content is compared."""


def build_run(
    config: ExperimentConfig,
    folder: RunFolder,
    console: Console,
    mesh: Mesh,
    device: torch.device,
    *,
    first_weights: FirstWeights | None = None,
) -> RunState:
    """Build a run, resumed from the newest intact checkpoint of its folder if there is one. Collective.

    The folder is locked. Rank 0 reads the text first, and only rank 0 writes files. `first_weights` are what the
    config's `init_from` names, on rank 0.

    Raises:
        ConfigError: if ranks have different configs, versions or run folders.
        DataError: if the text is unusable, differs between ranks, or is not the one the run was started with.
        CheckpointError: if there are checkpoints and none can be used.
        ResourceError: if the model cannot fit.
    """
    recorder = mesh.world.recorder
    recorder.enter("comparing ranks")
    check_ranks(config, folder, mesh, device)
    recorder.enter("checking the experts kernel")
    config, canary = check_kernel(resolve_kernel(config, device), mesh, device, warn=console.warning)
    recorder.enter("reading text")
    corpus, tasks = open_data(config, folder, console, mesh)
    recorder.enter("placing the experts")
    placed = place_experts(config, checkpoint_folder(config, folder), mesh, warn=console.warning)
    recorder.enter("building the model")
    run = build_model_and_engine(
        config, folder, console, mesh, device, corpus=corpus, tasks=tasks, placement=placed.placement
    )
    run.canary = canary
    recorder.enter("finding a checkpoint")
    checkpoint = resume_newest(run, first_weights, found=placed.checkpoint)
    if placed.said is not None:
        console.message(placed.said)
    recorder.enter("writing the run folder")
    write_run_folder(run, checkpoint, device)
    return run


def checkpoint_folder(config: ExperimentConfig, folder: RunFolder) -> CheckpointFolder:
    """Return the folder of a run's checkpoints, with what it keeps."""
    return CheckpointFolder(folder.checkpoints, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)


def check_ranks(config: ExperimentConfig, folder: RunFolder, mesh: Mesh, device: torch.device) -> None:
    """Stage 1: check that all ranks have the same config, versions and run folder, and enough memory.

    Runs before `experts_kernel: auto` is resolved, which may differ between hosts.
    """
    versions = {"turnout": turnout_version(), "torch": torch.__version__}
    values = {"version": versions, **config.model_dump(exclude=_HOST_SPECIFIC)}
    if different := differences_across_ranks(mesh.world, values):
        raise ConfigError("\n".join(f"{line}; all ranks need the same config and versions" for line in different))
    check_shared(folder, mesh.world)
    rows = -(-config.train.global_batch_size // mesh.layout.data_size)
    number = -(-rows // config.parallel.micro_batch_size)
    check_micro_batches(mesh.layout, number, at_once=config.parallel.at_once)
    if config.profile is not None:
        config.profile.check_ranks(mesh.layout.world_size)
    with raise_together(mesh.world):  # hosts may have different memory
        memory.check_memory(config, mesh.layout, device)


def open_data(config: ExperimentConfig, folder: RunFolder, console: Console, mesh: Mesh) -> tuple[Corpus, list[Task]]:
    """Stage 2: tokenize the text on rank 0, open it on all ranks, and read the evaluation tasks."""
    tokenizer = corpus = None
    with raise_together(mesh.world):
        if mesh.layout.rank == 0:
            with console.progress_bar("reading text") as bar:
                in_use = fingerprint_in_use(folder)
                tokenizer = tokenizer_of(folder, config.data, fingerprint=in_use, progress=bar)
                check_given(folder, config.data, tokenizer)
                with memory.hint(config, "reading text"):
                    corpus = corpus_of_run(config, folder, tokenizer, progress=bar)
    sent = mesh.world.broadcast_object(None if tokenizer is None else tokenizer_to_plain(tokenizer))
    if corpus is None:  # rank 0 has filled the token cache
        corpus = corpus_of_run(config, folder, tokenizer_from_plain(sent, config.data))
    if different := differences_across_ranks(mesh.world, {"data": {"fingerprint": abridged(corpus.fingerprint)}}):
        raise DataError(f"{different[0]}; all ranks must read the same text (data.sources)")
    tasks = load_tasks(config.eval.tasks, corpus, seq_len=config.model.seq_len, world=mesh.world, warn=console.warning)
    return corpus, tasks


def build_model_and_engine(
    config: ExperimentConfig,
    folder: RunFolder,
    console: Console,
    mesh: Mesh,
    device: torch.device,
    *,
    corpus: Corpus,
    tasks: Sequence[Task],
    placement: ExpertPlacement | None = None,
) -> RunState:
    """Stage 3: build the model with initial values, its engine, and the run around them."""
    size = model_size(meta_model(config, corpus.tokenizer.vocab_size))
    logs = None
    with raise_together(mesh.world):
        if mesh.layout.rank == 0:
            alarms = None if config.metrics.alarms is None else folder.alarms
            logs = JsonlTracker(folder.metrics, folder.routing, alarms=alarms, warn=console.warning)
    with memory.hint(config, "making the weights", note=f" ({size.total_parameters / 1e6:.1f}M parameters in all)"):
        model = build_parallel_model(config, corpus.tokenizer, mesh, device, warn=console.warning, placement=placement)
    if config.model.moe is not None:
        moe, layers = config.model.moe, model.moe_layers()
        warnings = training_warning(moe, layers), evaluation_warning(layers), frozen_router_warning(model)
        for warning in filter(None, warnings):
            console.warning(warning)
    with memory.hint(config, "making the optimizer state, two numbers per weight"):
        engine = config.engine.build(
            model,
            config.optim,
            numerics(config),
            mesh,
            folder=folder.deepspeed,
        )
    spikes, replay = config.train.spikes, open_replay(config, corpus, mesh.world)
    schedule = build_plugin(config.schedule, Callable, "schedule", total_steps=config.train.steps)  # type: ignore[arg-type]
    return RunState(
        mesh=mesh,
        config=config,
        folder=folder,
        corpus=corpus,
        stream=TrainStream(
            corpus,
            packing=config.data.packing,
            seq_len=config.model.seq_len,
            seed=config.seed,
            instead=replay if isinstance(replay, RecordedSequences) else None,
        ),
        tasks=tasks,
        engine=engine,
        schedule=schedule,
        saver=Saver(checkpoint_folder(config, folder), mesh, copies=config.checkpoint.asynchronous),
        console=console,
        trackers=Trackers([] if logs is None else [logs]),
        logs=logs,
        machine=SystemStats(folder.path, device),
        profiler=Profiler(config.profile, folder.profile, mesh, device, say=console.message, warn=console.warning),
        size=size,
        spikes=SpikeWindow(sigmas=spikes.sigmas, size=spikes.window, patience=config.train.max_consecutive_skips),
        best=BestSoFar(config.checkpoint.best_metric),
        early_stopping=EarlyStopping(config.train.early_stopping),
        ahead=CopyAhead.to_device(device),
        watch=AlarmWatch.of(config, model, logs),
        recorder=RoutingRecorder.of(config, folder, corpus, mesh),
        replayed=replay if isinstance(replay, ReplayedRows) else None,
    )


def resume_newest(
    run: RunState, first_weights: FirstWeights | None = None, *, found: CheckpointHandle | None = None
) -> CheckpointHandle | None:
    """Stage 4: load the newest intact checkpoint of the run folder, if there is one, and return it.

    A run with `init_from` has one from its beginning: that of step 0, which is written here. `found` is the newest one,
    if it was verified before.
    """
    world = run.mesh.world
    with raise_together(world):
        if run.mesh.layout.rank == 0:
            run.saver.folder.clean()
    checkpoint = found or find_newest(run.saver.folder, world, warn=run.console.warning)
    if checkpoint is None and run.config.init_from is not None:
        checkpoint = save_first_weights(run, first_weights)
    if checkpoint is not None:
        with raise_together(world), memory.hint(run.config, "reading a checkpoint"):
            resume(run, checkpoint)
        check_best(run)
    return checkpoint


def write_run_folder(run: RunState, checkpoint: CheckpointHandle | None, device: torch.device) -> None:
    """Stage 5: write config, tokenizer, run id and environment, and truncate the logs to the resumed step."""
    folder, corpus, recorder = run.folder, run.corpus, run.mesh.world.recorder
    has_no_logs = False
    with raise_together(run.mesh.world):
        if run.mesh.layout.rank == 0:
            save_tokenizer(folder, corpus.tokenizer)
            save_template(run.config, folder, corpus.tokenizer)
            metadata = None if checkpoint is None else checkpoint.run
            identity = identify(folder, name=run.config.name, found=metadata, step=run.start_step)
            run.id, run.parent = identity.id, identity.parent
            # A branch from a copied checkpoint: the logs that it refers to are in the other run's folder.
            has_no_logs = identity.said is not None and not folder.metrics.stat().st_size
            if identity.said is not None:
                run.console.warning(identity.said)
            folder.write(folder.config, dump(run.config))
            run.write_skipped_rows()
            if run.config.data.has_chats and not run.config.model.document_mask:
                run.console.warning(MIXED_CONVERSATIONS)
            for remark in corpus.remarks:
                run.console.message(remark)
            if corpus.skipped:
                run.console.warning(f"{summarize_skipped(corpus.skipped)}: {folder.skipped_rows}")
            recorder.enter("recording the environment")
            folder.write_environment(
                {
                    **runtime.environment_info(),
                    "device": str(device),
                    "experts": None if run.canary is None else asdict(run.canary),
                    "world_size": run.mesh.layout.world_size,
                    "model_size": asdict(run.size),
                    "data_fingerprint": corpus.fingerprint,
                    "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
                    "tasks": {task.name: {"fingerprint": task.fingerprint, **task.signatures} for task in run.tasks},
                }
            )
    if run.recorder is not None:
        recorder.enter("resuming the routing record")
        run.recorder.begin(run.start_step)
    recorder.enter("resuming the logs")
    if run.logs is not None:
        positions = None if checkpoint is None or has_no_logs else checkpoint.run.get("logs")
        run.logs.resume_at(run.start_step, positions)
