"""Entries of `train.freeze` and `train.lr_scale` that match only weights which a changed model no longer has."""

from collections.abc import Iterable

import torch

from trainer.experiment import ExperimentConfig
from trainer.models.gpt import GPT
from trainer.models.parameter_patterns import TIED, matches


def without_gone_weights(config: ExperimentConfig, old: GPT) -> tuple[ExperimentConfig, list[str]]:
    """Return the config of a changed model without entries of weights that only `old` has, and a line about them."""
    with torch.device("meta"):
        new = GPT(config.model.model_copy(update={"lora": None}), old.vocab_size)
    before, after = _names(old), _names(new)

    def is_gone(entry: str) -> bool:
        word = entry.removeprefix("!")
        return any(matches(word, name) for name in before) and not any(matches(word, name) for name in after)

    train = config.train
    gone = [entry for entry in (*train.freeze, *train.lr_scale) if is_gone(entry)]
    if not gone:
        return config, []
    freeze = [entry for entry in train.freeze if not is_gone(entry)]
    if all(entry.startswith("!") for entry in freeze):  # exceptions of nothing
        freeze = []
    factors = {entry: factor for entry, factor in train.lr_scale.items() if not is_gone(entry)}
    kept = {"freeze": type(train.freeze)(freeze), "lr_scale": factors}
    note = f"train.freeze and train.lr_scale are without {', '.join(dict.fromkeys(gone))}: those weights are gone"
    return config.model_copy(update={"train": train.model_copy(update=kept)}), [note]


def _names(model: GPT) -> Iterable[str]:
    names = [name for name, _ in model.named_parameters()]
    return [*names, *TIED.values()] if model.head is None else names
