"""Makes tokenizers.json here with transformers, tokenizers and sentencepiece; sharp is not imported.

    python tests/golden/make_tokenizers.py

Run once, in a throwaway environment (versions used are written into the file). For each kind of tokenizer
that GGUF files name, a small vocabulary is trained on the nasty corpus of prompts.py, and a tokenizer.json
and tokenizer_config.json are written to the published definition of a model of that kind:

    llama-bpe  meta-llama/Meta-Llama-3-8B-Instruct: Split by its pattern, ByteLevel; ignore_merges
    qwen2      Qwen/Qwen2.5-7B-Instruct: NFC, Split by its pattern, ByteLevel
    smollm     HuggingFaceTB/SmolLM2: Digits, ByteLevel with GPT-2's pattern
    gpt2       openai-community/gpt2: ByteLevel with GPT-2's pattern
    llama      meta-llama/Llama-2-7b, mistralai/Mistral-7B-v0.1: SentencePiece BPE with byte fallback
    llama-no-prefix  the same without the blank in front (tokenizer.ggml.add_space_prefix = false)

transformers loads them and gives ids and texts. The llama kinds are also held against sentencepiece itself.
"""

from __future__ import annotations

import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
from make_golden import versions
from prompts import PROMPTS, TEXTS
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
VOCAB = 700
SPACE = "\u2581"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# A word that is a token without any merge leading to it: only ignore_merges finds it.
UNREACHABLE = "\u0120SCREAMING"
SPECIALS = {
    "llama-bpe": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gpt2": ["<|endoftext|>"],
}
PLAIN_ADDED = {"qwen2": ["<think>", "</think>", "<tool_call>"]}
BOS_EOS = {
    "llama-bpe": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen2": (None, "<|im_end|>"),
    "smollm": ("<|im_start|>", "<|im_end|>"),
    "gpt2": ("<|endoftext|>", "<|endoftext|>"),
}
EXTRA_TEXTS = [
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<think>\nhm</think> <tool_call>x",
    "<s>[INST] hi [/INST] there</s><unk> <s> a</s> b",
    "<0x0A> <0xE3><0x81> is not a byte",
    "\u2581 \u2581\u2581under the bar \u2581",
    " SCREAMING SCREAMING",
    "e\u0301 \u1e9b\u0323 \u212b \uac00 \u1100\u1161",
    "a" * 300 + " " * 300 + "\u3042" * 40,
    "\u13a0\u13a1\u13a2 \u1e900 \U0001f9ff\U00010348\U0001d11e",
]
ALL_TEXTS = [*TEXTS, *EXTRA_TEXTS]
# What tokenizer_config.json adds to or takes from tokenizer.json.
_EXTRA = {"content": "<extra>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"add_bos_token": False}),
    ("llama", {"add_bos_token": True, "add_eos_token": True}),
    ("llama-bpe", {"add_eos_token": True}),
    ("qwen2", {"add_bos_token": False, "added_tokens_decoder": {"707": _EXTRA | {"special": True}}}),
    ("qwen2", {"added_tokens_decoder": {"707": _EXTRA | {"special": False, "lstrip": True}}}),
    ("qwen2", {"added_tokens_decoder": {"704": _EXTRA | {"content": "<think>", "special": True}}}),
    ("gpt2", {"pad_token": "!", "unk_token": {"__type": "AddedToken", **_EXTRA, "content": "?"}}),
    ("smollm", {"add_bos_token": True}),
]
VARIANT_TEXTS = ["", "hi! what?", "a <extra>b<extra> c", "<think>hm</think> x<|im_end|>", "</s>!"]


def corpus() -> list[str]:
    return [*TEXTS, *(text for text in PROMPTS.values() if isinstance(text, str))]


