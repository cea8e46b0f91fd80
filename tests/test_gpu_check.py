"""The GPU check without a GPU: budgets, resuming, isolation, merging, RESULTS.md, targets.

Over 400 lines: plans that fail, hang and leak are written out, each beside its test.
"""

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import torch

from slmperf.bench.results import read_results
from slmperf.testing.cases import FAMILIES


def load(root, name):
    spec = importlib.util.spec_from_file_location(name, root / "bench" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(root):
    return load(root, "gpu_report")


@pytest.fixture(scope="module")
def check(root, report):
    return load(root, "gpu_check")


# Sections of every kind of end. What a section does depends on files beside the plan, so that a
# second run can find it mended.
PLAN = """
import os, sys, time
from pathlib import Path

HERE = Path(__file__).parent


def row(name, **more):
    return {"name": name, "time_us": 2.0, "low_us": 1.0, "high_us": 3.0, "samples": 5, **more}


def good(part, facts):
    with open(HERE / "runs", "a") as log:
        log.write("good ")
    facts["tests"] = {"passed": 3}
    yield row("good 1", roof_share=0.75)
    yield row("good 2", gbs=12.0)


def raises(part, facts):
    yield row("half")
    if not (HERE / "mended").exists():
        raise RuntimeError("kernel says no")


def dies(part, facts):
    if not (HERE / "mended").exists():
        os._exit(11)


def hangs(part, facts):
    print("hanging", flush=True)
    time.sleep(0 if (HERE / "mended").exists() else 600)


def plan(part, device):
    return {"good": good, "raises": raises, "dies": dies, "hangs": hangs, "last": good}
"""


def run_check(root, folder, *options, **popen):
    """The command in a process of its own, on the planted sections."""
    (folder / "plan.py").write_text(PLAN)
    command = [sys.executable, "bench/gpu_check.py", "--device", "cpu", "--commit", "abc1234"]
    command += ["--plan", folder / "plan.py", "--out", folder / "results", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), cwd=root, text=True, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **popen,
    )  # fmt: skip


def part_files(folder):
    return {path.name.split(".")[-2]: path for path in (folder / "results/parts").glob("*.json")}


def statuses(path):
    sections = json.loads(path.read_text())["sections"]
    return {name: section["status"] for name, section in sections.items()}


@pytest.fixture(scope="module")
def broken_off(root, tmp_path_factory, check):
    """A part whose sections raise, die and hang, stopped by its budget."""
    folder = tmp_path_factory.mktemp("check")
    for name in ("RESULTS.md", "targets.toml"):
        shutil.copy(root / "bench" / name, folder)
    (folder / "plan.py").write_text(PLAN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.time()
    subprocess.run([sys.executable, "-c", "import torch, slmperf.bench.results"], env=environment)
    # Three processes come to their sections before the time is up; the fourth hangs until then.
    budget = max(10, round(6 * (time.time() - start)))
    grace = "import gpu_check; gpu_check.GRACE_S = 0; raise SystemExit(gpu_check.main())"
    options = ["--device", "cpu", "--commit", "abc1234", "--part", "ops", "--budget-s", str(budget)]
    options += ["--plan", str(folder / "plan.py"), "--out", str(folder / "results")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append('bench'); {grace}", *options],
        cwd=root, text=True, capture_output=True, env=environment,
    )  # fmt: skip
    return folder, done


def test_a_failure_costs_its_own_section_only(broken_off):
    folder, done = broken_off
    (path,) = part_files(folder).values()
    # "hangs" had less than half of the time or more: then it counts as failed.
    found = statuses(path)
    assert found.pop("hangs") in ("left", "failed")
    assert found == {"good": "done", "raises": "failed", "dies": "failed", "last": "left"}
    content = read_results(path)
    assert content["kind"] == "gpu-check" and content["commit"] == "abc1234"
    assert [row["name"] for row in content["rows"]] == ["good 1", "good 2", "half"]
    assert "RuntimeError: kernel says no" in content["sections"]["raises"]["error"]
    assert "ended with code 11" in content["sections"]["dies"]["error"]
    assert content["machine"]["torch"] == torch.__version__
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED ops: raises: RuntimeError: kernel says no" in done.stdout


def test_a_second_run_takes_up_what_is_left(root, broken_off):
    folder, _ = broken_off
    (folder / "mended").touch()
    runs = (folder / "runs").read_text()
    process = run_check(root, folder, "--part", "ops")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    (path,) = part_files(folder).values()
    assert set(statuses(path).values()) == {"done"}
    names = [row["name"] for row in json.loads(path.read_text())["rows"]]
    # "last" is "good" under another name: its rows stand beside the first ones.
    assert names == ["good 1", "good 2", "half", "good 1", "good 2"]
    assert (folder / "runs").read_text() == runs + "good "  # the first was not run again
    (merged,) = (folder / "results").glob("*/*-abc1234.json")
    content = read_results(merged)
    assert [row["name"] for row in content["rows"]] == ["good 1", "good 2", "half"]
    assert set(content["parts"]) == {"ops"}
    assert "tests on the device: 6 passed." in output and "| good 1 | 2.0 | - | 75 |" in output
    for name in ("RESULTS.md", "targets.toml"):  # a GPU's alone are written there
        assert (folder / name).read_text() == (root / "bench" / name).read_text()


def test_stopped_from_outside_it_leaves_no_process_and_loses_nothing(root, tmp_path):
    process = run_check(root, tmp_path, "--part", "engine", "--budget-s", "100")
    deadline, path = time.time() + 60, None
    while time.time() < deadline:
        path = part_files(tmp_path).get("engine")
        if path and statuses(path).get("hangs") == "running":
            break
        time.sleep(0.1)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    ).stdout.split()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert children and not any(os.path.exists(f"/proc/{pid}") for pid in children)
    assert statuses(path)["good"] == "done" and len(json.loads(path.read_text())["rows"]) == 3


