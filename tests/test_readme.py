"""What the README shows works as shown."""

import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_learns_from_a_human_score():
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", README)
    names: dict = {}
    exec(code, names)
    policy = lambda params, tokens: jnp.take_along_axis(
        jax.nn.log_softmax(jnp.broadcast_to(params, (*tokens.shape, 3))), tokens[..., None], -1
    )[..., 0]
    params, tokens = jnp.zeros(3), jnp.array([[0, 1], [2, 2]])
    mask = jnp.array([[True, True], [True, False]])
    old = policy(params, tokens)
    adv, returns = names["experience"](jnp.array([1.0, -1.0]), old, old, jnp.zeros((2, 2)), mask, 0.1)
    assert returns.shape == (2, 2)
    batch = {"tokens": tokens, "mask": mask, "old": old, "adv": adv}
    gradient = names["step"](params, policy=policy, batch=batch, clip=0.2)[1]
    assert gradient[0] < 0 < gradient[2]  # liked tokens become more likely, disliked ones less
    swept = names["sweep"](params, policy, batch, jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(swept, names["loss"](params, policy, batch, 0.2), rtol=1e-6)  # ratio 1: no clip yet


def test_the_commands_install_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"'\.\[([a-z,]+)\]'", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    assert {extra for group in named for extra in group.split(",")} <= set(extras)


def test_the_table_names_modules_that_exist():
    for path in re.findall(r"^\| `(rlhf_jax[a-z_.]*)`", README, re.M):
        place = ROOT / path.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), path
