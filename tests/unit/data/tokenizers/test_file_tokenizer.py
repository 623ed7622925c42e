"""Foreign tokenizers: steps that are kept, removed and refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import foreign_tokenizers
from trainer.data.tokenizers.file import read_tokenizer
from trainer.data.tokenizers.subword import SubwordTokenizer
from trainer.errors import DataError

Content = dict[str, Any]
ADVICE = (
    "a text must come back byte for byte; use a byte-level tokenizer (GPT-2, Llama 3, Qwen) or one that falls back to "
    "bytes (Llama 2, Mistral, Gemma)"
)


def read(folder: Path, content: Content, **files: Any) -> SubwordTokenizer:
    """Write a tokenizer's folder and read it."""
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return read_tokenizer(folder, end_of_document=None)


def tokens(tokenizer: SubwordTokenizer, text: str) -> list[bytes]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


# --- what is left out and what is kept --------------------------------------------------------------------------------


def test_no_bos_eos_padding_or_truncation_is_applied(folder):
    tokenizer = read(folder, foreign_tokenizers.byte_level())
    text = "It was a bright cold day in April"
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert len(tokenizer.encode(text)) > 7, "no truncation"
    assert len(tokenizer.encode("a")) == 1, "no padding, no BOS, no EOS"


def test_no_space_is_added_before_a_text(folder):
    tokenizer = read(folder, foreign_tokenizers.byte_fallback())
    assert tokens(tokenizer, "the the") == [b"the", b" the"]
    assert tokens(tokenizer, " the") == [b" the"]


def test_characters_outside_the_vocabulary_become_bytes(folder):
    assert tokens(read(folder, foreign_tokenizers.byte_fallback()), "a\u00fc") == [b"a", b"\xc3", b"\xbc"]


def test_only_characters_that_do_not_round_trip_become_bytes(folder):
    tokenizer = read(folder, foreign_tokenizers.byte_fallback())
    text = "in the " * 20 + foreign_tokenizers.SPACE + " the in" * 20
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.encode()
    assert len(ids) < len(tokenizer.encode("in the " * 20 + " the in" * 20)) + 40


def test_added_tokens_are_tokens_and_special_ones_are_not(folder):
    tokenizer = read(folder, foreign_tokenizers.byte_level())
    assert b"<tool>" in tokens(tokenizer, "a <tool> b")
    assert len(tokens(tokenizer, "<|begin|>")) > 1


def test_a_long_text_is_split_at_line_ends(folder):
    tokenizer = read(folder, foreign_tokenizers.byte_level())
    line = "It was a bright cold day in April\n"
    text = line * (600_000 // len(line))
    assert tokenizer.encode(text).tolist() == tokenizer.encode(line).tolist() * (600_000 // len(line))
    endless = "a\u00e9" * 300_000
    assert tokenizer.decode(tokenizer.encode(endless)) == endless.encode()


def test_files_of_earlier_versions_are_read(folder):
    """GPT-2's own file has no type, and merges as text; an old Metaspace has add_prefix_space."""
    content = foreign_tokenizers.byte_level()
    now = read(folder, content).encode(foreign_tokenizers.TEXT).tolist()
    model = {key: value for key, value in content["model"].items() if key != "type"}
    model["merges"] = [" ".join(merge) for merge in model["merges"]]
    assert read(folder, content | {"model": model}).encode(foreign_tokenizers.TEXT).tolist() == now
    content = foreign_tokenizers.metaspace()
    now = read(folder, content).encode(foreign_tokenizers.TEXT).tolist()
    before = {"type": "Metaspace", "replacement": foreign_tokenizers.SPACE, "add_prefix_space": True}
    assert read(folder, content | {"pre_tokenizer": before}).encode(foreign_tokenizers.TEXT).tolist() == now


def test_ids_may_have_holes(folder):
    content = foreign_tokenizers.byte_fallback()
    content["model"]["vocab"]["zz"] = 900
    tokenizer = read(folder, content)
    assert tokenizer.vocab_size == 901
    assert tokenizer.decode([500, 900]) == b"zz"


# --- what ends a document ---------------------------------------------------------------------------------------------


def test_the_end_of_document_is_the_one_asked_for_else_the_folder_s_else_a_known_name(folder):
    content = foreign_tokenizers.byte_level()
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert read(folder, content).end_of_document == ids["<|end_of_text|>"]
    assert read(folder, content, special_tokens_map={"eos_token": "<|pad|>"}).end_of_document == ids["<|pad|>"]
    named = read(folder, content, tokenizer_config={"eos_token": {"content": "<|begin|>"}})
    assert named.end_of_document == ids["<|begin|>"]
    wanted = read_tokenizer(folder, end_of_document="<tool>")
    assert wanted.end_of_document == ids["<tool>"] and ids["<tool>"] not in wanted.encode("<tool>")
    assert wanted.fingerprint != named.fingerprint


def test_a_file_by_another_name_does_not_belong_to_the_folder(folder):
    read(folder, foreign_tokenizers.byte_level(), tokenizer_config={"eos_token": "<|begin|>"})
    path = (folder / "tokenizer.json").rename(folder / "mine.json")
    ids = {token["content"]: token["id"] for token in foreign_tokenizers.byte_level()["added_tokens"]}
    assert read_tokenizer(path, end_of_document=None).end_of_document == ids["<|end_of_text|>"]


def test_a_name_that_the_tokenizer_does_not_have_is_refused_with_those_it_has(folder, fails):
    (folder / "tokenizer.json").write_text(json.dumps(foreign_tokenizers.byte_fallback()))
    with fails(
        "tokenizer.json: has no added token '<|eot|>' (data.tokenizer.end_of_document); it has '<unk>', '<s>', '</s>'; "
        "name one of them"
    ):
        read_tokenizer(Path("tokenizer.json"), end_of_document="<|eot|>")


def test_a_tokenizer_without_an_end_of_document_is_refused(folder, fails):
    content = foreign_tokenizers.byte_fallback()
    content["added_tokens"] = content["added_tokens"][:1]
    with fails(
        "tokenizer.json: does not name the token that ends a document; its added tokens are '<unk>'; one must stand "
        "between documents: set data.tokenizer.end_of_document"
    ):
        read(Path(), content)


# --- what is refused --------------------------------------------------------------------------------------------------


def _changed(content: Content, **sections: Any) -> Content:
    return content | sections


def _model(content: Content, **options: Any) -> Content:
    return content | {"model": content["model"] | options}


def _without_bytes() -> Content:
    content = foreign_tokenizers.byte_fallback()
    content["model"]["vocab"] = {token: i for token, i in content["model"]["vocab"].items() if token != "<0x0A>"}
    return content


def _stray_id() -> Content:
    content = foreign_tokenizers.byte_fallback()
    content["model"]["vocab"]["zz"] = 4294967295
    return content


UNSUITABLE: dict[str, tuple[Callable[[], Content], str]] = {
    "WordPiece": (foreign_tokenizers.wordpiece, "its normalizer BertNormalizer changes the text"),
    "WordPiece without normalizer": (
        lambda: _changed(foreign_tokenizers.wordpiece(), normalizer=None),
        "its pre-tokenizer BertPreTokenizer drops characters",
    ),
    "WordPiece alone": (
        lambda: _changed(foreign_tokenizers.wordpiece(), normalizer=None, pre_tokenizer=None),
        "its model is WordPiece, which does not keep every character",
    ),
    "NFKC": (
        lambda: _changed(
            foreign_tokenizers.byte_level(), normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}]}
        ),
        "its normalizer NFKC changes the text",
    ),
    "a pattern that is taken out": (
        lambda: _changed(
            foreign_tokenizers.byte_level(),
            pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
        ),
        "its pre-tokenizer Split drops characters",
    ),
    "ends of words": (
        lambda: _model(foreign_tokenizers.byte_level(), end_of_word_suffix="</w>"),
        "its tokens say where words begin or end (end_of_word_suffix '</w>') instead of keeping spaces",
    ),
    "a byte without a token": (_without_bytes, "it has no token for 1 bytes, among them 0x0A"),
    "no byte fallback": (
        lambda: _changed(foreign_tokenizers.byte_level(), pre_tokenizer=None),
        "it has no token for 149 bytes, among them 0x00",
    ),
    "a stray id": (
        _stray_id,
        "it has an id 4294967295 for 300 tokens, and ids below 16777216 are allowed",
    ),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_a_tokenizer_that_cannot_give_every_text_back_is_refused_with_the_reason(folder, fails, name):
    content, reason = UNSUITABLE[name]
    with fails(f"tokenizer.json: {reason}; {ADVICE}"):
        read(Path(), content())


