"""What the user can put right: one sentence on stderr, exit code 2, nothing written or overwritten."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bc
import behaviour
import collect
import cql
import dt
import iql
import lapo
import minari
import numpy as np
import pytest
import td3_bc
import torch
from conftest import ROOT, SMALL, TASK, for_scripts

import o2o_ppo
import o2o_sac
import o2o_td3


def refused(capsys, monkeypatch, module, *argv):
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        module.run_cli(module.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def contents(folder):
    """Every file below a folder, byte for byte."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_unknown_task_is_refused_and_nothing_is_left_behind(capsys, monkeypatch, tmp_path, checkpoint):
    argv = "--env-id", "hoper-medium-v2", "--checkpoint", checkpoint, "--run-dir", tmp_path / "run"
    assert "hoper-medium-v2" in refused(capsys, monkeypatch, collect, "--env-id", "hoper-medium-v2")
    monkeypatch.setattr(subprocess, "run", lambda *args: subprocess.CompletedProcess(args, 2))
    assert "o2o/hoper-medium-v2" in refused(capsys, monkeypatch, o2o_sac, *argv)
    assert not (tmp_path / "run").exists()


def test_missing_and_corrupt_checkpoints(capsys, monkeypatch, tmp_path, checkpoint):
    run_dir = ("--run-dir", tmp_path / "run")
    assert "offline/cql.py" in refused(capsys, monkeypatch, o2o_sac, "--checkpoint", tmp_path / "no.pt", *run_dir)
    broken = tmp_path / "broken.pt"
    for content in (checkpoint.read_bytes()[:1000], b"hello", b""):
        broken.write_bytes(content)
        assert "incomplete" in refused(capsys, monkeypatch, o2o_sac, "--checkpoint", broken, *run_dir)
    torch.save({"format": 1}, broken)
    assert "KeyError: 'policy'" in refused(capsys, monkeypatch, o2o_sac, "--checkpoint", broken, *run_dir)
    torch.save([1, 2], broken)
    assert "no checkpoint of ours" in refused(capsys, monkeypatch, o2o_sac, "--checkpoint", broken, *run_dir)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_runs_no_code(capsys, monkeypatch, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    torch.save({"format": 1, "policy": Bomb()}, tmp_path / "bomb.pt")
    assert "no checkpoint of ours" in refused(capsys, monkeypatch, o2o_sac, "--checkpoint", tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved.update(format=2), "format 2"),
        (lambda saved: saved.update(env_id="walker2d-medium-v2"), "walker2d-medium-v2"),
        (lambda saved: saved["policy"].update(kind="no_such_kind"), "no_such_kind"),
        (lambda saved: saved["policy"].update(hidden=[256]), "no policy for 11 observations"),
        (lambda saved: saved["policy"].update(hidden="wide"), "no policy for 11 observations"),
        (lambda saved: saved["actor"].update(obs_mean=torch.zeros(5)), "no policy for 11 observations"),
        (lambda saved: saved["actor"].update(obs_std=torch.zeros(11)), "not positive"),
        (lambda saved: saved["actor"].update(obs_mean=torch.full((11,), float("nan"))), "not finite"),
    ],
)
def test_checkpoints_that_do_not_fit(capfd, monkeypatch, tmp_path, checkpoint, change, words):
    saved = torch.load(checkpoint, weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "changed.pt")
    argv = ["o2o_sac.py", "--checkpoint", str(tmp_path / "changed.pt"), "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        o2o_sac.run_cli(o2o_sac.main)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and words in error and "Traceback" not in error
    assert not (tmp_path / "run/args.json").exists()


def test_a_folder_that_cannot_be_written_and_a_task_without_a_policy(capsys, monkeypatch, tmp_path, checkpoint):
    """Before the data are loaded, and without a word of results that are not there."""
    (tmp_path / "file").write_text("mine")
    argv = "--checkpoint", checkpoint, "--run-dir", tmp_path / "file/run"
    assert "file/run cannot be written to" in refused(capsys, monkeypatch, o2o_sac, *argv)
    error = refused(capsys, monkeypatch, o2o_sac, "--env-id", "hoper-medium-v2", "--dataset", "mine/hops-v0")
    assert "cql.py --env-id hoper-medium-v2 --dataset mine/hops-v0" in error and " hopper-medium-v2," in error


@pytest.mark.parametrize("script", [o2o_sac, o2o_td3, o2o_ppo])
def test_a_task_without_a_policy_of_the_scripts_own_class_starts_from_another(script, monkeypatch, tmp_path):
    """Its own first, and a named one before all."""
    seen = []

    def loaded(args, path, run, data):
        seen.append(Path(path).name)
        raise script.UserError("far enough")

    folder = tmp_path / "offline/checkpoints" / TASK
    folder.mkdir(parents=True)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))
    monkeypatch.setattr(script, "load_actor", loaded)
    monkeypatch.setattr(script, "load_data", lambda *_: None)
    own = {o2o_sac: "cql.pt", o2o_td3: "td3_bc.pt", o2o_ppo: "iql.pt"}[script]
    with pytest.raises(script.UserError, match=f"no offline policy at .*/{own}; train one"):
        script.main(script.Args())
    for name in ("iql_5.pt", "bc.pt", own):
        (folder / name).touch()
        for options in ({}, {"checkpoint": str(folder / "iql_5.pt")}):
            with pytest.raises(script.UserError):
                script.main(script.Args(run_dir=str(tmp_path / "run"), **options))
    assert seen == ["iql_5.pt", "iql_5.pt", "bc.pt", "iql_5.pt", own, "iql_5.pt"]


