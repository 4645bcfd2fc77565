import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "offline")]

import collect  # noqa: E402
import cql  # noqa: E402
import iql  # noqa: E402
import pytest  # noqa: E402
import td3_bc  # noqa: E402
import torch  # noqa: E402

import o2o_ppo  # noqa: E402
import o2o_sac  # noqa: E402
import o2o_td3  # noqa: E402

torch.set_num_threads(1)
TASK = "hopper-medium-v2"


@pytest.fixture(scope="session", autouse=True)
def minari_store(tmp_path_factory):
    """A Minari store with a small dataset of the shipped behaviour policy: no test touches the user's store."""
    store = tmp_path_factory.mktemp("minari")
    os.environ["MINARI_DATASETS_PATH"] = str(store)
    collect.main(collect.Args(env_id=TASK, num_steps=3000, num_envs=4))
    return store


@pytest.fixture(scope="session")
def checkpoints(minari_store, tmp_path_factory):
    """Barely trained offline policies, small and quick: those that each script takes by default."""
    paths = {}
    for module, script in ((cql, o2o_sac), (td3_bc, o2o_td3), (iql, o2o_ppo)):
        folder = tmp_path_factory.mktemp(module.__name__)
        paths[script] = folder / f"{module.__name__}.pt"
        args = module.Args(updates=4, eval_every=2, eval_episodes=1, batch_size=16, compile=False)
        args.output, args.run_dir = str(paths[script]), str(folder / "run")
        module.main(args)
    return paths


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


@pytest.fixture
def tiny(script, checkpoints, tmp_path):
    """Arguments of a run of `script` that takes seconds; keyword arguments change them."""

    def make(**changes):
        settings = {
            "checkpoint": str(checkpoints[script]),
            "run_dir": str(tmp_path / "run"),
            "reevaluation_steps": 4,
            "alignment_steps": 4,
            "online_steps": 12,
            "warm_up": 4,
            "updates_per_step": 2,
            "eval_every": 4,
            "eval_every_updates": 2,
            "eval_episodes": 1,
            "batch_size": 16,
            "fit_steps": 3,
            "compile": False,
        }
        if script is o2o_ppo:
            for name in ("warm_up", "updates_per_step"):
                del settings[name]
            settings |= {"alignment_steps": None, "rollout": 4, "minibatch_size": 2, "epochs": 2}
        return script.Args(**(settings | changes))

    return make
