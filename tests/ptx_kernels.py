"""Kernels around single PTX instructions, assembled without a GPU and run on one by test_ptx_gpu.py.

Each factory returns a kernel's Python function; its arguments are addresses (int64) and integers. Tiles are
copied word by word: what is not under test stays too simple to be wrong.
"""

from __future__ import annotations

import numpy as np

from kernels_numba.compiler import cuda
from kernels_numba.ptx import (
    arith,
    atomics,
    clock,
    cluster,
    control,
    cp_async,
    debug,
    distributed,
    fences,
    griddep,
    halves,
    ldst,
    matrix,
    mbarrier,
    mbarrier_poll,
    mma,
    named_barrier,
    packs,
    policy,
    predicated,
    predicated_vector,
    quotients,
    reduce,
    relaxed,
    shuffle,
    tma,
    vector,
    wgmma,
    wgmma_panels,
)
from kernels_numba.ptx.control import dynamic_shared
from kernels_numba.ptx.epilogue import make_store_rows
from kernels_numba.ptx.ldst import (
    ld_global_i32,
    ld_shared_b32,
    st_global_b32,
    st_global_f32,
    st_shared_b32,
)

DEPTH = 64  # K of a wgmma tile: one 128-byte row
A_BYTES = 64 * DEPTH * 2
i32 = np.int32


def make_wgmma_tile(n, dtype="bfloat16", a="shared", a_major="k", b_major="k"):
    """(image, words, a_rows, out), 128 threads: out f32[64, n] = 2 A B^T. image: A's 8192 bytes, then B's, as
    they must lie in shared memory; a_rows: A row-major, for a="registers"."""
    held = n // 2
    multiply = wgmma.make_wgmma(n, 4, dtype, a, a_major, b_major)
    finish, store = wgmma.make_wgmma_wait(n), make_store_rows(n, "float32")
    other = wgmma.make_descriptor_mn_major(DEPTH * 128)
    describe_a = wgmma.descriptor_k_major if a_major == "k" else other
    describe_b = wgmma.descriptor_k_major if b_major == "k" else other
    from_registers = a == "registers"

    def wgmma_tile(image, words, a_rows, out):
        smem = dynamic_shared()
        thread = cuda.threadIdx.x
        at = thread
        while at < words:
            st_shared_b32(smem + 4 * at, ld_global_i32(image + 4 * at))
            at += 128
        fences.fence_proxy_async()
        cuda.syncthreads()
        lane = thread & 31
        row = (thread >> 5) * 16 + (lane >> 2)
        pair = (lane & 3) * 2
        acc = cuda.local.array(held, np.float32)
        for i in range(held):
            acc[i] = np.float32(7)  # scale_d 0 must drop it
        if from_registers:
            fragment = cuda.local.array(16, np.int32)
            for step in range(4):
                start = a_rows + (row * 64 + step * 16 + pair) * 2
                fragment[4 * step] = ld_global_i32(start)
                fragment[4 * step + 1] = ld_global_i32(start + 1024)
                fragment[4 * step + 2] = ld_global_i32(start + 16)
                fragment[4 * step + 3] = ld_global_i32(start + 1040)
            multiply(acc, fragment, describe_b(smem + A_BYTES), 0)
            multiply(acc, fragment, describe_b(smem + A_BYTES), 1)
        else:
            multiply(acc, describe_a(smem), describe_b(smem + A_BYTES), 0)
            multiply(acc, describe_a(smem), describe_b(smem + A_BYTES), 1)
        finish(acc)
        store(acc, out + (row * n + pair) * 4, i32(4 * n), i32(pair), i32(n), i32(1), i32(1))

    return wgmma_tile


