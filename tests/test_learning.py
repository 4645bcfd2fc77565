"""The slow one: a policy that is learned from nothing but data has to hop, and its checkpoint has to act the same."""

import collect
import cql
import pytest
import torch
from conftest import TASK

import o2o_sac


@pytest.mark.slow
def test_cql_learns_to_hop(tmp_path, monkeypatch):
    """800 updates on 20,000 transitions of the medium policy (48 points); random actions make 1 point. Eight seeds made
    35 to 77 with this larger learning rate, which short training needs."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect.main(collect.Args(env_id=TASK, num_steps=20_000))
    args = cql.Args(updates=800, eval_every_updates=800, policy_lr=3e-4, cql_actions=3, bf16=True)
    args.output, args.run_dir = str(tmp_path / "cql.pt"), str(tmp_path / "run")
    cql.main(args)
    args = o2o_sac.Args(checkpoint=str(tmp_path / "cql.pt"))
    data = o2o_sac.load_data(args, torch.device("cpu"))
    policy = o2o_sac.load_actor(args, args.checkpoint, type("Folder", (), {"dir": tmp_path}), data)
    returns = o2o_sac.evaluate(o2o_sac.mode_of(policy), [data.make_env() for _ in range(20)], 0, "cpu")[0]
    score = data.score(returns.mean())
    assert score > 25
    assert abs(score - torch.load(tmp_path / "cql.pt", weights_only=True)["score"]) < 25
