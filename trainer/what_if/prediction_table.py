"""Show predictions as tables."""

from collections.abc import Iterator, Sequence

from trainer.what_if.prediction import Prediction


def prediction_lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    """Yield lines: drops by capacity and k, then each layout."""
    yield f"{'capacity':>9} {'k':>3} {'drop rate':>10} {'first MoE layer':>16}"
    for p in predictions:
        first = p.dropped[0] / max(1, p.assignments[0])
        yield f"{_capacity(p):>9} {p.top_k:>3} {p.drop_rate:>10.4%} {first:>16.4%}"
    if not any(p.layouts for p in predictions):
        return
    yield ""
    has_times = any(layout.step_ms for p in predictions for layout in p.layouts)
    head = f"{'capacity':>9} {'k':>3} {'ep':>3} {'placement':<11} {'busiest/mean':>12} {'dispatcher':<24}"
    head += f" {'MB/rank sent':>12}"
    yield f"{head} {'step ms (model)':>16}" if has_times else head
    for p in predictions:
        for layout in p.layouts:
            for dispatcher, size in layout.bytes_per_step.items():
                line = (
                    f"{_capacity(p):>9} {p.top_k:>3} {layout.ep_size:>3} {layout.placement[-11:]:<11} "
                    f"{layout.busiest_over_mean:>12.3f} {dispatcher:<24} {size / 1e6:>12.3f}"
                )
                yield f"{line} {layout.step_ms[dispatcher]:>16.3f}" if layout.step_ms else line


def _capacity(prediction: Prediction) -> str:
    return "none" if prediction.capacity is None else f"{prediction.capacity:g}"
