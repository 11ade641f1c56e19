"""Every kind of tokenizer: transformers' ids and texts, from an HF directory and from GGUF alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import change_tensors, copy_tiny
from test_tokenizer import check_incremental

from sharp.gguf_reader import read_gguf
from sharp.model_config import ModelFileError
from sharp.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizers.json").read_text(encoding="utf-8"))
KINDS = tuple(GOLDEN["kinds"])
TEXTS = GOLDEN["texts"]


def hf(kind: str, folder: Path, **config: Any) -> Tokenizer:
    """From a directory with the golden file's tokenizer.json and configuration (`config`: more of it)."""
    golden = GOLDEN["kinds"][kind]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(golden["tokenizer"]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(golden["config"] | config), encoding="utf-8")
    return Tokenizer.from_hf(folder, ())


def metadata(kind: str) -> dict[str, Any]:
    """The same tokenizer as a GGUF file says it."""
    golden = GOLDEN["kinds"][kind]
    definition, config = golden["tokenizer"], golden["config"]
    vocabulary = definition["model"]["vocab"] | {
        token["content"]: token["id"] for token in definition["added_tokens"]
    }
    out: dict[str, Any] = {
        "model": "llama" if golden["scores"] else "gpt2",
        "tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "token_type": golden["types"],
    }
    if golden["scores"]:
        out["scores"] = golden["scores"]
        out["add_space_prefix"] = kind == "llama"
        out["unknown_token_id"] = 0
    else:
        out["pre"] = kind
        out["merges"] = [" ".join(merge) for merge in definition["model"]["merges"]]
    for which in ("bos", "eos"):
        if f"{which}_token" in config:
            out[f"{which}_token_id"] = vocabulary[config[f"{which}_token"]]
    return {f"tokenizer.ggml.{key}": value for key, value in out.items()}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    out = {}
    for kind in KINDS:
        out["hf", kind] = hf(kind, folder / kind)
        out["gguf", kind] = Tokenizer.from_gguf(metadata(kind), Path("m.gguf"), ())
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_ids_and_text_equal_transformers(tokenizers: Any, source: str, kind: str) -> None:
    tokenizer = tokenizers[source, kind]
    rows = GOLDEN["kinds"][kind]["texts"]
    assert len(rows) == len(TEXTS) > 60
    for text, row in zip(TEXTS, rows, strict=True):
        assert tokenizer.encode(text) == row["ids"], text
        assert tokenizer.decode(row["ids"]) == row.get("decoded", text), text
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["whole"], text
        check_incremental(tokenizer, row["ids"], True)
        check_incremental(tokenizer, row["ids"], False)
    for row in GOLDEN["kinds"][kind]["sequences"]:  # ids at random: broken characters above all
        assert tokenizer.decode(row["ids"]) == row["decoded"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["whole"]
        check_incremental(tokenizer, row["ids"], True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_tells_the_kinds_apart(tokenizers: Any, kind: str) -> None:
    """Another kind's rules over the same vocabulary give other ids somewhere, so the test above can fail."""
    data = metadata(kind)
    if kind.startswith("llama") and kind != "llama-bpe":
        others = [data | {"tokenizer.ggml.add_space_prefix": kind != "llama"}]
    else:
        others = [data | {"tokenizer.ggml.pre": pre} for pre in ("llama-bpe", "qwen2", "smollm", "gpt2")]
        others = [other for other in others if other["tokenizer.ggml.pre"] != kind]
    for other in others:
        changed = Tokenizer.from_gguf(other, Path("m.gguf"), ())
        assert any(
            changed.encode(text, False) != tokenizers["gguf", kind].encode(text, False) for text in TEXTS
        )


@pytest.mark.parametrize("kind", ["qwen2", "llama", "llama-no-prefix"])
def test_incremental_on_any_ids(tokenizers: Any, kind: str) -> None:
    tokenizer = tokenizers["gguf", kind]

    @settings(max_examples=200, deadline=None)
    @given(ids=st.lists(st.integers(0, 720) | st.integers(3, 258), max_size=30), skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        check_incremental(tokenizer, ids, skip)

    check()


def test_byte_fallback_waits_for_the_end_of_a_run(tokenizers: Any) -> None:
    tokenizer = tokenizers["gguf", "llama"]
    byte = {value: value + 3 for value in range(256)}  # after <unk>, <s> and </s>
    letter = tokenizer.encode("a", add_special_tokens=False)[-1]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(byte[value]) for value in "あ".encode()] == ["", "", ""]
    assert detokenizer.push(letter).startswith("あ")
    assert [detokenizer.push(byte[value]) for value in (0xE3, 0x81)] == ["", ""]
    assert detokenizer.flush() == "\ufffd\ufffd"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_through_a_written_file(tmp_path: Path, tokenizers: Any, kind: str) -> None:
    """The metadata as the gguf library writes it: scores as float32, types as int32."""
    data, path = metadata(kind), tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in data.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = Tokenizer.from_gguf(read_gguf(path)[0], path, ())
    for text in TEXTS:
        assert read.encode(text) == tokenizers["gguf", kind].encode(text)


def test_what_goes_around_a_text_of_a_gguf_file(tokenizers: Any) -> None:
    bare = tokenizers["hf", "llama"].encode("hi", add_special_tokens=False)
    for bos in (False, True):
        for eos in (False, True):
            wanted = [1] * bos + bare + [2] * eos
            flags = {"add_bos_token": bos, "add_eos_token": eos}
            data = metadata("llama") | {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
            assert Tokenizer.from_gguf(data, Path("m.gguf"), ()).encode("hi") == wanted
    # What a file does not say: llama.cpp adds a BOS for these kinds, and for no other.
    adds = {kind for kind in KINDS if len(tokenizers["gguf", kind].encode(""))}
    assert adds == {"llama-bpe", "llama", "llama-no-prefix"}


@pytest.mark.parametrize("index", range(len(GOLDEN["variants"])))
def test_what_the_configuration_changes_equals_transformers(tmp_path: Path, index: int) -> None:
    variant = GOLDEN["variants"][index]
    tokenizer = hf(variant["kind"], tmp_path / "m", **variant["config"])
    for row in variant["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"]) == row["decoded"], row["text"]


def test_added_tokens_of_the_configuration(tmp_path: Path) -> None:
    """tokenizer_config.json may know more tokens than tokenizer.json, and that some are special."""
    entry = {"content": "<extra>", "special": True, "normalized": False}
    tokenizer = hf("qwen2", tmp_path / "m", added_tokens_decoder={"707": entry})
    assert tokenizer.encode("a<extra>")[-1] == 707
    assert tokenizer.decode(tokenizer.encode("a<extra>")) == "a"
    named = hf("qwen2", tmp_path / "n", pad_token={"content": "!"})
    assert named.decode(named.encode("hi!")) == "hi"  # a special token, though tokenizer.json says nothing


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": {"900": {"content": "<x>"}}}, "added token '<x>' has id 900, but 707 in"),
        ({"added_tokens_decoder": {"0": {"content": "<|im_end|>"}}}, "'<|im_end|>' has id 0, but 703 in"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder has 'x'"),
        ({"added_tokens_decoder": {"707": {"content": 5}}}, "added token 707 has content 5"),
        ({"added_tokens_decoder": {"707": {"content": "a", "special": 1}}}, "must be true or false"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object"),
    ],
)
def test_wrong_configuration(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message.replace("|", r"\|")) as error:
        hf("qwen2", tmp_path / "m", **config)
    assert "tokenizer_config.json" in str(error.value)


def test_an_engine_streams_byte_fallback(tmp_path: Path) -> None:
    """A whole model with such a tokenizer: the text only grows, and in the end it is what decode gives."""
    from sharp import LLM, SamplingParams

    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        rng = np.random.default_rng(3)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = rng.standard_normal((702, 32), dtype=np.float32)

    folder = change_tensors(copy_tiny(tmp_path / "m", vocab_size=702), enlarge)
    hf("llama", folder)
    params = SamplingParams(max_tokens=40, temperature=1.5, seed=4)
    with LLM(folder, device="cpu", progress=False) as llm:
        text = ""
        for output in llm.stream(["hello \u3042"], params):
            assert output.outputs[0].text.startswith(text)
            text = output.outputs[0].text
        ids = output.outputs[0].token_ids
        assert any(3 <= token_id < 259 for token_id in ids)
        assert text == llm.tokenizer.decode(ids)
        assert output.prompt_token_ids[0] == 1


def test_chat_templates_of_a_gguf_file() -> None:
    chat, data = [{"role": "user", "content": "x"}], metadata("gpt2")
    for key in ("tokenizer.chat_template", "tokenizer.chat_template.default"):
        tokenizer = Tokenizer.from_gguf(data | {key: "{{ eos_token }}!"}, Path("m.gguf"), ())
        assert tokenizer.has_chat_template
        assert tokenizer.apply_chat_template(chat) == "<|endoftext|>!"
    assert not Tokenizer.from_gguf(data, Path("m.gguf"), ()).has_chat_template
    with pytest.raises(ModelFileError, match=r"m\.gguf: tokenizer\.chat_template must be text, not int"):
        Tokenizer.from_gguf(data | {"tokenizer.chat_template": 5}, Path("m.gguf"), ())
    with pytest.raises(ModelFileError, match=r"m\.gguf: .*not valid jinja2, line 2"):
        Tokenizer.from_gguf(data | {"tokenizer.chat_template": "\n{% if"}, Path("m.gguf"), ())


def test_only_sentencepieces_own_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelFileError, match=r"only tokenizer\.model \(SentencePiece\).*save_pretrained"):
        Tokenizer.from_hf(tmp_path, ())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scores", None, "scores is missing"),
        ("scores", [1.0], "scores is missing or does not have one entry per token"),
        ("scores", [float("nan")] * 702, "scores has an entry that is not a finite number"),
        ("scores", ["1"] * 702, "scores has an entry that is not a finite number"),
        ("add_space_prefix", 3, "add_space_prefix must be true or false, not 3"),
        ("unknown_token_id", 702, "unknown_token_id 702 is not a token; there are 702"),
        ("tokens", ["x" * 300, *map(str, range(701))], "of 300 characters, over the limit of 256"),
        ("tokens", [], "entry per token"),
    ],
)
def test_wrong_sentencepiece_metadata(key: str, value: Any, message: str) -> None:
    data = metadata("llama") | {f"tokenizer.ggml.{key}": value}
    if key == "tokens" and value:
        data["tokenizer.ggml.token_type"] = [1] * 702
    with pytest.raises(ModelFileError, match=message) as error:
        Tokenizer.from_gguf(data, Path("m.gguf"), ())
    assert "m.gguf" in str(error.value)


