"""The check that a GPU at hand runs unattended: `make gpu-check`. No network, no .venv.

    1 tests    what machine, build and versions this is; pytest -m gpu, each test in a process
    2 owed     the machine's roof, and the rows that targets of bench/targets.toml wait for
    3.. ops, kd, train, linear, layer, engine, gram, prune, quantize, quantize-model: the benches,
        the one first whose sources changed last; served: real engines, where `make test-engines
        ENGINE_DEVICE=cuda` has built their environments; sanitize: CUDA C++ kernels under
        compute-sanitizer

Tests come before the rows owed: a row of a kernel that is wrong would settle a target falsely.

A part (`--part`, by number or name; all of them if not given) writes one file,
OUT/parts/<machine>.<commit>.<part>.json, after every section of it. So whatever ends it early, its
time (`--budget-s`) or a kill, costs the section under way; started again, it takes up what is left.
Sections run in a process of their own, so that a kernel that takes the device down costs one
section. Every call ends by merging the commit's parts into OUT/<machine>/<date>-<commit>.json and,
of a GPU, into RESULTS.md and targets.toml beside OUT if these are there: `--merge DIR` does only
that, with files that came back from elsewhere.

`--build` builds the package into build/gpu-site first and uses it; without it the slmperf that
Python finds is measured. Wheels in .whl are unpacked into build/whl-site: rivals, which are timed
where they can be imported. `--data DIR` (or ../shared/data) is where tests find real interactions,
through the environment variable SLMPERF_DATA. Exit code: 1 if a section failed, else 0.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITES = (ROOT / "build" / "gpu-site", ROOT / "build" / "whl-site")
sys.path.append(str(ROOT / "bench"))  # where nothing shadows: Python may run in safe-path mode

import gpu_report  # noqa: E402

# What a bench measures: the newest change below decides which comes first.
BENCHES = {
    "ops": ("slmperf/ops", "triton_kernels", "csrc", "slmperf/bench/ops.py"),
    "kd": ("slmperf/ops/kd_loss", "triton_kernels/kd_loss.py", "slmperf/bench/kd"),
    "train": ("slmperf/ops/kd_loss", "slmperf/distill", "slmperf/bench/train"),
    "linear": ("slmperf/ops/linear", "triton_kernels/linear_int4.py",
               "triton_kernels/linear_codes.py", "triton_kernels/linear_tiles.py", "csrc/cuda",
               "slmperf/bench/linear"),
    "layer": ("slmperf/bench/layer", "slmperf/ops/linear", "slmperf/ops/rms_norm.py",
              "slmperf/ops/silu_mul.py"),
    "engine": ("slmperf/engine",),
    "gram": ("slmperf/ops/gram.py", "slmperf/calibrate", "slmperf/bench/gram"),
    "prune": ("slmperf/prune", "slmperf/ops/eliminate.py", "slmperf/bench/prune_model.py"),
    "quantize": ("slmperf/quant/layer", "slmperf/ops/round_columns.py",
                 "triton_kernels/round_columns.py", "slmperf/bench/quantize/layer.py"),
    "quantize-model": ("slmperf/quant", "slmperf/bench/quantize/model.py"),
    "served": ("slmperf/serve", "slmperf/models/engines"),
    "sanitize": ("csrc/cuda",),
}  # fmt: skip
END_S = 10  # a killed process that is still there then hangs in a driver, and is left behind
GRACE_S = 20  # beyond the budget: for a section that keeps its own time to write down what it has


def last_changed(paths):
    """Seconds since 1970 of the newest change: by git, or by the files where there is none."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct", "--", *paths]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.strip():
            return int(said.stdout)
    files = [file for path in map(ROOT.joinpath, paths)
             for file in (path.rglob("*.*") if path.is_dir() else [path])]  # fmt: skip
    return max((int(file.stat().st_mtime) for file in files if file.is_file()), default=0)


def parts_in_order():
    """Names of the parts; their numbers are their places, from 1."""
    return ["tests", "owed", *sorted(BENCHES, key=lambda name: -last_changed(BENCHES[name]))]


