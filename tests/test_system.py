"The composed system: killed and resumed it is the same, it blocks no frame, and nothing is told twice"
import os, re, signal, subprocess, sys, time
import pytest, torch
from chronomem.backbone.model import ChronoModel
from chronomem.live.boot import BootConfig
from chronomem.live.segments import SegmentConfig, line, stamp, vote
from chronomem import Session
from chronomem.thought.subconscious import Subconscious
from chronomem.live.body import SystemConfig
from chronomem.live.journal import Journal, at_times, heard, told
from chronomem.live.system import ChronoSystem, live
from chronomem.senses.sources import Source
from chronomem.then.home import overview, wipe_user

class Bursts(Source):
    "Half a second of harmonics in every two"
    kind, period = 'audio', .05
    def __init__(self, n=160, clock=None): super().__init__('bursts', clock); self.n = n
    def frames(self, t0):
        g, x = torch.Generator().manual_seed(0), torch.arange(800)/16000
        for i in range(self.n):
            tone = sum(torch.sin(2*torch.pi*150*k*(x+.05*i))/k for k in range(1, 9))*.1*(i % 40 < 12)
            yield self.raw(t0+.05*i, tone + 1e-4*torch.randn(800, generator=g))

CONFIG = dict(every=2., tokens=4)

@pytest.fixture(scope='module')
def model(): return ChronoModel.default()

@pytest.fixture(scope='module')
def ear(): return Subconscious.from_pretrained()

LIFE = """
import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])
from test_system import *
with ChronoSystem(ChronoModel.default(), 'ann', sys.argv[2], config=SystemConfig(**CONFIG), boot=BootConfig(every=40)) as s:
    for e in s.listen(Bursts(), resume=True): print(e.frame, flush=True)
"""

def life(home, stop=None):
    "A process that lives the sound; killed once it has told of frame `stop`"
    p = subprocess.Popen([sys.executable, '-c', LIFE, os.path.dirname(__file__), str(home)], stdout=subprocess.PIPE, text=True)
    seen = []
    for x in p.stdout:
        seen.append(int(x))
        if stop and seen[-1] >= stop: os.kill(p.pid, signal.SIGKILL); break
    p.wait()
    assert stop or p.returncode == 0
    return seen

def leaves(x):
    "All tensors of a state"
    if isinstance(x, torch.Tensor): return [x]
    return [t for k in sorted(x.keys()) if x.get(k) is not None for t in leaves(x.get(k))]

def equal(a, b):
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) > 0 and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b))

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no kill -9 here')
def test_killed_and_resumed_is_the_same(tmp_path, model, ear):
    life(tmp_path/'whole')
    for stop in (95, None): seen = life(tmp_path/'cut', stop)
    assert 40 <= seen[0] <= 95
    a, b = (ChronoSystem(model, 'ann', tmp_path/k, ear, SystemConfig(**CONFIG)) for k in ('whole', 'cut'))
    with a, b:
        x, y = a.state, b.state
        assert x.t == y.t > 5
        texts = [[(m.text, m.role, m.position) for m in told(s.session)] for s in (a, b)]
        assert texts[0] == texts[1] and any(r[1] == 'assistant' for r in texts[0])
        assert equal(x.ladder, y.ladder) and equal(x.running, y.running)
        assert (x.ears, x.pending, x.asked) == (y.ears, y.pending, y.asked)

def test_a_key_written_before_a_kill_is_told_again(tmp_path, model):
    "Killed between the key and the telling: told; killed after it: not told twice"
    with ChronoSystem(model, 'ann', tmp_path, config=SystemConfig(listen=False)) as s:
        job = dict(key='k', kind='event', text='At 00:00:01 it rang.', source='x', position=1000)
        s.journal.add('k', s.session.t)
    with ChronoSystem(model, 'ann', tmp_path, config=SystemConfig(listen=False)) as s:
        s._give(job); s._give(job)
        assert s.session.t == 1 and s.count['again'] == 1
    with ChronoSystem(model, 'ann', tmp_path, config=SystemConfig(listen=False)) as s:
        s._give(job)
        assert s.session.t == 1

def test_what_is_pending_is_told_by_the_next_process(tmp_path, model, ear):
    "A kill finds jobs in the queue: the ear's file holds them"
    s = ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**CONFIG))
    for r in Bursts(20): s.step_frame(r)
    n = s.session.t
    s.pending = [dict(key='late', kind='event', text='At 00:00:01 it rang.', source='x', position=1000)]
    s.save(); s.listener.close(); s.session.close()
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**CONFIG)) as s:
        assert s.session.t == n+1 and not s.pending and told(s.session)[-1].text == 'At 00:00:01 it rang.'

def test_frames_never_wait_for_a_thought(tmp_path, model, ear, monkeypatch):
    "The model takes two seconds; frames go on meanwhile"
    slow = ChronoModel.answer
    def answer(self, *a, **k): time.sleep(2.); return slow(self, *a, **k)
    monkeypatch.setattr(ChronoModel, 'answer', answer)
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**CONFIG), threaded=True) as s:
        most = 0.
        for r in Bursts(120): t = time.perf_counter(); s.step_frame(r); most = max(most, time.perf_counter()-t)
        assert s.pending and most < 1.8
        s.join()
        assert s.count['thoughts'] >= 2 and not s.problems

