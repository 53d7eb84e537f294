"""The report of the benchmarks: its numbers, its incomplete cases, and the page in a real browser."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html import escape, unescape

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[bench]'")

from benchmarks import report
from benchmarks import results as read
from benchmarks.cases import OPS, SMALL, Case, layouts_of

L3 = 32 << 20
SHAPES = ((32, 256, 56, 56), (32, 256, 28, 28), (32, 2048, 7, 7), (4096, 1024))
PEERS = ("numpy", "PyTorch", "oneDNN nchw", "oneDNN nhwc", "oneDNN nChw16c", "JAX")
LIMITS = ("limit: read", read.PLAIN, read.STREAM, "limit: scale in place")
ODD_NAME = '<b>Evil</b> & "Co" $x_1$'


def takes_part(name, case):
    """As the contenders do: who supports what."""
    if name == "numpy":
        return case.threads == 1 or case.op == "eval"
    if name == "JAX":
        return case.memory == "called"
    if name.startswith("oneDNN"):
        layout = {"oneDNN nchw": "first", "oneDNN nhwc": "last"}.get(name, case.layout)
        return case.memory == "out" and layout == case.layout
    return True


def quartiles(samples):
    q1, median, q3 = np.percentile(samples, [25, 50, 75])
    return {"median": median, "q1": q1, "q3": q3}


def measured(case, peers, limits, rng):
    """The entries of a case, as the suite writes them."""
    scale = 2e-6 + case.n_bytes / 15e9 / case.threads
    names = [n for n in ("cbn", *peers) if takes_part(n, case)]
    times = {n: scale * rng.lognormal(0, 0.7) * rng.lognormal(0, 0.03, 5) for n in names}
    times |= {n: scale / rng.uniform(2, 4) * rng.lognormal(0, 0.02, 5) for n in limits}
    units, model = case.units(1 << 20)
    for name, samples in times.items():
        extra = {**asdict(case), "contender": name, "version": "1", "bytes": case.n_bytes, "units": units,
                 "model": model, "first": 3 * samples[0], "errors": {"y": 1e-7}}  # fmt: skip
        if name != "cbn":
            extra["ratio"] = quartiles(samples / times["cbn"])
        if limits and name not in limits:
            unit = np.minimum(times[read.PLAIN], times[read.STREAM]) / 2
            extra["share"] = quartiles(units * unit / samples)
        yield {"group": case.name, "name": f"{case.name} {name}", "extra_info": extra,
               "stats": {"median": float(np.median(samples)), "data": samples.tolist()}}  # fmt: skip


def cases_of(shapes, threads):
    """Shapes in all their layouts, small calls, growth and an allocating case."""
    cases = [Case(op, s, layout, n) for n in threads for s in shapes for layout in layouts_of(s) for op in OPS]
    cases += [Case(op, shapes[0], "first", max(threads), "called") for op in OPS]
    cases += [Case("eval", s, layouts_of(s)[0], 1) for s in SMALL]
    return cases + [Case(op, (4, 5, 10**k // 20), "first", n) for n in threads for k in range(2, 7) for op in OPS[:2]]


def results(shapes=SHAPES, threads=(1, 2), peers=PEERS, limits=LIMITS, latency=True, complete=True):
    """A file of results with made-up numbers."""
    rng = np.random.default_rng(1)
    rows = [row for case in cases_of(shapes, threads) for row in measured(case, peers, limits, rng)]
    calls = []
    for case in (Case("eval", (1, 64), "last"), Case("eval", (8, 64, 28, 28))) if latency else ():
        for load in ("idle", "busy"):
            for name in ("cbn", *peers[:2]):
                p50, p95, p99 = np.sort(rng.uniform(1e-6, 1e-4, 3))
                calls.append({"case": case.name, **asdict(case), "contender": name, "load": load, "p50": p50,
                              "p95": p95, "p99": p99, "calls": 1000})  # fmt: skip
    return {
        "machine_info": {"processor": "A <processor>", "cores": 2, "caches": {"L2": 1 << 20, "L3": L3}, "cbn": {}},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": rows,
        "suite": {
            "versions": {n: "1" for n in ("cbn", *peers)},
            "absent": {} if limits else {n: "no C compiler" for n in LIMITS},
            "wrong": [{"case": "eval-1x64", "contender": "OpenVINO", "why": "y is off by <1> of its scale"}],
            "failed": [],
            "latency": calls,
            "turns": 5,
            "seconds": 0.05,
            "complete": complete,
        },
    }  # fmt: skip


def written(folder, data):
    """(the page, the summary) that are written for these results."""
    path = folder / "results.json"
    path.write_text(json.dumps(data))
    page = report.write(path)
    assert page == folder / "report.html"
    return page.read_text(), (folder / "summary.md").read_text()


def cells(markdown):
    """{first cell: {head: cell}} of the summary's table."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def chosen(data, contender, field, **wanted):
    """{shape: median of a field} of the rows that have these properties; small and growing shapes are left out."""
    found = {}
    for row in data["benchmarks"]:
        e = row["extra_info"]
        large = tuple(e["shape"][:2]) != (4, 5) and tuple(e["shape"]) not in SMALL
        if large and e["contender"] == contender and field in e and all(e[k] == v for k, v in wanted.items()):
            found[tuple(e["shape"])] = e[field]["median"]
    return found


