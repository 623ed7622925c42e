"""Checks of optimizer, schedule and precision. Import no torch."""

from collections.abc import Iterator

from trainer.doctor.finding import Sign
from trainer.doctor.static.config_on_host import ConfigCheck, ConfigOnHost
from trainer.optim.schedule import resolve_warmup

_LEAST_RATE, _MOST_RATE = 1e-6, 0.02
_DIVERGES = 0.1
_LONG_WARMUP = 0.5
_SLOW_MOMENT = 0.995
_STRONG_DECAY = 1.0
_TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def _learning_rate(subject: ConfigOnHost) -> Iterator[Sign]:
    config, peak = subject.config, getattr(subject.config.schedule, "peak_lr", None)
    if peak is None:
        return
    factor = max([1.0, *config.train.lr_scale.values()])
    how = "" if factor == 1 else f" times {factor:g} (train.lr_scale)"
    if peak * factor > _MOST_RATE:
        severity = "severe" if peak * factor >= _DIVERGES else "warning"
        yield Sign(f"schedule.peak_lr: {peak:g}{how} with {config.optim.kind}", "use 1e-4 to 4e-3", severity)
    elif peak < _LEAST_RATE:
        yield Sign(f"schedule.peak_lr: {peak:g}: weights barely move in {config.train.steps} steps", "use 1e-4 to 4e-3")


def _no_warmup(subject: ConfigOnHost) -> Iterator[Sign]:
    config = subject.config
    keeps_moments = config.init_from is not None and config.init_from.parts == "weights+optimizer"
    if not keeps_moments and resolve_warmup(config.schedule.warmup_steps, config.train.steps) == 0:
        yield Sign(
            "schedule.warmup_steps: 0, and the optimizer's moments start at 0",
            "use 0.02 of the run, or leave it out; or continue with init_from.parts: weights+optimizer",
        )


def _long_warmup(subject: ConfigOnHost) -> Iterator[Sign]:
    steps = subject.config.train.steps
    warmup = resolve_warmup(subject.config.schedule.warmup_steps, steps)
    if warmup > _LONG_WARMUP * steps:
        yield Sign(f"schedule.warmup_steps: {warmup} of {steps} steps", "use 0.01 to 0.1 of the run")


def _slow_second_moment(subject: ConfigOnHost) -> Iterator[Sign]:
    betas = getattr(subject.config.optim, "betas", None)
    if betas is not None and betas[1] > _SLOW_MOMENT:
        yield Sign(f"optim.betas: {list(betas)}", "use [0.9, 0.95]")


def _no_clipping(subject: ConfigOnHost) -> Iterator[Sign]:
    if subject.config.train.grad_clip is None:
        yield Sign("train.grad_clip: null", "use 1.0")


def _strong_decay(subject: ConfigOnHost) -> Iterator[Sign]:
    decay = subject.config.optim.weight_decay
    if decay >= _STRONG_DECAY:
        yield Sign(f"optim.weight_decay: {decay:g}, of the router's gate too", "use 0.1")


def _rounded_float32(subject: ConfigOnHost) -> Iterator[Sign]:
    for name in _TF32:
        if subject.host.number(name) and subject.on_gpu:
            yield Sign(
                f"{name}={subject.host.environment[name]}: float32 products, the routers' among them, have 10 bits of "
                "mantissa",
                f"unset {name}",
            )


def _slow_precision(subject: ConfigOnHost) -> Iterator[Sign]:
    if subject.on_gpu and subject.config.train.dtype != "bfloat16":
        yield Sign(f"train.dtype: {subject.config.train.dtype} on a GPU", "use bfloat16: weights stay float32")


OPTIMIZATION_CHECKS: tuple[ConfigCheck, ...] = (
    ConfigCheck(
        name="learning_rate",
        severity="warning",
        find=_learning_rate,
        why="too high and the loss diverges or spikes, routers first; too low and nothing is learned",
        source="arXiv 2309.14322; arXiv 2202.08906",
    ),
    ConfigCheck(
        name="no_warmup",
        severity="warning",
        find=_no_warmup,
        why="the first steps of Adam are as large as its rate whatever the gradient is: routers collapse before "
        "experts differ",
        source="arXiv 2406.09405",
    ),
    ConfigCheck(
        name="long_warmup",
        severity="warning",
        find=_long_warmup,
        why="most of the budget is spent below the rate that was chosen",
        source="arXiv 2406.09405",
    ),
    ConfigCheck(
        name="slow_second_moment",
        severity="warning",
        find=_slow_second_moment,
        why="the second moment is too old when gradients grow: loss spikes",
        source="NVIDIA/Megatron-LM#1582; AI-Hypercomputer/maxtext#17; arXiv 2304.13013",
    ),
    ConfigCheck(
        name="no_clipping",
        severity="warning",
        find=_no_clipping,
        why="one bad batch undoes many steps",
        source="arXiv 2204.02311",
    ),
    ConfigCheck(
        name="strong_decay",
        severity="warning",
        find=_strong_decay,
        why="weights shrink faster than they learn: the logits of a router go to 0, and it chooses by rounding",
        source="ServiceNow/Fast-LLM#545; arXiv 1711.05101",
    ),
    ConfigCheck(
        name="rounded_float32",
        severity="severe",
        find=_rounded_float32,
        why="close scores of experts swap: 5 % of the tokens got others from a rounded router",
        source="sgl-project/sglang#33764; pytorch/pytorch#61890",
    ),
    ConfigCheck(
        name="slow_precision",
        severity="warning",
        find=_slow_precision,
        why="tensor cores stay idle: a tenth of the speed, and twice the memory of activations",
        source="databricks/megablocks#91",
    ),
)
