"""The report page: its numbers are the records', each beside its bound; it is one file and safe to open."""

import json
import re
from html.parser import HTMLParser
from statistics import median

import pytest
from test_figures import FLOPS, OTHERS, PARTS, write_all_kinds, write_run

from prelora.analysis import report
from prelora.analysis.markup import Html
from prelora.analysis.records import load_run
from prelora.analysis.report import write_report
from prelora.analysis.summary import frozen_parameters, peak_saving, released_memory, speed_ups


class Page(HTMLParser):
    """Tables as lists of rows of texts, and all text outside style and figures."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.words, self.open = [], [], []
        self.tags = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if "style" not in self.open and "svg" not in self.open:
            self.words.append(data.strip())

    def table(self, *headers):
        """The rows of the table with these headers, by first cell."""
        found = [rows for rows in self.tables if set(headers) <= set(rows[0])]
        assert len(found) == 1, headers
        return {row[0]: dict(zip(found[0][0], row, strict=True)) for row in found[0][1:]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all_kinds(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pages(folders):
    return {kind: write_report(folder).read_text(encoding="utf-8") for kind, folder in folders.items()}


@pytest.fixture
def without_figures(monkeypatch):
    """Leave the figures out of a page, which makes it ten times faster to write."""
    monkeypatch.setattr(report, "figure_section", lambda run: Html(""))


def rewrite(folder, change):
    """Apply ``change`` to every line of a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def measured(folder, phase, field):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return median(line[field] for line in lines if line["phase"] == phase)


def test_speed_ups_are_ratios_of_medians_beside_their_ceilings(folders, pages):
    rows = Page(pages["whole"]).table("Measured", "FLOP ceiling")
    folder = folders["whole"]
    for name, phase in (("WARMUP", "warmup"), ("LORA", "lora")):
        ratio = measured(folder, phase, "img_per_s") / measured(folder, "full", "img_per_s")
        assert rows[name]["Measured"] == f"{ratio:.2f}×"
        assert rows[name]["FLOP ceiling"] == f"{FLOPS['full'] / FLOPS[phase]:.2f}×"
    assert rows["LORA"]["Measured / ceiling"] == "94 %"
    assert rows["LORA"]["Share of possible gain"] == "78 %"
    assert rows["WARMUP"]["Share of possible gain"] == "–"
    spent = sum(n * measured(folder, phase, "seconds") for phase, n in (("full", 9), ("warmup", 3), ("lora", 6)))
    assert rows["Whole run"]["Measured"] == f"{18 * measured(folder, 'full', 'seconds') / spent:.2f}×"
    assert rows["Whole run"]["FLOP ceiling"] == f"{18 * 36 / (12 * 36 + 6 * 26):.2f}×"
    assert "Exceeds" not in pages["whole"]


@pytest.mark.usefixtures("without_figures")
def test_more_than_the_ceiling_is_called_what_it_is(tmp_path):
    def hasten(line):
        if line["phase"] == "lora":
            line["img_per_s"] = 150.0

    page = Page(write_report(rewrite(write_run(tmp_path / "fast"), hasten)).read_text())
    row = page.table("Measured", "FLOP ceiling")["LORA"]
    assert row["Measured"] == "1.50×"
    assert row["Measured / ceiling"] == "108 %"
    assert row["Remark"].startswith("Exceeds its FLOP ceiling.")
    assert "noise" in row["Remark"]


@pytest.mark.usefixtures("without_figures")
def test_slower_than_full_is_said(tmp_path):
    folder = rewrite(
        write_run(tmp_path / "slow"), lambda line: line.update(img_per_s=100 - 10 * line["phase"].count("lora"))
    )
    row = Page(write_report(folder).read_text()).table("Measured", "FLOP ceiling")["LORA"]
    assert (row["Measured"], row["Share of possible gain"]) == ("0.90×", "–")
    assert row["Remark"].startswith("Slower than FULL")


@pytest.mark.usefixtures("without_figures")
def test_between_ranks_a_speed_up_stands_beside_the_communication_bound_too(tmp_path):
    def send(line):
        line["communication"] = {"all_reduce": 2**20 if line["phase"] != "lora" else 2**18}
        line["img_per_s"] = 250.0 if line["phase"] == "lora" else 100.0

    page = Page(write_report(rewrite(write_run(tmp_path / "ranks", world_size=2), send)).read_text())
    row = page.table("Measured", "FLOP ceiling")["LORA"]
    assert (row["Measured"], row["Communication bound"]) == ("2.50×", "4.00×")
    assert "Exceeds" not in page.text
    assert page.table("Data", "Backward")["LORA"]["Sent per step and rank"] == "256 KiB all-reduce"


def test_a_steps_time_is_shared_out_by_part_and_its_rate_stands_beside_the_peak(pages):
    row = Page(pages["whole"]).table("Data", "Backward")["LORA"]

    assert [row[part.capitalize()] for part in PARTS] == ["10 %", "30 %", "50 %", "0.0 %", "10 %"]
    assert row["Images/s without the wait"] == "144"
    assert (row["GFLOP/s"], row["of the peak"]) == ("130", "32 %")


@pytest.mark.usefixtures("without_figures")
def test_without_counted_flops_no_speed_up_is_shown(tmp_path):
    folder = write_run(tmp_path / "uncounted", flops={"full": None})
    rewrite(folder, lambda line: line["event"].update(plan_flops=None))
    rows = Page(write_report(folder).read_text()).table("Measured", "FLOP ceiling")
    for row in rows.values():
        assert row["Measured"] == row["FLOP ceiling"] == "–"
        assert "FLOPs per image of FULL were not counted" in row["Remark"]


def test_few_epochs_are_said_to_be_few(pages):
    remark = Page(pages["direct"]).table("Measured", "FLOP ceiling")["LORA"]["Remark"]
    assert "Few epochs (3 of FULL, 2 here)" in remark


def test_phases_are_told_with_medians_and_counts(folders, pages):
    rows = Page(pages["whole"]).table("Images/s", "Trainable parameters")
    last = json.loads((folders["whole"] / "metrics.jsonl").read_text().splitlines()[-1])
    info = json.loads((folders["whole"] / "run.json").read_text())
    lora = rows["LORA"]
    assert lora["Epochs"] == "6"
    assert lora["Images/s"].startswith("130 (")
    assert lora["Seconds/epoch"].startswith(f"{measured(folders['whole'], 'lora', 'seconds'):.2f} (")
    assert lora["Trainable parameters"] == f"{last['trainable']:,}"
    assert lora["of the model's"] == f"{100 * last['trainable'] / info['parameters']:.0f} %"
    assert lora["Peak memory"] == f"{last['peak_memory_bytes'] / 2**20:.1f} MiB"


def test_memory_released_stands_beside_its_bound(folders, pages):
    run = load_run(folders["whole"])
    frozen = run.info.parameters - OTHERS
    assert frozen_parameters(run) == frozen
    assert {saving.item: (saving.measured, saving.bound) for saving in released_memory(run)} == {
        "gradients": (4 * frozen, 4 * frozen),
        "optimizer_state": (8 * frozen, 8 * frozen),
    }
    assert peak_saving(run).bound == 12 * frozen
    rows = Page(pages["whole"]).table("Released at the freeze")
    assert rows["Gradients"]["Measured"] == rows["Gradients"]["Bound"] == f"{4 * frozen / 2**20:.2f} MiB"
    assert rows["Peak, FULL to LORA"]["Bound"] == f"{12 * frozen / 2**20:.2f} MiB"


@pytest.mark.usefixtures("without_figures")
def test_memory_without_a_bound_is_not_shown(tmp_path):
    def only_frozen(line):
        line["event"]["released"] = (
            {"optimizer_state": 12345, "scratch": 54321} if line["event"]["action"] == "freeze" else {}
        )

    folder = rewrite(write_run(tmp_path / "odd"), only_frozen)
    rows = Page(write_report(folder).read_text()).table("Released at the freeze")
    assert rows["Scratch"]["Measured"] == rows["Scratch"]["Bound"] == "–"
    assert rows["Scratch"]["Remark"].startswith("Not shown")
    assert rows["Optimizer state"]["Measured"] == "12.1 KiB"
    assert rows["Optimizer state"]["Bound"] == "4.50 MiB"


@pytest.mark.usefixtures("without_figures")
def test_freeze_in_the_last_epoch_has_no_speed_of_lora(tmp_path):
    folder = write_run(tmp_path / "frozen", planned=18)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:12]))
    page = Page(write_report(folder).read_text())
    assert "It stopped in LORA." in page.text
    assert "LORA" not in page.table("Measured", "FLOP ceiling")
    assert page.table("Released at the freeze")["Gradients"]["Measured"] == "–"


def test_the_story_of_a_whole_run(folders, pages):
    run = load_run(folders["whole"])
    page = Page(pages["whole"])
    ranks = run.ranks.values()
    for told in (
        "vit_tiny was trained for 18 epochs: 9 in FULL, 3 in WARMUP, 6 in LORA.",
        "After epoch 9 it switched to LoRA (every group and the loss passed).",
        f"18 targets have ranks from 8 to 64, {sum(ranks) / len(ranks):.1f} on average.",
        f"The base was frozen after epoch 12, which left {run.epochs[-1].trainable:,} parameters trainable",
        f"gave top-1 {run.epochs[-1].evaluation.top1:.1f} % and",
        "The training loss was not finite in 1 epoch, first in epoch 7.",
    ):
        assert told in page.text
    assert "incomplete" not in page.text


def test_runs_that_did_not_get_there_say_so(pages):
    never, cut, single = (Page(pages[kind]) for kind in ("never", "cut", "single"))
    assert "It never switched." in never.text
    assert "only FULL was trained, and a speed-up needs a second phase" in never.text
    assert "No saving is shown" in never.text
    assert "incomplete: 11 of 30 planned epochs are finished. It stopped in WARMUP." in cut.text
    assert "The last line of metrics.jsonl (line 12) is cut off" in cut.text
    assert "The base has not been frozen." in cut.text
    assert "LORA" not in cut.table("Measured", "FLOP ceiling")
    assert "incomplete: 1 of 5 planned epochs" in single.text


def test_a_run_without_an_epoch_has_a_page(tmp_path):
    folder = write_run(tmp_path / "none", 0, 0, 0, planned=5)
    for metrics in ("", None):
        if metrics is None:
            (folder / "metrics.jsonl").unlink()
        page = Page(write_report(folder).read_text())
        assert "0 of 5 planned epochs are finished" in page.text
        assert "No epoch was finished" in page.text


def test_the_event_log_has_what_was_decided(pages):
    rows = Page(pages["whole"]).table("Epoch", "Decided")
    assert list(rows) == ["7", "9", "12"]
    assert rows["9"]["Decided"] == "switch"
    assert re.fullmatch(r"0\.\d+ % \(mlp_out\)", rows["9"]["Largest norm change"])
    assert rows["12"]["Decided"] == "freeze"
    assert "not finite" in rows["7"]["Reason"]


def test_configuration_and_environment_are_told(pages):
    page = Page(pages["whole"])
    cells = {row[0]: row[1] for rows in page.tables for row in rows if len(row) == 2}
    assert (cells["tau"], cells["cpu"], cells["gpu"], cells["torch"]) == ("0.5", "Some CPU", "–", "2.14.1")


@pytest.mark.parametrize("kind", ["whole", "never", "cut", "single", "direct"])
def test_the_page_asks_for_nothing(pages, kind):
    text = pages[kind]
    assert "http://" not in text
    assert "https://" not in text
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "image", "object"}
    targets = [
        value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "xlink:href", "src")
    ]
    assert targets
    assert all(value.startswith("#") for value in targets)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in targets} | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)


def test_figures_are_there_and_are_named(pages):
    page = Page(pages["whole"])
    assert sum(tag == "svg" and attrs["role"] == "img" for tag, attrs in page.tags) == 10
    assert "Figure 10." in page.text
    assert sum(tag == "svg" for tag, _ in Page(pages["never"]).tags) == 8


def test_what_a_run_says_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    folder = write_run(
        tmp_path / "evil", 3, 0, 0, model=evil, recipe=evil, environment={evil: evil}, config={"tau": evil}
    )
    text = write_report(rewrite(folder, lambda line: line["event"].update(reason=evil))).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text


@pytest.mark.usefixtures("without_figures")
def test_the_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", 3, 0, 0)
    out = tmp_path / "elsewhere" / "page.html"
    assert write_report(folder, out) == out
    before = out.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(report, "page", lambda title, body: "\ud800")
        with pytest.raises(UnicodeEncodeError):
            write_report(folder, out)
    assert out.read_text() == before
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert write_report(folder) == folder / "report.html"


def test_the_same_run_gives_the_same_page(folders, pages):
    assert report.render(load_run(folders["cut"])) == pages["cut"]


def test_epochs_trained_again_after_a_resume_count_once(tmp_path):
    folder = write_run(tmp_path / "run", 6, 0, 0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    again = json.dumps(json.loads(lines[4]) | {"loss": 0.125})
    (folder / "metrics.jsonl").write_text("\n".join([*lines, lines[5][:40], again]) + "\n")
    run = load_run(folder)
    assert [epoch.epoch for epoch in run.epochs] == [1, 2, 3, 4, 5]
    assert run.epochs[-1].loss == 0.125
    assert any("2 epochs were trained again" in note for note in run.notes)
    assert any("A line of metrics.jsonl (line 7) is cut off" in note for note in run.notes)


def test_a_missing_field_is_located(tmp_path):
    folder = write_run(tmp_path / "run", 3, 0, 0)
    rewrite(folder, lambda line: line.pop("lr"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: no field 'lr'"):
        load_run(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json"):
        load_run(folder)


def test_speed_ups_need_full(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[12:]))
    run = load_run(folder)
    assert all(speed.measured is None and "no epoch was trained in FULL" in speed.why for speed in speed_ups(run))
    assert any("No record of 12 epochs" in note for note in run.notes)
    write_report(folder)
