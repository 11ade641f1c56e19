"""What the engine's loop takes of the host in a step: `python tests/host_times.py`.

Microseconds of processor time of the engine's thread, least of 5 rounds of 400 steps in which all sequences
decode, over a device that takes no time (paced_driver.py): the engine and its runtime without the driver's
calls. With one final output each, as LLM.generate asks for them, and with one for every token.
"""

from __future__ import annotations

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import threading
import time
from queue import SimpleQueue

import paced_driver

from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.random_model import IdTokenizer
from sharp.request import SamplingParams
from sharp.stall import Borrowed

STEPS, ROUNDS, PROMPT = 400, 5, 64


def measure(model: paced_driver.PacedModel, num_seqs: int, *, final_only: bool) -> float:
    """Microseconds a step."""
    config = EngineConfig(max_num_batched_tokens=16_384, max_num_seqs=256, prefix_caching=False)
    params = SamplingParams(max_tokens=(ROUNDS + 1) * STEPS, temperature=0.0, ignore_eos=True)
    engine, found = Engine(Borrowed(model), IdTokenizer(), config), []
    for number in range(num_seqs):
        request = engine.make_request([1] * PROMPT, params, str(number))
        engine.submit(request, SimpleQueue(), final_only=final_only)

    def work() -> None:
        for _ in range(ROUNDS):
            start = time.thread_time()
            for _ in range(STEPS):
                engine.step()
            found.append((time.thread_time() - start) / STEPS)

    thread = threading.Thread(target=work)  # as the engine's own: no Ctrl-C to hold back
    thread.start()
    thread.join()
    engine.close()
    return 1e6 * min(found)


if __name__ == "__main__":
    paced_driver.install()
    made = paced_driver.PacedModel(max_tokens=16_384, scale=0.0)
    made.capture()
    for seqs in (1, 16, 64, 256):
        final, each = (measure(made, seqs, final_only=only) for only in (True, False))
        print(f"{seqs:4} decodes: {final:6.0f} us a step; {each:6.0f} with an output for every token")
