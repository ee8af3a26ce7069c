"""The largest batch that fits a chip, with few compilations: memory grows almost linearly with the images."""

from collections.abc import Callable

from deperceiver_jax.preflight.program import Cost

MOST = 4096  # images a chip
SURE = 6  # guesses along a line, before halving


def largest_batch(cost_of: Callable[[int], Cost], fits: Callable[[Cost], bool], limit: int, *, start: int) -> int:
    """The largest number of images a chip whose cost `fits`; 0 if not even one does. `limit` is in bytes.

    Every answer is compiled: one number that fits, and the next one that does not.
    """
    needed, low, high = {0: 0}, 0, MOST + 1
    guess = start
    while high - low > 1:
        cost = cost_of(guess)
        needed[guess] = cost.memory
        low, high = (guess, high) if fits(cost) else (low, guess)
        if high > MOST and len(needed) < 3:
            guess = 2 * guess
            continue
        if len(needed) > SURE:  # it is no line
            guess = (low + high) // 2
            continue
        a, b = sorted(needed, key=lambda images: abs(images - guess))[:2]
        slope = (needed[b] - needed[a]) / (b - a)
        line = a + int((limit - needed[a]) / slope) if slope > 0 else 2 * low
        guess = min(max(line, low + 1), high - 1)
    return low
