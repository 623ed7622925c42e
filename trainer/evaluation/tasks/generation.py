"""Writing after a prompt, and comparing what was written with what should have been."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.records.base import Row
from trainer.data.records.template import Template
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError
from trainer.evaluation.context import EvalContext
from trainer.evaluation.tasks.base import Task, TaskResult
from trainer.evaluation.tasks.batch_generation import room_for_prompt, write
from trainer.evaluation.tasks.examples import fingerprint_of, prompt_tokens, read_examples
from trainer.evaluation.tasks.registry import GenerationTaskConfig, TextMetric
from trainer.evaluation.tasks.text_metrics import Judgement, judge
from trainer.models.sampling import SamplingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    where: str
    prompt: str
    tokens: Sequence[int]
    """Tokens of the prompt, as far as they fit."""
    is_sharded: bool
    references: Sequence[str]


class GenerationTask(Task):
    """Rows with references."""

    def __init__(self, config: GenerationTaskConfig, tokenizer: Tokenizer, *, seq_len: int) -> None:
        """Read the rows.

        Raises:
            DataError: naming file and row, if one is unusable.
        """
        self.config = config
        self._options, self._tokenizer = config, tokenizer
        prompt, references = Template(config.prompt), [Template(text) for text in config.references]
        room = room_for_prompt(config.max_new_tokens, seq_len=seq_len)

        def example(row: Row) -> _Example:
            tokens = prompt_tokens(prompt, row, tokenizer)
            texts = [reference.render(row) for reference in references]
            for template, text in zip(config.references, texts, strict=True):
                if not text.strip():
                    raise DataError(
                        f"{row.where}: {template!r} holds no text (empty or only white space); every reference needs "
                        "some; correct or remove the row"
                    )
                if "rouge" in config.metrics and not re.search("[A-Za-z0-9]", text):
                    raise DataError(
                        f"{row.where}: {template!r} has no word that rouge counts (words of a to z and digits); use "
                        "chrf, or correct or remove the row"
                    )
            return _Example(
                where=row.where,
                prompt=prompt.render(row),
                tokens=tokens[-room:],
                is_sharded=len(tokens) > room,
                references=texts,
            )

        self._examples = read_examples(config, example)
        self.num_examples = len(self._examples)
        self.num_cut = sum(example.is_sharded for example in self._examples)
        self.fingerprint = fingerprint_of(config.name, *([e.tokens, e.references] for e in self._examples))
        first = self._examples[0].references  # how it is computed does not depend on the texts
        judged = {metric: self._judgement(metric, [first[0]], [first]) for metric in config.metrics}
        self.signatures = {metric: one.signature for metric, one in judged.items() if one.signature is not None}

    def _judgement(self, metric: TextMetric, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Judgement:
        return judge(metric, texts, references, bleu_tokenize=self._options.bleu_tokenize)

    def evaluate(self, subject: EvalContext) -> TaskResult:
        """Write after every prompt and judge the texts."""
        end = self._tokenizer.end_of_document
        written = write(
            subject,
            [example.tokens for example in self._examples],
            max_new_tokens=self._options.max_new_tokens,
            stop_token=end,
            options=SamplingOptions(temperature=self._options.temperature, top_p=self._options.top_p),
        )
        texts = [self._tokenizer.decode(tokens).decode("utf-8", "replace").strip() for tokens in written]
        references = [example.references for example in self._examples]
        metrics: dict[str, float] = {}
        for metric in self._options.metrics:
            metrics |= self._judgement(metric, texts, references).values
        is_ended = [bool(tokens) and tokens[-1] == end for tokens in written]
        metrics |= {"ended": sum(is_ended) / len(texts), "cut_prompts": self.num_cut}
        return TaskResult(
            name=self.config.name,
            metrics=metrics,
            predictions=[
                {
                    "row": e.where,
                    "prompt": e.prompt,
                    "prediction": text,
                    "references": e.references,
                    "ended": ended,
                    "cut_prompt": e.is_sharded,
                }
                for e, text, ended in zip(self._examples, texts, is_ended, strict=True)
            ],
        )
