"""How much is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """
    rounds: of latency and of draining; large_count is drained large_rounds times, or not at all.

    naive_count: fewer events than the others drain, because it takes long; the table says so.
    """

    rounds: int
    latency_seconds: float
    offered_loads: tuple[float, ...]
    offered_seconds: float
    drain_count: int
    naive_count: int
    large_count: int
    large_rounds: int
    ceiling_rounds: int
    flood_count: int
    memory_count: int
    growth_few: int
    growth_many: int
    growth_count: int
    growth_rounds: int
    posts: int
    paced_posts: int
    sustained_seconds: float
    bare_seconds: float


#: The rate at which latency is compared.
PACED_PER_SECOND = 200.0

WHOLE_WAY_PER_SECOND = 10.0

#: Under ten minutes on two cores.
USUAL = Plan(
    rounds=5,
    latency_seconds=3,
    offered_loads=(25, 400),
    offered_seconds=3,
    drain_count=20_000,
    naive_count=500,
    large_count=200_000,
    large_rounds=1,
    ceiling_rounds=1,
    flood_count=60_000,
    memory_count=50_000,
    growth_few=1_000,
    growth_many=100_000,
    growth_count=10_000,
    growth_rounds=2,
    posts=1_000,
    paced_posts=100,
    sustained_seconds=60,
    bare_seconds=10,
)

#: `LONG=1`: the million, and five rounds of everything.
LONG = Plan(
    rounds=5,
    latency_seconds=20,
    offered_loads=(25, 50, 100, 400, 600),
    offered_seconds=10,
    drain_count=20_000,
    naive_count=4_000,
    large_count=200_000,
    large_rounds=5,
    ceiling_rounds=5,
    flood_count=200_000,
    memory_count=1_000_000,
    growth_few=1_000,
    growth_many=300_000,
    growth_count=20_000,
    growth_rounds=5,
    posts=10_000,
    paced_posts=600,
    sustained_seconds=60,
    bare_seconds=30,
)

#: `--quick`: whether the benchmark itself works. Its figures mean nothing.
QUICK = Plan(
    rounds=2,
    latency_seconds=1,
    offered_loads=(50,),
    offered_seconds=1,
    drain_count=3_000,
    naive_count=100,
    large_count=0,
    large_rounds=0,
    ceiling_rounds=1,
    flood_count=10_000,
    memory_count=5_000,
    growth_few=100,
    growth_many=5_000,
    growth_count=1_000,
    growth_rounds=1,
    posts=100,
    paced_posts=10,
    sustained_seconds=3,
    bare_seconds=2,
)
