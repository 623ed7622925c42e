"""Any conversations become the documents and targets of a short definition, however they are read and split."""

import json
import os
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches.stream import TrainStream
from trainer.data.chat.chat_rows import parse_chat
from trainer.data.config import DataConfig, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.records import json_lines
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import Record
from trainer.data.sources.registry import ChatSourceConfig
from trainer.data.token_cache import workers
from trainer.data.token_cache.splits import is_held_out, tail_start
from trainer.data.token_cache.token_files import TokenFile

SEQ_LEN, EOD, END = 40, 255, 254
_MARKERS = {"system": 248, "user": 249, "assistant": 250, "tool": 251}
Documents = list[tuple[list[int], list[bool]]]


def rendered(messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """The definition: tokens of a conversation, and whether each of them and the end of the document is learned."""
    tokens, learned, is_learned = [], [], False
    for message in messages:
        is_learned = message["role"] == "assistant" and message.get("weight", 1) == 1
        content = [*message["content"].encode(), END]
        tokens += [_MARKERS[message["role"]], *content]
        learned += [False, *([is_learned] * len(content))]
    return tokens, [*learned, is_learned]


@contextmanager
def corpus_of(rows: list[Any], *, split: SplitConfig, part_bytes: int, num_workers: int = 1) -> Any:
    """Build a corpus in a folder of its own."""
    before = Path.cwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(json_lines, "_PART_BYTES", part_bytes),
        mock.patch.object(json_lines, "_CHUNK_BYTES", 100),
        mock.patch.object(workers, "_MIN_PROCESS_BYTES", 1),
    ):
        os.chdir(folder)
        try:
            Path("a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
            source = ChatSourceConfig(path="a.jsonl", domain="d", truncate="drop")
            yield build_corpus(
                DataConfig(sources=[source], packing="bfd", split=split, cache_dir="cache", workers=num_workers),
                seq_len=SEQ_LEN,
            )
        finally:
            os.chdir(before)


def documents_of(file: TokenFile) -> Documents:
    found = [file.document(index) for index in range(file.num_documents)]
    return [(tokens.tolist(), is_learned.tolist()) for tokens, is_learned in found]


def split_by_definition(rows: list[Any], split: SplitConfig) -> tuple[Documents, Documents]:
    texts = [parse_chat(Record("a", {"messages": row})).text for row in rows]
    if split.kind == "hash":
        held_out = [is_held_out(text, split.fraction) for text in texts]
    else:
        ends, start = np.cumsum([len(text) for text in texts]), tail_start(sum(map(len, texts)), split.fraction)
        held_out = [int(end) > start for end in ends]
    sides: tuple[Documents, Documents] = ([], [])
    for row, is_validation in zip(rows, held_out, strict=True):
        sides[is_validation].append(rendered(row))
    return sides


text = st.text(st.characters(codec="utf-8"), max_size=6)
exchange = st.tuples(text, text.filter(str.strip), st.sampled_from([None, None, 0, 1]))


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for asked, answer, weight in draw(st.lists(exchange, min_size=1, max_size=3)):
        flag = {} if weight is None else {"weight": weight}
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **flag}]
    messages[-1].pop("weight", None)  # something is learned
    return messages if draw(st.booleans()) else [*messages, {"role": "user", "content": draw(text)}]


FIRST, LAST = ([{"role": "user", "content": c}, {"role": "assistant", "content": c}] for c in "ad")
"""Of which the hash holds out one."""


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(conversations(), max_size=8),
    kind=st.sampled_from(["hash", "tail"]),
    fraction=st.sampled_from([0.2, 0.5]),
    part_bytes=st.sampled_from([1, 300, 1 << 20]),
)
def test_conversations_are_documents_and_their_answers_targets(rows, kind, fraction, part_bytes):
    split = SplitConfig(kind=kind, fraction=fraction)
    given = [FIRST, *rows, LAST]
    kept = [row for row in given if len(rendered(row)[0]) < SEQ_LEN]
    expected = split_by_definition(kept, split)
    if not all(expected):
        return
    with corpus_of(given, split=split, part_bytes=part_bytes) as corpus:
        assert (documents_of(corpus.train[0]), documents_of(corpus.validation[0])) == expected
        assert sum(one.records.count for one in corpus.skipped) == len(given) - len(kept)
        text_bytes = [token for side in expected for tokens, _ in side for token in tokens if token < 248]
        assert corpus.train[0].num_bytes + corpus.validation[0].num_bytes == len(text_bytes)
        targets = [
            token
            for tokens, learned in expected[0]
            for token, flag in zip([*tokens, EOD], learned, strict=True)
            if flag
        ]
        stream = TrainStream(corpus, packing="bfd", seq_len=SEQ_LEN, seed=0)
        epoch = stream.rows(0, stream.domain_rows[0].num_rows)
        assert Counter(epoch.targets[epoch.target_mask].tolist()) == Counter(targets)
        for row in range(len(epoch.tokens)):  # no conversation is in two rows
            present, lengths = np.unique(epoch.document_id[row][epoch.valid[row]], return_counts=True)
            assert lengths.tolist() == [len(expected[0][document][1]) for document in present]


def test_three_processes_read_what_one_reads():
    rows = [
        [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"a{i}", "weight": i % 2},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "so"},
        ]
        for i in range(40)
    ]
    split = SplitConfig(fraction=0.3)
    found: list[tuple[str, Documents]] = []
    for num_workers in (1, 3):
        with corpus_of(rows, split=split, part_bytes=700, num_workers=num_workers) as corpus:
            assert isinstance(corpus, Corpus)
            found.append((corpus.fingerprint, documents_of(corpus.train[0])))
    assert found[0] == found[1]
    assert found[0][1] == split_by_definition(rows, SplitConfig(kind="hash", fraction=0.3))[0]


KEYS = ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "instruction", "output", "history"]
KEYS += ["system", "tools", "role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "weight"]
WORDS = [
    "user",
    "assistant",
    "tool",
    "human",
    "gpt",
    "function_call",
    "",
    "x",
    "{}",
    "[1]",
    "\ud800",
    "\x1b[2J",
    "x" * 999,
]
scalar = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.sampled_from(WORDS)
anything = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(row=st.dictionaries(st.sampled_from(KEYS), anything, max_size=4))
def test_anything_is_a_conversation_or_a_short_line_with_its_place(row):
    try:
        parse_chat(Record("a.jsonl:1", row)).text.encode()
    except BadRecord as error:
        line = str(error)
        assert line.startswith("a.jsonl:1: ") and line.isprintable() and len(line) < 400
