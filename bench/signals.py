#!/usr/bin/env python3
"""Signals per second, their p99 and the memory of slave.py beside a minimal Flask slave and webhook.

    bench/signals.py [SIGNALS]      (10000 by default, for the memory; rates are taken over 5 s)

All three get the same requests from the same client, each on a connection of its own, over 1, 16 and
256 at once. slave.py writes a durable record for each; the others start a process for each. Flask is
installed into a virtual environment in a temporary folder, Debian's webhook is used where it is
installed; what is missing is said. Exit status 1 where slave.py does not take twice what Flask takes,
or has more than 30 MB after all signals.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS = 5  # of each measurement
CONNECTIONS = (1, 16, 256)
MAX_RSS_KIB = 30 * 1024
FLASK_SLAVE = """
import subprocess, sys
from flask import Flask, request
import logging
logging.getLogger("werkzeug").disabled = True
app = Flask(__name__)

@app.route("/")
def update():
    subprocess.Popen(["slave-activate", request.args["repo"]])
    return "ok\\n"

app.run("127.0.0.1", int(sys.argv[1]), threaded=True)
"""
ACTIVATE = "#!/bin/sh\necho \"$1 %s -\"\n" % ("1" * 40)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port, target):
    """One signal on a connection of its own; its status."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(("GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                            % target).encode())
        answer = connection.recv(65536)
        while connection.recv(65536):
            pass
    return answer[9:12]


def load(port, target, connections, seconds=None, count=None):
    """Signals until the time or the count is over: (per second, p99 in ms, failures)."""
    times, failures, left = [], [], [count or 1 << 60]
    end = time.monotonic() + (seconds or 3600)

    def pull():
        while time.monotonic() < end and left[0] > 0:
            left[0] -= 1
            began = time.monotonic()
            try:
                status = ask(port, target)
            except OSError as error:
                status = str(error)
            times.append(time.monotonic() - began)
            if status not in (b"200", b"202"):
                failures.append(status)

    began = time.monotonic()
    threads = [threading.Thread(target=pull) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    rate = len(times) / (time.monotonic() - began)
    return rate, times[int(len(times) * 0.99)] * 1000, len(failures)


def rss_kib(pid):
    with open("/proc/%d/status" % pid) as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1))


def start(command, port, folder):
    """A server's process, once it takes connections; its children find our slave-activate."""
    env = dict(os.environ, HOME=folder, PATH=folder + "/bin:" + os.environ["PATH"])
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise SystemExit("signals.py: %s does not listen" % command[0])


def find_peers(folder, ports):
    """{name: (command, port, target)} of all that can be had here."""
    peers = {"slave.py": ([sys.executable, "-I", ROOT + "/slave.py", "--bind", "127.0.0.1", "--port",
                           str(ports[0])], ports[0], "/?repo=hanuman")}
    with open(folder + "/flask_slave.py", "w") as handle:
        handle.write(FLASK_SLAVE)
    python = folder + "/venv/bin/python"
    if subprocess.call([sys.executable, "-m", "venv", folder + "/venv"]) == 0 and subprocess.call(
            [python, "-m", "pip", "install", "-qq", "flask"]) == 0:
        peers["flask"] = ([python, folder + "/flask_slave.py", str(ports[1])], ports[1],
                          "/?repo=hanuman")
    else:
        print("signals.py: no Flask: it can't be installed here", file=sys.stderr)
    if shutil.which("webhook"):
        with open(folder + "/hooks.json", "w") as handle:
            json.dump([{"id": "update", "execute-command": folder + "/bin/slave-activate",
                        "pass-arguments-to-command": [{"source": "url", "name": "repo"}]}], handle)
        peers["webhook"] = (["webhook", "-hooks", folder + "/hooks.json", "-ip", "127.0.0.1", "-port",
                             str(ports[2])], ports[2], "/hooks/update?repo=hanuman")
    else:
        print("signals.py: no webhook: apt-get install webhook", file=sys.stderr)
    return peers


def measure(name, command, port, target, folder, signals):
    """{connections: (rate, p99)} and the memory after `signals`; prints a line each."""
    process, rates = start(command, port, folder), {}
    try:
        idle = rss_kib(process.pid)
        for connections in CONNECTIONS:
            rate, p99, failures = load(port, target, connections, seconds=SECONDS)
            rates[connections] = rate
            print("%-9s %4d connections: %7.0f signals/s, p99 %7.1f ms, %d failed"
                  % (name, connections, rate, p99, failures), flush=True)
        load(port, target, 16, count=signals)
        after = rss_kib(process.pid)
        print("%-9s memory: %.1f MB idle, %.1f MB after all signals"
              % (name, idle / 1024, after / 1024), flush=True)
    finally:
        process.terminate()
        process.wait()
    return rates, after


def main():
    signals = int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(folder + "/bin")
        with open(folder + "/bin/slave-activate", "w") as handle:
            handle.write(ACTIVATE)
        os.chmod(folder + "/bin/slave-activate", 0o755)
        found = {}
        for name, peer in find_peers(folder, [free_port() for _ in range(3)]).items():
            found[name] = measure(name, *peer, folder, signals)
    rates, memory = found["slave.py"]
    bad = ["memory %d KiB" % memory] if memory > MAX_RSS_KIB else []
    for connections in CONNECTIONS if "flask" in found else ():
        ratio = rates[connections] / found["flask"][0][connections]
        print("slave.py takes %.1f times Flask's signals over %d connections" % (ratio, connections))
        if ratio < 2:
            bad.append("%.1f times Flask over %d connections" % (ratio, connections))
    if bad:
        print("signals.py: not what is promised: %s" % ", ".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
