"""Other trainers' names: the message suggests the counterpart here, never a key that only looks similar."""

import difflib
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from trainer.config import slots
from trainer.config.foreign import NO_HALF, SECTIONS, Counterpart, counterpart, tables, values
from trainer.config.loader import load
from trainer.config.overrides import as_override
from trainer.config.wording import choice, unknown_key
from trainer.config.yaml_nodes import resolve
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.models.config import ModelConfig

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"
TYPICAL: dict[str, str] = {
    **dict.fromkeys(
        ("model.d_model", "model.d_ff", "model.moe.d_ff", "model.seq_len", "model.attention.head_dim"), "128"
    ),
    "model.attention.latent.qk_rope_head_dim": "64",
    **{"model.lora.rank": "8", "model.lora.alpha": "16.0", "model.lora.use_rslora": "true"},
    **dict.fromkeys(("model.num_layers", "model.num_heads", "model.moe.num_experts", "train.global_batch_size"), "16"),
    **dict.fromkeys(("model.num_kv_heads", "model.moe.router.top_k", "model.moe.every"), "2"),
    **dict.fromkeys(("model.moe.num_shared_experts", "model.moe.first_dense_layers"), "1"),
    **dict.fromkeys(("parallel.ep_size", "parallel.cp_size"), "1"),
    **dict.fromkeys(("model.moe.router.normalize", "model.tie_embeddings", "model.qk_norm"), "true"),
    **dict.fromkeys(("parallel.compile", "metrics.tensorboard"), "true"),
    **dict.fromkeys(("model.moe.router.scale", "train.grad_clip"), "1.0"),
    **dict.fromkeys(("model.attention.softcap", "model.logit_softcap"), "30.0"),
    **dict.fromkeys(("model.moe.router.jitter", "model.moe.z_loss_coef", "model.init_std"), "0.02"),
    **dict.fromkeys(("schedule.final_fraction", "data.split.fraction"), "0.1"),
    **dict.fromkeys(("model.norm_eps", "optim.eps"), "1e-5"),
    **dict.fromkeys(("checkpoint.every", "eval.every", "metrics.log_every", "schedule.warmup_steps"), "100"),
    **dict.fromkeys(("metrics.wandb.project", "metrics.wandb.entity", "metrics.wandb.name", "name"), "mine"),
    **dict.fromkeys(("train.steps", "parallel.timeout_s"), "1800"),
    "model.moe.router.score": "softmax",
    "model.moe.capacity.factor": "1.25",
    "model.moe.capacity.min": "4",
    "model.rope_theta": "10000",
    "model.attention.window": "128",
    "model.attention.rotary_fraction": "0.5",
    "parallel.micro_batch_size": "8",
    "parallel.dispatcher.kind": "alltoall",
    "schedule.peak_lr": "3e-4",
    "schedule.kind": "cosine",
    "optim.kind": "adamw_torch",
    "train.dtype": "bf16",
    "checkpoint.keep": "3",
    "data.cache_dir": "prepared",
    "data.workers": "4",
    "data.sources.0.path": "data/*.jsonl",
    "seed": "42",
}
"""A typical value in other trainers' notation, for every key that accepts it unchanged."""
SHARES = {"warmup_ratio": "0.1", "lr_warmup_fraction": "0.01"}
NAMES = {name: meant for table in tables().values() for name, meant in table.items()}


def sections_of(key: str) -> list[Any]:
    """Return the sections that have a dotted key, under every kind; independent of `slots.homes`."""
    found: list[Any] = [ExperimentConfig]
    *path, last = key.split(".")
    for part in path:
        below: list[Any] = []
        for section in found:
            if part == "0":
                below.append(section)
                continue
            field = section.model_fields.get(part) if section is not None else None
            for one in slots.alternatives(field.annotation) if field is not None else []:
                below += slots.sections(get_args(one)[0] if get_origin(one) is list else one)
        found = below
    return [section for section in found if last in section.model_fields]


@pytest.mark.parametrize("meant", {m.key: m for m in NAMES.values() if m.key}.values(), ids=lambda meant: meant.key)
def test_every_counterpart_is_a_key_of_the_schema(meant: Counterpart) -> None:
    sections = sections_of(meant.key)
    assert sections
    kinds = [kind for kind in meant.note.split() if any(kind in slots.kinds(section) for section in sections)]
    if "kind:" in meant.note and meant.note.startswith("of "):
        assert kinds, f"none of {meant.note} has {meant.key}"