def make_wgmma_panels_tile(n, k, dtype, a):
    """(image, words, a_rows, out), 128 threads: out f32[64, n] = 2 A B^T. image: panels of 64 columns of A,
    then of B, as they must lie in shared memory; a_rows: A row-major, for a="registers"."""
    held, fragments, steps = n // 2, k // 4, k // 16
    a_panel, b_panel = 64 * 128, n * 128
    b_at = k // 64 * a_panel
    multiply = wgmma_panels.make_wgmma_panels(n, k, dtype, a, a_panel, b_panel)
    hold = wgmma_panels.make_hold(n)
    finish, store = wgmma.make_wgmma_wait(n), make_store_rows(n, "float32")
    describe, from_registers = wgmma.descriptor_k_major, a == "registers"

    def wgmma_panels_tile(image, words, a_rows, out):
        smem = dynamic_shared()
        thread = cuda.threadIdx.x
        at = thread
        while at < words:
            st_shared_b32(smem + 4 * at, ld_global_i32(image + 4 * at))
            at += 128
        fences.fence_proxy_async()
        cuda.syncthreads()
        lane = thread & 31
        row = (thread >> 5) * 16 + (lane >> 2)
        pair = (lane & 3) * 2
        acc = cuda.local.array(held, np.float32)
        for i in range(held):
            acc[i] = np.float32(7)  # scale_d 0 must drop it
        if from_registers:
            fragment = cuda.local.array(fragments, np.int32)
            for step in range(steps):
                start = a_rows + (row * k + step * 16 + pair) * 2
                fragment[4 * step] = ld_global_i32(start)
                fragment[4 * step + 1] = ld_global_i32(start + 16 * k)
                fragment[4 * step + 2] = ld_global_i32(start + 16)
                fragment[4 * step + 3] = ld_global_i32(start + 16 * k + 16)
            multiply(acc, fragment, describe(smem + b_at), 0)
            multiply(acc, fragment, describe(smem + b_at), 1)
        else:
            multiply(acc, describe(smem), describe(smem + b_at), 0)
            multiply(acc, describe(smem), describe(smem + b_at), 1)
        finish(acc)
        hold(acc)
        store(acc, out + (row * n + pair) * 4, i32(4 * n), i32(pair), i32(n), i32(1), i32(1))

    return wgmma_panels_tile


def make_predicated():
    """(x, out), 32 threads: out u32[32, 4] = x[32, 4] where the lane is a multiple of 3; the rest stays."""

    def predicated(x, out):
        words = cuda.local.array(4, np.int32)
        at = 16 * cuda.threadIdx.x
        vector.ld_global_v4(words, x + at)
        predicated_vector.st_global_v4_if(i32(cuda.threadIdx.x % 3 == 0), out + at, words)

    return predicated


def make_packs():
    """(x, out), 32 threads: out u32[32, 12] = x[32, 8] where the lane is odd, and 0 in its first four words
    elsewhere; the last four words are x's first four where the lane is below 5. The rest stays."""

    def packs_(x, out):
        lane = i32(cuda.threadIdx.x)
        words = cuda.local.array(8, np.int32)
        numbers = cuda.local.array(8, np.float32)
        at = x + 32 * cuda.threadIdx.x
        to = out + 48 * cuda.threadIdx.x
        packs.ld_global_v4_if_at(lane & 1, words, 4, at)
        packs.ld_global_nc_v4_if_at(lane & 1, numbers, 0, at + 16)
        packs.st_global_v4_if_at(1, to, words, 4)
        packs.st_global_v4_if_at(lane & 1, to + 16, numbers, 0)
        packs.ld_global_v4_if_at(1, words, 0, at)
        packs.st_global_v4_if_at(i32(lane < 5), to + 32, words, 0)

    return packs_


def make_halves():
    """(x, y, out), 256 threads: out f32[256, 6] = both bfloat16 and both float16 halves of x u32[256], the
    square root of y f32[256, 2]'s first and the quotient of its two."""

    def halves_(x, y, out):
        thread = cuda.threadIdx.x
        word = ld_global_i32(x + 4 * thread)
        value = cuda.local.array(2, np.float32)
        vector.ld_global_v2(value, y + 8 * thread)
        at = out + 24 * thread
        st_global_f32(at, halves.bf16_low(word))
        st_global_f32(at + 4, halves.bf16_high(word))
        st_global_f32(at + 8, halves.f16_low(word))
        st_global_f32(at + 12, halves.f16_high(word))
        st_global_f32(at + 16, quotients.sqrt_f32(value[0]))
        st_global_f32(at + 20, quotients.divide_full_f32(value[0], value[1]))

    return halves_


