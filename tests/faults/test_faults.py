"""The quick form of the fault suite, on fixed seeds; the long: sh tests/run --soak MINUTES."""
import pytest
from fleet import Fleet
from relays import (
    LEAVES,
    OF_THE_FLEET,
    RELAY_FAULTS,
    RelayFleet,
    check_all_good,
    make_relay_schedule,
    run_relay_round,
)
from rounds import EVENTS, SPREAD_S, run_round
from schedule import FAULTS, make_schedule

SLAVES = 20
SEEDS = (2, 28, 5)
RELAY_SEEDS = (1, 2, 8)


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


def test_the_seeds_for_relays_have_every_fault():
    schedules = [make_relay_schedule(seed) for seed in RELAY_SEEDS]
    assert schedules == [make_relay_schedule(seed) for seed in RELAY_SEEDS]
    events = [event for events in schedules for event in events]
    assert {event.kind for event in events} == set(RELAY_FAULTS)
    of_one = set(RELAY_FAULTS) - OF_THE_FLEET
    assert {event.kind for event in events if event.slave < LEAVES} >= of_one
    assert {event.kind for event in events if event.slave >= LEAVES} >= of_one, "of a relay"


@pytest.mark.slow
def test_what_a_relay_has_taken_is_accounted_for_on_every_slave(tmp_path):
    fleet = RelayFleet(tmp_path)
    try:
        assert list(check_all_good(fleet)) == []
        counts = [run_relay_round(fleet, seed) for seed in RELAY_SEEDS]
        assert sum(count["accepted"] for count in counts) >= len(RELAY_SEEDS)
        assert sum(count["fleet runs ended"] for count in counts) >= 1
    finally:
        fleet.close()
