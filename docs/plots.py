"""Curves of the losses and of their gradients, drawn from the library itself: `figures()` returns SVG by name."""

import io
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rlhf_jax import kl
from rlhf_jax.losses import (
    anchored_preference,
    distillation,
    divergence_preference,
    gated_policy,
    policy,
    preference,
    reward_model,
    unpaired_preference,
    value,
)

Curve = Callable[[jax.Array], jax.Array]

plt.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "rlhf_jax",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "font.size": 9,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
)


def svg(figure: plt.Figure) -> str:
    """A figure as text that is the same in every build."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def curves(table: dict[str, Curve], x: jax.Array, label: str, *, limit: float | None = None) -> str:
    """Value on the left, slope on the right, one line per function."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    styles = ["-", "--", "-.", ":"]
    for index, (name, curve) in enumerate(table.items()):
        style = styles[index % len(styles)]
        left.plot(x, jax.vmap(curve)(x), style, label=name)
        right.plot(x, jax.vmap(jax.grad(curve))(x), style, label=name)
    for axis, title in ((left, "value"), (right, "gradient")):
        axis.set(xlabel=label, title=title)
        if limit is not None:
            axis.set_ylim(-limit, limit)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return svg(figure)


def policy_curves(advantage: float) -> dict[str, Curve]:
    """Token losses of a log-ratio, the old log-prob being 0 and the advantage given."""
    old, judged = jnp.zeros(()), jnp.asarray(advantage)
    return {
        "surrogate": lambda x: policy.surrogate(x, old, judged),
        "clipped_surrogate": lambda x: policy.clipped_surrogate(x, old, judged).loss,
        "dual_clip_surrogate": lambda x: policy.dual_clip_surrogate(x, old, judged).loss,
        "two_sided_surrogate": lambda x: policy.two_sided_surrogate(x, old, judged).loss,
        "sapo": lambda x: gated_policy.sapo(x, old, judged),
        "dppo_tv (old prob. 1)": lambda x: gated_policy.dppo_tv(x, old, judged).loss,
    }


def pair_curves() -> dict[str, Curve]:
    """Pair losses of a margin m: the chosen log-ratio is m / 2, the rejected one -m / 2; β = 1."""

    def pair(loss: Callable[..., jax.Array], **knobs: float) -> Curve:
        return lambda m: loss(0.5 * m, -0.5 * m, beta=1.0, **knobs)

    return {
        "dpo": pair(preference.dpo),
        "conservative_dpo": pair(preference.conservative_dpo),
        "robust_dpo": pair(preference.robust_dpo),
        "hinge": pair(preference.hinge),
        "ipo_sum": pair(preference.ipo_sum),
        "exo": pair(preference.exo),
        "apo_zero": pair(anchored_preference.apo_zero),
        "nca": pair(anchored_preference.nca),
        "discopop": pair(preference.discopop, tau=1.0),
        "apo_down": pair(anchored_preference.apo_down),
        "sppo": pair(anchored_preference.sppo),
        "bco_pair": pair(anchored_preference.bco_pair),
    }


def thumb_curves() -> dict[str, Curve]:
    """Losses of one completion's log-ratio; KTO's reference point and BCO's shift are 0.5, β = 1."""
    found: dict[str, Curve] = {}
    for verdict in (True, False):
        name, flag, anchor = "good" if verdict else "bad", jnp.asarray(verdict), jnp.asarray(0.5)
        found |= {
            f"kto, {name}": lambda x, flag=flag, anchor=anchor: unpaired_preference.kto(x, flag, anchor, beta=1.0),
            f"apo_zero_unpaired, {name}": lambda x, flag=flag: unpaired_preference.apo_zero_unpaired(x, flag, beta=1.0),
            f"bco, {name}": lambda x, flag=flag, anchor=anchor: unpaired_preference.bco(x, flag, anchor, beta=1.0),
        }
    return found