def make_sums():
    """(x, out), 96 threads: adds x i64[96] to out's first i64, and their low halves to the i32 behind it."""

    def sums(x, out):
        words = cuda.local.array(2, np.uint32)
        vector.ld_global_v2(words, x + 8 * cuda.threadIdx.x)
        value = np.int64(np.uint64(words[0]) | (np.uint64(words[1]) << np.uint64(32)))
        reduce.red_add_i64(out, value)
        reduce.red_add_i32(out + 8, np.int32(words[0]))

    return sums


def make_wgmma_gemm(n):
    """(a, b, k, out), 128 threads: out f32[64, n] = A[64, k] B[n, k]^T, bfloat16, K upward in tiles of 64."""
    held = n // 2
    multiply, store = wgmma.make_wgmma(n, 4, wait=0), make_store_rows(n, "float32")

    def wgmma_gemm(a, b, k, out):
        smem = dynamic_shared()
        thread = cuda.threadIdx.x
        lane = thread & 31
        row = (thread >> 5) * 16 + (lane >> 2)
        pair = (lane & 3) * 2
        acc = cuda.local.array(held, np.float32)
        for i in range(held):
            acc[i] = np.float32(0)
        start = 0
        while start < k:
            at = thread
            while at < (64 + n) * 32:
                line = at >> 5
                word = at & 31
                if line < 64:
                    value = ld_global_i32(a + (line * k + start) * 2 + word * 4)
                else:
                    value = ld_global_i32(b + ((line - 64) * k + start) * 2 + word * 4)
                chunk = (word >> 2) ^ (line & 7)
                st_shared_b32(smem + line * 128 + chunk * 16 + (word & 3) * 4, value)
                at += 128
            fences.fence_proxy_async()
            cuda.syncthreads()
            multiply(acc, wgmma.descriptor_k_major(smem), wgmma.descriptor_k_major(smem + A_BYTES), start)
            cuda.syncthreads()
            start += 64
        store(acc, out + (row * n + pair) * 4, i32(4 * n), i32(pair), i32(n), i32(1), i32(1))

    return wgmma_gemm


def make_mma_gemm(dtype="bfloat16", offsets=False):
    """(a, b, k, n, c, out), 32 threads: out f32[.., n] = c + A[.., k] B[n, k]^T; a block: 16 rows (x), 8
    columns (y)."""
    plain = mma.mma_m16n8k16 if dtype == "bfloat16" else mma.mma_m16n8k16_f16
    indexed = mma.mma_m16n8k16_at if dtype == "bfloat16" else mma.mma_m16n8k16_f16_at
    first = 4 if offsets else 0

    def mma_gemm(a, b, k, n, c, out):
        lane = control.lane_id()
        row = cuda.blockIdx.x * 16 + (lane >> 2)
        line = cuda.blockIdx.y * 8 + (lane >> 2)
        pair = (lane & 3) * 2
        upper = (row * n + cuda.blockIdx.y * 8 + pair) * 4
        lower = upper + 32 * n
        words = cuda.local.array(2, np.float32)
        acc = cuda.local.array(8, np.float32)
        rows = cuda.local.array(8, np.int32)
        columns = cuda.local.array(8, np.int32)
        vector.ld_global_v2(words, c + upper)
        acc[first], acc[first + 1] = words[0], words[1]
        vector.ld_global_v2(words, c + lower)
        acc[first + 2], acc[first + 3] = words[0], words[1]
        start = 0
        while start < k:
            at = a + (row * k + start + pair) * 2
            rows[first] = ld_global_i32(at)
            rows[first + 1] = ld_global_i32(at + 16 * k)
            rows[first + 2] = ld_global_i32(at + 16)
            rows[first + 3] = ld_global_i32(at + 16 * k + 16)
            at = b + (line * k + start + pair) * 2
            columns[first] = ld_global_i32(at)
            columns[first + 1] = ld_global_i32(at + 16)
            if offsets:
                indexed(acc, first, rows, first, columns, first)
            else:
                plain(acc, rows, columns)
            start += 16
        vector.st_global_v2_f32(out + upper, acc[first], acc[first + 1])
        vector.st_global_v2_f32(out + lower, acc[first + 2], acc[first + 3])

    return mma_gemm