def mean(values):
    return np.prod(list(values)) ** (1 / len(values))


def section(page, name):
    """The part of the page from this headline to the next."""
    return page.split(f'<h2 id="{name}">')[1].split("<h2")[0]


def assert_sound(page):
    """Nothing from outside, every id once, every reference to an id on the page."""
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page.replace('xlink:href="#', 'href="#'))
    assert "@import" not in page
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


@pytest.fixture(scope="module")
def data():
    return results()


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    written(folder, data)
    return folder / "report.html"


@pytest.fixture(scope="module")
def files(page):
    """The page's text and the summary's."""
    return page.read_text(), page.with_name("summary.md").read_text()


class TestComplete:
    def test_is_sound(self, files):
        assert_sound(files[0])
        assert "interrupted" not in files[0]

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("layout", ["first", "last"])
    def test_ratio_is_the_geometric_mean(self, data, files, op, layout):
        row = cells(files[1])[read.group_words((op, layout))]
        ratios = chosen(data, "PyTorch", "ratio", op=op, layout=layout, threads=2, memory="out")
        expected = f"{read.ratio_words(mean(ratios.values()))} (worst {read.ratio_words(min(ratios.values()))})"
        assert row["PyTorch"] == expected
        headline = files[0].split("<nav>")[0]
        assert read.ratio_words(mean(ratios.values())) in headline
        assert read.shape_words(min(ratios, key=ratios.get)) in headline

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("layout", ["first", "last"])
    def test_share_is_over_arrays_larger_than_the_cache(self, data, files, op, layout):
        wanted = {"op": op, "layout": layout, "threads": 2, "memory": "out"}
        units = {s: Case(op, s, layout).units(1 << 20)[0] * Case(op, s).n_bytes for s in SHAPES}
        shares = {s: v for s, v in chosen(data, "cbn", "share", **wanted).items() if units[s] >= L3}
        row = cells(files[1])[read.group_words((op, layout))]
        assert row["share of the limit"] == (
            f"{100 * mean(shares.values()):.0f} % (worst {100 * min(shares.values()):.0f} %)"
        )

    def test_training_of_numpy_is_compared_on_one_thread(self, data, files):
        ratios = chosen(data, "numpy", "ratio", op="train", layout="first", threads=1)
        shown = cells(files[1])["training, channels first"]["numpy"]
        assert shown.startswith(read.ratio_words(mean(ratios.values())))
        assert "1 thread" in files[0].split("<nav>")[0]

    def test_jax_is_compared_with_cbn_allocating(self, data, files):
        (ratio,) = chosen(data, "JAX", "ratio", op="train", memory="called").values()
        assert cells(files[1])["training, channels first"]["JAX"].startswith(read.ratio_words(ratio))
        assert "both allocate" in files[0].split("<nav>")[0]

    def test_onednn_in_the_layout_of_the_caller_and_in_its_best(self, data, files):
        wanted = {"op": "backward", "layout": "last", "threads": 2, "memory": "out"}
        plain = chosen(data, "oneDNN nhwc", "ratio", **wanted)
        blocked = chosen(data, "oneDNN nChw16c", "ratio", **wanted)
        row = cells(files[1])["backward, channels last"]
        assert row["oneDNN"].startswith(read.ratio_words(mean(plain.values())))
        best = mean([min(plain[s], blocked[s]) for s in plain])
        assert row["oneDNN best"].startswith(read.ratio_words(best))

    def test_lost_rows_are_listed_and_no_others(self, data, files):
        lost = [
            (r["extra_info"]["ratio"]["median"], r["extra_info"]["contender"], r["extra_info"]["shape"])
            for r in data["benchmarks"]
            if r["extra_info"]["contender"] in PEERS and r["extra_info"]["ratio"]["median"] < 1
        ]
        listed = re.findall(r"<tr><td>(.*?)</td><td.*?>([\d.]+)×<.*?</tr>", section(files[0], "losses"))
        assert listed == [(name, f"{ratio:.2f}") for ratio, name, _ in sorted(lost)]
        total = sum(r["extra_info"]["contender"] in PEERS for r in data["benchmarks"])
        assert f"{total - len(lost)} of {total} comparisons" in files[0]
        assert f"{len(lost)} of {total} comparisons" in section(files[0], "losses")

    def test_wrong_rows_are_listed_escaped(self, files):
        faults = section(files[0], "faults")
        assert "OpenVINO" in faults
        assert escape("y is off by <1> of its scale") in faults
        assert escape("A <processor>") in files[0]
        assert "A <processor>" not in files[0] + files[1]

    def test_every_plot_is_there_in_light_and_dark(self, files):
        names = re.findall(r'<figure id="plot-(.*?)">', files[0])
        assert {"share-2", "share-1", "ratio-eval-2", "latency", "growth", "threads"} <= set(names)
        for kind in ("light", "dark"):
            assert files[0].count(f'class="on-{kind}"') == len(names)
        assert files[0].count('<svg role="img" aria-label="') == 2 * len(names)

    def test_no_time_in_the_headline(self, files):
        headline = unescape(re.sub("<[^>]+>", " ", files[0].split("<h1>")[1].split("<nav>")[0]))
        assert not re.search(r"\d\s*(ns|µs|ms|s|GB/s)\b", headline)


