"The listener through everything a source can do to it, restarts after a kill, and the command `chronomem listen`"
import io, json, os, signal, subprocess, sys, time
import numpy as np, pytest, soundfile as sf, torch
from chronomem.core import ManualClock, StateError, WallClock, load_tensors, save_tensors, seed_all
from chronomem.live.boot import STATE, BootConfig, BootManager
from chronomem.live.executive import ACTIONS, REASONS
from chronomem.live.listener import Listener, ListenerConfig
from chronomem.live.recording import _leaves
from chronomem.live.console import Console
from chronomem.thought.subconscious import Subconscious, SubconsciousConfig
from chronomem.senses.sources import AudioFile, Source, Watchdog
from chronomem.then.recall import Resonance, ResonanceConfig
from chronomem.thought.machine import ThoughtConfig

def small(seed=0, d=32):
    seed_all(seed)
    c = SubconsciousConfig(core=ThoughtConfig(d=d, d_in=32, memory=4, hidden=4, n_synch_out=32, n_synch_action=0, drift='decay'), echo=.3, hidden=32)
    return Subconscious(c, resonance=Resonance(ResonanceConfig(width=d, capacity=256))).eval().requires_grad_(False)

def voice(seconds=3., rate=16000):
    t = np.arange(int(seconds*rate))/rate
    x = sum(np.sin(2*np.pi*k*140*t)/k for k in range(1, 12))*(np.sin(2*np.pi*t) > 0)
    return (.2*x + .001*np.random.default_rng(0).normal(size=len(t))).astype('f4')

def nans(x): return np.where(np.arange(len(x)) % 50 == 7, np.nan, x).astype('f4')

FILES = dict(plain=(voice(), 16000, {}), clipped=((100*voice()).clip(-1, 1), 16000, {}), silent=(np.zeros(48000, 'f4'), 16000, {}), u8=(voice(3, 8000), 8000, dict(subtype='PCM_U8')),
             hi=(voice(3, 96000), 96000, dict(subtype='PCM_24')), stereo=(np.stack([voice(), voice()[::-1]], 1), 16000, {}), nan=(nans(voice()), 16000, dict(subtype='FLOAT')), short=(voice(.01), 16000, {}))

@pytest.fixture(scope='module')
def model(): return small()

def sane(events, n):
    "n frames and an end, each with features in range and a decision that can be read"
    *es, end = events
    assert len(es) == n and end.end and not any(e.end for e in es)
    for i, e in enumerate(es):
        assert e.frame == i and not e.error and not e.missing
        assert all(0 <= v['p'] <= 1 for v in e.features.values()) and all(0 <= v <= 1 for v in e.certainty.values())
        assert e.decision['action'] in ACTIONS and REASONS[e.decision['reason']][0] == e.decision['action']
        assert abs(sum(e.decision['attention'].values())-1) < 1e-3
        json.loads(json.dumps(e.record(), allow_nan=False))
    return end

@pytest.mark.parametrize('name', FILES)
def test_files(name, tmp_path, model):
    x, rate, kw = FILES[name]
    sf.write(tmp_path/'x.wav', x, rate, **kw)
    with Listener(model) as l: end = sane(list(l.events(AudioFile(tmp_path/'x.wav'))), 1 if name == 'short' else 60)
    assert end.reason == 'exhausted' and l.stats()['errors'] == 0
    if name == 'silent': assert l.run.mind.on.sum() == 0

@pytest.mark.parametrize('name,share', [('plain', .4), ('hi', .7), ('u8', .02)])
def test_truncated(name, share, tmp_path, model):
    x, rate, kw = FILES[name]
    sf.write(tmp_path/'x.wav', x, rate, **kw)
    raw = (tmp_path/'x.wav').read_bytes()
    (tmp_path/'x.wav').write_bytes(raw[:int(share*len(raw))])
    with Listener(model) as l: es = list(l.events(AudioFile(tmp_path/'x.wav')))
    assert 'cut off' in sane(es, len(es)-1).reason and abs(len(es)-1-60*share) <= 2

