"""Bytes that arrive one token at a time, turned into text that can be shown at once."""

import codecs


class Utf8Streamer:
    """Incremental UTF-8 decoder: text comes out as soon as, and not before, its characters are complete.

    Bytes that no continuation could make valid become the replacement character U+FFFD, so the pieces always join to
    what decoding everything at once with `errors="replace"` gives.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """Take the next bytes and return the text they complete, possibly none."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """End the text: return what an unfinished character becomes, and start afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
