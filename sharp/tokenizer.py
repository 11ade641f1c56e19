"""Token ids from text, text from token ids (at once or as they come), and chat prompts.

Knows how a GGUF file or an HF directory describes a byte-level BPE tokenizer, and hands the work to the
`tokenizers` library. Knows nothing of models or requests.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from sharp.chat_template import ChatTemplate
from sharp.model_config import ModelFileError, read_json

# token_type of a GGUF vocabulary: llama.cpp's enum llama_token_type.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_PRE_TOKENIZERS = ("smollm", "gpt2", "gpt-2")


class Tokenizer:
    """A byte-level BPE tokenizer.

    Attributes: vocab_size (one more than the largest id); eos_token_ids; bos_token_id (None without one).
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
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._special_ids = {
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._token_bytes: list[bytes] | None = None
        self._vocabulary = vocabulary
        self._template = None if chat_template is None else ChatTemplate(chat_template, special_tokens or {})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path, eos_token_ids: Sequence[int]) -> Tokenizer:
        """From a GGUF file's metadata (path: for messages). Raises ModelFileError for what is not
        supported.
        """
        try:
            return _from_gguf(cls, metadata, path, eos_token_ids)
        except ModelFileError:
            raise
        except (
            Exception
        ) as error:  # the library raises bare Exception for merges that do not fit the vocabulary
            raise ModelFileError(f"{path}: the tokenizer in the metadata cannot be built: {error}") from None

    @classmethod
    def from_hf(cls, directory: Path, eos_token_ids: Sequence[int]) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja (the last two may be absent).

        Raises ModelFileError when tokenizer.json is absent, damaged, or not byte-level.
        """
        path = directory / "tokenizer.json"
        read_json(path)  # for a clear message about a missing or broken file
        try:
            backend = Backend.from_file(str(path))
            decoder = "none" if backend.decoder is None else type(backend.decoder).__name__
        except Exception as error:  # the library raises bare Exception
            raise ModelFileError(f"{path} is not a tokenizer: {error}") from None
        if decoder != "ByteLevel":
            raise ModelFileError(f"{path}: decoder {decoder} is not supported; supported: ByteLevel")
        backend.no_truncation()
        backend.no_padding()
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        special = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(key)
            value = (
                value.get("content") if isinstance(value, dict) else value
            )  # older files: an AddedToken object
            if isinstance(value, str):
                special[key] = value
        bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        try:
            return cls(
                backend,
                eos_token_ids=eos_token_ids,
                bos_token_id=bos,
                chat_template=_hf_template(directory, config),
                special_tokens=special,
            )
        except ValueError as error:
            raise ModelFileError(f"{directory}: {error}") from None

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
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that name no token become nothing.

        Raises ValueError for an id outside [0, 2**31).
        """
        checked = [_check_id(token_id) for token_id in ids]
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
        if self._token_bytes is None:
            self._token_bytes = self._all_token_bytes()
        skipped = self._special_ids if skip_special_tokens else set()
        return Detokenizer(self._token_bytes, skipped)

    def _all_token_bytes(self) -> list[bytes]:
        """The bytes of every id, as the library's ByteLevel decoder sees them; holes in the ids are empty."""
        byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
        table = [b""] * self.vocab_size
        for token, token_id in self._vocabulary.items():
            try:
                table[token_id] = bytes([byte_of[char] for char in token])
            except KeyError:  # an added token with characters outside the alphabet stands for itself
                table[token_id] = token.encode("utf-8")
        return table


class Detokenizer:
    """Incremental decoding of one token sequence: joined pushes and flush equal Tokenizer.decode of all ids.

    A byte-level token is a fixed string of bytes, so the only state is the unfinished UTF-8 character: at
    most three bytes, and the cost of a push is that of its own bytes.
    """

    def __init__(self, token_bytes: Sequence[bytes], skipped: set[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        # Replacement follows Unicode's "maximal subpart" rule here and in the library alike: a byte sequence
        # becomes U+FFFD as soon as no continuation can make it valid.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that this token makes final; "" inside a character. Raises ValueError as decode does."""
        _check_id(token_id)
        if token_id in self._skipped or token_id >= len(self._token_bytes):
            return ""
        return self._decoder.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        """The end of the sequence: U+FFFD for a character that was never finished, else ""."""
        return self._decoder.decode(b"", final=True)


def _check_id(token_id: int) -> int:
    if not 0 <= token_id < 2**31:
        raise ValueError(f"token id {token_id} is outside [0, 2**31)")
    return int(token_id)


def _byte_alphabet() -> list[str]:
    """GPT-2's byte -> character table: printable Latin-1 as itself, the rest from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return [alphabet[byte] for byte in range(256)]


def _from_gguf(
    cls: type[Tokenizer], metadata: Mapping[str, Any], path: Path, eos_token_ids: Sequence[int]
) -> Tokenizer:
    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    model, pre = get("model"), get("pre", "gpt2")
    if model != "gpt2":
        raise ModelFileError(f"{path}: tokenizer.ggml.model {model!r} is not supported; supported: gpt2")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ModelFileError(f"{path}: tokenizer.ggml.pre {pre!r} is not supported; supported: {known}")
    if get("add_eos_token", False):
        raise ModelFileError(f"{path}: tokenizer.ggml.add_eos_token is not supported")
    tokens, merges = get("tokens"), get("merges")
    for key, value in (("tokens", tokens), ("merges", merges)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelFileError(f"{path}: tokenizer.ggml.{key} is missing or not a list of strings")
    types = get("token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ModelFileError(f"{path}: tokenizer.ggml.token_type does not have one entry per token")
    if len(set(tokens)) != len(tokens):
        raise ModelFileError(f"{path}: tokenizer.ggml.tokens has duplicates")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2:
            raise ModelFileError(f"{path}: tokenizer.ggml.merges has {merge!r}, which is not two tokens")
    backend = Backend(models.BPE(vocab=vocabulary, merges=pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # "smollm": the published tokenizer.json splits every digit off before GPT-2's pattern.
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        special = kind == _CONTROL
        add(
            [
                AddedToken(token, special=special, normalized=False)
                for token, token_type in zip(tokens, types, strict=True)
                if token_type == kind
            ]
        )
    special_tokens = {}
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in ids.items():
        token_id = get(f"{theirs}_token_id")
        if token_id is not None:
            if not 0 <= token_id < len(tokens):
                raise ModelFileError(f"{path}: tokenizer.ggml.{theirs}_token_id {token_id} is not a token")
            special_tokens[f"{ours}_token"] = tokens[token_id]
    bos_id = get("bos_token_id")
    if get("add_bos_token", False):
        if bos_id is None:
            raise ModelFileError(f"{path}: tokenizer.ggml.add_bos_token is set, but there is no bos_token_id")
        bos = special_tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    return cls(
        backend,
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_id,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens=special_tokens,
    )


def _hf_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the one in tokenizer_config.json (of several, the one named "default")."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{path} cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be text, "
            f"not {json.dumps(template)[:80]}"
        )
    return template