def test_no_sound_at_all(tmp_path, model):
    (tmp_path/'x.wav').touch()
    with pytest.raises(ValueError, match='empty'): AudioFile(tmp_path/'x.wav')
    class None_(Source):
        kind, period = 'audio', .05
        def frames(self, t0): return iter(())
    with Listener(model) as l: es = list(l.events(None_('none')))
    assert [e.end for e in es] == [True] and l.stats()['frames'] == 0

class Shaky(Source):
    "Live: 10 frames, then nothing for 0.6 s, 10 more, and it is gone"
    kind, period, replay = 'audio', .05, False
    def frames(self, t0):
        for i in range(20):
            self.clock.advance_to(t0 + .05*(i+1) + .6*(i >= 10))
            yield self.raw(self.clock.now()-.05, torch.randn(800)*.1)
        raise OSError('unplugged')

def test_stalls_and_vanishes(model):
    clock = WallClock()
    with Listener(model) as l: es = list(l.events(Watchdog(Shaky('mic', clock), clock)))
    assert es[-1].end and es[-1].reason == 'OSError: unplugged'
    assert sum(not e.missing for e in es[:-1]) == 20 and 6 <= sum(e.missing for e in es) <= 14
    gap = [e for e in es if e.missing]
    assert {e.decision['reason'] for e in gap[:3]} == {'no_input'} and l.run.inner.traces.count.item() == 20
    assert all(e.t < f.t for e, f in zip(es[:-1], es[1:-1]))

class Stuck(Source):
    kind, period, replay = 'audio', .05, False
    def frames(self, t0):
        yield self.raw(self.clock.now()-.05, torch.zeros(800))
        time.sleep(20)

def test_hangs_for_ever(model):
    clock = WallClock()
    with Listener(model) as l: es = list(l.events(Watchdog(Stuck('mic', clock), clock, give_up=.8)))
    assert 'no data for 0.8 s' in es[-1].reason and 4 <= sum(e.missing for e in es) <= 20

def test_starved_state_does_not_blow_up(model):
    class Gap(Source):
        kind, period = 'audio', .05
        def frames(self, t0):
            yield self.raw(0., torch.randn(800)*.1)
            yield self.raw(.05, duration=3600., missing=True, reason='stalled')
            yield self.raw(3600.05, torch.randn(800)*.1)
    with Listener(model, config=ListenerConfig(most_gap=300)) as l: es = list(l.events(Gap('gap')))
    assert len(es) == 303 and l.stats()['skipped'] == 72000-300 and es[-2].t == 3600.05
    assert all(v.isfinite().all() for v in (l.run.inner.past, l.run.inner.core.z, l.run.mind.spread))

class Wild(Source):
    kind, period = 'audio', .05
    def frames(self, t0):
        g = np.random.default_rng(0)
        for i in range(120):
            bad = [torch.zeros(0), torch.zeros(1, 800), np.zeros(800, 'i2'), None, {}, torch.full((800,), torch.inf), np.full(800, np.nan), torch.randn(800)*1e30, torch.randn(800).half(), b'x'][g.integers(10)]
            yield self.raw(.05*i, bad if i % 2 else torch.randn(800)*.1)

def test_broken_frames(model):
    with Listener(model) as l: es = list(l.events(Wild('wild')))
    assert len(es) == 121 and sum(bool(e.error) for e in es) == l.stats()['errors'] > 30
    assert all(e.features for e in es[:-1]) and all(not e.error for e in es[:-1:2])
    assert all(v.isfinite().all() for v in (l.run.inner.past, l.run.inner.core.z, l.run.inner.traces.value))

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('kw', [dict(), dict(echo=0.), dict(stats=0.)], ids=['echo', 'no echo', 'no statistics'])
def test_recorded_frames_are_the_written_ones(seed, kw):
    "Whatever comes, in whatever order: the same records, the same state, in every digit"
    seed_all(0)
    heads = tuple(h.replace(reads='state') for h in small().config.heads) if 'stats' in kw else small().config.heads
    m, g = Subconscious(small().config.replace(heads=heads, **kw), resonance=small().resonance).eval(), np.random.default_rng(seed)
    kinds = [lambda: np.zeros(800), lambda: .1*g.normal(size=800), lambda: 90*g.normal(size=800), lambda: nans(g.normal(size=800)), lambda: voice(.05), lambda: None]
    frames = [kinds[g.integers(len(kinds))]() for _ in range(80)]
    records, states = [], []
    for quick in (True, False):
        with Listener(m) as l:
            assert l.quick[0] is m and not l.last
            if not quick: l.quick = None, None
            es = [l._frame(.05*i, None if x is None else torch.as_tensor(x, dtype=torch.float32).nan_to_num()) for i, x in enumerate(frames)]
        records.append([{k: v for k, v in e.record().items() if k != 'ms'} for e in es]); states.append(l.run)
    assert records[0] == records[1] and not any(e.error for e in es)
    a, b = map(_leaves, states)
    assert len(a) == len(b) > 20 and all(torch.equal(v, w) for v, w in zip(a, b))

