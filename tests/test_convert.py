"""Foreign data: what they become, what is refused in one sentence, and that nothing of theirs is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import convert
import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import pendulum_episode
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path

import o2o_sac

OBS, ACT = 11, 3


def write_d4rl(path, lengths=((3, "terminal"), (4, "timeout"), (2, "cut")), **changes):
    """A file in D4RL's layout; observation t of the file is t in every dimension, so that mistakes show."""
    n = sum(length for length, _ in lengths)
    ends = np.cumsum([length for length, _ in lengths]) - 1
    kinds = {end: kind for end, (_, kind) in zip(ends, lengths, strict=True)}
    columns = {
        "observations": np.repeat(np.arange(n, dtype=np.float32)[:, None], OBS, axis=1),
        "actions": np.full((n, ACT), 0.5, dtype=np.float32),
        "rewards": np.arange(n, dtype=np.float32),
        "terminals": np.array([kinds.get(t) == "terminal" for t in range(n)]),
        "timeouts": np.array([kinds.get(t) == "timeout" for t in range(n)]),
    }
    with h5py.File(path, "w") as file:
        for key, value in (columns | changes).items():
            if value is not None:
                file[key] = value
    return str(path)


def converted(*argv):
    """Converts, and -> the dataset as a script reads it."""
    args = convert.tyro.cli(convert.Args, args=[*map(str, argv), "--to", "mine/converted-v0", "--overwrite"])
    convert.main(args)
    return o2o_sac.load_data(o2o_sac.Args(dataset="mine/converted-v0"), torch.device("cpu"))


def test_d4rl_file_drops_the_step_at_a_time_limit(tmp_path):
    data = converted(write_d4rl(tmp_path / "d.hdf5"), "--env", "Hopper-v5")
    obs, action, reward, next_obs, terminated = data.split(data.rows)
    # file rows 0-2 end in a terminal, 3-6 in a time limit, 7-8 where the file stops
    assert obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert terminated.tolist() == [0, 0, 1, 0, 0, 0, 0]
    kept = terminated == 0
    assert (next_obs[kept, 0] == obs[kept, 0] + 1).all()
    assert reward.tolist() == [0, 1, 2, 3, 4, 5, 7] and (action == 0.5).all()
    assert data.last.tolist() == [False, False, True, False, False, True, True]
    assert data.score(3234.3) == pytest.approx(100) and data.make_env().spec.id == "Hopper-v5"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"terminals": None}, "terminals"),
        ({"observations": np.full((9, OBS), np.nan, dtype=np.float32)}, "NaN"),
        ({"rewards": np.full(9, np.inf, dtype=np.float32)}, "NaN or infinite"),
        ({"observations": np.zeros((9, OBS + 1), dtype=np.float32)}, "shapes"),
        ({"actions": np.zeros((9, ACT + 1), dtype=np.float32)}, "shapes"),
        ({"rewards": np.zeros(8, dtype=np.float32)}, "length"),
        ({"rewards": np.array([b"x"] * 9)}, "layout"),
        ({"rewards": np.zeros((9, 2), dtype=np.float32)}, "layout"),
        ({"terminals": np.array([b"x"] * 9)}, "layout"),
        ({"terminals": np.full(9, np.nan)}, "0 or 1"),
        ({"actions": np.full((9, ACT), 3.0, dtype=np.float32)}, "3 times the border"),
        ({"observations": np.float32(1)}, "layout"),
        ({key: np.zeros((0, *shape)) for key, shape in (("observations", (OBS,)), ("actions", (ACT,)), ("rewards", ()),
                                                        ("terminals", ()), ("timeouts", ()))}, "empty"),
    ],
)  # fmt: skip
def test_bad_d4rl_files_are_refused(tmp_path, changes, words, minari_store):
    path = write_d4rl(tmp_path / "d.hdf5", **changes)
    with pytest.raises(convert.UserError, match=words):
        convert.main(convert.Args(source=path, to="mine/bad-v0", env="Hopper-v5"))
    assert not (minari_store / "mine/bad-v0").exists()


