"""Small statistics that checks share; no check itself."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt

__all__ = ["at_most", "spearman", "wilson"]


def at_most(k: int, n: int, p: float) -> float:
    """P(X ≤ k) for X ~ Binomial(n, p)."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def wilson(k: int, n: int, z: float = 2.576) -> tuple[float, float]:
    """Wilson's interval for a share of k in n; z = 2.576 makes it one of 99%."""
    share, square = k / n, z * z / n
    middle = (share + square / 2) / (1 + square)
    half = z * sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where one of the two is constant."""
    a, b = _ranks(x), _ranks(y)
    mean = (len(a) + 1) / 2
    top = sum((i - mean) * (j - mean) for i, j in zip(a, b, strict=True))
    bottom = sqrt(sum((i - mean) ** 2 for i in a) * sum((j - mean) ** 2 for j in b))
    return top / bottom if bottom else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop + 1 < len(order) and values[order[stop + 1]] == values[order[start]]:
            stop += 1
        for i in order[start : stop + 1]:
            ranks[i] = (start + stop) / 2 + 1
        start = stop + 1
    return ranks
