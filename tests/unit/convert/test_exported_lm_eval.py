"""lm-eval gives an exported model, in its own Hugging Face adapter, the numbers that it gives ours."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.builders import make_engine
from tests.exported_runs import make_run
from tests.unit.evaluation.lm_eval_tasks import write_tasks
from trainer.convert.hf_export import ExportOptions, export
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.collectives import Group
from trainer.evaluation.context import EvalContext
from trainer.evaluation.lm_eval import LmEvalModel
from trainer.families.registry import FAMILIES

MODEL: dict[str, Any] = {
    **{"num_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": 24, "seq_len": 64, "init_std": 0.3, "qk_norm": True},
    "moe": {"num_experts": 5, "d_ff": 12},
}


def metrics(model: Any, tasks: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of each task; standard errors of a dozen rows are left out."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False)
    return {
        task: {key: value for key, value in values.items() if key.endswith(",none") and "stderr" not in key}
        for task, values in found["results"].items()
    }


def test_an_exported_model_has_our_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval puts the beginning of a document before contexts only with add_bos_token; before texts it always does."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config, run, gpt = make_run(tmp_path, MODEL)
    options = ExportOptions(family=FAMILIES["qwen3_moe"])
    export(config, run, tmp_path / "out", options, warn=pytest.fail)
    engine = make_engine(config.model, dtype=torch.float32, vocab_size=gpt.vocab_size)
    engine.model.load_state_dict(gpt.state_dict())
    subject = EvalContext(engine=engine, world=Group.of_one(), tokens_per_pass=300)
    tasks = write_tasks(tmp_path)
    ours = metrics(LmEvalModel(subject, ByteTokenizer()), ["local_choice", "local_rolling", "local_writing"], tasks)
    theirs: dict[str, dict[str, float]] = {}
    for names, begins in ((["local_choice", "local_writing"], True), (["local_rolling"], None)):
        folder = str(tmp_path / "out")
        model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4, add_bos_token=begins)
        theirs |= metrics(model, names, tasks)
    assert ours.keys() == theirs.keys() and sum(map(len, ours.values())) == 4
    for task, values in ours.items():
        assert theirs[task] == pytest.approx(values, rel=1e-5), task
    assert 0 < ours["local_choice"]["acc,none"] < 1 or 0 < ours["local_choice"]["acc_norm,none"] < 1
