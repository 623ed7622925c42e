"""Law: the systems of the founding documents are available, and do what their texts specify where their code does not.

The code blocks of both documents stand here as they were published, but for their comments; tests show what they
compute, and that ours is the formula they give. The first document's 0-1 programme is compared with its optimum in
tests/unit/ops/test_assignment.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tests.builders import make_batch, make_context, make_model, moe_config, tiny_model_config
from tests.end_to_end import tiny
from tests.launched_ranks import ROOT
from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer import MoE

FOUNDING = ROOT / "configs/founding"
TOP_K, SPARSE = "top_k_experts_per_token", "sparse_expert_model"

NUM_TOKENS, D_MODEL, NUM_EXPERTS, D_FF = 10, 6, 4, 5


# The first document, section 4.2.1, as it stands there.


class TopKExpertSelector(nn.Module):
    def __init__(self, model, k):
        super().__init__()
        self.model = model
        self.k = k

    def forward(self, input, target):
        logits = self.model(input)
        probs = torch.nn.functional.softmax(logits, dim=-1)
        topk_probs, topk_indices = torch.topk(probs, self.k, dim=-1)  # noqa: RUF059
        topk_experts = torch.gather(input, dim=-1, index=topk_indices)
        return topk_experts  # noqa: RET504


def train(model, selector, input, target, optimizer, criterion, k):
    model.train()
    selector.train()
    optimizer.zero_grad()
    output = model(input)
    loss = criterion(output, target)
    loss.backward()
    optimizer.step()
    topk_experts = selector(input, output)
    return loss.item(), topk_experts


# The second document, section 5, as it stands there but for its comments.


class SparseExpertModel:
    def __init__(self, experts, router):
        self.experts = experts
        self.router = router

    def forward(self, x):
        expert_weights = self.router.route(x)
        expert_outputs = [expert(x) * weight for expert, weight in zip(self.experts, expert_weights)]  # noqa: B905
        y = sum(expert_outputs)
        return y  # noqa: RET504


# What the first document's code does.


def inputs(num_tokens: int = NUM_TOKENS, d_model: int = D_MODEL, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(d_in: int, d_out: int, seed: int = 2) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, bias=False).double()
    layer.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    return layer


def test_what_its_selector_calls_experts_are_columns_of_the_input() -> None:
    x = inputs()
    all_of_them = TopKExpertSelector(linear(D_MODEL, D_MODEL), D_MODEL)(x, None)
    assert torch.equal(all_of_them.sort(-1).values, x.sort(-1).values), "each row's own numbers, in another order"
    gate = linear(D_MODEL, NUM_EXPERTS)
    chosen = TopKExpertSelector(gate, 2)(x, None)
    for row, picked, best in zip(x, chosen, gate(x).topk(2).indices, strict=True):
        assert picked.tolist() == [row[column] for column in best]
    changed = x.clone()
    changed[:, NUM_EXPERTS:] += 1e-9  # too small to change a choice, and outside the experts' indices
    assert torch.equal(TopKExpertSelector(gate, 2)(changed, None), chosen), "columns beyond E are never seen"


def test_its_selector_fails_if_there_are_more_experts_than_features() -> None:
    with pytest.raises(RuntimeError, match="out of bounds for dimension 1 with size 6"):
        TopKExpertSelector(linear(D_MODEL, D_MODEL + 3), D_MODEL + 3)(inputs(), None)


def trained(k: int, steps: int = 5) -> tuple[list[float], Tensor, Tensor, nn.Linear]:
    """Losses and weights of the document's training, its last selection, and the gate of a separate selector."""
    model, gate = linear(D_MODEL, 3), linear(D_MODEL, NUM_EXPERTS, seed=3)
    optimizer: Optimizer = SGD([*model.parameters(), *gate.parameters()], lr=0.1)
    x, target = inputs(), torch.arange(NUM_TOKENS) % 3
    losses, chosen = [], torch.empty(0)
    for _ in range(steps):
        loss, chosen = train(model, TopKExpertSelector(gate, k), x, target, optimizer, nn.CrossEntropyLoss(), k)
        losses.append(loss)
    return losses, model.weight.detach(), chosen, gate


