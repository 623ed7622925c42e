"""Each convention's loss as a plain formula: its coefficient times its loss equals our coefficient times ours."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import make_context, moe_config
from trainer.cli import main
from trainer.config.loader import load
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.lab.conventions import CONVENTIONS, RoutedModel, convert, factor
from trainer.moe.balance import balance_loss, convention_scale
from trainer.moe.config import MoEConfig
from trainer.moe.losses import Denominators, objective
from trainer.moe.stats import MoEStats, collect_stats

NUM_ROWS, SEQ_LEN, D_MODEL, NUM_EXPERTS = 3, 8, 5, 6
NUM_TOKENS = NUM_ROWS * SEQ_LEN


@dataclass
class Layer:
    """Output of one router: (T, E) probabilities, (T, k) experts, best first."""

    probs: Tensor
    experts: Tensor
    stats: MoEStats


def routed_layers(num_layers: int, top_k: int, **router: Any) -> list[Layer]:
    """Route random tokens through random routers, in float64."""
    config = moe_config(num_experts=NUM_EXPERTS, router={"kind": "top_k", "top_k": top_k, "normalize": False, **router})
    context = make_context(NUM_ROWS, SEQ_LEN)
    layers = []
    for layer in range(num_layers):
        generator = torch.Generator().manual_seed(layer)
        module = config.router.build(d_model=D_MODEL, num_experts=NUM_EXPERTS, layer=layer).double()
        module.get_parameter("gate.weight").data.normal_(generator=generator)
        x = torch.randn(NUM_TOKENS, D_MODEL, dtype=torch.float64, generator=generator)
        routed = module(x, context)
        assert routed.probs is not None
        layers.append(
            Layer(
                probs=routed.probs.detach(),
                experts=routed.decision.expert_index.view(NUM_TOKENS, top_k),
                stats=collect_stats(routed, routed.decision, context),
            )
        )
    return layers


def counts(experts: Tensor) -> Tensor:
    return torch.bincount(experts.flatten(), minlength=NUM_EXPERTS).double()


def megatron(layers: list[Layer], top_k: int) -> Tensor:
    """The sum over layers of sum_e (sum_t P_te) c_e * E / (k T^2)."""
    scale = NUM_EXPERTS / (top_k * NUM_TOKENS**2)
    return torch.stack([(layer.probs.sum(0) * counts(layer.experts)).sum() * scale for layer in layers]).sum()


def transformers(layers: list[Layer], top_k: int) -> Tensor:
    """Layers concatenated along tokens; one-hot choices are averaged over tokens, not over k."""
    rows = len(layers) * NUM_TOKENS
    per_expert = sum((counts(layer.experts) for layer in layers), torch.zeros(())) / rows
    prob = torch.cat([layer.probs for layer in layers]).mean(0)
    return (per_expert * prob).sum() * NUM_EXPERTS


def deepspeed(layers: list[Layer], top_k: int) -> Tensor:
    """top1gating, top2gating or topkgating by k, and Megatron-DeepSpeed's sum."""

    def one(layer: Layer) -> Tensor:
        me = layer.probs.mean(0)
        mask = torch.zeros_like(layer.probs)
        if top_k <= 2:
            mask.scatter_(1, layer.experts[:, :1], 1)
            return (me * mask.mean(0)).sum() * NUM_EXPERTS
        mask.scatter_(1, layer.experts, 1)
        return (me * mask.mean(0)).mean() * NUM_EXPERTS * NUM_EXPERTS / top_k

    return torch.stack([one(layer) for layer in layers]).sum()


def tutel(layers: list[Layer], top_k: int) -> Tensor:
    """gshard_loss: one-hot first choices of height E / T; Swin-MoE's sum."""
    total = torch.zeros(())
    for layer in layers:
        mask = torch.zeros_like(layer.probs).scatter_(1, layer.experts[:, :1], NUM_EXPERTS / NUM_TOKENS)
        total = total + (layer.probs.sum(0) * mask.sum(0)).sum() / NUM_TOKENS
    return total


