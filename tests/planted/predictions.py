"""Faults of traces, and of what is predicted from them."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "padded rows shorten a capacity",
        "what_if/traced_passes.py",
        "shape = self.facts, (self.facts.rows_per_pass, self.facts.row_length)",
        "shape = self.facts, (len(numbers), self.facts.row_length)",
        "what_if/test_prediction.py",
    ),
    in_package(
        "predicted weights are the plain scores",
        "what_if/predicted_decision.py",
        "(normalized(weight) if facts.normalize else weight) * facts.scale",
        "weight * facts.scale",
        "what_if/test_prediction.py",
    ),
    in_package(
        "ranks take neighbouring passes of another step",
        "what_if/prediction.py",
        "(traced.domain, traced.number // size), traced.number % size",
        "(traced.domain, traced.number // size), 0",
        "what_if/test_prediction.py",
    ),
    in_package(
        "all tokens are in a predicted drop rate",
        "what_if/prediction.py",
        "is_counted = traced.counted[decision.token_index]",
        "is_counted = traced.context.valid[decision.token_index]",
        "what_if/test_prediction.py",
    ),
    in_package(
        "an evaluation for a prediction drops nothing",
        "what_if/evaluated_run.py",
        "layer.capacity = capacity",
        "layer.capacity = CapacityConfig()",
        "what_if/test_prediction.py",
    ),
    in_package(
        "a layer after drops is called exact",
        "what_if/prediction.py",
        "return next((layer + 1 for layer, number in enumerate(lost) if number), len(lost))",
        "return len(lost)",
        "what_if/test_prediction.py",
    ),
    in_package(
        "a trace lists scores in the order of experts",
        "training/trace_run.py",
        "scores.append(output.scores.gather(-1, order))",
        "scores.append(output.scores[:, : trace.num_ranked])",
        "training/test_trace_run.py",
    ),
    in_package(
        "a rank never copies another expert",
        "parallel/copy_experts.py",
        "        yield from self._other_copies(top, rank)\n",
        "",
        "parallel/test_copy_experts.py",
    ),
    in_package(
        "the memory of copies is not counted",
        "training/memory.py",
        "local_ranks * (state + activations + replicas + batch)",
        "local_ranks * (state + activations + batch)",
        "training/test_memory.py",
    ),
]