TEXT = json.dumps(foreign_tokenizers.byte_level())
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read (Expecting value: line 1 column 1 (char 0))"),
    "truncated": (TEXT[:-1].encode(), "cannot be read (Expecting ',' delimiter: "),
    "not UTF-8": (b"\xff\xfe", "cannot be read ('utf-8' codec can't decode byte 0xff in position 0: "),
    "a list": (b"[]", "cannot be read (it holds no JSON object)"),
    "nested for ever": (b"[" * 100_000, "cannot be read (it is nested too deeply)"),
    "another object": (b'{"eos_token": "x"}', "is not a tokenizer.json (it has no 'added_tokens')"),
    "no model": (b'{"added_tokens": [{"content": "</s>"}]}', "is not a tokenizer.json (it has no 'model')"),
    "a section of another form": (b'{"added_tokens": 7}', "is not a tokenizer.json ("),
    "a merge of unknown tokens": (
        json.dumps(_model(foreign_tokenizers.byte_level(), merges=[["qqqq", "zzzz"]])).encode(),
        "is not a tokenizer.json (Token `qqqq` out of vocabulary",
    ),
    "an unknown token that it does not have": (
        json.dumps(_model(foreign_tokenizers.byte_fallback(), unk_token="<nil>", byte_fallback=False)).encode(),
        "is not a tokenizer.json (",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_invalid_tokenizer_file_is_refused_in_one_line(folder, name):
    content, reason = DAMAGED[name]
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_tokenizer(Path(), end_of_document=None)
    message = str(caught.value)
    assert message.startswith(f"tokenizer.json: {reason}")
    assert message.endswith("; it may be damaged: download it again") and "\n" not in message


def test_a_missing_file_or_folder_is_named_with_advice(folder, fails):
    with fails(
        "gpt2: no such file; a tokenizer.json or a folder with one is needed; paths are relative to " + str(folder)
    ):
        read_tokenizer(Path("gpt2"), end_of_document=None)
    (folder / "model").mkdir()
    with fails(
        "model/tokenizer.json: no such file; write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    ):
        read_tokenizer(Path("model"), end_of_document=None)


def test_a_pipe_is_not_waited_for(folder, fails):
    os.mkfifo(folder / "pipe")
    with fails("pipe: is not a regular file; a tokenizer.json is needed; correct data.tokenizer.path"):
        read_tokenizer(Path("pipe"), end_of_document=None)


def test_damaged_options_are_named(folder):
    read(folder, foreign_tokenizers.byte_level())
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read \(Expecting property name"):
        read_tokenizer(folder, end_of_document=None)