def added(token_id: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": special}


def byte_level(kind: str) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """tokenizer.json, tokenizer_config.json and llama.cpp's token types."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if kind in ("llama-bpe", "qwen2"):
        pattern = LLAMA3 if kind == "llama-bpe" else QWEN2
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps = [split, level | {"use_regex": False}]
        trained_split = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [{"type": "Digits", "individual_digits": True}] if kind == "smollm" else []
        trained_split = [pre_tokenizers.Digits(individual_digits=True)] if steps else []
        steps = [*steps, level]
        trained_split.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(trained_split)
    if kind == "qwen2":
        trained.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    model["ignore_merges"] = kind == "llama-bpe"
    model["vocab"][UNREACHABLE] = len(model["vocab"])
    types = [1] * len(model["vocab"])
    tokens = []
    for content in SPECIALS[kind]:
        tokens.append(added(len(types), content, True))
        types.append(3)
    for content in PLAIN_ADDED.get(kind, []):
        tokens.append(added(len(types), content, False))
        types.append(4)
    bos, eos = BOS_EOS[kind]
    processor: dict[str, Any] = level | {"trim_offsets": False}
    if kind == "llama-bpe":
        bos_id = next(token["id"] for token in tokens if token["content"] == bos)
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        template = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        }
        processor = {"type": "Sequence", "processors": [level, template]}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "post_processor": processor,
        "decoder": level,
        "model": model,
    }
    return definition, {"bos_token": bos, "eos_token": eos}, types


def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus() for line in text.split("\n") if "\0" not in line]),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def llama(prefix: bool) -> tuple[dict[str, Any], dict[str, Any], list[int], list[float], Any]:
    from transformers.tokenization_utils_base import generate_merges

    pieces = sentencepiece_model()
    size = pieces.get_piece_size()
    vocab = {pieces.id_to_piece(i): i for i in range(size)}
    scores = {token: pieces.get_score(i) for token, i in vocab.items()}
    types = [
        2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        for i in range(size)
    ]
    merges = [list(pair) for pair in generate_merges(vocab, scores)]
    tokens = [added(i, token, True) for token, i in vocab.items() if types[i] in (2, 3)]
    for content in ("[INST]", "[/INST]"):
        tokens.append(added(len(types), content, True))
        vocab[content] = len(types)
        types.append(3)
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, blanks]}
        if prefix
        else blanks,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [*steps, strip] if prefix else steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return definition, config, types, [*scores.values(), 0.0, 0.0], pieces


def load(definition: dict[str, Any], config: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (("tokenizer.json", definition), ("tokenizer_config.json", config)):
            Path(folder, name).write_text(json.dumps(value), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    kept = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert kept[part] == definition[part], f"transformers replaced the {part}"
    return tokenizer


def main() -> None:
    kinds: dict[str, Any] = {}
    for kind in [*SPECIALS, "llama", "llama-no-prefix"]:
        scores: list[float] | None = None
        if kind in SPECIALS:
            definition, config, types = byte_level(kind)
        else:
            definition, config, types, scores, pieces = llama(prefix=kind == "llama")
        config = {key: value for key, value in config.items() if value is not None}
        tokenizer = load(definition, config)
        texts = []
        for text in ALL_TEXTS:
            ids = tokenizer(text)["input_ids"]
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            whole = tokenizer.decode(ids)
            texts.append({"ids": ids, **({} if decoded == text else {"decoded": decoded}), "whole": whole})
            if kind == "llama" and not any(token["content"] in text for token in definition["added_tokens"]):
                expected = pieces.encode(text)
                if expected != ids[1:]:
                    print(f"sentencepiece differs on {text[:60]!r}")
        rng = random.Random(5)
        sequences = []
        for length in (1, 2, 3, 8, 20, 40, 80):
            low = 3 if scores else 0  # where the byte tokens are, in a SentencePiece vocabulary
            ids = [
                rng.randrange(low, 259) if rng.random() < 0.8 else rng.randrange(len(types))
                for _ in range(length)
            ]
            sequences.append(
                {
                    "ids": ids,
                    "decoded": tokenizer.decode(ids, skip_special_tokens=True),
                    "whole": tokenizer.decode(ids),
                }
            )
        kinds[kind] = {
            "tokenizer": definition,
            "config": config,
            "types": types,
            "scores": scores,
            "texts": texts,
            "sequences": sequences,
        }
        print(kind, len(types), "tokens,", sum(len(row["ids"]) for row in texts), "ids")
    value = {
        "versions": versions() | {"sentencepiece": sentencepiece.__version__},
        "kinds": kinds,
        "texts": ALL_TEXTS,
    }
    value["variants"] = []
    for kind, config in VARIANTS:
        tokenizer = load(kinds[kind]["tokenizer"], kinds[kind]["config"] | config)
        rows = []
        for text in VARIANT_TEXTS:
            ids = tokenizer(text)["input_ids"]
            rows.append(
                {"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)}
            )
        value["variants"].append({"kind": kind, "config": config, "rows": rows})
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    (HERE / "tokenizers.json").write_text(text.replace('},{"', '},\n{"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
