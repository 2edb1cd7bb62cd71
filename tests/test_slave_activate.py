"""slave-activate by hand: arguments, settings, environment, hooks, outcomes and messages."""

import os
import shutil
import subprocess

import pytest
from activate_support import git
from processes import wait_until
from product import SHELLS

BAD_REPOS = [
    "-oProxyCommand=x",
    "--upload-pack=touch x",
    "../x",
    "a/b",
    "r\n",
    "r\nx",
    "..",
    "a..b",
    "",
    ".",
    ".git",
    "r.git",
    "r.lock",
    ".server-update",
    "a b",
    "a" * 101,
    b"r\xff",
    "é",
    "r\x1b[31m",
    "a:b",
]
BAD_REFS = [
    "-oProxyCommand=x",
    "--upload-pack=x",
    "../x",
    "a..b",
    "a b",
    "a\n",
    "x\ny",
    "a\x7f",
    "",
    "a~1",
    "a^",
    "a:b",
    "a?",
    "a*",
    "[a",
    "a\\b",
    "/a",
    "a/",
    "a//b",
    ".a",
    "a/.b",
    "a.lock",
    "a.lock/b",
    "@",
    "a@{1}",
    "a.",
    b"a\xff",
    "a" * 256,
    "a\u200b",
    "--normalize",
    "-",
]


