"""A fleet with two tiers of relays, under faults: each push that the top one has answered with 202
is accounted for on every slave beneath.

A forge tells the top relay alone. Beneath it are a leaf and another relay, which has leaves of its
own; all of them are reached through proxies, as the network between them breaks, too. All have one
secret.
"""
import http.client
import json
import random
import signal
import time
from collections import Counter

from checker import Violation, check_slave, check_tree, wait_for_calm
from fleet import REPO, FleetSlave, History
from forge_support import encode, github, github_headers, make_key
from processes import fleet_runs_below, kill, wait_until
from proxy import ProxyLoop
from rounds import mend_everything, run_events
from schedule import FAULTS, Event
from slave_support import SECRET, make_secret, signature
from upstream import HttpUpstream, Upstream

LEAVES = 3  # one beneath the top relay, the others beneath the low one
EVENTS = 12  # beside the pushes
PUSHES = 8
NEXT_RUN_S = 2
SPREAD_S = 4
LOW_OPTIONS = "--timeout 12 --connect-timeout 1 --retries 1"
TOP_OPTIONS = "--timeout 25 --connect-timeout 1 --retries 1"


def announce(fleet, commit):
    """What GitHub sends at a push: the update's id, or None where no 202 has come."""
    body = encode(github(after=commit))
    forge = http.client.HTTPConnection("127.0.0.1", fleet.top.proxy.port, timeout=10)
    try:
        headers = github_headers(make_key(REPO), body)
        forge.request("POST", "/hook?repo=" + REPO, body, headers)
        answer = forge.getresponse()
        said = json.loads(answer.read().decode("ascii"))
        return said["update"] if answer.status == 202 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        forge.close()


def push_to_top(fleet, slave, rng):
    """Somebody pushes, and the forge tells the top relay, if it can be reached."""
    announce(fleet, fleet.history.push())


def find_fleet_runs(fleet):
    """The processes of server-update that relays run."""
    return fleet_runs_below(fleet.top.folder) + fleet_runs_below(fleet.low.folder)


def signal_fleet_runs(fleet, signum):
    """A signal to each server-update that a relay runs; to the next ones, where there is none."""
    end = time.monotonic() + NEXT_RUN_S
    while not find_fleet_runs(fleet) and time.monotonic() < end:
        time.sleep(0.01)
    for pid in find_fleet_runs(fleet):
        kill(pid, signum)
        fleet.ended_runs += 1


def kill_fleet_runs(fleet, slave, rng):
    """kill -9 of the relays' server-update."""
    signal_fleet_runs(fleet, signal.SIGKILL)


def stop_fleet_runs(fleet, slave, rng):
    """SIGTERM of the relays' server-update."""
    signal_fleet_runs(fleet, signal.SIGTERM)


def reset_everywhere(fleet, slave, rng):
    """Each connection is reset: of the forge, of relays, to slaves, to upstream."""
    for one in fleet.slaves:
        one.proxy.mode = "reset"
    fleet.http.fault = "reset"

    def mend():
        for one in fleet.slaves:
            one.proxy.mode = None
        fleet.http.fault = None
    return mend


KINDS = ("kill_slave", "kill_everything", "kill_a_child", "stop_cleanly", "cut_network",
         "reset_clients", "fail_in_passing", "push")
OWN_FAULTS = (push_to_top, kill_fleet_runs, stop_fleet_runs, reset_everywhere)
OF_THE_FLEET = {fault.__name__ for fault in OWN_FAULTS} | {"push", "fail_in_passing"}
RELAY_FAULTS = dict({kind: FAULTS[kind] for kind in KINDS},
                    **{fault.__name__: fault for fault in OWN_FAULTS})


# Notes what is live after each update that has ended.
UPDATE_ENDED = """#!/bin/sh
echo "$4" >>'%s'
"""


class SignedSlave(FleetSlave):
    """A slave with a secret, which whoever asks it knows."""

    killed_children = 0  # single ones, in all rounds so far

    def get(self, path, headers=None, method="GET", timeout=120):
        """One signed request, not by way of the proxy: (status, headers, body as bytes)."""
        signed = dict(signature(path, method=method), **(headers or {}))
        return super().get(path, signed, method, timeout)


class RelayFleet:
    """Leaves, a relay above some of them, and one above that and the others."""

    def __init__(self, folder):
        self.folder = folder
        self.upstream = Upstream(folder / "upstream")
        self.http = HttpUpstream(self.upstream)
        self.history = History(self.upstream)
        self.history.push()
        self.history.push("side")
        self.loop = ProxyLoop()
        self.secret = make_secret(folder / "secret", SECRET)
        leaves = [self.add("leaf-%d" % number) for number in range(LEAVES)]
        self.low = self.add("low", leaves[1:], LOW_OPTIONS)
        self.top = self.add("top", [leaves[0], self.low], TOP_OPTIONS)
        self.slaves = [*leaves, self.low, self.top]
        self.ended_runs = 0  # of server-update, by a signal of ours

    def add(self, name, beneath=(), options=""):
        """A slave, with others beneath it perhaps."""
        settings = {"SECRET_FILE": self.secret}
        if beneath:
            slavelist = self.folder / (name + ".txt")
            slavelist.write_text("".join(slave.proxy.entry + "\n" for slave in beneath))
            settings.update(SLAVELIST=slavelist, RELAY_OPTIONS=options)
        slave = SignedSlave(self.folder / name, self.http.url, self.loop, settings=settings)
        hook = slave.hooks / "update-ended"
        hook.write_text(UPDATE_ENDED % (slave.folder / "told"))
        hook.chmod(0o755)
        return slave

    def close(self):
        for slave in self.slaves:
            slave.close()
        self.loop.close()
        self.http.close()


