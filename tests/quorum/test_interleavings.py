"""Goal: no acknowledged record is ever lost or contradicted, whatever happens in whatever order.

Method: the simulator, driven twice. Seeds give long runs, each with its own weather, that end with
everything restarted and one writer bringing all segments together. A failure names its seed N:
`BOREAL_QUORUM_FIRST_SEED=N BOREAL_QUORUM_SEEDS=1 pytest tests/quorum -k seed` repeats it, and
BOREAL_QUORUM_SEEDS=20000 looks further. Hypothesis gives short runs and, on a failure, the shortest
it can find.
"""

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.quorum.simulator import Action, Simulation, run_seed

FIRST_SEED = int(os.environ.get("BOREAL_QUORUM_FIRST_SEED", "0"))
SEEDS = int(os.environ.get("BOREAL_QUORUM_SEEDS", "300"))
BATCH = 50

Data = st.DataObject


@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + SEEDS, BATCH))
def test_seeds(first: int) -> None:
    for seed in range(first, min(first + BATCH, FIRST_SEED + SEEDS)):
        try:
            run_seed(seed)
        except Exception as error:
            error.add_note(f"repeat: BOREAL_QUORUM_FIRST_SEED={seed} BOREAL_QUORUM_SEEDS=1")
            raise


def test_a_seed_decides_the_whole_run() -> None:
    first, second = run_seed(7), run_seed(7)
    assert first.acknowledged == second.acknowledged
    assert [s.log for s in first.segments.values()] == [s.log for s in second.segments.values()]


def test_the_weather_lets_writers_get_somewhere() -> None:
    """Runs in which nothing was ever acknowledged would prove nothing."""
    runs = [run_seed(seed) for seed in range(40)]
    assert sum(len(run.acknowledged) >= 3 for run in runs) >= 20
    assert sum(any(not w.plan for w in run.writers.values()) for run in runs) >= 20


class AnyInterleaving(RuleBasedStateMachine):
    """Hypothesis says what happens; `Simulation.act` checks the invariants."""

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation()

    def _act(self, action: Action, data: Data) -> None:
        self.simulation.act(action, lambda n: data.draw(st.integers(0, n - 1)))

    @rule(data=st.data())
    def exchange(self, data: Data) -> None:
        self._act(Action.EXCHANGE, data)

    @rule(data=st.data())
    def write_and_exchange(self, data: Data) -> None:
        self._act(Action.WRITE, data)
        self._act(Action.EXCHANGE, data)

    @rule(data=st.data())
    def start_and_exchange(self, data: Data) -> None:
        self._act(Action.START, data)
        self._act(Action.EXCHANGE, data)

    @rule(action=st.sampled_from(list(Action)), data=st.data())
    def anything(self, action: Action, data: Data) -> None:
        self._act(action, data)

    def teardown(self) -> None:
        self.simulation.settle()


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(
    max_examples=30,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
