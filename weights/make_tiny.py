"""Makes weights/tiny: a random Llama-shaped model with a byte-level tokenizer, for tests. Deterministic.

Run `python weights/make_tiny.py` from the repository root (numpy, ml-dtypes, tokenizers, safetensors).
The shape is small but not degenerate: grouped-query attention (4 query heads on 2), head_dim * heads
different from hidden_size, an untied head, norm weights that are not 1. Weights are bfloat16, so that float32
and bfloat16 engines start from the same numbers. The head is scaled so that greedy decoding is not a near
tie.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FOLDER = Path(__file__).parent / "tiny"
SEED = 20
HIDDEN, INTERMEDIATE, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 32, 64, 2, 4, 2, 16
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# LEFT+RIGHT, in order of rank; Ġ is the byte-level alphabet's space.
MERGES = [
    "Ġ+t",
    "Ġ+a",
    "i+n",
    "h+e",
    "r+e",
    "o+n",
    "e+r",
    "Ġt+he",
    "a+t",
    "Ġ+s",
    "Ġ+o",
    "e+n",
    "Ġ+c",
    "e+s",
    "Ġ+w",
    "n+d",
    "i+t",
    "o+r",
    "i+s",
    "a+n",
    "Ġa+nd",
    "in+g",
    "o+u",
    "Ġ+f",
    "e+d",
    "Ġ+p",
    "Ġo+f",
    "Ġt+o",
    "a+l",
    "a+r",
    "u+s",
    "l+e",
    "Ġi+n",
    "h+i",
    "l+o",
    "he+l",
    "hel+lo",
    "Ġ+i",
    "l+d",
    "w+or",
    "wor+ld",
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [(left, right) for left, right in (merge.split("+") for merge in MERGES)]
    known = set(tokens)
    for left, right in pairs:  # "Ġi n" needs "Ġi", which a later merge makes: the list is sorted out here
        tokens += [token for token in (left, right, left + right) if token not in known]
        known.update((left, right, left + right))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def make_weights(vocab_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        values = rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)
        return values.astype(ml_dtypes.bfloat16)

    def norm() -> np.ndarray:
        return rng.uniform(0.7, 1.3, HIDDEN).astype(ml_dtypes.bfloat16)

    q_rows, kv_rows = Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    weights = {"model.embed_tokens.weight": matrix(vocab_size, HIDDEN, np.sqrt(HIDDEN))}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = norm()
        # Gains over 1 make attention peaky: a wrong position or mask then changes the answer visibly.
        weights[prefix + "self_attn.q_proj.weight"] = matrix(q_rows, HIDDEN, 1.5)
        weights[prefix + "self_attn.k_proj.weight"] = matrix(kv_rows, HIDDEN, 1.5)
        weights[prefix + "self_attn.v_proj.weight"] = matrix(kv_rows, HIDDEN, 1.5)
        weights[prefix + "self_attn.o_proj.weight"] = matrix(HIDDEN, q_rows, 1.5)
        weights[prefix + "post_attention_layernorm.weight"] = norm()
        weights[prefix + "mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN, 1.5)
        weights[prefix + "mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN, 1.5)
        weights[prefix + "mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE, 1.5)
    weights["model.norm.weight"] = norm()
    weights["lm_head.weight"] = matrix(vocab_size, HIDDEN, 5.0)
    return weights


def write_json(name: str, value: dict[str, Any]) -> None:
    (FOLDER / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    tokenizer = make_tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    save_file(make_weights(vocab_size), FOLDER / "model.safetensors", metadata={"format": "pt"})
    write_json(
        "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "vocab_size": vocab_size,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": Q_HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": SPECIALS.index("<|im_start|>"),
            "eos_token_id": SPECIALS.index("<|im_end|>"),
        },
    )
    write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )
    write_json(
        "generation_config.json",
        {"bos_token_id": SPECIALS.index("<|im_start|>"), "eos_token_id": [SPECIALS.index("<|im_end|>")]},
    )


if __name__ == "__main__":
    main()
