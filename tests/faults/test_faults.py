"""The quick form of the fault suite, on fixed seeds; the long: sh tests/run --soak MINUTES."""
import pytest
from fleet import Fleet
from rounds import EVENTS, SPREAD_S, run_round
from schedule import FAULTS, make_schedule

SLAVES = 20
SEEDS = (2, 28, 5)


def test_the_seeds_replay_and_have_every_fault():
    schedules = [make_schedule(seed, SLAVES, EVENTS, SPREAD_S) for seed in SEEDS]
    assert schedules == [make_schedule(seed, SLAVES, EVENTS, SPREAD_S) for seed in SEEDS]
    assert {event.kind for _, events in schedules for event in events} == set(FAULTS)
    assert {kind for kind, _ in schedules} > {"interrupt", "kill"}


@pytest.mark.slow
def test_a_fleet_under_faults_keeps_every_promise(tmp_path):
    fleet = Fleet(tmp_path / "fleet", SLAVES)
    try:
        assert fleet.clean_run().process.returncode == 0
        for seed in SEEDS:
            counts = run_round(fleet, seed)
            assert counts["accepted"] >= SLAVES
            assert counts["reads"] > SLAVES
    finally:
        fleet.close()
