"""Every launch file and every shell script, checked by tools that know their language and by their own headers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from tests.small_runs import REPO

LAUNCH = REPO / "launch"
FILES = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch", ".yaml"))
SCRIPTS = sorted([*REPO.glob("scripts/*.sh"), *LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", REPO / ".ci" / "run"])
# What the cluster sets, and what is for programs that a launch file starts.
OF_THE_CLUSTER = re.compile(r"SLURM_\w+|SKYPILOT_\w+|JOB_COMPLETION_INDEX")
HANDED_ON = {"ACCELERATE_USE_CPU", "GLOO_SOCKET_IFNAME", "TLSCALE_CACHE"}
KUBERNETES = "1.37"
OF_MANY_RUNS = "slurm_compare.sh"


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


def test_there_is_one_for_each_kind_of_place():
    assert {name_of(path) for path in FILES} == {
        "launch/kubernetes/indexed_job.yaml",
        "launch/kubernetes/trainjob.yaml",
        "launch/local.sh",
        "launch/skypilot.yaml",
        "launch/slurm.sbatch",
        "launch/slurm_compare.sh",
        "launch/tpu_pod.sh",
        "launch/two_hosts.sh",
    }


def shellcheck(text: str) -> str:
    """What shellcheck has to say of a script; it comes with the development environment."""
    tool = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [tool, "-s", "bash", "-"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def test_shellcheck_finds_what_is_wrong():
    assert "SC2086" in shellcheck("#!/usr/bin/env bash\nname=$1\nrm $name\n")


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_shellcheck_of_a_script(path):
    assert shellcheck(path.read_text()) == ""


def scripts_within(node) -> list[str]:
    """The texts of several lines in a YAML document: scripts, all of them."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return [script for part in node for script in scripts_within(part)]
    return [node] if isinstance(node, str) and "\n" in node.strip() else []


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=name_of)
def test_shellcheck_of_the_scripts_in_yaml(path):
    scripts = [script for document in yaml.safe_load_all(path.read_text()) for script in scripts_within(document)]
    assert len(scripts) == 2
    for script in scripts:
        assert shellcheck(script) == ""


# --- Headers ----------------------------------------------------------------------------------------------------------


def parts_of(path: Path) -> tuple[str, str]:
    """The comment that a file begins with, and its lines that are no comments."""
    lines = path.read_text().removeprefix("#!/usr/bin/env bash\n").splitlines()
    length = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    header = [line for line in lines[:length] if not line.startswith("#SBATCH")]
    return "\n".join(header), "\n".join(line for line in lines[length:] if not line.lstrip().startswith("#"))


@pytest.mark.parametrize("path", [path for path in FILES if path.name != OF_MANY_RUNS], ids=name_of)
def test_it_ends_in_the_one_command(path):
    text = path.read_text().replace('\\"', '"').replace("\\$", "$")
    commands = re.findall(r"^\s*(?:tlscale/run\.py|-m tlscale\.run) (.*)", text, flags=re.MULTILINE)
    assert len(commands) == 1
    assert re.match(r'"\$(recipe|RECIPE)" --out "\$(run_dir|RUN_DIR)" --resume\b', commands[0])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_its_variables_are_those_that_its_header_tells_of(path):
    header, code = parts_of(path)
    told = set(re.findall(r"^#   ([A-Z][A-Z0-9_]+)  ", header, flags=re.MULTILINE))
    used = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", code.replace("\\$", "$")))
    used |= set(re.findall(r"name: ([A-Z][A-Z0-9_]+), value:", code))  # the env of a pod
    used = {name for name in used if not OF_THE_CLUSTER.fullmatch(name)}
    assert ("RUN_DIR" in told) == (path.name != OF_MANY_RUNS)
    assert used - told == set()
    assert told - used <= HANDED_ON


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_says_what_it_was_tested_on(path):
    header, _ = parts_of(path)
    assert "\n# Tested on: " in header
    assert "not run" in header.lower(), "none was run on all that it is for"


