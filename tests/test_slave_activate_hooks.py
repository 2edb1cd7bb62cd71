"""What hooks get from slave-activate, and what a hook that fails in whatever way leads to."""

import os
import signal
import sys

import pytest
from activate_support import as_another_user, finish, hang_in, snapshot
from processes import wait_until
from product import SHELLS, need

pytestmark = pytest.mark.usefixtures("repo")


def show(activate, name):
    """A hook that writes down what it has got."""
    path = activate.hooks / name
    path.write_text(
        "#!/bin/sh\nenv -0 >$0.env\ngrep -E '^Sig(Ign|Blk)' /proc/self/status >$0.signals\n"
    )
    path.chmod(0o755)


def shown(activate, name):
    """The environment, and what of signals is not as it is by default."""
    text = (activate.hooks / (name + ".env")).read_bytes().decode()
    environment = dict(pair.split("=", 1) for pair in text.split("\0") if pair)
    signals = dict(
        line.split(":\t")
        for line in (activate.hooks / (name + ".signals")).read_text().splitlines()
    )
    return environment, {key: int(value, 16) for key, value in signals.items()}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["pre-update", "post-update"])
def test_a_hook_has_the_callers_environment(activate, shell, name):
    show(activate, name)
    own = {
        "LC_ALL": "C.UTF-8",
        "LANG": "de_DE.UTF-8",
        "GIT_ASKPASS": "/my/askpass",
        "SSH_ASKPASS": "/my/other",
        "GIT_SSH": "/my ssh/x",
        "url": "theirs",
        "ref": "theirs",
        "log": "theirs",
        "new": "theirs",
        "head": "theirs",
        "stage": "x",
        "repos": "their",
        "LINES": "7",
        "with_newline": "a\nb",
    }
    result = activate("r", env=own, prefix=shell.split())
    assert result.status == 0, result
    expected = activate.environment(own)
    environment, _ = shown(activate, name)
    assert environment.pop("SERVER_UPDATE_TREE") == str(activate.live())
    for key in ("PWD", "OLDPWD", "SHLVL", "_"):
        environment.pop(key, None)
        expected.pop(key, None)
    assert environment == expected


@pytest.mark.parametrize("name", ["pre-update", "post-update"])
def test_what_is_not_set_is_not_set_in_a_hook(activate, name):
    show(activate, name)
    unset = ["LC_ALL", "GIT_SSH_COMMAND", "GIT_TERMINAL_PROMPT", "GIT_ASKPASS", "SSH_ASKPASS"]
    prefix = ["env"] + [word for name in unset for word in ("-u", name)]
    assert activate("r", prefix=prefix).status == 0
    assert not set(unset) & set(shown(activate, name)[0])