def test_no_decision_storm_in_silence(tmp_path, model):
    sf.write(tmp_path/'x.wav', 1e-4*np.random.default_rng(0).normal(size=16000*20), 16000)
    with Listener(model) as l: acted = [e for e in l.events(AudioFile(tmp_path/'x.wav')) if e.decision and e.decision['action'] != 'wait']
    assert len(acted) <= 4

LIFE = '''
import sys, json, torch
sys.path.insert(0, {tests!r})
from test_listener import *
class Slow(AudioFile):
    def frames(self, t0):
        for r in super().frames(t0):
            time.sleep(.004); yield r
with Listener(small(), {home!r}, boot=BootConfig(every=20, page=64)) as l:
    for e in l.events(Slow({wav!r}), resume=True):
        print(json.dumps({{k: v for k, v in e.record().items() if k != 'ms'}}), flush=True)
'''

def test_killed_and_restarted(tmp_path):
    sf.write(tmp_path/'x.wav', voice(20), 16000)
    env = dict(os.environ, OMP_NUM_THREADS='1')
    with Listener(small()) as l: want = [json.loads(json.dumps({k: v for k, v in e.record().items() if k != 'ms'})) for e in l.events(AudioFile(tmp_path/'x.wav'))]
    whole = l.run
    got, cuts = {}, []
    code = LIFE.format(tests=os.path.dirname(__file__), home=str(tmp_path/'home'), wav=str(tmp_path/'x.wav'))
    for stop in (90, 150, None):
        p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=env)
        for i, line in enumerate(p.stdout):
            e = json.loads(line)
            if i == 0: cuts.append(e['frame'])
            assert got.setdefault(e['frame'], e) == e       # what is lived twice is the same twice
            if stop and i == stop: p.send_signal(signal.SIGKILL); break
        p.stdout.close(); p.wait()
    assert 0 == cuts[0] < cuts[1] < cuts[2] < 400
    assert [got[i] for i in sorted(got)] == want
    b = BootManager(small(), tmp_path/'home'); run, kept = b.start(); b.close()
    assert kept['over'] and all(torch.equal(v, run.inner.traces.get(k)) for k, v in whole.inner.traces.items() if v is not None)
    assert not list((tmp_path/'home').glob('.tmp-*'))

def test_other_model_is_refused(tmp_path):
    sf.write(tmp_path/'x.wav', voice(.5), 16000)
    with Listener(small(), tmp_path/'home') as l: list(l.events(AudioFile(tmp_path/'x.wav')))
    for other in (small(1), small(0, 48)):
        with pytest.raises(StateError, match='swap this one in'): Listener(other, tmp_path/'home')
    with Listener(small(), tmp_path/'home') as l:
        with pytest.raises(StateError, match='in use'): Listener(small(), tmp_path/'home')
        es = []
        for e in l.events(AudioFile(tmp_path/'x.wav')):
            es.append(e)
            if len(es) == 2: w = l.swap(lambda: small(1)); w.config.shadow = 3; w.thread.join()
    assert l.stats()['swaps'] == 1 and [e.frame for e in es] == list(range(10, 21))
    with Listener(small(1), tmp_path/'home') as l: assert l.at == 20 and l.run.inner.traces.count.item() == 20

