"""Models that transformers made and saved become runs that compute the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint_helpers import load
from tests.foreign_models import FAMILIES, make_foreign, save_foreign
from trainer.checkpoint.ancestors import ancestors
from trainer.checkpoint.branch import Branch
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.tools.verify import verify_checkpoint
from trainer.cli import main
from trainer.commands.resolve import check_run_folder
from trainer.config.loader import load as load_config
from trainer.convert.hf_import import Imported, import_model
from trainer.convert.link_tensors import region_of, to_theirs
from trainer.convert.linked_weights import LinkedWeights
from trainer.errors import CheckpointError, ConfigError
from trainer.experiment import ExperimentConfig
from trainer.families.registry import FAMILIES as IMPORTED

KNOWN = [*FAMILIES]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _import(family: str, *overrides: str, config: str | None = None, options: Any = None, **values: Any) -> Imported:
    save_foreign(Path("theirs"), make_foreign(family, **values), **(options or {}))
    path = None
    if config is not None:
        path = Path("mine.yaml")
        path.write_text(config)
    return import_model(Path("theirs"), path, list(overrides), gate="logits")


def _recorded(imported: Imported) -> ExperimentConfig:
    return load_config(imported.run / "config.yaml", [], ExperimentConfig)


def _round_trip(imported: Imported, vocab_size: int = 256) -> None:
    """HF -> native -> HF: every tensor made from ours is the one on disk, bit for bit, and none is left."""
    config, ours = _recorded(imported), load(CheckpointFolder(imported.run / "checkpoints"), 0)
    files = [load_file(file) for file in sorted(Path("theirs").glob("*.safetensors"))]
    theirs = {name: tensor for tensors in files for name, tensor in tensors.items()}
    for link in IMPORTED[imported.family].links(config.model, vocab_size):
        found = to_theirs(region_of(ours[f"model.{link.ours}"], link), link)
        expected = theirs.pop(link.theirs)
        assert torch.equal(found.to(expected.dtype), expected), link.theirs
    assert theirs == {}


@pytest.mark.parametrize("family", KNOWN)
def test_a_model_of_each_family_computes_what_it_computed_there(family: str) -> None:
    """The gate compares logits with transformers; here with weights far from their initial values."""
    imported = _import(family, "name=mine")
    assert imported.run == Path("runs/mine") and imported.family == family
    assert "bit for bit, logits within" in imported.checked
    config = _recorded(imported)
    assert config.data.tokenizer.model_dump()["path"] == "runs/mine/source" and config.model.vocab_size is None
    report = verify_checkpoint(CheckpointFolder(imported.run / "checkpoints"), 0)
    assert report.findings == [] and report.num_layers == len(config.model.moe_layers)
    _round_trip(imported)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine"], "nothing is left beside it"


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one key head, tied": ("mixtral", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "a key head each": ("mixtral", {"num_key_value_heads": 4}),
    "two heads a key, tied": ("qwen3_moe", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "bfloat16": ("qwen3_moe", {"dtype": torch.bfloat16}),
    "float16": ("mixtral", {"dtype": torch.float16}),
    "several files": ("dots1", {"options": {"max_shard_size": "9KB"}}),
}


@pytest.mark.parametrize(("family", "values"), CASES.values(), ids=CASES.keys())
def test_shapes_and_dtypes(family: str, values: dict[str, Any]) -> None:
    imported = _import(family, **values)
    _round_trip(imported)
    manifest = CheckpointFolder(imported.run / "checkpoints").manifest(0)
    record: Any = manifest.run["imported"]
    assert record["dtype"] == str(values.get("dtype", "float32")).removeprefix("torch.")
    assert {tensor.dtype for name, tensor in manifest.tensors.items() if "model." in name} == {"float32"}
    assert _recorded(imported).train.dtype == ("bfloat16" if record["dtype"] == "bfloat16" else "float32")


def test_an_embedding_may_be_padded() -> None:
    imported = _import("mixtral", vocab_size=300)
    assert _recorded(imported).model.vocab_size == 300
    _round_trip(imported, 300)


def test_a_config_of_the_users_own_decides_how_it_is_trained() -> None:
    mine = "name: own\nmodel: {num_layers: 2, d_model: 16, num_heads: 4, num_kv_heads: 2, seq_len: 16, d_ff: 7, "
    mine += "attention: {head_dim: 4}, rope_theta: 1e6, norm_eps: 1e-5, moe: {num_experts: 6, d_ff: 12, "
    mine += "balance: {coef: 0.5}, router: {kind: top_k, top_k: 2}}}\ndata: {tokenizer: {kind: byte}}\nseed: 5\n"
    config = _recorded(_import("mixtral", "train.steps=7", config=mine))
    assert (config.name, config.seed, config.train.steps, config.model.seq_len) == ("own", 5, 7, 16)
    assert config.model.moe is not None and config.model.moe.balance.coef == 0.5
    same = load_config(Path("mine.yaml"), ["train.steps=7"], ExperimentConfig)
    assert check_run_folder(RunFolder(Path("runs/own")), same) == [], "`train mine.yaml` goes on from it"
    wrong = mine.replace("num_kv_heads: 2", "num_kv_heads: 1").replace("top_k: 2", "top_k: 3").replace("own", "b")
    Path("mine.yaml").write_text(wrong)
    with pytest.raises(ConfigError) as caught:
        import_model(Path("theirs"), Path("mine.yaml"), [], gate="tensors")
    assert str(caught.value).splitlines() == [
        "mine.yaml: model.num_kv_heads is 1, and theirs has 2; use that",
        "mine.yaml: model.moe.router.top_k is 3, and theirs has 2; use that",
    ]
    assert not Path("runs/b").exists()


def test_a_config_of_the_users_own_states_a_padded_embedding() -> None:
    mine = "name: own\nmodel: {num_layers: 2, d_model: 16, num_heads: 4, num_kv_heads: 2, "
    mine += "attention: {head_dim: 4}, rope_theta: 1e6, norm_eps: 1e-5, moe: {num_experts: 6, d_ff: 12}}\n"
    with pytest.raises(ConfigError) as caught:
        _import("mixtral", config=mine, vocab_size=300)
    is_null = "model.vocab_size is null, so 256, one for each id, and the embedding of theirs has 300 rows"
    assert str(caught.value) == f"{is_null}; set it to 300"
    with pytest.raises(ConfigError, match="vocab_size is 299, and the embedding of theirs has 300 rows"):
        import_model(Path("theirs"), Path("mine.yaml"), ["model.vocab_size=299"], gate="tensors")
    imported = import_model(Path("theirs"), Path("mine.yaml"), ["model.vocab_size=300"], gate="logits")
    assert _recorded(imported).model.vocab_size == 300


def test_rows_of_a_written_config_are_no_longer_than_a_machine_can_train() -> None:
    config = _recorded(_import("mixtral", max_position_embeddings=100_000))
    assert config.model.seq_len == 4096
    assert config.model.moe is not None and config.model.moe.z_loss_coef == 0


def test_a_branch_of_an_imported_run_knows_the_published_model() -> None:
    first = _import("qwen3_moe")
    branch = Branch(parent=RunFolder(first.run), step=None, name="tuned", config="")
    branch.make(Path("runs/tuned"))
    assert [one.text for one in ancestors(RunFolder(Path("runs/tuned")))] == [
        f"{first.run.name} at step 0 (branch)",
        "theirs, qwen3_moe (import)",
    ]


def test_the_small_files_are_kept_as_they_were() -> None:
    save_foreign(Path("theirs"), make_foreign("mixtral"))
    Path("theirs/chat_template.jinja").write_text("{{ messages }}")
    Path("theirs/unknown.py").write_text("raise SystemExit")
    imported = import_model(Path("theirs"), None, ["name=kept"], gate="tensors")
    kept = {path.name: path.read_bytes() for path in (imported.run / "source").iterdir()}
    assert kept.keys() == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    assert all(content == (Path("theirs") / name).read_bytes() for name, content in kept.items())
    assert imported.checked == "53 tensors equal bit for bit"


def test_a_model_that_computes_something_else_is_refused_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key of the config, under which all tensors fit."""
    save_foreign(Path("theirs"), make_foreign("mixtral"))
    right = IMPORTED["mixtral"].from_hf
    monkeypatch.setattr(IMPORTED["mixtral"], "from_hf", lambda config: {**right(config), "norm_eps": 1e-2})
    with pytest.raises(CheckpointError, match=r"logits here differ from transformers' by .*; nothing was imported"):
        import_model(Path("theirs"), None, ["name=a"], gate="logits")
    assert not Path("runs").exists()


