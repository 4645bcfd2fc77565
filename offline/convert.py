"""Foreign data into datasets that the scripts read: flat, in [-1, 1], with their environment and reference returns.

    python offline/convert.py hopper.hdf5 --to mine/hopper-medium-v2 --env Hopper-v4  # a file in D4RL's layout
    python offline/convert.py D4RL/pointmaze/umaze-v2 --to mine/umaze-v0  # a Minari dataset, downloaded if need be
    python offline/convert.py D4RL/kitchen/complete-v2 --to d4rl/kitchen-complete-v0  # human demonstrations
    python o2o_sac.py --env-id hopper-medium-v2 --dataset mine/hopper-medium-v2  # and that is how it is used

A D4RL file has no next state where an episode ends by time limit: that last step is dropped. D4RL collected its
locomotion data on the environments that gymnasium calls v4; it is the user who knows, so --env has to name one.

Of a Minari dataset the environment comes along, and its wrappers. A dictionary of observations is flattened (--keys
chooses from it), and actions of another box are rescaled: by wrappers of gymnasium that become part of the dataset's
environment, so that the policy meets the same numbers online.

Kitchen: the joints of robot and objects are kept, not the goal, which never changes. The environment pays 1 for each
subtask when it is first done and ends when all are, so a score is D4RL's, in per cent of 4; the data pay at every step
for all that is done at the moment, as D4RL's do, and end with their last row (--kitchen-reward relabelled), or as the
environment does. D4RL's own Kitchen files hold no speeds, which the environment observes: they cannot be used.

All that can be wrong with foreign data is looked for here, before the first write: missing keys, lengths, dimensions,
numbers that are not finite, an environment that gymnasium does not know.
"""

import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path


@dataclass
class Args:
    source: tyro.conf.Positional[str]  # a .hdf5 file in D4RL's layout, or a Minari id, local or remote
    to: str = ""  # id of the dataset to write, such as mine/hopper-medium-v2
    env: str | None = None  # gymnasium id of the environment; None: the one that a Minari dataset names
    keys: tuple[str, ...] = ()  # of a dictionary of observations, the parts to keep; none: all
    ref_min: float | None = None  # return of 0 points; None: the source's, or D4RL's for its environments
    ref_max: float | None = None  # return of 100 points
    kitchen_reward: Literal["relabelled", "environment"] = "relabelled"  # Kitchen: at every step while done, or once
    overwrite: bool = False  # replace the dataset if it exists


# D4RL's returns of 0 and 100 points, by the environment's name without its version
REFERENCES = {
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Ant": (-325.6, 3879.7),
    "AdroitHandPen": (96.262799, 3076.8331),
    "AdroitHandDoor": (-56.512833, 2880.5693),
    "AdroitHandHammer": (-274.856578, 12794.1348),
    "AdroitHandRelocate": (-6.425911, 4233.8778),
    "FrankaKitchen": (0.0, 4.0),
}