def test_its_selector_neither_changes_the_loss_nor_learns_from_it() -> None:
    losses, weight, chosen, gate = trained(k=1)
    assert losses[-1] < losses[0], "the model learns"
    assert gate.weight.grad is None, "the selector does not: no loss has a gradient for it"
    assert torch.equal(gate.weight, linear(D_MODEL, NUM_EXPERTS, seed=3).weight)
    assert chosen.grad_fn is None, "and none could: what is gathered does not depend on how likely it was"
    other_losses, other_weight, _, _ = trained(k=4)
    assert losses == other_losses and torch.equal(weight, other_weight), "k changes nothing that is learned"


# What ours does.


def layer_of(router: dict, num_experts: int = NUM_EXPERTS) -> MoE:
    """A layer in float64 with random weights."""
    config = moe_config(num_experts=num_experts, d_ff=D_FF, router=router)
    layer = MoE(
        router=config.router.build(d_model=D_MODEL, num_experts=num_experts, layer=0),
        experts=Experts(num_experts, D_MODEL, D_FF, activation="swiglu", kernel="loop"),
        dispatcher=LocalDispatcher(),
        capacity=config.capacity,
    ).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return layer


def output(layer: MoE, x: Tensor) -> Tensor:
    return layer(x[None], make_context(1, len(x)))[0][0]


@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 4), (2, 4), (3, 4), (2, 9)])
def test_a_token_s_k_experts_compute_its_output_and_no_others_do(top_k: int, num_experts: int) -> None:
    """Even with more experts than features."""
    layer = layer_of({"kind": "top_k", "top_k": top_k, "normalize": top_k > 1}, num_experts)
    x = inputs()
    best = layer.router.get_parameter("gate.weight").detach().matmul(x.T).T.topk(top_k).indices
    y = output(layer, x)
    for token in range(NUM_TOKENS):
        layer.zero_grad()
        y[token].sum().backward(retain_graph=True)
        assert layer.experts.w_out.grad is not None
        taught = layer.experts.w_out.grad.abs().sum((1, 2)).nonzero().flatten()
        assert taught.tolist() == sorted(best[token].tolist())


@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (2, True), (3, True)])
def test_the_cross_entropy_alone_teaches_the_gate(top_k: int, normalize: bool) -> None:
    moe = {
        "router": {"kind": "top_k", "top_k": top_k, "normalize": normalize},
        "balance": {"coef": 0.0},
        "z_loss_coef": 0.0,
    }
    model = make_model(tiny_model_config(moe))
    model(make_batch(2, 8)).loss_sum.backward()
    gates = [p.grad for name, p in model.named_parameters() if "router" in name]
    assert len(gates) == 2 and all(g is not None and g.norm() > 1e-3 for g in gates)


# The second document's formula.


