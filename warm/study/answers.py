"""The answers of the results page: each question as Markdown tables and figures, the paper's answer beside ours.

Every function of QUESTIONS takes the `Scores` of a scale and a function that draws a figure (`page.Figures`), and
returns Markdown.
"""

import math

from training.system import as_flags
from warm.blur import BLUR_RATES
from warm.errors import BETAS
from warm.path import PAPER_BNR
from warm.report.tables import BNR_SCORES, TABLE_3, TABLE_4, TABLE_5, rows_of
from warm.study.data import LEVEL, POWER, Difference, compare, shown
from warm.study.plan import (ALTERNATIVES, UNIT_LOSS, EVALUATIONS, FIGURE_5_BNRS, METHODS, OTHER_TARGETS, PAPER_BNRS,
                             SCHEDULE_STEPS, SOLVERS, STEPS, bnr_name, choice_name, drawn, targets_name)

WARM, EDM = 'warm', 'edm'
NONE = '–'
NOTHING = 'Not measured at this scale.'
ERRORS, ERROR_BETAS = ('D', 'R'), (0.1, 0.5, 2, 10)  # what the last table shows
LINES = dict(zip(SOLVERS, ('-', ':', '--')))  # line styles in the figures
KINDS = {'unconditional': False, 'class-conditional': True}
TITLES = {EDM: 'EDM', WARM: f'Warm, BNR {PAPER_BNR:g}',
          choice_name(UNIT_LOSS): f'Warm, {UNIT_LOSS.lstrip("-")}'}
# Of the runs of the other questions: {name: title}.
OTHER_TITLES = {name: title for name, title in (
    *((bnr_name(bnr), f'BNR {bnr:g}') for bnr in PAPER_BNRS),
    *((targets_name(targets), row.title) for row, targets in zip(TABLE_5, OTHER_TARGETS)),
    *((choice_name(*flags), ' '.join(flags)) for flags, _ in ALTERNATIVES)) if name not in METHODS}


def table(heads, rows):
    """A Markdown table with the first column left-aligned, the others right-aligned."""
    return rows_of(heads, ['---'] + ['---:'] * (len(heads) - 1), rows)


def shared(values, others):
    """The entries of `values` whose seeds `others` has too, so that a row compares like with like."""
    return {seed: value for seed, value in values.items() if seed in others}


def against(values, reference):
    """Two table cells: the difference and the verdict on it."""
    difference = compare(values, reference)
    return [NONE, NONE] if difference is None else [str(difference), difference.verdict]


def mimg(kimg):
    """A number of images as text: '80 kimg', '2 Mimg'."""
    return f'{kimg / 1000:g} Mimg' if kimg >= 1000 else f'{kimg:g} kimg'


def of_seed_0(values):
    """{seed: value} cut down to seed 0, to compare with what only that seed has."""
    return {seed: value for seed, value in values.items() if seed == 0}


def mean(values):
    """Mean over the seeds of {seed: value}."""
    return sum(values.values()) / len(values)


def question_1(scores, figures):
    """Warm, with either weight of R, against EDM over images seen and time."""
    inception, times = scores.label(('IS',)), scores.scale.timed
    rows, more, curves = [], [], {'main': [], 'time': []}
    for kind, cond in KINDS.items():
        for kimg in scores.scale.main:
            edm, *others = (scores.values(name, kimg, cond) for name in METHODS)
            if not (edm or any(others)):
                continue
            title = f'{kind}, {mimg(kimg)}'
            rows.append([title, shown(edm),
                         *(cell for values in others for cell in (shown(values), *against(values, edm)))])
            more.append([title,
                         *(shown(scores.values(name, kimg, cond, ('IS',))) for name in METHODS if inception),
                         *(seconds(scores.seconds(name, kimg, cond)) for name in METHODS if times)])
        for name in METHODS:
            known = {kimg: values for kimg in scores.scale.main if (values := scores.values(name, kimg, cond))}
            points = [(kimg, scores.seconds(name, kimg, cond), mean(values)) for kimg, values in known.items()]
            label = f'{TITLES[name]}, {kind}'
            curves['main'].append(dict(label=label, x=[p[0] for p in points], y=[p[2] for p in points]))
            timed = [p for p in points if p[1]]
            curves['time'].append(dict(label=label, x=[p[1] for p in timed], y=[p[2] for p in timed]))
    figures('main', curves['main'], 'thousands of images seen', f'{scores.label()} ↓')
    figures('time', curves['time'], 'seconds of training', f'{scores.label()} ↓')
    titles = [TITLES[name] for name in METHODS]
    heads = ['', titles[0], *(head for title in titles[1:] for head in (title, 'minus EDM', 'verdict'))]
    more_heads = ['', *(f'{title}: {what}' for what in (inception, times and 'training') if what for title in titles)]
    missing = [name for name, cond in KINDS.items() if not any(row[0].startswith(f'{name},') for row in rows)]
    notes = [f"Not measured at this scale: {', '.join(missing)}."] if missing else []
    return '\n\n'.join([table(heads, rows), *notes, *together(scores),
                        *([table(more_heads, more)] if inception or times else [])])


