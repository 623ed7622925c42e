"""Every router as loops over tokens and experts, written from the papers' formulas, not from the code.

An oracle returns each token's experts and weights, best first if the order matters. Noise is given: its own tests are
in tests/unit/ops/test_noise.py.

# T tokens, k experts per token, E experts, D d_model.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference import Routed
from trainer.moe.routing import RoutingContext
from trainer.ops.noise import standard_normal, token_keys, uniform


@dataclass
class Case:
    """Input of an oracle."""

    x: Tensor  # (T, D)
    parameters: Mapping[str, Tensor]
    options: Mapping[str, Any]  # of the router's config, defaults included
    num_experts: int
    context: RoutingContext
    extra: dict[str, Tensor] = field(default_factory=dict)  # further outputs: loss (T,), load (T, E)

    @property
    def k(self) -> int:
        return self.context.top_k or self.options["top_k"]

    def rows(self) -> list[list[int]]:
        """The valid tokens of each sequence."""
        row, valid = self.context.sequence_index.tolist(), self.context.valid.tolist()
        return [[t for t in range(len(row)) if row[t] == r and valid[t]] for r in range(self.context.num_sequences)]

    def logits(self, weight: Tensor | None = None) -> Tensor:
        weight = self.parameters["gate.weight"] if weight is None else weight
        bias = self.parameters.get("gate.bias", torch.zeros(len(weight)))
        return torch.stack(
            [torch.stack([(token * row).sum() + b for row, b in zip(weight, bias, strict=True)]) for token in self.x]
        )


def softmax(row: Tensor) -> Tensor:
    return torch.exp(row) / torch.exp(row).sum()


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def best(values: Any, k: int, among: Any = None) -> list[int]:
    """The k largest, the first of equals, largest first."""
    numbers = [float(value.detach() if isinstance(value, Tensor) else value) for value in values]
    among = range(len(numbers)) if among is None else among
    return sorted(among, key=lambda i: (-numbers[i], i))[:k]


def _weighted(case: Case, chosen: list[list[int]], scores: Tensor, probs: Tensor, logits: Tensor) -> Routed:
    """Weight by scores, normalized and scaled as configured; null experts count in the sum but have no output."""
    experts, weights = [], []
    for t, mine in enumerate(chosen):
        mine = mine if case.context.valid[t] else []
        total = sum((scores[t, e] for e in mine), torch.zeros(()))
        scale = case.options.get("scale", 1.0)
        pairs = [(e, scale * (scores[t, e] / total if case.options["normalize"] else scores[t, e])) for e in mine]
        experts.append([e for e, _ in pairs if e < case.num_experts])
        weights.append([w for e, w in pairs if e < case.num_experts])
    return Routed(experts=experts, weights=weights, probs=probs, logits=logits)


def _scored(case: Case, score: str) -> tuple[Tensor, Tensor, Tensor]:
    logits = case.logits()
    rows = [softmax(row) if score == "softmax" else torch.stack([sigmoid(v) for v in row]) for row in logits]
    scores = torch.stack(rows)
    return logits, scores, torch.stack([row / row.sum() for row in rows])


def top_k(case: Case) -> Routed:
    logits, scores, probs = _scored(case, case.options.get("score", "softmax"))
    return _weighted(case, [best(row, case.k) for row in scores], scores, probs, logits)


def _bias(case: Case) -> Tensor:
    """The bias of each expert; every null expert has the last one."""
    bias, nulls = case.parameters["bias"].double(), case.options["null_experts"]
    return torch.tensor([*bias[: case.num_experts].tolist(), *([float(bias[-1])] * nulls)])


def bias_balanced(case: Case) -> Routed:
    logits, scores, probs = _scored(case, case.options["score"])
    bias = _bias(case)
    return _weighted(case, [best(row + bias, case.k) for row in scores], scores, probs, logits)


def group_limited(case: Case) -> Routed:
    logits, scores, probs = _scored(case, case.options["score"])
    groups, size = case.options["groups"], case.num_experts // case.options["groups"]
    bias = _bias(case)
    chosen = []
    for row in scores:
        biased = [float(v) for v in row.detach() + bias]
        members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        count = 2 if case.options["group_score"] == "best_two" else 1
        worth = [sum(sorted((biased[e] for e in group), reverse=True)[:count]) for group in members]
        allowed = [e for g in best(worth, case.options["groups_kept"]) for e in members[g]]
        allowed += range(case.num_experts, len(biased))
        chosen.append(best(biased, case.k, allowed))
    return _weighted(case, chosen, scores, probs, logits)


def gshard(case: Case) -> Routed:
    routed = top_k(case)
    if case.context.noise_key is None or not case.options["random_second"]:
        return routed
    _, scores, _ = _scored(case, "softmax")
    drawn = uniform(case.context.noise_key, case.k, salt="gshard 0")
    for t, mine in enumerate(routed.experts):
        total = sum(float(scores[t, e].detach()) for e in mine)
        stays = [
            i == 0 or float(drawn[t, i]) < case.k * float(scores[t, e].detach()) / total for i, e in enumerate(mine)
        ]
        routed.weights[t] = [w for w, s in zip(routed.weights[t], stays, strict=True) if s]
        routed.experts[t] = [e for e, s in zip(mine, stays, strict=True) if s]
    return routed


def noisy_top_k(case: Case) -> Routed:
    if case.context.noise_key is None:
        return top_k(case)
    clean = case.logits()
    size = torch.log(1 + torch.exp(case.logits(case.parameters["noise_gate.weight"]))) + 0.01
    noisy = clean + standard_normal(case.context.noise_key, clean.shape[1], salt="noisy_top_k 0") * size
    probs = torch.stack([softmax(row) for row in noisy])
    load = []
    for t, row in enumerate(noisy):
        chances = []
        for e in range(case.num_experts):
            others = sorted((row[j] for j in range(len(row)) if j != e), key=lambda v: float(v.detach()), reverse=True)
            threshold = others[case.k - 1]
            chances.append(0.5 * (1 + torch.erf((clean[t, e] - threshold) / size[t, e] / 2**0.5)))
        load.append(torch.stack(chances))
    case.extra["load"] = torch.stack(load)
    return _weighted(case, [best(row, case.k) for row in noisy], probs, probs, clean)


def cosine(case: Case) -> Routed:
    projection, directions = case.parameters["projection.weight"], case.parameters["directions"]
    factor = 10 * torch.exp(case.parameters["log_scale"][0])
    logits = []
    for token in case.x:
        p = torch.stack([(token * row).sum() for row in projection])
        cosines = [(p * v).sum() / (p.square().sum().sqrt() * v.square().sum().sqrt()) for v in directions]
        logits.append(torch.stack(cosines) * (factor if factor < 100 else 100))
    stacked = torch.stack(logits)
    probs = torch.stack([softmax(row) for row in stacked])
    return _weighted(case, [best(row, case.k) for row in probs], probs, probs, stacked)


def top_p(case: Case) -> Routed:
    logits, probs, _ = _scored(case, "softmax")
    at_most = case.context.top_k or case.options["max_experts"] or case.num_experts
    chosen = []
    for row in probs:
        mine: list[int] = []
        for e in best(row, at_most):
            if mine and sum(float(row[i].detach()) for i in mine) >= case.options["p"]:
                break
            mine.append(e)
        chosen.append(sorted(mine))
    case.extra["loss"] = torch.stack([-case.options["sparsity_coef"] * (row * torch.log(row)).sum() for row in probs])
    return _weighted(case, chosen, probs, probs, logits)


def _looks_ahead(case: Case) -> bool:
    return case.context.noise_key is not None or case.options["evaluation_routing"] == "as_trained"


def _assigned(case: Case, assign: Callable[[Tensor, int, int], list[tuple[int, int]]]) -> Routed:
    """Assign each sequence's tokens to experts within capacity, weighted by raw probabilities."""
    logits, probs, _ = _scored(case, "softmax")
    chosen: list[list[int]] = [[] for _ in case.x]
    for tokens in case.rows():
        room = min(
            len(tokens), math.ceil(case.options["capacity_factor"] * case.k * len(tokens) / case.num_experts - 1e-9)
        )
        if not _looks_ahead(case):
            pairs = [(i, e) for i, t in enumerate(tokens) for e in best(probs[t], case.k)]
        else:
            pairs = assign(probs[tokens].detach(), case.k, room) if tokens else []
        for i, e in pairs:
            chosen[tokens[i]].append(e)
    case = Case(case.x, case.parameters, {**case.options, "normalize": False}, case.num_experts, case.context)
    return _weighted(case, [sorted(mine) for mine in chosen], probs, probs, logits)


