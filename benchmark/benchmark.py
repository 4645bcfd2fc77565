"""Every command behind the published numbers, and a runner for them: on this machine, on Ray or on Slurm.

    ./benchmark.sh --list                                    # print the commands and their number, run nothing
    ./benchmark.sh --script o2o_td3 --seed 1 2 --workers 2   # run a part of them, two at once
    ./benchmark.sh --pretrain --task walker2d-medium-v2      # pre-train a policy for each seed, then fine-tune it
    ./benchmark.sh --engine ray --cuda --gpus 0.25           # on the Ray cluster at RAY_ADDRESS
    ./benchmark.sh --engine slurm                            # as one array job

A run is a folder RESULTS/<script>/<task>/<variant>/<seed>. One whose summary.json says `complete` is skipped, one that
was cut off is resumed, so the same command goes on after any interruption. A run that fails, or whose folder is
damaged, is named at the end (exit code 1); the others go on. `python benchmark/report.py RESULTS` makes the tables.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parents[1]
HOPPER = "hopper-medium-v2"
OTHERS = ("walker2d-medium-v2", "halfcheetah-medium-v2", "hopper-medium-replay-v2")  # the methods alone, three seeds
WALKER = {"o2o_td3": ("no-align", "interval"), "o2o_sac": ("interval",), "o2o_ppo": ("no-align", "interval")}  # too
FAST = "--bf16"  # the published runs, except those of the default commands
# What the published runs used, and the papers' budgets (--paper)
SAC = "--reevaluation-steps 100000 --alignment-steps 15000 --eval-every 500 --eval-every-updates 2500"
TD3 = "--reevaluation-steps 100000 --alignment-steps 50000 --eval-every 1000 --eval-every-updates 5000"
PPO = "--reevaluation-steps 50000 --online-steps 250000 --eval-every 2500 --eval-every-updates 5000"
LAPO = "--online-steps 20000 --eval-every 1000 --updates-per-step 1"  # the paper: 20 updates a step
IQL = "--online-steps 50000 --eval-every 1000"
CAL_QL = "--offline-steps 50000 --online-steps 50000 --eval-every 1000 --cql-actions 4 --bf16"  # the paper: 10 actions
PAPER = {  # by script, by the offline algorithm
    "o2o_sac": "--reevaluation-steps 500000 --alignment-steps 500000 --online-steps 100000",
    "o2o_td3": "--reevaluation-steps 500000 --alignment-steps 500000 --online-steps 100000",
    "o2o_ppo": "--reevaluation-steps 1000000 --online-steps 250000",
    "o3f": "--online-steps 100000 --eval-every 1000",
    "critics": "--reevaluation-steps 500000 --alignment-steps 500000",
    "baselines/rlpd": "--online-steps 250000 --updates-per-step 20",
    "baselines/wsrl": "--offline-steps 250000 --cql-actions 10 --online-steps 500000",
    "baselines/cal_ql": "--offline-steps 1000000 --online-steps 1000000",
    "baselines/iql": "--online-steps 1000000",
    "baselines/pex": "--online-steps 1000000",
    "baselines/awac": "--offline-steps 1000000 --online-steps 1000000",
    "baselines/proto": "--online-steps 1000000",
    "baselines/aca": "--offline-steps 500000 --online-steps 100000",
    "baselines/off2on": "--offline-steps 1000000 --cql-actions 10 --online-steps 250000",
    "lapo": "--updates-per-step 20",
}
NAIVE = "--no-reevaluate --no-align --no-constrain"  # the online algorithm as it is, from the offline policy
ABLATIONS = {"full": "", "no-reevaluate": "--no-reevaluate", "no-align": "--no-align", "no-constrain": "--no-constrain"}
OPTIMISM = {"": "", "-omega-1": "--omega 1", "-noise": "--no-optimism"}
EXPERIMENTS = {  # script: {variant: flags}
    "o2o_sac": {
        **{variant: f"{SAC} --online-steps 4000 {FAST} {flag}" for variant, flag in ABLATIONS.items()},
        "naive": f"{SAC} --online-steps 4000 {FAST} {NAIVE}",
        "full-8000": f"{SAC} --online-steps 8000 {FAST}",
        "interval": f"{SAC} --online-steps 8000 {FAST} --reference interval",
    },
    "o2o_td3": {
        **{variant: f"{TD3} --online-steps 50000 {FAST} {flag}" for variant, flag in ABLATIONS.items()},
        "naive": f"{TD3} --online-steps 50000 {FAST} {NAIVE}",
        "interval": f"{TD3} --online-steps 50000 {FAST} --reference interval",
    },
    "o2o_ppo": {
        **{variant: f"{PPO} {FAST} {ABLATIONS[variant]}" for variant in ("full", "no-reevaluate", "no-align")},
        "naive": f"{PPO} {FAST} --no-reevaluate --no-align",
        "interval": f"{PPO} {FAST} --reference interval",
    },
    "o3f": {
        **{f"lapo{name}": f"--base lapo {LAPO} {FAST} {flag}" for name, flag in OPTIMISM.items()},
        **{f"iql{name}": f"--base iql {IQL} {FAST} {flag}" for name, flag in OPTIMISM.items()},
    },
}
SOURCES = ("bc", "cql", "td3_bc", "iql", "lapo", "dt")  # offline policies, each to be fine-tuned by each online script
TRANSFER = {"o2o_sac": f"{SAC} --online-steps 8000", "o2o_td3": f"{TD3} --online-steps 50000", "o2o_ppo": PPO}
BASELINES = ("rlpd", "wsrl", "cal_ql", "iql", "pex", "awac", "proto", "aca", "off2on")  # in baselines/
EXPERIMENTS |= {
    "rlpd": {"full": f"--online-steps 50000 --eval-every 1000 {FAST}"},
    "wsrl": {"full": f"--offline-steps 10000 --online-steps 20000 --eval-every 1000 {FAST}"},
    "cal_ql": {"full": CAL_QL, "no-calibrate": f"{CAL_QL} --no-calibrate"},
    "iql": {"full": f"--online-steps 50000 --eval-every 1000 {FAST}"},
    "pex": {"full": f"--online-steps 50000 --eval-every 1000 {FAST}"},
    "awac": {"full": f"--offline-steps 100000 --online-steps 50000 --eval-every 1000 {FAST}"},
    "proto": {
        "full": f"--offline-steps 100000 --online-steps 50000 --eval-every 1000 {FAST}",
        "td3": f"--offline-steps 100000 --online-steps 50000 --eval-every 1000 {FAST} --td3",
    },
    "aca": {"full": f"--offline-steps 100000 --online-steps 50000 --eval-every 1000 {FAST}"},
    "off2on": {"full": f"--offline-steps 5000 --online-steps 20000 --eval-every 1000 {FAST}"},
}
MAZES = ("antmaze-umaze-v2", "antmaze-umaze-diverse-v2")  # one seed
MAZE_EXPERIMENTS = {script: {"full": FAST} for script in ("o2o_td3", "o2o_ppo", "iql")}  # by the scripts' settings
MAZE = f"--base iql --online-steps 25000 {FAST}"
MAZE_EXPERIMENTS["o3f"] = {"iql": MAZE, "iql-noise": f"{MAZE} --no-optimism"}
KITCHENS = ("kitchen-complete-v0",)  # one seed
KITCHEN = f"--base iql --online-steps 20000 --eval-every 2000 {FAST}"
KITCHEN_EXPERIMENTS = {"o3f": {"iql": KITCHEN, "iql-noise": f"{KITCHEN} --no-optimism"}}
EXPERIMENTS["critics"] = {"study": f"{SAC} --eval-every-updates 1000 {FAST}"}  # benchmark/critics.py
# One seed each, on hopper-medium-v2: the default commands as they stand, and how budget and alpha change alignment
DEFAULTS = ("o2o_sac", "o2o_td3", "o2o_ppo")
STUDIES = {
    f"alignment-{n}": f"{SAC} --alignment-steps {n} --online-steps 4000 {FAST}"
    for n in (25_000, 50_000, 100_000, 200_000)
}
STUDIES |= {f"alpha-{a}": f"{SAC} --online-steps 0 {FAST} --alpha {a}" for a in (0.05, 0.1, 0.5, 1.0)}  # 0.2 is `full`
PRETRAINING = {  # the offline algorithm that a fine-tuning run starts from: script, published budget
    "cql": ("cql", "--updates 100000"),
    "td3_bc": ("td3_bc", "--updates 200000"),
    "iql": ("iql", "--updates 200000"),
    "iql_5": ("iql", "--updates 200000 --num-critics 5"),
    "lapo": ("lapo", "--updates 100000"),
    "bc": ("bc", "--updates 20000"),
    "dt": ("dt", "--updates 20000"),
}
OWN = {"o2o_sac": "cql", "o2o_td3": "td3_bc", "o2o_ppo": "iql"}  # the offline policy of the script's own class
for online, budget in TRANSFER.items():  # what starts from `OWN` is `full`, or `full-8000`
    EXPERIMENTS[online] |= {f"from-{source}": f"{budget} {FAST}" for source in SOURCES if source != OWN[online]}


Baseline = Literal["rlpd", "wsrl", "cal_ql", "iql", "pex", "awac", "proto", "aca", "off2on"]
Script = Literal["o2o_sac", "o2o_td3", "o2o_ppo", "o3f", Baseline, "critics", "transfer"]


@dataclass
class Args:
    list: bool = False  # print the commands and their number, run nothing
    # only these; none named: all. `transfer`: from each offline policy, to each of o2o_sac, o2o_td3, o2o_ppo
    script: tuple[Script, ...] = ()
    task: tuple[str, ...] = ()  # all variants on these tasks; none named: the published runs, from policies that ship
    variant: tuple[str, ...] = ()  # only these: full, no-align, ... as --list shows them
    seed: tuple[int, ...] = (1, 2, 3, 4, 5)  # these seeds
    paper: bool = False  # the papers' budgets instead of the published ones
    pretrain: bool = False  # pre-train an offline policy for each seed first, instead of taking the shipped one
    results: Path = Path("runs/benchmark")  # folder of all runs; on a cluster one that every node sees
    cuda: bool = False  # pass --cuda to every run
    flags: str = ""  # more flags for every fine-tuning run: --flags="--online-steps 1000"
    offline_flags: str = ""  # more flags for every pre-training run
    engine: Literal["local", "ray", "slurm"] = "local"  # where the runs take place
    workers: int = 1  # local: runs at once, one thread each
    cpus: int = 1  # Ray: CPUs that a run takes
    gpus: float = 0.0  # Ray: fraction of a GPU that a run takes
    index: int | None = None  # run this command of the list alone, counted from 0; the clusters use it


class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


@cache
def warn(text):
    """Once for each text."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def read_json(path):
    """-> the dictionary in a file; None if there is no file, or no dictionary in it, which one line says."""
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        warn(f"{path} is damaged (it holds no dictionary)")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        warn(f"{path} is damaged ({error})")
    return None


