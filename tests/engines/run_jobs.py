"""Runs in an engine's environment: starts the engine on one checkpoint after the other.

    python run_jobs.py sglang|vllm FOLDER

FOLDER/jobs.json is a list of jobs; FOLDER/<name>.json gets what came out of each and
FOLDER/<name>.log what the engine said. A job without the first failed: the last line is why.

A job is {"name", "model": folder, "prompts": token ids, "new_tokens", "top", "device", "dtype",
"options"}, options being arguments of the engine in the place of those below. Each has a process of
its own, for SGLang takes the whole tree of its processes down when something fails. Without a GPU
it is forked after everything is imported, SGLang's own processes too: that saves most of the time.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path


def on_sglang(job):
    """The outputs of sglang.Engine for each prompt."""
    import sglang

    cpu = {
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
    }
    options = {
        "model_path": job["model"],
        "device": job["device"],
        "dtype": job["dtype"],
        "context_length": 128,
        "max_total_tokens": 2048,
        "max_running_requests": 4,
        "mem_fraction_static": 0.3,
        "skip_server_warmup": True,
        "skip_tokenizer_init": True,
        "log_level": "info",
    }
    options |= (cpu if job["device"] == "cpu" else {}) | job["options"]
    if job["device"] == "cpu":  # cores of each rank, which else has a NUMA node
        ranks = options.get("tp_size", 1)
        cores = sorted(os.sched_getaffinity(0))
        of_ranks = (str(cores[rank % len(cores)]) for rank in range(ranks))
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(of_ranks)
    engine = sglang.Engine(**options)
    outputs = engine.generate(
        input_ids=job["prompts"],
        sampling_params={
            "temperature": 0,
            "max_new_tokens": job["new_tokens"],
            "ignore_eos": True,
        },
        return_logprob=True,
        top_logprobs_num=job["top"],
        logprob_start_len=0,
    )
    engine.shutdown()
    about = [output["meta_info"] for output in outputs]
    return [
        {
            "tokens": [token for _, token, _ in one["output_token_logprobs"]],
            "top": [[token, value] for value, token, _ in one["output_top_logprobs"][0]],
            "prompt_logprobs": [value for value, _, _ in one["input_token_logprobs"][1:]],
        }
        for one in about
    ]


def on_vllm(job):
    """The outputs of vllm.LLM for each prompt."""
    import vllm

    cpu = {"enforce_eager": True, "compilation_config": {"mode": 0, "custom_ops": ["none"]}}
    options = {
        "model": job["model"],
        "dtype": job["dtype"],
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_logprobs": job["top"],
        "num_gpu_blocks_override": 32,  # of the cache: else a gibibyte is cleared
        "skip_tokenizer_init": True,
    }
    options |= (cpu if job["device"] == "cpu" else {}) | job["options"]
    engine = vllm.LLM(**options)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        vllm.SamplingParams(
            temperature=0,
            max_tokens=job["new_tokens"],
            logprobs=job["top"],
            prompt_logprobs=1,
            ignore_eos=True,
            detokenize=False,
        ),
        use_tqdm=False,
    )
    found = []
    for prompt, output in zip(job["prompts"], outputs, strict=True):
        first = sorted(output.outputs[0].logprobs[0].items(), key=lambda item: item[1].rank)
        own = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        found.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "top": [[token, value.logprob] for token, value in first[: job["top"]]],
                "prompt_logprobs": [values[token].logprob for token, values in own],
            }
        )
    return found


def run(engine, job, folder):
    """In the job's own process."""
    log = os.open(folder / f"{job['name']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    found = {"sglang": on_sglang, "vllm": on_vllm}[engine](job)
    (folder / f"{job['name']}.json").write_text(json.dumps(found))


def main():
    engine, folder = sys.argv[1], Path(sys.argv[2])
    jobs = json.loads((folder / "jobs.json").read_text())
    forked = jobs[0]["device"] == "cpu"
    if forked:
        # What a job would import, imported once; and SGLang asks for "spawn".
        if engine == "sglang":
            import sglang.srt.entrypoints.engine
            import sglang.srt.managers.detokenizer_manager
            import sglang.srt.managers.scheduler  # noqa: F401
            from sglang.srt.models.registry import import_model_classes

            import_model_classes("sglang.srt.models")
        else:
            import vllm.v1.engine.llm_engine
            import vllm.v1.worker.cpu_worker  # noqa: F401
        multiprocessing.set_start_method("fork")
        multiprocessing.set_start_method = lambda method, force=False: None
    for job in jobs:
        begun = time.monotonic()
        context = multiprocessing.get_context("fork" if forked else "spawn")
        process = context.Process(target=run, args=(engine, job, folder))
        process.start()
        process.join()
        took_s = time.monotonic() - begun
        print(f"{job['name']}: exit code {process.exitcode}, {took_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