def expert_choice(case: Case) -> Routed:
    def assign(scores: Tensor, _: int, room: int) -> list[tuple[int, int]]:
        return [(i, e) for e in range(scores.shape[1]) for i in best(scores[:, e], room)]

    return _assigned(case, assign)


def greedy(case: Case) -> Routed:
    def assign(scores: Tensor, k: int, room: int) -> list[tuple[int, int]]:
        pairs = sorted(itertools.product(*map(range, scores.shape)), key=lambda pair: (-float(scores[pair]), pair))
        taken: list[tuple[int, int]] = []
        for i, e in pairs:
            if sum(a == i for a, _ in taken) < k and sum(b == e for _, b in taken) < room:
                taken.append((i, e))
        return taken

    return _assigned(case, assign)


def linear_program(case: Case) -> Routed:
    """Try every assignment, for few tokens only."""

    def assign(scores: Tensor, k: int, room: int) -> list[tuple[int, int]]:
        n, num_experts = scores.shape
        subsets = [
            s for size in range(min(k, num_experts) + 1) for s in itertools.combinations(range(num_experts), size)
        ]
        value: dict[tuple[int, ...], tuple[float, list[tuple[int, int]]]] = {(0,) * num_experts: (0.0, [])}
        for i in range(n):  # over tokens; the state is the load of every expert
            found: dict[tuple[int, ...], tuple[float, list[tuple[int, int]]]] = {}
            for filled, (total, pairs) in value.items():
                for subset in subsets:
                    now = tuple(f + (e in subset) for e, f in enumerate(filled))
                    if max(now) > room:
                        continue
                    gain = total + sum(float(scores[i, e]) for e in subset)
                    if now not in found or gain > found[now][0]:
                        found[now] = gain, [*pairs, *((i, e) for e in subset)]
            value = found
        return max(value.values(), key=lambda pair: pair[0])[1]

    return _assigned(case, assign)


