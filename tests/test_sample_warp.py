"""Sampling's rung "warp": its kernels' text in Python, planned by its launcher, under many orders of threads;
its door; the code that it becomes; its ids and captures on a GPU."""

from __future__ import annotations

import json

import no_simulator
import numpy as np
import pytest
from gpu_capture import OWN, captured
from test_sample import SAMPLE, hard_rows

from kernels_numba import prebuild, simt, simt_threads, simt_warps
from kernels_numba.compiler import KernelsUnavailable
from kernels_numba.ops.sample import in_numpy as text
from kernels_numba.ops.sample import nucleus, warp
from kernels_numba.ops.sample.warp import Operands, Shape, Workspace, plan_sample
from kernels_numba.ops.warp.in_numpy import Arrays
from sharp.rungs import sample_rungs

LISTS = Shape(threads=64, capacity=128)
SHORT = Shape(threads=64, capacity=16)  # most borders do not fit: digit by digit


def parameters(rows, rng, cuts, hot=True):
    """temperatures, seeds, output_indices, top_ks, top_ps for rows of `cuts` in turn."""
    temperatures = rng.uniform(0.4, 2, rows) if hot else np.where(np.arange(rows) % 3, 0.8, 0)
    chosen = [cuts[row % len(cuts)] for row in range(rows)]
    return (
        temperatures.astype(np.float32), rng.integers(0, 2**64, rows, dtype=np.uint64),
        rng.integers(0, 1000, rows).astype(np.int32), np.array([k for k, _ in chosen], np.int32),
        np.array([p for _, p in chosen], np.float32),
    )  # fmt: skip


def sampled(logits, args, **how):
    out = np.full(len(logits), -7, np.int32)
    words = text.in_numpy(out, logits, *args, **how)
    return out, words


def ranks_of(logits):
    """uint64 ranks of f32[V], as nucleus.py says."""
    bits = (logits + np.float32(0)).view(np.uint32)  # -0 becomes 0
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    ids = np.arange(len(logits), dtype=np.uint64)
    return (keys << np.uint64(nucleus.ID_BITS)) | (np.uint64(nucleus.MAX_VOCAB - 1) - ids)


def cuts_are_right(words, logits, args, shape, rows=None):
    """Whether the ids that a workspace's bounds leave are the definition's, in each row that is cut."""
    at, parts = 0, warp._parts(len(logits), logits.shape[1], shape)
    for name in list(parts)[: list(parts).index("bounds")]:
        at += parts[name]
    bounds = words[at : at + 2 * len(logits)].view(np.uint64)
    temperatures, _, _, top_ks, top_ps = args
    for row, values in enumerate(logits[:rows]):
        top_k, top_p = int(top_ks[row]), top_ps[row]
        if temperatures[row] > 0 and (0 < top_k < len(values) or top_p < 1) and (values > -np.inf).any():
            weights = SAMPLE.weights_spec(values, temperatures[row])
            kept = SAMPLE.kept_spec(values, temperatures[row], top_k, top_p)
            mine = np.flatnonzero((ranks_of(values) >= bounds[row]) & (weights > 0))
            if not np.array_equal(mine, kept[weights[kept] > 0]):
                return False
    return True


def resting(words, rows, vocab, shape):
    """Whether a workspace is as the next launch must find it."""
    parts = warp._parts(rows, vocab, shape)
    return not words[: parts["counters"] + parts["numbers"] + parts["weights"]].any()


CUTS = [(2, 1.0), (0, 0.6), (40, 0.5), (300, 0.95), (0, 1.0), (0, 1e-6), (10_000, 0.999), (10_000, 1.0)]


