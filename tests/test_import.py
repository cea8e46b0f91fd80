"""What importing costs, and what it must not pull in; which names are public."""

import json
import subprocess
import sys
import time
from importlib import import_module

import pytest

HEAVY = ["torch", "triton", "transformers", "flashinfer", "cupy"]
REPORT = "import json, sys; print(json.dumps([n for n in {heavy} if n in sys.modules]))"

# Architecture section 6: names that documents, tests and users rely on.
PUBLIC = {
    "ops": "divergence kd_loss StudentHead TeacherHead TeacherLogits TeacherTopK ForwardKL "
    "ReverseKL JSD SkewForwardKL SkewReverseKL TotalVariation attention paged_attention "
    "multi_item_attention HeadMap linear Fp8Weight Int8Weight Int4Weight rms_norm silu_mul "
    "rope_write",
    "models": "shrink load PrunedForCausalLM QuantizedLinear replace_linear",
    "calibrate": "calibrate",
    "evaluate": "auc perplexity parity",
    "plan": "LatencyModel plan",
    "prune": "osscar prune_model solve_budget GradualSchedule",
    "quant": "quantize_weight rtn gptq quantease smooth quantize_model Int4 Int8 Fp8",
    "distill": "DistillationConfig DistillationTrainer DistillationLoss OnPolicySampler "
    "TeacherCache",
    "engine": "Engine PrefixIndex",
    "serve": "create_app",
    "recipe": "Recipe run",
}
# Names beside that list, each with the reason why it is public.
ADDITIONS = {
    # The oracles, what kd_loss and rms_norm return, and the doctor's question; inputs rounded once
    # for several products, and experts' weights as one.
    "ops": "divergence_reference kd_loss_reference KDLoss RMSNorm implementations quantize_input "
    "QuantizedInput stack_experts",
    # Section 6 names nothing of the data floor: readers, tasks, the split, prompts, the tokenizer.
    "data": "Interactions read_interactions Prompt read_prompts world Task tasks_for Split split "
    "PromptBuilder TrainingSequence RankingPrompt train_tokenizer prompt_texts training_texts",
    # The other half of load.
    "models": "save",
    # What the report's rows are made of: floors, intervals, and their result types.
    "evaluate": "evaluate_tasks floors floor_runs auc_interval auc_within calibration_error delta "
    "difference log_loss parity_tasks task_scores Estimate Metrics Parity Run",
    # The bulk path of an evaluation, and the latency rows of the report.
    "engine": "score_prompts OpenPrefix Prefill Rank layer_split prefill_latency rank_latency",
    # Section 6 has the command audit; this is the function behind it, and its types.
    "bench": "AuditReport Formula audit",
    # The function that recipes call and its results; the loss in loops and trainers of others;
    # teachers and text behind a server.
    "distill": "train TrainResult PackedBatches student_head teacher_head answer_weights "
    "use_kd_loss TeacherCacheWriter hash_of_model hash_of_tokenizer CachedTeacher ServerTeacher "
    "CompletionServer write_teacher_text read_teacher_text PaddedGeneration ContinuousBatching "
    "ServerGenerator",
}


def fresh(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    command = [sys.executable, *arguments, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def fastest(code: str, limit_s: float, tries: int = 5) -> float:
    """Seconds of the fastest of a few runs, so that a busy machine does not decide."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        fresh(code)
        best = min(best, time.perf_counter() - start)
        if best < limit_s:
            break
    return best


@pytest.mark.parametrize(
    "code",
    [
        "import slmperf",
        "import sys; sys.argv = ['slmperf', '--help']\n"
        "from slmperf.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code",
    ],
    ids=["import slmperf", "slmperf --help"],
)
def test_light_imports(code):
    last_line = fresh(f"{code}\n{REPORT.format(heavy=HEAVY)}").stdout.splitlines()[-1]
    assert json.loads(last_line) == []
    assert fastest(code, limit_s=1.0) < 1.0


def test_ops_cost_little_over_torch():
    code = (
        "import time, torch; start = time.perf_counter(); import slmperf.ops; "
        f"print(time.perf_counter() - start); {REPORT.format(heavy=HEAVY[1:])}"
    )
    best = float("inf")
    for _ in range(3):  # the fastest: a busy machine does not decide
        seconds, loaded = fresh(code).stdout.splitlines()
        assert json.loads(loaded) == [], "importing slmperf.ops pulled these in"
        best = min(best, float(seconds))
        if best <= 0.5:
            return
    assert best <= 0.5


def test_data_needs_no_torch():
    pytest.importorskip("slmperf.data")
    assert json.loads(fresh(f"import slmperf.data; {REPORT.format(heavy=HEAVY)}").stdout) == []


def test_submodules_are_attributes():
    code = "import slmperf; print(slmperf.check.InputError.__name__, 'ops' in dir(slmperf))"
    assert fresh(code).stdout.split() == ["InputError", "True"]
    code = "import slmperf\ntry: slmperf.nothing\nexcept AttributeError as e: print(e)"
    assert "nothing" in fresh(code).stdout


def test_bare_triton_kernels_refuses(root):
    code = "try: import triton_kernels\nexcept ImportError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "slmperf.triton_kernels" in done.stdout


@pytest.mark.parametrize("package", sorted(PUBLIC | ADDITIONS))
def test_public_names(package, root):
    if not (root / "slmperf" / package / "__init__.py").exists():
        pytest.skip(f"slmperf.{package} is not part of this version")
    module = import_module(f"slmperf.{package}")
    allowed = f"{PUBLIC.get(package, '')} {ADDITIONS.get(package, '')}".split()
    names = list(module.__all__)
    assert set(names) <= set(allowed), "public names that no document lists"
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(module, name, None) is not None, f"slmperf.{package}.{name} is not there"
    named = ", ".join(names)
    assert all(getattr(module, name).__doc__ for name in names), f"no docstring among {named}"
