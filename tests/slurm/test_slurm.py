"""The templates of slurm/ on a real Slurm cluster: two nodes of two ranks, stopped in every way
that a cluster knows, and the curve of a job that nobody stopped.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import LOST, ROOT, SUPPORT, TRAIN, curve, environment, options, reached, saved

from unic_ds import demo
from unic_ds.training import heartbeat

SCRIPT = str(ROOT / "tests" / "slurm" / "slurm_lab.sh")
NODES = 32
SIZE = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2"]
STEPS = 24
RUN = {"optim__batch_size": 4, "optim__steps": STEPS, "run__save_every": 1000, "eval__on": "false"}
ASKED_FOR = {"unic_b_8gpu.sh": 1, "unic_l_64gpu.sh": 8, "unic_g_256gpu.sh": 32}
"""Nodes of eight GPUs that a template asks for."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "a Slurm cluster of one's own needs root"
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
    if lacking := [name for name in programs if not shutil.which(name, path=SEARCHED)]:
        return f"Slurm's Debian packages are not installed (no {', '.join(lacking)})"
    spaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--mount-proc", "--fork", "true"]
    if subprocess.run(spaces, stderr=subprocess.DEVNULL).returncode:
        return "this machine lets nobody make network and process namespaces"
    return ""


SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.dist,
    pytest.mark.skipif(bool(missing()), reason=str(missing())),
]


class Lab:
    """A cluster that lives as long as its standard input is open, so at most as long as pytest."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = environment() | {"UNIC_DS_NPROC": "2", "UNIC_DS_GPU": "h100-80"}
        self.env["PATH"] += ":/usr/sbin:/sbin"
        command = ["bash", SCRIPT, "up", str(folder), str(NODES), "8", "cat"]
        said = folder / "lab.log"
        with said.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        ready = folder / "pids" / "ready"
        until(
            lambda: ready.exists() or self.process.poll() is not None,
            "it is up",
            show=said.read_text,
        )
        assert ready.exists(), said.read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def start(self, host: str, *command: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", SCRIPT, "on", str(self.folder), host, *command],
            env=self.env | more,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, **more: str) -> str:
        """Output of a command on the controller's host."""
        process = self.start("ctl", *command, **more)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, printed
        return printed.strip()

    def crash(self, node: str) -> None:
        subprocess.run(["bash", SCRIPT, "crash", str(self.folder), node], check=True)

    @contextmanager
    def without_gpus(self, node: str) -> Iterator[None]:
        """A node whose GPUs do not come up, as long as the block takes."""
        mark = self.folder / "dead" / node
        mark.touch()
        try:
            yield
        finally:
            mark.unlink()

    def submit(self, *words: str, **more: str) -> "Batch":
        """A job of a template."""
        log = self.folder / f"job-{time.monotonic_ns()}.log"
        number = self.run("sbatch", "--parsable", f"--output={log}", *words, **more)
        return Batch(self, number, log)

    def train(self, out: Path, *words: str, **more: str) -> "Batch":
        """The user's own way in, on two nodes of two ranks and a small recipe."""
        quick = ["--recipe", "quickstart", *options(out, **RUN), *words]
        return self.submit(*SIZE, "slurm/unic_l_64gpu.sh", *quick, **more)


