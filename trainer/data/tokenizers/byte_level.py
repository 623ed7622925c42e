"""The alphabet of byte-level tokenizers: a printable character for each byte.

Bytes that are a visible character of Latin-1 stand for themselves; the others are U+0100, U+0101, ... in their order,
so that a space is U+0120.

Source: GPT-2 (Radford et al. 2019); later byte-level tokenizers use the same vocabulary files.
"""

_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = iter(range(0x100, 0x200))
ALPHABET = tuple(chr(byte if byte in _VISIBLE else next(_OTHERS)) for byte in range(256))  # the character of each byte
BYTES = {character: byte for byte, character in enumerate(ALPHABET)}  # the byte of each character


def spelled_bytes(token: str) -> bytes | None:
    """Return the bytes that a token is spelled for; None if it has a character outside the alphabet."""
    try:
        return bytes(BYTES[character] for character in token)
    except KeyError:
        return None
