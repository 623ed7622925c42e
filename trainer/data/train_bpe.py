"""Training of a byte-level BPE on a run's own text; the tokenizer is kept in the token cache.

It is trained on the training side of the split, as cached by the byte tokenizer: held-out text has no influence on it,
sources are read in the same way as for training, and memory does not grow with the text.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import chain, pairwise
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.atomic_io import replace_file
from trainer.data.token_cache.build_cache import IngestProgress
from trainer.data.token_cache.cache_folder import build_lock, cache_error, publish, remove_abandoned, temporary_path
from trainer.data.token_cache.signed_json import hash_of
from trainer.data.token_cache.token_files import TokenFile
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.hf_files import CHAT_MARKERS, END_OF_DOCUMENT, TOKENIZER, read_tokenizer_file
from trainer.data.tokenizers.lossless import make_lossless
from trainer.data.tokenizers.subword import SubwordTokenizer, tokenizer_fingerprint

_FORMAT = 1  # raise with any change to the tokenizer of the same text
_FINGERPRINT = "fingerprint"
_PIECE_BYTES = 1 << 16
_log = logging.getLogger(__name__)

# Words with the preceding space, up to three digits, punctuation with the following line ends, and indentation without
# the indented text. Source: Llama 3 (Grattafiori et al. 2024), after OpenAI's cl100k_base.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(
    files: Sequence[TokenFile],
    *,
    text_fingerprint: str,
    vocab_size: int,
    min_frequency: int,
    max_train_bytes: int,
    cache_dir: str,
    chat: bool = False,
    progress: IngestProgress | None = None,
) -> SubwordTokenizer:
    """Train a tokenizer, or return it from the cache if text and options are the same.

    The same text, options and version of `tokenizers` give the same tokenizer. Several processes may call this at once:
    one trains, the others wait. `files` are the training text of each domain, encoded by the byte tokenizer; see
    `BPETokenizerConfig` for the options. Raises DataError if the cache cannot be written, or ResourceError if the disk
    is full.
    """
    options = {"vocab_size": vocab_size, "min_frequency": min_frequency, "max_train_bytes": max_train_bytes}
    version = metadata.version("tokenizers")
    inputs: dict[str, object] = {
        "format": _FORMAT,
        "text": text_fingerprint,
        "options": options | {"kind": "bpe"},
        "tokenizers": version,
    }
    special_tokens = [END_OF_DOCUMENT]
    if chat:
        special_tokens += CHAT_MARKERS
        inputs["special_tokens"] = special_tokens
    folder = Path(cache_dir) / f"bpe-{hash_of(inputs)[:16]}"

    def waiting() -> None:
        if progress is not None:
            progress.update(0, 1, "waiting for another process that trains this tokenizer")

    tokenizer = _cached(folder)
    if tokenizer is None:
        try:
            with build_lock(folder, waiting=waiting) as is_alone:
                if is_alone:
                    remove_abandoned([folder])
                tokenizer = _cached(folder)  # another process may have trained it meanwhile
                if tokenizer is None:
                    if folder.exists():
                        _log.warning("%s: the token cache is damaged; training the tokenizer again", folder)
                    text = _train(files, **options, special_tokens=special_tokens, progress=progress)
                    tokenizer = _publish(text, folder)
        except OSError as error:
            raise cache_error(cache_dir, error) from error
    if tokenizer.vocab_size < vocab_size:
        _log.warning(
            f"data.tokenizer.vocab_size: {vocab_size}, but the text has only {tokenizer.vocab_size} tokens that occur "
            f"{min_frequency} times; using those"
        )
    return tokenizer


def training_pieces(files: Sequence[TokenFile], max_bytes: int) -> Iterator[str]:
    """Yield pieces of the training text, at most `max_bytes` in total.

    Domains contribute equally, as far as they are large enough; the pieces of one are spread evenly over it.
    """
    shares = even_shares([file.num_bytes for file in files], max_bytes)
    for file, share in zip(files, shares, strict=True):
        passed = taken = 0
        for piece in _pieces(file):
            passed += len(piece)
            if taken * file.num_bytes < passed * share:  # less was taken than an even spread requires
                piece = piece[: share - taken]
                taken += len(piece)
                yield piece.decode("utf-8", "ignore")  # the limit may split a character


def even_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Divide `total` evenly into shares of at most `sizes`; the others share what small sizes leave."""
    shares = [0] * len(sizes)
    for done, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[index] = min(sizes[index], (total - sum(shares)) // (len(sizes) - done))
    return shares


def _pieces(file: TokenFile) -> Iterator[bytes]:
    end_of_document = bytes([ByteTokenizer.end_of_document])
    for start, end in pairwise(chain(map(int, file.document_starts), [file.num_tokens])):
        for first in range(start, end, _PIECE_BYTES):  # long documents are split
            yield file.tokens[first : min(end, first + _PIECE_BYTES)].tobytes().removesuffix(end_of_document)


def _cached(folder: Path) -> SubwordTokenizer | None:
    """Return the tokenizer in the cache; None if it is missing or damaged."""
    with suppress(OSError, ValueError):
        text = read_tokenizer_file(folder / TOKENIZER, through_links=False)
        fingerprint = read_tokenizer_file(folder / _FINGERPRINT, through_links=False)
        if tokenizer_fingerprint(text, END_OF_DOCUMENT) == fingerprint:
            return SubwordTokenizer(text, END_OF_DOCUMENT)
    return None


def _publish(text: str, folder: Path) -> SubwordTokenizer:
    tokenizer = SubwordTokenizer(text, END_OF_DOCUMENT)
    temporary = temporary_path(folder)
    temporary.mkdir()
    replace_file(temporary / TOKENIZER, text)
    replace_file(temporary / _FINGERPRINT, tokenizer.fingerprint)
    publish(temporary, folder, unless=lambda: _cached(folder) is not None)
    return tokenizer


def _train(
    files: Sequence[TokenFile],
    *,
    vocab_size: int,
    min_frequency: int,
    max_train_bytes: int,
    special_tokens: list[str],
    progress: IngestProgress | None,
) -> str:
    total_bytes = min(max_train_bytes, sum(file.num_bytes for file in files))

    def read() -> Iterator[str]:
        done_bytes = 0
        for piece in training_pieces(files, max_train_bytes):
            yield piece
            done_bytes += len(piece.encode())
            if progress is not None:
                progress.update(done_bytes, total_bytes, "training the tokenizer")

    library = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS), "isolated"), byte_level])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(read(), trainer)
    content = make_lossless(json.loads(library.to_str()), end_of_document=END_OF_DOCUMENT)
    return json.dumps(content, ensure_ascii=False, indent=1)
