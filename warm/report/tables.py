"""The paper's Tables 1 to 5 as Markdown: the paper's numbers, ours, and what differs."""

import dataclasses

from training.schedules import SOLVER
from warm.path import PAPER_BNR
from warm.report.data import PAPER_IMAGES, best_match, differences, flags_beyond_defaults, training_flags
from warm.systems import SYSTEMS
from warm.systems.cold import DEFAULT_START, STARTS
from warm.targets import PAPER_TARGETS

NONE = '–'


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set of the paper.

    Attributes:
        name: Prefix of its file names.
        resolution: Image side in pixels.
        conditional: Whether class labels are used.
    """

    name: str
    resolution: int
    conditional: bool = False


CIFAR10, CIFAR10_CLASSES = Data('cifar10', 32), Data('cifar10', 32, conditional=True)
FFHQ, LSUN_CHURCH = Data('ffhq', 64), Data('lsun-church', 128)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: the paper's numbers, and which measurements belong beside them.

    Attributes:
        title: As in the paper.
        nfe, fid, inception_score: The paper's numbers, None where it gives none.
        matches: facts → whether a measurement with these facts belongs in this row.
        images: Number of images behind the paper's numbers.
    """

    title: str
    nfe: int | None
    fid: float | None
    inception_score: float | None
    matches: object
    images: int = PAPER_IMAGES


def of_system(name):
    """Matches a system without epsilon scaling."""
    return lambda f: f['system'] == name and 'epsilon_scale' not in (f['sampler'] or {})


def of_cold(start):
    """Matches Cold Diffusion with this start (--cold-start); older records name it only where the flag was given."""
    return lambda f: (f['system'] == 'cold'
                      and (f['cold_start'] or (f['sampler'] or {}).get('cold_start', DEFAULT_START)) == start)


def of_epsilon_scaling(f):
    """Whether the facts are of EDM-ES."""
    return f['system'] == 'edm' and 'epsilon_scale' in (f['sampler'] or {})


def of_blurring_diffusion(f):
    """Whether the facts are of Blurring Diffusion, not known to be without blur."""
    return f['system'] == 'blurring' and not of_denoising_diffusion(f)


def of_denoising_diffusion(f):
    """Whether the facts are of Blurring Diffusion's own baseline: the same system without blur."""
    return f['system'] == 'blurring' and (f['network_options'] or {}).get('sigma_blur_max') == 0


def of_bnr(bnr):
    """Matches Warm with the paper's targets along a constant BNR; at BNR 0 also EDM."""
    return lambda f: (of_targets(PAPER_TARGETS)(f) and f['bnr'] == bnr) or (bnr == 0 and of_system('edm')(f))


def of_blurring_schedule(nfe):
    """Matches Warm with the paper's targets along Blurring Diffusion's schedule at this NFE."""
    return lambda f: of_targets(PAPER_TARGETS)(f) and str(f['path']).startswith('blurring') and f['nfe'] == nfe


def of_targets(name):
    """Matches Warm with a parametrisation of Table 5; at BNR 0 they are all the same."""
    return lambda f: f['system'] == 'warm' and f['targets'] == name


def at_paper_bnr(matches):
    """`matches`, restricted to the paper's BNR, 0.5."""
    return lambda f: matches(f) and f['bnr'] == PAPER_BNR


