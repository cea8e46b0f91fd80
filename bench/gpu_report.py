"""What becomes of the parts of a GPU check: one file, a block in RESULTS.md, targets that are met.

Standard library only. `read_parts` finds part files, `finish` merges those of one machine and
commit, writes, and prints a short table.
"""

import datetime
import json
import os
import re
import sys
import tomllib
from pathlib import Path

SCHEMA = "slmperf.bench/1"  # that of slmperf/bench/results.py
TAIL = 4000  # characters of a failure's output that are kept: a file stays far below 16 MiB
AGAIN = 75  # exit code of a sections' process that wants to be started afresh

# Of a row, what the table shows: key, heading, factor, decimals.
COLUMNS = (
    ("time_us", "us", 1, 1),
    ("host_us", "host us", 1, 1),
    ("gbs", "GB/s", 1, 0),
    ("tflops", "TFLOP/s", 1, 1),
    ("roof_share", "% roof", 100, 0),
    ("speedup", "x baseline", 1, 2),
    ("times_products", "x products", 1, 3),
    ("speedup_over_eager", "x eager", 1, 2),
    ("speedup_over_liger", "x liger", 1, 2),
    ("speedup_over_liger_chunked", "x chunked", 1, 2),
    ("tokens_per_s", "tokens/s", 1, 0),
    ("overhead_pct", "overhead, %", 1, 2),
    ("peak_mib", "peak MiB", 1, 0),
    ("memory_of_eager", "% of eager's", 100, 0),
    ("gradient_error", "error, %", 100, 3),
    ("gradient_error_close", "close, %", 100, 3),
    ("layer_change_pct", "layer, %", 1, 1),
    ("attention_block_change_pct", "attention block, %", 1, 1),
)


def now():
    """The hour, as results carry it."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%MZ}"


def slug(name):
    """A machine's name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def plain(commit):
    """A commit as part of a file's name: letters, digits, points and dashes."""
    return re.sub(r"[^\w.-]", "-", commit.replace("+", "-changed"))


def write(path, content):
    """JSON, in one step: whoever is killed leaves the state before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def fault(part):
    """What a part file lacks, None where it is whole."""
    for key, kind in (("date", str), ("commit", str), ("device", str), ("machine", dict),
                      ("roof", dict | None), ("sections", dict), ("rows", list)):  # fmt: skip
        if not isinstance(part.get(key, ...), kind):
            return f"{key} is {part.get(key, 'missing')!r:.60}"
    for name, section in part["sections"].items():
        if not isinstance(section, dict) or not isinstance(section.get("status"), str):
            return f"section {name!r:.60} has no status"
        if section["status"] == "failed" and not isinstance(section.get("error"), str):
            return f"section {name!r:.60} failed without an error"
    for row in part["rows"]:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            return "a row has no name"
        if not isinstance(row.get("time_us"), int | float):
            return f"time_us of row {row['name']!r:.60} is no number"
    return None


def read_parts(folder):
    """Every part file below a folder, oldest first; of one that is not whole a line says so."""
    found = []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(content, dict) and content.get("kind") == "gpu-check" and "part" in content:
            if wrong := fault(content):
                print(f"error: {path}: {wrong}, left out", file=sys.stderr)
            else:
                found.append(content)
    return sorted(found, key=lambda part: part["date"])


def merge(parts):
    """One result of the parts of one machine and commit; of two rows of a name the later stays."""
    rows = {row["name"]: row for part in parts for row in part["rows"]}
    machine = {}
    for part in parts:
        machine |= part["machine"]
    roofs = [part["roof"] for part in parts if part["roof"]]
    return {
        "schema": SCHEMA,
        "kind": "gpu-check",
        "date": parts[0]["date"],
        "machine": machine,
        "roof": roofs[-1] if roofs else None,
        "commit": parts[0]["commit"],
        "device": parts[0]["device"],
        "parts": {
            part["part"]: {key: part[key] for key in ("date", "roof", "sections")} for part in parts
        },
        "rows": list(rows.values()),
    }


def sections_of(merged):
    """(part, name, section) of every section."""
    return [
        (part, name, section)
        for part, content in merged["parts"].items()
        for name, section in content["sections"].items()
    ]


def _versions(merged):
    machine = merged["machine"]
    names = {"torch": "torch", "triton": "triton", "python": "Python"}
    return ", ".join(f"{names[key]} {machine[key]}" for key in names if key in machine)


def _tests(merged):
    """Sums over all test sections."""
    counts = {}
    for _, _, section in sections_of(merged):
        for outcome, count in section.get("tests", {}).items():
            counts[outcome] = counts.get(outcome, 0) + count
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none"


def _number(value, factor, decimals):
    return "-" if value is None else f"{value * factor:.{decimals}f}"


def table(rows):
    """Markdown lines: of a layer the whole block and its saving, of everything else each row."""
    shown = [row for row in rows if row.get("part", "block") in ("block", "saving")]
    columns = [one for one in COLUMNS if any(row.get(one[0]) is not None for row in shown)]
    if not shown:
        return []
    lines = ["| what | " + " | ".join(heading for _, heading, _, _ in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for row in shown:
        cells = (_number(row.get(key), factor, places) for key, _, factor, places in columns)
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def block(merged):
    """Lines for RESULTS.md."""
    name = merged["machine"].get("device", "unknown")
    lines = [f"### {name}, commit {merged['commit']}, {merged['date'][:10]}", ""]
    lines.append(f"{_versions(merged)}; tests on the device: {_tests(merged)}.")
    left = [f"{part}: {key} ({one['status']})" for part, key, one in sections_of(merged)
            if one["status"] != "done"]  # fmt: skip
    if left:
        lines += ["", "Not done: " + "; ".join(left) + "."]
    rows = table(merged["rows"])
    return [*lines, "", *rows] if rows else lines


def put_block(markdown, machine, lines):
    """RESULTS.md with the machine's block replaced, or added at the end."""
    begin, end = f"<!-- gpu-check {machine}: begin -->", f"<!-- gpu-check {machine}: end -->"
    text = "\n".join([begin, *lines, end])
    if begin in markdown and end in markdown:
        before, rest = markdown.split(begin, 1)
        return before + text + rest.split(end, 1)[1]
    heading = "" if "<!-- gpu-check " in markdown else "## GPU checks\n\n"
    return f"{markdown.rstrip()}\n\n{heading}{text}\n"


