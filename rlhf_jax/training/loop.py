"""A thin host loop around a pure step: checkpoints, clean interruption, progress. It knows no algorithm.

The step index is the number of completed steps before it, so a state saved under n is the input of step n, and a
resumed run calls `run` with ``range(n, total)``.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Interrupted", "StopRequest", "run", "stop_on_signals"]

State = TypeVar("State")


class Interrupted(Exception):
    """The loop ended at a signal, after completing and saving a step.

    Attributes:
      step: number of completed steps, the index to resume from.
      saved: whether the state was saved under it.
    """

    def __init__(self, step: int, *, saved: bool) -> None:
        super().__init__(f"stopped after step {step}" + (", which is saved" if saved else ""))
        self.step = step
        self.saved = saved


class StopRequest:
    """Whether somebody asked the loop to stop; set by a signal, or by hand with `ask`."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """Asks the loop to stop after the current step."""
        self.asked = True


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT (Ctrl-C) or SIGTERM inside the block into a request to stop after the current step.

    The second one acts as it did before the block, so that an impatient Ctrl-C ends the program at once. The block may
    span several loops; a request made between two of them stops the next one before its first step. Outside the main
    thread, where Python handles no signals, the request can only be made by hand.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            if handler is not None:  # None: installed by something other than Python, which cannot put it back
                signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        request.ask()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield request
    finally:
        restore()


def run(
    step: Callable[[State, int], tuple[State, Any]],
    state: State,
    steps: range,
    *,
    save: Callable[[int, State], None] | None = None,
    save_every: int = 0,
    on_step: Callable[[int, Any], None] | None = None,
    stop: StopRequest | None = None,
) -> State:
    """Calls ``state, metrics = step(state, index)`` for every index and returns the last state.

    Resuming from any saved state equals running straight through, if ``step`` is a function of its arguments.

    Args:
      step: one update; jitted by the caller, with its own batch fetching and keys folded from the index.
      state: the state before the first index.
      steps: indices to run, ``range(completed, total)``.
      save: called as ``save(completed, state)``; a checkpoint of the whole run.
      save_every: saves whenever this many steps are completed, counted from 0, and after the last; 0 saves on
        interruption alone.
      on_step: called as ``on_step(completed, metrics)`` after each step and before its save; metrics are still on the
        device unless ``step`` fetched them.
      stop: request made elsewhere, from `stop_on_signals` around several loops; by default this loop watches for
        signals itself.
    Returns:
      The state after the last step.
    Raises:
      Interrupted: a stop was asked for; the step then running was completed and saved first. Asked before the first
        step, nothing is saved, since nothing was done.
      ValueError: save_every without save, or steps that do not count up by one.

    >>> run(lambda total, index: (total + index, None), 0, range(4), on_step=lambda done, _: print(done, end=" "))
    1 2 3 4 6
    """
    if steps.step != 1:
        raise ValueError(f"steps must count up by one, got {steps}")
    if save_every < 0 or (save_every and save is None):
        raise ValueError(f"save_every needs a save function and must not be negative, got {save_every}")
    with contextlib.nullcontext(stop) if stop is not None else stop_on_signals() as request:
        if request.asked:
            raise Interrupted(steps.start, saved=False)
        for index in steps:
            state, metrics = step(state, index)
            done = index + 1
            if on_step is not None:
                on_step(done, metrics)
            due = bool(save_every) and (done % save_every == 0 or done == steps.stop)
            if save is not None and (due or request.asked):
                save(done, state)
            if request.asked:
                raise Interrupted(done, saved=save is not None)
    return state
