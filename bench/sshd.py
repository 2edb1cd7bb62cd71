"""An sshd of the benchmark's own on loopback, that answers for any number of hosts: slave1 ...

Its port, its keys, its configuration and the home of who logs in are its own; nothing of the
machine's is read or changed (a .bashrc can take longer than all else). Keys are exchanged in the
way that takes the least time, a third of what OpenSSH does by default.
"""

import os
import pwd
import shutil
import socket
import subprocess
import time

import measure

START_S = 10

SERVER = """ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 1000
LogLevel ERROR
SetEnv HOME={folder}/home
"""
CLIENT = """Host slave*
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  KexAlgorithms curve25519-sha256
  BatchMode yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, process):
    """Returns once something listens there; raises measure.Failed after START_S."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise measure.Failed("sshd did not start")


class Sshd:
    """A running sshd; host names and what each shell tool needs to be told about it."""

    def __init__(self, folder):
        self.folder = folder
        os.makedirs(os.path.join(folder, "home"), exist_ok=True)
        for name in ("host", "user"):
            if not os.path.exists(os.path.join(folder, name)):
                subprocess.run(
                    (
                        "ssh-keygen",
                        "-q",
                        "-t",
                        "ed25519",
                        "-N",
                        "",
                        "-f",
                        os.path.join(folder, name),
                    ),
                    check=True,
                )
        values = {"folder": folder, "port": free_port(), "user": pwd.getpwuid(os.getuid()).pw_name}
        self.server = self.write("sshd_config", SERVER.format(**values))
        self.client = self.write("ssh_config", CLIENT.format(**values))
        path = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        self.process = subprocess.Popen((path, "-D", "-f", self.server))
        wait_for(values["port"], self.process)

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="ascii") as handle:
            handle.write(text)
        return path

    def environment(self):
        """For pdsh and ansible; clush takes clush_options."""
        ssh = f"-F {self.client}"
        return {
            "PDSH_RCMD_TYPE": "ssh",
            "PDSH_SSH_ARGS_APPEND": ssh,
            "ANSIBLE_PIPELINING": "True",
            "ANSIBLE_SSH_ARGS": f"-C -o ControlMaster=auto -o ControlPersist=60s {ssh}",
            "ANSIBLE_REMOTE_TEMP": os.path.join(self.folder, "tmp"),
        }

    def clush_options(self):
        return ["-o", f"-F {self.client}"]

    def stop(self):
        measure.stop(self.process)


def start(folder):
    """A Sshd, or None (said loudly) where there can be none."""
    for tool in ("ssh", "ssh-keygen", "sshd"):
        if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            measure.skip("all peers over ssh", f"no {tool}")
            return None
    try:
        return Sshd(folder)
    except (measure.Failed, subprocess.CalledProcessError) as error:
        measure.skip("all peers over ssh", error)
        return None
