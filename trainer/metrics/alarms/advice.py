"""The cure of each alarm, as config keys with values. Imports no torch."""

from collections.abc import Callable

from trainer.metrics.alarms.symptom import AlarmName, Symptom, TrainingFacts

_COEF, _RATE = 0.01, 0.001
"""Defaults of the balance loss (Switch) and of the bias's update rate (arXiv 2408.15664)."""


def advice(symptom: Symptom, facts: TrainingFacts) -> str:
    """Return what to change, with the values that the keys have now."""
    return _CURES[symptom.alarm](symptom, facts)


def _stronger_balance(facts: TrainingFacts) -> str:
    """Return how to balance the load more."""
    if facts.bias_update_rate is not None:
        return _faster_bias(facts)
    coef = facts.balance_coef
    more = _COEF if coef < _COEF else 10 * coef
    return f"raise the balance loss: model.moe.balance.coef={more:g} (now {coef:g})"


def _faster_bias(facts: TrainingFacts) -> str:
    rate = facts.bias_update_rate or 0.0
    more = _RATE if rate < _RATE else 10 * rate
    return f"raise the bias's rate: model.moe.router.bias_update_rate={more:g} (now {rate:g})"


def _lower_rate(facts: TrainingFacts) -> str:
    if not facts.peak_lr:
        return "let the router learn slower: train.lr_scale={router: 0.1}"
    lower = f"schedule.peak_lr={facts.peak_lr / 3:.2g} (now {facts.peak_lr:.2g})"
    return f"lower {lower}, or the router's alone: train.lr_scale={{router: 0.1}}"


def _collapse(symptom: Symptom, facts: TrainingFacts) -> str:
    return f"{_stronger_balance(facts)}; {_lower_rate(facts)}; resume from a checkpoint before step {{step}}"


def _alike(symptom: Symptom, facts: TrainingFacts) -> str:
    coef, cures = facts.balance_coef, list[str]()
    if coef > _COEF:
        cures.append(f"lower model.moe.balance.coef={_COEF:g} (now {coef:g})")
    if facts.is_router_frozen:
        cures.append("let the router learn: take router out of train.freeze")
    else:
        cures.append("let the router learn faster: train.lr_scale={router: 3}")
    if facts.z_loss_coef > 0.001:
        cures.append(f"lower model.moe.z_loss_coef=0.001 (now {facts.z_loss_coef:g})")
    return "; ".join([*cures, "start with larger router weights: model.init_std"])


def _dead(symptom: Symptom, facts: TrainingFacts) -> str:
    remove = f"{facts.num_experts - len(symptom.experts)}"
    return (
        f"{_stronger_balance(facts)}; or take them out: turnout surgery prune RUN NAME --keep {remove}, "
        "or put noisy copies of busy experts beside them: turnout surgery add RUN NAME --count "
        f"{len(symptom.experts)} --noise 0.1"
    )


def _inert(symptom: Symptom, facts: TrainingFacts) -> str:
    if facts.is_router_frozen:
        return "a frozen router's bias stops too: take router out of train.freeze"
    if "decides alone" in symptom.text or "swings" in symptom.text:
        rate = facts.bias_update_rate or 0.0
        return f"lower the bias's rate: model.moe.router.bias_update_rate={min(_RATE, rate / 10):g} (now {rate:g})"
    return f"{_faster_bias(facts)}, or add a balance loss: model.moe.balance.coef=0.001 (now {facts.balance_coef:g})"


def _growth(symptom: Symptom, facts: TrainingFacts) -> str:
    return f"{_stronger_balance(facts)}; {_lower_rate(facts)}"


def _entropy(symptom: Symptom, facts: TrainingFacts) -> str:
    more = 0.001 if facts.z_loss_coef < 0.001 else 10 * facts.z_loss_coef
    return f"keep the logits small: model.moe.z_loss_coef={more:g} (now {facts.z_loss_coef:g}); {_lower_rate(facts)}"


def _gradient(symptom: Symptom, facts: TrainingFacts) -> str:
    cures = [f"give the router a gradient: model.moe.balance.coef={_COEF:g} (now {facts.balance_coef:g})"]
    cures.append(f"keep its probabilities from saturating: model.moe.z_loss_coef=0.001 (now {facts.z_loss_coef:g})")
    return "; ".join(cures)


def _plateau(symptom: Symptom, facts: TrainingFacts) -> str:
    if "rate is 0" in symptom.text:
        return f"set schedule.peak_lr=0.001 (now {facts.peak_lr or 0:g}), and see schedule.final_fraction"
    if facts.peak_lr is None:
        return "change the learning rate of the schedule, or end the training: train.steps={step}"
    return (
        f"if the loss is high, try schedule.peak_lr={3 * facts.peak_lr:.2g} or {facts.peak_lr / 3:.2g} "
        f"(now {facts.peak_lr:.2g}); if it is as low as it can be, let the rate decay now or end: train.steps={{step}}"
    )


def _slow(symptom: Symptom, facts: TrainingFacts) -> str:
    return (
        f"look at the host of rank {symptom.rank} (clocks, other processes, disk); profile it: "
        f"profile={{start: N, steps: 3, ranks: [{symptom.rank}]}}; with ep_size above 1 its experts may be the "
        "busiest: raise model.moe.balance.coef, or set parallel.ep_size=1"
    )


_CURES: dict[AlarmName, Callable[[Symptom, TrainingFacts], str]] = {
    "collapse": _collapse,
    "alike_tokens": _alike,
    "dead_experts": _dead,
    "inert_bias": _inert,
    "imbalance_growth": _growth,
    "entropy_zero": _entropy,
    "router_gradient": _gradient,
    "plateau": _plateau,
    "slow_rank": _slow,
}
