"""The container file and the manifests: strict schemas, KubeRay's rules, who may do and reach what, our own options.

What `kubectl apply -k` would send is rendered by `kubectl kustomize` or by `kustomize`; where neither is installed,
only the files that hold whole resources are checked.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.config import GroupConfig, RunConfig
from jobs import pretrain
from jobs.options import override, read_yaml
from simmatch.config import parse

ROOT = Path(__file__).resolve().parent.parent
KUBERAY = ROOT / "infra" / "kuberay"
SHARED = Path(os.environ.get("SIMMATCH_SHARED") or ROOT.parent / "shared")
SCHEMAS = SHARED / "schemas" / "kuberay"

APPLIED = ("base", "gpu", "cpu-smoke", "gpu-job")
"""What users apply; the other folders are components of these."""

WHOLE = ("base/ray-cluster.yaml", "base/network-policy.yaml", "job/ray-job.yaml")
"""Files that hold whole resources, not patches."""

GATED = {
    "networkPolicy", "tlsOptions", "historyServerOptions", "gcsFaultToleranceOptions",  # alpha
    "deletionStrategy", "numOfHosts", "suspend",  # beta, or of no use here
    "enableK8sTokenAuth",  # not for RayJob
}  # fmt: skip
"""Fields of KubeRay 1.7 that a feature gate guards: an operator with the defaults refuses them, or may change them."""

LONGEST_NAME = 47
"""Of a RayJob, from which KubeRay derives the names of the cluster and its services."""

RAY = {"app.kubernetes.io/part-of": "simmatch", "app.kubernetes.io/component": "ray"}
DASHBOARD, GCS = 8265, 6379

Resource = dict[str, Any]


@cache
def rendered(folder: str) -> str:
    """The manifests of a folder; skips the test where nothing here can render them."""
    words = [["kubectl", "kustomize"], ["kustomize", "build"]]
    tool = next((each for each in words if shutil.which(each[0])), None)
    if tool is None:
        pytest.skip("needs kubectl or kustomize")
    done = subprocess.run([*tool, str(KUBERAY / folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # such as the remark that a field is deprecated
    return done.stdout


def resources(folder: str) -> list[Resource]:
    return list(yaml.safe_load_all(rendered(folder)))


def of_kind(folder: str, kind: str) -> Resource:
    [found] = [each for each in resources(folder) if each["kind"] == kind]
    return found


def cluster_spec(resource: Resource) -> Resource:
    spec = resource["spec"]
    return spec["rayClusterSpec"] if resource["kind"] == "RayJob" else spec


def groups(resource: Resource) -> list[Resource]:
    """The head and the workers."""
    spec = cluster_spec(resource)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def templates(resource: Resource) -> list[Resource]:
    """Of the pods of Ray and, in a job, last, of the pod that submits it."""
    own = [group["template"] for group in groups(resource)]
    return [*own, resource["spec"]["submitterPodTemplate"]] if resource["kind"] == "RayJob" else own


def of_ray(folder: str) -> Resource:
    [found] = [each for each in resources(folder) if each["apiVersion"] == "ray.io/v1"]
    return found


# --- schemas -------------------------------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """A schema that refuses fields which it does not name, as the API server does with strict field validation."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@cache
def schema_of(kind: str) -> Any:
    """KubeRay's schema of a resource; `metadata` and the like are Kubernetes' own and left to it."""
    if not SCHEMAS.is_dir():
        pytest.skip(f"needs KubeRay's schemas in {SCHEMAS}")
    schema = json.loads((SCHEMAS / f"{kind.lower()}-v1.json").read_text())
    return closed({"type": "object", "properties": {"spec": schema["properties"]["spec"]}} | {"required": ["spec"]})


def errors(resource: Resource) -> list[str]:
    """What the schemas find wrong with a resource."""
    if resource["apiVersion"] != "ray.io/v1":
        return errors_of_kubernetes(resource)
    body = {"spec": resource["spec"]}
    found = [error.message for error in jsonschema.Draft202012Validator(schema_of(resource["kind"])).iter_errors(body)]
    for template in templates(resource):  # whose values KubeRay's schema checks less closely than Kubernetes does
        metadata = {"name": "a", **template.get("metadata", {})}
        found += errors_of_kubernetes(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        )
    return found


def errors_of_kubernetes(resource: Resource) -> list[str]:
    try:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error.message)]
    return []


