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

def ruled(writing, reading):
    "The embedded model with other rules of its ladder"
    from chronomem.ladder.build import LadderOptions, build_ladder
    m = ChronoModel.default()
    old, c = m.lm.memory, m.lm.config
    m.lm.memory = build_ladder(c.ladder, LadderOptions(writing=writing, reading=reading), c.n_mem*m.lm.d, m.lm.width)
    m.lm.memory.load_state_dict(old.state_dict(), strict=False)
    return m

def test_rules_of_the_ladder_act_and_are_put_back(make):
    from chronomem.ladder.reading import ReadingConfig
    from chronomem.ladder.writing import WritingConfig
    m = ruled(WritingConfig(when=('surprise',)), ReadingConfig(attend=True))
    run, memory = make(model=m), m.lm.memory
    assert [*run.locked] == ['cadences'] and (run.settings.margin, run.settings.look) == (1.25, .5)
    run.step().result(60)
    run.set(margin=3., look=.1).result(60)
    assert (memory.writing.config.margin, memory.reading.config.temperature) == (3., .1)
    assert run.session._new == 0, 'saved before the rule changes, as a replay would write by the old one'
    run.stop()
    assert (memory.writing.config.margin, memory.reading.config.temperature) == (1.25, .5)

# Serving

def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'voila.app', None)
    with pytest.raises(ImportError, match=r"chronomem\[app\]"): serve.app_command()
    assert serve.ENV not in os.environ

@pytest.mark.parametrize('port', [0, 65536, -1])
def test_port(port):
    with pytest.raises(ValueError, match='port'): serve.app_command(port=port)

@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "The address of a server"
    code = f"from chronomem.app.serve import app_command; app_command('Ann', {str(tmp_path_factory.mktemp('home'))!r}, port=8930, tell=lambda s: print(s, flush=True))"
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    try:
        address = re.search(r'http://127\.0\.0\.1:\d+/\?token=\w+', p.stdout.readline())[0]
        yield address
        p.send_signal(signal.SIGINT)
        assert p.wait(40) == 0
    finally: p.kill()

@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api')
    if not CHROMIUM: pytest.skip('no chromium')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        yield b
        b.close()

@pytest.mark.slow
def test_nobody_gets_in_without_the_token(served):
    from urllib.request import urlopen
    assert '/login' in urlopen(served.split('?')[0]).url

PICTURES = os.environ.get('CHRONOMEM_PICTURES')  # a folder: pictures are kept there

def shot(page, name, of=None):
    if PICTURES: (of or page).screenshot(path=f'{PICTURES}/{name}.png', **({} if of else dict(full_page=True)))

def count(page): return int(re.search(r'(\d[\d,]*) texts', page.locator('.cm-status').inner_text())[1].replace(',', ''))

def points(page):
    "Points of the curve of loss, as plotly has them"
    return page.evaluate("() => { const g = [...document.querySelectorAll('.js-plotly-plot')].find(g => g.data && g.data.length == 3 && g.data[2].name == 'learning'); return g && g.data[2].x ? g.data[2].x.length : 0 }")

def wait(page, ok, seconds=90):
    end = time.monotonic()+seconds
    while not ok():
        assert time.monotonic() < end, page.locator('body').inner_text()[:2000]
        page.wait_for_timeout(200)

@pytest.mark.slow
def test_the_page(served, browser):
    page = browser.new_page(viewport=dict(width=1440, height=1760))
    page.goto(served, timeout=180_000)
    state = lambda: page.locator('.cm-state').inner_text()
    click = lambda css: page.locator(f'button.cm-{css}').click()
    page.locator('.cm-status').wait_for(timeout=120_000)
    wait(page, lambda: state() == 'paused')
    shot(page, 'empty')
    # start, and curves grow
    click('start')
    wait(page, lambda: state() == 'running' and points(page) >= 2)
    n = points(page)
    wait(page, lambda: points(page) >= n+3)
    # a slider changes the run
    now = page.locator('.cm-now-rate').inner_text()
    handle = page.locator('.cm-rate .noUi-handle')
    handle.focus()
    for _ in range(3): handle.press('ArrowRight')
    wait(page, lambda: page.locator('.cm-now-rate').inner_text() != now)
    assert float(page.locator('.cm-now-rate').inner_text()) > float(now)
    # pause, and step by one
    wait(page, lambda: count(page) >= 14)
    click('pause')
    wait(page, lambda: state() == 'paused')
    n = count(page)
    page.wait_for_timeout(1500)
    assert count(page) == n
    click('step')
    wait(page, lambda: count(page) == n+1)
    assert state() == 'paused'
    # what can't be changed says why
    assert 'Cadences belong to the weights' in page.locator('body').inner_text()
    # chat
    page.locator('.cm-question input').fill('What is the passkey?')
    page.locator('.cm-question input').press('Enter')
    wait(page, lambda: 'latents' in page.locator('.cm-answers').inner_text())
    assert 'What is the passkey?' in page.locator('.cm-answers').inner_text()
    # memory: look, choose, forget
    page.locator('.cm-search input').fill('passkey')
    click('look')
    options = lambda: page.locator('.cm-list option').all_inner_texts()
    wait(page, lambda: any('passkey' in o for o in options()))
    before = options()
    page.locator('.cm-list select').select_option(index=0)
    click('forget')
    wait(page, lambda: options() and options() != before)
    assert before[0] not in options()
    assert 'filled' in page.locator('.cm-rungs').inner_text()
    # save, go on, and open the page again: the run goes on
    click('save')
    click('start')
    wait(page, lambda: state() == 'running')
    n, text = count(page), page.locator('.cm-answers').inner_text()
    page.reload(timeout=180_000)
    page.locator('.cm-status').wait_for(timeout=120_000)
    wait(page, lambda: state() == 'running' and count(page) > n)
    assert page.locator('.cm-answers').inner_text() == text
    assert points(page) > 2
    wait(page, lambda: count(page) > int(os.environ.get('CHRONOMEM_TEXTS', 0)), 400)
    shot(page, 'page')
    for name, f in zip(('loss', 'guards', 'gates', 'sync', 'recall'), page.locator('.js-plotly-plot').all()): shot(page, name, f)
    # stop
    click('stop')
    wait(page, lambda: state() == 'stopped')
    assert page.locator('button.cm-start').is_disabled()
    assert not page.locator('.cm-problems').inner_text().strip()
