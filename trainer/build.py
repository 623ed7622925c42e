"""The composition root: from a config to everything a run needs. The only module that knows every implementation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from trainer import faults
from trainer.checkpoint.catalogue import layout_of
from trainer.checkpoint.compatible import abridged, check_fits, check_model, check_record, check_tokenizer
from trainer.checkpoint.files import StoredTensors
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.kept_tokenizer import check_given, fingerprint_in_use, keep, tokenizer_of
from trainer.checkpoint.load import Found, find, find_newest
from trainer.checkpoint.run_folder import RunFolder, check_belongs
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.shared import check_shared
from trainer.config.dump import changed_keys, dump, short
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.stream import TrainStream
from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed import runtime
from trainer.distributed.agreement import differing
from trainer.distributed.mesh import Mesh
from trainer.distributed.together import raise_together
from trainer.engine.base import Engine
from trainer.engine.registry import NativeEngineConfig
from trainer.engine.spikes import SpikeWindow
from trainer.engine.step import NumericsConfig
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.evaluation.base import Task
from trainer.evaluation.preparation import read_tasks
from trainer.experiment import ExperimentConfig
from trainer.metrics.console import Console
from trainer.metrics.machine import Machine
from trainer.metrics.profiler import Profiler
from trainer.metrics.tensorboard_tracker import TensorBoardTracker
from trainer.metrics.trackers import JsonlTracker, Tracker, Trackers
from trainer.metrics.wandb_tracker import WandbTracker
from trainer.models.flops import ModelSize, model_size
from trainer.models.gpt import GPT
from trainer.moe.causality import evaluation_warning, training_warning
from trainer.moe.dispatch.registry import LocalDispatcherConfig
from trainer.ops.fused_ffn import has_onednn_product
from trainer.ops.kernels import choose_experts_kernel
from trainer.parallel.parallelize import parallelize

_OF_A_HOST: Any = {
    "runs_dir": True,
    "data": {"cache_dir": True, "sources": {"__all__": {"path": True}}, "tokenizer": {"path": True}},
    "eval": {"tasks": {"__all__": {"rows": {"path": True}, "candidates_file": True}}},
}
"""Keys of which hosts may have their own values: a file system can be mounted anywhere. Their content is compared."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything of one training run."""

    config: ExperimentConfig
    mesh: Mesh
    folder: RunFolder
    corpus: Corpus
    stream: TrainStream
    tasks: Sequence[Task]
    engine: Engine
    schedule: Callable[[int], float]
    saver: Saver
    console: Console
    trackers: Trackers
    machine: Machine
    profiler: Profiler
    size: ModelSize
    spikes: SpikeWindow
    id: str = ""
    """What the run is known by elsewhere; rank 0 knows it."""
    start_step: int = 0
    """Completed steps."""
    position: int = 0
    """Number of the next training row: with the seed, all there is to resume of the data."""
    tokens: int = 0
    """Tokens read so far, without filling."""
    skipped_steps: int = 0
    """Steps so far that were not taken: not finite, or skipped spikes."""
    skipped_in_a_row: int = 0
    """Steps that were not finite since the last one that was taken."""
    copies_equal_at: int | None = None
    """Completed steps when ranks were last seen to hold equal copies; None: not looked yet."""

    def checkpoint_info(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself beside the state."""
        return {
            "id": self.id,
            "position": self.position,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes": self.spikes.record(),
            "tokens": self.tokens,
            "streams": self.stream.places(self.position),
            "rows_of_a_step": self.config.train.global_batch_size,
            "data_fingerprint": self.corpus.fingerprint,
            "tokenizer_fingerprint": self.corpus.tokenizer.fingerprint,
            # No generator has a state: weights, order of the rows and all noise are functions of this and the numbers
            # of step and row.
            "random": {"kind": "counter_based", "seed": self.config.seed},
            "layout": self.layout(),
            "versions": {"turnout": runtime.turnout_version(), "torch": torch.__version__},
            "config": self.config.model_dump(mode="json"),
        }

    def layout(self) -> dict[str, int | str]:
        """Return who trains, in JSON values."""
        return {
            "world_size": self.mesh.layout.world_size,
            "ep_size": self.mesh.layout.ep_size,
            "data": self.config.parallel.data,
            "engine": self.config.engine.kind,
        }


def build_run(config: ExperimentConfig, folder: RunFolder, console: Console, mesh: Mesh, device: torch.device) -> Run:
    """Make a run, resumed from the newest undamaged checkpoint of its folder if there is one. The folder is locked.

    Rank 0 reads the text first and alone writes files.

    Raises:
        ConfigError: if the ranks were not given the same config, versions and run folder.
        DataError: if the text is unusable, not the same on all ranks, or not the one the run was started with.
        CheckpointError: if checkpoints exist and none can be used.
    """
    _check_alike(config, mesh)
    check_shared(folder, mesh.world)
    if config.profile is not None:
        config.profile.check_ranks(mesh.layout.world_size)
    config = resolve_kernel(config, device)
    is_writer = mesh.layout.rank == 0
    tokenizer = corpus = None
    with raise_together(mesh.world):
        if is_writer:
            with console.progress_bar("reading text") as bar:
                in_use = fingerprint_in_use(folder)
                tokenizer = tokenizer_of(folder, config.data, fingerprint=in_use, progress=bar)
                check_given(folder, config.data, tokenizer)
                corpus = build_corpus(config.data, tokenizer=tokenizer, progress=bar)
    tokenizer = mesh.world.broadcast_object(tokenizer)
    if corpus is None:  # what rank 0 has made of it is on the disk now
        corpus = build_corpus(config.data, tokenizer=tokenizer)
    different = differing(mesh.world, {"data": {"fingerprint": abridged(corpus.fingerprint)}})
    if different:
        raise DataError(f"{different[0]}; all ranks must read the same text (data.sources)")
    tasks = read_tasks(config.eval.tasks, corpus, seq_len=config.model.seq_len, world=mesh.world, warn=console.warning)
    faults.hit("start.text")
    stream = TrainStream(corpus, packing=config.data.packing, seq_len=config.model.seq_len, seed=config.seed)
    size = model_size(whole_model(config, corpus.tokenizer))
    lines = None
    with raise_together(mesh.world):
        if is_writer:
            config.metrics.check_installed()
            lines = JsonlTracker(folder.metrics, folder.routing, warn=console.warning)
    model = build_model(config, corpus.tokenizer, mesh, device, warn=console.warning)
    if config.model.moe is not None:
        for said in (
            training_warning(config.model.moe, model.moe_layers()),
            evaluation_warning(model.moe_layers()),
        ):
            if said is not None:
                console.warning(said)
    engine = config.engine.build(model, config.optim, numerics(config), mesh)
    faults.hit("start.engine")
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
        machine=Machine(folder.path, device),
        profiler=Profiler(config.profile, folder.profile, mesh, device, say=console.message, warn=console.warning),
        size=size,
        spikes=SpikeWindow(
            sigmas=config.train.spikes.sigmas,
            size=config.train.spikes.window,
            patience=config.train.max_consecutive_skips,
        ),
    )
    with raise_together(mesh.world):
        if is_writer:
            run.saver.folder.clean()
            faults.hit("resume.cleaned")
    found = find_newest(run.saver.folder, mesh.world, warn=console.warning)
    if found is not None:
        with raise_together(mesh.world):
            _resume(run, found)
    with raise_together(mesh.world):
        if is_writer:
            keep(folder, corpus.tokenizer)
            run.id = folder.identify(None if found is None else found.run.get("id"))
            folder.write(folder.config, dump(config))
            faults.hit("start.config_written")
            folder.write_environment(
                {
                    **runtime.describe(),
                    "device": str(device),
                    "world_size": mesh.layout.world_size,
                    "data_fingerprint": corpus.fingerprint,
                    "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
                    "tasks": {task.config.name: {"fingerprint": task.fingerprint, **task.signatures} for task in tasks},
                }
            )
    faults.hit("start.written")
    if lines is not None:
        lines.resume_at(run.start_step)
    faults.hit("start.done")
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
                described={**run.config.model_dump(mode="json"), "layout": run.layout(), "parameters": size},
                say=run.console.message,
                warn=run.console.warning,
            )
        )
    run.trackers.add(others)
    return run.trackers


def _check_alike(config: ExperimentConfig, mesh: Mesh) -> None:
    """Compare what the ranks were started with, before `experts_kernel: auto` becomes what is best on each host.

    Raises:
        ConfigError: with each key that differs, its values and who has them.
    """
    versions = {"turnout": runtime.turnout_version(), "torch": torch.__version__}
    values = {"version": versions, **config.model_dump(exclude=_OF_A_HOST)}
    different = differing(mesh.world, values)
    if different:
        raise ConfigError("\n".join(f"{line}; all ranks need the same config and versions" for line in different))


def whole_model(config: ExperimentConfig, tokenizer: Tokenizer) -> GPT:
    """Make the model without values, as it is in one process."""
    kernel = config.parallel.experts_kernel
    assert kernel != "auto", "resolve_kernel comes first"
    with torch.device("meta"), _default_dtype(torch.float64 if config.train.dtype == "float64" else torch.float32):
        return GPT(config.model, tokenizer.vocab_size, experts_kernel=kernel)


def build_model(
    config: ExperimentConfig, tokenizer: Tokenizer, mesh: Mesh, device: torch.device, *, warn: Callable[[str], None]
) -> GPT:
    """Make the initialised model on its device, in its layout."""
    can_compile = device.type != "cpu" or runtime.has_cpp_compiler()
    if config.parallel.compile and not can_compile:
        warn(
            "parallel.compile: true needs a C++ compiler (g++ or clang++), and there is none: going on without, slower"
        )
    return parallelize(
        whole_model(config, tokenizer),
        config.parallel,
        mesh,
        device,
        seed=config.seed,
        dtype=_DTYPES[config.train.dtype],
        can_compile=can_compile,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters in `dtype`; buffers that state their own dtype, such as the selection bias, keep it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def resolve_kernel(config: ExperimentConfig, device: torch.device) -> ExperimentConfig:
    """Replace `experts_kernel: auto` by what it means on this device, so that the run folder records it.

    Raises:
        ConfigError: if the kernel that is asked for is not in this build of torch.
    """
    if config.parallel.experts_kernel == "fused_onednn" and not has_onednn_product():
        raise ConfigError("parallel.experts_kernel: fused_onednn is not in this build of torch; use fused")
    if config.parallel.experts_kernel != "auto":
        return config
    moe, dtype = config.model.moe, _DTYPES[config.train.dtype]
    kernel = "loop"
    if moe is not None:
        tokens = config.parallel.micro_batch_size * config.model.seq_len
        kernel = choose_experts_kernel(
            device.type,
            dtype,
            cpu_vendor=runtime.cpu_vendor(),
            rows_per_expert=int(tokens * moe.experts_per_token / moe.num_experts),
            d_model=config.model.d_model,
            d_ff=moe.d_ff,
        )
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"experts_kernel": kernel})})


def numerics(config: ExperimentConfig) -> NumericsConfig:
    """Return what an engine must know of `train` and `seed`."""
    return NumericsConfig(seed=config.seed, dtype=_DTYPES[config.train.dtype], grad_clip=config.train.grad_clip)


def load_trained(
    config: ExperimentConfig, folder: RunFolder, *, step: int | None, warn: Callable[[str], None]
) -> tuple[Engine, Tokenizer, Found]:
    """Return an engine with the weights of a run's checkpoint, of `step` or the newest, all in this process.

    The tokenizer is the one that the run keeps in its folder.

    Raises:
        CheckpointError: if there is none, or it is damaged or of another model.
    """
    checkpoints, mesh = CheckpointFolder(folder.checkpoints), Mesh.of_one()
    found = find_newest(checkpoints, mesh.world, warn=warn) if step is None else find(checkpoints, step)
    if found is None:
        raise CheckpointError(f"{folder.checkpoints}: has no checkpoint; train first")
    check_record(found)
    tokenizer = tokenizer_of(folder, config.data, fingerprint=found.run["tokenizer_fingerprint"])
    device = runtime.start(config.parallel.device)
    config = resolve_kernel(in_one_process(config), device)
    model = build_model(config, tokenizer, mesh, device, warn=warn)
    engine = config.engine.build(model, config.optim, numerics(config), mesh)
    _load_state(found, engine, config, tokenizer)
    return engine, tokenizer, found


def in_one_process(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config for one process that takes no steps: it has no use for another engine than the native one."""
    alone = config.parallel.model_copy(
        update={"ep_size": 1, "data": "replicate", "dispatcher": LocalDispatcherConfig()}
    )
    return config.model_copy(update={"parallel": alone, "engine": NativeEngineConfig()})


def _resume(run: Run, found: Found) -> None:
    """Go on from a checkpoint: each rank reads its own parts, however the ranks that wrote it were laid out."""
    faults.hit("resume.found")
    _load_state(found, run.engine, run.config, run.corpus.tokenizer)
    if not run.folder.config.is_file():  # with it, the comparison was made before torch was imported
        for warning in _changes_since(found, run.config):
            run.console.warning(warning)
    saved, now = found.run["data_fingerprint"], run.corpus.fingerprint
    if saved != now:
        raise DataError(
            f"{found.path}: was trained on other text than data.sources gives now (fingerprint {abridged(saved)}, now "
            f"{abridged(now)}); restore the files, or start a new run with name=..."
        )
    run.start_step, run.position = found.step, int(found.run["position"])
    run.tokens = int(found.run["tokens"])
    run.stream.go_on_from(found.run.get("streams", {}))
    run.skipped_steps = int(found.run["skipped_steps"])
    run.skipped_in_a_row = int(found.run["skipped_in_a_row"])
    run.spikes.restore(found.run.get("spikes", {}))
    run.console.message(f"resuming from {found.path}{_moved(found, run)}")
    faults.hit("resume.loaded")


def _load_state(found: Found, engine: Engine, config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    check_record(found)
    stored = _stored_config(found)
    filled_up = None if stored is None else stored.model.model_dump(mode="json")
    check_model(found, config.model.model_dump(mode="json"), stored=filled_up)
    check_tokenizer(found, fingerprint=tokenizer.fingerprint)
    mine = engine.wanted()
    check_fits(found, mine)
    with StoredTensors(found.path, found.manifest) as tensors:
        engine.load_state(tensors.like(mine))


def _stored_config(found: Found) -> ExperimentConfig | None:
    """Return the config that a checkpoint was written with, filled up; None if this version cannot read it."""
    try:
        return ExperimentConfig.model_validate(found.run.get("config"))
    except ValidationError:
        return None


def _changes_since(found: Found, config: ExperimentConfig) -> list[str]:
    """Return a warning for each change of what is learned since a checkpoint.

    Raises:
        ConfigError: if the model itself changed.
    """
    stored = _stored_config(found)
    if stored is not None:
        return check_belongs(RunFolder(found.path), changed_keys(stored, config))
    counters = found.run.get("random")
    seed = counters.get("seed") if isinstance(counters, Mapping) else None
    unread = f"{found.path}: its config is not one of this version; beside model and seed nothing of it is compared"
    other = [f"seed was {short(seed)} in {found.path} and is now {config.seed}"] if seed != config.seed else []
    return [unread, *other]


def _moved(found: Found, run: Run) -> str:
    """Say how the layout differs from the one that wrote the checkpoint."""
    before, now = layout_of(found.manifest), run.layout()
    changes = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    return f" ({', '.join(changes)})" if changes else ""
