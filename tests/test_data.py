"""Loading: transitions stay aligned, ends of episodes mean what they say, bad datasets are refused in one sentence."""

import json
import shutil

import behaviour
import collect
import collect_antmaze
import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import o2o_sac

TASK = "hopper-medium-v2"
OBS, ACT = 11, 3
CPU = torch.device("cpu")


def load(dataset=None, env_id=TASK):
    return o2o_sac.load_data(o2o_sac.Args(env_id=env_id, dataset=dataset), CPU)


def test_transitions_are_aligned_inside_an_episode_and_never_across(minari_store):
    data = load()
    obs, _, reward, next_obs, terminated = data.split(data.rows)
    continues = (next_obs[:-1] == obs[1:]).all(-1)
    assert continues[~data.last[:-1]].all()
    assert not continues[data.last[:-1]].any()
    assert not terminated[~data.last].any() and data.last[-1]
    ends = data.last.nonzero().squeeze(1).tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    for start, end, episode in zip(starts, ends, minari.load_dataset(f"o2o/{TASK}").iterate_episodes(), strict=True):
        mine = data.rows[start : end + 1]
        assert len(mine) == len(episode.rewards)
        np.testing.assert_allclose(mine[-1, OBS + ACT + 1 : -1], episode.observations[-1], rtol=1e-6)
        assert mine[-1, -1].item() == episode.terminations[-1]
        assert reward[start : end + 1].sum().item() == pytest.approx(episode.rewards.sum(), rel=1e-4)


def episode_of(observations, actions, rewards):
    n = len(rewards)
    flags = np.zeros(n, dtype=bool), np.arange(n) == n - 1
    return EpisodeBuffer(None, None, None, observations, actions, rewards, *flags)


def test_minari_dataset_made_on_the_spot(minari_store):
    obs = np.random.default_rng(0).normal(size=(6, OBS))
    episode = episode_of(obs, np.zeros((5, ACT), np.float32), np.ones(5))
    name = "mine/hopper-v0"
    minari.create_dataset_from_buffers(name, [episode], env="Hopper-v5", eval_env="Hopper-v5", author_email="a@b.c")
    data = load(name)
    assert len(data.rows) == 5 and data.rows[:, -1].sum() == 0  # truncated, not terminated: it keeps its bootstrap
    assert data.make_env().spec.id == "Hopper-v5"


def test_the_score_of_data_counts_a_recording_up_to_its_first_end(minari_store, capsys):
    """AntMaze's recordings go on at the goal: a success is one point of return, however long the ant stays there."""
    episodes = []
    for ends in ([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]):
        flags = np.array(ends, dtype=bool), np.arange(6) == 5
        obs = np.random.default_rng(0).normal(size=(7, OBS))
        episodes.append(
            EpisodeBuffer(None, None, None, obs, np.zeros((6, ACT), np.float32), np.array(ends, float), *flags)
        )
    options = {"env": "Hopper-v5", "eval_env": "Hopper-v5", "author_email": "a@b.c"}
    minari.create_dataset_from_buffers("mine/goals-v0", episodes, **options, ref_min_score=0.0, ref_max_score=1.0)
    load("mine/goals-v0")
    assert "24 transitions, score 75.0 (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("env", "words"),
    [("Pendulum-v1", "actions in"), ("CartPole-v1", "cannot use|actions in"), (None, "names no environment")],
)
def test_a_dataset_that_is_not_flat_or_has_no_environment_is_refused(minari_store, env, words):
    made = gym.make(env or "Pendulum-v1")
    obs = np.stack([made.reset(seed=i)[0] for i in range(3)])
    actions = np.stack([np.asarray(made.action_space.sample()) for _ in range(2)])
    name = f"mine/bad{str(env).split('-')[0].lower()}-v0"
    spaces = {"observation_space": made.observation_space, "action_space": made.action_space}
    options = {"env": env, "eval_env": env} if env else spaces
    minari.create_dataset_from_buffers(name, [episode_of(obs, actions, np.ones(2))], author_email="a@b.c", **options)
    with pytest.raises(o2o_sac.UserError, match=words):
        load(name)


def spec_of(env, **changes):
    return json.dumps(json.loads(env.spec.to_json()) | changes)


def test_specs_of_gymnasiums_own_environments_and_wrappers_are_accepted():
    pendulum = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1.0, 1.0)
    for env in (gym.make("Hopper-v5"), pendulum, gym.wrappers.FlattenObservation(pendulum)):
        o2o_sac.check_spec(spec_of(env), "mine/good-v0")


def wrapper(entry_point):
    name = entry_point.split(":")[1]
    return {"additional_wrappers": [{"name": name, "entry_point": entry_point, "kwargs": {}}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"entry_point": "os:system", "kwargs": {"command": "false"}},
        {"id": "Hopper-v5"},  # a known name with another environment's code
        {"id": "Mine-v0"},
        {"id": "os:Mine-v0"},  # gymnasium would import the module
        {"id": ["Pendulum-v1"]},
        {"entry_point": None},
        wrapper("mine.wrappers:RescaleAction"),
        wrapper("os:system"),
        wrapper("gymnasium.wrappers.rendering:RecordVideo"),
        {"additional_wrappers": None},
        {"additional_wrappers": [{"name": "RescaleAction"}]},
    ],
    ids=str,
)
def test_specs_that_name_other_code_are_refused(changes):
    with pytest.raises(o2o_sac.UserError, match="mine/bad-v0 names .*none was made"):
        o2o_sac.check_spec(spec_of(gym.make("Pendulum-v1"), **changes), "mine/bad-v0")


