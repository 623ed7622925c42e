"""Law: a model of transformers that routes otherwise than its router would is replayed here, to the same logits.

The engine is transformers' own code with noise in what its routers select by, as other kernels and batches have it.
What it returns is written as vLLM and SGLang write it, read, and packed into rows.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import transformers_models
from tests.builders import make_model, tiny_model_config
from trainer.data.batches.assemble import assemble
from trainer.models.config import ModelConfig
from trainer.models.generation import ReadTokens, generate
from trainer.models.gpt import GPT
from trainer.models.sampling import SamplingOptions
from trainer.routing_record.engine_outputs import import_engine_outputs
from trainer.routing_record.record_reader import RoutingRecord
from trainer.routing_record.sequence_rows import RecordedSequences

LENGTHS, SEQ_LEN = (6, 5, 9, 3), 12


@pytest.fixture(scope="module")
def model() -> tuple[ModelConfig, GPT]:
    """A model with a dense layer first, in float64."""
    moe = {"num_experts": 6, "first_dense_layers": 1, "router": {"kind": "top_k", "top_k": 3}}
    config = tiny_model_config(moe, num_layers=3, qk_norm=True, document_mask=True, seq_len=SEQ_LEN)
    return config, make_model(config, dtype=torch.float64)


@pytest.fixture(scope="module")
def outputs(model: tuple[ModelConfig, GPT]) -> list[tuple[list[int], Tensor, Tensor]]:
    """Ids (n,), experts (n, MoE layers, k) and logits (n, V) of each sequence, from transformers."""
    theirs = transformers_models.build("qwen3_moe", model[1])
    drawn = torch.Generator().manual_seed(0)
    chosen: list[Tensor] = []

    def choose_otherwise(module: Any, _: Any, output: Any) -> Any:
        probs = output[0].softmax(-1)
        noise = torch.rand(probs.shape, generator=drawn, dtype=probs.dtype)
        index = (probs + 0.3 * noise).topk(3, dim=-1).indices
        weight = probs.gather(-1, index)
        chosen.append(index)
        return output[0], weight / weight.sum(-1, keepdim=True), index

    hooks = [m.register_forward_hook(choose_otherwise) for m in theirs.modules() if "TopKRouter" in type(m).__name__]
    assert len(hooks) == 2
    found = []
    for length in LENGTHS:
        ids = torch.randint(0, 32, (1, length), generator=drawn)
        chosen.clear()
        with torch.no_grad():
            logits = transformers_models.their_logits(theirs, ids, None)[0]
        found.append((ids[0].tolist(), torch.stack(chosen, dim=1), logits))
    return found


def _npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def _written(experts: Tensor, form: str) -> dict[str, Any]:
    """Return the experts (n, 2, k) of layers 1 and 2 as an engine returns them."""
    read = experts[:-1].numpy().astype(np.int32)  # the last token is written and never read
    whole = np.zeros((len(read), 3, 3), np.int32)
    whole[:, 1:] = read
    match form:
        case "vLLM: all layers, a list":
            return {"routed_experts": whole.tolist()}
        case "vLLM over HTTP: .npy in base64":
            return {"routed_experts": _npy(whole.astype(np.uint8))}
        case "vLLM 0.21: prompt apart, MoE layers":
            return {"prompt_routed_experts": read[:2].tolist(), "routed_experts": experts[2:].tolist()}
        case _:  # SGLang
            return {"meta_info": {"routed_experts": base64.b64encode(whole.tobytes()).decode()}}


FORMS = (
    "vLLM: all layers, a list",
    "vLLM over HTTP: .npy in base64",
    "vLLM 0.21: prompt apart, MoE layers",
    "SGLang: flat int32 in base64",
)


def test_an_engines_experts_give_its_logits(
    model: tuple[ModelConfig, GPT], outputs: list[tuple[list[int], Tensor, Tensor]], tmp_path: Path
) -> None:
    config, ours = model
    lines = []
    for (ids, experts, _), form in zip(outputs, FORMS, strict=True):
        names = ("input_ids", "output_ids") if form.startswith("SGLang") else ("prompt_token_ids", "token_ids")
        lines.append({names[0]: ids[:2], names[1]: ids[2:], **_written(experts, form)})
    (tmp_path / "out.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    import_engine_outputs([tmp_path / "out.jsonl"], tmp_path / "record", config, made_by="a test")
    rows = RecordedSequences(RoutingRecord(tmp_path / "record"), seq_len=SEQ_LEN, seed=0)
    visits = np.arange(rows.num_rows)
    assert rows.num_rows < len(LENGTHS), "some share a row"
    batch = assemble([(visits, rows.read(visits))], domain=0 * visits, sample_id=visits, seq_len=SEQ_LEN)
    with torch.no_grad():
        replayed, live = (
            ours(batch, want_logits=True),
            ours(
                type(batch)(**{name: part for name, part in batch.tensors().items() if name != "experts"}),
                want_logits=True,
            ),
        )
    for number, (ids, _, logits) in enumerate(outputs):
        here = (batch.document_id == number) & batch.valid
        assert batch.tokens[here].tolist() == ids[:-1] and batch.targets[here].tolist() == ids[1:]
        assert batch.loss_mask[here].tolist() == [False] + [True] * (len(ids) - 2), "what was written is learned"
        torch.testing.assert_close(replayed.logits[here], logits[:-1], rtol=0, atol=1e-12)
        assert (live.logits[here] - logits[:-1]).abs().max() > 1e-3, "the router itself chooses otherwise"
    assert all(stats.replaced is not None and stats.replaced.any() for stats in replayed.moe)


def test_generated_tokens_have_the_experts_of_a_forward_pass(model: tuple[ModelConfig, GPT]) -> None:
    """Also after the cache was full, and where the text ends with the token that stops it."""
    ours, read = model[1], list[ReadTokens]()
    drawn, options = torch.Generator().manual_seed(0), SamplingOptions(temperature=1.0)
    tokens = list(generate(ours, [1, 2, 3], max_new_tokens=20, options=options, generator=drawn, read=read))
    assert len(read) == 3 and read[0].tokens == [1, 2, 3, *tokens[:10]] and read[-1].tokens[-1] == tokens[-1]
    assert [len(part.tokens) - len(part.experts) for part in read] == [1, 1, 0]
    assert sum(len(part.tokens) - part.num_given for part in read) == 20, "each is learned once"
    again, stopped = list[ReadTokens](), torch.Generator().manual_seed(0)
    limits: dict[str, Any] = {"max_new_tokens": 20, "stop_token": tokens[3]}
    short = list(generate(ours, [1, 2, 3], options=options, generator=stopped, read=again, **limits))
    assert again[0].tokens == [1, 2, 3, *short, tokens[3]]
    for part in [*read, *again]:
        ids = torch.tensor([part.tokens[: len(part.experts)]])
        cache = ours.new_cache(1, ids.shape[1], keeps_experts=True)
        with torch.no_grad():
            ours.next_logits(ids, cache)
        assert cache.experts is not None and torch.equal(cache.experts[0][0], part.experts)