def chosen_parts(text):
    """ "all", or numbers and names joined by commas -> names."""
    order = parts_in_order()
    if text in ("", "all"):
        return order
    known = {str(place): name for place, name in enumerate(order, 1)} | {
        name: name for name in order
    }
    wanted = [one.strip() for one in text.split(",")]
    if strange := [one for one in wanted if one not in known]:
        numbered = ", ".join(f"{place} {name}" for place, name in enumerate(order, 1))
        raise SystemExit(f"error: part is {strange[0]!r}, expected all or some of {numbered}")
    return [known[one] for one in wanted]


def commit_of_tree():
    """What is measured: a stated commit, git's (+ if files differ), or a hash of the sources."""
    if (ROOT / "REVISION").is_file():
        return (ROOT / "REVISION").read_text().strip()
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode == 0:
            return said.stdout.strip()
    found = hashlib.sha256()
    for folder in ("slmperf", "triton_kernels", "csrc", "bench", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return f"tree-{found.hexdigest()[:8]}"


def cuda_name():
    """Name of the GPU, empty where torch sees none.

    Asked in a process that ends: a device may take one process at a time.
    """
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(f"error: torch does not import: {said.stderr.strip()[-300:]}")
    return said.stdout.strip()


def cpu_name():
    """Name of the processor; slmperf itself may not be built yet."""
    spec = importlib.util.spec_from_file_location("arch", ROOT / "slmperf" / "arch.py")
    arch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arch)
    return arch.cpu_name()


# --- a part ---------------------------------------------------------------------------------------


def begin(path, part, commit, device, name):
    """The part's file: what an earlier run of the same commit has done, or a new one."""
    content = {
        "schema": gpu_report.SCHEMA, "kind": "gpu-check", "date": gpu_report.now(),
        "machine": {"device": name}, "roof": None, "part": part, "commit": commit,
        "device": device, "sections": {}, "rows": [],
    }  # fmt: skip
    if path.exists():
        found = json.loads(path.read_text())
        if found.get("commit") == commit and found.get("device") == device:
            content = found
    done = {name: one for name, one in content["sections"].items() if one["status"] == "done"}
    content["sections"] = done
    gpu_report.write(path, content)
    return content


def note(path, name, **section):
    """Set a section of the part's file."""
    content = json.loads(path.read_text())
    content["sections"][name] = section
    gpu_report.write(path, content)


def kill_session(leader):
    """Kill what is left of the session that this process began, in whatever group it is.

    Neither compilers behind a pip nor what a test started may run on beside the next measurement.
    """
    for _ in range(END_S * 100):  # again: what was starting a process may have gone on doing so
        members = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
                # "pid (name) state parent group session ...", and a name may hold anything.
                fields = path.read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    members.append(int(path.parent.name))
        if not members:
            return
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.01)


def run_session(command, environment, seconds, **streams):
    """A command in a session of its own: its exit code, None where it took longer than that many
    seconds. However it ends, nothing that it started stays behind.
    """
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, start_new_session=True, **streams
    )
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_session(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)


def logged(path, name, command, environment, deadline):
    """Run a command as a section; whether it succeeded. Its last lines stay if it did not."""
    start = time.time()
    print(f"--- {name}: {' '.join(map(str, command))}", flush=True)
    with tempfile.TemporaryFile("w+") as log:
        code = run_session(
            command, environment, deadline - start, stdout=log, stderr=subprocess.STDOUT
        )
        log.seek(0)
        text = log.read()
    seconds = round(time.time() - start, 1)
    if code == 0:
        note(path, name, status="done", seconds=seconds)
    else:
        how = "not finished within the part's time" if code is None else f"exit code {code}"
        error = f"{text[-gpu_report.TAIL :]}\n{how}"
        note(path, name, status="failed", seconds=seconds, error=error)
        print(error, flush=True)
    return code == 0


