"""Paths and families of paths: formulas, what the texts of the flags mean, what lies inside what."""

import dataclasses
import math

import pytest
import torch

from dnnlib import UserError
from warm.path import (PATHS, BlurringSchedule, BNRList, BNRRange, ConstantBNR, OnePath, parse_family, parse_path,
                       schedule_texts)

LOW, HIGH = 0.002, 80.0


# -- paths

def test_constant_bnr():
    path = ConstantBNR(0.5)
    assert path.alpha(3.0) == 1.5 and not path.is_hot and ConstantBNR(0).is_hot and ConstantBNR(0).alpha(7.0) == 0


@pytest.mark.parametrize('t', [0.01, 0.3, 0.5, 0.9])
def test_blurring_schedule_is_the_cosine_schedule(t):
    """β = tan(πt/2) and α = σ_B,max·sin²(πt/2)."""
    assert BlurringSchedule(20).alpha(math.tan(math.pi * t / 2)) == pytest.approx(
        20 * math.sin(math.pi * t / 2) ** 2)


@pytest.mark.parametrize('name', PATHS)
def test_every_path(name):
    path = parse_path(None, name)
    beta = torch.logspace(-3, 2, 300, dtype=torch.float64)
    alpha = path.alpha(beta)
    assert alpha.dtype == torch.float64 and (alpha.diff() > 0).all() and path.alpha(0.0) == 0
    assert path.alpha(2.0) == pytest.approx(path.alpha(torch.tensor(2.0, dtype=torch.float64)).item())
    assert path.alpha(torch.ones([4, 1, 1, 1])).shape == (4, 1, 1, 1)
    assert path == parse_path(None, name) and isinstance(path.is_hot, bool) and str(path)


@pytest.mark.parametrize('path', [ConstantBNR(0.3), BlurringSchedule(3), *(parse_path(None, name) for name in PATHS)])
@pytest.mark.parametrize('low, high', [(LOW, HIGH), (0.002, 0.5), (2, 80)])
def test_bounds_are_the_extremes_of_the_ratio(path, low, high):
    beta = torch.logspace(math.log10(low), math.log10(high), 20001, dtype=torch.float64)
    ratio = path.alpha(beta) / beta
    assert path.bnr_bounds(low, high) == pytest.approx((ratio.min().item(), ratio.max().item()), rel=1e-6)


# -- texts

@pytest.mark.parametrize('bnr, schedule, path', [
    (None, None, ConstantBNR(0.5)), ('0.65', None, ConstantBNR(0.65)), ('0', 'constant', ConstantBNR(0)),
    (1.5, None, ConstantBNR(1.5)), (None, 'blurring', BlurringSchedule(20)),
    (None, 'blurring:7.5', BlurringSchedule(7.5)), ('1e-3', None, ConstantBNR(0.001)),
    ('1E-3', None, ConstantBNR(0.001)), ('1000', None, ConstantBNR(1000)),
])
def test_paths_from_texts(bnr, schedule, path):
    assert parse_path(bnr, schedule) == path
    assert parse_family(bnr, schedule) == OnePath(path)


@pytest.mark.parametrize('text, family', [
    ('0,0.1,0.3,0.5,1', BNRList((0, 0.1, 0.3, 0.5, 1))), ('0.5,0', BNRList((0.5, 0))),
    ('0.1-2', BNRRange(0.1, 2)), (' 0.1-2 ', BNRRange(0.1, 2)), ('0.1-1000', BNRRange(0.1, 1000)),
])
def test_families_from_texts(text, family):
    assert parse_family(text) == family


@pytest.mark.parametrize('bnr, schedule, said', [
    ('-1', None, 'Blur-to-Noise Ratio'), ('nan', None, 'Blur-to-Noise Ratio'), ('warm', None, "'warm'"),
    ('inf', None, 'inf'), ('', None, "''"), ('0.5,0.5', None, 'repeats a value'), ('0.1,-1', None, '-1'),
    ('0.1,,1', None, "''"), ('2-0.1', None, 'empty'), ('0.5-0.5', None, 'empty'), ('0-2', None, 'starts at 0'),
    ('0.1-inf', None, 'range'), ('0.1-warm', None, "'warm'"), (None, 'linear', 'constant, blurring'),
    (None, 'constant:3', '--bnr=0.5'), ('0.5', 'blurring', 'give one'), ('0.1,0.5', 'blurring', 'give one'),
    (None, 'blurring:5,', 'one number'), (None, 'blurring:,', "''"), (None, 'blurring:', "''"),
    (None, 'blurring:0', 'largest blur'), (None, 'blurring:-2', 'largest blur'), (None, 'blurring:x', "'x'"),
    (None, 'blurring:x', 'sigma_b_max of the schedule blurring; give a number, such as --bnr-schedule=blurring:20'),
    ('1e-2-1', None, 'without exponents'), ('1e30', None, '0 to 1000'), ('0.5,1001', None, '0 to 1000'),
    ('0.1-1001', None, 'beyond 1000'), (None, 'blurring:1e30', '≤ 2000 pixels'),
    ('nan', None, "'nan' in --bnr"), ('2-1', None, '--bnr=2-1'), ('-1', None, '--bnr'), ('0.5,0.5', None, '--bnr=0.5'),
    (None, 'foo', "--bnr-schedule 'foo'"), (None, 'blurring:x', '--bnr-schedule'),
])
def test_refuses_in_a_sentence(bnr, schedule, said):
    with pytest.raises(UserError) as e:
        parse_family(bnr, schedule)
    assert said in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('same', [
    [(None, None), ('0.5', None), (0.5, 'constant'), ('0.50', None)], [('0', None), ('0.0', None)],
    [('0.123456789', None)],
    [('0,0.1,1', None), ('0, .1 ,1.0', None)], [('1,0', None)], [('0.1-2', None), (' .10-2.', None)],
    [(None, 'blurring'), (None, 'blurring:20')], [(None, 'blurring:7.25')]])
