"""The floor: what a model that knows only how common each token is would reach."""

import numpy as np
from numpy.typing import NDArray

from trainer.data.corpus import Corpus

_CHUNK_TOKENS = 1 << 24  # a count of a chunk needs 8 bytes a token


def unigram_bits_per_byte(corpus: Corpus, domain_index: int) -> float:
    """Return the bits per byte of a unigram model on a domain's validation tokens.

    The model is p(token) = (count + 1) / (N + V), counted in the domain's training tokens. A language model that is not
    better has learned nothing of the order of tokens. Ends of documents are predicted too, and are no bytes.
    """
    vocab_size = corpus.tokenizer.vocab_size
    counts = _counts(corpus.train[domain_index].tokens, vocab_size) + 1
    bits = -np.log2(counts / counts.sum())  # (V,)
    validation = corpus.validation[domain_index]
    return float(_counts(validation.tokens, vocab_size) @ bits) / validation.num_bytes


def _counts(tokens: NDArray[np.unsignedinteger], vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, len(tokens), _CHUNK_TOKENS):
        counts += np.bincount(tokens[first : first + _CHUNK_TOKENS], minlength=vocab_size)
    return counts
