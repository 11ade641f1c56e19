"""The rules of notebooks/results: fields, commits, replacement; and that what is recorded keeps them."""

from __future__ import annotations

import json
import subprocess

import pytest

from sharp import bench, results


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit; returns (root, commit)."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return tmp_path, commit


def row(sha, **changes):
    values = {
        "op": "gemm",
        "case": "a",
        "rung": "plain",
        "value": 1.0,
        "commit": sha,
        "gpu": "NVIDIA H100 80GB HBM3",
        "err": 0.5,
    }
    return results.make_row(**{**values, **changes})


def test_rows_of_an_op_and_device_are_replaced_at_once(checkout):
    root, commit = checkout
    folder = root / "results"
    results.import_rows([row(commit), row(commit, case="b"), row(commit, op="rope")], folder, root)
    other = row(commit, gpu="NVIDIA H200", case="z")
    paths = results.import_rows([row(commit, value=2.0), other], folder, root, partial=True)
    assert [path.name for path in paths] == ["nvidia-h100-80gb-hbm3.json", "nvidia-h200.json"]
    h100 = json.loads((folder / "nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
    assert [(r["op"], r["case"], r["value"]) for r in h100] == [("gemm", "a", 2.0), ("rope", "a", 1.0)]
    assert len(results.read_rows(folder)) == 3


def test_a_part_of_the_grid_deletes_nothing_unless_told(checkout):
    root, commit = checkout
    folder = root / "results"
    whole = [row(commit, case=case, rung=rung) for case in "ab" for rung in ("plain", "hopper")]
    results.import_rows([*whole, row(commit, op="rope")], folder, root)
    before = (folder / "nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8")
    for part in (whole[:3], whole[::2], [row(commit, case="c"), *whole[1:]]):
        with pytest.raises(ValueError, match=r"recorded rows of these ops .*'gemm . \w+' is one.*--partial"):
            results.import_rows(part, folder, root)
    assert (folder / "nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8") == before
    assert len(results.lost_rows(whole[:1], folder)) == 3
    results.import_rows([*whole, row(commit, case="c")], folder, root)  # more than before is welcome
    results.import_rows([row(commit, gpu="NVIDIA L4")], folder, root)  # and another device
    results.import_rows(whole[:1], folder, root, partial=True)
    assert len(results.read_rows(folder)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"case": "a"}, "occurs twice in the file"),
        ({"commit": "0" * 40}, "is not in this history"),
        ({"commit": "HEAD; rm"}, "is not in this history"),
        ({"gpu": None}, "op and gpu must be named"),
        ({"err": None}, "only a result within its tolerance"),
        ({"err": 1.5}, "only a result within its tolerance"),
        ({"err": float("nan")}, "only a result within its tolerance"),
    ],
)
def test_rows_that_prove_nothing_are_refused_and_nothing_is_written(checkout, change, message):
    root, commit = checkout
    with pytest.raises(ValueError, match=message):
        results.import_rows([row(commit), row(commit, **change)], root / "results", root)
    assert not (root / "results").exists()


def test_fields_are_fixed(checkout):
    root, commit = checkout
    with pytest.raises(ValueError, match="unknown result fields"):
        results.make_row(speed=1)
    broken = row(commit)
    del broken["err"]
    with pytest.raises(ValueError, match="fields missing or unknown"):
        results.import_rows([broken], root / "results", root)


def test_what_is_recorded_keeps_the_rules():
    for recorded in results.read_rows():
        assert set(recorded) == set(results.FIELDS)
        assert recorded["err"] is not None
        assert recorded["err"] <= 1, recorded
        assert results.format_row(recorded)
        assert recorded["source_hash"] == results.source_hash(results.sources_of(recorded["op"])), (
            f"{recorded['op']} {recorded['case']}: its source changed since it was measured"
        )


def test_rows_of_changed_sources_can_be_dropped(tmp_path):
    fresh = row("0", source_hash=results.source_hash(results.op_sources("gemm")))
    old = row("0", op="scheduler", source_hash="0" * 16)
    path = tmp_path / "a-gpu.json"
    path.write_text(json.dumps([fresh, old]))
    assert results.drop_stale(tmp_path) == [old]
    assert json.loads(path.read_text()) == [fresh]
    assert results.drop_stale(tmp_path) == []


@pytest.mark.parametrize("words", [["import"], ["import", "rows.json", "--drop-stale"]])
def test_an_import_is_of_a_file_or_drops_what_is_stale(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(words)
    assert "a FILE to record, or --drop-stale, is required" in capsys.readouterr().err


def test_an_ops_sources_are_what_it_imports():
    sources = results.op_sources("gemm")
    assert {
        "kernels_numba/ops/gemm/hopper.py",
        "kernels_numba/ptx/wgmma.py",
        "kernels_numba/launch.py",
    } <= set(sources)
    assert "kernels_numba/ops/rope.py" not in sources
    assert "kernels_numba/ops/rope.py" in results.op_sources("rope")
    with pytest.raises(ValueError, match="no op 'gem'"):
        results.op_sources("gem")


def test_an_ops_sources_reach_into_its_folders(tmp_path):
    ops = tmp_path / "kernels_numba" / "ops"
    (ops / "gemm" / "ladder").mkdir(parents=True)
    (ops / "gemm" / "__init__.py").write_text("")
    (ops / "gemm" / "ladder" / "v1.py").write_text("from kernels_numba.tile import x\n")
    (tmp_path / "kernels_numba" / "tile.py").write_text("")
    (tmp_path / "kernels_numba" / "other.py").write_text("")
    assert results.op_sources("gemm", tmp_path) == [
        "kernels_numba/ops/gemm/__init__.py",
        "kernels_numba/ops/gemm/ladder/v1.py",
        "kernels_numba/tile.py",
    ]


def test_a_source_hash_sees_every_byte(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = 1\n")
    (tmp_path / "b.py").write_bytes(b"")
    before = results.source_hash(["a.py", "b.py"], tmp_path)
    assert before == results.source_hash(["b.py", "a.py"], tmp_path)
    (tmp_path / "b.py").write_bytes(b"#")
    assert before != results.source_hash(["a.py", "b.py"], tmp_path)
