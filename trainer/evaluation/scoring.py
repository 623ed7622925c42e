"""Score completions of prompts by their log-probabilities, summed over tokens.

# A prompt that several completions share is read once, all but its last token, into a cache ("stem"):
#   stem    p p p p p p                       one row for each prompt
#   lines   p a a a | p b b | p c c c c       one row for each completion, on a copy of the stem's cache
# A prompt with one completion is read with it:
#   lines   p p p p p p p a a a
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.distributed.collective_errors import barrier_gather
from trainer.errors import DataError
from trainer.evaluation.context import KV_CACHE_BATCH_FACTOR, EvalContext, batches
from trainer.models.cache import KVCache
from trainer.models.generation import padded

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and what may follow it."""

    prompt: Tokens
    """At least one token."""
    completions: Sequence[Tokens]
    """At least one token each; with the prompt, at most one more token than a row has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Score of a completion."""

    log_prob: float
    """Nats, summed over its tokens."""
    is_greedy: bool
    """Every token of it was the likeliest one."""


def fitted(prompt: Tokens, completions: Sequence[Tokens], *, seq_len: int, where: str) -> tuple[Question, bool]:
    """Return a question whose prompt is cut on the left until the longest completion fits, and whether it was cut.

    All completions are compared after the same prompt.

    Raises:
        DataError: naming the row, if not even one token of the prompt fits, or a completion has no token.
    """
    longest = max(map(len, completions))
    if min(map(len, completions)) == 0:
        raise DataError(f"{where}: one of the texts to score has no token; each needs some; correct or remove the row")
    room = seq_len + 1 - longest
    if room < 1:
        raise DataError(
            f"{where}: {longest} tokens are to be scored, and a row of the model has {seq_len} (model.seq_len); "
            "shorten the text or remove the row"
        )
    return Question(prompt=prompt[-room:], completions=completions), len(prompt) > room


@torch.no_grad()
def score(subject: EvalContext, questions: Sequence[Question]) -> list[list[Score]]:
    """Return the scores of every completion of every question, the same on all ranks.

    Dropless, in the precision of training. The layout and what is scored together change floating-point order only.
    """
    world = subject.world
    order = sorted(range(len(questions)), key=lambda i: -_cost(questions[i]))  # alike ones together: little padding
    # Rounds are made one by one, here only to be counted: all of them at once would be an object for each completion.
    passes = [_num_passes(_rounds(questions, order[rank :: world.size], subject)) for rank in range(world.size)]
    mine = _rounds(questions, order[world.index :: world.size], subject)
    found = [(*key, score.log_prob, score.is_greedy) for round_ in mine for key, score in _run(subject, round_)]
    for _ in range(max(passes) - passes[world.index]):
        _nothing(subject)
    scores: list[list[Score]] = [[] for _ in questions]
    for question, _, log_prob, is_greedy in sorted(item for part in barrier_gather(world, found) for item in part):
        scores[question].append(Score(log_prob=log_prob, is_greedy=is_greedy))
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One completion."""

    key: tuple[int, int]
    """Numbers of question and completion."""
    stem: int | None
    """Row of the stem's cache."""
    lead: Tokens
    """Prompt that is read before it."""
    completion: Tokens

    def __len__(self) -> int:
        """Return how many tokens are read: all but the last one."""
        return len(self.lead) + len(self.completion) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """Stems, read in one forward pass if there are any, and the passes that go on from them."""

    stems: Sequence[Tokens]
    passes: Sequence[Sequence[_Line]]


def _rounds(questions: Sequence[Question], numbers: Sequence[int], subject: EvalContext) -> Iterator[_Round]:
    """Plan one rank's forward passes."""
    budget = subject.tokens_per_pass
    has_stem = {i: len(questions[i].completions) > 1 and len(questions[i].prompt) > 1 for i in numbers}
    alone = [line for i in numbers if not has_stem[i] for line in _lines(questions[i], i, None)]
    alone.sort(key=lambda line: -len(line))
    for lines in batches(alone, [len(line) for line in alone], budget=budget):
        yield _Round(stems=(), passes=[lines])
    shared = [i for i in numbers if has_stem[i]]
    for group in batches(shared, [len(questions[i].prompt) - 1 for i in shared], budget=KV_CACHE_BATCH_FACTOR * budget):
        stems = [questions[i].prompt[:-1] for i in group]
        lines = [line for row, i in enumerate(group) for line in _lines(questions[i], i, row)]
        lines.sort(key=lambda line: -len(line))
        cached = max(map(len, stems)) + max(map(len, lines))
        most = max(1, KV_CACHE_BATCH_FACTOR * budget // cached)
        yield _Round(stems=stems, passes=list(batches(lines, [len(line) for line in lines], budget=budget, most=most)))


def _lines(question: Question, number: int, stem: int | None) -> Iterator[_Line]:
    lead = question.prompt if stem is None else question.prompt[-1:]
    for index, completion in enumerate(question.completions):
        yield _Line(key=(number, index), stem=stem, lead=lead, completion=completion)


def _cost(question: Question) -> int:
    return len(question.prompt) + max(map(len, question.completions))


def _num_passes(plan: Iterable[_Round]) -> int:
    return sum(len(round_.passes) + bool(round_.stems) for round_ in plan)


def _run(subject: EvalContext, round_: _Round) -> Iterator[tuple[tuple[int, int], Score]]:
    model = subject.engine.model
    device = model.embedding.weight.device
    stems: KVCache | None = None
    with subject.engine.autocast():
        if round_.stems:
            stems = model.new_cache(len(round_.stems), max(map(len, round_.stems)))
            tokens, num_new = padded(round_.stems, device)
            model.next_logits(tokens, stems, num_new)
        for lines in round_.passes:
            width = max(map(len, lines))
            if stems is None:
                cache = model.new_cache(len(lines), width)
            else:
                rows = torch.tensor([line.stem for line in lines], device=device)
                cache = stems.select(rows, capacity=stems.longest + width)
            tokens, num_new = padded([[*line.lead, *line.completion[:-1]] for line in lines], device)
            targets, _ = padded([[*line.lead[1:], *line.completion] for line in lines], device)
            log_probs, is_likeliest = model.target_log_probs(tokens, targets, cache, num_new)
            column = torch.arange(width, device=device)
            first = torch.tensor([[len(line.lead) - 1] for line in lines], device=device)
            is_scored = (column >= first) & (column < num_new[:, None])
            sums = torch.where(is_scored, log_probs.double(), 0.0).sum(1).tolist()
            greedy = (is_likeliest | ~is_scored).all(1).tolist()
            for line, log_prob, is_greedy in zip(lines, sums, greedy, strict=True):
                yield line.key, Score(log_prob=log_prob, is_greedy=is_greedy)


def _nothing(subject: EvalContext) -> None:
    """Run a forward pass without a token, for experts that others have tokens for."""
    model = subject.engine.model
    with subject.engine.autocast():
        tokens, num_new = padded([[]], model.embedding.weight.device)
        model.next_logits(tokens, model.new_cache(1, 1), num_new)
