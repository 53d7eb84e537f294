"""Types: both checkers accept what people write and refuse what cannot work; signatures are those of the calls."""

import doctest
import importlib.util
import inspect
import json
import pydoc
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import cbn
from cbn.batchnorm import EvalPlan

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


class Scaled(cbn.BatchNorm1d):
    """Another forward, with its own arguments."""

    def forward(self, x, /, scale: "float" = 1.5, *more, kind=np.float32, **rest):
        """Scale what the layer gives."""
        return scale * super().forward(x)


class Left:
    """A mixin, whose forward comes first."""

    forward = lambda self, x, left=None: super().forward(x)  # noqa: E731


class Mixed(Left, cbn.BatchNorm2d):
    pass


class Called(cbn.BatchNorm1d):
    def __call__(self, x, twice=False):
        """Call it, perhaps twice."""
        return super().__call__(super().__call__(x) if twice else x)


class CalledBelow(Called):
    def forward(self, x):
        return super().forward(x)


def of_bound(function):
    """The signature of an instance's calls, by a function of its class."""
    _, *parameters = inspect.signature(function).parameters.values()
    return str(inspect.signature(function).replace(parameters=parameters))


PLAIN = of_bound(cbn.BatchNorm.forward)


@pytest.mark.parametrize(
    ("callable_", "signature"),
    [
        (cbn.BatchNorm(3), PLAIN),
        (cbn.BatchNorm1d(3), PLAIN),
        (cbn.BatchNorm3d(3), PLAIN),
        (cbn.BatchNorm1d(3).eval().plan((2, 3)), of_bound(EvalPlan.forward)),
        (type("Empty", (cbn.BatchNorm2d,), {})(3), PLAIN),
        (Scaled(3), of_bound(Scaled.forward)),
        (type("Below", (Scaled,), {})(3), of_bound(Scaled.forward)),
        (Mixed(3), "(x, left=None)"),
        (Called(3), "(x, twice=False)"),
        (CalledBelow(3), "(x, twice=False)"),
        (type("Static", (cbn.BatchNorm,), {"forward": staticmethod(lambda x: x)})(3), "(x)"),
        (type("Any", (cbn.BatchNorm,), {"forward": lambda *args, **kwargs: args})(3), "(*args, **kwargs)"),
    ],
    ids=lambda c: type(c).__name__,
)
def test_signature_is_that_of_the_call(callable_, signature):
    assert str(inspect.signature(callable_)) == signature


def test_signature_has_names():
    for made in (cbn.BatchNorm1d(3), cbn.BatchNorm1d(3).plan((2, 3))):
        assert list(inspect.signature(made).parameters)[:3] == ["x", "out", "residual"]


def test_signatures_of_the_classes_are_those_of_their_constructors():
    assert list(inspect.signature(cbn.BatchNorm1d).parameters)[:3] == ["num_features", "eps", "momentum"]
    assert "num_features" in pydoc.render_doc(cbn.BatchNorm1d)


def test_a_call_is_compiled():
    """Whatever is said about it: no class has a function of Python's between a call and its plan."""
    for kind in (cbn.BatchNorm, cbn.BatchNorm1d, EvalPlan, Scaled, Mixed):
        assert isinstance(kind.__call__, types.WrapperDescriptorType)
    assert isinstance(Called.__call__, types.FunctionType)


def test_calls_of_subclasses_do_what_they_say():
    x = np.eye(3, dtype=np.float32)
    plain = cbn.BatchNorm1d(3)(x)
    assert np.array_equal(Scaled(3)(x, 2.0), 2 * plain)
    assert np.array_equal(Called(3)(x, twice=True), cbn.BatchNorm1d(3)(plain))
    with pytest.raises(TypeError, match="unexpected keyword argument 'training'"):
        cbn.BatchNorm1d(3)(x, training=True)
