"""Router: each way to choose, and Dynamo's costs worked out by hand."""

from __future__ import annotations

from collections import Counter
from math import exp

import pytest

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.job import Job
from keepwarm.replayers.router import ROUTERS, Router, View, Weights, classic, current
from keepwarm.replayers.tree import PromptTree

IDLE = View(0, 0, 0)


def job(tokens: int, session: str | None = None) -> Job:
    """A job with so long a prompt."""
    tree = PromptTree()
    return Job(tree.extend(tree.root, [Piece(1, tokens, "user")]), 1, session=session)


def chosen(name: str, views: list[View], times: int = 1, tokens: int = 100, **options: object) -> list[int]:
    """The workers for so many calls, all of them idle in between."""
    router = Router(name, block=10, **options)  # type: ignore[arg-type]
    return [router.choose(job(tokens), views, range(len(views))) for _ in range(times)]


def test_dynamos_cost() -> None:
    """105 tokens, 40 of them cached, 30 of prefill under way, 7 blocks of running calls that hold 20 of the prompt's
    tokens: (30 + 105) / 10 - 4 + 7 + 10 - 2. The prefill is a fraction, the prompt's own blocks are whole ones.
    """
    assert current(View(30, 7, 40, 20), 105, 10, Weights()) == pytest.approx(13.5 - 4 + 7 + 10 - 2)


def test_the_credit_never_makes_a_negative_load() -> None:
    """A credit of 2 a block for 100 cached tokens of 100 is 20 blocks against 10: the load is 0."""
    assert current(View(0, 3, 100), 100, 10, Weights(overlap=2.0)) == 3 + 10


def test_a_host_tiers_blocks_have_their_own_credit() -> None:
    """40 tokens on the device, 70 in the tier: 4 x 1 and 3 x 0.75, and nothing where the tier has less."""
    assert current(View(0, 0, 40, 0, 70), 100, 10, Weights()) == pytest.approx(10 - 4 - 2.25 + 10)
    assert current(View(0, 0, 40, 0, 30), 100, 10, Weights()) == pytest.approx(10 - 4 + 10)


def test_the_prefill_load_has_a_scale() -> None:
    """Half of (30 + 100) / 10 - 4, and the blocks whole."""
    assert current(View(30, 7, 40), 100, 10, Weights(prefill=0.5)) == pytest.approx(0.5 * 9 + 7 + 10)


def test_dynamos_classic_cost() -> None:
    """2 x (105 + 30 - 40) / 10 + 7."""
    assert classic(View(30, 7, 40, 20), 105, 10, Weights(overlap=2.0)) == pytest.approx(2 * 9.5 + 7)


def test_the_cheapest_worker_is_chosen() -> None:
    """Two cached blocks outweigh one block of load, not three."""
    assert chosen("kv_aware", [IDLE, View(0, 1, 20)]) == [1]
    assert chosen("kv_aware", [IDLE, View(0, 3, 20)]) == [0]
    assert chosen("kv_classic", [IDLE, View(0, 3, 20)], weights=Weights(overlap=2.0)) == [1]


def test_a_worker_where_the_prefix_runs_is_cheaper() -> None:
    """Both have 50 tokens cached; the one where a sibling holds them is chosen though it has four blocks of load."""
    assert chosen("kv_aware", [View(0, 0, 50), View(0, 4, 50, 50)]) == [1]


def test_ties_are_drawn_by_the_seed() -> None:
    """Of three equal workers and a dearer one each of the three gets its share, as the seed says."""
    views = [IDLE, View(0, 9, 0), IDLE, IDLE]
    drawn = chosen("kv_aware", views, 3000, seed=3)
    assert drawn == chosen("kv_aware", views, 3000, seed=3) != chosen("kv_aware", views, 3000, seed=4)
    shares = Counter(drawn)
    assert set(shares) == {0, 2, 3}
    assert all(900 < share < 1100 for share in shares.values())


def test_a_temperature_draws_by_softmax_of_scaled_costs() -> None:
    """Costs 20, 25 and 30 scaled to 0, 0.5 and 1, at temperature 0.5: e^0, e^-1 and e^-2."""
    views = [View(0, 0, 0), View(0, 5, 0), View(0, 10, 0)]
    shares = Counter(chosen("kv_aware", views, 20_000, weights=Weights(temperature=0.5)))
    total = 1 + exp(-1) + exp(-2)
    for index, weight in enumerate((1, exp(-1), exp(-2))):
        assert shares[index] / 20_000 == pytest.approx(weight / total, abs=0.015)


def test_round_robin_goes_around_whatever_the_load() -> None:
    """Worker after worker."""
    assert chosen("round_robin", [View(10**6, 10**6, 0), IDLE, IDLE], 7) == [0, 1, 2, 0, 1, 2, 0]


def test_random_goes_anywhere_by_the_seed() -> None:
    """Each worker gets about its share; the same seed draws the same."""
    drawn = chosen("random", [IDLE] * 3, 3000, seed=1)
    assert drawn == chosen("random", [IDLE] * 3, 3000, seed=1)
    assert all(900 < share < 1100 for share in Counter(drawn).values())


def test_least_loaded_counts_blocks_and_prefill() -> None:
    """5 blocks and 30 tokens in blocks of 10 are 8, more than 7; what is cached does not matter."""
    assert chosen("least_loaded", [View(30, 5, 100), View(0, 7, 0), View(80, 0, 0)]) == [1]


def test_sticky_sessions_stay_where_they_began() -> None:
    """A session begins on the least loaded worker and stays; another one, and a call without, go by load."""
    router, loads = Router("sticky", block=10), [View(0, 5, 0), IDLE]
    assert router.choose(job(50, "s"), loads, range(2)) == 1
    loads = [IDLE, View(0, 5, 0)]
    assert [router.choose(job(50, name), loads, range(2)) for name in ("s", "t", None, "s")] == [1, 0, 0, 1]
    assert router.choose(job(50, "s"), loads, [0]) == 0


def test_only_those_asked_for_are_chosen() -> None:
    """Of four workers the last two."""
    for name in ROUTERS:
        router = Router(name, block=10)
        assert {router.choose(job(50, f"s{n}"), [IDLE] * 4, [2, 3]) for n in range(60)} <= {2, 3}


def test_an_unknown_router_is_refused() -> None:
    """The name is told."""
    with pytest.raises(ValueError, match="'fastest'"):
        Router("fastest", block=16)
