"""A model with weights imported from DeepSpeed's own MoE layer computes the same logits."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests import imported_once
from tests.checkpoint_helpers import load
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.tools.import_deepspeed import read_deepspeed
from trainer.checkpoint.tools.translate import translate
from trainer.checkpoint.tools.weight_map import WeightMapConfig
from trainer.config.loader import load as load_config
from trainer.engine.deepspeed.start import join, load_deepspeed
from trainer.errors import CheckpointError, ConfigError
from trainer.experiment import ExperimentConfig
from trainer.models.gpt import GPT
from trainer.models.norm import RMSNorm
from trainer.ops.rotary import rotary_rates, rotary_table, rotate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CONFIG = """\
name: imported
model:
  num_layers: 2
  d_model: 16
  num_heads: 2
  seq_len: 16
  activation: swiglu
  moe: {num_experts: 4, d_ff: 12, router: {kind: top_k, top_k: 2}}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
train: {steps: 20, global_batch_size: 4}
eval: {max_tokens_per_domain: 128}
parallel: {micro_batch_size: 4}
"""
MAP = """\
weights:
  embedding.weight: wte.weight
  blocks.<layer>.attention_norm.weight: layers.<layer>.norm_1.weight
  blocks.<layer>.attention.qkv.weight: [layers.<layer>.q.weight, layers.<layer>.k.weight, layers.<layer>.v.weight]
  blocks.<layer>.attention.out.weight: layers.<layer>.o
  blocks.<layer>.ffn_norm.weight: layers.<layer>.norm_2.weight
  blocks.<layer>.ffn.router.gate.weight: layers.<layer>.moe.deepspeed_moe.gate.wg.weight
  blocks.<layer>.ffn.experts.w_in:
    - layers.<layer>.moe.deepspeed_moe.experts.deepspeed_experts.<expert>.gate.weight
    - layers.<layer>.moe.deepspeed_moe.experts.deepspeed_experts.<expert>.up.weight
  blocks.<layer>.ffn.experts.w_out: layers.<layer>.moe.deepspeed_moe.experts.deepspeed_experts.<expert>.down.weight
  norm.weight: norm.weight
  head.weight: lm_head.weight
transpose: ["*.o"]
ignore: ["layers.*.unused"]
"""
VOCABULARY = 256


class TheirExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 12, bias=False), nn.Linear(16, 12, bias=False)
        self.down = nn.Linear(12, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TheirLayer(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.norm_1, self.norm_2 = RMSNorm(16, 1e-6), RMSNorm(16, 1e-6)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.o = nn.Parameter(torch.randn(16, 16) * 0.1)  # (in, out), as in GPT-2
        self.register_buffer("unused", torch.zeros(3))
        self.moe = MoE(16, TheirExpert(), 4, ep_size, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
        with torch.no_grad():
            for norm in (self.norm_1, self.norm_2):
                norm.weight.fill_(1.0)

    def forward(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        heads = [part(self.norm_1(x)).view(*x.shape[:2], 2, 8).transpose(1, 2) for part in (self.q, self.k, self.v)]
        q, k, v = rotate(heads[0], rotary), rotate(heads[1], rotary), heads[2]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(x.shape) @ self.o
        y, balance, _ = self.moe(self.norm_2(x))
        return x + y, balance


class TheirModel(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(TheirLayer(ep_size) for _ in range(2))
        self.norm, self.lm_head = RMSNorm(16, 1e-6), nn.Linear(16, VOCABULARY, bias=False)
        with torch.no_grad():
            self.norm.weight.fill_(1.0)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, balance = self.wte(tokens), torch.zeros(())
        rotary = rotary_table(torch.arange(tokens.shape[1]), rotary_rates(8, 10000.0), x.dtype)
        for layer in self.layers:
            x, mine = layer(x, rotary)
            balance = balance + mine
        return self.lm_head(self.norm(x)), balance


def _tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(3))


def _write(folder: Path, ep_size: int, zero_stage: int) -> Tensor:
    """Train a DeepSpeed MoE model for some steps, save it and return its logits."""
    os.environ |= {"LOCAL_RANK": str(dist.get_rank())}
    deepspeed = load_deepspeed(torch.device("cpu"))
    join(deepspeed, mesh_here(ep_size=ep_size), torch.device("cpu"))
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(7 + dist.get_rank() % ep_size)
    model = TheirModel(ep_size)
    described = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "parameters"}
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(described, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": 100_000},
            "zero_allow_untested_optimizer": True,
        },
    )
    for _ in range(3):
        logits, balance = engine(_tokens())
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), _tokens()[:, 1:].flatten()) + 0.01 * balance
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag="mine")
    with torch.no_grad():
        logits, _ = engine(_tokens())
    engine.destroy()
    return logits


@pytest.fixture(scope="module")
def written(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A checkpoint of DeepSpeed with four experts sharded over 2 of 4 ranks, and its logits."""
    folder = tmp_path_factory.mktemp("theirs")
    logits = ranks.run(4, _write, folder / "saved", 2, 2)[0]
    return folder / "saved", logits


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "ours.yaml").write_text(CONFIG)
    (tmp_path / "map.yaml").write_text(MAP)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    return tmp_path


