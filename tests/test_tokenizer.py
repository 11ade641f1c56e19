"""The tokenizer: transformers' ids and chat prompts, exact incremental text, clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_files import TINY, copy_tiny, write_gguf
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from sharp.chat_template import ChatTemplate
from sharp.model_config import ModelFileError
from sharp.tokenizer import Tokenizer
from sharp.weights import open_checkpoint

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return open_checkpoint(TINY).tokenizer()


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Tokenizer:
    return open_checkpoint(demo_model).tokenizer()


# ---- against transformers


def test_demo_ids_equal_transformers(demo: Tokenizer) -> None:
    assert len(GOLDEN["texts"]) > 50
    for row in GOLDEN["texts"]:
        assert demo.encode(row["text"]) == row["ids"], row["text"]
        assert demo.decode(row["ids"], skip_special_tokens=False) == row["decoded"], row["text"]


def test_demo_round_trip(demo: Tokenizer) -> None:
    for row in GOLDEN["texts"]:
        assert demo.decode(row["ids"], skip_special_tokens=False) == row["text"]


def test_demo_chat_prompts_equal_transformers(demo: Tokenizer) -> None:
    assert len(GOLDEN["chats"]) >= 4
    for row in GOLDEN["chats"]:
        assert demo.apply_chat_template(row["messages"]) == row["prompt"]
        assert demo.apply_chat_template(row["messages"], add_generation_prompt=False) == row["closed"]


def test_demo_special_ids(demo: Tokenizer) -> None:
    assert (demo.vocab_size, demo.eos_token_ids, demo.bos_token_id) == (49152, (2,), 1)
    assert demo.encode("<|im_start|>a<|im_end|>") == [1, *demo.encode("a"), 2]
    assert demo.encode("a") == demo.encode("a", add_special_tokens=False)  # no BOS: the metadata says so


# ---- both file kinds


@pytest.mark.parametrize("pre", ["gpt2", "smollm"])
def test_gguf_and_hf_agree(tmp_path: Path, tiny: Tokenizer, pre: str) -> None:
    other = open_checkpoint(write_gguf(tmp_path / "m.gguf", pre=pre)).tokenizer()
    assert (other.vocab_size, other.eos_token_ids, other.bos_token_id) == (300, (2,), 1)
    for text in ["hello world", "the<|im_end|> end", "日本 é\n\n", ""]:
        assert other.encode(text) == tiny.encode(text)
    chat = [{"role": "user", "content": "hello"}]
    assert other.apply_chat_template(chat) == tiny.apply_chat_template(chat)


def test_smollm_splits_blanks_before_digits() -> None:
    """Where the two pre-tokenizers part: "gpt2" glues one blank to a number's first digit."""
    base = ["1", "Ġ", "ĠĠ", "Ġ1"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": base,
        "tokenizer.ggml.merges": ["Ġ Ġ", "Ġ 1"],
    }
    ids = {}
    for pre in ("smollm", "gpt2"):
        tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre}, Path("m"), ())
        ids[pre] = [base[token_id] for token_id in tokenizer.encode("  11")]
    assert ids == {"smollm": ["ĠĠ", "1", "1"], "gpt2": ["Ġ", "Ġ1", "1"]}


def test_bos_only_when_the_metadata_says_so(tmp_path: Path) -> None:
    with_bos = open_checkpoint(write_gguf(tmp_path / "m.gguf", add_bos=True)).tokenizer()
    plain = with_bos.encode("hello", add_special_tokens=False)
    assert with_bos.encode("hello") == [1, *plain]
    assert with_bos.encode("") == [1]


