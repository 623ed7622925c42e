"""Conversations through the token cache: what its name depends on, what is counted, streams, tokenizers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.batches.stream import TrainStream
from trainer.data.chat.config import ChatTemplateConfig
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.sources.registry import (
    ChatSourceConfig,
    HfChatSourceConfig,
    HfChatStreamSourceConfig,
    JsonlSourceConfig,
    SourceConfig,
)
from trainer.data.tokenizers.registry import BPETokenizerConfig

USER, ASSISTANT, END, EOD = 249, 250, 254, 255


def chat(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


ROWS = [chat(f"question {i}", "yes" * (1 + i % 3)) for i in range(60)]


def write(rows: list[dict[str, Any]], name: str = "a.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def corpus_of(*sources: SourceConfig, seq_len: int | None = 64, **options: Any) -> Corpus:
    given: dict[str, Any] = {"packing": "bfd", "split": SplitConfig(fraction=0.3), "cache_dir": "cache"} | options
    return build_corpus(DataConfig(sources=list(sources), **given), seq_len=seq_len)


def told(corpus: Corpus, domain: int = 0) -> list[bytes]:
    file = corpus.train[domain]
    return [bytes(file.document(i)[0].tolist()) for i in range(file.num_documents)]


def test_the_cache_depends_on_the_row_and_the_template_for_conversations_only(folder):
    write(ROWS)
    write([{"text": f"text {i}"} for i in range(20)], "b.jsonl")
    sources = ChatSourceConfig(path="a.jsonl"), JsonlSourceConfig(path="b.jsonl")
    Path("own.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    first, again, longer, other = (
        corpus_of(*sources, seq_len=seq_len, chat_template=ChatTemplateConfig(path=path)).folders
        for seq_len, path in ((64, None), (64, None), (65, None), (64, "own.jinja"))
    )
    assert first == again
    assert len({first[0], longer[0], other[0]}) == 3
    assert first[1] == longer[1] == other[1]


def test_conversations_need_the_length_of_a_row(folder):
    write(ROWS)
    with pytest.raises(ValueError, match="seq_len"):
        corpus_of(ChatSourceConfig(path="a.jsonl"), seq_len=None)


def test_what_is_dropped_is_counted_also_where_bad_rows_are_errors(folder):
    write([ROWS[0], chat("long", "x" * 99), *ROWS[1:]])
    corpus = corpus_of(ChatSourceConfig(path="a.jsonl", truncate="drop"))
    (skipped,) = corpus.skipped
    assert skipped.records.reasons == {"longer than a row": 1}
    assert skipped.records.first[0].startswith("a.jsonl:2: the conversation has 107 tokens")
    assert corpus.train[0].num_documents + corpus.validation[0].num_documents == len(ROWS)


@pytest.mark.parametrize("kind", ["auto", "tail"])
def test_a_conversation_is_never_divided(folder, fails, kind):
    write(ROWS[:1])
    with fails(
        "data.split: domain chat has one conversation, which is not divided; one is learned and another one held out; "
        "give it more conversations"
    ):
        corpus_of(ChatSourceConfig(path="a.jsonl"), split=SplitConfig(kind=kind))


def test_auto_moves_a_conversation_to_an_empty_side_with_its_mask(folder):
    rows = [chat("a", "b"), chat("c", "d")]
    for row in rows:
        row["messages"] += [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    write(rows)
    corpus = corpus_of(ChatSourceConfig(path="a.jsonl"), split=SplitConfig(fraction=1e-9))
    sides = [file.document(0) for file in (corpus.train[0], corpus.validation[0])]
    assert {bytes(tokens.tolist())[1:2] for tokens, _ in sides} == {b"a", b"c"}
    for tokens, is_learned in sides:
        assert bytes(np.append(tokens, EOD)[is_learned].tolist())[1:] == b"\xfe!\xfe\xff"
    assert "moved the text with the nearest hash" in corpus.remarks[0]


def test_evaluation_is_of_the_answers(folder):
    write(ROWS)
    corpus = corpus_of(ChatSourceConfig(path="a.jsonl"))
    batches = evaluation_batches(corpus, 0, packing="bfd", seq_len=64, batch_size=4, max_tokens=None)
    targets = np.concatenate([batch.targets[batch.target_mask].numpy() for batch in batches])
    answers = [token for token in targets.tolist() if token < 248]
    num_documents = corpus.validation[0].num_documents
    assert set(bytes(answers)) == set(b"yes")
    assert Counter(targets.tolist())[END] == Counter(targets.tolist())[EOD] == num_documents
    assert int(corpus.tokenizer.token_bytes()[targets].sum()) == len(answers), "markers have no bytes"


def test_hugging_face_reads_the_same(folder):
    write(ROWS)
    options: dict[str, Any] = {"path": "json", "data_files": "a.jsonl", "domain": "d", "truncate": "drop"}
    ours = corpus_of(ChatSourceConfig(path="a.jsonl", domain="d"))
    assert corpus_of(HfChatSourceConfig(**options)).fingerprint == ours.fingerprint
    write([chat("long", "x" * 99), *ROWS])
    streamed = corpus_of(HfChatStreamSourceConfig(block_tokens=200, **options))
    stream = TrainStream(streamed, packing="bfd", seq_len=64, seed=0)
    rows, read = stream.domain_rows[0], []
    while rows.epochs(len(read) + 1) < 1:  # a row at a time, to the end of the first epoch
        read.append(rows.read(np.array([len(read)])))
        assert len(read) < len(ROWS)
    targets = Counter(int(t) for row in read for t in row.targets[row.is_real & row.loss_mask.astype(bool)])
    assert targets[END] == targets[EOD] == ours.train[0].num_documents
    (skipped,) = streamed.skipped
    assert (skipped.block, skipped.records.reasons) == (0, {"longer than a row": 1})


def test_a_tokenizer_is_trained_on_what_is_said(folder):
    write([chat("x" * 500, "yes yes yes"), *ROWS])  # longer than a row of bytes
    tokenizer = BPETokenizerConfig(vocab_size=270, chat=True)
    corpus = corpus_of(ChatSourceConfig(path="a.jsonl", truncate="left"), tokenizer=tokenizer, seq_len=600)
    tokens, is_learned = corpus.train[0].document(0)
    decoded = corpus.tokenizer.decode(tokens.tolist()).decode()
    assert "question" in decoded or "xxx" in decoded
    answer = corpus.tokenizer.decode(tokens[is_learned[:-1]].tolist()).decode()
    assert answer.strip("yes ") == "" and answer
