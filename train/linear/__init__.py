"""Linear heads that are solved: ridge, LDA, softmax regression, and stacks of them."""

from llmembed.train.linear.devices import device_of
from llmembed.train.linear.parallel import one_thread_each
from llmembed.train.linear.ray_moments import joined_if_asked
from llmembed.train.linear.solved import grid_of, solve_base, train_solved, train_stack
from llmembed.train.linear.stacking import Member
from llmembed.train.linear.sweep import Grid, best_of, stack_of, sweep

__all__ = [
    "Grid",
    "Member",
    "best_of",
    "device_of",
    "grid_of",
    "joined_if_asked",
    "one_thread_each",
    "solve_base",
    "stack_of",
    "sweep",
    "train_solved",
    "train_stack",
]
