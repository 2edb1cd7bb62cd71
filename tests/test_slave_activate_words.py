"""What it says: each failure with what to do, and no password of a URL."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from activate_support import as_another_user, in_mounts
from product import SHELLS, need

SECRET = "s3cr3t"


@pytest.fixture
def activate(activate, repo):
    activate.short_pauses()
    return activate


def ssh_that_says(folder, words):
    ssh = folder / "ssh"
    ssh.write_text("#!/bin/sh\ncat >&2 <<'END'\n%s\nEND\nexit 255\n" % words, encoding="utf-8")
    ssh.chmod(0o755)
    return {"SERVER_UPDATE_BASE_URL": "ssh://git@x/y", "GIT_SSH_COMMAND": str(ssh)}


@pytest.mark.parametrize(
    "words, advice",
    [
        ("Host key verification failed.", "or add its key to known_hosts"),
        ("ssh: Could not resolve hostname x: Name or service not known", "look up names? see"),
        ("ssh: connect to host x port 22: Connection refused", "is it up, and are host and port"),
        ("ssh: connect to host x port 22: No route to host", "is it up, and are host and port"),
        ("ERROR: Repository not found.", "see BASE_URL"),
    ],
)
def test_what_ssh_says_comes_with_advice(activate, tmp_path, words, advice):
    noise = "\nfatal: Could not read from remote repository.\n\nPlease make sure you have x"
    result = activate("r", env=ssh_that_says(tmp_path, words + noise))
    assert (result.status, result.out) == (1, "")
    assert result.last.startswith("slave-activate: " + words.replace("fatal: ", "")), result
    assert advice in result.last


def test_nothing_that_upstream_says_moves_a_cursor(activate, tmp_path):
    """Neither ESC [ nor CSI, the same as one character, of two bytes in UTF-8."""
    words = "ERROR: \x1b[2Jone \u009b2Jtwo \u00e9."
    result = activate("r", env=ssh_that_says(tmp_path, words))
    assert (result.status, result.out) == (1, "")
    assert "ERROR: [2Jone 2Jtwo \u00e9." in result.err, result
    assert not re.search("[\x1b\x80-\x9f]", result.err)


def test_a_key_that_upstream_does_not_know(activate, tmp_path):
    result = activate("r", env=ssh_that_says(tmp_path, "git@x: Permission denied (publickey)."))
    assert result.last == "slave-activate: git@x: Permission denied (publickey)."
    assert "ssh key; add it there, as a deploy key" in result.err


@pytest.mark.parametrize(
    "fault, advice",
    [
        ("429", "429; it is asked too often; update fewer slaves at a time"),
        ("503", "503; upstream is in trouble; try again later"),
        ("403", "403; give root credentials for it, see gitcredentials(7)"),
        ("404", "not found; see BASE_URL"),
    ],
)
def test_what_http_says_comes_with_advice(activate, http_upstream, fault, advice):
    activate.settings["BASE_URL"] = http_upstream.url
    http_upstream.fault = fault
    result = activate("r")
    assert result.status == 1
    assert advice.replace("root", subprocess.getoutput("id -un")) in result.last, result


def test_a_host_that_has_no_name(activate):
    activate.settings["BASE_URL"] = "http://no-such-host.invalid"
    result = activate("r")
    assert "Could not resolve host" in result.last
    assert result.last.endswith("can this host look up names? see BASE_URL")


def test_no_credentials_of_a_url_are_printed(activate, http_upstream, tmp_path, own_home):
    base = http_upstream.url.replace("//", "//user:%s@" % SECRET)
    activate.settings["BASE_URL"] = base
    for fault in ("503", "404", "401", "403", "reset", "garbage", "cut:10"):
        http_upstream.fault = fault
        result = activate("r")
        assert result.status == 1
        assert SECRET not in result.err and "user:" not in result.err, result
    http_upstream.fault = None
    for args in (("r", "nowhere"), ("r", "1" * 40), ("r", "refs/tags/nowhere"), ("none",)):
        result = activate(*args)
        assert (result.status, SECRET in result.err) == (1, False), result
    for bad in ("https://user:%s@a b" % SECRET, "https://user:%s@x\t" % SECRET):
        result = activate("r", env={"SERVER_UPDATE_BASE_URL": bad})
        assert (result.status, SECRET in result.err) == (2, False), result
    conf = tmp_path / "slave.conf"
    for text in ("BASE_URL https://user:%s@x\n", "BASE_URI=https://u:%s@x\n", "https://u:%s@x=\n"):
        conf.write_text(text % SECRET)
        result = activate("r", env={"SERVER_UPDATE_CONF": str(conf)})
        assert (result.status, SECRET in result.err) == (2, False), result
    (own_home / ".gitconfig").write_text(
        '[url "https://user:%s@no-such-host.invalid/"]\n\tinsteadOf = forge:\n' % SECRET
    )
    result = activate("r", env={"SERVER_UPDATE_BASE_URL": "forge:/x"})
    assert (result.status, SECRET in result.err) == (1, False), result


@pytest.mark.parametrize(
    "password, status", [("pw/%s", 2), ("1/2%s", 2), ("a@%s", 2), ("pw:%s", 1)]
)
def test_a_password_that_makes_a_bad_url_is_not_printed(activate, password, status):
    base = "http://user:%s@127.0.0.1:1/x" % (password % SECRET)
    result = activate("r", env={"SERVER_UPDATE_BASE_URL": base})
    assert (result.status, SECRET in result.err) == (status, False), result


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
def test_settings_that_are_no_file(activate, tmp_path, kind):
    path = kind
    if kind == "fifo":
        path = str(tmp_path / "fifo")
        os.mkfifo(path)
    result = activate("r", env={"SERVER_UPDATE_CONF": path}, timeout=300)
    assert (result.status, result.last) == (
        2,
        "slave-activate: can't read '%s': it is no file" % path,
    )


def test_a_lock_that_is_a_link(activate, tmp_path):
    activate.state.mkdir(parents=True)
    (tmp_path / "theirs").write_text("theirs")
    (activate.state / "r.lock").symlink_to(tmp_path / "theirs")
    result = activate("r")
    assert (result.status, (tmp_path / "theirs").read_text()) == (1, "theirs"), result


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file(activate, make):
    """To open a pipe would wait for somebody who writes into it, for longer than TIMEOUT."""
    activate.state.mkdir(parents=True)
    lock = activate.state / "r.lock"
    make(str(lock))
    result = activate("r")
    assert (result.status, result.out) == (1, ""), result
    assert result.last == "slave-activate: '%s' is no file; remove it" % lock


def test_clones_in_a_folder_of_another_user(activate):
    """The message names the folder and its owner, and says why."""
    user = as_another_user(activate)
    assert activate("r", prefix=user).status == 0
    os.chown(str(activate.repos), 0, 0)
    activate.repos.chmod(0o755)
    result = activate("r", prefix=user)
    assert result.status == 1, result
    assert ".r.new'" in result.last and ": Permission denied; " in result.last
    assert "'%s' belongs to root" % activate.repos in result.last


@pytest.mark.parametrize("missing", ["git", "python3"])
def test_a_host_that_lacks_a_program(activate, tmp_path, missing):
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for path in Path(folder).glob("*"):
            if path.name != missing and not (programs / path.name).exists():
                (programs / path.name).symlink_to(path)
    activate.path = str(programs)
    result = activate("r", "v1")
    assert (result.status, result.out) == (1, ""), result
    assert result.err == "slave-activate: there is no %s in PATH (%s)\n" % (missing, programs)


@pytest.mark.parametrize("shell", SHELLS)
def test_without_proc(activate, shell):
    result = activate("r", prefix=in_mounts("mount -t tmpfs tmpfs /proc") + shell.split())
    assert (result.status, result.out) == (1, ""), result
    assert result.err == "slave-activate: can't read /proc/uptime; mount /proc\n"


def test_a_url_that_git_knows_nothing_of(activate):
    result = activate("r", env={"SERVER_UPDATE_BASE_URL": "foo://x/y"})
    assert "'remote-foo' is not a git command" in result.last
    assert result.last.endswith("see BASE_URL")


def test_an_immutable_live_folder(activate, make_immutable):
    activate.good("r")
    make_immutable(activate.live())
    result = activate("r")
    assert (result.status, "is it immutable?" in result.last) == (1, True), result


def test_a_mount_on_the_folder_for_the_new_clone(activate, tmp_path):
    activate.good("r")
    (activate.state / "r.new").mkdir()
    mount = "mount -t tmpfs tmpfs '%s/r.new'" % activate.state
    result = activate("r", prefix=in_mounts(mount))
    assert (result.status, "a filesystem is mounted at" in result.last) == (1, True), result


def test_a_submodules_commit_that_is_nowhere(activate, repo, upstream, http_upstream):
    upstream.create("one", {"s": "1"})
    activate.settings["BASE_URL"] = http_upstream.url
    text = '[submodule "one"]\n\tpath = one\n\turl = ../one.git\n'
    repo.commit({".gitmodules": text, "one": ("160000", "1" * 40)})
    result = activate("r")
    assert "submodule path 'one'" in result.last and "1" * 40 in result.last, result


def test_another_filesystem_is_said_in_words(activate, repo, tmp_path):
    """EXDEV, as of a folder that is part of a container's image; EBUSY."""
    need("strace")
    first, _ = activate.good("r")
    for error, words in (("EXDEV", "Invalid cross-device link"), ("EBUSY", "resource busy")):
        prefix = [
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=rename,renameat,renameat2",
            "-o",
            "/dev/null",
        ]
        prefix += ["-P", str(activate.live()), "-e", "inject=renameat2,rename:error=" + error]
        result = activate("r", prefix=prefix)
        assert (result.status, result.out) == (1, ""), result
        start = "slave-activate: cannot put the new clone in place of '%s': " % activate.live()
        assert result.last.startswith(start) and words in result.last, result
        assert result.last.count("; ") == 1, "and what to do"
        assert activate.head() == first


def test_a_read_only_filesystem(activate):
    activate.good("r")
    mount = "mount --bind '{0}' '{0}'\nmount -o remount,bind,ro '{0}'".format(activate.repos)
    result = activate("r", prefix=in_mounts(mount))
    assert (result.status, result.out) == (1, ""), result
    assert result.last.startswith("slave-activate: can't write '%s" % activate.state), result


@pytest.mark.parametrize("closing", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_failing_hook_where_nobody_listens(activate, closing):
    activate.hook("pre-update", "echo x; exit 1\n")
    command = 'exec "$@" ' + closing
    assert activate("r", prefix=["sh", "-c", command, "sh"]).status == 1
    assert os.listdir(str(activate.state)) == ["r.lock"]