def test_interrupted_run_says_so_first(tmp_path):
    data = results(threads=(1,), complete=False, latency=False)
    data["benchmarks"] = data["benchmarks"][:12]
    page, summary = written(tmp_path, data)
    assert_sound(page)
    assert page.index("This run was interrupted") < page.index('class="lead"')
    assert "interrupted" in summary
    assert report.PROSE["none"] in section(page, "latency")
    assert report.PROSE["none"] in section(page, "growth")


def test_nothing_measured(tmp_path):
    page, _ = written(tmp_path, results(latency=False, complete=False) | {"benchmarks": []})
    assert_sound(page)
    assert "Nothing" in page


def test_numpy_alone(tmp_path):
    page, summary = written(tmp_path, results(threads=(1,), peers=("numpy",)))
    assert_sound(page)
    assert set(cells(summary)["evaluation, channels first"]) == {"share of the limit", "numpy"}
    assert "PyTorch" not in page.split('<h2 id="method">')[0].replace(report.PROSE["ratio"], "")


def test_no_peer(tmp_path):
    page, summary = written(tmp_path, results(threads=(1,), peers=()))
    assert_sound(page)
    assert set(cells(summary)["evaluation, channels first"]) == {"share of the limit"}
    assert "No peer took part." in section(page, "losses")


def test_no_limits(tmp_path):
    page, summary = written(tmp_path, results(threads=(1,), limits=()))
    assert_sound(page)
    assert "plot-share" not in page
    assert "no C compiler" in page.split("<nav>")[0]
    assert "share of the limit" not in cells(summary)["evaluation, channels first"]


def test_one_thread_count(tmp_path):
    page, _ = written(tmp_path, results(threads=(1,)))
    assert_sound(page)
    assert "plot-threads" not in page
    assert "Only one number of threads" in section(page, "threads")


