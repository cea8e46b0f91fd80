"""How many times as fast the CPU kernels are as plain torch, beside each other in one process.

    python bench/ratios.py            print the ratios, beside those in bench/ratios.toml
    python bench/ratios.py --write    take them down there for this machine's instruction set
    SLMPERF_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 python bench/ratios.py --write
                                      the same for AVX2, ours and plain torch's, where AVX-512 is

One thread, inputs that stay in the caches, fastest round against fastest round, in turns: of all
figures these depend least on the machine and its other work. tests/test_regressions.py fails where
one is lost by more than a quarter.
"""

import argparse
import contextlib
import datetime
import tomllib
from pathlib import Path

import torch

from slmperf import arch
from slmperf.models.files import write_atomically
from slmperf.ops import JSD, ForwardKL, ReverseKL
from slmperf.ops.routing import cpu_isa
from slmperf.testing.battery import with_gradients
from slmperf.testing.cases import FAMILIES
from slmperf.testing.timing import forward_backward, rounds_s, sampler

FILE = Path(__file__).with_suffix(".toml")
ALLOWED_LOSS = 0.25
HEADER = """\
# Written by bench/ratios.py: plain torch's time by the CPU kernel's, forward and backward, one
# thread, per instruction set of the kernels.
"""


def _divergence(kind, dtype):
    """Large enough that the kernel, not the call, is most of its time; small enough that the
    fastest rounds give no page back to the system and fault none in, as plain torch's large
    intermediates do in the others."""
    return FAMILIES["divergence"].make((32, 4001), dtype, kind, 1.0, "apart")


CASES = {
    f"{case.op} {case}": case
    for case in (
        _divergence(ForwardKL(), torch.float32),
        _divergence(ReverseKL(), torch.float32),
        _divergence(JSD(0.5), torch.float32),
        _divergence(ForwardKL(), torch.bfloat16),
    )
}


@contextlib.contextmanager
def one_thread():
    """torch on one thread, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratio(case, seconds=0.3):
    """The reference's time by that of impl="cpu"."""
    given = with_gradients(case, case.tensors())
    leaves = [given[name] for name in case.differentiable]
    with one_thread():
        ways = {"cpu": lambda tensors: case.run(tensors, "cpu"), "reference": case.reference}
        samplers = {
            name: sampler([forward_backward(run, given, leaves)], "cpu")
            for name, run in ways.items()
        }
        taken = rounds_s(samplers, seconds)
    return min(taken["reference"]) / min(taken["cpu"])


def recorded():
    """Instruction set -> {"date", "machine", "torch", "ratios": {name: ratio}}."""
    return tomllib.loads(FILE.read_text()) if FILE.exists() else {}


def lost(case, expected, tries=3):
    """The best ratio of a few tries, if even that lost more than ALLOWED_LOSS; else None."""
    best = 0.0
    for _ in range(tries):
        best = max(best, ratio(case))
        if best >= (1 - ALLOWED_LOSS) * expected:
            return None
    return best


def write(entries):
    """Every instruction set's entry, in one step."""
    lines = [HEADER]
    for isa, entry in sorted(entries.items()):
        facts = (f'{key} = "{entry[key]}"' for key in ("date", "machine", "torch"))
        ratios = (f'"{name}" = {value:.2f}' for name, value in entry["ratios"].items())
        lines += [f"[{isa}]", *facts, "", f"[{isa}.ratios]", *ratios, ""]
    write_atomically(FILE, "\n".join(lines).rstrip("\n") + "\n")


def main():
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    isa, entries = cpu_isa(), recorded()
    before = entries.get(isa, {}).get("ratios", {})
    found = {}
    for name, case in CASES.items():
        # The middle of three: a lucky one would ask too much of later runs.
        found[name] = sorted(ratio(case) for _ in range(3))[1]
        print(f"{name}: {found[name]:.2f}, recorded {before.get(name, '-')}", flush=True)
    if wanted.write:
        entries[isa] = {
            "date": f"{datetime.date.today()}",
            "machine": arch.cpu_name(),
            "torch": torch.__version__,
            "ratios": found,
        }
        write(entries)


if __name__ == "__main__":
    main()
