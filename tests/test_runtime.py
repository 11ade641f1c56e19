"""The order in which a step's work is queued: engines over streams that run as late and in as odd an order as
events allow (host_driver.py) give every answer as if alone. No GPU, and no proof about one."""

from __future__ import annotations

import ast
import random
import warnings
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import host_driver
import numpy as np
import pytest
from engine_checks import TINY
from fake_model import FakeModel, FakeTokenizer, engine_config, expected, model_config

from kernels_numba.ops import apply_step as op
from kernels_numba.ops import resolve
from kernels_numba.ops.apply_step import StepLayout
from sharp import driver, graphs
from sharp.config import EngineConfig
from sharp.cuda_device import CudaDevice
from sharp.device import open_device
from sharp.engine import Engine
from sharp.failures import StepFailed
from sharp.graphs import Graph, keeping
from sharp.model import Model
from sharp.plan import BatchPlan
from sharp.request import EngineDead, SamplingParams
from sharp.runtime import Runtime, device_bytes
from sharp.step_buffers import StepPacker
from sharp.step_times import uniform_step
from sharp.trace_events import COMPUTE, COPIES
from sharp.weights import open_checkpoint

pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:.*logprobs.*:RuntimeWarning")
VOCAB = model_config().vocab_size
ROOT = Path(__file__).resolve().parent.parent


class Streamed(FakeModel):
    """The fake model behind a Runtime: its pages, logits and ids are written when the compute stream gets
    there, from what the fixed buffers hold then."""

    overlaps = True

    def open(self, host, config, graphs=True, decodes="ride"):
        layout = StepLayout(config.max_num_batched_tokens, config.max_num_seqs, 4096 // self.block_size)
        self.host, self.device, self.mixed, self.apart = host, CudaDevice("bfloat16"), 0, 0
        self.logits = self.device.empty((layout.max_seqs, VOCAB), np.float32)
        self.sampled = self.device.empty((layout.max_seqs,), np.int32)
        self.runtime = Runtime(
            self.queue_forward, SimpleNamespace(sample=self.queue_sample), self.device, layout, self.logits,
            self.sampled, self.copy_pages, graphs=graphs, decodes=decodes,
        )  # fmt: skip
        return self

    def read(self, arrays):
        """The plan that the buffers hold, at the time that they are read."""
        view, buffers = self.host.view, self.runtime.buffers
        tokens, rows, apart, seqs = view(buffers.counts).tolist()
        row_names = (*op.ROW_COLUMNS, "seeds")
        columns = {
            name: view(getattr(arrays, name))[: rows if name in row_names else tokens].copy()
            for name in (*op.TOKEN_COLUMNS, *row_names)
        }
        cu = view(buffers.section("cu_seqlens_q", seqs + 1)).copy()
        assert (cu[:apart] == apart).all(), "a decode is launched for twice"
        cu[:apart] = np.arange(apart)
        decodes = int((np.diff(cu) == 1).sum())
        alone = view(arrays.decode_context_lens)
        assert np.count_nonzero(alone) == apart == (decodes if len(alone) else 0), "a decode is left out"
        self.mixed += 0 < decodes < seqs
        self.apart += 0 < apart < seqs
        table = arrays.prefill_block_table if arrays.num_prefills else arrays.decode_block_table
        return BatchPlan(
            step=0,
            request_ids=tuple(map(str, range(seqs))),
            num_decodes=decodes,
            cu_seqlens_q=cu,
            context_lens=view(buffers.section("context_lens", seqs)).copy(),
            block_table=view(table)[:seqs].copy(),
            num_logprobs=np.full(rows, -1, np.int32),
            **columns,
        )

    def queue_forward(self, arrays, ops, stream):
        def compute():
            plan = self.read(arrays)
            if plan.num_tokens:
                plan.check(self.block_size)
                self.host.view(self.logits)[: len(plan.logits_rows)] = FakeModel.forward(self, plan)

        self.host.queue(stream, compute)
        return self.logits[: arrays.num_rows]

    def queue_sample(self, out, logits, *columns, stream, num_rows):
        arrays = next(a for a in self.runtime._arrays.values() if a.temperatures is columns[0])

        def compute():
            plan, view = self.read(arrays), self.host.view
            rows = len(plan.logits_rows)
            assert view(num_rows).tolist() == [rows]
            ids = FakeModel.sample(self, view(self.logits)[:rows].copy(), plan).token_ids
            view(self.sampled)[:rows] = ids
            view(self.sampled)[rows : arrays.num_rows] = -9  # what a rung without the count may write

        self.host.queue(stream, compute)

    def copy_pages(self, pairs):
        def move():
            for pages in (self.tokens, self.positions):
                rows = pages.reshape(-1, self.block_size)
                rows[pairs[:, 1]] = rows[pairs[:, 0]]

        if len(pairs):
            self.host.queue(self.device.stream, move)

    def launch(self, plan):
        launched = self.runtime.launch(plan)
        self.host.ctrl_c()
        return launched

    def land(self, launched):
        self.host.ctrl_c()
        sampled = self.runtime.land(launched)
        assert launched.gpu_s == pytest.approx(1e-3)
        return sampled

    def close(self):
        super().close()
        self.runtime.close()
        self.device.close()


def some_requests(rng, count):
    """Prompts and parameters of all kinds."""
    for _ in range(count):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 30))]
        yield prompt, SamplingParams(
            max_tokens=rng.randint(1, 12), temperature=rng.choice([0.0, 1.0]), ignore_eos=True,
            logprobs=rng.choice([None, 2]), n=rng.choice([1, 1, 2]), seed=rng.randrange(99),
        )  # fmt: skip


