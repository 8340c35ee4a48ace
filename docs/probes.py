"""Runs every exact probe and writes its distance from the known answer to docs/probes.md: `python docs/probes.py`."""

import itertools
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS.parent / "tests" / "probes"), str(DOCS.parent)]

from optima import BIASED, PROBES  # noqa: E402
from problem import HUMAN_OPTIMUM, LOG_REFERENCE, OPTIMUM  # noqa: E402

from rlhf_jax.testing import enumerable  # noqa: E402

HEAD = """# Exact probes

Problems so small that the answer is known: nine sequences of two tokens, a few answers of one, or a decision process of
three states. Every algorithm is run to the end, and the table says how far from the exact answer it stopped.
Expectations are sums over all sequences, trajectories or groups; only where it says "sampled groups", 256 groups are
drawn in every step. An answer without a closed form is found in float64 apart from the library: on a grid, by
bisection or by a root finder. The test suite runs the same problems and fails above the tolerance, and also if a public
function of losses, advantages, KL or constraints has neither a row here nor a reason. This page is written by
`python docs/probes.py`.

The policy starts at the reference. Its total variation distance from π_ref exp(r/β) / Z is {start:.3f}, from
π_T exp(r/β) / Z it is {human:.3f}.
"""

TAIL = """
## What has another optimum

These optimise something else, and their distance from the optimum of the regularised reward, or from the answer that
the row names, is real. With the KL in the reward, dividing by the group's spread does no harm: at the optimum the
shaped rewards are all equal. With the KL in the loss, the spread rescales the reward against it. Smoothing labels
that are clean shrinks margins, IPO regresses on win rates, and plain distillation does not know the reward. DiscoPOP
at its published τ = 0.05 rises at a margin of 0: from there it makes the winner less likely on average, and rests in
the wrong one of two minima. BCO's own shift, the mean reward, is -β log Z by chance only. Training for one try does
not train for two, and a sum of rewards is ruled by the one of large scale.

| algorithm | total variation |
| --- | --- |
"""


def number(distance: float) -> str:
    """Two digits that mean something; what is below float32's reach is said to be so."""
    return "< 1e-6" if distance < 1e-6 else f"{distance:.1e}"


def page() -> str:
    """The page as Markdown, every distance measured anew."""
    start, human = (float(enumerable.total_variation(LOG_REFERENCE, x)) for x in (OPTIMUM, HUMAN_OPTIMUM))
    text = [HEAD.format(start=start, human=human)]
    for family, group in itertools.groupby(PROBES, key=lambda probe: probe.family):
        text.append(
            f"\n## {family[0].upper() + family[1:]}\n\n| algorithm | exact answer | measured | distance | tolerance |"
        )
        text.append("| --- | --- | --- | --- | --- |")
        for probe in group:
            distance = number(float(probe.run()))
            text.append(f"| {probe.name} | {probe.answer} | {probe.measure} | {distance} | {probe.tolerance:g} |")
    text.append(TAIL.rstrip("\n"))
    for name, run in BIASED.items():
        text.append(f"| {name} | {float(run()):.3f} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    (DOCS / "probes.md").write_text(page())
