"""Token ids from text, text from token ids (at once or as they come), and chat prompts.

Knows the `tokenizers` library, which does the work. Knows nothing of models or requests, and leaves to
tokenizer_gguf.py and tokenizer_hf.py how files describe a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from sharp.chat_template import ChatTemplate
from sharp.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    Detokenizer,
    byte_fallback_table,
    byte_level_table,
    check_id,
)
from sharp.model_config import ModelFileError

MAX_TOKENS = 1 << 20  # the largest known vocabulary has 2**18
_BYTE_FALLBACK = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


class Tokenizer:
    """A byte-level BPE tokenizer, or a SentencePiece-like one with byte fallback.

    Attributes: vocab_size (one more than the largest id); eos_token_ids; bos_token_id (None without one).
    Raises ValueError for a decoder that is neither, ids over MAX_TOKENS or shared, a broken chat template.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self._num_stripped = _num_stripped(backend)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > MAX_TOKENS:
            last = max(vocabulary, key=vocabulary.__getitem__)
            raise ValueError(f"token {last!r:.80} has id {vocabulary[last]}, over the limit of {MAX_TOKENS}")
        token_of: dict[int, str] = {}
        for token, token_id in vocabulary.items():
            if token_of.setdefault(token_id, token) != token:
                raise ValueError(
                    f"tokens {token_of[token_id]!r:.40} and {token!r:.40} share the id {token_id}"
                )
        self._special_ids = {
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._table: list[Any] | None = None
        self._vocabulary = vocabulary
        self._template = None if chat_template is None else ChatTemplate(chat_template, special_tokens or {})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path, eos_token_ids: Sequence[int]) -> Tokenizer:
        """From a GGUF file's metadata (path: for messages). Raises ModelFileError for what is damaged or not
        supported.
        """
        from sharp.tokenizer_gguf import describe

        try:
            with library_errors():
                backend, parts = describe(metadata, path)
                return cls(backend, eos_token_ids=eos_token_ids, **parts)
        except ModelFileError:
            raise
        except Exception as error:
            raise ModelFileError(f"{path}: the tokenizer in the metadata cannot be built: {error}") from None

    @classmethod
    def from_hf(cls, directory: Path, eos_token_ids: Sequence[int]) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja (the last two may be absent).

        Raises ModelFileError when tokenizer.json is absent, damaged or not supported.
        """
        from sharp.tokenizer_hf import describe

        try:
            with library_errors():
                backend, parts = describe(directory)
        except ModelFileError:
            raise
        except Exception as error:
            raise ModelFileError(f"{directory / 'tokenizer.json'} is not a tokenizer: {error}") from None
        try:
            return cls(backend, eos_token_ids=eos_token_ids, **parts)
        except ValueError as error:
            raise ModelFileError(f"{directory}: {error}") from None

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return "byte-level BPE" if self._num_stripped is None else "SentencePiece-like BPE with byte fallback"

    @property
    def last_token(self) -> str:
        """The token with the largest id; "" without any."""
        return max(self._vocabulary, key=self._vocabulary.__getitem__, default="")

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written out in the text become their ids, as in transformers.

        add_special_tokens: also what the file says to add around every text, for example a BOS.
        Raises TypeError when text is not str, ValueError when it cannot be UTF-8 (a lone surrogate).
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} "
                f"at index {error.start}"
            ) from None
        with library_errors():
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that name no token become nothing.

        Raises ValueError for an id outside [0, 2**31).
        """
        checked = [check_id(token_id) for token_id in ids]
        if (
            skip_special_tokens
        ):  # the library misses those that its normalizer changes (Llama 2's older files)
            checked = [token_id for token_id in checked if token_id not in self._special_ids]
        with library_errors():
            text: str = self._backend.decode(checked, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text, by the model's own template; encode it with add_special_tokens=False.

        Raises ValueError when the model has no template or it refuses the messages, TypeError or ValueError
        for malformed messages.
        """
        if self._template is None:
            raise ValueError("this model has no chat template; give it plain text")
        return self._template.render(messages, add_generation_prompt)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder for one answer."""
        skipped = self._special_ids if skip_special_tokens else set()
        if self._num_stripped is None:
            return ByteLevelDetokenizer(self._token_table(), skipped)
        return ByteFallbackDetokenizer(self._token_table(), skipped, self._num_stripped)

    def _token_table(self) -> list[Any]:
        if self._table is None:
            make = byte_level_table if self._num_stripped is None else byte_fallback_table
            # Added tokens as the library decodes them, which is after its normalizer.
            decoder = self._backend.get_added_tokens_decoder()
            added = [(self._backend.id_to_token(i) or token.content, i) for i, token in decoder.items()]
            self._table = [*make([*self._vocabulary.items(), *added], self.vocab_size)]
        return self._table


def _num_stripped(backend: Backend) -> int | None:
    """Of a byte-fallback decoder, how many leading blanks it strips; None for a byte-level one."""
    state: Any = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    kinds = "none"
    if state is not None:
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return None
        if steps == _BYTE_FALLBACK:
            return 0
        if steps[:-1] == _BYTE_FALLBACK and steps[-1]["type"] == "Strip":
            strip = steps[-1]
            if strip["content"] == " " and strip["stop"] == 0:
                return int(strip["start"])
        kinds = " + ".join(step["type"] for step in steps)
    raise ValueError(
        f"decoder {kinds} is not supported; supported: ByteLevel, "
        f"Replace + ByteFallback + Fuse (+ Strip) as SentencePiece-like vocabularies have it"
    )


@contextmanager
def library_errors() -> Iterator[None]:
    """ValueError for what the library raises: bare Exception, or, when its Rust code panics on a damaged
    tokenizer, something that is no Exception at all.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library failed: {error}") from None
