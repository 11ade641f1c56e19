"""Sweeps of both GEMMs' tiles, of decode attention's splits and of the parts of prefill attention, with
measurements made up: what they try, take and write."""

from __future__ import annotations

import ast
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest

from kernels_numba.bench import tune_decode, tune_gemm, tune_gemm_few, tune_prefill
from kernels_numba.bench.cases import bench_cases
from kernels_numba.bench.contest import BASELINE
from kernels_numba.bench.tune_gemm import faster, promising, table_text
from kernels_numba.ops.gemm import hopper
from kernels_numba.ops.gemm.hopper_config import cheapest_config


def test_the_models_pick_is_tried_first_and_dear_tiles_not_at_all():
    tried = promising(4096, 4096, 4096, 132)
    assert tried[0].tile_m * tried[0].tile_n == 128 * 256
    assert cheapest_config(4096, 4096, 4096, 132) in tried
    assert "64x32" not in map(str, tried)
    assert len(promising(512, 576, 576, 132)) > 1


def test_a_winner_needs_a_margin():
    assert faster({"a": 100.0, "b": 98.0, "c": 99.5}, "a") == "b"
    assert faster({"a": 100.0, "b": 99.5}, "a") is None
    assert faster({"a": 100.0, "b": 120.0}, "a") is None


def test_the_table_reads_back_and_sorts():
    table = {(64, 960, 576): "128x160", (8, 3072, 576): "128x96"}
    tree = ast.parse(table_text(table))
    assert ast.get_docstring(tree) == tune_gemm.hopper_table.__doc__.strip()
    assignment = tree.body[1]
    assert ast.literal_eval(assignment.value) == table
    assert table_text(table).index("(8, 3072") < table_text(table).index("(64, 960")
    assert ast.literal_eval(ast.parse(table_text({})).body[1].value) == {}


class MadeUp:
    """A workload whose clock says what `times` says; a second look may say something else."""

    def __init__(self, looks):
        self.looks = iter(looks)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def compare(self, contenders, rounds):
        times = next(self.looks)
        measured = {name: SimpleNamespace(us=times.get(name, 500.0)) for name in contenders}
        refused = {name: "7 times the tolerance" for name in contenders if times.get(name) == 0}
        return SimpleNamespace(measured={BASELINE: SimpleNamespace(us=100.0), **measured}, refused=refused)


@pytest.mark.parametrize(("again", "table"), [(80.0, {(8, 3072, 576): "128x96"}), (99.9, {})])
def test_a_tile_must_win_twice(monkeypatch, capsys, again, table):
    picked = str(cheapest_config(1000, 3072, 576, 132))
    looks = [{picked: 100.0, "128x96": 80.0}, {picked: 100.0, "128x96": again}]
    monkeypatch.setattr(tune_gemm, "torch_side", lambda against: None)
    monkeypatch.setattr(tune_gemm, "Workload", lambda *_, **__: MadeUp(looks))
    monkeypatch.setattr(hopper, "num_sms", lambda: 132)
    assert tune_gemm.tune([(1000, 3072, 576)], rounds=1) == table
    said = capsys.readouterr().out
    assert f"M=1000 N=3072 K=576: model {picked}, table {'128x96' if table else '-'}; 128x96 1.250x" in said


def test_a_part_of_the_grid_leaves_the_rest_of_the_table(monkeypatch, tmp_path):
    out = tmp_path / "table.py"
    monkeypatch.setattr(tune_gemm, "tune", lambda shapes, rounds: dict.fromkeys([(16, 576, 1536)], "64x96"))
    monkeypatch.setattr(
        tune_gemm.hopper_table, "TUNED", {(16, 576, 1536): "128x96", (8, 3072, 576): "128x96"}
    )
    monkeypatch.setattr("sys.argv", ["tune", "--case", "M=2048 N=576 K=1536", "--out", str(out)])
    tune_gemm.main()
    written = ast.literal_eval(ast.parse(out.read_text()).body[1].value)
    assert written == {(16, 576, 1536): "64x96", (8, 3072, 576): "128x96"}
    monkeypatch.setattr("sys.argv", ["tune", "--case", "no such shape"])
    with pytest.raises(SystemExit):
        tune_gemm.main()


def test_the_price_of_a_fixed_split_is_told(monkeypatch, capsys):
    """Of made-up times: every length stands in the line, the fixed one over the best; a wrong result is no
    time."""
    times = {"256": 12.0, "512": 8.0, "1024": 10.0, "2048": 11.0}
    measured = {name: SimpleNamespace(us=us) for name, us in times.items()}
    outcome = SimpleNamespace(refused={}, measured=measured)

    class Sizes:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def compare(self, contenders, rounds):
            assert list(contenders) == list(times)
            splits = [one.keywords["build"].split for one in contenders.values()]
            assert splits == [256, 512, 1024, 2048]
            return outcome

    monkeypatch.setattr(tune_decode, "Workload", Sizes)
    monkeypatch.setattr(tune_decode, "read_gbs", lambda rounds: 3000.0)
    monkeypatch.setattr("sys.argv", ["tune", "--case", "28/4/128 B=1 kv=4096"])
    tune_decode.main()
    first, line = capsys.readouterr().out.splitlines()
    assert first == "reading alone: 3000 GB/s"
    assert line.startswith("28/4/128 B=1 kv=4096: 256 12.00 us, 512 8.00 us, 1024 10.00 us")
    assert line.endswith(f"{2 * 2 * 4096 * 4 * 128 / 10 / 1e3:.0f} GB/s, 1.250x the best")
    outcome.refused["512"] = "ArithmeticError: 2.00 times the tolerance"
    with pytest.raises(ArithmeticError, match=r"2\.00 times the tolerance"):
        tune_decode.main()
    monkeypatch.setattr("sys.argv", ["tune", "--case", "no such case"])
    with pytest.raises(SystemExit):
        tune_decode.main()


