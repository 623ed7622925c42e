"""Facts of a trace, which anyone may have written."""

from typing import Any

import pytest
from pydantic import ValidationError

from trainer.routing_record.trace_facts import TraceFacts

FACTS: dict[str, Any] = {
    "split": "held-out", "rows_per_pass": 8, "row_length": 16, "num_ranked": 4, "largest_top_k": 4, "normalize": True,
    "scale": 1.0, "score_dtype": "float32", "capacity": {}, "d_model": 8, "value_bytes": 4, "expert_flops": 1,
    "other_flops": 1,
}  # fmt: skip


@pytest.mark.parametrize("rows", [1 << 17, 1 << 20])
def test_a_pass_that_fits_into_no_memory_is_refused(rows: int) -> None:
    assert TraceFacts.model_validate({**FACTS, "rows_per_pass": 1 << 17, "row_length": 1024}).rows_per_pass == 1 << 17
    with pytest.raises(ValidationError, match=f"{rows} rows of 1048576 positions are more than 134217728 tokens"):
        TraceFacts.model_validate({**FACTS, "rows_per_pass": rows, "row_length": 1 << 20})
