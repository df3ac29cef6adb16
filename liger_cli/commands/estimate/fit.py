"""The largest size whose memory fits."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["largest_that_fits"]


def largest_that_fits(
    peak_of: Callable[[int], int], limit: int, *, start: int, most: int
) -> int | None:
    """Return the largest size of 1 to `most` whose peak is at most `limit`; None if 1 is too much.

    Every call of peak_of costs a second, so that each guess lies where a line through two known
    sizes meets the limit.

    Args:
        peak_of: The bytes of a size; they grow with it.
        start: The first size tried.
    """
    peaks: dict[int, int] = {}
    low, high, size = 0, most + 1, min(start, most)
    while high - low > 1:
        peaks[size] = peak_of(size)
        if peaks[size] <= limit:
            low = size
        else:
            high = size
        guess = _guess(peaks, low, high, limit)
        if len(peaks) % 3 == 0 and {low, high} <= peaks.keys():
            # Lines close in on a curve from one side alone.
            guess = (low + high) // 2
        size = min(max(guess, low + 1), high - 1)
    return low or None


def _guess(peaks: dict[int, int], low: int, high: int, limit: int) -> int:
    """Return where a line through the ends of what is still open meets the limit."""
    if low not in peaks:
        return high // 2
    if high not in peaks:
        *_, before, last = (0, *sorted(peaks))
        return _meets(peaks, before, last, limit) if before else 2 * last
    return _meets(peaks, low, high, limit)


def _meets(peaks: dict[int, int], small: int, large: int, limit: int) -> int:
    rise = peaks[large] - peaks[small]
    if rise <= 0:
        return 2 * large
    return small + (limit - peaks[small]) * (large - small) // rise
