"The dashboard: the run without a page, and the page in a real browser"
import itertools, json, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest
from chronomem.app import serve
from chronomem.app.dashboard import RUNS, TrainingRun, open_run
from chronomem.app.watching import told_among_prose
from chronomem.backbone.model import ChronoModel
from chronomem.core import StateError

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

@pytest.fixture(scope='module')
def model(): return ChronoModel.default()

@pytest.fixture
def make(model, tmp_path):
    "Runs that are stopped in the end"
    made = []
    def make(user='Ann', **kw):
        made.append(TrainingRun(**dict(model=model, user=user, home=tmp_path, lives=0) | kw))
        assert made[-1].ready.wait(60)
        return made[-1]
    yield make
    for r in made: r.stop()

def until(ok, seconds=60):
    end = time.monotonic()+seconds
    while not ok():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.02)

# The run

def test_a_run_begins_paused_and_steps_by_one(make):
    run = make()
    assert (run.state, len(run.lived)) == ('paused', 0)
    for n in (1, 2):
        assert run.step().result(60).t == n
        assert (run.state, len(run.lived)) == ('paused', n)
    assert len(run.rows) >= 2 and run.tokens == sum(r['tokens'] for r in run.rows)

def test_start_and_pause(make):
    run = make()
    run.start()
    until(lambda: len(run.lived) >= 3)
    run.pause().result(60)
    n = len(run.lived)
    time.sleep(.5)
    assert len(run.lived) == n and run.session.t == n

def test_step_pauses_a_run_that_runs(make):
    run = make()
    run.start()
    until(lambda: run.lived)
    run.step().result(60)
    assert run.state == 'paused'

def test_a_question_waits_one_text_at_most(make):
    run = make()
    run.start()
    until(lambda: len(run.lived) >= 2)
    n = len(run.lived)
    row = run.ask('What is the passkey?').result(60)
    assert len(run.lived) <= n+1 and row['question'] == 'What is the passkey?'
    assert run.chats[-1] == row

def test_settings_act_while_it_runs(make):
    run = make()
    run.start()
    run.set(rate=.004, anchor=2., stream_kl=.25, decay=.01).result(60)
    c = run.learner.config
    assert (c.rate, c.anchor, c.stream_kl, c.decay) == (.004, 2., .25, .01)
    assert run.learner.n['anchor'] == 2. and run.settings.rate == .004
    assert run.state == 'running' and {k: v for k, v in run.log[-1].items() if k != 'tokens'} == dict(rate=.004, anchor=2., stream_kl=.25, decay=.01)

def test_a_rate_of_zero_leaves_the_weights_as_they_are(make):
    run = make()
    run.set(rate=0.).result(60)
    before = {k: v.clone() for k, v in run.learner.state['weights'].items()}
    run.step().result(60)
    assert all((v == before[k]).all() for k, v in run.learner.state['weights'].items())
    run.set(rate=.01).result(60)
    run.step().result(60)
    assert any((v != before[k]).any() for k, v in run.learner.state['weights'].items())

@pytest.mark.parametrize('bad', [dict(rate=-1.), dict(decay=1.), dict(recall='all'), dict(tokens=0), dict(margin=2.), dict(look=.1), dict(rate='fast')])
def test_a_setting_is_checked_at_once(make, bad):
    run = make()
    was = run.settings
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))): run.set(**bad)
    assert run.settings == was and not run.problems

def test_what_answers_are_made_from(make):
    run = make(texts=[('user', 'My dog is called Prince.')])
    run.step().result(60)
    assert run.ask('What is my dog called?').result(60)['sources'] == []
    run.set(recall='both').result(60)
    assert 'Prince' in run.ask('What is my dog called?').result(60)['sources'][0]['text']

def test_an_answer_with_what_was_learned_leaves_the_same_latents(make):
    a, b = (make(u, texts=told_among_prose()) for u in ('Ann', 'Ben'))
    for run in (a, b):
        run.set(rate=.05).result(60)
        for _ in range(3): run.step().result(60)
    b.set(learned=True).result(60)
    row = b.ask('Who am I?').result(60)
    assert row['learned']
    a.call(lambda: a.session.ingest(a.model.chat('Who am I?', row['answer']))).result(60)
    z = [r.session.state.rungs['tau1']['z'] for r in (a, b)]
    assert (z[0]-z[1]).abs().max() < 1e-4

def test_an_error_of_the_thread_is_shown_and_the_run_goes_on(make):
    run = make(texts=['One.', 5, 'Three.', 'Four.'])
    run.start()
    until(lambda: run.state == 'failed')
    assert run.alive and len(run.lived) == 1
    assert run.problems[-1]['where'] == 'training' and 'TypeError' in run.problems[-1]['error'] or 'int' in run.problems[-1]['error']
    run.start()
    until(lambda: run.state == 'done')
    assert len(run.lived) == 3

def test_a_command_that_fails_is_shown(make):
    run = make()
    with pytest.raises(StateError, match='nothing is kept'): run.forget('0000000000').result(60)
    assert run.problems[-1]['where'] == 'forget' and run.alive and run.state == 'paused'

def test_a_run_that_can_not_open_says_why(make):
    run = make(model='/no/such/model')
    until(lambda: not run.thread.is_alive())
    assert run.state == 'failed' and not run.alive and run.problems[0]['where'] == 'opening'
    with pytest.raises(RuntimeError, match='ended'): run.step().result(5)

def test_two_runs_do_not_meet(make):
    a, b = make('Ann'), make('Ben')
    for r in (a, b): r.start()
    until(lambda: len(a.lived) >= 2 and len(b.lived) >= 2)
    a.stop()
    n = len(b.lived)
    until(lambda: len(b.lived) > n)
    assert (a.state, b.state) == ('stopped', 'running')

def test_two_runs_of_one_person(make):
    make('Ann')
    second = make('Ann', wait=.2)
    assert second.state == 'failed' and 'in use' in second.problems[0]['error']

def test_save_stop_and_go_on(make):
    run = make()
    for _ in range(3): run.step().result(60)
    run.set(rate=.003).result(60)
    run.save().result(60)
    t, frames = run.session.t, run.learner.t
    run.stop()
    assert run.state == 'stopped' and run.session.closed and run.learner.closed
    run.stop()
    again = make()
    assert (again.session.t, again.learner.t, again.settings.rate) == (t, frames, .003)

def test_incognito_leaves_nothing(make, tmp_path):
    run = make(incognito=True)
    run.step().result(60)
    with pytest.raises(ValueError, match='incognito'): run.save().result(60)
    run.stop()
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]

def test_a_run_is_found_by_its_name(model, tmp_path):
    kw = dict(model=model, user='Ann', home=tmp_path, lives=0)
    run = open_run('test', **kw)
    try:
        assert open_run('test', **kw) is run
        run.stop()
        assert open_run('test', **kw) is not run
    finally: RUNS.pop('test').stop()

def test_recall_by_delay_comes_while_the_stream_goes_on(make):
    run = make(lives=2, delays=(2, 4))
    run.start()
    until(lambda: len(run.recalls) >= 4)
    assert [(r['round'], r['delay']) for r in run.recalls][:4] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert run.recalls[0]['of'] == 2

def test_the_ladders_rules_are_put_back(make, tmp_path):
    from chronomem.backbone.backbone import MemoryLM
    from chronomem.ladder.reading import Looking, ReadingConfig
    from chronomem.ladder.whole import LadderRules
    from chronomem.ladder.writing import WritingConfig
    from chronomem.backbone.model import MemoryConfig