def together(scores, titles=TITLES):
    """[sentences]: each method's score relative to EDM's over all seeds, and how many would show the paper's gain."""
    texts, (edm, _), (warm, _) = [], BNR_SCORES[0], BNR_SCORES[PAPER_BNR]
    for name, title in titles.items():
        pairs = scores.log_ratios(name, EDM) if name != EDM else []
        if len(pairs) < 2:
            continue
        kimgs, logs = zip(*pairs)
        d = Difference(logs, 1)
        lengths = ' to '.join(map(mimg, sorted({min(kimgs), max(kimgs)})))
        ratio, low, high = (f'{math.exp(x):.2f}' for x in (d.mean, d.mean - d.margin, d.mean + d.margin))
        texts.append(
            f'{title}: all {len(logs)} pairs of runs together, each at the last score that both have, after '
            f"{lengths}, score {ratio} times EDM's, between {low} and {high} with {100 * (1 - LEVEL):g} % confidence; "
            f"by the paper's FIDs it is {warm / edm:.2f} at BNR {PAPER_BNR:g}. With pairs that vary as these do, it "
            f"takes {d.pairs_to_find(math.log(edm / warm))} to find a difference as large as the paper's with a "
            f'probability of {100 * POWER:g} %.')
    return texts


def seconds(number):
    """A time as text, '12 s'; '–' for None."""
    return NONE if number is None else f'{number:.0f} s'


def question_2(scores, figures):
    """Table 3: a network for each BNR, and one network for all."""
    kimg = scores.scale.side
    reference = scores.values(EDM, kimg)
    separate = {bnr: scores.values(bnr_name(bnr), kimg) for bnr in PAPER_BNRS}
    joint = {bnr: scores.values('warm-all', kimg, bnr=f'{bnr:g}') for bnr in PAPER_BNRS}
    if not any(joint.values()) and not any(separate[bnr] for bnr in PAPER_BNRS if bnr_name(bnr) not in METHODS):
        return NOTHING  # the runs in METHODS are question 1's
    rows = [[row.title, f'{row.fid:.2f}', shown(separate[bnr]),
             *(against(separate[bnr], reference) if bnr else [NONE, NONE]), shown(joint[bnr])]
            for bnr, row in zip(PAPER_BNRS, TABLE_3)]
    curves = [dict(x=[i for i, bnr in enumerate(PAPER_BNRS) if values[bnr]],
                   y=[mean(values[bnr]) for bnr in PAPER_BNRS if values[bnr]], label=label)
              for values, label in ((separate, 'a network each'), (joint, 'one network for all'))]
    figures('bnr', curves, 'Blur-to-Noise Ratio', f'{scores.label()} ↓',
            ticks=[f'{bnr:g}' for bnr in PAPER_BNRS])
    return table(['BNR', "paper's FID", 'a network each', 'minus EDM', 'verdict', 'one network for all'], rows)


