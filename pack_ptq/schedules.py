"""How settings change over the steps of a fit."""

import math

from pack_ptq.types import ReconstructionSpec


def penalty_beta(step: int, steps: int, spec: ReconstructionSpec) -> float | None:
    """Give the exponent of the rounding penalty, which falls linearly; none before the penalty starts (METHOD P3)."""
    start = spec.penalty_start * steps
    if step < start:
        return None
    first, last = spec.beta
    return first + (last - first) * min(1.0, (step - start) / max(1.0, steps - start))


def cosine_to_zero(step: int, steps: int) -> float:
    """Give the factor of a learning rate that falls from 1 to 0 as half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def rounding_rate(rate: float, steps: int) -> float:
    """Give the rate of roundings in a fit of some number of steps, where `rate` is that of 1000.

    Adam moves a variable by about its rate in each step, and a rounding has a fixed way to go: with one rate for every
    number of steps, few steps settle nothing but what was near the middle. Over 60 to 1000 steps the best rate falls as
    the root of their number (docs/experiments.md).
    """
    return rate * math.sqrt(1000 / max(1, steps))


def rate_at_bits(bits: int, power: float) -> float:
    """Give the factor of a tuning rate for weights of some width: 1 up to 3 bits, then `(7 / (2^bits - 1))^power`.

    The rate that is best at 3 bits does harm at 4, where there is less to mend; with a power of 2 it falls as the
    variance of the rounding error (docs/experiments.md).
    """
    return min(1.0, (7 / (2**bits - 1)) ** power)


def curriculum_share(step: int, steps: int, start: float) -> float:
    """Give the share of the samples to draw from, `min(1, l0 + (1 - l0) t / T)` (AIQViT, METHOD A4)."""
    return min(1.0, start + (1 - start) * step / max(1, steps))


def evaluation_steps(steps: int, count: int) -> set[int]:
    """Give `count` step counts spread over the second half of a fit, its end among them."""
    return {max(1, round(steps * (0.5 + 0.5 * (i + 1) / count))) for i in range(count)}
