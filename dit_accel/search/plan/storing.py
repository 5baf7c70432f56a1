"""Bytes that a plan keeps, and which layers do without where they are too many."""

from collections.abc import Mapping

from dit_accel.plan import Key
from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.segments import CC, FULL, REUSE, RS, LayerPlan, LayerTable

LSE_BYTES = 4


def bytes_of(plan: LayerPlan, rows: int, width: int, item: int) -> int:
    """What one layer keeps at most: `rows` samples times tokens of one branch, `width` numbers of a head."""
    heads = len(plan.picks[0])
    values = lse = 0
    for head in range(heads):
        names = {kind for row in plan.picks for kind in (row[head],) if kind != FULL}
        tails = any(isinstance(kind, Candidate) and kind.method == "tail" for kind in names)
        residuals = any(isinstance(kind, Candidate) and kind.method == "residual" for kind in names)
        shares = any(row[head] for row in plan.follows)  # cond's output and the difference
        values += 2 * (tails + residuals + (REUSE in names) + shares)
        lse += 2 * tails
    if any(action != CC for action in plan.actions):
        values += heads * (2 + (RS in plan.actions))  # whole modules: the same, and cond's last output
    return rows * (values * width * item + lse * LSE_BYTES)


def stateless(table: LayerTable) -> LayerTable:
    """The table of a layer that may keep nothing."""
    near = {FULL, *table.near()}
    return LayerTable(
        {kind: errors if kind in near else errors + float("inf") for kind, errors in table.pair.items()},
        {kind: errors if kind in near else errors + float("inf") for kind, errors in table.lone.items()},
        table.share + float("inf"),
        table.module + float("inf"),
        table.shared + float("inf"),
        table.seconds,
        table.anchors,
        table.around,
    )


def poorest(
    plans: Mapping[Key, LayerPlan], kept: Mapping[Key, int], without: Mapping[Key, LayerPlan], price: float
) -> Key:
    """The layer whose kept bytes save the least, in error and priced seconds, for each byte."""
    cost = {key: plan.error + price * plan.seconds for key, plan in plans.items()}
    worth = {
        key: (without[key].error + price * without[key].seconds - cost[key]) / kept[key]
        for key in plans if kept[key]
    }  # fmt: skip
    return min(worth, key=lambda key: worth[key])
