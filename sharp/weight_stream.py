"""Weights from their files into device memory: pieces of rows through pinned buffers, by several threads.

Knows how the pieces are made and put in the device's element type, and that a thread fills one of its two
buffers while the other is copied. Refuses to know CUDA: a device gives `lane`, two buffers and a copy queue.
No tensor is whole in host memory but in its mapped file (and where a source cannot be read by rows).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields
from math import prod
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from sharp.layout import GATE_UP_BLOCK, Piece, Recipe, pieces, recipes
from sharp.weights import Checkpoint, LayerWeights, ModelWeights

PIECE_BYTES = 8 << 20  # of a pinned buffer: large enough for the full rate, small enough to stay in a cache
MAX_THREADS = 8

Rows = Callable[[str, int, int], npt.NDArray[Any]]  # (tensor, first row, last row + 1) -> those rows


class Lane(Protocol):
    """Two buffers that one thread fills in turns, and the queue that copies them to the device."""

    def room(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The buffer that was sent longest ago, once its copy is over."""

    def send(self, target: Any) -> None:
        """Queue the copy of the buffer that room() gave last to a device array of as many bytes."""


class Lanes(Protocol):
    """What this module asks of a device."""

    dtype: str

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None, *, term: str = "") -> Any: ...

    def lane(self) -> AbstractContextManager[Lane]: ...

    def synchronize(self) -> None: ...


def fill(piece: Piece, out: npt.NDArray[Any], rows: Rows) -> None:
    """Write a piece's rows into out[rows, columns] (or out[rows]), converted to out's dtype, ties to even."""
    if len(piece.sources) == 1:
        _copy(out, rows(*piece.sources[0]))
        return
    both = out.reshape(-1, 2, GATE_UP_BLOCK, *out.shape[1:])
    for i, source in enumerate(piece.sources):
        _copy(both[:, i], rows(*source).reshape(-1, GATE_UP_BLOCK, *out.shape[1:]))


def _copy(out: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    if values.dtype == out.dtype == np.dtype(ml_dtypes.bfloat16):
        # The same bits: as integers numpy copies them without holding the interpreter's lock.
        out, values = out.view(np.uint16), values.view(np.uint16)
    with np.errstate(all="ignore"):  # a weight that is no number is the file's, not an accident
        out[...] = values


def copy_pieces(
    work: Iterator[Piece],
    send: Callable[[Lane, Piece], int],
    lane: Callable[[], AbstractContextManager[Lane]],
    num_threads: int,
    done: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Run send(lane, piece) for every piece of `work`, on num_threads threads with a lane each.

    done: called with what send returned, one call at a time. The first error in any thread, or a Ctrl-C here,
    ends all of them and is raised.
    """
    lock, errors = threading.Lock(), list[BaseException]()

    def run() -> None:
        try:
            with lane() as own:
                while not errors:
                    with lock:
                        piece = next(work, None)
                    if piece is None:
                        return
                    sent = send(own, piece)
                    with lock:
                        done(sent)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, name=f"weights-{i}", daemon=True) for i in range(num_threads)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C arrives in the main thread
        errors.append(error)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]


def stream_weights(checkpoint: Checkpoint, device: Lanes, *, progress: bool = True) -> ModelWeights:
    """Allocate every weight on the device under the term "weights" and fill it. Bits are those of
    load_weights with the device's upload_float.

    progress: a bar in bytes, and at the end bytes per second. Raises ModelFileError when intermediate_size is
    not a multiple of 8, and what the first failing thread met.
    """
    checkpoint.check_fusable()
    plan = recipes(checkpoint.config)
    arrays = {name: device.empty(recipe.shape, term="weights") for name, recipe in plan.items()}
    element: np.dtype[Any] = np.dtype(np.float32 if device.dtype == "float32" else ml_dtypes.bfloat16)

    def send(lane: Lane, piece: Piece) -> int:
        shape = (piece.stop - piece.start, *plan[piece.weight].shape[1:])
        num_bytes = prod(shape) * element.itemsize
        fill(piece, lane.room(num_bytes).view(element).reshape(shape), checkpoint.rows)
        lane.send(arrays[piece.weight][piece.start : piece.stop])
        return num_bytes

    total = sum(prod(recipe.shape) for recipe in plan.values()) * element.itemsize
    start = time.perf_counter()
    with tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress
    ) as bar:
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        copy_pieces(_all(plan, PIECE_BYTES // element.itemsize), send, device.lane, threads, bar.update)
        device.synchronize()
        bar.set_postfix_str(f"{total / (time.perf_counter() - start) / 1e9:.1f} GB/s to the device")
    return assemble(arrays, checkpoint.config.num_layers)


def _all(plan: dict[str, Recipe], most_elements: int) -> Iterator[Piece]:
    for name, recipe in plan.items():
        yield from pieces(name, recipe, most_elements)


def assemble(arrays: dict[str, Any], num_layers: int) -> ModelWeights:
    """The arrays of layout.recipes under the names that the forward reads."""
    names = [field.name for field in fields(LayerWeights)]
    return ModelWeights(
        embed=arrays["embed"],
        layers=[
            LayerWeights(**{name: arrays.get(f"{layer}.{name}") for name in names})
            for layer in range(num_layers)
        ],
        final_norm=arrays["final_norm"],
        lm_head=arrays.get("lm_head", arrays["embed"]),
    )