def test_a_state_under_former_names_goes_on(tmp_path):
    "Statistics were called `usual` and `lately` in files once"
    sf.write(tmp_path/'x.wav', voice(1.), 16000)
    with Listener(small(), tmp_path/'home') as l: list(l.events(AudioFile(tmp_path/'x.wav')))
    was, file = l.run.clone(), tmp_path/'home'/STATE
    tensors, meta = load_tensors(file)
    def former(k): return k.replace('inner.stats.recent', 'inner.usual.lately').replace('inner.stats', 'inner.usual')
    meta['state']['batch'] = {former(k): v for k, v in meta['state']['batch'].items()}
    save_tensors(file, {former(k): v for k, v in tensors.items()}, meta)
    with Listener(small(), tmp_path/'home') as l:
        assert l.at == 20 and torch.equal(l.run.inner.stats.recent.square, was.inner.stats.recent.square)
        assert torch.equal(l.run.inner.core.z, was.inner.core.z)

def test_newer_model_may_have_other_heads(tmp_path):
    sf.write(tmp_path/'x.wav', voice(1.), 16000)
    def other():
        like = small()
        seed_all(1)
        return Subconscious(like.config.replace(heads=like.config.heads[:2]), resonance=like.resonance).eval()
    es = []
    with Listener(small()) as l:
        for e in l.events(AudioFile(tmp_path/'x.wav')):
            es.append(e)
            if len(es) == 2: w = l.swap(other); w.config.shadow = 3; w.thread.join()
    assert l.stats()['swaps'] == 1 and not [e.error for e in es if e.error]
    assert set(es[0].features) > set(es[-2].features) == {'is_sound', 'is_speech'}

def test_full_disk_is_told_and_survived(tmp_path, model, monkeypatch):
    sf.write(tmp_path/'x.wav', voice(2), 16000)
    with Listener(model, tmp_path/'home', boot=BootConfig(every=5)) as l:
        def full(*a, **kw): raise OSError(28, 'No space left on device')
        monkeypatch.setattr('chronomem.live.boot.save_state', full)
        assert len(list(l.events(AudioFile(tmp_path/'x.wav')))) == 41
        assert 'No space left' in l.stats()['problem'] and l.stats()['errors'] == 0

def listen(*argv, **kw):
    return subprocess.run([sys.executable, '-c', 'from chronomem.app.cli import main; main()', 'listen', *map(str, argv)], capture_output=True, text=True, timeout=300, **kw)

def test_command(tmp_path, model):
    sf.write(tmp_path/'x.wav', voice(2), 16000)
    model.save_pretrained(tmp_path/'m')
    p = listen(tmp_path/'x.wav', '--model', tmp_path/'m', '--json', '--home', tmp_path/'h')
    es = [json.loads(l) for l in p.stdout.splitlines()]
    assert p.returncode == 0 and [e['frame'] for e in es] == list(range(41)) and es[-1]['end'] and '40 frames' in p.stderr
    assert set(es[0]['features']) == {h.name for h in model.config.heads} == set(es[0]['certainty'])
    p = listen(tmp_path/'x.wav', '--model', tmp_path/'m', '--home', tmp_path/'h', '--seconds', '1')
    assert p.returncode == 0 and 'is_sound' in p.stdout and '20 frames' in p.stderr and '\r' not in p.stdout
    t = time.time()
    p = listen(tmp_path/'x.wav', '--model', tmp_path/'m', '--realtime')
    assert p.returncode == 0 and time.time()-t > 2 and 'end: exhausted' in p.stdout

@pytest.mark.parametrize('argv,say', [(['none.wav'], 'no such file'), (['bad.wav'], 'not a sound file'), (['x.wav', '--seconds', '0'], 'above 0'), (['x.wav', '--model', 'nowhere'], 'no listener')])
def test_command_mistakes(argv, say, tmp_path):
    (tmp_path/'bad.wav').write_bytes(b'RIFF' + bytes(300)); sf.write(tmp_path/'x.wav', voice(.2), 16000)
    p = listen(*argv, cwd=tmp_path)
    assert p.returncode == 2 and say in p.stderr and 'Traceback' not in p.stderr and not p.stdout

# What the lines mean, by hand

