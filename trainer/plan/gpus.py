"""Table of devices that a plan can be made for: memory, speed and links, from the vendors' data sheets.

Speeds are without sparsity. Links are in bytes per second and direction. What of a device's numbers training reaches is
assumed: see `Reached`. Imports no torch.
"""

from dataclasses import dataclass, field

from trainer.config.nodes import shown
from trainer.errors import ConfigError

_GB, _TB, _T = 10**9, 10**12, 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Fractions of a data sheet's numbers that a step is assumed to reach, and times that it does not state."""

    products: float = 0.6
    """Of the speed of matrix products: published runs of mixtures of experts reach a quarter to a half in all."""
    memory: float = 0.8
    links: float = 0.8
    overlap: float = 0.8
    """Share of the gathers and reductions of weights that is hidden behind computation, as far as there is enough."""
    operation_s: float = 4e-6
    """Least time of an operation: the host starts so many one after the other."""
    shard_call_s: float = 0.0
    """Time of the host for FSDP2 around each gather and reduction of shards, beyond its operations."""
    starts_ahead: bool = True
    """The host starts operations while others are computed; without, both times add up."""
    inside_s: float = 15e-6
    """Latency of a collective inside a node."""
    between_s: float = 35e-6
    """Latency of a collective between nodes."""
    message_s: float = 1e-6
    """Time of each message in addition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device: data sheet numbers of one GPU, and of its links in a usual machine."""

    name: str
    memory: int
    """Bytes."""
    flops: dict[str, float]
    """FLOP/s of matrix products, by dtype."""
    bandwidth: float
    """Bytes/s of its memory."""
    inside: float
    """Bytes/s to the other GPUs of a machine."""
    between: float
    """Bytes/s to other machines: its own network adapter."""
    per_node: int = 8
    """GPUs of a machine."""
    source: str
    reserved: int = 2 * _GB
    """Bytes that are not for tensors: driver, kernels and buffers of the communication library."""
    fragments: float = 0.05
    """Share of memory that the allocator cannot use."""
    reached: Reached = field(default_factory=Reached)

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return int((self.memory - self.reserved) * (1 - self.fragments))


def _gpu(name: str, *, bfloat16: float, float32: float, float64: float, **more: object) -> Gpu:
    flops = {"bfloat16": bfloat16 * _T, "float32": float32 * _T, "float64": float64 * _T}
    return Gpu(name=name, flops=flops, **more)  # type: ignore[arg-type]


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu(
            "A100",
            bfloat16=312,
            float32=19.5,
            float64=19.5,
            memory=80 * _GB,
            bandwidth=2.039 * _TB,
            inside=300 * _GB,
            between=25 * _GB,
            source="NVIDIA A100 80GB SXM data sheet; DGX A100: 200 Gb/s InfiniBand a GPU",
        ),
        _gpu(
            "H100",
            bfloat16=989,
            float32=67,
            float64=67,
            memory=80 * _GB,
            bandwidth=3.35 * _TB,
            inside=450 * _GB,
            between=50 * _GB,
            source="NVIDIA H100 SXM data sheet; DGX H100: 400 Gb/s InfiniBand a GPU",
        ),
        _gpu(
            "H200",
            bfloat16=989,
            float32=67,
            float64=67,
            memory=141 * _GB,
            bandwidth=4.8 * _TB,
            inside=450 * _GB,
            between=50 * _GB,
            source="NVIDIA H200 SXM data sheet; DGX H200: 400 Gb/s InfiniBand a GPU",
        ),
        _gpu(
            "B200",
            bfloat16=2250,
            float32=75,
            float64=37,
            memory=180 * _GB,
            bandwidth=7.7 * _TB,
            inside=900 * _GB,
            between=50 * _GB,
            source="NVIDIA HGX and DGX B200 data sheets; 400 Gb/s InfiniBand a GPU",
        ),
        _gpu(
            "MI300X",
            bfloat16=1307,
            float32=163,
            float64=163,
            memory=192 * _GB,
            bandwidth=5.3 * _TB,
            inside=448 * _GB,
            between=50 * _GB,
            source="AMD Instinct MI300X data sheet and platform brief; 400 Gb/s adapter a GPU",
        ),
        _gpu(
            "L40S",
            bfloat16=362,
            float32=91.6,
            float64=1.4,
            memory=48 * _GB,
            bandwidth=864 * _GB,
            inside=32 * _GB,
            between=25 * _GB,
            per_node=8,
            source="NVIDIA L40S data sheet: PCIe 4.0 x16, no NVLink; 200 Gb/s a GPU",
        ),
        _gpu(
            "cpu",
            bfloat16=0.1,
            float32=0.1,
            float64=0.05,
            memory=8 * _GB,
            bandwidth=10 * _GB,
            inside=1 * _GB,
            between=1 * _GB,
            reserved=0,
            fragments=0.0,
            reached=Reached(
                products=1,
                memory=1,
                links=1,
                overlap=0,
                operation_s=12e-6,
                starts_ahead=False,
                inside_s=3e-4,
                between_s=1e-3,
                message_s=1e-4,
            ),
            source="one core with gloo, a guess: measure yours by doctor --cluster, and pass it as --links",
        ),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return a device by its name, in any case.

    Raises:
        ConfigError: if it is not in the table, with those that are.
    """
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise ConfigError(f"--gpu: {shown(name)} is not in the table; use one of {', '.join(GPUS)}")
    return found