@pytest.mark.parametrize("folder", APPLIED)
def test_what_is_applied_fits_the_schemas(folder: str) -> None:
    found = resources(folder)
    assert sorted(each["kind"] for each in found)[0] == "NetworkPolicy"
    assert len(found) == 2
    assert [error for each in found for error in errors(each)] == []


@pytest.mark.parametrize("file", WHOLE)
def test_files_with_whole_resources_fit_the_schemas(file: str) -> None:
    resource = yaml.safe_load((KUBERAY / file).read_text())
    if resource["kind"] == "RayJob":  # its cluster is copied into it
        resource["spec"]["rayClusterSpec"] = yaml.safe_load((KUBERAY / WHOLE[0]).read_text())["spec"]
    assert errors(resource) == []


def broken(resource: Resource, path: str, value: Any) -> Resource:
    """A copy with one value replaced."""
    copied = copy.deepcopy(resource)
    *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place: Any = copied
    for key in keys:
        place = place[key]
    place[last] = value
    return copied


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/rayVersions", "2.60.0"), ("spec/rayVersion", 2.6), ("spec/authOptions/mode", "tokens"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0), ("spec/workerGroupSpecs/0/replicas", "2"),
        ("spec/headGroupSpec/template/spec/containers/0/image", None),
        ("spec/headGroupSpec/template/spec/containers/0/securityContext/runAsRoot", False),
        ("spec/headGroupSpec/template/spec/containers/0/resources/limits/cpu", []),
        ("spec/headGroupSpec/template/metadata/label", {}),
    ],
)  # fmt: skip
def test_the_schemas_find_mistakes(path: str, value: Any) -> None:
    resource = yaml.safe_load((KUBERAY / WHOLE[0]).read_text())
    assert errors(broken(resource, path, value)) != []


# --- KubeRay's rules -------------------------------------------------------------------------------------------------


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(each)