class Job(NamedTuple):
    """One run: the command is `python script --env-id task --seed seed flags`, plus its folder and its policy."""

    script: str  # path from the root
    task: str
    variant: str
    seed: int
    flags: tuple[str, ...]
    policy: "Job | None" = None  # the pre-training run whose policy.pt it starts from; None: the shipped one

    def folder(self, results):
        return results / Path(self.script).stem / self.task / self.variant / str(self.seed)

    def complete(self, results):
        return (read_json(self.folder(results) / "summary.json") or {}).get("status") == "complete"

    def conflicts(self, results):
        """Whether the folder holds a run that began with other flags, or from another policy."""
        stored = read_json(self.folder(results) / "command.json")
        return stored is not None and (self.folder(results) / "args.json").exists() and stored != self.settings()

    def settings(self):
        return {"flags": list(self.flags), "policy": self.policy and self.policy.settings()}

    def command(self, results):
        folder = self.folder(results)
        files = ["--checkpoint", str(self.policy.folder(results) / "policy.pt")] if self.policy else []
        files += ["--run-dir", str(folder)]
        if self.script.startswith("offline/"):
            files += ["--output", str(folder / "policy.pt"), "--overwrite"]
        return ["python", self.script, "--env-id", self.task, "--seed", str(self.seed), *self.flags, *files]

    def __str__(self):
        return f"{Path(self.script).stem} {self.task} {self.variant} {self.seed}"


