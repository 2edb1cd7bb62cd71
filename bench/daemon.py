#!/usr/bin/env python3
"""What a slave costs: memory, signals per second, how long they take, beside Flask and webhook.

    daemon.py --work DIR --results DIR [--quick] [--rounds N]

All three run the same script for a signal, one that ends at once. slave.py writes each signal to
disk before it answers, and runs the script once for all the signals that came meanwhile; the
others start it for every signal, and forget the signal if they are killed.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import clients
import measure
import sshd

SECONDS = 0.6
NUMBERS = (1, 16, 256)
SOME, MANY = 10000, 100000
OURS = "slave.py"
ZEROES = "0" * 40
SCRIPT = f'#!/bin/sh\necho "$1 {ZEROES} {ZEROES}"\n'
FLASK = """
import logging, subprocess, sys
from flask import Flask, request
app = Flask(__name__)
@app.route("/")
def signal():
    subprocess.Popen(["slave-activate", request.args["repo"]], stdout=subprocess.DEVNULL)
    return "ok"
logging.getLogger("werkzeug").setLevel(logging.ERROR)
app.run("127.0.0.1", int(sys.argv[1]), threaded=True)
"""


class Slave:
    """One contestant: a started daemon, its port and the path of a signal."""

    def __init__(self, who, work, product=measure.PRODUCT):
        self.product = product
        self.folder = os.path.join(work, re.sub(r"\W", "", who))
        os.makedirs(self.folder, exist_ok=True)
        self.port, self.path = sshd.free_port(), "/?repo=hanuman"
        program = os.path.join(self.folder, "slave-activate")
        with open(program, "w", encoding="ascii") as handle:
            handle.write(SCRIPT)
        os.chmod(program, 0o755)
        env = dict(os.environ, PATH=self.folder + ":" + os.environ["PATH"], HOME=self.folder)
        env.update(SERVER_UPDATE_BIND="127.0.0.1", SERVER_UPDATE_REPOS_DIR=self.folder + "/repos")
        argv = {OURS: self.ours, "Flask": self.flask, "webhook": self.webhook}[who]()
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(argv, env=env, stdin=null, stdout=null, stderr=null)
        self.wait_until_up()

    def ours(self):
        program = os.path.join(self.product, "slave.py")
        return [sys.executable, "-I", program, "--port", str(self.port)]

    def flask(self):
        return ["python-with-flask", "-c", FLASK, str(self.port)]

    def webhook(self):
        """Debian's package of github.com/adnanh/webhook; it answers before the script ends."""
        hook = {
            "id": "update",
            "execute-command": os.path.join(self.folder, "slave-activate"),
            "pass-arguments-to-command": [{"source": "url", "name": "repo"}],
        }
        path = os.path.join(self.folder, "hooks.json")
        with open(path, "w", encoding="ascii") as handle:
            json.dump([hook], handle)
        self.path = "/hooks/update?repo=hanuman"
        return ["webhook", "-hooks", path, "-ip", "127.0.0.1", "-port", str(self.port)]

    def wait_until_up(self):
        url = f"http://127.0.0.1:{self.port}{self.path}"
        end = time.monotonic() + 10
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)
        raise measure.Failed(f"{self.folder}: not up")

    def memory(self):
        """Resident memory, in MB, with all that is mapped; without the scripts it started."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as handle:
            return int(re.search(r"VmRSS:\s+(\d+)", handle.read()).group(1)) / 1000

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def contestants():
    """Who can be had; who cannot is said loudly."""
    found = [OURS]
    for who, program in (("Flask", "python-with-flask"), ("webhook", "webhook")):
        if shutil.which(program):
            found.append(who)
        else:
            measure.skip(who, f"no {program}")
    return found


def load(slave, number, seconds):
    """One run's values: signals per second, and what 99 of 100 were answered within, in ms."""
    run = clients.Clients(slave.port, slave.path, number)
    took = run.run(seconds=seconds)
    times = sorted(run.latencies)
    return {"rate": len(times) / took, "p99": times[int(len(times) * 0.99)] * 1000}


def grow(slave, signals):
    """The slave's memory after so many signals from 16 clients."""
    clients.Clients(slave.port, slave.path, 16).run(signals=signals)
    return slave.memory()


def measure_rates(args, results, whos):
    """One daemon at a time: webhook still starts scripts long after it has answered."""
    groups = {}
    for number in NUMBERS[:2] if args.quick else NUMBERS:
        title = f"Signals from {number} client" + ("s" if number > 1 else "")
        groups[number] = results.group(title, OURS, kind="daemon", situation=str(number))
    for turn in range(1 if args.quick else args.rounds):
        for who in measure.in_turn(whos, turn):
            slave = Slave(who, args.work)
            try:
                for number, group in groups.items():
                    values = load(slave, number, 0.2 if args.quick else SECONDS)
                    measure.Results.add(group, who, values)
            finally:
                slave.stop()


def measure_all(args, results):
    memory = results.group("Memory of a slave", OURS, kind="daemon", situation="memory")
    some, many = (100, 1000) if args.quick else (SOME, MANY)
    whos = contestants()
    for who in whos:
        slave = Slave(who, args.work)
        try:
            values = {"idle": slave.memory(), "some": grow(slave, some)}
            if who == OURS and (args.all or args.quick):
                values["many"] = grow(slave, many)
            measure.Results.add(memory, who, values)
        finally:
            slave.stop()
    measure_rates(args, results, whos)
    for group in results.groups:
        measure.Results.sort(group, whos)


if __name__ == "__main__":
    measure.run_row("daemon", __doc__, measure_all)
