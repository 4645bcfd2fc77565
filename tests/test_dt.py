"""offline/dt.py: windows, losses and histories by hand, causality and padding, exact resume; and what reads its
checkpoints: offline/bc.py, tools/enjoy.py, the online scripts."""

import json
import math
import random
from copy import deepcopy
from functools import partial

import bc
import dt
import enjoy
import numpy as np
import pytest
import torch
from conftest import TASK, tiny_args
from test_hostile import damaged, mutated
from torch import nn

import o2o_ppo
import o2o_sac
import o2o_td3

dt.closing_score = partial(dt.closing_score, episodes=1)  # 50 are for people
OBS, ACT, WIDTH = 4, 2, 4 + 2 + 2


def tiny(folder, **changes):
    settings = {"updates": 4, "eval_every_updates": 2, "eval_episodes": 1, "batch_size": 4, "window": 4, "context": 3}
    settings |= {"hidden": 8, "layers": 2, "heads": 2, "warm_up": 1, "target_return": 3600.0}
    return dt.Args(**settings | {"output": str(folder / "dt.pt"), "run_dir": str(folder / "run")} | changes)


def net(seed=0, hidden=(16, 16), heads=2):
    torch.manual_seed(seed)
    return dt.DecisionTransformer(torch.full((OBS,), 0.5), torch.full((OBS,), 2.0), ACT, list(hidden), heads)


def window(length=6, batch=3, seed=0):
    steps = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))
    steps[..., -1] = 1
    return steps


def test_borders_and_returns_to_go_by_hand():
    last = torch.tensor([0, 0, 1, 1, 0, 1]).bool()
    first, end = dt.borders(last)
    assert first.tolist() == [0, 0, 0, 3, 4, 4] and end.tolist() == [2, 2, 2, 3, 5, 5]
    assert dt.rewards_left(torch.tensor([1.0, 2, 4, 8, -1, 3]), last).tolist() == [7, 6, 4, 8, 2, 3]


def test_windows_by_hand():
    steps = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    found = dt.windows(steps, torch.tensor([0, 0, 2]), torch.tensor([1, 3, 3]), 3)
    assert found[..., 0].tolist() == [[0, 1, 2], [2, 3, 4], [0, 3, 4]]
    assert found[..., 1].tolist() == [[0, 1, 1], [1, 1, 1], [0, 1, 1]]


def test_losses_by_hand():
    log_prob, entropy = torch.tensor([[9.0, 1.0], [2.0, 3.0]]), torch.tensor([[7.0, 1.0], [1.0, 4.0]])
    loss, *means = dt.sequence_loss(log_prob, entropy, torch.tensor([[0.0, 1], [1, 1]]), 0.5)
    assert (loss.item(), *map(float, means)) == (-2 - 0.5 * 2, 2, 2)
    assert dt.temperature_loss(torch.tensor(math.log(0.5)), 1.0, -2).item() == pytest.approx(1.5)


@pytest.mark.parametrize("column, reach", [(0, 3), (1, 3), (-2, 4)], ids=["return", "observation", "action"])
def test_no_token_changes_an_earlier_action(column, reach):
    """Changed at step 3: the action of step 3 depends on its return and observation, that of step 4 on its action."""
    steps = window()
    changed = steps.clone()
    changed[:, 3, column] += 1
    (mean, log_std), (new_mean, new_log_std) = net()(steps), net()(changed)
    assert torch.equal(mean[:, :reach], new_mean[:, :reach]) and torch.equal(log_std[:, :reach], new_log_std[:, :reach])
    assert ((mean - new_mean)[:, reach:].abs().amax(-1) > 1e-6).all()


def test_padding_counts_for_nothing():
    steps = window()
    steps[0, :4, -1], steps[1, :, -1] = 0, 0
    other = steps.clone()
    other[0, :4, :-1] = 99
    mean, short = net()(steps)[0], net()(steps[:1, 4:])[0]
    assert torch.equal(mean[0, 4:], net()(other)[0][0, 4:]) and mean.isfinite().all()
    torch.testing.assert_close(mean[:1, 4:], short)