def test_variables_that_lead_git_elsewhere_are_kept_from_hooks(activate, upstream):
    elsewhere = upstream.create("elsewhere")
    show(activate, "post-update")
    env = {"GIT_DIR": str(elsewhere.path), "GIT_WORK_TREE": "/", "GIT_INDEX_FILE": "/x"}
    assert activate("r", env=env).status == 0
    assert not set(env) & set(shown(activate, "post-update")[0])


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["pre-update", "post-update"])
def test_a_hook_has_the_default_signals(activate, shell, name):
    show(activate, name)
    assert activate("r", prefix=shell.split()).status == 0
    _, signals = shown(activate, name)
    assert (signals["SigIgn"], signals["SigBlk"]) == (0, 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_last_line_of_a_failing_hook_is_told(activate, repo, shell):
    activate.hook(
        "pre-update", "echo one; echo two >&2; printf '\\033[31mthree\\r\\n\\n'; exit 7\n"
    )
    result = activate("r", prefix=shell.split())
    assert (result.status, result.out) == (1, "")
    assert result.last == "slave-activate: pre-update hook failed (7): [31mthree"
    assert result.err.startswith("one\ntwo\n")
    (activate.hooks / "pre-update").unlink()
    activate.hook("post-update", "echo first; printf 'no new line'; kill -9 $$\n")
    result = activate("r", prefix=shell.split())
    assert (result.status, result.out) == (3, "r %s -\n" % repo.head())
    assert result.err == (
        "first\nno new line\n"
        "slave-activate: live, but post-update hook failed (137): no new line\n"
    )


def test_a_long_output_passes_whole(activate):
    activate.hook("pre-update", "seq 1 100000; echo last; exit 1\n")
    result = activate("r")
    assert result.err.count("\n") == 100002
    assert result.last == "slave-activate: pre-update hook failed (1): last"


UNUSABLE = {
    "no rights": (lambda path: path.chmod(0o644), 126),
    "a dangling link": (lambda path: (path.unlink(), path.symlink_to(path.parent / "x"))[0], 127),
    "a folder": (lambda path: (path.unlink(), path.mkdir())[0], 126),
    "no such interpreter": (lambda path: path.write_text("#!%s/x\n" % path.parent), 127),
}


@pytest.mark.parametrize("name", ["pre-update", "post-update"])
@pytest.mark.parametrize("how", UNUSABLE)
def test_a_hook_that_cannot_be_run_has_failed(activate, repo, name, how):
    break_it, status = UNUSABLE[how]
    break_it(activate.hook(name, "exit 0\n"))
    result = activate("r")
    assert result.status == (1 if name == "pre-update" else 3), result
    start = "slave-activate: " + ("live, but " if name == "post-update" else "")
    assert result.last.startswith(
        "%s%s hook failed (%d): cannot run '%s': " % (start, name, status, activate.hooks / name)
    )
    assert activate.live().exists() == (name == "post-update")


def test_a_hook_without_an_interpreter_is_a_script_for_sh(activate, repo):
    path = activate.hook("post-update", "")
    path.write_text("touch ran\n")
    assert activate("r").status == 0
    assert (activate.live() / "ran").exists()


@pytest.mark.parametrize("mode", [0o000, 0o600])
def test_a_hooks_folder_that_cannot_be_entered_is_a_hook_that_failed(activate, repo, mode):
    prefix = as_another_user(activate)
    activate.hook("pre-update", "exit 1\n")
    activate.hooks.chmod(mode)
    result = activate("r", prefix=prefix)
    activate.hooks.chmod(0o755)
    assert (result.status, result.out) == (1, ""), result
    assert result.last == (
        "slave-activate: pre-update hook failed (126): can't look into '%s'" % activate.hooks
    )
    assert not activate.live().exists()


def test_a_hooks_folder_behind_a_link_that_leads_nowhere(activate, tmp_path):
    """As /etc/server-update on a disk that is not mounted now."""
    (tmp_path / "etc").symlink_to(tmp_path / "unmounted")
    activate.settings["HOOKS_DIR"] = str(tmp_path / "etc" / "hooks")
    result = activate("r")
    assert (result.status, result.last.count("can't look into")) == (1, 1), result


def test_a_hooks_folder_that_is_named_must_be_there(activate, tmp_path):
    activate.settings["HOOKS_DIR"] = str(tmp_path / "nowhere" / "hooks")
    result = activate("r")
    assert (result.status, result.last) == (
        2,
        "slave-activate: there is no HOOKS_DIR '%s'" % activate.settings["HOOKS_DIR"],
    )
    assert not activate.repos.exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_settings_that_cannot_be_looked_at_are_an_error(activate, tmp_path, shell):
    """Also where no file is named; a settings folder of mode 0700, a dangling link."""
    prefix = as_another_user(activate) + shell.split()
    folder = tmp_path / "etc"
    folder.mkdir(mode=0o700)
    text = activate.script.read_text().replace("/etc/server-update", str(folder / "server-update"))
    activate.script.write_text(text)
    del activate.settings["CONF"]
    result = activate("r", prefix=prefix)
    assert (result.status, result.last) == (
        2,
        "slave-activate: can't read '%s/server-update/slave.conf'" % folder,
    )
    folder.chmod(0o755)
    (folder / "server-update").symlink_to(tmp_path / "unmounted")
    assert activate("r", prefix=prefix).status == 2
    (folder / "server-update").unlink()
    assert activate("r", prefix=prefix).status == 0
    (folder / "server-update").mkdir()
    (folder / "server-update/slave.conf").symlink_to("nowhere")
    assert activate("r", prefix=prefix).status == 2


@pytest.mark.parametrize("command", ["rm -rf .git", "mv .git ~/git; ln -s ~/git .git"])
def test_a_pre_update_that_removes_git(activate, repo, command):
    """A link leads elsewhere from where the tree goes live."""
    first, _ = activate.good("r")
    before = snapshot(activate.live())
    repo.commit({"f": "2"})
    activate.hook("pre-update", command + "\n")
    result = activate("r")
    assert (result.status, result.out) == (1, ""), result
    assert result.err == (
        "slave-activate: the pre-update hook has removed or broken '.git'; nothing is changed\n"
    )
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])


def test_what_a_pre_update_checks_out_is_what_is_told(activate, repo):
    old = repo.head()
    repo.commit({"f": "2"})
    activate.hook("pre-update", "git checkout -q --detach HEAD^\n")
    assert activate.good("r") == (old, "-")
    assert activate.head() == old