def part_of(report, part, rows, **more):
    content = {
        "schema": report.SCHEMA, "kind": "gpu-check", "date": "2026-11-22T07:00Z", "roof": None,
        "machine": {"device": "NVIDIA H200", "torch": "2.11.0", "python": "3.12.3"},
        "part": part, "commit": "abc1234", "device": "cuda", "rows": rows,
        "sections": {"s": {"status": "done", "seconds": 1.0}},
    }  # fmt: skip
    return content | more


def row_of(name, **more):
    return {"name": name, "time_us": 5000.0, "low_us": 4.0, "high_us": 6.0, "samples": 5, **more}


@pytest.fixture
def desk(root, tmp_path):
    """A copy of what a merge writes to."""
    (tmp_path / "bench").mkdir()
    for name in ("RESULTS.md", "targets.toml"):
        shutil.copy(root / "bench" / name, tmp_path / "bench")
    return tmp_path


@pytest.mark.parametrize("share,status", [(0.81, "measured"), (0.7, "measured"), (0.4, "missed")])
def test_parts_from_elsewhere_are_merged_and_settle_targets(
    check, report, desk, capsys, share, status
):
    """Files of two calls, brought home: one result, a block in RESULTS.md, the owed row filled."""
    back = desk / "back"
    targets = (desk / "bench/targets.toml").read_text()
    target = next(one for one in tomllib.loads(targets)["target"] if one["row"] == "divergence-gpu")
    assert target["status"] == "owed", "taken on a GPU by now: plant another owed target here"
    name = target["bench"]["row"]
    tests = {"t": {"status": "failed", "seconds": 2.0, "error": "a\nE  assert 1 == 2",
                   "tests": {"passed": 7, "failed": 1}}}  # fmt: skip
    report.write(back / "call-1" / "a.json", part_of(report, "tests", [], sections=tests))
    rows = [row_of("other"), row_of(name, roof_share=share, gbs=3000.0)]
    later = part_of(report, "owed", rows, date="2026-11-23T07:00Z", roof={"copy_gbs": 4300.0})
    report.write(back / "call-2" / "b.json", later)
    (back / "strange.json").write_text("[]")
    for _ in range(2):  # the same again changes nothing
        assert check.main(["--merge", str(back), "--out", str(desk / "bench/results")]) == 1
    printed = capsys.readouterr().out
    assert "FAILED tests: t: E  assert 1 == 2" in printed
    assert f"{status}: {target['name']}: {share:.3g} (roof_share; 5000 us), wanted >= 0.7" in (
        printed
    )
    content = read_results(desk / "bench/results/nvidia-h200/2026-11-22-abc1234.json")
    assert set(content["parts"]) == {"tests", "owed"} and content["roof"] == {"copy_gbs": 4300.0}

    results = (desk / "bench/RESULTS.md").read_text()
    assert results.count("<!-- gpu-check nvidia-h200: begin -->") == 1
    assert "tests on the device: 1 failed, 7 passed." in results
    assert f"| {name} | 5000.0 | 3000 | {100 * share:.0f} |" in results
    filled = next(line for line in results.splitlines() if line.startswith("| divergence-gpu |"))
    assert filled.endswith(
        f"| {share:.3g} (roof_share; 5000 us), wanted >= 0.7 | NVIDIA H200; torch 2.11.0, "
        "Python 3.12.3 | 2026-11-22 |"
    )
    now = tomllib.loads((desk / "bench/targets.toml").read_text())["target"]
    changed = [one for one in now if one not in tomllib.loads(targets)["target"]]
    assert changed == [target | {"status": status}]