def owed(targets):
    """Targets that wait for a GPU and say which row answers them."""
    return [
        target for target in tomllib.loads(targets)["target"]
        if target["machine"] == "gpu" and target["status"] == "owed"
    ]  # fmt: skip


def settle(targets, markdown, merged):
    """targets.toml and RESULTS.md with the owed rows that were taken, and a line for each target.

    A target's `bench` says where its figure comes from: {row, key, least or most}.
    """
    rows = {row["name"]: row for row in merged["rows"]}
    said = []
    for target in owed(targets):
        name, bench = target["name"], target.get("bench")
        row = rows.get(bench["row"]) if bench else None
        if row is None or row.get(bench["key"]) is None:
            said.append(f"owed: {name}")
            continue
        value = row[bench["key"]]
        met = value >= bench["least"] if "least" in bench else value <= bench["most"]
        status = "measured" if met else "missed"
        wanted = f"{'>=' if 'least' in bench else '<='} {bench.get('least', bench.get('most'))}"
        figure = f"{value:.3g} ({bench['key']}; {row['time_us']:.0f} us), wanted {wanted}"
        said.append(f"{status}: {name}: {figure}")
        blocks = re.split(r"^(?=\[\[target\]\])", targets, flags=re.MULTILINE)
        for place, text in enumerate(blocks):
            if f'row = "{target["row"]}"' in text.splitlines():
                blocks[place] = text.replace('status = "owed"', f'status = "{status}"', 1)
        targets = "".join(blocks)
        lines = markdown.splitlines(keepends=True)
        for place, line in enumerate(lines):
            cells = line.strip().strip("|").split("|")
            if cells[0].strip() == target["row"] and len(cells) == 5:
                machine = f"{merged['machine'].get('device')}; {_versions(merged)}"
                new = (figure, machine, merged["date"][:10])
                lines[place] = f"|{cells[0]}|{cells[1]}| {' | '.join(new)} |\n"
        markdown = "".join(lines)
    return targets, markdown, said


def finish(parts, out):
    """Merge, write, print; 1 where a section failed, else 0."""
    if not parts:
        return 1
    merged = merge(parts)
    machine = slug(merged["machine"].get("device", "unknown"))
    path = out / machine / f"{merged['date'][:10]}-{plain(merged['commit'])}.json"
    write(path, merged)
    print("\n".join(["", *block(merged), ""]))
    failed = 0
    for part, content in merged["parts"].items():
        sections = content["sections"].values()
        count = {status: sum(one["status"] == status for one in sections)
                 for status in ("done", "failed", "left")}  # fmt: skip
        seconds = sum(one.get("seconds", 0) for one in sections)
        print(f"{part}: " + ", ".join(f"{n} {name}" for name, n in count.items())
              + f", {seconds:.0f} s")  # fmt: skip
        failed += count["failed"]
    for part, name, section in sections_of(merged):
        if section["status"] == "failed":
            print(f"FAILED {part}: {name}: {section['error'].strip().splitlines()[-1]}")
    results, targets = out.parent / "RESULTS.md", out.parent / "targets.toml"
    if merged["device"] == "cuda" and results.exists() and targets.exists():
        wanted, markdown, said = settle(targets.read_text(), results.read_text(), merged)
        targets.write_text(wanted)
        print("\n".join(said))
        results.write_text(put_block(markdown, machine, block(merged)))
        print(f"wrote the block of {machine} in {results}")
    print(f"wrote {path}")
    return 1 if failed else 0