def test_observations_are_standardised_and_std_is_bounded():
    plain = dt.DecisionTransformer(torch.zeros(OBS), torch.ones(OBS), ACT, [16, 16], 2)
    weights = net().state_dict() | {key: plain.state_dict()[key] for key in ("obs_mean", "obs_std")}
    plain.load_state_dict(weights)
    steps = window()
    standardised = steps.clone()
    standardised[..., 1 : 1 + OBS] = (steps[..., 1 : 1 + OBS] - 0.5) / 2
    torch.testing.assert_close(plain(standardised), net()(steps))
    log_std = net()(1e4 * window())[1]
    assert log_std.min() >= -5 and log_std.max() <= 2


class Line(dt.gym.Env):
    """Its observation counts the steps; the reward is ten times that. Ends after five."""

    observation_space = dt.gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = dt.gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.count = 0
        return np.zeros(1), {}

    def step(self, action):
        self.count += 1
        return np.array([float(self.count)]), 10.0 * self.count, self.count == 5, False, {}


def test_the_return_asked_for_falls_by_the_reward_and_the_history_is_trimmed():
    env = dt.History(Line(), 3, 100.0, 0.1)
    for _ in range(2):  # a second episode remembers nothing of the first
        rows = env.reset()[0].reshape(3, 4)
        assert rows.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [10, 0, 0, 1]]
        for action in (0.5, -0.5, 0.25):
            rows = env.step(np.array([action], np.float32))[0].reshape(3, 4)
    assert rows.tolist() == [[9, 1, -0.5, 1], [7, 2, 0.25, 1], [4, 3, 0, 1]]
    assert env.observation_space.shape == (12,)


def test_a_history_is_what_windows_has_of_the_same_episode():
    """Asked for what the episode will bring, the policy sees the same in the data and in the environment."""
    env, seen, rewards = dt.History(Line(), 4, 150.0, 0.01), [], []
    obs, over = env.reset()[0], False
    while not over:
        seen.append(torch.tensor(obs.reshape(4, 4)))
        obs, reward, over, *_ = env.step(np.array([0.5]))
        rewards.append(reward)
    left = dt.rewards_left(torch.tensor(rewards), torch.arange(5) == 4)
    steps = torch.stack([0.01 * left, torch.arange(5.0), torch.full((5,), 0.5)], 1)
    data = dt.windows(steps, torch.zeros(5, dtype=torch.long), torch.arange(5), 4)
    data[:, -1, 2] = 0  # the current step has no action yet
    torch.testing.assert_close(torch.stack(seen).float(), data)


def test_a_batch_of_episodes_equals_one_by_one(minari_store):
    data = dt.load_data(dt.Args(), torch.device("cpu"))
    torch.manual_seed(0)
    policy = dt.DecisionTransformer(*dt.observation_stats(data), data.act_dim, [16, 16], 2)
    envs = [dt.History(data.make_env(), 5, 3600.0, 0.001) for _ in range(4)]
    together, _, steps = dt.evaluate(dt.mode_of(policy), envs, 7, data.rows.device)
    alone = [dt.evaluate(dt.mode_of(policy), envs[:1], 7 + i, data.rows.device)[0][0] for i in range(4)]
    assert together.tolist() == pytest.approx(alone, rel=1e-3) and len(set(alone)) == 4 and steps > 20


def parts(act=ACT, data=None, **changes):
    """-> nets, the update, and what it takes, on random steps or `data`."""
    args = dt.Args(**{"window": 4, "hidden": 8, "layers": 1, "heads": 2, "learning_rate": 1e-2} | changes)
    torch.manual_seed(0)
    actor = dt.DecisionTransformer(torch.zeros(OBS), torch.ones(OBS), act, [args.hidden] * args.layers, args.heads)
    nets = {"actor": actor, "log_temperature": nn.ParameterList([torch.tensor(math.log(args.temperature))])}
    optimizers = {"actor": dt.Adam(actor.parameters(), args.learning_rate, max_norm=args.max_norm)}
    optimizers["temperature"] = dt.Adam(nets["log_temperature"].parameters(), 0.1)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(50, 1 + OBS + act, generator=generator).tanh() if data is None else data
    spans, noise = torch.tensor([[0, 3], [7, 8], [20, 23]]), torch.randn(3, 4, act, generator=generator)
    update = dt.compile_update(dt.make_update(args, nets, optimizers, steps, act), args)
    return nets, update, (spans, noise, torch.tensor(1.0))