def megablocks(layers: list[Layer], top_k: int) -> Tensor:
    """One dot product over all layers' experts; every layer is MoE."""
    scores = torch.cat([layer.probs for layer in layers], dim=1).mean(0)
    per_expert = torch.cat([counts(layer.experts) for layer in layers])
    return NUM_EXPERTS / (len(layers) * NUM_TOKENS * top_k) * torch.dot(per_expert, scores)


def olmo_core(layers: list[Layer], top_k: int, num_layers: int) -> Tensor:
    """The weight is divided by the number of all layers; each MoE layer's loss is attached to its output."""
    weight, total = 1.0 / num_layers, torch.zeros(())
    for layer in layers:
        dot = torch.dot(counts(layer.experts), layer.probs.mean(0))
        total = total + NUM_EXPERTS * weight / (NUM_TOKENS * top_k) * dot
    return total


def fastmoe(layers: list[Layer], top_k: int, world_size: int) -> Tensor:
    """GShardGate with E / W experts on each process; the mean over layers."""
    num_expert = NUM_EXPERTS // world_size
    losses = []
    for layer in layers:
        c_e, m_e = counts(layer.experts[:, 0]) / NUM_TOKENS, layer.probs.mean(0)  # over all experts
        losses.append((c_e * m_e).mean() * num_expert**2)
    return torch.stack(losses).mean()


def deepseek_v3(layers: list[Layer], top_k: int) -> Tensor:
    """sum_e f_e P_e per sequence with f_e = E / (k S) c_e; mean over sequences, sum over layers."""
    total = torch.zeros(())
    for layer in layers:
        for row in range(NUM_ROWS):
            here = slice(row * SEQ_LEN, (row + 1) * SEQ_LEN)
            f = counts(layer.experts[here]) * NUM_EXPERTS / (top_k * SEQ_LEN)
            total = total + (f * layer.probs[here].mean(0)).sum() / NUM_ROWS
    return total


def our_config(top_k: int, **balance: Any) -> MoEConfig:
    router = {"kind": "top_k", "top_k": top_k, "normalize": False}
    return moe_config(
        num_experts=NUM_EXPERTS, router=router, z_loss_coef=0.0, balance={"scope": "micro_batch", **balance}
    )


def ours(layers: list[Layer], config: MoEConfig) -> Tensor:
    """Our term of the objective: coefficient times loss."""
    denominators = Denominators(target_tokens=1, routed_tokens=NUM_TOKENS)
    moe = [layer.stats for layer in layers]
    zero = torch.zeros((), dtype=torch.float64)
    return objective(zero, moe, global_stats=None, denominators=denominators, losses=config.aux_losses).total.detach()


def model_of(top_k: int, num_moe_layers: int = 3, num_layers: int | None = None, **fields: Any) -> RoutedModel:
    return RoutedModel(
        moe=our_config(top_k),
        num_layers=num_layers or num_moe_layers,
        num_moe_layers=num_moe_layers,
        **fields,
    )


THEIRS: dict[str, Callable[[list[Layer], int], Tensor]] = {
    "megatron": megatron,
    "deepspeed": deepspeed,
    "tutel": tutel,
    "megablocks": megablocks,
    "deepseek-v3": deepseek_v3,
}


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("name", THEIRS)
def test_the_printed_mapping_gives_their_loss_times_their_coefficient(name: str, num_layers: int, top_k: int) -> None:
    layers = routed_layers(num_layers, top_k)
    converted = convert(0.03, source=name, target="turnout", model=model_of(top_k, num_layers))
    mine = ours(layers, our_config(top_k, **converted.balance))
    torch.testing.assert_close(mine, 0.03 * THEIRS[name](layers, top_k), rtol=0, atol=1e-12)
    counts_first = name == "tutel" or (name == "deepspeed" and top_k == 2)
    assert bool(converted.warnings) == (counts_first and top_k > 1)