def make_tma_copy(rank, box_bytes, prefetch=True, hint=False):
    """(from_map, to_map, x, y, z, w, to_x, to_y, to_z, to_w, seen), 32 threads: a box to shared memory, its
    bytes to `seen`, and the box to another place by a TMA store; hint: with L2 policies, which change no
    byte."""
    bring = getattr(tma, f"tma_prefetch_{rank}d")
    load = getattr(tma, f"tma_load_{rank}d" + "_hint" * hint)
    store = getattr(tma, f"tma_store_{rank}d" + "_hint" * hint)

    def tma_copy(from_map, to_map, x, y, z, w, to_x, to_y, to_z, to_w, seen):
        smem = dynamic_shared()
        bar = smem + box_bytes
        thread = cuda.threadIdx.x
        if thread == 0:
            mbarrier.mbarrier_init(bar, 1)
            mbarrier.fence_mbarrier_init()
            tma.tma_prefetch_map(from_map)
            if prefetch:
                if rank == 2:
                    bring(from_map, x, y)
                elif rank == 3:
                    bring(from_map, x, y, z)
                else:
                    bring(from_map, x, y, z, w)
        cuda.syncthreads()
        if thread == 0:
            mbarrier.mbarrier_expect_tx(bar, box_bytes)
            first = policy.policy_evict_first()
            if rank == 2:
                if hint:
                    load(smem, from_map, bar, x, y, first)
                else:
                    load(smem, from_map, bar, x, y)
            elif rank == 3:
                if hint:
                    load(smem, from_map, bar, x, y, z, first)
                else:
                    load(smem, from_map, bar, x, y, z)
            elif hint:
                load(smem, from_map, bar, x, y, z, w, first)
            else:
                load(smem, from_map, bar, x, y, z, w)
        mbarrier.mbarrier_wait(bar, 0)
        at = thread * 4
        while at < box_bytes:
            st_global_b32(seen + at, ld_shared_b32(smem + at))
            at += 128
        fences.fence_proxy_async()
        cuda.syncthreads()
        if thread == 0:
            last = policy.policy_evict_last()
            if rank == 2:
                if hint:
                    store(to_map, smem, to_x, to_y, last)
                else:
                    store(to_map, smem, to_x, to_y)
            elif rank == 3:
                if hint:
                    store(to_map, smem, to_x, to_y, to_z, last)
                else:
                    store(to_map, smem, to_x, to_y, to_z)
            elif hint:
                store(to_map, smem, to_x, to_y, to_z, to_w, last)
            else:
                store(to_map, smem, to_x, to_y, to_z, to_w)
            tma.bulk_commit()
            tma.bulk_wait_read(0)
            tma.bulk_wait(0)

    return tma_copy


def make_multicast(half_bytes, rows, rank=2, hint=False):
    """(source, out, ranks), clusters of 2 blocks of 32 threads: each block loads half of a tile into both;
    out: what each block then holds; ranks: its rank. Block 0 waits for an arrival of each too. source: the
    address of a tensor map of `rank` dimensions, or for rank 1 of the bytes."""
    name = f"tma_load_{rank}d_multicast" + "_hint" * hint if rank > 1 else "bulk_load_multicast"
    load = getattr(tma, name)

    def multicast(source, out, ranks):
        smem = dynamic_shared()
        bar = smem + 2 * half_bytes
        remote = bar + 8
        rank_ = cluster.cluster_rank()
        thread = cuda.threadIdx.x
        if thread == 0:
            mbarrier.mbarrier_init(bar, 1)
            mbarrier.mbarrier_init(remote, 2)
            mbarrier.fence_mbarrier_init()
        cluster.cluster_sync()
        if thread == 0:
            mbarrier.mbarrier_expect_tx(bar, 2 * half_bytes)
            half = smem + rank_ * half_bytes
            normal = policy.policy_evict_normal()
            if rank == 1:
                load(half, source + rank_ * half_bytes, half_bytes, bar, 3)
            elif rank == 2:
                if hint:
                    load(half, source, bar, 0, rank_ * rows, 3, normal)
                else:
                    load(half, source, bar, 0, rank_ * rows, 3)
            elif rank == 3:
                if hint:
                    load(half, source, bar, 0, rank_ * rows, 0, 3, normal)
                else:
                    load(half, source, bar, 0, rank_ * rows, 0, 3)
            elif hint:
                load(half, source, bar, 0, rank_ * rows, 0, 0, 3, normal)
            else:
                load(half, source, bar, 0, rank_ * rows, 0, 0, 3)
        mbarrier.mbarrier_wait(bar, 0)
        at = thread * 4
        while at < 2 * half_bytes:
            st_global_b32(out + cuda.blockIdx.x * 2 * half_bytes + at, ld_shared_b32(smem + at))
            at += 128
        if thread == 0:
            mbarrier.mbarrier_arrive_remote(remote, 0)
        if rank_ == 0:
            mbarrier.mbarrier_wait(remote, 0)
        fences.fence_acq_rel_cluster()
        if thread == 0:
            same = cluster.cluster_address(smem, rank_) - cluster.cluster_address(smem, 0)
            st_global_b32(ranks + 4 * cuda.blockIdx.x, rank_ if (same == 0) == (rank_ == 0) else -1)
        cuda.syncthreads()
        cluster.cluster_arrive_relaxed()
        cluster.cluster_wait()

    return multicast


