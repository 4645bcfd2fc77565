import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "offline")]

import collect  # noqa: E402
import cql  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

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
def checkpoint(minari_store, tmp_path_factory):
    """A barely trained CQL checkpoint, small and quick."""
    folder = tmp_path_factory.mktemp("cql")
    path = folder / "cql.pt"
    args = cql.Args(updates=4, eval_every=2, eval_episodes=1, batch_size=16, compile=False)
    args.output, args.run_dir = str(path), str(folder / "run")
    cql.main(args)
    return path


@pytest.fixture
def tiny(checkpoint, tmp_path):
    """Arguments of a run of o2o_sac that takes seconds; keyword arguments change them."""
    import o2o_sac

    def make(**changes):
        settings = {
            "checkpoint": str(checkpoint),
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
        return o2o_sac.Args(**(settings | changes))

    return make
