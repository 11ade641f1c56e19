"""The end-to-end cases: which requests they are, what makes a row and what does not, a timed process."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_model import model_config
from test_load import Sleeping
from test_serving import Other, fast, opened

from sharp import bench, bench_cases, bench_startup, random_model, results
from sharp.bench_cases import KINDS, PEER, SEEDS, Case, Size, cases, run_case, run_model
from sharp.bench_model import rung_of
from sharp.bench_startup import WithoutTokenizer, config_json, measure_startup, time_process, write_weights
from sharp.hf_dir import HFDirectory
from sharp.plan import BatchPlan, SampleOutput
from sharp.random_model import SHAPES, RandomCheckpoint
from sharp.workloads import documents, online

TOY = replace(model_config(256), hidden_size=16, intermediate_size=24, num_layers=2, num_q_heads=2,
              eos_token_ids=())  # fmt: skip


def named(found: list[Case]) -> dict[str, Case]:
    return {case.name: case for case in found}


def test_the_cases_are_the_peers_and_two_seeds_more() -> None:
    found = named(list(cases(KINDS, "llama-3.2-1b", 128256, Size())))
    assert len(found) == 2 + 3 + 3 + 3
    base = found["online/llama-3.2-1b"]
    assert list(zip(base.prompts, base.new, strict=True)) == online()
    assert found["online/llama-3.2-1b seed 12"].prompts == [ids for ids, _ in online(seed=12)]
    longest = found["offline/llama-3.2-1b"]
    assert longest.new == sorted(base.new, reverse=True)
    assert sorted(zip(longest.prompts, longest.new, strict=True)) == sorted(online())
    assert found["documents/llama-3.2-1b"].prompts == documents()
    assert set(found["documents/llama-3.2-1b seed 15"].new) == {1}
    one, steady = found["decode1/llama-3.2-1b"], found["busy64/llama-3.2-1b"]
    assert (list(map(len, one.prompts)), one.new, one.unit) == ([128], [256], "ms")
    assert (list(map(len, steady.prompts)), steady.new) == ([128] * 64, [640] * 64)
    few = named(list(cases(["online"], "toy", 300, Size(2, 4, 1, 1))))
    assert list(few) == ["online/toy"]
    assert few["online/toy"].new == [4, 4]
    assert max(map(max, few["online/toy"].prompts)) < 300
    assert [seeds[0] for seeds in SEEDS.values()] == [11, 11, 13]


def test_a_cases_value_is_read_off_its_run() -> None:
    load = SimpleNamespace(seconds=2.0, times={0: [0.5, 0.6, 0.9]})
    prompts = [[1] * 5, [2] * 7]
    assert Case("x", "decode1", prompts[:1], [3], "ms").value(load) == pytest.approx(200)
    assert Case("x", "online", prompts, [3, 5], "token/s").value(load) == 4
    assert Case("x", "documents", prompts, [1, 1], "token/s").value(load) == 6


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    """Cases of a few tokens under the names of whole ones."""
    prompts = [[5] * 9, [6] * 30, [7] * 2]
    made = [
        Case("decode1/toy", "decode1", prompts[:1], [5], "ms"),
        Case("busy64/toy", "busy64", prompts, [4] * 3, "token/s"),
        Case("online/toy", "online", prompts, [4] * 3, "token/s"),
        Case("online/toy seed 12", "online", prompts, [4] * 3, "token/s"),
    ]
    monkeypatch.setattr(bench_cases, "cases", lambda kinds, *rest: iter(c for c in made if c.kind in kinds))
    monkeypatch.setitem(bench_cases.REFERENCES, ("online", "toy"), 12.5)
    return named(made)


def test_rows_and_references(toys: dict[str, Case]) -> None:
    model = Sleeping(fast)
    rows, denied = run_model("toy", ["decode1", "busy64", "online"], Size(), lambda name: opened(model))
    assert denied == 0  # that a host has no GPU to be busy is no failure
    assert [row["case"] for row in rows] == ["decode1/toy", "online/toy", "online/toy seed 12"]
    assert (rows[0]["unit"], rows[1]["unit"], rows[0]["op"]) == ("ms", "token/s", "engine")
    assert rows[0]["us"] == pytest.approx(1e3 * rows[0]["value"], rel=1e-3)
    assert [row["reference"] for row in rows] == [None, 12.5, None]
    assert [row["reference_source"] for row in rows] == [None, PEER, None]
    assert all(row["source_hash"] == results.source_hash(bench_cases_sources()) for row in rows)
    assert all(row["err"] == 0 and results.format_row(row) for row in rows)
    assert model.closed == 1


def bench_cases_sources() -> Any:
    from sharp.bench_engine import SOURCES

    return SOURCES


class Moody(Sleeping):
    """Other answers from one run to the next."""

    shift = 0

    def sample(self, logits: Any, plan: BatchPlan) -> SampleOutput:
        ids = super().sample(logits, plan).token_ids
        self.shift += any(plan.output_indices == 0)
        return SampleOutput((ids + self.shift) % 300, (None,) * len(ids))


@pytest.mark.parametrize(("model", "why"), [(Other, "another answer than alone"), (Moody, "answer")])
def test_what_is_not_right_makes_no_row(toys: dict[str, Case], model: Any, why: str) -> None:
    said: list[str] = []
    one = opened(model(fast))
    object.__setattr__(one, "say", said.append)
    assert run_case(one, toys["online/toy"], Size()) is None
    assert any("no row" in text and why in text for text in said), said
    _, denied = run_model("toy", ["online"], Size(), lambda name: one)
    assert denied == 2


def test_reduced_sizes_make_no_row(toys: dict[str, Case]) -> None:
    rows, denied = run_model("toy", ["decode1", "online"], Size(requests=3), lambda n: opened(Sleeping(fast)))
    assert (rows, denied) == ([], 0)


def test_a_gpu_that_tells(toys: dict[str, Case]) -> None:
    """A model whose device says when its steps ran: 9 of 10 ms of each."""

    class Tells(Sleeping):
        def __init__(self) -> None:
            super().__init__(lambda work: 0.0)
            self.device.kind, self.at = "cuda", 0.0

        def land(self, launched: Any) -> SampleOutput:
            launched.gpu_s = 9e-3
            launched.streams = (("GPU compute", "graph", self.at, self.at + 9e-3),)
            self.at += 10e-3
            return super().land(launched)

    one = opened(Tells())
    row = run_case(one, toys["busy64/toy"], Size())
    assert row is not None
    assert row["unit"] == "%"
    assert 89 < row["value"] < 94  # a run of few steps ends without its last gap
    assert one.host_share() is not None
    assert rung_of(one.model) == "reference"


def test_a_models_files_hold_its_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_model.SHAPES, "toy", TOY)
    made = RandomCheckpoint("toy")
    write_weights(made, tmp_path)
    read = WithoutTokenizer(HFDirectory(tmp_path))
    assert read.config == TOY
    assert read.names == made.names
    for name in made.names:
        assert (read.read(name) == made.read(name)).all()  # both in bfloat16
    for shape in SHAPES.values():
        assert config_json(shape)["num_hidden_layers"] == shape.num_layers
    monkeypatch.setattr(bench_startup, "SPARE_BYTES", 1 << 60)
    with pytest.raises(ValueError, match="bytes free; the weights and some room need 1,152,921,504"):
        write_weights(made, tmp_path)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "smollm2-135m"])
def test_the_real_shapes_can_be_written(shape: str, tmp_path: Path) -> None:
    """Their config.json says what their shape is; of the weights two layers' worth of names is enough."""
    (tmp_path / "config.json").write_text(json.dumps(config_json(SHAPES[shape])))
    from sharp.hf_config import config_from_hf

    assert config_from_hf(tmp_path) == SHAPES[shape]