def make_st_async():
    """(words f32[threads, 8], out f32[threads, 8]), clusters of 2 blocks of 32 threads: a thread sends its
    words 0 to 3, 4 and 5, and 6 to its place in the other block; out: what its own place then holds, 7: 0."""

    def st_async(words, out):
        smem = dynamic_shared()
        bar = smem + 1024
        thread = cuda.threadIdx.x
        at = words + 32 * (cuda.blockIdx.x * 32 + thread)
        held = cuda.local.array(4, np.int32)
        rest = cuda.local.array(4, np.float32)
        if thread == 0:
            mbarrier.mbarrier_init(bar, 1)
            mbarrier.fence_mbarrier_init()
        ldst.st_shared_b32(smem + 32 * thread + 28, 0)
        cluster.cluster_sync()
        if thread == 0:
            mbarrier.mbarrier_expect_tx(bar, 28 * 32)
        there = cluster.cluster_address(smem, cluster.cluster_rank() ^ 1)
        full, to = there + 1024, there + 32 * thread
        vector.ld_global_v4(held, at)
        vector.ld_global_v4(rest, at + 16)
        distributed.st_async_v4(to, held, full)
        distributed.st_async_v2_f32(to + 16, rest[0], rest[1], full)
        distributed.st_async_f32(to + 24, rest[2], full)
        mbarrier.mbarrier_wait(bar, 0)
        for i in range(8):
            value = ldst.ld_shared_f32(smem + 32 * thread + 4 * i)
            ldst.st_global_f32(out + 32 * (cuda.blockIdx.x * 32 + thread) + 4 * i, value)
        cluster.cluster_sync()

    return st_async


def make_ldmatrix(count, trans):
    """(words, out), 32 threads: 128 words to shared memory, then ldmatrix to out i32[32, count]."""
    load = getattr(matrix, f"ldmatrix_x{count}" + ("_trans" if trans else ""))

    def ldmatrix(words, out):
        smem = dynamic_shared()
        thread = cuda.threadIdx.x
        for i in range(4):
            st_shared_b32(smem + 4 * (thread + 32 * i), ld_global_i32(words + 4 * (thread + 32 * i)))
        cuda.syncthreads()
        held = cuda.local.array(count, np.int32)
        load(held, smem + 16 * thread)
        for i in range(count):
            st_global_b32(out + 4 * (thread * count + i), held[i])

    return ldmatrix


