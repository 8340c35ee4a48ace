"""The family tree of the losses as one picture: a child is its parent with one thing changed, named on the branch."""

import dataclasses

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import plots


@dataclasses.dataclass(frozen=True)
class Node:
    """A loss, what it changes in its parent, and its children; a name with a dot is a public function."""

    name: str
    change: str = ""
    children: tuple["Node", ...] = ()


def n(name: str, change: str = "", *children: Node) -> Node:
    """Short for Node, to keep the tree readable."""
    return Node(name, change, children)


FAMILIES = (
    n(
        "learn from demonstrations",
        "",
        n(
            "supervised.negative_log_likelihood",
            "",
            n("supervised.smoothed_cross_entropy", "target shares ε with all tokens"),
            n("supervised.dynamic_fine_tuning", "weighted by π"),
            n(
                "distillation.soft_cross_entropy",
                "the target is a teacher",
                n("distillation.hard_cross_entropy", "its likeliest token"),
                n("sampled_distillation.sampled_cross_entropy", "its samples"),
                n("distillation.hinton_cross_entropy", "τ² keeps the gradient's size"),
                n(
                    "distillation.forward_kl",
                    "minus the teacher's entropy",
                    n("distillation.top_k_kl", "k tokens and a tail"),
                    n("distillation.generalised_jsd", "against a mixture"),
                    n(
                        "distillation.reverse_kl",
                        "student's expectation",
                        n("sampled_distillation.sampled_reverse_kl", "own samples"),
                        n("human_distillation.human_reverse_kl_rewards", "+ human reward"),
                    ),
                    n("distillation.total_variation", "|P - Q|"),
                ),
                n(
                    "human_distillation.human_reweighted_cross_entropy",
                    "teacher times exp(r/β)",
                    n("human_distillation.human_soft_targets", "its samples and soft targets"),
                ),
            ),
            n(
                "regression_policy.weighted_log_likelihood",
                "weighted by how good it was",
                n("regression_policy.awr_weights", "exp(A/τ)"),
                n("regression_policy.awac_weights", "softmax over the batch"),
                n("regression_policy.mpo_weights", "softmax over actions"),
                n("regression_policy.vmpo_weights", "the better half"),
                n("human_distillation.reward_weighted_cross_entropy", "teacher's samples, exp(r/β)"),
            ),
        ),
    ),
    n(
        "learn from own samples",
        "",
        n(
            "policy.reinforce",
            "",
            n("policy.a2c", "returns minus a critic"),
            n("feedback.coach", "the person is the advantage", n("feedback.deep_coach", "windows, old samples")),
            n(
                "policy.surrogate",
                "importance ratio",
                n(
                    "policy.clipped_surrogate",
                    "pessimistic clip",
                    n("policy.dual_clip_surrogate", "bounded for A < 0"),
                    n("policy.two_sided_surrogate", "bounded ratio"),
                    n("covariance_policy.clip_cov", "high covariance detached"),
                    n(
                        "sequence_policy.gspo",
                        "ratio of the sequence",
                        n("sequence_policy.gspo_token", "advantage per token"),
                        n("sequence_policy.luspo", "times its length"),
                        n("sequence_policy.gmpo", "clip before the mean"),
                    ),
                ),
                n("gated_policy.cispo", "clipped weight, gradient kept"),
                n("gated_policy.sapo", "soft gate"),
                n("gated_policy.dppo_tv", "gate on probabilities"),
                n("gated_policy.dppo_kl", "gate on the KL"),
                n("covariance_policy.kl_cov", "high covariance penalised"),
                n("sequence_policy.vespo", "soft weight of the sequence"),
            ),
            n("regression_policy.dro", "squared violation of the optimum"),
            n("online_preference.nash_md", "win rate against a mixture"),
        ),
    ),
    n(
        "learn from comparisons",
        "",
        n(
            "reward_model.bradley_terry",
            "",
            n("reward_model.soft_bradley_terry", "shares of votes"),
            n("reward_model.rao_kupper", "ties by a threshold"),
            n("reward_model.davidson", "ties by a weight"),
            n("ranking.plackett_luce", "lists", n("ranking.list_choice", "the best alone")),
            n(
                "preference.dpo",
                "the policy is the reward",
                n("preference.conservative_dpo", "labels smoothed", n("preference.robust_dpo", "unbiased under flips")),
                n("preference.dpo_mean", "per token"),
                n("preference.exo", "reverse KL of the label"),
                n("preference.discopop", "blend with exp"),
                n("preference.hinge", "margin"),
                n("preference.ipo_sum", "squared", n("preference.ipo_mean", "per token")),
                n("divergence_preference.forward_kl_dpo", "another divergence"),
                n("divergence_preference.jensen_shannon_dpo", "another divergence"),
                n("divergence_preference.alpha_divergence_dpo", "another divergence"),
                n("anchored_preference.nca", "absolute likelihoods"),
                n("anchored_preference.apo_zero", "anchored"),
                n("anchored_preference.apo_down", "anchored"),
                n("anchored_preference.sppo", "squared, absolute"),
                n("anchored_preference.bco_pair", "a classifier", n("unpaired_preference.bco", "unpaired")),
                n("unpaired_preference.kto", "unpaired", n("unpaired_preference.apo_zero_unpaired", "anchor 0")),
                n(
                    "distributional_preference.aot_paired",
                    "sorted over the batch",
                    n("distributional_preference.aot_unpaired", "unpaired"),
                ),
                n("online_preference.online_dpo", "fresh samples", n("online_preference.xpo", "optimism")),
                n(
                    "reference_free_preference.cpo",
                    "no reference",
                    n("reference_free_preference.cpo_hinge", "margin"),
                    n("reference_free_preference.tpo", "a gold answer"),
                    n(
                        "reference_free_preference.simpo",
                        "per token, target margin",
                        n("reference_free_preference.alphapo", "reshaped reward"),
                        n("reference_free_preference.tpo_length_controlled", "a gold answer"),
                    ),
                    n("reference_free_preference.odds_ratio", "odds", n("reference_free_preference.orpo", "+ NLL")),
                ),
            ),
        ),
    ),
    n(
        "learn numbers",
        "",
        n(
            "value.squared_error",
            "",
            n("value.clipped_squared_error", "pessimistic clip"),
            n("value.huber", "bounded slope", n("value.quantile_huber", "every quantile")),
            n("value.expectile_error", "asymmetric", n("offline_q_learning.ilql", "+ Q + CQL")),
            n("categorical_value.cross_entropy", "a histogram"),
            n("q_learning.q_learning", "bootstrapped, max", n("q_learning.double_q_learning", "two networks")),
            n("q_learning.sarsa", "bootstrapped, next action", n("q_learning.expected_sarsa", "its expectation")),
            n(
                "rating.rating_regression",
                "human ratings",
                n("rating.ordinal", "ordered levels"),
                n("rating.process_rewards", "right or wrong, per step"),
            ),
            n("tamer.tamer", "delayed human signals", n("tamer.deep_tamer", "each step by itself")),
        ),
    ),
)