@pytest.mark.parametrize("shape", [LISTS, SHORT], ids=["lists", "short"])
@pytest.mark.parametrize("vocab", [1100, 1027, 5])
def test_the_kernels_text_is_the_definition(shape, vocab):
    """Every id of hard rows, each under another cut; in 16-byte loads and in single ones, chunks of 1,024."""
    rng = np.random.default_rng([vocab, shape.capacity])
    logits = hard_rows(rng, vocab)
    turn = vocab % len(CUTS)
    args = parameters(len(logits), rng, CUTS[turn:] + CUTS[:turn])
    got, words = sampled(logits, args, shape=shape, seed=turn)
    np.testing.assert_array_equal(got, SAMPLE.sample_spec(logits, *args))
    assert cuts_are_right(words, logits, args, shape)
    assert resting(words, len(logits), vocab, shape)


@pytest.mark.parametrize(("kind", "how"), [
    ("ordinary", lambda rng, n: rng.standard_normal(n) * 3), ("flat", lambda rng, n: rng.random(n) * 0.01),
    ("coarse", lambda rng, n: np.round(rng.standard_normal(n) * 4) / 2),
])  # fmt: skip
def test_random_cuts(kind, how):
    """Both borders in one bin, in two, far apart; the seed is in the output."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed = {seed}")
    rng = np.random.default_rng(seed)
    logits = how(rng, (8, 1040)).astype(np.float32)
    cuts = [(int(rng.integers(0, 1200)), float(np.float32(rng.random()))) for _ in logits]
    args = parameters(len(logits), rng, cuts)
    got, words = sampled(logits, args, shape=LISTS, seed=seed % 1000)
    assert cuts_are_right(words, logits, args, LISTS), f"seed {seed}"
    np.testing.assert_array_equal(got, SAMPLE.sample_spec(logits, *args), f"seed {seed}")


def test_no_order_of_threads_and_no_neighbour_changes_an_id():
    rng = np.random.default_rng(11)
    logits = hard_rows(rng, 1064)[:6]
    args = parameters(6, rng, CUTS)
    first, words = sampled(logits, args, shape=LISTS, seed=0)
    for seed in range(1, 4):  # on the workspace as the last launch left it, with other numbers of blocks
        again, words = sampled(logits, args, shape=LISTS, seed=seed, sms=seed, words=words)
        np.testing.assert_array_equal(again, first)
    for row in range(6):
        alone, _ = sampled(logits[row : row + 1], [a[row : row + 1] for a in args], shape=LISTS, seed=row)
        assert alone[0] == first[row]


def test_rows_past_the_real_number_do_not_exist():
    """Their memory is not there to be read; out beyond keeps what it held."""
    rng = np.random.default_rng(12)
    logits = hard_rows(rng, 200)
    args = parameters(len(logits), rng, CUTS)
    got, words = sampled(logits, args, real_rows=4)
    np.testing.assert_array_equal(got[:4], SAMPLE.sample_spec(logits, *args)[:4])
    assert (got[4:] == -7).all()
    assert resting(words, len(logits), 200, text.SMALL)
    got, _ = sampled(logits, args, real_rows=0)
    assert (got == -7).all()


def test_rows_may_be_cut_from_wider_ones_and_be_greedy():
    rng = np.random.default_rng(13)
    wide = rng.standard_normal((5, 131)).astype(np.float32)
    args = parameters(5, rng, [(3, 0.9), (0, 0.7)], hot=False)
    for logits in (wide[:, :101], wide[:, 1:129]):
        got, _ = sampled(logits, args)
        np.testing.assert_array_equal(got, SAMPLE.sample_spec(logits, *args))


def test_more_rows_than_threads_are_listed():
    rng = np.random.default_rng(14)
    logits = rng.standard_normal((67, 8)).astype(np.float32)
    args = parameters(67, rng, [(3, 0.9), (0, 1.0), (0, 0.7)])
    got, _ = sampled(logits, args, sms=1)
    np.testing.assert_array_equal(got, SAMPLE.sample_spec(logits, *args))


MUTANTS = [
    ("", "", ""),  # none: it is the changes that are noticed
    ("nucleus", "id_bits) | np.uint64(last - np.uint64(token_id))", "id_bits) | np.uint64(token_id)"),
    ("nucleus", "        if bits == sign:\n            bits = nothing\n", ""),
    ("plain", "(other == score and other_id < token_id)", "(other == score and other_id > token_id)"),
    ("plain", "rank_of(value, token_id) >= bound", "rank_of(value, token_id) > bound"),
    ("plain", "words[i])", "words[0])"),
    ("warp_tools", "                st_global_b32(counter, 0)\n", ""),
    ("survey", "        if num_rows == 0 or row <", "        if num_rows == 0 or row <="),
    ("cut", "                        st_global_b32(listed, 0)\n", "                        pass\n"),
    ("cut", "last = np.int32(start + k_need - 1)", "last = np.int32(start + k_need)"),
    ("cut", "total = np.uint64(total + s_answer[2])", "total = np.uint64(total)"),
    ("cut", "least = np.uint64(most - s_values[k_bin])", "least = most"),
    ("cut", "need = np.uint64(share(total, top_p) - before)", "need = share(total, top_p)"),
    ("cut", "cross(s_values, s_groups, s_answer, thread, share(most, top_p))", "pass"),
    ("cut", "np.uint64(np.uint64(s_high[b]) << half)", "np.uint64(s_high[b])"),
    ("cut", "                        store_u64(where, none)\n", ""),
    ("cut", "== (np.int32(i & size) == 0)", "== (np.int32(i & apart) == 0)"),
    # barriers that are missing, or that not all threads come to
    ("nucleus", "s_groups[group] = total\n        cuda.syncthreads()\n", "s_groups[group] = total\n"),
    ("cut", "                cuda.syncthreads()\n                apart =", "                apart ="),
    ("warp_tools", "s_flag[0] = last\n        cuda", "s_flag[0] = last\n            cuda"),
    (
        "warp_tools",
        "        cuda.syncthreads()\n        if thread < np.int32(WARP):",
        "        if thread < WARP:",
    ),
]


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_a_changed_text_is_noticed(number):
    """The tests above can fail: each changed line gives another id, or leaves the workspace in disorder."""
    module, old, new = MUTANTS[number]
    found = []

    def change(name, source):
        if module and name.endswith(f".{module}") and old in source:
            found.append(name)
            return source.replace(old, new)
        return source

    rng = np.random.default_rng(15)
    logits = np.concatenate([hard_rows(rng, 1040)[[0, 1, 5, 7]], rng.standard_normal((3, 1040)) * 2])
    logits = np.round(logits * 16).astype(np.float32) / np.float32(16)
    args = parameters(len(logits), rng, [(40, 0.9), (0, 0.6), (3, 0.5), (500, 0.95), (200, 1.0)])
    args[0][1] = 0  # greedy, all logits equal
    try:
        got, words = sampled(logits, args, shape=LISTS, change=change, real_rows=6)
        right = (got[:6] == SAMPLE.sample_spec(logits, *args)[:6]).all() and got[6] == -7
        right = right and cuts_are_right(words, logits, args, LISTS, 6)
        right = right and resting(words, len(logits), 1040, LISTS)
    except (IndexError, RuntimeError, FloatingPointError, RuntimeWarning):
        right = False
    assert found or not module, "the text has no such line"
    assert right == (not module)


def test_shares_and_weights_are_the_definitions():
    """The device functions' text, in Python."""
    block = simt_threads.ThreadBlock(simt.Memory(), 32, 1, np.random.default_rng(0))
    module = simt_warps.link(block, (f"{text.PACKAGE}.nucleus",), lambda name, source: source)
    share, fixed, rng = module["make_share"](), module["make_fixed"](), np.random.default_rng(16)
    for total in (nucleus.ONE, nucleus.ONE + 1, (1 << 60) - 1, *rng.integers(1 << 36, 1 << 60, 50).tolist()):
        for top_p in np.float32([0, -1, 1e-30, 1e-9, 0.1, 0.5, 0.9, 0.99999994, rng.random()]):
            assert share(np.uint64(total), top_p) == nucleus.share_spec(total, top_p)
    steps = rng.integers(0, nucleus.OCTAVES << nucleus.Y_BITS, 500).tolist()
    steps += [0, 1, (1 << nucleus.Y_BITS) - 1, 1 << nucleus.Y_BITS, nucleus.OCTAVES << nucleus.Y_BITS]
    wanted = nucleus.fixed_spec(np.array(steps, np.uint32))
    assert [int(fixed(np.int32(step))) for step in steps] == wanted.tolist()


