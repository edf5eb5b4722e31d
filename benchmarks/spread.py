"""Two samples of one figure held against each other: how each lies, how far their means are apart, and how likely
samples of one distribution would differ so much.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import comb
from random import Random
from statistics import fmean, quantiles, stdev

Sample = Sequence[float]


def described(sample: Sample) -> str:
    """Mean, standard deviation, least, quartiles and greatest of shares, in per cent."""
    low, middle, high = quantiles(sample, n=4, method="inclusive")
    shares = " ".join(f"{share * 100:.2f}" for share in (min(sample), low, middle, high, max(sample)))
    return f"{len(sample)} runs, mean {fmean(sample):.2%}, sd {stdev(sample) * 100:.2f}, quartiles {shares}"


def interval(ours: Sample, real: Sample, *, draws: int = 10_000) -> tuple[float, float]:
    """Where the difference of the means lies, in 95 % of bootstrap samples."""
    rng = Random(0)
    means = [fmean(rng.choices(ours, k=len(ours))) - fmean(rng.choices(real, k=len(real))) for _ in range(draws)]
    cuts = quantiles(means, n=40)
    return cuts[0], cuts[-1]


def described_mean(differences: Sample) -> str:
    """The mean of differences of shares and where it lies in 95 % of bootstrap samples, in points."""
    low, high = interval(differences, [0.0])
    return f"{fmean(differences) * 100:+.3f} points ({low * 100:+.3f} to {high * 100:+.3f})"


def fair(heads: int, tosses: int) -> float:
    """The p-value of so many heads under a fair coin, on both sides."""
    far = abs(2 * heads - tosses)
    ways = sum(comb(tosses, at) for at in range(tosses + 1) if abs(2 * at - tosses) >= far)
    return float(ways / (1 << tosses))


def distance(ours: Sample, real: Sample) -> float:
    """Kolmogorov and Smirnov's: how far the two distributions' shares below one value are apart at most."""
    ours, real = sorted(ours), sorted(real)
    return max(abs(bisect_right(ours, at) / len(ours) - bisect_right(real, at) / len(real)) for at in {*ours, *real})


def chance(ours: Sample, real: Sample, *, draws: int = 2_000) -> float:
    """The p-value of that distance: how often it is as great if the runs are dealt to both sides at random."""
    rng, runs, seen = Random(0), [*ours, *real], distance(ours, real) - 1e-12
    more = 0
    for _ in range(draws):
        rng.shuffle(runs)
        more += distance(runs[: len(ours)], runs[len(ours) :]) >= seen
    return (more + 1) / (draws + 1)


def held_against(ours: Sample, real: Sample) -> None:
    """Print all of it; ``ours`` are simulated."""
    low, high = interval(ours, real)
    print(f"real:      {described(real)}\nsimulated: {described(ours)}")
    print(f"difference of means {(fmean(ours) - fmean(real)) * 100:+.2f} points,", end=" ")
    print(f"95 % of bootstrap samples {low * 100:+.2f} to {high * 100:+.2f};", end=" ")
    print(f"KS distance {distance(ours, real):.3f}, p {chance(ours, real):.3f}")
