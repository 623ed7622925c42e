"""Contract of every registered tokenizer, and of every supported form of tokenizer.json."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from tests import foreign_tokenizers
from tests.registries import TOKENIZERS as CONFIGS
from trainer.data.config import DataConfig
from trainer.data.corpus import build_tokenizer
from trainer.data.sources.registry import TextSourceConfig
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.file import read_tokenizer


def _file(content: Callable[[], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    def options(folder: Path) -> dict[str, Any]:
        path = folder / f"{content.__name__}.json"
        path.write_text(json.dumps(content()))
        return {"kind": "file", "path": str(path)}

    return options


# The options of each kind, in each of its forms. A new tokenizer needs a line here.
FORMS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "byte": lambda folder: {"kind": "byte"},
    "bpe": lambda folder: {"kind": "bpe", "vocab_size": 300},
    "file, byte-level": _file(foreign_tokenizers.byte_level),
    "file, byte fallback": _file(foreign_tokenizers.byte_fallback),
    "file, metaspace": _file(foreign_tokenizers.metaspace),
}

AWKWARD = [
    *("the", " ", "  ", "\n", "\r\n", "\t", "\0", "\x7f", "a" * 40, "5" * 7),
    *("été", "e\u0301", "ﬁ", "\u2581", "\ufeff", "\u200d", "🕰️", "👩‍👩‍👧", "\U0010ffff", "\ud7ff", "\u0120"),
    *("<|endoftext|>", "<|end_of_text|>", "<|begin|>", " <|pad|> ", " <tool> ", "</s>", "<s>", "<unk>", "<0x41>"),
]
texts = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=4), max_size=10).map("".join)
awkwardly = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(foreign_tokenizers.TEXT)
    places = {"sources": [TextSourceConfig(path=str(folder / "text.txt"))], "cache_dir": str(folder / "cache")}
    data = {form: DataConfig.model_validate({**places, "tokenizer": FORMS[form](folder)}) for form in FORMS}
    return {form: build_tokenizer(section) for form, section in data.items()}


@pytest.fixture(params=FORMS)
def tokenizer(request: pytest.FixtureRequest, made: dict[str, Tokenizer]) -> Tokenizer:
    return made[request.param]


def test_every_registered_tokenizer_is_covered():
    assert {form.partition(",")[0] for form in FORMS} == CONFIGS.keys()


@awkwardly
@given(text=texts)
def test_decoding_restores_every_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()


@awkwardly
@given(text=texts)
def test_a_text_has_no_end_of_document_and_as_many_bytes_as_its_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert ids.dtype == np.min_scalar_type(tokenizer.vocab_size - 1)


@awkwardly
@given(texts=st.lists(texts, max_size=4))
def test_a_batch_is_encoded_like_single_texts(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]
    assert {ids.dtype for ids in batch} <= {tokenizer.encode("").dtype}


def test_tokens_can_be_decoded_one_by_one(tokenizer):
    ids = tokenizer.encode("".join(AWKWARD)).tolist()
    assert b"".join(tokenizer.decode([token]) for token in ids) == "".join(AWKWARD).encode()


def test_an_end_of_document_has_no_bytes(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.end_of_document, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == b"ab"
    assert tokenizer.token_bytes()[tokenizer.end_of_document] == 0


def test_exactly_the_ids_of_the_vocabulary_have_bytes(tokenizer):
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    for token in (0, tokenizer.vocab_size - 1):
        assert len(tokenizer.decode([token])) == tokenizer.token_bytes()[token]
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="range"):
            tokenizer.decode([token])


def test_an_empty_text_has_no_tokens(tokenizer):
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == b""


def test_another_process_gets_the_same_tokenizer(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.encode("".join(AWKWARD)).tolist() == tokenizer.encode("".join(AWKWARD)).tolist()
    same = ("fingerprint", "vocab_size", "end_of_document")
    assert [getattr(other, name) for name in same] == [getattr(tokenizer, name) for name in same]


def test_its_files_load_as_the_same_tokenizer(tokenizer, tmp_path):
    for name, text in tokenizer.files().items():
        (tmp_path / name).write_text(text)
    again = read_tokenizer(tmp_path, end_of_document=None)
    assert again.encode("".join(AWKWARD)).tolist() == tokenizer.encode("".join(AWKWARD)).tolist()
    assert again.end_of_document == tokenizer.end_of_document
    assert again.files() == read_tokenizer(tmp_path / "tokenizer.json", end_of_document=None).files()


def test_the_tokenizers_library_reads_the_same_ids_from_its_files(tokenizer):
    """Accents are left out: Hugging Face's decoder turns added tokens that have them into invalid bytes."""
    library = Library.from_str(tokenizer.files()["tokenizer.json"])
    text = foreign_tokenizers.TEXT.replace("é", "e") + "\n  the end "
    assert library.encode(text).ids == tokenizer.encode(text).tolist()
    assert library.decode(library.encode(text).ids) == text


def test_transformers_loads_its_files(made, tmp_path):
    from transformers import AutoTokenizer

    for name, text in made["bpe"].files().items():
        (tmp_path / name).write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs is not None
    ids = theirs(foreign_tokenizers.TEXT)["input_ids"]
    assert ids == made["bpe"].encode(foreign_tokenizers.TEXT).tolist()
    assert theirs.decode(ids) == foreign_tokenizers.TEXT
    assert theirs.eos_token_id == made["bpe"].end_of_document
