"""What every GPU kernel compiles to, held against bench/kernels.json, without a GPU.

    make kernels-check               every launch of every Triton kernel for sm_80 and sm_90, every
                                     file of csrc/cuda for sm_80 and sm_90a; exit code 1 and a line
                                     for each thing that is wrong
    make kernels-check UPDATE=1      the same, then writes bench/kernels.json and says what changed

Wrong is, for any kernel: more shared memory than a block may have; registers of a block beyond
65536; `tl.dot` without matrix instructions, on sm_90 without those of a warpgroup. And against the
recorded row: more spilled bytes (a kernel without a row may not spill), a matrix instruction that
is gone, a kernel without a row or a row without a kernel. The last group only notes where triton
(or nvcc) is of another version than the one recorded with: compilers differ.

A kernel that rightly does without, because its tiles are small or its products fp32, says so beside
its config table: `MATRIX_EXEMPT = {"_decode(*BLOCK_M=16*": "16 rows: a warpgroup takes 64"}`, a
pattern of launches and the reason. Launches are those of `family.compiled` in
slmperf/testing/cases.py, and of rounding_cases.py and attention_cases.py beside it. Shared memory
that CUDA C++ asks for at launch is not seen here.

Results are kept in build/kernels-check by a hash of the sources: a second run compiles nothing.
`make test` runs it with --sample, which compiles all only once a source has changed.

Over 400 lines: what is compiled, what is wrong and the record are one check.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "kernels.json"
CACHE = ROOT / "build" / "kernels-check"

# CUDA programming guide, table of technical specifications per compute capability: bytes of shared
# memory that one block may take, registers of a multiprocessor.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 65536
# A warpgroup's instructions are what reaches an H100's rate; HMMA and IMMA run at about half.
WANTED_MATRIX = {80: {"HMMA", "IMMA", "DMMA"}, 90: {"HGMMA", "QGMMA", "IGMMA"}}
NVCC_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "-cubin")
FIGURES = ("registers", "spilled_bytes", "spill_instructions", "shared_bytes", "threads", "matrix")


# One launch in so many is compiled where nothing has changed (--sample).
SAMPLE = 4


class CannotCheck(Exception):
    """Why nothing can be checked here; one line for the user."""


# --- what is compiled ---------------------------------------------------------------------------


def _digest(paths, *more):
    """A short hash of files and of words."""
    found = hashlib.sha256(json.dumps(more).encode())
    for path in sorted(paths):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _package(name):
    """Folder of a package that can be found without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _named(path):
    """A source file as kernels.json names it: below the repository, else by its name."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _as_recorded():
    """The recorded rows by label, where triton and the kernels' sources are those recorded; else
    none."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"triton": None}
    if record["triton"] != version("triton") or record["sources"] != source_hashes(record["rows"]):
        return {}
    return {label(row): row for row in record["rows"]}