def test_truncated_and_missing_files_and_environments_are_refused(tmp_path):
    path = tmp_path / "d.hdf5"
    write_d4rl(path)
    with pytest.raises(convert.UserError, match="name the environment"):
        convert.main(convert.Args(source=str(path), to="mine/bad-v0"))
    with pytest.raises(convert.UserError, match="cannot be made here"):
        convert.main(convert.Args(source=str(path), to="mine/bad-v0", env="NoSuchEnv-v0"))
    path.write_bytes(path.read_bytes()[:500])
    for file in (path,):
        with pytest.raises(convert.UserError, match="not a complete HDF5 file"):
            convert.main(convert.Args(source=str(file), to="mine/bad-v0", env="Hopper-v5"))


def test_names_and_existing_datasets(tmp_path, minari_store):
    path = write_d4rl(tmp_path / "d.hdf5")
    for name in ("", "no-version", "../outside-v0", "a b-v0"):
        with pytest.raises(convert.UserError, match="--to"):
            convert.main(convert.Args(source=path, to=name, env="Hopper-v5"))
    convert.main(convert.Args(source=path, to="mine/once-v0", env="Hopper-v5"))
    with pytest.raises(convert.UserError, match="--overwrite"):
        convert.main(convert.Args(source=path, to="mine/once-v0", env="Hopper-v5"))


def test_actions_of_another_box_are_rescaled_and_the_environment_with_them(minari_store):
    env = gym.make("Pendulum-v1", max_episode_steps=60)
    episode = pendulum_episode(env, 3)
    torques = np.linspace(-2, 2, 60, dtype=np.float32)[:, None]
    episode = EpisodeBuffer(
        None, 3, None, episode.observations, torques, *([*episode.rewards], [False] * 60, [False] * 60)
    )
    minari.create_dataset_from_buffers("mine/torques-v0", [episode], env=env, eval_env=env, author_email="a@b.c")
    data = converted("mine/torques-v0", "--ref-min", -1500, "--ref-max", -150)
    np.testing.assert_allclose(data.split(data.rows)[1][:, 0], torques[:, 0] / 2, atol=1e-6)
    scaled = data.make_env()
    assert scaled.action_space.high == 1 and scaled.unwrapped.action_space.high == 2
    assert data.references == (-1500, -150)


def test_what_is_changed_in_foreign_data_is_said(tmp_path, capsys):
    actions = np.full((9, ACT), 0.5, dtype=np.float32)
    actions[:3, 0] = 1.7
    path = write_d4rl(tmp_path / "d.hdf5", actions=actions, timeouts=None)
    data = converted(path, "--env", "Hopper-v5")
    printed = capsys.readouterr().out
    assert "12.5% of the actions" in printed and "has no timeouts" in printed  # 3 of the 24 numbers that are kept
    assert data.split(data.rows)[1].max() == 1
    converted(write_d4rl(tmp_path / "e.hdf5"), "--env", "Hopper-v5")
    assert "%" not in capsys.readouterr().out


def test_a_dataset_without_an_environment_gets_one(minari_store):
    env = gym.make("Pendulum-v1", max_episode_steps=60)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    episodes = [pendulum_episode(env, 3)]
    minari.create_dataset_from_buffers("mine/nowhere-v0", episodes, **spaces, author_email="a@b.c")
    with pytest.raises(convert.UserError, match="names no environment; offline/convert.py --env adds one"):
        converted("mine/nowhere-v0")
    data = converted("mine/nowhere-v0", "--env", "Pendulum-v1")
    assert data.make_env().spec.id == "Pendulum-v1" and len(data.rows) == 60


