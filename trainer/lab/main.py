"""The two benches of routers from their first line to their last: what they choose, and what is learned with them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.checkpoint.run_folder import RunFolder
from trainer.errors import ConfigError, NumericsError
from trainer.experiment import ExperimentConfig
from trainer.lab.charts_svg import choices_svg, outcomes_svg
from trainer.lab.logits import Logits, made_up
from trainer.lab.report import choices_record, outcomes_record, show_choices, show_outcomes, write
from trainer.lab.router_choices import BIAS_UPDATE_RATE, UPDATES, compare_choices, unreadable
from trainer.lab.router_kinds import ALONE
from trainer.lab.router_trainings import Training, train
from trainer.lab.traced_logits import traced
from trainer.lab.training_outcomes import TrainingOutcome, outcome, over_seeds
from trainer.terminal import print_safe


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicesOptions:
    """On what routers are compared without training."""

    sequences: int
    tokens: int
    """In a sequence."""
    num_experts: int
    top_k: int
    seed: int
    rounds: int
    """Number of timings of each router."""


def bench_choices(
    kinds: Sequence[str],
    options: ChoicesOptions,
    *,
    run: tuple[ExperimentConfig, RunFolder] | None,
    json_path: Path | None,
    svg_path: Path | None,
) -> int:
    """Compare what routers choose when given the same logits; return the exit code.

    Args:
        kinds: of routers.
        options: of the logits and of the measurement.
        run: whose newest checkpoint gives logits, too; its number of tokens and experts are in `options`.
        json_path: file for the numbers.
        svg_path: file for a picture.

    Raises:
        CheckpointError: if the run has no checkpoint.
        ConfigError: if its routers have no logits, or a router cannot be with so many experts.
    """
    left_out = unreadable(kinds, num_experts=options.num_experts, top_k=options.top_k)
    kinds = [kind for kind in kinds if kind not in left_out]
    if not kinds:
        raise ConfigError(next(iter(left_out.values())))
    logits = [
        made_up(
            kind,
            sequences=options.sequences,
            tokens=options.tokens,
            num_experts=options.num_experts,
            seed=options.seed,
        )
        for kind in ("random", "skewed")
    ]
    if run is not None:
        logits.append(traced(*run, sequences=options.sequences, seed=options.seed))
    choices = compare_choices(kinds, logits, top_k=options.top_k, rounds=options.rounds)
    titles = {given.kind: _title(given, options) for given in logits}
    own_k = [f"{choice.router} by k {choice.top_k}" for choice in choices if choice.top_k != options.top_k]
    show_choices(
        choices,
        titles,
        notes=[*_notes(kinds, own_k), *(f"{kind} is left out: {why}" for kind, why in left_out.items())],
    )
    if json_path is not None:
        about = {**asdict(options), "run": None if run is None else str(run[1].path)}
        write(json_path, {"options": about, "choices": choices_record(choices)})
    if svg_path is not None:
        title = f"Routers on the same logits: {options.num_experts} experts, {options.top_k} for each token"
        write(svg_path, choices_svg(choices, titles, top_k=options.top_k, title=title))
    return 0


def _title(given: Logits, options: ChoicesOptions) -> str:
    text = {
        "random": "standard normal logits",
        "skewed": "the same with an offset for each expert, from +2 to -2",
        "traced": f"logits of a trained run on held-out text, {', '.join(layer.name for layer in given.layers)}",
    }[given.kind]
    rows, width = given.context.valid_rows.shape
    return f"{given.kind}: {text}\n{rows} x {width} tokens, {given.num_experts} experts, {options.top_k} for each token"


def _notes(kinds: Sequence[str], own_k: Sequence[str]) -> list[str]:
    """Say what a reader must know of some of the routers in the table."""
    notes = ["routers decide as in training, with their noise"]
    if own_k:
        notes.append(f"measured on a programme of their own k: {', '.join(dict.fromkeys(own_k))}")
    if {"bias_balanced", "group_limited"} & set(kinds):
        notes.append(
            f"bias_balanced and group_limited learned their bias first: {UPDATES} steps, at a rate falling from "
            f"{BIAS_UPDATE_RATE} to 0, on other logits of the same kind"
        )
    if {"expert_choice", "linear_program", "greedy"} & set(kinds):
        notes.append("expert_choice, linear_program and greedy are given the room that they are measured with")
    if "cosine" in kinds:
        notes.append("cosine's logits are the given ones over their length, times 10: it chooses what top_k does")
    if "noisy_top_k" in kinds:
        notes.append("noisy_top_k's noise has the size 0.70 for every token and expert, before anything is learned")
    if {"hash", "random", "round_robin"} & set(kinds):
        notes.append("hash, random and round_robin read no logits; they are measured by the same scores")
    notes.append(f"{ALONE} has one network and no choice between experts; --train compares it")
    return notes


def bench_trainings(trainings: Sequence[Training], *, json_path: Path | None, svg_path: Path | None) -> int:
    """Train what is not trained yet, one after the other, and compare; return the exit code.

    Raises:
        Stopped: if a training was asked to stop.
        TurnoutError: if one failed, or its held-out loss is no number.
    """
    found: dict[str, list[TrainingOutcome]] = {}
    for number, training in enumerate(trainings, start=1):
        found.setdefault(training.router, []).append(_trained(training, f"[{number}/{len(trainings)}]"))
    outcomes = [over_seeds(of_router) for of_router in found.values()]
    config, seeds = trainings[0].config, len(outcomes[0].held_out_losses)
    tokens = config.train.steps * config.train.global_batch_size * config.model.seq_len
    title = f"{tokens} tokens each ({config.train.steps} steps), {seeds} seed{'s' if seeds > 1 else ''}"
    show_outcomes(outcomes, title, notes=_training_notes(trainings))
    if json_path is not None:
        write(json_path, {"tokens": tokens, "seeds": seeds, "routers": outcomes_record(outcomes)})
    if svg_path is not None:
        write(svg_path, outcomes_svg(outcomes, title=f"Routers trained on {title}"))
    return 0


def _trained(training: Training, number: str) -> TrainingOutcome:
    """Return what a training came to, after it if need be."""
    label = f"{number} {training.folder.path}"
    result = outcome(training)
    if result is None:
        print_safe(f"{label}: training for {training.config.train.steps} steps")
        train(training)
        result = outcome(training)
        if result is None:  # it ended well, so its last step was evaluated
            raise NumericsError(f"{training.folder.metrics}: its held-out loss is not finite; leave it out with --only")
    print_safe(f"{label}: held-out loss {result.held_out_loss:.4f}")
    return result


def _training_notes(trainings: Sequence[Training]) -> list[str]:
    """Say what differs between the trainings beside the router."""
    configs = {training.router: training.config.model.moe for training in trainings}
    notes = []
    factors = {router: moe.capacity.factor for router, moe in configs.items() if moe is not None}
    free = [router for router, factor in factors.items() if factor is None]
    if len(set(factors.values())) > 1:
        notes.append(
            f"without a capacity, for which they have no use: {', '.join(free)}; linear_program and greedy have the "
            "factor as their room"
        )
    coefs = {router: moe.balance.coef for router, moe in configs.items() if moe is not None}
    if len(set(coefs.values())) > 1:
        evened = [router for router, coef in coefs.items() if coef == 0]
        notes.append(f"without a balance loss (balance.coef 0), since they balance themselves: {', '.join(evened)}")
    alone = configs.get(ALONE)
    if alone is not None:
        share = getattr(alone.router, "capacity", 1.0)
        notes.append(
            f"{ALONE} has one network, {alone.d_ff} wide, for {share:.3g} of the tokens in training: as many weights "
            "as all experts of the others together"
        )
    notes.append("finished trainings are not repeated: remove their folder to train them again")
    return notes
