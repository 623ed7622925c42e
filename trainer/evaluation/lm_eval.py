"""Adapter of a model to EleutherAI's lm-eval. Needs the extra `lm-eval`; import it lazily.

lm-eval tokenizes a context together with its continuation and splits the tokens where the context's own end; trailing
spaces of a context go to the continuation (`TemplateLM`, as for its Hugging Face models). A context begins a document.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import ConfigError, DataError, first_line
from trainer.evaluation.context import EvalContext
from trainer.evaluation.scoring import Question, Score, Tokens, fit_question, score
from trainer.evaluation.tasks.batch_generation import generate_batched, max_prompt_tokens
from trainer.models.sampling import SamplingOptions

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")


class LmEvalModel(TemplateLM):
    """Serves lm-eval's requests with a model of ours."""

    def __init__(self, context: EvalContext, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._context, self._tokenizer = context, tokenizer

    @property
    def eot_token_id(self) -> int:
        """End-of-document token, which precedes every document."""
        return self._tokenizer.end_of_document

    @property
    def max_length(self) -> int:
        """Longest sequence of the model, in tokens."""
        return self._context.seq_len

    @property
    def max_gen_toks(self) -> int:
        """Default length of generated texts."""
        return min(256, self.max_length // 2)

    @property
    def batch_size(self) -> int:
        """Full-length sequences in a forward pass."""
        return max(1, self._context.tokens_per_pass // self.max_length)

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer."""
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize a document that begins with `string`, or only `string` without special tokens."""
        begin = [] if add_special_tokens is False else [self.eot_token_id]
        return begin + self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, Tokens, Tokens]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score each continuation after its context, which is truncated on the left if both do not fit."""
        questions: dict[tuple[int, ...], list[int]] = {}  # request numbers by context: equal ones are read once
        for number, (texts, context, continuation) in enumerate(requests):
            where = f"lm-eval: {'a text' if texts is None else repr(texts[1][:40])}"
            question, _is_truncated = fit_question(context, [continuation], seq_len=self.max_length, where=where)
            questions.setdefault(tuple(question.prompt), []).append(number)
        unique = [
            Question(prompt=prompt, completions=[requests[number][2] for number in numbers])
            for prompt, numbers in questions.items()
        ]
        answers: dict[int, Score] = {}
        for numbers, scores in zip(questions.values(), score(self._context, unique), strict=True):
            answers |= zip(numbers, scores, strict=True)
        return [(answers[number].log_prob, answers[number].is_greedy) for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text as a document, in windows of one context token."""
        disjoint = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1)
            disjoint.append([(None, *make_disjoint_window(window)) for window in windows])
        scores = iter(self._loglikelihood_tokens([window for of_text in disjoint for window in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in disjoint]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a text after each context, up to the first of the task's stop texts."""
        groups: dict[str, list[int]] = {}  # request numbers by generation options
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            options = requests[numbers[0]].args[1]
            texts |= zip(numbers, self._generate([requests[n].args[0] for n in numbers], options), strict=True)
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [text for text in until if text]
        length = next((int(options[key]) for key in _LENGTHS if options.get(key) is not None), self.max_gen_toks)
        unknown = sorted(set(options) - {"until", *_LENGTHS, *_SAMPLING})
        if unknown:
            raise ConfigError(f"lm-eval: generation option {unknown[0]!r} is not supported; remove it from the task")
        if not 1 <= length < self.max_length:
            raise ConfigError(
                f"lm-eval: max_gen_toks {length} leaves no space for a prompt in model.seq_len {self.max_length}; use "
                f"1 to {self.max_length - 1}"
            )
        does_sample = options.get("do_sample", True)
        sampling = SamplingOptions(
            temperature=float(options.get("temperature", 0.0)) if does_sample else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
        )
        stop_bytes = [text.encode() for text in stops]
        limit = max_prompt_tokens(length, seq_len=self.max_length)
        generated = generate_batched(
            self._context,
            [self.tok_encode(context)[-limit:] for context in contexts],
            max_new_tokens=length,
            stop_token=self.eot_token_id,
            sampling=sampling,
            is_over=lambda tokens: bool(stops) and any(stop in self._tokenizer.decode(tokens) for stop in stop_bytes),
        )
        texts = [self._tokenizer.decode(tokens).decode("utf-8", "replace") for tokens in generated]
        return [functools.reduce(lambda text, stop: text.partition(stop)[0], stops, text) for text in texts]


def run_lm_eval(
    model: LmEvalModel, tasks: Sequence[str], *, include_path: Path | None, limit: int | None
) -> tuple[dict[str, dict[str, Any]], str]:
    """Evaluate a model on lm-eval's tasks; return the results by task, and a printable table.

    The folder `include_path` has more tasks, as YAML files; `limit` is the number of examples per task.
    """
    # Indexing lm-eval's thousands of built-in tasks is slow: try --include-path alone first.
    more = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=more, include_defaults=False)
    if any(name not in manager.all_tasks for name in tasks):
        manager = TaskManager(include_path=more)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ConfigError(f"--lm-eval: {name!r} is not a task of lm-eval or of --include-path; correct the name")
    try:
        results = simple_evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    except OSError as error:  # `datasets` raises it without a network, and for a missing file
        raise DataError(f"lm-eval: {', '.join(tasks)}: {first_line(error)}; check the task and its data") from error
    assert results is not None, "this is rank 0"
    return results["results"], make_table(results)
