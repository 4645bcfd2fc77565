"""What a stranger's file may do: be refused in one sentence, or work. Seeded random damage of checkpoints, run folders,
datasets and flags; no traceback, no code that runs, no half-written folder."""

import copy
import json
import random
import shutil
from dataclasses import asdict, fields

import bc
import cql
import dt
import enjoy
import h5py
import iql
import lapo
import numpy as np
import pytest
import td3_bc
import torch
from conftest import ROOT, SMALL, TASK, tiny_args, tiny_policy

import o2o_ppo
import o2o_sac
import o2o_td3
import o3f
from baselines import iql as iql_online
from baselines import pex

CHECKPOINTS, RUN_FOLDERS = 200, 30  # damaged files for each script

BAD = (None, -1, 0, 10**12, float("nan"), "x", "", [], [3], {}, {"x": 1}, True, torch.zeros(0), torch.zeros(3))
BAD += (torch.zeros(2, 2), torch.full((11,), float("nan")), torch.ones(11, dtype=torch.float64), torch.tensor(1 + 2j))


def spots(node, path=()):
    """Every place in nested dictionaries, as a tuple of keys."""
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from spots(value, (*path, key))


def mutated(saved, rng):
    """A copy in which one or two entries are missing, replaced, scaled, cut, or of another type."""
    saved = copy.deepcopy(saved)
    for _ in range(rng.choice((1, 1, 2))):
        *path, key = rng.choice(list(spots(saved)))
        node = saved
        for step in path:
            node = node[step]
            if not isinstance(node, dict) or key not in node and step == path[-1]:
                break
        else:
            value, way = node.get(key), rng.randrange(4)
            if way == 0:
                node.pop(key, None)
            elif torch.is_tensor(value) and way == 1:
                node[key] = rng.choice(
                    (value.double(), value.half(), value * float("nan"), value.flatten()[:1], -value.abs())
                )
            else:
                node[key] = rng.choice(BAD)
    return saved


def damaged(content, rng):
    """Bytes of which one was flipped, or some are missing or doubled."""
    content, i = bytearray(content), rng.randrange(len(content))
    way = rng.randrange(3)
    if way == 0:
        content[i] ^= 1 << rng.randrange(8)
    elif way == 1:
        del content[i : i + rng.randrange(1, 2000)]
    else:
        content[i:i] = content[i : i + rng.randrange(1, 500)]
    return bytes(content)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.fixture(scope="module")