def make_stmatrix(count, trans):
    """(words, out), 32 threads: words i32[32, count] by stmatrix over 128 words of zeros, which go to out."""
    name = f"stmatrix_x{count}" + ("_trans" if trans else "")
    store = getattr(matrix, name)

    def stmatrix(words, out):
        smem = dynamic_shared()
        thread = cuda.threadIdx.x
        for i in range(4):
            st_shared_b32(smem + 4 * (thread + 32 * i), 0)
        cuda.syncthreads()
        at = words + 4 * thread * count
        if count == 1:
            store(smem + 16 * thread, ld_global_i32(at))
        elif count == 2:
            store(smem + 16 * thread, ld_global_i32(at), ld_global_i32(at + 4))
        else:
            store(
                smem + 16 * thread, ld_global_i32(at), ld_global_i32(at + 4), ld_global_i32(at + 8),
                ld_global_i32(at + 12),
            )  # fmt: skip
        cuda.syncthreads()
        for i in range(4):
            st_global_b32(out + 4 * (thread + 32 * i), ld_shared_b32(smem + 4 * (thread + 32 * i)))

    return stmatrix


def make_cp_async(by_barrier):
    """(source, out), 32 threads: 16 bytes a thread, then again the first (thread % 17) of them; out: 2 x 512
    bytes. They are waited for by groups, or by an mbarrier."""

    def cp_async_copy(source, out):
        smem = dynamic_shared()
        bar = smem + 1024
        thread = cuda.threadIdx.x
        if thread == 0:
            mbarrier.mbarrier_init(bar, 32)
        for i in range(8):
            st_shared_b32(smem + 4 * (thread + 32 * i), -1)
        cuda.syncthreads()
        cp_async.cp_async_16(smem + 16 * thread, source + 16 * thread)
        cp_async.cp_async_commit()
        cp_async.cp_async_16_zfill(smem + 512 + 16 * thread, source + 16 * thread, thread % 17)
        cp_async.cp_async_commit()
        if by_barrier:
            cp_async.cp_async_mbarrier_arrive(bar)
            mbarrier.mbarrier_wait(bar, 0)
        else:
            cp_async.cp_async_wait(1)
            cp_async.cp_async_wait(0)
            cuda.syncthreads()
        for i in range(8):
            at = 4 * (thread + 32 * i)
            st_global_b32(out + at, ld_shared_b32(smem + at))

    return cp_async_copy


def make_bulk(hint=False):
    """(source, out, size), 32 threads: size bytes (a multiple of 16, at most 4096) through shared memory."""

    def bulk(source, out, size):
        smem = dynamic_shared()
        bar = smem + 4096
        if cuda.threadIdx.x == 0:
            mbarrier.mbarrier_init(bar, 1)
            mbarrier.fence_mbarrier_init()
            tma.bulk_prefetch(source, size)
            mbarrier.mbarrier_expect_tx(bar, size)
            if hint:
                tma.bulk_load_hint(smem, source, size, bar, policy.policy_evict_first())
            else:
                tma.bulk_load(smem, source, size, bar)
            mbarrier.mbarrier_wait(bar, 0)
            if hint:
                tma.bulk_store_hint(out, smem, size, policy.policy_evict_last())
            else:
                tma.bulk_store(out, smem, size)
            tma.bulk_commit()
            tma.bulk_wait(0)
            fences.fence_proxy_async_global()

    return bulk


def make_vectors():
    """(source, out), 32 threads: pieces of out are source, moved in as many ways as the test lists."""

    def vectors(source, out):
        smem = dynamic_shared()
        thread = cuda.threadIdx.x
        at = 16 * thread
        words = cuda.local.array(4, np.int32)
        numbers = cuda.local.array(4, np.float32)
        ldst.prefetch_l2(source + at)
        vector.ld_global_v4(words, source + at)
        vector.st_global_v4(out + at, words)
        vector.ld_global_nc_v4(numbers, source + at)
        vector.st_global_cs_v4(out + 512 + at, numbers)
        vector.st_shared_v4(smem + (at ^ 16), words)
        cuda.syncthreads()
        vector.ld_shared_v4(numbers, smem + at)  # the neighbour's
        vector.st_global_v4(out + 1024 + at, numbers)
        vector.ld_global_v2(words, source + 8 * thread)
        st_global_b32(out + 1536 + 8 * thread, words[0])
        st_global_b32(out + 1540 + 8 * thread, words[1])
        vector.st_global_v2_f32(out + 1792 + 8 * thread, numbers[0], numbers[3])
        ldst.st_global_b16(out + 2048 + 2 * thread, words[0])
        first = policy.policy_evict_first()
        last = policy.policy_evict_last()
        vector.ld_global_v4_hint(words, source + at, first)
        vector.st_global_v4(out + 2112 + at, words)
        vector.ld_global_nc_v4_hint(numbers, source + at, last)
        vector.st_global_v4_hint(out + 2624 + at, numbers, first)

    return vectors


