"""Law: the average of the weights is torch's, held and saved as the weights are, in any layout."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.builders import make_batch, make_engine_of, rows_of, tiny_model_config
from tests.checkpoint_helpers import save
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import check_fits
from trainer.checkpoint.coverage import AVERAGE, WEIGHT
from trainer.checkpoint.find_checkpoint import find
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state import TrainState
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.distributed.mesh import Mesh
from trainer.engine.base import UPDATES
from trainer.engine.config import EMAConfig
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.registry import NativeEngineConfig
from trainer.engine.step import StepEngine
from trainer.engine.weight_average import WeightAverage
from trainer.errors import CheckpointError
from trainer.models.config import ModelConfig
from trainer.models.lora_config import LoRAConfig
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

ROWS, STEPS, RATE = 4, 6, 1e-2
EMA = EMAConfig(decay=0.75, start_step=1, every=2)
SKIPPED = 3  # number of the step that is skipped


class Where(NamedTuple):
    """A layout."""

    ep_size: int = 1
    is_sharded: bool = False
    zero_stage: int | None = None


WHERES = [Where(), Where(2), Where(is_sharded=True), Where(2, is_sharded=True)]


def _model(num_experts: int = 3) -> ModelConfig:
    return tiny_model_config({"num_experts": num_experts, "router": {"kind": "bias_balanced"}})


def _engine(
    where: Where, ema: EMAConfig | None = EMA, *, model: ModelConfig | None = None, freeze: tuple[str, ...] = ()
) -> StepEngine:
    is_alone = not torch.distributed.is_initialized()
    dispatcher = {"kind": "all_to_all" if where.ep_size > 1 else "local"}
    data = {"data": "shard" if where.is_sharded else "replicate", "shard_keeps": "weights"}
    is_native = where.zero_stage is None
    return make_engine_of(
        NativeEngineConfig() if where.zero_stage is None else DeepSpeedEngineConfig(zero_stage=where.zero_stage),
        model or _model(),
        dtype=torch.float64 if is_native else torch.float32,
        mesh=Mesh.of_one() if is_alone else mesh_here(ep_size=where.ep_size),
        parallel=ParallelConfig.model_validate({"ep_size": where.ep_size, "dispatcher": dispatcher, **data}),
        ema=ema,
        freeze=freeze,
        weight_decay=0.1,
    )


def _step(engine: StepEngine, step: int) -> None:
    layout = engine.mesh.layout
    share = ROWS // layout.world_size
    batch = make_batch(ROWS, 8, seed=step, first_sample=ROWS * step)
    mine = rows_of(batch, share * layout.rank, share * (layout.rank + 1))
    result = engine.train_step([mine], lr=RATE, skip_above=0.0 if step == SKIPPED else None)
    assert result.skipped is (step == SKIPPED)


def _whole(engine: StepEngine) -> dict[str, Tensor]:
    """Return the whole state on every rank."""
    slices = gather_state(engine.state(), engine.mesh).slices
    found = [{name: part.tensor.detach().clone() for name, part in slices.items()}]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    return found[0]


def _average(engine: StepEngine) -> WeightAverage:
    assert engine.average is not None
    return engine.average


def _loss(engine: StepEngine) -> float:
    return engine.eval_loss(make_batch(2, 8, seed=99), dropless=True).loss_sum


def _averages(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in whole.items() if name.startswith(AVERAGE)}


def _is_torchs(where: Where, rtol: float = 1e-12) -> None:
    """Compare the average with torch's, made from the whole weights of each step."""
    with closing(_engine(where)) as engine:
        learning = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
        start = _whole(engine)
        plain = nn.ParameterDict({n.replace(".", "/"): nn.Parameter(start[WEIGHT + n]) for n in learning})
        theirs, taken = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(EMA.decay)), 0
        for step in range(STEPS):
            _step(engine, step)
            whole = _whole(engine)
            with torch.no_grad():
                for name in learning:
                    plain[name.replace(".", "/")].copy_(whole[WEIGHT + name])
            taken += step != SKIPPED
            if (taken - EMA.start_step) % EMA.every == 0 and step != SKIPPED:  # torch's first update copies
                theirs.update_parameters(plain)
            if taken >= EMA.start_step:
                for name, p in theirs.module.items():  # pyrefly: ignore[not-callable]
                    mine, p = whole[AVERAGE + name.replace("/", ".")], p.detach()
                    assert float((mine - p).abs().max()) <= rtol * max(1.0, float(p.abs().max())), (where, step, name)
        whole = _whole(engine)
        assert set(_averages(whole)) == {AVERAGE + name for name in learning}, "buffers have none"
        assert engine.state().values[UPDATES] == 2
        assert any(not torch.equal(whole[AVERAGE + n], whole[WEIGHT + n]) for n in learning)


