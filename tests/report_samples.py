"""Reports with made-up numbers, and run folders with made-up logs, for tests of the page."""

import json
import random
from dataclasses import replace
from pathlib import Path

from trainer.report.report_data import (
    CheckpointFindings,
    DropRates,
    DuplicateExperts,
    Excerpt,
    ExpertFindings,
    LayerFindings,
    LayerFlow,
    Matrix,
    MeasuredText,
    ReportData,
    RunCard,
    TypicalRow,
    Word,
)

HOSTILE = '</script><script src="https://evil.example/x.js">alert(1)</script>&amp;\x1b[31m\u202e\x00"\'\ud800'
"""What a domain, token or run name may hold at its worst."""


def sample_report(
    *, name: str = "sample", hostile: str = "", seed: int = 0, experts: int = 4, layers: int = 2
) -> ReportData:
    """Return a report with random numbers; `hostile` is put into every text of others."""
    dice = random.Random(seed)
    domains = (f"en-de{hostile}", f"en-fr{hostile}", f"en-cs{hostile}")
    flows = tuple(
        LayerFlow(
            layer=i, next_layer=i + 1, counts=_matrix(dice, experts, experts, 900), mutual_information=dice.random()
        )
        for i in range(layers - 1)
    )
    return ReportData(
        card=_card(dice, name, domains, experts, layers),
        text=MeasuredText(
            tokens=12345,
            rows=96,
            domains=domains,
            domain_tokens=(4000, 4100, 4245),
            domain_loss=tuple(dice.uniform(2, 4) for _ in domains),
            loss=dice.uniform(2, 4),
            bits_per_byte=dice.uniform(1, 3),
        ),
        layers=tuple(_layer(dice, index, domains, experts, hostile) for index in range(layers)),
        flows=flows,
        checkpoints=tuple(_checkpoint(dice, step, layers) for step in (40, 80, 120)),
        remarks=(f"no outputs of layer 1 were compared{hostile}",),
    )


def write_logs(folder: Path, *, steps: int = 30, seed: int = 0, alarm: str = "") -> Path:
    """Write a run folder with a config line and logs of so many steps; return it."""
    dice = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("name: sample\n")
    metrics, routing = [], []
    for step in range(1, steps + 1):
        parts = {f"time/{part}": dice.uniform(0.001, 0.02) for part in ("data", "forward", "experts", "backward")}
        record = {"step": step, "tokens": step * 512, "loss": 5 - 3 * step / steps + dice.random() / 10, **parts}
        record |= {"load_imbalance": dice.uniform(1, 2), "drop_rate": dice.uniform(0, 0.1), "router_entropy": 1.2}
        metrics.append(record | {"lr": 1e-3, "grad_norm": dice.random(), "tokens_per_s": 9000.0, "step_s": 0.05})
        routing.append({"step": step, "counts": [[dice.randrange(1, 90) for _ in range(4)] for _ in range(2)]})
        if step % 10 == 0:
            domains = {f"eval/{domain}/bits_per_byte": dice.uniform(2, 3) for domain in ("en-de", "en-fr")}
            metrics.append({"step": step, "eval/loss": 2.5, "eval/bits_per_byte": dice.uniform(2, 3), **domains})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (folder / "routing.jsonl").write_text("".join(json.dumps(record) + "\n" for record in routing))
    if alarm:
        rung = {
            "step": 7,
            "alarm": "dead_experts",
            "layer": 1,
            "message": alarm,
            "advice": "raise model.moe.balance.coef",
        }
        (folder / "alarms.jsonl").write_text(json.dumps(rung) + "\n")
    return folder


def _matrix(dice: random.Random, rows: int, columns: int, most: float) -> Matrix:
    return tuple(tuple(most * dice.random() ** 3 for _ in range(columns)) for _ in range(rows))


def _card(dice: random.Random, name: str, domains: tuple[str, ...], experts: int, layers: int) -> RunCard:
    return RunCard(
        name=name,
        folder=f"runs/{name}",
        step=120,
        planned_steps=120,
        trained_tokens=491520,
        parameters=2_400_000,
        active_parameters=900_000,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=2,
        router="top_k",
        capacity_factor=1.25,
        domains=domains,
        last={"step": 120, "loss": dice.uniform(2, 3), "eval/loss": dice.uniform(2, 3)},
        config={"model": {"d_model": 16 * (1 + dice.randrange(90)), "moe": {"num_experts": experts}}, "seed": 0},
    )


def _layer(dice: random.Random, index: int, domains: tuple[str, ...], experts: int, hostile: str) -> LayerFindings:
    weights = [dice.random() for _ in range(experts)]
    square = _matrix(dice, experts, experts, 1)
    return LayerFindings(
        layer=index,
        load=tuple(weight / sum(weights) for weight in weights),
        load_imbalance=max(weights) * experts / sum(weights),
        domain_counts=_matrix(dice, len(domains), experts, 4000),
        mutual_information=dice.random() / 2,
        mutual_information_share=0.2,
        router_entropy=dice.random(),
        dead=(experts - 1,),
        coactivation=square,
        weight_similarity=square,
        output_similarity=None if index else square,
        duplicates=(DuplicateExperts(first=0, second=1, weights=0.97, outputs=None),),
        drops=DropRates(overall=0.05, by_domain=(0.01, 0.09, None), by_position=(0.02, 0.06), positions=(0, 32)),
        experts=tuple(_expert(dice, number, domains, experts, hostile) for number in range(experts)),
    )


def _expert(dice: random.Random, number: int, domains: tuple[str, ...], experts: int, hostile: str) -> ExpertFindings:
    texts = ["der", " ein", "\n", "!", " une", " le", " na", "1"]
    words = [
        Word(
            text=dice.choice(texts) + hostile,
            tokens=(5,),
            count=40,
            occurrences=90,
            lift=dice.uniform(1.1, experts),
            lift_low=1.05,
        )
        for _ in range(6)
    ]
    excerpt = Excerpt(
        domain=domains[0], row=3, before=f"Ein Mann{hostile} ", token="steht", after=" auf der Leiter.\nUn homme"
    )
    return ExpertFindings(
        expert=number,
        tokens=0 if number == experts - 1 else 900,
        share=dice.random() / experts,
        domain_lift=tuple(dice.uniform(0.2, 2) for _ in domains),
        kinds=(replace(words[0], text="line break", tokens=()), replace(words[1], text="number", tokens=())),
        explained=0.25,
        words=tuple(words),
        ngrams=tuple(words[:2]),
        excerpts=(excerpt,) * 4,
        rows=(TypicalRow(domain=domains[1], row=8, share=0.7, text=f"Un homme{hostile} sur une echelle."),),
    )


def _checkpoint(dice: random.Random, step: int, layers: int) -> CheckpointFindings:
    values = [tuple(dice.random() for _ in range(layers)) for _ in range(4)]
    return CheckpointFindings(
        step=step,
        loss=dice.uniform(2, 4),
        saturation=values[0],
        mutual_information=values[1],
        router_entropy=values[2],
        load_imbalance=values[3],
        dead_experts=layers,
    )
