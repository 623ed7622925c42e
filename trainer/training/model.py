"""Build the model of a config: on its device, in its layout, with initial values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed import runtime
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import Degrees
from trainer.engine.numerics import NumericsConfig
from trainer.engine.registry import NativeEngineConfig
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.models.config import ModelConfig
from trainer.models.freeze import check_rate_factors, freeze_parameters, frozen_names
from trainer.models.gpt import GPT
from trainer.models.parameter_patterns import selected
from trainer.moe.dispatch.registry import LocalDispatcherConfig
from trainer.ops.kernels import choose_experts_kernel, missing_kernel
from trainer.ops.layer_widths import AdapterWidths, LayerWidths
from trainer.parallel.canary import CanaryReport, run_canary
from trainer.parallel.expert_placement import ExpertPlacement
from trainer.parallel.parallelize import parallelize

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def meta_model(config: ExperimentConfig, num_ids: int) -> GPT:
    """Build the whole model, for a tokenizer of so many ids, on the meta device, with what is frozen.

    Raises:
        ConfigError: if `train.freeze` or `train.lr_scale` does not fit the model.
    """
    kernel = config.parallel.experts_kernel
    assert kernel != "auto", "resolve_kernel comes first"
    with torch.device("meta"), _default_dtype(torch.float64 if config.train.dtype == "float64" else torch.float32):
        model = GPT(config.model, num_ids, experts_kernel=kernel)
    freeze_parameters(model, frozen_names(model, config.train.freeze))
    check_rate_factors(model, config.train.lr_scale)  # refused before there are weights
    return model


def check_what_learns(config: ExperimentConfig) -> None:
    """Check `train.freeze` and `train.lr_scale` against the model, before there is a run folder.

    Raises:
        ConfigError: if they do not fit.
    """
    if config.train.freeze or config.train.lr_scale:
        parallel = config.parallel.model_copy(update={"experts_kernel": "loop"})  # any has the same weights
        meta_model(config.model_copy(update={"parallel": parallel}), 1)


def build_parallel_model(
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    device: torch.device,
    *,
    warn: Callable[[str], None],
    placement: ExpertPlacement | None = None,
) -> GPT:
    """Build the model with initial values, on its device and in its layout, with experts placed as the config says.

    `placement` is in place of that, for `auto`, which is contiguous by itself.

    Raises:
        ConfigError: if `train.freeze` or `train.lr_scale` does not fit the model.
    """
    if config.parallel.deterministic:
        runtime.use_deterministic_kernels()
    can_compile = device.type != "cpu" or runtime.has_cpp_compiler()
    if config.parallel.compile and not can_compile:
        warn(
            "parallel.compile: true needs a C++ compiler (g++ or clang++), and none is installed: training without it, "
            "more slowly"
        )
    return parallelize(
        meta_model(config, tokenizer.vocab_size),
        config.parallel,
        mesh,
        device,
        seed=config.seed,
        dtype=_DTYPES[config.train.dtype],
        can_compile=can_compile,
        placement=placement,
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
    """Replace `experts_kernel: auto` by the kernel for this device, so that the run folder records it."""
    if (message := missing_kernel(config.parallel.experts_kernel, device.type)) is not None:
        raise ConfigError(f"parallel.experts_kernel: {message}")
    if config.parallel.experts_kernel != "auto":
        return config
    moe, kernel = config.model.moe, "loop"
    if moe is not None:
        tokens = config.parallel.micro_batch_size * config.model.seq_len
        kernel = choose_experts_kernel(
            device.type,
            _DTYPES[config.train.dtype],
            cpu_vendor=runtime.cpu_vendor(),
            rows_per_expert=int(tokens * moe.experts_per_token / moe.num_experts),
            d_model=config.model.d_model,
            d_ff=moe.d_ff,
        )
    update = {"experts_kernel": kernel}
    if config.parallel.kernel_canary == "auto":  # recorded with the kernel, which a resumed run finds named
        update["kernel_canary"] = "fall_back"
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


def check_kernel(
    config: ExperimentConfig, mesh: Mesh, device: torch.device, *, warn: Callable[[str], None]
) -> tuple[ExperimentConfig, CanaryReport | None]:
    """Compare kernel and dispatcher with the oracle; return the config with the kernel to train with. Collective.

    Raises:
        ConfigError: if one of them is wrong and may not be replaced.
    """
    moe = config.model.moe
    if moe is None:
        return config, None
    if config.parallel.deterministic:  # cuBLAS reads its setting when the first product runs, which is here
        runtime.use_deterministic_kernels()
    widths = LayerWidths(
        d_model=config.model.d_model,
        d_ff=moe.d_ff,
        activation=config.model.activation_function,
        has_bias=moe.expert_bias,
        adapters=_adapter_widths(config.model),
        is_frozen=not _experts_learn(config),
        dtype=_DTYPES[config.train.dtype],
    )
    report = run_canary(config.parallel, widths, moe.num_experts, mesh, device)
    for name, fault in report.refused.items():
        warn(
            f"parallel.experts_kernel: {name} is wrong on this device: {fault}; training with {report.experts_kernel} "
            "instead"
        )
    parallel = config.parallel.model_copy(update={"experts_kernel": report.experts_kernel})
    return config.model_copy(update={"parallel": parallel}), report


def _adapter_widths(model: ModelConfig) -> AdapterWidths | None:
    """Return what the adapters of experts are; None without any."""
    lora, names = model.lora, {each.name for each in model.adapted() if each.group == "experts"}
    if lora is None or not names:
        return None
    return AdapterWidths(rank=lora.rank, scale=lora.scale, of_w_in="w_in" in names, of_w_out="w_out" in names)


def _experts_learn(config: ExperimentConfig) -> bool:
    """Return whether any weight of the experts has a gradient, apart from adapters."""
    lora, freeze = config.model.lora, config.train.freeze
    names = [
        f"blocks.{layer}.ffn.experts.{weight}" for layer in config.model.moe_layers for weight in ("w_in", "w_out")
    ]
    return any((lora is None or selected(lora.trains, name)) and not selected(freeze, name) for name in names)


def numerics(config: ExperimentConfig) -> NumericsConfig:
    """Return the settings of `train` and `seed` that an engine needs."""
    train = config.train
    return NumericsConfig(
        seed=config.seed,
        dtype=_DTYPES[train.dtype],
        grad_clip=train.grad_clip,
        lr_scale=train.lr_scale,
        ema=train.ema,
    )


def single_process(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config for one process that only evaluates: no parallelism, the native engine."""
    alone = {**asdict(Degrees()), "data": "replicate", "dispatcher": LocalDispatcherConfig()}
    parallel = config.parallel.model_copy(update=alone)
    return config.model_copy(update={"parallel": parallel, "engine": NativeEngineConfig()})