def test_a_model_that_fails_in_transformers_is_one_line() -> None:
    values = {"n_group": 8, "topk_group": 3}  # groups of one expert, whose best two are looked for
    folder = save_foreign(Path("theirs"), make_foreign("glm4_moe", **values))
    with pytest.raises(CheckpointError, match="theirs: transformers cannot compute with its model: selected index"):
        import_model(folder, None, ["name=mine"], gate="logits")
    assert not Path("runs/mine").exists()


def test_rounding_that_has_grown_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights so large that float32 loses digits, and near ties between experts; a fault is still one."""
    save_foreign(Path("theirs"), make_foreign("mixtral", initializer_range=1.0, num_hidden_layers=8))
    imported = import_model(Path("theirs"), None, ["name=a"], gate="logits")
    assert "logits of most tokens within" in imported.checked
    right = IMPORTED["mixtral"].from_hf
    monkeypatch.setattr(IMPORTED["mixtral"], "from_hf", lambda config: {**right(config), "norm_eps": 2e-3})
    with pytest.raises(CheckpointError, match=r"logits here differ from transformers' by .*; nothing was imported"):
        import_model(Path("theirs"), None, ["name=b"], gate="logits")


def test_two_tensors_exchanged_on_the_way_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate `tensors` makes theirs from what was written, and does not read it as it was written."""
    save_foreign(Path("theirs"), make_foreign("mixtral"))
    right = LinkedWeights.read

    def exchanged(self: LinkedWeights, name: str, start: int, length: int) -> torch.Tensor:
        return right(self, name.replace("attention_norm", "ffn_norm"), start, length)

    monkeypatch.setattr(LinkedWeights, "read", exchanged)
    with pytest.raises(CheckpointError, match="is not what was written of it"):
        import_model(Path("theirs"), None, ["name=a"], gate="tensors")
    assert not Path("runs").exists()


