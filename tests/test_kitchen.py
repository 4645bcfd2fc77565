"""offline/collect_kitchen.py: the scripted arm, rewards by hand and as the environment gives them, the datasets, and
scripts that run on one."""

import collect_kitchen as kitchen
import iql
import minari
import numpy as np
import pytest
import torch
from conftest import tiny_args, tiny_policy

import o2o_ppo
import o3f

TASK = "kitchen-mixed-v0"


@pytest.fixture(scope="module")
def dataset(minari_store):
    """A demonstration or two of mixed. -> its episodes."""
    kitchen.main(kitchen.Args(env_id=TASK, num_steps=250))
    return list(minari.load_dataset(f"o2o/{TASK}").iterate_episodes())


@pytest.fixture(scope="module")
def cook():
    return kitchen.Cook(kitchen.kitchen_env(kitchen.SUBTASKS, endless=True), noise=0.0)


@pytest.mark.parametrize("subtask", kitchen.SUBTASKS)
def test_the_arm_does_each_subtask_and_nothing_else(subtask, cook):
    observations, actions, rewards, _ = cook.demonstration([subtask], [1, 0])
    found = kitchen.done(observations, kitchen.SUBTASKS)
    assert found[-1].tolist() == [other == subtask for other in kitchen.SUBTASKS], "done, and it stays so"
    assert rewards.sum() == 1 and len(actions) < 130 and abs(actions).max() <= 1
    assert abs(cook.data.qpos[:7] - cook.start).max() < 0.5, "back where it started"


def test_actions_are_noisy_as_asked(cook):
    first = []
    for noise in (0.0, 0.1):
        one = kitchen.Cook(cook.env, noise)
        for i in range(60):
            one.begin([1, i])
            one.step(np.zeros(7), 0.02)
            first.append(one.actions[0])
    still, loud = np.array(first[:60])[:, :7], np.array(first[60:])[:, :7]  # the fingers' are at the border
    assert still.std(0).max() < 0.02 and 0.08 < (loud - still).std() < 0.12


def test_what_is_done_and_its_rewards_by_hand():
    obs = np.zeros((4, 59))
    obs[:, 18 + 19 - 9], obs[:, 18 + 22 - 9] = [0, 0.2, 0.2, 0.0], [0, -0.2, -0.8, -0.8]  # slide cabinet, microwave
    obs[:, 18 + 17 - 9 : 18 + 19 - 9] = [-0.69, -0.05]  # the light
    pair = ("slide cabinet", "microwave")
    assert kitchen.done(obs, pair).tolist() == [[False, False], [True, False], [True, True], [False, True]]
    assert kitchen.done(obs, ("light switch",)).all()
    assert kitchen.kitchen_rewards(obs, pair, "relabelled").tolist() == [1, 2, 1]
    assert kitchen.kitchen_rewards(obs, pair, "environment").tolist() == [1, 1, 0]


def test_the_environment_pays_for_what_is_done_first(dataset):
    """The rewards of the data are FrankaKitchen's own; computed from the observations they are the same."""
    for episode in dataset:
        by_hand = kitchen.kitchen_rewards(episode.observations, kitchen.REWARDED["mixed"], "environment")
        np.testing.assert_array_equal(episode.rewards, by_hand)
    assert 0 < sum(episode.rewards.sum() for episode in dataset) <= 3 * len(dataset)


def test_a_dataset_is_flat_repeatable_and_carries_its_kitchen(dataset, minari_store):
    source = minari.load_dataset(f"o2o/{TASK}")
    assert sum(len(episode.rewards) for episode in dataset) >= 250
    env = source.recover_environment()
    assert env.spec.id == "FrankaKitchen-v1" and env.spec.max_episode_steps == 280
    assert set(env.unwrapped.goal) == set(kitchen.REWARDED["mixed"])
    assert [source.storage.metadata[key] for key in ("ref_min_score", "ref_max_score")] == [0, 4]
    for episode in dataset:
        assert episode.observations.shape == (len(episode.rewards) + 1, 59) and episode.actions.shape[1] == 9
        assert episode.observations.dtype == episode.actions.dtype == np.float32 and abs(episode.actions).max() <= 1
        assert not episode.terminations.any() and episode.truncations.tolist().index(True) == len(episode.rewards) - 1
    kitchen.main(kitchen.Args(env_id=TASK, num_steps=250, overwrite=True))
    again = next(iter(minari.load_dataset(f"o2o/{TASK}").iterate_episodes()))
    np.testing.assert_array_equal(again.actions, dataset[0].actions)