def run(engine, requests):
    """Answers of all requests by id, whatever comes between."""
    for prompt, params in requests:
        engine.add_request(prompt, params)
    finished = {}
    while engine.has_unfinished:
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            continue
        finished |= {output.request_id: output for output in outputs if output.finished}
    return finished


def run_engine(host, seed, graphs=True, interrupted=0.0):
    """Random requests through an engine with overlap, now and then interrupted; every answer as if alone.
    Returns the model."""
    rng = random.Random(seed)
    config = engine_config(
        max_num_batched_tokens=rng.choice([5, 24]), max_num_seqs=4, overlap=True, admission="optimistic"
    )
    decodes = rng.choice(["ride", "apart"])
    model = Streamed(num_blocks=24, block_size=4).open(host, config, graphs, decodes)
    if rng.random() < 0.5:
        model.runtime.capture()
        assert not graphs or len(model.runtime.graphs) == len(model.runtime.buckets.all())
    host.interrupted = interrupted
    engine, requests = Engine(model, FakeTokenizer(), config), list(some_requests(rng, 10))
    finished = run(engine, requests)
    host.interrupted = 0.0
    assert len(finished) == len(requests)
    for output, (prompt, params) in zip(
        (finished[f"request-{i}"] for i in range(len(requests))), requests, strict=True
    ):
        first = output.outputs[0]
        assert list(first.token_ids) == expected(prompt, params, params.seed), output.request_id
        for entry, token in zip(first.logprobs or (), first.token_ids, strict=params.logprobs is not None):
            assert token in entry
    for row in (COMPUTE, COPIES):  # each step that landed, when it was there
        assert [span.step for span in engine.trace.spans(row)] == [r.step for r in engine.stats.history]
    engine.close()
    return model


@pytest.mark.parametrize("graphs", [True, False])
def test_every_answer_as_if_alone_in_any_order_that_events_allow(monkeypatch, graphs):
    mixed = apart = replays = 0
    for seed in range(10):
        host = host_driver.install(monkeypatch, seed)
        model = run_engine(host, seed, graphs)
        mixed, apart = mixed + model.mixed, apart + model.apart
        replays += host.replays
        assert all(graph is None for graph in host.graphs.values())
        assert all(executable is None for executable in host.executables.values())
    assert mixed > apart + 10
    assert apart > 10
    assert (replays > 200) == graphs


