"""Tokens of a rendered chat and the characters that they cover, against the library's own."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from tests.chat_templates import STYLES
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.file import read_tokenizer
from trainer.data.tokenizers.rendered_tokens import encode_rendered, names_pattern

_MADE = {}


def made(name: str, folder: Path) -> tuple:
    """Return a style's tokenizer here and in the library, with the names of its tokens."""
    if name not in _MADE:
        style = next(style for style in STYLES if style.name == name)
        ours = read_tokenizer(style.write(folder / name), end_of_document=None)
        theirs = HfTokenizer.from_str(ours.files()["tokenizer.json"])
        _MADE[name] = ours, theirs, [*ours.special_tokens(), *style.added]
    return _MADE[name]


@pytest.mark.parametrize("name", ["tools", "brackets"])
@given(data=st.data())
def test_ids_and_places_are_those_of_the_library(name: str, data: st.DataObject, tmp_path_factory) -> None:
    """Whatever stands between the names of tokens, also parts of names."""
    ours, theirs, names = made(name, tmp_path_factory.getbasetemp())
    parts = st.sampled_from(
        [*names, "<|", "|>", "<", "[", "/", "im_end", " ", "\n", "the", "\u00e9", "\U0001f570\ufe0f"]
    )
    text = "".join(data.draw(st.lists(parts | st.text("abc \n\u6642", max_size=4), max_size=12)))
    wanted = theirs.encode(text, add_special_tokens=False)
    got = encode_rendered(ours, text, names_pattern(ours.special_tokens()))
    assert got.ids.tolist() == wanted.ids
    assert list(zip(got.starts.tolist(), got.ends.tolist(), strict=True)) == wanted.offsets


@given(text=st.text(), start=st.integers(0, 9), length=st.integers(0, 9))
def test_bytes_are_learned_with_their_characters(text: str, start: int, length: int) -> None:
    tokens = encode_rendered(ByteTokenizer(), text, names_pattern(ByteTokenizer().special_tokens()))
    mask = tokens.overlapping(((start, start + length),))
    assert bytes(tokens.ids[mask].tolist()) == text[start : start + length].encode()


def test_a_token_that_begins_before_a_span_is_in_it(tmp_path: Path) -> None:
    ours, _, _ = made("tools", tmp_path)
    tokens = encode_rendered(ours, " the clocks", names_pattern(ours.special_tokens()))
    assert tokens.starts[0] == 0 and tokens.ends[0] > 2
    assert tokens.overlapping(((1, 2),)).tolist() == [True, *[False] * (len(tokens.ids) - 1)]


def test_the_longest_name_is_found(tmp_path: Path) -> None:
    style = STYLES[0]
    folder = style.write(tmp_path / "longest")
    content = json.loads((folder / "tokenizer.json").read_text())
    last = content["added_tokens"][-1]
    content["added_tokens"].append(last | {"id": last["id"] + 1, "content": f"{last['content']}>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    ours = read_tokenizer(folder, end_of_document=None)
    text = f"{last['content']}>{last['content']}"
    assert encode_rendered(ours, text, names_pattern(ours.special_tokens())).ids.tolist() == [
        last["id"] + 1,
        last["id"],
    ]
