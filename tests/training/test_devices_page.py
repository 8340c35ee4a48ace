"""The example of docs/devices.md runs, and its two ways end in the same parameters."""

import pathlib
import re

import jax
import numpy as np
from flax import jax_utils

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")


def test_a_mesh_and_pmap_take_the_same_step():
    scope = {}
    exec(re.findall(r"(?ms)^```python\n(.*?)^```", TEXT)[0], scope)
    mapped = jax_utils.unreplicate(scope["copies"]).params
    start = scope["params"]
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), start, scope["placed"].params)
    assert min(jax.tree.leaves(moved)) > 1e-4
    # A hundredth of Adam's step of 1e-3: it divides by the gradient's size, so rounding counts where that is small.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), scope["placed"].params, mapped)
    for name, value in scope["metrics"].items():
        np.testing.assert_allclose(value, scope["same_metrics"][name][0], rtol=1e-5, atol=1e-7)
