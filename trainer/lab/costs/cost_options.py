"""Entries that the benchmarks of costs compare: shapes, routings, kernels and peers, as options name them. No torch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.moe.config import MoEConfig
from trainer.parallel.config import ParallelConfig

RoutingKind = Literal["own", "balanced", "skewed", "traced"]
PEERS: Final = ("grouped_mm", "batched_mm", "eager")
"""Hugging Face's implementations of the experts."""
_BYTES: Final = {"float32": 4, "bfloat16": 2}
_MAX_VALUES: Final = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Sizes of one MoE layer and of its input."""

    num_experts: int
    top_k: int
    d_model: int
    d_ff: int
    tokens: int
    dtype: str
    """Dtype of the matrix products; the layer's input is float32."""

    @property
    def title(self) -> str:
        """One line about the shape, without the number of experts: lines of several are compared."""
        return f"{self.tokens} tokens x {self.d_model}, {self.top_k} experts of {self.d_ff} for each, {self.dtype}"

    def record(self) -> dict[str, Any]:
        """Return JSON values: what shapes that are compared share."""
        names = ("top_k", "d_model", "d_ff", "tokens", "dtype")
        return {name: getattr(self, name) for name in names}

    @property
    def itemsize(self) -> int:
        """Bytes of a number in a matrix product."""
        return _BYTES[self.dtype]

    @property
    def least_saved(self) -> int:
        """Bytes a token that a backward pass needs: the layer's input X, and H, what enters the activation."""
        return 4 * self.d_model + self.itemsize * self.top_k * 2 * self.d_ff

    def sections(self) -> dict[str, Any]:
        """Return the `model` section of a config of one such layer."""
        router = {"kind": "top_k", "top_k": self.top_k, "normalize": self.top_k > 1}
        moe = {"num_experts": self.num_experts, "d_ff": self.d_ff, "router": router}
        return {"num_layers": 1, "num_heads": 1, "d_model": self.d_model, "seq_len": self.tokens, "moe": moe}


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens are routed: by the model itself, evenly, with half of all tokens on one expert, or as a run does."""

    kind: RoutingKind
    run: Path | None = None
    """The traced run."""

    @classmethod
    def parse(cls, text: str, *, among: Sequence[str]) -> "Routing":
        """Return the routing of a word.

        Raises:
            ConfigError: if it is none of `among`, or a traced run is not named.
        """
        kind, colon, run = text.partition(":")
        if kind not in among or (kind == "traced") != bool(run) or (colon and not run):
            allowed = ", ".join("traced:RUN" if name == "traced" else name for name in among)
            raise ConfigError(f"--routing: {shown(text)} is not a routing; use some of {allowed}")
        return cls(kind, Path(run).expanduser() if run else None)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.kind if self.run is None else f"traced from {self.run}"


@dataclass(frozen=True, slots=True)
class TracedRun:
    """A run whose routing is repeated."""

    routing: Routing
    config: ExperimentConfig
    folder: RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOptions:
    """Options that all benchmarks of costs share."""

    rounds: int
    device: str = "cpu"
    """As `parallel.device` names it."""
    seed: int = 0
    peers: tuple[str, ...] = ()
    routings: tuple[Routing, ...] = ()
    traced: tuple[TracedRun, ...] = ()
    json_path: Path | None = None

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        routings = [str(routing) for routing in self.routings]
        return {"rounds": self.rounds, "device": self.device, "seed": self.seed, "routings": routings}


def by_dtype(shapes: Sequence[LayerShape]) -> list[list[LayerShape]]:
    """Return the shapes of each dtype."""
    dtypes = dict.fromkeys(shape.dtype for shape in shapes)
    return [[shape for shape in shapes if shape.dtype == dtype] for dtype in dtypes]


def kernels_named(text: str) -> tuple[str, ...]:
    """Return the kernels of a list; `all` are those of the package.

    Raises:
        ConfigError: if one does not exist.
    """
    field = ParallelConfig.model_fields["experts_kernel"]
    known = [name for name in get_args(field.annotation) if name != "auto"]
    if text == "all":
        return tuple(known)
    return tuple(
        name if ":" in name else _among(name, ["auto", *known], option="--kernel", what="a kernel")
        for name in _words(text)
    )


def peers_named(text: str) -> tuple[str, ...]:
    """Return the peers of a list, `all` or `none`.

    Raises:
        ConfigError: if one does not exist.
    """
    if text in ("all", "none"):
        return PEERS if text == "all" else ()
    return tuple(_among(name, PEERS, option="--peers", what="a peer") for name in _words(text))


def dispatchers_named(text: str) -> tuple[str, ...]:
    """Return the dispatchers of a list; `all` are those that communicate.

    Raises:
        ConfigError: if one does not exist.
    """
    union = get_args(ParallelConfig.model_fields["dispatcher"].annotation) or ()
    known = [kind for config in union if (kind := config.model_fields["kind"].default) != "local"]
    if text == "all":
        return tuple(known)
    return tuple(_among(name, known, option="--dispatcher", what="a dispatcher") for name in _words(text))


def dtypes_named(text: str) -> tuple[str, ...]:
    """Return the dtypes of a list.

    Raises:
        ConfigError: if one is not a dtype of training that is compared here.
    """
    return tuple(_among(name, list(_BYTES), option="--dtype", what="a dtype") for name in _words(text))


def shapes_of(
    *, experts: Sequence[int], top_k: int, d_model: int, d_ff: int, tokens: int, dtypes: Sequence[str]
) -> list[LayerShape]:
    """Return a shape for each number of experts and dtype.

    Raises:
        ConfigError: if one cannot be computed.
    """
    if d_model % 2:
        raise ConfigError(f"--d-model: {d_model} is odd; use an even number")
    for count in experts:
        if top_k > count:
            raise ConfigError(f"--top-k: {top_k} is more than {count} experts; use 1 to {count}")
        if max(count * d_model * 2 * d_ff, tokens * top_k * max(d_model, 2 * d_ff), tokens * count) > _MAX_VALUES:
            raise ConfigError(f"--experts: {count} of this size are more than a machine can hold; use smaller sizes")
    return [
        LayerShape(num_experts=count, top_k=top_k, d_model=d_model, d_ff=d_ff, tokens=tokens, dtype=dtype)
        for count, dtype in itertools.product(experts, dtypes)
    ]


def shape_of_config(config: ExperimentConfig, dtypes: Sequence[str]) -> list[LayerShape]:
    """Return the shape of a config's MoE layers for each dtype, or for its own."""
    moe = moe_of(config)
    return shapes_of(
        experts=[moe.num_experts],
        top_k=max(1, round(moe.experts_per_token)),
        d_model=config.model.d_model,
        d_ff=moe.d_ff,
        tokens=config.parallel.micro_batch_size * config.model.seq_len,
        dtypes=dtypes or dtypes_named(config.train.dtype),
    )


def moe_of(config: ExperimentConfig) -> MoEConfig:
    """Return the MoE section of a config.

    Raises:
        ConfigError: if it has none.
    """
    if config.model.moe is None:
        raise ConfigError("model.moe: null leaves no experts to measure; name a config with experts")
    return config.model.moe


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _among(name: str, known: Sequence[str], *, option: str, what: str) -> str:
    if name not in known:
        raise ConfigError(f"{option}: {shown(name)} is not {what}; use some of {', '.join(known)}")
    return name