def make_warps():
    """(x, out), 64 threads: out i32[64, 14]: shuffles and the like, as the test lists them."""

    def warps(x, out):
        thread = cuda.threadIdx.x
        lane = control.lane_id()
        at = out + 56 * thread
        begun = clock.now_ns()
        value = cuda.local.array(2, np.float32)
        vector.ld_global_v2(value, x + 8 * thread)
        st_global_f32(at, shuffle.shfl_xor_f32(value[0], 5))
        st_global_f32(at + 4, shuffle.shfl_down_f32(value[0], 3))
        st_global_b32(at + 8, shuffle.shfl_idx_i32(thread, (lane + 1) & 31))
        st_global_b32(at + 12, shuffle.warp_uniform(thread))
        st_global_b32(at + 16, control.elect_one())
        st_global_b32(at + 20, lane)
        st_global_b32(at + 24, mma.pack_bf16(value[0], value[1]))
        st_global_b32(at + 28, mma.pack_f16(value[0], value[1]))
        static = cuda.shared.array(64, np.int32)
        st_shared_b32(control.shared_address(static) + 4 * thread, thread * 3)
        cuda.syncthreads()
        st_global_b32(at + 32, static[63 - thread])
        st_global_f32(at + 36, shuffle.shfl_up_f32(value[0], 3))
        st_global_f32(at + 40, shuffle.shfl_idx_f32(value[0], lane ^ 9))
        st_global_b32(at + 44, shuffle.shfl_xor_i32(thread, 6))
        control.nanosleep(20000)
        st_global_b32(at + 48, i32(clock.now_ns() - begun))
        st_global_b32(at + 52, clock.sm_id())

    return warps


def make_choices():
    """(x, counters, out), 64 threads: arithmetic and choices of x f32[64, 2], counters i32[2]; out i32[64,
    24], as test_arithmetic_and_choices lists them."""

    def choices(x, counters, out):
        thread = cuda.threadIdx.x
        lane = control.lane_id()
        at = out + 96 * thread
        value = cuda.local.array(2, np.float32)
        pair = cuda.local.array(2, np.float32)
        four = cuda.local.array(4, np.float32)
        vector.ld_global_v2(value, x + 8 * thread)
        a, b = value[0], value[1]
        smem = dynamic_shared()
        st_global_f32(at, arith.ex2_f32(a))
        st_global_f32(at + 4, arith.lg2_f32(arith.max_f32(b, np.float32(0.5))))
        st_global_f32(at + 8, arith.fma_f32(a, b, a))
        st_global_f32(at + 12, arith.add_f32(arith.mul_f32(a, b), a))
        st_global_f32(at + 16, arith.divide_f32(a, b))
        st_global_f32(at + 20, arith.select_f32(a < b, a, b))
        st_global_b32(at + 24, arith.select_i32(lane & 2, thread, -7))
        st_global_b32(at + 28, atomics.ballot(i32(a < b)))
        st_global_b32(at + 32, atomics.popc(thread * 1021))
        st_global_b32(at + 36, atomics.shfl_up_i32(thread, 4))
        predicated.st_global_b32_if(lane & 1, at + 40, thread)
        predicated.st_global_f32_if(lane & 2, at + 44, b)
        predicated.st_global_v2_f32_if(lane & 4, at + 48, a, b)
        st_global_b32(at + 56, atomics.atom_add_i32(counters, 3))
        st_global_b32(at + 60, atomics.atom_add_acq_rel_i32(counters + 4, thread))
        row = smem + 16 * thread
        for k in range(4):
            st_shared_b32(row + 4 * k, thread)
        predicated.st_shared_zero_16_if(lane & 1, row)
        predicated.st_shared_f32_if(lane & 2, row + 4, a)
        st_global_b32(at + 64, ld_shared_b32(row))
        st_global_b32(at + 68, ld_shared_b32(row + 4))
        bar = smem + 1024
        if thread == 0:
            mbarrier.mbarrier_init(bar, 64)
        cuda.syncthreads()
        mbarrier.mbarrier_arrive(bar)
        mbarrier_poll.mbarrier_poll(bar, 0)
        st_global_b32(at + 72, 1)
        st_global_b32(at + 76, arith.bits_f32(a))
        relaxed.st_relaxed_v2_f32_if(1, at + 80, b, a)
        relaxed.st_relaxed_v2_f32_if(0, at + 80, a, a)
        relaxed.ld_relaxed_v2(pair, at + 80)
        relaxed.ld_relaxed_v4(four, at + 80)
        st_global_f32(at + 88, pair[1])
        st_global_f32(at + 92, four[0])

    return choices