@pytest.mark.parametrize("spec", [None, "", "Pendulum-v1", "{", "[]", "3", "null", b"\x80\x04."])
def test_specs_that_are_not_json_objects_are_refused(spec):
    with pytest.raises(o2o_sac.UserError, match="mine/bad-v0 names no environment"):
        o2o_sac.check_spec(spec, "mine/bad-v0")


def test_a_spec_that_is_a_command_is_refused_before_minari_would_run_it(minari_store, tmp_path):
    """Without spaces in the metadata Minari makes the environment as soon as the dataset is opened."""
    name, marker = "mine/bomb-spaceless-v0", tmp_path / "exploded"
    shutil.copytree(minari_store / "o2o" / TASK, minari_store / name)
    path = minari_store / name / "data/metadata.json"
    metadata = json.loads(path.read_text()) | {"dataset_id": name}
    del metadata["observation_space"], metadata["action_space"]
    command = {"entry_point": "os:system", "kwargs": {"command": f"touch {marker}"}}
    path.write_text(json.dumps(metadata | {"env_spec": spec_of(gym.make("Hopper-v5"), **command)}))
    with pytest.raises(o2o_sac.UserError, match="none was made"):
        load(name)
    assert not marker.exists()
    with pytest.raises(Exception):  # noqa: B017  # the command is live, so the check is what stopped it
        minari.load_dataset(name)
    assert marker.exists()


def test_numbers_that_are_not_finite_are_refused(minari_store):
    obs = np.zeros((6, OBS))
    obs[3, 3] = np.nan
    episode = episode_of(obs, np.zeros((5, ACT), np.float32), np.ones(5))
    options = {"env": "Hopper-v5", "eval_env": "Hopper-v5", "author_email": "a@b.c"}
    minari.create_dataset_from_buffers("mine/nan-v0", [episode], **options)
    with pytest.raises(o2o_sac.UserError, match="finite"):
        load("mine/nan-v0")


def test_a_missing_minari_dataset_is_refused(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "download_dataset", unreachable)
    with pytest.raises(o2o_sac.UserError, match="no network"):
        load("mujoco/hopper/medium-v0")


def test_without_dataset_and_without_collect_the_error_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(o2o_sac, "__file__", str(tmp_path / "copied.py"))
    with pytest.raises(o2o_sac.UserError, match="offline/collect.py"):
        load(env_id="walker2d-expert-v2")


@pytest.mark.parametrize("task", [task for task in collect.TASKS if not task.startswith(("antmaze", "kitchen"))])
def test_data_of_every_task_are_made_from_what_ships_and_read(task, monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collect.main(collect.Args(env_id=task, num_steps=400))
    data = load(env_id=task)
    env, (name, quality) = data.make_env(), collect.parse_task(task)
    gym_id, low, high = collect.ENVS[name]
    assert env.spec.id == gym_id and data.references == (low, high)
    assert (data.obs_dim, data.act_dim) == (env.observation_space.shape[0], env.action_space.shape[0])
    assert len(data.rows) >= 400 and data.rows.isfinite().all()
    if name == "halfcheetah":  # it cannot fall: episodes end at the time limit alone, which is not a termination
        assert data.rows[:, -1].sum() == 0 and len(data.rows) == 1000 * int(data.last.sum())
    stored = minari.load_dataset(f"o2o/{task}")
    assert stored.storage.metadata["algorithm_name"] == ("uniform random" if quality == "random" else "SAC")
    assert "mujoco" in str(stored.storage.metadata["requirements"])
    assert next(stored.iterate_episodes()).observations.dtype == np.float32


def test_the_tables_of_tasks_are_the_same():
    own = {"antmaze": behaviour.ENVS["antmaze"]}  # the ant's training; collect_antmaze.py makes the data
    assert collect.ENVS | own == behaviour.ENVS and collect.TASKS[: len(behaviour.TASKS)] == behaviour.TASKS
    assert [task for task in collect.TASKS if task.startswith("antmaze")] == collect_antmaze.TASKS


@pytest.mark.parametrize("offline", [0, 16, 32, 64])
def test_batches_mix_offline_and_online_data(offline):
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([o2o_sac.draw(generator, 80, 100, offline, 64) for _ in range(50)])
    assert index.shape == (50, 64) and index.min() >= 0 and index.max() <= 99
    assert ((index < 80).sum(1) == offline).all()


def test_behaviour_training_resumes_exactly(tmp_path, monkeypatch):
    """Cut off in the middle of an episode, which the resumed run repeats."""

    def args(name, **changes):
        settings = {"train_steps": 70, "warm_up": 30, "snapshot_every": 25, "batch_size": 8, "compile": False}
        return behaviour.Args(output=str(tmp_path / f"{name}.pt"), run_dir=str(tmp_path / name), **settings | changes)

    behaviour.main(args("whole", train_steps=75))
    real, calls = behaviour.draw_curve, []

    def cut_off(run):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(behaviour, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            behaviour.main(args("cut", train_steps=75))
    behaviour.main(args("cut", train_steps=75, resume=str(tmp_path / "cut")))
    one, other = (torch.load(tmp_path / f"{name}/resume.pt", weights_only=True) for name in ("whole", "cut"))
    for key, net in one["nets"].items():
        assert all(torch.equal(value, other["nets"][key][name]) for name, value in net.items())
    assert torch.equal(one["buffer"], other["buffer"]) and one["progress"] == other["progress"]
    assert len(torch.load(tmp_path / "cut.pt", weights_only=True)["ladder"]) == 3
