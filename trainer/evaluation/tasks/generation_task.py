"""Generation: continue prompts and compare the texts with references."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.records.base import Record
from trainer.data.records.template import Template
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError
from trainer.evaluation.context import EvalContext
from trainer.evaluation.tasks.base import Every, Task, TaskResult
from trainer.evaluation.tasks.batch_generation import generate_batched, max_prompt_tokens
from trainer.evaluation.tasks.examples import TaskRecords, hash_questions, prompt_tokens
from trainer.evaluation.tasks.text_metrics import TextMetric, TextScore, score_texts
from trainer.models.sampling import SamplingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    where: str
    prompt: str
    tokens: Sequence[int]
    """Tokens of the prompt, truncated on the left to fit."""
    is_truncated: bool
    references: Sequence[str]


class GenerationTask(Task):
    """Records with reference texts."""

    def __init__(
        self,
        records: TaskRecords,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        every: Every,
        prompt: str,
        references: Sequence[str],
        metrics: Sequence[TextMetric],
        bleu_tokenize: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> None:
        """Read the records; raise `DataError`, with file and record, if one is unusable. The options are a config's."""
        self.name, self.every = records.task, every
        self._tokenizer, self._max_new_tokens = tokenizer, max_new_tokens
        self._sampling = SamplingOptions(temperature=temperature, top_p=top_p)
        self._metrics, self._bleu_tokenize = metrics, bleu_tokenize
        question_prompt, templates = Template(prompt), [Template(text) for text in references]
        limit = max_prompt_tokens(max_new_tokens, seq_len=seq_len)

        def example(row: Record) -> _Example:
            tokens = prompt_tokens(question_prompt, row, tokenizer)
            texts = [template.render(row) for template in templates]
            for template, text in zip(references, texts, strict=True):
                if not text.strip():
                    raise DataError(
                        f"{row.where}: {template!r} is empty or only white space; every reference needs some text; "
                        "correct or remove the row"
                    )
                if "rouge" in metrics and not re.search("[A-Za-z0-9]", text):
                    raise DataError(
                        f"{row.where}: {template!r} has no word that rouge counts (a to z and digits); use chrf, or "
                        "correct or remove the row"
                    )
            return _Example(
                where=row.where,
                prompt=question_prompt.render(row),
                tokens=tokens[-limit:],
                is_truncated=len(tokens) > limit,
                references=texts,
            )

        self._examples = records.examples(example)
        self.num_examples = len(self._examples)
        self.num_truncated = sum(example.is_truncated for example in self._examples)
        self.fingerprint = hash_questions(self.name, *([e.tokens, e.references] for e in self._examples))
        first = self._examples[0].references  # a signature does not depend on the texts
        scores = {metric: self._score(metric, [first[0]], [first]) for metric in metrics}
        self.signatures = {metric: one.signature for metric, one in scores.items() if one.signature is not None}

    def _score(self, metric: TextMetric, texts: Sequence[str], references: Sequence[Sequence[str]]) -> TextScore:
        return score_texts(metric, texts, references, bleu_tokenize=self._bleu_tokenize)

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Continue every prompt and score the texts."""
        end = self._tokenizer.end_of_document
        generated = generate_batched(
            context,
            [example.tokens for example in self._examples],
            max_new_tokens=self._max_new_tokens,
            stop_token=end,
            sampling=self._sampling,
        )
        texts = [self._tokenizer.decode(tokens).decode("utf-8", "replace").strip() for tokens in generated]
        references = [example.references for example in self._examples]
        metrics: dict[str, float] = {}
        for metric in self._metrics:
            metrics |= self._score(metric, texts, references).values
        is_ended = [bool(tokens) and tokens[-1] == end for tokens in generated]
        metrics |= {"ended": sum(is_ended) / len(texts), "cut_prompts": self.num_truncated}
        return TaskResult(
            name=self.name,
            metrics=metrics,
            predictions=[
                {
                    "row": e.where,
                    "prompt": e.prompt,
                    "prediction": text,
                    "references": e.references,
                    "ended": ended,
                    "cut_prompt": e.is_truncated,
                }
                for e, text, ended in zip(self._examples, texts, is_ended, strict=True)
            ],
        )
