"""Root of an experiment file, and the rules between its sections. Imports no torch."""

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.init_from import InitFromConfig
from trainer.config.base import LINE_PATTERN, Config, PathText, Problem, repeated
from trainer.config.numbers import Whole
from trainer.data.config import DataConfig
from trainer.data.sources.registry import InstalledSourceConfig
from trainer.engine.config import TrainConfig
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.deepspeed.passthrough import RunOptions
from trainer.engine.registry import EngineConfig, NativeEngineConfig
from trainer.errors import ConfigError
from trainer.evaluation.config import EvalConfig
from trainer.evaluation.metric_names import unknown_metric
from trainer.families.config import ExportConfig
from trainer.metrics.config import MetricsConfig, ProfileConfig
from trainer.models.config import ModelConfig
from trainer.moe.dispatch.registry import AllToAllDispatcherConfig, ExchangeOptions, SymmetricMemoryDispatcherConfig
from trainer.ops.lora_kernels import LORA_KERNELS
from trainer.optim.registry import AdamWConfig, OptimConfig, ScheduleConfig, WarmupCosineConfig
from trainer.parallel.config import ParallelConfig, RecomputeEveryConfig
from trainer.parallel.library_rules import library_problems
from trainer.parallel.pipeline_stages import pipeline_stages
from trainer.parallel.sharing_rules import sharing_problems
from trainer.routing_record.replay_rules import record_problem, replay_problems

_KERNEL_DTYPES = {
    "grouped": ("float32", "bfloat16"),
    "triton": ("float32", "bfloat16"),
    "sonicmoe": ("bfloat16",),
    "scattermoe": ("bfloat16",),
}
"""Values of `train.dtype` of the experts kernels that have not all."""


