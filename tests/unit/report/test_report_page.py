"""The page of runs: whole, safe, self-contained, and with the numbers of its data."""

import base64
import hashlib
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.report_samples import HOSTILE, sample_report, write_logs
from trainer.report.markup import figure_number
from trainer.report.page_script import PAGE_SCRIPT
from trainer.report.report_data import ReportData
from trainer.report.report_page import MOST_BYTES, report_html
from trainer.runs.recorded_run import RecordedRun


def _parsed(page: str) -> ElementTree.Element:
    """Parse a page as XML, which is stricter than HTML: an element that is not closed or a bare `<` is an error."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return RecordedRun(write_logs(tmp_path_factory.mktemp("runs") / "sample", alarm="expert 3 sleeps"))


@pytest.fixture(scope="module")
def page(run: RecordedRun) -> str:
    return report_html([sample_report()], [run])


def _attributes(tree: ElementTree.Element) -> list[tuple[str, str, str]]:
    return [(element.tag, name, value) for element in tree.iter() for name, value in element.attrib.items()]


def test_nothing_is_loaded_and_only_our_script_may_run(page: str) -> None:
    tree = _parsed(page)
    assert {element.tag for element in tree.iter()} & {
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "use",
    } == set()
    loads = [
        (tag, value) for tag, name, value in _attributes(tree) if name in ("src", "href", "srcset", "action", "data")
    ]
    assert all(value.startswith("#") or (tag, value) == ("link", "data:,") for tag, value in loads)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|WebSocket|import\(", page)
    (script,) = tree.iter("script")
    assert script.text == PAGE_SCRIPT
    digest = base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()
    (policy,) = [value for tag, name, value in _attributes(tree) if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'; " in policy
    assert not [name for _, name, _ in _attributes(tree) if name.startswith("on")]


def test_links_lead_to_sections_and_ids_are_unique(page: str) -> None:
    tree = _parsed(page)
    ids = [value for _, name, value in _attributes(tree) if name == "id"]
    assert len(ids) == len(set(ids)) >= 12
    links = [value.removeprefix("#") for tag, name, value in _attributes(tree) if (tag, name) == ("a", "href")]
    assert links == [element.get("id") for element in tree.iter("section")]


def test_the_page_is_whole_without_its_script(page: str) -> None:
    """The script only adds to what it finds: nothing is hidden before it ran, and it writes no text but values."""
    before = page.split("<script>", 1)[0]
    assert "hidden" not in re.sub(r"aria-hidden|overflow[-\w]*: hidden", "", before)
    assert "innerHTML" not in PAGE_SCRIPT
    for words in ("What each expert is for", "layer x expert", "Dropped assignments", "saturation", "strongest flows"):
        assert words in before


def test_logged_numbers_are_on_the_page(page: str, run: RecordedRun) -> None:
    """The page has every logged value of the curves that it draws, to five figures, in the order of the steps."""
    for key in ("loss", "grad_norm", "load_imbalance", "drop_rate", "eval/bits_per_byte", "eval/en-de/bits_per_byte"):
        pairs = [(record["step"], record[key]) for record in run.metrics() if key in record]
        steps = " ".join(str(step) for step, _ in pairs)
        values = " ".join(f"{value:.5g}" for _, value in pairs)
        assert f'data-steps="{steps}" data-values="{values}"' in page, key
        assert f"<b>{figure_number(pairs[-1][1])}</b>" in page, key


def test_mean_times_of_the_parts_are_on_the_page(page: str, run: RecordedRun) -> None:
    of_forward = [record["time/forward"] for record in run.metrics() if "time/forward" in record][1:]
    cells = [float(value) for _, name, value in _attributes(_parsed(page)) if name == "data-value"]
    assert any(cell == pytest.approx(1000 * sum(of_forward) / len(of_forward), rel=1e-12) for cell in cells)


def test_load_over_time_is_that_of_routing_jsonl(page: str, run: RecordedRun) -> None:
    records = [json.loads(line)["counts"][1] for line in run.folder.routing.read_text().splitlines()][:2]
    share = sum(counts[0] for counts in records) / sum(map(sum, records))
    tree = _parsed(page)
    table = next(t for t in tree.iter("table") if t.get("aria-label") == "load of layer 1")
    assert float(next(table.iter("tbody"))[0][1].get("title", "")) == pytest.approx(100 * share, abs=0.005)


def test_measured_numbers_are_on_the_page(page: str) -> None:
    data = sample_report()
    assert data.text is not None
    numbers = [*data.text.domain_loss]
    numbers += [value for layer in data.layers for value in (layer.load_imbalance, layer.router_entropy)]
    for number in numbers:
        assert f'data-value="{number!r}"' in page
    for layer in data.layers:
        assert f"expert and domain share {layer.mutual_information:.3g} of 1.58 bits" in page
        assert all(f'title="{100 * load:.2f}"' in page for load in layer.load)
        assert layer.coactivation is not None
        assert f'title="{100 * layer.coactivation[0][1]:.2f}"' in page
    assert all(f"{flow.layer} and {flow.next_layer}: {flow.mutual_information:.3g}" in page for flow in data.flows)
    for number in (*data.checkpoints[0].saturation, *data.checkpoints[1].load_imbalance):
        assert f"{number:.5g}" in page
    for expert in data.layers[1].experts:
        assert all(f"{word.count} of {word.occurrences}; lift {word.lift:.3g}" in page for word in expert.words)
        assert "44 %" in page  # 40 of 90


def test_an_alarm_that_ended_keeps_its_cure(tmp_path: Path) -> None:
    run = RecordedRun(write_logs(tmp_path / "run"))
    common = {"alarm": "dead_experts", "layer": 1, "value": 0.25, "threshold": 0.5}
    lines = [
        common | {"step": 5, "state": "rings", "message": "3 of 8 sleep", "advice": "raise balance.coef"},
        common | {"step": 9, "state": "again", "message": "6 of 8 sleep", "advice": "raise it further"},
        common | {"step": 20, "state": "ended", "message": "has ended", "advice": ""},
        common | {"step": 22, "layer": 0, "state": "rings", "message": "1 sleeps", "advice": "wait"},
    ]
    (run.path / "alarms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = _parsed(report_html([sample_report()], [run]))
    cards = [" ".join(card.itertext()) for card in page.iter("div") if card.get("class") == "card alarm"]
    assert len(cards) == 2
    assert "dead_experts , layer 1: rang at step 5, 2 times until step 9; ended at step 20" in cards[0]
    assert "6 of 8 sleep" in cards[0] and "value 0.25, threshold 0.5" in cards[0] and "raise it further" in cards[0]
    assert "layer 0: rang at step 22; has not ended" in cards[1]


def test_hostile_text_is_only_text(tmp_path: Path, run: RecordedRun) -> None:
    """Names, tokens and passages of others add no element, no attribute and no control character."""
    bad = run.path.parent / "x<script>alert(1)<"
    (bad.parent).mkdir(exist_ok=True)
    write_logs(bad, alarm=HOSTILE.replace("\ud800", ""))
    page = report_html([sample_report(hostile=HOSTILE)], [RecordedRun(bad)])
    tree = _parsed(page)
    plain = _parsed(report_html([sample_report()], [run]))
    assert [element.tag for element in tree.iter()] == [element.tag for element in plain.iter()]
    assert sorted(name for _, name, _ in _attributes(tree)) == sorted(name for _, name, _ in _attributes(plain))
    assert page.count("\\x1b[31m\\u202e\\x00") > 40
    assert not set("\x1b\u202e\x00\ud800") & set(page)
    page.encode()


def test_runs_stand_beside_each_other_with_a_table_of_differences(tmp_path: Path) -> None:
    runs = [RecordedRun(write_logs(tmp_path / name, seed=seed)) for seed, name in enumerate(("a", "b"))]
    data = [sample_report(name="a"), sample_report(name="b", seed=4, experts=8, layers=3)]
    page = report_html(data, runs)
    tree = _parsed(page)
    differences = next(element for element in tree.iter("section") if element.get("id") == "differences")
    rows = {tuple(cell.text for cell in row)[:1]: [cell.text for cell in row][1:] for row in differences.iter("tr")}
    assert rows[("model.moe.num_experts",)] == ["4", "8"]
    assert ("seed",) not in rows
    assert rows[("eval/loss",)] == [figure_number(one.card.last["eval/loss"]) for one in data]
    for section in ("domains", "words", "drops", "card"):
        found = next(element for element in tree.iter("section") if element.get("id") == section)
        headings = ["".join(heading.itertext()) for heading in found.iter("h3")]
        assert {"a", "b"} <= set(headings), section
    names = {element.get("data-name") for element in tree.iter("path")}
    assert {"a, training", "b, training", "a, held out", "b, held out", "a", "b"} <= names


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [RecordedRun(write_logs(tmp_path / place / "same")) for place in ("one", "two")]
    page = report_html([sample_report(), sample_report()], runs)
    assert f"{tmp_path}/one/same, training" in page
    assert "The configs are equal." in page


def test_a_run_without_checkpoint_dense_or_just_begun_has_a_page(tmp_path: Path) -> None:
    begun = RecordedRun(write_logs(tmp_path / "begun", steps=0))
    card = replace(sample_report().card, step=None, moe_layers=(), num_experts=None, top_k=None, router=None, last={})
    page = report_html([ReportData(card=card, remarks=("There is no checkpoint yet.",))], [begun])
    tree = _parsed(page)
    assert [element.get("id") for element in tree.iter("section")] == ["card", "alarms"]
    assert "There is no checkpoint yet." in page


@pytest.mark.parametrize(("experts", "layers"), [(12, 24), (128, 24)])
def test_a_large_model_has_a_page_of_less_than_2_mb(experts: int, layers: int, tmp_path: Path) -> None:
    """Of many experts it says less, of too many the first of each layer; the curves are always there."""
    one = sample_report(experts=experts, layers=1, hostile=" word" * 30)
    data = replace(one, layers=tuple(replace(one.layers[0], layer=i) for i in range(layers)), checkpoints=())
    run = RecordedRun(write_logs(tmp_path / "large", steps=40))
    records = [{"step": step, "counts": [[step] * experts] * layers} for step in range(10, 410, 10)]
    run.folder.routing.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = report_html([data], [run])
    assert len(page.encode()) < MOST_BYTES
    tree = _parsed(page)
    found = {element.get("id"): element for element in tree.iter("section")}
    folded = ["".join(summary.itertext()).split(":")[0] for summary in found["words"].iter("summary")]
    assert folded == [f"layer {index}" for index in range(layers)]
    shown = sum("".join(heading.itertext()).startswith("expert 0 ") for heading in found["words"].iter("h3"))
    assert shown == layers and "Shortened to keep the page small" in page
    assert ("more experts are only in the JSON" in page) == (experts > 12)
    assert ("routing.jsonl has it" in page) == (experts > 12)
    assert {path.get("data-name") for path in found["loss"].iter("path")} > {"training", "held out"}


def test_logs_of_any_values_have_a_page(tmp_path: Path) -> None:
    """Values of any type and size, as a damaged or a foreign log may have, are drawn or left out."""
    dice = random.Random(7)
    values = [None, True, -1, 0.5, 1e308, -1e308, math.nan, math.inf, 10**400, 5e-324, HOSTILE[:-1], [[1]], {"a": 1}]
    keys = ["loss", "eval/loss", "eval/<b>/bits_per_byte", "load_imbalance", "time/forward", "time/<i>", "lr", "alarm"]
    keys += ["state", "layer", "rank", "message", "advice", "value", "threshold", "counts", "alarms"]
    for number in range(60):
        run = RecordedRun(write_logs(tmp_path / str(number), steps=number % 3))
        for log in (run.folder.metrics, run.folder.routing, run.folder.alarms):
            for _ in range(8):
                record: dict[str, object] = {key: dice.choice(values) for key in dice.sample(keys, 6)}
                record["step"] = dice.choice([0, 1, 2, 2**53, True, -1, 1.5])
                if dice.random() < 0.5:
                    record["counts"] = [[dice.choice(values) for _ in range(2)] for _ in range(2)]
                line = json.dumps(record)
                with log.open("a") as file:
                    file.write(dice.choice([line, line, line, line[: len(line) // 2]]) + "\n")
        page = report_html([replace(sample_report(), card=replace(sample_report().card, last={}))], [run])
        _parsed(page)
        assert not re.search(r' (d|x|y|width|height)="[^"]*(nan|inf)', page)
