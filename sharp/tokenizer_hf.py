"""A tokenizer from a Hugging Face directory: tokenizer.json, tokenizer_config.json, chat_template.jinja.

Knows what the second file adds to the first: tokens, and which are special. What goes around every text (a
BOS, an EOS) is said by tokenizer.json alone; transformers 5, too, lays the older add_bos_token and
add_eos_token of tokenizer_config.json aside. Refuses directories that have only SentencePiece's own file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from sharp.model_config import ModelFileError, read_json
from sharp.untrusted import check_directory

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_MAX_ADDED = 1 << 16
# Of JSON syntax in tokenizer.json, four times what the largest known has: 3.5 million tokens would take the
# library 27 s and 1.6 GB. A colon for every token, two commas for a merge and one for its pair.
_MAX_COLONS, _MAX_COMMAS = 1 << 20, 1 << 22
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def describe(directory: Path) -> tuple[Backend, dict[str, Any]]:
    """The library's tokenizer and the other arguments of sharp's Tokenizer. Raises ModelFileError."""
    check_directory(directory)
    path = directory / "tokenizer.json"
    if not path.exists() and (directory / "tokenizer.model").exists():
        raise ModelFileError(
            f"{path} does not exist, only tokenizer.model (SentencePiece), which is not read. Convert it "
            f"once, where transformers and sentencepiece are installed: AutoTokenizer.from_pretrained(DIR)"
            f".save_pretrained(DIR)"
        )
    backend = _load(path)
    backend.no_truncation()
    backend.no_padding()
    config_path = directory / "tokenizer_config.json"
    config = _optional(config_path)
    older = _optional(directory / "special_tokens_map.json")
    special = {}
    for key in _NAMED:
        value = config.get(key, older.get(key))
        value = (
            value.get("content") if isinstance(value, dict) else value
        )  # older files: an AddedToken object
        if isinstance(value, str) and value:
            special[key] = value
    _add_tokens(backend, config.get("added_tokens_decoder", {}), config_path)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in special.values():
        if token not in known and backend.token_to_id(token) is not None:
            backend.add_special_tokens([AddedToken(token, special=True)])
    bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
    return backend, {
        "bos_token_id": bos,
        "chat_template": _template(directory, config),
        "special_tokens": special,
    }


def _load(path: Path) -> Backend:
    try:
        data = path.read_bytes()
        for char, most in ((b":", _MAX_COLONS), (b",", _MAX_COMMAS)):
            if data.count(char) > most:
                raise ModelFileError(f"{path} has more than {most:,} entries, over the limit")
        msgspec.json.decode(data, type=dict[str, msgspec.Raw])  # syntax alone: nothing is built for it
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist") from None
    except ModelFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}") from None
    return Backend.from_buffer(data)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _add_tokens(backend: Backend, entries: Any, path: Path) -> None:
    """added_tokens_decoder: id -> token, normally what tokenizer.json has too."""
    if not isinstance(entries, dict) or len(entries) > _MAX_ADDED:
        raise ModelFileError(f"{path}: added_tokens_decoder must be an object of up to {_MAX_ADDED} tokens")
    present = backend.get_added_tokens_decoder()
    tokens = {}
    for key, entry in entries.items():
        if not key.isdecimal() or len(key) > 10 or not isinstance(entry, dict):
            raise ModelFileError(f"{path}: added_tokens_decoder has {key!r:.40}: {entry!r:.80}")
        content = entry.get("content")
        if not isinstance(content, str) or not content:
            raise ModelFileError(f"{path}: added token {key} has content {content!r:.80}")
        flags = {name: entry.get(name, default) for name, default in _FLAGS.items()}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise ModelFileError(f"{path}: added token {key}: {flags} must be true or false")
        tokens[int(key)] = AddedToken(content, **flags)
    for token_id, token in sorted(tokens.items()):
        if repr(present.get(token_id)) == repr(token):
            continue
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise ModelFileError(
                f"{path}: added token {token.content!r:.80} has id {token_id}, but {found} in tokenizer.json"
            )


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the one in tokenizer_config.json (of several, the one named "default")."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{path} cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be text, "
            f"not {json.dumps(template)[:80]}"
        )
    return template
