"""baselines/iql.py: what the environment and the buffer see, what an update moves, exact resume, refusals. The losses
are those of offline/iql.py, to the letter (test_shared.py), and tested in test_losses.py."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import iql
import numpy as np
import pytest
import torch
from conftest import tiny_policy

import o3f
from baselines import iql as online


@pytest.fixture(scope="module")
def policy(minari_store, tmp_path_factory):
    return tiny_policy(iql, tmp_path_factory.mktemp("iql"))


def tiny(policy, run_dir, **changes):
    settings = {"online_steps": 12, "eval_every": 4, "eval_episodes": 1, "batch_size": 16, "compile": False}
    return online.Args(**settings | {"checkpoint": str(policy), "run_dir": str(run_dir)} | changes)


def test_it_begins_where_the_offline_run_ended(policy):
    data = online.load_data(online.Args(), torch.device("cpu"))
    nets, saved = online.load_iql(policy, online.Args(), data)
    for key in ("actor", "critics", "value"):
        assert all(torch.equal(x, saved[key][name]) for name, x in nets[key].state_dict().items())
    assert all(
        torch.equal(a, b) for a, b in zip(nets["targets"].parameters(), nets["critics"].parameters(), strict=True)
    )


def test_a_run_moves_everything_and_resumes_exactly(policy, tmp_path, monkeypatch):
    summary = online.main(tiny(policy, tmp_path / "whole"))
    assert summary["status"] == "complete" and [step for step, _ in summary["scores"]] == [4, 8, 12]
    real, calls = online.draw_curve, []

    def cut_off(run):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(online, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            online.main(tiny(policy, tmp_path / "cut"))
    assert online.main(online.parse_args(["--resume", str(tmp_path / "cut")]))["scores"] == summary["scores"]
    whole, cut = (torch.load(tmp_path / name / "resume.pt", weights_only=True)["nets"] for name in ("whole", "cut"))
    start = torch.load(policy, weights_only=True)
    for net in whole:
        assert all(torch.equal(value, cut[net][key]) for key, value in whole[net].items())
        if net != "targets":
            weights = [key for key in whole[net] if "obs" not in key]
            assert any(not torch.equal(whole[net][key], start[net][key]) for key in weights), f"{net} stood still"


def test_rewards_are_scaled_as_in_the_offline_training_and_actions_are_drawn(policy, tmp_path):
    online.main(tiny(policy, tmp_path / "run", reward_scale=2.0, reward_bias=-1.0, online_steps=8))
    rows = torch.load(tmp_path / "run/resume.pt", weights_only=True)["online"]
    raw = online.load_data(online.Args(), torch.device("cpu")).rows[:, 14]
    scale = torch.load(policy, weights_only=True)["reward_scale"]
    rewards = (rows[:, 14] / scale + 1) / 2  # hopper's own lie between about 0 and 6
    assert raw.min() - 3 < rewards.min() and rewards.max() < raw.max() + 3
    actor = online.load_iql(policy, online.Args(), online.load_data(online.Args(), torch.device("cpu")))[0]["actor"]
    assert (rows[:, 11:14] - actor.mode(rows[:, :11])).abs().max() > 0.1, "the first action has the policy's noise"


def test_its_model_is_a_start_for_the_next_run_and_for_o2o_ppo(policy, tmp_path):
    import o2o_ppo

    online.main(tiny(policy, tmp_path / "run", online_steps=4))
    model = tmp_path / "run/model.pt"
    assert online.main(tiny(model, tmp_path / "next", online_steps=4))["status"] == "complete"
    data = o2o_ppo.load_data(o2o_ppo.Args(), torch.device("cpu"))
    actor = o2o_ppo.load_actor(o2o_ppo.Args(), model, type("Run", (), {"dir": tmp_path}), data)
    assert np.isfinite(actor.mode(data.rows[:3, :11]).detach().numpy()).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved.pop("critics"), "no complete IQL"),
        (lambda saved: saved.update(num_critics=10**9), "no complete IQL"),
        (lambda saved: saved.update(env_id="walker2d-medium-v2"), "not IQL for hopper"),
        (lambda saved: saved["policy"].update(kind="deterministic"), "not IQL for hopper"),
        (lambda saved: saved["value"].update(obs_mean=torch.zeros(5)), "expects 5 observations"),
        (lambda saved: saved["value"].update(obs_std=torch.zeros(11)), "not positive"),
    ],
)
def test_checkpoints_that_do_not_fit(policy, tmp_path, change, words):
    saved = torch.load(policy, weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "changed.pt")
    with pytest.raises(online.UserError, match=words):
        online.main(tiny(tmp_path / "changed.pt", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "schedule, values", [("abrupt", [0.85] * 12), ("linear", [0.7 + 0.0125 * i for i in range(1, 13)])]
)
def test_schedule_moves_the_expectile(policy, tmp_path, monkeypatch, schedule, values):
    seen, real = [], online.make_iql_update

    def spied(args, *inputs):
        update = real(args, *inputs)
        return lambda *batch: seen.append(float(args.expectile)) or update(*batch)

    monkeypatch.setattr(online, "make_iql_update", spied)
    online.main(tiny(policy, tmp_path / "run", schedule=schedule, warm_up=0))
    assert seen == pytest.approx(values)


def test_compiled_equals_eager_while_the_expectile_moves(policy, monkeypatch):
    """As graphs, whose C++ takes a minute more: a number that was compiled into them would show."""
    monkeypatch.setattr(online.torch, "compile", partial(torch.compile, backend="aot_eager"))
    data, results = online.load_data(online.Args(), torch.device("cpu")), []
    start, _ = online.load_iql(policy, online.Args(), data)
    for compiled, moves in ((False, True), (True, True), (True, False)):
        nets, expectile = deepcopy(start), torch.tensor(0.7)
        optimizers = {key: online.Adam(nets[key].parameters(), 1e-3) for key in ("actor", "value", "critics")}
        args = replace(online.Args(compile=compiled), expectile=expectile)
        update = online.compile_update(online.make_iql_update(args, nets, optimizers, data.split), args)
        for i in range(4):
            expectile.fill_(0.5 + 0.1 * i if moves else 0.5)
            update(data.rows[16 * i : 16 * i + 16], None, torch.ones(()))
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    eager, graph, still = results
    assert (eager - graph).abs().mean() < 0.01 * (eager - still).abs().mean()


def test_dropout_is_of_the_policy_alone_and_compiled_equals_eager(policy, tmp_path, monkeypatch):
    """Offline, online and in O3F, one update: critics and V are those without it, and the draw decides."""
    monkeypatch.setattr(online.torch, "compile", partial(torch.compile, backend="aot_eager"))
    data = online.load_data(online.Args(), torch.device("cpu"))
    start, _ = online.load_iql(policy, online.Args(), data)

    def updated(dropout, seed, compiled=False):
        nets, args = deepcopy(start), online.Args(compile=compiled, dropout=dropout)
        optimizers = {key: online.Adam(nets[key].parameters(), 1e-3) for key in ("actor", "value", "critics")}
        update = online.compile_update(online.make_iql_update(args, nets, optimizers, data.split), args)
        noise = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(seed))
        update(data.rows[:16], noise, torch.ones(()))
        return {key: torch.cat([x.flatten() for x in net.parameters()]) for key, net in nets.items()}

    without, first, second, graph = updated(0.0, 0), updated(0.3, 0), updated(0.3, 1), updated(0.3, 0, compiled=True)
    assert all(torch.equal(without[key], first[key]) for key in ("value", "critics", "targets"))
    assert not torch.equal(without["actor"], first["actor"]) and not torch.equal(first["actor"], second["actor"])
    assert torch.allclose(first["actor"], graph["actor"], atol=1e-6)


def test_runs_with_dropout_go_through_and_hand_it_on(minari_store, tmp_path, monkeypatch):
    seen, real = [], online.dropout_forward
    for module in (iql, online, o3f):
        monkeypatch.setattr(module, "dropout_forward", lambda *inputs: seen.append(inputs[2:]) or real(*inputs))
    path = tiny_policy(iql, tmp_path, dropout=0.1, num_critics=2)
    assert online.main(tiny(path, tmp_path / "online", dropout=0.2))["status"] == "complete"
    given = {"online_steps": 4, "eval_every": 4, "eval_episodes": 1, "batch_size": 16, "compile": False}
    args = o3f.Args(base="iql", checkpoint=str(path), run_dir=str(tmp_path / "o3f"), num_candidates=3, **given)
    assert o3f.main(args)["status"] == "complete" and args.dropout == 0.1, "O3F goes on with that of the training"
    assert [dropout for _, dropout in seen] == [0.1] * 4 + [0.2] * 12 + [0.1] * 4
    assert all(noise.shape == (2, 16, 256) for noise, _ in seen) and not torch.equal(seen[0][0], seen[1][0])
    assert online.settings(online.Args(env_id="kitchen-mixed-v0"))["dropout"] == 0.1