def test_it_says_what_is_live_now_and_what_was_before(activate, upstream):
    repo = upstream.create("r")
    first = repo.head()
    result = activate("r")
    assert (result.status, result.out, result.err) == (0, "r %s -\n" % first, "")
    second = repo.commit({"new": "1"})
    assert activate.good("r") == (second, first)
    assert (activate.live() / "new").read_text() == "1"
    assert activate.good("r") == (second, second)
    assert sorted(os.listdir(str(activate.state))) == ["r.lock"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_updates_and_fails_alike(activate, upstream, shell):
    repo = upstream.create("r")
    first = repo.head()
    prefix = shell.split()
    assert activate.good("r", prefix=prefix) == (first, "-")
    second = repo.commit({"sub dir/new": "1"})
    assert activate.good("r", second, prefix=prefix) == (second, first)
    assert activate.good("r", "main", prefix=prefix) == (second, second)
    failed = activate("nope", prefix=prefix)
    assert (failed.status, failed.out) == (1, "")
    assert failed.last == (
        "slave-activate: repository '%s/nope.git' does not exist; see BASE_URL"
        % upstream.base_path
    )
    assert activate("r", "no-such", prefix=prefix).last == (
        "slave-activate: Remote branch no-such not found in upstream origin; "
        "name a branch, a tag or a full commit hash"
    )
    assert activate.head() == second


@pytest.mark.slow
def test_busyboxs_tools_are_enough(activate, upstream, tmp_path):
    """As on Alpine: git, python3 and busybox, through a roll-up of packs."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in subprocess.check_output(["busybox", "--list"]).decode().split():
        (tools / name).symlink_to(shutil.which("busybox"))
    for name in ("git", "python3"):
        (tools / name).symlink_to(shutil.which(name))
    repo = upstream.create("r", {"d/f": "1"})
    env = {"PATH": str(tools)}
    prefix = [str(tools / "sh")]
    for number in range(18):  # past the roll-up of packs
        new = repo.commit({"d/f": str(number)})
        result = activate("r", prefix=prefix, env=env)
        assert (result.status, result.out.split()[1], result.err) == (0, new, ""), result
    assert 1 < len(activate.packs()) < 18
    (activate.live() / ".git/objects/pack").chmod(0o700)
    new = repo.commit({"d/f": None})
    process = activate.start("r", prefix=prefix, env=env)
    process.terminate()
    process.communicate(timeout=300)
    assert activate.good("r", prefix=prefix, env=env)[0] == new


@pytest.mark.parametrize("shell", SHELLS)
def test_hostile_names_and_refs_are_refused_and_touch_nothing(activate, tmp_path, shell):
    for args in [(name,) for name in BAD_REPOS] + [("r", ref) for ref in BAD_REFS]:
        result = activate(*args, prefix=shell.split())
        assert (result.status, result.out) == (2, ""), (args, result)
        assert result.last.startswith("slave-activate: "), (args, result)
        assert result.err.count("\n") == 1 and "\x1b" not in result.err, (args, result)
    assert not activate.repos.exists()
    assert sorted(os.listdir(str(tmp_path))) == ["activate", "home", "hooks", "upstream"]


def test_names_and_refs_that_are_only_unusual_pass(activate, upstream):
    name = "_a.B-9" + "x" * 94
    repo = upstream.create(name)
    repo.git("branch", "größe/@x+y=1,2%", "main")
    repo.git("tag", "v" * 200, "main")
    for ref in ("größe/@x+y=1,2%", "v" * 200):
        assert activate.good(name, ref)[0] == repo.head()


@pytest.mark.parametrize("shell", SHELLS)
def test_usage(activate, shell):
    prefix = shell.split()
    for args, text in (
        ((), "usage: slave-activate REPO [REF]; or --help"),
        (("r", "x", "y"), "usage: slave-activate REPO [REF]; or --help"),
        (("--frobnicate",), "unknown option '--frobnicate'; see slave-activate --help"),
        (("--frobnicate", "r"), "unknown option '--frobnicate'; see slave-activate --help"),
    ):
        result = activate(*args, prefix=prefix)
        assert (result.status, result.err) == (2, "slave-activate: %s\n" % text)
    for option in ("-h", "--help"):
        result = activate(option, prefix=prefix)
        assert (result.status, result.err) == (0, "")
        assert result.out.startswith("slave-activate REPO [REF]\n")
        assert "#" not in result.out and "3 live" in result.out


def test_a_truncated_copy_does_nothing(activate, upstream):
    upstream.create("r")
    lines = activate.script.read_text().splitlines(True)
    activate.script.write_text("".join(lines[:-1]))
    assert activate("r").out == ""
    assert not activate.repos.exists()


# -- settings ---------------------------------------------------------------


def write_conf(activate, text):
    conf = activate.bin / "slave.conf"
    conf.write_bytes(text.encode() if isinstance(text, str) else text)
    activate.settings = {"CONF": str(conf)}
    return conf


@pytest.mark.parametrize("shell", SHELLS)
def test_the_settings_file_is_read_as_text(activate, upstream, tmp_path, shell):
    repo = upstream.create("r")
    repos = tmp_path / "home/my repos $(touch x)"
    write_conf(
        activate,
        "# comment\n\n  BASE_URL = %s/none \r\n\tBASE_URL='%s/'\r\n"
        'REPOS_DIR=~/my repos $(touch x)\nHOOKS_DIR = "%s"\nPORT=80\nTLS_KEY=`touch y`\n'
        "SUBMODULES=maybe not here\n"
        "SUBMODULES=no" % (tmp_path, upstream.base_path, activate.hooks),
    )
    refused = activate("r", prefix=shell.split())
    assert (refused.status, refused.err) == (
        2,
        "slave-activate: %s:9: bad SUBMODULES 'maybe not here'\n" % (activate.bin / "slave.conf"),
    )
    conf = activate.bin / "slave.conf"
    conf.write_text(conf.read_text().replace("SUBMODULES=maybe not here\n", ""))
    result = activate("r", prefix=shell.split())
    assert result.status == 0, result
    assert git(repos / "r", "rev-parse", "HEAD") == repo.head()
    assert sorted(os.listdir(str(tmp_path / "home"))) == ["my repos $(touch x)"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("FOO=1", "{}:1: unknown setting 'FOO'"),
        ("\n#\nBASE_URL", "{}:3: no '=' in 'BASE_URL'"),
        ("BASE_URL=-x", "{}:1: bad BASE_URL '-x'"),
        ("BASE_URL=relative", "{}:1: bad BASE_URL 'relative'"),
        ("BASE_URL=http://a b", "{}:1: bad BASE_URL 'http://a b'"),
        ("REPOS_DIR=repos", "{}:1: bad REPOS_DIR 'repos'"),
        ("HOOKS_DIR=hooks", "{}:1: bad HOOKS_DIR 'hooks'"),
        ("SUBMODULES=1", "{}:1: bad SUBMODULES '1'"),
        ("BASE_URL;touch x;=1", "{}:1: unknown setting 'BASE_URL;touch x;'"),
        ("BASE_URL:/;touch x;=1", "{}:1: unknown setting 'BASE_URL:/;touch x;'"),
    ],
)
def test_a_bad_setting_is_named_with_its_place(activate, text, complaint):
    conf = write_conf(activate, text)
    result = activate("r", cwd=str(activate.bin))
    assert (result.status, result.err) == (2, "slave-activate: %s\n" % complaint.format(conf))
    assert os.listdir(str(activate.bin)).count("x") == 0
    assert not activate.repos.exists()


def test_variables_win_and_empty_ones_are_not_set(activate, upstream, tmp_path):
    repo = upstream.create("r")
    write_conf(activate, "BASE_URL=%s/none\nREPOS_DIR=%s\n" % (tmp_path, activate.repos))
    env = {"SERVER_UPDATE_BASE_URL": upstream.base_path, "SERVER_UPDATE_REPOS_DIR": ""}
    assert activate.good("r", env=env)[0] == repo.head()
    result = activate("r", env={"SERVER_UPDATE_SUBMODULES": "on"})
    assert (result.status, result.last) == (
        2,
        "slave-activate: bad SUBMODULES 'on' (set by SERVER_UPDATE_SUBMODULES)",
    )


def test_a_settings_file_that_was_named_must_be_there(activate, tmp_path):
    activate.settings = {"CONF": str(tmp_path / "none" / "slave.conf")}
    result = activate("r")
    assert (result.status, result.last) == (
        2,
        "slave-activate: can't read '%s/none/slave.conf'" % tmp_path,
    )


def test_a_settings_file_may_be_named_from_where_one_stands(activate, upstream, tmp_path):
    repo = upstream.create("r")
    (tmp_path / "own.conf").write_text("SUBMODULES=no\n", encoding="utf-8")
    activate.settings["CONF"] = "own.conf"
    assert activate.good("r", cwd=str(tmp_path))[0] == repo.head()


def test_without_a_home_there_must_be_repos_dir(activate, upstream):
    upstream.create("r")
    result = activate("r", prefix=["env", "-u", "HOME", "-u", "SERVER_UPDATE_REPOS_DIR"])
    assert (result.status, result.last) == (
        2,
        "slave-activate: neither HOME nor REPOS_DIR is set",
    )


# -- environment ------------------------------------------------------------


def test_a_minimal_environment_is_enough(activate, upstream, tmp_path, own_home):
    repo = upstream.create("r")
    done = subprocess.run(
        [
            "env",
            "-i",
            "PATH=/usr/bin:/bin",
            "HOME=%s" % own_home,
            "SERVER_UPDATE_BASE_URL=%s" % upstream.base_path,
            str(activate.script),
            "r",
        ],
        stdout=subprocess.PIPE,
    )
    assert done.stdout.decode() == "r %s -\n" % repo.head()
    assert git(own_home / "repos/r", "status", "--porcelain") == ""


def test_git_variables_that_point_elsewhere_are_forgotten(activate, upstream, tmp_path):
    repo = upstream.create("r")
    elsewhere = upstream.create("elsewhere")
    before = elsewhere.git("for-each-ref")
    names = ["DIR", "WORK_TREE", "INDEX_FILE", "OBJECT_DIRECTORY", "COMMON_DIR", "QUARANTINE_PATH"]
    env = {"GIT_" + name: str(elsewhere.path) for name in names}
    env.update({"GIT_NAMESPACE": "x", "GIT_PREFIX": "y/", "CDPATH": str(tmp_path)})
    assert activate.good("r", env=env) == (repo.head(), "-")
    assert activate.good("r", env=env) == (repo.head(), repo.head())
    assert elsewhere.git("for-each-ref") == before


def test_it_runs_in_a_folder_that_is_gone(activate, upstream, tmp_path):
    repo = upstream.create("r")
    gone = tmp_path / "gone"
    gone.mkdir()
    done = activate("r", prefix=["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh"], cwd=str(gone))
    assert done.out == "r %s -\n" % repo.head()


def test_the_users_configuration_is_used(activate, upstream, own_home):
    repo = upstream.create("r")
    (own_home / ".gitconfig").write_text(
        '[url "%s/"]\n\tinsteadOf = other:\n[core]\n\thooksPath = hooks\n' % upstream.base_path
    )
    activate.settings["BASE_URL"] = "other:"
    repo.commit({"hooks/post-checkout": ("100755", "#!/bin/sh\ntouch /%s/ran\n" % own_home)})
    activate.settings["BASE_URL"] = "other:/"
    assert activate.good("r")[0] == repo.head()
    assert not (own_home / "ran").exists(), "a file of the repository was run"


def test_ssh_is_the_users_and_never_asks(activate, tmp_path, own_home):
    ssh = tmp_path / "my ssh"
    ssh.write_text(
        '#!/bin/sh\necho "args: $*" >&2\necho "Permission denied (publickey)." >&2\nexit 255\n'
    )
    ssh.chmod(0o755)
    (own_home / ".gitconfig").write_text("[core]\n\tsshCommand = '%s' -i key\n" % ssh)
    result = activate("r", env={"SERVER_UPDATE_BASE_URL": "ssh://somewhere/x"})
    assert result.status == 1
    assert "args: -i key -o BatchMode=yes -o ConnectTimeout=20" in result.err
    assert result.last == "slave-activate: Permission denied (publickey)."


def test_an_upstream_that_wants_a_user_name_fails_at_once(activate, upstream, http_upstream):
    upstream.create("r")
    http_upstream.fault = "401"
    activate.settings["BASE_URL"] = http_upstream.url
    prompt = activate.bin / "askpass"
    prompt.write_text("#!/bin/sh\ntouch %s/asked; echo x\n" % activate.bin)
    prompt.chmod(0o755)
    env = {"GIT_ASKPASS": str(prompt), "SSH_ASKPASS": str(prompt), "DISPLAY": ":0"}
    result = activate("r", env=env, timeout=300)
    assert (result.status, result.last) == (
        1,
        "slave-activate: could not read Username for '%s': terminal prompts disabled; "
        "no such repository, or it needs credentials" % http_upstream.url,
    )
    assert not (activate.bin / "asked").exists()


# -- hooks ------------------------------------------------------------------

HOOK = 'echo "$(basename "$0") $*|$(pwd)|$(git rev-parse HEAD)|$(cat f)" | tee -a "%s"; cat\n'


def test_hooks_order_arguments_and_folder(activate, upstream, tmp_path):
    repo = upstream.create("r", {"f": "1"})
    log = tmp_path / "log"
    for name in ("pre-update", "post-update"):
        activate.hook(name, HOOK % log)
    first, second = repo.head(), repo.commit({"f": "2"})
    result = activate("r", first)
    assert result.out == "r %s -\n" % first, "a hook's output is not ours"
    assert "pre-update r - %s" % first in result.err
    activate.good("r")
    new = "%s/r.new" % activate.state
    assert log.read_text().splitlines() == [
        "pre-update r - %s|%s|%s|1" % (first, new, first),
        "post-update r - %s|%s|%s|1" % (first, activate.live(), first),
        "pre-update r %s %s|%s|%s|2" % (first, second, new, second),
        "post-update r %s %s|%s|%s|2" % (first, second, activate.live(), second),
    ]


def test_a_failing_pre_update_leaves_the_old_tree_live(activate, upstream):
    repo = upstream.create("r", {"f": "1"})
    first, _ = activate.good("r")
    repo.commit({"f": "2"})
    activate.hook("pre-update", "echo broken >&2; exit 7\n")
    activate.hook("post-update", "touch ran\n")
    result = activate("r")
    assert (result.status, result.out, result.err) == (
        1,
        "",
        "broken\nslave-activate: pre-update hook failed (7): broken\n",
    )
    assert (activate.head(), activate.leftovers()) == (first, [])
    assert not (activate.live() / "ran").exists()


def test_a_failing_post_update_is_exit_3(activate, upstream):
    repo = upstream.create("r")
    activate.hook("post-update", "exit 9\n")
    result = activate("r")
    assert (result.status, result.out) == (3, "r %s -\n" % repo.head())
    assert result.last == "slave-activate: live, but post-update hook failed (9)"
    assert activate.leftovers() == []


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("closing", ["2>/dev/full", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_who_cannot_hear_still_gets_the_right_exit_status(activate, upstream, shell, closing):
    repo = upstream.create("r")
    activate.hook("post-update", "exit 9\n")
    command = 'shell=$1; shift; exec $shell "$@" ' + closing
    assert activate("r", prefix=["sh", "-c", command, "sh", shell]).status == 3
    assert activate.head() == repo.head()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_closed_output_is_no_error(activate, repo, shell):
    command = 'shell=$1; shift; exec $shell "$@" >&-'
    result = activate("r", prefix=["sh", "-c", command, "sh", shell])
    assert (result.status, result.err) == (0, ""), result


def test_a_hook_that_is_not_executable_is_named_and_has_failed(activate, upstream):
    upstream.create("r")
    hook = activate.hook("pre-update", "exit 0\n", mode=0o644)
    result = activate("r")
    assert (result.status, result.last) == (
        1,
        "slave-activate: pre-update hook failed (126): cannot run '%s': Permission denied" % hook,
    )


def test_what_a_hook_has_started_lives_on_and_holds_nothing(activate, upstream, tmp_path):
    upstream.create("r")
    pid = tmp_path / "pid"
    activate.hook("post-update", "[ -e %s ] || { sleep 1000 & echo $! >%s; }\n" % (pid, pid))
    process = activate.start("r", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.wait(60) == 0
    daemon = int(pid.read_text())
    try:
        assert activate.good("r", timeout=300)
        assert os.path.exists("/proc/%d" % daemon)
        fds = [
            os.readlink("/proc/%d/fd/%s" % (daemon, fd))
            for fd in os.listdir("/proc/%d/fd" % daemon)
        ]
        assert fds == ["/dev/null"] * 3
    finally:
        os.kill(daemon, 9)


# -- several at once, odd outputs -------------------------------------------


def test_runs_at_the_same_time_take_turns(activate, upstream):
    repo = upstream.create("r", {"f": "1"})
    activate.good("r")
    activate.hook(
        "pre-update",
        '[ ! -e "%s/busy" ] && mkdir "%s/busy" && sleep 0.1 && rmdir "%s/busy"\n'
        % ((activate.bin,) * 3),
    )
    last = repo.commit({"f": "2"})
    runs = [activate.start("r") for _ in range(4)]
    ends = [run.communicate(timeout=300) + (run.returncode,) for run in runs]
    assert [end[2] for end in ends] == [0] * 4, ends
    assert sum(end[0].decode().startswith("r %s " % last) for end in ends) == 4
    waiting = b"slave-activate: waiting for the lock '%s'\n" % os.fsencode(
        str(activate.state / "r.lock")
    )
    assert sum(waiting in end[1] for end in ends) == 3
    assert (activate.head(), activate.leftovers()) == (last, [])


def test_other_repositories_do_not_wait(activate, upstream):
    upstream.create("r")
    upstream.create("other")
    activate.hook("pre-update", '[ "$1" != r ] || { touch %s/in; sleep 1000; }\n' % activate.bin)
    slow = activate.start("r")
    wait_until(lambda: (activate.bin / "in").exists())
    try:
        assert activate("other", timeout=300).status == 0
        assert slow.poll() is None
    finally:
        os.killpg(slow.pid, 15)
        slow.communicate(timeout=300)


def test_nobody_reading_its_output_changes_nothing(activate, upstream):
    repo = upstream.create("r")
    with open("/dev/full", "wb") as full:
        result = activate("r", stdout=full)
    assert (result.status, result.last) == (0, "slave-activate: can't print the outcome")
    reader, writer = os.pipe()
    os.close(reader)
    assert activate("r", stdout=writer).status == 0
    os.close(writer)
    assert (activate.head(), activate.leftovers()) == (repo.head(), [])


def test_a_folder_that_cannot_be_written_is_one_clear_line(activate, upstream, tmp_path):
    upstream.create("r")
    (tmp_path / "file").write_text("")
    activate.settings["REPOS_DIR"] = str(tmp_path / "file")
    result = activate("r")
    assert (result.status, result.last) == (
        1,
        "slave-activate: can't make '%s/.server-update': Not a directory" % (tmp_path / "file"),
    )