def flat(nets):
    return torch.cat([p.detach().flatten() for part in nets.values() for p in part.parameters()])


def test_an_update_moves_all_weights_by_its_rate_and_the_temperature_towards_the_target():
    nets, update, (spans, noise, scale) = parts()
    before = deepcopy(nets)
    values = update(spans, noise, scale)
    pairs = zip(before["actor"].parameters(), nets["actor"].parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)
    rises = nets["log_temperature"][0] > before["log_temperature"][0]
    assert rises == (values["entropy"] < -ACT)
    before = deepcopy(nets)
    update(spans, noise, torch.tensor(0.0))
    assert torch.equal(flat({"a": before["actor"]}), flat({"a": nets["actor"]}))


def test_the_updates_numbers_by_hand():
    nets, update, (spans, noise, scale) = parts()
    actor, generator = deepcopy(nets["actor"]), torch.Generator().manual_seed(0)
    steps = torch.randn(50, 1 + OBS + ACT, generator=generator).tanh()
    values = update(spans, noise, scale)
    log_prob, entropy = [], []
    for (first, last), rows in zip(spans.tolist(), noise, strict=True):
        x = torch.cat([steps[first : last + 1], torch.ones(last - first + 1, 1)], 1)
        mean, log_std = (y[0].double() for y in actor(x[None]))
        rows, u = rows[-len(x) :], torch.atanh(x[:, -1 - ACT : -1].double())
        normal = torch.distributions.Normal(mean, log_std.exp())
        density = lambda u, normal=normal: (normal.log_prob(u) - torch.log(1 - u.tanh() ** 2)).sum(-1)  # noqa: E731
        log_prob += density(u).tolist()
        entropy += (-density(mean + log_std.exp() * rows)).tolist()
    assert values["log_prob"].item() == pytest.approx(np.mean(log_prob), rel=1e-4)
    assert values["entropy"].item() == pytest.approx(np.mean(entropy), rel=1e-4)
    assert values["loss"].item() == pytest.approx(-np.mean(log_prob) - 0.1 * np.mean(entropy), rel=1e-4)


def test_the_return_asked_for_decides_the_action():
    """Half of the data's episodes earn 1 and act 0.5, the others earn 0 and act -0.5, in the same states."""
    good = torch.arange(200) // 4 % 2
    data = torch.cat([good.unsqueeze(1), torch.randn(200, OBS), (good - 0.5).unsqueeze(1).expand(200, ACT)], 1)
    nets, update, _ = parts(data=data.float(), hidden=16, temperature=1e-3)
    generator, scale = torch.Generator().manual_seed(1), torch.tensor(1.0)
    for _ in range(200):
        first = torch.randint(50, (16,), generator=generator) * 4
        update(torch.stack([first, first + 3], 1), torch.randn(16, 4, ACT, generator=generator), scale)
    steps = torch.zeros(2, 1, WIDTH)
    steps[1, 0, 0], steps[..., -1] = 1, 1
    low, high = nets["actor"].mode(steps.flatten(1))
    assert low.max() < -0.3 and high.min() > 0.3


def test_compiled_equals_eager(monkeypatch):
    """As graphs: those are cheap, their C++ takes minutes."""
    monkeypatch.setattr(dt.torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        nets, update, inputs = parts(compile=compiled, window=2)
        for _ in range(2):
            update(inputs[0], inputs[1][:, :2], inputs[2])
        results.append(flat(nets))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole(minari_store, tmp_path_factory):
    """A run that nothing interrupted. -> its folder and its summary."""
    folder = tmp_path_factory.mktemp("dt")
    return folder, dt.main(tiny(folder))


def test_a_run_leaves_what_it_promises(whole):
    folder, summary = whole
    assert summary["status"] == "complete" and math.isfinite(summary["closing_score"])
    assert {"args.json", "metrics.jsonl", "curve.png", "summary.json"} <= {p.name for p in (folder / "run").iterdir()}
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("offline", 2), ("offline", 4)]
    assert {f"offline/{key}" for key in ("loss", "log_prob", "entropy", "temperature", "score")} <= rows[0].keys()
    saved = dt.load_file(folder / "dt.pt")
    policy = {"kind": "decision_transformer", "hidden": [8, 8], "heads": 2, "context": 3, "target_return": 3600.0}
    assert saved["policy"] == policy | {"rtg_scale": 0.001}
    assert (saved["format"], saved["algorithm"], saved["env_id"], saved["step"]) == (1, "dt", TASK, 4)
    assert saved["score"] == summary["closing_score"] and (saved["actor"]["obs_std"] > 0).all()


