"""What every script that keeps a buffer puts into it, and draws from it: rewards of the data and of the environment in
one unit, scaled as the flags and the checkpoint say, and the promised share of the data in every batch."""

import gymnasium as gym
import iql
import numpy as np
import pytest
import torch
from conftest import SMALL, tiny_args, tiny_policy

import o2o_sac
import o2o_td3
import o3f
from baselines import aca, awac, cal_ql, off2on, pex, proto, rlpd, wsrl
from baselines import iql as iql_online

SCRIPTS = [o2o_sac, o2o_td3, o3f, rlpd, wsrl, cal_ql, iql_online, pex, awac, proto, aca, off2on]


@pytest.fixture(scope="module")
def scaled_iql(minari_store, tmp_path_factory):
    """An IQL policy with five critics, so that it fits all of them. IQL scales its rewards."""
    return tiny_policy(iql, tmp_path_factory.mktemp("iql"), num_critics=5)


class Rewards(gym.Wrapper):
    def __init__(self, env, log):
        super().__init__(env)
        self.log = log

    def step(self, action):
        result = self.env.step(action)
        self.log.append(result[1])
        return result


def small(script, checkpoints, scaled_iql, run_dir, **changes):
    """-> arguments of a run of 24 steps, the scale that its checkpoint brings."""
    if script in checkpoints:
        return tiny_args(script, checkpoints[script], run_dir, online_steps=24, eval_every=24, **changes), 1.0
    options = SMALL[script] | {"online_steps": 24, "eval_every": 24, "run_dir": str(run_dir)} | changes
    if script not in (o3f, pex, iql_online):
        return script.Args(**options), 1.0
    scale = torch.load(scaled_iql, weights_only=True)["reward_scale"]
    assert scale != 1
    return script.Args(**options | {"checkpoint": str(scaled_iql)}), scale


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_rewards_of_the_data_and_of_the_environment_are_scaled_alike(
    script, checkpoints, scaled_iql, tmp_path, monkeypatch
):
    log, seen, real = [], [], script.online_start

    def online_start(args, run, data):
        env, obs, buffer, first = real(args, run, data)
        seen.append((buffer, first))
        return Rewards(env, log), obs, buffer, first

    monkeypatch.setattr(script, "online_start", online_start)
    args, scale = small(script, checkpoints, scaled_iql, tmp_path / "run", reward_scale=2.0, reward_bias=-1.0)
    script.main(args)
    (buffer, first), column = seen[0], 11 + 3
    data = script.load_data(script.Args(), torch.device("cpu"))
    raw = data.rows[:, column]
    assert len(log) == 24 and len(raw) == first
    if script in (awac, proto):  # scaled by the range of the data's returns, in closed form in test_losses.py
        scale = script.reward_scale(2 * raw - 1, data.last)
        assert scale != 1
    torch.testing.assert_close(buffer[:first, column], scale * (2 * raw - 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(buffer[first:, column], scale * (2 * np.array(log) - 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("script", [rlpd, pex], ids=lambda module: module.__name__)
def test_the_share_of_the_data_in_a_batch(script, checkpoints, scaled_iql, tmp_path, monkeypatch, fraction):
    shares, real = [], script.draw

    def draw(generator, first, *rest):
        index = real(generator, first, *rest)
        shares.append(float((index < first).float().mean()))
        return index

    monkeypatch.setattr(script, "draw", draw)
    script.main(small(script, checkpoints, scaled_iql, tmp_path / "run", offline_fraction=fraction)[0])
    assert len(shares) == 20 and set(shares) == {fraction}
