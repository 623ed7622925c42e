"""A run goes on in another text: every domain where it was, or the new text from its beginning."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.texts import make_corpus_of, make_text
from trainer.data.batches.batch import Batch
from trainer.data.batches.stream import TrainStream
from trainer.data.batches.text_order import TextOrder, continued_order, describe_change, restarted_order
from trainer.data.config import DataConfig, Packing, SplitConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.sources.registry import HfStreamSourceConfig, SourceConfig, TextSourceConfig

A, B, C = (make_text(40, longest=9, seed=seed) for seed in range(3))
GROWN_B = make_text(55, longest=9, seed=1)
SEQ_LEN = 6


def _corpus(**texts) -> Corpus:
    corpus = make_corpus_of(*texts.values())
    return replace(corpus, domains=tuple(texts), contents=tuple(str(id(text)) for text in texts.values()))


def _stream(corpus: Corpus, packing: Packing = "bfd") -> TrainStream:
    return TrainStream(corpus, packing=packing, seq_len=SEQ_LEN, seed=5)


def _continued(before: TrainStream, corpus: Corpus, position: int, packing: Packing = "bfd") -> TrainStream:
    """Return the stream of a new text, resumed from what a checkpoint of the old one records."""
    saved = TextOrder.model_validate_json(before.text_order(position).model_dump_json())
    order = continued_order(saved, dict(zip(corpus.domains, corpus.contents, strict=True)), position=position)
    stream = _stream(corpus, packing)
    stream.resume_at({}, order)
    return stream


def _rows_of(batch: Batch, corpus: Corpus, name: str) -> list[tuple]:
    of = batch.domain[:, 0] == corpus.domains.index(name)
    return [tuple(row) for row in torch.stack([batch.tokens, batch.targets], 1)[of].flatten(1).tolist()]


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_an_unchanged_domain_goes_on_in_its_order_wherever_it_is_in_the_new_text(packing: Packing) -> None:
    """Of its visits, the first come from the old text's rows and the others from the new one's, as if nothing were."""
    old, new = _corpus(a=A, b=B), _corpus(c=C, b=GROWN_B, a=A)
    before = _stream(old, packing)
    after = _continued(before, new, 31, packing)
    assert after.first_slot == 31
    read = _rows_of(before.rows(0, 31), old, "a") + _rows_of(after.rows(31, 600), new, "a")
    assert read == _rows_of(_stream(old, packing).rows(0, 2000), old, "a")[: len(read)]


def test_a_changed_domain_goes_on_at_its_visits_and_a_new_one_begins() -> None:
    old, new = _corpus(a=A, b=B), _corpus(c=C, b=GROWN_B, a=A)
    before = _stream(old)
    after = _continued(before, new, 31)
    visits = before.text_order(31).domains
    alone = _rows_of(_stream(_corpus(other=C, b=GROWN_B)).rows(0, 4000), _corpus(other=C, b=GROWN_B), "b")
    assert _rows_of(after.rows(31, 300), new, "b")[:50] == alone[visits["b"].visits :][:50], "its key is still 1"
    order = after.text_order(31).domains
    assert (order["c"].first_visit, order["c"].key) == (0, 2), "a number that no other domain has"
    epoch = _rows_of(after.rows(31, 2000), new, "c")[: after.domain_rows[0].num_rows]
    assert max(Counter(epoch).values()) == 1 and after.epochs(31)["c"] == 0
    assert after.epochs(31)["b"] == visits["b"].visits / after.domain_rows[1].num_rows


def test_a_restarted_text_is_read_as_a_new_run_reads_it_under_numbers_that_go_on() -> None:
    new = _corpus(c=C, b=GROWN_B)
    stream = _stream(new)
    stream.resume_at({}, restarted_order(position=31))
    again, fresh = stream.rows(31, 500), _stream(new).rows(0, 500)
    assert torch.equal(again.tokens, fresh.tokens) and torch.equal(again.domain, fresh.domain)
    assert again.sample_id[:, 0].tolist() == list(range(31, 531)), "noise is keyed by it, and does not repeat"
    assert stream.epochs(31) == {"c": 0, "b": 0}


@pytest.mark.parametrize("how", ["continue", "restart"])
def test_a_second_checkpoint_after_the_change_says_where_the_rows_are(how: str) -> None:
    old, new, third = _corpus(a=A, b=B), _corpus(c=C, b=GROWN_B, a=A), _corpus(b=GROWN_B, d=B)
    stream = _stream(new)
    if how == "continue":
        stream = _continued(_stream(old), new, 31)
    else:
        stream.resume_at({}, restarted_order(position=31))
    resumed = _stream(new)
    resumed.resume_at({}, TextOrder.model_validate_json(stream.text_order(77).model_dump_json()))
    assert torch.equal(resumed.rows(77, 300).tokens, stream.rows(31, 400).tokens[46:346])
    assert resumed.text_order(200) == stream.text_order(200)
    twice = _continued(resumed, third, 90)
    read = _rows_of(stream.rows(31, 59), new, "b") + _rows_of(twice.rows(90, 300), third, "b")
    assert read == _rows_of(stream.rows(31, 2000), new, "b")[: len(read)]


def test_a_run_whose_text_never_changed_records_an_order_that_is_none() -> None:
    stream = _stream(_corpus(a=A, b=B))
    order = stream.text_order(40)
    assert [(d.key, d.first_visit) for d in order.domains.values()] == [(0, 0), (1, 0)] and order.start == 0
    again = _stream(_corpus(a=A, b=B))
    again.resume_at({}, order)
    assert torch.equal(again.rows(40, 90).tokens, stream.rows(40, 90).tokens)


def test_a_stream_goes_on_beside_a_new_source_and_begins_again_if_it_changed(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "text {i:03d}"}}\n' for i in range(60)))

    def corpus(*, others: int) -> Corpus:
        names = [f"o{i}" for i in range(others)]
        for name in names:
            (folder / f"{name}.txt").write_text(f"{name}bcdefgh" * 80)
        stream = HfStreamSourceConfig(path="json", data_files="rows.jsonl", block_tokens=120, domain="s")
        sources: list[SourceConfig] = [*(TextSourceConfig(path=f"{name}.txt", domain=name) for name in names), stream]
        return build_corpus(DataConfig(sources=sources, split=SplitConfig(fraction=0.2), cache_dir="cache"))

    old = corpus(others=1)
    before = _stream(old)
    before.load_blocks(0, 60, prefetch=False)
    read = _rows_of(before.rows(0, 60), old, "s")
    positions, saved = before.stream_positions(60), before.text_order(60)

    new = corpus(others=2)
    after = _continued(before, new, 60)
    after.resume_at(positions, after.text_order(60))
    after.load_blocks(60, 60, prefetch=False)
    read += _rows_of(after.rows(60, 60), new, "s")
    assert read == _rows_of(_stream(old).rows(0, 400), old, "s")[: len(read)]

    changed = dict(zip(new.domains, [*new.contents[:-1], "another"], strict=True))
    assert continued_order(saved, changed, position=60, streams={"s"}).domains["s"].first_visit == 0


def test_what_happens_to_each_domain_is_said() -> None:
    saved = _stream(_corpus(a=A, b=B, d=C, s=C)).text_order(31)
    contents = {"c": "", "b": "another", "a": str(id(A)), "s": "another"}
    said = describe_change("continue", saved, contents, position=31, streams={"s"})
    assert said == (
        "data.changed: continue: other text from row 31 of the run on; a: unchanged, goes on in its order; b: changed, "
        "goes on in the order of the new text (of this epoch, some rows are read again and others left out); "
        "s: a changed stream, read from its beginning; c: new, read from its beginning; d: no longer read"
    )
    said = describe_change("restart", saved, contents, position=31)
    assert said.endswith("from row 31 of the run on, read from its beginning, in epochs from 0")
