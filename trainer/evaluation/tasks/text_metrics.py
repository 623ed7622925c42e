"""Score generated texts against references: sacrebleu's and rouge-score's metrics, and exact match."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluation.tasks.registry import TextMetric
from trainer.packages import importing

References = Sequence[Sequence[str]]
"""References of each text; as many for every text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One metric of all texts."""

    values: dict[str, float]
    """Values by name; a metric can have several."""
    signature: str | None = None
    """sacrebleu's own words on how it was computed: numbers with another one are not comparable."""


def judge(metric: TextMetric, texts: Sequence[str], references: References, *, bleu_tokenize: str) -> Judgement:
    """Compare texts with their references.

    Returns:
        bleu: corpus BLEU, 0 to 100 (arXiv 1804.08771).
        chrf: corpus chrF2, 0 to 100.
        rouge: rouge1, rouge2 and rougeL, 0 to 1: F1, mean over texts of the best reference, without stemming. Its words
            are runs of the letters a to z and digits.
        exact_match: share of texts that are one of their references, white space around both apart.
    """
    match metric:
        case "bleu" | "chrf":
            with importing("sacrebleu", user=f"eval.tasks: {metric}"):
                from sacrebleu.metrics import BLEU, CHRF

            scorer = BLEU(tokenize=bleu_tokenize) if metric == "bleu" else CHRF()
            score = scorer.corpus_score(texts, list(zip(*references, strict=True)))
            return Judgement(values={metric: score.score}, signature=str(scorer.get_signature()))
        case "rouge":
            return Judgement(values=_rouge(texts, references))
        case "exact_match":
            pairs = zip(texts, references, strict=True)
            same = sum(text.strip() in {one.strip() for one in own} for text, own in pairs)
            return Judgement(values={metric: same / len(texts)})


def _rouge(texts: Sequence[str], references: References) -> dict[str, float]:
    with importing("rouge_score", user="eval.tasks: rouge"):
        from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    scores = [scorer.score_multi(list(own), text) for text, own in zip(texts, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