def test_template_places(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "x"}]
    folder = copy_tiny(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("file {{ bos_token }} {{ messages[0].content }}")
    assert open_checkpoint(folder).tokenizer().apply_chat_template(chat) == "file <|im_start|> x"
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config["eos_token"] = {"content": "<|im_end|>"}
    path.write_text(json.dumps(config))
    assert open_checkpoint(folder).tokenizer().apply_chat_template(chat) == "d"
    path.unlink()
    with pytest.raises(ValueError, match="no chat template"):
        open_checkpoint(folder).tokenizer().apply_chat_template(chat)


# ---- decoding


def check_incremental(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Joined pushes and flush are decode(); no push gives back what a later one would have completed."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) + detokenizer.flush() == whole
    text = ""
    for piece in pieces:
        text += piece
        assert whole.startswith(text)


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.integers(0, 310), max_size=40), skip=st.booleans())
@example(ids=[], skip=True)
def test_incremental_equals_decode_on_any_ids(tiny: Tokenizer, ids: list[int], skip: bool) -> None:
    check_incremental(tiny, ids, skip)  # ids from 300 on name no token


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), skip=st.booleans())
@example(text="👩‍👩‍👧‍👦 e\u0301\U0010ffff\x00", skip=True)
def test_incremental_equals_text(tiny: Tokenizer, text: str, skip: bool) -> None:
    ids = tiny.encode(text)
    check_incremental(tiny, ids, skip)
    detokenizer = tiny.detokenizer(skip_special_tokens=False)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) == text  # nothing left to flush
    assert detokenizer.flush() == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)  # never half a character


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=24))
@example(raw=b"\xf0\x9f\x98")
@example(raw=b"\xed\xa0\x80\xf4\x90\x80\x80")
@example(raw=b"\xe3\x81\xe3\x81\x82\xc0\x80a")
def test_incremental_on_invalid_bytes(tiny: Tokenizer, raw: bytes) -> None:
    """Every byte as its own token: U+FFFD where, and as soon as, no continuation can help."""
    table = tiny._token_table()
    ids = [table.index(bytes([byte])) for byte in raw]
    check_incremental(tiny, ids, True)
    assert tiny.decode(ids) == raw.decode("utf-8", errors="replace")


def test_half_characters_wait_and_lost_ones_do_not(tiny: Tokenizer) -> None:
    table = tiny._token_table()
    first, second, third = (table.index(bytes([byte])) for byte in "あ".encode())
    detokenizer = tiny.detokenizer()
    assert [detokenizer.push(i) for i in (first, second, third)] == ["", "", "あ"]
    letter = table.index(b"a")
    assert [detokenizer.push(i) for i in (first, second, letter)] == ["", "", "\ufffda"]
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"


def test_demo_incremental(demo: Tokenizer) -> None:
    for row in GOLDEN["texts"]:
        check_incremental(demo, row["ids"], True)
        check_incremental(demo, row["ids"], False)
        check_incremental(demo, row["ids"][::-1], True)  # halves of characters in the wrong order


def test_specials_are_skipped(tiny: Tokenizer) -> None:
    ids = tiny.encode("<|im_start|>hello<|im_end|>")
    assert tiny.decode(ids) == "hello"
    assert tiny.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"
    assert [tiny.detokenizer().push(i) for i in (1, 2)] == ["", ""]
    assert tiny.detokenizer(skip_special_tokens=False).push(2) == "<|im_end|>"


def test_added_tokens_outside_the_byte_alphabet(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "m", vocab_size=300)
    path = folder / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.add_tokens(["two words", "ÿ日"])
    backend.save(str(path))
    tokenizer = Tokenizer.from_hf(folder, ())
    text = "hello two words and ÿ日 é"
    ids = tokenizer.encode(text)
    assert {300, 301} <= set(ids)
    check_incremental(tokenizer, ids, True)
    with pytest.raises(ModelFileError, match="the tokenizer has 302 tokens, the model's vocabulary only 300"):
        open_checkpoint(folder).tokenizer()


