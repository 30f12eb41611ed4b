"""The report page: what it shows, what it must never do with what a model wrote, and its charts."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmalign.errors import ConfigError
from mmalign.report import write_report
from mmalign.report.charts import Series, duration, line_panel, nice_ticks, number, plus_minus, smooth, stacked_bar
from mmalign.report.diagnosis import diagnose
from mmalign.report.page import phase_seconds
from mmalign.report.runs import read_run, results
from mmalign.report.samples import MAX_SAMPLES, choose, embed_image
from run_folders import rollout_records, write_metrics, write_pipeline, write_samples, write_stage

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and keeps what a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(run_dir: Path) -> tuple[str, Page]:
    text = write_report(run_dir).read_text(encoding="utf-8")
    return text, Page(text)


# -- the page ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
def test_page_is_self_contained_and_complete(tmp_path: Path, images: bool) -> None:
    text, page = page_of(write_pipeline(tmp_path / "run", images=images))
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert "prefers-color-scheme: dark" in text
    shown = " ".join(page.text)
    for expected in ("before", "after", "0.25", "0.75", "+0.500 ± 0.060", "+8.3", "4 min 00 s", "2.14.1", "0123abc", "f" * 16,
                     "rollout: 1 min 12 s", "reward: answer_match", "gradient norm"):
        assert expected in shown
    assert page.count("img") == (6 if images else 0)
    if not images:
        first, second = shown.index("first a red circle"), shown.index("second a red circle")
        assert first < second < shown.index("first two blue squares")


def test_everything_a_model_or_user_wrote_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    run = tmp_path / "run"
    stage = write_stage(run, name=bad, kind=bad, config={"note": bad}, versions={bad: bad}, git=bad, seed=bad, started=bad,
                        metrics={f"eval/{bad}": 0.5, f"difference/{bad}": 0.1, f"before/{bad}": 0.4, bad: 1.0})
    write_metrics(stage, [{"step": i, bad: i, f"rewards/{bad}/mean": i, f"seconds/{bad}": 1.0, "seconds": 2.0} for i in range(5)])
    write_samples(stage, [{"prompt": [{"role": bad, "content": bad}], "completion": bad, "answer": bad, "rewards": {bad: 1.0}},
                          {"prompt": bad * 100, "completion": bad * 100, "rewards": {}}])
    (run / "config.yaml").write_text(f"# {bad}\nseed: 0\n")
    text, page = page_of(run)
    assert page.count("script") == 0
    assert page.count("img") == 0
    assert "&lt;script&gt;alert(1)" in text
    assert all("onerror" not in attributes for _, attributes in page.tags)


def test_evaluations_are_matched_by_position_and_only_if_they_have_as_many_samples(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run")
    write_samples(run / "before", [{"prompt": "only one", "completion": "lonely sample", "rewards": {}}])
    text, _ = page_of(run)
    assert "lonely sample" not in text
    assert "cannot be matched" in text


def test_a_run_directory_may_be_moved(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    text, _ = page_of(tmp_path / "elsewhere")
    assert "first a red circle" in text
    assert "cannot be matched" not in text


def test_a_sample_list_cannot_point_outside_of_its_folder(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    run = write_stage(tmp_path / "run")
    write_samples(run, [{"prompt": "p", "image": "../../secret.png", "rewards": {}},
                        {"prompt": "q", "image": str(tmp_path / "secret.png"), "rewards": {}}])
    text, page = page_of(run)
    assert page.count("img") == 0
    assert text.count("image missing") == 2


def test_large_images_are_shrunk_and_broken_ones_left_out(tmp_path: Path) -> None:
    noise = Image.effect_noise((900, 600), 90).convert("RGB")
    noise.save(tmp_path / "large.png")
    source, small = embed_image(tmp_path / "large.png")
    assert source.startswith("data:image/jpeg")
    assert len(source) < (tmp_path / "large.png").stat().st_size / 5
    assert not small
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    assert embed_image(tmp_path / "broken.png") == ("", False)
    assert embed_image(tmp_path / "absent.png") == ("", False)


def test_single_stage_run_with_samples_of_two_moments(tmp_path: Path) -> None:
    run = write_stage(tmp_path / "run", kind="grpo", name="run")
    write_metrics(run, rollout_records(20))
    for step in (2, 10, 20):
        write_samples(run / "samples" / f"step-{step}", [{"prompt": "p", "completion": f"at {step}", "rewards": {"r": step}}])
    text, _ = page_of(run)
    assert "at 2<" in text
    assert "at 20<" in text
    assert "at 10<" not in text  # the first and the last evaluation


def test_unfinished_and_damaged_stages_are_shown_as_such(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train = write_stage(root / "train", kind="sft", status="running", seconds=None, finished=None)
    write_metrics(train, [{"step": i, "loss": 1.0 / i, "seconds": 30.0} for i in range(1, 9)])
    with (train / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    (root / "broken").mkdir()
    (root / "broken" / "manifest.json").write_text("{")
    text, _ = page_of(root)
    assert "Not finished: train" in text or "Not finished: broken, train" in text
    assert "4 min 00 s" in text


def test_stages_follow_the_configuration_and_moved_folders_are_ignored(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "run")
    shutil.copytree(root / "before", root / "before.previous-1")
    write_stage(root / "report", kind="report")
    assert [stage.name for stage in read_run(root).stages] == ["before", "grpo", "after"]


def test_a_folder_without_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match=r"absent.*does not exist"):
        write_report(tmp_path / "absent")


def test_output_may_be_elsewhere_and_nothing_partial_stays(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run")
    target = write_report(run, tmp_path / "pages" / "one.html")
    assert [p.name for p in target.parent.iterdir()] == ["one.html"]
    assert not (run / "report.html").exists()


def test_results_of_runs(tmp_path: Path) -> None:
    compared, = (r for r in results(read_run(write_pipeline(tmp_path / "run"))) if r.compared)
    assert (compared.stage, compared.before, compared.after, compared.error) == ("after", 0.25, 0.75, 0.06)
    assert compared.ratio == pytest.approx(0.5 / 0.06)


@pytest.mark.parametrize(("difference", "kind"), [
    (0.5, "better"), (0.13, "better"), (-0.5, "worse"), (0.11, "same"), (0.0, "same"),
])
def test_a_difference_is_coloured_from_two_standard_errors_on(tmp_path: Path, difference: float, kind: str) -> None:
    run = write_stage(tmp_path / "run", metrics={"eval/r": 1.0, "before/r": 0.5, "after/r": 1.0, "difference/r": difference,
                                                 "difference/r/error": 0.06})
    text, _ = page_of(run)
    assert f'<span class="{kind}">' in text


def test_phases_add_up_to_the_whole() -> None:
    split = phase_seconds([{"seconds": 10.0, "seconds/rollout": 6.0, "seconds/update": 1.0},
                           {"seconds": 10.0, "seconds/rollout": 4.0, "seconds/update": 2.0}])
    assert split == {"rollout": 10.0, "other": 7.0, "update": 3.0}
    assert phase_seconds([{"seconds": 1.0}]) == {}


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=80))
def test_shown_samples_cover_prompts_first(prompts: list[str]) -> None:
    shown = choose([{"prompt": p} for p in prompts], limit=MAX_SAMPLES)
    assert shown == sorted(set(shown))
    assert len(shown) == min(len(prompts), MAX_SAMPLES)
    assert {prompts[i] for i in shown} == set(prompts)  # at most six prompts, all fit


# -- what the curves say -------------------------------------------------------------------------------------------------


def records(**columns: float) -> list[dict[str, float]]:
    return [{"step": i, **columns} for i in range(20)]


def test_a_loss_near_zero_is_explained_not_warned_of() -> None:
    remark, = diagnose(records(**{"loss/policy": 1e-9, "rollout_gap/max": 1e-6, "grad_norm": 0.3}))
    assert not remark.serious
    assert diagnose(records(grad_norm=0.0))[0].serious


@pytest.mark.parametrize(("found", "expected"), [
    (records(grad_norm=0.0), "gradient norm is 0"),
    (records(**{"loss/sigmoid": math.log(2), "grad_norm": 0.1}), "log 2"),
    (records(**{"groups/zero_spread": 0.9, "grad_norm": 0.1}), "90% of the groups"),
    (records(**{"completions/cut_off": 0.6}), "max_new_tokens"),
    (records(**{"rollout_gap/max": 0.4}), "away from those it was sampled with"),
    (records(**{"rewards/judge/none_fraction": 0.8}), "'judge' did not apply to 80%"),
    (records(**{"loss/policy": 1e-9, "rollout_gap/max": 1e-6, "grad_norm": 0.3}), "expected"),
    ([{"step": i, "grad_norm": 500.0 if i == 7 else 1.0} for i in range(20)], "500 times the median"),
    ([{"step": i, "rewards/chosen": -0.1 * i, "rewards/rejected": -0.3 * i, "rewards/margin": 0.2 * i} for i in range(20)],
     "chosen samples fell while the margin grew"),
])
def test_diagnosis_names_what_is_wrong(found: list[dict[str, float]], expected: str) -> None:
    assert any(expected in remark.text for remark in diagnose(found))


def test_diagnosis_is_silent_on_a_healthy_run() -> None:
    assert diagnose([{**r, "loss/policy": 0.02} for r in rollout_records()]) == []
    assert diagnose(records(grad_norm=0.0)[:3]) == []


# -- charts --------------------------------------------------------------------------------------------------------------


def test_smooth_is_the_normalised_exponential_average() -> None:
    values, span = [1.0, 4.0, 2.0, 8.0], 3.0
    keep = 1 - 2 / (span + 1)
    for end in range(1, 5):
        weights = [keep ** (end - 1 - i) for i in range(end)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert smooth(values, span)[end - 1] == pytest.approx(expected)
    assert smooth(values, 1.0) == values
    assert smooth([2.0] * 5, 9.0) == pytest.approx([2.0] * 5)
    with_gap = smooth([1.0, math.nan, 3.0], 3.0)
    assert math.isnan(with_gap[1])
    assert with_gap[2] == pytest.approx(smooth([1.0, 3.0], 3.0)[1])


finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(finite, st.floats(1e-9, 1e12), st.integers(2, 8))
def test_ticks_are_round_and_inside(low: float, width: float, count: int) -> None:
    high = low + width
    if high - low < 1e-9 * max(abs(low), 1.0):
        return
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert 1 <= len(ticks) <= count + 1
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        assert f"{step:.0e}"[0] in "125"


@settings(max_examples=60, deadline=None)
@example([1.0, 2.2250738585072014e-308], False)
@example([0.0, 0.0], True)
@given(st.lists(st.one_of(finite, st.just(math.nan), st.floats(1e-9, 1e9)), min_size=1, max_size=60), st.booleans())
def test_any_series_gives_well_formed_svg_inside_the_panel(values: list[float], band: bool) -> None:
    x = [float(i) for i in range(len(values))]
    panel = line_panel("a < b", [Series("s", x, values, [abs(v) for v in values] if band else None)])
    if all(math.isnan(v) for v in values):
        assert panel == ""
        return
    root = ElementTree.fromstring(panel)
    svg = root.find("svg")
    assert svg is not None
    for path in svg.iter("path"):
        for px, py in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.get("d", "")):
            assert -0.2 <= float(px) <= 320.2
            assert -0.2 <= float(py) <= 170.2
    assert "nan" not in panel


def test_spikes_survive_thinning_and_wide_ranges_use_a_log_axis() -> None:
    spiky = [1.0] * 5000
    spiky[3210] = 50.0
    panel = line_panel("loss", [Series("loss", list(range(5000)), spiky)])
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(r'd="([^"]*)"[^>]*class="raw"', panel).group(1))]
    assert min(heights) < 20 < max(heights)
    assert len(heights) < 500
    assert "(log scale)" in line_panel("lr", [Series("lr", [0, 1, 2], [1e-6, 1e-3, 1.0])])
    assert "(log scale)" not in line_panel("lr", [Series("lr", [0, 1, 2], [0.0, 1e-3, 1.0])])


def test_bar_widths_are_shares() -> None:
    bar = ElementTree.fromstring(stacked_bar({"rollout": 6.0, "update": 3.0, "reward": 1.0, "none": 0.0}, width=100))
    widths = [float(rect.get("width", 0)) for rect in bar.iter("rect")]
    assert widths == [60.0, 30.0, 10.0]
    assert stacked_bar({"a": 0.0}) == ""


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (0.5, "0.5"), (-0.25, "−0.25"), (1234.567, "1235"), (250000.0, "250000"), (1e-5, "1e−5"), (2.5e-7, "2.5e−7"),
    (3.2e9, "3.2e9"), (math.nan, "–"), (12.345678, "12.35"),
])
def test_numbers_read_well(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "error", "text"), [
    (-0.002068, 0.002717, "−0.0021 ± 0.0027"), (12.34, 3.21, "+12.3 ± 3.2"), (250.0, 30.0, "+250 ± 30"), (0.5, 0.0, "+0.5 ± 0"),
    (math.nan, 0.1, "– ± 0.1"),
])
def test_differences_show_two_digits_of_their_error(value: float, error: float, text: str) -> None:
    assert plus_minus(value, error) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.25 s"), (12.34, "12.3 s"), (61.0, "1 min 01 s"), (7500.0, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_json_lines_that_are_no_objects_are_ignored(tmp_path: Path) -> None:
    run = write_stage(tmp_path / "run")
    lines = ["3", "null", json.dumps({"step": 1, "loss": None}), '{"step": 2, "loss": 1.5}']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert [record["step"] for record in read_run(run).stages[0].records] == [1, 2]
    write_report(run)