def _is_used_and_put_back(where: Where) -> None:
    """Evaluate raw, averaged and raw weights, and go on, beside an engine that does not evaluate."""
    with closing(_engine(where)) as engine, closing(_engine(where)) as quiet, closing(_engine(where, None)) as loaded:
        for step in range(STEPS - 1):
            _step(engine, step)
            _step(quiet, step)
        raw, before = _loss(engine), _whole(engine)
        with _average(engine).in_use():
            averaged, inside = _loss(engine), _whole(engine)
        assert _loss(engine) == raw != averaged
        for name in engine.learning:
            assert torch.equal(inside[WEIGHT + name], before[AVERAGE + name]), name
        for name, tensor in _whole(engine).items():
            assert torch.equal(tensor, before[name]), name
        loaded.load_state(_state_like(loaded, before))
        assert _loss(loaded) == averaged
        _step(engine, STEPS)
        _step(quiet, STEPS)
        after = _whole(quiet)
        for name, tensor in _whole(engine).items():
            assert torch.equal(tensor, after[name]), (where, name)


def _state_like(engine: StepEngine, whole: dict[str, Tensor]) -> TrainState:
    """Return a state with averages in the place of the weights."""
    slices = {}
    for name, part in engine.wanted().slices.items():
        average = AVERAGE + name.removeprefix(WEIGHT)
        tensor = whole[average if name.startswith(WEIGHT) and average in whole else name]
        slices[name] = replace(part, tensor=tensor[part.start : part.start + part.length] if tensor.dim() else tensor)
    return TrainState(slices=slices, values={"optimizer_steps": 0})


@contextmanager
def _loaded(folder: Path, step: int, engine: StepEngine) -> Iterator[StepEngine]:
    with closing(engine):
        found = find(CheckpointFolder(folder), step)
        check_fits(found, engine.wanted())
        with StoredTensors(found.path, found.manifest) as tensors:
            engine.load_state(tensors.like(engine.wanted()))
        yield engine


def _resumes(folder: Path, wheres: list[Where], rtol: float = 1e-12) -> None:
    """Save in each layout and load in it and in the two after it."""
    for index, first in enumerate(wheres):
        with closing(_engine(first)) as engine:
            for step in range(STEPS - 1):
                _step(engine, step)
            saver = Saver(CheckpointFolder(folder), engine.mesh)
            saver.start(index + 1, engine.state(), {}, prunes=False)
            saved = saver.wait()
            assert saved is not None and saved.error is None, saved
            saver.close()
            before = _whole(engine)
            _step(engine, STEPS)
            after = _whole(engine)
        for second in (wheres * 2)[index : index + 3]:
            with _loaded(folder, index + 1, _engine(second)) as resumed:
                assert resumed.state().values == {"optimizer_steps": STEPS - 2, UPDATES: 1}
                for name, tensor in _whole(resumed).items():
                    assert torch.equal(tensor, before[name]), (first, second, name)
                _step(resumed, STEPS)
                for name, tensor in _whole(resumed).items():
                    tolerance = 0.0 if first == second else rtol * max(1.0, float(after[name].abs().max()))
                    assert float((tensor - after[name]).abs().max()) <= tolerance, (first, second, name)