def compile_rows(capability, launches_file, sample=False):
    """Rows of every Triton launch for one capability; triton must not be interpreting.

    sample  where no source has changed, only every SAMPLE-th launch is compiled, and whatever is
            not recorded; the others' rows are the recorded ones
    """
    from slmperf.testing.offline import compile_launch, launches

    if launches_file:
        spec = importlib.util.spec_from_file_location(launches_file.stem, launches_file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        wanted = module.launches(capability)
    else:
        from slmperf.testing import attention_cases, rounding_cases
        from slmperf.testing.cases import FAMILIES

        cases = [case for family in FAMILIES.values() for case in family.compiled]
        cases += rounding_cases.COMPILED + attention_cases.COMPILED
        wanted = [launch for case in cases for launch in launches(case, capability)]
    rows, patterns = [], {}
    known = _as_recorded() if sample else {}
    for number, launch in enumerate(sorted(set(wanted), key=str)):
        module = sys.modules[launch.kernel.fn.__module__]
        exempt = getattr(module, "MATRIX_EXEMPT", {})
        patterns |= exempt
        row = {"source": _named(module.__file__), "kernel": launch.kernel.__name__}
        row |= {"sm": f"sm_{capability}", "launch": str(launch)}
        for pattern, reason in exempt.items():
            if fnmatchcase(row["launch"], pattern):
                row["exempt"] = reason
        if number % SAMPLE and label(row) in known:
            rows.append(known[label(row)])
            continue
        try:
            usage = compile_launch(launch, capability)
        except Exception as error:  # triton raises whatever its passes and ptxas raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            rows.append(row | {"error": lines[0]})
            continue
        rows.append(row | {name: getattr(usage.code, name) for name in FIGURES})
        rows[-1]["dot"] = usage.dot
    unused = [p for p in patterns if not any(fnmatchcase(row["launch"], p) for row in rows)]
    return {"rows": rows, "unused": sorted(unused)}


def _triton_job(capability, launches_file, cache, sample):
    """(file of the kept result, process that writes it or None) for one capability."""
    slmperf, kernels = _package("slmperf"), _package("slmperf.triton_kernels")
    sources = [*(slmperf / "ops").rglob("*.py"), *kernels.glob("*.py"), Path(__file__)]
    names = ("case", "cases", "kd_cases", "kd_family", "battery", "offline", "rounding_cases",
             "attention_cases", "linear_cases", "glue_cases", "rope_cases")  # fmt: skip
    sources += [*(slmperf / "ops").rglob("*.toml")]  # linear's tiles
    sources += [slmperf / "testing" / f"{name}.py" for name in names]
    sources += [launches_file] if launches_file else []
    key = _digest(sources, version("triton"), version("torch"), capability)
    whole = cache / f"triton-{capability}-{key}.json"
    kept = whole.with_suffix(".sample.json") if sample and not whole.exists() else whole
    if kept.exists():
        return kept, None
    # triton's own cache compiles again only what changed.
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, "--compile", str(capability), "--keep", str(kept)]
    command += ["--launches", str(launches_file)] if launches_file else []
    command += ["--sample"] if sample else []
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    return kept, process


def triton_rows(launches_file, cache, sample=False):
    """Rows of every Triton launch for both capabilities, and patterns that exempt nothing.

    sample  see compile_rows
    """
    try:
        version("triton")
    except PackageNotFoundError:
        raise CannotCheck("triton is not installed: no kernel can be compiled") from None
    jobs = [_triton_job(capability, launches_file, cache, sample) for capability in SHARED_LIMIT]
    failed = ""
    for _, process in jobs:
        errors = process.communicate()[1] if process else ""
        failed = errors if process and process.returncode else failed
    if failed:
        raise CannotCheck(f"the kernels could not be launched:\n{failed[-3000:]}")
    found = [json.loads(kept.read_text()) for kept, _ in jobs]
    rows = [row for part in found for row in part["rows"]]
    return rows, sorted({pattern for part in found for pattern in part["unused"]})


def find_nvcc():
    """(nvcc, its release), or (None, why it is not there)."""
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH")
             if os.environ.get(name)]  # fmt: skip
    path = os.pathsep.join([os.environ.get("PATH", ""), *homes])
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"), path=path)
    if nvcc is None:
        return None, "nvcc is neither on PATH nor in CUDA_HOME"
    if shutil.which("c++filt") is None:
        return None, "no c++filt to spell C++ names"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return nvcc, re.search(r"release ([\d.]+)", said)[1]


