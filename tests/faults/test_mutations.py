"""The proof that the suite can fail: the product broken on purpose, caught each time.

A mutation is an edit of a copy of a script, found by a pattern: where the script no longer has
what the pattern describes, the test fails, and the pattern has to follow.
"""
import re
import shutil
import subprocess
from collections import namedtuple

import pytest
import scenarios
from product import ROOT, copy_scripts
from scenarios import Place

SCRIPTS = ("server-update", "slave.py", "slave-activate")
# What a scenario raises when it meets a broken product.
CAUGHT = (AssertionError, OSError, ValueError, LookupError, subprocess.SubprocessError)

LAST_LINE = r'(?=main "\$@"; exit\n\Z)'  # of a shell script: a definition before it wins


def publish_with(text):
    """The program that slave-activate's exchange runs, with a function that replaces another."""
    return 'publish_program="$publish_program\n%s"\n' % text


Mutation = namedtuple("Mutation", "name script pattern replacement scenario")
GUARD = r'(?m)^if __name__ == "__main__":$'  # a definition that comes before it replaces ours
AT_GUARD = '\n\nif __name__ == "__main__":'
MUTATIONS = [
    Mutation("answer before the record is written", "slave.py", GUARD,
             "save_now = Journal.save\n"
             "def save(self, *args):\n"
             "    threading.Timer(5, save_now, (self, *args)).start()\n"
             "Journal.save = save\n"
             + AT_GUARD,
             scenarios.accepted_survives_a_loss_of_power),
    Mutation("no fsync of the record", "slave.py", GUARD,
             "def write_synced(path, content):\n"
             "    with open(path, \"wb\") as handle:\n"
             "        handle.write(content)\n"
             + AT_GUARD,
             scenarios.accepted_is_on_disk_before_the_answer),
    Mutation("no fsync of the record's folder", "slave.py", GUARD,
             "def sync(self):\n"
             "    pass\n"
             "Journal.sync = sync\n"
             + AT_GUARD,
             scenarios.accepted_is_on_disk_before_the_answer),
    Mutation("what was queued is not taken up again", "slave.py", GUARD,
             "take_up_all = Updater.take_up\n"
             "def take_up(self, repo):\n"
             "    take_up_all(self, repo)\n"
             "    self.queued.clear()\n"
             "Updater.take_up = take_up\n"
             + AT_GUARD,
             scenarios.accepted_survives_a_loss_of_power),
    Mutation("no flush before the exchange", "slave-activate", LAST_LINE,
             publish_with("def flush_to_disk(new):\n    pass\n"),
             scenarios.a_clone_is_on_disk_before_it_goes_live),
    Mutation("no flush after the exchange", "slave-activate", LAST_LINE,
             publish_with("def flush_folders(new, live):\n    pass\n"),
             scenarios.a_clone_is_on_disk_before_it_goes_live),
    Mutation("rm before the rename", "slave-activate", LAST_LINE,
             publish_with("def exchange(new, live, aside):\n    import shutil\n"
                          "    shutil.rmtree(live)\n    os.rename(new, live)\n"),
             scenarios.a_reader_never_sees_it_missing),
    Mutation("two renames", "slave-activate", LAST_LINE,
             publish_with("def exchange(new, live, aside):\n    import time\n"
                          "    os.rename(live, aside)\n    time.sleep(0.02)\n"
                          "    os.rename(new, live)\n    os.rename(aside, new)\n"),
             scenarios.a_reader_never_sees_it_missing),
    Mutation("rm before the clone", "slave-activate", LAST_LINE,
             'sweep_if_needed() { rm -rf "$live"; }\n',
             scenarios.what_was_live_survives_a_failing_upstream),
    Mutation("no lock", "slave-activate", LAST_LINE,
             'take_lock() { open_lock "$lock"; }\n',
             scenarios.two_at_once_take_turns),
    Mutation("no sweep", "slave-activate", LAST_LINE,
             "sweep_if_needed() { :; }\n",
             scenarios.the_next_run_sweeps_what_a_killed_one_left),
    Mutation("pre-update's exit status ignored", "slave-activate", LAST_LINE,
             'run_pre_update() { run_hook pre-update "$new" || :; }\n',
             scenarios.a_failing_hook_keeps_what_is_live),
    Mutation("damaged objects taken over", "slave-activate", LAST_LINE,
             "find_changed() { :; }\n",
             scenarios.a_damaged_pack_heals),
    Mutation("the alternates file stays", "slave-activate", LAST_LINE,
             'adopt_objects_of() { cp -Rlf "$(cat "$1")/." "${1%/info/alternates}"; }\n',
             scenarios.a_clone_stands_alone),
    Mutation("any name by hand", "slave-activate", LAST_LINE,
             "check_arguments() { :; }\n",
             scenarios.no_name_reaches_outside_by_hand),
    Mutation("any name by HTTP", "slave.py", GUARD,
             "def is_repo_name(text):\n"
             "    return True\n"
             "PARAMETERS[\"repo\"] = is_repo_name\n"
             + AT_GUARD,
             scenarios.no_name_reaches_outside_by_http),
    Mutation("no signature is as good as a right one", "slave.py", GUARD,
             "check_all = Guard.check_signature\n"
             "def check_signature(self, values, *rest):\n"
             "    if values:\n"
             "        check_all(self, values, *rest)\n"
             "Guard.check_signature = check_signature\n"
             + AT_GUARD,
             scenarios.an_unsigned_signal_is_refused),
    Mutation("the older ref wins", "slave.py", GUARD,
             "accept_newer = Records.accept\n"
             "def accept(self, repo, ref, *rest):\n"
             "    ref = self.queued.ref if self.queued else ref\n"
             "    return accept_newer(self, repo, ref, *rest)\n"
             "Records.accept = accept\n"
             + AT_GUARD,
             scenarios.the_last_signal_wins),
    Mutation("ids follow the clock", "slave.py", GUARD,
             "def next_update_id(newest, now):\n"
             "    return int(now * 1000)\n"
             + AT_GUARD,
             scenarios.ids_grow_although_the_clock_went_back),
    Mutation("only the shell is ended, not its group", "slave.py", GUARD,
             "def signal_group(leader, number):\n"
             "    with contextlib.suppress(ProcessLookupError):\n"
             "        os.kill(leader, number)\n"
             + AT_GUARD,
             scenarios.nothing_of_a_run_outlives_it),
    Mutation("slave-activate's exit status ignored", "slave.py", GUARD,
             "judge_well = judge\n"
             "def judge(*run):\n"
             "    changes = {\"commit\": None, \"previous\": None}\n"
             "    changes.update(judge_well(*run), state=\"live\")\n"
             "    return changes\n"
             + AT_GUARD,
             scenarios.a_failed_update_is_no_success),
    Mutation("unreachable is as good as live", "server-update",
             r"return outcome in GOOD", 'return outcome in (*GOOD, "unreachable")',
             scenarios.a_dead_slave_is_no_success),
    Mutation("different commits are no matter", "server-update",
             r"result\.commit != first", "False",
             scenarios.different_commits_are_no_success),
    Mutation("a poll without an answer is an outcome", "server-update",
             r'Step\(WAIT, "timeout", judge', 'Step(END, "failed", judge',
             scenarios.a_restart_between_signal_and_outcome_is_seen_through),
    Mutation("another ref is as good as ours", "server-update",
             r'record\.state == "live" and record\.ref != ref', "False",
             scenarios.a_replaced_update_is_no_success),
    Mutation("the commit is not the slave's word", "server-update",
             r'read_commit\(body, "commit"\)', 'read_commit(body, "previous")',
             scenarios.what_is_told_as_live_is_live),
]


