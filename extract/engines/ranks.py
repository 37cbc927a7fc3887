"""Which blocks a rank does where several processes share an extraction without an engine.

Every rank makes the same plan and takes each `world`-th block of it. Nothing is agreed upon at run
time: a rank that is started again, or ranks of another world size, find what is committed and do
the rest of their shares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llmembed.cache_format import SplitPlan


def blocks_of_rank(plans: Sequence[SplitPlan], rank: int, world: int) -> list[SplitPlan]:
    """Keep of each plan the blocks that one rank does.

    Blocks are counted over all splits, done or not, so the deal does not depend on what is done.

    Args:
        plans: one a split.
        rank: 0 to `world` - 1.
        world: how many ranks there are.
    """
    kept, n_before = [], 0
    for plan in plans:
        numbered = ((n_before + block.start // plan.block_rows, block) for block in plan.blocks)
        blocks = tuple(block for number, block in numbered if number % world == rank)
        kept.append(dataclasses.replace(plan, blocks=blocks))
        n_before += -(-plan.n_rows // plan.block_rows)
    return kept
