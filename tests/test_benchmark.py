"""The list of commands, and the runner: it skips, resumes, names what failed, and survives the loss of a node."""

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import critics
import offline_critics
import pytest
import speed
import torch
import tyro
from conftest import ROOT, TASK

import benchmark
import o2o_sac
import o2o_td3

TINY = "--reevaluation-steps 4 --alignment-steps 4 --online-steps 8 --warm-up 4 --eval-every 4 --eval-every-updates 2"
TINY += " --eval-episodes 1 --batch-size 16 --no-compile"
OFFLINE = "--updates 4 --eval-every-updates 2 --eval-episodes 1 --batch-size 16 --no-compile"


def run(*words, expect=0, **environment):
    """`./benchmark.sh words` with this interpreter. -> what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(ROOT / "benchmark.sh"), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, **environment},
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def module_of(script):
    """The script of a command as a module."""
    return importlib.import_module(".".join(Path(script).with_suffix("").parts[-2:]) if "baselines/" in script
                                   else Path(script).stem)  # fmt: skip


def commands(log):
    return [shlex.split(line) for line in log.read_text().splitlines() if line.startswith("python ")]


@pytest.mark.parametrize("options", [(), ("--paper",), ("--pretrain", "--task", "walker2d-expert-v2")], ids=len)
def test_every_command_of_the_list_parses(options, tmp_path):
    *lines, total = run("--list", *options, "--results", tmp_path).splitlines()
    assert total.startswith(f"# {len(lines)} commands, 0 of them complete") and len(lines) > 50
    assert len({line.split(" --run-dir ")[0] for line in lines}) == len(lines), "two runs are the same"
    for line in lines:
        python, script, *argv = shlex.split(line)
        assert python == "python" and (ROOT / script).exists()
        tyro.cli(module_of(script).Args, args=argv)


def test_transfer_is_every_offline_policy_into_every_online_script():
    lines = run("--list", "--script", "transfer", "--seed", 1, "--pretrain").splitlines()[:-1]
    online, tasks = [line for line in lines if line.startswith("python o2o_")], (benchmark.HOPPER, benchmark.OTHERS[0])
    assert len(online) == 2 * 15 and len(lines) == 2 * (15 + len(benchmark.SOURCES)), "the diagonal is `full`"
    for line in online:
        script, source, task = re.match(r"python (\w+)\.py .*/(\w+)/([\w-]+)/\2/1/policy.pt", line).groups()
        assert source != benchmark.OWN[script] and f"/{task}/from-{source}/1" in line and task in tasks
    assert sum(f"/{task}/from-" in line for line in online for task in tasks[:1]) == 15
    shipped = [line for line in run("--list", "--script", "transfer", "--seed", 1).splitlines()[:-1]]
    for task in tasks:
        assert any(f"/{task}/" in line for line in shipped)
    assert all("offline/checkpoints/" in line and any(f"/{task}/" in line for task in tasks) for line in shipped)
    later = run("--list", "--script", "transfer", "--seed", 2).splitlines()[:-1]
    assert later and all(f"/{benchmark.HOPPER}/" in line for line in later)  # walker2d-medium: one seed


def test_filters():
    lines = run("--list", "--script", "o2o_td3", "o2o_ppo", "--variant", "full", "no-constrain", "--seed", 2, 7)
    assert "no command" in run("--index", 5000, expect=2)
    names = [line.split("--run-dir ")[1] for line in lines.splitlines() if line.startswith("python")]
    expected = []
    for script, variants in (("o2o_td3", ("full", "no-constrain")), ("o2o_ppo", ("full",))):
        expected += [f"{script}/{TASK}/{variant}/{seed}" for variant in variants for seed in (2, 7)]
        expected += [f"{script}/{task}/full/2" for task in benchmark.OTHERS]  # there three seeds of the method alone
    assert names == [f"runs/benchmark/{name}" for name in expected]
    lines = run("--list", "--script", "o2o_td3", "--task", benchmark.OTHERS[0]).splitlines()
    names, shipped = benchmark.EXPERIMENTS["o2o_td3"], benchmark.ROOT / "offline/checkpoints" / benchmark.OTHERS[0]
    able = [x for x in names if not x.startswith("from-") or (shipped / f"{x.removeprefix('from-')}.pt").exists()]
    assert {"full", "from-cql"} < set(able) and len(lines) - 1 == 5 * len(able)  # everything, on a task that is named
    assert "no command" in run("--script", "o2o_ppo", "--variant", "no-constrain", expect=2)


def test_the_default_list_starts_only_from_policies_that_ship():
    jobs = benchmark.all_jobs(benchmark.Args())
    assert {job.task for job in jobs} == {benchmark.HOPPER, *benchmark.OTHERS, *benchmark.MAZES, *benchmark.KITCHENS}
    for job in jobs:
        base = benchmark.base_of(Path(job.script).stem, job.variant if job.variant != "default" else "lapo")
        folder = ROOT / "offline/checkpoints" / job.task
        assert base is None or any((folder / f"{b}.pt").exists() for b in (base, base.removesuffix("_5"))), job
    everywhere = benchmark.all_jobs(benchmark.Args(pretrain=True, script=("o3f",), variant=("iql",), seed=(1,)))
    assert {job.task for job in everywhere} == {
        benchmark.HOPPER,
        *benchmark.OTHERS,
        *benchmark.MAZES,
        *benchmark.KITCHENS,
    }


# flags that the published runs had under other names, or whose default was filled in where it did not matter
RENAMED = {f"{old}_{part}": f"limit_{part}" for old in ("kl", "distance") for part in ("start", "end", "steps")}


def test_published_runs_used_the_listed_flags():
    """What stands in results/ was made with the settings that the list names."""
    jobs, found = benchmark.all_jobs(benchmark.Args()), 0
    for job in jobs:
        path = job.folder(ROOT / "results") / "args.json"
        if not path.exists():
            continue
        module = module_of(job.script)
        module = getattr(module, "sac", module)  # the study of critics takes the flags of o2o_sac.py
        listed = module.parse_args(["--env-id", job.task, "--seed", str(job.seed), *job.flags])
        published = json.loads(path.read_text())
        published["bf16"] = published.pop("matmul_precision", None) == "medium" or published.get("bf16", False)
        share = {"half": 0.5, "none": 0.0}.get(published.pop("offline_data", None), 0.5)
        published.setdefault("offline_fraction", share)
        for old, new in RENAMED.items():
            if old in published:
                published[new] = published.pop(old)
        for key, value in vars(listed).items():
            # None is filled in from the task or the checkpoint; with --reference best the interval is not used
            unused = (key == "reference_every" and listed.reference == "best") or key == "exp_name"
            unused = unused or (key == "online_steps" and "critics" in job.script)  # they never go online
            new = key not in published and value == getattr(module.Args, key)  # a flag that came later, at its default
            slow = key == "bf16" and not published[key]  # a CPU without units for it leaves it out
            if value is not None and not unused and not new and not slow:
                assert published[key] == value, f"{path}: {key}"
        found += 1
    assert found >= 39
    assert found == len(list((ROOT / "results").glob("*/*/*/*/args.json")))


def test_pretrains_for_each_seed_skips_what_is_complete_and_resumes_what_was_cut_off(tmp_path):
    words = ("--script", "o2o_td3", "--task", TASK, "--variant", "full", "--seed", 1, 2, "--pretrain", "--workers", 2)
    words += (f"--flags={TINY}", f"--offline-flags={OFFLINE}", "--results", tmp_path)
    run(*words)
    folder = tmp_path / "o2o_td3" / TASK / "full" / "2"
    args = json.loads((folder / "args.json").read_text())
    assert args["checkpoint"] == str(tmp_path / "td3_bc" / TASK / "td3_bc" / "2" / "policy.pt")
    whole = (folder / "metrics.jsonl").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    text = run(*words)
    assert "4 runs" in text and "3 of them complete already" in text
    first, second = commands(folder / "log.txt")
    assert "--resume" not in first and second[2:] == ["--resume", str(folder)]
    assert (folder / "metrics.jsonl").read_text() == whole
    assert len(commands(tmp_path / "o2o_td3" / TASK / "full" / "1" / "log.txt")) == 1
    assert "4 of them complete already" in run(*words)
    text = run(*words[:-1], tmp_path, "--cuda", expect=2)
    assert "4 runs in" in text and "other flags" in text and "--results" in text
    (folder / "log.txt").unlink()
    (folder / "log.txt").mkdir()  # a folder that cannot be written to fails that run alone
    (folder / "summary.json").unlink()
    assert "1 of 1 runs failed: o2o_td3 hopper-medium-v2 full 2" in run(*words, expect=1)


def test_a_run_that_fails_is_named(tmp_path):
    words = ("--script", "o2o_td3", "--task", TASK, "--variant", "full", "no-align", "--seed", 1)
    words += ("--results", tmp_path)
    text = run(*words, f"--flags={TINY} --offline-fraction nothing", expect=1)
    assert "2 of 2 runs failed: o2o_td3 hopper-medium-v2 full 1; o2o_td3 hopper-medium-v2 no-align 1" in text
    text = run(*words, "--pretrain", f"--flags={TINY}", f"--offline-flags={OFFLINE} --tau none", expect=1)
    assert "its offline policy did" in text and "3 of 3 runs failed" in text


def test_a_damaged_folder_stops_nothing_else(tmp_path):
    """A command that can't be read fails that run; a summary that can't be read is written anew by its run."""
    words = ("--script", "o2o_td3", "--task", TASK, "--variant", "full", "no-align", "--seed", 1)
    words += ("--pretrain", f"--offline-flags={OFFLINE}")  # a policy that falls at once: its evaluations are short
    first, second = (tmp_path / "o2o_td3" / TASK / name / "1" for name in ("full", "no-align"))
    for folder in (first, second):
        folder.mkdir(parents=True)
    (first / "args.json").write_text("{}")
    (first / "command.json").write_text("")
    (second / "summary.json").write_text('{"status": "compl')
    text = run(*words, f"--flags={TINY}", "--results", tmp_path, expect=1)
    assert f"{first / 'command.json'} is damaged; remove the folder" in text
    assert "1 of 3 runs failed: o2o_td3 hopper-medium-v2 full 1" in text
    assert f"warning: {second / 'summary.json'} is damaged" in text
    assert json.loads((second / "summary.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("name", speed.Args.updates)
def test_speed_makes_every_update_as_its_script_does(name):
    for update in speed.updates_of(name, compiled=False, bf16=False).values():
        update()


def test_slurm_submits_arrays_whose_tasks_run_the_list(tmp_path):
    subprocess.run(["bash", "-n", ROOT / "benchmark/slurm.sh"], check=True)
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/calls\necho "77;cluster"\n')
    sbatch.chmod(0o755)
    words = ("--script", "o2o_td3", "--task", TASK, "--variant", "full", "--seed", 1, 2, "--pretrain")
    words += ("--results", tmp_path / "runs", f"--flags={TINY}", f"--offline-flags={OFFLINE}")
    run(
        *words,
        "--engine",
        "slurm",
        PATH=f"{sbatch.parent}{os.pathsep}{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    offline, online = [line.split(" benchmark/slurm.sh ") for line in (tmp_path / "calls").read_text().splitlines()]
    assert offline[0] == "--parsable --array=0,1"
    assert online[0] == "--parsable --array=2,3 --dependency=afterany:77"
    # what the cluster would do with the second task of each array; the flags reach the script as they were given
    chosen = {"script": ("o2o_td3",), "task": (TASK,), "variant": ("full",), "seed": (1, 2), "pretrain": True}
    job = benchmark.all_jobs(benchmark.Args(**chosen))[3]
    chosen |= {"results": tmp_path / "runs", "flags": TINY, "offline_flags": OFFLINE}
    passed = benchmark.again(benchmark.Args(**chosen))
    assert online[1] == " ".join(passed)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for index in ("1", "3"):
        environment = {**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": index}
        subprocess.run(["bash", "benchmark/slurm.sh", *passed], cwd=ROOT, env=environment, check=True)
    assert job.complete(tmp_path / "runs")
    assert not (tmp_path / "runs/o2o_td3" / TASK / "full" / "1").exists()


def descendants(pid):
    """{pid: command line} of everything that this process started."""
    parents, lines = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            lines[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    family = {pid}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return {child: lines[child] for child in family - {pid}}


@pytest.mark.skipif("O2O_TEST_RAY" not in os.environ, reason="takes minutes, and Linux: set O2O_TEST_RAY to run it")
def test_ray_goes_on_after_a_node_was_killed(tmp_path):
    """Two nodes of one CPU each, four runs. The second node dies in the middle of a run; all runs are complete in the
    end, that one by --resume on the first node."""
    pytest.importorskip("ray", reason="needs requirements-cluster.txt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    sockets = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of Unix sockets must be short
    environment = {**os.environ, "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    start = [Path(sys.executable).parent / "ray", "start", "--num-cpus=1", "--block"]
    head = [*start, "--head", f"--port={address.split(':')[1]}", f"--temp-dir={sockets}", "--include-dashboard=false"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    nodes = [subprocess.Popen(head, **quiet)]
    try:
        limit = time.time() + 60
        while subprocess.run([start[0], "status", "--address", address], **quiet, check=False).returncode:
            assert time.time() < limit, "Ray did not start"
            time.sleep(0.5)
        nodes.append(subprocess.Popen([*start, f"--address={address}"], **quiet))
        long = f"{TINY} --online-steps 600 --eval-every 100"
        words = ["--script", "o2o_td3", "--task", TASK, "--variant", "full", "no-align", "--seed", "1", "2"]
        words = [sys.executable, "benchmark/benchmark.py", *words, "--engine", "ray", "--results", str(tmp_path)]
        output = {"env": environment | {"RAY_ADDRESS": address}, "stderr": subprocess.STDOUT}
        with open(tmp_path / "driver.txt", "w") as log:
            driver = subprocess.Popen([*words, f"--flags={long}"], cwd=ROOT, stdout=log, **output)
        victim, limit = None, time.time() + 300
        while victim is None:
            assert time.time() < limit and driver.poll() is None, (tmp_path / "driver.txt").read_text()
            time.sleep(0.1)
            for line in descendants(nodes[1].pid).values():
                folder = Path(line.split("--run-dir ")[1].split()[0]) if "o2o_td3.py" in line else None
                if folder and (folder / "resume.pt").exists() and "running" in (folder / "summary.json").read_text():
                    victim = folder
        raylets = [pid for pid, line in descendants(nodes[1].pid).items() if "raylet/raylet" in line]
        assert len(raylets) == 1
        os.kill(raylets[0], signal.SIGKILL)
        assert driver.wait(400) == 0, (tmp_path / "driver.txt").read_text()
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(30)
        shutil.rmtree(sockets, ignore_errors=True)
    first, *later = commands(victim / "log.txt")
    assert "--resume" not in first and later and all("--resume" in command for command in later)
    folders = sorted(tmp_path.glob(f"o2o_td3/{TASK}/*/*"))
    assert len(folders) == 4
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        steps = [step for step, _ in summary["scores"]]
        assert summary["status"] == "complete" and steps == list(range(100, 601, 100))


def test_study_of_critics(checkpoint, tmp_path):
    """Stage 1 is shared; the fixed critic stays as stage 1 left it, the other two move, and every actor moves."""
    settings = {"reevaluation_steps": 4, "alignment_steps": 4, "eval_every_updates": 2, "eval_episodes": 1}
    settings |= {"batch_size": 16, "compile": False, "checkpoint": str(checkpoint), "run_dir": str(tmp_path / "run")}
    critics.main(o2o_sac.Args(**settings))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = ("reevaluate", "fixed", "iterated", "aligned")
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, step) for stage in stages for step in (2, 4)]
    assert all(f"{row['stage']}/score" in row for row in rows[2:])
    nets = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["nets"]

    def same(a, b):
        return all(torch.equal(nets[a][key], nets[b][key]) for key in nets[a])

    assert not same("critics", "targets")  # the anchor of the alignment is their Polyak average
    for name in ("critics_iterated", "critics_aligned"):
        assert not same(name, "critics")
    actors = ("offline", "actor_fixed", "actor_iterated", "actor_aligned")
    assert not any(same(a, b) for a, b in itertools.combinations(actors, 2))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "complete"


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2), (["o3f", "run"], 2)])
def test_offline_critics_say_how_they_are_called(words, code, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["offline_critics.py", *words])
    with pytest.raises(SystemExit) as stop:
        offline_critics.main()
    out, err = capsys.readouterr()
    assert stop.value.code == code and (err if code else out).startswith("usage: ") and not (out if code else err)


@pytest.mark.parametrize(("name", "source"), offline_critics.SOURCES.items())
def test_study_of_the_offline_methods_critics(name, source, tmp_path, monkeypatch, capsys):
    """They enter the run as the offline run left them, with its statistics and without layer norm."""
    few = ["--env-id", TASK, "--eval-episodes", "1", "--batch-size", "16", "--no-compile"]
    few += ["--eval-every-updates", "2"]
    offline = importlib.import_module(source)
    words = ["--updates", "4", "--run-dir", str(tmp_path / "off"), "--output", str(tmp_path / "off" / "policy.pt")]
    offline.main(offline.parse_args([*few, *words]))
    run = ["--no-align", "--online-steps", "0", "--run-dir", str(tmp_path / "on")]
    monkeypatch.setattr(sys, "argv", ["offline_critics.py", name, str(tmp_path / "off"), *few, *run])
    offline_critics.main()
    nets = [torch.load(tmp_path / run / "resume.pt", weights_only=True)["nets"] for run in ("off", "on")]
    assert nets[0]["critics"].keys() == nets[1]["critics"].keys() and "net.0.weight" in nets[0]["critics"]
    assert all(torch.equal(nets[0]["critics"][key], nets[1]["critics"][key]) for key in nets[0]["critics"])
    assert json.loads((tmp_path / "on" / "args.json").read_text())["reevaluate"] is False
    monkeypatch.setattr(sys, "argv", ["offline_critics.py", name, str(tmp_path), *few])
    with pytest.raises(SystemExit) as stop:
        offline_critics.main()
    assert stop.value.code == 2 and "resume.pt is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--workers", "0"), "--workers"),
        (("--flags=--gamma '0.9",), "as a shell reads them"),
        (("--task", "../../outside"), "no name of a task"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_what_a_user_mistypes_is_a_sentence(words, says, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmark/benchmark.py", "--list", *words, "--results", tmp_path / "runs"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_the_list_works_whatever_lies_in_the_folders(tmp_path):
    for seed, content in enumerate(["", "{}", "[]", "null", '{"status": "compl'], start=1):
        folder = tmp_path / "o2o_td3" / TASK / "full" / str(seed)
        folder.mkdir(parents=True)
        for name in ("summary.json", "command.json"):
            (folder / name).write_text(content)
    text = run("--list", "--script", "o2o_td3", "--task", TASK, "--variant", "full", "--results", tmp_path)
    assert "5 commands, 0 of them complete" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_workers_at_once(checkpoints, tmp_path, number):
    """Sent to the benchmark alone, as a scheduler does, and to one that a shell started in the background: the runs end
    with it, with summaries; nothing new starts."""
    words = ("--script", "o2o_td3", "--task", TASK, "--variant", "full", "--seed", "1", "2", "--results", str(tmp_path))
    flags = TINY.replace("--online-steps 8", "--online-steps 100000")
    words += (f"--flags={flags} --checkpoint {checkpoints[o2o_td3]}",)  # the shipped policy hops for long
    command = [sys.executable, str(ROOT / "benchmark/benchmark.py"), *words]
    background = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **background)
    first, second = (tmp_path / "o2o_td3" / TASK / "full" / seed for seed in ("1", "2"))
    deadline = time.time() + 120
    try:
        while not (first / "resume.pt").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()  # its run would go on for hours
    assert json.loads((first / "summary.json").read_text())["status"] == "interrupted"
    assert not (second / "args.json").exists()
