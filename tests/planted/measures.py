"""Faults of evaluation, of writing text and of metrics."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "the beginning of a long prompt is kept",
        "evaluation/scoring.py",
        "prompt[-room:]",
        "prompt[:room]",
        "evaluation/test_scoring.py",
    ),
    in_package(
        "the first token of a completion is not scored",
        "evaluation/scoring.py",
        "(column >= first)",
        "(column > first)",
        "evaluation/test_scoring.py",
    ),
    in_package(
        "the benefit of a tie goes to the right candidate",
        "evaluation/ranking.py",
        "else -values[i], i in relevant)",
        "else -values[i], i not in relevant)",
        "evaluation/test_ranking.py",
    ),
    in_package(
        "classes that were wrongly chosen have no F1",
        "evaluation/choice.py",
        "{*chosen, *answers}",
        "{*answers}",
        "evaluation/test_choice.py",
    ),
    in_package(
        "a domain's bits are nats",
        "evaluation/held_out.py",
        "return self.sums.loss_sum / math.log(2) / max",
        "return self.sums.loss_sum / max",
        "evaluation/test_held_out.py",
    ),
    in_package(
        "prompts count as bytes that were predicted",
        "evaluation/held_out.py",
        "batch.targets[batch.target_mask]",
        "batch.targets",
        "evaluation/test_held_out.py",
    ),
    in_package(
        "the best gain has no end at k",
        "evaluation/ranking.py",
        "range(1, min(k, len(places)) + 1)",
        "range(1, len(places) + 1)",
        "evaluation/test_ranking.py::test_metrics_equal_hand_computed_ones",
    ),
    in_package(
        "imbalance is of the mean layer",
        "metrics/routing.py",
        "(load.amax(-1) / mean).max()",
        "(load.amax(-1) / mean).mean()",
        "metrics/test_routing.py",
    ),
]