@pytest.mark.parametrize("at_start", [True, False])
def test_a_capture_that_fails_costs_no_answer(monkeypatch, at_start):
    """From there on steps are launched one by one, and it is said once."""
    host = host_driver.install(monkeypatch, 3)
    config = engine_config(max_num_batched_tokens=24, max_num_seqs=4, overlap=True)
    model = Streamed(num_blocks=64, block_size=4).open(host, config)
    monkeypatch.setattr(
        host, "cuGraphInstantiate", lambda graph, flags: (host.CUresult.CUDA_ERROR_NOT_PERMITTED,)
    )
    requests = list(some_requests(random.Random(3), 8))
    engine = Engine(model, FakeTokenizer(), config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if at_start:
            model.runtime.capture()
            assert model.runtime.graphs is None
        finished = run(engine, requests)
    assert any("NOT_PERMITTED" in str(one.message) for one in said)
    assert len([one for one in said if "no graphs" in str(one.message)]) == 1
    for number, (prompt, params) in enumerate(requests):
        answer = finished[f"request-{number}"].outputs[0]
        assert list(answer.token_ids) == expected(prompt, params, params.seed)
    engine.close()


def test_interrupted_steps_leave_no_trace(monkeypatch):
    """Ctrl-C anywhere in a launch, behind it and before a landing: steps that are forgotten still run."""
    interruptions = 0
    for seed in range(10):
        host = host_driver.install(monkeypatch, seed)
        run_engine(host, seed, seed % 2 == 0, interrupted=0.02)
        interruptions += host.interruptions
    assert interruptions > 50


def no_wait_for_the_words(monkeypatch):
    monkeypatch.setattr(driver.Stream, "wait", lambda self, event: None)


def early_landing(monkeypatch):
    monkeypatch.setattr(driver.Event, "synchronize", lambda self: None)
    monkeypatch.setattr(driver.Event, "elapsed_ms", lambda self, end: 1.0)


def no_word_of_a_lost_step(monkeypatch):
    """Whatever was packed is taken to have arrived."""
    pack = StepPacker.pack

    def trusting(self, plan, bucket, out):
        if self._packed is not None:
            self.launched()
        return pack(self, plan, bucket, out)

    monkeypatch.setattr(StepPacker, "pack", trusting)


@pytest.mark.parametrize("mutate", [no_wait_for_the_words, early_landing, no_word_of_a_lost_step])
def test_a_missing_hand_over_shows(monkeypatch, mutate):
    mutate(monkeypatch)
    failures = 0
    for seed in range(30):
        with monkeypatch.context() as patch:
            host = host_driver.install(patch, seed)
            try:
                run_engine(host, seed, seed % 2 == 0, interrupted=0.02)
            except (AssertionError, IndexError, EngineDead, ValueError, StepFailed):
                failures += 1
    assert failures > 0


@pytest.mark.parametrize("mutant", [False, True])
def test_words_wait_for_those_before_them_to_be_read(monkeypatch, mutant):
    """Four steps launched before the compute stream moves: none overwrites another's words."""
    host = host_driver.install(monkeypatch, 0)
    model = Streamed(num_blocks=24, block_size=4).open(host, engine_config(max_num_seqs=4))
    model.runtime.capture()
    if mutant:
        monkeypatch.setattr(model.device.copy_stream, "wait", lambda event: None)
    host.held.add(model.device.compute_stream.handle)
    plans, launched = [], []
    for number in range(4):
        plan = uniform_step(1, 7, 0, 4, VOCAB, step=number)
        shift = 2 * number  # pages
        plan = replace(plan, block_table=plan.block_table + shift, slot_mapping=plan.slot_mapping + 4 * shift)
        plans.append(plan)
        launched.append(model.runtime.launch(plan))  # dropped, its pinned memory would be waited for
        while host._happen(1):  # the copies get on as far as they may
            pass
    model.device.compute_stream.synchronize()
    written = [(model.tokens[plan.slot_mapping] == plan.token_ids).all() for plan in plans]
    assert all(written) != mutant
    model.close()


def test_rungs_without_a_count_are_captured_behind_their_first_step(monkeypatch):
    """For them, steps without tokens would take as long as full ones."""
    host = host_driver.install(monkeypatch, 0)
    model = Streamed(num_blocks=24, block_size=4)
    model.queue_sample = lambda *args, stream, inner=model.queue_sample: inner(
        *args, stream=stream, num_rows=model.runtime.buffers.num_rows
    )
    model.open(host, engine_config(max_num_seqs=4))
    model.runtime.capture()
    assert len(model.runtime.graphs) == 0
    for _ in range(2):
        model.land(model.launch(uniform_step(1, 7, 0, 4, VOCAB)))
        assert [str(bucket) for bucket in model.runtime.graphs._graphs] == ["mixed 16"]
    assert host.replays == 1
    model.close()


def test_counts_are_copied_before_single_launches_only(monkeypatch):
    """Between apply_step and launches that may begin before it has ended; a graph begins behind it."""
    host = host_driver.install(monkeypatch, 0)
    model = Streamed(num_blocks=24, block_size=4).open(host, engine_config(max_num_seqs=4))
    copies, copy = [], host.cuMemcpyDtoDAsync
    host.cuMemcpyDtoDAsync = lambda target, source, size, stream: (
        copies.append(target) or copy(target, source, size, stream)
    )
    plan = uniform_step(1, 7, 0, 4, VOCAB)
    model.land(model.launch(plan))  # launches, and is captured behind them
    assert copies == [model.runtime.buffers.counts.address]
    model.land(model.launch(plan))
    assert len(copies) == 1
    assert host.replays == 1
    model.runtime.graphs.close()
    model.runtime.graphs = None
    model.land(model.launch(plan))
    assert len(copies) == 2
    model.close()


def test_a_plan_that_is_too_large_is_named(monkeypatch):
    host = host_driver.install(monkeypatch, 0)
    model = Streamed(num_blocks=24, block_size=4).open(host, engine_config(max_num_seqs=4))
    with pytest.raises(ValueError, match=r"33 tokens .* over the 32 tokens and 4 sequences"):
        model.launch(uniform_step(1, 33, 0, 4, VOCAB))
    model.close()


def test_the_option_is_true_or_false():
    with pytest.raises(TypeError, match="graphs must be True or False, not 1"):
        EngineConfig(graphs=1)


# A whole model -------------------------------------------------------------------------------------


def open_tiny(host, monkeypatch, **options):
    """(model, config): the tiny model over the driver's model, its ops the reference's, queued."""
    monkeypatch.setattr("sharp.budget.CUDA_RESERVE", 1 << 20)
    ops = host_driver.deferred(host, resolve("reference", {}))
    monkeypatch.setattr("sharp.model.resolve", lambda default, forced: ops)
    config = EngineConfig(device="cuda", dtype="float32", **options)
    return Model(open_checkpoint(TINY), config, CudaDevice("float32")), config


@pytest.mark.parametrize("decodes", ["ride", "apart"])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_model_answers_as_the_reference(monkeypatch, graphs, decodes):
    """Through plan, words, buckets, graphs and ids that only the device knows: the ids of a host engine;
    decodes ride with chunks or have launches of their own."""
    options = {"num_blocks": 16, "max_num_batched_tokens": 40, "max_num_seqs": 4}
    rng = random.Random(5)
    requests = [([1 + t % 250 for t in prompt], params) for prompt, params in some_requests(rng, 8)]
    usual = Model(
        open_checkpoint(TINY), EngineConfig(dtype="float32", **options), open_device("cpu", "float32")
    )
    wanted = run(Engine(usual, usual.tokenizer, EngineConfig(**options)), requests)
    for seed in range(4):
        with monkeypatch.context() as patch:
            host = host_driver.install(patch, seed)
            patch.setattr("sharp.model.where_decodes", lambda *where: decodes)
            model, config = open_tiny(host, patch, graphs=graphs, **options)
            assert model.overlaps
            assert model.runtime.buckets.decodes == decodes
            engine = Engine(model, model.tokenizer, config)
            found = run(engine, requests)
            assert (host.replays > 10) == graphs
            for name, output in wanted.items():
                for ours, theirs in zip(found[name].outputs, output.outputs, strict=True):
                    assert ours.token_ids == theirs.token_ids, name
                    for a, b in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
                        assert a == pytest.approx(b, abs=1e-4)
            engine.close()
            assert host.used() == 0


def test_what_the_buffers_take_is_in_the_budget(monkeypatch):
    host = host_driver.install(monkeypatch, 0)
    model, _ = open_tiny(host, monkeypatch, num_blocks=8, max_num_batched_tokens=40, max_num_seqs=4)
    layout = model.runtime.layout
    assert (layout.max_tokens, layout.max_seqs) == (40, 4)
    assert model.arena.left == 0
    assert model.arena.terms["staging"] == model.budget.staging >= device_bytes(layout)
    assert model.budget.graphs > 0
    assert model.budget.arena == model.arena.num_bytes
    model.close()


# Graphs --------------------------------------------------------------------------------------------


def test_a_capture_that_fails_leaves_the_stream_usable(monkeypatch):
    host = host_driver.install(monkeypatch, 0)
    stream = driver.Stream()

    def broken(on):
        host.queue(on, print)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Graph(broken, stream, "a broken step")
    assert not host.captures
    assert list(host.graphs.values()) == [None]
    done = []
    graph = Graph(lambda on: host.queue(on, lambda: done.append(1)), stream, "a step")
    assert graph.num_nodes == 1
    for _ in range(2):
        graph.replay(stream)
    stream.synchronize()
    assert done == [1, 1]
    graph.destroy()
    assert all(executable is None for executable in host.executables.values())


def test_memory_cannot_be_had_while_a_graph_is_captured(monkeypatch):
    host_driver.install(monkeypatch, 0)
    stream, device = driver.Stream(), CudaDevice("float32")
    with pytest.raises(driver.CudaError, match="CAPTURE_UNSUPPORTED"):
        Graph(lambda on: device.empty((4,)), stream, "a step that allocates")
    device.close()


def remembered():
    return [(import_module(path), name) for path, names in graphs.REMEMBERED.items() for name in names]


def test_what_launches_read_lives_as_long_as_the_graph(monkeypatch):
    """Also where an op remembers only its latest launches."""
    for module, name in remembered():
        monkeypatch.setattr(module, name, lambda *args, of=(module, name): (of, args))
    before, kept = [getattr(module, name) for module, name in remembered()], []
    with suppress(ZeroDivisionError), keeping(kept):
        for module, name in remembered():
            assert getattr(module, name)(1, 2) == ((module, name), (1, 2))
        raise ZeroDivisionError
    assert kept == [(of, (1, 2)) for of in remembered()]
    assert [getattr(module, name) for module, name in remembered()] == before


def test_whatever_ops_allocate_by_themselves_is_kept():
    """A function of an op that takes device memory is one that graphs.py knows, or a workspace's maker, whose
    caller keeps it, or a count for callers without num_rows: hopper's, who capture nothing, and the heads',
    which `prepared` there returns, and that is known; or a debug launch's, which is waited for."""
    known = {(module.__name__, name) for module, name in remembered()}
    known |= {("kernels_numba.ops.gemm.hopper", "_count"), ("kernels_numba.ops.warp.lm_head", "_many")}
    known.add(("kernels_numba.ops.prefill_attention.clocks", "attend_clocked"))
    unknown = []
    for path in sorted((ROOT / "kernels_numba" / "ops").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            calls = {
                n.func.attr for n in ast.walk(function) if isinstance(n, ast.Call) and hasattr(n.func, "attr")
            }
            if calls & {"to_device", "device_array"} and function.name != "of":
                if (module, function.name) not in known:
                    unknown.append((module, function.name))
    assert unknown == []
