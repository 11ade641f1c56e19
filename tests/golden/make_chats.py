"""Makes chats.json in this folder: transformers' rendering of templates.py; sharp is not imported.

    python tests/golden/make_chats.py

Run once, in a throwaway environment with transformers (versions used are written into the file). A row is a
chat's text with and without the generation prompt, or the complaint that the template raised.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jinja2
from make_golden import versions
from templates import TEMPLATE_CHATS, TEMPLATES

HERE = Path(__file__).resolve().parent
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    kinds = json.loads((HERE / "tokenizers.json").read_text(encoding="utf-8"))["kinds"]
    with tempfile.TemporaryDirectory() as folder:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
        Path(folder, "tokenizer.json").write_text(json.dumps(kinds["llama"]["tokenizer"]), encoding="utf-8")
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def main() -> None:
    loaded, out = tokenizer(), {}
    for name, template in TEMPLATES.items():
        rows: list[Any] = []
        for chat in TEMPLATE_CHATS:
            try:
                rows.append(
                    [
                        loaded.apply_chat_template(
                            chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
                        )
                        for prompt in (True, False)
                    ]
                )
            except jinja2.TemplateError as error:
                rows.append(str(error))
        out[name] = rows
        print(name, sum(isinstance(row, list) for row in rows), "of", len(rows), "rendered")
    value = {"versions": versions(), "special_tokens": SPECIAL, "rows": out}
    text = json.dumps(value, ensure_ascii=True, indent=1)
    (HERE / "chats.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
