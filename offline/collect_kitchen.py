"""Makes the Kitchen datasets, on this machine, without a download: a scripted arm moves the things of a kitchen.

    python offline/collect_kitchen.py --env-id kitchen-complete-v0  # makes `o2o/kitchen-complete-v0`, locally
    python offline/collect_kitchen.py --env-id kitchen-mixed-v0 --evaluate  # how often each subtask succeeds

The names are D4RL's (Fu et al. 2020, arXiv 2004.07219), the demonstrations are not: theirs are human, by teleoperation,
these are scripted, on Gymnasium-Robotics' FrankaKitchen-v1. So scores are not comparable with D4RL's tables.

  complete   microwave, kettle, light switch, slide cabinet, in this order; all four succeed in every demonstration
  partial    four of the seven subtasks in a random order, one demonstration in ten of the four above
  mixed      the same without any that holds all four of microwave, kettle, bottom burner, light switch

The environment rewards the four of `complete`, for mixed those of the last line: 1 for each when it is first done, and
it ends when all are. A score is that return in per cent of 4. D4RL's data pay at every step for all that is done at
the moment; --kitchen-reward relabelled does so here.

A subtask is a list of points for the hand, followed by damped least squares on the arm's Jacobian, with noise on the
actions and jitter on the points. Between two subtasks the arm returns to where it started. Failures stay in the data,
but not in those of complete.

The policy's observation is FrankaKitchen's own: 9 joints of the robot, their speeds, then those of 21 objects (59). It
does not contain the goal, which never changes within a dataset.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import gymnasium_robotics
import minari
import mujoco
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    env_id: str = "kitchen-complete-v0"  # kitchen-{complete,partial,mixed}-v0
    seed: int = 1  # the only seed: orders, jitter and noise derive from it
    num_steps: int | None = None  # transitions, at least; None: as many as D4RL has, 3,680 or 136,950
    noise: float = 0.1  # std of the noise on the actions, which lie in [-1, 1]
    kitchen_reward: Literal["environment", "relabelled"] = (
        "environment"  # 1 when first done, or at every step while done
    )
    overwrite: bool = False  # replace the dataset if it exists
    evaluate: bool = False  # make no dataset, but print the success of each subtask over 50 tries


COMPLETE = ("microwave", "kettle", "light switch", "slide cabinet")
SUBTASKS = (*COMPLETE, "bottom burner", "top burner", "hinge cabinet")
REWARDED = {
    "complete": COMPLETE,
    "partial": COMPLETE,
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}
TASKS = [f"kitchen-{quality}-v0" for quality in REWARDED]
STEPS = {"complete": 3_680, "partial": 136_950, "mixed": 136_950}  # D4RL's
STIFFNESS = np.array([870, 870, 870, 870, 120, 120, 120])  # N m / rad, of the arm's position actuators
DT = 0.08  # seconds of a step
FORWARD = np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # the hand looks along +y, its fingers open along x


def done(observations, subtasks):
    """Which subtasks are done in each state: their joints within 0.3 of the goal, as in FrankaKitchen. observations
    (T, 59) -> bool (T, len(subtasks))."""
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env as facts

    joints = np.concatenate([observations[:, :9], observations[:, 18:39]], axis=1)
    off = [joints[:, facts.OBS_ELEMENT_INDICES[subtask]] - facts.OBS_ELEMENT_GOALS[subtask] for subtask in subtasks]
    return np.stack([np.linalg.norm(x, axis=1) for x in off], axis=1) < facts.BONUS_THRESH


def kitchen_rewards(observations, subtasks, way):
    """Rewards (T,) of the states (T + 1, 59) of an episode: `relabelled` the number of subtasks that are done after the
    step, as in D4RL's data, `environment` the number of those that are done for the first time."""
    now = done(observations[1:], subtasks)
    first = now & (now.cumsum(0) == 1)
    return (now if way == "relabelled" else first).sum(1).astype(np.float32)


def kitchen_env(subtasks, endless=False):
    """-> FrankaKitchen with flat observations (59,), which ends when all subtasks are done or after 280 steps. All that
    makes it is plain data."""
    settings = {"max_episode_steps": 10**6} if endless else {}
    settings |= {"tasks_to_complete": list(subtasks), "terminate_on_tasks_completed": not endless}
    env = gym.make("FrankaKitchen-v1", disable_env_checker=True, **settings)  # which only warns, in every process
    return gym.wrappers.FlattenObservation(gym.wrappers.FilterObservation(env, ["observation"]))


class Cook:
    """One kitchen and the scripted arm in it."""

    def __init__(self, env, noise):
        self.env, self.noise = env, noise
        self.model, self.data = env.unwrapped.model, env.unwrapped.data
        self.hand = self.model.site("end_effector").id

    def begin(self, seed):
        self.rng = np.random.default_rng(seed)
        obs, _ = self.env.reset(seed=int(self.rng.integers(2**31)))
        self.start, self.over = self.data.qpos[:7].copy(), False
        self.observations, self.actions, self.rewards, self.end = [obs.copy()], [], [], False

    @property
    def position(self):
        return self.data.site_xpos[self.hand].copy()

    def site(self, name):
        return self.data.site(name).xpos.copy()

    def step(self, speeds, grip):
        """One step with joint speeds (7,) in rad/s and the fingers towards `grip` metres each. The arm sags by gravity,
        which is known and made up for."""
        if self.over:
            return
        action = np.zeros(9)
        action[:7] = (speeds + self.data.qfrc_bias[:7] / (STIFFNESS * DT)) / 2  # an action of 1 is 2 rad/s
        action[7:] = 25 * (grip - self.data.qpos[7:9]) / 2
        action = np.clip(action + self.noise * self.rng.standard_normal(9), -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = self.env.step(action.astype(np.float64))
        self.observations.append(obs.copy())
        self.actions.append(action)
        self.rewards.append(reward)
        self.over, self.end = terminated or truncated, terminated

    def go(self, target, speed=1.5, grip=0.0, near=0.03, steps=20, until=lambda: False, rotation=None):
        """Moves the hand to `target` (3,), at most at `speed` m/s, until it is `near` metres, or `until()`, or `steps`
        are over; with a `rotation` (3, 3) also turns it, and goes on for all steps."""
        for _ in range(steps):
            off = np.asarray(target, float) - self.position
            if self.over or until() or (rotation is None and np.linalg.norm(off) < near):
                return
            linear, angular = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))
            mujoco.mj_jacSite(self.model, self.data, linear, angular, self.hand)
            jacobian, wanted = linear[:, :7], 8 * off * min(1, speed / (8 * np.linalg.norm(off) + 1e-9))
            if rotation is not None:
                jacobian, wanted = np.vstack([jacobian, angular[:, :7]]), np.append(wanted, self.turn(rotation))
            damped = jacobian @ jacobian.T + 0.01 * np.eye(len(wanted))
            self.step(jacobian.T @ np.linalg.solve(damped, wanted), grip)

    def turn(self, rotation):
        """-> angular velocity (3,) in rad/s that turns the hand towards `rotation`."""
        off = rotation @ self.data.site_xmat[self.hand].reshape(3, 3).T
        axis = np.array([off[2, 1] - off[1, 2], off[0, 2] - off[2, 0], off[1, 0] - off[0, 1]]) / 2
        sine = np.linalg.norm(axis)
        return axis / max(sine, 1e-9) * min(4 * math.atan2(sine, (np.trace(off) - 1) / 2), 2.0)

    def home(self):
        """Back to the joints of the start, so that a subtask is the same whatever came before it."""
        for _ in range(22):
            off = self.start - self.data.qpos[:7]
            if self.over or abs(off).max() < 0.2:
                return
            self.step(np.clip(6 * off, -2, 2), 0.0)

    def push(self, start, ends, until, speed=0.8, steps=8, before=0.42):
        """To `before` the first point (in y), to the point, and through the others as long as not `until()`."""
        self.go((start[0], before, start[2]), near=0.05)
        self.go(start, near=0.02)
        for end in ends:
            self.go(end, speed, near=0.005, steps=steps, until=until)

    def pull(self, site, jitter, hinge, sign, until, lead, rotation=None):
        """Grasps the handle at `site()` (3,) and pulls it around a vertical hinge (2,), the hand `lead` radians ahead.
        One that slips away is let go at once."""
        handle = site() + jitter
        self.go((handle[0], 0.33, handle[2]), grip=0.04, near=0.05)
        self.go((handle[0], handle[1] - 0.10, handle[2]), 1.0, 0.04, near=0.02, steps=15, rotation=rotation)
        self.go(handle - [0, 0.005, 0], 0.6, grip=0.04, near=0.015, steps=15, rotation=rotation)
        for _ in range(3):
            self.step(np.zeros(7), 0.0)
        radius = np.linalg.norm(handle[:2] - hinge)
        for _ in range(36):
            x, y = self.position[:2] - hinge
            if self.over or until() or np.linalg.norm(self.position - site()) > 0.1:
                break
            angle = math.atan2(y, x) + sign * lead
            target = (hinge[0] + radius * math.cos(angle), hinge[1] + radius * math.sin(angle), handle[2])
            self.go(target, 0.8, near=0.01, steps=2)
        for _ in range(2):
            self.step(np.zeros(7), 0.04)
        self.go(self.position - [0, 0.12, 0], grip=0.04, steps=8)

    def twist(self, knob, until):
        """Grasps a knob (3,) and turns it clockwise."""
        self.go((knob[0], 0.45, knob[2]), 1.0, 0.04, steps=15, rotation=FORWARD)
        self.go((knob[0], 0.62, knob[2]), 0.6, 0.04, steps=18, rotation=FORWARD)
        self.go((knob[0], 0.62, knob[2]), 0.6, 0.0, steps=4, rotation=FORWARD)
        for angle in np.arange(0.2, 1.9, 0.2):
            cos, sin = math.cos(angle), math.sin(angle)
            turned = FORWARD @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
            self.go((knob[0], 0.62, knob[2]), 0.6, 0.0, steps=4, until=until, rotation=turned)
        self.go(self.position - [0, 0.1, 0], grip=0.04, steps=4)

    def do(self, subtask):
        """One of SUBTASKS, from the start pose and back to it."""
        joint, jitter = self.data.qpos, self.rng.uniform(-0.005, 0.005, 3)
        if subtask == "kettle":
            x = joint[23] + 0.05
            ends = [jitter + (x, y, 1.74) for y in np.arange(0.2, 0.8, 0.06)]
            self.push(jitter + (x, 0.10, 1.77), ends, lambda: joint[24] > 0.6, steps=5, before=0.10)
        elif subtask == "light switch":
            ends = [jitter + (x, 0.59, 2.28) for x in (-0.36, -0.42, -0.48)]
            self.push(jitter + (-0.29, 0.59, 2.28), ends, lambda: joint[17] < -0.6, steps=10)
        elif subtask == "slide cabinet":
            ends = [jitter + (x, 0.59, 2.6) for x in np.arange(-0.12, 0.4, 0.06)]
            self.push(jitter + (-0.21, 0.58, 2.58), ends, lambda: joint[19] > 0.2)
        elif subtask == "microwave":
            self.pull(
                lambda: self.site("microhandle_site"), jitter, (-1.128, 0.455), -1, lambda: joint[22] < -0.6, 0.22
            )
        elif subtask == "hinge cabinet":
            for _ in range(2):
                if joint[21] < 1.1:
                    self.pull(
                        lambda: self.site("hinge_site2"),
                        jitter,
                        (-0.224, 0.71),
                        1,
                        lambda: joint[21] > 1.3,
                        0.3,
                        FORWARD,
                    )
        else:
            site, index = {"bottom burner": ("knob2_site", 11), "top burner": ("knob4_site", 15)}[subtask]
            self.twist(self.site(site) + jitter, lambda: joint[index] < -0.75)
        self.home()

    def demonstration(self, subtasks, seed):
        """The subtasks in this order. -> observations (T + 1, 59), actions (T, 9), rewards (T,), done at the end?"""
        self.begin(seed)
        for subtask in subtasks:
            self.do(subtask)
        return np.stack(self.observations), np.stack(self.actions), np.array(self.rewards), self.end