def policies(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    return checkpoints | {
        "lapo": tiny_policy(lapo, folder / "lapo", num_critics=2),
        "iql": tiny_policy(iql, folder / "iql", num_critics=2),
    }


def readers(policies, data, folder):
    """-> {name: (a good file, function that reads a file like it)} of every script that reads checkpoints."""
    run = type("Folder", (), {"dir": folder})
    found = {}
    for script in (o2o_sac, o2o_td3, o2o_ppo):
        args = tiny_args(script, "", folder)
        found[script.__name__] = policies[script], lambda path, s=script, a=args: s.load_actor(a, path, run, data)
    for base in ("lapo", "iql"):
        args = lambda base=base: o3f.Args(base=base)  # noqa: E731
        found[f"o3f {base}"] = policies[base], lambda path, a=args: o3f.load_base(path, a(), data)
        found[f"bc {base}"] = (
            policies[base],
            lambda path: bc.teacher_from(bc.load_file(path), data, torch.device("cpu")),
        )
        found[f"enjoy {base}"] = policies[base], lambda path: enjoy.load_mode(path, data)
    return found


def test_mutated_checkpoints(policies, tmp_path, monkeypatch):
    """200 for each script: refused with its own exception in one line, or a policy with finite actions."""
    data, rng = o2o_sac.load_data(o2o_sac.Args(), torch.device("cpu")), random.Random(0)
    nobody = lambda *command: type("Done", (), {"returncode": 2})  # noqa: E731  # of another kind: no copy is made here
    for script in (o2o_sac, o2o_td3, o2o_ppo):
        monkeypatch.setattr(script.subprocess, "run", nobody)
    path, outcomes = tmp_path / "changed.pt", {}
    for name, (good, read) in readers(policies, data, tmp_path).items():
        content, saved = good.read_bytes(), torch.load(good, weights_only=True)
        for i in range(CHECKPOINTS):
            if i % 4 == 0:
                path.write_bytes(damaged(content, rng))
            else:
                torch.save(mutated(saved, rng), path)
            try:
                read(path)
                outcome = "fine"
            except Exception as error:
                assert type(error).__name__ == "UserError", f"{name}: {error!r}"
                assert "\n" not in str(error)
                outcome = "refused"
            outcomes[name, outcome] = outcomes.get((name, outcome), 0) + 1
    assert all(outcomes.get((name, "refused"), 0) > 50 for name, _ in outcomes), outcomes


def test_one_flipped_bit_is_found(policies, tmp_path):
    content, rng, path = policies[o2o_sac].read_bytes(), random.Random(1), tmp_path / "flipped.pt"
    harmless = 0
    for _ in range(100):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:  # what is left lies between the archive's entries
            saved = o2o_sac.load_file(path)
            real = torch.load(policies[o2o_sac], weights_only=True)
            assert all(torch.equal(saved["actor"][key], real["actor"][key]) for key in real["actor"])
            harmless += 1
        except o2o_sac.UserError:
            continue
    assert harmless < 20


@pytest.mark.parametrize("content", [b"", b"x" * 999, "directory", "tensor", "list"])
def test_what_is_no_checkpoint_at_all(tmp_path, content):
    path = tmp_path / "policy.pt"
    if content == "directory":
        path.mkdir()
    elif isinstance(content, str):
        torch.save({"tensor": torch.zeros(3), "list": [1, 2]}[content], path)
    else:
        path.write_bytes(content)
    with pytest.raises(o2o_sac.UserError, match=r"no checkpoint of ours"):
        o2o_sac.load_file(path)


BASELINES = [script for script in SMALL if script is not o3f]
SCRIPTS = [o2o_sac, o2o_td3, o2o_ppo, o3f, cql, td3_bc, iql, lapo, bc, dt, *BASELINES]


def finished_run(module, policies, folder):
    """A short run of a script in `folder`/good. -> that folder."""
    if module in (o2o_sac, o2o_td3, o2o_ppo):
        module.main(tiny_args(module, policies[module], folder / "good", online_steps=8))
    elif module is o3f:
        settings = {"base": "iql", "checkpoint": str(policies["iql"]), "online_steps": 8, "eval_every": 4}
        settings |= {"eval_episodes": 1, "updates_per_step": 1, "compile": False, "run_dir": str(folder / "good")}
        o3f.main(o3f.Args(**settings))
    elif module in BASELINES:
        start = {"checkpoint": str(policies["iql"])} if module in (iql_online, pex) else {}
        module.main(module.Args(**SMALL[module], **start, run_dir=str(folder / "good")))
    else:
        tiny_policy(module, folder, run_dir=str(folder / "good"))
    return folder / "good"


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_mutated_run_folders(module, policies, tmp_path, monkeypatch, capsys):
    """Damage to args.json or resume.pt: refused, and the run keeps its state; or it goes on to its end."""
    good, rng = finished_run(module, policies, tmp_path), random.Random(2)
    arguments = json.loads((good / "args.json").read_text())
    saved, bytes_of = torch.load(good / "resume.pt", weights_only=True), (good / "resume.pt").read_bytes()
    monkeypatch.setattr(module, "draw_curve", lambda run: None)  # slow, and not what is tested
    budgets = {key: x for key, x in arguments.items() if key.endswith(("_steps", "_every", "updates"))}
    kept = {key: arguments[key] for key in ("output",) if key in arguments}  # None is the checkpoint that ships
    refused = 0
    for i in range(RUN_FOLDERS):
        folder = tmp_path / f"run{i}"
        shutil.copytree(good, folder, ignore=shutil.ignore_patterns("tensorboard"))
        if i % 3 == 0:
            changed = {key: value for key, value in mutated(arguments, rng).items() if not torch.is_tensor(value)}
            text = json.dumps({**budgets, **changed, **kept})  # without a budget it would be the default's hours
            (folder / "args.json").write_text(text if rng.random() < 0.9 else text[: len(text) // 2])
        elif i % 3 == 1:
            (folder / "resume.pt").write_bytes(damaged(bytes_of, rng))
        else:
            torch.save(mutated(saved, rng), folder / "resume.pt")
        before = contents(folder)
        monkeypatch.setattr(module.sys, "argv", [module.__name__, "--resume", str(folder)])
        try:
            module.run_cli(module.main)
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and "Traceback" not in error
            if i % 3 == 1:
                assert contents(folder) == before
            refused += 1
        shutil.rmtree(folder)
    assert refused > RUN_FOLDERS / 3


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
@pytest.mark.parametrize("value", ["-1", "0", "nan", "1e9", "inf", "-1e9"])
def test_every_flag_at_its_worst(module, value, capsys):
    """Refused as no number or as out of range, or a number that its range allows."""
    for field in fields(module.Args):
        default = getattr(module.Args, field.name)
        if isinstance(default, bool) or not isinstance(default, int | float):
            continue
        try:
            args = module.parse_args([f"--{field.name.replace('_', '-')}={value}"])
            module.check_ranges(args)
        except SystemExit as stop:  # tyro: an integer was asked for
            assert stop.code == 2
        except module.UserError as error:
            assert field.name.replace("_", "-") in str(error)
        else:
            borders = next(b for b, flags in module.RANGES.items() if field.name in flags.split())
            assert borders[0] <= getattr(args, field.name) <= borders[1]


DATA = [
    ("actions", lambda x: x * 3),
    ("actions", lambda x: x[:, :2]),
    ("actions", lambda x: x[:-1]),
    ("observations", lambda x: x * np.float32("nan")),
    ("observations", lambda x: x.astype(np.float64) * 1e300),
    ("observations", lambda x: x[:-5]),
    ("observations", lambda x: x[:, 0]),
    ("observations", lambda x: np.array([b"text"] * len(x))),
    ("rewards", lambda x: x + np.inf),
    ("rewards", lambda x: x[:0]),
    ("rewards", lambda x: np.float32(1)),
    ("terminations", lambda x: np.full(len(x), np.nan)),
    ("terminations", lambda x: np.full(len(x), 7)),
    ("terminations", lambda x: np.array([b"yes"] * len(x))),
    ("rewards", None),
    ("actions", "group"),
    ("rewards", "huge"),
]


@pytest.mark.parametrize("number", range(len(DATA)))
def test_mutated_datasets(number, minari_store, monkeypatch):
    key, change = DATA[number]
    name = f"damaged{number}-v0"
    folder = minari_store / "o2o" / name
    shutil.copytree(minari_store / "o2o" / TASK, folder)
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        episode = file["episode_0"]
        value = episode[key][()]
        del episode[key]
        if change == "group":
            episode.create_group(key)
        elif change == "huge":
            episode.create_dataset(key, shape=(10**12,), dtype="f4", chunks=(1024,))
        elif change is not None:
            episode[key] = change(value)
    with pytest.raises(o2o_sac.UserError) as error:
        o2o_sac.load_data(o2o_sac.Args(dataset=f"o2o/{name}"), torch.device("cpu"))
    assert name in str(error.value) and "\n" not in str(error.value)
    shutil.rmtree(folder)


def test_randomly_damaged_datasets(minari_store):
    """100 flipped, cut and doubled pieces of metadata and of the data's first kilobytes."""
    rng, folder = random.Random(3), minari_store / "o2o/damaged-v0"
    for i in range(100):
        shutil.copytree(minari_store / "o2o" / TASK, folder)
        path = folder / "data" / ("metadata.json" if i % 2 else "main_data.hdf5")
        content = path.read_bytes()
        path.write_bytes(damaged(content[:4096], rng) + content[4096:])
        try:
            o2o_sac.load_data(o2o_sac.Args(dataset="o2o/damaged-v0"), torch.device("cpu"))
        except o2o_sac.UserError as error:
            assert "\n" not in str(error)
        shutil.rmtree(folder)


def test_an_environment_without_a_time_limit_is_refused(minari_store, capsys):
    import gymnasium as gym

    gym.register("Unlimited-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv")
    folder = minari_store / "o2o/unlimited-v0"
    shutil.copytree(minari_store / "o2o" / TASK, folder)
    path = folder / "data/metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"]) | {"id": "Unlimited-v0", "max_episode_steps": None}
    spec["entry_point"] = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec), "dataset_id": "o2o/unlimited-v0"}))
    with pytest.raises(o2o_sac.UserError, match="no time limit"):
        o2o_sac.load_data(o2o_sac.Args(dataset="o2o/unlimited-v0"), torch.device("cpu"))


