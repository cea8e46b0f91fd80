"""report: the tables, the first line and the plots of a whole run, of a short one, and of one with
several seeds.
"""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from slmperf.check import InputError
from slmperf.recipe import paper
from slmperf.recipe.report import first_line, print_table, write_report
from slmperf.recipe.report_tables import tables
from slmperf.recipe.results import (
    COMPARISONS,
    KINDS,
    Comparison,
    ComparisonRow,
    DataFacts,
    Interval,
    ParityResult,
    Results,
    SeedMetrics,
    StageLatency,
    StageResult,
)

# title, kind, parameters, AUC, prefill ms
STAGES = [
    ("item mean", "floor", None, 0.706, None),
    ("logistic member + item", "floor", None, 0.8209, None),
    ("teacher", "teacher", 1_432_960, 0.8215, 61.0),
    ("student, SFT", "sft", 331_200, 0.8101, 18.2),
    ("student, KD", "kd", 331_200, 0.8178, 18.1),
    ("MLP -25%, one-shot", "prune_mlp", 294_336, 0.8098, 16.8),
    ("MLP -25%, SFT", "sft", 294_336, 0.8105, 16.8),
    ("MLP -25%, KD", "kd", 294_336, 0.8169, 16.8),
    ("MLP -50%, two steps, KD", "prune_gradual", 257_472, 0.8165, 15.5),
    ("half the heads", "prune_attention", 239_040, 0.7901, 10.1),
    ("half the heads, KD", "kd", 239_040, 0.8159, 10.1),
    ("int8", "quantise", 239_040, 0.8157, 12.9),
]
PARTS = {
    "qkv projections": 0.9,
    "rope and attention": 2.9,
    "output projection": 0.4,
    "norms": 0.2,
    "mlp": 1.6,
    "rest": 0.1,
}


def whole_run(seeds: int = 1, synthetic: bool = False) -> Results:
    data = DataFacts(
        source="movietweetings-100k (ratings.dat)",
        synthetic=synthetic,
        members=16554,
        items=10506,
        interactions=100000,
        scored_members=2583,
        candidates=14420,
        tasks=["like", "top"],
    )
    results = Results(recipe="quickstart", data=data, date="2026-01-31", seconds=512.0)
    results.machine = {"processor": "a processor", "cores": "2"}
    results.versions = {"torch": "2.13.0"}
    results.settings = {
        "seed": 0,
        "stages": [{"name": "teacher", "hidden": 96, "heads": [4, 2]}, {"name": "student_kd"}],
    }
    results.notes = ["A note of the run."]
    for number, (title, kind, parameters, auc, prefill) in enumerate(STAGES):
        delta = 100 * (auc / STAGES[2][3] - 1)
        stage = StageResult(
            name=f"stage_{number}",
            title=title,
            kind=kind,
            parameters=parameters,
            size_mib=4 * parameters / 2**20 if parameters else None,
            auc_interval=Interval(auc - 0.008, auc + 0.008),
            delta_pct=delta,
            delta_interval=None if kind == "teacher" else Interval(delta - 0.3, delta + 0.3),
        )
        for seed in range(seeds):
            shift = 0.001 * (seed - (seeds - 1) / 2)
            stage.seeds.append(
                SeedMetrics(
                    seed=seed,
                    auc={"like": auc - 0.02 + shift, "top": auc + 0.02 + shift},
                    auc_mean=auc + shift,
                    auc_within=0.73,
                    log_loss=0.45,
                    calibration_error=0.02,
                    perplexity=None if kind == "floor" else 7.5,
                )
            )
        if prefill is not None:
            stage.shape = {"layers": 3, "hidden": 64}
            stage.train_seconds, stage.train_tokens_per_second = 40.0, 31000.0
            stage.latency = StageLatency(
                context=512,
                prefill_ms=prefill,
                prefill_p90_ms=1.1 * prefill,
                candidates=16,
                rank_uncached_ms=14 * prefill,
                rank_cached_ms=0.5 * prefill,
                layer_ms={part: value * prefill / 20 for part, value in PARTS.items()},
            )
        results.stages.append(stage)
    for kind, roles in COMPARISONS.items():
        rows = [
            ComparisonRow(
                stage=f"stage_{place + 2}",
                role=role,
                title=f"{kind} {role}",
                parameters=331_200,
                delta_pct=-0.5 * place,
                delta_interval=Interval(-0.5 * place - 0.2, -0.5 * place + 0.2) if place else None,
                auc_mean=0.81,
                auc_by_seed=[0.8095, 0.8105][:seeds],
            )
            for place, role in enumerate(roles)
        ]
        results.comparisons.append(Comparison(kind, rows))
    results.parities = [
        ParityResult("stage_4", "stage_7", 0.91, 0.987, 0.1834, 0.45, 0.451, 0.02, 0.021)
    ]
    return results


