"""Run the router benchmarks: choices on the same logits, and trainings on the same text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.checkpoint.run_folder import RunFolder
from trainer.console.result_tables import write_result
from trainer.errors import ConfigError, NumericsError
from trainer.experiment import ExperimentConfig
from trainer.lab.bench_charts import choices_svg, outcomes_svg
from trainer.lab.bench_report import choices_record, outcomes_record, show_choices, show_outcomes
from trainer.lab.logits import Logits, synthetic_logits
from trainer.lab.router_choices import BIAS_UPDATE_RATE, UPDATES, compare_choices, kinds_without_logits
from trainer.lab.router_configs import MIXTURE_OF_DEPTHS
from trainer.lab.router_trainings import Training, run_training
from trainer.lab.run_logits import logits_of_run
from trainer.lab.training_outcomes import TrainingOutcome, mean_over_seeds, read_outcome
from trainer.terminal import print_safe


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicesOptions:
    """Options of the benchmark on the same logits."""

    sequences: int
    tokens: int
    """Tokens per sequence."""
    num_experts: int
    top_k: int
    seed: int
    rounds: int
    """Timings of each router."""


def bench_choices(
    kinds: Sequence[str],
    options: ChoicesOptions,
    *,
    run: tuple[ExperimentConfig, RunFolder] | None,
    json_path: Path | None,
    svg_path: Path | None,
) -> int:
    """Compare routers on the same logits, print the result, write it as numbers and a picture; return the exit code.

    The newest checkpoint of `run`, if any, gives logits as well; `options` has its number of tokens and experts.

    Raises:
        CheckpointError: if the run has no checkpoint.
        ConfigError: if the run's routers compute no logits, or a router does not support this number of experts.
    """
    skipped = kinds_without_logits(kinds, num_experts=options.num_experts, top_k=options.top_k)
    kinds = [kind for kind in kinds if kind not in skipped]
    if not kinds:
        raise ConfigError(next(iter(skipped.values())))
    size = {"sequences": options.sequences, "tokens": options.tokens, "num_experts": options.num_experts}
    logits = [synthetic_logits(kind, **size, seed=options.seed) for kind in ("random", "skewed")]
    if run is not None:
        logits.append(logits_of_run(*run, sequences=options.sequences, seed=options.seed))
    choices = compare_choices(kinds, logits, top_k=options.top_k, rounds=options.rounds)
    titles = {given.kind: _title(given, options) for given in logits}
    own_k = [f"{choice.router} by k {choice.top_k}" for choice in choices if choice.top_k != options.top_k]
    left_out = [f"{kind} is left out: {reason}" for kind, reason in skipped.items()]
    show_choices(choices, titles, notes=[*_notes(kinds, own_k), *left_out])
    if json_path is not None:
        settings = {**asdict(options), "run": None if run is None else str(run[1].path)}
        write_result(json_path, {"options": settings, "choices": choices_record(choices)})
    if svg_path is not None:
        title = f"Routers on the same logits: {options.num_experts} experts, {options.top_k} for each token"
        write_result(svg_path, choices_svg(choices, titles, top_k=options.top_k, title=title))
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
    notes = ["routers choose as in training, with noise"]
    if own_k:
        notes.append(f"measured against a programme with their own k: {', '.join(dict.fromkeys(own_k))}")
    learned = f"{UPDATES} updates at a rate decaying from {BIAS_UPDATE_RATE} to 0, on other logits of the same kind"
    of_kinds = {
        "bias_balanced group_limited": f"bias_balanced and group_limited learned their bias first: {learned}",
        "expert_choice linear_program greedy": "expert_choice, linear_program and greedy are given the capacity they "
        "are measured at",
        "cosine": "cosine's logits are the given ones, normalised and times 10: its choices are those of top_k",
        "noisy_top_k": "noisy_top_k's noise has its untrained scale, 0.70, for every token and expert",
        "hash random round_robin": "hash, random and round_robin ignore the logits; their choices are scored by the "
        "same scores",
    }
    notes += [note for some, note in of_kinds.items() if not set(some.split()).isdisjoint(kinds)]
    return [*notes, f"{MIXTURE_OF_DEPTHS} has one network and no choice between experts; --train compares it"]


def bench_trainings(trainings: Sequence[Training], *, json_path: Path | None, svg_path: Path | None) -> int:
    """Run the trainings that are not finished, compare all of them and return the exit code.

    Raises:
        StopRequested: if a training was asked to stop.
        TurnoutError: if a training failed, or its held-out loss is not finite.
    """
    by_router: dict[str, list[TrainingOutcome]] = {}
    for number, training in enumerate(trainings, start=1):
        by_router.setdefault(training.router, []).append(_trained(training, f"[{number}/{len(trainings)}]"))
    outcomes = [mean_over_seeds(of_router) for of_router in by_router.values()]
    config, seeds = trainings[0].config, len(outcomes[0].held_out_losses)
    tokens = config.train.steps * config.train.global_batch_size * config.model.seq_len
    title = f"{tokens} tokens each ({config.train.steps} steps), {seeds} seed{'s' if seeds > 1 else ''}"
    show_outcomes(outcomes, title, notes=_training_notes(trainings))
    if json_path is not None:
        write_result(json_path, {"tokens": tokens, "seeds": seeds, "routers": outcomes_record(outcomes)})
    if svg_path is not None:
        write_result(svg_path, outcomes_svg(outcomes, title=f"Routers trained on {title}"))
    return 0


def _trained(training: Training, number: str) -> TrainingOutcome:
    label = f"{number} {training.folder.path}"
    result = read_outcome(training)
    if result is None:
        print_safe(f"{label}: training for {training.config.train.steps} steps")
        run_training(training)
        result = read_outcome(training)
        if result is None:  # it exited normally, so its last step was evaluated
            raise NumericsError(f"{training.folder.metrics}: its held-out loss is not finite; leave it out with --only")
    print_safe(f"{label}: held-out loss {result.held_out_loss:.4f}")
    return result


def _training_notes(trainings: Sequence[Training]) -> list[str]:
    notes = []
    configs = {training.router: moe for training in trainings if (moe := training.config.model.moe) is not None}
    factors = {router: moe.capacity.factor for router, moe in configs.items()}
    if len(set(factors.values())) > 1:
        free = ", ".join(router for router, factor in factors.items() if factor is None)
        notes.append(
            f"without a capacity, which they do not use: {free}; linear_program and greedy get it as an option"
        )
    coefs = {router: moe.balance.coef for router, moe in configs.items()}
    if len(set(coefs.values())) > 1:
        self_balancing = ", ".join(router for router, coef in coefs.items() if coef == 0)
        notes.append(f"without a balance loss (balance.coef 0): {self_balancing} balance themselves")
    if (single := configs.get(MIXTURE_OF_DEPTHS)) is not None:
        share = getattr(single.router, "capacity", 1.0)
        notes.append(
            f"{MIXTURE_OF_DEPTHS} has one network, {single.d_ff} wide, for {share:.3g} of the tokens in training: "
            "as many weights as all experts of the others together"
        )
    notes.append("finished trainings are not repeated: remove their folder to train them again")
    return notes
