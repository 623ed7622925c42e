"""DeepSpeed's own options: passed through, required to agree with ours, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from tests.builders import make_engine_of, tiny_model_config
from trainer.config.loader import load
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.deepspeed.optimizer import moments_of, set_steps
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.prove.all_cases import all_cases
from trainer.prove.cases import apply_case, without_repeated_options
from trainer.prove.small_config import shrink


def _experiment(raw: Any, *, zero_stage: int = 1, **sections: Any) -> ExperimentConfig:
    engine = {"kind": "deepspeed", "zero_stage": zero_stage, "deepspeed_config": raw}
    return ExperimentConfig.model_validate({"name": "x", "engine": engine, **sections})


def _refusal(raw: Any, **sections: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        _experiment(raw, **sections)
    (error,) = caught.value.errors()
    return str(error["msg"]).split("; engine.")


AGREES = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": "auto",
        "stage3_max_live_parameters": 1_000_000,
        "offload_optimizer": {"device": "none", "pin_memory": True},
    },
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
}


def test_a_file_that_says_the_same_is_taken_over_without_what_is_said_elsewhere() -> None:
    config = _experiment(AGREES, zero_stage=2, train={"dtype": "bfloat16"})
    assert isinstance(config.engine, DeepSpeedEngineConfig)
    assert config.engine.resolved(grad_clip=1.0) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": 50_000_000,
            "offload_optimizer": {"pin_memory": True},
        },
        "steps_per_print": 100,
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"train_batch_size": 8}, "train_batch_size: 8, but train.global_batch_size is 64"),
        ({"train_micro_batch_size_per_gpu": 2}, "2, but parallel.micro_batch_size is 8"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5, but train.grad_clip is 1.0"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: 2, but engine.zero_stage is 1"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: true, but engine.zero_stage is 1"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, '"nvme", but engine.offload_opti'),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type: "Lamb": the engine trains with AdamW'),
        ({"optimizer": {"params": {"lr": 1e-4}}}, "optimizer.params.lr: 0.0001, but schedule.peak_lr is 0.001"),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "[0.9, 0.999], but optim.betas is [0.9, 0.95]"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler: the learning rate is that of `schedule`"),
        ({"bf16": {"enabled": True}}, "it would round the router's weights as well; train.dtype: bfloat16 keeps them"),
        ({"fp16": {"enabled": True}}, "there is no float16; use train.dtype: bfloat16"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled: true, but `train.dtype: bfloat16` is false"),
        ({"communication_data_type": "bf16"}, "gradients are summed in float32"),
        ({"gradient_accumulation_steps": 4}, "it follows from train.global_batch_size, parallel.micro_batch_size and"),
        ({"prescale_gradients": True}, "prescale_gradients: true: gradients are summed, not averaged"),
        ({"progressive_layer_drop": {"enabled": True}}, "not among DeepSpeed's options that are known"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        ({"steps_per_print": 0}, "steps_per_print: 0 is not a whole number above 0"),
        ({"steps_per_print": "often"}, 'steps_per_print: "often" is not a whole number above 0'),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown: 1 is not true or false"),
        ({"csv_monitor": 5}, "csv_monitor: 5 is not a mapping"),
        ({"csv_monitor": {"output_path": "/tmp/x"}}, "output_path: '/tmp/x': it is deepspeed/csv_monitor in the run"),
        ({"tensorboard": {"output_path": "logs"}}, "output_path: 'logs': it is deepspeed/tensorboard in the run"),
        ({"csv_monitor": {"job_name": "../../x"}}, "job_name: '../../x' is not the name of something in the run"),
        ({"tensorboard": {"job_name": "/tmp"}}, "job_name: '/tmp' is not the name of something in the run folder"),
        ({"flops_profiler": {"output_file": "a/b.txt"}}, "output_file: 'a/b.txt' is not the name of something in the"),
        ({"flops_profiler": {"output_file": "a\n"}}, "output_file: 'a\\n' is not the name of something in the run"),
        ({"flops_profiler": {"output_file": 5}}, "output_file: 5 is not the name of something in the run folder"),
        ({"wandb": {"enabled": True, "project": "x"}}, "wandb: it would upload from within the run and write outside"),
        ({"comet": {"enabled": True, "api_key": "x"}}, "comet: it would upload from within the run and write outside"),
        ({"steps_per_print": 1e300}, "steps_per_print: 1e+300 is not a whole number above 0"),
        ({"progressive_layer_drop": "x" * 5000}, "not among DeepSpeed's options that are known not to change what is"),
        ({"zero_optimization": {"allgather_bucket_size": 3}}, "3 is not an even whole number above 0"),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, "-5 is not a whole number above 0"),
        ({"timers": {"throughput": {"enabled": True}}}, "not among DeepSpeed's options that are known"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel: experts are split over parallel.ep_size ranks"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_says_otherwise_or_may_change_what_is_learned_is_an_error(raw: Any, said: str) -> None:
    (message,) = _refusal(raw)
    assert said in message and message.startswith("engine.deepspeed_config.")


def test_what_deepspeed_writes_is_in_the_run_folder(tmp_path: Path) -> None:
    raw = {
        "csv_monitor": {"enabled": True},
        "tensorboard": {"enabled": True, "output_path": "", "job_name": "mine"},
        "flops_profiler": {"enabled": True, "output_file": "flops.txt", "profile_step": 2},
        "wandb": {"enabled": False, "project": "x"},
        "comet": {"enabled": "auto"},
    }
    engine = _experiment(raw).engine
    assert isinstance(engine, DeepSpeedEngineConfig)
    given = engine.resolved(grad_clip=None, folder=tmp_path / "deepspeed")
    assert given["csv_monitor"] == {"enabled": True, "output_path": f"{tmp_path}/deepspeed", "job_name": "csv_monitor"}
    assert given["tensorboard"]["output_path"] == f"{tmp_path}/deepspeed/tensorboard"
    assert given["tensorboard"]["job_name"] == "mine"
    assert given["flops_profiler"]["output_file"] == f"{tmp_path}/deepspeed/flops.txt"
    nowhere = engine.resolved(grad_clip=None)  # as in `prove`
    assert not {"csv_monitor", "tensorboard", "flops_profiler", "wandb", "comet"} & nowhere.keys()
    assert not {"wandb", "comet"} & given.keys()


def test_deepspeed_s_own_csv_files_are_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed creates its folder as soon as it starts: below the run folder, whatever the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    section = DeepSpeedEngineConfig(deepspeed_config={"csv_monitor": {"enabled": True}})
    engine = make_engine_of(section, tiny_model_config(), folder=tmp_path / "run" / "deepspeed")
    engine.close()
    assert [path.name for path in tmp_path.glob("run/deepspeed/*")] == ["csv_monitor"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_everything_is_said_at_once() -> None:
    assert len(_refusal({"train_batch_size": 8, "bf16": {"enabled": True}, "gradient_clipping": 3})) == 3


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (0, "0: DeepSpeed clips by the mean of the ranks' norms there"),
        (3, "3: DeepSpeed has no expert parallelism there; use 1 or 2, or engine.kind native with parallel.data shard"),
        (4, "4: there is no such stage; use 1 or 2"),
    ],
)
def test_other_stages_are_refused_with_the_reason(stage: int, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DeepSpeedEngineConfig(zero_stage=stage)


def _load(folder: Path, name: str) -> ExperimentConfig:
    (folder / "x.yaml").write_text("name: x\nengine: {kind: deepspeed, zero_stage: 2}\n")
    return load(folder / "x.yaml", [f"engine.deepspeed_config={folder / name}"], ExperimentConfig)


def test_a_json_file_is_read_once_and_recorded(tmp_path: Path) -> None:
    raw = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    (tmp_path / "ds.json").write_text(json.dumps(raw))
    engine = _load(tmp_path, "ds.json").engine
    assert isinstance(engine, DeepSpeedEngineConfig) and engine.deepspeed_config == raw
    assert DeepSpeedEngineConfig.model_validate(engine.model_dump()) == engine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("", "is not JSON: Expecting value: line 1 column 1"),
        ("[1]", "ds.json: is not a mapping"),
        ('{"a": 1, "a": 2}', "has the key a twice"),
        (
            '{"gradient_clipping": NaN}',
            "engine.deepspeed_config.gradient_clipping.float: Input should be a finite number",
        ),
        (
            '{"gradient_clipping": 1e999}',
            "engine.deepspeed_config.gradient_clipping.float: Input should be a finite number",
        ),
        (f'{{"steps_per_print": {"9" * 5000}}}', "ds.json: Exceeds the limit (4300 digits)"),
        ("[" * 100_000, "ds.json: maximum recursion depth exceeded"),
        ('{"train_batch_size": 8}', "engine.deepspeed_config.train_batch_size: 8, but train.global_batch_size is 64"),
    ],
)
def test_a_bad_file_is_answered_in_a_line(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, "ds.json")
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        _load(tmp_path, ".")


def test_buckets_must_hold_everything_where_ranks_hold_different_numbers_of_experts() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 1000}}
    model = {"moe": {"num_experts": 5}}
    _experiment(raw, model=model)
    (message,) = _refusal(raw, model=model, parallel={"ep_size": 2})
    assert "zero_optimization.reduce_bucket_size: parallel.ep_size does not divide model.moe.num_experts" in message


def test_null_says_nothing() -> None:
    config = _experiment({"tensorboard": None, "zero_optimization": {"reduce_bucket_size": None}})
    assert isinstance(config.engine, DeepSpeedEngineConfig)
    assert config.engine.resolved(grad_clip=None)["zero_optimization"] == {"stage": 1}
    assert "tensorboard" not in config.engine.resolved(grad_clip=None)


def test_a_proof_takes_no_offence_at_what_it_changes_itself() -> None:
    raw = {"train_batch_size": 16, "torch_autocast": {"enabled": True}, "zero_optimization": {"overlap_comm": True}}
    config = _experiment(raw, train={"global_batch_size": 16, "dtype": "bfloat16"})
    plain = shrink(without_repeated_options(config))
    assert isinstance(plain.engine, DeepSpeedEngineConfig)
    assert plain.engine.deepspeed_config == {"zero_optimization": {"overlap_comm": True}}
    cases = all_cases(plain, ["native", "deepspeed"])
    assert {apply_case(plain, case).engine.kind for case in cases} == {"native", "deepspeed"}


def test_what_deepspeed_itself_refuses_is_a_config_error_and_leaves_nothing(tmp_path: Path) -> None:
    section = DeepSpeedEngineConfig(deepspeed_config={"csv_monitor": {"enabled": "perhaps"}})
    with pytest.raises(ConfigError, match=r"engine.deepspeed_config: DeepSpeed refuses it: 1 validation error"):
        make_engine_of(section, tiny_model_config(), folder=tmp_path)
    assert not dist.is_initialized()


class CountsInNumbers(torch.optim.Optimizer):
    """Optimizer whose state has the format of DeepSpeed's kernels."""

    def __init__(self, flat: torch.Tensor) -> None:
        super().__init__([flat], {})


def test_moments_and_counter_of_an_optimizer_that_counts_in_numbers() -> None:
    flat = torch.ones(3, requires_grad=True)
    optimizer = CountsInNumbers(flat)
    found = moments_of(optimizer, flat)
    assert {key: tensor.tolist() for key, tensor in found.items()} == {"exp_avg": [0.0] * 3, "exp_avg_sq": [0.0] * 3}
    found["exp_avg"].fill_(2.0)
    set_steps(optimizer, flat, 7)
    assert optimizer.state[flat]["step"] == 7 and isinstance(optimizer.state[flat]["step"], int)
    assert moments_of(optimizer, flat)["exp_avg"].tolist() == [2.0] * 3
