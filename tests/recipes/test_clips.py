"""Clips of play: an episode ends where it ends, frames show what is there, GIFs can be read back."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.environments import Environment, Step
from rlhf_jax.quickstart.report import Clip, Report, render
from rlhf_jax.recipes import clips

Image = pytest.importorskip("PIL.Image")


def counter():
    def step(key, state, action):
        new = state + action
        ended = new >= 3
        after = jnp.where(ended, 0.0, new)
        return Step(after, after[None], new[None], jnp.float32(1), ended, ended & False)

    return Environment(lambda key: (jnp.float32(0), jnp.zeros(1)), step, 2, (1,), 10)


def test_an_episode_is_shown_to_its_last_outcome(key):
    walk = lambda pace: lambda key, seen: jnp.full(seen.shape[0], pace)
    seen = lambda steps: clips.episode_observations(counter(), walk, jnp.array([1, 3]), key, steps=steps)
    assert [episode[:, 0].tolist() for episode in seen(8)] == [[0, 1, 2, 3], [0, 3]]
    assert [episode[:, 0].tolist() for episode in seen(2)] == [[0, 1, 2], [0, 3]]


def test_a_board_shows_each_plane_in_its_colour_and_the_last_on_top():
    board = np.zeros((2, 2, 4))
    board[0, 0, 0] = board[0, 1, 3] = board[0, 1, 0] = 1
    pixels = np.asarray(clips.board_frame(board, square=2))
    assert pixels.shape == (4, 4, 3)
    assert pixels[0, 0].tolist() == [31, 102, 177]
    assert pixels[1, 3].tolist() == [185, 80, 26]
    assert pixels[3, 0].tolist() == [20, 20, 20]


def test_the_pole_leans_where_the_angle_says():
    left, right = (np.asarray(clips.cart_pole_frame(np.array([0, 0, angle, 0]))) for angle in (-0.5, 0.5))
    orange = lambda picture: np.argwhere((picture == [185, 80, 26]).all(-1))[:, 1].mean()
    assert orange(left) < 160 < orange(right)


def test_a_gif_holds_at_most_so_many_frames_and_stands_in_the_report():
    boards = np.eye(50)[:, None, :, None] * np.ones((1, 3, 1, 1))
    data = clips.gif(boards, clips.board_frame, most=20)
    assert Image.open(io.BytesIO(data)).n_frames == 17  # every third of 50
    page = render(Report(title="t", clips=[Clip("before & after", data, "a note")]))
    assert "data:image/gif;base64,R0lGOD" in page
    assert "before &amp; after" in page
