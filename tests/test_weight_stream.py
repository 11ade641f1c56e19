"""Streaming of weights on the host: every byte once, the same bits as whole reads, errors that end all
threads; and a device whose arena is host memory, over which the whole engine runs. What a GPU does with it
is in test_memory_gpu.py."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from engine_checks import TINY, decode, load
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from model_files import change_tensors, copy_tiny, write_gguf
from test_weights import MemorySource

from sharp.config import EngineConfig
from sharp.device import HostDevice
from sharp.engine import Engine
from sharp.layout import GATE_UP_BLOCK, Recipe, pieces, recipes
from sharp.memory import Arena, ArenaFull
from sharp.model import Model
from sharp.request import SamplingParams
from sharp.weight_stream import copy_pieces, fill, stream_weights
from sharp.weights import Checkpoint, load_weights, open_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)


# Pieces --------------------------------------------------------------------------------------------


@st.composite
def weights(draw):
    columns = draw(st.sampled_from([(), (1,), (3,), (16,)]))
    if columns and draw(st.booleans()):
        inner = GATE_UP_BLOCK * draw(st.integers(1, 9))
        return Recipe((2 * inner, *columns), ("gate", "up"), (inner, inner), interleaved=True)
    rows = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    return Recipe((sum(rows), *columns), tuple("qkv"[: len(rows)]), rows)


@given(weights(), st.integers(1, 400))
def test_pieces_hold_every_row_once_and_no_more_than_allowed(recipe, most):
    columns = int(np.prod(recipe.shape[1:]))
    tensors = {
        name: np.arange(rows * columns, dtype=np.float32).reshape(rows, *recipe.shape[1:]) + 10_000 * i
        for i, (name, rows) in enumerate(zip(recipe.tensors, recipe.rows, strict=True))
    }
    given_rows = {name: np.zeros(rows, int) for name, rows in zip(recipe.tensors, recipe.rows, strict=True)}

    def rows(name, start, stop):
        given_rows[name][start:stop] += 1
        return tensors[name][start:stop]

    target, at = np.full(recipe.shape, -1, np.float32), 0
    least = (2 * GATE_UP_BLOCK if recipe.interleaved else 1) * columns
    for piece in pieces("w", recipe, most):
        assert piece.start == at < piece.stop
        assert (piece.stop - piece.start) * columns <= max(most, least)
        fill(piece, target[piece.start : piece.stop], rows)
        at = piece.stop
    assert at == recipe.shape[0]
    assert all((count == 1).all() for count in given_rows.values())
    if recipe.interleaved:
        gate, up = (tensors[name].reshape(-1, 1, GATE_UP_BLOCK, *recipe.shape[1:]) for name in ("gate", "up"))
        expected = np.concatenate([gate, up], axis=1).reshape(recipe.shape)
    else:
        expected = np.concatenate([tensors[name] for name in recipe.tensors])
    assert np.array_equal(target, expected)


def biased():
    return Checkpoint(MemorySource(replace(open_checkpoint(TINY).config, qkv_bias=True)))


@pytest.mark.parametrize("make", [lambda: open_checkpoint(TINY), biased])
def test_recipes_are_what_load_weights_hands_over(make):
    source, found = make(), []
    load_weights(source, lambda array: found.append(array.shape), progress=False)
    plan = recipes(source.config).values()
    assert sorted(found) == sorted(recipe.shape for recipe in plan)
    assert sorted(name for recipe in plan for name in recipe.tensors) == sorted(source.names)


# A device whose memory is the host's ---------------------------------------------------------------


class HostBlock:
    """Host memory in place of an arena's."""

    def __init__(self, num_bytes):
        self.raw = np.full(num_bytes + 256, 0xFF, np.uint8)  # NaN in each element type
        self.address = -(-self.raw.ctypes.data // 256) * 256

    def free(self):
        self.raw = None


class HostLane:
    """Two buffers of host memory; a copy happens when its buffer is wanted again, or at the end."""

    def __init__(self):
        self.buffers, self.queued, self.turn = [None, None], [None, None], 0

    def room(self, num_bytes):
        self.turn ^= 1
        self.arrive(self.turn)
        self.buffers[self.turn] = np.full(num_bytes, 0xAB, np.uint8)
        return self.buffers[self.turn]

    def send(self, target):
        self.queued[self.turn] = target

    def arrive(self, turn):
        target, self.queued[turn] = self.queued[turn], None
        if target is not None:
            target.reshape(-1).view(np.uint8)[:] = self.buffers[turn]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.arrive(0)
        self.arrive(1)


class ArenaDevice(HostDevice):
    """The reference over an arena of host memory, planned, filled and closed as a GPU's is."""

    kind = "cuda"  # the budget's arithmetic of a GPU; the ops are numpy's
    copy_stream = "one"

    def __init__(self, dtype, free=3 << 30):
        super().__init__(dtype)
        self.free, self.open, self.staged = free, None, 0

    @contextmanager
    def arena(self, num_bytes):
        self.open = Arena(num_bytes, HostBlock)
        yield self.open
        self.open = None

    def empty(self, shape, dtype=None, *, term="other"):
        kind = np.dtype(dtype or self._element)
        if self.open is None:
            return np.empty(shape, kind)
        array = self.open.take(term, shape, kind)
        start = array.address - array.owner.raw.ctypes.data
        return array.owner.raw[start : start + array.nbytes].view(kind).reshape(shape)

    def upload(self, array, *, term="other"):
        target = self.empty(array.shape, array.dtype, term=term)
        target[...] = array
        return target

    def reserve_staging(self, num_bytes):
        for _ in range(2):
            self.empty((num_bytes,), np.uint8, term="staging")

    def lane(self):
        return HostLane()

    def free_bytes(self):
        return self.free


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 33, "max_num_seqs": 5, "num_blocks": 7}])
def test_an_engine_over_an_arena(tied, options, tmp_path):
    """Every byte that was planned is taken, under the same names; answers are those of the usual host."""
    path = TINY
    if tied:
        path = change_tensors(
            copy_tiny(tmp_path / "m", tie_word_embeddings=True), lambda t: t.pop("lm_head.weight")
        )
    config = EngineConfig(device="cpu", **options)
    model = Model(open_checkpoint(path), config, ArenaDevice("float32"))
    arena, budget = model.arena, model.budget
    assert arena.left == 0
    assert arena.num_bytes == budget.arena <= budget.free + budget.weights
    padding = arena.terms.pop("kv_pages") - budget.kv_pages
    assert 0 <= padding < 256 * 2 * model.config.num_layers
    planned = {name: size for name, size in budget.terms().items() if name in arena.terms}
    assert arena.terms == {**planned, "weights": budget.weights}
    prompts = [[5, 9, 17, 3, 250, 44, 81], [7], list(range(20, 60))]
    usual, config = load(path, "cpu", "float32", **options)
    assert decode(model, config, prompts, 8)[0] == decode(usual, config, prompts, 8)[0]
    engine = Engine(model, model.tokenizer, config)
    engine.add_request(prompts[2], SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    block = arena._block
    engine.close()
    assert block.raw is None


def test_what_is_not_planned_is_refused_by_name(monkeypatch):
    """An array that the budget forgets ends the start, and does not go to memory of its own."""
    monkeypatch.setattr("sharp.model.weight_bytes", lambda *of: 0)
    monkeypatch.setattr("sharp.budget.weight_bytes", lambda *of: 4096)
    with pytest.raises(ArenaFull, match=r"weights: [\d,]+ bytes for float32"):
        Model(
            open_checkpoint(TINY),
            EngineConfig(num_blocks=1, max_num_batched_tokens=1, max_num_seqs=1),
            ArenaDevice("float32"),
        )


# Files ---------------------------------------------------------------------------------------------


def written(folder, kind):
    if kind.startswith("gguf"):
        return write_gguf(folder / "m.gguf", GGMLQuantizationType[kind.split()[1]])
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)

    return change_tensors(copy_tiny(folder / "m"), change)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "gguf F32", "gguf F16", "gguf Q8_0", "gguf Q4_0", "gguf BF16"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_weights_have_the_bits_of_whole_reads(tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setattr("sharp.weight_stream.PIECE_BYTES", 1000)  # many pieces
    checkpoint = open_checkpoint(written(tmp_path, kind))

    def upload(array):
        return array.astype(BF16) if dtype == "bfloat16" else array

    expected = load_weights(checkpoint, upload, progress=False)
    found = stream_weights(checkpoint, ArenaDevice(dtype), progress=False)
    assert_equal_weights(found, expected)


def assert_equal_weights(found, expected):
    for field in ("embed", "final_norm", "lm_head"):
        assert same(getattr(found, field), getattr(expected, field)), field
    for index, (layer, wanted) in enumerate(zip(found.layers, expected.layers, strict=True)):
        for field, array in vars(wanted).items():
            assert same(getattr(layer, field), array), f"layer {index} {field}"


def same(a, b):
    return (a is None and b is None) or (a.dtype == b.dtype and a.tobytes() == b.tobytes())


def test_numbers_that_are_none_and_ties_are_rounded_alike(tmp_path):
    """float32 bits of every exponent, halves of a bfloat16 step among them, infinities and NaN."""
    bits = np.arange(0, 1 << 32, 104729, dtype=np.uint64).astype(np.uint32)
    bits = np.concatenate([bits, (bits & 0xFFFF0000) | 0x8000])
    recipe = Recipe((bits.size,), ("x",), (bits.size,))
    values = bits.view(np.float32)
    out = np.empty(bits.size, BF16)
    for piece in pieces("w", recipe, 1000):
        fill(piece, out[piece.start : piece.stop], lambda name, start, stop: values[start:stop])
    with np.errstate(all="ignore"):
        assert out.tobytes() == values.astype(BF16).tobytes()


def test_rows_of_files_are_not_copied(tmp_path):
    checkpoint = open_checkpoint(written(tmp_path, "BF16"))
    rows = checkpoint.rows("model.layers.0.mlp.down_proj.weight", 3, 9)
    assert rows.dtype == BF16
    assert not rows.flags.owndata
    assert not rows.flags.writeable
    with pytest.raises(KeyError, match="no tensor nonsense"):
        checkpoint.rows("nonsense", 0, 1)


# Threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_every_piece_is_sent_once(threads):
    sent, total = [], []
    copy_pieces(
        iter(range(500)), lambda lane, piece: sent.append(piece) or piece, nullcontext, threads, total.append
    )
    assert sorted(sent) == sorted(total) == list(range(500))


@pytest.mark.parametrize("where", ["send", "work", "lane"])
def test_the_first_error_ends_all_threads(where):
    started, before = [], threading.active_count()

    def work():
        yield from range(10)
        if where == "work":
            raise OSError("the file went away")
        yield from range(1_000_000)

    def send(lane, piece):
        started.append(piece)
        if where == "send" and len(started) == 20:
            raise OSError("the file went away")
        time.sleep(0.001)
        return 1

    def lane():
        if where == "lane":
            raise OSError("the file went away")
        return nullcontext()

    with pytest.raises(OSError, match="went away"):
        copy_pieces(work(), send, lane, 4)
    assert threading.active_count() == before
    assert len(started) < 60


def test_the_bar_says_bytes_and_their_rate(capsys):
    stream_weights(open_checkpoint(TINY), ArenaDevice("float32"), progress=True)
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "GB/s to the device" in shown