def question_3(scores, figures):
    """Fig. 5, and whether 2M at 18 evaluations matches Heun at 35, for networks of seed 0.

    For the separate networks, trained longest, and for one network for all BNRs, where only the BNR differs.
    """
    main, kimg = scores.longest(drawn('heun', STEPS[0])), scores.scale.side
    kinds = [*((TITLES[name], name, main, {}) for name in METHODS),
             *((f'one network, BNR {bnr}', 'warm-all', kimg, {'bnr': bnr}) for bnr in FIGURE_5_BNRS)]
    heads = [f'{2 * n - 1} / {e}' if 2 * n - 1 != e else str(e) for n, e in zip(STEPS, EVALUATIONS)]
    rows, curves = [], {'nfe': [], 'nfe-one-network': []}
    for color, (title, what, at, fixed) in enumerate(kinds):
        for solver, counts in SOLVERS.items():
            cells = [of_seed_0(scores.solved(what, at, solver, steps, **fixed)) for steps in counts]
            if any(cells):
                rows.append([f'{title}, {solver}, {mimg(at)}', *map(shown, cells)])
            nfes = [2 * n - 1 for n in STEPS] if solver == 'heun' else EVALUATIONS
            curves['nfe-one-network' if fixed else 'nfe'].append(
                dict(x=[n for n, cell in zip(nfes, cells) if cell], y=[mean(c) for c in cells if c],
                     label=f"{title.removeprefix('one network, ')}, {solver}", color=f'C{color}',
                     linestyle=LINES[solver]))
    if not rows:
        return NOTHING
    for name, drawn_curves in curves.items():
        figures(name, drawn_curves, 'NFE', f'{scores.label()} ↓', log=True)
    answers = []
    for title, what, at, fixed in kinds[:len(METHODS)]:
        few, many = (of_seed_0(scores.solved(what, at, solver, 18, **fixed)) for solver in ('dpmpp2m', 'heun'))
        if few and many:
            answers.append(f'{title}: 2M with 18 evaluations {shown(few)}, Heun with 35 {shown(many)}.')
    return '\n\n'.join([table(['seed 0, NFE of Heun / others', *heads], rows), *answers])


def question_4(scores, figures):
    """Table 5 (parametrisations) and Table 4 (Blurring Diffusion's schedule)."""
    kimg, rows = scores.scale.side, []
    ours = scores.values(WARM, kimg)
    names = [*map(targets_name, OTHER_TARGETS), WARM]
    for row, what in zip(TABLE_5, names):
        values = scores.values(what, kimg)
        rows.append([row.title, f'{row.fid:.2f}', shown(values),
                     *(against(values, ours) if what != WARM else ['', ''])])
    if not any(scores.values(what, kimg) for what in (*names[:-1], 'warm-blurring')):
        return NOTHING
    first = table([f'Parametrisation, {mimg(kimg)}', "paper's FID", scores.label(), 'minus (d)', 'verdict'], rows)
    paper = {row.nfe: row.fid for row in TABLE_4}
    rows = [[str(2 * n - 1), f'{paper[2 * n - 1]:.2f}', *(shown(of_seed_0(scores.solved(what, kimg, 'heun', n)))
                                                          for what in ('warm-blurring', WARM))] for n in SCHEDULE_STEPS]
    second = table([f'NFE, {mimg(kimg)}, seed 0', "paper's FID, blurring schedule", 'blurring schedule',
                    f'constant BNR {PAPER_BNR:g}'], rows)
    return f'{first}\n\n{second}'


def question_5(scores, figures):
    """Our own choices, and the kind of blur, against their alternatives, and these against EDM."""
    kimg, rows = scores.scale.side, []
    ours, edm = scores.values(WARM, kimg), scores.values(EDM, kimg)
    for flags, chosen in ALTERNATIVES:
        values = scores.values(choice_name(*flags), kimg)
        rows.append([f"`{' '.join(flags)}` for {chosen}", shown(shared(ours, values)), shown(values),
                     *against(values, ours), *against(values, edm)])
    if all(row[2] == NONE for row in rows):
        return NOTHING
    heads = ['as chosen', 'alternative', 'difference', 'verdict', 'alternative minus EDM', 'verdict']
    return table([f'Alternative, {mimg(kimg)}', *heads], rows)


def question_6(scores, figures):
    """Transfer from EDM to Warm, beside EDM continued from the same weights by the same command."""
    parent_kimg = scores.scale.main[-1]
    parent, rows = scores.values(EDM, parent_kimg), []
    for kimg in scores.scale.transfer:
        warm, edm = scores.values('transfer', kimg), scores.values('transfer-edm', kimg)
        rows.append([mimg(kimg), shown(warm), shown(edm), *against(warm, parent), *against(warm, edm)])
    if all(row[1] == NONE for row in rows):
        return NOTHING
    return f'Parent: EDM after {mimg(parent_kimg)}, {shown(parent)}.\n\n' + table(
        ['images after the transfer', 'to Warm', 'to EDM', 'Warm minus parent', 'verdict', 'Warm minus EDM', 'verdict'],
        rows)