WARM, WARM_TITLE = of_bnr(PAPER_BNR), f'Warm (BNR {PAPER_BNR:g})'
TABLE_1 = {
    'Unconditional CIFAR-10': (CIFAR10, [
        Row('Cold Diffusion (Blur)', 50, 80.08, None, of_cold(DEFAULT_START)),
        Row('IHDM', 200, 18.96, None, of_system('ihdm')),
        Row('Blurring Diffusion', 1000, 3.17, 9.51, of_blurring_diffusion),
        Row('EDM', 35, 1.97, 9.78, of_system('edm')),
        Row('EDM-ES', 35, 1.95, None, of_epsilon_scaling),
        Row('STF', 35, 1.92, 9.79, of_system('stf')),
        Row('PFGM++', 35, 1.91, None, of_system('pfgmpp')),
        Row(WARM_TITLE, 35, 1.85, 10.02, WARM)]),
    'Class-conditional CIFAR-10': (CIFAR10_CLASSES, [
        Row('EDM', 35, 1.79, None, of_system('edm')),
        Row('EDM-ES', 35, 1.80, None, of_epsilon_scaling),
        Row('PFGM++', 35, 1.74, None, of_system('pfgmpp')),
        Row(WARM_TITLE, 35, 1.68, 10.19, WARM)]),
    'FFHQ 64×64': (FFHQ, [
        Row('EDM', 79, 2.53, None, of_system('edm')),
        Row('PFGM++', 79, 2.43, None, of_system('pfgmpp')),
        Row(WARM_TITLE, 79, 2.29, 3.41, WARM)]),
}
TABLE_2 = {  # by number of images: that of the papers it compares with
    '10,000 images': (LSUN_CHURCH, [
        Row('Denoising Diffusion', 1000, 4.68, None, of_denoising_diffusion, 10_000),
        Row('Blurring Diffusion', 1000, 3.88, None, of_blurring_diffusion, 10_000),
        Row(WARM_TITLE, 511, 3.47, None, WARM, 10_000)]),
    '50,000 images': (LSUN_CHURCH, [
        Row('IHDM', 400, 45.06, None, of_system('ihdm')),
        Row(WARM_TITLE, 511, 2.56, None, WARM)]),
}
BNR_SCORES = {0: (1.97, 9.78), 0.1: (1.97, 9.96), 0.3: (1.90, 10.02), 0.5: (1.85, 10.02), 0.65: (1.91, 10.00),
              1: (2.01, 9.96), 2: (2.57, 9.89), 10: (11.97, 8.51)}  # of Table 3: {BNR: (FID, IS)}
TABLE_3 = [Row('0 (EDM)' if bnr == 0 else f'{bnr:g}', 35, *scores, of_bnr(bnr)) for bnr, scores in BNR_SCORES.items()]
TABLE_4 = [*(Row('Blurring Diffusion', nfe, fid, score, of_blurring_schedule(nfe)) for nfe, fid, score in (
    (35, 12.97, 8.57), (79, 4.13, 9.27), (159, 2.91, 9.46), (239, 2.77, 9.52), (319, 2.73, 9.54), (399, 2.71, 9.54),
    (999, 2.68, 9.56))),
    Row('Blurring Diffusion, as reported by its authors', 1000, 3.17, 9.51, of_blurring_diffusion)]
TABLE_5 = [
    Row('(a) R: x₀', 35, 13.19, None, at_paper_bnr(of_targets('clean'))),
    Row('(b) D: V M Vᵀx₀', 35, 9.09, None, at_paper_bnr(of_targets('blurred'))),
    Row('(c) R: x₀, D: V M Vᵀx₀', 35, 1.98, None, at_paper_bnr(of_targets('clean-blurred'))),
    Row('(d) R: x_rest, D: V M Vᵀx₀', 35, 1.85, None, at_paper_bnr(of_targets(PAPER_TARGETS)))]
# The methods looked for on any data set, whether or not the paper has numbers for it.
METHODS = [*TABLE_1['Unconditional CIFAR-10'][1],
           *(Row(f'Cold Diffusion (Blur), from {start}', None, None, None, of_cold(start))
             for start in STARTS if start != DEFAULT_START),
           Row('Denoising Diffusion', None, None, None, of_denoising_diffusion)]


def further_bnrs(measurements):
    """Rows for BNRs that we measured and the paper did not."""
    bnrs = {m.facts['bnr'] for m in measurements} - {None, *BNR_SCORES}
    return [Row(f'{bnr:g}', None, None, None, of_bnr(bnr)) for bnr in sorted(bnrs)]


def further_step_counts(measurements):
    """Rows for NFEs of Blurring Diffusion's schedule that we measured and the paper did not."""
    counts = {m.facts['nfe'] for m in measurements if str(m.facts['path']).startswith('blurring')}
    return [Row('Blurring Diffusion', None, None, None, of_blurring_schedule(nfe))
            for nfe in sorted(counts - {row.nfe for row in TABLE_4})]


