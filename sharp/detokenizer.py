"""Text from token ids as they come, for the two decoders that language models use.

Knows what a token stands for; refuses to know where vocabularies come from. For either class, joined pushes
and the flush are what decoding all ids at once gives, and text that was given is never taken back.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence, Set
from typing import Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """Incremental decoding of one token sequence."""

    def push(self, token_id: int) -> str:
        """Text that this token makes final, often "". Raises ValueError for an id outside [0, 2**31)."""

    def flush(self) -> str:
        """The end of the sequence: U+FFFD for what was never finished, else ""."""


class ByteLevelDetokenizer:
    """A token is a fixed string of bytes (GPT-2, Llama 3, Qwen): the state is an unfinished character."""

    def __init__(self, token_bytes: Sequence[bytes], skipped: Set[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        # Replacement follows Unicode's "maximal subpart" rule here and in the library alike: a byte sequence
        # becomes U+FFFD as soon as no continuation can make it valid.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        check_id(token_id)
        if token_id in self._skipped or token_id >= len(self._token_bytes):
            return ""
        return self._decoder.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteFallbackDetokenizer:
    """A token is text, or one byte of a character that the vocabulary lacks (Llama 2, Mistral).

    A run of byte tokens is text if it is UTF-8 as a whole, else U+FFFD for each of its bytes: that is the
    library's rule (decoders.ByteFallback), and why a run is held until a token of text ends it.
    """

    def __init__(self, pieces: Sequence[str | int | None], skipped: Set[int], num_stripped: int) -> None:
        """pieces: by id, text, or a byte's value, or None for no token. num_stripped: as many blanks are
        taken from the beginning of the whole text, the counterpart of the blank that encoding puts there.
        """
        self._pieces = pieces
        self._skipped = skipped
        self._num_stripped = num_stripped
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        check_id(token_id)
        piece = self._pieces[token_id] if token_id < len(self._pieces) else None
        if token_id in self._skipped or piece is None:
            return ""
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        return self._strip(self._end_run() + piece)

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        try:
            text = self._run.decode("utf-8")
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return text

    def _strip(self, text: str) -> str:
        while self._num_stripped and text.startswith(" "):
            text, self._num_stripped = text[1:], self._num_stripped - 1
        if text:
            self._num_stripped = 0
        return text


def check_id(token_id: int) -> int:
    """Raises ValueError for an id outside [0, 2**31)."""
    if not 0 <= token_id < 2**31:
        raise ValueError(f"token id {token_id} is outside [0, 2**31)")
    return int(token_id)


def byte_level_table(tokens: Iterable[tuple[str, int]], size: int) -> list[bytes]:
    """The bytes of every id, as the library's ByteLevel decoder sees them; holes in the ids are empty."""
    byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
    table = [b""] * size
    for token, token_id in tokens:
        try:
            table[token_id] = bytes([byte_of[char] for char in token])
        except KeyError:  # an added token with characters outside the alphabet stands for itself
            table[token_id] = token.encode("utf-8")
    return table


def byte_fallback_table(tokens: Iterable[tuple[str, int]], size: int) -> list[str | int | None]:
    """By id: text with blanks for U+2581, a byte's value for "<0x..>", None for holes in the ids."""
    table: list[str | int | None] = [None] * size
    for token, token_id in tokens:
        byte = _BYTE_TOKEN.fullmatch(token)
        table[token_id] = int(byte[1], 16) if byte else token.replace("\u2581", " ")
    return table


def _byte_alphabet() -> list[str]:
    """GPT-2's byte -> character table: printable Latin-1 as itself, the rest from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return [alphabet[byte] for byte in range(256)]