# The door.


def views(rows=3, vocab=40, **changes):
    """Operands that lie nowhere, but for what changes."""
    arrays = Arrays()
    made = {
        "out": np.zeros(rows, np.int32), "logits": np.zeros((rows, vocab), np.float32),
        "temperatures": np.zeros(rows, np.float32), "seeds": np.zeros(rows, np.uint64),
        "output_indices": np.zeros(rows, np.int32), "top_ks": np.zeros(rows, np.int32),
        "top_ps": np.ones(rows, np.float32), "num_rows": None,
    }  # fmt: skip
    if "words" not in changes:
        made["words"] = np.zeros(Workspace.num_words(max(rows, 1), vocab), np.int32)
    made["words"] = changes.pop("words", made.get("words"))
    made = {name: changes.pop(name, array) for name, array in made.items()}
    found = {name: None if array is None else arrays.view(array) for name, array in made.items()}
    sizes = {"workspace_rows": max(rows, 1), "workspace_vocab": vocab, **changes}
    return Operands(**found, **sizes)


@pytest.mark.parametrize(("changes", "told"), [
    ({"logits": np.zeros((3, 40), np.float64)}, "logits has dtype float64; float32"),
    ({"out": np.zeros(2, np.int32)}, r"out has shape \(2,\); \(3\)"),
    ({"top_ks": np.zeros(3, np.int64)}, "top_ks has dtype int64; int32"),
    ({"top_ps": np.zeros((3, 1), np.float32)}, "top_ps has shape"),
    ({"num_rows": np.zeros(2, np.int32)}, "num_rows has shape"),
    ({"words": np.zeros(8, np.int32)}, "workspace has shape"),
    ({"rows": warp.MAX_ROWS + 1, "vocab": 4, "words": np.zeros(Workspace.num_words(1, 4), np.int32),
      "workspace_rows": 1}, "logits has 4,097 rows; at most 4,096"),
    ({"words": np.zeros(Workspace.num_words(2, 40), np.int32), "workspace_rows": 2},
     "workspace is for 2 rows of 40 ids; one for 3 of 40"),
])  # fmt: skip
def test_what_it_cannot_take_is_named(changes, told):
    with pytest.raises(ValueError, match=f"sample: {told}"):
        plan_sample(views(**changes), 4)