def _compile_cuda(nvcc, source, sm):
    """Rows of the kernels of one file of CUDA C++ on one architecture."""
    from slmperf.testing.offline import read_cubin

    row = {"source": _named(source), "kernel": source.name, "sm": sm, "launch": source.name}
    torch = _package("torch") / "include"
    include = [ROOT / "csrc", source.parent, torch, torch / "torch" / "csrc" / "api" / "include"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        command = [nvcc, *NVCC_FLAGS, f"-arch={sm}", *(f"-I{path}" for path in include)]
        command += [str(source), "-o", cubin.name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            return [row | {"error": (lines or ["nvcc fails"])[0]}]
        codes = read_cubin(Path(cubin.name))
    rows = []
    for code in codes:
        said = subprocess.run(["c++filt", code.function], capture_output=True, text=True)
        name = said.stdout.strip()
        row |= {"kernel": name.split("(")[0], "launch": name}
        rows.append(row | {name: getattr(code, name) for name in FIGURES} | {"dot": False})
    return rows


def cuda_rows(nvcc, release, folder, cache):
    """Rows of every kernel in folder/*.cu, for sm_80 and sm_90a."""
    headers = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")]
    headers += [_package("slmperf") / "testing" / "offline.py", Path(__file__)]
    rows = []
    for source in sorted(folder.glob("*.cu")):
        for sm in ("sm_80", "sm_90a"):
            key = _digest([source, *headers], release, version("torch"), sm)
            kept = cache / f"{source.stem}-{sm}-{key}.json"
            if not kept.exists():
                _write(kept, json.dumps(_compile_cuda(nvcc, source, sm)))
            rows += json.loads(kept.read_text())
    return rows


def _write(path, text):
    """Write in one step: another run reads all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


# --- what is wrong with it ----------------------------------------------------------------------


def capability_of(row):
    """80 or 90."""
    return int(re.search(r"\d+", row["sm"])[0])


def own_faults(row):
    """What is wrong with a row, whatever was recorded."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    capability, found = capability_of(row), []
    if row["shared_bytes"] > SHARED_LIMIT[capability]:
        limit = SHARED_LIMIT[capability]
        found.append(f"takes {row['shared_bytes']} bytes of shared memory, a block has {limit}")
    if row["registers"] * row["threads"] > REGISTERS:
        needs = f"{row['registers']} registers x {row['threads']} threads"
        found.append(f"takes {needs}, a multiprocessor has {REGISTERS}")
    if row["dot"] and "exempt" not in row and not WANTED_MATRIX[capability] & set(row["matrix"]):
        wanted, has = ", ".join(sorted(WANTED_MATRIX[capability])), _matrix(row)
        found.append(f"has tl.dot but none of {wanted} (found {has})")
    return found


def losses(row, recorded):
    """What is worse in a row than in the recorded one (None: not recorded)."""
    if "error" in row:
        return []
    if recorded is None:
        spills = f", and spills {row['spilled_bytes']} bytes" if row["spilled_bytes"] else ""
        return [f"is not in kernels.json{spills}"]
    found = []
    if row["spilled_bytes"] > recorded["spilled_bytes"]:
        more = f"{row['spill_instructions']} loads and stores"
        found.append(
            f"spills {row['spilled_bytes']} bytes ({more}), recorded {recorded['spilled_bytes']}"
        )
    if gone := sorted(set(recorded["matrix"]) - set(row["matrix"])):
        found.append(f"lost {', '.join(gone)} (recorded {_matrix(recorded)}, now {_matrix(row)})")
    return found


def _matrix(row):
    return ", ".join(f"{count} {name}" for name, count in row["matrix"].items()) or "none"


def differences(row, recorded):
    """Figures that are not as recorded, in words."""
    names = [name for name in FIGURES if recorded.get(name) != row.get(name)]
    return [f"{name} {recorded.get(name)} -> {row.get(name)}" for name in names]


def label(row):
    """How a line names a row."""
    return f"{row['sm']} {row['launch']}"


def compare(rows, record, same_compiler):
    """(what fails, what is only noted): lines. `same_compiler(row)`: whether figures compare."""
    known = {label(row): row for row in record["rows"]}
    failed, noted = [], []
    for row in rows:
        old = known.pop(label(row), None)
        failed += [f"{label(row)} {fault}" for fault in own_faults(row)]
        worse = [f"{label(row)} {loss}" for loss in losses(row, old)]
        (failed if same_compiler(row) else noted).extend(worse)
        if old and not worse and (changed := differences(row, old)) and "error" not in row:
            noted.append(f"{label(row)} changed: {', '.join(changed)}")
    for row in known.values():
        gone = f"{label(row)} is in kernels.json but there is no such kernel"
        (failed if same_compiler(row) else noted).append(gone)
    return failed, noted


# --- the command --------------------------------------------------------------------------------


def is_cuda(row):
    """Whether a row is of CUDA C++."""
    return row["source"].endswith(".cu")


def source_hashes(rows):
    """First half of the SHA-256 of each kernel's source, and of what Triton kernels share."""
    shared = {_named(path) for path in (ROOT / "triton_kernels").glob("*.py")}
    names = sorted({row["source"] for row in rows} | shared)
    found = {name: ROOT / name for name in names if (ROOT / name).exists()}
    return {name: hashlib.sha256(at.read_bytes()).hexdigest()[:32] for name, at in found.items()}


def render(rows, versions):
    """kernels.json: a line per row, in an order that does not depend on the run."""
    ordered = sorted(rows, key=lambda row: (row["source"], row["kernel"], label(row)))
    head = json.dumps({**versions, "sources": source_hashes(rows)}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in ordered)
    return f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n'


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="write the record, say what changed")
    parser.add_argument("--record", type=Path, default=RECORD, help="instead of bench/kernels.json")
    launches = "file whose launches(capability) stand in for the ops' own"
    parser.add_argument("--launches", type=Path, help=launches)
    parser.add_argument("--cuda", type=Path, default=ROOT / "csrc" / "cuda", help="folder of *.cu")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where results are kept")
    text = "compile a part of them where no source has changed since the record"
    parser.add_argument("--sample", action="store_true", help=text)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)  # a child: one capability
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.compile:
        rows = compile_rows(given.compile, given.launches, given.sample)
        _write(given.keep, json.dumps(rows))
        return 0
    try:
        return check(given)
    except CannotCheck as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2


