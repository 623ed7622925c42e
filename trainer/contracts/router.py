"""Contract of a router: checks for every router of the registry and for plug-ins.

# B sequences of S tokens, T = B * S, k experts per token, E experts.
"""

import itertools
import math
from dataclasses import replace

import torch

from trainer.contracts.ensure import DoesNotApply, ensure
from trainer.contracts.router_inputs import B, D, S, context_of, make_router, make_x, matrix, repeated_tokens, same
from trainer.moe.capacity import expert_capacity, limit_to_capacity
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routers.config.options import AssignmentOptions, RouterOptions
from trainer.moe.routing import Router, RoutingDecision


def is_well_formed(config: RouterOptions, num_experts: int) -> None:
    """The decision is well formed: experts exist and differ, weights are as declared, padding has none."""
    valid = torch.rand(B * S, generator=torch.Generator().manual_seed(5)) < 0.8
    num_choices = num_experts + config.num_null_experts
    for is_training in (True, False):
        router = make_router(config, num_experts)
        output = router(make_x(), context_of(is_training=is_training, valid=valid))
        decision, weight = output.decision, output.decision.combine_weight
        token, expert = decision.token_index, decision.expert_index
        size = (decision.num_tokens, decision.num_experts)
        ensure(size == (B * S, num_experts), f"a decision of {size[0]} tokens and {size[1]} experts")
        ensure((token.diff() >= 0).all(), "assignments are not listed by token")
        ensure(not decision.kept[~valid[token]].any(), "padding has experts")
        pairs = list(zip(token.tolist(), expert.tolist(), strict=True))
        ensure(len(pairs) == len(set(pairs)), "a token has an expert twice")
        ensure(((expert >= 0) & (expert < num_choices)).all(), f"expert indices beyond 0 to {num_choices - 1}")
        is_sound = weight.dtype == torch.float64 and torch.isfinite(weight).all() and (weight >= 0).all()
        ensure(is_sound, f"combine weights in {weight.dtype} from {weight.min():g} to {weight.max():g}")
        top_k = decision.top_k
        if top_k is not None:
            expected = [t for t in range(B * S) for _ in range(top_k)]
            ensure(token.tolist() == expected, f"{len(pairs)} assignments of {B * S} tokens, not top_k {top_k} of each")
        ensure(top_k is not None or not config.has_fixed_k, "has_fixed_k is declared, and the decision has no top_k")
        dispatched = int((decision.kept & (expert < num_experts)).sum())
        ensure(decision.num_rows in (None, dispatched), f"num_rows is {decision.num_rows}, and {dispatched} are kept")
        most = int(torch.bincount(token, minlength=1).max())
        ensure(decision.most_per_token in (None, most), f"most_per_token is {decision.most_per_token}, not {most}")
        if config.weight_sum is not None:
            sums = torch.zeros(B * S, dtype=torch.float64).index_add(0, token, weight.detach() * decision.kept)
            torch.testing.assert_close(sums[valid], torch.full_like(sums[valid], config.weight_sum))
        probs, scores = output.probs, output.scores
        if probs is not None:
            shape = (B * S, num_experts + (config.num_null_experts > 0))
            ensure(probs.shape == shape, f"probs of shape {tuple(probs.shape)}")
            torch.testing.assert_close(probs.sum(-1), torch.ones(B * S, dtype=torch.float64))
        if scores is not None:
            ensure(scores.shape == (B * S, num_choices), f"scores of shape {tuple(scores.shape)}")
            ensure(not scores.requires_grad and (scores >= 0).all(), "scores with gradient, or negative")
        elif config.num_null_experts > 0:
            ensure(probs is None, "scores are missing, which tell null experts apart")
        if config.ranks_choices and not hasattr(router, "bias"):
            is_ranked = (weight.view(B * S, -1).diff(dim=1) <= 1e-12).all()
            ensure(is_ranked, "ranks_choices is declared, and a later choice weighs more")


def padding_changes_nothing(config: RouterOptions, num_experts: int) -> None:
    """The content and the amount of padding change nothing for the tokens."""
    router, x = make_router(config, num_experts), make_x()
    valid = (torch.arange(S) < torch.tensor([[S], [5], [3]])).flatten()
    for is_training in (True, False):
        context = context_of(is_training=is_training, valid=valid)
        one, other = (router(each, context).decision for each in (x, torch.where(valid[:, None], x, 100 * make_x(9))))
        ensure(same(matrix(one), matrix(other)), "the content of padding changes decisions")


def rows_do_not_see_each_other(config: RouterOptions, num_experts: int) -> None:
    """A sequence is routed the same alone as in a batch, so that the layout changes nothing."""
    router, x = make_router(config, num_experts), make_x()
    for is_training in (True, False):
        context = context_of(is_training=is_training)
        together = matrix(router(x, context).decision)
        for row in range(B):
            here = slice(row * S, (row + 1) * S)
            noise_key = None if context.noise_key is None else context.noise_key[here]
            one = replace(context_of(is_training=False, rows=1), token_ids=context.token_ids[here], noise_key=noise_key)
            alone = matrix(router(x[here], one).decision)
            ensure(same(alone, together[here]), f"sequence {row} is routed otherwise when it is alone")


