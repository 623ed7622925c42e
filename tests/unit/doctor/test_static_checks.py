"""Every static check finds its seeded fault, and none says a word about a config that comes with the package."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.config.loader import load
from trainer.doctor.cluster.cluster_checks import CLUSTER_CHECKS
from trainer.doctor.cluster.dispatch_checks import DISPATCH_CHECKS
from trainer.doctor.finding import DoctorFinding, examine
from trainer.doctor.host_facts import HostFacts
from trainer.doctor.recorded.run_checks import RUN_CHECKS
from trainer.doctor.static import size_checks
from trainer.doctor.static.config_on_host import ConfigOnHost
from trainer.doctor.static.registry import STATIC_CHECKS
from trainer.doctor.step.step_checks import STEP_CHECKS
from trainer.doctor.step.text_checks import TEXT_CHECKS
from trainer.experiment import ExperimentConfig

ROOT = Path(__file__).parents[3]
SHIPPED = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "sweeps"]
ONE = HostFacts(cores=2)
NODE = HostFacts(
    environment={"OMP_NUM_THREADS": "8"},
    cores=64,
    world_size=8,
    ranks_here=8,
    has_gpu=True,
    shared_memory_bytes=64 << 30,
    open_files=65536,
    file_system="ext4",
    free_bytes=10**15,
)
NODES = replace(NODE, world_size=16)
"""Two of them."""
CUDA = ["parallel.device=cuda", "train.dtype=bfloat16", "model.d_model=1024", "model.moe.d_ff=512"]
CUDA += ["model.seq_len=1024", "parallel.micro_batch_size=32", "train.global_batch_size=512"]
"""A config that fits GPUs."""


def found(overrides: list[str], host: HostFacts = ONE, config: str = "quickstart") -> dict[str, DoctorFinding]:
    """Examine a shipped config with some keys changed."""
    subject = ConfigOnHost(config=load(ROOT / f"configs/{config}.yaml", overrides, ExperimentConfig), host=host)
    return {finding.check: finding for finding in examine(STATIC_CHECKS, subject)}


def started(host: HostFacts, **variables: str) -> dict[str, Any]:
    """Return a host whose ranks are started with these variables too."""
    return {"overrides": CUDA, "host": replace(host, environment={**host.environment, **variables})}


BIAS = "model.moe.router={kind: bias_balanced, bias_update_rate: %s}"
NO_COEF = "model.moe.balance.coef=0"
FAULTS: dict[str, list[dict[str, Any]]] = {
    "no_balance": [{"overrides": [NO_COEF]}, {"overrides": [NO_COEF, BIAS % 0]}],
    "inert_bias": [{"overrides": [BIAS % 0]}, {"overrides": [BIAS % "1e-6"]}],
    "fast_bias": [{"overrides": [BIAS % 0.1]}],
    "layout_balance": [
        {"overrides": ["model.moe.balance.scope=micro_batch"]},
        {"overrides": ["model.moe.balance.counts=running"]},
    ],
    "sequence_balance": [{"overrides": ["model.moe.balance.scope=sequence"]}],
    "balance_coefficient": [
        {"overrides": ["model.moe.balance.coef=0.5"]},
        {"overrides": ["model.moe.balance.coef=1e-7"]},
        {"overrides": ["model.moe.balance={coef: 0.09, convention: hf}"]},
    ],
    "z_coefficient": [{"overrides": ["model.moe.z_loss_coef=0.1"]}],
    "no_z_loss": [{"overrides": ["model.moe.z_loss_coef=0", "train.dtype=bfloat16"]}],
    "look_ahead_routing": [
        {"overrides": ["model.moe.router={kind: expert_choice}"]},
        {"overrides": ["model.moe.router={kind: sinkhorn, evaluation_routing: as_trained}"]},
    ],
    "eviction": [
        {"overrides": ["model.moe.capacity={factor: 1.25, scope: rank}"]},
        {"overrides": ["model.moe.capacity={factor: 1.25, policy: probability}"]},
    ],
    "tight_capacity": [{"overrides": ["model.moe.capacity.factor=0.5"]}],
    "drawn_single_expert": [{"overrides": ["model.moe.router={top_k: 2, top_k_choices: [1, 2]}"]}],
    "frozen_random_router": [{"overrides": ["train.freeze=[router]"]}],
    "uneven_experts": [{"overrides": ["parallel.ep_size=3"], "host": replace(NODE, world_size=3, ranks_here=3)}],
    "learning_rate": [{"overrides": ["schedule.peak_lr=0.03"]}, {"overrides": ["train.lr_scale={router: 100}"]}],
    "no_warmup": [{"overrides": ["schedule.warmup_steps=0"]}],
    "long_warmup": [{"overrides": ["schedule.warmup_steps=0.8"]}],
    "slow_second_moment": [{"overrides": ["optim.betas=[0.9, 0.999]"]}],
    "no_clipping": [{"overrides": ["train.grad_clip=null"]}],
    "strong_decay": [{"overrides": ["optim.weight_decay=3"]}],
    "rounded_float32": [started(NODE, NVIDIA_TF32_OVERRIDE="1")],
    "slow_precision": [{"overrides": [*CUDA, "train.dtype=float32"], "host": NODE}],
    "small_experts": [{"overrides": [*CUDA, "model.moe.d_ff=64"], "host": NODE}],
    "few_rows_per_expert": [{"overrides": [*CUDA, "parallel.micro_batch_size=1", "model.seq_len=64"], "host": NODE}],
    "unaligned_widths": [{"overrides": [*CUDA, "model.moe.d_ff=520"], "host": NODE}],
    "spare_ids": [{"overrides": ["model.vocab_size=8192", "data.tokenizer={kind: bpe, vocab_size: 1024}"]}],
    "large_logits": [{"overrides": [*CUDA, "parallel.loss_chunk=null", "model.vocab_size=100000"], "host": NODE}],
    "unchecked_kernel": [{"overrides": [*CUDA, "parallel.kernel_canary=off"], "host": NODE}],
    "unfit_ranks": [
        {"overrides": [*CUDA, "parallel.ep_size=3"], "host": NODE},
        {"overrides": [*CUDA, "parallel={data: shard, shard_size: 3}"], "host": NODE},
        {"overrides": ["parallel.ep_size=2", "parallel.placement=absent.json"]},
    ],
    "idle_ranks": [
        {"overrides": [*CUDA, "train.global_batch_size=4"], "host": NODE},
        {"overrides": [*CUDA, "train.global_batch_size=9"], "host": NODE},
    ],
    "experts_across_nodes": [{"overrides": [*CUDA, "parallel.ep_size=16", "model.moe.num_experts=16"], "host": NODES}],
    "disk_space": [
        {"overrides": CUDA, "host": replace(NODE, free_bytes=10**8)},
        {
            "overrides": [*CUDA, "checkpoint.keep_every=500", "train.steps=5000000"],
            "host": replace(NODE, free_bytes=10**12),
        },
    ],
    "unsafe_rename": [{"overrides": CUDA, "host": replace(NODE, file_system="fuse.s3fs")}],
    "lost_storage": [{"overrides": CUDA, "host": replace(NODE, file_system="tmpfs")}],
    "rare_checkpoints": [
        {"overrides": [*CUDA, "checkpoint.every=null", "train.steps=50000"], "host": NODE},
        {"overrides": [*CUDA, "checkpoint.every=20000", "train.steps=50000"], "host": NODE},
    ],
    "infiniband_off": [
        started(NODES, NCCL_IB_DISABLE="1"),
        started(replace(NODE, has_infiniband=True), NCCL_IB_DISABLE="1"),
    ],
    "direct_copies_off": [
        started(NODE, NCCL_P2P_DISABLE="1"),
        started(NODE, NCCL_P2P_LEVEL="LOC"),
        started(NODE, NCCL_SHM_DISABLE="1"),
    ],
    "inward_interface": [started(NODES, NCCL_SOCKET_IFNAME="lo"), started(NODES, GLOO_SOCKET_IFNAME="eth0,docker0")],
    "silent_hangs": [started(NODE, TORCH_NCCL_ASYNC_ERROR_HANDLING="0")],
    "blocking_wait": [started(NODE, TORCH_NCCL_BLOCKING_WAIT="1")],
    "debugging_left_on": [started(NODE, CUDA_LAUNCH_BLOCKING="1"), started(NODE, TORCH_DISTRIBUTED_DEBUG="detail")],
    "one_queue": [started(NODE, CUDA_DEVICE_MAX_CONNECTIONS="1")],
    "too_many_threads": [
        started(NODE, OMP_NUM_THREADS="16"),
        {"overrides": CUDA, "host": replace(NODE, environment={})},
    ],
    "small_shared_memory": [{"overrides": CUDA, "host": replace(NODE, shared_memory_bytes=64 << 20)}],
    "few_open_files": [{"overrides": CUDA, "host": replace(NODE, open_files=256)}],
    "little_locked_memory": [{"overrides": CUDA, "host": replace(NODE, locked_bytes=65536, has_infiniband=True)}],
}


def test_every_check_has_a_seeded_fault() -> None:
    names = [check.name for check in STATIC_CHECKS]
    assert set(names) == set(FAULTS) and len(names) == len(set(names))


@pytest.mark.parametrize("name", FAULTS)
def test_a_check_finds_its_seeded_faults(name: str) -> None:
    for fault in FAULTS[name]:
        assert name in found(**fault), fault


@pytest.mark.parametrize("host", [ONE, HostFacts()], ids=["two cores", "64 cores"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_nothing_is_found_in_a_shipped_config(path: Path, host: HostFacts) -> None:
    subject = ConfigOnHost(config=load(path, [], ExperimentConfig), host=host)
    assert examine(STATIC_CHECKS, subject) == []


@pytest.mark.parametrize("host", [NODE, NODES], ids=["8 GPUs", "16 GPUs"])
def test_nothing_is_found_in_a_config_for_gpus_on_them(host: HostFacts) -> None:
    assert found([], host, config="moe_1b") == {}
    assert found(CUDA, host) == {}


def test_a_fault_of_gpus_is_none_on_a_cpu() -> None:
    cpu = replace(
        NODE, has_gpu=False, shared_memory_bytes=1, environment={"OMP_NUM_THREADS": "8", "NCCL_P2P_DISABLE": "1"}
    )
    assert found(["train.global_batch_size=64"], cpu) == {}


def test_a_finding_says_what_where_why_and_what_to_do() -> None:
    for name, faults in FAULTS.items():
        finding = found(**faults[0])[name]
        assert all([finding.found, finding.why, finding.remedy])
        assert "arXiv" in finding.source or "#" in finding.source


def test_what_is_severe_depends_on_how_bad_it_is() -> None:
    assert found(["schedule.peak_lr=0.03"])["learning_rate"].severity == "warning"
    assert found(["schedule.peak_lr=0.3"])["learning_rate"].severity == "severe"
    assert found([*CUDA, "train.global_batch_size=4"], NODE)["idle_ranks"].severity == "severe"
    assert found([*CUDA, "train.global_batch_size=9"], NODE)["idle_ranks"].severity == "warning"


def test_the_documentation_has_every_check() -> None:
    text = (ROOT / "docs/doctor.md").read_text()
    for check in (*STATIC_CHECKS, *STEP_CHECKS, *TEXT_CHECKS, *RUN_CHECKS, *CLUSTER_CHECKS, *DISPATCH_CHECKS):
        assert f"| `{check.name}` | {check.severity} | {check.why} | {check.source} |" in text


def test_a_library_for_rows_is_named_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,) = FAULTS["experts_across_nodes"]
    assert "deepep" not in found(**fault)["experts_across_nodes"].remedy
    monkeypatch.setattr(size_checks, "is_installed", lambda package: package == "deep_ep")
    assert found(**fault)["experts_across_nodes"].remedy.endswith("or deepep, which is installed")