def test_a_spec_may_not_name_files(minari_store):
    spec = json.dumps({"id": "Hopper-v5", "entry_point": "gymnasium.envs.mujoco.hopper_v5:HopperEnv",
                       "kwargs": {"xml_file": "folder/x.xml"}, "additional_wrappers": []})  # fmt: skip
    with pytest.raises(o2o_sac.UserError, match="none was made"):
        o2o_sac.check_spec(spec, "mine/x-v0")
    o2o_sac.check_spec(spec.replace("folder/x.xml", "hopper.xml"), "mine/x-v0")


def test_a_relative_checkpoint_is_found_from_another_folder(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(checkpoint.parent)
    args = tiny_args(o2o_sac, checkpoint.name, tmp_path / "run", online_steps=8)
    o2o_sac.main(args)
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = o2o_sac.parse_args(["--resume", "../run", "--online-steps", "12"])
    assert o2o_sac.main(again)["online_steps"] == 12


def test_the_default_policy_leaves_no_path_in_the_run(minari_store, tmp_path):
    settings = asdict(tiny_args(o2o_sac, "", tmp_path / "run", online_steps=8)) | {"checkpoint": None}
    o2o_sac.main(o2o_sac.Args(**settings))
    assert json.loads((tmp_path / "run/args.json").read_text())["checkpoint"] is None


def test_default_folders_of_one_second_differ(monkeypatch):
    names = {o2o_sac.Run(o2o_sac.Args(), {}).dir.name for _ in range(20)}
    assert len(names) == 20


@pytest.mark.parametrize("output", ["/dev/null/policy.pt", "/proc/policy.pt", "."])
def test_an_output_that_cannot_be_written_is_said_before_training(output, tmp_path, monkeypatch):
    if output == "/proc/policy.pt":
        monkeypatch.setattr(cql.os, "access", lambda *args: False)
    with pytest.raises(cql.UserError, match="cannot be written"):
        cql.main(cql.Args(output=output, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_clock_that_stands_still_breaks_nothing(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(o2o_sac.time, "monotonic", lambda: 5.0)
    assert o2o_sac.main(tiny_args(o2o_sac, checkpoints[o2o_sac], tmp_path))["status"] == "complete"


def test_a_warm_up_without_updates_is_said(checkpoints, tmp_path, capsys):
    o2o_sac.main(tiny_args(o2o_sac, checkpoints[o2o_sac], tmp_path, warm_up=50))
    assert "leaves no updates" in capsys.readouterr().err


def test_an_estimate_that_is_far_off_is_said(capsys):
    o2o_sac.warn_unless_near(190.0, 208.0)
    assert not capsys.readouterr().err
    o2o_sac.warn_unless_near(37.0, 208.0)
    assert "37" in (text := capsys.readouterr().err) and "208" in text and text.count("\n") == 1


def test_a_notebooks_backend_breaks_nothing(monkeypatch):
    import os
    import subprocess
    import sys

    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, ROOT / "o2o_sac.py", "--eval-every", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--eval-every is 0" in done.stderr and "Traceback" not in done.stderr


def test_tracking_goes_on_in_the_same_run_and_a_missing_login_is_a_sentence(checkpoints, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    seen = []
    monkeypatch.setattr(wandb, "init", lambda **settings: seen.append(settings))
    args = tiny_args(o2o_sac, checkpoints[o2o_sac], tmp_path / "run", track=True, online_steps=8)
    o2o_sac.main(args)
    o2o_sac.main(o2o_sac.parse_args(["--resume", str(tmp_path / "run"), "--online-steps", "12"]))
    assert len(seen) == 2 and seen[0]["id"] == seen[1]["id"] and seen[1]["resume"] == "allow"

    def refuse(**settings):
        raise wandb.errors.UsageError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(o2o_sac.UserError, match="wandb login"):
        o2o_sac.main(tiny_args(o2o_sac, checkpoints[o2o_sac], tmp_path / "other", track=True))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("wrapper", ["NormalizeReward", "NormalizeObservation", "TransformReward", "RecordVideo"])
def test_wrappers_that_learn_rescale_rewards_or_write_files_are_refused(wrapper):
    import gymnasium as gym

    place = getattr(gym.wrappers, wrapper)
    extra = {"name": wrapper, "entry_point": f"{place.__module__}:{wrapper}", "kwargs": {}}
    spec = {"id": "Hopper-v5", "entry_point": gym.registry["Hopper-v5"].entry_point, "kwargs": {}}
    with pytest.raises(o2o_sac.UserError, match="none was made"):
        o2o_sac.check_spec(json.dumps(spec | {"additional_wrappers": [extra]}), "mine/x-v0")
    o2o_sac.check_spec(json.dumps(spec | {"additional_wrappers": []}), "mine/x-v0")


def test_returns_that_do_not_vary_stop_no_run(checkpoints, tmp_path, monkeypatch):
    real = o2o_ppo.Rollout.collect

    def constant(rollout, *rest):
        obs, action, log_prob, reward, next_obs, terminated, done = real(rollout, *rest)
        return obs, action, log_prob, 0 * reward, next_obs, torch.ones_like(terminated), torch.ones_like(done)

    monkeypatch.setattr(o2o_ppo.Rollout, "collect", constant)
    args = tiny_args(o2o_ppo, checkpoints[o2o_ppo], tmp_path, reevaluate=False)
    assert o2o_ppo.main(args)["status"] == "complete"


def test_a_relative_store_works_from_where_it_was_named(tmp_path, monkeypatch):
    import collect

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "store")
    collect.main(collect.Args(env_id="hopper-random-v2", num_steps=50, num_envs=1))
    assert len(o2o_sac.load_data(o2o_sac.Args(env_id="hopper-random-v2"), torch.device("cpu")).rows) >= 50
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["o2o"]


def test_what_is_kept_is_said_only_where_something_is(tmp_path):
    run = o2o_sac.Run(o2o_sac.Args(run_dir=str(tmp_path)), {})
    for kept in (False, True):
        with pytest.raises(o2o_sac.UserError) as error:
            run.log("online", 1, {"loss": float("nan")})
        assert ("keeps the last good state" in str(error.value)) == kept
        (tmp_path / "resume.pt").touch()


def test_a_resumed_run_stays_in_its_folder(checkpoints, tmp_path):
    o2o_sac.main(tiny_args(o2o_sac, checkpoints[o2o_sac], tmp_path / "a", online_steps=8))
    with pytest.raises(o2o_sac.UserError, match="only these may change"):
        o2o_sac.parse_args(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b")])