def _all(folder: Path) -> None:
    for where in WHERES[1:]:
        _is_torchs(where)
        _is_used_and_put_back(where)
    _resumes(folder, WHERES)


def test_the_average_is_torchs_in_one_process() -> None:
    _is_torchs(Where())
    _is_used_and_put_back(Where())


def test_on_two_ranks_it_is_torchs_is_evaluated_and_resumes_in_another_layout(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, _all, tmp_path)


def _all_of_deepspeed(folder: Path) -> None:
    _is_torchs(Where(2, zero_stage=1), 1e-6)
    wheres = [Where(2, zero_stage=1), Where(zero_stage=2)]
    for where in wheres:
        _is_used_and_put_back(where)
    _resumes(folder, wheres, 1e-6)


@pytest.mark.nightly
def test_deepspeed_has_it_too_evaluates_it_and_resumes_at_another_stage(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    ranks.run(2, _all_of_deepspeed, tmp_path)


def test_a_lower_decay_at_first_forgets_the_first_weights() -> None:
    engine = _engine(Where(), EMAConfig(decay=0.15, warmup=True))
    expected = engine.model.get_parameter("head.weight").detach().clone()
    for step, decay in enumerate([1 / 10, 0.15, 0.15]):  # then 2 / 11 > 0.15
        _step(engine, step)
        expected = decay * expected + (1 - decay) * engine.model.get_parameter("head.weight").detach()
    torch.testing.assert_close(_average(engine).tensors["head.weight"], expected, rtol=1e-12, atol=1e-12)


def test_frozen_weights_have_no_average_and_adapters_have_one() -> None:
    engine = _engine(Where(), freeze=("router", "embedding"))
    learning = {name for name, p in engine.model.named_parameters() if p.requires_grad}
    assert set(_average(engine).tensors) == learning and "embedding.weight" not in learning
    adapted = _engine(Where(), model=_model().model_copy(update={"lora": LoRAConfig(rank=2)}))
    assert _average(adapted).tensors and all("lora" in name for name in _average(adapted).tensors)


def test_it_can_be_turned_on_and_off_in_an_old_run(tmp_path: Path) -> None:
    old = _engine(Where(), None)
    _step(old, 0)
    save(tmp_path, 1, old.state())
    with _loaded(tmp_path, 1, _engine(Where())) as on:
        for name, weight in on.learning.items():
            assert torch.equal(_average(on).tensors[name], weight), "it begins at the weights of the checkpoint"
        _step(on, 1)
        _step(on, 2)
        save(tmp_path, 2, on.state())
    with _loaded(tmp_path, 2, _engine(Where(), None)) as off:
        assert UPDATES not in off.state().values and not _averages(_whole(off))
    with _loaded(tmp_path, 2, _engine(Where(), freeze=("experts",))) as fewer:  # these lose their averages
        save(tmp_path, 3, fewer.state())
    with _loaded(tmp_path, 3, _engine(Where())) as again:
        w_in = again.learning["blocks.0.ffn.experts.w_in"]
        assert torch.equal(_average(again).tensors["blocks.0.ffn.experts.w_in"], w_in)
        assert not torch.equal(_average(again).tensors["head.weight"], again.learning["head.weight"])


def test_a_checkpoint_that_lacks_some_averages_is_refused(tmp_path: Path) -> None:
    state = _engine(Where()).state()
    lacking = {name: part for name, part in state.slices.items() if name != "ema.head.weight"}
    save(tmp_path, 1, type(state)(slices=lacking, values=state.values))
    with pytest.raises(CheckpointError, match=r"ema\.head\.weight is not in it"):
        check_fits(find(CheckpointFolder(tmp_path), 1), _engine(Where()).wanted())
    lacking = {name: part for name, part in state.slices.items() if name != "ema.blocks.0.ffn.experts.w_in"}
    with pytest.raises(CheckpointError, match=r"ema\.blocks\.0\.ffn\.experts\.w_in of \[3, 24, 16\] is missing"):
        save(tmp_path, 2, type(state)(slices=lacking, values=state.values))