def test_the_orders_of_the_three_tasks():
    rng, four = np.random.default_rng(0), set(kitchen.COMPLETE)
    assert {kitchen.orders("complete", rng) for _ in range(5)} == {kitchen.COMPLETE}
    partial, mixed = ([kitchen.orders(quality, rng) for _ in range(400)] for quality in ("partial", "mixed"))
    for order in partial + mixed:
        assert len(set(order)) == 4 and set(order) <= set(kitchen.SUBTASKS)
    assert 0.05 < np.mean([set(order) == four for order in partial]) < 0.2
    assert not any(set(order) == set(kitchen.REWARDED["mixed"]) for order in mixed)
    assert len(set(partial)) > 100


def test_complete_keeps_what_succeeds(minari_store, monkeypatch):
    real, tries = kitchen.Cook.demonstration, []

    def demonstration(cook, subtasks, seed):
        tries.append(seed)
        return real(cook, subtasks[: 2 if len(tries) == 1 else 4], seed)

    monkeypatch.setattr(kitchen.Cook, "demonstration", demonstration)
    kitchen.main(kitchen.Args(env_id="kitchen-complete-v0", num_steps=100, noise=0.0, kitchen_reward="relabelled"))
    (episode,) = minari.load_dataset("o2o/kitchen-complete-v0").iterate_episodes()
    assert len(tries) == 2 and episode.terminations.tolist() == [False] * (len(episode.rewards) - 1) + [True]
    assert episode.rewards[-1] == 4 and episode.rewards.sum() > 100, "paid at every step for all that is done"
    assert kitchen.done(episode.observations, kitchen.COMPLETE).any(0).all()


def test_scripts_run_on_it_with_its_settings(dataset, tmp_path):
    values = iql.settings(iql.Args(env_id=TASK))
    assert (values["temperature"], values["normalize_rewards"]) == (0.5, False)
    assert o3f.settings(o3f.Args(env_id=TASK, base="iql"))["sigma"] == 0.05
    policy = tiny_policy(iql, tmp_path, num_critics=5, env_id=TASK, **values)
    args = o3f.Args(env_id=TASK, base="iql", checkpoint=str(policy), online_steps=4, eval_every=4, eval_episodes=1)
    args.batch_size, args.compile, args.run_dir = 16, False, str(tmp_path / "o3f")
    summary = o3f.main(args)
    assert summary["status"] == "complete" and 0 <= summary["final_score"] <= 100
    args = tiny_args(o2o_ppo, policy, tmp_path / "ppo", env_id=TASK, online_steps=8, eval_every=8)
    assert o2o_ppo.main(args)["status"] == "complete"


@pytest.mark.parametrize("change", [{"env_id": "kitchen-easy-v0"}, {"noise": -1.0}, {"num_steps": 0}, {"seed": -1}])
def test_refusals(change, capsys, monkeypatch):
    monkeypatch.setattr(kitchen, "parse_args", lambda: kitchen.Args(**change))
    with pytest.raises(SystemExit) as stop:
        kitchen.run_cli(kitchen.main)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_it_is_not_made_over_another(dataset):
    with pytest.raises(kitchen.UserError, match="exists at"):
        kitchen.main(kitchen.Args(env_id=TASK, num_steps=250))


def test_a_policy_observes_as_it_was_trained(dataset):
    """The recovered environment's observations are the collecting one's, but for their noise."""
    source = minari.load_dataset(f"o2o/{TASK}")
    first = np.stack([episode.observations[0] for episode in dataset])
    obs, _ = source.recover_environment().reset(seed=0)
    assert obs.shape == (59,) and torch.as_tensor(abs(obs - first[0])).max() < 0.1