def method_of(facts):
    """Name of a method, with Warm's path, and its targets where they are not the paper's."""
    title = SYSTEMS[facts['system']].title if facts['system'] in SYSTEMS else facts['system']
    details = [facts['path'], facts['targets'] if facts['targets'] != PAPER_TARGETS else None,
               'epsilon scaling' if 'epsilon_scale' in (facts['sampler'] or {}) else None]
    details = ', '.join(text for text in details if text)
    return f'{title} ({details})' if details else title


def further_methods(measurements, tabled=True):
    """Rows for methods that we measured and for which neither METHODS nor, if `tabled`, Tables 3 to 5 have a row.

    Args:
        measurements: All on one data set.
        tabled: Whether Tables 3 to 5 are drawn for this data set.
    """
    tables_here = TABLES_3_TO_5 if tabled else ()
    listed = [*METHODS, *(row for _, _, rows, further in tables_here for row in (*rows, *further(measurements)))]

    def unlisted(facts):
        return facts['system'] is not None and not any(row.matches(facts) for row in listed)
    titles = dict.fromkeys(method_of(m.facts) for m in measurements)
    return [Row(title, None, None, None, lambda f, title=title: method_of(f) == title and unlisted(f))
            for title in titles]


TABLES_3_TO_5 = [  # (title, head of the first column, the paper's rows, measurements → rows that the paper lacks)
    ('Table 3. Blur-to-Noise Ratios at NFE 35', 'BNR', TABLE_3, further_bnrs),
    ("Table 4. Blurring Diffusion's schedule in Warm's parametrisation", 'BNR schedule', TABLE_4, further_step_counts),
    (f'Table 5. Training objectives at BNR {PAPER_BNR:g}, NFE 35', 'Branches', TABLE_5, lambda measurements: [])]


def is_dataset(facts, data):
    """Whether the facts are of this data set of the paper; without a recorded resolution, the name decides."""
    return (str(facts['dataset']).lower().startswith(data.name) and bool(facts['label_dim']) == data.conditional
            and facts['resolution'] in (None, data.resolution))


def others(measurements):
    """Group the measurements on data sets that the paper lacks: {(name, whether conditional): measurements}."""
    groups = {}
    for m in measurements:
        if not any(is_dataset(m.facts, data) for data, _ in (*TABLE_1.values(), *TABLE_2.values())):
            groups.setdefault((m.facts['dataset'], bool(m.facts['label_dim'])), []).append(m)
    return groups


def title_of(dataset):
    """Title of a (name, whether conditional), such as 'digits-8x8, unconditional'."""
    name, conditional = dataset
    return f"{name or 'unknown data'}, {'class-conditional' if conditional else 'unconditional'}"


def tables(measurements):
    """All five tables, filled in from `Measurement`s, as Markdown."""
    blocks = ['## Table 1. Methods on CIFAR-10 and FFHQ',
              paper_table('Method', sections(TABLE_1, measurements) + other_sections(measurements)),
              '## Table 2. Methods on LSUN-church 128×128', paper_table('Method', sections(TABLE_2, measurements))]
    unconditional = [m for m in measurements if is_dataset(m.facts, CIFAR10)]
    sets = {None: unconditional, **others(measurements)}
    for title, head, rows, further in TABLES_3_TO_5:
        for dataset, group in sets.items():
            answered = [(row, answer(row, group)) for row in rows]
            answered += [(row, m) for row in further(group) if (m := answer(row, group)) is not None]
            if dataset is None or any(found for _, found in answered):
                blocks.append(f'## {title}' + (f' – {title_of(dataset)}' if dataset else ''))
                blocks.append(paper_table(head, [cells_of(row, found, 'CIFAR-10' if dataset else None)
                                                 for row, found in answered]))
    return '\n\n'.join(blocks)


def answer(row, measurements):
    """The best measurement for a row, or None."""
    return best_match([m for m in measurements if row.matches(m.facts)], row.images, nfe=row.nfe, solver=SOLVER)


def sections(table, measurements):
    """Lines of Table 1 or 2: the methods, under a heading for each data set or number of images.

    Under headings with the usual number of images, methods that we scored and the paper does not list come last.
    """
    lines = []
    for title, (data, rows) in table.items():
        group = [m for m in measurements if is_dataset(m.facts, data)]
        lines += [[f'**{title}**']] + [cells_of(row, answer(row, group)) for row in rows]
        listed = {row.title for other, listed_rows in table.values() if other == data for row in listed_rows}
        if rows[0].images == PAPER_IMAGES:
            lines += scored([row for row in METHODS if row.title not in listed]
                            + further_methods(group, tabled=data == CIFAR10), group)
    return lines


