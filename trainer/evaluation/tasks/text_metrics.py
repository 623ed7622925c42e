"""Score generated texts against references: sacrebleu's and rouge-score's metrics, and exact match."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.packages import importing

TextMetric = Literal["bleu", "chrf", "rouge", "exact_match"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """One metric over all texts."""

    values: dict[str, float]
    """Values by name; rouge has several."""
    signature: str | None = None
    """sacrebleu's description of its settings: scores with different signatures are not comparable."""


def score_texts(
    metric: TextMetric, texts: Sequence[str], references: Sequence[Sequence[str]], *, bleu_tokenize: str
) -> TextScore:
    """Compare texts with their references, of which every text has the same number.

    Returns:
        bleu: corpus BLEU, 0 to 100 (arXiv 1804.08771).
        chrf: corpus chrF2, 0 to 100.
        rouge: rouge1, rouge2 and rougeL, 0 to 1: F1, mean over texts of the best reference, without stemming. Its words
            are runs of the letters a to z and digits.
        exact_match: share of texts equal to one of their references, ignoring surrounding white space.
    """
    match metric:
        case "bleu" | "chrf":
            with importing("sacrebleu", user=f"eval.tasks: {metric}"):
                from sacrebleu.metrics import BLEU, CHRF

            scorer = BLEU(tokenize=bleu_tokenize) if metric == "bleu" else CHRF()
            score = scorer.corpus_score(texts, list(zip(*references, strict=True)))
            return TextScore(values={metric: score.score}, signature=str(scorer.get_signature()))
        case "rouge":
            with importing("rouge_score", user="eval.tasks: rouge"):
                from rouge_score.rouge_scorer import RougeScorer

            names = ["rouge1", "rouge2", "rougeL"]
            scorer = RougeScorer(names, use_stemmer=False)
            scores = [scorer.score_multi(list(own), text) for text, own in zip(texts, references, strict=True)]
            means = {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
            return TextScore(values=means)
        case "exact_match":
            pairs = zip(texts, references, strict=True)
            num_equal = sum(text.strip() in {one.strip() for one in own} for text, own in pairs)
            return TextScore(values={metric: num_equal / len(texts)})
