"""The slow one: a policy that is learned from nothing but data has to hop, and its checkpoint has to act the same."""

import collect
import pytest
import td3_bc
import torch
from conftest import TASK

import o2o_td3


@pytest.mark.slow
def test_td3_bc_learns_to_hop(tmp_path, monkeypatch):
    """1,000 updates on 20,000 transitions of the medium policy (48 points); random actions make 1 point. Four seeds
    made 35 to 47."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    collect.main(collect.Args(env_id=TASK, num_steps=20_000))
    args = td3_bc.Args(updates=1000, eval_every_updates=1000, compile=False)
    args.output, args.run_dir = str(tmp_path / "td3_bc.pt"), str(tmp_path / "run")
    td3_bc.main(args)
    args = o2o_td3.Args(checkpoint=str(tmp_path / "td3_bc.pt"))
    data = o2o_td3.load_data(args, torch.device("cpu"))
    policy = o2o_td3.load_actor(args, args.checkpoint, type("Folder", (), {"dir": tmp_path}), data)
    returns = o2o_td3.evaluate(o2o_td3.mode_of(policy), [data.make_env() for _ in range(20)], 0, "cpu")[0]
    score = data.score(returns.mean())
    assert score > 20
    assert abs(score - torch.load(tmp_path / "td3_bc.pt", weights_only=True)["score"]) < 25
