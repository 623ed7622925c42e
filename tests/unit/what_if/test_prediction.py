"""Predictions from a trace equal real evaluations to the last row: drops, rows of ranks, bytes that are sent."""

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.data.batches.assemble import row_slice
from trainer.data.batches.evaluation import evaluation_batches
from trainer.distributed.mesh import Mesh
from trainer.engine.base import RoutingSums
from trainer.errors import ConfigError, DataError
from trainer.lab.costs.message_counter import MessageCounter, call_of
from trainer.moe.routing import RoutingDecision
from trainer.training.routing_recorder import facts_of
from trainer.training.run import RunState
from trainer.training.setup import build_run
from trainer.training.trace_run import TraceOptions, record_trace
from trainer.what_if.evaluated_run import EvaluatedRun
from trainer.what_if.predicted_decision import predicted_decision
from trainer.what_if.prediction import Prediction
from trainer.what_if.scenarios import Scenarios, predict_all
from trainer.what_if.traced_passes import Trace

TOKENS = 16 * 20  # seven passes of three rows of 16, the last of two rows; the last step of two ranks has one pass
SKEWED = "model.init_std=1.0"  # so that experts overflow
ONE_LAYER = "model.moe.layers=[1]"
PADDED = "padded_all_to_all"
DISPATCHERS = ("all_to_all", "deduplicated_all_to_all", "all_gather", PADDED)


def _sources(folder: Path) -> list[str]:
    """Return the overrides of two domains of short documents, which leave padding; prompts, which nobody learns."""
    drawn = random.Random(0)
    for name, letters in (("a", "abcdefgh "), ("b", "jklmnop ")):
        documents = ["".join(drawn.choices(letters, k=drawn.randint(3, 30))) for _ in range(120)]
        if not (folder / f"{name}.jsonl").exists():
            rows = [{"prompt": one[:2], "text": one[2:]} for one in documents]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = "{{kind: jsonl, path: {0}/{1}.jsonl, domain: {1}, prompt: '{{prompt}}'}}"
    files = ", ".join(file.format(folder, name) for name in ("a", "b"))
    packed = "data.packing=bfd", "model.document_mask=true"
    return [f"data.sources=[{files}]", "data.tokenizer={kind: byte}", "data.split.fraction=0.4", *packed]


def _built(folder: Path, *overrides: str, mesh: Mesh | None = None) -> RunState:
    """Build an untrained run, whose weights depend on no override below."""
    config = config_of(folder, SKEWED, *_sources(folder), f"eval.max_tokens_per_domain={TOKENS}", *overrides)
    where = RunFolder(Path(config.runs_dir) / config.name)
    console = Console(config.train.steps, file=io.StringIO())
    return build_run(config, where, console, mesh or Mesh.of_one(), torch.device("cpu"))


def _traced(folder: Path, *overrides: str, num_ranked: int | None = 4) -> Path:
    """Trace an untrained run, and return the folder of the trace."""
    run = _built(folder, *overrides)
    facts = facts_of(run.config, run.corpus.tokenizer, origin="eval", step=0, domains=run.corpus.domains)
    options = TraceOptions(max_tokens=TOKENS, num_ranked=num_ranked)
    record_trace(run.config, run.engine, run.corpus, facts, folder / "t", options)
    return folder / "t"


def _evaluated(run: RunState, *, dropless: bool = False, top_k: int | None = None) -> RoutingSums:
    """Evaluate held-out text for real, and return the sums of the routing."""
    total, layout, rows = None, run.mesh.layout, run.config.parallel.micro_batch_size
    options: Any = {"packing": run.config.data.packing, "seq_len": run.config.model.seq_len, "max_tokens": TOKENS}
    size = rows * layout.world_size
    for batch in chain(*(evaluation_batches(run.corpus, domain, batch_size=size, **options) for domain in (0, 1))):
        local = row_slice(batch, rows * layout.rank, rows * (layout.rank + 1))
        sums = run.engine.eval_loss(local, dropless=dropless, top_k=top_k)
        total = sums if total is None else total + sums
    assert total is not None and total.routing is not None
    return total.routing


