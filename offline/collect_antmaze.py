"""Makes the AntMaze datasets, on this machine, without a download: a directional ant follows waypoints through a maze.

    python offline/collect_antmaze.py --env-id antmaze-umaze-v2  # makes `o2o/antmaze-umaze-v2`, locally
    python offline/collect_antmaze.py --env-id antmaze-large-play-v2 --evaluate  # how often the ant reaches the goal

D4RL's protocol (Fu et al. 2020, arXiv 2004.07219) on Gymnasium-Robotics' AntMaze-v5, at 20 steps a second:

  umaze                          from the start cell to the goal cell
  umaze-diverse, *-diverse       from any free cell to any other
  *-play                         from any free cell to one of a few hand-picked cells

The ant walks in a straight line to a jittered point of the next cell on the shortest way, with noise of 0.2 on its
actions. When it has reached its goal it roams in that cell for a second, then a new trajectory begins. An ant that has
fallen on its back cannot get up: it lies there to the time limit, or the data would not say what a fall costs.
Afterwards rewards and ends are relabelled for the goal of the evaluation, which, as there, lies anywhere in the middle
of the goal cell: reward 1 and the end of the episode where the ant is within 0.45 m of it. So a score is the share of
successes, in per cent. The names are D4RL's, the files are not: scores on these data are not comparable with D4RL's
tables.

The policy's observation is flat: position in the maze (2), then the ant's 27 numbers; it does not contain the goal.
"""

import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
import zipfile
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
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

gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    env_id: str = "antmaze-umaze-v2"  # antmaze-{umaze,umaze-diverse,{medium,large}-{play,diverse}}-v2
    seed: int = 1  # the only seed: starts, goals, jitter and noise derive from it
    num_steps: int = 1_000_000  # transitions, at least
    num_envs: int = 10  # mazes walked in at once, with one policy call for all
    behaviour: str | None = None  # file of the directional ant; None: offline/checkpoints/behaviour/ant.pt
    overwrite: bool = False  # replace the dataset if it exists
    evaluate: bool = False  # make no dataset, but print how often the ant walks from the start to the goal in time


# walls 1, free cells 0, r where the evaluation starts, g its goal, p the hand-picked goals of the play data
MAZES = {
    "umaze": ("AntMaze_UMaze-v5", "11111 1r001 11101 1g001 11111"),
    "medium": ("AntMaze_Medium-v5", "11111111 1r011001 100100p1 11000111 10010001 1p100101 10001pg1 11111111"),
    "large": (
        "AntMaze_Large-v5",
        "111111111111 1r0001p00001 101101010101 10000p0100p1 101111011101 10p101000001 110101010111 1001p0p10g01 "
        "111111111111",
    ),
}
QUALITIES = {"umaze": ("", "-diverse"), "medium": ("-play", "-diverse"), "large": ("-play", "-diverse")}
TASKS = [f"antmaze-{maze}{quality}-v2" for maze in MAZES for quality in QUALITIES[maze]]
RADIUS, CELL = 0.45, 4.0  # metres, of the environment: how near to the goal is there, and the width of a cell
SPREAD = 1.0  # metres: the environment draws the goal this far from the middle of its cell, in x and in y
ROAM = 20  # steps, a second, that a trajectory goes on after its goal


def free_cells(maze, kinds="0rgp"):
    """-> [(row, column)] of the cells of these kinds."""
    rows = MAZES[maze][1].split()
    return [(i, j) for i, row in enumerate(rows) for j, kind in enumerate(row) if kind in kinds]


def next_cells(maze, goal):
    """-> {cell: the next one on a shortest way to `goal`}, by breadth-first search; the goal's next one is itself."""
    free, found, queue = set(free_cells(maze)), {goal: goal}, deque([goal])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cell in free and cell not in found:
                found[cell] = (i, j)
                queue.append(cell)
    return found


def middle(maze, cell):
    """-> x and y (2,) of the middle of a cell, in metres; the origin is the middle of the maze, y points up."""
    rows = MAZES[maze][1].split()
    return np.array([(cell[1] + 0.5 - len(rows[0]) / 2) * CELL, (len(rows) / 2 - cell[0] - 0.5) * CELL])


def cell_of(maze, xy):
    """-> (row, column) of the cell at x and y (2,)."""
    rows = MAZES[maze][1].split()
    return int(np.floor(len(rows) / 2 - xy[1] / CELL)), int(np.floor(xy[0] / CELL + len(rows[0]) / 2))


