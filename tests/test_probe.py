"""The probe on a device whose times and peaks are known, its cache, and the command on the tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import model_config

from sharp.__main__ import main
from sharp.budget import Term
from sharp.config import EngineConfig
from sharp.device import HostDevice
from sharp.eager import Eager
from sharp.meter import COPY_BYTES, HostMeter, copy_bandwidth, free_before_context
from sharp.plan import BatchPlan, SampleOutput
from sharp.probe import Probe
from sharp.probe_cache import fingerprint, get_probe, probe_path, read_probe, write_probe
from sharp.step_times import CHEAP_ROUNDS, ROUNDS, Curves, measure_curves, uniform_step

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"
CONFIG = EngineConfig(device="cpu", max_num_batched_tokens=256, max_num_seqs=16, block_size=16)


def floor_then_linear(tokens: int, keys: int) -> float:
    """10 ms up to 64 tokens, then in proportion; and 1 us for every pair of a token and a key."""
    return 0.010 * max(1.0, tokens / 64) + 1e-6 * tokens * keys


class TimedModel(Eager):
    """Takes known times on a clock of its own; every step is checked."""

    def __init__(self, seconds: Callable[[int, int], float], num_blocks: int = 4096) -> None:
        self.config, self.num_blocks, self.block_size = model_config(), num_blocks, 16
        self.seconds, self.now, self.plans = seconds, 0.0, list[BatchPlan]()

    def clock(self) -> float:
        return self.now

    def stage(self, plan: BatchPlan) -> BatchPlan:
        plan.check(self.block_size)
        assert plan.block_table.max() < self.num_blocks
        assert plan.token_ids.max() < self.config.vocab_size
        self.plans.append(plan)
        return plan

    def forward(self, plan: BatchPlan) -> BatchPlan:
        self.now += self.seconds(plan.num_tokens, int(plan.context_lens[0]))
        return plan

    def sample(self, logits: Any, plan: BatchPlan) -> SampleOutput:
        return SampleOutput(np.ones(len(plan.logits_rows), np.int32), (None,) * len(plan.logits_rows))

    def close(self) -> None: ...


class FakeMeter:
    """Memory that is 1000 bytes higher while a step is queued."""

    looks = 0

    def look(self) -> None:
        self.looks += 1


def curves(model: TimedModel, **options: Any) -> Curves:
    meter: Any = FakeMeter()
    found = measure_curves(model, CONFIG, meter, clock=model.clock, max_model_len=2048, **options)
    assert meter.looks == len(model.plans)
    return found


def probe(**changes: Any) -> Probe:
    found = Probe(
        model="m",
        device="d",
        kind="cpu",
        dtype="float32",
        free=800,
        total=1000,
        memory=(Term("weights", 100, 90, "w"), Term("logits", 5, None, "l")),
        kv_bytes_per_token=4,
        block_size=16,
        num_blocks=7,
        max_num_seqs=16,
        curves=curves(TimedModel(floor_then_linear)),
        copies=({"way": "memory to memory", "bytes": 1, "bytes_per_s": 2.5},),
        seconds=1.5,
        date="2026-01-01T00:00:00+00:00",
        fingerprint={"device": "d"},
    )
    return replace(found, **changes)


def test_the_points_are_the_devices_times() -> None:
    found = curves(TimedModel(floor_then_linear))
    assert found.skipped == ()
    assert {c for _, c, _ in found.prefill} == {0, 1024}
    assert sorted(t for t, c, _ in found.prefill if c == 0) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert sorted(t for t, c, _ in found.decode if c == 64) == [1, 2, 4, 8, 16]
    for tokens, context, seconds in found.prefill:
        assert seconds == pytest.approx(floor_then_linear(tokens, context + tokens))
    for tokens, context, seconds in found.decode:
        assert seconds == pytest.approx(floor_then_linear(tokens, context + 1))


def test_how_single_steps_vary() -> None:
    model = TimedModel(floor_then_linear)
    calls = iter(range(10**6))
    model.seconds = lambda t, k: floor_then_linear(t, k) * (1.0, 0.9, 1.1)[next(calls) % 3]
    noise = curves(model, limit_s=1e6).noise
    assert len(noise) == 40
    assert noise == tuple(sorted(noise))
    assert (noise[2], noise[20], noise[-3]) == pytest.approx((0.9, 1.0, 1.1))
    assert np.ptp(curves(TimedModel(floor_then_linear)).noise) < 1e-9


def test_compiling_is_not_counted() -> None:
    """The first step of each size takes 20 s more: no point is left out for it, and none is wrong."""
    model = TimedModel(floor_then_linear)
    seen: set[int] = set()

    def seconds(tokens: int, keys: int) -> float:
        first = 0.0 if tokens in seen else 20.0
        seen.add(tokens)
        return first + floor_then_linear(tokens, keys)

    model.seconds = seconds
    found, wanted = curves(model, limit_s=14.0), curves(TimedModel(floor_then_linear), limit_s=14.0)
    for ours, theirs in ((found.prefill, wanted.prefill), (found.decode, wanted.decode)):
        assert np.array(sorted(ours)) == pytest.approx(np.array(sorted(theirs)))
    assert model.now > 100


def test_a_disturbed_round_does_not_count() -> None:
    model = TimedModel(floor_then_linear)
    calls = iter(range(10**6))
    model.seconds = lambda t, k: floor_then_linear(t, k) * (50 if next(calls) % 4 == 0 else 1)
    for tokens, context, seconds in curves(model, limit_s=1e6).prefill:
        assert seconds == pytest.approx(floor_then_linear(tokens, context + tokens))


def test_less_time_means_fewer_points_and_never_fewer_rounds() -> None:
    slow = TimedModel(lambda tokens, keys: 0.3 * tokens)
    found = curves(slow, limit_s=20.0)
    assert slow.now < 30
    assert found.skipped
    assert "too long" in found.skipped[0]
    sizes = {c: [t for t, context, _ in found.prefill if context == c] for c in (0, 1024)}
    assert all(line and line[0] == 1 for line in sizes.values())
    rounds = [p.num_tokens for p in slow.plans if p.num_decodes == 0 and p.context_lens[0] < 1024]
    assert all(ROUNDS <= rounds.count(size) <= CHEAP_ROUNDS + 1 for size in set(rounds))


def test_few_pages_end_a_line() -> None:
    found = curves(TimedModel(floor_then_linear, num_blocks=66))
    assert any("over the 66 pages" in why for why in found.skipped)
    assert max(t for t, c, _ in found.prefill if c == 1024) == 32
    assert max(t for t, _, _ in found.decode) == 16  # at a context that the largest batch can have


@pytest.mark.parametrize(("num_seqs", "tokens", "context"), [(1, 1, 0), (1, 37, 5), (5, 1, 16), (3, 4, 30)])
def test_uniform_steps_are_right_plans(num_seqs: int, tokens: int, context: int) -> None:
    plan = uniform_step(num_seqs, tokens, context, 16, 300)
    plan.check(16)
    assert (plan.num_seqs, plan.num_tokens) == (num_seqs, num_seqs * tokens)
    assert (plan.context_lens == context + tokens).all()
    assert len(np.unique(plan.block_table)) == plan.block_table.size  # pages of its own


def test_the_knee_is_proposed() -> None:
    found = probe().propose()
    assert found.max_num_batched_tokens == 64
    assert found.max_num_seqs == 16
    assert "knee" in found.why
    assert probe(max_num_seqs=100).propose().max_num_batched_tokens == 100


def test_a_latency_target_is_kept_at_the_longest_context() -> None:
    found = probe().propose(150)
    tokens = found.max_num_batched_tokens
    curve = probe().prefill
    assert curve.predict(tokens, 1024) <= 0.150 < curve.predict(tokens + 1, 1024)
    assert 64 < tokens < 128  # 10 ms a 64 tokens, and more than 1 ms a token for the context
    assert found.max_num_seqs == 16
    assert probe().propose(20).max_num_seqs == 9  # 10 ms, and 1.025 ms a sequence


@pytest.mark.parametrize("target", [0, -1, float("nan"), float("inf"), True, 5])
def test_targets_that_cannot_be_met(target: float) -> None:
    with pytest.raises(ValueError, match="target_itl_ms"):
        probe().propose(target)


def test_json_keeps_every_number() -> None:
    found = probe()
    assert Probe.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["memory"][0]["predicted"] == 100


def test_cache_hit_miss_stale_and_damaged(tmp_path: Path) -> None:
    found, key = probe(), {"device": "d"}
    path = probe_path(key, tmp_path / "probes")
    assert read_probe(path, key, 800) == (None, "nothing kept for this device, model and version")
    write_probe(path, found)
    kept, why = read_probe(path, key, 801)
    assert kept == replace(found, from_cache=True)
    assert "still true" in why
    assert read_probe(path, key, 900)[0] is not None
    stale, why = read_probe(path, key, 699)  # another process holds memory
    assert stale is None
    assert "800" in why
    assert "699" in why
    assert read_probe(path, {"device": "e"}, 800)[0] is None
    whole = path.read_bytes()
    impossible = whole.replace(b"[1,0,", b"[0,0,")  # a step of no tokens
    for damaged in (b"", b"{", whole[: len(whole) // 2], b"\xff\xfe", b"[]", impossible):
        path.write_bytes(damaged)
        kept, why = read_probe(path, key, 800)
        assert kept is None
        assert "damaged" in why
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_get_probe_measures_once(tmp_path: Path) -> None:
    calls, said = [], []

    def measure(checkpoint: Any, config: Any, device: Any, key: dict[str, str], **options: Any) -> Probe:
        calls.append(key)
        return probe(fingerprint=key, free=device.free_bytes(), total=1 << 40)

    def get(**options: Any) -> Probe:
        return get_probe(
            TINY, EngineConfig(device="cpu"), directory=tmp_path, measure=measure, say=said.append, **options
        )

    assert not get().from_cache
    assert get().from_cache
    assert len(calls) == 1
    assert not get(fresh=True).from_cache
    assert len(calls) == 2
    assert ["nothing kept" in said[0], "still true" in said[1], "anew" in said[2]] == [True] * 3
    shutil.rmtree(tmp_path)
    tmp_path.write_text("no directory")  # a cache that cannot be written costs the next start, nothing else
    assert not get().from_cache
    assert "could not be kept" in said[-1]


def test_the_fingerprint_changes_with_what_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "tiny"
    shutil.copytree(TINY, model)

    def key(dtype: str = "float32", **options: Any) -> str:
        return json.dumps(fingerprint(HostDevice(dtype), model, EngineConfig(**options)))

    first = key()
    assert key() == first
    assert key(device="cpu", dtype="float32") == first  # what auto came to, said outright
    others = {key("bfloat16"), key(block_size=32), key(max_model_len=64), key(rungs={"gemm": "reference"})}
    os.utime(model / "model.safetensors", ns=(1, 1))
    others.add(key())
    (model / "model.safetensors").write_bytes(b"shorter")
    others.add(key())
    monkeypatch.setattr("kernels_numba.cubins.SOURCES", "edited")
    others.add(key())
    monkeypatch.setattr("sharp.__version__", "9.9")
    others.add(key())
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    others.add(key())
    monkeypatch.setattr("numpy.__version__", "9.9")
    others.add(key())
    assert len(others | {first}) == 11


def resident_rows(text: str) -> set[str]:
    return {line.split(":")[0] for line in text.splitlines()} & {"RssAnon", "VmRSS"}


HOST_READINGS = """
import time
import numpy as np
from sharp.device import HostDevice
from sharp.eager import Eager
from sharp.meter import HostMeter

