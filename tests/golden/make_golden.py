"""Makes the golden files in this folder with Hugging Face transformers; sharp is not imported.

    python tests/golden/make_golden.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

Run once, in a throwaway environment with torch, transformers and gguf (versions used are written into each
file).

Weights: transformers' own GGUF loading, dequantised to float32; every tensor is then compared with the `gguf`
library's dequantiser, and q/k rows with the un-permuted ones.

Tokenizer: not the one that transformers derives from the GGUF file. For architecture llama it keeps the
byte-level split alone (transformers 5.23), while the published tokenizer.json of
HuggingFaceTB/SmolLM2-135M-Instruct has Sequence[Digits(individual_digits), ByteLevel(no prefix space, GPT-2
pattern)], which is also what the file's own tokenizer.ggml.pre = "smollm" stands for. They differ where
blanks meet digits ("a  1"). So a tokenizer.json is written here to the published definition, with the
vocabulary, merges and control tokens of the GGUF file, and loaded by transformers.

Files: smollm2.json (prompts, ids, greedy ids), smollm2.npz (top-20 ids and logits of each step,
teacher-forced), tiny.json + tiny.npz (the same with full logits, for weights/tiny), tokenizer.json (ids of a
nasty corpus, chat templates rendered).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from prompts import CHATS, PROMPTS, TEXTS, TINY_PROMPTS

HERE = Path(__file__).resolve().parent
NUM_TOKENS, TOP = 48, 20


def versions() -> dict[str, str]:
    from importlib.metadata import version

    import gguf  # noqa: F401
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gguf": version("gguf"),
        "tokenizers": version("tokenizers"),
    }


def published_tokenizer(reader: Any) -> Any:
    """A transformers tokenizer with the published pre-tokenizer and the file's vocabulary."""
    from transformers import AutoTokenizer

    def get(key: str) -> Any:
        return reader.fields[key].contents()

    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == 3
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in get("tokenizer.ggml.merges")],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": get("tokenizer.chat_template"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (("tokenizer.json", definition), ("tokenizer_config.json", config)):
            Path(folder, name).write_text(json.dumps(value), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    split = str(tokenizer.backend_tokenizer.pre_tokenizer)
    for part in ("Digits", "ByteLevel"):
        assert part in split, f"transformers replaced the pre-tokenizer: {split}"
    return tokenizer


def check_weights(model: Any, reader: Any) -> int:
    """Every tensor of the model equals the gguf library's dequantised one, bit by bit; returns how many."""
    import gguf

    config, state = model.config, model.state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    seen = set()
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{parts[part]}.weight"
        else:
            name = names[stem] + ".weight"
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # One head, one pair at a time: interleaved pair (2i, 2i+1) becomes rows i and i + D/2.
            head_dim, shuffled = expected.shape[0] // heads, np.empty_like(expected)
            for head in range(heads):
                for i in range(head_dim // 2):
                    shuffled[head * head_dim + i] = expected[head * head_dim + 2 * i]
                    shuffled[head * head_dim + head_dim // 2 + i] = expected[head * head_dim + 2 * i + 1]
            expected = shuffled
        assert np.array_equal(state[name].float().numpy(), expected), name
        seen.add(name)
    assert set(state) - seen <= {"lm_head.weight"}, set(state) - seen
    return len(seen)


def run(model: Any, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """Greedy continuation without stopping, and float32 logits [NUM_TOKENS, V] of one teacher-forced pass."""
    import torch

    with torch.inference_mode():
        cache, step, out = None, torch.tensor([ids]), []
        for _ in range(NUM_TOKENS):
            result = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(int(result.logits[0, -1].argmax()))
            step = torch.tensor([[out[-1]]])
        whole = model(input_ids=torch.tensor([ids + out[:-1]]), use_cache=False).logits[0, len(ids) - 1 :]
    logits = whole.float().numpy()
    for i, token in enumerate(out):
        # The cached and the uncached pass round differently: they may only disagree on a tie.
        assert logits[i].max() - logits[i, token] < 1e-3, (i, token)
    return out, logits


def top2_margin(logits: np.ndarray) -> list[float]:
    top = np.sort(logits, axis=1)[:, -2:]
    return [round(float(value), 6) for value in top[:, 1] - top[:, 0]]


def write_json(name: str, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=True, indent=None, separators=(",", ":"))
    # One prompt a line: a diff then shows which one changed. The separators cannot occur inside strings
    # unescaped.
    (HERE / name).write_text(text.replace('},{"', '},\n{"') + "\n", encoding="utf-8")


def main(gguf_path: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    reader = gguf.GGUFReader(gguf_path)
    tokenizer = published_tokenizer(reader)

    write_json(
        "tokenizer.json",
        {
            "versions": versions(),
            "texts": [
                {
                    "text": text,
                    "ids": tokenizer(text)["input_ids"],
                    "decoded": tokenizer.decode(tokenizer(text)["input_ids"]),
                }
                for text in TEXTS
            ],
            "chats": [
                {
                    "messages": chat,
                    "prompt": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
                    "closed": tokenizer.apply_chat_template(
                        chat, tokenize=False, add_generation_prompt=False
                    ),
                }
                for chat in CHATS
            ],
        },
    )

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf_path.parent), gguf_file=gguf_path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    print("tensors equal to gguf's:", check_weights(model, reader))
    rows, arrays = [], {}
    for index, (name, prompt) in enumerate(PROMPTS.items()):
        text = prompt
        if isinstance(prompt, list):
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text)["input_ids"]
        out, logits = run(model, ids)
        top = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
        arrays[f"ids_{index}"] = top.astype(np.int32)
        arrays[f"logits_{index}"] = np.take_along_axis(logits, top, axis=1)
        margins = top2_margin(logits)
        rows.append(
            {"name": name, "prompt": text, "prompt_token_ids": ids, "token_ids": out, "margins": margins}
        )
        print(
            f"{name}: {len(ids)} ids, smallest margin {min(margins)}, {tokenizer.decode(out)[:60]!r}",
            flush=True,
        )
    write_json("smollm2.json", {"versions": versions(), "file": gguf_path.name, "prompts": rows})
    np.savez_compressed(HERE / "smollm2.npz", **arrays)

    folder = HERE.parents[1] / "weights" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows, arrays = [], {}
    for index, text in enumerate(TINY_PROMPTS):
        ids = tokenizer(text)["input_ids"]
        out, logits = run(model, ids)
        arrays[f"logits_{index}"] = logits
        margins = top2_margin(logits)
        rows.append({"prompt": text, "prompt_token_ids": ids, "token_ids": out, "margins": margins})
        print(f"tiny: {len(ids)} ids, {len(set(out))} different, smallest margin {min(margins)}")
    write_json("tiny.json", {"versions": versions(), "prompts": rows})
    np.savez_compressed(HERE / "tiny.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
