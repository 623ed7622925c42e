"""A byte-level BPE of a run's own text, made once and kept in the token cache.

It is made of the training side of the split alone, as it lies in the token cache as bytes: so nothing that is held out
has a say in it, sources are read no other way than for training, and memory does not grow with the text.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import chain, pairwise
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.atomic_io import replace_file
from trainer.data.config import DataConfig
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.token_cache.build_cache import IngestProgress
from trainer.data.token_cache.cache import cache_error, new_name, publish, remove_remains, sole_builder
from trainer.data.token_cache.shards import TokenFile
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.exact import made_exact
from trainer.data.tokenizers.folder import END_OF_DOCUMENT, TOKENIZER, read_text
from trainer.data.tokenizers.registry import BPETokenizerConfig, ByteTokenizerConfig
from trainer.data.tokenizers.subword import SubwordTokenizer, fingerprint_of

_FORMAT = 1  # raised by whatever makes another tokenizer of the same text
_FINGERPRINT = "fingerprint"
_PIECE_BYTES = 1 << 16
_LABEL = "training the tokenizer"
_log = logging.getLogger(__name__)

# Words with the space before them, at most three digits, punctuation with the line ends after it, indentation apart
# from what it indents. Source: Llama 3 (Grattafiori et al. 2024), after OpenAI's cl100k_base.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained_tokenizer(
    config: BPETokenizerConfig, data: DataConfig, *, progress: IngestProgress | None = None
) -> SubwordTokenizer:
    """Return the tokenizer of a text, from the cache if it was made of the same text with the same options.

    The same text, options and version of `tokenizers` give the same tokenizer. Several processes may call this at once:
    one trains, the others wait for it.

    Args:
        config: its options.
        data: the section it is of, which says what the text is and where the cache is.
        progress: is told how far it is.

    Raises:
        DataError: if a source is unusable, a side of the split stays empty or the cache folder cannot be written.
        ResourceError: if the disk is full.
    """
    corpus = build_corpus(data.model_copy(update={"tokenizer": ByteTokenizerConfig()}), progress=progress)
    made_of = {
        "format": _FORMAT,
        "text": corpus.fingerprint,
        "options": config.model_dump(mode="json"),
        "tokenizers": metadata.version("tokenizers"),
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"bpe-{key}"

    def waiting() -> None:
        if progress is not None:
            progress.update(0, 1, "waiting for another process that trains this tokenizer")

    tokenizer = _cached(folder)
    if tokenizer is None:
        try:
            with sole_builder(folder, waiting=waiting) as is_alone:
                if is_alone:
                    remove_remains([folder])
                # Who was waited for has made it.
                tokenizer = _cached(folder) or _build(config, folder, corpus, progress=progress)
        except OSError as error:
            raise cache_error(data.cache_dir, error) from error
    if tokenizer.vocab_size < config.vocab_size:
        _log.warning(
            "data.tokenizer.vocab_size: %d, and the text has only %d tokens that occur %d times; going on with those",
            config.vocab_size,
            tokenizer.vocab_size,
            config.min_frequency,
        )
    return tokenizer


def training_pieces(corpus: Corpus, max_bytes: int) -> Iterator[str]:
    """Yield text of the training side in pieces, at most `max_bytes` of it.

    Domains give equal parts, as far as they have that much; the pieces of one are spread evenly over it.

    Args:
        corpus: of the byte tokenizer.
        max_bytes: most bytes of all pieces together.
    """
    shares = even_shares([file.num_bytes for file in corpus.train], max_bytes)
    for file, share in zip(corpus.train, shares, strict=True):
        passed = taken = 0
        for piece in _pieces(file):
            passed += len(piece)
            if taken * file.num_bytes < passed * share:  # behind what was to be taken up to here
                piece = piece[: share - taken]
                taken += len(piece)
                yield piece.decode("utf-8", "ignore")  # a cut may fall into a character


def even_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Return parts of `sizes`, equal but for sizes that are less, which together are `total`, or all there is."""
    shares = [0] * len(sizes)
    for done, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[index] = min(sizes[index], (total - sum(shares)) // (len(sizes) - done))
    return shares


def _pieces(file: TokenFile) -> Iterator[bytes]:
    """Yield the documents, long ones in pieces."""
    end_of_document = bytes([ByteTokenizer.end_of_document])
    for start, end in pairwise(chain(map(int, file.document_starts), [file.num_tokens])):
        for first in range(start, end, _PIECE_BYTES):
            yield file.tokens[first : min(end, first + _PIECE_BYTES)].tobytes().removesuffix(end_of_document)


def _cached(folder: Path) -> SubwordTokenizer | None:
    """Return what is in the cache, if it is whole."""
    with suppress(OSError, ValueError):
        text, known = (read_text(folder / name, through_links=False) for name in (TOKENIZER, _FINGERPRINT))
        if fingerprint_of(text, END_OF_DOCUMENT) == known:
            return SubwordTokenizer(text, END_OF_DOCUMENT)
    return None


def _build(
    config: BPETokenizerConfig, folder: Path, corpus: Corpus, *, progress: IngestProgress | None
) -> SubwordTokenizer:
    if folder.exists():
        _log.warning("%s: the token cache is damaged; training the tokenizer again", folder)
    text = _train(config, corpus, progress=progress)
    tokenizer = SubwordTokenizer(text, END_OF_DOCUMENT)
    temporary = new_name(folder)
    temporary.mkdir()
    replace_file(temporary / TOKENIZER, text)
    replace_file(temporary / _FINGERPRINT, tokenizer.fingerprint)
    publish(temporary, folder, unless=lambda: _cached(folder) is not None)
    return tokenizer


def _train(config: BPETokenizerConfig, corpus: Corpus, *, progress: IngestProgress | None) -> str:
    """Return the text of a new tokenizer.json."""
    total_bytes = min(config.max_train_bytes, sum(file.num_bytes for file in corpus.train))

    def read() -> Iterator[str]:
        done_bytes = 0
        for piece in training_pieces(corpus, config.max_train_bytes):
            yield piece
            done_bytes += len(piece.encode())
            if progress is not None:
                progress.update(done_bytes, total_bytes, _LABEL)

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(read(), trainer)
    content = made_exact(json.loads(library.to_str()), end_of_document=END_OF_DOCUMENT)
    return json.dumps(content, ensure_ascii=False, indent=1)
