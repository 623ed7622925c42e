"""Alarms about what routers decide: tokens alike, entropy at 0, no gradient, an inert selection bias. Import no torch.

# L MoE layers, E experts.
"""

import math
from collections.abc import Iterator

from trainer.metrics.alarms.balance_rules import imbalance_limit
from trainer.metrics.alarms.config import AlarmsConfig
from trainer.metrics.alarms.observation import Observation, of_layer
from trainer.metrics.alarms.symptom import Symptom, TrainingFacts, severity_below

_SCORE_RANGE = 1.0
"""Largest difference of two scores, after softmax or sigmoid."""


def router_symptoms(observation: Observation, config: AlarmsConfig, facts: TrainingFacts) -> Iterator[Symptom]:
    """Yield what is wrong with the routers' probabilities, gradients and biases."""
    if not facts.learns_routing or facts.num_experts < 2:
        return
    for layer in range(len(observation.counts)):
        yield from _probabilities(observation, layer, config, facts)
        yield from _gradient(observation, layer, config, facts)
        yield from _bias(observation, layer, config, facts)


def _probabilities(seen: Observation, layer: int, config: AlarmsConfig, facts: TrainingFacts) -> Iterator[Symptom]:
    most, entropy = math.log(facts.num_experts), of_layer(seen.entropy, layer)
    information = of_layer(seen.token_information, layer)
    if config.entropy is not None and entropy is not None and entropy < config.entropy * most:
        yield Symptom(
            alarm="entropy_zero",
            layer=facts.layers[layer],
            value=entropy / most,
            threshold=config.entropy,
            text=f"the router's probabilities have an entropy of {entropy:.2g} nats, at most {most:.3g}: it is certain "
            "of every token",
            severity=severity_below(max(0.0, entropy) / most, config.entropy),
        )
    if config.alike_tokens is not None and information is not None and information < config.alike_tokens * most:
        yield Symptom(
            alarm="alike_tokens",
            layer=facts.layers[layer],
            value=information / most,
            threshold=config.alike_tokens,
            text=f"the router gives all tokens the same probabilities: they tell {max(0.0, information):.2g} nats "
            f"about the token, at most {most:.3g}",
            severity=severity_below(max(0.0, information) / most, config.alike_tokens),
        )


def _gradient(seen: Observation, layer: int, config: AlarmsConfig, facts: TrainingFacts) -> Iterator[Symptom]:
    norm, limit = of_layer(seen.router_grad_norm, layer), config.router_gradient
    if limit is None or norm is None or facts.is_router_frozen or seen.grad_norm <= 0 or norm >= limit * seen.grad_norm:
        return
    yield Symptom(
        alarm="router_gradient",
        layer=facts.layers[layer],
        value=norm / seen.grad_norm,
        threshold=limit,
        text=f"the router's gradient has vanished: its norm is {norm:.2g}, that of the whole gradient "
        f"{seen.grad_norm:.2g}",
        severity=severity_below(norm / seen.grad_norm, limit),
    )


def _bias(seen: Observation, layer: int, config: AlarmsConfig, facts: TrainingFacts) -> Iterator[Symptom]:
    """Yield a bias that cannot balance the load, where that is uneven."""
    change, span, limit = of_layer(seen.bias_change, layer), of_layer(seen.bias_span, layer), config.bias_steps
    imbalance = seen.imbalance(layer)
    if facts.bias_update_rate is None or limit is None or span is None or change is None:
        return
    if imbalance < imbalance_limit(config, seen, layer):
        return
    # Scores of sigmoid do not sum to 1 over experts, as probabilities do: about a half each.
    scale = facts.num_experts / 2 if facts.score == "sigmoid" else 1.0
    missing = max(0.0, scale * (of_layer(seen.prob_span, layer) or 0.0) - span)
    if change == 0 and (facts.bias_update_rate == 0 or facts.is_router_frozen):
        value, why = math.inf, "does not move"
    elif change == 0:
        value, why = math.inf, "swings and is back where it was: all tokens follow each of its moves"
    elif span >= _SCORE_RANGE:
        value, why = math.inf, f"spans {span:.2g}, more than any two scores differ, and decides alone"
    elif (value := missing / change) > limit:
        why = f"moves {change:.1g} a step, and needs about {value:,.0f} steps more to reach the scores"
    else:
        return
    yield Symptom(
        alarm="inert_bias",
        layer=facts.layers[layer],
        value=value,
        threshold=limit,
        text=f"the selection bias {why}, while the busiest expert has {imbalance:.2f} times the mean load",
        severity=min(1000.0, value / limit),
    )
