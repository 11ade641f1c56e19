"""`python -m sharp.bench`: words and exit statuses, plans, rows, files that survive; without a GPU."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_fakes import FakeWorkload, Simulated
from test_house import without_cuda
from test_import import heavy, modules_after

from kernels_numba.bench import contest, tune_decode
from kernels_numba.bench import gpu as gpu_bench
from kernels_numba.ops import OP_NAMES, OPS
from sharp import bench, bench_ops, results

WORKLOAD = contest.Workload  # the real one, before any test replaces it
GPU = bench_ops.Gpu("NVIDIA H100 80GB HBM3", "580.1", (9, 0))
COMMIT = "0123abc"


GEMMS = 96 + 208 + 8  # shapes: of many tokens, of few, with a residual


@pytest.fixture
def workloads(monkeypatch):
    """A fresh FakeWorkload."""

    class Workload(FakeWorkload):
        opened, wrong, broken, interrupt_at = [], set(), set(), None

    return Workload


@pytest.fixture
def gpu(monkeypatch, workloads):
    """This machine as one with an H100, where FakeWorkload measures beside a torch that is not there."""
    monkeypatch.setattr(bench, "gpu_here", lambda: GPU)
    monkeypatch.setattr(bench, "torch_is_here", lambda: True)
    monkeypatch.setattr(contest, "torch_side", lambda against: object() if against == "torch" else None)
    monkeypatch.setattr(contest, "Workload", workloads)
    monkeypatch.setattr(tune_decode, "read_gbs", lambda: 3000.0)
    monkeypatch.setattr(gpu_bench, "copy_gbs", lambda: 2500.0)
    return workloads


def run(capsys, *words):
    """(exit status, the lines printed)."""
    status = 0
    try:
        bench.main(list(words))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code)
    return status, capsys.readouterr().out.splitlines()


@pytest.fixture
def recorded(monkeypatch):
    """A table of two rows, whatever is recorded."""
    figures = {"value": 1.0, "unit": "TFLOP/s", "us": 2.0, "err": 0.1, "gpu": "G", "date": "2026-01-01"}
    rows = [
        results.make_row(
            op="gemm", case="M=512", rung="hopper", baseline="torch.matmul", ratio=1.0, **figures
        ),
        results.make_row(op="engine", case="online", rung="hopper", **figures),
    ]
    monkeypatch.setattr(results, "read_rows", lambda: rows)


def test_without_a_gpu_and_without_an_op_the_table_is_all(capsys, recorded):
    for words in ([], ["--quick"]):
        status, lines = run(capsys, *words)
        assert status == 0
        assert "no GPU can be used here" in lines[-1]
        assert any("torch.matmul" in line for line in lines[:-1])
        assert any(line.startswith("engine") for line in lines)


def test_without_a_gpu_an_op_that_was_asked_for_is_a_failure(capsys, recorded):
    status, lines = run(capsys, "gemm", "--case", "M=512")
    assert status == 1
    assert "nothing was measured" in lines[-1]
    assert len(lines) > 1
    assert all(line.startswith("gemm") for line in lines[:-1])
    status, lines = run(capsys, "silu_mul")
    assert status == 1
    assert lines[0] == "no measurements of silu_mul are recorded yet (in notebooks/results)"


def test_where_cuda_cannot_be_imported(tmp_path):
    done = without_cuda(tmp_path, "sharp.bench")
    assert done.returncode == 0, done.stderr
    assert "numba-cuda cannot be imported" in done.stdout
    assert without_cuda(tmp_path, "sharp.bench", "rope").returncode == 1


def test_the_bench_imports_nothing_heavy_until_it_must():
    loaded = modules_after("import sharp.bench, sharp.bench_ops, kernels_numba.bench")
    assert not heavy(loaded)
    loaded = modules_after("import kernels_numba.bench.contest, kernels_numba.bench.torch_side")
    assert "torch" not in loaded
    assert not {name for name in loaded if name.partition(".")[0] == "sharp"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gemm", "--case", "M=7 "], "no case contains that, they are called like 'M=1 N=4096 K=4096'"),
        (
            ["gemm", "--rung", "quick"],
            "'quick'; the kernels of gemm are gemv, hopper, mma_step, mma_sync, naive, plain, wgmma",
        ),
        (["gemm", "--rung", "reference"], "--rung is 'reference'"),
        (
            ["--rung", "nothing"],
            "the kernels of any op are gemv, hopper, mma_step, mma_sync, naive, plain, unconstrained, warp, "
            "wgmma",
        ),
        (["gemm", "--rounds", "4"], "--rounds is 4; at least 5 are required"),
    ],
)
def test_wrong_values_are_named_on_any_machine(capsys, words, message):
    status, lines = run(capsys, *words)
    assert status == 1
    assert lines[-1].startswith("not measured: ")
    assert message in lines[-1]


@pytest.mark.parametrize("words", [["gem"], ["--against", "jax"], ["gemm", "--rounds", "x"], ["import"]])
def test_wrong_words_are_usage_errors(capsys, words):
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    assert end.value.code == 2
    if words == ["gem"]:
        assert "engine, scheduler, serve, import, show or one of embedding" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--commit", "HEAD"], "--commit is 'HEAD'; 7 to 40 hex digits"),
        (["--resume"], "--resume needs --out"),
        (["--out", "/no/such/folder/rows.json"], "cannot be written: No such file"),
        (["--out", "/dev/full"], "not a regular file"),
    ],
)
def test_doors_before_anything_is_measured(capsys, gpu, words, message):
    status, lines = run(capsys, "gemm", *(words if "--commit" in words else ["--commit", COMMIT, *words]))
    assert status == 1
    assert message in lines[-1]
    assert gpu.opened == []


def test_a_full_disk_is_told_at_the_door(capsys, gpu, monkeypatch, tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "rows.json"
    monkeypatch.setattr(os, "fsync", full)
    status, lines = run(capsys, "gemm", "--commit", COMMIT, "--out", str(out))
    assert status == 1
    assert "cannot be written: No space left on device" in lines[-1]
    assert gpu.opened == []
    assert list(tmp_path.iterdir()) == []


def test_rungs_the_device_lacks(capsys, gpu, monkeypatch):
    monkeypatch.setattr(bench, "gpu_here", lambda: bench_ops.Gpu("NVIDIA L4", None, (8, 9)))
    status, lines = run(capsys, "gemm", "--rung", "hopper", "--commit", COMMIT)
    assert status == 1
    assert "--rung is 'hopper', which does not run on compute capability 8.9" in lines[-1]
    status, lines = run(capsys, "gemm", "--case", "M=512", "--commit", COMMIT)
    assert status == 0
    assert {row["rung"] for row in json.loads(lines[-1])} == {"plain", "mma_sync"}


def test_what_a_plan_holds():
    items, left_out = bench_ops.plan(OP_NAMES, named=[], gpu=GPU)
    assert {item.op for item in items} == set(OP_NAMES)
    assert left_out > 0
    gemm = [item for item in items if item.op == "gemm"]
    assert len(gemm) == GEMMS
    assert all("hopper" in item.rungs and "reference" not in item.rungs for item in gemm)
    rungs_of = {item.case: item.rungs for item in gemm}
    assert rungs_of["M=1 N=4096 K=4096"] == ("mma_sync", "hopper", "gemv")
    assert rungs_of["M=2 N=4096 K=4096"] == ("hopper",)
    assert rungs_of["M=512 N=4096 K=4096"] == ("plain", "hopper")
    both, _ = bench_ops.plan(["gemm"], named=["mma_sync"], gpu=GPU)
    assert all(item.rungs == ("mma_sync",) for item in both)
    assert len(both) == GEMMS
    one, _ = bench_ops.plan(["gemm"], named=["gemv"], gpu=GPU)
    assert {item.params["m"] for item in one} == {1}
    largest = next(item for item in gemm if item.case == "M=16384 N=37888 K=3584")
    assert largest.rungs == ("mma_sync", "hopper")  # plain would take seconds a call
    steps, _ = bench_ops.plan(["gemm"], named=["naive", "wgmma"], text="M=4096 N=4096 K=4096", gpu=GPU)
    assert [item.rungs for item in steps] == [("naive", "wgmma")]  # a ladder's steps, too
    named, left_out = bench_ops.plan(["gemm"], named=["plain"], gpu=GPU)
    assert (len(named), left_out) == (GEMMS, 0)  # unless it is asked for
    quick, _ = bench_ops.plan(OP_NAMES, named=[], quick=True, gpu=GPU)
    assert {item.op for item in quick} == set(OP_NAMES)
    assert sum(len(item.rungs) for item in quick) < 140
    some, _ = bench_ops.plan(OP_NAMES, named=[], text="smollm2-135m T=64", gpu=GPU)
    of_rows = {"embedding", "rms_norm", "rope", "store_kv", "rope_store_kv", "silu_mul"}
    assert {item.op for item in some} == of_rows


def test_a_registered_rung_is_measured_too(monkeypatch):
    monkeypatch.setitem(OPS["rope"].rungs, "mine", lambda **_: None)
    items, _ = bench_ops.plan(["rope"], named=[], gpu=GPU)
    assert items[0].rungs == ("plain", "mine")


def test_of_a_rungs_choices_the_quickest_is_kept():
    """What the contract of attention costs: any other split, whichever is best."""
    items, _ = bench_ops.plan(["decode_attention"], named=["hopper", "unconstrained"], gpu=GPU)
    both = ("hopper", "unconstrained")
    for item in items:
        assert item.rungs == (both if len(set(item.params["context_lens"])) == 1 else both[:1])
    assert {item.rungs for item in items} == {both, both[:1]}
    contenders = bench_ops.contenders_of(OPS["decode_attention"], "unconstrained")
    assert [one.keywords["split"] for one in contenders.values()] == [256, 512, 2048]
    assert list(bench_ops.contenders_of(OPS["gemm"], "gemv")) == ["gemv"]
    times = dict(zip(contenders, (3.0, 1.5, 2.0), strict=True))
    measured = {contest.BASELINE: 9, **{name: SimpleNamespace(us=us) for name, us in times.items()}}
    outcome = SimpleNamespace(measured=measured, sustained={})
    assert bench_ops.keep_quickest(outcome, "unconstrained") == ", unconstrained split=512"
    assert outcome.measured == {contest.BASELINE: 9, "unconstrained": SimpleNamespace(us=1.5)}
    assert bench_ops.keep_quickest(outcome, "unconstrained") == ""


def test_rows_and_lines_of_a_measurement(capsys, gpu, tmp_path):
    out = tmp_path / "rows.json"
    words = ["gemm", "--rung", "hopper", "--case", "M=512 N=4096", "--commit", COMMIT, "--out", str(out)]
    status, lines = run(capsys, *words, "--sustained")
    assert status == 0
    rows = json.loads(lines[-1])
    assert rows == json.loads(out.read_text())
    names = ["M=512 N=4096 K=4096", "M=512 N=4096 K=14336"]
    assert [row["case"] for row in rows] == [n + w for n in names for w in ("", " sustained")]
    for row in rows:
        assert set(row) == set(results.FIELDS)
        assert (row["op"], row["rung"], row["unit"]) == ("gemm", "hopper", "TFLOP/s")
        assert (row["baseline"], row["ratio"], row["err"]) == ("torch.matmul", 1.5, 0.5)
        assert (row["gpu"], row["driver"], row["commit"]) == (GPU.name, GPU.driver, COMMIT)
        assert row["source_hash"] == results.source_hash(results.op_sources("gemm"))
    assert (rows[0]["us"], rows[1]["us"]) == (20.0, 40.0)
    line = next(line for line in lines if line.startswith("gemm") and "sustained" not in line)
    for part in (
        "20.00 us",
        "50.00 TFLOP/s",
        "of roofline",
        "1.50x torch.matmul",
        "19.0..25.0 us",
        "; baseline ",
        "cold L2",
    ):
        assert part in line
    assert lines[-3] == "gemm hopper: 4 rows, geometric mean 1.500x, least 1.500x"
    assert lines[-2].startswith(
        "many tokens (512 and more), times torch's speed: geometric mean 1.500 (1.03 w"
    )


def test_the_ops_between_are_held_against_what_the_card_copies(capsys, gpu):
    """All of them by one command: rung warp at 8,192 tokens."""
    _, lines = run(capsys, "--rung", "warp", "--case", "T=8192", "--commit", COMMIT)
    rows = json.loads(lines[-1])
    assert {row["op"] for row in rows} == {"embedding", "rms_norm", "qk_norm", "rope_store_kv", "silu_mul"}
    assert lines[1] == "copying alone: 2500 GB/s, read and written"
    timed = [line for line in lines if line.startswith("silu_mul ") and "cold L2" in line]
    assert len(timed) == 3
    assert all(line.endswith("cold L2, 2% of what the card copies)") for line in timed)
    last = [line for line in lines if "that the card copies: least 0.020 (0.8 wanted: MISSED)" in line]
    assert [line.split()[0] for line in last] == ["rms_norm", "rope_store_kv", "silu_mul", "embedding"]


def test_few_tokens_are_held_against_what_the_card_reads(capsys, gpu):
    words = ["gemm", "--rung", "hopper", "--case", "M=1 N=960|M=1 N=28672", "--commit", COMMIT]
    _, lines = run(capsys, *words)
    assert lines[0] == "baseline: torch"
    assert lines[1] == "reading alone: 3000 GB/s"
    few = [line for line in lines if line.startswith("gemm ") and "cold L2" in line]
    assert few[0].endswith("cold L2, 392% of what the card reads)")
    assert few[1].endswith("cold L2, 2% of what the card reads, 2.87 us allowed)")
    _, lines = run(capsys, *words, "--warm")
    assert not any("card reads" in line for line in lines)  # what is in a cache is not read


def test_warm_rows_say_so_and_peers_are_cited(capsys, gpu):
    words = ["prefill_attention", "--case", "32/8/128 1x16384", "--rung", "plain", "--commit", COMMIT]
    _, lines = run(capsys, *words, "--warm", "--against", "none")
    [row] = json.loads(lines[-1])
    assert row["case"] == "32/8/128 1x16384 warm"
    assert row["reference"] == 727
    assert (row["baseline"], row["ratio"]) == (None, None)
    assert any("peer: 727, FlashAttention 3" in line and "no baseline" in line for line in lines)


def test_failures_are_told_and_nothing_else_stops(capsys, gpu, tmp_path):
    gpu.wrong, gpu.broken = {"hopper"}, {"rope"}
    out = tmp_path / "rows.json"
    status, lines = run(capsys, "--quick", "--commit", COMMIT, "--out", str(out))
    assert status == 1
    rows = json.loads(lines[-1])
    assert {row["op"] for row in rows} == set(OP_NAMES) - {"rope"}
    assert {(row["op"], row["rung"]) for row in rows if row["rung"] not in ("plain", "warp")} == {
        ("decode_attention", "mma_sync"), ("gemm", "mma_sync"), ("gemm_silu_mul", "mma_sync"),
        ("prefill_attention", "mma_sync"),
    }  # fmt: skip
    told = [line for line in lines if line.startswith("not timed: ")]
    assert any("gemm M=512 N=4096 K=4096 hopper: ArithmeticError: 7.00 times" in line for line in told)
    assert any("rope llama3.2-1b T=64: MemoryError: no room" in line for line in told)


def test_the_whole_way_with_real_kernels_in_the_simulator(capsys, gpu, monkeypatch, tmp_path):
    """Every op: words, plan, data, the plain kernel, its check, row, file. Only the clock is made up."""
    from kernels_numba.bench import cases

    toys = {op: next(iter(OPS[op].CASES.values())) for op in OP_NAMES}
    monkeypatch.setattr(cases, "bench_cases", lambda op, quick=False, text="": {"toy": toys[op]})
    monkeypatch.setattr(contest, "Workload", functools.partial(WORKLOAD, lane=Simulated()))
    out = tmp_path / "rows.json"
    words = ["--rung", "plain", "--warm", "--against", "none", "--commit", COMMIT, "--out", str(out)]
    status, lines = run(capsys, *words)
    assert status == 0, lines
    rows = json.loads(out.read_text())
    assert [row["op"] for row in rows] == list(OP_NAMES)
    for row in rows:
        assert (row["case"], row["rung"], row["us"]) == ("toy warm", "plain", 1e6)
        assert row["err"] <= 1
        assert row["dtype"] == ("float32" if row["op"] == "sample" else "bfloat16")
    assert sum("1 calls over 1 sets of operands, warm L2" in line for line in lines) == len(OP_NAMES)


def test_resuming(capsys, gpu, tmp_path):
    out = tmp_path / "rows.json"
    words = ["gemm", "--rung", "hopper", "--commit", COMMIT, "--out", str(out)]
    run(capsys, *words, "--case", "N=576 K=1536")
    gpu.opened.clear()
    status, lines = run(capsys, *words, "--case", "N=576")
    assert status == 1
    assert f"--out is {out}, which holds 19 rows: add --resume, or remove it" in lines[-1]
    assert len(json.loads(out.read_text())) == 19
    status, lines = run(capsys, *words, "--case", "N=576", "--resume")
    assert status == 0
    assert len(gpu.opened) == 19
    assert len(json.loads(lines[-1])) == len(json.loads(out.read_text())) == 38
    for other in (["--commit", "fedcba9"], ["--against", "none"]):  # rows of something else are not kept
        gpu.opened.clear()
        copy = tmp_path / "copy.json"
        copy.write_text(out.read_text())
        again = [word if word != str(out) else str(copy) for word in words]
        _, lines = run(capsys, *again, "--case", "N=576 K=576", "--resume", *other)
        assert "38 rows of" in lines[0]
        assert len(gpu.opened) == 19


def test_resuming_with_the_sustained_rate_measures_again(capsys, gpu, tmp_path):
    out = tmp_path / "rows.json"
    words = ["gemm", "--rung", "hopper", "--case", "N=576 K=1536", "--commit", COMMIT, "--out", str(out)]
    run(capsys, *words)
    _, lines = run(capsys, *words, "--resume", "--sustained")
    assert len(gpu.opened) == 38
    assert len(json.loads(lines[-1])) == 38
    run(capsys, *words, "--resume", "--sustained")
    assert len(gpu.opened) == 38


def test_the_sustained_rate_of_a_part_leaves_the_other_rows(capsys, gpu, tmp_path):
    out = tmp_path / "rows.json"
    words = ["gemm", "--rung", "hopper", "--commit", COMMIT, "--out", str(out)]
    run(capsys, *words, "--case", "N=576 K=1536")
    part = ["--case", "M=512 N=576 K=1536", "--resume", "--sustained"]
    gpu.interrupt_at = 20  # what is measured again is not lost before it is there again
    assert run(capsys, *words, *part)[0] == 130
    assert len(json.loads(out.read_text())) == 19
    gpu.interrupt_at = None
    _, lines = run(capsys, *words, *part)
    rows = json.loads(lines[-1])
    names = [row["case"] for row in rows]
    assert len(names) == len(set(names)) == 20
    assert [name for name in names if name.endswith("sustained")] == ["M=512 N=576 K=1536 sustained"]


def test_an_interrupt_keeps_what_was_measured(capsys, gpu, tmp_path):
    gpu.interrupt_at = 4
    out = tmp_path / "rows.json"
    words = ["gemm", "--rung", "hopper", "--commit", COMMIT, "--out", str(out)]
    status, _ = run(capsys, *words)
    assert status == 130
    assert len(json.loads(out.read_text())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    gpu.interrupt_at = None
    status, lines = run(capsys, *words, "--resume")
    assert status == 0
    assert len(json.loads(lines[-1])) == GEMMS


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '[{"op": "gemm"}]'])
def test_a_file_of_something_else_is_left_alone(capsys, gpu, tmp_path, text):
    out = tmp_path / "rows.json"
    out.write_text(text)
    status, lines = run(capsys, "gemm", "--commit", COMMIT, "--out", str(out), "--resume")
    assert status == 1
    assert "holds something else than rows" in lines[-1]
    assert out.read_text() == text


def test_without_torch_there_is_no_baseline_and_it_is_said(capsys, gpu, monkeypatch):
    monkeypatch.setattr(bench, "torch_is_here", lambda: False)
    _, lines = run(capsys, "rope", "--case", "T=64", "--commit", COMMIT)
    assert "baseline: none (torch is not installed)" in lines
    assert {row["baseline"] for row in json.loads(lines[-1])} == {None}
    monkeypatch.undo()
    if not bench.torch_is_here():
        with pytest.raises(ValueError, match="torch cannot be the baseline here"):
            contest.torch_side("torch")


def test_changed_code_has_no_commit(monkeypatch, tmp_path):
    import subprocess

    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="pass --commit"):
        bench.head_commit()
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    clean = bench.head_commit()
    assert len(clean) == 40
    (tmp_path / "sharp").mkdir()
    (tmp_path / "sharp" / "new.py").write_text("")
    with pytest.raises(ValueError, match="commit first"):
        bench.head_commit()
    assert bench.head_commit(to_file=False) == clean + "-dirty"


def test_import_words(capsys, monkeypatch, tmp_path):
    rows = [results.make_row(op="gemm", case="a", rung="plain", gpu="G", err=0.1, commit="0" * 40)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    status, lines = run(capsys, "import", str(path))
    assert status == 1
    assert lines[-1].startswith("not imported: row 0: commit '000000")
    monkeypatch.setattr(results, "check_rows", lambda rows: None)
    monkeypatch.setattr(results, "lost_rows", lambda rows: [{**rows[0], "case": "b"}])
    given = {}

    def record(rows, partial):
        given["partial"] = partial
        return [Path(results.ROOT / "notebooks/results/g.json")]

    monkeypatch.setattr(results, "import_rows", record)
    status, lines = run(capsys, "import", str(path), "--partial")
    assert (status, given["partial"]) == (0, True)
    assert lines == ["deleted: gemm b plain", "recorded in notebooks/results/g.json"]
    assert run(capsys, "import", str(tmp_path / "absent"))[0] == 1