@pytest.mark.parametrize("folder", APPLIED)
def test_kuberays_rules(folder: str) -> None:
    resource = of_ray(folder)
    assert not GATED & set(keys(resource["spec"]))
    assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", resource["metadata"]["name"])
    assert len(resource["metadata"]["name"]) <= LONGEST_NAME
    locked = dict(line.split("==") for line in (ROOT / "infra/requirements.lock").read_text().splitlines()[1:])
    assert cluster_spec(resource)["rayVersion"] == locked["ray"]
    for group in cluster_spec(resource)["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(resource):
        memory = 2**30 * int(
            group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")
        )
        assert 75 * 2**20 <= int(group["rayStartParams"]["object-store-memory"]) <= 0.3 * memory


@pytest.mark.parametrize("folder", ["cpu-smoke", "gpu-job"])
def test_a_job_is_tried_again_and_clears_up(folder: str) -> None:
    spec = of_kind(folder, "RayJob")["spec"]
    assert spec["backoffLimit"] == (0 if folder == "cpu-smoke" else 2)
    assert spec["shutdownAfterJobFinishes"]  # without it KubeRay refuses a time to live
    assert spec["ttlSecondsAfterFinished"] > 0
    grace = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert isinstance(grace, str)  # Ray takes no numbers for variables
    assert int(grace) > GroupConfig().grace_s


# --- who may do and reach what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", APPLIED)
def test_clusters_ask_for_a_token(folder: str) -> None:
    """KubeRay makes the token and hands it to every pod, that which submits the job too; none is written here."""
    resource = of_ray(folder)
    assert cluster_spec(resource)["authOptions"] == {"mode": "token"}
    for template in templates(resource):
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                assert not variable["name"].startswith("RAY_AUTH"), "KubeRay sets it"
                assert not re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"]) or "valueFrom" in variable


@pytest.mark.parametrize("folder", APPLIED)
def test_pods_have_no_rights_and_all_limits(folder: str) -> None:
    """The restricted level of Kubernetes' pod security standards."""
    for template in templates(of_ray(folder)):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000  # the user of the image
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(set(volume) == {"name", "persistentVolumeClaim"} for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            own = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == own
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert re.fullmatch(r"simmatch:[\d.]+-(cpu|cuda)", container["image"])


def admitted(policy: Resource, labels: dict[str, str], port: int) -> bool:
    """Whether a pod with these labels reaches a port of a pod that the policy selects."""
    for rule in policy["ingress"]:
        ports = [each["port"] for each in rule.get("ports", [])]
        peers = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
        if (not ports or port in ports) and any(peer.items() <= labels.items() for peer in peers):
            return True
    return False


@pytest.mark.parametrize("folder", APPLIED)
def test_only_pods_of_ray_reach_each_other(folder: str) -> None:
    policy = of_kind(folder, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    resource = of_ray(folder)
    labels = [template["metadata"]["labels"] for template in templates(resource)]
    inside, submitter = labels[: len(groups(resource))], labels[len(groups(resource)) :]
    for own in inside:
        assert policy["podSelector"]["matchLabels"].items() <= own.items()
        assert own == RAY
        assert admitted(policy, own, GCS)
        assert admitted(policy, own, 40001)  # of a rank
    for own in [*submitter, {"app.kubernetes.io/name": "kuberay-operator"}]:
        assert admitted(policy, own, DASHBOARD)
        assert not admitted(policy, own, GCS)
    for stranger in ({}, {"app.kubernetes.io/part-of": "simmatch"}, {"ray.io/node-type": "worker"}):
        assert not admitted(policy, stranger, DASHBOARD)
    assert len(submitter) == (resource["kind"] == "RayJob")


# --- our own options -------------------------------------------------------------------------------------------------


def config_of(entrypoint: str) -> tuple[RunConfig, str]:
    """The run's configuration and directory."""
    words = shlex.split(entrypoint)
    assert words[:3] == ["python", "-m", "jobs.pretrain"]
    options = pretrain._parser().parse_args(words[3:])
    path = ROOT / Path(options.config).relative_to("/app")  # where the image has it, whatever the working directory
    return parse(RunConfig, override(read_yaml(path), options.set)), options.run_dir


@pytest.mark.parametrize("folder", ["cpu-smoke", "gpu-job"])
def test_the_jobs_run_what_exists_and_fits(folder: str) -> None:
    resource = of_kind(folder, "RayJob")
    config, run_dir = config_of(resource["spec"]["entrypoint"])
    config.check_mesh()
    [workers] = cluster_spec(resource)["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    limits, ranks = container["resources"]["limits"], config.mesh.world_size
    assert ranks * config.cluster.cpus_per_rank <= workers["replicas"] * int(limits["cpu"])
    assert (config.device == "cuda") == ("nvidia.com/gpu" in limits) == container["image"].endswith("-cuda")
    if config.device == "cuda":
        assert ranks == workers["replicas"] * int(limits["nvidia.com/gpu"])
    mounts = [each["mountPath"] for each in container.get("volumeMounts", [])]
    assert "://" in run_dir or any(run_dir.startswith(f"{mount}/") for mount in mounts)
    assert config.data.path is None or "://" in config.data.path


# --- the image and the shell -----------------------------------------------------------------------------------------

BIN = Path(sys.executable).parent


def complaints(*words: str | Path, text: str | None = None) -> str:
    done = subprocess.run(list(map(str, words)), input=text, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def test_the_container_file_is_clean() -> None:
    assert complaints(BIN / "hadolint", ROOT / "infra/Dockerfile") == ""
    assert "DL3008" in complaints(BIN / "hadolint", "-", text="FROM debian:12\nRUN apt-get install gcc\n")


def test_the_shell_scripts_are_clean() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    paths = [ROOT / ".ci/run", *(ROOT / name for name in listed if name.endswith(".sh"))]
    assert complaints(BIN / "shellcheck", *paths) == ""
    for folder in ("cpu-smoke", "gpu-job"):
        entrypoint = of_kind(folder, "RayJob")["spec"]["entrypoint"]
        assert complaints(BIN / "shellcheck", "--shell=bash", "-", text=entrypoint) == ""
    assert "SC2086" in complaints(BIN / "shellcheck", "--shell=bash", "-", text="ls $1\n")


def test_the_image_holds_locked_versions_and_no_root() -> None:
    lines = (ROOT / "infra/Dockerfile").read_text().splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("FROM ")]
    stages = {lines[i].split(" AS ")[1]: lines[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)}
    assert set(stages) == {"build", "build-cpu", "build-cuda", "runtime", "cpu", "cuda"}
    for variant in ("cpu", "cuda"):
        assert [line for line in stages[variant] if line][-1] == "USER 1000"
        assert f"COPY --from=build-{variant} /opt/simmatch /opt/simmatch" in stages[variant]
    installs = [line for line in lines if line.startswith("RUN pip install")]
    assert len(installs) == 4
    assert all("-c infra/requirements.lock" in line for line in installs)
    [variables] = [line for line in stages["runtime"] if line.startswith("ENV ")]
    assert {"RAY_AUTH_MODE=token", "PYTHONPATH=/app"} <= set(variables.split())
