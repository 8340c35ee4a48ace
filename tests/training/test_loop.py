"""loop.py: saves when it should, stops where it should, and resumes to the same numbers."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.loop import Interrupted, StopRequest, run, stop_on_signals


def add(state, index):
    return [*state, index], {"index": index}


def test_steps_callbacks_and_saves_come_in_order():
    events = []
    final = run(
        add,
        [],
        range(2, 7),
        save=lambda done, state: events.append(("save", done, len(state))),
        save_every=2,
        on_step=lambda done, metrics: events.append(("step", done, metrics["index"])),
    )
    assert final == [2, 3, 4, 5, 6]
    assert events == [
        ("step", 3, 2),
        ("step", 4, 3),
        ("save", 4, 2),
        ("step", 5, 4),
        ("step", 6, 5),
        ("save", 6, 4),
        ("step", 7, 6),
        ("save", 7, 5),
    ]


def test_no_steps_are_no_steps():
    assert run(add, ["kept"], range(5, 5), save=lambda *_: pytest.fail("nothing to save"), save_every=1) == ["kept"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("save_every", [0, 1, 2])
def test_a_signal_ends_the_loop_after_the_step_and_its_save(number, save_every):
    before = signal.getsignal(number)
    saved, seen = [], []

    def step(state, index):
        if index == 2:
            os.kill(os.getpid(), number)
        return add(state, index)

    save, watch = lambda *args: saved.append(args), lambda *args: seen.append(args)
    with pytest.raises(Interrupted, match="stopped after step 3, which is saved") as stop:
        run(step, [], range(10), save=save, save_every=save_every, on_step=watch)
    assert (stop.value.step, stop.value.saved) == (3, True)
    assert saved[-1] == (3, [0, 1, 2])
    assert [done for done, _ in saved].count(3) == 1
    assert seen[-1][0] == 3
    assert signal.getsignal(number) is before


def test_a_signal_in_the_last_step_is_not_lost():
    def step(state, index):
        signal.raise_signal(signal.SIGINT)
        return add(state, index)

    with pytest.raises(Interrupted) as stop:
        run(step, [], range(1))
    assert (stop.value.step, stop.value.saved) == (1, False)


def test_the_second_ctrl_c_acts_at_once():
    def step(state, index):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal should have ended the step")

    with pytest.raises(KeyboardInterrupt):
        run(step, [], range(3))


def test_one_request_spans_several_loops():
    saved = []
    with stop_on_signals() as stop:
        state = run(add, [], range(2), stop=stop)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted) as interruption:
            run(add, state, range(2, 4), stop=stop, save=lambda *s: saved.append(s), save_every=1)
    assert (interruption.value.step, interruption.value.saved, saved) == (2, False, [])


def test_a_request_by_hand():
    stop = StopRequest()
    with pytest.raises(Interrupted) as interruption:
        run(add, [], range(9), stop=stop, on_step=lambda done, _: stop.ask() if done == 4 else None)
    assert interruption.value.step == 4


def test_it_runs_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(add, [], range(3))))
    thread.start()
    thread.join()
    assert results == [[0, 1, 2]]


def test_an_error_in_a_step_passes_through_and_signals_are_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        run(lambda state, index: 1 // 0, [], range(3))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("interrupt_at", [1, 4, 5])
def test_interrupted_and_resumed_equals_straight_through(tmp_path, interrupt_at):
    @jax.jit
    def update(state, index):
        noise = jax.random.normal(jax.random.fold_in(state["key"], index), state["w"].shape)
        return {"w": state["w"] * 0.9 + noise, "key": state["key"]}, {"norm": jnp.linalg.norm(state["w"])}

    def fresh():
        return {"w": jnp.zeros(3), "key": jax.random.key(0)}

    straight = run(update, fresh(), range(8))
    with Checkpoints(tmp_path) as checkpoints:
        stop = StopRequest()
        with pytest.raises(Interrupted):
            run(
                update,
                fresh(),
                range(8),
                save=checkpoints.save,
                save_every=2,
                stop=stop,
                on_step=lambda done, _: stop.ask() if done == interrupt_at else None,
            )
        restored = checkpoints.restore(fresh())
        assert restored.step == interrupt_at
        resumed = run(update, restored.state, range(restored.step, 8), save=checkpoints.save, save_every=2)
        assert checkpoints.latest() == 8
    assert resumed["w"].tolist() == straight["w"].tolist()


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        (range(0, 4, 2), {}, "count up by one"),
        (range(4), {"save_every": 2}, "needs a save function"),
        (range(4), {"save_every": -1, "save": print}, "must not be negative, got -1"),
    ],
)
def test_mistakes_are_named(steps, options, words):
    with pytest.raises(ValueError, match=words):
        run(add, [], steps, **options)
