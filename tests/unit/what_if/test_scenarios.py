"""The command `what-if`: what it prints, and what it refuses, from the trace of a run."""

import json
from pathlib import Path

import pytest

from tests.exported_runs import make_run
from trainer.cli import main
from trainer.routing_record.record_reader import RoutingRecord

MODEL = {"num_layers": 2, "d_model": 16, "num_heads": 2, "seq_len": 16, "d_ff": 8, "moe": {"num_experts": 4, "d_ff": 8}}


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """Run a command that ends with a code, and return what it prints."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    printed = capsys.readouterr()
    assert exit_.value.code == code, printed.err
    return printed.err if code else printed.out


def test_every_combination_is_predicted_and_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, trace = make_run(tmp_path, MODEL)[1].path, str(tmp_path / "t")
    assert " bytes each, in 1 files" in said(["trace", str(run), "--to", trace], capsys)
    options = ["what-if", trace, "--capacity", "none,0.5", "--top-k", "1,2", "--ep-size", "1,2"]
    found = json.loads(said([*options, "--json"], capsys))["predictions"]
    assert [(one["capacity"], one["top_k"]) for one in found] == [(None, 1), (None, 2), (0.5, 1), (0.5, 2)]
    assert [one["drop_rate"] == 0 for one in found] == [True, True, False, False]
    tokens = int(RoutingRecord(tmp_path / "t").lengths().sum())
    (ones,) = {sum(layout["rows_per_rank"][0]) for layout in found[1]["layouts"]}
    assert ones == 2 * tokens, "every row is on some rank"
    lines = said([*options, "--flops", "1e9", "--bandwidth", "1e9"], capsys).splitlines()
    assert len(lines) == 1 + 4 + 1 + 1 + 1 + 8 and "other layers are estimates" in lines[5]
    assert "step ms (model)" in lines[7] and " none   2   2 contiguous " in lines[11]
    assert [line.split()[-3:] for line in lines[1:5]] == [[n, "of", "2"] for n in "1211"]
    exact = json.loads(said([*options, "--json", "--run", str(run), "--step", "0"], capsys))["predictions"]
    assert all(one["exact_layers"] == 2 for one in exact)
    assert [one["estimate"] for one in exact] == [one["dropped"] for one in found]
    table = said([*options, "--run", str(run)], capsys).splitlines()
    assert table[0].endswith("by the trace alone") and table[1].split()[2:7] == ["0.0000%", "0.0000%", "2", "of", "2"]
    assert "choose weights of --run" in said(["what-if", trace, "--step", "0"], capsys, code=2)
    assert "has no moving average" in said(["what-if", trace, "--run", str(run), "--weights", "ema"], capsys, code=4)
    assert "is none of contiguous, round_robin, greedy, balanced, nor" in said(
        ["what-if", trace, "--placement", "x"], capsys, code=2
    )
    assert "is not predicted; use all_to_all" in said(["what-if", trace, "--dispatcher", "mail"], capsys, code=2)
    assert "give both or neither" in said(["what-if", trace, "--flops", "1"], capsys, code=2)
    file = str(tmp_path / "best.json")
    placed = said(["what-if", trace, "--ep-size", "2", "--write-placement", file], capsys).splitlines()
    assert "busiest rank 1." in placed[-1] and placed[-1].endswith("% above the best possible")
    names = f"contiguous,round_robin,greedy,balanced,{file}"
    options = ["what-if", trace, "--ep-size", "2", "--placement", names, "--json"]
    (one,) = json.loads(said(options, capsys))["predictions"]
    contiguous, _, greedy, balanced, read = [
        [max(rows) for rows in layout["rows_per_rank"]] for layout in one["layouts"]
    ]
    assert read == balanced, "the file is the balanced placement"
    assert all(b <= g <= c for b, g, c in zip(balanced, greedy, contiguous, strict=True)) and balanced != contiguous
    options = ["what-if", trace, "--ep-size", "4", "--placement", file]
    assert "is for 2 ranks (ep_size), and --ep-size is 4" in said(options, capsys, code=2)
    assert "give one --ep-size" in said(["what-if", trace, "--write-placement", file], capsys, code=2)
    nowhere = str(tmp_path / "no" / "p.json")
    options = ["what-if", trace, "--ep-size", "2", "--write-placement", nowhere]
    assert "there is no folder" in said(options, capsys, code=2)
    assert said(["eval", str(run), "--json", "--record", str(tmp_path / "r")], capsys)
    assert "without scores, not a trace" in said(["what-if", str(tmp_path / "r")], capsys, code=3)
    path = next((tmp_path / "t").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "is damaged (its SHA-256 differs" in said(["what-if", trace], capsys, code=3)