def sensed(T, gaps=(), batch=1, width=32, seen=None):
    "Frames of a drive, some of which bring no token"
    from chronomem.thought.subconscious import SubInput
    torch.manual_seed(1)
    starved = torch.tensor([[t in gaps for t in range(T)]]).expand(batch, -1)
    return SubInput(torch.randn(batch, T, width), torch.zeros(batch, T, seen), torch.ones(batch, T), .05*torch.arange(T).double().expand(batch, -1), starved)

def test_meaning_of_drift_in_a_listener():
    "What was felt last halves in every half-life without sound, the first frame counts one; sound ends it"
    m = small(); m.core.sync.half_life = 2.
    state, felt = m(m.init(1), sensed(8, (3, 4, 5, 6), seen=m.n_stats))
    s = felt.sync[0]
    torch.testing.assert_close(s[3:7], s[2]*torch.tensor([2**-.5, .5, 2**-1.5, .25])[:, None])
    assert state.core.sync.idle.item() == 0 and state.steps.item() == 8
    full = m(m.init(1), sensed(8, seen=m.n_stats)._replace(starved=None))[1].sync[0]
    torch.testing.assert_close(s[:3], full[:3])                        # with sound nothing is scaled
    assert m(m.init(1), sensed(7, (3, 4, 5, 6), seen=m.n_stats))[0].core.sync.idle.item() == 4

def test_meaning_of_the_context():
    "Weights .5, .25, .15, .1 of the latents 1, 5, 10 and 20 frames ago"
    m = small()
    past = [torch.full((1, 32), float(k)) for k in range(20, 0, -1)]    # newest last: k frames ago holds k
    assert m.context(past, None)[0, 0].item() == pytest.approx(.5*1 + .25*5 + .15*10 + .1*20)

def test_meaning_of_the_echo():
    "A latent is half the activations, half the context, of which three tenths are the echo"
    m = small().eval()
    class Ten(torch.nn.Module):
        def echo(self, *_): return torch.full((1, 32), 10.)
    m.resonance = Ten()
    past, c = [torch.ones(1, 32)]*20, m.init(1, traces=False).core
    core = c.z, c.history, (c.sync.alpha, c.sync.beta, c.sync.centre, c.sync.power)
    latent, (z, *_), _ = m._frame(past, core, torch.zeros(1, 32), 'some', 0., m.core.sync.ready(), None)
    torch.testing.assert_close(latent, (.7*1 + .3*10 + z)/2)

def speaking(e, chances, sure=1.):
    "The turns of speech that an executive hears in chances of speech, frame by frame: on, began, ended"
    s, out = e.init(1), []
    for p in chances:
        level, on, run, began, ended = e._speech(s, torch.tensor([p]), torch.tensor([sure]))
        s.level, s.on, s.run = level, on, run
        out.append('b' if began else 'e' if ended else 'o' if on else '.')
    return ''.join(out)

def executive(**kw):
    from chronomem.live.executive import Executive, ExecutiveConfig
    return Executive(ExecutiveConfig(**dict(smooth=1.) | kw), width=4)

def test_meaning_of_beginning_and_ending():
    "Three frames above .6 begin, four below .35 end; in between nothing changes; what is not certain never begins"
    e = executive(hold=3, release=4)
    assert speaking(e, [.9]*4) == '..bo' and speaking(e, [.9, .9, .5, .9, .9, .9]) == '.....b'
    assert speaking(e, [.9]*3 + [.5]*5) == '..booooo' and speaking(e, [.9]*3 + [.1]*5) == '..boooe.'
    assert speaking(e, [.9]*3 + [.1]*3 + [.4] + [.1]*4) == '..boooooooe'
    assert speaking(e, [.9]*4, sure=.4) == '....' and speaking(e, [.6]*4) == '....' and speaking(e, [.9]*4, sure=.5) == '..bo'
    s = executive(smooth=.4); assert s._speech(s.init(1), torch.tensor([1.]), torch.tensor([1.]))[0].item() == pytest.approx(.4)

