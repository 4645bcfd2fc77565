"""Copies stay copies, flags are used, documented commands run."""

import ast
import importlib
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "results"))

SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("offline/*.py")])
BLOCK = re.compile(r"^# shared: (\w+)\n(.*?)^# end shared$", re.M | re.S)


def test_shared_blocks_are_identical():
    copies = defaultdict(lambda: defaultdict(list))  # name -> text -> files
    for path in SCRIPTS:
        text = path.read_text()
        assert text.count("\n# shared: ") == len(BLOCK.findall(text)), f"{path.name}: a marker is not closed"
        for name, block in BLOCK.findall(text):
            copies[name][block].append(path.name)
    assert copies, "no shared block found"
    for name, versions in copies.items():
        assert len(versions) == 1, f"{name} has drifted: {list(versions.values())}"


def test_nothing_from_a_shared_block_is_defined_elsewhere():
    shared = {
        node.name
        for path in SCRIPTS
        for _, block in BLOCK.findall(path.read_text())
        for node in ast.parse(block).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert "UserError" in shared
    for path in SCRIPTS:
        own = ast.parse(BLOCK.sub("", path.read_text())).body
        names = {node.name for node in own if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not names & shared, f"{path.name} has its own version of {names & shared}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_flag_is_read_and_no_script_imports_another(path):
    tree = ast.parse(path.read_text())
    fields = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    names = {node.target.id for node in fields if isinstance(node, ast.AnnAssign)}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert names == names & read, f"never read: {names - read}"
    ours = {script.stem for script in SCRIPTS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {str(module).split(".")[0] for module in modules} & (ours | {"offline", "tests"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_explains_every_flag(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    module = importlib.import_module(path.stem)
    with pytest.raises(SystemExit):
        tyro.cli(module.Args, args=["--help"])
    text = capsys.readouterr().out
    for line in text.splitlines():
        if line.startswith("│ --"):
            explanation = re.sub(r"\(default: .*?\)|\(repeatable\)|--[\w-]+|\{.*?\}|[A-Z|]{3,}|│", "", line)
            assert len(explanation.strip(" ,|")) > 3, f"{path.name}: {line}"


def test_the_table_of_settings_serves_every_task_and_every_row_of_it_is_some_script_s():
    served = set()
    for script in map(importlib.import_module, ("o2o_sac", "o2o_td3", "o2o_ppo")):
        for task in script.TASKS:
            args = script.Args(env_id=task)
            asked = {flag for flag in script.SETTINGS if getattr(args, flag, 0) is None}
            script.fill_settings(args)
            assert asked and not [flag for flag in asked if getattr(args, flag) is None]
            served |= asked
            for flag in asked:  # expert quality is what makes a difference, not the mixture's name
                twin = script.Args(env_id=task.replace("-medium-expert-", "-expert-").replace("-replay", ""))
                script.fill_settings(twin)
                assert getattr(args, flag) == getattr(twin, flag)
        assert {flag for flags in script.EXCEPTIONS.values() for flag in flags} <= set(script.SETTINGS)
        assert set(script.EXCEPTIONS) <= set(script.ENVS)
    assert served == set(script.SETTINGS)


def documented_commands():
    """(where, script, arguments) of every `python ....py` in the README and in the scripts' docstrings."""
    readme = "\n".join(re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S))
    texts = {"README.md": readme} | {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in SCRIPTS}
    for where, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", line):
                match = re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:\S*/)?python (\S+\.py)(.*)", part)
                if match:
                    yield where, match[1], shlex.split(match[2], comments=True)
                if "./benchmark.sh" in part:
                    yield where, "results/benchmark.py", shlex.split(part.split("./benchmark.sh")[1], comments=True)


def test_documented_commands_parse():
    commands = list(documented_commands())
    assert len(commands) > 10
    for where, script, argv in commands:
        assert (ROOT / script).exists(), f"{where}: {script} does not exist"
        if not script.startswith("results/") or script == "results/benchmark.py":
            try:
                tyro.cli(importlib.import_module(Path(script).stem).Args, args=argv)
            except SystemExit as stop:
                if stop.code:  # --help ends with 0
                    pytest.fail(f"{where}: python {script} {shlex.join(argv)}")


def test_the_documented_way_to_write_a_checkpoint_and_to_act_with_it_works(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    net = nn.Sequential(nn.Linear(11, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    names = {"net": net, "mean": torch.full((11,), 0.5), "std": torch.full((11,), 2.0)}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert torch.allclose(names["action"], net(torch.full((1, 11), -0.25)).tanh(), atol=1e-6)


SHIPPED = sorted((ROOT / "offline/checkpoints").glob("*-v2/*.pt"))
SIZES = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6)}  # observations, actions


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shipped_policy_is_small_tells_nothing_of_where_it_was_made_and_is_loaded(path):
    task, algorithm = path.parent.name, path.stem.removesuffix("_5")
    scripts = {"cql": "o2o_sac", "td3_bc": "o2o_td3", "iql": "o2o_ppo", "lapo": "o3f"}
    if path.stem in ("lapo", "iql_5"):
        script = importlib.import_module("o3f")
        args = script.Args(env_id=task, base=algorithm)
        _, saved = script.load_base(path, args, *SIZES[task.split("-")[0]], bf16=False)
    else:
        script = importlib.import_module(scripts[path.stem])
        _, saved = script.load_policy(path, task, *SIZES[task.split("-")[0]], 0.1)
    assert (saved["algorithm"], saved["env_id"], saved["dataset"]) == (algorithm, task, f"o2o/{task}")
    assert saved["step"] >= (30_000 if algorithm == "lapo" else 50_000)
    assert path.stat().st_size < (6e6 if algorithm == "lapo" else 2 * 2**20)  # LAPO: five critics of three layers
    assert not [value for value in saved["args"].values() if isinstance(value, str) and value.startswith("/")]


def test_the_default_task_has_a_policy_for_every_script():
    assert {path.name for path in SHIPPED if path.parent.name == "hopper-medium-v2"} >= {
        *("cql.pt", "td3_bc.pt", "iql.pt", "iql_5.pt", "lapo.pt")
    }
