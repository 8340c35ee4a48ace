"""Moving pictures of play: what a policy does in one episode, as an animated GIF (Pillow)."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from rlhf_jax import environments
from rlhf_jax.environments import Environment
from rlhf_jax.errors import missing_extra

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["board_frame", "cart_pole_frame", "episode_observations", "gif"]

_COLOURS = np.array([[31, 102, 177], [230, 160, 40], [185, 190, 198], [185, 80, 26]], np.uint8)  # of a board's planes


def episode_observations(
    game: Environment, policy: Callable[[Any], environments.Policy], params: Any, key: Array, *, steps: int
) -> list[np.ndarray]:
    """[T, ...] what each of N policies saw in one episode, at most `steps` long, its last outcome included.

    Args:
      game: the environment; the episodes begin alike.
      policy: of parameters.
      params: of the policies; every leaf has the leading axis N.
      key: consumed.
      steps: the longest clip.
    """
    reset_key, act_key = jax.random.split(key)
    begin = environments.reset(game, reset_key, batch=1)
    run = jax.vmap(lambda params: environments.rollout(game, policy(params), begin, act_key, steps=steps)[1])
    play = jax.device_get(jax.jit(run)(params))
    episodes = []
    for seen, outcomes, ended in zip(play.observations, play.outcomes, play.terminated | play.truncated, strict=True):
        ends = np.flatnonzero(ended[0])
        length = int(ends[0]) + 1 if len(ends) else steps
        episodes.append(np.concatenate([seen[0, :length], outcomes[0, length - 1 : length]]))
    return episodes


def board_frame(observation: np.ndarray, *, square: int = 16) -> "Image":
    """A board [H, W, C <= 4] of 0 and 1: one colour per plane, the last plane on top."""
    picture = np.full((*observation.shape[:2], 3), 20, np.uint8)
    for plane in range(observation.shape[-1]):
        picture[observation[..., plane] > 0.5] = _COLOURS[plane]
    return _pillow().fromarray(picture.repeat(square, axis=0).repeat(square, axis=1))


def cart_pole_frame(observation: np.ndarray, *, width: int = 320) -> "Image":
    """CartPole's observation: cart position in [-2.4, 2.4] and the pole's angle in radians."""
    picture = _pillow().new("RGB", (width, width // 2), (246, 246, 244))
    from PIL import ImageDraw

    draw, place, angle = ImageDraw.Draw(picture), float(observation[0]), float(observation[2])
    x, y, pole = width / 2 + place / 4.8 * width, 0.4 * width, 0.3 * width
    draw.line([(0, y + 8), (width, y + 8)], fill=(138, 144, 153), width=1)
    draw.rectangle([x - 20, y - 8, x + 20, y + 8], fill=(31, 102, 177))
    draw.line([(x, y - 8), (x + pole * np.sin(angle), y - 8 - pole * np.cos(angle))], fill=(185, 80, 26), width=6)
    return picture


def gif(
    observations: Sequence[np.ndarray] | np.ndarray,
    frame: Callable[[np.ndarray], "Image"],
    *,
    most: int = 100,
    milliseconds: int = 50,
) -> bytes:
    """An animated GIF of observations; of more than `most` every k-th is shown, so that the file stays small."""
    every = -(-len(observations) // most)
    frames = [frame(x).quantize(16) for x in observations[::every]]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return file.getvalue()


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "quickstart", "draw clips of play") from error
    return Image
