"""Unigram baseline: bits per byte of a model that uses token frequencies only."""

import numpy as np
from numpy.typing import NDArray

from trainer.data.corpus import Corpus
from trainer.data.token_cache.token_files import TokenFile

_CHUNK_TOKENS = 1 << 24  # counting a chunk takes 8 bytes per token


def unigram_bits_per_byte(corpus: Corpus, domain_index: int) -> float:
    """Return the bits per byte of a unigram model on a domain's validation tokens.

    The model is p(token) = (count + 1) / (N + V), counted in the domain's training tokens. A language model that is not
    better has learned nothing about the order of tokens. Ends of documents are predicted but have no bytes; prompts are
    neither counted nor predicted.
    """
    vocab_size, token_bytes = corpus.tokenizer.vocab_size, corpus.tokenizer.token_bytes()
    counts = _counts(corpus.train[domain_index], vocab_size) + 1
    bits = -np.log2(counts / counts.sum())  # (V,)
    predicted = _counts(corpus.validation[domain_index], vocab_size)
    return float(predicted @ bits) / max(1, int(predicted @ token_bytes))


def _counts(file: TokenFile, vocab_size: int) -> NDArray[np.int64]:
    counts, has_prompts = np.zeros(vocab_size, dtype=np.int64), file.has_prompts
    for first in range(0, file.num_tokens, _CHUNK_TOKENS):
        tokens = file.tokens[first : first + _CHUNK_TOKENS]
        if has_prompts:
            positions = first + np.arange(len(tokens))
            tokens = tokens[file.is_learned(positions, file.document_of(positions))]
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts
