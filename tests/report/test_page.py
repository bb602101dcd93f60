"""The page about runs: complete, escaped, small, and whole on the disk or not there."""

import json
import re
import resource
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import TEACHER, run_folder

from unic_ds import cli, training
from unic_ds.evaluate import comparison
from unic_ds.evaluate.comparison import Comparison, Score
from unic_ds.evaluate.table import TITLE
from unic_ds.report import cost, curves, event_words, page, run_record, sections
from unic_ds.report.run_record import Series
from unic_ds.training.run_report import RunReport

UNREADABLE = [
    {"name": "a/b.jpg", "reason": "truncated"},
    {"name": "c.png", "reason": "no image"},
]
SCRIPT = "</script><img src=x onerror=alert(1)>"


class Parsed(HTMLParser):
    """Elements of a page with their attributes, and its text without scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.data, self.inside = [], [], {}, [None, None]
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = [tag, dict(attrs).get("id")]

    def handle_endtag(self, tag):
        self.inside = [None, None]

    def handle_data(self, data):
        if self.inside[0] in ("script", "style"):
            self.data[self.inside[1] or self.inside[0]] = data
        else:
            self.texts.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(*folders):
    return Parsed(page.render([run_record.read(folder) for folder in folders]))


def table(student=60.0, protocol="knn k=20"):
    scores = [
        Score("dino", "knn", 70.0, "knn k=20"),
        Score("student after", "knn", student, protocol),
        Score("student after", "rmse", 0.5, "depth", "", "lower"),
    ]
    return Comparison.of(scores, {"dino": "teacher", "student after": "student"})


@pytest.mark.dist
def test_a_run_writes_its_report_and_names_it_last(finished):
    out, printed = finished
    table, _, after = printed.partition(f"report: {out / 'report.html'}\n")
    assert TITLE in table and after.count("\n") < 10  # the launcher prints its own end
    found = Parsed((out / "report.html").read_text())
    assert len(found.named("figure")) >= 10 and "finished" in found.text
    values = comparison.read(out)
    for row in values.rows:
        assert f"{row.values['student after']:.1f}" in found.text
        assert all(protocol in found.text for protocol in row.protocols.values())
    facts = json.loads((out / "teachers.json").read_text())
    assert all(row["licence"] in found.text for row in facts.values())
    assert "times 2 ranks" in found.text  # by its newest checkpoint


def test_texts_from_outside_stay_texts(tmp_path):
    name = "a<b>&'\"\x1b[2J\u202e"
    hostile = TEACHER | {"licence": SCRIPT, "source": f"file:{name}"}
    events = [
        {"event": "failed", "step": 3, "error": SCRIPT, "rank": 1},
        {"event": SCRIPT, "x": {"y": [SCRIPT]}},
        {"event": "skipped", "step": 4, "why": "loss", "samples": {"0": [SCRIPT, name]}},
    ]
    scores = [Score(SCRIPT, SCRIPT, 1.0, SCRIPT, SCRIPT), Score("student after", "b", 2.0, name)]
    found = Comparison.of(scores, {SCRIPT: "teacher", "student after": "student"})
    out = run_folder(tmp_path / name, teachers=(SCRIPT, "x"), events=events, table=found)
    (out / "teachers.json").write_text(json.dumps({SCRIPT: hostile}))
    (out / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(out / "pictures" / "a.png")
    picture = {"file": "a.png", "kind": SCRIPT, "title": SCRIPT, "caption": f'{SCRIPT}" x="'}
    (out / "pictures" / "pictures.json").write_text(json.dumps([picture]))
    shown = parsed(out)
    tags = [tag for tag, _ in shown.elements]
    assert tags.count("script") == 2 and tags.count("style") == 1 and tags.count("img") == 1
    assert not any(key.startswith("on") for _, found in shown.elements for key in found)
    assert shown.named("img")[0]["src"].startswith("data:image/webp;base64,")
    assert shown.named("img")[0]["alt"] == f'{SCRIPT}" x="'
    assert shown.text.count(SCRIPT) > 8 and "\x1b" not in shown.text and "\\x1b[2J" in shown.text
    data = json.loads(shown.data["data"])
    assert f"{SCRIPT}/kept" in data["runs"][0]["series"]


def test_a_page_loads_nothing(tmp_path):
    text = page.render([run_record.read(run_folder(tmp_path / "run"))])
    found = Parsed(text)
    addresses = [v for _, row in found.elements for k, v in row.items() if k in ("src", "href")]
    assert all(address.startswith("#") for address in addresses)
    (policy,) = [row["content"] for row in found.named("meta") if row.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.hash_source(found.data["script"]) in policy
    assert page.hash_source(found.data["style"]) in policy
    assert "Copyright (c) 2022 Leon Sorokin" in found.data["script"]  # as the MIT licence asks
    assert "unsafe" not in policy and "http" not in policy
    targets = {row["id"] for _, row in found.elements if "id" in row}
    assert {address[1:] for address in addresses} <= targets
    assert all(row.get("scope") for row in found.named("th"))


def test_runs_are_compared_by_what_differs(tmp_path):
    folders = [
        run_folder(tmp_path / f"{i}" / "run", table=table(60.0 + i), optim__lr=lr, seed=1)
        for i, lr in enumerate((0.001, 0.002))
    ]
    records = [run_record.read(folder) for folder in folders]
    differing, everything = sections.settings([record.settings for record in records])
    assert [(row.name, list(row.values)) for row in differing] == [("optim.lr", ["0.001", "0.002"])]
    assert len(everything) > 100
    found = parsed(*folders)
    assert found.text.index("Settings that differ") < found.text.index("All settings")
    assert "2 runs: 0/run, 1/run" in found.text
    together = sections.students_side_by_side([r.comparison for r in records], ["a", "b"])
    assert [cell.best for cell in together.rows[0].cells] == [False, True]
    assert [cell.text for cell in together.rows[0].cells] == ["60.0", "61.0"]
    lone, _ = sections.settings([records[0].settings])
    assert {"seed", "optim.lr"} <= {row.name for row in lone}


def test_a_table_has_gains_and_protocols(tmp_path):
    found = sections.evaluation(table(), "run")
    assert found.columns == ["dino", "student after", "student after - best teacher"]
    assert [cell.text for cell in found.rows[0].cells] == ["70.0", "60.0", "-10.0 (-14.3 %)"]
    assert [cell.best for cell in found.rows[0].cells] == [True, False, False]
    assert found.rows[1].cells[0].text == "-" and "knn k=20" in found.notes


def test_curves_keep_their_extremes_and_gaps():
    step_N = np.arange(1, 100_001)
    value_N = np.sin(step_N / 50.0)
    value_N[[777, 99_998]] = 50.0, -50.0
    value_N[40_000:60_000] = np.nan
    value_N[5] = np.inf
    few = curves.envelope(Series(step_N, value_N), curves.POINTS)
    assert len(few.step_N) <= curves.POINTS and (np.diff(few.step_N) > 0).all()
    assert (np.nanmax(few.value_N), np.nanmin(few.value_N)) == (50.0, -50.0)
    assert (few.step_N[0], few.step_N[-1]) == (1, 100_000)
    inside = (few.step_N > 40_200) & (few.step_N < 59_800)
    assert inside.any() and np.isnan(few.value_N[inside]).all()
    other = curves.envelope(Series(step_N, value_N * 2), curves.POINTS)
    assert np.array_equal(few.step_N, other.step_N)
    short = Series(step_N[:9], value_N[:9])
    assert len(curves.envelope(short, curves.POINTS).step_N) == 9


def test_charts_are_of_all_teachers_or_of_all_runs(tmp_path):
    one, two = (run_record.read(run_folder(tmp_path / name)) for name in "ab")
    (series, other) = (curves.with_shares(record) for record in (one, two))
    charts = {c.title: c for group in curves.groups([series], ["a"]) for c in group.charts}
    assert [line.label for line in charts["Kept share"].lines] == ["dino", "clip"]
    share = series["clip/weight_share"].value_N
    assert share == pytest.approx(np.full(40, 2 / 3))
    assert charts["Distillation loss"].summaries[0].most == 77.0
    charts = {c.title: c for g in curves.groups([series, other], ["a", "b"]) for c in g.charts}
    assert [line.label for line in charts["Kept share: dino"].lines] == ["a", "b"]
    assert "Kept share" not in charts


def test_the_cost_is_counted_from_the_log(tmp_path):
    out = run_folder(tmp_path / "run", lines=100, optim__batch_size=64)
    found = cost.of(run_record.read(out))
    assert found.seconds == pytest.approx(1000 * 64 / 640)
    assert (found.ranks, found.unit) == (None, "hours")
    (out / "start.json").write_text(json.dumps({"ranks": 8, "device": "NVIDIA H200"}))
    found = cost.of(run_record.read(out))
    assert (found.unit, found.hours) == ("GPU hours", pytest.approx(8 * 100 / 3600))
    (out / "start.json").write_text(json.dumps({"ranks": 2, "device": "cpu", "cores": 3}))
    found = cost.of(run_record.read(out))
    assert (found.unit, found.hours) == ("core hours", pytest.approx(6 * 100 / 3600))
    assert "times 2 ranks of 3 cores" in found.counted
    assert cost.of(run_record.read(run_folder(tmp_path / "empty", lines=0))) is None


def test_events_are_put_in_words(tmp_path):
    names = [f"{i}.jpg" for i in range(9)]
    events = [
        {"event": "skipped", "step": 5, "why": "spike", "samples": {"0": names}},
        {"event": "rolled back", "at": 7, "to": 4, "left_out": [5, 7]},
        {"event": "resumed", "step": 4, "ranks": 2},
        {"event": "unreadable", "step": 8, "count": 2, "images": UNREADABLE},
        {"event": "rank lost", "step": 8, "says": "rank 1 was killed", "ranks": [{"rank": 1}]},
    ]
    record = run_record.read(run_folder(tmp_path / "run", events=events))
    rows = {row.name: row for row in sections.events([record], ["run"])}
    assert rows["skipped"].text == ("loss spike; samples 0.jpg, 1.jpg, 2.jpg, 3.jpg and 5 more")
    assert rows["rolled back"].text == "to step 4; data of steps 5 to 7 are left out"
    assert (rows["rolled back"].step, rows["resumed"].text) == (7, "after step 4, on 2 rank(s)")
    assert rows["unreadable"].text == "2 images: a/b.jpg (truncated), c.png (no image)"
    assert (rows["unreadable"].kind, rows["rank lost"].kind) == ("warn", "bad")
    assert rows["rank lost"].text == "rank 1 was killed; ranks rank 1"
    many = run_record.read(run_folder(tmp_path / "many", events=events * 400))
    assert len(sections.events([many], ["run"])) == sections.EVENTS
    assert sections.event_counts(many) == ", ".join(f"{row['event']} 400" for row in events)


def test_events_that_stand_out_are_those_that_are_written():
    sources = [file.read_text() for file in Path(training.__file__).parent.glob("*.py")]
    call = r"(?:write|note|append|abort|record_permanent_failure)\((?:[\w.]+,\s+|\s)*"
    constants = dict(re.findall(r'^(\w+) = "([a-z ]+)"$', "\n".join(sources), re.M))
    written = {
        name or constants.get(constant, "")
        for text in sources
        for name, constant in re.findall(rf'{call}(?:"([a-z ]+)"|([A-Z]+)\b)', text)
    }
    shown = {name for names in event_words.KINDS.values() for name in names}
    assert written - {""} == shown | {"resumed", "extended"}


def test_runs_that_are_hardly_there(tmp_path):
    out = run_folder(tmp_path / "run", lines=0)
    (out / "teachers.json").unlink()
    text = parsed(out).text
    for said in ("There is no log line yet", "teachers.json is not written yet", "not finished"):
        assert said in text
    assert "Without an evaluation: run" in text and "--probe.pictures" in text


def test_a_log_of_many_quantities_has_a_page(tmp_path):
    out = run_folder(tmp_path / "run", lines=0)
    row = {f"x{i}": float(i) for i in range(2000)}
    rows = [json.dumps({"step": step} | row) for step in range(1, 80)]
    (out / "log.jsonl").write_text("\n".join(rows))
    text = page.render([run_record.read(out)])
    found = Parsed(text)
    assert len(text) < page.BYTES and "Further quantities have no chart" in found.text
    assert len([row for row in found.named("figure") if "data-chart" in row]) == curves.CHARTS


def test_the_verb_writes_a_page_and_prints_its_path(tmp_path, capsys, monkeypatch):
    one, two = (run_folder(tmp_path / name, lines=3) for name in ("one", "two"))
    assert cli.VERBS["report"].run([str(one)]) == 0
    assert capsys.readouterr().out == f"{one / 'report.html'}\n"
    monkeypatch.chdir(tmp_path)
    assert cli.VERBS["report"].run([str(one), str(two)]) == 0
    assert capsys.readouterr().out == "report.html\n" and (tmp_path / "report.html").is_file()
    assert cli.VERBS["report"].run([str(two), "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file() and not (two / "report.html").exists()


def test_a_run_of_stages_has_the_page_of_its_current_stage(tmp_path):
    out = run_folder(tmp_path / "run", lines=0, stages="optim.steps=50")
    stage = run_folder(out / "stage1", lines=5)
    RunReport(stage).write()
    text = (out / page.FILE).read_text()
    assert text == (stage / page.FILE).read_text()
    assert Parsed(text).text.startswith("run/stage1 - ") and "There is no log line yet" not in text
    (out / page.FILE).unlink()
    assert page.write_for([out]) == out / page.FILE
    assert Parsed((out / page.FILE).read_text()).text.startswith("run/stage1 - ")
    with pytest.raises(ValueError, match="given twice"):
        page.write_for([out, stage], tmp_path / "x.html")
    run_folder(stage, lines=6, table=table())
    run_folder(out, lines=7, stages="optim.steps=50")
    found = Parsed(page.write_for([out]).read_text()).text
    assert found.startswith("run - ") and "Step 70 " in found
    before = (stage / page.FILE).stat().st_mtime_ns
    RunReport(out).write()
    assert (stage / page.FILE).stat().st_mtime_ns == before
    assert not (tmp_path / page.FILE).exists()


def test_mistakes_are_one_sentence(tmp_path):
    one = run_folder(tmp_path / "one", lines=1)
    many = [tmp_path / f"{i}" for i in range(100)]
    for folders, said in (
        ([], "got 0"),
        (many, "1 to 32 runs, as many curves as its colours and dashes tell apart, got 100"),
        ([one, tmp_path / "." / "one"], "given twice"),
        ([tmp_path], "is no run folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            page.write_for(folders, tmp_path / "x.html")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="report needs RUN"):
        cli.VERBS["report"].run([])
    assert not (tmp_path / "x.html").exists()


def test_a_full_disk_leaves_the_old_page(tmp_path):
    out = run_folder(tmp_path / "run")
    (out / page.FILE).write_text("old")
    before = sorted(path.name for path in out.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RuntimeError, match=r"report.html' cannot be written \(File too large"):
            page.write_for([out])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / page.FILE).read_text() == "old"
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_failing_report_is_said_once_and_ends_no_run(tmp_path, capsys):
    out = run_folder(tmp_path / "run")
    (out / page.FILE).mkdir()
    report = RunReport(out)
    for _ in range(3):
        report.write()
    report.write(last=True)
    said = capsys.readouterr().out
    assert said.count("no report: ") == 1 and "the run goes on" in said
    (out / page.FILE).rmdir()
    report.write(last=True)
    assert f"report: {out / page.FILE}" in capsys.readouterr().out


def test_pages_of_a_run_take_a_small_share_of_its_time(tmp_path):
    out = run_folder(tmp_path / "run")
    report = RunReport(out)
    report.write()
    first = (out / page.FILE).stat().st_mtime_ns
    report.write()
    assert (out / page.FILE).stat().st_mtime_ns == first
    assert report.written.next_time > time.monotonic()
    report.write(last=True)
    assert (out / page.FILE).stat().st_mtime_ns > first


def test_pictures_fit_the_page(tmp_path):
    out = run_folder(tmp_path / "run", lines=2)
    (out / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1800, 3), np.uint8)
    Image.fromarray(noise).save(out / "pictures" / "new.png", compress_level=1)
    (out / "pictures" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    Image.new("1", (9000, 9000)).save(out / "pictures" / "vast.png")
    rows = [
        {"file": "old.png", "kind": "pca", "model": "student", "title": "old"},
        {"file": "new.png", "kind": "pca", "model": "student", "title": "PCA", "caption": "How"},
        {"file": "../config.yaml", "kind": "up", "model": "student"},
        {"file": "bad.png", "kind": "bad", "model": "student"},
        {"file": "gone.png", "kind": "gone", "model": "student"},
        {"file": "vast.png", "kind": "vast", "model": "student"},
    ]
    (out / "pictures" / "pictures.json").write_text(json.dumps(rows))
    text = page.render([run_record.read(out)])
    found = Parsed(text)
    (image,) = found.named("img")
    assert image["alt"] == "How" and int(image["width"]) >= 600 and len(text) < 2_500_000
    assert "../config.yaml is left out: its name" in found.text
    assert "bad.png is left out: it cannot be read as an image" in found.text
    assert "vast.png is left out: it has more than 40,000,000 pixels" in found.text
    assert (
        "gone.png is left out: No such file or directory" in found.text
        and "old" not in found.text.split("Pictures")[-1]
    )
    (out / "pictures" / "pictures.json").write_text("{}")
    assert "is no list of pictures" in parsed(out).text


@pytest.mark.slow
def test_a_long_log_and_many_runs_make_a_small_page_soon(tmp_path):
    out = run_folder(tmp_path / "long", lines=100_000, teachers=("a", "b", "c"))
    begun = time.process_time()
    file = page.write_for([out])
    took = time.process_time() - begun
    begun = time.process_time()
    for line in (out / "log.jsonl").read_bytes().splitlines():
        json.loads(line)
    parsing = time.process_time() - begun
    assert took < max(5, 4 * parsing)  # seconds; a slow machine takes long to parse JSON alone
    assert file.stat().st_size < 1_000_000
    folders = [run_folder(tmp_path / f"{i}", lines=700, seed=i) for i in range(page.RUNS)]
    assert page.write_for(folders, tmp_path / "all.html").stat().st_size < page.BYTES
