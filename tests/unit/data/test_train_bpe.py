"""The tokenizer that a run trains on its own text."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import train_bpe
from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.config import DataConfig, Packing
from trainer.data.corpus import Corpus, build_corpus, build_tokenizer
from trainer.data.sources import text
from trainer.data.token_cache import workers
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.subword import SubwordTokenizer
from trainer.data.train_bpe import even_shares, training_pieces
from trainer.data.unigram import unigram_bits_per_byte
from trainer.errors import DataError

LEARNED = "the cat sat on the mat and the cat saw the rat\n" * 36
HELD_OUT = ("zyxw zyxwzyxw\n" * 20)[: len(LEARNED) // 9]


@pytest.fixture
def section(folder: Path) -> Callable[..., DataConfig]:
    """Return the data section of a text whose last part is held out."""
    (folder / "text.txt").write_text(LEARNED + HELD_OUT)

    def make(**options: Any) -> DataConfig:
        return DataConfig.model_validate(
            {
                "sources": [{"kind": "text", "path": "text.txt"}],
                "split": {"kind": "tail", "fraction": 0.1},
                "cache_dir": "cache",
                "tokenizer": {"kind": "bpe", "vocab_size": 270, **options},
            }
        )

    return make


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every training."""
    made: list[str] = []
    train = train_bpe._train

    def counting(*args: Any, **options: Any) -> str:
        made.append("trained")
        return train(*args, **options)

    monkeypatch.setattr(train_bpe, "_train", counting)
    return made


def built(section: DataConfig) -> SubwordTokenizer:
    tokenizer = build_tokenizer(section)
    assert isinstance(tokenizer, SubwordTokenizer)
    return tokenizer


def test_frequent_words_are_tokens_and_the_vocabulary_is_as_large_as_asked(section):
    tokenizer = built(section())
    assert tokenizer.vocab_size == 270
    assert len(tokenizer.encode(" the cat")) == 2
    assert tokenizer.decode([tokenizer.end_of_document]) == b""


def test_held_out_text_does_not_influence_training(section, folder):
    before = built(section())
    assert len(before.encode("zyxw")) == 4
    (folder / "text.txt").write_text(LEARNED + "w" * len(HELD_OUT))
    assert built(section()).files() == before.files()


def test_a_second_run_trains_nothing(section, trainings):
    assert built(section()).fingerprint == built(section()).fingerprint
    assert trainings == ["trained"]


def test_other_options_or_another_text_train_again(section, trainings, folder):
    built(section())
    built(section(min_frequency=3))
    built(section(vocab_size=265))
    built(section(max_train_bytes=100))
    (folder / "text.txt").write_text("A" + LEARNED + HELD_OUT)
    built(section())
    assert len(trainings) == 5


@pytest.mark.parametrize("name", ["tokenizer.json", "fingerprint"])
@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_a_damaged_cache_is_trained_again_with_a_message(section, trainings, folder, caplog, name, damage):
    first = built(section())
    (place,) = (folder / "cache").glob("bpe-*/")
    file = place / name
    if damage == "flipped":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert built(section()).fingerprint == first.fingerprint
    assert len(trainings) == 2
    message = f"{place.relative_to(folder)}: the token cache is damaged; training the tokenizer again"
    assert caplog.messages == [message]


def test_a_vocabulary_smaller_than_requested_is_logged_at_every_start(section, caplog):
    with caplog.at_level(logging.WARNING):
        first, second = built(section(vocab_size=5000)), built(section(vocab_size=5000))
    assert 257 < first.vocab_size == second.vocab_size < 300
    message = f"the text has only {first.vocab_size} tokens that occur 2 times; using those"
    assert caplog.messages == [f"data.tokenizer.vocab_size: 5000, but {message}"] * 2


def test_a_cache_that_cannot_be_written_is_named(section, folder):
    built(section())
    (place,) = (folder / "cache").glob("bpe-*/")
    shutil.rmtree(place)
    place.with_name(f"{place.name}.lock").unlink()
    place.with_name(f"{place.name}.lock").mkdir()
    with pytest.raises(DataError, match=r"^data\.cache_dir: cache: cannot be written"):
        built(section())


def test_progress_is_reported(section):
    seen: list[tuple[int, int, str]] = []

    class Seen:
        def update(self, done_bytes: int, total_bytes: int, label: str) -> None:
            seen.append((done_bytes, total_bytes, label))

    data = section()
    build_tokenizer(data, progress=Seen())
    assert seen[-1] == (len(LEARNED), len(LEARNED), "training the tokenizer")


