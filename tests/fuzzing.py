"""Mutated model files by the thousand: each opens, or one clear error says that it does not.

    python -W error tests/fuzzing.py --cases 20000 --seconds 600 --seed 7

Knows how to damage files; what a case may do is in `try_case`. Every case must end in time, in a
ModelFileError (or a ValueError, where a text is encoded) or in success, and the whole process in an address
space of a few hundred MB over what it began with. Prints counts as JSON; a finding is printed with its seed,
which makes the same case again (--seed S --cases 1).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program, too, it is this checkout that is tested

from model_files import TINY, copy_tiny, write_gguf  # noqa: E402

from sharp.info import model_report  # noqa: E402
from sharp.model_config import ModelFileError  # noqa: E402
from sharp.tokenizer import Tokenizer  # noqa: E402
from sharp.weights import load_weights, open_checkpoint  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "tokenizers.json"
CASE_SECONDS = 5.0  # a case takes milliseconds; the machine may be busy
MEMORY_BYTES = 768 << 20  # over what the process has when the first case begins
TEXT = "The 12 ships, naïve 日本 \U0001f600\r\n\t  <|im_end|> <s>"
INTERESTING = [0, 1, 2, 7, 8, 31, 32, 127, 128, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
INTERESTING += [2**40, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**63, 2**64,
    -(2**63), 10**30, "", "a", "\u2581", "\x00", "\ud800", "x" * 1000, "../../etc/passwd", "/etc/passwd",
    [], {}, [[]], [None], [1, 2], ["a"], {"a": 1}, {"content": "a"}, {"type": "BPE"}, {"type": "ByteLevel"},
    {"type": "Sequence", "decoders": []}, {"Regex": "(a+)+$"}, {"Regex": "("}, {"String": ""}, "ByteLevel",
    "{{ 1 }}", "{% if",
]  # fmt: skip


class Corpus:
    """A few real models in a folder; a case damages one file of one of them."""

    def __init__(self, folder: Path) -> None:
        golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["kinds"]
        self.bytes_of: dict[Path, bytes] = {}
        plain = copy_tiny(folder / "plain")
        (plain / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        sharded = copy_tiny(folder / "sharded")
        tensors, index = load_file(TINY / "model.safetensors"), {}
        (sharded / "model.safetensors").unlink()
        for part in range(2):
            name = f"model-{part + 1:05}-of-00002.safetensors"
            chosen = {key: tensors[key] for key in sorted(tensors)[part::2]}
            save_file(chosen, sharded / name)
            index.update(dict.fromkeys(chosen, name))
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        for kind in ("llama", "llama-bpe", "qwen2"):
            other = copy_tiny(folder / kind, vocab_size=800)
            (other / "model.safetensors").unlink()  # only its tokenizer is opened
            (other / "tokenizer.json").write_text(json.dumps(golden[kind]["tokenizer"]), encoding="utf-8")
            (other / "tokenizer_config.json").write_text(json.dumps(golden[kind]["config"]))
        ggufs = folder / "gguf"
        ggufs.mkdir()
        for stored in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_0):
            write_gguf(ggufs / f"{stored.name}.gguf", stored)
        data = write_gguf(ggufs / "spm.gguf", metadata=_scores).read_bytes()
        # Four bytes for four: the model of the vocabulary becomes SentencePiece's.
        key = b"tokenizer.ggml.model" + struct.pack("<IQ", 8, 4) + b"gpt2"
        assert key in data
        (ggufs / "spm.gguf").write_bytes(data.replace(key, key[:-12] + struct.pack("<Q", 5) + b"llama"))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.bytes_of[path] = path.read_bytes()
        self.paths = sorted(self.bytes_of)


def _scores(writer: Any) -> None:
    writer.add_token_scores([-float(i) for i in range(300)])


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes, most of them near the beginning, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(out)
        at = rng.randrange(size + 1) if rng.random() < 0.3 else rng.randrange(min(size, 12_000) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            out[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING) % 2**32)
        elif kind == 2:
            out[at : at + 8] = struct.pack("<Q", rng.choice(INTERESTING))
        elif kind == 3:
            del out[at : at + rng.choice((1, 4, 8, 100, 5000))]
        elif kind == 4:
            out[at:at] = out[at : at + rng.choice((1, 8, 64, 1000))]
        elif kind == 5:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 64)))
        elif kind == 6:
            del out[at:]
        elif size:
            out[at : at + 1] = bytes([out[at % size] ^ (1 << rng.randrange(8))])
    return bytes(out)


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """One to three nodes of the tree replaced, removed, renamed or copied; now and then nested deeply."""
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        stack = [tree]
        while stack and len(places) < 2000:
            node = stack.pop(rng.randrange(len(stack)))
            keys = (
                list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            )
            # A vocabulary of thousands must not drown the rest.
            for key in rng.sample(list(keys), min(len(keys), 12)):
                places.append((node, key))
                stack.append(node[key])
        if not places:
            break
        node, key = rng.choice(places)
        action = rng.randrange(7)
        if action <= 3:
            node[key] = deepcopy(rng.choice(ODD))
        elif action == 4:
            del node[key]
        elif action == 5:
            node[key] = deepcopy(rng.choice(places)[0]) if rng.random() < 0.2 else rng.choice(INTERESTING)
        elif isinstance(node, dict):
            node[rng.choice(["", "a", "type", "model", str(key) + "x"])] = node.pop(key)
    text = json.dumps(tree)
    if rng.random() < 0.01:
        text = text.replace("null", "[" * rng.choice((100, 5000, 200_000)), 1)
    return text.encode("utf-8", "surrogatepass")


def damage(path: Path, data: bytes, rng: random.Random) -> bytes:
    if path.suffix == ".json" and rng.random() < 0.7:
        return damage_json(data, rng)
    if path.suffix == ".safetensors" and rng.random() < 0.5:
        [length] = struct.unpack("<Q", data[:8])
        header = damage_json(data[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return damage_bytes(data, rng)


def try_case(path: Path) -> str:
    """What became of it: "opened", or the beginning of the error. Any other exception goes out: a finding."""
    folder, tokenizer_only = path.parent, path.parent.name in ("llama", "llama-bpe", "qwen2")
    target = path if path.suffix == ".gguf" else folder
    try:
        if tokenizer_only:
            tokenizer = Tokenizer.from_hf(folder, ())
        else:
            model_report(str(target))
            checkpoint = open_checkpoint(target)
            tokenizer = checkpoint.tokenizer()
            load_weights(checkpoint, lambda array: np.asarray(array), progress=False)
    except ModelFileError as error:
        text = str(error)
        assert str(folder) in text, f"the message names no file: {text}"
        assert len(text) < 4000, f"a message of {len(text)} characters"
        return "refused"
    try:
        ids = tokenizer.encode(TEXT)
        whole = tokenizer.decode(ids[:50])
        detokenizer = tokenizer.detokenizer()
        assert "".join(map(detokenizer.push, ids[:50])) + detokenizer.flush() == whole
        if path.suffix == ".jinja":
            tokenizer.apply_chat_template([{"role": "user", "content": TEXT}])
    except ValueError:
        return "opened, text refused"
    return "opened"


def run(
    cases: int, seconds: float, seed: int, only: str = "", report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Counts of what happened; "findings" holds seed, file and traceback of what must not."""
    counts: Counter[str] = Counter()
    per_file: Counter[str] = Counter()
    findings: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        corpus = Corpus(Path(name).resolve())
        paths = [path for path in corpus.paths if only in str(path)]
        for path in paths:  # undamaged, and everything imported, before memory is limited
            assert try_case(path) == "opened", path
        _limit_memory()
        deadline = time.monotonic() + seconds
        for case in range(seed, seed + cases):
            if time.monotonic() > deadline:
                break
            rng = random.Random(case)
            path = rng.choice(paths)
            path.write_bytes(damage(path, corpus.bytes_of[path], rng))
            started = time.monotonic()
            try:
                counts[try_case(path)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                text = "".join(traceback.format_exception(error)[-6:])
                findings.append(f"seed {case}, {path.parent.name}/{path.name}: {text[-1500:]}")
                report(findings[-1])
            taken = time.monotonic() - started
            slowest = max(slowest, taken)
            if taken > CASE_SECONDS:
                findings.append(f"seed {case}, {path.parent.name}/{path.name}: took {taken:.1f} s")
                report(findings[-1])
            per_file[path.suffix if path.suffix != ".json" else path.name] += 1
            path.write_bytes(corpus.bytes_of[path])
    return {
        "cases": sum(per_file.values()),
        "outcomes": dict(counts),
        "files": dict(per_file),
        "findings": findings,
        "slowest_seconds": round(slowest, 3),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _limit_memory() -> None:
    """No more address space than MEMORY_BYTES over what is in use (Linux; elsewhere nothing is limited)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="end after this many, whatever is left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path has this in it")
    options = parser.parse_args()
    result = run(
        options.cases, options.seconds, options.seed, options.only, lambda text: print(text, file=sys.stderr)
    )
    print(json.dumps(result))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
