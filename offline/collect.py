"""Makes the datasets behind the D4RL task names, on this machine, without a download.

    python offline/collect.py --env-id hopper-medium-v2  # makes `o2o/hopper-medium-v2` in the local Minari store
    python offline/collect.py --env-id hopper-medium-v2 --train  # trains the behaviour policies, by behaviour.py
    python offline/collect.py --env-id antmaze-umaze-v2  # AntMaze, by its sibling collect_antmaze.py; so too Kitchen

D4RL's protocol (Fu et al. 2020, arXiv 2004.07219) on gymnasium's v5 environments:
  random          uniform actions
  medium          a SAC policy stopped at about a third of expert performance, sampled
  expert          the best policy of the same SAC run, sampled
  medium-replay   what SAC saw on its way to medium: here a ladder of its snapshots, sampled for the share of steps
                  that training spent around each (D4RL stores the replay buffer; a ladder is small enough to ship)
  medium-expert   half medium, half expert
The names are D4RL's, the files are not: scores on these data are not comparable with D4RL's tables.

A dataset carries its world: flat float32 observations, actions in [-1, 1], the environment to be made, and the returns
that make 0 and 100 points.
"""

import difflib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-v2"  # task: {hopper,walker2d,halfcheetah}-..., antmaze-..., kitchen-...
    seed: int = 1  # the only seed: start states and action noise derive from it
    num_steps: int | None = None  # transitions; None: 1,000,000, for medium-replay as many as SAC took to medium
    num_envs: int = 64  # episodes rolled out at once, with one policy call for all
    behaviour: str | None = None  # file of behaviour policies; None: offline/checkpoints/behaviour/<env>.pt
    overwrite: bool = False  # replace the dataset if it exists
    train: bool = False  # train the behaviour policies of the environment instead, by offline/behaviour.py


# D4RL's names: environment, and the two returns that make 0 and 100 points (D4RL's, measured on its own environments)
ENVS = {
    "hopper": ("Hopper-v5", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3),
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0),
}
TASKS = [f"{env}-{q}-v2" for env in ENVS for q in ("random", "medium", "medium-replay", "medium-expert", "expert")]
MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()
TASKS += [f"antmaze-{maze}-v2" for maze in MAZES]
TASKS += [f"kitchen-{demonstrations}-v0" for demonstrations in ("complete", "partial", "mixed")]


def parse_task(env_id):
    """`hopper-medium-v2` -> (`hopper`, `medium`). Raises UserError for a name that is not in TASKS."""
    if env_id not in TASKS:
        near = difflib.get_close_matches(env_id, TASKS, n=len(TASKS), cutoff=0.0)
        raise UserError(f"unknown task '{env_id}'; known tasks, nearest first: {', '.join(near)}")
    name, quality = env_id.rsplit("-v", 1)[0].split("-", 1)
    return name, quality


def normalized_score(env_id, returns):
    """100 * (return - random) / (expert - random), D4RL's points; `returns` a number or an array."""
    _, low, high = ENVS[parse_task(env_id)[0]]
    return 100 * (returns - low) / (high - low)


def behaviour_schedule(quality, policies, num_steps):
    """-> list of (actor or None for uniform actions, steps): who acts, and for how many of `num_steps` transitions."""
    if quality == "random":
        return [(None, num_steps)]
    if quality == "medium-replay":
        rungs = policies["ladder"]
        edges = np.linspace(0, num_steps, len(rungs) + 1).round().astype(int)
        # the first rung stands for SAC's warm-up, which acts uniformly
        return [(None if i == 0 else rung["actor"], int(edges[i + 1] - edges[i])) for i, rung in enumerate(rungs)]
    half = num_steps // 2
    if quality == "medium-expert":
        return [(policies["medium"]["actor"], half), (policies["expert"]["actor"], num_steps - half)]
    return [(policies[quality]["actor"], num_steps)]