def base(case: Case) -> Routed:
    logits = case.logits()
    chosen: list[list[int]] = [[] for _ in case.x]
    for tokens in case.rows():
        places = -(-len(tokens) // case.num_experts)
        if not _looks_ahead(case):
            assigned = [best(logits[t], 1)[0] for t in tokens]
        else:  # every assignment of one expert per token
            ways = itertools.product(range(case.num_experts), repeat=len(tokens))
            fits = (way for way in ways if max(map(way.count, way), default=0) <= places)
            assigned = list(
                max(fits, key=lambda way: sum(float(logits[t, e].detach()) for t, e in zip(tokens, way, strict=True)))
            )
        for t, e in zip(tokens, assigned, strict=True):
            chosen[t] = [e]
    scores = torch.stack([torch.stack([sigmoid(v) for v in row]) for row in logits])
    case = Case(case.x, case.parameters, {"normalize": False}, case.num_experts, case.context)
    return _weighted(case, chosen, scores, torch.stack([softmax(row) for row in logits]), logits)


def sinkhorn(case: Case) -> Routed:
    logits = case.logits()
    plan = logits.detach().clone()
    for tokens in case.rows() if _looks_ahead(case) else []:
        here = torch.exp(logits[tokens].detach())
        for _ in range(case.options["iterations"]):
            for e in range(case.num_experts):
                here[:, e] = here[:, e] / here[:, e].sum() * len(tokens) / case.num_experts
            for i in range(len(tokens)):
                here[i] = here[i] / here[i].sum()
        plan[tokens] = here
    _, scores, _ = _scored(case, case.options["score"])
    case = Case(case.x, case.parameters, {**case.options, "normalize": False}, case.num_experts, case.context)
    probs = torch.stack([softmax(row) for row in logits])
    return _weighted(case, [best(row, case.k) for row in plan], scores, probs, logits)


def mixture_of_depths(case: Case) -> Routed:
    logits = case.logits()
    computed: set[int] = set()
    for tokens in case.rows():
        if _looks_ahead(case):
            count = math.ceil(case.options["capacity"] * len(tokens) - 1e-9)
            computed |= {tokens[i] for i in best([logits[t, 0] for t in tokens], count)}
        else:
            computed |= {t for t in tokens if logits[t, 0] > 0}
    gate = case.parameters["gate.weight"]
    own = torch.stack([(token.detach() * gate[0]).sum() for token in case.x])
    signs = torch.stack([sigmoid(v) if t in computed else 1 - sigmoid(v) for t, v in enumerate(own)])
    case.extra["loss"] = -case.options["predictor_coef"] * torch.log(signs)
    return Routed(
        experts=[[0] if t in computed else [] for t in range(len(case.x))],
        weights=[[sigmoid(logits[t, 0])] if t in computed else [] for t in range(len(case.x))],
        probs=torch.ones_like(logits),
        logits=logits,
    )


def _even(case: Case, chosen: list[list[int]]) -> Routed:
    weight = torch.tensor(1 / case.k, dtype=case.x.dtype)
    chosen = [mine if case.context.valid[t] else [] for t, mine in enumerate(chosen)]
    none = torch.zeros(len(case.x), case.num_experts)
    return Routed(experts=chosen, weights=[[weight] * len(mine) for mine in chosen], probs=none, logits=none)


def hash_(case: Case) -> Routed:
    drawn = uniform(case.context.token_ids, case.num_experts, salt=f"hash {case.options['salt']} 0")
    return _even(case, [best(row, case.k) for row in drawn])


def random_(case: Case) -> Routed:
    context = case.context
    key = token_keys(0, context.token_ids, context.position) if context.noise_key is None else context.noise_key
    return _even(case, [best(row, case.k) for row in uniform(key, case.num_experts, salt="random 0")])


def round_robin(case: Case) -> Routed:
    positions = case.context.position.tolist()
    return _even(case, [[(p * case.k + j) % case.num_experts for j in range(case.k)] for p in positions])


def dense(case: Case) -> Routed:
    logits, probs, _ = _scored(case, "softmax")
    case = Case(case.x, case.parameters, {"normalize": False}, case.num_experts, case.context)
    return _weighted(case, [list(range(case.num_experts)) for _ in case.x], probs, probs, logits)


ORACLES: dict[str, Callable[[Case], Routed]] = {
    "top_k": top_k,
    "switch": top_k,
    "bias_balanced": bias_balanced,
    "group_limited": group_limited,
    "gshard": gshard,
    "noisy_top_k": noisy_top_k,
    "cosine": cosine,
    "top_p": top_p,
    "expert_choice": expert_choice,
    "sinkhorn": sinkhorn,
    "base": base,
    "linear_program": linear_program,
    "greedy": greedy,
    "mixture_of_depths": mixture_of_depths,
    "hash": hash_,
    "random": random_,
    "round_robin": round_robin,
    "dense": dense,
}
