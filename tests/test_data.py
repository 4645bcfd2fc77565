"""Loading: transitions stay aligned, ends of episodes mean what they say, bad files are refused in one sentence."""

import collect
import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import o2o_sac

TASK = "hopper-medium-v2"
OBS, ACT = 11, 3


def test_transitions_are_aligned_inside_an_episode_and_never_across(minari_store):
    data = o2o_sac.load_dataset(TASK)
    obs, _, reward, next_obs, terminated = o2o_sac.split(data.rows, OBS, ACT)
    same_episode = data.episode[1:] == data.episode[:-1]
    continues = (next_obs[:-1] == obs[1:]).all(-1)
    assert continues[same_episode].all()
    assert not continues[~same_episode].any()
    assert not terminated[:-1][same_episode].any()
    for i, episode in enumerate(minari.load_dataset(f"o2o/{TASK}").iterate_episodes()):
        mine = data.rows[data.episode == i]
        assert len(mine) == len(episode.rewards)
        np.testing.assert_allclose(mine[-1, OBS + ACT + 1 : -1], episode.observations[-1], rtol=1e-6)
        assert mine[-1, -1].item() == episode.terminations[-1]
        assert reward[data.episode == i].sum().item() == pytest.approx(data.returns[i], rel=1e-4)


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


def test_d4rl_file_drops_the_step_at_a_time_limit(tmp_path):
    data = o2o_sac.load_dataset(TASK, write_d4rl(tmp_path / "d.hdf5"))
    obs, _, reward, next_obs, terminated = o2o_sac.split(data.rows, OBS, ACT)
    # file rows 0-2 end in a terminal, 3-6 in a time limit, 7-8 where the file stops
    assert obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert terminated.tolist() == [0, 0, 1, 0, 0, 0, 0]
    kept = terminated == 0
    assert (next_obs[kept, 0] == obs[kept, 0] + 1).all()
    assert reward.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert data.make_env().spec.id == "Hopper-v4"
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"terminals": None}, "terminals"),
        ({"observations": np.full((9, OBS), np.nan, dtype=np.float32)}, "NaN"),
        ({"rewards": np.full(9, np.inf, dtype=np.float32)}, "NaN or infinite"),
        ({"observations": np.zeros((9, OBS + 1), dtype=np.float32)}, "shapes"),
        ({"actions": np.zeros((9, ACT + 1), dtype=np.float32)}, "shapes"),
        ({"rewards": np.zeros(8, dtype=np.float32)}, "length"),
        ({key: np.zeros((0, *shape)) for key, shape in (("observations", (OBS,)), ("actions", (ACT,)), ("rewards", ()),
                                                        ("terminals", ()), ("timeouts", ()))}, "empty"),
    ],
)  # fmt: skip
def test_bad_d4rl_files_are_refused(tmp_path, changes, words):
    with pytest.raises(o2o_sac.UserError, match=words):
        o2o_sac.load_dataset(TASK, write_d4rl(tmp_path / "d.hdf5", **changes))