def make_relay_schedule(seed):
    """The events of a round, in order: a pure function of its seed."""
    rng = random.Random(seed)
    kinds = [rng.choice(sorted(set(RELAY_FAULTS) - {"push_to_top"})) for _ in range(EVENTS)]
    kinds += ["push_to_top"] * PUSHES
    return sorted(Event(round(rng.uniform(0, SPREAD_S), 3), kind, rng.randrange(LEAVES + 2),
                        round(rng.uniform(0.1, 2), 3), rng.randrange(2 ** 32)) for kind in kinds)


def live_at(slave):
    """The commit of a live tree, looked up without the product."""
    return slave.json("/status?repo=" + REPO)["commit"] if slave.tree.exists() else None


def check_beneath(fleet, record):
    """Who is not at the top relay's commit is named in its record, or its relay is."""
    if record["state"] == "failed":
        if set(record["beneath"]) != {"not started"}:
            yield "failed, and beneath it is %s" % record["beneath"]
        return
    behind = [slave for slave in fleet.slaves[:-1] if live_at(slave) != record["commit"]]
    if behind and set(record["beneath"]) == {"live"}:
        yield "all are live beneath, and %s is not: %s" % (behind[0].folder.name, record)
    told = {bad["slave"]: bad["outcome"] for bad in record["beneath_bad"]}
    low = fleet.low.proxy.entry
    for slave in behind:
        entry = slave.proxy.entry
        name = "%s > %s" % (low, entry)
        is_told = entry in told or name in told or set(record["beneath"]) == {"not started"}
        # A relay that could not be followed to its end says nothing of those beneath it.
        if slave in fleet.slaves[1:LEAVES] and told.get(low, "beneath failed") != "beneath failed":
            is_told = True
        if not is_told:
            yield "%s is at %s, and the top relay says %s" % (
                slave.folder.name, live_at(slave), record)


def check_told(fleet):
    """Of each update that all were told to be live by, each slave has put the commit live."""
    for record in fleet.top.json("/status?repo=%s&history=1" % REPO)["updates"]:
        if set(record["beneath"]) != {"live"}:
            continue
        if record["beneath"]["live"] != LEAVES + 1:
            yield "not all are told: %s" % record
        for slave in fleet.slaves[:-1]:
            put_live = [line[1] for line in slave.journal() if len(line) == 3]
            if record["commit"] not in put_live:
                yield "%s never put %s live, and the top relay says that all did: %s" % (
                    slave.folder.name, record["commit"], record)


def check_ended(slave):
    """The hook update-ended has run for each update that has ended, at least once.

    (One that kill_a_child has met before it could note anything has run, too.)
    """
    updates = slave.json("/status?repo=%s&history=1" % REPO)["updates"]
    ended = Counter(record["commit"] or "-" for record in updates)

    def is_told():
        told = Counter((slave.folder / "told").read_text().split())
        return sum((ended - told).values()) <= slave.killed_children

    try:
        wait_until(is_told, what="update-ended of all of %s" % ended)
    except AssertionError as error:
        yield str(error)


def check_all_good(fleet):
    """One more push, and nothing is left of the faults."""
    commit = fleet.history.push()
    update = announce(fleet, commit)
    record = fleet.top.wait_update(REPO, update)
    if (record["commit"], record["beneath"]) != (commit, {"live": LEAVES + 1}):
        yield "the next push did not put all right: %s" % record
    for slave in fleet.slaves:
        wait_for_calm(slave)
        if live_at(slave) != commit:
            yield "%s is at %s, not %s" % (slave.folder.name, live_at(slave), commit)
        yield from check_tree(fleet, slave)


def run_relay_round(fleet, seed):
    """One round; what happened as a dict of counts. Raises Violation with all that was broken."""
    plan = make_relay_schedule(seed)
    for slave in fleet.slaves:
        slave.journal_before = len(slave.journal())
    since = fleet.history.pushed_at[-1]
    ended_before = fleet.ended_runs
    run_events(fleet, plan, RELAY_FAULTS)
    mend_everything(fleet)
    for event in plan:
        if event.kind == "kill_a_child":
            fleet.slaves[event.slave].killed_children += 1
    # From above, as those above ask those beneath.
    for slave in reversed(fleet.slaves):
        wait_for_calm(slave)
    problems = list(check_beneath(fleet, fleet.top.json("/status?repo=" + REPO)))
    problems += check_told(fleet)
    for slave in fleet.slaves:
        problems += check_slave(fleet, slave, since, excused=True)
        problems += ["%s: %s" % (slave.folder.name, problem) for problem in check_ended(slave)]
    problems += check_all_good(fleet)
    if problems:
        raise Violation("seed %s: %s\n%s" % (
            seed, ", ".join("%s at %.2f s on %d" % (event.kind, event.at, event.slave)
                            for event in plan), "\n".join(problems)))
    return {"accepted": len([1 for when, _ in fleet.top.accepted() if when >= since]),
            "faults": len(plan), "fleet runs ended": fleet.ended_runs - ended_before}