_BUILD = """\
import sys
from trainer.data.token_cache import workers
from trainer.data.config import DataConfig
from trainer.data.corpus import build_tokenizer
from trainer.data import train_bpe
train, trained = train_bpe._train, []
train_bpe._train = lambda *arguments, **options: trained.append(1) or train(*arguments, **options)
data = DataConfig.model_validate_json(sys.argv[1])
print(build_tokenizer(data).fingerprint, len(trained))
"""


def _start(section: DataConfig, **environment: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, section.model_dump_json()],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def _said(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Return the fingerprint of a process's tokenizer and the number of trainings."""
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    fingerprint, trained = output.split()
    return fingerprint, int(trained)


def test_the_same_text_gives_the_same_tokenizer_in_any_process(section, folder):
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]  # many pairs of equal frequency
    (folder / "text.txt").write_text(" ".join(words * 3) + HELD_OUT)
    folders = [section(vocab_size=600).model_copy(update={"cache_dir": f"cache{i}"}) for i in range(3)]
    environments = [
        {"PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "false"},
        {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "3", "RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true"},
    ]
    processes = [_start(place, **environment) for place, environment in zip(folders, environments, strict=True)]
    found = [_said(process) for process in processes]
    assert found == [(found[0][0], 1)] * 3


def test_of_two_processes_at_once_one_trains(section, folder):
    fingerprints, trainings = zip(*map(_said, [_start(section()) for _ in range(2)]), strict=True)
    assert fingerprints[0] == fingerprints[1] and sum(trainings) == 1
    assert len(list((folder / "cache").glob("bpe-*/"))) == 1
    assert [path.name for path in (folder / "cache").glob(".*")] == []


# --- which text -------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=6), total=st.integers(0, 3000))
def test_shares_are_all_there_is_or_equal_parts(sizes, total):
    shares = even_shares(sizes, total)
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert sum(shares) == min(total, sum(sizes))
    cut = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert not cut or (max(cut) - min(cut) <= 1 and max(shares) <= max(cut) + 1)


def _pieces(corpus: Corpus, max_bytes: int) -> str:
    return "".join(training_pieces(corpus.train, max_bytes))


def test_a_large_limit_takes_all_that_is_learned(make_corpus):
    corpus = make_corpus(a="abcd" * 100, b="été" * 50)
    learned = [bytes(file.tokens[:]).decode() for file in corpus.train]
    assert _pieces(corpus, 10_000) == "".join(learned)


def test_a_limit_is_shared_by_the_domains(make_corpus):
    found = _pieces(make_corpus(a="a" * 4000, b="b" * 4000, c="c" * 20), 110)
    assert (found.count("a"), found.count("b"), found.count("c")) == (50, 50, 10)


def test_a_limited_sample_is_spread_over_the_documents(folder):
    for number in range(100):
        (folder / f"{number:02}.txt").write_text(f"{number:02};" * 10)
    source = {"kind": "text", "path": "*.txt"}
    data = DataConfig.model_validate({"sources": [source], "split": {"kind": "hash"}, "cache_dir": "cache"})
    corpus = build_corpus(data)
    taken = [int(number) for number in dict.fromkeys(_pieces(corpus, 600).split(";")) if number]
    assert len(taken) == 20
    gaps = [later - earlier for earlier, later in pairwise(taken)]
    assert min(gaps) >= 3 and max(gaps) <= 9


def test_a_long_document_is_read_in_pieces_of_whole_characters(make_corpus):
    corpus = make_corpus(a="é" * 200_000)
    pieces = list(training_pieces(corpus.train, 1 << 30))
    assert max(map(len, pieces)) <= 1 << 16 and set("".join(pieces)) == {"é"}
    assert 99_990 <= len("".join(pieces)) <= 100_000


def test_no_tokenizer_is_trained_on_bytes_that_have_changed_in_the_cache(section):
    data = section()
    file = build_corpus(data, tokenizer=ByteTokenizer()).folders[0] / "text.train.tokens"
    file.write_bytes(file.read_bytes().swapcase())
    with pytest.raises(DataError, match=r"text\.train\.tokens: its content is not what was written"):
        build_corpus(data)
    assert not list(file.parents[1].glob("bpe-????????????????"))


# --- numbers that are compared between tokenizers ---------------------------------------------------------------------


def _target_bytes(corpus: Corpus, packing: Packing) -> int:
    token_bytes = corpus.tokenizer.token_bytes()
    batches = evaluation_batches(corpus, 0, packing=packing, seq_len=7, batch_size=3, max_tokens=None)
    return sum(int(token_bytes[batch.targets[batch.target_mask].numpy()].sum()) for batch in batches)


def test_bits_per_byte_are_of_the_same_bytes_but_for_the_first_token(section):
    """The first token, a byte or a word, is not a target in wrapped rows."""
    data = section()
    own, of_bytes = build_corpus(data), build_corpus(data, tokenizer=ByteTokenizer())
    first = own.tokenizer.decode(own.validation[0].tokens[:1])
    assert own.validation[0].num_bytes == of_bytes.validation[0].num_bytes == len(HELD_OUT)
    assert _target_bytes(own, "wrapped") == len(HELD_OUT) - len(first)
    assert _target_bytes(of_bytes, "wrapped") == len(HELD_OUT) - 1
    assert _target_bytes(own, "bfd") == _target_bytes(of_bytes, "bfd") == len(HELD_OUT)


def test_documents_are_the_same_under_every_tokenizer(folder, section):
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"<|endoftext|> document {number}\x00\r\n")
    data = section().model_copy(update={"split": DataConfig().split})
    data = DataConfig.model_validate({**data.model_dump(), "sources": [{"kind": "text", "path": "*.txt"}]})
    own, of_bytes = build_corpus(data), build_corpus(data, tokenizer=ByteTokenizer())
    for mine, theirs in zip(
        (own.train[0], own.validation[0]), (of_bytes.train[0], of_bytes.validation[0]), strict=True
    ):
        assert own.tokenizer.decode(mine.tokens[:]) == of_bytes.tokenizer.decode(theirs.tokens[:])
        assert mine.num_documents == theirs.num_documents
        assert (mine.tokens[:] == own.tokenizer.end_of_document).sum() == mine.num_documents - 1