@pytest.mark.parametrize("name", [name for name, meant in NAMES.items() if meant.key and not meant.note])
def test_a_counterpart_without_a_note_accepts_the_value_unchanged(name: str) -> None:
    key = NAMES[name].key
    message = as_override(f"--{name.lstrip('.')}", SHARES.get(name, TYPICAL[key]), ExperimentConfig)
    written = message.partition("write ")[2].split()
    extra = ["data.sources.0.kind=text"] if key.startswith("data.sources.0") else []
    value: Any = load(SMOKE, [*written, *extra], ExperimentConfig).model_dump()
    for part in key.split("."):
        value = value[int(part) if part.isdecimal() else part]
    assert written[0] == f"{key}={written[0].partition('=')[2]}"
    assert value == resolve(written[0].partition("=")[2])


def test_every_key_in_a_note_is_in_the_schema() -> None:
    words = {
        word.strip("():;,").removesuffix("metrics.jsonl") for meant in NAMES.values() for word in meant.note.split()
    }
    dotted = {word for word in words if "." in word.strip(".") and word.split(".")[0] in ExperimentConfig.model_fields}
    assert len(dotted) > 15
    assert [word for word in dotted if not sections_of(word.split("=")[0])] == []


def test_names_are_in_one_table_each_and_are_not_our_keys() -> None:
    assert len(NAMES) == sum(map(len, tables().values())) >= 200
    homes = slots.homes(ExperimentConfig)
    assert [name for name in NAMES if name in homes and homes[name] != ("model.moe.router",)] == []
    assert [name for name in NAMES if name in homes] == ["capacity_factor"], "some routers have it too"
    assert all(meant.key or meant.note for meant in NAMES.values())
    assert not SECTIONS & ExperimentConfig.model_fields.keys()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "max_seq_length",
            "max_length",
            "logging_dir",
            "eval_strategy",
            "save_strategy",
            "aux_loss_alpha",
        ),
        *("sliding_window", "rope_type", "n_experts", "num_moe_experts", "gradient_clipping", "mixed_precision"),
        *("flash_attn", "use_flash_attn", "recompute_activations", "moe_router_dtype", "normalization", "tf32"),
        *("lora_dropout", "lora_target_modules", "log_every_n_steps", "val_check_interval", "accelerator", "strategy"),
        *("resume", "streaming", "devices", "do_train", "do_eval", "do_predict", "iterations", "mtp_num_layers"),
    ],
)
def test_common_names_are_in_a_table(name: str) -> None:
    meant = counterpart(name)
    assert meant is not None
    assert meant.key or meant.note.endswith(("leave it out", "use train.dtype: bfloat16"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_its_counterpart_in_any_section(name: str) -> None:
    section, _, last = name.rpartition(".")
    elsewhere = "" if name.startswith(".") else section or "model"
    for where, kind in ((section, ExperimentConfig), (elsewhere, ModelConfig)):
        message = unknown_key(last, kind, [], ExperimentConfig, where=where)
        assert message == f"unknown key; {NAMES[name]}"
    assert counterpart(last.replace("_", "-").upper(), section) == NAMES[name]


def test_hugging_face_names_are_spelled_as_in_transformers() -> None:
    """Names are those of its dataclass and configs, or older ones that many scripts still use."""
    transformers = pytest.importorskip("transformers")
    known = set(transformers.TrainingArguments.__dataclass_fields__)
    models = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "Olmoe", "Gemma2", "SwitchTransformers")
    for name in (f"{model}Config" for model in models):
        config = getattr(transformers, name)
        known |= config().to_dict().keys() | config.attribute_map.keys()
    known |= transformers.GPT2Config().to_dict().keys() | transformers.BertConfig().to_dict().keys()
    older = {
        *("warmup_ratio", "torch_dtype", "train_batch_size", "use_qk_norm", "scoring_func", "attn_implementation"),
        *("router_z_loss_coef", "shared_expert_intermediate_size", "n_group", "topk_group", "aux_loss_alpha"),
        *("rope_type", "partial_rotary_factor", "max_length", "max_seq_length", "logging_dir"),
        *("evaluation_strategy", "model_name_or_path"),
    }
    assert set(tables()["hugging_face"]) - known <= older


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("max_grad_norm: 1\n", ["2:1: max_grad_norm: unknown key; write train.grad_clip"]),
        ("model: {hidden_size: 64}\n", ["2:9: model.hidden_size: unknown key; write model.d_model"]),
        (
            "train:\n  warmup_ratio: 0.1\n",
            ["3:3: train.warmup_ratio: unknown key; write schedule.warmup_steps"],
        ),
        (
            "train: {gradient_accumulation_steps: 4}\n",
            ["2:9: train.gradient_accumulation_steps: unknown key; it follows from train.global_batch_size, "
             "parallel.micro_batch_size and the ranks; leave it out"],
        ),
        (
            "model: {moe: {router: {num_experts_per_tok: 2}}}\n",
            ["2:24: model.moe.router.num_experts_per_tok: unknown key; write model.moe.router.top_k"],
        ),
        (
            "parallel: {tensor-model-parallel-size: 2}\n",
            ["2:12: parallel.tensor-model-parallel-size: unknown key; there is no tensor, sequence or pipeline "
             "parallelism; leave it out"],
        ),
        ("checkpoint: {interval: 5}\n", ["2:14: checkpoint.interval: unknown key; write checkpoint.every"]),
        ("training: {local_batch_size: 4, steps: 9}\noptimizer: {lr: 1, name: AdamW, eps: 1}\n",
         ["2:12: training.local_batch_size: unknown key; write parallel.micro_batch_size",
          "2:33: training.steps: unknown key; write train.steps",
          "3:13: optimizer.lr: unknown key; write schedule.peak_lr",
          "3:20: optimizer.name: unknown key; write optim.kind",
          "3:33: optimizer.eps: unknown key; did you mean optim.eps?"]),
        ("eval_every: 5\n", ["2:1: eval_every: unknown key; did you mean eval.every?"]),
    ],
)  # fmt: skip
def test_a_file_of_another_trainer_is_reported_line_by_line(tmp_path: Path, text: str, lines: list[str]) -> None:
    (tmp_path / "x.yaml").write_text(f"name: x\n{text}")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "x.yaml", [], ExperimentConfig)
    assert str(caught.value).replace(f"{tmp_path}/x.yaml:", "").split("\n") == lines