def heading(obs, direction):
    """What the directional ant sees: gymnasium's 27 numbers and a unit vector in the plane, turned so that the ant
    always looks along x. It then need not learn each direction by itself. (B, 27), (B, 2) -> (B, 29)."""
    w, x, y, z = obs[:, 1:5].T
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    cos, sin, half_cos, half_sin = np.cos(yaw), np.sin(yaw), np.cos(yaw / 2), np.sin(yaw / 2)
    parts = half_cos * w + half_sin * z, half_cos * x + half_sin * y, half_cos * y - half_sin * x
    quaternion = np.stack([*parts, half_cos * z - half_sin * w], axis=1)
    quaternion *= np.where(quaternion[:, :1] < 0, -1, 1)  # q and -q are the same rotation

    def turned(v):
        return np.stack([cos * v[:, 0] + sin * v[:, 1], cos * v[:, 1] - sin * v[:, 0]], axis=1)

    parts = obs[:, :1], quaternion, obs[:, 5:13], turned(obs[:, 13:15]), obs[:, 15:27], turned(direction)
    return np.concatenate(parts, axis=1)


def maze_env(maze, evaluation):
    """-> the maze with flat observations (29,): position, then the ant's 27 numbers. As an evaluation it ends at the
    goal, which is g; for collecting it never ends. All that makes it is plain data."""
    name, rows = MAZES[maze]
    cells = [[int(kind) if kind in "01" else kind if kind in "rg" else 0 for kind in row] for row in rows.split()]
    settings = {"continuing_task": not evaluation, "reset_target": False, "include_cfrc_ext_in_observation": False}
    env = gym.make(name, maze_map=cells, **settings)
    return gym.wrappers.FlattenObservation(gym.wrappers.FilterObservation(env, ["achieved_goal", "observation"]))


class Walk:
    """One maze with an ant in it, which walks from a start to a goal of the task's kinds, again and again."""

    def __init__(self, maze, quality, seed):
        self.maze, self.env, self.rng = maze, maze_env(maze, evaluation=False), np.random.default_rng(seed)
        self.starts = free_cells(maze, "r" if maze == "umaze" and not quality else "0rgp")
        self.goals = free_cells(maze, {"": "g", "-play": "pg", "-diverse": "0rgp"}[quality])
        self.ways = {goal: next_cells(maze, goal) for goal in self.goals}

    def begin(self):
        start, goal = (cells[self.rng.integers(len(cells))] for cells in (self.starts, self.goals))
        while start == goal:
            goal = self.goals[self.rng.integers(len(self.goals))]
        options = {"reset_cell": np.array(start), "goal_cell": np.array(goal)}
        obs, _ = self.env.reset(seed=int(self.rng.integers(2**31)), options=options)
        self.goal, self.target, self.left, self.reached = goal, self.draw_goal(goal), None, False
        self.observations, self.steps = [obs.copy()], []

    def draw_goal(self, cell):
        return middle(self.maze, cell) + self.rng.uniform(-SPREAD, SPREAD, 2)

    def direction(self):
        """-> unit vector (2,) from the ant to the next waypoint, which jitters: it is drawn anew in every step."""
        position = self.observations[-1][:2]
        cell = cell_of(self.maze, position)
        if cell == self.goal or cell not in self.ways[self.goal]:
            waypoint = self.target
        else:
            waypoint = middle(self.maze, self.ways[self.goal][cell]) + self.rng.uniform(-0.5, 0.5, 2)
        return (waypoint - position) / max(np.linalg.norm(waypoint - position), 1e-6)

    def step(self, action):
        """-> whether the trajectory is over."""
        obs, _, _, truncated, _ = self.env.step(action)
        self.observations.append(obs.copy())
        self.steps.append(action)
        if np.linalg.norm(obs[:2] - self.target) <= RADIUS:
            self.reached, self.target = True, self.draw_goal(self.goal)
            self.left = ROAM if self.left is None else self.left
        self.left = None if self.left is None else self.left - 1
        return truncated or self.left == 0


def relabelled(observations, goal):
    """Rewards and ends for the goal of the evaluation: 1 where a step leads within RADIUS of it. observations (T + 1,
    29), goal (2,) -> rewards (T,), terminations (T,)."""
    there = np.linalg.norm(observations[1:, :2] - goal, axis=1) <= RADIUS
    return there.astype(np.float32), there


