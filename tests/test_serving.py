"""Requests that arrive over time: their definitions by hand, the peers' requests to the byte, the command."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import engine_config
from test_load import Sleeping

from sharp import bench, bench_model, bench_serve, results
from sharp.bench_model import Opened, gate_places, known_ids
from sharp.plan import BatchPlan, SampleOutput
from sharp.predictor import StepWork
from sharp.serving import Served, metrics, parse_limits, table, unit_of
from sharp.workloads import documents, online, poisson

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"


def test_metrics_by_hand() -> None:
    """Three requests: two of them 4 and 2 tokens, one of a single token, in 2 seconds."""
    served = [Served(10, [0.1, 0.2, 0.3, 0.7]), Served(20, [0.5, 0.6]), Served(5, [0.05])]
    found = metrics(served, 2.0, {"ttft": 200.0, "itl": 300.0})
    assert found["request_throughput"] == 1.5
    assert found["output_throughput"] == 3.5
    assert found["total_token_throughput"] == (7 + 35) / 2
    assert found["request_goodput"] == 0.5  # the first has a gap of 400 ms, the second waits too long
    assert found["mean_ttft_ms"] == pytest.approx(1e3 * 0.65 / 3)
    assert found["median_ttft_ms"] == pytest.approx(100)
    assert found["mean_tpot_ms"] == pytest.approx((200 + 100) / 2)  # without the one of a single token
    assert found["mean_itl_ms"] == pytest.approx((100 + 100 + 400 + 100) / 4)  # a gap counts, not a request
    assert found["p99_itl_ms"] == pytest.approx(np.percentile([100, 100, 400, 100], 99))
    assert found["mean_e2el_ms"] == pytest.approx((700 + 600 + 50) / 3)
    assert found["median_e2el_ms"] == pytest.approx(600)
    assert "request_goodput" not in metrics(served, 2.0)
    for limits, good in (({"tpot": 150.0}, 2), ({"e2el": 650.0}, 2), ({"itl": 1e3, "ttft": 60.0}, 1)):
        assert metrics(served, 1.0, limits)["request_goodput"] == good
    assert metrics([Served(5, [0.05])], 1.0)["p99_itl_ms"] == 0
    assert "mean 216.67, median 100.00" in table(found)
    for seconds, some in ((0.0, served), (math.nan, served), (1.0, [])):
        with pytest.raises(ValueError, match="at least 1 in over 0 s"):
            metrics(some, seconds)


def test_limits_are_read_and_refused() -> None:
    assert parse_limits(["ttft:500", "itl:50"]) == {"ttft": 500.0, "itl": 50.0}
    assert parse_limits([]) == {}
    for words, message in (
        (["ttl:5"], "'ttl:5'; NAME:MILLISECONDS is required, NAME one of ttft, tpot, itl, e2el"),
        (["ttft"], "'ttft'; NAME:MILLISECONDS"),
        (["ttft:x"], "'x' is no number of milliseconds"),
        (["ttft:0"], "over 0 ms"),
        (["ttft:inf"], "over 0 ms and finite"),
        (["ttft:nan"], "over 0 ms"),
        (["ttft:5", "ttft:6"], "gives ttft twice: 5 and 6"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_limits(words)


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson(4000, 20.0, seed=3)
    gaps = np.diff([0.0, *times])
    assert times[-1] == pytest.approx(200.0)
    assert gaps.min() > 0
    assert gaps.std() == pytest.approx(1 / 20, rel=0.08)  # of an exponential gap: its mean
    counts = np.histogram(times, bins=200, range=(0, 200))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.35)
    assert poisson(4000, 20.0, seed=3) == times != poisson(4000, 20.0, seed=4)
    assert poisson(3, math.inf, seed=0) == [0.0] * 3
    assert poisson(0, 5.0, seed=0) == []
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="over 0 requests/s"):
            poisson(3, bad, seed=0)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_the_peers_requests_to_the_byte() -> None:
    """Counts as they were published with the peers' figures, and a hash of all ids, for two seeds each."""
    requests, docs = online(), documents()
    assert sum(len(ids) for ids, _ in requests) == 134_456
    assert sum(new for _, new in requests) == 41_742
    lengths = sorted(map(len, docs))
    assert (sum(lengths), lengths[256], lengths[-1]) == (95_353, 111, 1_953)
    assert (digest(requests), digest(online(seed=12))) == ("130821aba3d0f4f4", "bdedd2846f711401")
    assert (digest(docs), digest(documents(seed=14))) == ("33e7976ae121ea7e", "13f022c5f5b3c09a")


class Other(Sleeping):
    """Answers a request otherwise when it is not alone in its step: a batch that is no contract."""

    def sample(self, logits: Any, plan: BatchPlan) -> SampleOutput:
        ids = super().sample(logits, plan).token_ids
        return SampleOutput(ids + (plan.num_seqs > 1), (None,) * len(ids))


def opened(model: Any) -> Opened:
    config = engine_config(block_size=64, max_num_batched_tokens=2048, max_num_seqs=64, max_queue_len=600)
    return Opened("toy", model, config, "CPU Test", None, "0123abc", lambda text: None)


def fast(work: StepWork) -> float:
    return 1e-4