class Batch:
    """A job of the lab."""

    def __init__(self, lab: Lab, number: str, log: Path):
        self.lab, self.number, self.log = lab, number, log
        self.asked = 0.0  # when its state was, on the monotonic clock

    def facts(self) -> dict[str, str]:
        said = self.lab.run("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    def has_ended(self) -> bool:
        """True if it has a last state; asked once a second, since each question starts programs."""
        if time.monotonic() < self.asked + 1:
            return False
        self.asked = time.monotonic()
        return self.state in ENDED

    @property
    def nodes(self) -> list[str]:
        said = self.facts()["NodeList"]
        return self.lab.run("scontrol", "show", "hostnames", said).split()

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def ended(self) -> str:
        """Its last state, when it has one."""
        until(self.has_ended, f"job {self.number} has ended", show=self.printed)
        return self.state

    def change(self, **facts: str) -> None:
        words = [f"{name}={value}" for name, value in facts.items()]
        self.lab.run("scontrol", "update", f"JobId={self.number}", *words)

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def waits(self, condition, what: str) -> None:
        """Wait for something that only a job which has not ended can bring."""
        until(lambda: condition() or self.has_ended(), what, show=self.printed)
        assert condition(), f"{what}: the job has ended\n{self.printed()[-6000:]}"

    def started(self, times: int) -> None:
        """Wait until it has begun, requeued that often, without Slurm's two minutes before it."""
        if times:
            self.waits(lambda: self.restarts == times, "it is requeued")
            time.sleep(2)  # Slurm revokes what nodes were told of the job by the second
            self.change(StartTime="now")
        self.waits(lambda: f"start {times} on" in self.printed(), "it starts")

    def reaches(self, out: Path, step: int) -> None:
        self.waits(lambda: reached(out) >= step, f"step {step}")


def until(condition, what: str, timeout: float = 900, show=lambda: "") -> None:
    """Wait for something; an assertion that shows what was printed where it does not come."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout} s\n{show()[-6000:]}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def lab(demonstration, tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.mark.parametrize(("template", "nodes"), ASKED_FOR.items())
def test_slurm_takes_the_templates_as_they_are(lab, template, nodes):
    said = lab.run("sbatch", "--test-only", f"slurm/{template}")
    assert re.search(rf"using {nodes * 64} processors on nodes n(\[1-{nodes}\]|1) in", said), said
    process = lab.start("ctl", "sbatch", "--test-only", "--gpus-per-node=9", f"slurm/{template}")
    assert "not available" in process.communicate(timeout=60)[0]


def test_a_job_that_cannot_run_is_refused_before_it_trains(lab, tmp_path):
    gpu = tmp_path / "tiny.yaml"
    gpu.write_text("memory_gb: 2\ntflops: 10\nmemory_gb_s: 100\nnode_gb_s: 10\nnet_gb_s: 1\n")
    job = lab.train(tmp_path / "run", UNIC_DS_GPU=str(gpu))
    assert job.ended() == "FAILED"
    assert "does NOT fit" in job.printed() and "nothing was trained" in job.printed()
    assert job.facts()["ExitCode"] == "2:0" and job.facts()["Restarts"] == "0"
    unknown = "unknown option --optim.lrr (did you mean optim.lr?)"
    assert unknown in wrong(lab.train(tmp_path / "run", "--optim.lrr", "1"))
    words = ["--ds-config", "ds_configs/zero1.json", "--optim.lrr", "1"]
    words += ["--data.train", "$(touch ran); touch ran\n* `touch ran`"]  # read by no shell
    assert unknown in wrong(lab.submit(*SIZE, "slurm/unic_b_8gpu.sh", *words))
    assert not (ROOT / "ran").exists()
    recipe = tmp_path / "mine.yaml"
    assert "needs --out" in wrong(lab.submit(*SIZE, "slurm/unic_b_8gpu.sh", f"--recipe={recipe}"))
    assert not (tmp_path / "run").exists()


def wrong(job: Batch) -> str:
    """Output of a job that a mistake ended."""
    assert job.ended() == "FAILED" and job.facts()["ExitCode"] == "2:0", job.printed()
    return job.printed()


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    job = lab.train(out)
    assert job.ended() == "COMPLETED", job.printed()[-4000:]
    assert job.facts()["Restarts"] == "0" and saved(out) == STEPS
    return out


def test_a_job_trains_to_its_end(whole):
    assert set(curve(whole)) == set(range(1, STEPS + 1))
    assert (whole / "student" / "model.safetensors").is_file()


@dataclass(frozen=True)
class Leg:
    """One stretch of a job, from its start to what stopped it."""

    nodes: list[str]
    printed: str
    steps: int  # logged
    saved: int
    state: str
    restarts: str


class Journey:
    """One run that is cancelled, preempted, out of time, bereft of a node and of a rank."""

    def __init__(self, lab: Lab, out: Path):
        self.lab, self.out, self.read = lab, out, 0
        self.words = "--run.hang_timeout", "20"
        self.job = lab.train(out, *self.words)
        self.job.reaches(out, 2)
        self.cancelled = self.leg(lambda: lab.run("scancel", self.job.number))
        self.job, self.read = lab.train(out, *self.words), 0
        self.preempted = self.leg(self.preempt, restarts=1)
        self.timed_out = self.leg(self.end_its_time, restarts=2)
        self.bereft = self.leg(self.crash_a_node, restarts=3)
        self.ended = self.leg(self.stop_a_rank)

    def leg(self, stop, restarts: int | None = None) -> Leg:
        """Start the job, stop it, and wait until it has ended, or is requeued for that time."""
        job = self.job
        job.started(int(job.facts()["Restarts"]))
        nodes = job.nodes
        stop()
        if restarts is None:
            job.ended()
        else:
            job.waits(lambda: job.restarts == restarts, "it is requeued")
            job.waits(lambda: job.state == "PENDING", "its last ranks are gone")
        printed, facts = job.printed(), job.facts()
        leg = Leg(
            nodes=nodes,
            printed=printed[self.read :],
            steps=reached(self.out),
            saved=saved(self.out),
            state=facts["JobState"],
            restarts=facts["Restarts"],
        )
        self.read = len(printed)
        return leg

    def preempt(self) -> None:
        """A job of the partition that goes before asks for these nodes."""
        self.steps()
        wanted = ["--nodes=2", "--exclusive", f"--nodelist={','.join(self.job.nodes)}"]
        sleeps = ["--output=/dev/null", "--wrap", "sleep 3600"]
        self.lab.run("sbatch", "--partition=high", *wanted, *sleeps)
        self.slowly(lambda: self.job.restarts or self.job.facts()["PreemptTime"] != "None")

    def end_its_time(self) -> None:
        """Five minutes are left at once, which is when the templates want to be told."""
        self.steps()
        self.job.change(TimeLimit="5")
        self.slowly((self.out / "STOP").exists)

    def crash_a_node(self) -> None:
        """A node that is not the batch host dies; its operator tells Slurm before it finds out."""
        self.job.change(TimeLimit="1440")
        self.steps()
        node = self.job.nodes[1]
        self.lab.crash(node)
        self.lab.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")

    def stop_a_rank(self) -> None:
        """SIGSTOP to a rank that is not on the batch host, in the midst of a step."""
        self.steps()
        self.stopped = self.rank()
        self.signal("STOP", self.stopped)

    def steps(self) -> None:
        """Wait until this start of the job has made a step."""
        self.job.reaches(self.out, reached(self.out) + 1)

    def rank(self) -> heartbeat.Heartbeat:
        """One that trains now, not on the batch host."""
        host, rows = self.job.nodes[1], []
        while not rows:  # whose record is being written is missing for a moment
            rows = [row for row in heartbeat.read_all(self.out) if row.host == host]
        return rows[0]

    def signal(self, name: str, rank: heartbeat.Heartbeat) -> None:
        process = self.lab.start(rank.host, "kill", f"-{name}", str(rank.pid))
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, printed

    def slowly(self, told) -> None:
        """Have a rank make a step in five seconds until the job is told to stop: Slurm looks at
        time limits twice a minute, and a fast machine would have trained to the end by then.
        """
        rank = self.rank()
        while not told():
            self.signal("STOP", rank)
            beat, end = self.rank().beat, time.monotonic() + 5
            while time.monotonic() < end and not told():
                time.sleep(0.1)
            self.signal("CONT", rank)
            until(lambda beat=beat: told() or self.rank().beat != beat, "it has beaten again")


@pytest.fixture(scope="module")
def journey(lab, tmp_path_factory):
    return Journey(lab, tmp_path_factory.mktemp("journey") / "run")


@pytest.mark.fault("scancel", "saves and stays cancelled; the same sbatch goes on from there")
def test_a_cancelled_job_stays_so_and_its_folder_is_whole(journey):
    leg = journey.cancelled
    assert leg.state == "CANCELLED" and leg.restarts == "0"
    assert f"stopped after step {leg.steps} of {STEPS}" in leg.printed
    assert leg.saved == leg.steps >= 2
    assert f"resumed after step {leg.saved} from" in journey.preempted.printed


@pytest.mark.fault("preemption by a job of a higher partition", "saves, is requeued, goes on")
def test_a_preempted_job_saves_and_goes_on_elsewhere(journey):
    leg, after = journey.preempted, journey.timed_out
    assert leg.state == "PENDING" and leg.saved == leg.steps > journey.cancelled.saved
    assert f"stopped after step {leg.steps} of {STEPS}" in leg.printed
    assert f"resumed after step {leg.saved} from" in after.printed
    assert not set(leg.nodes) & set(after.nodes)


@pytest.mark.fault("Slurm's time limit", "saves five minutes before it, is requeued, goes on")
def test_a_job_out_of_time_saves_and_goes_on(journey):
    leg = journey.timed_out
    assert leg.state == "PENDING" and leg.saved == leg.steps > journey.preempted.saved
    assert f"stopped after step {leg.steps} of {STEPS}" in leg.printed
    assert f"resumed after step {leg.saved} from" in journey.bereft.printed


@pytest.mark.fault("power cut of a node", "is requeued, goes on from the last checkpoint elsewhere")
def test_a_job_that_lost_a_node_goes_on_with_others(journey):
    leg = journey.bereft
    assert leg.state == "PENDING" and leg.steps > leg.saved == journey.timed_out.saved
    assert f"resumed after step {leg.saved} from" in journey.ended.printed
    assert leg.nodes[1] not in journey.ended.nodes


@pytest.mark.fault("SIGSTOP to a rank of another node", "is named; torchrun starts all ranks again")
def test_a_stopped_rank_of_another_node_is_named_and_the_job_goes_on(journey):
    leg = journey.ended
    assert f"{journey.stopped.label} wrote no heartbeat for 20 s" in leg.printed
    assert leg.printed.count(f"resumed after step {journey.bereft.saved} from") == 2


@pytest.mark.fault("all of these in one run", "the curve of one that nobody stopped")
def test_all_that_stopped_a_job_leaves_no_trace_in_its_curve(journey, whole):
    leg = journey.ended
    assert leg.state == "COMPLETED" and leg.restarts == "3" and leg.saved == STEPS
    assert curve(journey.out) == curve(whole)


@pytest.mark.fault("a start that always fails", "is requeued once, then fails for good")
def test_a_job_that_fails_twice_at_the_same_place_is_not_requeued_again(lab, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    job = lab.train(out, PET_LOG_DIR="/proc/none")  # torchrun can make no log folder
    job.started(1)
    assert job.ended() == "FAILED" and job.restarts == 1
    assert f"failed twice without a newer checkpoint (step_{STEPS:07d})" in job.printed()
    assert curve(out) == curve(whole)


@pytest.mark.fault("time runs out while a job still builds", "is requeued all the same, once")
def test_a_job_that_cannot_stop_in_time_is_requeued(lab, tmp_path):
    """Its rank 1 never comes back from the first call of its teacher."""
    out = tmp_path / "run"
    sleepy = {
        "teachers": "sleepy=python:sleepy_teacher:build",
        "teachers__sleepy__precision": "fp32",
    }
    words = ["--recipe", "quickstart", *options(out, **RUN | LOST | sleepy)]
    env = {"SLEEPY": "1:1", "PYTHONPATH": str(SUPPORT), "UNIC_DS_LATE": "3"}
    job = lab.submit(*SIZE, "slurm/unic_l_64gpu.sh", *words, **env)

    def met() -> set[str]:
        return {row.start for row in heartbeat.read_all(out) if row.rank == 1}

    job.waits(met, "its ranks have met")
    old = met()
    job.change(TimeLimit="5")
    job.waits(lambda: job.restarts == 1 and job.state == "PENDING", "it is requeued")
    assert "did not stop within 3 s" in job.printed() and not (out / "checkpoints").exists()
    job.change(TimeLimit="1440")
    job.started(1)
    job.waits(lambda: met() - old, "its ranks have met again")
    job.change(TimeLimit="5")
    given_up = "failed twice without a newer checkpoint (none yet); not requeued"
    job.waits(lambda: given_up in job.printed(), "it gives up")
    lab.run("scancel", job.number)


@pytest.mark.lengthy
@pytest.mark.fault("a run that its ranks refuse", "ends after one start, with the reason")
def test_a_job_that_would_end_so_again_is_not_tried_again(lab, whole, tmp_path):
    """Neither by torchrun, which starts the ranks of a failed node again, nor by a requeue."""
    images = tmp_path / "images"
    images.mkdir()
    for folder in sorted((demo.root() / demo.PARTS[0]).iterdir())[1:]:
        (images / folder.name).symlink_to(folder)
    # Fewer images than the checkpoint is of, which the ranks find out.
    job = lab.train(tmp_path / "run", "--resume", str(whole), "--data.train", str(images))
    assert job.ended() == "FAILED" and job.restarts == 0
    printed = job.printed()
    assert "it would end so again; not requeued" in printed
    assert printed.count("not tried again: ") == 2  # by each of torchrun's restarts
    told = json.loads((tmp_path / "run" / "events.jsonl").read_text())
    assert told["event"] == "refused" and told["job"] == f"{job.number}.0"
    assert told["says"] in printed


@pytest.mark.fault("a node whose GPUs do not come up", "is named; the job goes on without it")
def test_a_job_goes_on_without_a_node_whose_gpus_do_not_come_up(lab, whole, tmp_path):
    """Not tried again by torchrun; the requeued job leaves out what sbatch did, and this node."""
    out = tmp_path / "run"
    quick = ["--recipe", "quickstart", *options(out, **RUN)]
    job = lab.submit(*SIZE, "--exclude=n32", "slurm/unic_l_64gpu.sh", *quick)
    job.waits(lambda: job.state == "RUNNING", "it has nodes")
    dead = job.nodes[1]
    with lab.without_gpus(dead):  # the job is still being checked
        job.waits(lambda: job.restarts == 1 and job.state == "PENDING", "it is requeued")
        printed = job.printed()
        says = f"unic_ds: error: node {dead} should have GPUs (SLURM_GPUS_ON_NODE is 2)"
        assert printed.count(says) == 1
        assert f"requeued without {dead}" in printed
        left_out = lab.run("scontrol", "show", "hostnames", job.facts()["ExcNodeList"]).split()
        assert set(left_out) == {dead, "n32"}
        job.started(1)
        assert job.ended() == "COMPLETED" and dead not in job.nodes
    assert curve(out) == curve(whole)


@pytest.mark.lengthy
def test_a_finished_run_that_is_to_train_longer_is_planned_like_any_other(lab, whole, tmp_path):
    out, gpu = Path(shutil.copytree(whole, tmp_path / "run")), tmp_path / "tiny.yaml"
    gpu.write_text("memory_gb: 2\ntflops: 10\nmemory_gb_s: 100\nnode_gb_s: 10\nnet_gb_s: 1\n")
    longer = RUN | {"optim__steps": STEPS + 2, "run__extend": "true"}
    words = ["--recipe", "quickstart", *options(out, **longer)]
    printed = wrong(lab.submit(*SIZE, "slurm/unic_l_64gpu.sh", *words, UNIC_DS_GPU=str(gpu)))
    assert "does NOT fit" in printed and "nothing was trained" in printed
    assert curve(out) == curve(whole)


def test_a_plan_is_a_job_too(lab):
    job = lab.submit("slurm/plan.sh", "--recipe=quickstart", "--gpus=8")
    assert job.ended() == "COMPLETED" and "8 x h100-80" in job.printed(), job.printed()
    assert ": fits" in job.printed()


@pytest.mark.lengthy
def test_the_table_or_the_newest_encoder_of_a_run_can_be_had(lab, whole, tmp_path):
    job = lab.submit("slurm/eval.sh", str(whole))
    assert job.ended() == "COMPLETED" and "is finished" in job.printed()
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "results.json").unlink()
    job = lab.submit("slurm/eval.sh", str(out))
    assert job.ended() == "COMPLETED", job.printed()
    newest = out / "encoders" / f"step_{STEPS:07d}" / "model.safetensors"
    assert newest.read_bytes() == (whole / "student" / "model.safetensors").read_bytes()


@pytest.mark.lengthy
def test_models_are_compared_on_two_nodes(lab, whole, tmp_path):
    """Both nodes have a part of the images; the table is that of one node."""
    words = ["knn", "--models", f"{whole},pixels", "--eval.max_train", "60", "--eval.max_val", "30"]
    tables = []
    for nodes in (1, 2):
        size = [f"--nodes={nodes}", "--gpus-per-node=1", "--cpus-per-task=1"]
        cache = ["--eval.cache", str(tmp_path / f"cache{nodes}")]
        job = lab.submit(*size, "slurm/eval.sh", *words, *cache)
        assert job.ended() == "COMPLETED", job.printed()
        tables.append(job.printed().partition("Frozen features")[2])
    assert "knn k=10 T=0.07 cosine 60/30 images" in tables[0]
    assert tables[0] == tables[1]


@pytest.mark.lengthy
def test_torchrun_and_deepspeed_start_two_nodes_without_slurm(lab, whole, tmp_path):
    hosts = ("n31", "n32")
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    binaries = Path(sys.executable).parent
    launchers = {
        "torchrun": ["--nnodes=2", "--nproc-per-node=1", "--node-rank={}"],
        "deepspeed": [f"--hostfile={tmp_path / 'hosts'}", "--no_ssh", "--node_rank={}"],
    }
    for name, words in launchers.items():
        meet = [f"--master_addr={hosts[0]}", "--master_port=29517"]
        ends = [TRAIN, *options(tmp_path / name, **RUN, run__stop_at=3)]
        ranks = [
            lab.start(host, str(binaries / name), *(w.format(i) for w in words), *meet, *ends)
            for i, host in enumerate(hosts)
        ]
        for rank in ranks:
            printed, _ = rank.communicate(timeout=900)
            assert rank.returncode == 0, printed[-4000:]
    assert curve(tmp_path / "torchrun") == curve(tmp_path / "deepspeed")
    for step, row in curve(tmp_path / "torchrun").items():  # two ranks beside four
        assert row["loss"] == pytest.approx(curve(whole)[step]["loss"], rel=1e-5)
