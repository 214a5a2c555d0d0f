"""The shape of the house: imports go one way, docs show what the commands say, choices come from the registry."""

import ast
import importlib
import operator
import os
import re
import subprocess

import click
import pytest
from click.testing import CliRunner

from tests.commands import ROOT, invoke, refused
from warm.presets import PRESETS
from warm.systems import SYSTEMS

LAYERS = ['dnnlib', 'torch_utils', 'training', 'warm', 'scripts']  # each may import those before it
SCRIPTS = ['train', 'generate', 'fid', 'dataset_tool']
MODULE_COMMANDS = {'classifier': 'training.classifier', 'study': 'warm.study.run'}  # run by python -m
MODULES = [*(p for layer in LAYERS[:-1] for p in sorted((ROOT / layer).rglob('*.py'))),
           *(ROOT / f'{name}.py' for name in SCRIPTS)]


def layer_of(module):
    name = module.split('.')[0]
    return 'scripts' if name in SCRIPTS else name if name in LAYERS else None


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'relative import'
            yield node.module


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = LAYERS.index(layer_of(path.relative_to(ROOT).as_posix().removesuffix('.py').replace('/', '.')))
    for name in imported(ast.parse(path.read_text())):
        layer = layer_of(name)
        assert layer is None or LAYERS.index(layer) <= own, f'{path.name} imports {name}'
        assert layer != 'scripts', f'{path.name} imports the script {name}'


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_downloads_load_the_network_library(path):
    statements = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = imported(ast.Module(statements, type_ignores=[]))
    assert not {'requests', 'urllib3'} & {name.split('.')[0] for name in names}


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), 'no module docstring'
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            assert ast.get_docstring(node) or is_click(node), f'{node.name} has no docstring'


@pytest.mark.parametrize('page', ['README.md', 'docs/robustness.md'])
def test_the_tests_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    named = re.findall(r'`(tests/[\w/]+\.py)(?:::(\w+))?`((?:, `test_\w+`)*)', text)
    assert len(named) > 5
    for path, first, others in named:
        functions = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text(encoding='utf-8')))
                     if isinstance(node, ast.FunctionDef)}
        assert {name for name in (first, *re.findall(r'test_\w+', others)) if name} <= functions, path


def test_every_package_is_installed():
    """`pip install .` takes those that pyproject.toml lists."""
    found = {path.parent.relative_to(ROOT).as_posix().replace('/', '.')
             for layer in LAYERS[:-1] for path in (ROOT / layer).rglob('__init__.py')}
    listed = re.search(r'^packages = \[(.*)\]$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)[1]
    assert set(re.findall(r'"([\w.]+)"', listed)) == found and 'warm.systems' in found


def test_samplers_are_found_where_edm_has_them():
    for name in ('edm_sampler', 'ablation_sampler', 'StackedRandomGenerator'):
        assert callable(getattr(importlib.import_module('generate'), name))


def test_lines_fit():
    """120 columns, tests and benchmarks too."""
    paths = [path for pattern in ('*.py', *(f'{layer}/**/*.py' for layer in LAYERS[:-1]), 'tests/**/*.py')
             for path in ROOT.glob(pattern)]
    long = [f'{path.relative_to(ROOT)}:{number}' for path in paths
            for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1) if len(line) > 120]
    assert len(paths) > 100 and not long, long


BENCHMARKS = sorted(path.stem for path in (ROOT / 'tests' / 'benchmarks').glob('bench_*.py'))


@pytest.mark.parametrize('name', BENCHMARKS)
def test_benchmarks_start_without_options(name):
    """They accept no options, as `make bench` starts them, and those that gpu_all.py gives, at full size and tiny."""
    command = importlib.import_module(f'tests.benchmarks.{name}').main
    gpu_all = importlib.import_module('tests.benchmarks.gpu_all')
    assert sorted(sum(gpu_all.CALLS.values(), ())) == sorted([gpu_all.TESTS[0], *gpu_all.RUNS])  # each in one call
    runs = gpu_all.RUNS.values()
    lines = [[]] + [list(options) for script, *ways, _ in runs if script == f'{name}.py'
                    for options in ways if options is not None]
    for line in lines:
        command.make_context(name, [*line, '--out=report.json'])


def is_click(node):
    return any('click' in ast.dump(d) or 'option' in ast.dump(d) for d in node.decorator_list)


def test_top_level_holds_only_what_it_should():
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip('not a git checkout')
    top = {name.split('/')[0] for name in tracked.stdout.split()}
    assert top <= {*(f'{name}.py' for name in SCRIPTS), *LAYERS[:-1], 'tests', 'environment.yml', 'README.md',
                   'LICENSE', 'pyproject.toml', 'requirements.txt', 'requirements-test.txt', 'Makefile', 'docs', '.ci',
                   '.gitignore', 'results'}