@pytest.mark.parametrize(("num_moe_layers", "num_layers"), [(1, 1), (3, 3), (3, 4)])
def test_olmo_core_divides_by_dense_layers_too(num_moe_layers: int, num_layers: int) -> None:
    layers = routed_layers(num_moe_layers, 2)
    converted = convert(0.03, source="olmo-core", target="turnout", model=model_of(2, num_moe_layers, num_layers))
    mine = ours(layers, our_config(2, **converted.balance))
    torch.testing.assert_close(mine, 0.03 * olmo_core(layers, 2, num_layers), rtol=0, atol=1e-12)
    assert not converted.warnings


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 6])
def test_fastmoe_is_divided_by_the_square_of_the_number_of_processes(world_size: int, top_k: int) -> None:
    layers = routed_layers(3, top_k)
    model = model_of(top_k, world_size=world_size)
    converted = convert(0.03, source="fastmoe", target="turnout", model=model)
    mine = ours(layers, our_config(top_k, **converted.balance))
    torch.testing.assert_close(mine, 0.03 * fastmoe(layers, top_k, world_size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_is_exact_for_one_layer(top_k: int) -> None:
    layers = routed_layers(1, top_k)
    converted = convert(0.03, source="transformers", target="turnout", model=model_of(top_k, 1))
    mine = ours(layers, our_config(top_k, **converted.balance))
    torch.testing.assert_close(mine, 0.03 * transformers(layers, top_k), rtol=0, atol=1e-12)
    assert not converted.warnings


def test_transformers_pools_several_layers_which_is_exact_only_where_they_are_loaded_alike() -> None:
    converted = convert(0.03, source="transformers", target="turnout", model=model_of(2, 3))
    assert [w.split(",")[0] for w in converted.warnings] == ["transformers pools its 3 MoE layers"]
    config = our_config(2, **converted.balance)
    alike = routed_layers(1, 2) * 3
    torch.testing.assert_close(ours(alike, config), 0.03 * transformers(alike, 2), rtol=0, atol=1e-12)
    different = routed_layers(3, 2)
    assert abs(float(ours(different, config) - 0.03 * transformers(different, 2))) > 1e-3


@pytest.mark.parametrize("name", ["tutel", "deepspeed"])
def test_first_choices_are_no_multiple_of_all_choices(name: str) -> None:
    converted = convert(0.03, source=name, target="turnout", model=model_of(2, 1))
    assert converted.balance["convention"] == "gshard_first_choice"
    assert [w.split(",")[0] for w in converted.warnings] == [f"{name} counts first choices only"]
    layers = routed_layers(1, 2)
    canonical = ours(layers, our_config(2, coef=converted.coef))
    assert abs(float(canonical - 0.03 * THEIRS[name](layers, 2))) > 1e-3


@pytest.mark.parametrize("name", CONVENTIONS)
def test_with_even_probabilities_a_loss_is_its_conversion_factor(name: str) -> None:
    """Ours is 1 then, whatever is chosen."""
    layers, model = routed_layers(3, 2), model_of(2, world_size=2 if name == "fastmoe" else None)
    even = torch.full((NUM_TOKENS, NUM_EXPERTS), 1 / NUM_EXPERTS, dtype=torch.float64)
    balanced = [replace(layer, probs=even) for layer in layers]
    formulas: dict[str, Callable[[], Tensor]] = {
        **{key: lambda key=key: THEIRS[key](balanced, 2) for key in THEIRS},
        "transformers": lambda: transformers(balanced, 2),
        "olmo-core": lambda: olmo_core(balanced, 2, 3),
        "fastmoe": lambda: fastmoe(balanced, 2, 2),
        "turnout": lambda: torch.ones(()),
        "gshard_first_choice": lambda: torch.ones(()),
    }
    assert float(formulas[name]()) == pytest.approx(factor(name, model), abs=1e-12)


@pytest.mark.parametrize("a", CONVENTIONS)
def test_conversion_round_trips(a: str) -> None:
    for b, top_k in itertools.product(CONVENTIONS, [1, 2, 3]):
        model = model_of(top_k, 3, 4, world_size=3 if "fastmoe" in (a, b) else None)
        there = convert(0.017, source=a, target=b, model=model)
        back = convert(there.coef, source=b, target=a, model=model)
        assert back.coef == pytest.approx(0.017, rel=1e-15)
        assert len(back.warnings) == len(there.warnings)
        assert a != b or not there.warnings


@pytest.mark.parametrize(("ours_name", "name"), [("hf", "transformers"), ("megatron", "megatron")])
def test_the_config_s_own_conventions_agree(ours_name: str, name: str) -> None:
    config = our_config(2, convention=ours_name)
    assert convention_scale(config.aux_losses, num_moe_layers=3) == factor(name, model_of(2, 3))


def test_some_conventions_ignore_a_selection_bias() -> None:
    biased = moe_config(router={"kind": "bias_balanced", "top_k": 2})
    model = RoutedModel(moe=biased, num_layers=1, num_moe_layers=1)
    assert "selection bias" in convert(0.1, source="megatron", target="turnout", model=model).warnings[0]
    assert not convert(0.1, source="megatron", target="deepseek-v3", model=model).warnings[1:]
    assert not convert(0.1, source="megablocks", target="turnout", model=model).warnings


def test_null_experts_exist_in_no_other_trainer() -> None:
    config = moe_config(router={"kind": "top_k", "top_k": 2, "null_experts": 2})
    converted = convert(
        0.1, source="deepspeed", target="turnout", model=RoutedModel(moe=config, num_layers=1, num_moe_layers=1)
    )
    assert any("null experts" in warning for warning in converted.warnings)
    assert "convention" not in converted.balance, "the config would refuse it"


def test_a_router_that_does_not_rank_its_choices_keeps_the_canonical_convention() -> None:
    config = moe_config(router={"kind": "sinkhorn", "top_k": 2})
    converted = convert(
        0.1, source="tutel", target="turnout", model=RoutedModel(moe=config, num_layers=1, num_moe_layers=1)
    )
    assert converted.balance == {"coef": pytest.approx(0.1)}
    assert "above" not in converted.warnings[0]


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"kind": "hash"}, "model.moe.router: hash has no probabilities, so there is no balance loss"),
        (
            {"kind": "expert_choice"},
            "model.moe.router: expert_choice does not give every token top_k experts, and coefficients of other "
            "trainers are for a fixed k; use a router that does, such as top_k",
        ),
        (
            {"kind": "top_k", "top_k_choices": [1, 2]},
            "model.moe.router.top_k_choices: k changes from step to step, and coefficients of other trainers are for a "
            "fixed k; convert with a config that leaves it out",
        ),
    ],
)
def test_routers_without_k_or_probabilities_are_refused(router: dict, message: str) -> None:
    model = RoutedModel(moe=moe_config(router=router), num_layers=1, num_moe_layers=1)
    with pytest.raises(ConfigError) as caught:
        convert(0.1, source="turnout", target="megatron", model=model)
    assert str(caught.value) == message