def test_a_run_resumes_exactly(whole, tmp_path, monkeypatch):
    def cut_off(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dt, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            dt.main(tiny(tmp_path, updates=4))  # before anything was saved
    first = dt.main(dt.parse_args(["--resume", str(tmp_path / "run")]))
    assert first["closing_score"] == whole[1]["closing_score"]
    real, calls = dt.draw_curve, []

    def cut_off_later(run):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(dt, "draw_curve", cut_off_later)
        with pytest.raises(KeyboardInterrupt):
            dt.main(tiny(tmp_path / "later"))
    dt.main(dt.parse_args(["--resume", str(tmp_path / "later/run")]))
    one, other = (dt.load_file(folder / "dt.pt")["actor"] for folder in (whole[0], tmp_path / "later"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (dt.load_file(folder / "run/resume.pt") for folder in (whole[0], tmp_path / "later"))
    for name in ("actor", "temperature"):
        pairs = zip(one["optimizers"][name]["state"], other["optimizers"][name]["state"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(one["nets"]["log_temperature"]["0"], other["nets"]["log_temperature"]["0"])


def test_it_trains_on_the_rewards_that_are_left(minari_store, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(dt, "make_update", lambda *parts: seen.append(parts) or (lambda spans, noise, scale: {}))
    dt.main(tiny(tmp_path, rtg_scale=0.01))
    args, *_, steps, act_dim = seen[0]
    data = dt.load_data(args, torch.device("cpu"))
    rewards = [np.array(episode.rewards) for episode in data.source.iterate_episodes()]
    left = np.concatenate([x[::-1].cumsum()[::-1] for x in rewards])
    torch.testing.assert_close(steps[:, 0], torch.tensor(0.01 * left, dtype=torch.float32), rtol=1e-4, atol=1e-4)
    obs, action, *_ = data.split(data.rows)
    assert act_dim == 3 and torch.equal(steps[:, 1:], torch.cat([obs, action], dim=1))


def test_the_learning_rate_rises_then_falls_to_nothing(minari_store, tmp_path, monkeypatch):
    scales = []
    monkeypatch.setattr(dt, "make_update", lambda *parts: lambda spans, noise, scale: scales.append(scale.item()) or {})
    dt.main(tiny(tmp_path, updates=100, eval_every_updates=100, warm_up=10))
    assert scales[:2] == pytest.approx([1 / 11, 2 / 11], rel=0.01) and np.argmax(scales) in (9, 10)
    assert 0.9 < max(scales) <= 1 and 0 < scales[-1] < 1e-3 and len(scales) == 100


def test_what_is_asked_for_depends_on_the_task(pendulum, tmp_path):
    targets = {TASK: 3600, "walker2d-medium-replay-v2": 5000, "halfcheetah-medium-v2": 6000, "antmaze-umaze-v2": 1}
    assert {task: dt.settings(dt.Args(env_id=task))["target_return"] for task in targets} == targets
    dt.main(tiny(tmp_path, env_id=pendulum, target_return=None, context=1))  # of another task: the best of the data
    data = dt.load_data(dt.Args(env_id=pendulum), torch.device("cpu"))
    best = max(float(episode.rewards.sum()) for episode in data.source.iterate_episodes())
    assert dt.load_file(tmp_path / "dt.pt")["policy"]["target_return"] == pytest.approx(best, rel=1e-5)


def test_refusals(whole, tmp_path):
    with pytest.raises(dt.UserError, match="multiple of --heads"):
        dt.main(tiny(tmp_path, hidden=10, heads=4))
    with pytest.raises(dt.UserError, match="exists; pass --overwrite"):
        dt.main(tiny(whole[0], run_dir=str(tmp_path / "run")))
    with pytest.raises(dt.UserError, match="only these may change"):
        dt.parse_args(["--resume", str(whole[0] / "run"), "--window", "7"])
    assert not (tmp_path / "run").exists()


def test_labels_are_what_the_policy_would_do_if_it_had_acted_so_far():
    """Two episodes of rewards 1, 2, 3 and 4, 0: asked for 5, or for the 6 that the first one brings."""
    reward, last = torch.tensor([1.0, 2, 3, 4, 0]), torch.tensor([0, 0, 1, 0, 1]).bool()
    obs, action = torch.randn(5, OBS), torch.randn(5, ACT)
    rows = torch.cat([obs, action, reward.unsqueeze(1), obs, torch.zeros(5, 1)], 1)
    data, seen = bc.Data("", rows, last, OBS, ACT, (0, 1), None), []
    labels = bc.transformer_labels(lambda x: seen.append(x) or x[:, :3], data, 2, 5.0, 10.0)
    seen = torch.cat(seen).view(5, 2, WIDTH)
    assert labels.shape == (5, 3)
    assert seen[:, -1, 0].tolist() == [60, 50, 30, 50, 10]
    assert seen[:, 0, 0].tolist() == [0, 60, 50, 0, 50] and seen[:, 0, -1].tolist() == [0, 1, 1, 0, 1]
    assert torch.equal(seen[:, -1, 1 : 1 + OBS], obs) and torch.equal(seen[[1, 4], 0, 1 + OBS : -1], action[[0, 3]])
    assert (seen[:, -1, 1 + OBS : -1] == 0).all() and (seen[:, -1, -1] == 1).all()


def copy_of(whole, tmp_path, monkeypatch, **changes):
    """Teaches a copy of the transformer. -> bc's summary."""
    monkeypatch.setattr(bc, "closing_score", partial(bc.closing_score, episodes=1))
    settings = {"teacher": str(whole[0] / "dt.pt"), "updates": 40, "eval_every_updates": 20, "eval_episodes": 1}
    settings |= {"compile": False, "output": str(tmp_path / "copy.pt"), "run_dir": str(tmp_path / "copy")}
    return bc.main(bc.Args(**settings | changes))


@pytest.mark.parametrize("kind", ["squashed_gaussian", "deterministic"])
def test_the_copy_of_a_transformer_gets_likelier(whole, tmp_path, monkeypatch, kind):
    summary = copy_of(whole, tmp_path, monkeypatch, policy=kind, updates=300, eval_every_updates=100)
    losses = [json.loads(line)["offline/held_out_loss"] for line in (tmp_path / "copy/metrics.jsonl").open()]
    assert losses[-1] < losses[0] and summary["held_out_loss"] == min(losses)
    assert math.isfinite(summary["teacher_score"])
    assert bc.load_file(tmp_path / "copy.pt")["policy"]["kind"] == kind


def test_a_copy_resumes_exactly(whole, tmp_path, monkeypatch):
    copy_of(whole, tmp_path / "a", monkeypatch)
    copy_of(whole, tmp_path / "b", monkeypatch, updates=20)
    again = bc.parse_args(["--resume", str(tmp_path / "b/copy"), "--updates", "40"])
    bc.main(again)
    one, other = (bc.load_file(tmp_path / name / "copy.pt") for name in "ab")
    assert all(torch.equal(one["actor"][key], other["actor"][key]) for key in one["actor"])
    assert one["teacher_score"] == other["teacher_score"]


def test_all_scripts_act_as_the_transformer_that_was_trained(whole, minari_store):
    data, saved = enjoy.load_data(enjoy.Args(env_id=TASK), torch.device("cpu")), dt.load_file(whole[0] / "dt.pt")
    mode, wrap = enjoy.load_mode(whole[0] / "dt.pt", data)
    trained = dt.DecisionTransformer(*dt.observation_stats(data), data.act_dim, [8, 8], 2)
    trained.load_state_dict(saved["actor"])
    copied, _ = bc.transformer_from(saved, data.obs_dim, data.act_dim)
    env, own = wrap(data.make_env()), dt.History(data.make_env(), 3, 3600.0, 0.001)
    obs, same = env.reset(seed=3)[0], own.reset(seed=3)[0]
    for _ in range(5):
        assert np.array_equal(obs, same)
        x = data.to_tensor(obs[None])
        assert torch.equal(mode(x), trained.mode(x)) and torch.equal(mode(x), copied.mode(x))
        obs, same = (e.step(mode(x)[0].numpy())[0] for e in (env, own))


def test_enjoy_scores_and_films_a_transformer(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(enjoy.gym.Wrapper, "render", lambda env: np.zeros((16, 16, 3), np.uint8))
    path = str(whole[0] / "dt.pt")
    found = enjoy.main(enjoy.Args(checkpoint=(path,), episodes=2, video=str(tmp_path / "film.gif")))
    (result,) = found.values()
    assert math.isfinite(result["score"]) and (tmp_path / "film.gif").stat().st_size > 0


@pytest.mark.parametrize("script", [o2o_sac, o2o_td3, o2o_ppo], ids=lambda module: module.__name__)
def test_an_online_script_starts_from_a_transformer_and_finishes(script, whole, tmp_path, monkeypatch, imitations):
    monkeypatch.setattr(bc, "closing_score", partial(bc.closing_score, episodes=1))
    summary = script.main(tiny_args(script, whole[0] / "dt.pt", tmp_path / "run"))
    assert summary["status"] == "complete" and summary["scores"]
    copy = script.load_file(tmp_path / "run/imitated.pt")
    assert copy["policy"]["kind"] == script.KIND and math.isfinite(copy["teacher_score"])


BAD_POLICIES = [
    lambda saved: saved["policy"].update(hidden=[10**9] * 2),
    lambda saved: saved["policy"].update(hidden=[1024] * 1024),
    lambda saved: saved["policy"].update(hidden=[8] * 10**6),
    lambda saved: saved["policy"].update(hidden=[8, 16]),
    lambda saved: saved["policy"].update(hidden=[]),
    lambda saved: saved["policy"].update(heads=0),
    lambda saved: saved["policy"].update(heads=3),
    lambda saved: saved["policy"].update(context=10**12),
    lambda saved: saved["policy"].update(context=True),
    lambda saved: saved["policy"].update(target_return=math.nan),
    lambda saved: saved["policy"].update(rtg_scale="x"),
    lambda saved: saved["policy"].pop("target_return"),
    lambda saved: saved["actor"].pop("head.weight"),
    lambda saved: saved["actor"].update(more=torch.zeros(3)),
    lambda saved: saved["actor"]["head.weight"].fill_(math.nan),
    lambda saved: saved["actor"].update({"obs_std": -saved["actor"]["obs_std"]}),
    lambda saved: saved["actor"].update({"head.bias": saved["actor"]["head.bias"].double()}),
    lambda saved: saved["actor"].update({"head.bias": 3}),
]


def readers(data):
    yield bc.UserError, lambda path: bc.teacher_from(bc.load_file(path), data, torch.device("cpu"))
    yield enjoy.UserError, lambda path: enjoy.load_mode(path, data)


@pytest.mark.parametrize("number", range(len(BAD_POLICIES)))
def test_a_hostile_transformer_is_refused_in_one_sentence(number, whole, minari_store, tmp_path):
    saved, data = dt.load_file(whole[0] / "dt.pt"), bc.Data("x", torch.zeros(1, 27), None, 11, 3, (0, 1), None)
    BAD_POLICIES[number](saved)
    torch.save(saved, tmp_path / "bad.pt")
    for error, read in readers(data):
        with pytest.raises(error) as refusal:
            read(tmp_path / "bad.pt")
        assert "\n" not in str(refusal.value)


def test_randomly_damaged_transformers(whole, tmp_path):
    path, rng = tmp_path / "changed.pt", random.Random(0)
    data = bc.Data("x", torch.zeros(1, 27), None, 11, 3, (0, 1), None)
    saved, content, refused = dt.load_file(whole[0] / "dt.pt"), (whole[0] / "dt.pt").read_bytes(), 0
    for i in range(150):
        if i % 4:
            torch.save(mutated(saved, rng), path)
        else:
            path.write_bytes(damaged(content, rng))
        for error, read in readers(data):
            try:
                read(path)
            except error as sentence:
                assert "\n" not in str(sentence)
                refused += 1
    assert refused > 100