def commands():
    """{name: click command}: the scripts, their subcommands, and modules that are commands."""
    found = {}
    for name in SCRIPTS:
        command = importlib.import_module(name).main
        found[name] = command
        if isinstance(command, click.Group):
            found.update({f'{name}-{sub}': c for sub, c in command.commands.items()})
    return {**found, **{name: importlib.import_module(module).main for name, module in MODULE_COMMANDS.items()}}


@pytest.mark.parametrize('name', commands())
def test_help_texts_in_docs(name):
    """docs/NAME-help.txt is what --help prints. UPDATE_DOCS=1 pytest tests/test_structure.py rewrites them."""
    path = ROOT / 'docs' / f'{name}-help.txt'
    module = MODULE_COMMANDS.get(name, '').removesuffix('.run')
    script, _, sub = name.partition('-')
    program = f'python -m {module}' if module else f'python {script}.py {sub}'.strip()
    shown = CliRunner().invoke(commands()[name], ['--help'], terminal_width=120, prog_name=program).output
    if os.environ.get('UPDATE_DOCS') == '1':
        path.write_text(shown)
    # Versions of click break lines differently.
    assert path.read_text().split() == shown.split(), f'{path.name} is old; UPDATE_DOCS=1 as above makes it anew'


def test_readme_names_files_that_exist():
    text = (ROOT / 'README.md').read_text()
    for name in re.findall(r'`((?:warm|training|torch_utils|dnnlib|tests|docs)/[\w./-]*)`', text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r'\]\(((?!http)[^)#]+)\)', text):
        assert (ROOT / name).exists(), name


def test_the_page_of_the_method_names_what_exists():
    """Its code, its options, and the pages it refers to."""
    text = (ROOT / 'docs' / 'method.md').read_text()
    names = re.findall(r'`warm\.(\w+)\.([\w.]+)`', text)
    assert len(names) > 25
    for module, name in names:
        operator.attrgetter(name)(importlib.import_module(f'warm.{module}'))
    flags = {flag for parameter in importlib.import_module('train').main.params for flag in parameter.opts}
    assert flags >= set(re.findall(r'`(--[\w-]+)', text)) and '--rest-scale' in text
    assert all((ROOT / 'docs' / name).exists() for name in re.findall(r'\]\(([^)]+)\)', text))


def test_readme_names_every_system_and_preset():
    text = (ROOT / 'README.md').read_text()
    for name in [*PRESETS, *(name for name, system in SYSTEMS.items() if system.trainable)]:
        assert f'`{name}`' in text, name


def test_readme_commands_parse():
    """Every command line of ours in the README names options that exist."""
    text = (ROOT / 'README.md').read_text().replace('\\\n', ' ')
    found = re.findall(r'(?:python|torchrun[^\n]*?) (train|generate|fid|dataset_tool)\.py([^\n`#]*)', text)
    assert len(found) > 8
    for script, rest in found:
        command = importlib.import_module(script).main
        words = rest.split()
        if isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {flag for parameter in command.params for flag in parameter.opts}
        for word in words:
            if word.startswith('--'):
                assert word.split('=')[0] in known, f'{script}.py {word}'


@pytest.mark.parametrize('name', PRESETS)
def test_presets(name):
    """A preset fills in defaults; an option given beside it wins."""
    preset = PRESETS[name]
    out = invoke('train.py', f'--preset={name}', '-n', '--batch=48')
    assert out.exit_code == 0, out.output
    assert '"batch_size": 48' in out.output and '"system": "warm"' in out.output
    twin = invoke('train.py', f'--preset={name}', '-n', '--precond=edm')
    assert '"system": "edm"' in twin.output and '"bnr"' not in twin.output
    if 'cres' in preset.train:
        numbers = ',\n      '.join(preset.train['cres'].split(','))
        assert f'"channel_mult": [\n      {numbers}\n' in out.output


def test_dry_run_of_a_preset_needs_no_data_but_a_run_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, preset in PRESETS.items():
        if name != 'digits':
            refused(invoke('train.py', f'--preset={name}'), preset.train['data'], preset.data)
    refused(invoke('train.py', f'--data={PRESETS["ffhq"].train["data"]}'), PRESETS['ffhq'].data)
    refused(invoke('train.py', '--preset=ffhq', f'--data={tmp_path}/ffhq-64x64.zip'), 'ffhq-64x64.zip')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('preset', [[], ['--preset=ffhq']])
def test_dry_run_looks_at_data_that_the_user_names(preset):
    refused(invoke('train.py', *preset, '-n', '--data=/nowhere/x.zip'), 'there is no folder or zip /nowhere/x.zip')