def test_a_refused_run_reports_no_results(script, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.Run, "restore", lambda *_: (_ for _ in ()).throw(script.UserError("no")))
    with pytest.raises(script.UserError):
        script.main(tiny())
    assert "everything is in" not in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [("gamma", "nan"), ("gamma", "1.5"), ("batch-size", "-1"), ("eval-episodes", "0"), ("policy-lr", "inf"),
     ("offline-fraction", "2"), ("online-steps", "-5"), ("num-threads", "0"), ("seed", "-1")],
)  # fmt: skip
def test_flags_out_of_range(capsys, monkeypatch, tmp_path, checkpoint, flag, value):
    argv = "--checkpoint", checkpoint, "--run-dir", tmp_path / "run", f"--{flag}={value}"
    assert f"--{flag} is {value}" in refused(capsys, monkeypatch, o2o_sac, *argv)
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten_unasked(capsys, monkeypatch, tmp_path, checkpoint):
    before = checkpoint.read_bytes()
    for module in (cql, td3_bc, iql):
        assert "--overwrite" in refused(capsys, monkeypatch, module, "--output", checkpoint)
    assert checkpoint.read_bytes() == before
    assert "--overwrite" in refused(capsys, monkeypatch, collect, "--env-id", TASK)
    (tmp_path / "args.json").write_text("{}")
    argv = ("--checkpoint", checkpoint, "--run-dir", tmp_path)
    assert "--resume" in refused(capsys, monkeypatch, o2o_sac, *argv)
    assert (tmp_path / "args.json").read_text() == "{}"


def test_resume_needs_a_run_of_this_algorithm(capsys, monkeypatch, tmp_path):
    assert "no run of this script" in refused(capsys, monkeypatch, o2o_sac, "--resume", tmp_path / "none")
    for damaged in ("", "[]", '{"algorithm": "o2o_sac", "no_such_flag": 1}', '{"seed": 1}'):
        (tmp_path / "args.json").write_text(damaged)
        assert "no run of this script" in refused(capsys, monkeypatch, o2o_sac, "--resume", tmp_path)
    (tmp_path / "args.json").write_text(json.dumps({"algorithm": "cql", "seed": 1}))
    assert "a run of cql" in refused(capsys, monkeypatch, o2o_sac, "--resume", tmp_path)