def orders(quality, rng):
    """-> the subtasks of one demonstration, in order."""
    if quality == "complete":
        return COMPLETE
    while True:
        four = COMPLETE if rng.random() < 0.1 else rng.choice(SUBTASKS, 4, replace=False)
        four = tuple(map(str, rng.permutation(four)))
        if quality == "partial" or not set(REWARDED["mixed"]) <= set(four):
            return four


def evaluate_arm(args, tries=50):
    """Prints how often each subtask succeeds from the start, and the four of the task one after the other."""
    cook = Cook(kitchen_env(SUBTASKS, endless=True), args.noise)
    for subtasks in (*((x,) for x in SUBTASKS), REWARDED[parse_quality(args.env_id)]):
        good, steps = 0, []
        for i in range(tries):
            observations, *_ = cook.demonstration(subtasks, [args.seed, i])
            found = done(observations, subtasks)
            good += found.any(0).all()
            steps += [found.all(1).argmax()] if found.all(1).any() else []
        print(f"{', '.join(subtasks)}: {good} of {tries}, after {np.mean(steps) if steps else math.nan:.0f} steps")


def parse_quality(env_id):
    """`kitchen-mixed-v0` -> `mixed`. Raises UserError for a name that is not in TASKS."""
    if env_id not in TASKS:
        raise UserError(f"unknown task '{env_id}'; known tasks: {', '.join(TASKS)}")
    return env_id.split("-")[1]


