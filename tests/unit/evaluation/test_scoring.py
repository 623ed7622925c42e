"""Tests for completion scoring: batches and caches give the log-probabilities of full passes over single texts."""

import random

import pytest
import torch
from torch import Tensor, nn

from tests.builders import make_batch, make_engine, tiny_model_config
from trainer.distributed.collectives import Group
from trainer.engine.native import NativeEngine
from trainer.errors import DataError
from trainer.evaluation.context import EvalContext
from trainer.evaluation.scoring import Question, Score, fit_question, score
from trainer.models.generation import generate_many, greedy_tokens
from trainer.moe.routing import RoutingOptions

SEQ_LEN = 24


def _engine(router: str = "top_k", dtype: torch.dtype = torch.float64) -> NativeEngine:
    moe = {"router": {"kind": router}, "capacity": {"factor": 0.5, "min": 1}}
    return make_engine(tiny_model_config(moe, seq_len=SEQ_LEN), dtype=dtype)


def _subject(engine: NativeEngine, tokens_per_pass: int) -> EvalContext:
    return EvalContext(engine=engine, world=Group.of_one(), tokens_per_pass=tokens_per_pass)


def _questions(count: int = 9) -> list[Question]:
    """Prompts of 1 to 15 tokens with 1 to 6 completions of 1 to 7 tokens, two of them with a common beginning."""
    draw = random.Random(5)

    def text(length: int) -> list[int]:
        return [draw.randrange(32) for _ in range(length)]

    questions = []
    for number in range(count):
        completions = [text(draw.randint(1, 6)) for _ in range(1 + number % 5)]
        if len(completions) > 1:
            completions.append([*completions[0], draw.randrange(32)])
        questions.append(Question(prompt=text(1 + 7 * number % 15), completions=completions))
    return questions


@torch.no_grad()
def _by_itself(engine: NativeEngine, prompt: list[int], completion: list[int]) -> Score:
    """Score a completion token by token, each with a full dropless pass over its prefix."""
    log_prob, is_greedy = 0.0, True
    for place, token in enumerate(completion):
        text = [*prompt, *completion[:place]]
        batch = make_batch(1, len(text))
        batch.tokens[0] = torch.tensor(text)
        logits = engine.model(batch, RoutingOptions(dropless=True), want_logits=True).logits
        assert logits is not None
        log_prob += float(logits[0, -1].log_softmax(-1)[token])
        is_greedy &= int(logits[0, -1].argmax()) == token
    return Score(log_prob=log_prob, is_greedy=is_greedy)


@pytest.mark.parametrize("router", ["top_k", "round_robin"])
@pytest.mark.parametrize("tokens_per_pass", [1, 30, 4000])
def test_a_score_equals_that_of_a_full_pass_over_the_text(router: str, tokens_per_pass: int) -> None:
    """With budgets of one row, a few rows and all rows."""
    engine, questions = _engine(router), _questions()
    scores = score(_subject(engine, tokens_per_pass), questions)
    assert [len(row) for row in scores] == [len(question.completions) for question in questions]
    for question, row in zip(questions, scores, strict=True):
        for completion, found in zip(question.completions, row, strict=True):
            expected = _by_itself(engine, list(question.prompt), list(completion))
            assert abs(found.log_prob - expected.log_prob) < 1e-10
            assert found.is_greedy == expected.is_greedy


def test_only_greedy_decoding_counts_as_greedy() -> None:
    engine = _engine()
    prompt = [3, 1, 4]
    (text,) = generate_many(engine.model, [prompt], max_new_tokens=5, choose=greedy_tokens, stop_token=-1)
    other = [*text[:-1], (text[-1] + 1) % 32]
    (row,) = score(_subject(engine, 100), [Question(prompt=prompt, completions=[text, other])])
    assert [one.is_greedy for one in row] == [True, False]


class _Counting(nn.Module):
    """An embedding that counts the tokens it looks up."""

    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        self.inner, self.weight, self.num_tokens, self.num_passes = inner, inner.weight, 0, 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.num_tokens, self.num_passes = self.num_tokens + tokens.numel(), self.num_passes + 1
        return self.inner(tokens)


def test_a_prompt_that_candidates_share_is_read_once() -> None:
    engine = _engine()
    counting = _Counting(engine.model.embedding)
    engine.model.embedding = counting  # type: ignore[assignment]
    question = Question(prompt=list(range(20)), completions=[[number, 1] for number in range(30)])
    score(_subject(engine, 1000), [question])
    assert counting.num_tokens == 19 + 30 * 2 and counting.num_passes == 2


def test_a_prompt_is_truncated_on_the_left_until_the_longest_completion_fits() -> None:
    question, is_truncated = fit_question(range(10), [[1], [1, 2, 3]], seq_len=8, where="f:1")
    assert is_truncated and list(question.prompt) == [4, 5, 6, 7, 8, 9]  # 6 + 3 - 1 = 8: the last token is not read
    question, is_truncated = fit_question(range(6), [[1], [1, 2, 3]], seq_len=8, where="f:1")
    assert not is_truncated and len(question.prompt) == 6


def test_a_completion_that_does_not_fit_is_refused_by_row() -> None:
    assert len(fit_question([1, 2], [range(8)], seq_len=8, where="f:1")[0].prompt) == 1
    with pytest.raises(DataError, match=r"^f:7: the text to score has 9 tokens, and model.seq_len is 8"):
        fit_question([1, 2], [range(9)], seq_len=8, where="f:7")


def test_a_completion_without_a_token_is_refused_by_row() -> None:
    """For example an empty text of lm-eval."""
    with pytest.raises(DataError, match=r"^f:7: one of the texts to score has no token"):
        fit_question([1, 2], [[3], []], seq_len=8, where="f:7")


def test_scores_follow_the_precision_of_training() -> None:
    """Under bfloat16 autocast scores are close to the float32 ones but not equal."""
    questions = _questions()
    wide, narrow = (
        [one.log_prob for row in score(_subject(_engine(dtype=dtype), 100), questions) for one in row]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide != narrow
    torch.testing.assert_close(torch.tensor(wide), torch.tensor(narrow), rtol=0.1, atol=0.5)
