#!/usr/bin/env python3
"""A signal to many slaves: server-update beside curl -Z, xargs and curl, and the shells over ssh.

    fanout.py --work DIR --results DIR [--quick] [--rounds N] [--all]

The slaves are addresses of 127.0.0.0/8, answered by slaves.py; those that are dead drop packets.
"""
import os
import shutil
import subprocess
import sys
import threading
import time

import measure
import slaves
import sshd

OURS = "server-update"
CURL, XARGS = "curl -Z", "xargs -P64 curl"
CONNECT_S = 4
SHORT_CONNECT_S = 0.5  # where nothing is said of the default
DELAY_S = 0.05
DEAD_EVERY = 50
UPDATE_S = 5
XARGS_MOST = 1000
POLL_S = 0.02
MANY = (1000, 10000, 100000)
MANY_ONCE = 100000  # slaves that have one run, unless with --all: it takes a minute


class Fleet:
    """A process of slaves.py and the lists that name its slaves."""

    def __init__(self, work, number, delay_s=0.0, dead=False, update_s=0.0):
        self.number, self.work = number, work
        hosts = [slaves.address(slave) for slave in range(number)]
        self.dead = hosts[DEAD_EVERY // 2 :: DEAD_EVERY] if dead else []
        program = os.path.join(measure.HERE, "slaves.py")
        argv = (sys.executable, program, str(delay_s), str(update_s), *self.dead)
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE)
        port = int(self.process.stdout.readline() or 0)
        if not port:
            raise measure.Failed("slaves.py did not start")
        urls = [f"http://{host}:{port}/?repo=hanuman" for host in hosts]
        self.list = self.write("slavelist.txt", [f"{host}:{port}" for host in hosts])
        self.urls = self.write("urls.txt", urls)
        self.config = self.write("curl.txt", [f'url="{url}"\noutput=/dev/null' for url in urls])

    def write(self, name, lines):
        path = os.path.join(self.work, name)
        with open(path, "w", encoding="ascii") as handle:
            handle.writelines(line + "\n" for line in lines)
        return path

    def commands(self, follow=False, connect_s=CONNECT_S, product=measure.PRODUCT):
        """Who takes part: the command, and what a result looks like in its output."""
        program = os.path.join(product, "server-update")
        ours = [sys.executable, program, "--list", self.list]
        ours += ["--json", "--retries", "0", "--connect-timeout", str(connect_s), "hanuman"]
        found = {OURS: (ours if follow else [*ours, "--no-wait"], b'"result"')}
        if not shutil.which("curl"):
            return found
        curl = ["-s", "--connect-timeout", str(connect_s), "-w", "%{http_code}\\n"]
        parallel = ["curl", "-Z", "--parallel-immediate", "--parallel-max", "300", *curl]
        found[CURL] = ([*parallel, "-K", self.config], b"202")
        one = ["xargs", "-a", self.urls, "-P", "64", "-n", "1", "curl", "-o", "/dev/null", *curl]
        found[XARGS] = (one, b"202")
        return found

    def stop(self):
        measure.stop(self.process)


