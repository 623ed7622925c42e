"""Tests for the lm-eval adapter: local tasks give the metrics that we compute ourselves, without a network."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from tests.unit.evaluation.lm_eval_tasks import ROWS, write_tasks
from tests.unit.evaluation.task_helpers import SEQ_LEN, build, subject
from trainer.checkpoint.choice import NEWEST
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.errors import ConfigError, DataError
from trainer.evaluation import lm_eval
from trainer.evaluation.lm_eval import LmEvalModel, run_lm_eval
from trainer.evaluation.scoring import Question, score


@pytest.fixture
def model() -> LmEvalModel:
    return LmEvalModel(subject(), ByteTokenizer())


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tasks over a local file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return write_tasks(tmp_path)


def _ask(*arguments: Any) -> Any:
    """Return a minimal lm-eval instance."""
    return SimpleNamespace(args=arguments)


def test_accuracy_is_that_of_our_own_choice_task(model: LmEvalModel, tasks: Path, tmp_path: Path) -> None:
    """lm-eval puts a space before each choice and excludes the end of the document."""
    results, table = run_lm_eval(model, ["local_choice"], include_path=tasks, limit=None)
    theirs = results["local_choice"]
    fields: dict[str, Any] = {"choices": [" yes", " no, it is odd", " no"], "answer": "label", "ends_document": False}
    ours = build(tmp_path, ROWS, kind="choice", **fields).evaluate(subject()).metrics
    assert theirs["acc,none"] == ours["acc"]
    assert "local_choice" in table and 0 <= theirs["acc_norm,none"] <= 1


def test_bits_per_byte_are_those_of_each_text_read_as_a_document(model: LmEvalModel, tasks: Path) -> None:
    """Texts of up to four sequences: lm-eval's windows are disjoint, each with one context token."""
    results, _ = run_lm_eval(model, ["local_rolling"], include_path=tasks, limit=None)
    nats = num_bytes = 0
    for row in ROWS:
        tokens = list(row["text"].encode())
        num_bytes += len(tokens)
        last, asked = 255, []
        for start in range(0, len(tokens) - len(tokens) % SEQ_LEN, SEQ_LEN):
            asked.append(Question(prompt=[last], completions=[tokens[start : start + SEQ_LEN]]))
            last = tokens[start + SEQ_LEN - 1]
        rest = len(tokens) % SEQ_LEN
        if rest:  # the last window is full: it reads on from further back
            known = [255, *tokens][: len(tokens) - rest + 1][-(SEQ_LEN + 1 - rest) :]
            asked.append(Question(prompt=known, completions=[tokens[-rest:]]))
        nats -= sum(scores[0].log_prob for scores in score(subject(), asked))
    assert max(len(row["text"]) for row in ROWS) > 2 * SEQ_LEN
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-6)


def test_a_text_ends_at_the_first_stop(model: LmEvalModel) -> None:
    asked = [_ask("Is it? ", {"until": [], "max_gen_toks": 12}), _ask("Is it not? ", {"until": [], "max_gen_toks": 12})]
    free = model.generate_until(asked)
    stop = free[0][3:5]
    stopped = model.generate_until([_ask("Is it? ", {"until": [stop, "\n"], "max_gen_toks": 12})])
    assert stopped == [free[0][: free[0].index(stop)]]
    assert free == model.generate_until(asked)


def test_answers_keep_the_order_of_the_requests(model: LmEvalModel) -> None:
    """Requests are grouped by context for scoring and by options for generation."""
    pairs = [("a b", " c"), ("d", " e"), ("a b", "f"), ("", "c"), ("d", " e")]
    together = model.loglikelihood([_ask(*pair) for pair in pairs])
    for (context, continuation), (found, _) in zip(pairs, together, strict=True):
        question = Question(prompt=[255, *context.encode()], completions=[list(continuation.encode())])
        assert found == pytest.approx(score(subject(), [question])[0][0].log_prob, abs=1e-10)
    assert len({round(value, 6) for value, _ in together}) == 4
    options = [{"until": [], "max_gen_toks": length} for length in (3, 5, 3)]
    texts = model.generate_until([_ask("x", one) for one in options])
    assert texts[0] == texts[2] and texts[1].startswith(texts[0].rstrip("\ufffd")) and len(texts[1]) > len(texts[0])


def test_a_trailing_space_of_the_context_belongs_to_what_follows(model: LmEvalModel) -> None:
    """As in lm-eval's own models: "a " + "b" is scored as "a" + " b"."""
    (spaced,), (moved,) = (model.loglikelihood([_ask(*pair)]) for pair in (("a ", "b"), ("a", " b")))
    assert spaced == moved


def test_unsupported_requests_are_an_error_of_one_line(
    model: LmEvalModel, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_tasks_only(include_path: str, include_defaults: bool = True) -> TaskManager:
        """Skip the index of all lm-eval tasks, which takes half a minute."""
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval, "TaskManager", own_tasks_only)
    with pytest.raises(ConfigError, match=r"^--lm-eval: 'local_chioce' is not a task of lm-eval or of --include-path"):
        run_lm_eval(model, ["local_chioce"], include_path=tasks, limit=None)
    with pytest.raises(
        ConfigError, match=r"max_gen_toks 64 leaves no space for a prompt in model\.seq_len 64; use 1 to 63"
    ):
        model.generate_until([_ask("x", {"max_gen_toks": 64})])
    with pytest.raises(ConfigError, match="generation option 'num_beams' is not supported"):
        model.generate_until([_ask("x", {"num_beams": 4})])
    with pytest.raises(DataError, match=r"the text to score has 70 tokens, and model\.seq_len is 64"):
        model.loglikelihood([_ask("x", "y" * 70)])


def test_missing_data_is_a_data_error(model: LmEvalModel, tasks: Path) -> None:
    (tasks.parent / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"^lm-eval: local_choice: .*; check the task and its data$"):
        run_lm_eval(model, ["local_choice"], include_path=tasks, limit=None)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trainer.checkpoint.run_folder import RunFolder
    from trainer.experiment import ExperimentConfig
    from trainer.training.evaluate_run import evaluate_by_lm_eval

    monkeypatch.delitem(sys.modules, "trainer.evaluation.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config, folder = ExperimentConfig(name="x"), RunFolder(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^--lm-eval: needs lm_eval, which is not installed; pip install 'turnout\[lm-eval\]'$"
    ):
        evaluate_by_lm_eval(config, folder, ["a"], include_path=None, limit=None, choice=NEWEST, screen=sys.stdout)
