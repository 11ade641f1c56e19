"""The sweep of the mma.sync GEMM's tiles, with measurements made up: what it tries, and what it says of
them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from kernels_numba.bench import tune_mma
from kernels_numba.bench.contest import BASELINE
from kernels_numba.ops.gemm import gemm_cost
from kernels_numba.ops.gemm_mma import Card
from kernels_numba.ops.gemm_mma.config import CONFIGS, pick_config

H100 = Card(132, 233_472)


@pytest.mark.parametrize("m", tune_mma.M)
@pytest.mark.parametrize("nk", tune_mma.NK)
def test_the_pick_is_among_what_is_tried(m, nk):
    tried = tune_mma.contenders((m, *nk), H100, hopper=True)
    assert str(pick_config(m, *nk, *H100)[0]) in tried
    assert list(tried)[-2:] == ["ladder", "hopper"]
    assert "hopper" not in tune_mma.contenders((m, *nk), H100, hopper=False)
    assert (m < 2048) or not any(name.startswith("16x32x") for name in tried)


def test_every_other_tile_is_tried_somewhere_and_picked_nowhere():
    tried = {config for m in tune_mma.M for nk in tune_mma.NK for config in tune_mma.promising(m, *nk, H100)}
    assert tried >= set(tune_mma.OTHERS)
    assert not set(tune_mma.OTHERS) & set(CONFIGS)


class MadeUp:
    """A workload whose clock gives the pick 200 us, other tiles 160, cuBLAS 100."""

    refused: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, op, params, torch):
        self.cost = gemm_cost(params["m"], params["n"], params["k"])
        self.picked = str(pick_config(params["m"], params["n"], params["k"], *H100)[0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def compare(self, contenders, rounds):
        times = {BASELINE: 100.0} | {name: 200.0 if name == self.picked else 160.0 for name in contenders}
        measured = {name: SimpleNamespace(us=us) for name, us in times.items()}
        return SimpleNamespace(measured=measured, refused=self.refused)


@pytest.fixture
def made_up(monkeypatch):
    device = SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(tune_mma, "torch_side", lambda against: None)
    monkeypatch.setattr(tune_mma, "card", lambda: H100)
    monkeypatch.setattr(tune_mma, "cuda", SimpleNamespace(get_current_device=lambda: device))
    monkeypatch.setattr(tune_mma, "Workload", MadeUp)


def test_a_sweep_says_what_the_pick_loses(monkeypatch, capsys, made_up):
    words = ["tune", "--case", "N=4096 K=4096", "--m", "64", "4096", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", words)
    tune_mma.main()
    first, second, mean, ratio = capsys.readouterr().out.splitlines()
    assert first.startswith("M=64 N=4096 K=4096: pick 64x32x64s4w2x2 200.0 us, 11 TFLOP/s, 173 GB/s; best ")
    assert "the pick loses 25.0%; of the pick's time: baseline 0.50 ladder 0.80 hopper 0.80" in second
    assert mean == "2 shapes: the pick is 25.0% behind the best tile in the mean"
    assert ratio == "M >= 2048: 0.500 of cuBLAS in the mean, 0.500 at worst"


def test_a_wrong_tile_ends_the_sweep(monkeypatch, made_up):
    monkeypatch.setattr(MadeUp, "refused", {"128x256x32s4w2x4": "2 times the tolerance"})
    with pytest.raises(ArithmeticError, match="128x256x32s4w2x4: 2 times"):
        tune_mma.tune([(4096, 4096, 4096)], 1)
    monkeypatch.setattr("sys.argv", ["tune", "--case", "no such shape"])
    with pytest.raises(SystemExit):
        tune_mma.main()
    assert math.isnan(tune_mma.geometric_mean([]))
