"""Makes families.json and families.npz with Hugging Face transformers; sharp is not imported.

    python tests/golden/make_families.py

Run once, in a throwaway environment with torch and transformers (their versions are written into the file).
Each model of family_models.py is written as a directory, loaded by transformers in float32 with eager
attention, and run over its whole prompt. No tensor may be missing or left over, and a second run token by
token through transformers' cache must agree. Of real models only the angles are kept: inv_freq and the
factor of cosines and sines.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from family_models import CONFIGS, ROPES, ROWS, checksum, make_weights, prompt, write_directory

HERE = Path(__file__).resolve().parent


def logits_of(folder: Path, ids: list[int]) -> np.ndarray:
    """f32[len(ids), V] from transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    left = {key: names for key, names in info.items() if names and key != "error_msgs"}
    assert not left, left
    model.eval()
    with torch.inference_mode():
        whole = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
        cache, steps = None, []
        for token in ids:
            result = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits[0, -1].float().numpy())
    assert np.abs(np.stack(steps) - whole).max() < 1e-4, "transformers' two ways disagree"
    return whole


def rope_of(raw: dict[str, Any]) -> dict[str, Any]:
    """inv_freq and attention factor as transformers' LlamaRotaryEmbedding makes them."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=raw["head_dim"] * 2, num_attention_heads=2, **raw)
    rotary = LlamaRotaryEmbedding(config)
    return {"inv_freq": rotary.inv_freq.tolist(), "attention_factor": float(rotary.attention_scaling)}


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(2)
    rows, arrays = [], {}
    for name in CONFIGS:
        ids = prompt(name)
        with tempfile.TemporaryDirectory() as folder:
            logits = logits_of(write_directory(Path(folder) / name, name), ids)
        arrays[name] = logits[list(ROWS)]
        rows.append({"name": name, "checksum": checksum(make_weights(name)), "prompt_token_ids": ids})
        print(f"{name}: logits of standard deviation {logits.std():.2f}, largest {np.abs(logits).max():.1f}")
    value = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "models": rows,
        "ropes": {name: rope_of(raw) for name, raw in ROPES.items()},
    }
    text = json.dumps(value, separators=(",", ":")).replace('},{"', '},\n{"')
    (HERE / "families.json").write_text(text + "\n", encoding="utf-8")
    np.savez_compressed(HERE / "families.npz", **arrays)


if __name__ == "__main__":
    main()
