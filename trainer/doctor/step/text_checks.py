"""Checks of the rows of a step, and of the text behind them. Import no torch."""

from collections.abc import Iterator

from trainer.doctor.finding import Sign
from trainer.doctor.step.step_evidence import StepCheck, StepEvidence

_MOST_PADDING = 0.4
_FEWEST_TARGETS = 0.02
_MOST_EPOCHS = 40
_SPARE = 1.25
_SPARE_IDS = 1024


def _padding(step: StepEvidence) -> Iterator[Sign]:
    text = step.text
    share = text.padding / max(1, text.num_tokens)
    if share > _MOST_PADDING:
        yield Sign(
            f"{share:.0%} of the positions are padding: documents do not fill rows of {text.seq_len} tokens "
            f"(data.packing: {text.packing})",
            f"use model.seq_len={max(1, round(text.seq_len * (1 - share)))}, or data.packing: wrapped",
        )


def _few_targets(step: StepEvidence) -> Iterator[Sign]:
    text = step.text
    share = text.targets / max(1, text.num_tokens - text.padding)
    if share < _FEWEST_TARGETS:
        yield Sign(
            f"{text.targets} of {text.num_tokens - text.padding} tokens count in the loss",
            "look at the source's prompt and at what of a conversation is learned (data.sources)",
            "severe" if text.targets == 0 else None,
        )


def _many_epochs(step: StepEvidence) -> Iterator[Sign]:
    text = step.text
    if text.epochs > _MOST_EPOCHS:
        yield Sign(
            f"the run reads domain {text.domain} {text.epochs:.1f} times",
            "lower train.steps, take more text, or data.mixture: {by: tokens}",
        )


def _spare_rows(step: StepEvidence) -> Iterator[Sign]:
    text = step.text
    if text.vocab_rows > _SPARE * text.num_ids + _SPARE_IDS:
        yield Sign(
            f"the embedding has {text.vocab_rows} rows for {text.num_ids} ids of the tokenizer",
            "lower model.vocab_size, or make it null",
        )


TEXT_CHECKS: tuple[StepCheck, ...] = (
    StepCheck(
        name="mostly_padding",
        severity="warning",
        find=_padding,
        why="padding costs as much as text and teaches nothing",
        source="arXiv 2404.10830",
    ),
    StepCheck(
        name="few_targets",
        severity="warning",
        find=_few_targets,
        why="nearly all of a step is read and not learned",
        source="NVIDIA/Megatron-LM#1984",
    ),
    StepCheck(
        name="many_epochs",
        severity="warning",
        find=_many_epochs,
        why="text that is read more than four times teaches less each time, after forty nothing",
        source="arXiv 2305.16264",
    ),
    StepCheck(
        name="spare_rows",
        severity="warning",
        find=_spare_rows,
        why="rows that no text uses are never trained",
        source="arXiv 2405.05417",
    ),
)
