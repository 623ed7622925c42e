"""Any texts, in any files and order: each document is held out by exactly one fold, together with all its copies."""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from trainer.data.config import DataConfig, FoldConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.records import json_lines
from trainer.data.sources.registry import JsonlSourceConfig
from trainer.data.token_cache import workers
from trainer.data.token_cache.folds import fold_of
from trainer.data.token_cache.token_files import TokenFile

Rows = list[tuple[str, str]]


def _corpus(rows: Rows, fold: FoldConfig, *, num_files: int, part_bytes: int) -> Corpus:
    for number in range(num_files):
        lines = [json.dumps({"q": q, "a": a}) + "\n" for q, a in rows[number::num_files]]
        Path(f"{number}.jsonl").write_text("".join(lines))
    source = JsonlSourceConfig(path="*.jsonl", text="{a}", prompt="{q}", domain="d")
    with mock.patch.object(json_lines, "_PART_BYTES", part_bytes), mock.patch.object(json_lines, "_CHUNK_BYTES", 50):
        return build_corpus(DataConfig(sources=[source], fold=fold, cache_dir="cache", workers=1))


def _texts(file: TokenFile) -> Counter[bytes]:
    return Counter(bytes(file.document(index)[0]) for index in range(file.num_documents))


word = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])  # to shrink takes minutes
@given(
    rows=st.lists(st.tuples(word, word), min_size=4, max_size=16),
    copies=st.integers(1, 3),
    of=st.integers(2, 4),
    seed=st.integers(0, 3),
    num_files=st.integers(1, 3),
    part_bytes=st.sampled_from([1, 100, 1 << 20]),
    drawn=st.randoms(use_true_random=False),
)
def test_each_document_is_held_out_once_with_its_copies(rows, copies, of, seed, num_files, part_bytes, drawn):
    rows = [*rows, *((a, q) for q, a in rows), *rows[:copies]]
    texts = Counter((q + a).encode() for q, a in rows)
    if {fold_of(text, of=of, seed=seed) for text in texts} != set(range(of)):
        return  # refused: a fold would be empty
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(workers, "_MIN_PROCESS_BYTES", 1):
        os.chdir(folder)
        try:
            held_out: Counter[bytes] = Counter()
            folds = [FoldConfig(index=index, of=of, seed=seed) for index in range(of)]
            for fold in folds:
                corpus = _corpus(rows, fold, num_files=num_files, part_bytes=part_bytes)
                train, validation = _texts(corpus.train[0]), _texts(corpus.validation[0])
                assert train + validation == texts and not train & validation, "no copy is learned and held out"
                held_out += validation
            assert held_out == texts
            shuffled = drawn.sample(rows, len(rows))  # other files, shards and order: the same fold
            for path in Path().glob("*.jsonl"):
                path.unlink()
            again = _texts(_corpus(shuffled, folds[0], num_files=1, part_bytes=1 << 20).validation[0])
            assert again == Counter({text: n for text, n in texts.items() if fold_of(text, of=of, seed=seed) == 0})
        finally:
            os.chdir(before)