def test_the_readme_has_them_all():
    text = (LAUNCH / "README.md").read_text()
    rows = re.findall(r"^\| \[`([\w./]+)`\]\(([\w./]+)\) \|", text, flags=re.MULTILINE)
    assert {name for name, _ in rows} == {str(path.relative_to(LAUNCH)) for path in FILES}
    assert all(name == link for name, link in rows)


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def documents(name: str) -> dict[str, dict]:
    """kind -> document of a file below launch/kubernetes."""
    return {each["kind"]: each for each in yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text())}


def test_the_indexed_job_is_valid():
    parts = documents("indexed_job.yaml")
    assert parts.keys() == {"Service", "Job"}
    for part in parts.values():
        kubernetes_validate.validate(part, KUBERNETES, strict=True)
    parts["Job"]["spec"]["podFailurePolicy"]["rules"][0]["acton"] = "Ignore"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(parts["Job"], KUBERNETES, strict=True)


def test_the_pods_of_the_indexed_job_find_the_first():
    parts = documents("indexed_job.yaml")
    service, job = parts["Service"], parts["Job"]
    pod = job["spec"]["template"]["spec"]
    env = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(env["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(env["PROCESSES_PER_NODE"]) == pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]


def same_when_read_by(model, document: dict) -> bool:
    """Whether a model of the API takes every key of a document, and gives it back as it is."""
    return model.from_dict(document).to_dict() == document


def test_the_train_job_is_valid():
    parts = documents("trainjob.yaml")
    runtime, job = parts["TrainingRuntime"], parts["TrainJob"]
    assert same_when_read_by(models.TrainerV1alpha1TrainingRuntime, runtime)
    assert same_when_read_by(models.TrainerV1alpha1TrainJob, job)
    assert not same_when_read_by(models.TrainerV1alpha1TrainJob, {**job, "spec": {**job["spec"], "numNodes": 2}})
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    template = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": node["template"]["spec"]}
    kubernetes_validate.validate(template, KUBERNETES, strict=True)


def test_both_kinds_of_pods_do_the_same():
    """The one is told by variables what the other is told by options."""

    def scripts(name: str) -> list[str]:
        found = [script for document in documents(name).values() for script in scripts_within(document)]
        return [re.sub(r"(torch\.distributed\.run) .*?(-m tlscale)", r"\1 \2", each, flags=re.DOTALL) for each in found]

    assert scripts("indexed_job.yaml") == scripts("trainjob.yaml")


# --- TPU --------------------------------------------------------------------------------------------------------------

CURL = """#!/usr/bin/env bash
case ${*: -1} in */agent-worker-number) echo 2 ;; *) echo a:b:10.0.0.5,c:d:10.0.0.6 ;; esac
"""


def test_the_command_for_the_hosts_of_a_tpu(tmp_path):
    """With a gcloud that runs it here, a curl that knows a host's metadata, and a Python that shows its words."""
    tools = {
        "gcloud": f'#!/usr/bin/env bash\nprintf "%s" "${{*: -1}}" >"{tmp_path}/command"\nexec bash -c "${{*: -1}}"\n',
        "curl": CURL,
        "python": '#!/usr/bin/env bash\nprintf \'%s\\n\' "$PJRT_DEVICE" "$@"\n',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    given = {
        "TPU_NAME": "pod",
        "ZONE": "z",
        "CHECKOUT": str(tmp_path),
        "PYTHON": str(tmp_path / "python"),
        "HOSTS": "8",
    }
    done = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "recipes/flowers.yaml", "optim.lr=1e-3", "freeze=(a|b)\\..*"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **given},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert shellcheck((tmp_path / "command").read_text()) == ""
    device, *words = done.stdout.splitlines()
    assert device == "TPU"
    assert words[words.index("--nnodes") + 1] == "8"
    assert words[words.index("--node-rank") + 1] == "2"
    assert words[words.index("--master-addr") + 1] == "10.0.0.5"
    end = ["tlscale/run.py", "recipes/flowers.yaml", "--out", "runs/flowers", "--resume", "optim.lr=1e-3"]
    assert words[-7:] == [*end, "freeze=(a|b)\\..*"]