def _command(workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return imported_once.run(["-m", "trainer", *arguments], cwd=workplace)


def test_our_model_computes_the_same_logits_and_trains_on(written: tuple[Path, Tensor], workplace: Path) -> None:
    source, logits = written
    arguments = ["checkpoint", "import-deepspeed", "ours.yaml", str(source), "--map", "map.yaml"]
    refused = _command(workplace, *arguments)
    assert refused.returncode == 4 and "give --trust-checkpoint if you trust whoever wrote it" in refused.stderr
    assert not (workplace / "runs").exists()
    (workplace / "half.yaml").write_text(MAP.replace("  norm.weight: norm.weight\n", ""))
    half = _command(workplace, *arguments[:-1], "half.yaml", "--trust-checkpoint")
    assert half.returncode == 4 and "norm.weight: no line of the map says where it comes from" in half.stderr
    assert not (workplace / "runs").exists(), "a run without those weights would train from others"
    done = _command(workplace, *arguments, "--trust-checkpoint")
    assert done.returncode == 0, done.stderr
    assert "step_00000000: the weights of" in done.stdout
    tensors = load(workplace / "runs/imported/checkpoints", 0)
    config = load_config(workplace / "ours.yaml", [], ExperimentConfig)
    model = GPT(config.model, VOCABULARY, experts_kernel="loop")
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    cache = model.new_cache(4, 16)
    with torch.no_grad():
        mine = model.next_logits(_tokens(), cache)
    torch.testing.assert_close(mine, logits[:, -1], rtol=1e-5, atol=1e-5)

    again = _command(workplace, *arguments, "--trust-checkpoint")
    assert again.returncode == 2 and "has checkpoints; start a new run with name=" in again.stderr
    trained = _command(workplace, "train", "ours.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "resuming from runs/imported/checkpoints/step_00000000" in trained.stdout
    first = json.loads((workplace / "runs/imported/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1


def _shapes() -> tuple[dict[str, torch.Size], dict[str, int]]:
    config = ExperimentConfig.model_validate({"name": "x", "model": _model_section()})
    with torch.device("meta"):
        model = GPT(config.model, VOCABULARY)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return shapes, {name: 4 for name in shapes if ".experts." in name}


def _model_section() -> dict[str, Any]:
    import yaml

    return yaml.safe_load(CONFIG)["model"]


def _map(text: str, folder: Path) -> WeightMapConfig:
    (folder / "map.yaml").write_text(text)
    return load_config(folder / "map.yaml", [], WeightMapConfig)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("  norm.weight: norm.weight\n", "", "norm.weight: no line of the map says where it comes from"),
        ("  head.weight: lm_head.weight\n", "  head.weight: head.weight\n", "head.weight: is not in the checkpoint"),
        ('transpose: ["*.o"]', 'transpose: ["*norm.weight"]', "norm.weight: has 1 dimensions, and `transpose` is for"),
        (" layers.<layer>.k.weight,", "", "blocks.0.attention.qkv.weight: is [48, 16] here and [32, 16] there"),
        ('ignore: ["layers.*.unused"]', "", "layers.0.unused: is not used; map it, or name it under `ignore`"),
        (".<expert>.down.", ".0.down.", "is one tensor for each expert there; write <expert> for its number"),
        ("[layers.<layer>.q.weight,", "[norm.weight,", "norm.weight: cannot be put together with layers.0.k.weight"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    written: tuple[Path, Tensor], tmp_path: Path, before: str, after: str, said: str
) -> None:
    assert before in MAP
    theirs = read_deepspeed(written[0], is_trusted=True)
    map_ = _map(MAP.replace(before, after), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        translate(theirs, map_, *_shapes())
    assert said in str(caught.value)


def test_a_map_with_an_unresolvable_placeholder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"map.yaml:1:1: weights: layers.<layer>.x: <layer> is not in norm.weight"):
        _map("weights:\n  norm.weight: layers.<layer>.x\n", tmp_path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def _change(folder: Path, kind: str, proof: Path) -> None:
    main = folder / "mine/mp_rank_00_model_states.pt"
    match kind:
        case "an expert's file is lost":
            (folder / "mine/layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
        case "all files of a layer are lost":
            for path in (folder / "mine").glob("layer_1_expert_*"):
                path.unlink()
        case "an expert has another number":
            path = folder / "mine/layer_0_expert_1_mp_rank_00_model_states.pt"
            path.write_bytes((folder / "mine/layer_0_expert_2_mp_rank_00_model_states.pt").read_bytes())
        case "a file is cut off":
            main.write_bytes(main.read_bytes()[:1000])
        case "the tag leads elsewhere":
            (folder / "latest").write_text("../../etc")
        case "of stage 3":
            (folder / "mine/zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
        case "of two tensor-parallel ranks":
            (folder / "mine/mp_rank_01_model_states.pt").touch()
        case "of a pipeline":
            (folder / "mine/layer_00-model_states.pt").touch()
        case "nothing there":
            shutil.rmtree(folder)
        case "a bomb":
            main.write_bytes(pickle.dumps(Bomb(proof)))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("an expert's file is lost", "MoE layer 1 has 4 experts, and there are no files of 2"),
        ("all files of a layer are lost", "MoE layer 1 has 4 experts, and there are no files of 0, 1, 2, 3"),
        ("an expert has another number", "is not a weight of expert 1"),
        ("a file is cut off", "mp_rank_00_model_states.pt: cannot be read"),
        ("the tag leads elsewhere", "'../../etc' is not the name of a folder beside it"),
        ("of stage 3", "its weights are sharded over ranks (ZeRO 3); put them together with DeepSpeed first"),
        ("of two tensor-parallel ranks", "its weights are sharded over tensor-parallel ranks"),
        ("of a pipeline", "is of a pipeline"),
        ("nothing there", "is not a DeepSpeed checkpoint: it has no mp_rank_00_model_states.pt"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(
    written: tuple[Path, Tensor], tmp_path: Path, kind: str, said: str
) -> None:
    shutil.copytree(written[0], tmp_path / "copy")
    _change(tmp_path / "copy", kind, tmp_path / "proof")
    with pytest.raises(CheckpointError) as caught:
        read_deepspeed(tmp_path / "copy", is_trusted=True)
    assert said in str(caught.value)


def test_nothing_is_unpickled_before_the_user_trusts_it(written: tuple[Path, Tensor], tmp_path: Path) -> None:
    shutil.copytree(written[0], tmp_path / "copy")
    _change(tmp_path / "copy", "a bomb", tmp_path / "proof")
    with pytest.raises(CheckpointError, match="can run code when they are read"):
        read_deepspeed(tmp_path / "copy", is_trusted=False)
    assert not (tmp_path / "proof").exists()


def test_experts_of_different_shapes_are_an_error(tmp_path: Path) -> None:
    theirs = {"n": torch.ones(3), "x.0": torch.ones(2, 3), "x.1": torch.ones(3, 2)}
    map_ = _map("weights: {n: n, e: x.<expert>}\n", tmp_path)
    with pytest.raises(CheckpointError, match=r"e: experts have different shapes there: \[2, 3\], \[3, 2\]"):
        translate(theirs, map_, {"n": torch.Size([3]), "e": torch.Size([2, 2, 3])}, {"e": 2})


def test_a_placeholder_may_occur_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a.<layer>.<layer>: has <layer> more than once"):
        _map("weights:\n  a.<layer>.<layer>: x\n", tmp_path)