@pytest.mark.parametrize("key", ["date", "roof", "sections", "rows", "time_us", "status"])
def test_a_part_file_that_is_not_whole_is_left_out(check, report, desk, capsys, key):
    """One line for it; the others are merged."""
    whole = part_of(report, "tests", [row_of("kept")], device="cpu")
    broken = part_of(report, "ops", [row_of("lost")])
    if key == "time_us":
        del broken["rows"][0][key]
    elif key == "status":
        broken["sections"] = {"s": {}}
    else:
        del broken[key]
    report.write(desk / "back" / "a.json", broken)
    options = ["--merge", str(desk / "back"), "--out", str(desk / "bench/results")]
    assert check.main(options) == 2
    (first, last) = capsys.readouterr().err.splitlines()
    assert "a.json: " in first and key in first and "no part files" in last
    report.write(desk / "back" / "b.json", whole)
    assert check.main(options) == 0
    content = read_results(desk / "bench/results/nvidia-h200/2026-11-22-abc1234.json")
    assert [row["name"] for row in content["rows"]] == ["kept"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_cpu_settles_no_gpu_target(check, report, desk):
    target = report.owed((desk / "bench/targets.toml").read_text())[0]
    before = (desk / "bench/targets.toml").read_text()
    rows = [row_of(target["bench"]["row"], roof_share=0.99)]
    report.write(desk / "back" / "a.json", part_of(report, "owed", rows, device="cpu"))
    results = (desk / "bench/RESULTS.md").read_text()
    assert check.main(["--merge", str(desk / "back"), "--out", str(desk / "bench/results")]) == 0
    assert (desk / "bench/targets.toml").read_text() == before
    assert (desk / "bench/RESULTS.md").read_text() == results


def test_a_block_replaces_its_own_and_no_other(report):
    first = report.put_block("# Results\n", "a", ["one"])
    both = report.put_block(first, "b", ["two"])
    assert both.count("## GPU checks") == 1
    again = report.put_block(both, "a", ["three", "four"])
    assert "one" not in again and "three\nfour\n<!-- gpu-check a: end -->" in again
    assert "<!-- gpu-check b: begin -->\ntwo\n" in again
    assert report.put_block(again, "a", ["three", "four"]) == again


@pytest.mark.parametrize(
    "options,message",
    [
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--part", "90"], "part is '90', expected all or some of 1 tests, 2 owed, 3 "),
        (["--merge", "nowhere"], "no part files below nowhere"),
        (["--data", "nowhere", "--device", "cpu"], "--data nowhere is no folder"),
    ],
)
def test_bad_options_are_one_line(check, options, message, capsys, monkeypatch):
    monkeypatch.setattr(check, "cuda_name", lambda: "")
    try:
        code, text = check.main(options), ""
    except SystemExit as exit:
        code, text = 2, str(exit)
    printed = text or capsys.readouterr().err
    assert code == 2 and message in printed and len(printed.strip().splitlines()) == 1


def test_parts_by_number_name_and_last_change(check, monkeypatch):
    monkeypatch.setattr(check, "last_changed", lambda paths: "engine" in str(paths))
    assert check.chosen_parts("all")[:3] == ["tests", "owed", "engine"]
    assert check.chosen_parts("3, tests") == ["engine", "tests"]


def test_without_git_the_sources_name_and_date_themselves(check, monkeypatch, tmp_path):
    """A copy of the tree has no .git: the same files give the same name."""
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "slmperf").mkdir()
    source = tmp_path / "slmperf" / "a.py"
    source.write_text("a = 1\n")
    first = check.commit_of_tree()
    assert first.startswith("tree-") and check.commit_of_tree() == first
    source.write_text("a = 2\n")
    assert check.commit_of_tree() != first
    os.utime(source, (1000, 1000))
    assert check.last_changed(["slmperf", "nowhere"]) == 1000


