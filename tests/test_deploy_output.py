"""`slmperf deploy`: command lines, the script with stand-ins for its programs, manifests."""

import math
import os
import re
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from deployments import (
    DECILM,
    FP8,
    H100,
    PER_LAYER,
    deployment,
    folder,
    options_of,
    quantised,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from slmperf.check import InputError
from slmperf.serve.deploy.checkpoint import read_checkpoint
from slmperf.serve.deploy.kubernetes import check_name, kubernetes_name, manifests
from slmperf.serve.deploy.lines import Deployment, router_line, script, serve_line
from slmperf.serve.deploy.sizing import Wanted, size

# ---- command lines


def test_options_follow_checkpoint_and_sizes(tmp_path):
    made = deployment(tmp_path / "a", FP8, tp=2)
    line = options_of(serve_line(made, "/m", "127.0.0.1", 30000, 3))
    assert line["--tp-size"] == ["2"] and line["--dp-size"] == ["3"]
    assert line["--context-length"] == ["16392"] and line["--mem-fraction-static"] == ["0.88"]
    assert not line.keys() & {"--dtype", "--kv-cache-dtype", "--trust-remote-code"}
    mixed = quantised("fp8", kv_cache=True) | {"dtype": "float32"}
    made = deployment(tmp_path / "b", mixed | {"max_position_embeddings": 16384}, engine="vllm")
    line = options_of(serve_line(made, "/m", "127.0.0.1", 8000))
    assert line["--dtype"] == ["bfloat16"] and line["--kv-cache-dtype"] == ["fp8_e4m3"]
    assert line["--max-model-len"] == ["16384"]  # as many as the model has
    line = options_of(serve_line(deployment(tmp_path / "c", DECILM, engine="vllm"), "/m", "h", 1))
    assert line["--trust-remote-code"] == []


def test_the_router_keeps_members_apart_and_together(tmp_path):
    """A hot prompt shares more with its prefix than the threshold, a long instruction less; and it
    leaves a worker when waiting there takes longer than the prefix elsewhere.
    """
    made = deployment(tmp_path, FP8, items=16, item_tokens=256, replicas=2)
    line = options_of(router_line(made, "h", 1, ["--worker-urls", "u"]))
    assert line["--policy"] == ["cache_aware"]
    (threshold,) = line["--cache-threshold"]
    assert 0.6 < float(threshold) < (16384 - 256) / 16384
    (gap,) = line["--balance-abs-threshold"]
    sized = made.sized
    assert int(gap) * sized.hot / 16 == pytest.approx(sized.cold - sized.hot, rel=0.02)
    (letters,) = line["--max-tree-size"]
    assert int(letters) > 4 * sized.cached_tokens


def stand_ins(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """An environment whose programs write their arguments to <program>-<pid>, then do something."""
    place = folder / "bin"
    place.mkdir()
    for program, then in programs.items():
        told = f'printf \'%s\\n\' "$0 ${{CUDA_VISIBLE_DEVICES:-}}" "$@" > {folder}/{program}-$$'
        (place / program).write_text(f"#!/bin/sh\n{told}\n{then}\n")
        (place / program).chmod(0o755)
    return {"PATH": f"{place}:{os.environ['PATH']}"}


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_the_script_starts_all_and_leaves_nothing(tmp_path, engine, replicas):
    """With stand-ins for the programs: what they are told, and that the servers end with all."""
    made = deployment(tmp_path / "a model's", FP8, engine=engine, replicas=replicas)
    server = "exec sleep 60" if replicas > 1 else "true"
    environment = stand_ins(tmp_path, {engine: server, "python3": "sleep 0.3"})
    path = tmp_path / "serve.sh"
    path.write_text(script(made))
    subprocess.run(["sh", path], env=environment, timeout=20, check=False)
    servers = sorted(tmp_path.glob(f"{engine}-*"))
    assert len(servers) == (replicas if engine == "vllm" else 1)
    ports, gpus = set(), set()
    for one in servers:
        head, *words = one.read_text().splitlines()
        assert str(made.checkpoint.folder.resolve()) in words
        line = options_of(words)
        assert line["--host"] == ["127.0.0.1"]
        ports |= set(line["--port"])
        gpus |= set(head.split()[1:])
        with pytest.raises(ProcessLookupError):  # ended with the script
            os.kill(int(one.name.rpartition("-")[2]), 0)
    assert len(ports) == len(servers)
    assert gpus == ({"0", "1", "2"} if engine == "vllm" and replicas > 1 else set())
    routers = list(tmp_path.glob("python3-*"))
    assert len(routers) == (replicas > 1)
    for one in routers:
        line = options_of(one.read_text().splitlines()[1:])
        assert {url.rpartition(":")[2] for url in line["--worker-urls"]} == ports
        assert ("--dp-aware" in line) == (engine == "sglang")
        assert line["--host"] == line["--prometheus-host"] == ["127.0.0.1"]


def test_the_script_ends_when_it_is_told_to(tmp_path):
    made = deployment(tmp_path / "model", FP8, replicas=2)
    environment = stand_ins(tmp_path, {"sglang": "exec sleep 60", "python3": "exec sleep 60"})
    path = tmp_path / "serve.sh"
    path.write_text(script(made))
    with subprocess.Popen(["sh", path], env=environment) as process:
        limit = time.monotonic() + 10
        while len(list(tmp_path.glob("*-[0-9]*"))) < 2 and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.5)  # until the shell waits
        process.terminate()
        assert process.wait(10) == 1
    started = list(tmp_path.glob("*-[0-9]*"))
    assert len(started) == 2
    for one in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(one.name.rpartition("-")[2]), 0)