def test_flags_are_one_text_for_all_spellings(same):
    flags = [parse_family(*texts).flags for texts in same]
    assert all(f == flags[0] for f in flags)
    assert parse_family(flags[0]['bnr'], flags[0]['bnr_schedule']) == parse_family(*same[0])


# -- families

def test_what_lies_inside():
    assert OnePath(ConstantBNR(0.5)).contains(ConstantBNR(0.5), LOW, HIGH)
    assert not OnePath(ConstantBNR(0.5)).contains(ConstantBNR(0.4), LOW, HIGH)
    assert OnePath(BlurringSchedule(20)).contains(BlurringSchedule(20), LOW, HIGH)
    assert not OnePath(BlurringSchedule(20)).contains(BlurringSchedule(10), LOW, HIGH)
    some = BNRList((0, 0.5))
    assert some.contains(ConstantBNR(0), LOW, HIGH) and not some.contains(ConstantBNR(0.3), LOW, HIGH)
    assert not some.contains(BlurringSchedule(1), LOW, HIGH)
    wide = BNRRange(0.1, 2)
    assert all(wide.contains(ConstantBNR(bnr), LOW, HIGH) for bnr in (0.1, 0.7, 2))
    assert not any(wide.contains(ConstantBNR(bnr), LOW, HIGH) for bnr in (0, 0.09, 2.1))
    # The blurring schedule's ratio runs from 20·β to 10 and back to 20/β.
    assert not wide.contains(BlurringSchedule(20), LOW, HIGH)
    assert BNRRange(0.03, 11).contains(BlurringSchedule(20), LOW, HIGH)
    assert not BNRRange(0.05, 11).contains(BlurringSchedule(20), LOW, HIGH)


@pytest.mark.parametrize('text, bnr', [('0.3', 0.3), ('0,0.4,2', 0.4), ('0.1-2', 0.5), ('1-2', 1), ('0.1-0.3', 0.3)])
def test_default_path_is_near_the_paper(text, bnr):
    family = parse_family(text)
    assert family.default == ConstantBNR(bnr) and family.contains(family.default, LOW, HIGH)


def test_only_bnr_0_alone_is_hot():
    assert parse_family('0').is_hot
    assert not any(parse_family(text).is_hot for text in ('0,0.5', '0.1-2', '0.5'))


def test_draws_from_a_list_alike():
    torch.manual_seed(0)
    beta = torch.rand([6000, 1, 1, 1]) + 0.5
    ratio = BNRList((0, 0.5, 2)).draw_alpha(beta) / beta
    assert ratio.shape == beta.shape and ratio.dtype == torch.float32
    for bnr in (0, 0.5, 2):
        assert ((ratio - bnr).abs() < 1e-6).float().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert (ratio == 0).any(), 'BNR 0 must be exact'


def test_draws_log_uniformly_from_a_range():
    torch.manual_seed(0)
    beta = torch.rand([6000, 1, 1, 1]) + 0.5
    place = (BNRRange(0.1, 2).draw_alpha(beta) / beta / 0.1).log() / math.log(20)
    assert place.min() >= -1e-6 and place.max() <= 1 + 1e-6
    assert torch.quantile(place, torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def test_a_single_path_draws_nothing():
    torch.manual_seed(0)
    expected = torch.rand([3])
    torch.manual_seed(0)
    parse_family('0.5').draw_alpha(torch.ones([4, 1, 1, 1]))
    assert torch.equal(torch.rand([3]), expected)


def test_a_schedule_without_a_number(monkeypatch):
    class Straight(ConstantBNR):
        def __init__(self):
            super().__init__(1)

    Straight.__dataclass_fields__ = {}
    monkeypatch.setitem(PATHS, 'straight', Straight)
    texts = schedule_texts()
    assert texts[:2] == ['constant', 'blurring[:SIGMA_B_MAX]'] and texts[-1] == 'straight'
    assert parse_path(None, 'straight').alpha(2.0) == 2.0
    assert parse_family(None, 'straight').flags == {'bnr': None, 'bnr_schedule': 'straight'}
    with pytest.raises(UserError, match='straight:3: straight takes no number; give --bnr-schedule=straight'):
        parse_path(None, 'straight:3')


@dataclasses.dataclass(frozen=True)
class Sigmoid(BlurringSchedule):
    """A schedule with two numbers, here in place of one that a user would write."""

    sigma_b_max: float = 20.0
    slope: float = 2.0


def test_a_schedule_with_several_numbers(monkeypatch):
    """Numbers left out keep their defaults; what a snapshot stores rebuilds the same path."""
    monkeypatch.setitem(PATHS, 'sigmoid', Sigmoid)
    assert schedule_texts()[-1] == 'sigmoid[:SIGMA_B_MAX,SLOPE]'
    for text, path in (('sigmoid', Sigmoid()), ('sigmoid:5', Sigmoid(5)), ('sigmoid:5,0.7', Sigmoid(5, 0.7))):
        assert parse_path(None, text) == path
        assert parse_family(None, parse_family(None, text).flags['bnr_schedule']) == OnePath(path)
    for text, words in (('sigmoid:5,x', "'x' in --bnr-schedule is not slope of the schedule sigmoid"),
                        ('sigmoid:1,2,3', 'takes up to 2 numbers; give --bnr-schedule=sigmoid:20,2')):
        with pytest.raises(UserError, match=words):
            parse_path(None, text)
