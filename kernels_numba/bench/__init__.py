"""Times kernels beside a baseline: in one process, in turns, from captured graphs, and only if right.

    cases.py       what each op is measured on        ops.py     one entry an op: arguments, cost
    data.py        random numbers on the device       entry.py   how a result is checked, part by part
    errors.py      what counts as right               timing.py  turns, medians, calls a replay
    gpu.py         streams, graphs, events            peers.py   datasheets, and figures of others
    torch_side.py  the baseline
    contest.py     all of it together: `measure` is what a sweep over configurations calls
    tune_gemm.py   such a sweep: the tiles of the GEMM
    tune_mma.py    the same of the mma.sync GEMM, beside cuBLAS
    tune_decode.py what a fixed split costs a decode, and how fast the card reads

A graph holds calls over several sets of buffers, which together touch more than L2 holds (cold), or over one
(warm). Times are medians of rounds, in which each contender has one turn. Knows: how to measure. Refuses to
know: how a measurement is recorded (sharp/bench.py does that). Importing this package imports none of them.
"""