# ---- manifests

# Of the Kubernetes API reference (apps/v1, v1, policy/v1, rbac.authorization.k8s.io/v1) the fields
# that the manifests have: name -> type, or the fields of an object; [x]: a list of x.
PROBE = {
    "httpGet": {"path": str, "port": str},
    "timeoutSeconds": int,
    "periodSeconds": int,
    "failureThreshold": int,
}
METADATA = {"name": str, "labels": dict}
SELECTOR = {"matchLabels": dict}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "ports": [{"name": str, "containerPort": int}],
    "resources": {"requests": dict, "limits": dict},
    "startupProbe": PROBE,
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
POD = {
    "automountServiceAccountToken": bool,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
            "emptyDir": {"medium": str, "sizeLimit": str},
        }
    ],
}
ROLLING = {"type": str, "rollingUpdate": {"maxSurge": int, "maxUnavailable": int}}
SPECS = {
    ("apps/v1", "Deployment"): {
        "replicas": int,
        "selector": SELECTOR,
        "strategy": ROLLING,
        "template": {"metadata": {"labels": dict}, "spec": POD},
    },
    ("v1", "Service"): {
        "clusterIP": str,
        "selector": dict,
        "ports": [{"name": str, "port": int, "targetPort": str}],
    },
    ("policy/v1", "PodDisruptionBudget"): {"maxUnavailable": int, "selector": SELECTOR},
}
WHOLE = {
    ("v1", "ServiceAccount"): {},
    ("rbac.authorization.k8s.io/v1", "Role"): {
        "rules": [{"apiGroups": [str], "resources": [str], "verbs": [str]}]
    },
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): {
        "roleRef": {"apiGroup": str, "kind": str, "name": str},
        "subjects": [{"kind": str, "name": str}],
    },
}


def check_fields(found: object, known: object, where: str) -> None:
    if isinstance(known, type):
        assert type(found) is known, f"{where}: {found!r}"
        if known is dict:
            assert all(type(value) is str for value in found.values()), where
    elif isinstance(known, list):
        for index, one in enumerate(found):
            check_fields(one, known[0], f"{where}[{index}]")
    else:
        for key, value in found.items():
            assert key in known, f"{where}.{key}"
            check_fields(value, known[key], f"{where}.{key}")


LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035, as of a Service