def test_names_are_escaped(tmp_path):
    data = results(shapes=SHAPES[:1], threads=(1,), peers=("numpy", ODD_NAME))
    page, _ = written(tmp_path, data)
    assert_sound(page)
    assert ODD_NAME not in page
    assert "<b>Evil" not in page
    assert escape(ODD_NAME) in page


def test_a_row_without_a_time_is_left_out(tmp_path):
    data = results(threads=(1,))
    for row in data["benchmarks"]:
        if row["extra_info"]["contender"] == "JAX":
            row["stats"]["data"] = [np.nan] * 5
            row["extra_info"]["ratio"] = dict.fromkeys(("median", "q1", "q3"), np.nan)
    page, summary = written(tmp_path, data)
    assert "JAX" not in cells(summary)["evaluation, channels first"]
    assert "nan" not in re.sub(r"[A-Za-z]nan|nan[A-Za-z]", "", page)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCHEMES = {"dark": 0, "light": 1}
# Opens everything, and notes on the page what can be seen: {figure: sizes of its light and its dark picture}
PROBE = """<script>
for (const d of document.querySelectorAll('details')) d.open = true;
const found = {};
for (const f of document.querySelectorAll('figure')) found[f.id] = [...f.querySelectorAll('svg')].map(s => {
  const r = s.getBoundingClientRect(); return [r.width, r.height]; });
const probe = document.createElement('pre');
probe.id = 'probe';
probe.textContent = JSON.stringify({figures: found, page: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color, wide: document.documentElement.scrollWidth});
document.body.append(probe);
</script>"""


