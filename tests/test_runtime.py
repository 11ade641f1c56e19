"""The order in which a step's work is queued: an engine over streams that run as late and in as odd an order
as events allow gives every answer as if alone. No GPU and no proof about one: see stream_model.py."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_model import FakeModel, FakeTokenizer, engine_config, expected, model_config
from stream_model import ModelDevice, ModelEvent, ModelStream, World, array_at, install

from kernels_numba.ops import apply_step as op
from kernels_numba.ops.apply_step import StepLayout
from sharp.engine import Engine
from sharp.failures import StepFailed
from sharp.plan import BatchPlan
from sharp.request import EngineDead, SamplingParams
from sharp.runtime import Runtime
from sharp.step_buffers import StepPacker
from sharp.step_times import uniform_step
from sharp.trace_events import COMPUTE, COPIES

VOCAB = model_config().vocab_size


class Streamed(FakeModel):
    """The fake model behind a Runtime: its pages, logits and ids are written when the compute stream gets
    there, from what the fixed buffers hold then."""

    overlaps = True
    graphs: bool = True

    def open(self, config):
        device = ModelDevice()
        layout = StepLayout(config.max_num_batched_tokens, config.max_num_seqs, 4096 // self.block_size)
        self.logits = device.empty((layout.max_seqs, VOCAB), np.float32)
        self.sampled = device.empty((layout.max_seqs,), np.int32)
        self.runtime = Runtime(
            self.queue_forward, SimpleNamespace(sample=self.queue_sample), device, layout, self.logits,
            self.sampled, self.copy_pages, graphs=self.graphs,
        )  # fmt: skip
        self.device, self.mixed = device, 0
        return self

    def read(self, arrays):
        """The plan that the buffers hold, at the time that they are read."""
        tokens, rows, decodes, seqs = array_at(self.runtime.buffers.counts).tolist()
        host = {
            name: array_at(getattr(arrays, name)).copy()
            for name in ("token_ids", "positions", "slot_mapping", *op.ROW_COLUMNS, "seeds")
        }
        lens = array_at(self.runtime.buffers.section("context_lens", seqs)).copy()
        cu = array_at(self.runtime.buffers.section("cu_seqlens_q", seqs + 1)).copy()
        cu[:decodes] = np.arange(decodes)
        self.mixed += 0 < decodes < seqs
        row_names = (*op.ROW_COLUMNS, "seeds")
        return BatchPlan(
            step=0, request_ids=tuple(map(str, range(seqs))), num_decodes=decodes, cu_seqlens_q=cu,
            context_lens=lens, block_table=array_at(arrays.decode_block_table)[:seqs].copy(),
            num_logprobs=np.full(rows, -1, np.int32),
            **{name: host[name][: rows if name in row_names else tokens] for name in host},
        )  # fmt: skip

    def queue_forward(self, arrays, ops, stream):
        def compute():
            plan = self.read(arrays)
            if plan.num_tokens:
                plan.check(self.block_size)
                array_at(self.logits)[: len(plan.logits_rows)] = FakeModel.forward(self, plan)

        stream.queue(compute)
        return self.logits[: arrays.num_rows]

    def queue_sample(self, out, logits, *columns, stream, num_rows):
        arrays = next(a for a in self.runtime._arrays.values() if a.temperatures is columns[0])

        def compute():
            plan = self.read(arrays)
            rows = len(plan.logits_rows)
            ids = FakeModel.sample(self, array_at(self.logits)[:rows].copy(), plan).token_ids
            array_at(self.sampled)[:rows] = ids
            assert array_at(num_rows).tolist() == [rows]
            array_at(self.sampled)[rows : arrays.num_rows] = -9  # what a rung without the count may write

        stream.queue(compute)

    def copy_pages(self, pairs):
        def move():
            for pages in (self.tokens, self.positions):
                rows = pages.reshape(-1, self.block_size)
                rows[pairs[:, 1]] = rows[pairs[:, 0]]

        self.device.compute_stream.queue(move)

    def launch(self, plan):
        launched = self.runtime.launch(plan)
        World.now.ctrl_c()
        return launched

    def land(self, launched):
        World.now.ctrl_c()
        sampled = self.runtime.land(launched)
        assert launched.gpu_s == pytest.approx(1e-3)
        return sampled


def run_engine(seed, graphs=True, count=10, interrupted=0.0):
    """Random requests through an engine with overlap, now and then interrupted; every answer as if alone.
    Returns the model."""
    rng = random.Random(seed)
    config = engine_config(
        max_num_batched_tokens=rng.choice([5, 24]), max_num_seqs=4, overlap=True, admission="optimistic"
    )
    model = Streamed(num_blocks=24, block_size=4)
    model.graphs = graphs
    model.open(config)
    if rng.random() < 0.5:
        model.runtime.capture()
        assert not graphs or len(model.runtime.graphs) == len(model.runtime.buckets.all())
    World.now.interrupted = interrupted
    engine = Engine(model, FakeTokenizer(), config)
    wanted = {}
    for _ in range(count):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 30))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 12), temperature=rng.choice([0.0, 1.0]), ignore_eos=True,
            logprobs=rng.choice([None, 2]), n=rng.choice([1, 1, 2]), seed=rng.randrange(99),
        )  # fmt: skip
        wanted[engine.add_request(prompt, params)] = (prompt, params)
    finished = {}
    while engine.has_unfinished:
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            continue
        finished |= {output.request_id: output for output in outputs if output.finished}
    assert set(finished) == set(wanted)
    for name, (prompt, params) in wanted.items():
        first = finished[name].outputs[0]
        assert list(first.token_ids) == expected(prompt, params, params.seed), name
        for entry, token in zip(first.logprobs or (), first.token_ids, strict=params.logprobs is not None):
            assert token in entry
    for row in (COMPUTE, COPIES):  # each step that landed, when it was there
        assert [span.step for span in engine.trace.spans(row)] == [r.step for r in engine.stats.history]
    engine.close()
    return model


def apply(state, packed, sampled, layout):
    op.apply_step_reference(state, packed, sampled, layout)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.filterwarnings("ignore:.*logprobs.*:RuntimeWarning")
def test_every_answer_as_if_alone_in_any_order_that_events_allow(monkeypatch, graphs):
    mixed = 0
    for seed in range(10):
        install(monkeypatch, seed, apply)
        mixed += run_engine(seed, graphs).mixed
    assert mixed > 20


@pytest.mark.filterwarnings("ignore:.*logprobs.*:RuntimeWarning")
def test_interrupted_steps_leave_no_trace(monkeypatch):
    """Ctrl-C anywhere in a launch, behind it and before a landing: steps that are forgotten still run."""
    interruptions = 0
    for seed in range(10):
        install(monkeypatch, seed, apply)
        run_engine(seed, seed % 2 == 0, interrupted=0.02)
        interruptions += World.now.interruptions
    assert interruptions > 50


def no_wait(of):
    """A stream that does not wait for the other one's events."""

    def mutate(monkeypatch):
        wait = ModelStream.wait
        monkeypatch.setattr(
            ModelStream, "wait", lambda self, event: None if self.role == of else wait(self, event)
        )

    return mutate