def test_a_process_is_timed_to_its_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_model.SHAPES, "toy", TOY)
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    with bench_startup.weights_on_disk("toy") as folder:
        fresh, cached, err = measure_startup(folder, "cpu", "float32", 1)
        assert err == 0
        assert 0.1 < min(fresh, cached) <= max(fresh, cached) < 60
        _, token = time_process(folder, "cpu", "float32")
        assert token == bench_startup.first_token(folder, "cpu", "float32")
        os.remove(folder / "rest.safetensors")
        with pytest.raises(RuntimeError, match=r"ended with 1: (?s:.*)rest\.safetensors"):
            time_process(folder, "cpu", "float32")
    assert not folder.exists()


def test_the_command_at_reduced_size(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(random_model.SHAPES, "toy", replace(TOY, max_position_embeddings=2048))
    out = tmp_path / "rows.json"
    words = ["engine", "--model", "toy", "--device", "cpu", "--commit", "0123abc", "--out", str(out)]
    bench.main([*words, "--quick", "--requests", "2", "--new-tokens", "3", "--case", "decode1", "online"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "[]"
    assert json.loads(out.read_text()) == []
    assert [line for line in lines if "right, and no row" in line] == [
        f"{name}/toy: right, and no row: it was run at reduced size" for name in ("decode1", "online")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model", "gpt-9"],
            "--model is 'gpt-9'; one of smollm2-135m, llama-3.2-1b",
        ),
        (["--requests", "0"], "--requests is 0; at least 1"),
        (["--new-tokens", "-1"], "--new-tokens is -1; at least 1"),
        (["--rounds", "0"], "--rounds is 0; at least 1"),
        (["--out", "/no/such/folder/rows.json"], "there is no folder /no/such/folder"),
        (["--max-num-batched-tokens", "0"], "max_num_batched_tokens must be at least 1"),
    ],
)
def test_wrong_words_are_named(words: list[str], message: str, capsys: Any) -> None:
    given = ["engine", "--device", "cpu", "--model", "smollm2-135m", "--commit", "0123abc"]
    with pytest.raises(SystemExit) as caught:
        bench.main([*given, *words])
    assert caught.value.code == 1
    assert message in capsys.readouterr().out