class MemoryPoller(threading.Thread):
    """The most memory that a process and its children have for themselves, in MB."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.most = pid, 0
        self.done = threading.Event()
        self.start()

    def run(self):
        while not self.done.wait(POLL_S):
            self.most = max(self.most, measure.own_bytes(measure.family(self.pid)))

    def stop(self):
        self.done.set()
        self.join()
        return self.most / 1e6


def run_counted(argv, mark, expected, env=None):
    """What argv took; raises measure.Failed unless the mark is expected times in its output."""
    null = subprocess.DEVNULL
    before = time.monotonic()
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=null, stderr=null, env=env)
    poller = MemoryPoller(child.pid)
    text, first = b"", None
    for part in iter(lambda: child.stdout.read1(65536), b""):
        text += part
        if first is None and mark in text:
            first = time.monotonic() - before
    child.stdout.close()
    _, child.returncode, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - before
    if text.count(mark) != expected:
        raise measure.Failed(f"{argv[:3]}: {text.count(mark)} results in place of {expected}")
    cpu = usage.ru_utime + usage.ru_stime
    values = {"seconds": seconds, "cpu": cpu, "memory": poller.stop(), "first": first}
    if argv[0] == "curl":
        del values["first"]  # it keeps its output back until a block of it is full
    return values


def take_turns(group, rounds, commands, expected, env=None):
    """expected: how many results each of the contestants has to show."""
    whos = list(commands)
    for number in range(rounds):
        for who in measure.in_turn(whos, number):
            argv, mark = commands[who]
            measure.Results.add(group, who, run_counted(argv, mark, expected[who], env))
    measure.Results.sort(group, whos)


def measure_signals(args, results, number, delay_s, dead, connect_s=CONNECT_S):
    """A table: one signal to each, no waiting for the update."""
    fleet = Fleet(args.work, number, delay_s, dead)
    words = "answering after 50 ms" if delay_s else "answering at once"
    if dead:
        words += f", 2 % dead and given up after {connect_s} s"
    situation = ("delayed" if delay_s else "instant") + " dead" * dead
    title = f"A signal to {number:,} slaves, {words}"
    group = results.group(title, OURS, kind=f"signal-{number}", situation=situation)
    if situation == "instant":
        group["plot"] = {"slaves": number}
    try:
        commands = fleet.commands(connect_s=connect_s)
        if number > XARGS_MOST or number == XARGS_MOST and situation != "instant":
            commands.pop(XARGS, None)
        # curl writes 000 for a dead one, server-update a result that says what is wrong
        alive = number - len(fleet.dead)
        expected = {who: number if who == OURS else alive for who in commands}
        take_turns(group, args.rounds, commands, expected)
    finally:
        fleet.stop()


def measure_followed(args, results, number, update_s):
    """A table: the same slaves followed to the end of an update that takes update_s."""
    fleet = Fleet(args.work, number, DELAY_S, dead=True, update_s=update_s)
    title = f"{number:,} slaves, 2 % dead, followed to the end of updates that take {update_s} s"
    group = results.group(title, OURS, kind="followed", situation="delayed dead")
    try:
        commands = {OURS: fleet.commands(follow=True)[OURS]}
        take_turns(group, args.rounds, commands, {OURS: number})
    finally:
        fleet.stop()


def measure_many(args, results, number):
    """A table: slaves that all go live, on one machine with their master."""
    rounds = 1 if number >= MANY_ONCE and not args.all else args.rounds
    fleet = Fleet(args.work, number, update_s=UPDATE_S)
    title = f"{number:,} slaves, all followed to the end of updates that take {UPDATE_S} s"
    group = results.group(title, OURS, kind="many", situation=str(number))
    group["plot"] = {"followed": number}
    program = os.path.join(measure.PRODUCT, "server-update")
    argv = [sys.executable, program, "--list", fleet.list, "--json", "hanuman"]
    try:
        take_turns(group, rounds, {OURS: (argv, b'"outcome": "live"')}, {OURS: number})
    finally:
        fleet.stop()


def shell_commands(ssh, number, fleet):
    """The shells over ssh, each running a command that does nothing on all hosts at once."""
    hosts = ",".join(f"slave{slave}" for slave in range(1, number + 1))
    found = {OURS: fleet.commands()[OURS]}
    say = "echo 202"
    if shutil.which("pdsh"):
        found["pdsh"] = (["pdsh", "-f", str(number), "-w", hosts, say], b"202")
    if shutil.which("clush"):
        argv = ["clush", "-f", str(number), *ssh.clush_options(), "-w", hosts, say]
        found["clush"] = (argv, b"202")
    if shutil.which("ansible"):
        argv = ["ansible", "all", "-i", hosts + ",", "-f", str(number), "-m", "raw", "-a", say]
        found["ansible -m raw"] = (argv, b"\n202")
    return found


def measure_shells(args, results, number):
    """A table: what reaching the slaves over ssh costs, where nothing is to be done there."""
    ssh = sshd.start(os.path.join(args.work, "sshd"))
    if not ssh:
        return
    fleet = Fleet(args.work, number)
    title = f"A command to {number} hosts over ssh, beside a signal to {number} slaves"
    group = results.group(title, OURS, kind="shells", situation=str(number))
    env = dict(os.environ, HOME=os.path.join(args.work, "home"), **ssh.environment())
    try:
        commands = shell_commands(ssh, number, fleet)
        take_turns(group, args.rounds, commands, dict.fromkeys(commands, number), env)
    finally:
        fleet.stop()
        ssh.stop()


def measure_all(args, results):
    if args.quick:
        measure_signals(args, results, 10, 0.0, False)
        return
    for number in (10, 100, 1000, 10000):
        measure_signals(args, results, number, 0.0, False)
        if args.all:
            measure_signals(args, results, number, DELAY_S, False)
        if args.all and number >= DEAD_EVERY:
            measure_signals(args, results, number, 0.0, True, SHORT_CONNECT_S)
        if number == 10000 or args.all and number >= DEAD_EVERY:
            connect_s = CONNECT_S if number == 10000 else SHORT_CONNECT_S
            measure_signals(args, results, number, DELAY_S, True, connect_s)
    measure_followed(args, results, 10000, UPDATE_S)
    for number in MANY:
        measure_many(args, results, number)
    if args.all:
        measure_shells(args, results, 10)
    measure_shells(args, results, 100)


def main(argv):
    args = measure.parser(__doc__).parse_args(argv)
    if args.quick:
        args.rounds = 1
    os.makedirs(os.path.join(args.work, "home"), exist_ok=True)
    with measure.kept_results("fanout", args.results) as results:
        measure_all(args, results)


if __name__ == "__main__":
    main(sys.argv[1:])