def base_of(script, variant):
    """The entry of PRETRAINING that a run starts from; None: from nothing."""
    if script in ("rlpd", "wsrl", "cal_ql", "awac", "proto", "aca", "off2on"):
        return None
    if variant.startswith("from-"):
        return variant.removeprefix("from-")
    return (OWN | {"critics": "cql", "iql": "iql", "pex": "iql"}).get(script) or (
        "iql_5" if variant.startswith("iql") else "lapo"
    )


def all_jobs(args):
    """The list, in a fixed order: pre-training first, then fine-tuning."""
    cuda, fine_tuning, pretraining = ["--cuda"] * args.cuda, [], {}

    def add(script, task, variant, seed, flags):
        policy, base, transfer = None, base_of(script, variant), variant.startswith("from-")
        chosen = not args.script or script in args.script or (transfer and "transfer" in args.script)
        if not chosen or (args.variant and variant not in args.variant):
            return
        folder = "benchmark/" if script == "critics" else "baselines/" if script in BASELINES else ""
        path = f"{folder}{script}.py"
        if args.paper and variant == "full-8000":
            return  # the budget is the paper's, so it is `full` again
        paper = [
            *PAPER[path.removesuffix(".py").removeprefix("benchmark/")].split(),
            *(PAPER.get(base, "").split() if script == "o3f" else ()),
        ]
        words = [*flags.split(), *(paper if args.paper else ()), *cuda, *shlex.split(args.flags)]
        if args.pretrain and base:
            name, budget = PRETRAINING[base]
            offline = [*budget.split(), *FAST.split(), *(["--updates", "1000000"] if args.paper else ()), *cuda]
            offline += shlex.split(args.offline_flags)
            policy = Job(f"offline/{name}.py", task, base, seed, last_of_each(offline))
            pretraining[policy] = None  # a dict keeps the order and drops what several variants share
        elif transfer:
            words += ["--checkpoint", f"offline/checkpoints/{task}/{base}.pt"]
        fine_tuning.append(Job(path, task, variant, seed, last_of_each(words), policy))

    for script, variants in EXPERIMENTS.items():
        for task in args.task or (HOPPER, *OTHERS, *MAZES, *KITCHENS):
            short = not args.task and task != HOPPER
            own = {"antmaze": MAZE_EXPERIMENTS, "kitchen": KITCHEN_EXPERIMENTS}.get(task.split("-")[0])
            for variant, flags in (variants if own is None else own.get(script, {})).items():
                base = base_of(script, variant)
                folder = ROOT / "offline/checkpoints" / task  # o3f.py takes two critics where there are no five
                ships = base is None or any((folder / f"{b}.pt").exists() for b in (base, base.removesuffix("_5")))
                transfer = variant.startswith("from-")
                if (short or transfer) and not ships and not args.pretrain:
                    continue
                for seed in args.seed:
                    walker = task == OTHERS[0] and (variant in WALKER.get(script, ()) or (transfer and seed == 1))
                    published = variant in ("full", "full-8000", "iql") or walker
                    if not short or (seed == 1 if own else seed <= 3 and published):
                        add(script, task, variant, seed, flags)
        if HOPPER in (args.task or (HOPPER,)) and 1 in args.seed and not args.paper:
            if script in DEFAULTS:
                add(script, HOPPER, "default", 1, "")
                add(script, HOPPER, "default-interval", 1, "--reference interval")
            for variant, flags in STUDIES.items() if script == "o2o_sac" else ():
                add(script, HOPPER, variant, 1, flags)
    return [*pretraining, *fine_tuning]


