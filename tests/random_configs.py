"""Train random configs in one process and on two to four ranks, and compare everything that they compute.

    python -m tests.random_configs --count 200 --seed 0       a line for each config, and the worst error
    python -m tests.random_configs --count 1 --seed 17        repeat config 17, which depends on its number only

Covers every router with its options, every loss and capacity rule that must not depend on the layout, and text full of
repeated tokens, in float64 for 10 steps. Settings that `prove` labels as not layout-invariant are never drawn. Exits
with 1 if any config differs by more than 1e-9.
"""

import argparse
import random
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from tests.registries import DISPATCHERS, ROUTERS
from tests.repeated_texts import repeated_texts
from trainer.data.config import FoldConfig
from trainer.engine.config import EMAConfig
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.models.freeze import check_rate_factors, freeze_parameters, frozen_names
from trainer.models.gpt import GPT
from trainer.parallel.pipeline_stages import SCHEDULES, check_micro_batches
from trainer.prove.cases import Case, apply_case, labels, reference
from trainer.prove.compare import Comparison, compare
from trainer.prove.pool import LocalRanks
from trainer.prove.rounding import FLOORS
from trainer.prove.run_case import run_case

CLAMPED = {"activation": "clamped_swiglu", "swiglu_alpha": 1.5, "swiglu_limit": 0.2}  # which values exceed
_OF_RECORDS = ("documents", "answers", "weighted answers")
STEPS, TOLERANCE, TIMEOUT_S = 10, 1e-9, 300.0


@dataclass(frozen=True, slots=True)
class Trial:
    """A config, and the layout that is compared with one process."""

    number: int
    config: ExperimentConfig
    case: Case
    text: str

    @property
    def name(self) -> str:
        """Description in one line."""
        moe = self.config.model.moe
        assert moe is not None
        router = moe.router.model_dump(exclude_defaults=True, exclude={"kind"})
        room = "" if moe.capacity.factor is None else f", room {moe.capacity.factor} by {moe.capacity.policy}"
        train = self.config.train
        learning = "".join(f" {key} {value}" for key in ("freeze", "lr_scale", "ema") if (value := getattr(train, key)))
        return f"{moe.router.kind} {router}{learning} of {moe.num_experts}{room}; {self.text}; {self.case.name}"


def draw(number: int, folder: Path) -> Trial:
    """Return a valid config and a layout that fits it, as a function of the number."""
    drawn = random.Random(number)
    while True:  # rejection sampling: rules between keys refuse a few
        text = drawn.choice(list(repeated_texts(folder)))
        rows, peak_lr = drawn.randint(3, 9), drawn.choice([1e-3, 3e-3, 1e-2])
        values = {
            "name": f"config{number}",
            "seed": drawn.randrange(1000),
            "model": _model(drawn, list(ROUTERS)[number % len(ROUTERS)]) | _adapters(number),
            "data": {
                "sources": repeated_texts(folder)[text],
                "packing": _packing(drawn, text),
                "cache_dir": str(folder / "cache"),
            },
            "optim": {"weight_decay": drawn.choice([0.0, 0.1]), "betas": drawn.choice([(0.9, 0.95), (0.8, 0.999)])},
            "schedule": {
                "kind": drawn.choice(["warmup_cosine", "warmup_stable_decay"]),
                "peak_lr": peak_lr,
                "warmup_steps": drawn.choice([0, 1, 3]),
            },
            "train": {
                "steps": STEPS + drawn.choice([0, 5]),
                "global_batch_size": rows,
                # AdamW scales a gradient that is 0 except for rounding, as that of q and k where all tokens are equal,
                # by lr / eps: with the rounding of a gradient of 100 and lr 1e-2 the result exceeds 1e-9.
                "grad_clip": drawn.choice([0.1, 1.0] if peak_lr > 1e-3 else [None, 0.1, 1.0]),
                "dtype": "float64",
            },
        }
        try:
            config = ExperimentConfig.model_validate(values)
            config = _with_rates(random.Random(f"rates {number}"), config)
            config = _with_fold(random.Random(f"fold {number}"), config, text)
            config = _with_average(random.Random(f"average {number}"), config)
            config = _with_watch(random.Random(f"watch {number}"), config)
            case = replace(_layout(drawn, config), replays=_replays(random.Random(f"replays {number}"), config))
            case = _placed(random.Random(f"placement {number}"), case)
            case = _sharing_rows(random.Random(f"rows {number}"), config, case)
            case = _sharing_heads(random.Random(f"heads {number}"), config, case)
            case = _copied(random.Random(f"copies {number}"), config, case)
            overlaps = case.ep_size > 1 and case.zero_stage is None and number % 2 == 1
            case = replace(case, overlap="micro_batches" if overlaps else "none")
            config, case = _in_stages(random.Random(f"stages {number}"), config, case)
            apply_case(config, case)
        except (ConfigError, ValidationError):  # as where the router of an adapted model has no weights
            continue
        if text == "one byte" and config.model.qk_norm and config.model.norm == "rms_plus_one":
            continue  # where keys are equal these weights get no gradient, so what started at 0 is rounding alone
        if not labels(config):
            return Trial(number, config, case, text)


