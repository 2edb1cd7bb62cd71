"""The proof that the suite can fail: the product broken on purpose, caught each time."""
import subprocess
from collections import namedtuple

import processes
import pytest
import scenarios
from mutations import SCRIPTS, NothingToBreak, break_copy
from product import need
from scenarios import Place

# What a scenario raises when it meets a broken product.
CAUGHT = (AssertionError, OSError, ValueError, LookupError, subprocess.SubprocessError)

Mutation = namedtuple("Mutation", "name script replaces code scenario")
MUTATIONS = [
    Mutation("answer before the record is written", "slave.py", "Journal.save", """
def broken(self, repo, records):
    threading.Timer(5, original, (self, repo, records)).start()
""", scenarios.accepted_survives_a_loss_of_power),
    Mutation("no fsync of the record", "slave.py", "write_synced", """
def broken(path, content):
    with open(path, "wb") as handle:
        handle.write(content)
""", scenarios.accepted_is_on_disk_before_the_answer),
    Mutation("no fsync of the record's folder", "slave.py", "Journal.sync", """
def broken(self):
    pass
""", scenarios.accepted_is_on_disk_before_the_answer),
    Mutation("what was queued is not taken up again", "slave.py", "Updater.take_up", """
def broken(self, repo):
    original(self, repo)
    self.waiting.clear()
""", scenarios.accepted_survives_a_loss_of_power),
    Mutation("no flush before the exchange", "slave-activate", "publish_program/flush_to_disk", """
def flush_to_disk(new):
    pass
""", scenarios.a_clone_is_on_disk_before_it_goes_live),
    Mutation("no flush after the exchange", "slave-activate", "publish_program/flush_folders", """
def flush_folders(new, live):
    pass
""", scenarios.a_clone_is_on_disk_before_it_goes_live),
    Mutation("rm before the rename", "slave-activate", "publish_program/exchange", """
def exchange(new, live, aside):
    import shutil
    if os.path.lexists(live):
        shutil.rmtree(live)
    os.rename(new, live)
""", scenarios.a_reader_never_sees_it_missing),
    Mutation("two renames", "slave-activate", "publish_program/exchange", """
def exchange(new, live, aside):
    import time
    if os.path.lexists(live):
        os.rename(live, aside)
    time.sleep(0.02)
    os.rename(new, live)
    if os.path.lexists(aside):
        os.rename(aside, new)
""", scenarios.a_reader_never_sees_it_missing),
    Mutation("rm before the clone", "slave-activate", "make_clone", """
make_clone() {
    rm -rf "$live"
    original
}
""", scenarios.what_was_live_survives_a_failing_upstream),
    Mutation("no lock", "slave-activate", "take_lock", """
take_lock() {
    : >>"$lock"
}
""", scenarios.two_at_once_take_turns),
    Mutation("no sweep", "slave-activate", "sweep_if_needed", """
sweep_if_needed() {
    :
}
""", scenarios.the_next_run_sweeps_what_a_killed_one_left),
    Mutation("pre-update's exit status ignored", "slave-activate", "run_pre_update", """
run_pre_update() {
    (original) || :
}
""", scenarios.a_failing_hook_keeps_what_is_live),
    Mutation("damaged objects taken over", "slave-activate", "find_changed", """
find_changed() {
    :
}
""", scenarios.a_damaged_pack_heals),
    Mutation("the alternates file stays", "slave-activate", "adopt_objects", """
adopt_objects() {
    :
}
""", scenarios.a_clone_stands_alone),
    Mutation("any name by hand", "slave-activate", "check_arguments", """
check_arguments() {
    :
}
""", scenarios.no_name_reaches_outside_by_hand),
    Mutation("any name by HTTP", "slave.py", "parse_query", """
def broken(query):
    pairs = [part.partition("=") for part in query.split("&")]
    return {name: unquote(text) for name, _, text in pairs if name in PARAMETERS}
""", scenarios.no_name_reaches_outside_by_http),
    Mutation("no signature is as good as a right one", "slave.py", "Guard.check_signature", """
def broken(self, values, *signed):
    if values:
        original(self, values, *signed)
""", scenarios.an_unsigned_signal_is_refused),
    Mutation("one key for all slaves", "server-update", "derive_key", """
def broken(master_key, origin):
    return original(master_key, "")
""", scenarios.a_slaves_key_is_worth_nothing_at_another),
    Mutation("the older ref wins", "slave.py", "Records.accept", """
def broken(self, repo, ref, *more):
    return original(self, repo, self.queued.ref if self.queued else ref, *more)
""", scenarios.the_last_signal_wins),
    Mutation("ids follow the clock", "slave.py", "Records.accept", """
def broken(self, repo, ref, now, *more):
    after = original(self, repo, ref, now, *more)
    return after._replace(queued=after.queued._replace(update=int(now * 1000)))
""", scenarios.ids_grow_although_the_clock_went_back),
    Mutation("only the shell is ended, not its group", "slave.py", "Run.signal", """
def broken(self, number):
    try:
        os.kill(self.process.pid, number)
    except ProcessLookupError:
        pass
    return True
""", scenarios.nothing_of_a_run_outlives_it),
    Mutation("slave-activate's exit status ignored", "slave.py", "judge", """
def broken(*run, **more):
    return dict(original(*run, **more), state="live", commit=None, previous=None)
""", scenarios.a_failed_update_is_no_success),
    Mutation("unreachable is as good as live", "server-update", "is_good", """
def broken(outcome, *more):
    return outcome == "unreachable" or original(outcome, *more)
""", scenarios.a_dead_slave_is_no_success),
    Mutation("different commits are no matter", "server-update", "exit_code", """
def broken(results):
    return 1 - all(is_good(result.outcome) for result in results)
""", scenarios.different_commits_are_no_success),
    Mutation("a poll without an answer is an outcome", "server-update", "judge_poll", """
def broken(reply, *more):
    step = original(reply, *more)
    return step if reply.status else step._replace(action=END, outcome="failed")
""", scenarios.a_restart_between_signal_and_outcome_is_seen_through),
    Mutation("another ref is as good as ours", "server-update", "judge_record", """
def broken(record, args, *more):
    record.ref = args.ref
    return original(record, args, *more)
""", scenarios.a_replaced_update_is_no_success),
    Mutation("nothing goes on beneath", "slave.py", "Updater.update_beneath", """
def broken(self, record, changes):
    return changes
""", scenarios.a_push_reaches_the_slaves_beneath),
    Mutation("all beneath count as live", "slave.py", "read_summary", """
def broken(stdout):
    summary = original(stdout)
    return dict(summary, beneath={"live": sum(summary["beneath"].values())})
""", scenarios.a_dead_slave_beneath_is_told),
    Mutation("a relay ends before those beneath", "slave.py", "Updater.update_beneath", """
def broken(self, record, changes):
    threading.Thread(target=original, args=(self, record, dict(changes)), daemon=True).start()
    return changes
""", scenarios.a_push_survives_a_kill_of_the_relay),
    Mutation("any proof of a push is a right one", "slave.py", "check_proofs", """
def broken(*_):
    pass
""", scenarios.a_push_without_its_key_starts_nothing),
    Mutation("a hook's key is for any repository", "slave.py", "make_hook_key", """
def broken(secret, repo, ref):
    return original(secret, "another", None)
""", scenarios.a_push_without_its_key_starts_nothing),
    Mutation("seen from outside all is live", "slave.py", "outcome", """
def broken(record):
    return "live"
""", scenarios.a_failed_update_is_none_seen_from_outside),
    Mutation("the commit is not the slave's word", "server-update", "read_commit", """
def broken(body, name):
    return original(body, "previous")
""", scenarios.what_is_told_as_live_is_live),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name.replace(" ", "-"))
def test_the_suite_catches(mutation, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LATEST_S", 60)  # some are caught as something never happens
    if "on_disk" in mutation.scenario.__name__:
        need("strace")
    sources = break_copy(tmp_path / "broken", mutation.script, mutation.replaces, mutation.code)
    place = Place(tmp_path / "place", sources)
    try:
        with pytest.raises(CAUGHT):
            mutation.scenario(place)
    finally:
        place.close()


def test_mutations_are_many_and_touch_every_script():
    assert len(MUTATIONS) >= 32
    assert {mutation.scenario for mutation in MUTATIONS} == set(scenarios.SCENARIOS)
    assert {mutation.script for mutation in MUTATIONS} == set(SCRIPTS)


@pytest.mark.parametrize(
    ("script", "name", "code"),
    [
        ("slave.py", "no_such_function", "def broken(): pass"),
        ("slave.py", "Journal.no_such_method", "def broken(): pass"),
        ("slave-activate", "no_such_function", "no_such_function() { :; }"),
        ("slave-activate", "publish_program/no_such_function", "def no_such_function(): pass"),
        ("slave-activate", "no_such_program/exchange", "def exchange(): pass"),
    ],
)
def test_what_is_not_there_cannot_be_broken(tmp_path, script, name, code):
    with pytest.raises(NothingToBreak):
        break_copy(tmp_path / "broken", script, name, code)