def test_an_override_with_another_trainers_name_gets_the_counterpart(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "x.yaml", ["optimizer.lr=3e-4", "n_layer=4", "train.save_steps=5"], ExperimentConfig)
    assert str(caught.value).split("\n") == [
        "<override 1>: optimizer.lr: unknown key; write schedule.peak_lr",
        "<override 2>: n_layer: unknown key; write model.num_layers",
        "<override 3>: train.save_steps: unknown key; write checkpoint.every",
    ]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.steps", "10", "--train.steps: is not an option; write train.steps=10"),
        ("--train.steps", None, "--train.steps: is not an option; write train.steps=..."),
        ("--seed", "3", "--seed: is not an option; write seed=3"),
        ("--steps", "3", "--steps: is not an option; write train.steps=3 or profile.steps=3"),
        ("--lr", "3e-4", "--lr: is not an option; write schedule.peak_lr=3e-4"),
        ("--micro-batch-size", "4", "--micro-batch-size: is not an option; write parallel.micro_batch_size=4"),
        ("--optimizer.lr", "1", "--optimizer.lr: is not an option; write schedule.peak_lr=1"),
        (
            "--warmup_ratio",
            "0.1",
            "--warmup_ratio: is not an option; write schedule.warmup_steps=0.1",
        ),
        ("--fp16", None, "--fp16: is not an option; there is no float16; use train.dtype: bfloat16"),
        ("--bogus", "1", "--bogus: is not an option; leave it out"),
        ("--lr_scheduler_type", "cosine", "--lr_scheduler_type: is not an option; write schedule.kind=warmup_cosine"),
        (
            "--lr_scheduler_type",
            "linear",
            "--lr_scheduler_type: is not an option; write schedule.kind=warmup_stable_decay schedule.decay_fraction=1",
        ),
        ("--optimizer", "AdamW", "--optimizer: is not an option; write optim.kind=adamw"),
        (
            "--resume",
            None,
            "--resume: is not an option; the same command resumes a run from its newest checkpoint; leave it out",
        ),
        ("--streaming", None, "--streaming: is not an option; write data.sources.0.kind=... (as hf_stream)"),
        ("train.steps", "10", "train.steps: is not an override; write train.steps=10"),
        ("7", None, "7: is not an override; write key=value, such as train.steps=100"),
    ],
)  # fmt: skip
def test_an_unknown_option_gets_the_override_to_write(option: str, value: str | None, message: str) -> None:
    assert as_override(option, value, ExperimentConfig) == message


