import os
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "offline"), str(ROOT / "benchmark"), str(ROOT / "tools")]

import bc  # noqa: E402
import collect  # noqa: E402
import cql  # noqa: E402
import dt  # noqa: E402
import gymnasium as gym  # noqa: E402
import iql  # noqa: E402
import lapo  # noqa: E402
import minari  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import td3_bc  # noqa: E402
import torch  # noqa: E402
from minari.data_collector import EpisodeBuffer  # noqa: E402

import o2o_ppo  # noqa: E402
import o2o_sac  # noqa: E402
import o2o_td3  # noqa: E402
import o3f  # noqa: E402
from baselines import aca, awac, cal_ql, off2on, pex, proto, rlpd, wsrl  # noqa: E402
from baselines import iql as iql_online  # noqa: E402

torch.set_num_threads(1)
for module in (
    bc,
    cql,
    dt,
    iql,
    lapo,
    td3_bc,
    o2o_sac,
    o2o_td3,
    o2o_ppo,
    o3f,
    rlpd,
    wsrl,
    cal_ql,
    pex,
    awac,
    proto,
    aca,
    off2on,
    iql_online,
):
    module.closing_score = partial(module.closing_score, episodes=1)  # 50 are for people
TASK = "hopper-medium-v2"
OFFLINE_PHASE = {"offline_steps": 4, "eval_every_updates": 2}
SMALL = {  # a run of each that takes seconds, from nothing or from IQL
    iql_online: {},
    rlpd: {"warm_up": 4, "updates_per_step": 1, "num_critics": 3},
    wsrl: OFFLINE_PHASE | {"warm_up": 4, "updates_per_step": 1, "num_critics": 3, "cql_actions": 2},
    cal_ql: OFFLINE_PHASE | {"cql_actions": 2, "actor_layers": 2, "critic_layers": 2},
    awac: OFFLINE_PHASE,
    proto: OFFLINE_PHASE,
    aca: OFFLINE_PHASE,
    off2on: OFFLINE_PHASE | {"round_steps": 8, "first_round": 1, "num_agents": 2, "cql_actions": 2},
    pex: {"warm_up": 4},
    o3f: {"base": "iql", "updates_per_step": 1, "num_candidates": 5},
}
for options in SMALL.values():
    options |= {"online_steps": 8, "eval_every": 4, "eval_episodes": 1, "batch_size": 16, "compile": False} | options


@pytest.fixture(scope="session", autouse=True)
def minari_store(tmp_path_factory):
    """A Minari store with a small dataset of the shipped behaviour policy: no test touches the user's store."""
    store = tmp_path_factory.mktemp("minari")
    os.environ["MINARI_DATASETS_PATH"] = str(store)
    collect.main(collect.Args(env_id=TASK, num_steps=3000, num_envs=4))
    return store


def pendulum_episode(env, seed, steps=60):
    rng = np.random.default_rng(seed)
    observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
    for _ in range(steps):
        actions.append(rng.uniform(-1, 1, 1).astype(np.float32))
        obs, reward, *_ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(reward)
    flags = np.zeros(steps, dtype=bool), np.arange(steps) == steps - 1
    columns = np.array(observations, np.float32), np.array(actions), np.array(rewards), *flags
    return EpisodeBuffer(None, seed, None, *columns)


@pytest.fixture(scope="session")
def pendulum(minari_store):
    """The task name of a dataset on an environment that no script knows, with actions rescaled by a wrapper."""
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1", max_episode_steps=60), -1.0, 1.0)
    episodes = [pendulum_episode(env, seed) for seed in range(5)]
    options = {"ref_min_score": -1500.0, "ref_max_score": -150.0, "author": "o2o", "author_email": "a@b.c"}
    minari.create_dataset_from_buffers("o2o/pendulum-random-v0", episodes, env=env, eval_env=env, **options)
    return "pendulum-random-v0"


def tiny_policy(module, folder, **changes):
    """A barely trained offline policy of this offline script. -> its path."""
    settings = {"updates": 4, "eval_every_updates": 2, "eval_episodes": 1, "batch_size": 16, "compile": False}
    settings |= {"output": str(folder / f"{module.__name__}.pt"), "run_dir": str(folder / "run")}
    module.main(module.Args(**settings | changes))
    return folder / f"{module.__name__}.pt"


@pytest.fixture(scope="session")
def checkpoints(minari_store, tmp_path_factory):
    """Those that each script takes by default."""
    pairs = ((cql, o2o_sac), (td3_bc, o2o_td3), (iql, o2o_ppo))
    return {script: tiny_policy(module, tmp_path_factory.mktemp(module.__name__)) for module, script in pairs}


@pytest.fixture(scope="session")
def checkpoint(checkpoints):
    """A CQL checkpoint."""
    return checkpoints[o2o_sac]


def for_scripts(*modules):
    """Limits a test that takes `script` to these."""
    return pytest.mark.parametrize("script", modules, indirect=True, ids=lambda module: module.__name__)


@pytest.fixture(params=[o2o_sac, o2o_td3, o2o_ppo], ids=lambda module: module.__name__)
def script(request):
    """Each of the scripts in turn, for what all of them promise."""
    return request.param


def tiny_args(script, checkpoint, run_dir, **changes):
    """Arguments of a run of `script` that takes seconds."""
    settings = {
        "checkpoint": str(checkpoint),
        "run_dir": str(run_dir),
        "reevaluation_steps": 4,
        "alignment_steps": 4,
        "online_steps": 12,
        "warm_up": 4,
        "updates_per_step": 2,
        "eval_every": 4,
        "eval_every_updates": 2,
        "eval_episodes": 1,
        "batch_size": 16,
        "compile": False,
    }
    if script is o2o_ppo:
        for name in ("warm_up", "updates_per_step"):
            del settings[name]
        settings |= {"alignment_steps": 250_000, "rollout": 4, "minibatch_size": 2, "epochs": 2}
    return script.Args(**(settings | changes))


@pytest.fixture
def tiny(script, checkpoints, tmp_path):
    """tiny_args of the script, in tmp_path/run; keyword arguments change them."""
    settings = {"checkpoint": checkpoints[script], "run_dir": tmp_path / "run"}
    return lambda **changes: tiny_args(script, **(settings | changes))


@pytest.fixture
def imitations(monkeypatch):
    """The commands by which online scripts call offline/bc.py, which runs in this process, for a few updates."""
    calls, flags = [], ["--updates", "4", "--eval-every-updates", "2", "--eval-episodes", "1", "--no-compile"]

    def in_process(command):
        calls.append(command)
        bc.main(bc.parse_args([*map(str, command[2:]), *flags]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_process)
    return calls