def check(given):
    """Compile, compare, print; the exit code."""
    record = {"triton": None, "nvcc": None, "sources": {}, "rows": []}
    if given.record.exists():
        record = json.loads(given.record.read_text())
    rows, unused = triton_rows(given.launches, given.cache, given.sample and not given.update)
    nvcc, release = find_nvcc()
    kept = []
    if nvcc:
        rows += cuda_rows(nvcc, release, given.cuda, given.cache)
    else:
        kept = [row for row in record["rows"] if is_cuda(row)]
        print(f"csrc/cuda is not compiled: {release}; its {len(kept)} recorded rows stay")
        release = record["nvcc"]
    now = {"triton": version("triton"), "nvcc": release}
    for name, found in now.items():
        if record[name] not in (None, found):
            print(f"recorded with {name} {record[name]}, here is {found}: figures are only noted")

    def same_compiler(row):
        return record[name := "nvcc" if is_cuda(row) else "triton"] in (None, now[name])

    failed, noted = compare([*rows, *kept], record, same_compiler)
    hashes = source_hashes([*rows, *kept])
    noted += [f"{name} changed since kernels.json was written" for name in record["sources"]
              if record["sources"][name] != hashes.get(name)]  # fmt: skip
    failed += [f"MATRIX_EXEMPT {pattern!r} exempts no launch" for pattern in unused]
    if given.update:
        pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        if now["triton"] != pinned[1]:
            raise CannotCheck(
                f"triton is {now['triton']}, kernels.json is recorded with {pinned[1]}"
            )
        for line in [*failed, *noted]:
            print(f"changed: {line}")
        known = {label(row): row for row in record["rows"]}
        compiled = [row for row in rows if "error" not in row]
        failed = [f"{label(row)} {fault}" for row in rows for fault in own_faults(row)]
        _write(given.record, render([*compiled, *kept], now))
        print(f"wrote {given.record}: {len(compiled) + len(kept)} rows, {len(known)} before")
    else:
        for line in noted:
            print(f"note: {line}")
    for line in failed:
        print(f"FAIL: {line}")
    if failed and not given.update:
        print("make kernels-check UPDATE=1 records the kernels as they are now")
    spilling = sum(1 for row in rows if row.get("spilled_bytes"))
    with_matrix = sum(1 for row in rows if row.get("matrix"))
    print(
        f"{len(rows)} kernels compiled: {with_matrix} with matrix instructions, "
        f"{spilling} spill, {len(failed)} faults"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