@pytest.mark.parametrize(
    ("key", "alike"),
    [("warmup_stops", "warmup_steps"), ("num_head", "num_heads"), ("d_mdoel", "d_model"), ("numlayers", "num_layers")],
)
def test_a_misspelled_key_gets_the_similar_key(key: str, alike: str) -> None:
    assert unknown_key(key, ModelConfig, [], ExperimentConfig).endswith(f"{alike}?")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("streaming=true", "write data.sources.0.kind (as hf_stream)"),
        ("model.mtp_num_layers=1", "only the next token is predicted; leave it out"),
        ("iterations=10", "write train.steps"),
        ("train.iterations=10", "write train.steps"),
        ("devices=2", "launch --nproc N or torchrun starts the processes; leave it out"),
        ("do_eval=true", "train also evaluates, every eval.every steps, and eval only evaluates; leave it out"),
        ("model.moe.min_capacity=4", "write model.moe.capacity.min"),
        ("model.moe.router.num_moe_experts=4", "write model.moe.num_experts"),
        ("model.moe.router.normalization=RMSNorm", "all norms are RMSNorm; leave it out"),
        ("parallel.experts_per_token=2", "write model.moe.router.top_k"),
        ("optimizer=adamw", "write optim.kind"),
        ("lr_scheduler=cosine", "write schedule.kind"),
    ],
)
def test_a_counterpart_comes_before_a_similar_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMOKE, [override], ExperimentConfig)
    assert str(caught.value) == f"<override 1>: {override.partition('=')[0]}: unknown key; {message}"


@pytest.mark.parametrize(
    "override",
    [
        "trainn.x=1",  # a mapping that resembles a mapping
        "schedul=cosine",  # and text that is one of its kinds
        "model.moe.micro_capacity=4",
        "model.mtp_layers=1",
        "model.moe.router.free_experts=4",
        "parallel.experts_norm=4",
        "trainer_mode=true",
        "evals=3",
        "metrix=true",
    ],
)
def test_keys_of_another_type_or_meaning_are_not_suggested(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMOKE, [override], ExperimentConfig)
    is_slip = override in ("trainn.x=1", "schedul=cosine")
    assert ("did you mean" in str(caught.value)) == is_slip, caught.value


@pytest.mark.parametrize(
    ("key", "section", "alike"),
    [("global_batch", "train", "global_batch_size"), ("z_loss", "model.moe", "z_loss_coef")],
)
def test_a_key_without_its_unit_gets_the_full_key(key: str, section: str, alike: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean ([a-z.]*\.)?{alike}\?"):
        load(SMOKE, [f"{section}.{key}=1"], ExperimentConfig)


@pytest.mark.parametrize("key", ["num_blocks", "d_emb", "interval", "grad_norm", "rope_shift", "norm_type", "d_kv"])
def test_other_words_are_not_taken_for_misspellings(key: str) -> None:
    for section in (ExperimentConfig, ModelConfig, type(ExperimentConfig(name="x").train)):
        message = unknown_key(key, section, [], ExperimentConfig)
        assert "did you mean" not in message, message


@pytest.mark.parametrize("text", sorted(NO_HALF))
def test_half_precision_is_never_taken_for_bfloat16(text: str) -> None:
    message = choice(text, ["float32", "bfloat16", "float64"])
    assert message.endswith("is not one of float32, bfloat16, float64; there is no float16: use bfloat16")


def test_every_counterpart_of_a_value_is_in_the_schema() -> None:
    options = {
        text for leaf in slots.homes(ExperimentConfig) for home in slots.homes(ExperimentConfig)[leaf]
        for section in sections_of(f"{home}.{leaf}".lstrip("."))
        for text in slots.literals(section.model_fields[leaf].annotation)
    }  # fmt: skip
    assert set(values().values()) <= options


@pytest.mark.parametrize("value", ["off", "no", "false", False, "none", None, "disable", "OFF"])
def test_off_means_disabled_not_offline(value: object) -> None:
    options = ["disabled", "auto", "online", "offline"]
    assert difflib.get_close_matches("off", options, n=1) == ["offline"], "the most similar option"
    assert choice(value, options).endswith("; did you mean disabled?")