@pytest.fixture(scope="module")
def plans(root, check):
    return load(root, "gpu_plans")


@pytest.fixture(scope="module")
def sections(root, plans):
    return load(root, "gpu_sections")


def test_every_test_marked_gpu_is_among_the_sections(sections, root):
    """Read from the sources alone, against what pytest collects."""
    files = {path for path in (root / "tests").glob("test_*.py") if "mark.gpu" in path.read_text()}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    collected = {line.split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert set(sections.gpu_tests()) == collected, done.stdout + done.stderr
    assert "tests/test_ops.py::test_full_cross_on_device" in collected


def test_every_plan_is_a_part(sections):
    """A bench with a plan is run: its sources are named where the parts come from."""
    import gpu_check

    assert set(gpu_check.BENCHES) == set(sections.BENCHES)


def test_owed_targets_name_a_section_each(sections, report, root):
    """On a GPU the part "owed" takes every owed row, and no other part takes it again."""
    targets = report.owed((root / "bench" / "targets.toml").read_text())
    assert all("bench" in target for target in targets)
    plans = {name: sections.plan_of(name, "cuda") for name in ("owed", *sections.BENCHES)}
    for target in targets:
        row = target["bench"]["row"]
        where = [name for name, plan in plans.items() if any(map(row.startswith, plan))]
        assert where == ["owed"], target["name"]
    assert all(next(iter(plan)) == "roof" for plan in plans.values())
    every = [section for make in sections.BENCHES.values() for section in make("cuda")]
    taken = [section for plan in plans.values() for section in plan if section != "roof"]
    assert sorted(taken) == sorted(every)
    assert sum(len(family.bench["cuda"]) for family in FAMILIES.values()) < len(every)
    assert (
        "3b -> 2.4b -> 2.1b, 32768 tokens, tp1, fp8" in plans["layer"] and len(plans["engine"]) == 4
    )


@pytest.fixture
def stub(sections, report, tmp_path, monkeypatch):
    """A part of a GPU check whose sections run in this process."""
    path = tmp_path / "part.json"
    report.write(path, part_of(report, "ops", [], sections={}))
    (tmp_path / "plan.py").write_text(PLAN)
    monkeypatch.setattr(sections, "machine_facts", lambda part, device: {"device": "a GPU"})
    return path


def test_after_a_failure_on_a_gpu_the_process_is_left(sections, stub, monkeypatch):
    """What a failed kernel leaves of a device's state is not trusted."""
    (stub.parent / "mended").touch()  # nothing dies or hangs
    plan = stub.parent / "plan.py"
    plan.write_text(PLAN.replace('(HERE / "mended").exists()', 'part.device != "cuda"', 1))
    arguments = [str(stub), str(time.time() + 60), "1.0", str(plan)]
    monkeypatch.setattr(sections.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sections.torch.cuda, "is_initialized", lambda: True)
    assert sections.main(arguments) == sections.AGAIN
    found = {"good": "done", "raises": "failed", "dies": "left", "hangs": "left", "last": "left"}
    assert statuses(stub) == found
    assert sections.main(arguments) == 0
    assert statuses(stub) == dict.fromkeys(found, "done") | {"raises": "failed"}
    late = [str(stub), str(time.time() - 1), "1.0", str(plan)]
    stub.write_text(stub.read_text().replace('"failed"', '"left"'))
    assert sections.main(late) == 0 and statuses(stub)["raises"] == "left"


TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("name", ["a b [1]", "c"])
def test_fine(name):
    pass

@pytest.mark.gpu
def test_wrong():
    assert 1 == 2, "the last row differs"

@pytest.mark.gpu
def test_skipped():
    pytest.skip("not here")

def test_unmarked():
    assert False
"""


def test_outcomes_of_tests_are_counted_and_failures_kept(sections, stub, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    part, facts = sections.Part(stub, time.time() + 60, 1.0), {}
    with pytest.raises(sections.Failed, match="the last row differs"):
        sections.run_test(str(tmp_path / "test_some.py"), part, facts)
    assert facts["tests"] == {"passed": 2, "failed": 1, "skipped": 1}
    late, facts = sections.Part(stub, time.time() - 60, 1.0), {}
    (tmp_path / "test_some.py").write_text(TESTS.replace("pass\n", "__import__('time').sleep(9)\n"))
    with pytest.raises(sections.Failed, match="not finished within the part's time"):
        sections.run_test(str(tmp_path / "test_some.py"), late, facts)


REPORT = """<testsuites><testsuite>
<testcase name="test_backends[fa3 llama]" time="1.5"/>
<testcase name="test_backends[triton qwen3]" time="2"><system-out>said</system-out></testcase>
<testcase name="test_sizes[w4a16]" time="1"><failure message="apart">apart</failure></testcase>
<testcase name="test_sizes[fp8]" time="0"><skipped message="no kernel"/></testcase>
</testsuite></testsuites>"""


def test_tests_of_engines_are_counted_by_function(plans):
    backends, sizes = plans.counted("sglang", REPORT)
    assert backends["name"] == "served sglang test_backends" and backends["time_us"] == 3.5e6
    assert (backends["passed"], backends["not_passed"], backends["samples"]) == (2, 0, 2)
    assert (sizes["passed"], sizes["not_passed"]) == (0, 2)


def test_a_build_that_fails_is_tried_without_cuda(check, report, tmp_path, monkeypatch):
    """So that a fault in CUDA C++ does not cost the figures of everything else."""
    tried = []

    def logged(path, name, command, environment, deadline):
        tried.append((name, environment.get("SLMPERF_CUDA"), command[-1]))
        return name != "build"

    monkeypatch.setattr(check, "logged", logged)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / ".whl").mkdir()
    (tmp_path / ".whl" / "rival-1-py3-none-any.whl").touch()
    environment = {"PYTHONPATH": "/own"}
    given = check.arguments_of(["--build"])
    assert check.prepare(tmp_path / "part.json", given, environment, 0.0)
    wheel = tmp_path / ".whl" / "rival-1-py3-none-any.whl"
    assert tried == [("rivals", None, wheel), ("build", "auto", "."),
                     ("build without CUDA C++", "0", ".")]  # fmt: skip
    assert environment["PYTHONPATH"].split(os.pathsep) == [*map(str, check.SITES), "/own"]
    monkeypatch.setattr(check, "logged", lambda *given: False)
    assert not check.prepare(tmp_path / "part.json", given, {}, 0.0)


# A process that starts another in a group of its own, says its number, and waits or ends.
STARTS = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "300"], process_group=0, stdout=subprocess.DEVNULL)
print("child", child.pid, flush=True)
time.sleep({seconds})
"""


def alive(pid):
    """Whether a process runs; one that has ended and was not asked for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_compilers_behind_a_pip_end_with_their_time(check, report, tmp_path):
    """Else they would run on beside what is measured next; a command that ends leaves none too."""
    path = tmp_path / "part.json"
    report.write(path, part_of(report, "tests", [], sections={}))
    for seconds, code in ((300, "not finished within the part's time"), (0, "exit code 3")):
        program = STARTS.format(seconds=seconds) + "\nsys.exit(3)"
        command = [sys.executable, "-c", program]
        assert not check.logged(path, "build", command, dict(os.environ), time.time() + 2)
        error = json.loads(path.read_text())["sections"]["build"]["error"]
        assert error.splitlines()[-1] == code
        assert not alive(error.split()[1])


def test_a_parts_end_is_the_end_of_everything_in_it(check, report, tmp_path):
    """Its process has died and left something behind, in a group of its own."""
    (tmp_path / "plan.py").write_text(
        "import os, subprocess\n\ndef work(part, facts):\n"
        "    child = subprocess.Popen(['sleep', '300'], process_group=0)\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n    os._exit(9)\n\n"
        "def plan(part, device):\n    return {'starts': work}\n"
    )
    path = tmp_path / "part.json"
    report.write(path, part_of(report, "ops", [], sections={}, device="cpu"))
    given = check.arguments_of(["--plan", str(tmp_path / "plan.py")])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    check.run_part(path, given, environment, time.time() + 60)
    assert statuses(path) == {"starts": "failed"}
    assert not alive((tmp_path / "pid").read_text())


def test_what_a_test_started_ends_with_its_time(sections, stub, tmp_path):
    late = sections.Part(stub, time.time() + 4, 1.0)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_starts.py").write_text(
        "import subprocess, time\nimport pytest\n\n@pytest.mark.gpu\ndef test_starts():\n"
        "    child = subprocess.Popen(['sleep', '300'])\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n    time.sleep(300)\n"
    )
    with pytest.raises(sections.Failed, match="not finished within the part's time"):
        sections.run_test(str(tmp_path / "test_starts.py"), late, {})
    assert not alive((tmp_path / "pid").read_text())


def test_doctor_needs_no_command_line(sections, stub, tmp_path, monkeypatch):
    """An image without typer and pydantic still says what was built."""
    for name in ("typer", "rich", "pydantic"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this image')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = {}
    sections.doctor(None, facts)
    assert list(facts["doctor"]) == ["built", "machine", "packages", "ops"]


def test_the_tests_have_the_device_to_themselves(sections, report, tmp_path, monkeypatch):
    """The process that starts them asks nothing of it."""

    def machine(device):
        raise AssertionError("asked in the tests' parent")

    monkeypatch.setattr(sections.results, "machine", machine)
    path, plan = tmp_path / "part.json", tmp_path / "plan.py"
    plan.write_text("def plan(part, device):\n    return {}\n")
    report.write(path, part_of(report, "tests", [], sections={}, device="cpu"))
    assert sections.main([str(path), str(time.time() + 60), "1.0", str(plan)]) == 0
    found = json.loads(path.read_text())["machine"]
    assert found["torch"] == torch.__version__ and found["kind"] == "cpu"


def test_engine_rows_hold_their_share_of_the_roof(sections, plans, stub, monkeypatch):
    from slmperf.models.shapes import Shape

    tiny = Shape(1, 64, 2, 1, 32, 128, 256)
    monkeypatch.setattr(plans, "ENGINES", {"cpu": ((tiny, 2, 64, 3),)})
    part = sections.Part(stub, time.time() + 60, 1.0)
    # Ten bytes a microsecond and operations for nothing: the least time is that of the bytes.
    part.kept_roof = type("Roof", (), {"ideal_us": lambda self, bytes, flops, dtype: bytes / 10})()
    (work,) = plans.engine_plan("cpu").values()
    rows = {row["name"].rpartition(", ")[2]: row for row in work(part, {})}
    assert set(rows) == {"prefill", "rank 3 uncached", "rank 3 cached"}
    least = {name: row["roof_share"] * row["time_us"] for name, row in rows.items()}
    weights = 2 * tiny.layer_matrix_parameters * 4
    assert least["rank 3 uncached"] > least["prefill"] > weights / 10
    assert weights / 10 < least["rank 3 cached"] < least["rank 3 uncached"]


def test_kd_rows_at_tiny_sizes(plans, sections, stub, monkeypatch):
    """The part "kd" as `DEVICE=cpu` runs it; compiled by a quicker compiler, memory not asked."""
    from slmperf.bench.kd import measure

    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(measure, "peak_of", lambda *given: 3.0)
    plan = plans.kd_plan("cpu")
    assert list(plan) == ["kd 16<-24 x 512", "kd step of the quickstart"]
    part = sections.Part(stub, time.time() + 60, 0.01)
    for name, work in plan.items():
        assert not part.run(name, work), part.content["sections"][name]
    rows = {row["name"]: row for row in part.content["rows"]}
    assert all(name.startswith(row["section"]) for name, row in rows.items())
    assert len(rows) == 2 * 4 + 2 + 1 + 2
    ours = "kd 16<-24 x 512, {} tokens, bf16: kd_loss, fp32 logits"
    few = rows["kd 16<-24 x 512, 256 tokens, 4 of them answers, bf16: kd_loss, fp32 logits"]
    worst = rows["kd 16<-24 x 512, worst of all tokens"]
    each = [rows[ours.format(tokens)] for tokens in plans.KD_TOKENS["cpu"]]
    assert worst["times_products_fp32"] == max(row["times_products"] for row in each)
    assert worst["speedup_over_eager"] == min(row["speedup_over_eager"] for row in each)
    assert worst["time_us"] == each[-1]["time_us"] and few["time_us"] > 0
    assert "speedup_over_liger" not in worst, "no rival ran"


def test_prune_rows_at_toy_size(plans, sections, stub, monkeypatch):
    """The part "prune" as `DEVICE=cpu` runs it, and what fails it."""
    from slmperf.bench import prune_model

    plan = plans.prune_plan("cpu")
    part = sections.Part(stub, time.time() + 60, 0.01)
    for name, work in plan.items():
        assert not part.run(name, work), part.content["sections"][name]
    rows = {row["name"]: row for row in part.content["rows"]}
    assert all(name.startswith(row["section"]) for name, row in rows.items())
    whole = "prune 2x16, F 24, 4/2 heads of 4 to F 16, 2 heads, 256 tokens, {}"
    assert list(rows) == [
        whole.format(way)
        for mode in ("sequential", "one_pass")
        for way in (f"{mode}, two forwards", mode)
    ] + ["prune osscar 64x32 to 40"]
    row = rows[whole.format("one_pass")]
    forwards = rows[whole.format("one_pass, two forwards")]["time_us"] / 1e6
    assert row["times_forwards"] == row["seconds"] / forwards
    # Embeddings and head 2 * 96 * 16; q, o of two heads, k, v of one; three matrices; norms.
    layer = 2 * 16 * 8 + 2 * 16 * 4 + 3 * 16 * 16 + 2 * 16
    assert row["parameters"] == 2 * 96 * 16 + 2 * layer + 16
    monkeypatch.setattr(prune_model, "osscar", lambda gram, *given, **more: FarApart())
    assert part.run("osscar", plan["prune osscar 64x32 to 40"])
    assert "errors are" in part.content["sections"]["osscar"]["error"]


class FarApart:
    """Answers of a solver, each with another error."""

    count = 0

    def __init__(self):
        FarApart.count += 1
        self.kept, self.error = torch.arange(40), float(FarApart.count)


def test_ours_that_cannot_run_fail_their_section(plans, sections, stub, monkeypatch):
    from slmperf.bench.kd import measure

    name = "kd 16<-24 x 512, 32 tokens, bf16: {}"
    refused = {name.format("eager"): "OutOfMemoryError: too large"}
    monkeypatch.setattr(measure, "measure", lambda *given: measure.Measured([], refused))
    work = plans.kd_plan("cpu")["kd 16<-24 x 512"]
    part = sections.Part(stub, time.time() + 60, 0.01)
    refused[name.format("kd_loss, fp32 logits")] = "RuntimeError: kernel says no"
    assert part.run("kd", work)
    error = part.content["sections"]["kd"]["error"]
    assert error.endswith("kd_loss, fp32 logits: RuntimeError: kernel says no")
    assert "OutOfMemory" not in error


def test_a_figure_that_one_row_lacks_is_not_the_worst_of_all(plans):
    """Eager that did not fit at the most tokens leaves its target owed."""

    def row(mode, **more):
        return row_of(
            mode, role="ours", way=f"kd_loss, {mode} logits", above_gradients_gib=1.0, **more
        )

    rows = [
        row("bf16", times_products=1.1, speedup_over_eager=2.0),
        row("difference", times_products=1.3, speedup_over_eager=1.7),
        row("bf16", times_products=1.2, speedup_over_eager=2.5),
        row("difference", times_products=1.2),
    ]
    found = plans.worst_of(rows, "worst")
    assert found["times_products_bf16"] == 1.2 and found["times_products_difference"] == 1.3
    assert found["above_gradients_gib"] == 1.0 and "speedup_over_eager" not in found
    rows[-1]["speedup_over_eager"] = 1.6
    assert plans.worst_of(rows, "worst")["speedup_over_eager"] == 1.6


@pytest.mark.gpu
def test_timing_on_a_device():
    """Graph replay, the copy roof and peak memory on the device itself."""
    from slmperf.testing.timing import copy_roof_gbs, median_us, peak_mib

    x = torch.empty(2**26, device="cuda")
    times = median_us({"fill": [x.zero_], "twice": [lambda: (x.zero_(), x.zero_())]}, "cuda", 0.2)
    assert 1.5 < times["twice"] / times["fill"] < 2.5
    roof = copy_roof_gbs("cuda")
    assert 0.3 * roof < x.numel() * 4 / times["fill"] * 1e-3 < 3 * roof
    assert peak_mib(lambda: torch.empty(2**20, device="cuda"), "cuda") == pytest.approx(4, abs=1)