def read_d4rl(path, max_steps):
    """-> episodes [(observations (T+1, O), actions (T, A), rewards (T,), terminations (T,))] of a file in D4RL layout.
    Without timeouts in it, an episode ends after `max_steps`, the time limit of the environment. Raises UserError if
    it is no such file, or if its columns do not fit together."""
    try:
        with h5py.File(path) as file:
            obs, actions, rewards, ends = (file[key][()] for key in ("observations", "actions", "rewards", "terminals"))
            limits = file["timeouts"][()] if "timeouts" in file else None
        if limits is None:
            print(f"{path} has no timeouts: an episode ends at a terminal, or after {max_steps} steps", flush=True)
            steps, limits = 0, np.zeros(len(ends))
            for i in range(len(ends)):
                steps = 0 if ends[i] else steps + 1
                if steps == max_steps:
                    steps, limits[i] = 0, 1
        lengths = {len(column) for column in (obs, actions, rewards, ends, limits)}
        if not all(np.isin(np.asarray(flags, float), (0, 1)).all() for flags in (ends, limits)):
            raise ValueError("terminals and timeouts have to be 0 or 1")
        ends, limits = ends.astype(bool).reshape(len(ends)), limits.astype(bool).reshape(len(limits))
        obs, actions, rewards = (column.astype(np.float32) for column in (obs, actions, rewards))
        rewards = rewards.reshape(len(rewards))  # a column of them is fine, several columns are not
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path} is not a complete HDF5 file in D4RL's layout ({error})") from error
    if len(lengths) != 1:
        raise UserError(f"{path}: observations, actions, rewards, terminals and timeouts differ in length")
    episodes, start = [], 0
    for last in np.flatnonzero(ends | limits | (np.arange(len(ends)) == len(ends) - 1)):
        if ends[last]:  # the state after a terminal is never used, so any will do
            observations, stop = np.concatenate([obs[start : last + 1], obs[last : last + 1]]), last + 1
        else:
            observations, stop = obs[start : last + 1], last
        if stop > start:
            episodes.append((observations, actions[start:stop], rewards[start:stop], ends[start:stop]))
        start = last + 1
    return episodes


def read_minari(name, own_env):
    """-> the episodes of a Minari dataset, observations as they are, and the dataset. Its environment has been checked
    before anything made it; with `own_env` it need not have one. Raises UserError."""
    try:
        folder = Path(get_dataset_path(name))
        if not folder.exists():
            minari.download_dataset(name)
        spec = json.loads((folder / "data/metadata.json").read_text()).get("env_spec")
    except Exception as error:  # whatever the store or the network raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot read the dataset {name} ({reason}); `minari list local` shows what there is"
        ) from error
    if spec or not own_env:
        check_spec(spec, name)
    try:
        source = minari.load_dataset(name)
        episodes = [(e.observations, e.actions, e.rewards, e.terminations) for e in source.iterate_episodes()]
    except Exception as error:  # a damaged store raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot read the dataset {name} ({reason}); `minari list local` shows what there is"
        ) from error
    return episodes, source


def flat_environment(env, keys):
    """-> the environment with flat observations and actions in [-1, 1], the functions that do the same to arrays of its
    observations and actions, and a list that the latter extends by how many numbers it clipped, and of how many. Raises
    UserError if it cannot be flattened."""
    space, outside = env.observation_space, []
    if keys and not (isinstance(space, gym.spaces.Dict) and set(keys) <= set(space.spaces)):
        known = list(getattr(space, "spaces", {}))
        raise UserError(f"--keys {' '.join(keys)} are not among the observations {known} of {env.spec.id}")
    env = gym.wrappers.FilterObservation(env, list(keys)) if keys else env
    parts = list(env.observation_space.spaces) if isinstance(space, gym.spaces.Dict) else []
    env = gym.wrappers.FlattenObservation(env) if not is_flat(space) else env
    box = env.action_space
    if not (is_flat(box) and np.isfinite(box.low).all() and np.isfinite(box.high).all()):
        raise UserError(f"the actions of {env.spec.id} are no flat box with borders")
    low, high = box.low.copy(), box.high.copy()
    same = (low == -1).all() and (high == 1).all()
    env = env if same else gym.wrappers.RescaleAction(env, -1.0, 1.0)

    def observations(obs):
        if not parts:
            return np.asarray(obs, np.float32).reshape(len(obs), -1)
        return np.concatenate([np.asarray(obs[key], np.float32).reshape(len(obs[key]), -1) for key in parts], axis=1)

    def actions(action):
        action = np.asarray(action, np.float64).reshape(len(action), -1)
        scaled = action if same else 2 * (action - low) / (high - low) - 1
        if abs(scaled).max(initial=0) > 2:
            raise ValueError(f"actions reach {abs(scaled).max():.3g} times the border of the environment's box")
        outside.extend([(abs(scaled) > 1.001).sum(), scaled.size])
        return scaled.clip(-1, 1).astype(np.float32)  # a policy's sample may lie outside; what was executed does not

    return env, observations, actions, outside


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


