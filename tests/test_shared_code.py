"""What holds for all scripts: what they share stays shared, their size, syntax and help."""

import ast
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tokenize

import pytest
from product import PYTHON, ROOT, SOURCES, VERSION

PYTHON_SCRIPTS = ["server-update", "slave.py"]
SHELL_SCRIPTS = ["slave-activate", "install.sh"]
SCRIPTS = sorted(PYTHON_SCRIPTS + SHELL_SCRIPTS)
MAX_TOKENS = 14000  # of code: names, blank lines, comments and docstrings make reading no harder
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}
MAX_COLUMNS = 99
MAX_FUNCTION_LINES = 45
BLOCK = re.compile(
    r"^# shared with (\S+): keep identical\n(.*?)^# end of shared block\n", re.M | re.S
)


def text_of(name):
    """A script's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def test_what_two_scripts_share_is_identical():
    blocks = {name: BLOCK.findall(text_of(name)) for name in PYTHON_SCRIPTS}
    assert [peer for peer, _ in blocks["server-update"]] == ["slave.py"]
    assert [peer for peer, _ in blocks["slave.py"]] == ["server-update"]
    assert blocks["server-update"][0][1] == blocks["slave.py"][0][1]
    assert "def is_repo_name" in blocks["slave.py"][0][1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_read_in_one_sitting(name):
    lines = text_of(name).splitlines()
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []
    assert [line for line in lines if line != line.rstrip()] == []
    assert (ROOT / name).stat().st_mode & stat.S_IXUSR


def count_tokens(text):
    """Tokens without layout; an f-string is one, as it was before Python 3.12."""
    count = 0
    depth = 0  # of f-strings within f-strings
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_END":
            depth -= 1
        elif depth == 0 and token.type not in LAYOUT:
            count += 1
        if kind == "FSTRING_START":
            depth += 1
    return count


@pytest.mark.parametrize("name", PYTHON_SCRIPTS)
def test_python_is_that_of_3_7_and_has_short_functions(name):
    old = {} if sys.version_info < (3, 8) else {"feature_version": (3, 7)}
    tree = ast.parse(text_of(name), name, **old)
    assert ast.get_docstring(tree)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    described = [node for node in ast.walk(tree)
                 if isinstance(node, documented) and ast.get_docstring(node)]
    assert count_tokens(text_of(name)) - len(described) <= MAX_TOKENS
    if not old:
        return  # this is 3.7, which knows no ends of nodes
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    too_long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: size for name, size in too_long.items() if size > MAX_FUNCTION_LINES} == {}


def test_all_scripts_and_the_changes_have_one_version():
    for name in SCRIPTS:
        run = subprocess.run([SOURCES / name, "--version"], stdout=subprocess.PIPE, check=True)
        assert run.stdout.decode() == "%s %s\n" % (name, VERSION)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"(?m)^## %s$" % re.escape(VERSION), changes)


@pytest.mark.parametrize("name", PYTHON_SCRIPTS)
def test_only_the_standard_library_is_imported(name):
    modules = set()
    for node in ast.walk(ast.parse(text_of(name))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            modules.add(node.module)
    command = [PYTHON, "-I", "-S", "-c", "import " + ", ".join(sorted(modules))]
    assert subprocess.run(command, stderr=subprocess.PIPE).stderr == b""


@pytest.mark.parametrize("shell", ["dash", "busybox ash", "bash"])
@pytest.mark.parametrize("name", [*SHELL_SCRIPTS, "tests/run", "tests/demo"])
def test_shell_is_posix(name, shell):
    words = shell.split()
    if not shutil.which(words[0]):
        pytest.skip("no %s here" % words[0])
    done = subprocess.run([*words, "-n", str(ROOT / name)], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", [*SHELL_SCRIPTS, "tests/run", "tests/demo"])
def test_a_truncated_shell_script_does_nothing(name, tmp_path):
    lines = text_of(name).splitlines(True)
    assert lines[0] == "#!/bin/sh\n"
    assert lines[-1] == 'main "$@"; exit\n'  # so that nothing written after it is run
    (tmp_path / "script").write_text("".join(lines[:-1]), encoding="utf-8")
    done = subprocess.run(
        ["sh", str(tmp_path / "script"), "slave"],
        env=dict(os.environ, DESTDIR=str(tmp_path)),
        cwd=str(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert sorted(os.listdir(str(tmp_path))) == ["home", "script"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_alone_tells_what_it_is(name, run_script, tmp_path):
    for option in ("--help", "-h"):
        done = run_script(name, option)
        assert (done.returncode, done.stderr) == (0, "")
        assert name in done.stdout.splitlines()[0]
    assert os.listdir(str(tmp_path / "alone" / name)) == [name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_option_is_a_usage_error(name, run_script):
    done = run_script(name, "--no-such-option")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_contract_has_the_real_help(run_script):
    page = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    done = run_script("server-update", "--help", env={"COLUMNS": "100"})
    assert "```\n" + done.stdout + "```\n" in page


def test_the_commands_that_the_readme_gives_first_are_there():
    top = (ROOT / "README.md").read_text(encoding="utf-8")[:4000]
    assert "sh tests/demo" in top
    assert "sh tests/run" in top


@pytest.mark.parametrize("page", ["promises.md", "security.md"])
def test_the_tests_that_a_page_names_are_there(page):
    named = set(re.findall(r"`((?:test|an?|the|no|accepted|different|what)_\w+)`",
                           (ROOT / "docs" / page).read_text(encoding="utf-8")))
    files = (ROOT / "tests").glob("**/*.py")
    defined = {name for path in files
               for name in re.findall(r"^def (\w+)", path.read_text(encoding="utf-8"), re.M)}
    assert len(named) > 20
    assert named - defined == set()


def test_the_map_of_the_code_names_what_is_there():
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    maps = dict(re.findall(r"(?ms)^### (\S+): (.*?)(?=^##)", text))
    assert sorted(maps) == SCRIPTS
    for name, part in maps.items():
        for word in re.findall(r"`([A-Za-z_.]+)`", part):
            assert word.rpartition(".")[2] in text_of(name), (name, word)
    for name in PYTHON_SCRIPTS:
        sections = re.findall(r"(?m)^# -- ([a-z ]*[a-z])", text_of(name))
        assert re.findall(r"(?m)^\| ([a-z ]+) \|", maps[name])[1:] == [
            section for section in sections if section != "main"
        ]


def test_the_names_in_the_how_to_are_there():
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    part = text[text.index("## How to"):text.index("## Which tests")]
    code = "".join(map(text_of, SCRIPTS))
    code += (ROOT / "tests" / "processes.py").read_text(encoding="utf-8")
    for word in re.findall(r"`([A-Za-z_.]+)`", part):
        assert word.rpartition(".")[2] in code, word


def test_the_tests_that_the_development_page_names_are_there():
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\btest_\w+\.py", text))
    assert len(named) > 20
    assert named - {path.name for path in (ROOT / "tests").glob("test_*.py")} == set()