def early_landing(monkeypatch):
    monkeypatch.setattr(ModelEvent, "synchronize", lambda self: None)
    monkeypatch.setattr(ModelEvent, "elapsed_ms", lambda self, end: 1.0)


def no_word_of_a_lost_step(monkeypatch):
    """Whatever was packed is taken to have arrived."""
    pack = StepPacker.pack

    def trusting(self, plan, bucket, out):
        if self._packed is not None:
            self.launched()
        return pack(self, plan, bucket, out)

    monkeypatch.setattr(StepPacker, "pack", trusting)


@pytest.mark.parametrize(
    "mutate",
    [no_wait("compute"), early_landing, no_word_of_a_lost_step],
    ids=["words not waited for", "ids not waited for", "changes lost"],
)
@pytest.mark.filterwarnings("ignore:.*logprobs.*:RuntimeWarning")
def test_a_missing_hand_over_shows(monkeypatch, mutate):
    mutate(monkeypatch)
    failures = 0
    for seed in range(30):
        with monkeypatch.context() as patch:
            install(patch, seed, apply)
            try:
                run_engine(seed, seed % 2 == 0, interrupted=0.02)
            except (AssertionError, IndexError, EngineDead, ValueError, StepFailed):
                failures += 1
    assert failures > 0


@pytest.mark.parametrize("mutant", [False, True])
def test_words_wait_for_those_before_them_to_be_read(monkeypatch, mutant):
    """Four steps launched before the compute stream moves: none overwrites another's words."""
    if mutant:
        no_wait("copy")(monkeypatch)
    world = install(monkeypatch, 0, apply)
    world.favoured = "copy"
    model = Streamed(num_blocks=24, block_size=4).open(engine_config(max_num_seqs=4))
    model.runtime.capture()
    world.frozen = True
    plans = []
    for number in range(4):
        plan = uniform_step(1, 7, 0, 4, VOCAB, step=number)
        shift = 2 * number  # pages
        plan = replace(plan, block_table=plan.block_table + shift, slot_mapping=plan.slot_mapping + 4 * shift)
        plans.append(plan)
        model.runtime.launch(plan)
    model.device.compute_stream.synchronize()
    written = [(model.tokens[plan.slot_mapping] == plan.token_ids).all() for plan in plans]
    assert all(written) != mutant


def test_rungs_without_a_count_are_captured_behind_their_first_step(monkeypatch):
    install(monkeypatch, 0, apply)
    model = Streamed(num_blocks=24, block_size=4)
    model.queue_sample = lambda *args, stream, inner=model.queue_sample: inner(
        *args, stream=stream, num_rows=model.runtime.buffers.num_rows
    )
    model.open(engine_config(max_num_seqs=4))
    model.runtime.capture()
    assert len(model.runtime.graphs) == 0
    for _ in range(2):
        model.land(model.launch(uniform_step(1, 7, 0, 4, VOCAB)))
        assert [str(bucket) for bucket in model.runtime.graphs._graphs] == ["mixed 16"]


def test_a_plan_that_is_too_large_is_named(monkeypatch):
    install(monkeypatch, 0, apply)
    model = Streamed(num_blocks=24, block_size=4).open(engine_config(max_num_seqs=4))
    with pytest.raises(ValueError, match=r"33 tokens .* over the 32 tokens and 4 sequences"):
        model.launch(uniform_step(1, 33, 0, 4, VOCAB))