def check_syntax(script, text):
    """A broken product must still be a program: a syntax error is caught by anything."""
    if text.startswith("#!/bin/sh"):
        assert subprocess.call(["sh", "-n", str(script)]) == 0
    else:
        compile(text, str(script), "exec")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name.replace(" ", "-"))
def test_the_suite_catches(mutation, tmp_path):
    if not shutil.which("strace") and "on_disk" in mutation.scenario.__name__:
        pytest.skip("no strace here")
    sources = copy_scripts(ROOT, tmp_path / "broken", *SCRIPTS)
    script = sources / mutation.script
    whole = script.read_text(encoding="utf-8")
    text, edits = re.subn(mutation.pattern, mutation.replacement, whole)
    assert edits, "%s no longer has what this mutation breaks" % mutation.script
    script.write_text(text, encoding="utf-8")
    check_syntax(script, text)
    place = Place(tmp_path / "place", sources)
    try:
        with pytest.raises(CAUGHT):
            mutation.scenario(place)
    finally:
        place.close()


def test_mutations_are_many_and_touch_every_script():
    assert len(MUTATIONS) >= 10
    assert {mutation.scenario for mutation in MUTATIONS} == set(scenarios.SCENARIOS)
    assert {mutation.script for mutation in MUTATIONS} == set(SCRIPTS)