def test_live_and_replay_tell_the_same(tmp_path, model, ear):
    for name, threaded in (('a', False), ('b', True)):
        with ChronoSystem(model, name, tmp_path, ear, SystemConfig(**CONFIG), threaded=threaded) as s:
            for _ in s.listen(Bursts()): pass
    a, b = ([(m.text, m.role) for m in told(model.session(n, tmp_path)) if m.role == 'system'] for n in 'ab')
    assert a == b and len(a) >= 3

def test_at_most_one_thought_in_so_many_seconds(tmp_path, model, ear):
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(every=3., tokens=2)) as s:
        for _ in s.listen(Bursts()): pass
        rows = [r for r in s.journal.rows if r['key'].endswith('thought')]
        at = [m.position/1000 for m in told(s.session) if m.role == 'assistant']
        assert len(rows) >= 2 and all(b-a >= 3 for a, b in zip(at, at[1:]))
        assert all(r['decision']['text'] and r['decision']['evidence'] for r in rows)
        assert [t.source for t in s.stream] == ['self']*len(rows)

@pytest.mark.parametrize('off', ['listen', 'remember', 'think'])
def test_parts_may_be_left_out(tmp_path, model, ear, off):
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**CONFIG, **{off: False})) as s:
        if off == 'listen': assert s.listener is None; s.tell('hello'); return
        for r in Bursts(80): s.step_frame(r)
        assert s.count['heard'] >= 1 and (s.count['thoughts'] == 0) == (off == 'think')
        assert any(tmp_path.rglob('*.safetensors')) == False or off != 'remember'

def test_a_wipe_takes_the_listener_too(tmp_path, model, ear):
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**CONFIG)) as s:
        for r in Bursts(60): s.step_frame(r)
    assert [r['problem'] for r in overview(tmp_path)] == [''] and any(tmp_path.rglob('listener.safetensors'))
    with model.session('ann', tmp_path) as a: a.fork('eve').close()
    wipe_user('ann', tmp_path)
    assert [r['user'] for r in overview(tmp_path)] == ['eve']
    with ChronoSystem(model, 'eve', tmp_path, ear) as s: s.wipe()
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and p.name != '.lock']

def test_another_process_answers_about_a_time(tmp_path, model):
    with ChronoSystem(model, 'ann', tmp_path, config=SystemConfig(listen=False)) as s:
        for a, b, who in ((1, 3, 'theo'), (10, 12, 'jackson')):
            s._give(dict(key=who, kind='event', text=line('speech', a, b, who, .9), source='x', position=1000*a))
    with model.session('ann', tmp_path) as s:
        assert [e['text'].split()[0] for e in heard(s, '00:00:11', '00:00:11')] == ['jackson']
        assert 'theo' in at_times(heard(s), 'Who spoke at 0:02?')[0] and not at_times(heard(s), 'Who spoke at 5:00?')

def test_a_journal_that_was_torn_is_read(tmp_path):
    j = Journal(tmp_path/'j', most=10)
    for i in range(25): j.add(str(i), i)
    assert len((tmp_path/'j').read_text().split('\n')) < 25
    with open(tmp_path/'j', 'a') as f: f.write('{"key": "to')
    assert '24' in Journal(tmp_path/'j', 25) and '0' not in Journal(tmp_path/'j', 25)
    assert oct((tmp_path/'j').stat().st_mode)[-3:] == '600'

def test_a_source_that_ends_in_mid_word_still_tells(tmp_path, model, ear):
    c = SegmentConfig()
    state = dict(speech=dict(on=True, run=0, first=0., start=1.), votes=vote({}, 'fsdd-theo', .9), sound={}, talked=True, odd=False)
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**CONFIG)) as s:
        s.listener.place = dict(source='x', position=0, t0=0., over=False)
        s.ears = state; s._cut(2.5)
        assert told(s.session)[-1].text == line('speech', 1., 2.5, 'theo', .9) and s.ears == {}
        s._cut(3.)
        assert s.session.t == 1

LIVE = """
import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])
from test_system import *
for x in live(Bursts(4000), 'ann', sys.argv[2], config=SystemConfig(**CONFIG)): print(x, flush=True)
"""
ASK = """
import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])
from test_system import *
with ChronoModel.default().session('ann', sys.argv[2], recall='traces') as s: print([m.text for m in s.ask(sys.argv[3], 4, sources=True, remember=False)[1]])
"""

