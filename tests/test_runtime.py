"""The order in which a step's work is queued: an engine over streams that run as late and in as odd an order
as events allow gives every answer as if alone. No GPU and no proof about one: see stream_model.py."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from fake_model import EOS, FakeModel, FakeTokenizer, engine_config, expected, model_config
from stream_model import ModelDevice, ModelEvent, ModelStream, array_at, install

from kernels_numba.ops import apply_step as op
from kernels_numba.ops.apply_step import StepLayout
from sharp import driver, memory, runtime
from sharp.engine import Engine
from sharp.plan import BatchPlan
from sharp.request import SamplingParams
from sharp.runtime import Runtime

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

    def queue_sample(self, out, logits, *columns, stream):
        arrays = next(a for a in self.runtime._arrays.values() if a.temperatures is columns[0])

        def compute():
            plan = self.read(arrays)
            rows = len(plan.logits_rows)
            ids = FakeModel.sample(self, array_at(self.logits)[:rows].copy(), plan).token_ids
            array_at(self.sampled)[:rows] = ids
            array_at(self.sampled)[rows : arrays.num_rows] = -9  # as a rung without the count writes there

        stream.queue(compute)

    def copy_pages(self, pairs):
        def move():
            for pages in (self.tokens, self.positions):
                rows = pages.reshape(-1, self.block_size)
                rows[pairs[:, 1]] = rows[pairs[:, 0]]

        self.device.compute_stream.queue(move)

    def launch(self, plan: BatchPlan):
        return self.runtime.launch(plan)

    def land(self, launched):
        sampled = self.runtime.land(launched)
        assert launched.gpu_s == pytest.approx(1e-3)
        return sampled


def run_engine(seed, graphs=True, count=12, **options):
    """Random requests through an engine with overlap; every answer as if alone. Returns the model."""
    rng = random.Random(seed)
    config = engine_config(
        max_num_batched_tokens=rng.choice([5, 24]), max_num_seqs=4, overlap=True, admission="optimistic",
        **options,
    )  # fmt: skip
    model = Streamed(num_blocks=24, block_size=4)
    model.graphs = graphs
    model.open(config)
    if rng.random() < 0.5:
        model.runtime.capture()
        assert not graphs or len(model.runtime.graphs) == len(model.runtime.buckets.all())
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
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    assert set(finished) == set(wanted)
    for name, (prompt, params) in wanted.items():
        first = finished[name].outputs[0]
        assert first.token_ids == expected(prompt, params, params.seed), name
        for entry, token in zip(first.logprobs or (), first.token_ids, strict=params.logprobs is not None):
            assert token in entry
    engine.close()
    return model


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.filterwarnings("ignore:.*logprobs.*:RuntimeWarning")
def test_every_answer_as_if_alone_in_any_order_that_events_allow(monkeypatch, graphs):
    mixed = 0
    for seed in range(12):
        install(monkeypatch, seed, apply)
        mixed += run_engine(seed, graphs).mixed
    assert mixed > 20


def apply(state, packed, sampled, layout):
    op.apply_step_reference(state, packed, sampled, layout)


def no_wait_for_the_words(monkeypatch):
    waits = ModelStream.wait
    monkeypatch.setattr(
        ModelStream, "wait",
        lambda self, event: None if self is compute_of(self) else waits(self, event),
    )  # fmt: skip


def compute_of(stream):
    return stream if getattr(stream, "is_compute", False) else None


def no_wait_for_the_slot(monkeypatch):
    """The words of the step after the next go over those that are still to be applied."""
    wait = ModelStream.wait
    monkeypatch.setattr(
        ModelStream, "wait", lambda self, event: None if event in slots(self) else wait(self, event)
    )


MUTANTS = {}