def test_rows_of_a_run() -> None:
    model = Sleeping(fast)
    rows, refused = bench_serve.serve(opened(model), [200.0, math.inf], 20, {"ttft": 9e5}, seed=1)
    assert refused == 0
    assert len(rows) == 2 * 16 == len({row["case"] for row in rows})
    assert all(set(row) == set(results.FIELDS) and row["err"] == 0 for row in rows)
    by_case = {row["case"]: row for row in rows}
    goodput = by_case["toy inf/s request_goodput ttft:900000"]
    assert goodput["value"] == by_case["toy inf/s request_throughput"]["value"] > 0
    assert goodput["unit"] == unit_of("request_goodput") == "request/s"
    assert by_case["toy 200/s p99_ttft_ms"]["unit"] == "ms"
    assert by_case["toy 200/s output_throughput"]["unit"] == "token/s"
    assert by_case["toy 200/s mean_e2el_ms"]["us"] == pytest.approx(
        1e3 * by_case["toy 200/s mean_e2el_ms"]["value"], rel=1e-3
    )
    assert all(results.format_row(row) for row in rows)


def test_wrong_answers_make_no_row() -> None:
    said: list[str] = []
    one = opened(Other(fast))
    object.__setattr__(one, "say", said.append)
    rows, refused = bench_serve.serve(one, [math.inf], 20, {}, seed=1)
    assert (rows, refused) == ([], 1)
    assert any("has another answer than alone" in text for text in said)
    full = opened(Sleeping(fast))
    object.__setattr__(full, "config", engine_config(block_size=64, max_num_batched_tokens=64, max_num_seqs=1,
                                                     max_queue_len=2))  # fmt: skip
    prompts, new = [[5] * 9] * 6, [3] * 6
    problems = full.wrong(prompts, new, full.run(prompts, new, [0.0] * 6))
    assert "requests were refused" in problems[0]
    assert "answers have another length than asked for" in problems[1]


def test_the_gate_looks_from_end_to_end() -> None:
    assert gate_places(256) == [0, 85, 170, 255]
    assert gate_places(1) == [0]
    assert gate_places(3) == [0, 1, 2]
    assert known_ids([[1, 299, 300, 40_000]], 300) == [[1, 299, 0, 100]]


def test_a_gpus_share_is_that_of_the_measured_run() -> None:
    one = opened(Sleeping(fast))
    prompts, new = [[5] * 9] * 4, [3] * 4
    load = one.run(prompts, new, [0.0] * 4)
    assert one.gpu_busy() is None
    [(trace, _)] = one.seen
    for step in range(10):
        trace.add_stream(bench_model.COMPUTE, "graph", step * 1.0, step + 0.9, step)
    assert one.wrong(prompts, new, load) == []
    assert one.seen[0].trace is trace  # not that of a request alone
    assert one.gpu_busy() == pytest.approx(9 / 9.9)
    assert one.gpu_busy(1) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model on the host: rows in a file that an import takes, the trace beside it."""
    out, trace = tmp_path / "rows.json", tmp_path / "trace.json"
    commit = results_commit()
    words = ["serve", "--model", str(TINY), "--device", "cpu", "--num-prompts", "3", "--request-rate", "50"]
    bench.main([*words, "--commit", commit, "--out", str(out), "--trace-out", str(trace)])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])
    assert json.loads(out.read_text()) == rows
    assert rows[0]["case"] == "tiny 50/s request_throughput"
    results.check_rows(rows)
    assert any(event["name"] == "commit" for event in json.loads(trace.read_text())["traceEvents"])


def test_no_load_is_too_large_for_the_queue() -> None:
    one = bench_model.open_model(str(TINY), "cpu", "float32", "0123abc", {}, lambda text: None)
    assert one.config.max_queue_len > bench_serve.MAX_PROMPTS
    assert not one.config.prefix_caching
    assert one.name == "tiny"
    one.model.close()


def results_commit() -> str:
    import subprocess

    found = subprocess.run(
        ["git", "-C", str(results.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--request-rate", "0"], "--request-rate is 0; it must be over 0"),
        (["--request-rate", "nan"], "--request-rate is nan"),
        (["--request-rate", "4", "4"], "names a rate twice"),
        (["--num-prompts", "0"], "--num-prompts is 0; from 1 to 100000"),
        (["--seed", "-1"], "--seed is -1"),
        (["--goodput", "ttft:-5"], "--goodput is 'ttft:-5'"),
        (["--out", "/no/such/folder/rows.json"], "there is no folder /no/such/folder"),
        (["--trace-out", "/no/such/folder/t.json"], "--trace-out is /no/such/folder/t.json"),
        (["--model", "random:gpt-9"], "a random model's shape must be one of"),
        (["--max-model-len", "99"], "the longest of the 256 requests is 1244 tokens with its answer"),
        (["--out", "/"], "--out is /, a folder; the name of a file is required"),
        (["--trace-out", "/dev/null"], "--trace-out is /dev/null, not a regular file"),
        (["--max-num-seqs", "0"], "max_num_seqs must be at least 1, not 0"),
        (["--commit", "HEAD"], "--commit is 'HEAD'"),
    ],
)
def test_wrong_words_are_told_before_anything_is_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--commit" in words else ["--commit", "0123abc"]
    with pytest.raises(SystemExit) as caught:
        bench.main(["serve", "--device", "cpu", "--model", str(TINY), *given, *words])
    assert caught.value.code == 1
    assert message in capsys.readouterr().out
