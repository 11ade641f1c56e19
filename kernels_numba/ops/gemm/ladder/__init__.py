"""The steps from a GEMM anybody would write to the one in hopper.py, each the one before plus one idea.

naive.py: a thread an output, all from global memory. (Then ../__init__.py, rung "plain": tiles in shared
memory.) mma_step.py: tensor cores, a warp at a time, loads in the background. wgmma.py: tensor cores a
warpgroup at a time, fed by TMA. (Then ../hopper.py, rung "hopper": who loads never multiplies, and blocks
live on.) notebooks/02_tensor_cores.py walks up. door.py checks what the tensor-core steps are given.
"""