def written(results: Results, folder) -> tuple[str, str]:
    write_report(results, folder)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def pictures(html: str) -> list[str]:
    return [
        base64.b64decode(one).decode()
        for one in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    ]


def test_results_survive_json():
    results = whole_run(seeds=2)
    text = results.to_json()
    assert Results.from_json(text) == results
    assert Results.from_json(text).to_json() == text
    results.parities[0].spearman = float("nan")
    assert json.loads(results.to_json())["parities"][0]["spearman"] is None
    broken = json.loads(text)
    broken["stages"][0]["size"] = 3
    with pytest.raises(InputError, match=r"results\.stages\[0\]: unknown key 'size'"):
        Results.from_json(json.dumps(broken))
    del broken["stages"][0]["size"], broken["stages"][0]["kind"]
    with pytest.raises(InputError, match=r"results\.stages\[0\]: missing key 'kind'"):
        Results.from_json(json.dumps(broken))


def test_the_fixture_covers_every_kind():
    assert {kind for _, kind, *_ in STAGES} == set(KINDS)


def test_whole_report(tmp_path):
    results = whole_run()
    markdown, html = written(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    first = markdown.splitlines()[0]
    assert first.startswith("The data is real: movietweetings-100k (ratings.dat); 100,000 interact")
    for title, *_ in STAGES:
        assert f"| {title} |" in markdown
        assert title.replace("'", "&#39;") in html
    row = next(line for line in markdown.splitlines() if line.startswith("| student, KD |"))
    assert row == (
        "| student, KD | 331,200 | 1.26 | 0.7978 | 0.8378 | 0.8178 | -0.45 [-0.75, -0.15] "
        "| 0.7300 | 0.4500 | 0.0200 | 7.500 | 18.10 | 253.40 | 9.05 |"
    )
    floor = next(line for line in markdown.splitlines() if line.startswith("| logistic member"))
    assert "| 0.8209 | -0.07 [-0.37, +0.23] |" in floor and floor.count("–") == 6
    assert "A note of the run." in markdown
    assert "| stages.teacher.heads | 4, 2 |" in markdown
    assert "0.4500 → 0.4510" in markdown


def test_the_papers_figures_stand_beside_ours_and_say_so(tmp_path):
    markdown, html = written(whole_run(), tmp_path)
    for kind, roles in COMPARISONS.items():
        assert f"## {paper.TITLES[kind]}" in markdown
        if kind == "calibration":  # of which the paper states a finding and no AUC
            assert kind not in paper.AUC_DELTAS
            continue
        assert set(roles) == set(paper.AUC_DELTAS[kind]), "every role has the paper's figure"
        assert paper.AUC_DELTAS[kind]["baseline"][0].delta_pct == 0
    assert (
        "| distillation sft | 331,200 | 0.8100 | -1.00 [-1.20, -0.80] "
        "| 8B, SFT; 3B, SFT | -0.62; -1.21 |" in markdown
    )
    assert (
        "| attention one_shot | 331,200 | 0.8100 | -0.50 [-0.70, -0.30] | 2.1B, one-shot | -1.07 |"
        in markdown
    )
    assert "| 2.1B | 171 | 184 | 6.04x |" in markdown
    assert markdown.count("arXiv 2502.14305") == len(COMPARISONS) + 1
    assert '<td class="paper">-1.07</td>' in html


def test_html_is_self_contained(tmp_path):
    _, html = written(whole_run(), tmp_path)
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert "<script" not in html and "@import" not in html
    drawn = pictures(html)
    assert len(drawn) == 3
    for one in drawn:
        ElementTree.fromstring(one)
    assert len(html) < 1_500_000
    again = tmp_path / "again"
    again.mkdir()
    assert written(whole_run(), again)[1] == html, "the same results give the same bytes"


def test_synthetic_data_is_said_first(tmp_path):
    results = whole_run(synthetic=True)
    results.data.source = "a made world <seed 3>"
    markdown, html = written(results, tmp_path)
    assert markdown.startswith("The data is synthetic: a made world <seed 3>;")
    assert '<p class="origin synthetic">The data is synthetic: a made world &lt;seed 3&gt;;' in html
    out = io.StringIO()
    import rich.console

    print_table(results, rich.console.Console(file=out))
    assert out.getvalue().startswith("The data is synthetic: ")


def test_a_short_recipe(tmp_path):
    whole = whole_run()
    results = Results(recipe="short", data=whole.data, date="2026-01-31")
    results.stages = [
        StageResult(
            name="student",
            title="student | SFT",
            kind="sft",
            parameters=331_200,
            seeds=[SeedMetrics(seed=0, auc={"like": 0.7}, auc_mean=0.7)],
        ),
        StageResult(name="raw", title="not scored", kind="prune_mlp", parameters=300_000),
    ]
    results.data.tasks = ["like"]
    markdown, html = written(results, tmp_path)
    assert "| student \\| SFT | 331,200 | 0.7000 |" in markdown
    assert "| not scored | 300,000 | – |" in markdown
    assert [table.title for table in tables(results)] == [
        "Every stage",
        "Machine, date and versions",
    ]
    assert len(pictures(html)) == 1, "quality alone"
    results.stages = []
    assert "The data is real" in written(results, tmp_path)[0]


def test_a_comparison_with_missing_rows(tmp_path):
    results = whole_run()
    results.comparisons = [Comparison("one_shot", results.comparisons[2].rows[:2])]
    markdown, _ = written(results, tmp_path)
    assert "| one_shot cut_1 |" in markdown and "6.0B" not in markdown


def test_several_seeds(tmp_path):
    markdown, _ = written(whole_run(seeds=2), tmp_path)
    assert "Means of 2 seeds" in markdown
    assert "## Every seed" in markdown
    assert "| student, KD | 1 | 0.7983 | 0.8383 | 0.8183 | 0.4500 | 0.0200 | 7.500 |" in markdown
    assert "| gradual gradual | 331,200 | 0.8100 (0.8095 to 0.8105) | -1.00 " in markdown


def test_console_table():
    import rich.console

    results = whole_run()
    out = io.StringIO()
    print_table(results, rich.console.Console(file=out))
    lines = out.getvalue().splitlines()
    assert lines[0] == first_line(results)
    row = next(line for line in lines if line.strip().startswith("half the heads, KD"))
    assert row.split()[4:8] == ["239,040", "0.91", "0.7959", "0.8359"] and row.split()[-1] == "5.05"
    narrow = io.StringIO()
    print_table(results, rich.console.Console(file=narrow, width=80, force_terminal=True))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", narrow.getvalue()).splitlines()[1:]
    assert all(len(line) <= 80 for line in plain)
    row = next(line for line in plain if line.strip().startswith("half the heads, KD"))
    assert row.split()[4:] == ["239,040", "0.8159", "-0.68", "[-0.98,", "-0.38]"]
