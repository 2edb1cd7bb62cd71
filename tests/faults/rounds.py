"""A round: the master runs under faults, then all is mended, run once more and looked at."""
import random
import signal
import time

from checker import Reader, Violation, check_clean_run, check_master, check_slave, wait_for_calm
from schedule import FAULTS, give_back, make_schedule, restart

EVENTS = 12
SPREAD_S = 1.5
WITHOUT_SLAVE = ("push", "force_push", "push_to_top", "kill_fleet_runs", "stop_fleet_runs",
                 "reset_everywhere")
# Faults after which an update of that slave may honestly end as failed; break_upstream: of any.
EXCUSES = {"kill_a_child", "kill_slave", "kill_everything", "edit_times", "break_record",
           "mount_volume", "hide_record", "remove_state", "limit_files"}


def run_events(fleet, events, faults=FAULTS):
    """Begin and end each fault at its time; those still to be ended are ended late, not never."""
    began, endings = time.monotonic(), []
    queue = [(event.at, event) for event in events]
    while queue or endings:
        todo = sorted(queue + endings, key=lambda item: item[0])[0]
        time.sleep(max(0, began + todo[0] - time.monotonic()))
        if todo in endings:
            endings.remove(todo)
            todo[1]()
            continue
        queue.remove(todo)
        event = todo[1]
        slave = fleet.slaves[event.slave]
        if slave.process.poll() is not None and event.kind not in WITHOUT_SLAVE:
            continue  # it is down already
        end = faults[event.kind](fleet, slave, random.Random(event.seed))
        if end:
            endings.append((event.at + event.lasts, end))


def mend_everything(fleet):
    """No more faults: what is down starts, what is broken outside of the slaves is mended."""
    fleet.http.fault = None
    for slave in fleet.slaves:
        slave.proxy.mode = None
        slave.clock.write_text("0")
        slave.unmount_volume()
        give_back(slave)
        restart(slave)


def run_masters(fleet, kind, events):
    """The master, and what happens to it, while the events take place: [(master, exit status)]."""
    masters = [fleet.master()]
    if kind == "second with another ref":
        masters.append(fleet.master("--ref", "side"))
    run_events(fleet, events)
    if kind == "interrupt":
        masters[0].process.send_signal(signal.SIGINT)
    elif kind == "kill":
        masters[0].process.kill()
    if kind in ("interrupt", "kill"):
        masters.append(fleet.master())
    return [(master, master.wait()) for master in masters]


def run_round(fleet, seed, events=EVENTS, spread_s=SPREAD_S):
    """One round; what happened as a dict of counts. Raises Violation with all that was broken."""
    kind, plan = make_schedule(seed, len(fleet.slaves), events, spread_s)
    for slave in fleet.slaves:
        slave.journal_before = len(slave.journal())
    fleet.history.push()
    since, reader = time.time(), Reader(fleet)
    ended = run_masters(fleet, kind, plan)
    mend_everything(fleet)
    problems = []
    for master, status in ended:
        problems += check_master(fleet, master, status)
    kinds = {event.kind for event in plan}
    excused = {event.slave for event in plan if event.kind in EXCUSES}
    excused |= set(range(len(fleet.slaves))) if "break_upstream" in kinds else set()
    excused |= {0} if "fill_disk" in kinds else set()
    for slave in fleet.slaves:
        wait_for_calm(slave)
    problems += check_clean_run(fleet, fleet.clean_run())
    for number, slave in enumerate(fleet.slaves):
        problems += check_slave(fleet, slave, since, number in excused)
    problems += reader.finish()
    if problems:
        raise Violation("seed %s: master: %s; %s\n%s" % (
            seed, kind, ", ".join("%s at %.2f s on %d" % (event.kind, event.at, event.slave)
                                  for event in plan), "\n".join(problems)))
    return {"accepted": sum(len([1 for when, _ in slave.accepted() if when >= since])
                            for slave in fleet.slaves),
            "faults": len(plan), "reads": reader.reads, "masters": len(ended) + 1}
