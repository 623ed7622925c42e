"""Split a domain again whose documents the hash has sent to one side, under `split: auto`.

The documents of one text change sides, that whose hash is nearest to the other side: no text is on both, and it is the
same one whoever reads. (The tail of the documents would hold out texts that are learned as well.)
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from trainer.data.token_cache.ingest import SIDES, DomainInfo, write_text
from trainer.data.token_cache.shards import TokenFile, TokenWriter, open_token_file, paths
from trainer.data.tokenizers.base import Tokenizer


def with_both_sides(domain: DomainInfo, folder: Path, *, tokenizer: Tokenizer) -> DomainInfo:
    """Give a domain whose documents are all on one side another one, in place.

    Args:
        domain: split by hash.
        folder: of its token files, which nobody else has open.
        tokenizer: that made them.

    Returns:
        The domain as it is then; unchanged if all its documents are of one text.
    """
    full, empty = SIDES if domain.train.num_documents else reversed(SIDES)
    info = getattr(domain, full)
    file = open_token_file(folder, f"{domain.name}.{full}", info, vocab_size=tokenizer.vocab_size)
    digests = [_digest(prompt + text) for prompt, text in documents(file, tokenizer)]
    if len(set(digests)) < 2:
        return domain
    moved = min(digests) if empty == "validation" else max(digests)
    made = folder / f".{domain.name}.resplit"
    made.mkdir()
    with ExitStack() as files:
        writers = {
            side: files.enter_context(
                TokenWriter(
                    made,
                    f"{domain.name}.{side}",
                    vocab_size=tokenizer.vocab_size,
                    end_of_document=tokenizer.end_of_document,
                )
            )
            for side in SIDES
        }
        for digest, (prompt, text) in zip(digests, documents(file, tokenizer), strict=True):
            write_text(writers[empty if digest == moved else full], tokenizer, text, prompt=prompt)
        sides = {side: writer.info() for side, writer in writers.items()}
    for side in SIDES:
        for path in paths(folder, f"{domain.name}.{side}", getattr(domain, side), vocab_size=tokenizer.vocab_size):
            path.unlink()
    for path in list(made.iterdir()):
        path.rename(folder / path.name)
    shutil.rmtree(made)
    return domain.model_copy(update={**sides, "is_resplit": True})


def documents(file: TokenFile, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Yield prompt and text of each document."""
    # An end of document stands behind each but the last.
    ends = [*(file.document_starts[1:] - 1).tolist(), file.num_tokens]
    for start, answer, end in zip(file.document_starts.tolist(), file.answer_starts.tolist(), ends, strict=True):
        prompt, text = (
            tokenizer.decode(file.tokens[a:b].tolist()).decode() for a, b in ((start, answer), (answer, end))
        )
        yield prompt, text


def _digest(text: str) -> bytes:
    """Return what the side of a text hangs on (splits.is_held_out): the lowest are held out."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:8]
