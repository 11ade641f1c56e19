"""The sweep over the tiles of the GEMM, with measurements made up: what it tries, takes and writes."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest

from kernels_numba.bench import tune_gemm
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
        return SimpleNamespace(measured={BASELINE: SimpleNamespace(us=100.0), **measured})


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
    from types import SimpleNamespace

    from kernels_numba.bench import tune_decode

    times = {256: 12.0, 512: 8.0, 1024: 10.0, 2048: 11.0}
    measured = {str(n): SimpleNamespace(us=us) for n, us in times.items()}
    outcome = SimpleNamespace(refused={}, measured=measured)

    class MadeUp:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def compare(self, contenders, rounds):
            assert [one.keywords["build"].split for one in contenders.values()] == list(times)
            return outcome

    monkeypatch.setattr(tune_decode, "Workload", MadeUp)
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
