"""AntMaze: the maps are D4RL's, the ant finds its way, the dataset carries its maze, every script runs on it."""

import collect
import collect_antmaze as antmaze
import cql
import fallen_ant
import gymnasium as gym
import iql
import numpy as np
import pytest
import td3_bc
import torch
from behaviour import Directional
from conftest import tiny_args, tiny_policy
from gymnasium_robotics.envs.maze import maps

import o2o_ppo
import o2o_sac
import o2o_td3
import o3f

TASK = "antmaze-umaze-v2"


@pytest.fixture(scope="module")
def data(minari_store):
    collect.main(collect.Args(env_id=TASK, num_steps=4000))
    return o2o_sac.load_data(o2o_sac.Args(env_id=TASK), torch.device("cpu"))


@pytest.mark.parametrize("maze", antmaze.MAZES)
def test_the_mazes_are_the_environments_and_cells_lie_where_it_has_them(maze):
    walls = {"umaze": maps.U_MAZE, "medium": maps.MEDIUM_MAZE, "large": maps.LARGE_MAZE}[maze]
    rows = antmaze.MAZES[maze][1].split()
    assert [[kind == "1" for kind in row] for row in rows] == [[cell == 1 for cell in row] for row in walls]
    env = antmaze.maze_env(maze, evaluation=True)
    for cell in antmaze.free_cells(maze):
        middle = antmaze.middle(maze, cell)
        np.testing.assert_allclose(middle, env.unwrapped.maze.cell_rowcol_to_xy(np.array(cell)))
        for shift in (-1.9, 0, 1.9):
            assert antmaze.cell_of(maze, middle + shift) == cell
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        assert obs.shape == (29,) and antmaze.cell_of(maze, obs[:2]) == antmaze.free_cells(maze, "r")[0]
        goal = env.unwrapped.goal - antmaze.middle(maze, antmaze.free_cells(maze, "g")[0])
        assert (abs(goal) <= antmaze.SPREAD).all()


def test_ways_are_the_shortest():
    found = antmaze.next_cells("umaze", (3, 1))
    way = [(1, 1)]
    while way[-1] != (3, 1):
        way.append(found[way[-1]])
    assert way == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    for maze in antmaze.MAZES:
        for goal in antmaze.free_cells(maze):
            assert set(antmaze.next_cells(maze, goal)) == set(antmaze.free_cells(maze)), "every cell can be reached"


def test_what_the_ant_sees_does_not_depend_on_where_north_is():
    env = gym.make("Ant-v5", include_cfrc_ext_in_observation=False).unwrapped
    rng, seen = np.random.default_rng(0), []
    qpos, qvel = env.init_qpos + 0.1 * rng.normal(size=15), rng.normal(size=14)
    qpos[3:7] /= np.linalg.norm(qpos[3:7])
    for yaw in (0.0, 1.0, 3.0):
        turn, cos, sin = np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]), np.cos(yaw), np.sin(yaw)
        w, x, y, z = qpos[3:7]
        product = [w * turn[0] - z * turn[3], x * turn[0] - y * turn[3], y * turn[0] + x * turn[3]]
        product.append(z * turn[0] + w * turn[3])  # the turn after the ant's own orientation
        rotate = np.array([[cos, -sin], [sin, cos]])
        position, velocity = qpos.copy(), qvel.copy()
        position[3:7], velocity[:2] = product, rotate @ qvel[:2]
        obs = np.concatenate([position[2:], velocity])
        seen.append(antmaze.heading(obs[None], (rotate @ [0.6, 0.8])[None])[0])
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-12)
    np.testing.assert_allclose(seen[0], seen[2], atol=1e-12)


def test_the_directional_ant_is_paid_for_its_speed_and_repeats_itself():
    env = Directional()
    env.reset(seed=3)
    env.unwrapped.set_state(env.unwrapped.init_qpos, np.concatenate([env.direction, np.zeros(12)]))
    before = env.unwrapped.data.qpos[:2].copy()
    direction = env.direction
    _, reward, *_ = env.step(np.full(8, 0.1))
    speed = (env.unwrapped.data.qpos[:2] - before) @ direction / env.unwrapped.dt
    assert 0 < speed < 2.5 and reward == pytest.approx(speed + 1 - 0.5 * 8 * 0.01)
    first = [env.reset(seed=9)[0], *(env.step(np.full(8, 0.3))[0] for _ in range(120))]
    again = [env.reset(seed=9)[0], *(env.step(np.full(8, 0.3))[0] for _ in range(120))]
    np.testing.assert_array_equal(first, again)


def test_the_ant_reaches_the_goal():
    actor, _ = antmaze.load_ant(antmaze.Path(antmaze.__file__).parent / "checkpoints/behaviour/ant.pt")
    assert antmaze.evaluate_ant(actor, "umaze", 1, episodes=20) >= 0.7


def test_an_ant_on_its_back_is_recorded_to_the_time_limit():
    walk, rng, over = antmaze.Walk("umaze", "", 1), np.random.default_rng(0), False
    walk.begin()
    while not over:
        action = rng.choice([-1.0, 1.0], 8) if len(walk.steps) % 3 == 0 else walk.steps[-1]
        over = walk.step(action)
    backs = [obs[4] ** 2 + obs[5] ** 2 > 0.5 for obs in walk.observations]
    assert len(walk.steps) == 700 and sum(backs) > 300 and not walk.reached


