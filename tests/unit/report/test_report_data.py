"""Tests for the numbers of a report as JSON."""

import json
import math

from trainer.report.report_data import MeasuredText, ReportData, RunCard, report_json


def card() -> RunCard:
    """Return the card of a dense run without a checkpoint."""
    return RunCard(
        name="tiny",
        folder="runs/tiny",
        step=None,
        planned_steps=12,
        trained_tokens=None,
        parameters=None,
        active_parameters=None,
        moe_layers=(),
        num_experts=None,
        top_k=None,
        router=None,
        capacity_factor=None,
        domains=("a", "b"),
        last={"loss": math.nan, "eval/loss": 2.5},
        config={"train": {"steps": 12}},
    )


def test_every_number_is_strict_json_and_keeps_its_place() -> None:
    text = MeasuredText(
        tokens=3,
        rows=1,
        domains=("a", "b"),
        domain_tokens=(1, 2),
        domain_loss=(1.0, math.inf),
        loss=0.1,
        bits_per_byte=0.2,
    )
    found = json.loads(json.dumps(report_json([ReportData(card=card(), text=text)]), allow_nan=False))
    assert found[0]["card"]["last"] == {"loss": None, "eval/loss": 2.5}
    assert found[0]["text"]["domain_loss"] == [1.0, None] and found[0]["text"]["loss"] == 0.1
    assert found[0]["layers"] == [] and found[0]["card"]["config"] == {"train": {"steps": 12}}