def other_sections(measurements):
    """Lines for data sets that the paper lacks: the methods that we scored on them."""
    lines = []
    for dataset, group in others(measurements).items():
        lines += [[f'**{title_of(dataset)}** (not in the paper)'], *scored(METHODS + further_methods(group), group)]
    return lines


def scored(rows, measurements):
    """Lines of those rows that have a measurement, without the paper's numbers, which are for other data."""
    return [cells_of(dataclasses.replace(row, nfe=None, fid=None, inception_score=None), m)
            for row in rows if (m := answer(row, measurements)) is not None]


def cells_of(row, m, paper_data=None):
    """Cells of a row and its measurement (or None); `paper_data` names the paper's data set if ours is another."""
    paper = [_number(row.nfe, 'd'), _number(row.fid, '.2f'), _number(row.inception_score, '.2f')]
    if m is None:
        return [row.title, *paper, NONE, NONE, NONE, 'not measured']
    distance, inception_score = (m.value(kind) for kind in ('FID', 'IS'))
    return [row.title, *paper, _number(m.facts['nfe'], 'd'), _labelled(distance, 'FID'),
            _labelled(inception_score, 'IS'), differences(m, row.nfe, paper_data, row.images) or 'nothing']


def _number(value, form):
    return NONE if value is None else format(value, form)


def _labelled(score, plain):
    if score is None:
        return NONE
    label, value = score
    return f'{value:.2f}' if label == plain else f'{value:.4g} ({label})'


def paper_table(head, lines):
    """A Markdown table with the paper's numbers beside ours; a line of one cell is a heading."""
    heads = [head, 'NFE ↓ (paper)', 'FID ↓ (paper)', 'IS ↑ (paper)', 'NFE (ours)', 'FID (ours)', 'IS (ours)',
             'What differs']
    return rows_of(heads, ['---'] + ['---:'] * 6 + ['---'], lines)


def rows_of(heads, alignment, lines):
    """A Markdown table of text cells; short lines are padded with empty ones."""
    full = [heads, alignment, *(cells + [''] * (len(heads) - len(cells)) for cells in lines)]
    return '\n'.join('| ' + ' | '.join(str(c).replace('|', '\\|').replace('\n', ' ') for c in cells) + ' |'
                     for cells in full)


def all_scores(measurements):
    """A Markdown table of every measurement, with all it takes to repeat it."""
    heads = ['Run', 'Snapshot', 'kimg', 'Network', 'Path', 'Solver', 'NFE', 'Other options', 'Images', 'Rounds',
             'Seeds', 'Scores', 'Detector', 'Device', 'Seconds', 'Commit']
    lines = []
    for m in measurements:
        f = m.facts
        scores = ', '.join(f'{label} {value:.5g}' for label, value in m.values.items())
        lines.append([m.run, f['network'] or NONE, _number(f['kimg'], 'g'), _network(f), _path(f),
                      f['solver'] or NONE, _number(f['nfe'], 'd'), _other_options(f), _number(f['num_images'], ',d'),
                      str(m.rounds), f['seeds'] or NONE, scores,
                      f['detector'] or NONE, f['device'] or NONE, f'{m.seconds:.0f}', f['commit'] or NONE])
    return rows_of(heads, ['---'] * len(heads), lines)


def _network(facts):
    """Class and size of the U-Net, where recorded."""
    millions = facts['parameters'] / 1e6 if isinstance(facts['parameters'], int) else None
    return f"{facts['architecture']}, {millions:.3g} M" if millions else NONE


def _path(facts):
    """Warm's path; for another system its name, and what its samples start from if not noise."""
    return facts['path'] or f"{facts['system'] or NONE}{' from ' + facts['prior'] if facts['prior'] else ''}"


def _other_options(facts):
    given = [('precision', facts['precision']), ('class', facts['class_idx']), ('cold-blur', facts['cold_blur'])]
    flags = [*training_flags(facts), *flags_beyond_defaults(facts),
             *(f'--{name}={value}' for name, value in given if value is not None)]
    return f"`{' '.join(flags)}`" if flags else NONE