@torch.no_grad()
def rollouts(weights, hidden, gym_id, num_steps, num_envs, seed, bar):
    """Whole episodes, at least `num_steps` transitions of them, from `num_envs` environments with one policy call for
    all. An environment stops after the episode in which its share of the steps is complete, so no episode is cut."""
    # at least 5,000 steps for each: the last episode, which is finished, then adds little
    envs = [gym.make(gym_id) for _ in range(min(num_envs, max(1, num_steps // 5_000)))]
    obs_dim, act_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    actor = None
    if weights is not None:
        actor = SquashedGaussianActor(torch.zeros(obs_dim), torch.ones(obs_dim), act_dim, hidden)
        actor.load_state_dict({k: v.float() for k, v in weights.items()})
    generator = torch.Generator().manual_seed(seed)
    share, episodes = -(-num_steps // len(envs)), []
    obs = np.stack([env.reset(seed=seed * 1_000 + i)[0] for i, env in enumerate(envs)])
    current = [([obs[i].copy()], []) for i in range(len(envs))]  # observations (T+1), steps (T) of the open episodes
    done_steps, alive = np.zeros(len(envs), dtype=int), np.arange(len(envs))
    while len(alive):
        if actor is None:
            actions = 2 * torch.rand(len(alive), act_dim, generator=generator) - 1
        else:
            noise = torch.randn(len(alive), act_dim, generator=generator)
            actions = actor.sample(torch.as_tensor(obs[alive], dtype=torch.float32), noise)[0]
        finished = []
        for i, action in zip(alive, actions.numpy(), strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            observations, steps = current[i]
            observations.append(obs[i].copy())
            steps.append((action, reward, terminated, truncated))
            if terminated or truncated:
                columns = [np.stack(column) for column in zip(*steps, strict=True)]
                episodes.append(EpisodeBuffer(None, None, None, np.stack(observations).astype(np.float32), *columns))
                done_steps[i] += len(steps)
                bar.update(len(steps))
                obs[i], _ = envs[i].reset()
                current[i] = ([obs[i].copy()], [])
                if done_steps[i] >= share:
                    finished.append(i)
        alive = np.setdiff1d(alive, finished) if finished else alive
    return episodes


@contextmanager
def own_store(root):
    """A temporary folder in `root`, on the same disk so that it can be renamed. Removes what killed makers left."""
    prefix = f".making-{socket.gethostname()}-"
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{prefix}*"):
        try:
            os.kill(int(left.name.removeprefix(prefix).split("-")[0]), 0)
        except (ProcessLookupError, ValueError):  # its process is gone
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:  # it lives, under another user
            continue
    with tempfile.TemporaryDirectory(dir=root, prefix=f"{prefix}{os.getpid()}-") as store:
        yield store


def collect(args, path):
    """Rolls out the behaviour policies and writes `o2o/<env_id>` into the local Minari store, all of it or nothing."""
    name, quality = parse_task(args.env_id)
    gym_id, low, high = ENVS[name]
    dataset_id = f"o2o/{args.env_id}"
    root = Path(get_dataset_path()).resolve()
    target = root / dataset_id
    if target.exists() and not args.overwrite:
        raise UserError(f"dataset {dataset_id} exists at {target}; pass --overwrite to make it again")
    policies = {"hidden": []}
    if quality != "random":
        if not path.exists():
            raise UserError(f"no behaviour policies at {path}; train them with --env-id {args.env_id} --train")
        policies = load_file(path)
        if policies.get("algorithm") != "sac" or policies.get("env") != name:
            raise UserError(f"{path} does not hold behaviour policies of {name}; train them with --train")
        if policies["medium"] is None:
            raise UserError(f"the SAC run behind {path} has not reached medium yet; continue it with --train --resume")
    num_steps = args.num_steps or (policies["medium"]["step"] if quality == "medium-replay" else 1_000_000)
    started, episodes = time.time(), []
    with tqdm(total=num_steps, unit="step", unit_scale=True, desc=dataset_id, disable=None) as bar:
        for i, (weights, steps) in enumerate(behaviour_schedule(quality, policies, num_steps)):
            episodes += rollouts(weights, policies["hidden"], gym_id, steps, args.num_envs, args.seed + i, bar)
    returns = np.array([sum(episode.rewards) for episode in episodes])
    total = sum(len(episode.rewards) for episode in episodes)
    rolled = time.time() - started

    # written into a store of its own and then renamed: an interrupted run leaves no half dataset behind
    with own_store(root) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Minari would like an author's e-mail address
        os.environ["MINARI_DATASETS_PATH"] = store
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                episodes,
                env=gym_id,
                eval_env=gym_id,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (episodes[0].observations.shape[1],), np.float32),
                algorithm_name="uniform random" if quality == "random" else "SAC",
                author="o2o",
                code_permalink="offline/collect.py",
                ref_min_score=low,
                ref_max_score=high,
                description=f"{args.env_id} made by offline/collect.py on {gym_id} (D4RL's protocol, not D4RL's file); "
                f"arguments {asdict(args)}; versions {versions()}",
                requirements=[f"mujoco=={version('mujoco')}", f"gymnasium=={gym.__version__}"],
            )
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        if "o2o" not in list_local_namespaces():
            create_namespace("o2o")
        if args.overwrite and target.exists():
            shutil.rmtree(target)
        try:
            os.replace(Path(store) / dataset_id, target)
        except OSError:
            if not target.exists():  # else another process made the same dataset meanwhile: that one stays
                raise
    print(
        f"{dataset_id}: {total} transitions, {len(episodes)} episodes on {gym_id}, mean return {returns.mean():.0f} "
        f"(score {normalized_score(args.env_id, returns.mean()):.1f}, best episode {returns.max():.0f}), "
        f"{total / rolled:.0f} transitions/s, {time.time() - started:.0f} s in all, at {target}"
    )


def mlp(net, x, bf16):
    """A network's output, with `bf16` all products in bf16 but the last: bf16 can't tell a Q of 300 from one of 301."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        x = net[:-1](x)
    return net[-1](x.float())


class SquashedGaussianActor(nn.Module):
    """a = tanh(u), u ~ N(mean(s), std(s)^2): SAC's policy. `noise` is standard normal and given from outside, so that
    a compiled and an eager update see the same numbers."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes = [len(obs_mean), *hidden]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net, self.bf16 = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * act_dim)), bf16
        nn.init.xavier_uniform_(self.net[-1].weight, gain=0.01)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, obs):
        """(B, O) raw observations -> mean (B, A) and log_std (B, A) of u."""
        mean, log_std = mlp(self.net, (obs - self.obs_mean) / self.obs_std, self.bf16).chunk(2, dim=-1)
        return mean, (log_std - 1).clamp(-20, 2)  # a new network's std is 1 / e

    def sample(self, obs, noise):
        """-> action (B, A) in [-1, 1], its log_prob (B,) in nats, and u (B, A)."""
        mean, log_std = self(obs)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), squashed_log_prob(mean, log_std, u), u

    def mode(self, obs):
        """-> tanh of the mean (B, A), the action that evaluation executes."""
        return torch.tanh(self(obs)[0])


def squashed_log_prob(mean, log_std, u):
    """log density of a = tanh(u) in nats, (..., A) three times -> (...):

        log N(u; mean, std^2) - sum log(1 - tanh(u)^2),   log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))

    Takes u and not a: atanh(a) is not finite where tanh rounds to 1."""
    normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


def load_file(path):
    """torch.load of tensors, numbers and strings, so no code. Raises UserError if the file is missing or damaged."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("there is no such file")
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch does not look at its own checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged zip or pickle raises nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.80}"
        raise UserError(f"{path} is missing, incomplete or no checkpoint of ours ({reason})") from error


def versions():
    """Of the packages that decide what a run computes."""
    return {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco", "minari")}


def parse_args():
    return tyro.cli(Args)


def interrupted(error):
    """Whether Ctrl-C or SIGTERM is at the root of an exception: one that arrives inside an import gets wrapped."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def run_cli(main):
    """A UserError becomes one sentence on stderr and exit code 2; SIGTERM ends a run like Ctrl-C, with a summary."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs would ignore the former
        signal.signal(number, signal.default_int_handler)
    try:
        main(parse_args())
    except BaseException as error:
        if isinstance(error, UserError | OSError):  # OSError: no space left, no permission
            print(f"error: {error}", file=sys.stderr)
        elif not interrupted(error):
            raise
        sys.exit(130 if interrupted(error) else 2)


def main(args: Args):
    parse_task(args.env_id)
    if args.seed < 0 or args.num_envs < 1 or (args.num_steps is not None and args.num_steps < 1):
        raise UserError("--seed has to be 0 or more, --num-envs and --num-steps 1 or more")
    name, _ = parse_task(args.env_id)
    here = Path(__file__).resolve().parent
    path = Path(args.behaviour or here / "checkpoints/behaviour" / f"{name.removesuffix('maze')}.pt")
    common = ["--env-id", args.env_id, "--seed", str(args.seed), *(["--overwrite"] if args.overwrite else [])]
    if args.train:
        if subprocess.run([sys.executable, here / "behaviour.py", *common, "--output", path]).returncode:
            raise UserError(f"{here / 'behaviour.py'} ended without policies, for the reason above")
        return
    if name in ("antmaze", "kitchen"):
        common += ["--behaviour", path] if name == "antmaze" else []
        common += ["--num-steps", str(args.num_steps)] if args.num_steps else []
        if subprocess.run([sys.executable, here / f"collect_{name}.py", *common]).returncode:
            raise UserError(f"{here / f'collect_{name}.py'} ended without a dataset, for the reason above")
        return
    torch.set_num_threads(1)
    collect(args, path)


if __name__ == "__main__":
    run_cli(main)
