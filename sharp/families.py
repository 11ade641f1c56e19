"""Model families: how their files call the tensors, and which switches of the forward they turn on.

A family is one entry of FAMILIES and nothing else: no class of its own, no code. Knows names and switches;
refuses to know sizes (model_config.py), arithmetic (model.py) and file formats (hf_dir.py, gguf_file.py).

Inside the engine a tensor has the name that Llama's Hugging Face files give it ("our" name below).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from sharp.rope import ROPE_KINDS

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Names:
    """How a file calls the tensors. A stem is a name without its layer and without .weight or .bias.

    layer: what stands before a stem in layer N, with {} for N. stems: our stem -> the file's.
    """

    layer: str
    stems: Mapping[str, str]

    def renamed(self, layer: str, stems: Mapping[str, str]) -> Names:
        """These names with another `layer` and some other stems. ValueError for a stem that is not ours."""
        unknown = sorted(set(stems) - set(self.stems))
        if unknown or layer.count("{}") != 1:
            what = (
                f"there is no tensor {', '.join(unknown)}" if unknown else f"layer {layer!r} needs one {{}}"
            )
            raise ValueError(f"{what}; tensors: {', '.join(self.stems)}")
        return Names(layer, MappingProxyType({**self.stems, **stems}))

    def stored(self, ours: str) -> str:
        """The file's name of the tensor that we call `ours`; names that are not in the table stay."""
        match = _LAYER.fullmatch(ours)
        rest = match.group(2) if match else ours
        stem, dot, kind = rest.rpartition(".")
        name = self.stems.get(stem, stem) + dot + kind
        return self.layer.format(match.group(1)) + name if match else name

    def ours(self, stored: str) -> str:
        """Our name of a tensor in a file; an unknown one stays as it is, and is refused later."""
        before, _, after = self.layer.partition("{}")
        match = re.fullmatch(rf"{re.escape(before)}(\d+){re.escape(after)}(.+)", stored)
        stem, dot, kind = (match.group(2) if match else stored).rpartition(".")
        for ours, theirs in self.stems.items():
            if theirs == stem:
                return f"model.layers.{match.group(1)}.{ours}{dot}{kind}" if match else ours + dot + kind
        return stored


HF_NAMES = Names(
    "model.layers.{}.",
    MappingProxyType(
        {
            stem: stem
            for stem in (
                "model.embed_tokens", "model.norm", "lm_head", "input_layernorm", "self_attn.q_proj",
                "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm", "self_attn.k_norm",
                "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
                "mlp.down_proj",
            )
        }
    ),
)  # fmt: skip
GGUF_NAMES = Names(
    "blk.{}.",
    MappingProxyType(
        {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
    ),
)


@dataclass(frozen=True)
class Family:
    """One family. `name` is the `model_type` of its config.json and what `sharp info` prints.

    window: who looks at `sliding_window` tokens only: nobody, all layers (Mistral), or those that
    `use_sliding_window` with `layer_types` or `max_window_layers` names (Qwen).
    """

    name: str
    hf_class: str  # in config.json's `architectures`
    gguf: str  # general.architecture of its GGUF files
    hf_names: Names = HF_NAMES
    gguf_names: Names = GGUF_NAMES
    gguf_interleaved: bool = False  # its GGUF files store q and k rows for rotary pairs (2i, 2i + 1)
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head of q and k before the rotation
    window: Literal["none", "all", "some"] = "none"
    # What an absent key of config.json means; transformers' defaults.
    sliding_window: int | None = None
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tied: bool = False
    rope_kinds: tuple[str, ...] = ROPE_KINDS


_QWEN: dict[str, Any] = {"window": "some", "sliding_window": 4096}
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # Llama 2 and 3, SmolLM2, and everything else that calls itself llama
        Family("llama", "LlamaForCausalLM", "llama", gguf_interleaved=True),
        # GGUF has no name for Mistral: its files say llama, and a window tells the two apart
        Family(
            "mistral", "MistralForCausalLM", "llama", gguf_interleaved=True, window="all", sliding_window=4096
        ),
        # Qwen2 and Qwen2.5
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", qkv_bias=True, **_QWEN),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", qk_norm=True, head_dim=128, **_QWEN),
    )
}


def register(family: Family) -> None:
    """Add a family, from a notebook or a plugin; the newest of a name wins. TypeError for anything else."""
    if not isinstance(family, Family):
        raise TypeError(f"a family is a sharp.families.Family, not a {type(family).__name__}")
    FAMILIES[family.name] = family


def family_of_hf(model_type: object, architectures: object) -> Family:
    """The family of a config.json. ValueError that names what it is and lists what is supported.

    Upper and lower case of a class name do not count: the first Llama files say LLaMAForCausalLM.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    if architectures is not None:
        named = architectures if isinstance(architectures, list) else [architectures]
        if family.hf_class.lower() not in [str(name).lower() for name in named]:
            raise ValueError(
                f"architectures {architectures!r} is not supported; supported for model_type "
                f"{model_type!r}: {family.hf_class}"
            )
    return family


def family_of_gguf(architecture: object, windowed: bool) -> Family:
    """The family of a GGUF file. windowed: its metadata has a sliding window, which holds for all layers.

    ValueError that names the architecture and lists what is supported.
    """
    found = [family for family in FAMILIES.values() if family.gguf == architecture]
    if not found:
        known = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES.values()))
        raise ValueError(f"general.architecture {architecture!r} is not supported; supported: {known}")
    for family in found:
        if (family.window == "all") == windowed:
            return family
    if windowed:
        raise ValueError(f"attention.sliding_window is not supported for architecture {architecture!r}")
    return found[0]