def browse(page, folder, scheme, *arguments, width=1200, height=2000):
    """What the browser prints, and its log."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--virtual-time-budget=5000", *arguments,
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not re.search(r"CONSOLE|Refused|ERR_", done.stderr), done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
class TestInBrowser:
    @pytest.fixture
    def probed(self, page, tmp_path):
        copy = tmp_path / "probed.html"
        copy.write_text(page.read_text().replace("</body>", PROBE + "</body>"))

        def seen(scheme, **size):
            text = browse(copy, tmp_path, scheme, "--dump-dom", **size)
            return json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', text)[1]))

        return seen

    def test_console_errors_are_found(self, tmp_path):
        broken = tmp_path / "broken.html"
        broken.write_text("<script>nothing.here()</script>")
        with pytest.raises(AssertionError, match="CONSOLE"):
            browse(broken, tmp_path, "light", "--dump-dom")

    def test_every_plot_is_visible_in_light_and_dark(self, probed):
        seen = {scheme: probed(scheme) for scheme in SCHEMES}
        assert len(seen["light"]["figures"]) >= 9
        for light, dark in zip(*(seen[s]["figures"].values() for s in ("light", "dark")), strict=True):
            assert light[0][0] > 700
            assert light[0][1] > 100
            assert light[1] == [0, 0]
            assert dark == light[::-1]
        assert seen["light"]["page"] == "rgb(255, 255, 255)"
        for scheme, bright in (("light", "page"), ("dark", "ink")):
            values = {k: sum(map(int, re.findall(r"\d+", seen[scheme][k]))) for k in ("page", "ink")}
            assert max(values, key=values.get) == bright
            assert abs(values["page"] - values["ink"]) > 450

    def test_fits_a_telephone(self, probed):
        seen = probed("light", width=500)  # the narrowest window that the browser opens
        assert seen["wide"] <= 500
        assert all(light[0] > 700 for light, _ in seen["figures"].values())  # they scroll in a box of their own

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_screenshot_is_not_blank(self, page, tmp_path, scheme):
        from matplotlib.image import imread

        picture = tmp_path / "page.png"
        browse(page, tmp_path, scheme, f"--screenshot={picture}", height=3000)
        pixels = imread(picture)[..., :3]
        assert pixels.shape[:2] == (3000, 1200)
        assert (np.median(pixels) > 0.5) == (scheme == "light")
        # something on the page in every stretch of 500 lines
        assert all(pixels[i : i + 500].std() > 0.02 for i in range(0, 3000, 500))


def test_statistics_have_a_section_with_errors(tmp_path):
    found = results(latency=False)
    case = Case("moments+extrema", (20000, 1000), "last", 1, "called", group="statistics")
    rows = [r for r in measured(case, ("numpy", "scikit-learn"), LIMITS, np.random.default_rng(3))]
    errors = {"cbn": 1e-16, "numpy": 8.0, "scikit-learn": 2e-13}
    for row in rows:
        row["extra_info"]["errors"] = {"mean": 1e-20, "var": errors.get(row["extra_info"]["contender"], 0.0)}
    before = written(tmp_path, found)[1]
    found["benchmarks"] += rows
    page, summary = written(tmp_path, found)
    assert_sound(page)
    text = section(page, "statistics")
    assert "moments with extrema" in text
    assert "20000×1000" in text
    assert [text.count(f"error {word}<") for word in ("1e-16", "8e+00", "2e-13")] == [1, 1, 1]
    for name in errors:
        extra = next(r["extra_info"] for r in rows if r["extra_info"]["contender"] == name)
        shown = (
            f"{100 * extra['share']['median']:.0f} %" if name == "cbn" else read.ratio_words(extra["ratio"]["median"])
        )
        assert shown in text
    assert cells(summary) == cells(before)  # the table is about batch normalization


def test_networks_functions_and_chains_have_sections(tmp_path):
    rng = np.random.default_rng(2)
    found = results(latency=False)
    network = Case("eval", (8,), "first", 2, group="networks", network="ResNet-50")
    function = Case("train", (32, 64), "last", 1, group="functions")
    chain = Case("eval", (2, 256, 28, 28), "first", 2, group="chain", chain="read by one")
    for case, names in ((network, ("cbn layers", "PyTorch", "oneDNN nChw16c")), (function, ("cbn layers", "PyTorch")),
                        (chain, ("cbn, plain stores", "cbn, non-temporal stores"))):  # fmt: skip
        rows = list(measured(case, ("PyTorch", "oneDNN nChw16c"), LIMITS, rng))
        ours = next(row for row in rows if row["extra_info"]["contender"] == "cbn")
        for name in names:
            row = next((r for r in rows if r["extra_info"]["contender"] == name), None)
            if row is None:
                row = json.loads(json.dumps(ours))
                row["extra_info"] |= {"contender": name, "ratio": {"median": 1.25, "q1": 1.2, "q3": 1.3}}
                rows.append(row)
        found["benchmarks"] += [row for row in rows if row["extra_info"]["contender"] in ("cbn", *names)]
    page, summary = written(tmp_path, found)
    assert_sound(page)
    assert "ResNet-50, N\u00a0=\u00a08" in section(page, "networks")
    assert "oneDNN best" in section(page, "networks")
    assert "32×64" in section(page, "functions")
    assert section(page, "chains").count("1.25×") == 2
    assert "read by one" in section(page, "chains")
    table = cells(summary)
    assert {"networks, evaluation, channels first", "functions, training"} <= set(table)
    assert not [name for name in table if "chain," in name]
    ratio = next(r["extra_info"]["ratio"]["median"] for r in found["benchmarks"]
                 if r["extra_info"].get("network") and r["extra_info"]["contender"] == "PyTorch")  # fmt: skip
    assert table["networks, evaluation, channels first"]["PyTorch"].startswith(read.ratio_words(ratio))


def test_variants_have_a_section_of_costs(tmp_path):
    rng = np.random.default_rng(4)
    found = results(latency=False)
    before = written(tmp_path, found)[1]
    case = Case("backward", (4096, 1024), "last", 2, group="variants", variant="ghosts of 32")
    rows = list(measured(case, (), LIMITS, rng))
    for name, cost in (("cbn, variant", 0.94), ("cbn, loop over slices", 3.125)):
        row = json.loads(json.dumps(rows[0]))
        row["extra_info"] |= {"contender": name, "ratio": {"median": cost, "q1": cost - 0.02, "q3": cost + 0.02}}
        rows.append(row)
    found["benchmarks"] += rows
    page, summary = written(tmp_path, found)
    assert_sound(page)
    text = section(page, "variants")
    assert all(words in text for words in ("ghosts of 32", "4096×1024", "0.94×", "3.12×", "0.92–0.96"))
    assert cells(summary) == cells(before)
    assert "cbn, variant" not in section(page, "losses")  # a cost is no loss against a peer
