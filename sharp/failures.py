"""Which errors end a step, and which end the engine. Decided here and nowhere else.

A step fails alone if the model raised, in launch() or land(), an error that says what could not be done this
time: a RuntimeError (a launch that the driver refuses, CudaError among them), a FloatingPointError (logits
that are not finite) or a MemoryError. Its requests are told; what they may have left behind is taken back,
and others go on. All else ends the engine: an error of the scheduler or of a text, for then lengths, pages
and texts may disagree; a TypeError, ValueError, AssertionError or the like of the model, which are mistakes
in a program and come again; what is no Exception; and any error after which the CUDA context is of no use (a
sticky one). Refuses to know what a step computes.
"""

from __future__ import annotations

from sharp import driver
from sharp.plan import BatchPlan

STEP_ERRORS = (RuntimeError, FloatingPointError, MemoryError)
MISTAKES = (NotImplementedError, RecursionError)  # RuntimeErrors that are none of these
NAMES = 6  # requests that a message names; of more, the number


class StepFailed(RuntimeError):
    """A step could not be computed (its __cause__ says why): its requests have ended, the engine goes on."""

    def __init__(self, plan: BatchPlan, error: BaseException) -> None:
        more = plan.num_seqs - NAMES
        names = ", ".join(plan.request_ids[:NAMES]) + (f" and {more} more" if more > 0 else "")
        super().__init__(
            f"step {plan.step} ({plan.num_tokens} tokens of {names}) failed: {type(error).__name__}: {error}"
        )
        self.step = plan.step
        self.__cause__ = error


def ends_the_step_only(error: BaseException) -> bool:
    """Whether an error that a model raised leaves the engine alive."""
    could_not = isinstance(error, STEP_ERRORS) and not isinstance(error, MISTAKES)
    return could_not and driver.poisoned() is None
