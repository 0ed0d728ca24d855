"""The project's ground: what its files promise about one another."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import yunmin

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_dependency_is_pinned_to_one_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_normal(line.split("==")[0]) for line in lines if "==" in line}
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in lines)
    extras = PROJECT["project"]["optional-dependencies"]
    # kernels for CUDA are built against the user's own torch, and the tests here do without them and the peers
    tested = (requirements for extra, requirements in extras.items() if extra not in ("cuda", "peers"))
    wanted = [*PROJECT["project"]["dependencies"], *(requirement for group in tested for requirement in group)]
    names = {_normal(re.split(r"[\[<>=!~;]", requirement)[0]) for requirement in wanted} - {"yunmin"}
    assert names - pinned == set()


def test_one_version_everywhere() -> None:
    assert f"\nversion: {yunmin.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{yunmin.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_command_has_a_module_with_a_summary_and_a_main() -> None:
    for name, target in PROJECT["project"]["entry-points"]["yunmin.commands"].items():
        module, _, function = target.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, name
        assert spec.origin is not None, name
        tree = ast.parse(Path(spec.origin).read_text())
        assert (ast.get_docstring(tree) or "").strip(), f"{module} has no docstring to summarize {name}"
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_installed_commands_are_those_of_the_project() -> None:
    installed = {point.name for point in entry_points(group="yunmin.commands")}
    assert installed == set(PROJECT["project"]["entry-points"]["yunmin.commands"]), "run `make install` again"


def test_packages_listed_are_those_with_code_and_tests_are_not_installed() -> None:
    listed = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert listed == found - {"tests"}
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == listed


def test_help_is_instant_because_it_imports_no_stage_and_no_torch() -> None:
    heavy = ("torch", "numpy", "bentoml", "training.", "export.", "serving.", "research.", "benchmarks.")
    code = (
        f"import sys, yunmin.cli; yunmin.cli.main(['--help']); print([m for m in sys.modules if m.startswith({heavy})])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in PROJECT["project"]["entry-points"]["yunmin.commands"]:
        assert re.search(rf"^  {command} +\w", done.stdout, re.MULTILINE), command


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(PROJECT["project"]["entry-points"]["yunmin.commands"]))
def test_every_command_explains_itself_with_examples_without_torch(command: str) -> None:
    code = (
        "import sys, yunmin.cli\n"
        "try: yunmin.cli.main(sys.argv[1:])\n"
        "except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "0 False"
    assert f"examples:\n  yunmin {command}" in done.stdout


@pytest.mark.parametrize("target", ["quickstart", "test", "lint", "bench", "peers", "clean", "help", "install"])
def test_makefile_has_the_target_and_help_shows_it(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:.*## \w", makefile, re.MULTILINE)
    assert target in next(line for line in makefile.splitlines() if line.startswith(".PHONY:"))


def test_make_names_what_is_missing_when_no_python_is_new_enough(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "rm"):
        found = next(p for d in os.environ["PATH"].split(os.pathsep) if (p := Path(d) / tool).exists())
        (tools / tool).symlink_to(found.resolve())
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    environment = {"PATH": str(tools)}
    done = subprocess.run(
        [tools / "make", "install"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.startswith("make: no Python >= 3.11 found; install one, or name it")


def test_ci_run_is_executable_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


def test_nothing_a_user_runs_depends_on_files_outside_the_project() -> None:
    pattern = re.compile(r"\.\./shared|/work/|/tmp/w\b")
    suffixes = {".py", ".md", ".toml", ".yaml", ".cff", ".txt", ""}
    roots = [ROOT / name for name in ("yunmin", "training", "export", "serving", "research", "benchmarks", ".ci")]
    files = [path for root in roots for path in root.rglob("*")] + list(ROOT.glob("*"))
    texts = [path for path in files if path.is_file() and path.suffix in suffixes]
    assert [path for path in texts if pattern.search(path.read_text(encoding="utf-8"))] == []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