def comparison_curves() -> dict[str, Curve]:
    """Reward-model losses of the difference of two scores, the first one chosen or neither."""
    zero, won, tied = jnp.zeros(()), jnp.asarray(False), jnp.asarray(True)
    return {
        "bradley_terry": lambda x: reward_model.bradley_terry(x, zero),
        "bradley_terry, margin 1": lambda x: reward_model.bradley_terry(x, zero, margin=1.0),
        "bradley_terry, smoothing 0.1": lambda x: reward_model.bradley_terry(x, zero, label_smoothing=0.1),
        "rao_kupper, chosen": lambda x: reward_model.rao_kupper(x, zero, won, theta=2.0),
        "rao_kupper, tie": lambda x: reward_model.rao_kupper(x, zero, tied, theta=2.0),
        "davidson, tie": lambda x: reward_model.davidson(x, zero, tied, nu=0.7),
    }


def score_curves() -> dict[str, Curve]:
    """What takes the place of the log-ratio in f-DPO."""
    return {
        "log-ratio (dpo)": lambda x: x,
        "forward_kl_scores": divergence_preference.forward_kl_scores,
        "jensen_shannon_scores": divergence_preference.jensen_shannon_scores,
        "alpha_divergence_scores": divergence_preference.alpha_divergence_scores,
    }


def kl_curves() -> dict[str, Curve]:
    """Estimators of a log-ratio, the reference log-prob being 0."""
    zero = jnp.zeros(())
    return {
        "k1": lambda x: kl.k1(x, zero),
        "k2": lambda x: kl.k2(x, zero),
        "k3": lambda x: kl.k3(x, zero),
        "k1_with_k2_gradient": lambda x: kl.k1_with_k2_gradient(x, zero),
        "k3_with_k2_gradient": lambda x: kl.k3_with_k2_gradient(x, zero),
    }


def value_curves() -> dict[str, Curve]:
    """Losses of a value whose return is 0, the old value being 1."""
    zero, old = jnp.zeros(()), jnp.ones(())
    return {
        "squared_error": lambda x: value.squared_error(x, zero),
        "clipped_squared_error": lambda x: value.clipped_squared_error(x, old, zero, clip=0.5),
        "huber": lambda x: value.huber(x, zero),
        "expectile_error": lambda x: value.expectile_error(x, zero, expectile=0.8),
    }


def divergence_curves() -> dict[str, Curve]:
    """Divergences of a student with logit x on one of two tokens from a teacher of 0.8 and 0.2."""
    teacher = jnp.log(jnp.array([0.8, 0.2]))

    def two(loss: Callable[..., jax.Array]) -> Curve:
        return lambda x: loss(jnp.stack([x, jnp.zeros(())]), teacher)

    return {
        "forward_kl": two(distillation.forward_kl),
        "reverse_kl": two(distillation.reverse_kl),
        "generalised_jsd": two(distillation.generalised_jsd),
        "total_variation": two(distillation.total_variation),
    }


def figures() -> dict[str, str]:
    """SVG text by name of the figure."""
    near, wide = jnp.linspace(-1.5, 1.5, 301), jnp.linspace(-4.0, 4.0, 301)
    return {
        "policy_good": curves(policy_curves(1.0), near, "log-ratio, advantage +1", limit=5.0),
        "policy_bad": curves(policy_curves(-1.0), near, "log-ratio, advantage -1", limit=5.0),
        "preference": curves(pair_curves(), wide, "margin", limit=4.0),
        "thumbs": curves(thumb_curves(), wide, "log-ratio", limit=4.0),
        "comparisons": curves(comparison_curves(), wide, "difference of scores", limit=4.0),
        "scores": curves(score_curves(), wide, "log-ratio", limit=4.0),
        "kl": curves(kl_curves(), near, "log-ratio", limit=3.0),
        "value": curves(value_curves(), jnp.linspace(-3.0, 3.0, 301), "value, return 0", limit=6.0),
        "divergence": curves(divergence_curves(), wide, "student logit", limit=3.0),
    }


if __name__ == "__main__":
    import pathlib
    import sys

    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "figures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in figures().items():
        (folder / f"{name}.svg").write_text(text)