def test_the_parts_of_prefill_attention_and_what_folds_cost(monkeypatch, capsys):
    times = {name: 1000.0 + 10 * i for i, name in enumerate(tune_prefill.builds(128))}
    made = {**times, "no folds": 800.0}
    monkeypatch.setattr(tune_prefill, "prebuild", lambda modules, progress: None)
    monkeypatch.setattr(tune_prefill, "Workload", lambda *_, **__: MadeUp([made]))
    monkeypatch.setattr("sys.argv", ["tune", "--case", "32/8/128 1x16384", "--rounds", "1"])
    tune_prefill.main()
    said = capsys.readouterr().out
    flops = (
        tune_prefill.BENCH_OPS["prefill_attention"]
        .cost(bench_cases("prefill_attention")["32/8/128 1x16384"])
        .flops
    )
    assert f"1000.00 us; TFLOP/s as it is {flops / 1e9:.1f}, no turns" in said
    assert "folds cost +25.0%" in said
    monkeypatch.setattr(tune_prefill, "Workload", lambda *_, **__: MadeUp([{"no turns": 0}]))
    with pytest.raises(ArithmeticError, match="no turns: 7 times the tolerance"):
        tune_prefill.main()
    monkeypatch.setattr("sys.argv", ["tune", "--case", "none such"])
    with pytest.raises(SystemExit):
        tune_prefill.main()


class MadeUpFew(MadeUp):
    """Every contender takes 50 us, but the many-token GEMM 80 and one rival 40; torch 55."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return SimpleNamespace(compare=self.compare, cost=SimpleNamespace(bytes=120_000_000))

    def compare(self, contenders, rounds):
        times = dict.fromkeys(contenders, 50.0) | {"many": 80.0, "128x16x2": 40.0}
        measured = {name: SimpleNamespace(us=us) for name, us in times.items()}
        return SimpleNamespace(
            measured={BASELINE: SimpleNamespace(us=55.0), **measured}, refused=self.refused
        )

    refused: ClassVar[dict] = {}


def test_the_gemm_for_few_tokens_is_held_against_its_targets(monkeypatch, capsys):
    monkeypatch.setattr(tune_gemm_few, "Workload", MadeUpFew)
    monkeypatch.setattr(tune_gemm_few, "torch_side", lambda against: None)
    monkeypatch.setattr(tune_gemm_few, "read_gbs", lambda rounds: 3050.0)
    monkeypatch.setattr(tune_gemm_few, "prebuild", lambda modules: "35 kernels")
    monkeypatch.setattr(hopper, "num_sms", lambda: 132)
    monkeypatch.setattr("sys.argv", ["tune", "--case", "M=16 N=4096 K=14336"])
    tune_gemm_few.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "35 kernels" == f"{len(list(tune_gemm_few.kernels()))} kernels"
    assert lines[0] == "reading alone: 3050 GB/s"
    assert lines[1] == (
        "M=16 N=4096 K=14336: 64x16 50.00 us, 2400 GB/s, 1.100x torch, target of its bytes 42.50 us, "
        "many-token 80.00 us, best 128x16x2 40.00 us"
    )
    assert "geometric mean 1.100, least 1.100, of 1" in lines[2]
    assert lines[3].endswith("none")
    assert lines[4].startswith("M <= 64, smaller weights: 0 of 0 over")
    assert lines[5].startswith("the pick against the best tile: geometric mean 0.800")
    assert lines[6].startswith("use_few()'s GEMM against the better of the two: geometric mean 1.000")
    (row,) = json.loads(lines[7])
    assert (row["m"], row["n"], row["k"], row["loss"]) == (16, 4096, 14336, 1.25)
    monkeypatch.setattr(MadeUpFew, "refused", {"64x16": "3 times the tolerance"})
    tune_gemm_few.main()
    assert "M=16 N=4096 K=14336: 3 times the tolerance" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tune", "--case", "no such case"])
    with pytest.raises(SystemExit):
        tune_gemm_few.main()


def test_few_tokens_are_swept_over_the_grid_and_the_heads():
    cases = tune_gemm_few.few_cases()
    assert len(cases) == 16 * 14 + 3 * 4
    assert tune_gemm_few.sizes_of(*cases["head qwen2.5-7b M=64"]) == (64, 152064, 3584)
    for op, params in cases.values():
        tried = tune_gemm_few.rivals(*tune_gemm_few.sizes_of(op, params), 132)
        assert len(set(tried)) == len(tried) <= 6
    for m, names in (
        (8, "64x8 64x16 64x8x2 64x16x2 128x8x2 128x16x2"),
        (32, "64x32 64x64 64x32x2 128x64 64x64x2 128x32x2"),
        (64, "64x64 64x96 128x64 64x64x2"), (100, "64x128 64x96 128x128"),
        (384, "64x128 128x128 128x256"),
    ):  # fmt: skip
        assert " ".join(map(str, tune_gemm_few.rivals(m, 4096, 4096, 132))) == names
    more = ["many 64x32deep", "many 64x64deep", "many 128x64c4"]
    assert list(tune_gemm_few.many_tiles("gemm", 64)) == ["many", *more]
    assert list(tune_gemm_few.many_tiles("gemm", 32)) == list(tune_gemm_few.many_tiles("lm_head", 64))
