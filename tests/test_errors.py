"""What the user can put right: one sentence on stderr, exit code 2, nothing overwritten."""

import json
import os
import subprocess
import sys

import collect
import cql
import gymnasium as gym
import pytest
import torch
from conftest import ROOT, TASK, for_scripts

import o2o_ppo
import o2o_sac
import o2o_td3


def refused(capsys, monkeypatch, module, algorithm, *argv):
    monkeypatch.setattr(sys, "argv", [algorithm, *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        module.run_cli(module.main, algorithm)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_unknown_task_names_the_nearest_first(capsys, monkeypatch):
    error = refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--env-id", "hoper-medium-v2")
    assert error.index("hopper-medium-v2") < error.index("walker2d-expert-v2")


def test_missing_and_corrupt_checkpoints(capsys, monkeypatch, tmp_path, checkpoint):
    assert "offline/cql.py" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--checkpoint", tmp_path / "no.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    assert "incomplete" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--checkpoint", broken)
    broken.write_bytes(b"hello")
    assert "incomplete" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--checkpoint", broken)
    torch.save({"format": 1}, broken)
    assert "is missing" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--checkpoint", broken)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved.update(format=2), "format 2"),
        (lambda saved: saved.update(env_id="walker2d-medium-v2"), "walker2d-medium-v2"),
        (lambda saved: saved["policy"].update(kind="decision_transformer"), "decision_transformer"),
        (lambda saved: saved["policy"].update(hidden=[256]), "do not fit"),
        (lambda saved: saved["actor"].update(obs_mean=torch.zeros(5), obs_std=torch.ones(5)), "5 observations"),
    ],
)
def test_checkpoints_that_do_not_fit(capsys, monkeypatch, tmp_path, checkpoint, change, words):
    saved = torch.load(checkpoint, weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "changed.pt")
    run_dir = tmp_path / "run"
    argv = ("--checkpoint", tmp_path / "changed.pt", "--run-dir", run_dir)
    assert words in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", *argv)
    assert not run_dir.exists()


def test_nothing_is_overwritten_unasked(capsys, monkeypatch, tmp_path, checkpoint):
    before = checkpoint.read_bytes()
    assert "--overwrite" in refused(capsys, monkeypatch, cql, "cql", "--output", checkpoint)
    assert checkpoint.read_bytes() == before
    assert "--overwrite" in refused(capsys, monkeypatch, collect, "collect", "--env-id", TASK)
    assert "--overwrite" in refused(capsys, monkeypatch, collect, "collect", "--env-id", TASK, "--train")
    (tmp_path / "args.json").write_text("{}")
    argv = ("--checkpoint", checkpoint, "--run-dir", tmp_path)
    assert "--resume" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", *argv)
    assert (tmp_path / "args.json").read_text() == "{}"


def test_resume_needs_a_run_of_this_algorithm(capsys, monkeypatch, tmp_path):
    assert "nothing to resume" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--resume", tmp_path / "none")
    (tmp_path / "args.json").write_text(json.dumps({"algorithm": "cql", "seed": 1}))
    assert "not a run of o2o_sac" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--resume", tmp_path)
    for damaged in ("", json.dumps({"algorithm": "o2o_sac", "no_such_flag": 1})):
        (tmp_path / "args.json").write_text(damaged)
        assert "damaged" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--resume", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_but_missing(capsys, monkeypatch):
    assert "CUDA" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", "--cuda")


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

    monkeypatch.setattr(o2o_sac, "write_json", full)
    argv = ("--checkpoint", checkpoint, "--run-dir", tmp_path / "run")
    assert "No space left" in refused(capsys, monkeypatch, o2o_sac, "o2o_sac", *argv)


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
    assert "--minibatch-size" in refused(capsys, monkeypatch, o2o_ppo, "o2o_ppo", "--minibatch-size", "100")
    assert "--num-envs" in refused(capsys, monkeypatch, o2o_ppo, "o2o_ppo", "--num-envs", "3")
    assert "--no-align" in refused(capsys, monkeypatch, o2o_ppo, "o2o_ppo", "--alignment-steps", "0")


@for_scripts(o2o_ppo)
def test_ppo_cannot_be_resumed_with_another_layout(script, tiny, tmp_path):
    script.main(tiny(online_steps=4))
    with pytest.raises(script.UserError, match="--num-envs"):
        script.main(tiny(resume=str(tmp_path / "run"), num_envs=2))


@for_scripts(o2o_sac, o2o_td3)
def test_resume_with_fewer_online_steps_than_done(script, tiny, tmp_path):
    script.main(tiny())
    with pytest.raises(script.UserError, match="did 12 environment steps already"):
        script.main(tiny(resume=str(tmp_path / "run"), online_steps=8))


def test_no_compiler_falls_back_to_eager(monkeypatch, capsys):
    def missing():
        raise o2o_sac.InvalidCxxCompiler()

    monkeypatch.setattr(o2o_sac, "get_cpp_compiler", missing)
    o2o_sac.can_compile.cache_clear()
    assert o2o_sac.compile_update(len, True, "cpu") is len and o2o_sac.compile_update(max, True, "cpu") is max
    assert capsys.readouterr().err.count("no C++ compiler") == 1
    o2o_sac.can_compile.cache_clear()


def test_no_renderer_is_explained(tmp_path):
    def make_env(**kwargs):
        raise gym.error.Error("no display")

    with pytest.raises(o2o_sac.UserError, match="MUJOCO_GL"):
        o2o_sac.record_video(None, make_env, tmp_path / "videos/x.mp4", 0, "cpu")


def test_the_command_itself_exits_with_2_and_no_traceback():
    command = [sys.executable, ROOT / "o2o_sac.py", "--env-id", "antmaze-large-v9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
