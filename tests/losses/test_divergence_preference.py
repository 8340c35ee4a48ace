"""The scores of f-DPO are the derivatives of their divergences' generators. (The losses are in test_preference.py.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses import divergence_preference as divergence


def forward_kl(u):
    return -jnp.log(u)


def jensen_shannon(u):
    return u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2)


def alpha_divergence(alpha):
    return lambda u: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


SCORES = {
    "forward KL": (divergence.forward_kl_scores, forward_kl),
    "Jensen-Shannon": (divergence.jensen_shannon_scores, jensen_shannon),
    "alpha 1/2": (divergence.alpha_divergence_scores, alpha_divergence(0.5)),
    "alpha 0.9": (lambda x: divergence.alpha_divergence_scores(x, alpha=0.9), alpha_divergence(0.9)),
    "alpha -0.7": (lambda x: divergence.alpha_divergence_scores(x, alpha=-0.7), alpha_divergence(-0.7)),
}
TABLE = pytest.mark.parametrize(("scores", "generator"), SCORES.values(), ids=SCORES)


@TABLE
def test_scores_are_derivatives_of_the_generator(scores, generator):
    with jax.enable_x64(True):
        x = jnp.float64([-2.0, -0.3, 0.0, 0.4, 1.7])
        np.testing.assert_allclose(scores(x), jax.vmap(jax.grad(generator))(jnp.exp(x)), rtol=1e-9, atol=1e-12)
        check_grads(scores, (x,), order=1, modes=["rev"])


@TABLE
def test_scores_increase_and_stay_finite(scores, generator):
    x = jnp.float32([-300.0, -80.0, -1.0, 0.0, 1.0, 10.0])
    values, slopes = jax.vmap(jax.value_and_grad(scores))(x)
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
    assert (np.diff(values) >= 0).all()
    assert (np.diff(values[2:]) > 0).all()  # elsewhere a bounded score may have reached its bound
    assert (slopes[2:] > 0).all()
    assert scores(x.astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(TypeError, match="log_ratios must be floating"):
        scores(jnp.arange(3))


def test_limits_of_the_scores():
    x = jnp.float32([-5.0, 0.0, 2.0])
    np.testing.assert_allclose(divergence.alpha_divergence_scores(x, alpha=0.0), x)
    forward = divergence.forward_kl_scores(x)
    np.testing.assert_allclose(divergence.alpha_divergence_scores(x, alpha=1.0), forward + 1, rtol=1e-5)
    far = jnp.float32([-70.0, 70.0])
    np.testing.assert_allclose(divergence.jensen_shannon_scores(far), [-70 + np.log(2), np.log(2)], rtol=1e-6)