# The command.

CONFIG = """\
name: x
model: {num_layers: 4, moe: {first_dense_layers: 1, num_experts: 8, router: {top_k: 2}}}
data: {sources: [{kind: text, path: text.txt}]}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(CONFIG)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], list[str]]:
    """Run the command in this process; return its exit code and the lines of stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(["config", "coefficient", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out.splitlines(), err.splitlines()


SCOPE = "  # add scope: micro_batch to count over what {} does"
FIRST = "warning: not exact: {} counts first choices only, {} all 2: equal only when balanced"
POOLED = (
    "warning: not exact: transformers pools its 3 MoE layers, so that one can offset another: equal only where all "
    "layers have the same load"
)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (
            ["0.01", "--from", "megatron", "--to", "turnout"],
            ["0.01 of megatron is 0.03 of turnout", "balance: {coef: 0.03}" + SCOPE.format("megatron")],
        ),
        (
            ["0.01", "--from", "transformers"],
            [
                "0.01 of transformers is 0.02 of turnout",
                "balance: {coef: 0.02}" + SCOPE.format("transformers"),
                POOLED,
            ],
        ),
        (
            ["0.01", "--from", "transformers", "model.moe.router.top_k=4", "model.num_layers=2"],
            ["0.01 of transformers is 0.04 of turnout", "balance: {coef: 0.04}" + SCOPE.format("transformers")],
        ),
        (
            ["1e-2", "--from", "deepspeed", "model.moe.balance.scope=micro_batch"],
            [
                "0.01 of deepspeed is 0.03 of turnout",
                "balance: {coef: 0.03, convention: gshard_first_choice}",
                FIRST.format("deepspeed", "turnout") + "; the convention above counts like deepspeed",
            ],
        ),
        (
            ["1e-4", "--from", "deepseek-v3"],
            ["0.0001 of deepseek-v3 is 0.0003 of turnout", "balance: {coef: 0.0003, scope: sequence}"],
        ),
        (["0.03", "--from", "turnout", "--to", "megatron"], ["0.03 of turnout is 0.01 of megatron"]),
        (
            ["0.03", "--from", "turnout", "--to", "tutel"],
            ["0.03 of turnout is 0.01 of tutel", FIRST.format("tutel", "turnout")],
        ),
        (
            ["0.04", "--from", "fastmoe", "--to", "tutel", "--world-size", "2"],
            ["0.04 of fastmoe is 0.00333333333333 of tutel"],
        ),
        (
            ["0.01", "--from", "megablocks", "--to", "deepseek-v3"],
            [
                "0.01 of megablocks is 0.0025 of deepseek-v3",
                "warning: not exact: deepseek-v3 counts within each sequence, which is stricter than over a "
                "micro-batch",
            ],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0][0].isdigit() else "",
)
def test_the_command_prints_the_coefficient_and_the_mapping(
    arguments: list[str], printed: list[str], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for word in arguments if "=" not in word]
    overrides = [word for word in arguments if "=" in word]
    assert run(capsys, *options, config, *overrides) == (0, printed, [])


def test_the_printed_mapping_is_a_balance_section(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("deepspeed", "deepseek-v3"):
        _, lines, _ = run(capsys, "0.01", "--from", name, config)
        mapping = lines[1].removeprefix("balance: ").split("  #")[0]
        loaded = load(config, [f"model.moe.balance={mapping}"], ExperimentConfig)
        assert loaded.model.moe is not None
        assert loaded.model.moe.balance.coef == pytest.approx(0.03)


NAMES = ", ".join(CONVENTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abc", "--from", "tutel"], "coefficient: must be a number of at least 0, got 'abc'"),
        (["-1", "--from", "tutel"], "coefficient: must be a number of at least 0, got '-1'"),
        (["nan", "--from", "tutel"], "coefficient: must be a number of at least 0, got 'nan'"),
        (["inf", "--from", "tutel"], "coefficient: must be a number of at least 0, got 'inf'"),
        (["1", "--from", "mixtral"], f"--from: 'mixtral' is not one of {NAMES}"),
        (
            ["1", "--from", "tutel", "--to", "megatorn"],
            f"--to: 'megatorn' is not one of {NAMES}; did you mean megatron?",
        ),
        (
            ["1", "--from", "fastmoe"],
            "--world-size: fastmoe needs it, since its loss is proportional to 1 / W^2; give the number of processes "
            "its experts were distributed over",
        ),
        (
            ["1", "--from", "fastmoe", "--world-size", "3"],
            "--world-size: 8 experts cannot be distributed evenly over 3 processes",
        ),
        (
            ["1", "--from", "fastmoe", "--world-size", "0"],
            "turnout config coefficient: argument --world-size: must be a whole number of at least 1, got '0'; see "
            "turnout config coefficient --help",
        ),
        (
            ["1", "--from", "tutel", "--world-size", "2"],
            "--world-size: only fastmoe's coefficient depends on it; remove it",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *arguments, config) == (2, [], [message])


def test_a_dense_model_has_no_balance_loss(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, lines = run(capsys, "1", "--from", "tutel", config, "model.moe=null")
    assert (code, lines) == (2, [f"{config}: model.moe is null, and a dense model has no balance loss"])


def test_ours_is_the_mean_of_the_losses_of_layers() -> None:
    layers, config = routed_layers(3, 2), our_config(2, coef=1.0)
    alone = [balance_loss(layer.stats, config.aux_losses, global_stats=None).detach() / NUM_TOKENS for layer in layers]
    torch.testing.assert_close(ours(layers, config), torch.stack(alone).mean(), rtol=0, atol=1e-12)