def test_truncated_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "d.hdf5"
    write_d4rl(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(o2o_sac.UserError, match="not a complete HDF5 file"):
        o2o_sac.load_dataset(TASK, str(path))
    with pytest.raises(o2o_sac.UserError, match="missing"):
        o2o_sac.load_dataset(TASK, str(tmp_path / "missing.hdf5"))


def test_minari_dataset_made_on_the_spot(minari_store):
    episode = EpisodeBuffer(
        observations=np.random.default_rng(0).normal(size=(6, OBS)),
        actions=np.zeros((5, ACT), dtype=np.float32),
        rewards=np.ones(5),
        terminations=np.zeros(5, dtype=bool),
        truncations=np.array([False] * 4 + [True]),
    )
    name = "mine/hopper-v0"
    minari.create_dataset_from_buffers(name, [episode], env="Hopper-v5", eval_env="Hopper-v5", author_email="a@b.c")
    data = o2o_sac.load_dataset(TASK, name)
    assert len(data.rows) == 5 and data.rows[:, -1].sum() == 0  # truncated, not terminated: it keeps its bootstrap
    assert data.make_env().spec.id == "Hopper-v5"
    with pytest.raises(o2o_sac.UserError, match="Hopper-v5, walker2d-medium-v2 needs Walker2d"):
        o2o_sac.load_dataset("walker2d-medium-v2", name)
    with pytest.raises(o2o_sac.UserError, match="shapes"):
        o2o_sac.load_dataset("walker2d-medium-v2", write_d4rl(minari_store / "d.hdf5"))


def test_a_minari_dataset_without_its_environment_is_refused(minari_store):
    box = {"observation_space": gym.spaces.Box(-9, 9, (OBS,)), "action_space": gym.spaces.Box(-1, 1, (ACT,))}
    buffer = EpisodeBuffer(
        observations=np.zeros((3, OBS), np.float32),
        actions=np.zeros((2, ACT), np.float32),
        rewards=np.ones(2),
        terminations=np.zeros(2, dtype=bool),
        truncations=np.array([False, True]),
    )
    minari.create_dataset_from_buffers("mine/nowhere-v0", [buffer], author_email="a@b.c", **box)
    with pytest.raises(o2o_sac.UserError, match="nowhere-v0 names no environment that can be made here"):
        o2o_sac.load_dataset(TASK, "mine/nowhere-v0")


def test_a_missing_minari_dataset_is_refused(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(minari.dataset.minari_dataset, "MinariStorage", unreachable, raising=False)
    monkeypatch.setattr("minari.storage.hosting.download_dataset", unreachable)
    with pytest.raises(o2o_sac.UserError, match="no network"):
        o2o_sac.load_dataset(TASK, "mujoco/hopper/medium-v0")


def test_an_environment_that_a_run_could_not_resume_or_act_in_is_refused(monkeypatch):
    monkeypatch.setitem(o2o_sac.ENVS, "hopper", ("Pendulum-v1", 0.0, 1.0))
    episodes = [(np.zeros((3, 3)), np.zeros((2, 1)), np.zeros(2), np.zeros(2))]
    monkeypatch.setattr(o2o_sac, "read_minari", lambda *args, **kwargs: (episodes, lambda: gym.make("Pendulum-v1")))
    with pytest.raises(o2o_sac.UserError, match=r"Pendulum-v1 is not a MuJoCo environment with actions in \[-1, 1\]"):
        o2o_sac.load_dataset(TASK, "some/data-v0")


def test_without_dataset_and_without_collect_the_error_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(o2o_sac, "__file__", str(tmp_path / "copied.py"))
    with pytest.raises(o2o_sac.UserError, match="offline/collect.py"):
        o2o_sac.load_dataset("walker2d-expert-v2")


@pytest.mark.parametrize("task", o2o_sac.TASKS)
def test_data_of_every_task_are_made_from_what_ships_and_read(task, monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collect.main(collect.Args(env_id=task, num_steps=400))
    data = o2o_sac.load_dataset(task)
    env, (name, quality) = data.make_env(), o2o_sac.parse_task(task)
    gym_id, low, high = o2o_sac.ENVS[name]
    assert env.spec.id == gym_id
    assert (data.obs_dim, data.act_dim) == (env.observation_space.shape[0], env.action_space.shape[0])
    assert len(data.rows) >= 400 and data.rows.isfinite().all()
    if name == "halfcheetah":  # it cannot fall: episodes end at the time limit alone, which is not a termination
        assert data.rows[:, -1].sum() == 0 and len(data.rows) == 1000 * len(data.returns)
    metadata = minari.load_dataset(f"o2o/{task}").storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (low, high)
    assert metadata["algorithm_name"] == ("uniform random" if quality == "random" else "SAC")
    assert metadata["code_permalink"] == "offline/collect.py" and "mujoco" in str(metadata["requirements"])


def test_best_episodes_for_offline_data_part():
    returns = np.arange(60.0)
    np.random.default_rng(0).shuffle(returns)
    rows, episode = torch.arange(120.0).unsqueeze(1), torch.arange(60).repeat_interleave(2)
    data = o2o_sac.Dataset("x", rows, episode, returns, OBS, ACT, None)
    kept = o2o_sac.offline_part(data, "part")
    assert len(kept) == 100
    assert min(returns[(kept[:, 0] // 2).long().numpy()]) == 10
    assert o2o_sac.offline_part(data, "half") is rows


@pytest.mark.parametrize(("use", "offline_share"), [("half", (0.5, 0.5)), ("all", (0.7, 0.9)), ("none", (0, 0))])
def test_batches_mix_offline_and_online_data(use, offline_share):
    args = o2o_sac.Args(offline_data=use, batch_size=64)
    index = o2o_sac.draw_batches(args, torch.Generator().manual_seed(0), first=80, last=100, count=50, device="cpu")
    assert index.shape == (50, 64) and index.min() >= 0 and index.max() == 99
    share = (index < 80).float().mean(1)
    assert offline_share[0] <= share.mean() <= offline_share[1]
    if use == "half":
        assert (share == 0.5).all() and (index[:, :32] < 80).all()
