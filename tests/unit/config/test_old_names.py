"""Old names of keys and values: still accepted, each with a warning that states the present one."""

import warnings
from pathlib import Path

import pytest

from trainer.config.loader import load
from trainer.config.old_names import OldNameWarning
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig

ROUTER = "model: {{moe: {{router: {{{}}}}}}}"
OLD_AND_PRESENT = [
    ("model: {attention_within: document}", "model: {document_mask: true}", "document is now document_mask: true"),
    ("model: {attention_within: row}", "model: {document_mask: false}", "row is now document_mask: false"),
    ("data: {packing: crossing}", "data: {packing: wrapped}", "crossing is now wrapped"),
    ("data: {packing: whole}", "data: {packing: bfd}", "whole is now bfd"),
    (
        ROUTER.format("draw_top_k: [1, 2]"),
        ROUTER.format("top_k_choices: [1, 2]"),
        r"model\.moe\.router: draw_top_k is now called top_k_choices; the old",
    ),
    *(
        (
            ROUTER.format(f"kind: {kind}, room: 1.5, evaluation: same"),
            ROUTER.format(f"kind: {kind}, capacity_factor: 1.5, evaluation_routing: as_trained"),
            "same is now evaluation_routing: as_trained",
        )
        for kind in ("expert_choice", "linear_program", "greedy")
    ),
    (
        "model: {moe: {num_experts: 1, router: {kind: mixture_of_depths, share: 0.5}}}",
        "model: {moe: {num_experts: 1, router: {kind: mixture_of_depths, capacity: 0.5}}}",
        "share is now called capacity",
    ),
]


def _load(folder: Path, text: str, *overrides: str, name: str = "x.yaml") -> ExperimentConfig:
    (folder / name).write_text(f"name: x\n{text}\n")
    return load(folder / name, overrides, ExperimentConfig)


@pytest.mark.parametrize(("old", "present", "expected"), OLD_AND_PRESENT)
def test_an_old_name_means_the_present_one(old: str, present: str, expected: str, tmp_path: Path) -> None:
    with pytest.warns(OldNameWarning, match=expected):
        config = _load(tmp_path, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config == _load(tmp_path, present)


@pytest.mark.parametrize(("old", "present", "expected"), OLD_AND_PRESENT)
def test_a_stored_config_with_old_names_loads_silently(old: str, present: str, expected: str, tmp_path: Path) -> None:
    """Checkpoints store the plain values of every key."""
    wanted = _load(tmp_path, present).model_dump()
    stored = _with_old_names(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored != wanted and ExperimentConfig.model_validate(stored).model_dump() == wanted


def _with_old_names(values: dict) -> dict:
    """Return the values of a config under the names before the renames."""
    values = {**values, "model": {**values["model"]}, "data": {**values["data"]}}
    model, data = values["model"], values["data"]
    model["attention_within"] = "document" if model.pop("document_mask") else "row"
    data["packing"] = {"wrapped": "crossing", "bfd": "whole"}[data["packing"]]
    router = {**model["moe"]["router"]}
    names = {"top_k_choices": "draw_top_k", "capacity_factor": "room", "capacity": "share"}
    router = {names.get(key, key): value for key, value in router.items()}
    if "evaluation_routing" in router:
        router["evaluation"] = {"as_trained": "same"}.get(router["evaluation_routing"], router["evaluation_routing"])
        del router["evaluation_routing"]
    model["moe"] = {**model["moe"], "router": router}
    return values


def test_the_warning_has_the_location(tmp_path: Path) -> None:
    with pytest.warns(OldNameWarning) as caught:
        _load(tmp_path, "model:\n  attention_within: document")
    (warning,) = caught
    assert str(warning.message) == (
        f"{tmp_path}/x.yaml:3:3: model.attention_within: document is now document_mask: true; the old name still works"
    )


def test_an_override_replaces_a_value_of_the_file_under_either_name(tmp_path: Path) -> None:
    old, present = (ROUTER.format(f"kind: greedy, {key}: 3") for key in ("room", "capacity_factor"))
    for text in (old, present):
        for override in ("room=2", "capacity_factor=2"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OldNameWarning)
                config = _load(tmp_path, text, f"model.moe.router.{override}")
            assert config.model.moe is not None and config.model.moe.router.model_dump()["capacity_factor"] == 2


def test_a_file_replaces_a_value_of_its_base_under_either_name(tmp_path: Path) -> None:
    """Also if only the base states the kind."""
    for below, above in (("room", "capacity_factor"), ("capacity_factor", "room"), ("room", "room")):
        (tmp_path / "base.yaml").write_text(ROUTER.format(f"kind: greedy, {below}: 3"))
        with pytest.warns(OldNameWarning):
            config = _load(tmp_path, "base: base.yaml\n" + ROUTER.format(f"{above}: 2"))
        assert config.model.moe is not None and config.model.moe.router.model_dump()["capacity_factor"] == 2


def test_both_names_in_one_file_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings(), pytest.raises(ConfigError) as caught:
        warnings.simplefilter("error", OldNameWarning)
        _load(tmp_path, ROUTER.format("kind: greedy, room: 3, capacity_factor: 2"))
    assert str(caught.value) == (
        f"{tmp_path}/x.yaml:2:38: model.moe.router.room: is the old name of capacity_factor, which is given as well; "
        "remove it"
    )


def test_a_wrong_value_under_an_old_name_is_reported_at_its_location(tmp_path: Path) -> None:
    with (
        pytest.warns(OldNameWarning),
        pytest.raises(ConfigError, match=r"x\.yaml:2:44: .*capacity_factor: must be more"),
    ):
        _load(tmp_path, ROUTER.format("kind: greedy, room: 0"))
