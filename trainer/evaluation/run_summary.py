"""Summarize an evaluation for the screen and the picture of the experts."""

from collections.abc import Sequence

from trainer.console.summary import DomainScore, ExpertCounts, RunSummary
from trainer.data.corpus import Corpus
from trainer.data.unigram import unigram_bits_per_byte
from trainer.evaluation.eval_report import EvalReport
from trainer.evaluation.held_out import EvalResult


def summarize_evaluation(report: EvalReport, corpus: Corpus, moe_layers: Sequence[int], *, title: str) -> RunSummary:
    """Return the contents of the summary screen."""
    held_out, tasks = report.held_out, [(result.name, result.metrics) for result in report.tasks]
    if held_out is None:
        return RunSummary(title=title, tasks=tasks)
    record = held_out.record()
    experts = ExpertCounts(
        counts=held_out.counts(),
        domains=[result.domain for result in held_out.domains],
        layer_names=[f"layer {layer}" for layer in moe_layers],
    )
    return RunSummary(
        title=title,
        facts=[("target tokens", str(sum(domain.sums.target_tokens for domain in held_out.domains)))],
        scores=_domain_scores(corpus, held_out),
        eval_loss=record["eval/loss"],
        eval_loss_capacity=record.get("eval/loss_capacity"),
        tasks=tasks,
        experts=experts if moe_layers else None,
    )


def _domain_scores(corpus: Corpus, held_out: EvalResult) -> list[DomainScore]:
    """Return the bits per byte of each domain, and of all if there are several, with a unigram model's."""
    unigrams = [unigram_bits_per_byte(corpus, index) for index in range(len(corpus.domains))]
    scores = [
        DomainScore(name=result.domain, bits_per_byte=result.bits_per_byte, unigram_bits_per_byte=unigram)
        for result, unigram in zip(held_out.domains, unigrams, strict=True)
    ]
    if len(scores) > 1:
        target_bytes = [result.target_bytes for result in held_out.domains]
        mean = sum(u * b for u, b in zip(unigrams, target_bytes, strict=True)) / max(1, sum(target_bytes))
        overall = held_out.record()["eval/bits_per_byte"]
        scores.append(DomainScore(name="all", bits_per_byte=overall, unigram_bits_per_byte=mean))
    return scores