def collect_kitchen(args):
    """Demonstrates, and writes `o2o/<env_id>` into the local Minari store, all of it or nothing."""
    quality = parse_quality(args.env_id)
    dataset_id, root = f"o2o/{args.env_id}", Path(get_dataset_path()).resolve()
    target, num_steps = root / dataset_id, args.num_steps or STEPS[quality]
    if target.exists() and not args.overwrite:
        raise UserError(f"dataset {dataset_id} exists at {target}; pass --overwrite to make it again")
    started, rng, rewarded = time.time(), np.random.default_rng(args.seed), REWARDED[quality]
    env, episodes, total, tries = kitchen_env(rewarded), [], 0, 0
    cook = Cook(env, args.noise)
    with tqdm(total=num_steps, unit="step", unit_scale=True, desc=dataset_id, disable=None) as bar:
        while total < num_steps:
            observations, actions, rewards, end = cook.demonstration(orders(quality, rng), [args.seed, tries])
            tries += 1
            if quality == "complete" and not end:
                if tries > 20 * (len(episodes) + 1):
                    raise UserError(f"only {len(episodes)} of {tries} demonstrations succeeded; lower --noise")
                continue
            if args.kitchen_reward == "relabelled":
                rewards = kitchen_rewards(observations, rewarded, "relabelled")
            ends = np.arange(len(rewards)) == len(rewards) - 1
            observations = observations.astype(np.float32)
            episodes.append(
                EpisodeBuffer(None, None, None, observations, actions, rewards, ends & end, ends & (not end))
            )
            total += len(rewards)
            bar.update(len(rewards))
    with own_store(root) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Minari would like an author's e-mail address
        os.environ["MINARI_DATASETS_PATH"] = store
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                episodes,
                env=env,
                eval_env=env,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (59,), np.float32),
                action_space=gym.spaces.Box(-1, 1, (9,), np.float32),
                algorithm_name="scripted demonstrations",
                author="o2o",
                code_permalink="offline/collect_kitchen.py",
                ref_min_score=0.0,
                ref_max_score=4.0,
                description=f"{args.env_id} made by offline/collect_kitchen.py (D4RL's names, not its demonstrations); "
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
    four = [done(episode.observations, rewarded).any(0).sum() for episode in episodes]
    print(
        f"{dataset_id}: {total} transitions, {len(episodes)} demonstrations of {tries}, {np.mean(four):.2f} of 4 "
        f"subtasks done in the mean (score {25 * np.mean(four):.1f}), all 4 in {np.mean(np.array(four) == 4):.0%}, "
        f"{time.time() - started:.0f} s in all, at {target}"
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


class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


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
    parse_quality(args.env_id)
    if args.seed < 0 or not 0 <= args.noise <= 1 or (args.num_steps is not None and args.num_steps < 1):
        raise UserError("--seed has to be 0 or more, --num-steps 1 or more, and --noise between 0 and 1")
    evaluate_arm(args) if args.evaluate else collect_kitchen(args)


if __name__ == "__main__":
    run_cli(main)
