"""The data behind warm.report: runs with their statistics and scores, and scores grouped into measurements."""

import dataclasses
import inspect
import json
import pathlib
from types import NoneType

from dnnlib import UserError
from dnnlib.json_files import read_lines, read_object
from training.metrics import METRICS, STD, kind_of
from training.run_files import OPTIONS_NAME, SCORES_NAME, STATS_NAME
from training.samplers import ablation_sampler
from training.schedules import SOLVER
from training.system import as_flags
from warm.choices import DEFAULTS as CHOICES
from warm.samplers import SAMPLER_DEFAULTS
from warm.systems import SYSTEMS
from warm.systems.cold import ColdProcess

PAPER_IMAGES, PAPER_ROUNDS = 50_000, 3  # Sec. 3.1
PAPER_KIMG, PAPER_GPUS = 200_000, 8  # the length of training is EDM's
BETTER = {name: metric.best for metric in METRICS.values() for name in metric.scores if not name.endswith(STD)}
DISTANCES = ('FID', 'FD')  # kinds of a distance's label: Inception's, any other detector's
# Two scores that agree in these are rounds of one measurement; everything else may differ between rounds.
GROUP_KEYS = ('network_sha256', 'kimg', 'system', 'dataset', 'label_dim', 'nfe', 'solver', 'precision', 'bnr', 'path',
              'trained_on', 'targets', 'prior', 'cold_blur', 'cold_start', 'sampler', 'class_idx', 'detector',
              'detector_sha256', 'ref_sha256', 'num_images')
# What the network's content determines, or what does not matter: taken from the last round.
LAST_ROUND_KEYS = ('resolution', 'commit', 'device', 'ranks', 'network', 'architecture', 'parameters',
                   'network_options', 'loss')
# What a score has, as fid.py writes it; what is recorded of some only may be None.
SCORE_TYPES = {'metric': str, 'value': (int, float), 'num_images': int, 'nfe': (int, NoneType),
               'kimg': (int, float, NoneType), 'bnr': (int, float, NoneType), 'sampler': (dict, NoneType),
               'seconds': (int, float, NoneType)}
# Options that the facts hold under another name: as NFE, solver, path, targets and blur; `data` is the training set.
NAMED_OTHERWISE = ('num_steps', 'solver', 'bnr', 'bnr_schedule', 'data', 'targets', *CHOICES, 'cold_blur')
ABLATION_DEFAULTS = {name: p.default for name, p in inspect.signature(ablation_sampler).parameters.items()}


@dataclasses.dataclass
class Run:
    """A run folder, or a metrics.jsonl alone.

    Attributes:
        name: Name of the folder.
        options: Content of training_options.json, {} if there is none.
        stats: Lines of stats.jsonl.
        scores: Lines of metrics.jsonl.
    """

    name: str
    options: dict
    stats: list
    scores: list

    @property
    def label(self):
        """Short name for legends: run number, system and the BNR it was trained on."""
        system = self.options.get('system')
        number = self.name.split('-')[0]
        if system is None or not number.isdecimal():
            return self.name
        kwargs = self.options.get('network_kwargs', {})
        path = ''
        if kwargs.get('bnr_schedule'):
            path = f" {kwargs['bnr_schedule']}"
        elif kwargs.get('bnr'):
            path = f" BNR {kwargs['bnr']}"
        return f'{number} {system}{path}'


@dataclasses.dataclass
class Measurement:
    """All rounds of scoring one network in one way.

    Attributes:
        run: Name of the run.
        facts: What the rounds have in common (GROUP_KEYS); LAST_ROUND_KEYS; all their seeds. None where unknown.
        values: {metric's label: best value}.
        rounds: Number of different sets of seeds.
        seconds: Scoring time of all rounds together.
    """

    run: str
    facts: dict
    values: dict
    rounds: int
    seconds: float

    def value(self, kind):
        """(label, value) of the distance (kind 'FID') or of another kind such as 'IS', from any detector; or None."""
        names = DISTANCES if kind == 'FID' else (kind,)
        for label, value in self.values.items():
            if kind_of(label) in names:
                return label, value
        return None


def run_paths(path):
    """[`path`], or the runs inside it, sorted by name, if it is a folder of some and none itself."""
    path = pathlib.Path(path)
    inside = sorted(path.iterdir()) if path.is_dir() and not _is_run(path) else []
    return [folder for folder in inside if _is_run(folder)] or [path]


def _is_run(path):
    """Whether there is something to report in a folder."""
    return bool(read_lines(path / STATS_NAME) or read_lines(path / SCORES_NAME))


def read_run(path):
    """Read a run folder, or a metrics.jsonl alone, as a `Run`.

    Raises:
        UserError: no such folder, or nothing to report in it.
    """
    path = pathlib.Path(path)
    if path.is_file():
        lines = read_lines(path)
        if not any(map(is_own_score, lines)):
            raise UserError(f'{path} holds no score of a network or images; give a run folder, or a {SCORES_NAME} of '
                            'fid.py')
        return Run(path.parent.resolve().name, {}, [], lines)
    if not path.is_dir():
        raise UserError(f'there is no run folder {path}; give folders that train.py made, or metrics.jsonl files')
    stats, scores = read_lines(path / STATS_NAME), read_lines(path / SCORES_NAME)
    if not stats and not scores:
        raise UserError(f'{path} has neither a {STATS_NAME} nor a {SCORES_NAME}, nor has a folder in it; give a run '
                        'folder of train.py, or score one of its networks with fid.py calc --network first')
    return Run(path.resolve().name, read_object(path / OPTIONS_NAME) or {}, stats, scores)


