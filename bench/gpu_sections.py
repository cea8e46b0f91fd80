"""What the parts of a GPU check run, section after section; started by gpu_check.py.

    python gpu_sections.py PART_FILE DEADLINE SECONDS [PLAN]

A section is a function that gives rows (and facts) for the part's file. Exit code 0 when no section
is left or the time is up; AGAIN where a section failed on a GPU: what it left of the device's state
is not trusted, the next one gets a new process.
"""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

from gpu_plans import BENCHES, Failed, roof_section  # noqa: E402
from gpu_report import AGAIN, TAIL, owed  # noqa: E402

from slmperf.bench import results  # noqa: E402


class Part:
    """A part's file while its sections run."""

    def __init__(self, path, deadline, seconds):
        self.path, self.deadline, self.seconds = path, deadline, seconds
        self.content = json.loads(path.read_text())
        self.device = self.content["device"]
        self.kept_roof = None

    def save(self):
        """Write all of it, in one step."""
        more = {key: self.content[key] for key in ("part", "commit", "device", "sections")}
        results.write_results(
            self.path, "gpu-check", self.content["rows"],
            machine=self.content["machine"], roof=self.content["roof"], **more,
        )  # fmt: skip

    def roof(self):
        """The machine's roof, measured once in a part."""
        if self.kept_roof is None:
            from slmperf.bench.roof import roof

            self.kept_roof = roof(self.device)
            self.content["roof"] = self.kept_roof.as_json()
        return self.kept_roof

    def run(self, name, work):
        """One section; whether it failed."""
        start = time.time()
        print(f"--- {name}", flush=True)
        self.content["rows"] = [row for row in self.content["rows"] if row["section"] != name]
        section = self.content["sections"][name] = {"status": "running", "began": start}
        self.save()
        facts = {}
        try:
            for row in work(self, facts) or ():
                self.content["rows"].append({**row, "section": name})
                self.save()
            section = {"status": "done"}
        except Failed as failure:
            section = {"status": "failed", "error": str(failure)[-TAIL:]}
        except Exception:
            section = {"status": "failed", "error": traceback.format_exc()[-TAIL:]}
        section |= {"seconds": round(time.time() - start, 1), **facts}
        self.content["sections"][name] = section
        self.save()
        if section["status"] == "failed":
            print(section["error"], flush=True)
        return section["status"] == "failed"


# --- part "tests" ---------------------------------------------------------------------------------


def command_output(*command):
    """What a program prints, None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def asked(code):
    """What a Python program prints as JSON, in a process that ends: a device may take one process
    at a time, and the tests have each its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}"], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise Failed(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def doctor(part, facts):
    """What the built package says of itself."""
    facts["doctor"] = asked("from slmperf.bench.doctor import facts\nprint(json.dumps(facts()))")


def gpu_tests():
    """Every test marked gpu, without its parameters: file::function.

    Files without such tests are not collected: they may import what a GPU image lacks.
    """
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text())
        found += [
            f"tests/{path.name}::{node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            and any("pytest.mark.gpu" in ast.unparse(one) for one in node.decorator_list)
        ]
    return found


def run_test(test, part, facts):
    """One test with all of its parameters in a process of its own; counts, and failures' text."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "--maxfail=30",
               "-p", "no:cacheprovider", "-m", "gpu", test]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        # A group of its own, so that what a test started ends with it; within this session, so that
        # whoever ends this process ends the test too.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            code = process.wait(max(1.0, part.deadline - time.time()))
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        text = log.read()
    counts = {}
    for outcome in re.findall(r" (PASSED|FAILED|SKIPPED|ERROR)\b +(?:\(.*\) +)?\[ *\d+%\]", text):
        counts[outcome.lower()] = counts.get(outcome.lower(), 0) + 1
    facts["tests"] = counts
    print(f"{test}: {counts}", flush=True)
    if code == 124:
        raise Failed(f"{text}\nnot finished within the part's time")
    if code not in (0, 5):  # 5: nothing to collect
        raise Failed(text)


def tests_plan(device):
    """Correctness first: a figure of a wrong kernel is worth nothing."""
    plan = {"doctor": doctor}
    for test in gpu_tests():
        plan[test] = lambda part, facts, test=test: run_test(test, part, facts)
    return plan


# --- the parts -----------------------------------------------------------------------------------


def plan_of(name, device):
    """Section name -> function of a part. What a target waits for is taken by part "owed" alone."""
    if name == "tests":
        return tests_plan(device)
    rows = [target["bench"]["row"] for target in owed((ROOT / "bench/targets.toml").read_text())
            if "bench" in target and device == "cuda"]  # fmt: skip

    def waited_for(section):
        return any(row.startswith(section) for row in rows)

    plan = {"roof": roof_section}
    if name == "owed":
        every = [(key, work) for make in BENCHES.values() for key, work in make(device).items()]
        return plan | {key: work for key, work in every if waited_for(key)}
    found = BENCHES[name](device)
    return plan | {key: work for key, work in found.items() if not waited_for(key)}


def machine_facts(part, device):
    """results.machine and what only a GPU's own tools know."""
    if part == "tests":  # this process leaves the device to them
        code = "from slmperf.bench.results import machine\nprint(json.dumps(machine(%r)))"
        facts = asked(code % device)
    else:
        facts = results.machine(device)
    if device == "cuda":
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
        facts["nvidia_smi"] = command_output("nvidia-smi", f"--query-gpu={query}", "--format=csv")
        nvcc = command_output("nvcc", "--version")
        facts["nvcc"] = nvcc.splitlines()[-1] if nvcc else None
    rivals = ("flashinfer", "flash_attn", "liger_kernel", "quack", "vllm", "sglang")
    facts["rivals"] = [name for name in rivals if importlib.util.find_spec(name)]
    return facts


def main(arguments):
    path, deadline, seconds, *plan_file = arguments
    part = Part(Path(path), float(deadline), float(seconds))
    name, device = part.content["part"], part.device
    part.content["machine"] = machine_facts(name, device)
    if plan_file:
        spec = importlib.util.spec_from_file_location("plan", plan_file[0])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        plan = module.plan(name, device)
    else:
        plan = plan_of(name, device)
    for key in plan:
        part.content["sections"].setdefault(key, {"status": "left"})
    part.save()
    for key, work in plan.items():
        if part.content["sections"][key]["status"] != "left":
            continue
        if time.time() > part.deadline:
            break
        if part.run(key, work) and torch.cuda.is_available() and torch.cuda.is_initialized():
            return AGAIN
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a device whose state is spoilt can hang in its libraries' own endings
