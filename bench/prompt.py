#!/usr/bin/env python3
"""How soon people and programs get what they wait for: the first sign, an answer, the end.

    prompt.py --work DIR --results DIR [--quick] [--rounds N]

The tests hold that these come at all; how fast a machine is that does other things meanwhile is
no matter for a test. Each has a bound in claims.py.
"""

import http.client
import json
import os
import pty
import signal
import subprocess
import sys
import time

import daemon
import fanout
import fleet
import measure

SLAVES, QUICK_SLAVES = 10000, 10
UPDATE_S = 60  # of slaves that are interrupted before
UNDER_WAY_S, QUICK_UNDER_WAY_S = 5, 0.5
REQUESTS = 50
OURS = "slave.py listens"


def python_start_s():
    """What the interpreter itself takes to start, with what server-update imports."""
    program = "import argparse, concurrent.futures, http.client, json, ssl, urllib.request"
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.monotonic() - before


def first_sign_s(slaves):
    """Until server-update shows something on a terminal, beyond Python's own start."""
    argv = slaves.commands(follow=True)[fanout.OURS][0]
    argv = [word for word in argv if word != "--json"]
    ours, theirs = pty.openpty()
    null = subprocess.DEVNULL
    start_s = python_start_s()
    before = time.monotonic()
    process = subprocess.Popen(argv, stdin=null, stdout=theirs, stderr=theirs)
    os.read(ours, 1)
    seconds = time.monotonic() - before
    process.kill()
    process.wait()
    os.close(ours)
    os.close(theirs)
    return max(0.0, seconds - start_s)


def interrupt_s(slaves, under_way_s):
    """From Ctrl-C to the end, with all slaves under way and their outcomes told."""
    argv = slaves.commands(follow=True)[fanout.OURS][0]
    null = subprocess.DEVNULL
    process = subprocess.Popen(argv, stdin=null, stdout=subprocess.PIPE, stderr=null)
    process.stdout.readline()  # that it starts
    time.sleep(under_way_s)  # it has signalled them by then, and waits
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    text = process.stdout.read()
    seconds = time.monotonic() - before
    measure.stop(process)
    if text.count(b'"result"') != slaves.number:
        raise measure.Failed(f"Ctrl-C: {text.count(b'result')} results of {slaves.number}")
    return seconds


def start_slave(work, *options):
    """slave.py with a slave-activate that ends at once: (process, what it has said is a pipe)."""
    os.makedirs(work, exist_ok=True)
    activate = os.path.join(work, "slave-activate")
    with open(activate, "w", encoding="ascii") as handle:
        handle.write(daemon.SCRIPT)
    os.chmod(activate, 0o755)
    env = dict(os.environ, PATH=work + ":" + os.environ["PATH"], HOME=work)
    env["SERVER_UPDATE_BIND"] = "127.0.0.1"
    argv = [sys.executable, "-I", os.path.join(measure.PRODUCT, "slave.py"), "--port", "0"]
    pipe = subprocess.PIPE
    return subprocess.Popen([*argv, *options], env=env, stdin=subprocess.DEVNULL, stderr=pipe)


def mistake_s(work):
    """Until slave.py has said what is wrong with its settings, and ended."""
    before = time.monotonic()
    process = start_slave(work, "--timeout", "never")
    process.communicate()
    if process.returncode != 2:
        raise measure.Failed(f"slave.py ended with {process.returncode}")
    return time.monotonic() - before


def ask(connection, path):
    """(status, body) of one request on a kept connection."""
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def slave_values(work):
    """{what: seconds} of one slave: listening, a long poll, requests on one connection."""
    before = time.monotonic()
    process = start_slave(work)
    try:
        port = fleet.read_port(process)
        found = {OURS: time.monotonic() - before}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        update = json.loads(ask(connection, "/?repo=hanuman")[1])["update"]
        record = json.loads(ask(connection, f"/status?repo=hanuman&update={update}&wait=20")[1])
        found["an outcome is told"] = max(0.0, time.time() - record["finished"])
        before = time.monotonic()
        for _ in range(REQUESTS):
            ask(connection, "/healthz")
        found[f"{REQUESTS} requests on one connection"] = time.monotonic() - before
        connection.close()
    finally:
        process.terminate()
        process.communicate()
    return found


def measure_all(args, results):
    group = results.group("How soon", OURS, kind="prompt", situation="prompt")
    number = QUICK_SLAVES if args.quick else SLAVES
    under_way_s = QUICK_UNDER_WAY_S if args.quick else UNDER_WAY_S
    slaves = fanout.Fleet(args.work, number, update_s=UPDATE_S)
    try:
        for turn in range(1 if args.quick else args.rounds):
            work = os.path.join(args.work, f"slave{turn}")
            found = slave_values(work)
            found["a mistake is told"] = mistake_s(work)
            found["the first sign"] = first_sign_s(slaves)
            found["Ctrl-C"] = interrupt_s(slaves, under_way_s)
            for what, seconds in found.items():
                measure.Results.add(group, what, {"seconds": seconds})
    finally:
        slaves.stop()


if __name__ == "__main__":
    measure.run_row("prompt", __doc__, measure_all)
