"""Contract of a tokenizer: every text comes back byte for byte."""

import pickle
import tempfile
from pathlib import Path

import numpy as np

from trainer.contracts.ensure import ensure
from trainer.data.tokenizers.file import read_tokenizer
from trainer.data.tokenizers.registry import TokenizerOptions

AWKWARD = [
    *("the", " ", "  ", "\n", "\r\n", "\t", "\0", "\x7f", "a" * 40, "5" * 7),
    *("\u00e9t\u00e9", "e\u0301", "\ufb01", "\u2581", "\ufeff", "\u200d", "\U0001f570\ufe0f", "\U0010ffff", "\ud7ff"),
    *("<|endoftext|>", "<|begin|>", " <|pad|> ", " <tool> ", "</s>", "<s>", "<unk>", "<0x41>"),
]
"""Texts that tokenizers are known to change."""


def texts_come_back(config: TokenizerOptions) -> None:
    """`decode` of `encode` is the text, also token by token."""
    tokenizer = config.build()
    for text in ["", *AWKWARD, "".join(AWKWARD)]:
        ids = tokenizer.encode(text).tolist()
        ensure(tokenizer.decode(ids) == text.encode(), f"{text!r} comes back as {tokenizer.decode(ids)!r}")
        one_by_one = b"".join(tokenizer.decode([token]) for token in ids)
        ensure(one_by_one == text.encode(), f"{text!r} comes back as {one_by_one!r} token by token")


def ids_are_narrow_and_end_no_document(config: TokenizerOptions) -> None:
    """Ids have the narrowest unsigned dtype, and no text gives an end of document."""
    tokenizer = config.build()
    ids = tokenizer.encode("".join(AWKWARD))
    ensure(ids.dtype == np.min_scalar_type(tokenizer.vocab_size - 1), f"ids are {ids.dtype}")
    ensure(tokenizer.end_of_document not in ids, "a text gives an end of document")
    ensure(int(ids.max()) < tokenizer.vocab_size, f"id {ids.max()} is not in a vocabulary of {tokenizer.vocab_size}")


def special_tokens_are_of_no_text(config: TokenizerOptions) -> None:
    """No text gives a special token, and none has bytes."""
    tokenizer = config.build()
    special = tokenizer.special_tokens()
    ensure(len(set(special.values())) == len(special), "two special tokens have the same id")
    for name, index in special.items():
        ensure(0 <= index < tokenizer.vocab_size, f"{name} has the id {index}, outside of the vocabulary")
        ensure(tokenizer.token_bytes()[index] == 0, f"{name} has bytes")
        ensure(index not in tokenizer.encode(f"a{name} {name}{name}"), f"a text with {name} in it gives that token")


def bytes_are_those_of_the_tokens(config: TokenizerOptions) -> None:
    """`token_bytes` counts the bytes of every id, none for an end of document."""
    tokenizer = config.build()
    sizes = tokenizer.token_bytes()
    ensure(sizes.shape == (tokenizer.vocab_size,), f"token_bytes has shape {sizes.shape}")
    ensure(sizes[tokenizer.end_of_document] == 0, "an end of document has bytes")
    for text in AWKWARD:
        total = int(sizes[tokenizer.encode(text)].sum())
        ensure(total == len(text.encode()), f"the tokens of {text!r} have {total} bytes, not {len(text.encode())}")


def batches_equal_single_texts(config: TokenizerOptions) -> None:
    """`encode_batch` gives what `encode` gives for each text."""
    tokenizer = config.build()
    batch = [ids.tolist() for ids in tokenizer.encode_batch(AWKWARD)]
    ensure(batch == [tokenizer.encode(text).tolist() for text in AWKWARD], "a batch has other ids than its texts")


def copies_are_the_same(config: TokenizerOptions) -> None:
    """A pickled copy, and the tokenizer that its files make, give the same ids."""
    tokenizer, text = config.build(), "".join(AWKWARD)
    ids, copy = tokenizer.encode(text).tolist(), pickle.loads(pickle.dumps(tokenizer))
    ensure(copy.encode(text).tolist() == ids, "a pickled copy gives other ids")
    ensure(copy.fingerprint == tokenizer.fingerprint, "a pickled copy has another fingerprint")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in tokenizer.files().items():
            (Path(folder) / name).write_text(content)
        again = read_tokenizer(Path(folder), end_of_document=None)
    ensure(again.encode(text).tolist() == ids, "the tokenizer that is read from files() gives other ids")


CHECKS = [
    texts_come_back,
    ids_are_narrow_and_end_no_document,
    special_tokens_are_of_no_text,
    bytes_are_those_of_the_tokens,
    batches_equal_single_texts,
    copies_are_the_same,
]