meter, size = HostMeter(HostDevice("float32")), 64 << 20
before = meter.used()
held = np.ones(size, np.uint8)
for _ in range(50):  # some kernels count what was touched a moment later
    if meter.used() - before > 0.9 * size:
        break
    time.sleep(0.1)
assert 0.9 * size < meter.used() - before < 1.5 * size, (before, meter.used())
meter.start_peak()
np.ones(size, np.uint8).sum()  # taken and given back at once
meter.look()
assert 0.9 * size < meter.peak() < 1.5 * size, meter.peak()
assert 0 < meter.free() <= meter.total()
"""


def test_host_readings_follow_what_is_allocated() -> None:
    """In a process of its own: where a high-water mark cannot be reset, another test's stands in the way."""
    status = Path("/proc/self/status")
    if not status.exists() or not resident_rows(status.read_text()):
        pytest.skip("only a maximum can be read here")
    done = subprocess.run([sys.executable, "-c", HOST_READINGS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_used_takes_the_narrowest_row_that_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"RssAnon": 5, "VmRSS": 7}
    monkeypatch.setattr("sharp.meter._status", lambda name: rows.get(name, 0))
    monkeypatch.setattr("sharp.meter._largest", lambda: 9)
    meter = HostMeter(HostDevice("float32"))
    assert meter.used() == 5
    del rows["RssAnon"]  # sandboxes with a kernel of their own do not tell it apart
    assert meter.used() == 7
    del rows["VmRSS"]
    assert meter.used() == 9


class FakeDriver:
    """libcuda and libnvidia-ml in one: a card with 7 of 10 bytes free, unless `broken` says no."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.shut = broken, 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == self.broken:
                return 1
            if name == "nvmlDeviceGetMemoryInfo":
                arguments[1][0], arguments[1][1], arguments[1][2] = 10, 7, 3
            self.shut += name == "nvmlShutdown"
            return 0

        return call


def test_free_memory_before_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that the answers are put together rightly: whether NVML gives them, a GPU has to show."""
    driver = FakeDriver()
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    assert free_before_context() == (7, 10)
    assert driver.shut == 1
    for name in ("cuInit", "cuDeviceGet", "cuDeviceGetPCIBusId", "nvmlInit_v2", "nvmlDeviceGetMemoryInfo"):
        driver = FakeDriver(name)
        assert free_before_context() is None
    assert driver.shut == 1

    def absent(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", absent)
    assert free_before_context() is None


def test_host_copies() -> None:
    rows = copy_bandwidth(HostDevice("float32"))
    assert [row["bytes"] for row in rows] == list(COPY_BYTES)
    assert all(1e7 < row["bytes_per_s"] < 1e13 for row in rows)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sharp.probe.STEP_LIMIT", {"cpu": 64})
    monkeypatch.setattr("sharp.probe.SEQS_LIMIT", {"cpu": 4})
    return tmp_path


SMALL = "import sys, sharp.probe as p; p.STEP_LIMIT, p.SEQS_LIMIT = {'cpu': 64}, {'cpu': 4}\n"


def test_the_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: in this one, buffers may get memory that earlier tests gave back."""
    words = ["probe", str(TINY), "--device", "cpu"]
    code = SMALL + "from sharp.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words, "--json", "--target-itl-ms", "10000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TINY.parent.parent, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "nothing kept" in done.stderr
    found = json.loads(done.stdout)
    assert found["from_cache"] is False
    assert found["proposal"]["max_num_batched_tokens"] == 64
    terms = {term["name"]: term for term in found["budget"]}
    if Path("/proc/self/status").exists():
        assert abs(terms["buffers"]["error"]) < 0.1
    assert terms["reserve"]["measured"] >= 0
    assert found["kv_bytes_per_token"] * 64 * found["num_blocks"] == terms["kv_pages"]["predicted"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "still true" in shown.err
    assert "max_num_batched_tokens" in shown.out
    assert "memory to memory" in shown.out
    assert "kv_pages" in shown.out


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--target-itl-ms", "0"], 2, "0"),
        (["--target-itl-ms", "nan"], 2, "nan"),
        (["--target-itl-ms", "soon"], 2, "--target-itl-ms"),
        (["--device", "tpu"], 2, "tpu"),
        (["--dtype", "int8"], 2, "int8"),
    ],
)
def test_wrong_options(words: list[str], code: int, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(TINY), *words]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert named in shown.err
    assert len(shown.err.splitlines()) == 1


def test_no_model_and_a_target_out_of_reach(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "no/such.gguf", "--device", "cpu"]) == 1
    assert main(["probe", str(TINY), "--device", "cpu", "--target-itl-ms", "1e-9"]) == 2
    assert "cannot be met: a step of one token takes" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_probe_on_a_gpu(on_gpu: bool, tmp_path: Path) -> None:
    """Free memory, peaks and copies as the driver gives them; a second call is from the cache."""
    if not on_gpu:
        pytest.skip("run with --device=cuda")
    found = get_probe(TINY, EngineConfig(device="cuda"), directory=tmp_path)
    assert 0 < found.free <= found.total
    terms = {term.name: term for term in found.memory}
    arena = terms["arena"]
    assert arena.measured is not None
    assert abs(arena.measured - arena.predicted) < 16 << 20  # one allocation, in pieces of 2 MiB
    for name in ("weights", "activations", "logits", "rope_table", "staging"):
        assert terms[name].measured == terms[name].predicted
    graphs = terms["graphs"]
    assert graphs.measured is not None
    assert 0 <= graphs.measured <= graphs.predicted
    assert terms["reserve"].measured is not None
    assert terms["reserve"].measured <= terms["reserve"].predicted
    ways = {row["way"]: row["bytes_per_s"] for row in found.copies if row["bytes"] in (1 << 26, 1 << 27)}
    assert len(ways) == 6
    assert all(1e8 < rate < 1e12 for rate in ways.values())
    assert found.propose().max_num_batched_tokens >= 1
    assert get_probe(TINY, EngineConfig(device="cuda"), directory=tmp_path).from_cache