def check_manifests(made: Deployment) -> dict[tuple[str, str], dict]:
    """All that has to hold of every deployment; the documents by kind and name."""
    documents = manifests(made)
    text = yaml.safe_dump_all(documents)
    assert list(yaml.safe_load_all(text)) == documents
    found = {}
    for one in documents:
        kind = one["apiVersion"], one["kind"]
        where = one["kind"]
        rest = {"apiVersion": str, "kind": str, "metadata": METADATA}
        known = rest | ({"spec": SPECS[kind]} if kind in SPECS else WHOLE[kind])
        check_fields(one, known, where)
        assert LABEL.fullmatch(one["metadata"]["name"]), one["metadata"]["name"]
        found[one["kind"], one["metadata"]["name"]] = one
    assert len(found) == len(documents)
    pods = []
    for (kind, _), one in found.items():
        if kind != "Deployment":
            continue
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
        (container,) = one["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        line = options_of(container["command"])
        assert line["--host"] == ["0.0.0.0"] and line["--port"] == [str(ports["http"])]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container.get(probe, {"httpGet": {"port": "http"}})["httpGet"]["port"] in ports
        for mount in container.get("volumeMounts", []):
            volumes = one["spec"]["template"]["spec"]["volumes"]
            assert mount["name"] in {volume["name"] for volume in volumes}
        pods.append((labels, ports))
    for (kind, _), one in found.items():
        if kind == "Service":
            ((labels, ports),) = [
                pod for pod in pods if one["spec"]["selector"].items() <= pod[0].items()
            ]
            (port,) = one["spec"]["ports"]
            assert port["targetPort"] in ports
            if "clusterIP" in one["spec"]:  # names resolve to pods: nothing maps the port
                assert port["port"] == ports[port["targetPort"]]
        elif kind == "PodDisruptionBudget":
            wanted = one["spec"]["selector"]["matchLabels"].items()
            assert any(wanted <= labels.items() for labels, _ in pods)
    return found


def test_one_replica_is_a_service_and_its_pod(tmp_path):
    made = deployment(tmp_path / "The.Model", PER_LAYER, engine="vllm", tp=4)
    found = check_manifests(made)
    assert sorted(found) == [("Deployment", "small-workers"), ("Service", "small")]
    pod = found["Deployment", "small-workers"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert container["command"][:3] == ["vllm", "serve", "/models/The.Model"]
    assert container["image"] == "engine:1"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == "models"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    # SGLang answers /health after a second at best, a probe's own second would always fail.
    assert all(container[f"{one}Probe"]["timeoutSeconds"] > 20 for one in ("readiness", "liveness"))


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_several_replicas_stand_behind_the_router(tmp_path, engine):
    made = deployment(tmp_path, FP8, engine=engine, replicas=4)
    found = check_manifests(made)
    workers = found["Deployment", "small-workers"]["spec"]
    assert workers["replicas"] == 4
    assert ("PodDisruptionBudget", "small-workers") in found
    router = found["Deployment", "small-router"]["spec"]
    assert router["replicas"] == 1  # what it knows of the caches is in its memory
    (container,) = router["template"]["spec"]["containers"]
    line = options_of(container["command"])
    labels = dict(word.split("=") for word in line["--selector"])
    assert labels.items() <= workers["template"]["metadata"]["labels"].items()
    (port,) = workers["template"]["spec"]["containers"][0]["ports"]
    assert line["--service-discovery-port"] == [str(port["containerPort"])]
    # It sees the pods of its namespace: account, role and binding go together.
    assert line["--service-discovery-namespace"] == ["$(NAMESPACE)"]
    assert container["env"][0]["name"] == "NAMESPACE"
    account = router["template"]["spec"]["serviceAccountName"]
    binding = found["RoleBinding", account]
    assert binding["roleRef"]["name"] == account == binding["subjects"][0]["name"]
    assert ("ServiceAccount", account) in found
    (rule,) = found["Role", account]["rules"]
    assert rule["resources"] == ["pods"] and set(rule["verbs"]) == {"get", "list", "watch"}


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(max_size=90),
    ranks=st.sampled_from([1, 2, 4, 8]),
    replicas=st.integers(1, 500),
    context=st.integers(1, 131072),
    share=st.floats(0, 1),
    items=st.integers(1, 4096),
    engine=st.sampled_from(["sglang", "vllm"]),
)
def test_any_name_and_any_size(
    tmp_path_factory, text, ranks, replicas, context, share, items, engine
):
    name = kubernetes_name(text)
    check_name("--name", name)
    path = tmp_path_factory.getbasetemp() / "odd"
    wanted = Wanted(
        engine,
        context,
        items,
        item_tokens=math.ceil(context * share) or 1,
        replicas=replicas,
    )
    read = read_checkpoint(folder(path, FP8))
    try:
        sized, _ = size(read, H100, wanted, ranks)
    except InputError:  # 12 heads over 8 ranks; a request larger than the cache
        assert ranks == 8 or wanted.tokens > 1_000_000
        return
    # Folders may be called anything that a file system takes.
    odd = replace(read, folder=Path("/") / (re.sub(r"[/\0]", "", text) or "x"))
    made = Deployment(name, odd, wanted, sized, image="engine:1", claim="models")
    check_manifests(made)
    flat = script(made).replace("\\\n", " ")
    assert str(odd.folder.resolve()) in shlex.split(flat, comments=True)