def followed(scores, figures):
    """Runs of the smaller questions that were ahead at their end, trained and scored for as long as question 1's."""
    titles = {name: OTHER_TITLES[name] for name in scores.scale.longer}
    rows = []
    for name, title in titles.items():
        for kimg in scores.scale.main:
            values, edm, warm = (scores.values(what, kimg) for what in (name, EDM, WARM))
            if values:
                rows.append([f'{title}, {mimg(kimg)}', shown(values), *against(values, edm), *against(values, warm)])
    if not rows:
        return NOTHING
    heads = ['', scores.label(), 'minus EDM', 'verdict', f'minus {TITLES[WARM]}', 'verdict']
    return '\n\n'.join([table(heads, rows), *together(scores, titles)])


def crossed_networks(scores):
    """[Markdown]: scores of images drawn with parts of two networks; [] where none were."""
    rows = []
    for line in scores.crossed:
        low, high = line['low'], line['high']
        levels = ' ≤ '.join([*([f'{low:g}'] if low else []), 'β']) + (f' < {high:g}' if high else '')
        own, other = (f"`{' '.join(as_flags(of['network_options']))}`, {mimg(round(of['kimg']))}"
                      for of in (line, line['other']))
        taken = {'none': 'nothing', 'both': 'D and R'}.get(line['take'], line['take'])
        rows.append([own, taken,
                     *((other, 'all' if levels == 'β' else levels) if line['take'] != 'none' else (NONE, NONE)),
                     f"{line['value']:.3g}"])
    return ['Images drawn with D or R of another network (`python -m warm.crossed`):',
            table(['the network', 'taken', 'from', 'at noise levels', scores.label()], rows)] if rows else []


def where_networks_err(scores, figures):
    """Errors of D and R by noise level, and scores with those of another network."""
    side, end = scores.scale.side, scores.scale.main[-1]
    titles = {**TITLES, 'warm-all': 'one network for all BNRs', **OTHER_TITLES}
    of_other_paths = {EDM, *(bnr_name(bnr) for bnr in PAPER_BNRS if bnr != PAPER_BNR),
                      *(choice_name(f'--blur={blur}') for blur in BLUR_RATES)}
    others, alike = [], []  # of other paths or blurs than Warm's, and of the same
    for name, title in titles.items():
        kimgs = dict.fromkeys((side, end)) if name in METHODS or name in scores.scale.longer else (side,)
        (others if name in of_other_paths else alike).extend((title, name, kimg) for kimg in kimgs)
    rows = [[f'{title}, {mimg(kimg)}', *(shown(scores.errors_of(what, kimg, quantity, beta))
                                         for quantity in ERRORS for beta in ERROR_BETAS)]
            for title, what, kimg in (*others, *alike)]
    rows = [row for row in rows if set(row[1:]) != {NONE}]
    curves = []
    for title, what, kimg in alike:
        known = {beta: mean(values) for beta in BETAS if (values := scores.errors_of(what, kimg, 'R', beta))}
        curves.append(dict(x=list(known), y=list(known.values()), label=f'{title}, {mimg(kimg)}'))
    crossed = crossed_networks(scores)
    if not rows:
        return '\n\n'.join(crossed) or NOTHING
    figures('errors', curves, 'noise level β', "error of R relative to the linear filter's", log=True)
    return '\n\n'.join([
        f'Mean squared errors on images unseen in training (`python -m warm.errors`, `{scores.scale.unseen}`), divided '
        'by those of the best linear filter of each DCT band. The networks below Warm’s first row see the same noisy '
        'images as it; those above see images that hide other things, and compare only roughly.',
        table(['', *(f'{quantity}, β = {beta:g}' for quantity in ERRORS for beta in ERROR_BETAS)], rows),
        *crossed])


QUESTIONS = {
    f'1. Warm at BNR {PAPER_BNR:g} against EDM': question_1,
    '2. Which BNR (Table 3)': question_2,
    '3. Fewer evaluations (Fig. 5)': question_3,
    '4. Parametrisations and schedules (Tables 5 and 4)': question_4,
    '5. Our own choices, and the kind of blur': question_5,
    '6. From EDM to Warm by transfer': question_6,
    'Leads of the smaller questions, followed further': followed,
    'Where the networks err, by noise level': where_networks_err,
}