def test_launches_are_sized_by_the_arrays():
    assert plan_sample(views(rows=0), 4) == ()
    plans = plan_sample(views(rows=3, vocab=20_000), 4)
    assert [plan.grid for plan in plans] == [9, 8, 8, 8]
    assert [plan.kernel.name for plan in plans] == [
        f"sample_{step}_v4" for step in ("survey", "weigh", "gather", "draw")
    ]
    assert plan_sample(views(vocab=41), 4)[0].kernel.name == "sample_survey_v1"
    with pytest.raises(ValueError, match="0 rows of 8 ids; 1 to 4,096 rows"):
        Workspace.num_words(0, 8)
    assert 4 * Workspace.num_words(256, 151_936) < 6.5 * 2**20


def test_without_a_compiler_the_rung_says_so(on_gpu):
    if on_gpu:
        pytest.skip("there is one")
    with pytest.raises(KernelsUnavailable, match="rung warp is made of PTX instructions"):
        SAMPLE.rungs["warp"](*(np.zeros((1, 4), np.float32),) * 7)


def test_an_engine_takes_it_where_it_runs():
    assert sample_rungs("plain", (9, 0), {}) == sample_rungs("plain", (8, 6), {}) == {"sample": "warp"}
    assert sample_rungs("plain", (9, 0), {"sample": "plain"}) == sample_rungs("reference", None, {}) == {}
    assert sample_rungs("plain", (7, 5), {}) == sample_rungs("plain", None, {}) == {}
    with pytest.raises(ValueError, match=r"rung 'warp' of sample .* 8\.0 or newer, here is no GPU"):
        sample_rungs("plain", None, {"sample": "warp"})


