"""A tokenizer from the metadata of a GGUF file: tokenizer.ggml.*.

Knows llama.cpp's names for things and the published definitions they stand for. Two models of vocabulary:
"gpt2", byte-level BPE with merges, and "llama", SentencePiece's BPE, where tokens have scores and no merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from sharp.model_config import ModelFileError
from sharp.tokenizer import MAX_TOKENS

# token_type of a GGUF vocabulary: llama.cpp's enum llama_token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# The patterns of the published tokenizer.json files of Llama 3 and Qwen 2 (2.5 and 3 have the same).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
# tokenizer.ggml.pre -> what splits a text before BPE, ahead of the step that maps bytes to characters.
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "smollm": ("digits", "gpt2"),
    "gpt2": ("gpt2",),
    "gpt-2": ("gpt2",),
}
# SentencePiece itself makes none over 16 characters; pieces are cut at every place, which costs their square.
_MAX_PIECE, _MAX_CHARS = 256, 1 << 23


def describe(metadata: Mapping[str, Any], path: Path) -> tuple[Backend, dict[str, Any]]:
    """The library's tokenizer and the other arguments of sharp's Tokenizer. Raises ModelFileError."""
    vocabulary = _Vocabulary(metadata, path)
    model = vocabulary.get("model")
    if model == "gpt2":
        backend, adds_bos = _byte_level(vocabulary)
    elif model == "llama":
        backend, adds_bos = _sentencepiece(vocabulary)
    else:
        raise vocabulary.wrong(f"model {model!r} is not supported; supported: gpt2, llama")
    for kinds, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        chosen = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in kinds and token
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(chosen)
    special_tokens = {
        f"{ours}_token": vocabulary.tokens[token_id]
        for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if (token_id := vocabulary.token_id(theirs)) is not None
    }
    around = []
    for which, default in (("bos", adds_bos), ("eos", False)):
        token_id = vocabulary.token_id(which)
        adds = vocabulary.flag(f"add_{which}_token", default and token_id is not None)
        if adds and token_id is None:
            raise vocabulary.wrong(f"add_{which}_token is set, but there is no {which}_token_id")
        around.append([(vocabulary.tokens[token_id], token_id)] if adds and token_id is not None else [])
    backend.post_processor = add_around("$A", *around)
    templates = [metadata.get(f"tokenizer.chat_template{name}") for name in ("", ".default")]
    template = templates[0] if templates[0] is not None else templates[1]
    if template is not None and not isinstance(template, str):
        raise ModelFileError(f"{path}: tokenizer.chat_template must be text, not {type(template).__name__}")
    return backend, {
        "bos_token_id": vocabulary.token_id("bos"),
        "chat_template": template,
        "special_tokens": special_tokens,
    }


def add_around(
    text: str, before: list[tuple[str, int]], after: list[tuple[str, int]]
) -> processors.TemplateProcessing | None:
    """What puts these (token, id) before and after every text; None for neither."""
    if not before and not after:
        return None
    single = [token for token, _ in before] + [text] + [token for token, _ in after]
    return processors.TemplateProcessing(single=single, special_tokens=list(dict.fromkeys([*before, *after])))


class _Vocabulary:
    """tokenizer.ggml.* of one file: tokens and types, checked; the rest on demand."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata, self._path = metadata, path
        self.tokens: list[str] = self.strings("tokens")
        if len(self.tokens) > MAX_TOKENS:
            raise self.wrong(f"tokens has {len(self.tokens)} entries, over the limit of {MAX_TOKENS}")
        if len(set(self.tokens)) != len(self.tokens):
            raise self.wrong("tokens has duplicates")
        types = self.get("token_type", [_NORMAL] * len(self.tokens))
        if not isinstance(types, list) or len(types) != len(self.tokens):
            raise self.wrong("token_type does not have one entry per token")
        self.types = types

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def wrong(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: tokenizer.ggml.{what}")

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(f"{key} is missing or not a list of strings")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(f"{key} must be true or false, not {value!r:.80}")
        return value

    def token_id(self, which: str) -> int | None:
        value = self.get(f"{which}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise self.wrong(f"{which}_token_id {value!r:.80} is not a token; there are {len(self.tokens)}")
        return value


def _byte_level(vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    """BPE over bytes, and whether such a file adds a BOS when it does not say."""
    pre = vocabulary.get("pre", "gpt2")
    if pre not in _PRE_TOKENIZERS:
        raise vocabulary.wrong(f"pre {pre!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}")
    splits = _PRE_TOKENIZERS[pre]
    pairs = []
    for merge in vocabulary.strings("merges"):
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
        if not left or not right or " " in right:
            raise vocabulary.wrong(f"merges has {merge!r:.80}, which is not two tokens")
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    # Llama 3 takes a word that is a token as it is, whatever its merges would make of it.
    backend = Backend(models.BPE(vocab=ids, merges=pairs, ignore_merges=_LLAMA3 in splits))
    steps: list[Any] = []
    for split in splits:
        if split == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif split != "gpt2":
            steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in splits))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if _QWEN2 in splits:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, _LLAMA3 in splits


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    """SentencePiece's BPE as the published tokenizer.json of Llama 2 and Mistral 7B have it.

    SentencePiece joins the two neighbours whose joint piece has the highest score, leftmost first; that is
    BPE with merges ranked by the score of what they make.
    """
    scores = vocabulary.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise vocabulary.wrong("scores is missing or does not have one entry per token")
    if not all(isinstance(score, float) and isfinite(score) for score in scores):
        raise vocabulary.wrong("scores has an entry that is not a finite number")
    if (num_chars := sum(map(len, vocabulary.tokens))) > _MAX_CHARS:
        raise vocabulary.wrong(f"tokens has {num_chars} characters, over the limit of {_MAX_CHARS}")
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    merges = []
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        if kind != _NORMAL:
            continue
        if len(token) > _MAX_PIECE:
            raise vocabulary.wrong(
                f"tokens has {token[:40]!r}... of {len(token)} characters, over the limit of {_MAX_PIECE}"
            )
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in ids and token[cut:] in ids:
                merges.append((-score, token[:cut], token[cut:]))
    merges.sort(key=lambda merge: merge[0])  # stable: of one piece's cuts, the longer left part first
    unknown = vocabulary.token_id("unknown")
    backend = Backend(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for _, left, right in merges],
            unk_token=vocabulary.tokens[unknown or 0] if vocabulary.tokens else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    blanks = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blanks]) if prefix else blanks
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True
