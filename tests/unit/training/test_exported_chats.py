"""A run trained on chats: its template in its folder, in a chat, and in what is exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_templates import STYLES
from trainer import train
from trainer.checkpoint.choice import NEWEST
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.convert.hf_export import ExportOptions, export
from trainer.data.corpus import build_corpus
from trainer.data.tokenizers.file import read_tokenizer
from trainer.experiment import ExperimentConfig
from trainer.families.registry import FAMILIES
from trainer.models.sampling import SamplingOptions
from trainer.training.chat_session import AnswerOptions, ChatSession
from trainer.training.load_trained import load_trained
from trainer.training.run_template import chat_encoder, kept_template

MESSAGES = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Hello <|im_end|>"},
    {"role": "assistant", "content": "\u00e9t\u00e9"},
]
CONFIG = """\
name: x
model: {d_model: 16, num_layers: 1, num_heads: 2, seq_len: 128, d_ff: 16, moe: {num_experts: 2, d_ff: 8}}
train: {steps: 1, global_batch_size: 2}
schedule: {kind: warmup_cosine, warmup_steps: 0}
data:
  sources: [{kind: chat, path: chats.jsonl}]
  packing: bfd
  split: {kind: tail}
  tokenizer: {kind: file, path: theirs}
parallel: {device: cpu}
eval: {every: 1}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    """Return the config of a run on one conversation, many times, with the tokenizer and template of a folder."""
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(f"{json.dumps({'messages': MESSAGES})}\n" * 40)
    Path("x.yaml").write_text(CONFIG)
    STYLES[0].write(Path("theirs"))
    return load(Path("x.yaml"), [], ExperimentConfig)


def test_a_run_speaks_as_it_was_trained_wherever_it_is(config: ExperimentConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    train(config)
    folder = RunFolder(Path("runs/x"))
    tokenizer = read_tokenizer(folder.path, end_of_document=None)
    template = kept_template(config, folder)
    assert template is not None and template.text == STYLES[0].text
    encoder = chat_encoder(config, template, tokenizer)
    document = encoder.encode(MESSAGES).ids.tolist()
    file = build_corpus(config.data, tokenizer=tokenizer, seq_len=128).train[0]
    assert file.tokens[: len(document)].tolist() == document

    export(config, folder, tmp_path / "out", ExportOptions(family=FAMILIES["mixtral"], gate="tensors"), warn=print)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = [MESSAGES[0], {"role": "user", "content": "Hello"}, MESSAGES[2]]
    for messages, prompt in ((plain, False), (plain[:2], True)):
        got = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        ours = encoder.prompt(messages) if prompt else encoder.encode(messages).ids
        assert got == [tokenizer.end_of_document, *ours.tolist()], "as rows begin"

    # Greedy answers, with the history of earlier ones.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    special = tokenizer.special_tokens()
    assert model.generation_config.eos_token_id == [special["<|endoftext|>"], special["<|im_end|>"]]
    engine, _, _ = load_trained(config, folder, NEWEST, warn=print)
    greedy, before = SamplingOptions(temperature=0), (tokenizer.end_of_document,)
    options = AnswerOptions(sampling=greedy, max_tokens=9, first_tokens=before)
    session = ChatSession(engine.model, encoder, options, system="Be terse.")
    said: list[dict[str, str]] = [{"role": "system", "content": "Be terse."}]
    for question in ("Hello", "\u00e9t\u00e9 \u6642"):
        said.append({"role": "user", "content": question})
        ids = theirs.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        answer = tokenizer.decode(made[0, ids.shape[1] :].tolist()).decode(errors="replace")
        assert "".join(session.answer(question)) == answer
        said.append({"role": "assistant", "content": answer})
    assert session.messages() == said
