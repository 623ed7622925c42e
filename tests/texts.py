"""Small tokenised texts of numbers, for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.data.corpus import Corpus
from trainer.data.token_cache.token_files import TokenFile
from trainer.data.tokenizers.byte import ByteTokenizer

EOD = ByteTokenizer().end_of_document
FIRST_MARKER = min(ByteTokenizer().special_tokens().values())  # ids below are bytes of text


def make_file(*documents: Sequence[int], prompts: Sequence[int] = ()) -> TokenFile:
    """Return a token file of documents; the first `prompts` tokens of each are its prompt."""
    tokens, starts = [], []
    for document in documents:
        if starts:
            tokens.append(EOD)
        starts.append(len(tokens))
        tokens.extend(document)
    answers = np.array(starts) + np.array(prompts or [0] * len(starts))
    return TokenFile(
        tokens=np.array(tokens, dtype=np.uint8 if max(tokens) < 256 else np.uint32),
        document_starts=np.array(starts),
        answer_starts=answers,
        num_bytes=len(tokens) - len(starts) + 1,
    )


def make_text(num_documents: int, *, longest: int, seed: int = 0, prompts: bool = False) -> TokenFile:
    """Return documents of random lengths and tokens; `prompts` gives each a prompt of random length."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, num_documents)
    documents = [generator.integers(0, FIRST_MARKER, length).tolist() for length in lengths]
    return make_file(*documents, prompts=generator.integers(0, lengths).tolist() if prompts else ())


def make_corpus_of(*files: TokenFile, shares: Sequence[float] = (), vocab_size: int = 256) -> Corpus:
    """Return a corpus with a domain for each text, used for both training and validation."""
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    return Corpus(
        domains=tuple(f"d{i}" for i in range(len(files))),
        weights=tuple(shares) or (1 / len(files),) * len(files),
        train=files,
        validation=files,
        tokenizer=tokenizer,
        contents=("",) * len(files),
        fingerprint="",
        streams=(None,) * len(files),
        folders=(Path("cache"),) * len(files),
    )
