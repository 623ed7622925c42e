"""Small tokenizers in the formats of well-known models, as the content of a tokenizer.json."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "It was a bright cold day in April, and the clocks were striking thirteen.\n"
    "def day(clock):\n    return clock + 13  # été, straße, Κρόνος, 時計 🕰️\r\n"
) * 20
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"


def byte_level() -> dict[str, Any]:
    """Llama 3 and Qwen: special tokens, NFC, BOS and EOS, padding, truncation."""
    library = Tokenizer(models.BPE(ignore_merges=True))
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    library.add_special_tokens(["<|begin|>", "<|end_of_text|>", AddedToken("<|pad|>", lstrip=True, rstrip=True)])
    library.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True), "été"])
    begin, end = (library.token_to_id(token) for token in ("<|begin|>", "<|end_of_text|>"))
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end_of_text|>", special_tokens=[("<|begin|>", begin), ("<|end_of_text|>", end)]
    )
    library.enable_truncation(5)
    library.enable_padding(length=7, pad_token="<|pad|>", pad_id=library.token_to_id("<|pad|>"))
    return json.loads(library.to_str())


def byte_fallback() -> dict[str, Any]:
    """Llama 2: a mark for spaces, one before the text, and byte fallback."""
    words = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, SPACE, *"abcdefghijklmnopqrstuvwxyzIA.,()é"]
    merges = [("t", "h"), ("th", "e"), (SPACE, "the"), (SPACE, SPACE), ("i", "n"), (SPACE, "a"), ("<", "s")]
    words += ["".join(merge) for merge in merges[:-1]]
    vocabulary = {word: index for index, word in enumerate(words)}
    library = Tokenizer(
        models.BPE(vocabulary, merges[:-1], unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # type: ignore[arg-type]
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(library.to_str())


def metaspace() -> dict[str, Any]:
    """Newer Mistral: the pre-tokenizer writes the mark; here with a unigram model."""
    words = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, SPACE, *"abcdefghijklmnopqrstuvwxyz", f"{SPACE}the", "ing"]
    pieces = [(word, -1.0 - 0.01 * index) for index, word in enumerate(words)]
    library = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    library.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(library.to_str())


def wordpiece() -> dict[str, Any]:
    """BERT, which changes the text and drops white space."""
    library = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.add_special_tokens(["[UNK]", "[EOS]"])
    return json.loads(library.to_str())