@pytest.mark.parametrize(
    "argv",
    [
        ("--online-steps", "8"),
        ("--eval-episodes", "0"),
        ("--batch-size", "-1"),
        ("--gamma", "nan"),
        ("--gamma", "0.5"),
        ("--seed", "2"),
        ("--checkpoint", "other.pt"),
        ("--no-align",),
        ("--num-threads", "0"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(capsys, monkeypatch, finished, argv):
    script, folder = finished
    before = contents(folder)
    if argv == ("--no-align",) and script is o2o_ppo:
        argv = ("--no-reevaluate",)
    refused(capsys, monkeypatch, script, "--resume", folder, *argv)
    assert contents(folder) == before


def test_after_every_refusal_a_run_still_resumes(capsys, monkeypatch, finished, tmp_path):
    script, folder = finished
    refused(capsys, monkeypatch, script, "--resume", folder, "--online-steps", "8")
    monkeypatch.setattr(sys, "argv", ["script", "--resume", str(folder), "--online-steps", "16"])
    script.run_cli(script.main)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "complete" and [step for step, _ in summary["scores"]] == [4, 8, 12, 16]


@pytest.fixture(scope="module")
def finished_runs():
    """script -> the folder of a finished run, made once."""
    return {}


@pytest.fixture
def finished(script, tiny, tmp_path, tmp_path_factory, finished_runs):
    """The script, and a finished run of it that the test may damage."""
    if script not in finished_runs:
        finished_runs[script] = tmp_path_factory.mktemp(script.__name__) / "run"
        script.main(tiny(run_dir=str(finished_runs[script])))
    shutil.copytree(finished_runs[script], tmp_path / "run")
    return script, tmp_path / "run"


@for_scripts(o2o_ppo)
def test_ppo_cannot_be_resumed_with_another_layout(script, tiny, tmp_path, capsys, monkeypatch):
    script.main(tiny(online_steps=4))
    before = contents(tmp_path / "run")
    assert "only these may change" in refused(
        capsys, monkeypatch, script, "--resume", tmp_path / "run", "--num-envs", "2"
    )
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
def test_damaged_metrics_are_written_again(finished, monkeypatch, damage):
    script, folder = finished
    before, path = (folder / "metrics.jsonl").read_bytes(), folder / "metrics.jsonl"
    damaged = {"truncated": before[:50], "missing": None, "longer": before + b'{"stage"'}[damage]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    monkeypatch.setattr(sys, "argv", ["script", "--resume", str(folder)])
    script.run_cli(script.main)
    assert path.read_bytes() == before


def test_a_damaged_resume_file_is_refused(finished, capsys, monkeypatch):
    script, folder = finished
    for content in (b"", b"hello", (folder / "resume.pt").read_bytes()[:5000]):
        (folder / "resume.pt").write_bytes(content)
        before = contents(folder)
        assert "resume.pt" in refused(capsys, monkeypatch, script, "--resume", folder)
        assert contents(folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_but_missing(capsys, monkeypatch):
    for module in (o2o_sac, o2o_td3, o2o_ppo, cql):
        assert "CUDA" in refused(capsys, monkeypatch, module, "--cuda")


@pytest.mark.parametrize("module", [behaviour, bc, cql, dt, iql, lapo, td3_bc, o2o_sac, o2o_td3, o2o_ppo, *SMALL])
@pytest.mark.parametrize(("capability", "used"), [("AVX2", False), ("AVX512", True), ("DEFAULT", True)])
def test_bf16_is_left_out_where_it_would_be_slow(module, capability, used, capsys, monkeypatch, tmp_path):
    """oneDNN has no bf16 products for AVX2, and torch's own are scalar."""

    def started(args, *_):
        seen.append(args.bf16)
        raise module.UserError("far enough")

    seen = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(module, "Run", started)
    options = {"output": str(tmp_path / "policy.pt")} if hasattr(module.Args, "output") else {}
    with pytest.raises(module.UserError, match="far enough"):
        module.main(module.Args(bf16=True, **options))
    assert seen == [used] and ("--bf16 is left out" in capsys.readouterr().err) is not used


def test_a_full_disk_leaves_the_previous_file_whole(monkeypatch, tmp_path):
    path = tmp_path / "model.pt"
    o2o_sac.save_file({"value": 1}, path)

    def full(payload, target):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(o2o_sac.UserError, match="No space left"):
        o2o_sac.save_file({"value": 2}, path)
    assert torch.load(path, weights_only=True) == {"value": 1}
    assert os.listdir(tmp_path) == ["model.pt"]


def test_an_error_of_the_file_system_is_one_sentence_too(capsys, monkeypatch, checkpoint, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(o2o_sac, "save_file", full)
    argv = ("--checkpoint", checkpoint, "--run-dir", tmp_path / "run")
    assert "No space left" in refused(capsys, monkeypatch, o2o_sac, *argv)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(script, tiny, monkeypatch, tmp_path):
    target, loss, good = (
        ("clipped_surrogate", "objective", 4) if script is o2o_ppo else ("td_target", "critic_loss", 10)
    )
    real, calls = getattr(script, target), {"n": 0}

    def spoiled(*args, **kwargs):
        calls["n"] += 1
        return real(*args, **kwargs) * (float("nan") if calls["n"] > good else 1)

    monkeypatch.setattr(script, target, spoiled)
    with pytest.raises(script.UserError, match=f"online/{loss} is not finite at step 8"):
        script.main(tiny())
    saved = torch.load(tmp_path / "run/resume.pt", weights_only=True)
    assert all(value.isfinite().all() for net in saved["nets"].values() for value in net.values())
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def test_sizes_of_ppo_that_do_not_divide(capsys, monkeypatch):
    assert "--minibatch-size" in refused(capsys, monkeypatch, o2o_ppo, "--minibatch-size", "100")
    assert "--num-envs" in refused(capsys, monkeypatch, o2o_ppo, "--num-envs", "3")


@pytest.mark.parametrize("compiler", ["missing", "broken"])
def test_no_compiler_that_works_falls_back_to_eager(capsys, tmp_path, compiler):
    path = tmp_path / "c++"
    if compiler == "broken":  # as without Python.h: it says who it is, and compiles nothing
        path.write_text('#!/bin/sh\ncase "$*" in *--version*) echo "g++ 13.0"; exit 0;; esac\nexit 1\n')
        path.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (str(path),), "force_disable_caches": True}):
        torch._dynamo.reset()
        update = o2o_sac.compile_update(lambda x: (2.5 * x).exp().sum() + x.cumsum(0), o2o_sac.Args())
        for _ in range(2):
            assert update(torch.zeros(7)).tolist() == [7] * 7
    torch._dynamo.reset()
    assert capsys.readouterr().err.count("no C++ compiler that works") == 1


def test_the_command_itself_exits_with_2_and_no_traceback(minari_store):
    command = [sys.executable, ROOT / "o2o_sac.py", "--env-id", "antmaze-large-v9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def edited_metadata(store, name, monkeypatch, tmp_path, **changes):
    """A copy of the small dataset whose metadata.json was changed. -> its id."""
    import shutil

    copy = store / "o2o" / name
    shutil.copytree(store / "o2o" / TASK, copy)
    path = copy / "data/metadata.json"
    metadata = json.loads(path.read_text()) | {"dataset_id": f"o2o/{name}"} | changes
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))
    return f"o2o/{name}"


@pytest.mark.parametrize("without_spaces", [False, True])
@pytest.mark.parametrize("where", ["entry_point", "wrapper", "id"])
def test_a_dataset_runs_no_code(capsys, monkeypatch, minari_store, tmp_path, checkpoint, where, without_spaces):
    spec = json.loads(minari.load_dataset(f"o2o/{TASK}").env_spec.to_json())
    marker = tmp_path / "exploded"
    call = {"entry_point": "os:system", "kwargs": {"command": f"touch {marker}"}}
    if where == "wrapper":
        spec["additional_wrappers"] = [{"name": "RescaleAction", **call}]
    else:
        spec |= call | ({"id": "Mine-v0"} if where == "id" else {})
    changes = {"env_spec": json.dumps(spec)}
    if without_spaces:  # Minari then makes the environment as soon as the dataset is opened
        changes |= {"observation_space": None, "action_space": None}
    name = edited_metadata(minari_store, f"bomb-{where}-{without_spaces}-v0".lower(), monkeypatch, tmp_path, **changes)
    argv = "--dataset", name, "--checkpoint", checkpoint, "--run-dir", tmp_path / "run"
    assert "none was made" in refused(capsys, monkeypatch, o2o_sac, *argv)
    assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("spec", [None, "", "[]", "{}", '{"id": 3}', '{"id": "Hopper-v5", "additional_wrappers": 1}'])
def test_a_dataset_without_a_usable_environment(capsys, monkeypatch, minari_store, tmp_path, checkpoint, spec):
    name = edited_metadata(minari_store, f"spec{abs(hash(spec))}-v0", monkeypatch, tmp_path, env_spec=spec)
    argv = "--dataset", name, "--checkpoint", checkpoint, "--run-dir", tmp_path / "run"
    assert name in refused(capsys, monkeypatch, o2o_sac, *argv)
    assert not (tmp_path / "run").exists()


def test_scores_without_reference_returns_are_returns(capsys, monkeypatch, minari_store, tmp_path, checkpoint):
    changes = {"ref_min_score": None, "ref_max_score": None}
    name = edited_metadata(minari_store, "plain-v0", monkeypatch, tmp_path, **changes)
    data = o2o_sac.load_data(o2o_sac.Args(dataset=name), torch.device("cpu"))
    assert data.score(1234.5) == pytest.approx(1234.5)
    assert "for lack of references" in capsys.readouterr().out
    mean = np.mean([episode.rewards.sum() for episode in minari.load_dataset(name).iterate_episodes()])
    assert float(data.split(data.rows)[2].sum()) == pytest.approx(mean * int(data.last.sum()), rel=1e-4)


def test_without_dataset_the_network_is_never_touched(monkeypatch, tmp_path):
    def network(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(minari, "download_dataset", network)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *args: subprocess.CompletedProcess(args, 2))
    for script in (o2o_sac, o2o_td3, o2o_ppo):
        with pytest.raises(script.UserError, match="no dataset"):
            script.load_data(script.Args(), torch.device("cpu"))


def test_a_copied_script_makes_its_data_with_offline_collect_and_runs_no_other_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    script, marker = tmp_path / "o2o_sac.py", tmp_path / "was-run"
    script.write_text((ROOT / "o2o_sac.py").read_text())
    spec = importlib.util.spec_from_file_location("copied", script)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    for folder, runs in ((tmp_path, False), (tmp_path / "offline", True)):
        folder.mkdir(exist_ok=True)
        (folder / "collect.py").write_text(f"open({str(marker)!r}, 'w'); raise SystemExit(1)")
        with pytest.raises(copied.UserError, match="make it with offline/collect.py"):
            copied.load_data(copied.Args(env_id="nothing-v0"), torch.device("cpu"))
        assert marker.exists() == runs


def test_a_torch_that_does_not_compile_gradients_updates_eagerly(capsys, monkeypatch):
    """Up to 2.8, whoever copies a file into a project that has one."""
    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace())
    args = o2o_sac.Args()
    assert all(o2o_sac.compile_update(update, args) is update for update in (len, max, min))
    assert capsys.readouterr().err.count("does not compile gradients") == 1