def last_of_each(words):
    """Flags without those that a later one overrides, so that the printed command says each thing once."""
    flags, groups = [], {}
    for word in words:
        if word.startswith("--"):
            flags = groups[word] = []
            continue
        flags.append(word)
    return tuple(word for flag, values in groups.items() for word in (flag, *values))


@contextmanager
def locked(path):
    """Waits for whoever holds the lock of this file, on this machine or on another that shares the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


RUNNING = set()  # processes of `call`


def call(command, log):
    """Runs a command of the list with its output in `log`. -> its exit code. It ends with whoever called it."""
    keeper = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    environment = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **os.environ}
    with open(log, "a") as file:
        print(shlex.join(command), file=file, flush=True)
        words = [*keeper, sys.executable, *command[1:]]
        with subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT) as process:
            RUNNING.add(process)
            try:
                return process.wait()
            finally:
                RUNNING.discard(process)


def run_job(job, results):
    """Runs or resumes one run, after its dataset was made if there is none. -> whether it is complete."""
    from minari.storage.datasets_root_dir import get_dataset_path

    folder, start = job.folder(results), time.time()
    with locked(folder / ".benchmark.lock"):
        if job.complete(results):
            print(f"{job}: complete already", flush=True)
            return True
        settings, started = folder / "command.json", (folder / "args.json").exists()
        if started and settings.exists() and read_json(settings) is None:
            print(f"{job}: FAILED, {settings} is damaged; remove the folder to start this run anew", flush=True)
            return False
        temporary = settings.with_suffix(".tmp")
        temporary.write_text(json.dumps(job.settings(), indent=1))
        os.replace(temporary, settings)
        log, data = folder / "log.txt", get_dataset_path(f"o2o/{job.task}")
        if not any(word.split("=")[0] == "--dataset" for word in job.flags):
            with locked(data.parent / f".{job.task}.lock"):
                if not data.exists() and call(["python", "offline/collect.py", "--env-id", job.task], log):
                    print(f"{job}: FAILED, no dataset; see {log}", flush=True)
                    return False
        code = call(["python", job.script, "--resume", str(folder)] if started else job.command(results), log)
        outcome = "complete" if not code and job.complete(results) else f"FAILED with exit code {code}; see {log}"
        print(f"{job}: {outcome}, {(time.time() - start) / 60:.1f} min", flush=True)
        return outcome == "complete"


def run_local(jobs, args):
    """-> {job: whether it is complete}. A job waits for its policy, which stands before it in the queue."""
    futures = {}

    def work(job):
        if job.policy in futures and not futures[job.policy].result():
            print(f"{job}: FAILED, its offline policy did", flush=True)
            return False
        try:
            return run_job(job, args.results)
        except (OSError, ValueError) as error:  # the disk, or a damaged file in the folder: the other runs go on
            print(f"{job}: FAILED, {error}", flush=True)
            return False

    with ThreadPoolExecutor(args.workers) as pool:
        try:
            for job in jobs:
                futures[job] = pool.submit(work, job)
            return {job: future.result() for job, future in futures.items()}
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                process.terminate()  # a run then saves its summary and ends
            raise


def run_ray(jobs, args):
    """The same on a Ray cluster: each job is a task that runs command number i of the list, in the copy of this project
    that `ray job submit --working-dir .` made on the node, else in this folder, which every node must see. A task whose
    node dies is tried again elsewhere, and resumes the run."""
    import ray

    passed = {key: os.environ[key] for key in ("MINARI_DATASETS_PATH", "WANDB_API_KEY") if key in os.environ}
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # then the variables came with the job
    ray.init(runtime_env=None if submitted else {"env_vars": passed})

    @ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=-1)
    def remote(words, *policy):
        if not all(policy):
            return False
        keeper = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        folder = Path.cwd() if Path("benchmark/benchmark.py").exists() else ROOT
        command = [*keeper, sys.executable, "benchmark/benchmark.py", *words]
        return subprocess.run(command, cwd=folder, check=False).returncode == 0

    everything, futures = all_jobs(args), {}
    for job in jobs:
        needs = [futures[job.policy]] if job.policy in futures else []
        futures[job] = remote.remote(again(args, everything.index(job)), *needs)
    outcome = {}
    for job, future in futures.items():
        try:
            outcome[job] = ray.get(future)
        except ray.exceptions.RayError as error:  # the other runs go on
            print(f"{job}: FAILED, {error}", flush=True)
            outcome[job] = False
    return outcome


def run_slurm(jobs, args):
    """Submits benchmark/slurm.sh as an array job over the incomplete commands of the list, pre-training first. sbatch
    answers with the id of the job; squeue and the logs tell the rest."""
    everything, after = all_jobs(args), []
    for offline in (True, False):
        stage = [everything.index(job) for job in jobs if job.script.startswith("offline/") == offline]
        if not stage:
            continue
        array = ",".join(map(str, stage))
        words = ["sbatch", "--parsable", f"--array={array}", *after, "benchmark/slurm.sh", *again(args)]
        identity = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        # after any: a run whose policy is missing says so itself, the others go on
        after = [f"--dependency=afterany:{identity.split(';')[0]}"]
        print(f"{identity}: {len(stage)} runs")


def again(args, index=None):
    """The flags that make the same list elsewhere, and choose command `index` of it."""
    words = ["--results", str(args.results.resolve()), f"--flags={args.flags}", f"--offline-flags={args.offline_flags}"]
    for key in ("script", "task", "variant", "seed"):
        values = getattr(args, key)
        words += [f"--{key}", *map(str, values)] if values else []
    words += [f"--{key}" for key in ("paper", "pretrain", "cuda") if getattr(args, key)]
    return words + (["--index", str(index)] if index is not None else [])


def main(args: Args):
    try:
        shlex.split(args.flags), shlex.split(args.offline_flags)
    except ValueError as error:
        raise UserError(f"--flags and --offline-flags have to be words as a shell reads them ({error})") from error
    if args.workers < 1 or args.cpus < 1 or args.gpus < 0 or min((0, *args.seed)) < 0:
        raise UserError("--workers and --cpus have to be 1 or more, --gpus and --seed 0 or more")
    if wrong := [task for task in args.task if not re.fullmatch(r"[\w-]+", task)]:
        raise UserError(f"'{wrong[0]}' is no name of a task")
    results = args.results.resolve()
    os.chdir(ROOT)  # where the commands are run; no path in what they write depends on where that is
    args.results = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
    jobs = all_jobs(args)
    if args.index is not None:
        jobs = jobs[args.index : args.index + 1]
    if not jobs:
        raise UserError("no command of the list has this script, task, variant and seed; see ./benchmark.sh --list")
    complete = sum(job.complete(args.results) for job in jobs)
    if args.list:
        for job in jobs:
            print(shlex.join(job.command(args.results)))
        print(f"# {len(jobs)} commands, {complete} of them complete in {args.results}")
        return
    if conflicts := [str(job) for job in jobs if job.conflicts(args.results)]:
        text = f"{len(conflicts)} runs in {args.results} were made with other flags, {conflicts[0]} for one"
        raise UserError(f"{text}; name another folder with --results")
    if args.index is None:
        print(f"{len(jobs)} runs in {args.results}, {complete} of them complete already", flush=True)
        jobs = [job for job in jobs if not job.complete(args.results)]
    if args.engine == "slurm":
        return run_slurm(jobs, args)
    outcome = run_ray(jobs, args) if args.engine == "ray" else run_local(jobs, args)
    failed = [str(job) for job, good in outcome.items() if not good]
    if failed:
        sys.exit(f"error: {len(failed)} of {len(outcome)} runs failed: " + "; ".join(failed))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs would ignore the former
        signal.signal(number, signal.default_int_handler)
    try:
        main(tyro.cli(Args, description=__doc__.splitlines()[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