def test_meaning_of_resting():
    "After speaking at 0 it may speak again at 2 seconds, not before; looking is another action; the most urgent reason that may act wins"
    e = executive(); s = e.init(1)
    def act(now, *why):
        fires, now = torch.zeros(1, 5, dtype=torch.bool), torch.tensor([now], dtype=torch.float64)
        for i in why: fires[0, i] = True
        a, r, s.last = e._choose(s, fires, torch.tensor([[False, False, True]]), now)
        return ACTIONS[a.item()], list(REASONS)[r.item()]
    assert act(0., 0, 1) == ('speak', 'speech_ended') and act(.5, 0, 1) == ('look', 'speech_started')
    assert act(1.95, 0) == ('wait', 'resting') and act(2., 0) == ('speak', 'speech_ended') and act(2.1) == ('wait', 'nothing_new')

def test_meaning_of_a_shift_and_of_strange():
    "Total variation of seven affects; deviations against the usual, of which nothing is known for the first `settle` frames"
    e = executive(settle=2); s = e.init(1)
    at = e.at['affect']
    a, b = torch.zeros(1, e.n), torch.zeros(1, e.n)
    a[0, at.start], b[0, at.start+1] = 1., 1.
    assert e._shift(a, b, 'affect').item() == 1. and e._shift(a, (a+b)/2, 'affect').item() == .5
    s.spread.fill_(4.); s.centre.fill_(1.); x = torch.full((1, 4), 7.)
    for steps, sigma in ((1, 0.), (2, 3.), (9, 3.)): s.steps.fill_(steps); assert e._strange(s, x)[0].item() == sigma
    s.steps.fill_(3); _, centre, spread = e._strange(s, x)              # the fourth frame counts a quarter
    assert centre[0, 0].item() == 1+6/4 and spread[0, 0].item() == 4 + (3/4*36 - 4)/4

def test_meaning_of_averages():
    "A twentieth of a second against half a second and eight; voices count only while somebody speaks"
    e = executive(); s = e.init(1); p = torch.ones(1, e.n); s.steps.fill_(5)
    for on in (False, True):
        s.on.fill_(on); fast, slow = e._averages(s, p)
        assert fast[0, e.at['is_sound']].item() == pytest.approx(.1) and slow[0, e.at['is_sound']].item() == pytest.approx(.05/8)
        assert fast[0, e.at['affect']].max().item() == pytest.approx(.1*on)
    s.steps.fill_(0); assert (e._averages(s, p)[0] == 1).all(), 'the first frame is both'

def test_meaning_of_anomalies_that_wait():
    "An anomaly waits three frames for speech to explain it; then it is told, unless somebody speaks"
    def told(talk):
        e = executive(patience=3); s, out, quiet = e.init(1), [], torch.zeros(1, dtype=torch.bool)
        for t in range(6):
            on = torch.tensor([t == talk])
            fires, s.pending = e._fires(s, on, on.long(), (quiet, quiet), torch.zeros(1, 7), torch.tensor([t == 1]))
            out.append('.x'[int(fires[0, 3])])
        return ''.join(out)
    assert told(None) == '....x.' and told(3) == told(4) == '......'

def test_meaning_of_waking_up():
    "Speech may be certain after .2 s, awake after 1 s: frames of .05 s"
    b = BootManager(small())
    for awake, speech, affect, warm in ((0, 0., 0., 0.), (1, .25, 1/16, .05), (4, 1., .25, .2), (40, 1., 1., 1.)):
        run = b.cold(); run.awake.fill_(awake)
        got = b.scaling(run.awake)
        assert (got['is_speech'].item(), got['affect'].item(), b.warmth(run).item()) == pytest.approx((speech, affect, warm))

def test_meaning_of_touched_pages():
    "Ten slots in pages of four: 0 to 3, 4 to 7, 8 and 9"
    from types import SimpleNamespace
    from chronomem.live.boot import _touched
    traces = SimpleNamespace(time=torch.zeros(1, 10))
    pages = lambda before, count: ''.join('.x'[int(v)] for v in _touched(traces, torch.tensor([before]), torch.tensor([count]), 4))
    assert [pages(*p) for p in ((0, 0), (0, 1), (0, 4), (0, 5), (3, 5), (8, 10), (9, 11), (12, 14), (0, 10), (7, 99))] == ['...', 'x..', 'x..', 'xx.', 'xx.', '..x', 'x.x', 'x..', 'xxx', 'xxx']