def causality_is_as_declared(config: RouterOptions, num_experts: int) -> None:
    """Tokens depend on others exactly as `causal` declares, neither less nor more."""
    router = make_router(config, num_experts)
    for is_training in (True, False):
        declared = router.causal if is_training else router.causal_in_evaluation
        leaks, crosses = _leaks(router, is_training)
        found = f"training {is_training}: declared {declared}, sees"
        ensure(leaks == (declared != "strict"), f"{found} later tokens {leaks}")
        ensure(crosses == (declared == "no"), f"{found} other rows {crosses}")


def _leaks(router: Router, is_training: bool) -> tuple[bool, bool]:
    """Return whether later tokens of the sequence, and whether other sequences, change what an earlier token gets."""
    leaks = crosses = False
    for seed in range(6):
        x, context = make_x(seed), context_of(is_training=is_training, seed=seed)
        before = matrix(router(x, context).decision).view(B, S, -1)
        for cut in (2, S // 2, S - 1):
            ids, other = context.token_ids.clone().view(B, S), x.clone().view(B, S, D)
            other[0, cut:] = 3 * make_x(seed + 50).view(B, S, D)[0, cut:]
            ids[0, cut:] += 1
            changed = replace(context, token_ids=ids.flatten())
            after = matrix(router(other.flatten(0, 1), changed).decision).view(B, S, -1)
            leaks |= not same(before[0, :cut], after[0, :cut])
            crosses |= not same(before[1:], after[1:])
    return leaks, crosses


def capacity_is_kept(config: RouterOptions, num_experts: int) -> None:
    """No expert gets more rows of a sequence than its capacity."""
    router, context = make_router(config, num_experts, spread=3.0), context_of(is_training=True)
    decision = router(make_x() + 1, context).decision
    if config.has_fixed_k and decision.top_k is not None:
        for policy in ("position", "probability", "random", *(["choice_major"] if config.ranks_choices else [])):
            section = CapacityConfig.model_validate({"factor": 1.0, "min": 1, "policy": policy})
            limited = limit_to_capacity(decision, section, context)
            most, found = expert_capacity(S * decision.top_k, num_experts, factor=1.0, minimum=1), _busiest(limited)
            ensure(found <= most and limited.capacity == B * most, f"{policy}: {found} rows, but a capacity of {most}")
    elif isinstance(config, AssignmentOptions):
        most = math.ceil(config.capacity_factor * config.top_k * S / num_experts)
        ensure(_busiest(decision) <= most, f"{_busiest(decision)} rows of a sequence for one expert, not {most}")


def _busiest(decision: RoutingDecision) -> int:
    return int((~matrix(decision).isnan()).view(B, S, -1).sum(1).max())


def equal_scores_are_broken_the_same_way(config: RouterOptions, num_experts: int) -> None:
    """Equal scores are broken the same way in every sequence."""
    router, context = make_router(config, num_experts, spread=0.0), context_of(is_training=False)
    context = replace(context, token_ids=context.token_ids.view(B, S)[:1].expand(B, S).flatten())
    rows = matrix(router(torch.zeros(B * S, D, dtype=torch.float64), context).decision).view(B, S, -1)
    are_equal = same(rows[0], rows[1]) and same(rows[0], rows[2])
    ensure(are_equal, "equal scores give different experts in different sequences")


def everything_learns(config: RouterOptions, num_experts: int) -> None:
    """Every parameter gets a finite gradient through the combine weights that is not zero."""
    router = make_router(config, num_experts)
    decision = router(make_x(), context_of(is_training=True)).decision
    value = (decision.combine_weight * torch.linspace(-1, 1, decision.combine_weight.numel()) ** 3)[decision.kept].sum()
    for name, parameter in router.named_parameters():
        (gradient,) = torch.autograd.grad(value, parameter, retain_graph=True)
        is_sound = torch.isfinite(gradient).all() and (gradient != 0).any()
        ensure(is_sound, f"{name} has no gradient, or one that is not finite")


def noise_is_a_function_of_its_key(config: RouterOptions, num_experts: int) -> None:
    """Equal calls give equal decisions: noise is a function of its key."""
    router, x = make_router(config, num_experts), make_x()
    for is_training in (True, False):
        context = context_of(is_training=is_training)
        one, other = (matrix(router(x, context).decision) for _ in range(2))
        ensure(same(one, other), "two equal calls give different decisions")


def scores_are_wide(config: RouterOptions, num_experts: int) -> None:
    """Under autocast every output stays at least float32."""
    router = make_router(config, num_experts).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = router(make_x().bfloat16(), context_of(is_training=True))
    for part in (output.decision.combine_weight, output.logits, output.probs, output.load, output.loss):
        ensure(part is None or part.dtype == torch.float32, "an output is narrower than float32 under autocast")


def what_is_not_finite_is_no_crash(config: RouterOptions, num_experts: int) -> None:
    """NaN and infinity in the input raise no error, so that all ranks skip the step together."""
    for bad in (torch.nan, torch.inf):
        x = make_x()
        x[3] = bad
        decision = make_router(config, num_experts)(x, context_of(is_training=True)).decision
        exists = (decision.expert_index >= 0) & (decision.expert_index < num_experts + config.num_null_experts)
        ensure(exists.all(), "an input that is not finite gives an expert that does not exist")


def extreme_scores_have_gradients(config: RouterOptions, num_experts: int) -> None:
    """Logits of +-200, which underflow in float32, leave loss and gradient finite."""
    router = make_router(config, num_experts).float()
    output = router(40 * make_x().float(), context_of(is_training=True))
    parts = [output.decision.combine_weight.sum(), output.probs, output.loss]
    value = sum((part.square().sum() for part in parts if part is not None), torch.zeros(()))
    ensure(torch.isfinite(value), "large logits give a loss that is not finite")
    for name, parameter in router.named_parameters():
        (gradient,) = torch.autograd.grad(value, parameter, retain_graph=True)
        ensure(torch.isfinite(gradient).all(), f"large logits give {name} a gradient that is not finite")


def k_of_one_call_is_k_of_the_config(config: RouterOptions, num_experts: int) -> None:
    """`context.top_k` gives the same experts as the option `top_k`."""
    if "top_k" not in type(config).model_fields:
        raise DoesNotApply
    for top_k in range(1, num_experts + 1):
        wanted = config.model_copy(update={"top_k": top_k})
        if any(wanted.problems_among(num_experts)):
            continue
        for is_training in (True, False):
            context = context_of(is_training=is_training)
            asked = make_router(config, num_experts)(make_x(), replace(context, top_k=top_k)).decision
            built = make_router(wanted, num_experts)(make_x(), context).decision
            ensure(asked.top_k == built.top_k, f"context.top_k {top_k} gives {asked.top_k} experts")
            is_same = same(matrix(asked), matrix(built))
            ensure(is_same, f"context.top_k {top_k} gives other experts than the option top_k")


def rounding_chooses_no_expert(config: RouterOptions, num_experts: int) -> None:
    """Tokens that differ in their last bits, as another layout rounds them, get the same experts."""
    policies = ["probability"] * config.has_fixed_k + ["choice_major"] * config.ranks_choices
    capacities = [CapacityConfig.model_validate({"factor": 1.0, "min": 1, "policy": policy}) for policy in policies]
    for dtype, spread in itertools.product((torch.float64, torch.float32), (0.5, 12.0)):
        router = make_router(config, num_experts, spread=spread).to(dtype)
        generator = torch.Generator().manual_seed(0)
        for name, (x, valid) in repeated_tokens().items():
            for is_training in (True, False):
                context = context_of(is_training=is_training, valid=valid)
                found = []
                for last_bits in (0, 1, 1):
                    drawn = 2 * torch.rand(x.shape, generator=generator, dtype=dtype) - 1
                    decision = router(x.to(dtype) * (1 + last_bits * torch.finfo(dtype).eps * drawn), context).decision
                    limited = [limit_to_capacity(decision, capacity, context) for capacity in capacities]
                    found.append(torch.stack([~matrix(each).isnan() for each in (decision, *limited)]))
                is_same = torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
                ensure(is_same, f"the last bits of an input choose the experts: {name}, {dtype}, spread {spread}")


def given_experts_are_used(config: RouterOptions, num_experts: int) -> None:
    """Experts that are given replace the choice and nothing else: given its own, a router computes the same bits."""
    if not config.replays_experts:
        raise DoesNotApply
    router, x = make_router(config, num_experts), make_x()
    for is_training in (True, False):
        context = context_of(is_training=is_training)
        own = router(x, context)
        chosen = own.decision.expert_index.view(B * S, -1)
        again = router(x, replace(context, given=chosen))
        ensure(torch.equal(again.decision.combine_weight, own.decision.combine_weight), "its own choice, other weights")
        ensure(torch.equal(again.decision.kept, own.decision.kept), "its own choice, other assignments are kept")
        others = (chosen + 1) % (num_experts + config.num_null_experts)  # still distinct
        output = router(x, replace(context, given=others))
        decision, live = output.decision, output.live_choice
        ensure(torch.equal(decision.expert_index, others.flatten()), "given experts are not used in their order")
        ensure(live is not None and torch.equal(live, chosen), "live_choice is not the router's own")
        if config.learns_weights and config.weight_sum is None:
            (gradient,) = torch.autograd.grad(decision.combine_weight.sum(), [next(router.parameters())])
            ensure((gradient != 0).any(), "given experts leave the router without a gradient")


CHECKS = [
    is_well_formed,
    padding_changes_nothing,
    rows_do_not_see_each_other,
    causality_is_as_declared,
    capacity_is_kept,
    equal_scores_are_broken_the_same_way,
    everything_learns,
    noise_is_a_function_of_its_key,
    scores_are_wide,
    what_is_not_finite_is_no_crash,
    extreme_scores_have_gradients,
    k_of_one_call_is_k_of_the_config,
    rounding_chooses_no_expert,
    given_experts_are_used,
]