# ---- bad input


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, TypeError, "text must be str, not NoneType"),
        (b"bytes", TypeError, "text must be str, not bytes"),
        ("ok \ud83d bad", ValueError, r"lone surrogate U\+D83D at index 3"),
        ("\udcff", ValueError, r"lone surrogate U\+DCFF at index 0"),
    ],
)
def test_bad_text(tiny: Tokenizer, text: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.encode(text)


@pytest.mark.parametrize("token_id", [-1, 2**31])
def test_bad_ids(tiny: Tokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token_id} is outside"):
        tiny.decode([token_id])
    with pytest.raises(ValueError, match=rf"token id {token_id} is outside"):
        tiny.detokenizer().push(token_id)


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, "messages is empty"),
        ("hi", TypeError, "messages must be a list"),
        ({"role": "user", "content": "hi"}, TypeError, "messages must be a list"),
        (None, TypeError, "messages must be a list"),
        (["hi"], TypeError, r"messages\[0\] must be an object, not str"),
        ([{"content": "hi"}], ValueError, r"messages\[0\] has no 'role'"),
        ([{"role": "user"}], ValueError, r"messages\[0\] has no 'content'"),
        ([{"role": "", "content": "hi"}], ValueError, r"messages\[0\]\['role'\] is empty"),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": 3}],
            TypeError,
            r"messages\[1\]\['content'\]",
        ),
    ],
)
def test_bad_messages(tiny: Tokenizer, messages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.apply_chat_template(messages)


def test_template_environment() -> None:
    chat = [{"role": "user", "content": "<é>"}]
    assert ChatTemplate("{{ messages[0] | tojson }}", {}).render(chat, True) == (
        '{"role": "user", "content": "<é>"}'
    )
    trimmed = ChatTemplate("  {% if true %}\nx\n  {% endif %}\ny", {})
    assert trimmed.render(chat, True) == "x\ny"
    assert ChatTemplate("{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}", {}).render(chat, True) == "1"
    assert ChatTemplate("{{ strftime_now('%%') }}", {}).render(chat, True) == "%"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused these messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refused these messages"),
        ("{{ 1 // 0 }}", "refused these messages"),
        ("{{ ''.__class__.__mro__ }}", "refused these messages: access to attribute"),
        ("{{ messages.append(1) }}", "refused these messages"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refused these messages"),
    ],
)
def test_template_errors(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], True)


def test_template_syntax_error(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("ok\n{% if %}")
    with pytest.raises(ModelFileError, match="chat template is not valid jinja2, line 2"):
        open_checkpoint(folder).tokenizer()


# ---- wrong files

GOOD: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.token_type": [1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "bert", "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama"),
        ("model", None, "tokenizer.ggml.model None"),
        (
            "pre",
            "tekken",
            "tokenizer.ggml.pre 'tekken' is not supported; supported: llama-bpe, .*, qwen2, smoll",
        ),
        ("pre", ["gpt2"], "tokenizer.ggml.pre|cannot be built"),
        ("tokens", None, "tokenizer.ggml.tokens is missing"),
        ("tokens", [1, 2], "tokenizer.ggml.tokens is missing or not a list of strings"),
        ("tokens", ["a", "b", "a"], "duplicates"),
        ("token_type", [1, 1], "one entry per token"),
        ("merges", ["ab"], "merges has 'ab'"),
        ("merges", ["a b c"], "merges has 'a b c'"),
        ("merges", ["a z"], "cannot be built"),
        ("bos_token_id", 3, "bos_token_id 3 is not a token"),
        ("add_bos_token", True, "no bos_token_id"),
        ("add_eos_token", True, "no eos_token_id"),
        ("add_bos_token", 7, "add_bos_token must be true or false, not 7"),
        ("bos_token_id", "x", "bos_token_id 'x' is not a token; there are 3"),
        ("bos_token_id", True, "bos_token_id True is not a token"),
    ],
)
def test_wrong_gguf_tokenizer(key: str, value: Any, message: str) -> None:
    assert Tokenizer.from_gguf(GOOD, Path("m.gguf"), ()).encode("ab") == [2]
    with pytest.raises(ModelFileError, match=message) as error:
        Tokenizer.from_gguf(GOOD | {f"tokenizer.ggml.{key}": value}, Path("m.gguf"), ())
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("{}", "is not a tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}', "is not a tokenizer"),
    ],
)
def test_wrong_tokenizer_json(tmp_path: Path, text: str | None, message: str) -> None:
    folder = copy_tiny(tmp_path / "m")
    path = folder / "tokenizer.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ModelFileError, match=message) as error:
        open_checkpoint(folder).tokenizer()
    assert str(path) in str(error.value)


def test_other_decoders_are_refused(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "m")
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.Metaspace()
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        ModelFileError, match=r"decoder Metaspace is not supported; supported: ByteLevel, Replace \+ ByteF"
    ):
        open_checkpoint(folder).tokenizer()
