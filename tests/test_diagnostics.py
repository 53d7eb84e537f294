"""What `check` finds, its text and its pictures."""

import io
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn.checks import channel_list
from cbn.diagnostics import Report

LISTS = ("constant_output", "low_var", "negative_var", "nonfinite_input", "constant_input", "far")


def listed(report):
    """The lists of a report that are not empty, and what is not finite."""
    found = {name: getattr(report, name) for name in LISTS}
    lists = {name: list(indices) for name, indices in found.items() if indices is not None and len(indices)}
    return lists | {name: list(indices) for name, indices in report.nonfinite.items()}


@pytest.mark.parametrize("convention", ["unbiased", "biased"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [1, -1, 0])
def test_values_are_those_of_numpy(rng, axis, dtype, convention):
    layer = cbn.BatchNorm(5, eps=1e-3, channel_axis=axis, dtype=dtype, running_var=convention)
    layer.running_mean[:] = rng.normal(0, 2, 5)
    layer.running_var[:] = rng.uniform(0.1, 3, 5)
    layer.weight[:] = rng.normal(0, 1, 5)
    x_c = rng.normal(1, 2, (5, 60))
    x = np.moveaxis(x_c.reshape(5, 10, 6), 0, axis).astype(dtype)
    x_c = np.moveaxis(x, axis, 0).reshape(5, -1).astype(float)
    before = {name: a.tobytes() for name, a in layer.state_dict().items()}
    report = layer.check(x)
    mean, var = layer.running_mean.astype(float), layer.running_var.astype(float)
    batch_var = x_c.var(axis=1, ddof=int(convention == "unbiased"))
    shift, ratio = (x_c.mean(axis=1) - mean) / np.sqrt(var + 1e-3), (batch_var + 1e-3) / (var + 1e-3)
    np.testing.assert_allclose(report.mean_shift, shift, rtol=1e-10)
    np.testing.assert_allclose(report.var_ratio, ratio, rtol=1e-10)
    distance = (ratio + shift**2 - 1 - np.log(ratio)) / 2
    np.testing.assert_allclose(report.distance, distance, rtol=1e-8)
    assert np.array_equal(report.furthest, np.argsort(-distance))
    np.testing.assert_allclose(report.output_std, np.abs(layer.weight) * np.sqrt(var / (var + 1e-3)), rtol=1e-6)
    bound, wide = 1 + 4 / np.sqrt(60), np.log(4) + 4 * np.sqrt(2 / 59) + 16 / 59
    assert np.array_equal(report.far, np.flatnonzero((np.abs(shift) > bound) | (np.abs(np.log(ratio)) > wide)))
    assert report.batch.count[0] == 60
    assert np.array_equal(report.batch.max, x_c.max(axis=1))
    assert {name: a.tobytes() for name, a in layer.state_dict().items()} == before, "nothing changes"


def test_the_mean_shift_is_the_mean_of_the_normalized_batch(rng):
    layer = cbn.BatchNorm1d(3, affine=False, dtype=np.float64).eval()
    layer.running_mean[:], layer.running_var[:] = [1, 2, 3], [4, 0, 1]
    x = rng.normal(0, 1, (40, 3))
    np.testing.assert_allclose(layer.check(x).mean_shift, layer(x).mean(axis=0), rtol=1e-12)


def test_a_new_layer_has_nothing():
    for layer in (cbn.BatchNorm1d(3), cbn.BatchNorm2d(3, affine=False), cbn.BatchNorm(3, track_running_stats=False)):
        report = layer.check()
        assert isinstance(report, Report)
        assert report.ok
        assert listed(report) == {}
        assert str(report) == f"{type(layer).__name__}(3): nothing found"
        assert report.batch is report.mean_shift is report.far is report.nan_count is None


def test_parameters_and_statistics():
    layer = cbn.BatchNorm1d(8, dtype=np.float64)
    layer.weight[:3] = [0, 1e-9, -1e-4]
    layer.running_var[3:6] = [0, 1e-6, -1e-7]
    layer.running_var[6] = np.nan
    layer.running_mean[1] = np.inf
    layer.weight_grad[2] = np.nan
    report = layer.check()
    assert not report.ok
    assert listed(report) == {
        "constant_output": [0, 1, 3],
        "low_var": [3, 4],
        "negative_var": [5],
        "running_var": [6],
        "running_mean": [1],
        "weight_grad": [2],
    }
    assert np.isnan(report.output_std[5])
    assert str(report).splitlines() == [
        "BatchNorm1d(8): 6 findings",
        "  the output is constant: channels 0, 1 and 3",
        "  running_var is below eps = 1e-05: channels 3 and 4",
        "  running_var is negative: channel 5",
        "  running_mean is not finite: channel 1",
        "  running_var is not finite: channel 6",
        "  weight_grad is not finite: channel 2",
    ]
    assert repr(report) == "<Report of BatchNorm1d(8): 6 findings>"


@pytest.mark.parametrize("eps", [0, 1e-5])
def test_dead_channels_give_constant_output(rng, eps):
    """What is listed is what evaluation gives, for inputs with the running statistics."""
    layer = cbn.BatchNorm1d(4, eps=eps, dtype=np.float64).eval()
    layer.running_var[:] = [1, 0, 1e-4, 1e-30]
    layer.weight[:] = [0, 1, 1, 1]
    report = layer.check()
    x = rng.normal(0, 1, (100, 4)) * np.sqrt(layer.running_var)
    with np.errstate(all="ignore"):
        std = layer(x).std(axis=0)
    alive = ~np.isnan(std)
    np.testing.assert_allclose(report.output_std[alive], std[alive], rtol=0.3)
    assert list(report.constant_output) == ([0, 1, 3] if eps else [0, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite(rng, dtype):
    layer = cbn.BatchNorm2d(4)
    x = rng.standard_normal((20, 4, 3, 3)).astype(dtype)
    x[0, 1] = np.nan
    x[5, 2, 0, 0], x[6, 2, 0, 0] = np.inf, -np.inf
    x[3, 2, 1, 1] = np.nan
    report = layer.check(x)
    assert list(report.nan_count) == [0, 9, 1, 0]
    assert list(report.inf_count) == [0, 0, 2, 0]
    assert list(report.batch.count) == [180, 171, 177, 180]
    assert listed(report) == {"nonfinite_input": [1, 2]}
    finite = x[:, 2].astype(float)
    np.testing.assert_allclose(report.batch.mean[2], finite[np.isfinite(finite)].mean(), rtol=1e-5)
    assert "  the input has 10 NaN and 2 infinite values: channels 1 and 2" in str(report).splitlines()


def test_constant_inputs_and_channels_without_values(rng):
    layer = cbn.BatchNorm1d(3)
    x = rng.standard_normal((50, 3))
    x[:, 1] = 0.25
    x[:, 2] = np.nan
    report = layer.check(x)
    assert listed(report) == {"nonfinite_input": [2], "constant_input": [1], "far": [1]}
    assert np.isnan(report.mean_shift[2])
    assert list(report.furthest) == [1, 0], "without the channel that has no values"
    empty = layer.check(x[:0])
    assert empty.ok
    assert np.all(np.isnan(empty.distance))
    assert empty.furthest.size == 0


def test_noise_of_small_batches_is_no_finding():
    rng = np.random.default_rng(3)
    for n in (1, 2, 3, 5, 20):
        layer = cbn.BatchNorm1d(200)
        report = layer.check(rng.standard_normal((n, 200)))
        assert report.far.size <= 2, n
    assert np.isnan(layer.check(np.zeros((1, 200))).var_ratio[0])
    far = layer.check(rng.standard_normal((100, 200)) + 2 * (np.arange(200) == 7)).far
    assert list(far) == [7]


def test_a_layer_without_running_statistics(rng):
    layer = cbn.BatchNorm1d(3, track_running_stats=False)
    layer.weight[2] = 0
    x = rng.standard_normal((50, 3))
    x[:, 0] = 1
    report = layer.check(x)
    assert listed(report) == {"constant_output": [2], "constant_input": [0]}
    assert report.running_mean is report.mean_shift is report.far is None
    assert "furthest" not in str(report)


def test_the_text_is_short(rng):
    layer = cbn.BatchNorm1d(2048)
    layer.running_var[100:147] = 0
    text = str(layer.check(rng.standard_normal((50, 2048)) * 10))
    assert "channels 100, 101, 102, 103, 104, 105, 106, 107, 108, 109 and 37 more\n" in text
    assert len(text) < 1000
    assert max(map(len, text.splitlines())) < 200
    assert "  furthest: channel 1" in text
    assert channel_list(np.arange(10)) == "channels 0, 1, 2, 3, 4, 5, 6, 7, 8 and 9"
    assert channel_list(np.arange(11)).endswith(" 8, 9 and 1 more")


def test_refused_inputs(rng):
    layer = cbn.BatchNorm2d(3)
    x = rng.standard_normal((2, 4, 5, 3))
    words = r"input of shape \(2, 4, 5, 3\) has 4 channels along axis 1; expected 3; .*channel_axis=-1\?"
    with pytest.raises(ValueError, match=words):
        layer.check(x)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        layer.check(x[0, 0])
    with pytest.raises(TypeError, match="input has dtype int64"):
        layer.check(np.zeros((2, 3, 4, 4), np.int64))
    layer.running_mean.shape = (1, 3)
    with pytest.raises(ValueError, match="running_mean has become an array"):
        layer.check()


# ---- pictures --------------------------------------------------------------------------------------------------------


def is_png(file):
    return file.getvalue().startswith(b"\x89PNG") and len(file.getvalue()) > 10_000


def layers(rng, n_channels):
    layer = cbn.BatchNorm1d(n_channels)
    layer.running_mean[:] = rng.normal(0, 2, n_channels)
    layer.running_var[:] = rng.uniform(0.1, 3, n_channels)
    return layer, rng.normal(1, 2, (50, n_channels)).astype(np.float32)


@pytest.mark.parametrize("n_channels", [1, 48, 2048])
def test_pictures(rng, tmp_path, n_channels):
    pytest.importorskip("matplotlib")
    layer, x = layers(rng, n_channels)
    bare = cbn.BatchNorm1d(n_channels, track_running_stats=False)
    for report in (layer.check(x), layer.check(), bare.check(x)):
        file = io.BytesIO()
        assert report.plot(file) is None
        assert is_png(file)
    layer.check(x).plot(tmp_path / "check.svg")
    assert "<svg" in (tmp_path / "check.svg").read_text()[:500]
    with pytest.raises(ValueError, match=r"BatchNorm1d\(\d+\) has no running statistics, and no batch was given"):
        bare.check().plot(io.BytesIO())


@pytest.mark.parametrize("n_channels", [3, 100])
@pytest.mark.parametrize("bad", [0, np.nan, np.inf, -1, 1e30])
def test_pictures_of_bad_statistics(rng, n_channels, bad):
    """Warnings are errors here."""
    pytest.importorskip("matplotlib")
    layer, x = layers(rng, n_channels)
    layer.running_var[1], x[:, 1] = bad, np.nan
    one = layer.check(x)
    layer.running_var[:], x[:] = bad, np.nan
    for report in (one, layer.check(x) if n_channels == 3 else layer.check()):
        file = io.BytesIO()
        report.plot(file)
        assert is_png(file)


def test_a_picture_changes_no_setting_and_needs_no_display(rng):
    pytest.importorskip("matplotlib")
    code = """if True:
        import io, sys, numpy as np, cbn
        report = cbn.BatchNorm1d(3).check(np.eye(3))
        assert "matplotlib" not in sys.modules
        import matplotlib
        before = matplotlib.rcParams.copy()
        report.plot(io.BytesIO())
        assert matplotlib.rcParams.copy() == before
        assert "matplotlib.pyplot" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def names_in(report):
    """The channels that a picture names, and whether two of the names overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = []
    plain = Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        return plain(figure, *arguments, **options)

    Figure.savefig = keep
    try:
        report.plot(io.BytesIO())
    finally:
        Figure.savefig = plain
    canvas = FigureCanvasAgg(figures[0])
    canvas.draw()
    found, overlaps = [], 0
    for ax in figures[0].axes:
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in ax.texts]
        found.append([text.get_text() for text in ax.texts])
        overlaps += sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    return found, overlaps


@pytest.mark.parametrize("n_channels", [3, 2048])
def test_channels_far_off_are_named_without_overlap(rng, n_channels):
    pytest.importorskip("matplotlib")
    layer = cbn.BatchNorm1d(n_channels)
    layer.running_mean[:] = np.arange(n_channels)
    x = rng.normal(layer.running_mean, 1, (500, n_channels))
    assert names_in(layer.check(x))[0] == [[], [], []]
    for some in ([0], [0, 1, 2], [n_channels - 1, 0], [n_channels - 1, n_channels - 2]):
        moved = x.copy()
        moved[:, some] = moved[:, some] * 4 + 9
        found, overlaps = names_in(layer.check(moved))
        assert overlaps == 0
        for names in found[1:]:
            assert names
            assert {int(name.split()[1]) for name in names} <= set(some)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'a plot needs the matplotlib package: pip install "cbn\[plots\]"'):
        cbn.BatchNorm1d(3).check().plot(io.BytesIO())