def _watched(run: RunState) -> list[RoutingDecision]:
    """Return a list that gets the decisions of a run's first MoE layer, after drops."""
    dispatcher, found = run.engine.model.moe_layers()[0].dispatcher, list[RoutingDecision]()
    begin = dispatcher.begin

    def watched(x: torch.Tensor, decision: RoutingDecision) -> Any:
        found.append(decision)
        return begin(x, decision)

    dispatcher.begin = watched  # type: ignore[method-assign]
    return found


def _predicted(trace: Path, run: RunState | None = None, **wanted: Any) -> Prediction:
    """Predict by a trace alone, or by an evaluation of its run."""
    traced = None if run is None else _Loaded(run)
    (found,) = predict_all(trace, Scenarios(**wanted), traced)  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class _Loaded:
    """A `RunOfTrace` whose weights need no checkpoint."""

    run: RunState

    def load(self, trace: Trace) -> EvaluatedRun:
        return EvaluatedRun(trace, self.run.config, self.run.engine, self.run.corpus)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a trace of two MoE layers, and below it traces of one, for each scope of a capacity."""
    folder = tmp_path_factory.mktemp("what_if")
    _traced(folder, "name=traced")
    for scope in ("sequence", "rank"):
        (folder / scope).mkdir()
        _traced(folder / scope, "name=traced", ONE_LAYER, f"model.moe.capacity={{scope: {scope}, min: 1}}")
    yield folder


@pytest.mark.parametrize("policy", ["position", "choice_major", "probability", "random"])
@pytest.mark.parametrize("scope", ["sequence", "rank"])
def test_drops_equal_those_of_an_evaluation_at_that_capacity(folder: Path, policy: str, scope: str) -> None:
    """At other factors and k than those of the traced model, which had no capacity; all drops of its one MoE layer."""
    some, options = 0, [ONE_LAYER, "name=real", f"model.moe.capacity={{policy: {policy}, scope: {scope}, min: 1}}"]
    for factor, top_k in ((0.5, 2), (1.0, 1), (1.25, 3)):
        run = _built(folder / scope, *options, f"model.moe.capacity.factor={factor}")
        decisions = _watched(run)
        real = _evaluated(run, top_k=top_k)
        found = _predicted(folder / scope / "t", capacities=[factor], top_ks=[top_k], policy=policy)
        assert found.dropped == real.dropped.tolist() and found.assignments == real.counts.sum(1).tolist()
        assert found.drop_rate == float(real.dropped.sum()) / float(real.counts.sum())
        some += found.dropped[0]
        assert run.config.model.moe is not None
        trace, capacity = Trace(folder / scope / "t"), run.config.model.moe.capacity
        for traced, theirs in zip(trace.passes(), decisions, strict=True):  # who is dropped, to the token
            ours = predicted_decision(trace, traced, 0, top_k=top_k, capacity=capacity)
            assert torch.equal(ours.kept, theirs.kept) and ours.capacity == theirs.capacity
            for name in ("expert_index", "combine_weight"):
                assert torch.equal(getattr(ours, name)[ours.kept], getattr(theirs, name)[ours.kept]), name
    assert some > 20, "there is something to predict"


def test_the_first_of_several_layers_is_exact(folder: Path) -> None:
    """What it drops changes the input of the next, which a trace cannot know; its prediction is by the given input."""
    real = _evaluated(_built(folder, "model.moe.capacity={factor: 0.75}", "name=real"))
    found = _predicted(folder / "t", capacities=[0.75])
    assert found.dropped[0] == real.dropped[0] > 0 and found.exact_layers == 1
    assert found.assignments == real.counts.sum(1).tolist()
    nothing = _predicted(folder / "t", capacities=[None])
    assert nothing.dropped == [0, 0] and nothing.drop_rate == 0 and nothing.exact_layers == 2
    assert _predicted(folder / "t", capacities=[None], top_ks=[1]).exact_layers == 1


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_with_its_run_every_layer_is_exact(folder: Path, policy: str) -> None:
    """The run is evaluated; beside it stands what the trace alone would say, wrong for the second layer."""
    traced, capacity = _built(folder, "name=again"), f"model.moe.capacity={{policy: {policy}, min: 1, scope: rank}}"
    wrong = 0
    (folder / policy).mkdir()
    trace = _traced(folder / policy, "name=traced", capacity)
    for factor, top_k in ((0.5, 2), (1.0, 1), (0.75, 3)):
        real = _evaluated(_built(folder, "name=real", capacity, f"model.moe.capacity.factor={factor}"), top_k=top_k)
        found = _predicted(trace, traced, capacities=[factor], top_ks=[top_k])
        alone = _predicted(trace, capacities=[factor], top_ks=[top_k])
        assert found.dropped == real.dropped.tolist() and found.assignments == real.counts.sum(1).tolist()
        assert found.drop_rate == float(real.dropped.sum()) / float(real.counts.sum()) > 0
        assert (found.exact_layers, alone.exact_layers, found.estimate) == (2, 1, alone.dropped)
        wrong += alone.dropped[1] != found.dropped[1]
    assert wrong, "an estimate is one"
    assert traced.engine.model.moe_layers()[0].capacity.factor is None, "the model is as it was"


def test_a_run_that_is_not_the_traced_one_is_noticed(folder: Path) -> None:
    with pytest.raises(DataError, match=r"--run: MoE layer 0 chooses other experts than the trace has, which was made"):
        _predicted(folder / "t", _built(folder, "name=real", "seed=1"), capacities=[0.75])
    run = _built(folder, "name=later")
    with torch.no_grad():
        run.engine.parameters["blocks.1.ffn.router.gate.weight"].neg_()
    with pytest.raises(DataError, match=r"--run: MoE layer 1 chooses other experts"):
        _predicted(folder / "t", run, capacities=[0.75])
    other = _built(folder, "name=other", "data.split.fraction=0.3")
    with pytest.raises(DataError, match=r"--run: the run reads other text than the trace has"):
        _predicted(folder / "t", other, capacities=[0.75])


def test_a_router_without_scores_has_its_own_k_only(folder: Path) -> None:
    (folder / "hash").mkdir()
    hashed = "model.moe.router={kind: hash, top_k: 2}", "model.moe.balance.coef=0"
    trace = _traced(folder / "hash", "name=traced", *hashed, num_ranked=None)
    real = _evaluated(_built(folder / "hash", "name=real", *hashed, "model.moe.capacity.factor=0.75"))
    found = _predicted(trace, capacities=[0.75])
    assert found.dropped == real.dropped.tolist() and found.exact_layers == 2, "it reads no activations"
    assert min(real.dropped.tolist()) > 0
    with pytest.raises(ConfigError, match=r"--top-k: hash does not rank experts .* has only the 2 that it chose"):
        _predicted(trace, top_ks=[1])
    with pytest.raises(ConfigError, match=r"--top-k: 5 is more than 4, for which this trace lists experts"):
        _predicted(folder / "t", top_ks=[5])
    with pytest.raises(ConfigError, match=r"--ep-size: 5 is more than the 4 experts"):
        _predicted(folder / "t", ep_sizes=[5])
    with pytest.raises(ConfigError, match="padded_all_to_all needs a capacity"):
        _predicted(folder / "t", capacities=[None], dispatchers=["padded_all_to_all"])


def test_a_balanced_placement_is_beside_the_contiguous_one(folder: Path) -> None:
    found = _predicted(folder / "t", ep_sizes=[2], placements=["contiguous", "balanced"], capacities=[None]).layouts
    assert [layout.placement for layout in found] == ["contiguous", "balanced"]
    for plain, even in zip(*(layout.rows_per_rank for layout in found), strict=True):
        assert sum(plain) == sum(even) and max(even) <= max(plain)
    assert found[0].rows_per_rank != found[1].rows_per_rank


def _on_ranks(folder: Path, dispatcher: str, factor: float | None, *more: str) -> tuple[list[int], int]:
    """Return the rows that the experts of this rank compute in an evaluation, by layer, and the bytes it sends."""
    overrides = [f"parallel.dispatcher={dispatcher}", "parallel.ep_size=2", "name=real", *more]
    if factor is not None:
        overrides.append(f"model.moe.capacity.factor={factor}")
    run = _built(folder, *overrides, mesh=mesh_here(ep_size=2))
    layers = run.engine.model.moe_layers()
    rows = [0] * len(layers)

    def count(layer: int, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        local = len(layers[layer].experts.w_in) + len(options.get("copies", {"w_in": ()})["w_in"])
        is_row = (inputs[1] < local) & (inputs[2] != 0)  # rows of padding have no weight
        rows[layer] += int(is_row.sum())

    for number, layer in enumerate(layers):
        layer.experts.register_forward_pre_hook(
            lambda _, inputs, options, number=number: count(number, inputs, options), with_kwargs=True
        )
    with _RowsAndWeights(run.config.model.d_model) as counter:
        _evaluated(run, dropless=factor is None)
    run.engine.close()
    return rows, counter.num_bytes


class _RowsAndWeights(MessageCounter):
    """Counts rows, and the weights of experts, which have three dimensions."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = call_of(func, args)
        if call is not None and call.name.startswith(("alltoall", "allgather")):
            is_weight = call.name.startswith("alltoall") and args[1].dim() == 3
            self.num_bytes += call.bytes_sent if is_weight or call.width == self.width else 0
        return func(*args, **(kwargs or {}))