def test_vocabularies_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by counting, before the library takes a gigabyte for them."""
    text = json.dumps(GOLDEN["kinds"]["gpt2"]["tokenizer"])
    (tmp_path / "tokenizer.json").write_text(text.replace('"merges": [', '"merges": [' + '"a b",' * 2**22))
    with pytest.raises(
        ModelFileError, match=r"tokenizer\.json has more than 4,194,304 entries, over the limit"
    ):
        Tokenizer.from_hf(tmp_path, ())
    (tmp_path / "tokenizer.json").write_text(text.replace('"vocab": {', '"vocab": {' + '"a":1,' * 2**20))
    with pytest.raises(
        ModelFileError, match=r"tokenizer\.json has more than 1,048,576 entries, over the limit"
    ):
        Tokenizer.from_hf(tmp_path, ())
    monkeypatch.setattr("sharp.tokenizer_gguf._MAX_CHARS", 700)
    with pytest.raises(ModelFileError, match=r"tokens has \d+ characters, over the limit of 700"):
        Tokenizer.from_gguf(metadata("llama"), Path("m.gguf"), ())
    monkeypatch.setattr("sharp.tokenizer_gguf.MAX_TOKENS", 700)
    with pytest.raises(ModelFileError, match="tokens has 702 entries, over the limit of 700"):
        Tokenizer.from_gguf(metadata("gpt2"), Path("m.gguf"), ())


def test_special_tokens_that_a_normalizer_changes(tmp_path: Path) -> None:
    """Found by fuzzing; older files of Llama 2 are like that, and the library does not skip such tokens."""
    definition = json.loads(json.dumps(GOLDEN["kinds"]["llama"]["tokenizer"]))
    for token in definition["added_tokens"]:
        token["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    tokenizer = Tokenizer.from_hf(tmp_path, ())
    ids = tokenizer.encode("The <s> The </s>")
    assert ids.count(1) == 2
    assert ids.count(2) == 1
    assert not {"<", ">"} & set(tokenizer.decode(ids))
    check_incremental(tokenizer, ids, True)
    check_incremental(tokenizer, ids, False)


def test_two_tokens_of_one_id(tmp_path: Path) -> None:
    """Found by fuzzing: the library decodes such an id one way or the other."""
    definition = json.loads(json.dumps(GOLDEN["kinds"]["gpt2"]["tokenizer"]))
    definition["model"]["vocab"]["!"] = definition["model"]["vocab"]["#"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"tokens '[!#]' and '[!#]' share the id \d+"):
        Tokenizer.from_hf(tmp_path, ())


def test_what_the_library_meets_late(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Found by fuzzing: a template or an unknown token without an id, met when the first text is encoded."""
    definition = json.loads(json.dumps(GOLDEN["kinds"]["llama"]["tokenizer"]))
    definition["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(ValueError, match="the tokenizers library failed"):
        Tokenizer.from_hf(tmp_path, ()).encode("hello")
    definition = json.loads(json.dumps(GOLDEN["kinds"]["llama"]["tokenizer"]))
    definition["model"] |= {"unk_token": "nothing", "byte_fallback": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(ValueError, match="the tokenizers library failed: Unk token `nothing` not found"):
        Tokenizer.from_hf(tmp_path, ()).encode("\u3042")
    capfd.readouterr()  # what the panic prints


def test_ids_far_outside(tmp_path: Path) -> None:
    """A table of two billion entries is never made."""
    definition = json.loads(json.dumps(GOLDEN["kinds"]["gpt2"]["tokenizer"]))
    definition["model"]["vocab"]["!"] = 2**31 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(ModelFileError, match="token '!' has id 2147483647, over the limit of 1048576"):
        Tokenizer.from_hf(tmp_path, ())
