"""Each small attack on the product itself; test_mutations proves that each can fail.

All promises have other tests too, for every day: docs/promises.md.
"""
import shutil

import pytest
from product import SOURCES, daily
from scenarios import SCENARIOS, Place

NEEDS_STRACE = {"accepted_is_on_disk_before_the_answer", "a_clone_is_on_disk_before_it_goes_live"}
EVERY_DAY = 5  # the next is a reader over updates, for which see test_slave_activate_price.py


@pytest.mark.parametrize("scenario", daily(EVERY_DAY, SCENARIOS), ids=lambda one: one.__name__)
def test_the_promise_is_kept_when(scenario, tmp_path):
    if scenario.__name__ in NEEDS_STRACE and not shutil.which("strace"):
        pytest.skip("no strace here")
    place = Place(tmp_path / "place", SOURCES)
    try:
        scenario(place)
    finally:
        place.close()