def _replays(drawn: random.Random, config: ExperimentConfig) -> bool:
    """Draw whether the experts of a first training are replayed, if they can be."""
    moe = config.model.moe
    can_replay = moe is not None and moe.router.replays_experts and moe.router.recorded_k is not None
    return can_replay and drawn.random() < 0.3


def _placed(drawn: random.Random, case: Case) -> Case:
    """Draw where experts are, and whether they are somewhere else after the first step."""
    if case.ep_size == 1:
        return case
    kinds: tuple[Literal["contiguous", "round_robin"], ...] = ("contiguous", "round_robin")
    first, then = drawn.choice(kinds), drawn.choice(kinds)
    return replace(case, placement=first, moves_to=then if then != first else None)


def _sharing_rows(drawn: random.Random, config: ExperimentConfig, case: Case) -> Case:
    """Draw whether ranks share rows, and how."""
    sizes = [n for n in (2, 4) if case.world_size % n == 0 and config.model.seq_len % (2 * n) == 0]
    if not sizes or drawn.random() < 0.5:
        return case
    size = drawn.choice(sizes)
    kinds: tuple[Literal["ulysses", "ring"], ...] = ("ulysses", "ring") if size <= config.model.num_heads else ("ring",)
    rows = -(-config.train.global_batch_size * size // case.world_size)
    return replace(case, cp_size=size, cp=drawn.choice(kinds), micro_batch_size=drawn.randint(1, rows))


def _sharing_heads(drawn: random.Random, config: ExperimentConfig, case: Case) -> Case:
    """Draw whether ranks share heads, beside rows or alone."""
    together = 2 * case.cp_size
    can_share = case.world_size % together == 0 and config.model.seq_len % (2 * together) == 0
    if not can_share or case.zero_stage is not None or drawn.random() < 0.6:
        return case
    heads = replace(case, tp_size=2, micro_batch_size=min(case.micro_batch_size, config.train.global_batch_size))
    try:
        apply_case(config, heads)
    except (ConfigError, ValidationError):  # as for too few heads of keys
        return case
    return heads


def _in_stages(drawn: random.Random, config: ExperimentConfig, case: Case) -> tuple[ExperimentConfig, Case]:
    """Draw whether a layout of two ranks is that of each of two stages, which have the layers of a deeper model."""
    if case.world_size != 2 or case.zero_stage is not None or case.replays or drawn.random() < 0.3:
        return config, case
    values = config.model_dump()
    values["model"]["num_layers"] = drawn.choice([4, 5])
    values["model"]["moe"] |= {"layers": None, "first_dense_layers": 0, "every": 1}
    schedule = drawn.choice(list(SCHEDULES))
    stages = replace(case, world_size=4, pp_size=2, pp_schedule=schedule, micro_batch_size=1)
    rows = -(-config.train.global_batch_size * case.cp_size * case.tp_size // case.world_size)
    try:
        deep = ExperimentConfig.model_validate(values)
        parallel = apply_case(deep, stages).parallel
        check_micro_batches(parallel.degrees, rows, at_once=parallel.at_once)
    except (ConfigError, ValidationError):  # as for too few micro-batches
        return config, case
    return deep, stages


def _copied(drawn: random.Random, config: ExperimentConfig, case: Case) -> Case:
    """Draw how many copies of experts of other ranks each rank has."""
    moe = config.model.moe
    most = 0 if moe is None else moe.num_experts - -(-moe.num_experts // case.ep_size)
    return replace(case, replicas=drawn.choice([0, 1, most, drawn.randint(0, most)])) if most else case


def _packing(drawn: random.Random, text: str) -> str:
    if text == "chats":
        return "bfd"
    return drawn.choice(["wrapped", "bfd"]) if text in _OF_RECORDS else "wrapped"


def _with_fold(drawn: random.Random, config: ExperimentConfig, text: str) -> ExperimentConfig:
    """Return the config with a fold of its documents held out, where it reads many."""
    if text not in _OF_RECORDS or drawn.random() < 0.5:
        return config
    of = drawn.randint(2, 4)
    fold = FoldConfig(index=drawn.randrange(of), of=of, seed=drawn.randrange(3))
    return config.model_copy(update={"data": config.data.model_copy(update={"fold": fold})})


_FROZEN = [["router"], ["experts"], ["embedding", "head"], ["norms", "attention"], ["*", "!router"], ["blocks.0"]]
_FACTORS = [{"router": 0.005}, {"experts": 3.0, "blocks.0.*": 0.1}, {"attention": 0.5, "*_norm": 2.0}, {"*": 0.3}]


def _with_rates(drawn: random.Random, config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with frozen weights and factors of the learning rate, where these fit its model."""
    freeze, lr_scale = drawn.choice([[], [], *_FROZEN]), drawn.choice([{}, {}, *_FACTORS])
    with torch.device("meta"):
        try:
            model = GPT(config.model, 256)
        except ConfigError:  # what learns beside adapters has no weights, as a router that hashes
            config = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
            model = GPT(config.model, 256)
    try:
        freeze_parameters(model, frozen_names(model, freeze))
        check_rate_factors(model, lr_scale)
    except ConfigError:  # a router without weights, or factors of frozen weights only
        return config
    train = config.train.model_copy(update={"freeze": freeze, "lr_scale": lr_scale})
    return config.model_copy(update={"train": train})


def _with_average(drawn: random.Random, config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with a moving average of the weights, or without one."""
    if drawn.random() < 0.6:
        return config
    fields = {"start_step": drawn.choice([0, 2]), "every": drawn.choice([1, 3]), "warmup": drawn.random() < 0.5}
    ema = EMAConfig(decay=drawn.choice([0.3, 0.9, 0.999]), **fields)
    return config.model_copy(update={"train": config.train.model_copy(update={"ema": ema})})


def _with_watch(drawn: random.Random, config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with what watches a run, keeps its best and ends it, none of which changes a step."""
    alarms = drawn.choice([{}, {"plateau": None, "patience": 1, "collapse": 0.9}, None])
    changes: dict[str, Any] = {"metrics": {"alarms": alarms, "log_every": drawn.choice([1, 4])}}
    if drawn.random() < 0.5:
        stopping = {"metric": "eval/loss", "patience": drawn.randint(1, 3)}
        end = drawn.choice([{"stop_after": drawn.randint(1, STEPS - 1)}, {"early_stopping": stopping}])
        changes |= {"train": end, "checkpoint": {"best": "eval/loss"}, "eval": {"every": drawn.choice([2, 5])}}
    values = config.model_dump()
    return ExperimentConfig.model_validate(values | {name: values[name] | keys for name, keys in changes.items()})


def _model(drawn: random.Random, kind: str) -> dict[str, Any]:
    layers, heads = drawn.randint(1, 3), drawn.choice([1, 2, 4])
    fields: dict[str, Any] = {
        "num_layers": layers,
        "d_model": heads * drawn.choice([4, 8]),
        "num_heads": heads,
        "num_kv_heads": drawn.choice([None, 1]),
        "d_ff": 16,
        "seq_len": drawn.choice([8, 12, 24, 32]),
        "document_mask": drawn.choice([False, True]),
        **drawn.choice([{"activation": "swiglu"}, {"activation": "gelu"}, CLAMPED]),
        "qk_norm": drawn.random() < 0.3,
        "attention": _attention(drawn),
        "rope_scaling": drawn.choice([None, None, *_SCALINGS]),
        "norm": drawn.choice(["rms", "rms_plus_one"]),
        "logit_softcap": drawn.choice([None, None, 3.0]),
        "tie_embeddings": drawn.random() < 0.3,
        "vocab_size": drawn.choice([None, None, 261]),
        "init_std": drawn.choice([0.02, 0.1, 0.3, 0.6]),
        "moe": _moe(drawn, kind, layers),
        "vocab_z_loss_coef": 0.01 if drawn.random() < 0.3 else 0.0,
    }
    if drawn.random() < 0.2:
        biases = {key: fields["attention"][key] for key in ("qkv_bias", "out_bias")}
        fields |= {"num_kv_heads": None, "qk_norm": False, "attention": {"latent": _latent(drawn), **biases}}
    return fields


def _adapters(number: int) -> dict[str, Any]:
    """Return adapters for some of the configs, drawn by themselves."""
    drawn = random.Random(f"adapters {number}")
    if drawn.random() < 0.75:
        return {}
    lora = {
        "rank": drawn.choice([1, 2, 3]),
        "alpha": drawn.choice([1.0, 6.0]),
        "use_rslora": drawn.random() < 0.5,
        "targets": drawn.choice([None, ["experts"], ["attention", "experts.w_out"]]),
        "trains": drawn.choice([(), ("router",), ("norms", "router")]),
    }
    return {"lora": lora}


def _latent(drawn: random.Random) -> dict[str, Any]:
    return {
        "q_lora_rank": drawn.choice([None, 6]),
        "kv_lora_rank": drawn.choice([4, 10]),
        "qk_nope_head_dim": drawn.choice([4, 7]),
        "qk_rope_head_dim": drawn.choice([2, 4]),
        "v_head_dim": drawn.choice([4, 9]),
    }


_SCALINGS = [
    {"kind": "linear", "factor": 2.0},
    {"kind": "dynamic", "factor": 2.0, "original_length": 6},
    {"kind": "yarn", "factor": 4.0, "original_length": 6, "beta_fast": 1.0, "beta_slow": 0.1},
    {"kind": "llama3", "factor": 4.0, "original_length": 6, "low_freq_factor": 0.1, "high_freq_factor": 1.0},
]


def _attention(drawn: random.Random) -> dict[str, Any]:
    window = drawn.choice([None, None, 1, 5])
    return {
        "head_dim": drawn.choice([None, None, 6]),
        "qkv_bias": drawn.random() < 0.3,
        "out_bias": drawn.random() < 0.3,
        "qk_norm_over": drawn.choice(["head", "all_heads"]),
        "clip_qkv": drawn.choice([None, None, 0.5]),
        "rotary_fraction": drawn.choice([1.0, 1.0, 0.5, 0.67]),
        "scale": drawn.choice([None, None, 0.3]),
        "softcap": drawn.choice([None, None, 0.5]),
        "sinks": drawn.random() < 0.3,
        "window": window,
        "window_pattern": drawn.choice([["sliding"], ["sliding", "full"]]) if window else ["sliding"],
    }


def _moe(drawn: random.Random, kind: str, layers: int) -> dict[str, Any]:
    num_experts = 1 if kind == "mixture_of_depths" else drawn.choice([2, 3, 4, 6, 8, 9])

    def sometimes(value: Any, otherwise: Any) -> Any:
        return value if drawn.random() < 0.3 else otherwise

    scope = drawn.choice(["sequence", "global_batch"])
    return {
        "num_experts": num_experts,
        "d_ff": drawn.choice([4, 12]),
        **_places(drawn, layers),
        **_shared(drawn),
        "expert_bias": drawn.random() < 0.4,
        "router": _router(drawn, kind, num_experts),
        "capacity": _capacity(drawn) if ROUTERS[kind].has_fixed_k and drawn.random() < 0.5 else {},
        "balance": {
            "coef": drawn.choice([0.0, 0.01, 0.3]),
            "scope": scope,
            "counts": sometimes("previous_step", "exact") if scope == "global_batch" else "exact",
            "convention": sometimes(drawn.choice(["hf", "megatron", "gshard_first_choice"]), "canonical"),
        },
        "cv_squared": {
            "importance_coef": sometimes(0.1, 0.0),
            "load_coef": 0.1 if kind == "noisy_top_k" and drawn.random() < 0.5 else 0.0,
            "scope": drawn.choice(["sequence", "global_batch"]),
        },
        "device_balance": {"coef": sometimes(0.1, 0.0), "groups": drawn.choice([2, 3])},
        "diversity_coef": sometimes(0.1, 0.0),
        "z_loss_coef": drawn.choice([0.0, 0.001, 0.1]),
    }


def _places(drawn: random.Random, layers: int) -> dict[str, Any]:
    """Draw which layers are MoE."""
    if drawn.random() < 0.2:
        return {"layers": sorted(drawn.sample(range(layers), drawn.randint(1, layers)))}
    first = 1 if layers > 1 and drawn.random() < 0.3 else 0
    return {"first_dense_layers": first, "every": 2 if drawn.random() < 0.3 else 1}


def _shared(drawn: random.Random) -> dict[str, Any]:
    """Draw the shared experts."""
    if drawn.random() < 0.6:
        return {}
    return {
        "num_shared_experts": drawn.randint(1, 2),
        "shared_d_ff": drawn.choice([None, 5]),
        "shared_gate": drawn.random() < 0.5,
    }


def _capacity(drawn: random.Random) -> dict[str, Any]:
    return {
        "factor": drawn.choice([0.5, 1.0, 1.25]),
        "min": drawn.randint(1, 3),
        "policy": drawn.choice(["position", "choice_major", "probability", "random"]),
        "renormalize_after_drop": drawn.random() < 0.3,
    }


def router_options(drawn: random.Random, num_experts: int) -> dict[str, Any]:
    """Return a value for every option of any router."""
    most = min(4, num_experts)
    return {
        "top_k": drawn.randint(1, most),
        "top_k_choices": [1, most, drawn.randint(1, most)],
        "normalize": drawn.random() < 0.5,
        "scale": drawn.choice([0.5, 2.0]),
        "null_experts": drawn.randint(1, 3),
        "jitter": drawn.choice([0.01, 0.3]),
        "score": drawn.choice(["softmax", "sigmoid"]),
        "bias_update_rate": drawn.choice([0.0, 0.001, 0.05]),
        "groups": drawn.randint(2, 4),
        "groups_kept": drawn.randint(1, 2),
        "group_score": drawn.choice(["best", "best_two"]),
        "random_second": drawn.random() < 0.5,
        "d_proj": drawn.choice([3, 8]),
        "p": drawn.choice([0.3, 0.5, 0.9, 1.0]),
        "max_experts": drawn.randint(1, most),
        "gate_bias": drawn.random() < 0.7,
        "sparsity_coef": drawn.choice([0.0, 0.1]),
        "capacity_factor": drawn.choice([0.6, 1.0, 1.5]),
        "iterations": drawn.choice([1, 5, 30]),
        "capacity": drawn.choice([0.125, 0.5, 1.0]),
        "predictor_coef": drawn.choice([0.01, 0.3]),
        "salt": drawn.randrange(5),
        "evaluation_routing": drawn.choice(["top_k", "as_trained"]),
    }


def _router(drawn: random.Random, kind: str, num_experts: int) -> dict[str, Any]:
    """Draw some of the options of a kind of router; the others keep their defaults."""
    options = router_options(drawn, num_experts)
    known = ROUTERS[kind].model_fields
    return {"kind": kind} | {key: value for key, value in options.items() if key in known and drawn.random() < 0.5}


def _layout(drawn: random.Random, config: ExperimentConfig) -> Case:
    moe = config.model.moe
    assert moe is not None
    world_size = drawn.randint(2, 4)
    ep_size = drawn.choice([n for n in range(1, world_size + 1) if world_size % n == 0 and n <= moe.num_experts])
    dispatcher = "all_to_all"
    if ep_size > 1:
        unusable = {"local"} | ({"padded_all_to_all"} if moe.capacity.factor is None else set())
        dispatcher = drawn.choice([kind for kind in DISPATCHERS if kind not in unusable])
    return Case(
        world_size=world_size,
        ep_size=ep_size,
        dispatcher=dispatcher,
        chunks=drawn.randint(1, min(3, moe.num_experts // ep_size)),
        data=drawn.choice(["replicate", "shard"]),
        ranks_per_node=2 if world_size == 4 else 4,
        micro_batch_size=drawn.randint(1, -(-config.train.global_batch_size // world_size)),
        loss_chunk=drawn.choice([None, 1, 5, 1024]),
        recompute=drawn.choice(["none", "experts", "norms_and_activations", "block"]),
    )


def compared(trial: Trial, ranks: LocalRanks) -> Comparison:
    """Train in one process and on ranks, and compare."""
    alone = run_case(trial.config, reference(trial.config), ranks, steps=STEPS, timeout_s=TIMEOUT_S)
    together = run_case(trial.config, trial.case, ranks, steps=STEPS, timeout_s=TIMEOUT_S)
    return compare(together, alone, tolerance=TOLERANCE, floor=FLOORS["float64"])


def main() -> int:
    """Compare `--count` configs, starting with number `--seed`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="number of the first config")
    options = parser.parse_args()
    worst, differing = 0.0, []
    with tempfile.TemporaryDirectory() as folder, closing(LocalRanks()) as ranks:
        for number in range(options.seed, options.seed + options.count):
            start = time.perf_counter()
            trial = draw(number, Path(folder))
            found = compared(trial, ranks)
            group, error = max(found.worst.items(), key=lambda pair: pair[1])
            worst = max(worst, error)
            verdict = "equal" if found.is_equal else f"DIFFERS: {found.first_different}: {found.cause}"
            spent = time.perf_counter() - start
            print(f"{number:4} {error:7.0e} {group:16} {spent:5.1f}s  {trial.name}  {verdict}", flush=True)
            if not found.is_equal:
                differing.append(number)
    print(f"{options.count} configs, the worst relative error {worst:.0e}; {len(differing)} differ: {differing}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
