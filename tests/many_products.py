"""The GEMM for many tokens on numpy arrays: its kernel's text, on simt_gemm.py, with models of the intrinsics
that move accumulators out of registers (ptx/epilogue.py), which are made of machine code's parts and have no
text to run."""

from __future__ import annotations

import numpy as np

from kernels_numba import simt, simt_clusters, simt_warps
from kernels_numba.ops.gemm.boxes import MAP_BYTES, heights
from kernels_numba.ops.gemm.hopper import PRODUCT, RESIDUAL_MAP, X_MAP
from kernels_numba.ops.gemm.hopper_config import TILE_K, smem_plan
from kernels_numba.ptx.epilogue import _XOR, BOX_COLUMNS
from kernels_numba.simt_gemm import GemmWarp

GATE = (
    "kernels_numba.ops.warp.elements",
    "kernels_numba.ops.gemm_few.epilogue",
    "kernels_numba.ops.gemm.gate",
)
MODULES = (*GATE, "kernels_numba.ops.gemm.boxes", "kernels_numba.ops.gemm.hopper")
MAPS = 1 << 10  # stands for the address of the tensor maps


class ManyWarp(GemmWarp):
    """One warp; results in bfloat16 or float32."""

    def bulk_wait_read(self, pending):
        pass

    def bulk_commit(self):
        pass

    def tma_prefetch_2d(self, tensor_map, x, y):
        assert self.one(tensor_map) == MAPS + 128 * RESIDUAL_MAP

    def _at(self, base, box, row, unit):
        """Where a box's row has its 8 columns number `unit`."""
        shift, mask = _XOR[box.columns]
        return base + box.offset + row * 2 * box.columns + 16 * (unit ^ ((row >> shift) & mask))

    def _named(self, row, half):
        """The first of this warp's rows; each lane must name its own (ldmatrix, stmatrix)."""
        first = 16 * (self.warp % 4)
        lane = np.arange(32)
        assert np.array_equal(row, first + lane % 16)
        assert np.array_equal(half, lane // 16)
        return first

    def make_stage(self, n, rounds, dtype):
        def stage(acc, which, base, row, half):
            first = self._named(row, half)
            for box in rounds[which]:
                for unit in range(box.columns // 8):
                    at = 4 * (box.first // 8 + unit)
                    for below in (0, 1):
                        eight = acc[at + 2 * below : at + 2 * below + 2].T.reshape(8, 8)  # rows, columns
                        for i in range(8):
                            to = self._at(self.one(base), box, first + 8 * below + i, unit)
                            self.shared(to, 16)[:] = simt.to_bits(eight[i]).view(np.uint8)

        return stage

    def _add(self, acc, columns, source, row, half, parts):
        """acc with the residual added to those columns, in float32; what is stored rounds it."""
        first, sums = self._named(row, half), acc.copy()
        for column in columns:
            part, box = divmod(column // 64, source.boxes)
            start = self.one(parts[2 * part + (box > 0)]) + max(box - 1, 0) * source.pitch
            assert (start - simt.SMEM_START) % 1024 == 0
            unit, at = column % 64 // 8, column // 2
            for below in (0, 1):
                lines = [first + 8 * below + i for i in range(8)]
                words = np.stack([self.shared(start + 128 * i + 16 * (unit ^ i % 8), 16) for i in lines])
                more = simt.to_float(words.view(np.uint16)).reshape(32, 2).T  # two neighbours a lane
                mine = slice(at + 2 * below, at + 2 * below + 2)
                sums[mine] = more + simt.to_float(simt.to_bits(acc[mine]))
        return sums

    def make_stage_sum(self, n, rounds, dtype, source):
        stage = self.make_stage(n, rounds, dtype)

        def stage_sum(acc, which, base, row, half, *parts):
            columns = [box.first + i for box in rounds[which] for i in range(0, box.columns, 8)]
            stage(self._add(acc, columns, source, row, half, parts), which, base, row, half)

        return stage_sum

    def make_store_sum_rows(self, n, dtype, source):
        store = self.make_store_rows(n, dtype)

        def store_sum_rows(acc, out, row_bytes, col, num_cols, low, high, row, half, *parts):
            sums = self._add(acc, range(0, n, 8), source, row, half, parts)
            store(sums, out, row_bytes, col, num_cols, low, high)

        return store_sum_rows

    def make_store_boxes(self, rounds):
        def store_boxes(maps, which, base, row, col, num_cols):
            row, col = self.one(row), self.one(col)
            for box in rounds[which]:
                matrix, (height, columns) = self.maps[self.one(maps) + 128 * BOX_COLUMNS.index(box.columns)]
                assert (height, columns) == (64, box.columns)
                for i in range(64):
                    for unit in range(columns // 8):
                        to = col + box.first + 8 * unit
                        if row + i < matrix.shape[0] and to < matrix.shape[1]:
                            words = self.shared(self._at(self.one(base), box, i, unit), 16).view(np.uint16)
                            matrix[row + i, to : to + 8] = words

        return store_boxes

    def make_send_rows(self, rounds):
        def send_rows(which, base, member, out, row_bytes, rows, columns):
            for thread in np.asarray(member).tolist():
                for box in rounds[which]:
                    units = box.columns // 8
                    for row in range(thread // units, 64, 128 // units):
                        column = box.first + 8 * (thread % units)
                        if row < rows and column < columns:
                            words = self.shared(self._at(self.one(base), box, row, thread % units), 16)
                            at = self.one(out) + row * row_bytes + 2 * column
                            self.memory.bytes_at(at, 16)[:] = words

        return send_rows


class ManyClusterWarp(ManyWarp, simt_clusters.ClusterWarp):
    """One warp of a cluster whose blocks share x."""


def many_in_numpy(config, out, x, weight, bias=None, num_rows=None, *, grid=2, group=1, seed=0, build=PRODUCT,
                  activation="", residual=None, change=lambda name, text: text):  # fmt: skip
    """out as gemm_hopper() would leave it; x, weight, bias, residual: bfloat16 bits; out: those, or
    float32."""
    memory = simt.Memory()
    count = np.array([len(x) if num_rows is None else num_rows], np.int32)
    arrays = [(out, (64, columns)) for columns in BOX_COLUMNS]
    assert len(arrays) == X_MAP
    for matrix, tile, parts in ((x, config.tile_m, config.cluster), (weight, config.tile_n, 1)):
        arrays += [(matrix, (height, TILE_K)) for height in heights(len(matrix), tile, parts)]
    if residual is not None:
        assert len(arrays) == RESIDUAL_MAP
        arrays.append((residual, (config.tile_m, TILE_K)))
    maps = {MAPS + MAP_BYTES * i: pair for i, pair in enumerate(arrays)}
    epilogue = activation if residual is None else "residual"
    out_dtype = "float32" if out.dtype == np.float32 else "bfloat16"
    specialised = (config, "bfloat16", out_dtype, bias is not None, build, epilogue)
    arguments = (
        MAPS, memory.put(out), 0 if bias is None else memory.put(bias), memory.put(count), len(x),
        len(weight), x.shape[1], out.strides[0], group,
    )  # fmt: skip
    common = (MODULES, "make_gemm_hopper_kernel", specialised, arguments, grid * config.cluster,
              config.threads, smem_plan(config).bytes, memory, maps)  # fmt: skip
    if config.cluster > 1:
        simt_clusters.run(*common, config.cluster, seed, change, ManyClusterWarp)
    else:
        simt_warps.run(*common, seed, change, ManyWarp)