class ExperimentConfig(Config):
    """A run: what is learned (`model` to `train`), and where (`parallel`, `engine`)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    """Name of the run; its folder is RUNS_DIR/NAME."""
    runs_dir: PathText = "runs"
    """Folder of all runs."""
    prepare: Annotated[str, Field(min_length=1, max_length=500, pattern=LINE_PATTERN)] | None = None
    """Command that creates the files this config reads; errors about missing files name it."""
    seed: Whole = 1337
    """Seed of initial weights, data order and all noise."""
    init_from: InitFromConfig | None = None
    """Another model whose weights a new run starts from. Null: initial values of the seed."""
    model: ModelConfig = ModelConfig()
    """Model architecture."""
    data: DataConfig = DataConfig()
    """Training text."""
    optim: OptimConfig = AdamWConfig()
    """The optimizer."""
    schedule: ScheduleConfig = WarmupCosineConfig()
    """The learning rate."""
    train: TrainConfig = TrainConfig()
    """Length and precision of training."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on held-out text."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallelism and devices."""
    engine: EngineConfig = NativeEngineConfig()
    """Engine that performs the optimizer steps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save."""
    metrics: MetricsConfig = MetricsConfig()
    """Metrics and trackers."""
    export: ExportConfig = ExportConfig()
    """Families of models that this one must fit into."""
    profile: ProfileConfig | None = None
    """Steps to record with torch's profiler. Null: none."""

    def problems(self) -> Iterator[Problem]:
        """Check the sections against each other."""
        steps, warmup = self.train.steps, self.schedule.warmup_steps
        if isinstance(warmup, int) and warmup >= steps:
            allowed = f"use at most {steps - 1}, or a fraction of the run: schedule.warmup_steps=0.1"
            yield Problem("schedule.warmup_steps", f"{warmup} does not fit in train.steps {steps}; {allowed}")
        domains = [
            domain
            for source in self.data.sources
            for domain in (source.domains if isinstance(source, InstalledSourceConfig) else [source.domain])
        ]
        if self.train.ema is not None and "ema" in [*domains, *(task.name for task in self.eval.tasks)]:
            yield Problem("train.ema", "a domain or task is named ema, whose results eval/ema/... are; rename it")
        yield from self._metric_problems(domains)
        for domain in repeated(domains):
            yield Problem("data.sources", f"two sources have domain {domain}; give each its own `domain`")
        yield from self._vocabulary_problems()
        for problem in self.export.problems_of(self.model):
            yield Problem(f"export.{problem.key}", problem.message)
        yield from self._task_problems(domains)
        yield from self._routing_gap_problems()
        yield from self._replay_problems()
        if self.profile is not None and self.profile.last > steps:
            given = f"steps {self.profile.start} to {self.profile.last}, and train.steps is {steps}"
            yield Problem("profile", f"{given}; lower profile.start or profile.steps")
        yield from self._kernel_problems()
        yield from self._dispatcher_problems()
        yield from library_problems(self.model, self.parallel, self.train.dtype)
        yield from self._shard_problems()
        yield from sharing_problems(self.model, self.parallel, engine=self.engine.kind)
        yield from self._pipeline_problems()
        yield from self._deepspeed_problems()
        recompute, layers = self.parallel.recompute, self.model.num_layers
        if isinstance(recompute, RecomputeEveryConfig) and recompute.every > layers:
            given = f"{recompute.every} is more than the {layers} layers, so nothing is computed again"
            yield Problem("parallel.recompute.every", f"{given}; use at most {layers}, or recompute: none")

    def _metric_problems(self, domains: Sequence[str]) -> Iterator[Problem]:
        """Check that evaluations have the metrics by which something is decided."""
        best, has_average = self.checkpoint.best_metric, self.train.ema is not None
        if best is not None and (no := unknown_metric(best.metric, self.eval, domains, has_average=has_average)):
            yield Problem("checkpoint.best", no)
        stops = self.train.early_stopping
        if stops is not None and (no := unknown_metric(stops.metric, self.eval, domains, has_average=has_average)):
            yield Problem("train.early_stopping.metric", no)

    def _vocabulary_problems(self) -> Iterator[Problem]:
        """Check that the embedding has a row for each id, where these are known without reading a file."""
        rows, tokenizer = self.model.vocab_size, self.data.tokenizer
        ids = getattr(tokenizer, "vocab_size", 256 if tokenizer.kind == "byte" else 0)
        if rows is not None and rows < ids:
            yield Problem(
                "model.vocab_size", f"{rows} rows for the {ids} ids of data.tokenizer; use at least {ids}, or null"
            )

    def _replay_problems(self) -> Iterator[Problem]:
        if self.metrics.routing_record is not None and (problem := record_problem(self.model.moe)) is not None:
            yield Problem("metrics.routing_record", f"{problem}; use null")
        if (replay := self.train.routing_replay) is not None:
            for problem in replay_problems(self.model, replay.rows):
                key = f"train.routing_replay.{problem.key}".removesuffix(".")
                yield Problem(key, problem.message)

    def _routing_gap_problems(self) -> Iterator[Problem]:
        moe = self.model.moe
        if self.metrics.routing_gap_every is None or (moe is not None and moe.router.has_probs):
            return
        reason = "the model is dense (model.moe: null)" if moe is None else f"{moe.router.kind} computes no scores"
        yield Problem("metrics.routing_gap_every", f"{reason}, so routing has no optimum to compare with; use null")

    def _task_problems(self, domains: Sequence[str]) -> Iterator[Problem]:
        """Check evaluation tasks against the sequence length and the domains, which also use the key eval/NAME."""
        for index, task in enumerate(self.eval.tasks):
            for problem in task.problems_in(self.model.seq_len):
                yield Problem(f"eval.tasks.{index}.{problem.key}", problem.message)
            if task.name in domains:
                yield Problem(f"eval.tasks.{index}.name", f"{task.name} is a domain of data.sources; use another name")

    def _dispatcher_problems(self) -> Iterator[Problem]:
        """Check the dispatcher against the number of experts and ranks."""
        moe, ep_size, dispatcher = self.model.moe, self.parallel.ep_size, self.parallel.dispatcher
        if moe is None:
            if ep_size > 1:
                yield Problem("parallel.ep_size", f"{ep_size}, but the model is dense (model.moe: null); use 1")
            return
        if ep_size > moe.num_experts:
            given = f"{ep_size} ranks cannot share {moe.num_experts} experts (model.moe.num_experts)"
            yield Problem("parallel.ep_size", f"{given}; use at most {moe.num_experts}")
        least, replicas = moe.num_experts // ep_size, self.parallel.replicas
        if ep_size > 1 and replicas > (most := moe.num_experts - -(-moe.num_experts // ep_size)):
            problem = f"{replicas}, and all other ranks together may have only {most} experts; use at most {most}"
            yield Problem("parallel.replicas", problem)
        if isinstance(dispatcher, ExchangeOptions) and 0 < least < dispatcher.chunks:
            experts = f"only {least} experts ({moe.num_experts} over ep_size {ep_size})"
            problem = f"{dispatcher.chunks} chunks, and a rank may have {experts}; use at most {least}"
            yield Problem("parallel.dispatcher.chunks", problem)
        has_budget = isinstance(dispatcher, AllToAllDispatcherConfig | SymmetricMemoryDispatcherConfig)
        if has_budget and dispatcher.row_budget is not None:
            chunks = dispatcher.chunks if isinstance(dispatcher, ExchangeOptions) else 1
            yield from self._row_budget_problems(chunks, has_fixed_k=moe.router.has_fixed_k)
        if dispatcher.kind == "local" and ep_size > 1:
            problem = f"local does not communicate; with ep_size {ep_size} use all_to_all"
            yield Problem("parallel.dispatcher.kind", problem)
        if dispatcher.kind == "padded_all_to_all" and moe.capacity.factor is None:
            yield Problem(
                "parallel.dispatcher.kind",
                "padded_all_to_all sends capacity-sized buffers, and model.moe.capacity.factor is null (dropless); "
                "use all_to_all, or set a factor",
            )

    def _row_budget_problems(self, chunks: int, *, has_fixed_k: bool) -> Iterator[Problem]:
        """Check what receive buffers of static size go with."""
        key, without = "parallel.dispatcher.row_budget", "leave row_budget out"
        if chunks > 1:
            yield Problem(key, f"it needs one chunk, and chunks is {chunks}; use one of the two")
        if not has_fixed_k:
            kind = self.model.moe.router.kind if self.model.moe else ""
            yield Problem(key, f"{kind} has no fixed number of experts per token to take a share of; {without}")
        if isinstance(self.engine, DeepSpeedEngineConfig):
            yield Problem(key, f"the DeepSpeed engine cannot take a step again; {without}, or use engine.kind native")

    def _kernel_problems(self) -> Iterator[Problem]:
        """Check that the experts kernel supports the dtype and shapes."""
        moe, dtype = self.model.moe, self.train.dtype
        kernel = self.parallel.experts_kernel
        if moe is None:
            return
        if moe.expert_bias and (":" in kernel or kernel in ("sonicmoe", "scattermoe")):
            what = "a kernel of your own" if ":" in kernel else kernel
            text = f"true, and {what} has no biases; use false, or parallel.experts_kernel: auto"
            yield Problem("model.moe.expert_bias", text)
        adapted = {each.group for each in self.model.adapted()}
        if "experts" in adapted and kernel not in ("auto", *LORA_KERNELS):
            problem = f"{kernel} computes no adapters (model.lora) of experts"
            others = ", ".join(sorted(adapted - {"experts"})) or "attention"
            yield Problem("parallel.experts_kernel", f"{problem}; use auto, or model.lora.targets: [{others}]")
        if dtype not in _KERNEL_DTYPES.get(kernel, (dtype,)):
            yield Problem("parallel.experts_kernel", f"{kernel} does not support {dtype}; use auto")
            return
        if kernel == "sonicmoe" and self.model.activation != "swiglu":
            problem = f"sonicmoe has swiglu, and model.activation is {self.model.activation}; use auto"
            yield Problem("parallel.experts_kernel", problem)
        if dtype != "bfloat16" and kernel == "mxfp8" and self.parallel.device != "cpu":
            problem = f"mxfp8 has products in bfloat16, and train.dtype is {dtype}"
            remedy = "use train.dtype=bfloat16, or parallel.device=cpu, where it is emulated in any dtype"
            yield Problem("parallel.experts_kernel", f"{problem}; {remedy}")
        if kernel not in ("grouped", "mxfp8"):
            return  # any width
        multiple = 32 if kernel == "mxfp8" else 8 if dtype == "bfloat16" else 4
        for key, width in (("model.d_model", self.model.d_model), ("model.moe.d_ff", moe.d_ff)):
            if width % multiple:
                problem = f"{kernel} needs {key} to be a multiple of {multiple} in {dtype}, not {width}; use auto"
                yield Problem("parallel.experts_kernel", problem)

    def _shard_problems(self) -> Iterator[Problem]:
        """Refuse the degree of a sharding that is off."""
        if self.parallel.shard_size is not None and self.parallel.data != "shard":
            problem = f"{self.parallel.shard_size}, but parallel.data is replicate; use shard, or leave it out"
            yield Problem("parallel.shard_size", problem)
        if self.parallel.shard_keeps != "gradients" and self.parallel.data != "shard":
            problem = f"{self.parallel.shard_keeps}, but parallel.data is replicate; use shard, or leave it out"
            yield Problem("parallel.shard_keeps", problem)

    def _pipeline_problems(self) -> Iterator[Problem]:
        """Check that the layers fill the stages, and what does not know stages."""
        parallel = self.parallel
        if parallel.pp_size == 1:
            return
        try:
            pipeline_stages(self.model, self.model.vocab_size or 1, parallel.degrees)
        except ConfigError as error:
            yield Problem(*str(error).split(": ", 1))
        without_stages = {
            "engine.kind": isinstance(self.engine, DeepSpeedEngineConfig),
            "metrics.routing_record": self.metrics.routing_record is not None,
            "metrics.routing_gap_every": self.metrics.routing_gap_every is not None,
            "train.routing_replay": self.train.routing_replay is not None,
        }
        for key in (key for key, is_on in without_stages.items() if is_on):
            yield Problem(key, f"it does not go with parallel.pp_size {parallel.pp_size}; leave it out, or pp_size: 1")

    def _deepspeed_problems(self) -> Iterator[Problem]:
        """Check DeepSpeed's options against the sections that they repeat."""
        engine = self.engine
        if not isinstance(engine, DeepSpeedEngineConfig):
            return
        if not isinstance(self.optim, AdamWConfig):
            yield Problem("optim.kind", f"{self.optim.kind}: the DeepSpeed engine has adamw; use engine.kind native")
            return
        if self.parallel.data == "shard":
            yield Problem("parallel.data", "shard is FSDP2's, and DeepSpeed shards by engine.zero_stage; use replicate")
        if self.parallel.overlap != "none":
            yield Problem("parallel.overlap", "it does not go with the DeepSpeed engine; use engine.kind native")
        if self.train.dtype == "float64":
            yield Problem("train.dtype", "float64: DeepSpeed sums gradients in float32; use engine.kind native")
        ours = RunOptions(
            zero_stage=engine.zero_stage,
            offload_optimizer=engine.offload_optimizer,
            global_batch_size=self.train.global_batch_size,
            micro_batch_size=self.parallel.micro_batch_size,
            dtype=self.train.dtype,
            grad_clip=self.train.grad_clip,
            optim=self.optim,
            peak_lr=self.schedule.peak_lr,
            has_uneven_experts=self.model.moe is not None and self.model.moe.num_experts % self.parallel.ep_size != 0,
        )
        yield from engine.conflicts(ours)