def is_own_score(line):
    """Whether a line is a score, and not of images drawn with parts of another network (warm.crossed)."""
    return 'other' not in line and all(isinstance(line.get(name), kinds) for name, kinds in SCORE_TYPES.items())


def measurements_of(runs):
    """Group the scores of all runs into `Measurement`s, in the order of the files; only those that `is_own_score`."""
    groups = {}
    for run in runs:
        for line in run.scores:
            if is_own_score(line):
                same = {name: line.get(name) for name in GROUP_KEYS}
                groups.setdefault((run.name, json.dumps(same, sort_keys=True)), (run, []))[1].append(line)
    return [_measurement(run, lines) for run, lines in groups.values()]


def _measurement(run, lines):
    values = {}
    for line in lines:
        base = kind_of(line['metric'])
        best = BETTER.get('FID' if base == 'FD' else base)
        if best is not None:
            values[line['metric']] = best(line['value'], values.get(line['metric'], line['value']))
    facts = {name: lines[-1].get(name) for name in (*GROUP_KEYS, *LAST_ROUND_KEYS)}
    if facts['network_options'] is None and facts['system'] in SYSTEMS and run.options:  # a record of an older version
        kwargs = run.options.get('network_kwargs', {})
        facts['network_options'] = SYSTEMS[facts['system']].changed_network(kwargs)
    facts['seeds'] = '; '.join(dict.fromkeys(str(line['seeds']) for line in lines if line.get('seeds')))
    seconds = {str(line.get('seeds')): line.get('seconds') or 0 for line in lines}
    return Measurement(run.name, facts, values, len(seconds), sum(seconds.values()))


def flags_beyond_defaults(facts):
    """The sampler's options that differ from their defaults, as flags ['--S_churn=30', …]; not NAMED_OTHERWISE."""
    system = SYSTEMS.get(facts.get('system'))
    own = {option.name: option.default for option in system.own_sample_options} if system else {}
    plain = {**own, **ABLATION_DEFAULTS, **SAMPLER_DEFAULTS}
    return as_flags({name: value for name, value in (facts.get('sampler') or {}).items()
                     if name not in NAMED_OTHERWISE and (name not in plain or value != plain[name])})


def training_flags(facts):
    """The options of the network and the loss that were not the defaults, as flags; not NAMED_OTHERWISE.

    Nor is `--sigma-blur-max=0`, by which the tables tell Denoising Diffusion from Blurring Diffusion.
    """
    network, loss = (facts.get(name) if isinstance(facts.get(name), dict) else {}
                     for name in ('network_options', 'loss'))
    return as_flags({**{name: value for name, value in network.items()
                        if name not in NAMED_OTHERWISE and (name, value) != ('sigma_blur_max', 0)}, **loss})


def is_plain(facts):
    """Whether a score is of plain training and sampling: no options beyond the defaults, images of all classes."""
    return not (training_flags(facts) or flags_beyond_defaults(facts)) and facts.get('class_idx') is None


def in_float32(facts):
    """Whether the network ran in float32, or its precision is unknown."""
    return facts.get('precision') in (None, 'fp32')


def best_match(candidates, images=PAPER_IMAGES, **preferred):
    """The candidate that compares best with a number of the paper's over `images` images; None without candidates.

    In order of priority: plain training and sampling (`is_plain`), so that the best of a scan over options does not
    win; most of the facts `preferred`; nearest number of images; longest training; float32; best score.
    """
    def rank(m):
        distance = m.value('FID')
        return (is_plain(m.facts), sum(m.facts.get(name) == value for name, value in preferred.items()),
                -abs((m.facts['num_images'] or 0) - images), m.facts['kimg'] or 0, in_float32(m.facts),
                -distance[1] if distance else float('-inf'))
    return max(candidates, key=rank, default=None)


def differences(m, nfe=None, dataset=None, images=PAPER_IMAGES):
    """How a measurement differs from the paper's, in words: data, NFE, images, rounds, training, detector, sampler.

    Args:
        m: The measurement.
        nfe: The paper's NFE, or None if it gives none.
        dataset: Name of the paper's data set, if the measurement is on another.
        images: The paper's number of images.
    """
    f, words = m.facts, []
    if dataset is not None:
        words.append(f'data {f["dataset"]} instead of {dataset}')
    if nfe is not None and f['nfe'] != nfe:
        words.append(f'NFE {f["nfe"]} instead of {nfe}')
    if f['num_images'] != images:
        words.append(f'{f["num_images"]:,} images')
    if m.rounds != PAPER_ROUNDS:
        words.append(f'{m.rounds} round{"s" if m.rounds > 1 else ""}')
    if f['kimg'] is not None and f['kimg'] < PAPER_KIMG * 0.999:
        words.append(f'trained on {f["kimg"] / 1000:.3g} of {PAPER_KIMG // 1000} Mimg')
    label = (m.value('FID') or ('FID',))[0]
    if label != 'FID':
        words.append(f'{label} instead of FID')
    if f['solver'] not in (None, SOLVER):
        words.append(f'solver {f["solver"]}')
    words += [f'`{flag}`' for flag in (*training_flags(f), *flags_beyond_defaults(f))]
    if not in_float32(f):
        words.append(f'precision {f["precision"]}')
    if f['trained_on'] not in (None, f['path']):
        words.append(f'network for {f["trained_on"]}')
    if f['prior'] is not None:
        words.append(f'starts from {f["prior"]}')
    if f['cold_blur'] not in (None, ColdProcess.blur):
        words.append(f'`--cold-blur={f["cold_blur"]}`')
    if f['class_idx'] is not None:
        words.append(f'class {f["class_idx"]} alone')
    return '; '.join(words)