def make_hand_over(rounds):
    """(out), 64 threads: warp 0 writes, warp 1 reads, by two named barriers; out i32[rounds, 32]."""

    def hand_over(out):
        smem = dynamic_shared()
        thread = cuda.threadIdx.x
        lane = thread & 31
        for turn in range(rounds):
            if thread < 32:
                if turn > 0:
                    named_barrier.named_barrier_sync(2, 64)
                control.nanosleep(200)
                st_shared_b32(smem + 4 * lane, turn * 100 + lane)
                fences.fence_acq_rel_cta()
                named_barrier.named_barrier_arrive(1, 64)
            else:
                named_barrier.named_barrier_sync(1, 64)
                st_global_b32(out + 4 * (turn * 32 + lane), ld_shared_b32(smem + 4 * (31 - lane)))
                if turn < rounds - 1:
                    named_barrier.named_barrier_arrive(2, 64)
        fences.fence_acq_rel_gpu()

    return hand_over


def make_pipeline(rounds, stages, stress, wrong=0):
    """(out), 64 threads: warp 0 hands `rounds` rows of 32 numbers to warp 1 through `stages` slots, full and
    empty barriers by phase; out i32[rounds, 32]. Bounded waits; with stress the warps dawdle; wrong=1: the
    reader waits for the phase before."""
    wait_full = debug.make_mbarrier_wait("full", True)
    wait_empty = debug.make_mbarrier_wait("empty", True)
    pause = debug.make_stress(stress)

    def pipeline(out):
        smem = dynamic_shared()
        full = smem + 128 * stages
        empty = full + 8 * stages
        thread = cuda.threadIdx.x
        lane = thread & 31
        if thread == 0:
            for stage in range(stages):
                mbarrier.mbarrier_init(full + 8 * stage, 32)
                mbarrier.mbarrier_init(empty + 8 * stage, 32)
        cuda.syncthreads()
        for turn in range(rounds):
            stage = turn % stages
            phase = (turn // stages) & 1
            if thread < 32:
                wait_empty(empty + 8 * stage, phase ^ 1)
                pause(1)
                st_shared_b32(smem + 128 * stage + 4 * lane, turn * 100 + lane)
                mbarrier.mbarrier_arrive(full + 8 * stage)
            else:
                wait_full(full + 8 * stage, phase ^ wrong)
                pause(2)
                st_global_b32(
                    out + 4 * (turn * 32 + lane), ld_shared_b32(smem + 128 * stage + 4 * (31 - lane))
                )
                mbarrier.mbarrier_arrive(empty + 8 * stage)

    return pipeline


def make_stuck(report):
    """(): waits for a phase that never ends."""
    wait = debug.make_mbarrier_wait("never", True, report)

    def stuck():
        smem = dynamic_shared()
        if cuda.threadIdx.x == 0:
            mbarrier.mbarrier_init(smem, 1)
        cuda.syncthreads()
        wait(smem, 0)

    return stuck


def make_registers():
    """(out), 384 threads: one warpgroup gives registers up, two take them; out i32[384] = thread."""

    def registers(out):
        thread = cuda.threadIdx.x
        griddep.griddep_wait()
        griddep.griddep_launch()
        if shuffle.warp_uniform(thread >> 7) == 0:
            control.setmaxnreg_dec(40)
            st_global_b32(out + 4 * thread, thread)
        else:
            control.setmaxnreg_inc(232)
            st_global_b32(out + 4 * thread, thread)

    return registers