def test_a_run_of_that_name_is_left_alone() -> None:
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/note").write_text("mine")
    save_foreign(Path("theirs"), make_foreign("mixtral"))
    with pytest.raises(ConfigError, match=r"runs/a: exists; choose another name=\.\.\. for the new run, or remove it"):
        import_model(Path("theirs"), None, ["name=a"], gate="tensors")
    assert [path.name for path in Path("runs").rglob("*")] == ["a", "note"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("../nowhere/at all", "no such folder"),
        ("someone/some-model", "someone/some-model: is no folder here, and cannot be fetched from the hub"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(
    given: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as exit_:
        main(["import", given, "name=a"])
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 3 and len(lines) == 1 and message in lines[0]


def test_a_folder_in_the_hubs_cache_is_links_to_its_blobs() -> None:
    save_foreign(Path("theirs"), make_foreign("mixtral"))
    cache = Path("models--someone--some-model")
    snapshot = cache / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(Path("theirs").iterdir())):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert import_model(snapshot, None, [], gate="logits").run == Path("runs/some-model")


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["import", "theirs", "name=a", *arguments])
    [line] = capsys.readouterr().err.splitlines()
    assert not Path("runs").exists()
    return exit_.value.code, line


def test_a_machine_that_is_too_small_is_told_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_foreign(Path("theirs"), make_foreign("mixtral"))
    with monkeypatch.context() as patch:
        patch.setattr("trainer.convert.hf_import.total_memory", lambda _: 1000)
        code, line = _fails(capsys)
        assert code == 7 and "--gate tensors compares every tensor bit for bit instead" in line
    with monkeypatch.context() as patch:
        patch.setattr("trainer.convert.hf_import.is_installed", lambda _: False)
        code, line = _fails(capsys)
        assert code == 2 and line.startswith("--gate logits: needs transformers, which is not installed")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        code, line = _fails(capsys, "--gate", "tensors")
        assert code == 7 and "of disk, and 1.00 kB are free" in line


def test_a_name_on_the_hub_is_its_folder_in_the_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_foreign(Path("theirs"), make_foreign("mixtral"))
    asked = {}

    def download(name: str, **options: Any) -> str:
        asked[name] = options
        return "theirs"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(SystemExit) as exit_:
        main(["import", "someone/some-model", "name=a", "--gate", "tensors"])
    assert exit_.value.code == 0 and "runs/a: mixtral, 0.02M parameters" in capsys.readouterr().out
    assert "*.safetensors" in asked["someone/some-model"]["allow_patterns"]
    assert not any(".bin" in pattern or ".py" in pattern for pattern in asked["someone/some-model"]["allow_patterns"])
