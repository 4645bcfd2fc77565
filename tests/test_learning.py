"""The slow one: a policy that is learned from nothing but data has to hop, and its checkpoint has to act the same."""

import collect
import cql
import numpy as np
import pytest
from conftest import TASK

import o2o_sac


@pytest.mark.slow
def test_cql_learns_to_hop(tmp_path, monkeypatch):
    """A thousand updates on 20,000 transitions of the medium policy (48 points); random actions make 1 point."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect.main(collect.Args(env_id=TASK, num_steps=20_000))
    args = cql.Args(updates=1000, eval_every=500, matmul_precision="medium")
    args.output, args.run_dir = str(tmp_path / "cql.pt"), str(tmp_path / "run")
    cql.main(args)
    data = o2o_sac.load_dataset(TASK)
    policy, saved = o2o_sac.load_policy(tmp_path / "cql.pt", TASK, data.obs_dim, data.act_dim, 0.1)
    envs = [data.make_env() for _ in range(20)]
    mean_return, _, _ = o2o_sac.evaluate(o2o_sac.mode_of(policy), envs, 0, "cpu")
    score = o2o_sac.normalized_score(TASK, mean_return)
    assert score > 25
    assert np.isfinite(saved["score"])