@pytest.mark.parametrize("shell", SHELLS)
def test_a_hook_that_ignores_term_is_killed(activate, tmp_path, shell):
    """And what it has started, in its grace of five seconds."""
    pids = tmp_path / "pids"
    activate.hook(
        "post-update", "trap '' TERM\nsleep 1000 & echo $$ $! >%s\nwait; sleep 1000\n" % pids
    )
    process = activate.start("r", prefix=shell.split())
    wait_until(lambda: pids.exists() and pids.read_text().count(" "))
    os.kill(process.pid, signal.SIGTERM)
    result = finish(process, 60)
    assert (result.status, result.last) == (
        3,
        "slave-activate: live, but post-update hook failed (137)",
    ), result
    for pid in pids.read_text().split():
        wait_until(lambda pid=pid: not os.path.exists("/proc/" + pid))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_term_just_before_a_hook_begins(activate, tmp_path, shell):
    """What is to run it ends all the same, though a shell has it ignore INT at first."""
    began, fake = tmp_path / "began", tmp_path / "fake"
    hang_in("class Output", began, fake)
    activate.hook("pre-update", "exit 0\n")
    env = {"PATH": "%s:%s" % (fake, os.environ["PATH"])}
    process = activate.start("r", prefix=shell.split(), env=env)
    wait_until(began.exists)
    process.terminate()
    result = finish(process, 60)
    assert (result.status, result.err) == (1, "slave-activate: interrupted\n"), result


@pytest.mark.parametrize("name", ["pre-update", "post-update"])
def test_a_shell_that_is_killed_just_before_a_hook_begins(activate, tmp_path, name):
    """What is to run it says so in a line: the environment for the hook has gone with it."""
    began, fake = tmp_path / "began", tmp_path / "fake"
    hang_in("class Output", began, fake)
    activate.hook(name, "touch '%s'\n" % (tmp_path / "ran"))
    env = {"PATH": "%s:%s" % (fake, os.environ["PATH"])}
    process = activate.start("r", env=env)
    wait_until(began.exists)
    process.kill()
    process.wait()
    began.unlink()
    _, err = process.communicate(timeout=60)
    assert err.decode() == (
        "slave-activate: no hook, as /proc/%d/environ: No such file or directory\n" % process.pid
    )
    assert not (tmp_path / "ran").exists()


# -- the exit status ---------------------------------------------------------------------


def test_killed_after_the_exchange_it_is_live_all_the_same(activate, repo, tmp_path):
    """The program that makes the exchange, killed as it is about to flush the folders."""
    need("strace")
    first, _ = activate.good("r")
    second = repo.commit({"f": "2"})
    activate.hook("post-update", "touch ran\n")
    prefix = [
        "strace",
        "-f",
        "-qq",
        "-P",
        str(activate.repos),
        "-e",
        "trace=fsync",
        "-e",
        "inject=fsync:signal=KILL",
        "-o",
        str(tmp_path / "trace"),
    ]
    result = activate("r", prefix=prefix)
    assert "SIGKILL" in (tmp_path / "trace").read_text()
    assert (result.status, result.out) == (0, "r %s %s\n" % (second, first)), result
    assert (activate.live() / "ran").exists()
    assert activate.leftovers() == []


@pytest.mark.parametrize("shell", SHELLS)
def test_overwritten_in_place_while_it_runs_it_runs_nothing_new(activate, repo, tmp_path, shell):
    pwned = tmp_path / "pwned"
    activate.hook("pre-update", "printf '\\ntouch %s\\n' >>%s\n" % (pwned, activate.script))
    assert activate("r", prefix=shell.split()).status == 0
    assert not pwned.exists()
    assert "touch" in activate.script.read_text()[-len(str(pwned)) - 10 :]


NO_PROCESSES = """
import os, resource, subprocess, sys
live, gate = sys.argv[1:3]
before = os.stat(live).st_ino
process = subprocess.Popen(sys.argv[3:])
while os.stat(live).st_ino == before and process.poll() is None:
    pass
resource.prlimit(process.pid, resource.RLIMIT_NPROC, (0, 0))
open(gate, "w").close()
sys.exit(process.wait())
"""


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_a_host_that_has_no_processes_left_after_the_exchange(activate, repo, shell):
    """It is live, the hook has not run, and no shell's own exit status says anything else."""
    prefix = as_another_user(activate)
    assert activate("r", prefix=prefix).status == 0
    second = repo.commit({"f": "2"})
    activate.hook("post-update", "touch ran\n")
    # The shell waits, without a process, until it can't have one any more.
    gate = activate.repos / "gate"
    text = activate.script.read_text()
    assert text.count("    go_live\n") == 1
    wait = "    until [ -e '%s' ]; do :; done\n" % gate
    activate.script.write_text(text.replace("    go_live\n", "    go_live\n" + wait))
    watch = [sys.executable, "-c", NO_PROCESSES, str(activate.live()), str(gate), shell]
    result = activate("r", prefix=prefix + watch, timeout=120)
    assert activate.head() == second
    assert (result.status, result.out.split()[1]) == (3, second), result
    assert result.last.startswith("slave-activate: live, but post-update hook failed ("), result
