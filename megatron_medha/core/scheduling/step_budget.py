"""How long a step may take, and how far below that to aim on a machine that does not do as predicted."""

from __future__ import annotations

from megatron_medha.core.batch import Batch

_TOLERANCE = 1.1   # a step this much over its budget has broken it
_DECREASE = 0.01    # of the aim, after a step that broke its budget
_INCREASE = 0.0003   # after one that kept it: the two balance when 3% of the steps break theirs
_MIN_UTILIZATION = 0.7
_MAX_PREFILL_SLOWDOWN = 0.02  # of the prefills' speed, for the TPOT targets of clients


class BudgetUtilization:
    """The share of a step's budget that predictions may fill.

    1 on a machine whose steps take what is predicted. Where they scatter (cores shared with strangers), half of all
    steps would break a budget that predictions fill exactly; aiming lower keeps it in all but a few percent.
    The budget is there for those who read: a step that no decode waits for need not be lowered, and teaches nothing.
    """

    def __init__(self) -> None:
        self.share = 1.0

    def learn(self, batch: Batch, duration_s: float) -> None:
        """Take note of how a step went that was filled up to the aim; others say nothing of it."""
        # Also left out: steps that were over budget by design (the floor of one tile).
        if not 0.8 * self.share <= batch.predicted_s / batch.budget_s <= 1.0:
            return
        if duration_s > _TOLERANCE * batch.budget_s:
            self.share = max(_MIN_UTILIZATION, self.share - _DECREASE)
        else:
            self.share = min(1.0, self.share + _INCREASE)


def min_efficient_step_s(budget_s: float, fixed_s: float) -> float:
    """The shortest step in which prefills are at most 2% slower than in steps of budget_s.

    fixed_s: what every step takes whatever it computes, at most half of budget_s. The rest of a step goes into tokens.
    """
    least_share = (1.0 - _MAX_PREFILL_SLOWDOWN) * (1.0 - fixed_s / budget_s)
    return fixed_s / (1.0 - least_share)