def prepare(path, given, environment, deadline):
    """Unpack rivals and build the package, each as a section; whether there is something to run."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade",
           "--no-compile"]  # fmt: skip
    sites = SITES if given.build else SITES[1:]
    wheels = sorted((ROOT / ".whl").glob("*.whl"))
    if wheels:
        logged(path, "rivals", [*pip, "--target", SITES[1], *wheels], environment, deadline)
    if given.build:
        # A second way, so that a fault in CUDA C++ does not cost every other figure.
        for name, cuda in (("build", "auto"), ("build without CUDA C++", "0")):
            command = [*pip, "--no-build-isolation", "--target", SITES[0], "."]
            with_cuda = environment | {"SLMPERF_CUDA": cuda}
            if logged(path, name, command, with_cuda, deadline):
                break
        else:
            return False
    paths = [*map(str, sites), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return True


def run_part(path, given, environment, deadline):
    """One part, within its budget: processes that run section after section, until none is left."""
    own = Path(__file__).with_name("gpu_sections.py")
    command = [sys.executable, str(own), str(path), str(deadline), str(given.seconds)]
    command += [str(given.plan)] if given.plan else []
    while time.time() < deadline:
        print(f"--- {path.name}", flush=True)
        code = run_session(command, environment, deadline + GRACE_S - time.time())
        sections = json.loads(path.read_text())["sections"]
        under_way = [name for name, one in sections.items() if one["status"] == "running"]
        for name in under_way:
            began = sections[name]["began"]
            seconds = round(time.time() - began, 1)
            if code is None and seconds < given.budget_s / 2:
                note(path, name, status="left")
            else:
                how = "took longer than the part" if code is None else f"ended with code {code}"
                note(path, name, status="failed", seconds=seconds, error=f"its process {how}")
        if code is None or code == 0:
            return
        if not under_way and code != gpu_report.AGAIN:
            error = f"the process of the sections ended with code {code} before any of them"
            note(path, "sections", status="failed", error=error)
            return


# --- the command ----------------------------------------------------------------------------------


def arguments_of(text):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--part", default="all", help="numbers or names, joined by commas")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for each part")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each row")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--data", type=Path, help="folder of real interactions")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--build", action="store_true", help="build the package first")
    parser.add_argument("--merge", type=Path, help="only merge the part files of this folder")
    parser.add_argument("--plan", type=Path, help="file with another plan(part, device)")
    return parser.parse_args(text)


def stop(number, frame):
    """Asked to end: the way of an exception, so that no process stays behind."""
    raise SystemExit(128 + number)


def main(arguments=None):
    given = arguments_of(arguments)
    signal.signal(signal.SIGTERM, stop)
    if given.merge:
        parts = gpu_report.read_parts(given.merge)
        if not parts:
            print(f"error: no part files below {given.merge}", file=sys.stderr)
            return 2
        runs = {}
        for part in parts:
            runs.setdefault((part["machine"].get("device"), part["commit"]), []).append(part)
        return max(gpu_report.finish(one, given.out) for one in runs.values())
    if given.data and not given.data.is_dir():
        print(f"error: --data {given.data} is no folder", file=sys.stderr)
        return 2
    gpu = "" if given.device == "cpu" else cuda_name()
    if given.device == "cuda" and not gpu:
        print("error: device is cuda, but torch sees no CUDA device here", file=sys.stderr)
        return 2
    device, name = ("cuda", gpu) if gpu else ("cpu", cpu_name())
    parts, commit = chosen_parts(given.part), given.commit or commit_of_tree()
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if given.data:
        environment["SLMPERF_DATA"] = str(given.data.resolve())
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        print("device cpu: a GPU's rows stay owed")
    print(f"{name}, commit {commit}; parts {', '.join(parts)}, {given.budget_s:.0f} s each")
    folder = given.out / "parts"
    stem = f"{gpu_report.slug(name)}.{gpu_report.plain(commit)}"
    for place, part in enumerate(parts):
        path, deadline = folder / f"{stem}.{part}.json", time.time() + given.budget_s
        begin(path, part, commit, device, name)
        if place == 0 and not prepare(path, given, environment, deadline):
            break
        run_part(path, given, environment, deadline)
    found = [one for one in gpu_report.read_parts(folder)
             if one["commit"] == commit and one["device"] == device]  # fmt: skip
    return gpu_report.finish(found, given.out)


if __name__ == "__main__":
    sys.exit(main())
