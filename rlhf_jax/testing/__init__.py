"""Property-test your own losses: ragged strategies, float64 oracles, exact answers and the contract of the library.

Needs the ``testing`` extra (hypothesis) and nothing else. A complete test of a loss is one line::

    check_contract(my_loss, Case("BT:log_prob BT:log_prob BT BT:mask ->", knobs={"clip": 0.2}))
"""

from rlhf_jax.testing.case import Case
from rlhf_jax.testing.contract import CHECKS, NotApplicable, check_contract

__all__ = ["CHECKS", "Case", "NotApplicable", "check_contract"]