def _all_on_ranks(folder: Path) -> dict[str, tuple[list[int], int]]:
    """Evaluate by every dispatcher, dropless but for the padded one, which has static sizes with a capacity only.

    And with a capacity in both layers, and with copies of experts that are elsewhere.
    """
    found = {name: _on_ranks(folder, f"{{kind: {name}}}", None) for name in DISPATCHERS if name != PADDED}
    found[PADDED] = _on_ranks(folder / "sequence", f"{{kind: {PADDED}}}", 0.75, ONE_LAYER)
    found["both layers"] = _on_ranks(folder, "{kind: all_to_all}", 0.75)
    moved = "parallel.placement=round_robin", "parallel.replicas=1"
    return {**found, "moved": _on_ranks(folder, "{kind: all_to_all}", None, *moved)}


def test_rows_of_ranks_and_bytes_equal_the_real_ones(folder: Path, ranks: Ranks) -> None:
    found = ranks.run(2, _all_on_ranks, folder)
    steps = 2 * 4  # of two passes, but for the last one of each domain
    for name in found[0]:
        is_dropless = name not in (PADDED, "both layers")
        moved: dict[str, Any] = {"placements": ["round_robin"], "replicas": 1} if name == "moved" else {}
        kind = name if name in DISPATCHERS else "all_to_all"
        wanted: dict[str, Any] = {"ep_sizes": [2], "dispatchers": [kind], "capacities": [None if is_dropless else 0.75]}
        wanted |= moved
        run = _built(folder, "name=again") if name == "both layers" else None
        (layout,) = _predicted(folder / ("sequence/t" if name == PADDED else "t"), run, **wanted).layouts
        real = torch.tensor([rows for rows, _ in (rank[name] for rank in found)]).t()
        assert layout.rows_per_rank == real.tolist() and real[-1, 0] != real[-1, 1], name
        assert layout.bytes_per_step[kind] * steps * 2 == sum(rank[name][1] for rank in found), name
    with pytest.raises(ConfigError, match="--replicas: 3, and all other ranks of 2 together may have only 2 experts"):
        _predicted(folder / "t", ep_sizes=[2], replicas=3)


def test_a_modelled_step_follows_its_formula(folder: Path) -> None:
    """Without bandwidth or FLOPs to spare there is time: three forward passes of FLOPs, and rows sent twice."""
    wanted: dict[str, Any] = {"ep_sizes": [1, 2], "capacities": [None]}
    alone, two = _predicted(folder / "t", **wanted, speeds=(1e6, 1e30)).layouts
    sends = _predicted(folder / "t", **wanted, speeds=(1e30, 1e6)).layouts
    assert sends[0].step_ms["all_to_all"] == pytest.approx(0) and alone.bytes_per_step == {"all_to_all": 0}
    assert sends[1].step_ms["all_to_all"] == pytest.approx(2 * two.bytes_of_busiest["all_to_all"] / 1e6 * 1e3)
    assert alone.busiest_over_mean == 1 < two.busiest_over_mean <= two.worst_busiest_over_mean
    assert two.step_ms["all_to_all"] > 0 and alone.step_ms["all_to_all"] > 0