class Room(gym.Env):
    """Observations in a dictionary."""

    observation_space = gym.spaces.Dict(
        {
            "position": gym.spaces.Box(-9, 9, (2,)),
            "goal": gym.spaces.Box(-9, 9, (1,)),
            "noise": gym.spaces.Box(-1, 1, (3,)),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        return {
            "position": np.array([1, 2], np.float32),
            "goal": np.array([3], np.float32),
            "noise": np.zeros(3, np.float32),
        }, {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


gym.register("Room-v0", entry_point=f"{__name__}:Room", max_episode_steps=5)


@pytest.mark.parametrize(("keys", "expected"), [((), {1.0, 2.0, 3.0, 0.0}), (("position", "goal"), {1.0, 2.0, 3.0})])
def test_a_dictionary_of_observations_is_flattened_as_the_environment_does_it(minari_store, keys, expected):
    env = gym.make("Room-v0")
    obs = env.reset()[0]
    many = {key: np.stack([value] * 6) for key, value in obs.items()}
    ends = np.zeros(5, bool), np.array([False] * 4 + [True])
    episode = EpisodeBuffer(None, 0, None, many, np.zeros((5, 2), np.float32), np.ones(5), *ends)
    name = f"mine/room{len(keys)}-v0"
    minari.create_dataset_from_buffers(name, [episode], env=env, eval_env=env, author_email="a@b.c")
    data = converted(name, *(("--keys", *keys) if keys else ()))
    flat = data.make_env().reset()[0]
    assert set(flat.tolist()) == expected
    np.testing.assert_array_equal(data.split(data.rows)[0][0], flat)
    with pytest.raises(convert.UserError, match="--keys"):
        convert.main(convert.Args(source=name, to="mine/nothing-v0", keys=("velocity",)))


@pytest.fixture(scope="module")
def human(minari_store):
    """A dataset in the layout of D4RL/kitchen at Minari's remote: nested dictionaries, no ends, rewards for all that is
    done at the moment. Of two subtasks that the scripted arm does. -> its id, the observations, the rewards"""
    import collect_kitchen

    subtasks, settings = ["slide cabinet", "light switch"], {"max_episode_steps": 450}
    settings |= {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}
    env = gym.make("FrankaKitchen-v1", tasks_to_complete=subtasks, **settings)
    cook = collect_kitchen.Cook(collect_kitchen.kitchen_env(collect_kitchen.SUBTASKS, endless=True), 0.0)
    obs, actions, *_ = cook.demonstration(subtasks, [1, 1])
    facts = collect_kitchen.gymnasium_robotics.envs.franka_kitchen.kitchen_env
    joints = np.concatenate([obs[:, :9], obs[:, 18:39]], axis=1)
    many = {"observation": obs.astype(np.float64)}
    many["achieved_goal"] = {x: joints[:, facts.OBS_ELEMENT_INDICES[x]].astype(np.float64) for x in subtasks}
    many["desired_goal"] = {x: np.tile(facts.OBS_ELEMENT_GOALS[x], (len(obs), 1)) for x in subtasks}
    rewards = collect_kitchen.kitchen_rewards(obs, subtasks, "relabelled")
    flags = np.zeros(len(actions), bool), np.arange(len(actions)) == len(actions) - 1
    episode = EpisodeBuffer(None, 0, None, many, actions.astype(np.float64), rewards, *flags)
    minari.create_dataset_from_buffers("mine/human-v2", [episode], env=env, author_email="a@b.c")
    return "mine/human-v2", obs, rewards


def test_kitchen_as_d4rl_has_it(human):
    name, obs, rewards = human
    data = converted(name)
    assert torch.equal(data.split(data.rows)[0], torch.as_tensor(obs[:-1], dtype=torch.float32))
    assert data.split(data.rows)[2].tolist() == rewards.tolist() and rewards.sum() > 50
    assert data.rows[:, -1].tolist() == [0.0] * (len(rewards) - 1) + [1.0]
    env = data.make_env()
    assert env.spec.max_episode_steps == 280 and env.unwrapped.remove_task_when_completed
    assert env.unwrapped.terminate_on_tasks_completed and set(env.unwrapped.goal) == {"slide cabinet", "light switch"}
    assert data.references == (0, 4) and env.reset(seed=0)[0].shape == (59,)


def test_kitchen_as_the_environment_pays(human):
    name, _, rewards = human
    data = converted(name, "--kitchen-reward", "environment")
    reward, terminated = data.split(data.rows)[2], data.rows[:, -1]
    first = [int((rewards >= n).argmax()) for n in (1, 2)]
    assert torch.nonzero(reward).flatten().tolist() == first and reward.sum() == 2
    assert len(reward) == first[1] + 1 and terminated.sum() == terminated[-1] == 1, "ends with the last subtask"


def test_d4rls_kitchen_files_are_refused_and_adroits_are_read(tmp_path):
    n = 9
    shapes = {"observations": np.zeros((n, 60), np.float32), "actions": np.zeros((n, 9), np.float32)}
    with pytest.raises(convert.UserError, match="hold no speeds"):
        converted(write_d4rl(tmp_path / "kitchen.hdf5", **shapes), "--env", "FrankaKitchen-v1")
    shapes = {"observations": np.zeros((n, 39), np.float32), "actions": np.zeros((n, 28), np.float32)}
    data = converted(write_d4rl(tmp_path / "door.hdf5", **shapes), "--env", "AdroitHandDoor-v1")
    assert data.references == (-56.512833, 2880.5693) and data.make_env().spec.id == "AdroitHandDoor-v1"


def test_a_foreign_dataset_runs_no_code(minari_store, tmp_path, capsys, monkeypatch):
    """Neither its environment nor a wrapper, and also not if Minari has to make the environment to open the dataset."""
    episode = pendulum_episode(gym.make("Pendulum-v1", max_episode_steps=60), 0)
    env = gym.make("Pendulum-v1")
    minari.create_dataset_from_buffers("mine/bomb-v0", [episode], env=env, eval_env=env, author_email="a@b.c")
    path = get_dataset_path("mine/bomb-v0") / "data/metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"])
    command = {"command": f"touch {tmp_path}/exploded"}
    bad = [{**spec, "entry_point": "os:system", "kwargs": command}]
    bad += [{**spec, "additional_wrappers": [{"name": "X", "entry_point": "os:system", "kwargs": command}]}]
    bad += [{**spec, "id": "Mine-v0"}]
    recorder = {"name": "RecordVideo", "entry_point": "gymnasium.wrappers.rendering:RecordVideo", "kwargs": {}}
    bad += [{**spec, "additional_wrappers": [recorder]}]
    for spec in bad:
        for drop in ((), ("observation_space", "action_space")):
            changed = {key: value for key, value in metadata.items() if key not in drop}
            path.write_text(json.dumps(changed | {"env_spec": json.dumps(spec)}))
            monkeypatch.setattr(sys, "argv", ["convert.py", "mine/bomb-v0", "--to", "mine/never-v0"])
            with pytest.raises(SystemExit) as stop:
                convert.run_cli(convert.main)
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.count("\n") == 1 and "none was made" in error
    assert not (tmp_path / "exploded").exists() and not (minari_store / "mine/never-v0").exists()


def test_a_column_of_rewards_is_fine(tmp_path):
    path = write_d4rl(tmp_path / "d.hdf5", rewards=np.arange(9, dtype=np.float32)[:, None])
    assert converted(path, "--env", "Hopper-v5").split(torch.zeros(1, 27))[2].shape == (1,)


def test_a_file_without_timeouts_is_split_at_the_time_limit(tmp_path):
    """HalfCheetah never terminates: read as one, row 999 would lead into the next reset."""
    n = 2500
    shapes = {"observations": (n, 17), "actions": (n, 6), "rewards": (n,), "terminals": (n,)}
    with h5py.File(tmp_path / "c.hdf5", "w") as file:
        for key, shape in shapes.items():
            file[key] = np.zeros(shape, dtype=np.float32)
        file["observations"][:] = np.arange(n)[:, None]
    data = converted(tmp_path / "c.hdf5", "--env", "HalfCheetah-v5")
    obs, _, _, next_obs, _ = data.split(data.rows)
    assert data.last.sum() == 3 and (next_obs[:, 0] == obs[:, 0] + 1).all()
    assert not {999.0, 1999.0} & set(obs[:, 0].tolist())


def test_what_is_not_there_or_cannot_end_is_said_at_once(tmp_path):
    with pytest.raises(convert.UserError, match="there is no file"):
        convert.main(convert.Args(source=str(tmp_path / "no.hdf5"), to="mine/no-v0", env="Hopper-v5"))
    gym.register("Endless-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv")
    with pytest.raises(convert.UserError, match="no time limit"):
        convert.main(convert.Args(source=write_d4rl(tmp_path / "d.hdf5"), to="mine/no-v0", env="Endless-v0"))


def test_what_a_killed_maker_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    host = convert.socket.gethostname()
    process = subprocess.Popen(["true"])
    process.wait()
    dead, alive = (tmp_path / f".making-{host}-{pid}-x" for pid in (process.pid, os.getppid()))
    for folder in (dead, alive):
        folder.mkdir()
    with convert.own_store(tmp_path) as store:
        assert not dead.exists() and alive.exists() and Path(store).exists()
    assert not Path(store).exists()