class Feedforward(nn.Module):
    """Expert e of a layer as a module, which counts its rows."""

    def __init__(self, layer: MoE, expert: int) -> None:
        super().__init__()
        self.w_in, self.w_out = layer.experts.w_in[expert], layer.experts.w_out[expert]
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        gate, up = (x @ self.w_in.T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.w_out.T


class Router:
    """The document's g: a softmax over all experts for every token."""

    def __init__(self, gate: Tensor) -> None:
        self.gate = gate

    def route(self, x: Tensor) -> list[Tensor]:
        return [weight[:, None] for weight in (x @ self.gate.T).softmax(-1).T]


def document_s(layer: MoE) -> SparseExpertModel:
    """The document's model, with the weights of our layer."""
    experts = [Feedforward(layer, expert) for expert in range(layer.experts.num_experts)]
    return SparseExpertModel(experts, Router(layer.router.get_parameter("gate.weight")))


def rows_of(layer: MoE, run: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """Run a layer; return its output, and the rows of each expert."""
    given: list[Tensor] = []
    hook = layer.experts.register_forward_pre_hook(lambda _, arguments: given.append(arguments[1]))
    y = run()
    hook.remove()
    return y, torch.bincount(torch.cat(given).flatten(), minlength=layer.experts.num_experts).tolist()


def test_the_document_s_code_runs_every_expert_on_every_token_and_is_our_dense_router() -> None:
    layer, x = layer_of({"kind": "dense"}), inputs()
    theirs = document_s(layer)
    y = theirs.forward(x)
    assert [expert.rows for expert in theirs.experts] == [NUM_TOKENS] * NUM_EXPERTS
    mine, rows = rows_of(layer, lambda: output(layer, x))
    assert rows == [NUM_TOKENS] * NUM_EXPERTS
    torch.testing.assert_close(mine, y, rtol=0, atol=1e-12)


def test_their_gradients_are_equal_too() -> None:
    layer, x = layer_of({"kind": "dense"}), inputs()
    probe = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    parameters = list(layer.parameters())
    theirs = torch.autograd.grad((document_s(layer).forward(x) * probe).sum(), parameters)
    mine = torch.autograd.grad((output(layer, x) * probe).sum(), parameters)
    for ours, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_only_the_relevant_experts_run(top_k: int) -> None:
    layer, x = layer_of({"kind": "top_k", "top_k": top_k}), inputs()
    y, rows = rows_of(layer, lambda: output(layer, x))
    assert sum(rows) == top_k * NUM_TOKENS
    theirs = document_s(layer).forward(x)
    same = bool(((y - theirs).abs() < 1e-12).all())
    assert same == (top_k == NUM_EXPERTS), "with all of them it is the document's formula"


def test_the_sparse_sum_is_the_formula_of_the_experts_that_are_kept() -> None:
    layer, x = layer_of({"kind": "top_k", "top_k": 2}), inputs()
    scores = (x @ layer.router.get_parameter("gate.weight").T).softmax(-1)
    kept = scores * (scores >= scores.topk(2).values[:, -1:])
    theirs = document_s(layer)
    weights = [weight[:, None] for weight in (kept / kept.sum(-1, keepdim=True)).T]
    theirs.router.route = lambda _: weights
    torch.testing.assert_close(output(layer, x), theirs.forward(x), rtol=0, atol=1e-12)


# Both documents' systems, as configs.

SMALL = [
    "data.sources=[{kind: text, path: prose.txt, domain: prose}, {kind: text, path: code.txt, domain: code}]",
    "model.d_model=32",
    "model.num_heads=2",
    "model.seq_len=32",
    "model.init_std=0.2",
    "model.moe.num_experts=4",
    "model.moe.d_ff=32",
    "schedule.peak_lr=1e-2",
    "schedule.warmup_steps=2",
    "train.steps=20",
    "train.global_batch_size=8",
    "eval.every=10",
    "eval.max_tokens_per_domain=512",
    "checkpoint.every=20",
    "metrics.log_every=1",
]
FORMS = {
    "first, k=1": (TOP_K, ["model.moe.router.top_k=1", "model.moe.router.normalize=false"]),
    "first": (TOP_K, []),
    "first, k=4": (TOP_K, ["model.moe.router.top_k=4"]),
    "first, its programme": (
        TOP_K,
        ["model.moe.router={kind: linear_program, top_k: 2}", "train.global_batch_size=4"],  # 160 solves
    ),
    "first, its heuristic": (TOP_K, ["model.moe.router={kind: greedy, top_k: 2}"]),
    "second": (SPARSE, []),
    "second, its formula": (SPARSE, ["model.moe.router={kind: dense}"]),
}


@pytest.mark.parametrize("name", [TOP_K, SPARSE])
def test_the_config_is_sound_and_reads_text_that_is_there(name: str) -> None:
    config = load(FOUNDING / f"{name}.yaml", [], ExperimentConfig)
    assert [source.kind for source in config.data.sources] == ["installed"]
    assert config.model.moe is not None and config.model.moe.router.kind == "top_k"
    assert bool(config.model.moe.diversity_coef) == (name == SPARSE)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", FORMS)
def test_the_small_form_learns_and_says_how_well_on_held_out_text(form: str, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 100)
    (tmp_path / "code.txt").write_text("for i in range(10):\n    total += values[i]\nreturn total\n" * 100)
    name, overrides = FORMS[form]
    tiny.run(tmp_path, "train", str(FOUNDING / f"{name}.yaml"), "name=small", *SMALL, *overrides)
    records = [json.loads(line) for line in (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    held_out = [record for record in records if "eval/loss" in record]
    assert len(losses) == 20 and losses[-1] < 0.75 * losses[0]
    assert held_out[-1]["eval/bits_per_byte"] < 0.9 * held_out[0]["eval/bits_per_byte"]
    assert {"eval/prose/loss", "eval/code/loss", "eval/expert_domain_mi"} <= held_out[-1].keys()
    assert any("diversity_loss" in record for record in records) == (name == SPARSE)