def test_parallel_ingestion_gives_the_same_tokens(folder, section, monkeypatch):
    monkeypatch.setattr(workers, "_MIN_PROCESS_BYTES", 1)
    monkeypatch.setattr(text, "_PART_BYTES", 4000)
    pools, pool = [], workers.ProcessPoolExecutor

    def counting(num_processes: int, **options: Any) -> Any:
        pools.append(num_processes)
        return pool(num_processes, **options)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", counting)
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"the cat sat on mat {number}, été\u2581 {'the rat ' * number}")
    found = []
    for processes in (1, 2):
        data = section().model_dump() | {"workers": processes, "cache_dir": f"cache{processes}"}
        split, sources = {"kind": "hash"}, [{"kind": "text", "path": "*.txt"}]
        found.append(build_corpus(DataConfig.model_validate(data | {"split": split, "sources": sources})))
    assert found[0].fingerprint == found[1].fingerprint
    assert pools == [2, 2], "one pool for the bytes, one for the tokens"


def test_a_streamed_corpus_trains_on_its_first_block(folder):
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "the cat sat on mat {i}"}}\n' for i in range(200)))
    source = {"kind": "hf_stream", "path": "json", "data_files": "rows.jsonl", "block_tokens": 500}
    tokenizer = {"kind": "bpe", "vocab_size": 270}
    data = DataConfig.model_validate({"sources": [source], "cache_dir": "cache", "tokenizer": tokenizer})
    corpus = build_corpus(data)
    assert len(corpus.tokenizer.encode("the cat sat on mat 199")) < 12
    assert corpus.tokenizer.decode(corpus.train[0].tokens[:]).startswith(b"the cat sat on mat ")


def test_the_floor_counts_a_large_vocabulary(make_corpus, monkeypatch):
    corpus = make_corpus(a="abab" * 100)
    monkeypatch.setattr(corpus.tokenizer, "vocab_size", 1 << 17)
    assert 1 < unigram_bits_per_byte(corpus, 0) < 17


def test_the_cached_tokenizer_is_a_hugging_face_file(section, folder):
    tokenizer = built(section())
    (file,) = (folder / "cache").glob("bpe-*/tokenizer.json")
    assert file.read_text() == tokenizer.files()["tokenizer.json"]
    assert json.loads(file.read_text())["model"]["type"] == "BPE"


def test_markers_of_chats_are_reserved(folder, section, trainings):
    """They are special, cost merges, and make another tokenizer; without them nothing changes."""
    plain, with_chat = (build_tokenizer(section(chat=chat)) for chat in (False, True))
    special = with_chat.special_tokens()
    assert set(special) - set(plain.special_tokens()) == {"<|im_start|>", "<|im_end|>"}
    assert plain.vocab_size == with_chat.vocab_size == 270
    assert not set(with_chat.encode("<|im_start|>").tolist()) & set(special.values())
    assert build_tokenizer(section(chat=True)).fingerprint == with_chat.fingerprint
    assert trainings == ["trained"] * 2
    with pytest.raises(ValueError, match="258 has no room for the markers of chat: true; use at least 259"):
        section(chat=True, vocab_size=258)