def as_kitchen(episode, subtasks, way):
    """An episode (observations (T + 1, 59), actions, rewards, terminations) with the rewards and the end that `way`
    names: `relabelled` the data's own rewards and an end with the last row, `environment` 1 for each subtask when it is
    first done, and an end with the last of them."""
    obs, actions, rewards, _ = episode
    if way == "relabelled":
        return obs, actions, rewards, np.arange(len(actions)) == len(actions) - 1
    whole = (done(obs[1:], subtasks).cumsum(0) > 0).all(1)
    stop = int(whole.argmax()) + 1 if whole.any() else len(actions)
    return obs[: stop + 1], actions[:stop], kitchen_rewards(obs, subtasks, way)[:stop], whole[:stop]


def make(env_id):
    """An environment of gymnasium's, or of Gymnasium-Robotics."""
    if env_id not in gym.registry:
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
    return gym.make(env_id)


def is_flat(space):
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 1


def convert(args):
    """-> episodes ready to be written, the environment, the reference returns. Raises UserError."""
    references, name = (None, None), args.source
    from_file = name.endswith((".hdf5", ".h5"))
    if from_file and not Path(name).is_file():
        raise UserError(f"there is no file {name}")
    if from_file:
        if args.env is None:
            raise UserError(
                f"{name} does not say where it was collected; name the environment, such as --env Hopper-v4"
            )
    else:
        raw, source = read_minari(name, args.env is not None)
        references = tuple(source.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score"))
    try:
        env = make(args.env) if args.env else source.recover_environment()
        kitchen = env.spec.id.startswith("FrankaKitchen")
        if kitchen:  # as D4RL scores it; the data were collected without end, and paid at every step
            goal = sorted(env.unwrapped.goal)
            env = gym.make(env.spec.id, tasks_to_complete=goal, disable_env_checker=True)
        limit = env.spec.max_episode_steps
        known = REFERENCES.get(env.spec.id.split("-v")[0], (None, None))
    except Exception as error:  # whatever gymnasium or the simulator raises
        reason = " ".join(str(error).split())
        raise UserError(f"the environment of {name} cannot be made here ({reason}); name another with --env") from error
    if limit is None:
        raise UserError(f"{env.spec.id} has no time limit, so an evaluation on it might never end")
    if from_file and kitchen:
        raise UserError(f"{name}: D4RL's Kitchen files hold no speeds; use Minari's, such as D4RL/kitchen/complete-v2")
    if from_file:
        raw = read_d4rl(name, limit)
    env, observations, actions, outside = flat_environment(env, ("observation",) if kitchen else args.keys)
    (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
    episodes = []
    for i, (obs, action, reward, ends) in enumerate(raw):
        try:
            obs, action, steps = observations(obs), actions(action), len(reward)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"{name}, episode {i}: does not fit {env.spec.id} ({error})") from error
        shapes, expected = (obs.shape, action.shape), ((steps + 1, obs_dim), (steps, act_dim))
        if shapes != expected or len(ends) != steps:
            raise UserError(f"{name}, episode {i}: observations and actions have shapes {shapes}, expected {expected}")
        if not all(np.isfinite(x).all() for x in (obs, action, reward)):
            raise UserError(f"{name}, episode {i} holds NaN or infinite numbers; remove it first")
        if kitchen:
            obs, action, reward, ends = as_kitchen((obs, action, reward, ends), goal, args.kitchen_reward)
            steps = len(reward)
        truncated = np.zeros(steps, bool)
        truncated[-1] = not ends[-1]
        rewards, ends = np.asarray(reward, np.float32), np.asarray(ends, bool)
        episodes.append(EpisodeBuffer(None, None, None, obs, action, rewards, ends, truncated))
    if not episodes:
        raise UserError(f"{name} is empty")
    if share := sum(outside[::2]) / max(1, sum(outside[1::2])):
        print(f"{share:.1%} of the actions' numbers lay outside the environment's box and were clipped", flush=True)
    low = next((x for x in (args.ref_min, references[0], known[0]) if x is not None), None)
    high = next((x for x in (args.ref_max, references[1], known[1]) if x is not None), None)
    if (low is None) != (high is None) or (low is not None and not low < high):
        raise UserError(f"the returns of 0 and of 100 points are {low} and {high}; give --ref-min below --ref-max")
    return episodes, env, (low, high)


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


def write_dataset(args, episodes, env, references):
    """All of it or nothing: written into a store of its own, then renamed."""
    root = Path(get_dataset_path()).resolve()
    target = root / args.to
    low, high = references
    options = {} if low is None else {"ref_min_score": float(low), "ref_max_score": float(high)}
    with own_store(root) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari would like an author's e-mail address
        os.environ["MINARI_DATASETS_PATH"] = store
        try:
            minari.create_dataset_from_buffers(
                args.to,
                episodes,
                env=env,
                eval_env=env,
                observation_space=gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32),
                action_space=gym.spaces.Box(-1, 1, env.action_space.shape, np.float32),
                algorithm_name="unknown",
                author="o2o",
                code_permalink="offline/convert.py",
                description=f"{args.source}, converted by offline/convert.py",
                **options,
            )
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        namespace = args.to.rsplit("/", 1)[0]
        if "/" in args.to and namespace not in list_local_namespaces():
            create_namespace(namespace)
        if args.overwrite and target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(store) / args.to, target)
    total, mean = sum(len(e.rewards) for e in episodes), np.mean([sum(e.rewards) for e in episodes])
    points = "no reference returns" if low is None else f"0 points at a return of {low:g}, 100 at {high:g}"
    print(
        f"{args.to}: {total} transitions, {len(episodes)} episodes on {env.spec.id}, mean return {mean:.1f}, {points}"
    )