# What they become.

COMPILE = """
import json
from kernels_numba.assemble import assemble_kernel
from kernels_numba.ops.sample import warp
reports = [assemble_kernel(kernel, arch) for kernel in warp.kernels() for arch in ("sm_90a",)]
print(json.dumps([(r.name, r.arch, r.registers, r.problems, r.instructions) for r in reports]))
"""
REGISTERS = {"survey": 64, "weigh": 128, "gather": 128, "draw": 80}


def test_every_kernel_stays_in_registers_and_loads_wide():
    """On Hopper; test_assemble.py assembles all of them for all targets."""
    rows = json.loads(no_simulator.last_line(COMPILE))
    assert len(rows) == 8
    for name, arch, registers, problems, instructions in rows:
        assert problems == [], (name, arch)
        assert registers <= REGISTERS[name.split("_")[1]], (name, arch, registers)
        assert not {"LDL", "STL"} & set(instructions), (name, arch)


def test_they_are_built_ahead():
    names = [name for name in prebuild.kernel_modules() if ".sample" in name]
    assert names == ["kernels_numba.ops.sample.warp"]
    for arch, there in (("sm_80", 8), ("sm_120", 8), ("sm_75", 0)):
        assert len(list(prebuild.fitting(names, arch))) == there


# On a GPU.


@pytest.fixture
def cuda(gpu_where):
    return gpu_where(lambda have: have >= (8, 0), "8.0")


class OnGpu:
    """Copies of a call's arrays on the device, in a bucket of more rows if wanted, which hold what must not
    be read."""

    def __init__(self, cuda, logits, args, bucket=None):
        self.cuda, self.rows = cuda, len(logits)
        more = 0 if bucket is None else bucket - self.rows
        self.num_rows = None if bucket is None else cuda.to_device(np.array([self.rows], np.int32))

        def upload(array):
            fill = np.full((more, *array.shape[1:]), 3, array.dtype)
            return cuda.to_device(np.concatenate([array, fill]))

        self.out, self.args = upload(np.full(self.rows, -7, np.int32)), [upload(a) for a in (logits, *args)]
        self.workspace = Workspace.of(self.rows + more, logits.shape[1])

    def launch(self, stream=None, rung="warp"):
        how = {"num_rows": self.num_rows, "workspace": self.workspace} if rung == "warp" else {}
        SAMPLE.rungs[rung](self.out, *self.args, stream=stream, **how)

    def ids(self):
        self.cuda.synchronize()
        out = self.out.copy_to_host()
        assert (out[self.rows :] == 3).all()
        return out[: self.rows]

    def run(self, rung="warp"):
        self.launch(rung=rung)
        return self.ids()


def real_rows(rng, vocab, count=40):
    """Hard rows, and ordinary ones of several widths, with cuts."""
    scales = rng.uniform(0.05, 6, count)[:, None]
    logits = np.concatenate([hard_rows(rng, vocab), rng.standard_normal((count, vocab)) * scales])
    cuts = [*CUTS, (1, 1.0), (50, 0.95), (20, 0.8), (5000, 0.99), (0, 0.9)]
    args = parameters(len(logits), rng, cuts)
    args[0][::7] = 0
    return logits.astype(np.float32), args


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [7, 8192, 49_152, 128_256, 151_936, 151_937])
def test_warp_ids_against_the_definition(cuda, vocab):
    """Float32 logarithms of two libraries may order near ties of the noise otherwise: test_ops's rule. The
    cuts themselves are in integers: as on the host, to the last id."""
    from test_ops import check_samples

    from kernels_numba.inputs import Call

    rng = np.random.default_rng([vocab, 3])
    logits, args = real_rows(rng, vocab)
    gpu = OnGpu(cuda, logits, args)
    got = gpu.run()
    names = ("temperatures", "seeds", "output_indices", "top_ks", "top_ps")
    check_samples(Call("sample", {"logits": logits, **dict(zip(names, args, strict=True))}, ("out",)), got)
    words = gpu.workspace.words.copy_to_host()
    assert cuts_are_right(words, logits, args, warp.PRODUCT)
    assert resting(words, len(logits), vocab, warp.PRODUCT)
    np.testing.assert_array_equal(OnGpu(cuda, logits, args).run("plain"), got)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [49_152, 151_936])
