"""Score completions of prompts by their log-probabilities, summed over tokens.

# A prompt shared by several completions is read once, all but its last token, into a KV cache (the prefix):
#   prefixes   p p p p p p                       one row per prompt
#   rows       p a a a | p b b | p c c c c       one row per completion, on a copy of the prefix's cache
# A prompt with one completion is read together with it:
#   rows       p p p p p p p a a a
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.distributed.collective_errors import barrier_gather
from trainer.errors import DataError
from trainer.evaluation.context import KV_CACHE_BATCH_FACTOR, EvalContext, split_batches
from trainer.models.generation import pad_right
from trainer.models.kv_cache import KVCache

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and its possible completions."""

    prompt: Tokens
    """At least one token."""
    completions: Sequence[Tokens]
    """At least one token each; at most `seq_len` + 1 tokens together with the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Score of a completion."""

    log_prob: float
    """Nats, summed over its tokens."""
    is_greedy: bool
    """Whether greedy decoding would produce it."""


def fit_question(prompt: Tokens, completions: Sequence[Tokens], *, seq_len: int, where: str) -> tuple[Question, bool]:
    """Truncate a prompt on the left until the longest completion fits: all completions follow the same prompt.

    Returns the question and whether its prompt was truncated. Raises `DataError`, with `where`, if not even one token
    of the prompt fits, or a completion has no token.
    """
    longest = max(map(len, completions))
    if min(map(len, completions)) == 0:
        raise DataError(f"{where}: one of the texts to score has no tokens; each needs some; correct or remove the row")
    max_prompt = seq_len + 1 - longest
    if max_prompt < 1:
        raise DataError(
            f"{where}: the text to score has {longest} tokens, and model.seq_len is {seq_len}; shorten the text or "
            "remove the row"
        )
    return Question(prompt=prompt[-max_prompt:], completions=completions), len(prompt) > max_prompt


@torch.no_grad()
def score(context: EvalContext, questions: Sequence[Question]) -> list[list[Score]]:
    """Score every completion of every question. Collective; the result is the same on all ranks.

    Dropless, in the precision of training. Layout and batching change only the floating-point order.
    """
    world = context.world
    longest = [len(question.prompt) + max(map(len, question.completions)) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: -longest[i])  # little padding
    # Only counted here: keeping all rounds would keep an object per completion.
    num_passes = [
        sum(
            len(one.passes) + bool(one.prefixes)
            for one in _rounds(questions, order[share :: context.num_shares], context)
        )
        for share in range(context.num_shares)
    ]
    rounds = _rounds(questions, order[context.share :: context.num_shares], context)
    local = [(*key, score.log_prob, score.is_greedy) for one in rounds for key, score in _run(context, one)]
    for _ in range(max(num_passes) - num_passes[context.share]):
        _empty_pass(context)
    scores: list[list[Score]] = [[] for _ in questions]
    mine = local if context.is_first_of_share else []
    for question, _, log_prob, is_greedy in sorted(item for part in barrier_gather(world, mine) for item in part):
        scores[question].append(Score(log_prob=log_prob, is_greedy=is_greedy))
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One completion with the part of its prompt that is read together with it."""

    key: tuple[int, int]
    """Numbers of question and completion."""
    prefix: int | None
    """Row of the prefix cache."""
    prompt: Tokens
    completion: Tokens

    def __len__(self) -> int:
        """Return the number of input tokens: all but the last one."""
        return len(self.prompt) + len(self.completion) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """Prefixes, read in one forward pass if there are any, and the passes that continue them."""

    prefixes: Sequence[Tokens]
    passes: Sequence[Sequence[_Row]]


def _rounds(questions: Sequence[Question], numbers: Sequence[int], context: EvalContext) -> Iterator[_Round]:
    """Plan one rank's forward passes."""
    budget = context.tokens_per_pass
    cached_budget = KV_CACHE_BATCH_FACTOR * budget
    has_prefix = {i: len(questions[i].completions) > 1 and len(questions[i].prompt) > 1 for i in numbers}
    rows = [row for i in numbers if not has_prefix[i] for row in _rows(questions[i], i, None)]
    rows.sort(key=lambda row: -len(row))
    for batch in split_batches(rows, [len(row) for row in rows], budget=budget):
        yield _Round(prefixes=(), passes=[batch])
    shared = [i for i in numbers if has_prefix[i]]
    for group in split_batches(shared, [len(questions[i].prompt) - 1 for i in shared], budget=cached_budget):
        prefixes = [questions[i].prompt[:-1] for i in group]
        rows = [row for number, i in enumerate(group) for row in _rows(questions[i], i, number)]
        rows.sort(key=lambda row: -len(row))
        cache_len = max(map(len, prefixes)) + max(map(len, rows))
        max_rows = max(1, cached_budget // cache_len)
        passes = split_batches(rows, [len(row) for row in rows], budget=budget, max_items=max_rows)
        yield _Round(prefixes=prefixes, passes=list(passes))


def _rows(question: Question, number: int, prefix: int | None) -> Iterator[_Row]:
    prompt = question.prompt if prefix is None else question.prompt[-1:]
    for index, completion in enumerate(question.completions):
        yield _Row(key=(number, index), prefix=prefix, prompt=prompt, completion=completion)


def _run(context: EvalContext, round_: _Round) -> Iterator[tuple[tuple[int, int], Score]]:
    model = context.engine.model
    device = model.device
    prefix_cache: KVCache | None = None
    with context.engine.autocast():
        if round_.prefixes:
            prefix_cache = model.new_cache(len(round_.prefixes), max(map(len, round_.prefixes)))
            tokens, num_new = pad_right(round_.prefixes, device)
            model.next_logits(tokens, prefix_cache, num_new)
        for rows in round_.passes:
            width = max(map(len, rows))
            if prefix_cache is None:
                cache = model.new_cache(len(rows), width)
            else:
                selected = torch.tensor([row.prefix for row in rows], device=device)
                cache = prefix_cache.select(selected, capacity=prefix_cache.longest + width)
            tokens, num_new = pad_right([[*row.prompt, *row.completion[:-1]] for row in rows], device)
            targets, _ = pad_right([[*row.prompt[1:], *row.completion] for row in rows], device)
            log_probs, is_most_likely = model.target_log_probs(tokens, targets, cache, num_new)
            column = torch.arange(width, device=device)
            first = torch.tensor([[len(row.prompt) - 1] for row in rows], device=device)
            is_scored = (column >= first) & (column < num_new[:, None])
            sums = torch.where(is_scored, log_probs.double(), 0.0).sum(1).tolist()
            greedy = (is_most_likely | ~is_scored).all(1).tolist()
            for row, log_prob, is_greedy in zip(rows, sums, greedy, strict=True):
                yield row.key, Score(log_prob=log_prob, is_greedy=is_greedy)


def _empty_pass(context: EvalContext) -> None:
    """Run a forward pass without tokens, so that this rank's experts serve the other ranks' passes."""
    model = context.engine.model
    with context.engine.autocast():
        tokens, num_new = pad_right([[]], model.device)
        model.next_logits(tokens, model.new_cache(1, 1), num_new)
