"""Which changes of a config a run may resume with, above all those of its text."""

from pathlib import Path

import pytest

from trainer.checkpoint.config_changes import check_belongs
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import Change
from trainer.errors import ConfigError

WHERE = RunFolder(Path("runs/a"))
NEW_PATH = Change("data.sources.0.path", "a.txt", "b.txt")
WEIGHT = Change("data.sources.0.weight", 1.0, 2.0)


def _order_warnings(*changes: Change, may_read_other_text: bool) -> list[str]:
    said = check_belongs(WHERE, changes, may_read_other_text=may_read_other_text)
    return [line for line in said if "the order of the rows changes" in line]


def test_the_option_itself_changes_nothing() -> None:
    assert check_belongs(WHERE, [Change("data.changed", None, "continue")], may_read_other_text=True) == []


@pytest.mark.parametrize("allowed", [False, True])
def test_other_sources_are_a_warning_by_key(allowed: bool) -> None:
    said = check_belongs(WHERE, [NEW_PATH], may_read_other_text=allowed)
    assert said == ["data.sources.0.path was a.txt in runs/a and is now b.txt"]


def test_other_shares_of_other_text_do_not_disturb_the_order_of_a_domain() -> None:
    assert len(_order_warnings(WEIGHT, may_read_other_text=True)) == 1, "of the same text they do"
    assert len(_order_warnings(WEIGHT, NEW_PATH, may_read_other_text=False)) == 1
    assert _order_warnings(WEIGHT, NEW_PATH, may_read_other_text=True) == []
    assert _order_warnings(Change("data.packing", "bfd", "wrapped"), NEW_PATH, may_read_other_text=True) != []


def test_another_tokenizer_is_refused_with_other_text_too() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.kind byte, the config has bpe"):
        check_belongs(WHERE, [NEW_PATH, Change("data.tokenizer.kind", "byte", "bpe")], may_read_other_text=True)


def test_another_list_of_frozen_weights_says_what_becomes_of_moments() -> None:
    change = Change("train.freeze", [], ["router"])
    before_a_step, going_on = (check_belongs(WHERE, [change], goes_on=goes_on)[0] for goes_on in (False, True))
    assert before_a_step == "train.freeze was [] in runs/a and is now [router]"
    assert going_on.removeprefix(before_a_step) == (
        "; weights that learn from here on start without moments, and those that no longer do lose theirs"
    )


def test_another_init_from_is_not_read_once_there_are_weights() -> None:
    changes = [Change("init_from.run", "runs/x", "runs/y"), Change("init_from.step", None, 3)]
    [said] = check_belongs(WHERE, changes)
    assert said.startswith("init_from is not what it was in runs/a, and is not read")
    assert len(check_belongs(WHERE, [Change("init_from", None, {"run": "runs/y"})])) == 1
    assert check_belongs(WHERE, changes, goes_on=False) == [], "it will be read"
    assert check_belongs(WHERE, [Change("init_from", {"run": "runs/y"}, None)]) == [], "its parent may be removed"