def test_warp_ids_are_the_same_in_any_batch(cuda, vocab):
    rng = np.random.default_rng([vocab, 4])
    logits, args = real_rows(rng, vocab)
    together = OnGpu(cuda, logits, args)
    first = together.run()
    for _ in range(20):
        np.testing.assert_array_equal(together.run(), first)
    for bucket in (len(logits), 64, 256):
        np.testing.assert_array_equal(OnGpu(cuda, logits, args, bucket).run(), first)
    for row in range(0, len(logits), 5):
        one = slice(row, row + 1)
        assert OnGpu(cuda, logits[one], [a[one] for a in args]).run()[0] == first[row]


@pytest.mark.gpu
def test_warp_draws_follow_the_truncated_softmax(cuda):
    from test_sample import LOGITS, chi_squared, truncated

    count = 4096
    rows = np.broadcast_to(np.asarray(LOGITS, np.float32), (count, len(LOGITS))).copy()
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.86), (7, 0.93)):
        args = (
            np.full(count, 0.9, np.float32), np.arange(count, dtype=np.uint64),
            np.zeros(count, np.int32), np.full(count, top_k, np.int32), np.full(count, top_p, np.float32),
        )  # fmt: skip
        ids = OnGpu(cuda, rows, args).run()
        assert chi_squared(ids, truncated(LOGITS, 0.9, top_k, top_p)) < 32


@pytest.mark.gpu
def test_warp_sampling_is_captured_and_reads_the_rows_of_its_replay(cuda):
    """One graph, replayed with other numbers of rows and other cuts in the same bucket; it allocates
    nothing."""
    rng = np.random.default_rng(5)
    logits, args = real_rows(rng, 49_152)
    whole = OnGpu(cuda, logits, args).run()
    gpu = OnGpu(cuda, logits, args, 64)
    stream = cuda.stream()
    gpu.num_rows.copy_to_device(np.array([0], np.int32))
    cuda.synchronize()
    gpu.launch(stream)  # prepared and loaded before the capture; no row is written
    stream.synchronize()
    assert (gpu.out.copy_to_host()[: gpu.rows] == -7).all()
    free = cuda.current_context().get_memory_info().free
    replay = captured(stream, lambda: gpu.launch(stream))
    greedy = args[0].copy()
    for rows, temperatures in ((gpu.rows, args[0]), (11, args[0]), (gpu.rows, 0 * greedy), (30, greedy)):
        gpu.out.copy_to_device(np.where(np.arange(64) < gpu.rows, -7, 3).astype(np.int32))
        gpu.num_rows.copy_to_device(np.array([rows], np.int32))
        padded = np.concatenate([temperatures, np.full(64 - gpu.rows, 3, np.float32)]).astype(np.float32)
        gpu.args[1].copy_to_device(padded)
        cuda.synchronize()
        replay()
        stream.synchronize()
        got = gpu.ids()
        alone = (temperatures, *args[1:])
        wanted = whole if temperatures is args[0] else OnGpu(cuda, logits, alone).run()
        np.testing.assert_array_equal(got[:rows], wanted[:rows])
        assert (got[rows:] == -7).all()
    assert free - cuda.current_context().get_memory_info().free <= OWN