def test_ctrl_c_ends_a_run_and_another_process_answers(tmp_path):
    "The last line sums it up; what was heard is found by its time in a process that heard nothing"
    here = os.path.dirname(__file__)
    fresh = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell may start us with Ctrl-C ignored
    p = subprocess.Popen([sys.executable, '-c', LIVE, here, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=fresh)
    seen = []
    for x in p.stdout:
        seen.append(x.strip())
        if sum('there was' in y for y in seen) == 4: p.send_signal(signal.SIGINT); break
    rest, errors = p.communicate(timeout=600)
    seen += rest.strip().split('\n')
    assert p.returncode == 0 and 'stopped' in seen and 'Traceback' not in errors, errors
    assert re.fullmatch(r'\d+ things? remembered, \d+ thoughts?, \d+ frames?, \d+ late, 0 missing', seen[-1])
    line = next(x for x in seen if ' there was' in x and '00:00:04' in x).split('  ', 1)[1]
    run = lambda *a: subprocess.run([sys.executable, *a], stdout=subprocess.PIPE, text=True, timeout=600, check=True).stdout
    assert line in run('-c', ASK, here, str(tmp_path), 'What was there at 00:00:04?')
    assert run('-m', 'chronomem.app.cli', 'ask', 'What was there at 00:00:04?', '--user', 'ann', '--home', str(tmp_path)).strip()

def test_who_stops_reading_has_everything_saved(tmp_path, model, ear):
    lines = live(Bursts(), 'ann', tmp_path, model, ear, config=SystemConfig(**CONFIG))
    while 'there was' not in next(lines): pass
    lines.close()
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**CONFIG)) as s: assert len(heard(s.session)) == 1 and s.recent

@pytest.mark.parametrize('stop', [1., 5.2, 30., 400.])
def test_each_passage_of_a_line_can_be_found_and_read_alone(model, stop):
    "A long segment is cut between sentences; each piece names speaker and times"
    with model.session('x', incognito=True) as s:
        s.ingest(line('speech', 3., 3+stop, 'theo', .9), 'system', 'mic')
        pieces = s.memories(n=99)
        assert all(m.text.startswith('theo spoke') for m in pieces) and (len(pieces) > 1) == (stop > 3)
        assert [r['stop'] for r in heard(s)] == [int(3+stop)]

def test_a_question_finds_the_trace_of_its_time_by_words(model):
    "Plain `Session.ask` knows nothing of times: the words of the line do it"
    with model.session('x', incognito=True, recall='traces', top=1) as s:
        for i in range(30): s.ingest(line('speech', 4*i, 4*i+2.5, 'george jackson nicolas theo'.split()[i*7 % 4], .9), 'system', 'mic')
        found = [s.ask(f'Who spoke at {stamp(4*i+1)}?', 1, remember=False, sources=True)[1][0] for i in range(30)]
        assert sum(m.position == 0 and stamp(4*i+1) in m.text for i, m in enumerate(found)) >= 29

def test_a_thought_is_listed_but_answers_nothing(tmp_path, model):
    with ChronoSystem(model, 'ann', tmp_path, config=SystemConfig(listen=False), recall='traces') as s:
        s._told(dict(key='a', source='mic', position=1), line('speech', 1., 2., 'theo', .9), 'system')
        s._told(dict(key='b', source='self', position=1), 'At 00:00:01, because it spoke: jackson', 'assistant')
        assert [m.role for m in told(s.session)] == ['system', 'assistant']
        assert [m.role for m in s.session.memories('Who spoke at 00:00:01?', every=False)] == ['system']
        assert [m.role for m in s.ask('Who spoke at 00:00:01?', 2, sources=True)[1]] == ['system']

def test_a_question_finds_no_question(tmp_path, model):
    with ChronoSystem(model, 'ann', tmp_path, config=SystemConfig(listen=False), recall='traces') as s:
        s.tell('Listen for the doorbell, please.')
        for _ in range(2): found = s.ask('What were you watching for?', 2, sources=True)[1]
        assert [m.text for m in found] == ['Listen for the doorbell, please.']

def test_what_is_forgotten_leaves_the_listener_too(tmp_path, model, ear):
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**{**CONFIG, 'think': False})) as s:
        for r in Bursts(60): s.step_frame(r)
        gone = told(s.session)[0]
        s.forget(gone.id)
        assert gone.text not in [m.text for m in told(s.session)] and gone.text not in s.recent
    assert not any(gone.text.encode() in p.read_bytes() for p in tmp_path.rglob('*') if p.is_file())

def test_kept_as_latents_no_line_is_written_down(tmp_path, model, ear):
    with ChronoSystem(model, 'ann', tmp_path, ear, SystemConfig(**CONFIG), keep='latents') as s:
        for r in Bursts(60): s.step_frame(r)
        assert s.recent and s.count['heard'] and told(s.session) == []
        s.ask('What was there at 00:00:00?', 2)
    assert not any(b'there was' in p.read_bytes() for p in tmp_path.rglob('*') if p.is_file())

@pytest.mark.parametrize('recall', ['none', 'ladder'])
def test_no_text_is_read_where_none_is_wanted(model, recall):
    with ChronoSystem(model, 'ann', config=SystemConfig(listen=False, remember=False), recall=recall) as s:
        s._told(dict(key='a', source='mic', position=1), line('speech', 1., 2., 'theo', .9), 'system')
        assert s.ask('Who spoke at 00:00:01?', 2, sources=True)[1] == []