def names(nodes: tuple[Node, ...] = FAMILIES) -> list[str]:
    """Every name in the tree that stands for a public function."""
    found = []
    for node in nodes:
        found += [node.name] if "." in node.name else []
        found += names(node.children)
    return found


def figure() -> str:
    """The tree as SVG: depth to the right, one line per loss."""
    rows: list[tuple[float, float, Node]] = []
    edges: list[tuple[float, float, float, float]] = []
    height = 0.0

    def place(node: Node, depth: int) -> float:
        nonlocal height
        height += 1.0
        mine = height
        rows.append((depth, mine, node))
        for child in node.children:
            edges.append((depth, mine, depth + 1, place(child, depth + 1)))
        return mine

    for family in FAMILIES:
        place(family, 0)
        height += 0.5
    drawn, axes = plt.subplots(figsize=(10, 0.19 * height))
    for x, y, right, below in edges:
        axes.plot([x, x, right - 0.05], [y + 0.25, below, below], color="#888888", linewidth=0.8)
    for x, y, node in rows:
        label = node.name.rpartition(".")[-1]
        weight = "normal" if "." in node.name else "bold"
        axes.text(x, y, label, va="center", fontsize=8, weight=weight)
        if node.change:
            axes.text(x + 0.085 * len(label) + 0.12, y, node.change, va="center", fontsize=7, color="#777777")
    axes.set(xlim=(-0.1, 9.0), ylim=(height + 1, 0))
    axes.axis("off")
    return plots.svg(drawn)