def test_the_shipped_critic_knows_what_a_fall_costs():
    for fallen, upright in fallen_ant.main(fallen_ant.Args(episodes=3)).values():
        assert fallen < upright - 5


def test_rewards_and_ends_are_those_of_the_evaluations_goal():
    observations = np.zeros((4, 29))
    observations[:, 0] = [0.0, 0.3, 0.5, 0.9]
    rewards, ends = antmaze.relabelled(observations, np.array([0.9, 0.0]))
    assert rewards.tolist() == [0, 1, 1] and ends.tolist() == [False, True, True]


def test_the_dataset(data):
    obs, action, reward, next_obs, terminated = data.split(data.rows)
    assert data.obs_dim == 29 and data.act_dim == 8 and len(data.rows) >= 4000
    assert (reward == terminated).all() and 0.001 < reward.mean() < 0.3
    assert (terminated <= data.last.float()).all(), "what ends an episode is its last transition"
    assert (next_obs[:, :2] - obs[:, :2]).norm(dim=1).max() < 1, "a transition leads from one episode into another"
    cells = {antmaze.cell_of("umaze", xy) for xy in obs[:, :2].numpy()}
    assert cells == set(antmaze.free_cells("umaze")), "the corridor from start to goal is all of this maze"
    assert data.score(0.5) == pytest.approx(50) and action.abs().max() <= 1


def test_the_dataset_carries_its_maze_and_an_episode_ends_at_the_goal(data):
    env = data.make_env()
    env.reset(seed=0)
    ant = env.unwrapped.ant_env.unwrapped
    qpos = ant.data.qpos.copy()
    qpos[:2] = env.unwrapped.goal
    ant.set_state(qpos, ant.data.qvel.copy())
    obs, reward, terminated, _, _ = env.step(np.zeros(8))
    assert obs.shape == (29,) and reward == 1 and terminated
    assert env.spec.max_episode_steps == 700
    np.testing.assert_allclose(obs[:2], env.unwrapped.goal, atol=0.2)


@pytest.mark.parametrize(
    ("task", "starts", "goals"),
    [("umaze", 1, 1), ("umaze-diverse", 7, 7), ("medium-play", 26, 4), ("medium-diverse", 26, 26),
     ("large-play", 46, 7), ("large-diverse", 46, 46)],
)  # fmt: skip
def test_starts_and_goals_of_every_name(task, starts, goals):
    walk = antmaze.Walk(*antmaze.parse_maze(f"antmaze-{task}-v2"), 0)
    assert (len(walk.starts), len(walk.goals)) == (starts, goals)
    for _ in range(3):
        walk.begin()
        assert antmaze.cell_of(walk.maze, walk.observations[0][:2]) != walk.goal


def test_settings_of_the_task():
    assert o2o_sac.parse_args(["--env-id", TASK]).num_critics == 1
    assert o2o_sac.parse_args(["--env-id", "antmaze-large-play-v2"]).alpha == 0.5
    assert o2o_td3.parse_args(["--env-id", TASK, "--reward-bias", "0"]).reward_bias == 0, "the command line wins"
    assert (
        iql.parse_args(["--env-id", TASK]).expectile == 0.9 and not iql.parse_args(["--env-id", TASK]).normalize_rewards
    )
    assert cql.parse_args(["--env-id", TASK]).lagrange and o2o_ppo.parse_args(["--env-id", TASK]).reward_bias == -1


@pytest.mark.parametrize("script", [o2o_sac, o2o_td3, o2o_ppo, o3f], ids=lambda module: module.__name__)
def test_every_script_runs_on_it_and_scores_raw_rewards(script, data, tmp_path, monkeypatch):
    source = {o2o_sac: cql, o2o_td3: td3_bc}.get(script, iql)
    monkeypatch.setattr(gym.wrappers.TimeLimit, "step", shorter(gym.wrappers.TimeLimit.step))
    changes = {"reward_scale": 10.0, "reward_bias": -5.0} if script is o2o_sac else {"reward_bias": -1.0}
    policy = tiny_policy(source, tmp_path, env_id=TASK, **changes, **({} if source is cql else {}))
    if script is o3f:
        changes |= {"base": "iql", "updates_per_step": 1, "online_steps": 8, "eval_every": 4, "eval_episodes": 1}
        args = o3f.Args(env_id=TASK, checkpoint=str(policy), run_dir=str(tmp_path / "online"), compile=False, **changes)
    else:
        args = tiny_args(script, policy, tmp_path / "online", env_id=TASK, **changes)
    summary = script.main(args)
    assert summary["status"] == "complete" and all(0 <= score <= 100 for _, score in summary["scores"])
    if script in (o2o_sac, o2o_td3):
        online = torch.load(tmp_path / "online/resume.pt", weights_only=True)["online"]
        assert (online[:, 29 + 8] == changes["reward_bias"]).all(), "no success, so the scaled reward is the bias"


def shorter(step):
    """Episodes of 40 steps, so that evaluations take no time."""

    def limited(self, action):
        self._max_episode_steps = min(self._max_episode_steps, 40)
        return step(self, action)

    return limited
