"""The files that start a run on a cluster: what they say fits together, and the command exists."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from forwardgrad.cli._train import read_options

FOLDER = Path(__file__).parents[1] / "examples" / "cluster"
SLURM, KUBERNETES = FOLDER / "train.slurm", FOLDER / "train.yaml"


def of_slurm():
    """The options that every task gets."""
    script = SLURM.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^srun .*$", script, re.MULTILINE)
    words = shlex.split(line)
    return words[words.index("train") + 1 :]


def of_kubernetes():
    """Service, Job, its container, and the options as pairs."""
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    options = dict(arg.partition("=")[::2] for arg in container["args"])
    return service, job, container, options


def test_slurm_script_is_one():
    subprocess.run(["bash", "-n", SLURM], check=True)
    lines = SLURM.read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH "))
    # Slurm reads no further than the first command.
    assert all(line.startswith("#") for line in lines[:last])
    assert of_slurm()[-5:-1] == ["--coordinator", "auto", "--out", "$OUT"]


def test_pods_find_each_other():
    service, job, container, options = of_kubernetes()
    name, spec = job["metadata"]["name"], job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(options["--processes"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    subdomain, (port,) = spec["template"]["spec"]["subdomain"], container["ports"]
    assert service["metadata"]["name"] == subdomain
    assert options["--coordinator"] == f"{name}-0.{subdomain}:{port['containerPort']}"
    assert service["spec"]["ports"][0]["port"] == port["containerPort"]
    index = next(e for e in container["env"] if f"$({e['name']})" == options["--process-id"])
    path = index["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_options_exist(kind):
    if kind == "slurm":
        read_options(of_slurm())
    else:
        _, _, container, _ = of_kubernetes()
        assert container["command"] == ["forwardgrad", "train"]
        read_options([a.replace("$(PROCESS)", "0") for a in container["args"]])
