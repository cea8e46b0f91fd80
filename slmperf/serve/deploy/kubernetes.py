"""kubernetes: the manifests of one deployment, as a list of documents.

One pod is one replica: an engine over the GPUs of one machine. Several of them stand behind the
router, which finds them by their labels (so that `kubectl scale` is enough), in one pod only: what
it knows of the workers' caches is in its memory. Fields by the API reference of Kubernetes
(apps/v1, v1, policy/v1, rbac.authorization.k8s.io/v1).
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from slmperf.check import InputError
from slmperf.serve.deploy.lines import (
    METRICS_PORT,
    PORTS,
    ROUTER_PORT,
    Deployment,
    remembered,
    router_line,
    serve_line,
)

ROUTER_IMAGE = "lmsysorg/sgl-model-gateway:v0.3.2"
_LONGEST_NAME = 63  # of a label (RFC 1123); names here get a suffix
_SUFFIX = len("-workers")
_EVERYWHERE = "0.0.0.0"  # of a pod: probes, router and clients come from outside of it
_MODELS = "/models"
_STARTUP_S = 1800  # weights come from a network volume, then graphs are captured
_GI = 2**30

Document = dict[str, Any]


def kubernetes_name(text: str) -> str:
    """A name that Kubernetes takes for everything, made from any text: "2.4B_fp8" -> m-2-4b-fp8."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name or not name[0].isalpha():  # a Service's name begins with a letter
        name = f"m-{name}".rstrip("-")
    return name[: _LONGEST_NAME - _SUFFIX].rstrip("-")


def check_name(option: str, name: str) -> None:
    """InputError for a name that Kubernetes would refuse."""
    if name != kubernetes_name(name):
        raise InputError(
            f"{option}: wanted lower-case letters, digits and single hyphens, a letter first, at "
            f"most {_LONGEST_NAME - _SUFFIX}, found {name!r} (such as {kubernetes_name(name)})"
        )


def manifests(deployment: Deployment) -> list[Document]:
    """The documents, in the order in which they are to be made."""
    several = deployment.sized.replicas > 1
    name = deployment.name
    documents = [_workers(deployment)]
    if several:
        documents.append(
            _document(
                "policy/v1",
                "PodDisruptionBudget",
                f"{name}-workers",
                name,
                {"maxUnavailable": 1, "selector": {"matchLabels": _labels(name, "worker")}},
            )
        )
        documents += [
            # No address of its own: the name stands for each pod's, at the port it listens on.
            _service(f"{name}-workers", name, "worker", PORTS[deployment.engine], clusterIP="None"),
            *_discovery_rights(name),
            _router(deployment),
        ]
    documents.append(_service(name, name, "router" if several else "worker", 80))
    return documents


def text(documents: list[Document], head: list[str]) -> str:
    """One YAML stream, `head` as comments before it."""
    body = yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, explicit_start=True, width=1000)
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + body


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice, instead of an anchor and a reference to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _labels(name: str, component: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/component": component}


def _document(
    version: str, kind: str, name: str, app: str, spec: Document | None = None, **rest: Any
) -> Document:
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": app}}
    found: Document = {"apiVersion": version, "kind": kind, "metadata": metadata}
    return found | ({} if spec is None else {"spec": spec}) | rest


def _deployment(name: str, app: str, component: str, replicas: int, pod: Document) -> Document:
    labels = _labels(app, component)
    spec = {
        "replicas": replicas,
        "selector": {"matchLabels": labels},
        # One goes before another comes: no GPUs lie idle for an update.
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
        },
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return _document("apps/v1", "Deployment", name, app, spec)


def _workers(deployment: Deployment) -> Document:
    sized, port = deployment.sized, PORTS[deployment.engine]
    model = f"{_MODELS}/{deployment.checkpoint.folder.resolve().name}"
    # Both engines read the weights through host memory, and have some GB of code and buffers in it.
    memory = math.ceil(sized.weight_bytes * sized.ranks / _GI) + 16
    # /health of SGLang answers when a token came out of the scheduler: after a second, under load
    # after up to 20. Three times in a row without an answer is a server that hangs.
    health: Document = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 25}
    container: Document = {
        "name": deployment.engine,
        "image": deployment.image,
        "command": serve_line(deployment, model, _EVERYWHERE, port),
        "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
        "ports": [{"name": "http", "containerPort": port}],
        "resources": {
            "requests": {"cpu": str(4 + 2 * sized.ranks), "memory": f"{memory}Gi"},
            "limits": {"nvidia.com/gpu": str(sized.ranks)},
        },
        "startupProbe": health | {"periodSeconds": 30, "failureThreshold": _STARTUP_S // 30},
        "readinessProbe": health | {"periodSeconds": 10, "failureThreshold": 1},
        "livenessProbe": health | {"periodSeconds": 30, "failureThreshold": 3},
        "volumeMounts": [
            {"name": "models", "mountPath": _MODELS, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    claim = {"claimName": deployment.claim, "readOnly": True}
    pod: Document = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 60,
        "containers": [container],
        "volumes": [
            {"name": "models", "persistentVolumeClaim": claim},
            # The 64 MiB of a container's own are too few for the ranks' exchange.
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{8 * sized.ranks}Gi"}},
        ],
    }
    return _deployment(f"{deployment.name}-workers", deployment.name, "worker", sized.replicas, pod)


def _router(deployment: Deployment) -> Document:
    name = deployment.name
    workers = ["--service-discovery", "--selector"]
    workers += [f"{key}={value}" for key, value in _labels(name, "worker").items()]
    workers += ["--service-discovery-port", str(PORTS[deployment.engine])]
    workers += ["--service-discovery-namespace", "$(NAMESPACE)"]  # Kubernetes puts it in
    namespace = {"valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}
    # What the router remembers of each worker's cache, in letters.
    memory = 1 + math.ceil(deployment.sized.replicas * remembered(deployment) / _GI)
    container: Document = {
        "name": "router",
        "image": ROUTER_IMAGE,
        "command": router_line(deployment, _EVERYWHERE, ROUTER_PORT, workers),
        "env": [{"name": "NAMESPACE"} | namespace],
        "ports": [
            {"name": "http", "containerPort": ROUTER_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "resources": {"requests": {"cpu": "2", "memory": f"{memory}Gi"}},
        "readinessProbe": {"httpGet": {"path": "/readiness", "port": "http"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/liveness", "port": "http"}, "periodSeconds": 10},
    }
    pod: Document = {"serviceAccountName": f"{name}-router", "containers": [container]}
    return _deployment(f"{name}-router", name, "router", 1, pod)


def _discovery_rights(name: str) -> list[Document]:
    """What lets the router see the pods of its namespace, and nothing else."""
    api, router = "rbac.authorization.k8s.io", f"{name}-router"
    rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    role = {"apiGroup": api, "kind": "Role", "name": router}
    return [
        _document("v1", "ServiceAccount", router, name),
        _document(f"{api}/v1", "Role", router, name, rules=[rule]),
        _document(
            f"{api}/v1",
            "RoleBinding",
            router,
            name,
            roleRef=role,
            subjects=[{"kind": "ServiceAccount", "name": router}],
        ),
    ]


def _service(name: str, app: str, component: str, port: int, **rest: str) -> Document:
    """A name for the pods of a component."""
    ports = [{"name": "http", "port": port, "targetPort": "http"}]
    spec = {**rest, "selector": _labels(app, component), "ports": ports}
    return _document("v1", "Service", name, app, spec)