class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


def check_spec(spec, name):
    """Making an environment runs code, and a dataset says which: nothing is made but what gymnasium's registry holds,
    under wrappers of gymnasium that touch no file. `spec`: the dataset's own JSON. Raises UserError."""
    harmless = "FilterObservation FlattenObservation RescaleAction RescaleObservation ClipAction TimeLimit".split()
    if not spec:
        raise UserError(f"{name} names no environment; offline/convert.py --env adds one")
    try:
        spec, places = json.loads(spec), {f"{getattr(gym.wrappers, w).__module__}:{w}" for w in harmless}
        if spec["entry_point"].startswith("gymnasium_robotics."):  # AntMaze, Kitchen, Adroit
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
        good = {wrapper["entry_point"] for wrapper in spec["additional_wrappers"]} <= places
        good &= gym.registry[spec["id"]].entry_point == spec["entry_point"]
        good &= not any(isinstance(value, str) and "/" in value for value in spec["kwargs"].values())  # files
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        hint = f"none was made; import what registers your own at the top of {Path(__file__).name}"
        raise UserError(f"{name} names no environment that gymnasium knows ({error!r}); {hint}") from error
    if not good:
        hint = f"with code that is not gymnasium's, or wrappers other than {', '.join(harmless)}"
        raise UserError(f"{name} names {spec['id']} {hint}; none was made")


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
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", args.to):
        raise UserError(f"--to '{args.to}' is no name for a dataset: it ends in a version, as in mine/hopper-v0")
    target = Path(get_dataset_path(args.to))
    if target.exists() and not args.overwrite:
        raise UserError(f"dataset {args.to} exists at {target}; pass --overwrite to make it again")
    write_dataset(args, *convert(args))


if __name__ == "__main__":
    run_cli(main)