@torch.no_grad()
def walk(actor, walks, num_steps, seed, bar):
    """-> trajectories [(observations (T + 1, 29), actions (T, 8), reached its goal?)] of whole walks, at least
    `num_steps` transitions of them."""
    generator, done, share = torch.Generator().manual_seed(seed), [], -(-num_steps // len(walks))
    counts, alive = np.zeros(len(walks), dtype=int), list(range(len(walks)))
    for one in walks:
        one.begin()
    while alive:
        obs = np.stack([walks[i].observations[-1][2:] for i in alive])
        seen = heading(obs, np.stack([walks[i].direction() for i in alive]))
        noise = 0.2 * torch.randn(len(alive), 8, generator=generator)
        actions = (actor.mode(torch.as_tensor(seen, dtype=torch.float32)) + noise).clamp(-1, 1).numpy()
        for i, action in zip(list(alive), actions, strict=True):
            if walks[i].step(action):
                one = walks[i]
                done.append((np.stack(one.observations).astype(np.float32), np.stack(one.steps), one.reached))
                counts[i] += len(one.steps)
                bar.update(len(one.steps))
                if counts[i] >= share:
                    alive.remove(i)
                else:
                    one.begin()
    return done


def parse_maze(env_id):
    """`antmaze-large-play-v2` -> (`large`, `-play`). Raises UserError for a name that is not in TASKS."""
    if env_id not in TASKS:
        raise UserError(f"unknown task '{env_id}'; known tasks: {', '.join(TASKS)}")
    maze, *quality = env_id.removesuffix("-v2").split("-")[1:]
    return maze, "".join(f"-{word}" for word in quality)


def load_ant(path):
    """-> the directional ant, and the update it is of. Raises UserError."""
    saved = load_file(path)
    try:
        actor = SquashedGaussianActor(torch.zeros(29), torch.ones(29), 8, saved["hidden"])
        actor.load_state_dict({key: value.float() for key, value in saved["expert"]["actor"].items()})
        return actor, saved["expert"]["step"]
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} holds no directional ant ({type(error).__name__}); train it with --train") from error


def evaluate_ant(actor, maze, seed, episodes=50):
    """-> the share of episodes in which the ant walks from r to g within the time limit."""
    walks = [Walk(maze, "", seed + i) for i in range(10)]
    for one in walks:
        one.starts, one.goals = free_cells(maze, "r"), free_cells(maze, "g")
        one.ways = {goal: next_cells(maze, goal) for goal in one.goals}
    reached = []
    while len(reached) < episodes:
        reached += [good for _, _, good in walk(actor, walks, len(walks), seed + len(reached), tqdm(disable=True))]
    return float(np.mean(reached))


def collect_maze(args, path):
    """Walks, relabels, and writes `o2o/<env_id>` into the local Minari store, all of it or nothing."""
    maze, quality = parse_maze(args.env_id)
    dataset_id, root = f"o2o/{args.env_id}", Path(get_dataset_path()).resolve()
    target = root / dataset_id
    if target.exists() and not args.overwrite:
        raise UserError(f"dataset {dataset_id} exists at {target}; pass --overwrite to make it again")
    actor, _ = load_ant(path)
    started, rng = time.time(), np.random.default_rng(args.seed)
    walks = [Walk(maze, quality, [args.seed, i]) for i in range(args.num_envs)]
    with tqdm(total=args.num_steps, unit="step", unit_scale=True, desc=dataset_id, disable=None) as bar:
        done = walk(actor, walks, args.num_steps, args.seed, bar)
    (goal,), episodes = free_cells(maze, "g"), []
    for observations, actions, _ in done:
        where = middle(maze, goal) + rng.uniform(-SPREAD, SPREAD, 2)
        rewards, ends = relabelled(observations, where)
        truncated = np.zeros(len(ends), bool)
        truncated[-1] = not ends[-1]
        episodes.append(EpisodeBuffer(None, None, None, observations, actions, rewards, ends, truncated))
    total, env = sum(len(episode.rewards) for episode in episodes), maze_env(maze, evaluation=True)
    with own_store(root) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Minari would like an author's e-mail address
        os.environ["MINARI_DATASETS_PATH"] = store
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                episodes,
                env=env,
                eval_env=env,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (29,), np.float32),
                algorithm_name="SAC that follows waypoints",
                author="o2o",
                code_permalink="offline/collect_antmaze.py",
                ref_min_score=0.0,
                ref_max_score=1.0,
                description=f"{args.env_id} made by offline/collect_antmaze.py (D4RL's protocol, not D4RL's file); "
                f"arguments {asdict(args)}; versions {versions()}",
                requirements=[f"{name}=={version(name)}" for name in ("mujoco", "gymnasium", "gymnasium-robotics")],
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
    rewarded = np.concatenate([episode.rewards for episode in episodes])
    print(
        f"{dataset_id}: {total} transitions, {len(episodes)} walks, {100 * np.mean([good for *_, good in done]):.0f} % "
        f"reached their goal, {100 * np.mean([e.rewards.any() for e in episodes]):.0f} % pass the evaluation's, "
        f"{100 * rewarded.mean():.2f} % of the steps rewarded, {time.time() - started:.0f} s, at {target}"
    )


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
    maze, _ = parse_maze(args.env_id)
    if args.seed < 0 or args.num_envs < 1 or args.num_steps < 1:
        raise UserError("--seed has to be 0 or more, --num-envs and --num-steps 1 or more")
    torch.set_num_threads(1)
    path = Path(args.behaviour or Path(__file__).resolve().parent / "checkpoints/behaviour/ant.pt")
    if args.evaluate:
        actor, step = load_ant(path)
        share = evaluate_ant(actor, maze, args.seed)
        print(f"{path}, {step} steps of training: reaches the goal of {maze} in {100 * share:.0f} % of 50 episodes")
        return
    collect_maze(args, path)


if __name__ == "__main__":
    run_cli(main)
