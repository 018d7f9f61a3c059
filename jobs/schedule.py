"""The learning rate of a step; a pure function, so that resuming needs no state."""

import math

from jobs.config import ScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of optimizer step `step` (0-based) of `total_steps`.

    Warm-up rises linearly and reaches the peak at step `warmup_steps`; the first step is never at zero.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    span = max(1, total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    match schedule.kind:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = (1.0 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.final_share + (1.0 - schedule.final_share) * share) if schedule.kind != "constant" else peak
