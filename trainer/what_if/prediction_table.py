"""Show predictions as tables."""

from collections.abc import Iterator, Sequence

from trainer.what_if.prediction import Prediction


def prediction_lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    """Yield lines: drops by capacity and k, then each layout."""
    has_estimates = any(p.estimate is not None for p in predictions)
    head = f"{'capacity':>9} {'k':>3} {'drop rate':>10} {'first MoE layer':>16} {'exact layers':>13}"
    yield f"{head} {'by the trace alone':>19}" if has_estimates else head
    for p in predictions:
        first, exact = p.dropped[0] / max(1, p.assignments[0]), f"{p.exact_layers} of {len(p.dropped)}"
        line = f"{_capacity(p):>9} {p.top_k:>3} {p.drop_rate:>10.4%} {first:>16.4%} {exact:>13}"
        yield line if p.estimate is None else f"{line} {sum(p.estimate) / max(1, sum(p.assignments)):>19.4%}"
    if any(p.exact_layers < len(p.dropped) for p in predictions):
        yield "other layers are estimates, from the inputs that they had in the trace; --run RUN evaluates them"
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
