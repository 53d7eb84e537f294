"""Types: both checkers accept what people write and refuse what cannot work; signatures are those of the calls."""

import doctest
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RIGHT, WRONG = (ROOT / "tests" / "typed" / name for name in ("right.py", "wrong.py"))


def output(*command):
    """What a checker prints; it fails where it cannot run, which is not to say that it found no error."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(files):
    lines = output("mypy", "--strict", "--no-error-summary", "--hide-error-context", *files).splitlines()
    return [match.groups() for line in lines if (match := re.match(r"(.+?):(\d+): error: (.*)", line))]


def pyright(files):
    found = json.loads(output("pyright", "--outputjson", "--pythonpath", sys.executable, *files))
    return [
        (d["file"], d["range"]["start"]["line"] + 1, d["message"])
        for d in found["generalDiagnostics"]
        if d["severity"] == "error"
    ]


@pytest.fixture(scope="module", params=[mypy, pyright], ids=lambda checker: checker.__name__)
def errors(request, tmp_path_factory):
    """file name -> line -> message, of one checker over all files."""
    pytest.importorskip(request.param.__name__)
    readme = tmp_path_factory.mktemp("types") / "readme.py"
    examples = doctest.DocTestParser().get_examples((ROOT / "README.md").read_text())
    readme.write_text("".join(example.source for example in examples))
    assert "import cbn" in readme.read_text()
    found = {name: {} for name in ("right.py", "wrong.py", "readme.py")}
    for file, line, message in request.param([str(RIGHT), str(WRONG), str(readme)]):
        found[Path(file).name][int(line)] = message
    return found


@pytest.mark.parametrize("name", ["right.py", "readme.py"])
def test_what_people_write_is_accepted(errors, name):
    assert errors[name] == {}


def test_what_cannot_work_is_refused(errors):
    marked = {i for i, line in enumerate(WRONG.read_text().splitlines(), 1) if re.search(r"  # wrong\b", line)}
    found = errors["wrong.py"]
    lines = WRONG.read_text().splitlines()
    assert {lines[i - 1].strip() for i in marked - found.keys()} == set(), "accepted"
    assert {i: found[i] for i in found.keys() - marked} == {}, "refused"


def test_what_is_accepted_runs():
    spec = importlib.util.spec_from_file_location("right", RIGHT)
    right = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(right)
    for part in (right.inputs, right.attributes, right.steps, right.functions):
        part()
