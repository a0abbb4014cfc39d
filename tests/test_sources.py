"What notebooks 13_sources and 14_devices can't show: damaged bytes of any kind, threads that hang, and memory over a long time."
import gc, io, os, threading, time, tracemalloc
from types import SimpleNamespace
import numpy as np, pytest, soundfile as sf, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from chronomem.core import ManualClock, WallClock
from chronomem.senses.audio import clean_audio, frames_of
from chronomem.senses.scenes import find_clips
from chronomem.senses.devices import ImageFolder, Microphone, TextSource, VideoFile, watch
from chronomem.senses.sources import AudioFile, RawRing, Source, Watchdog, ended, merge, paced

quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

def encoded(form, subtype, rate=16000, channels=1, seconds=.4):
    x = .5*np.sin(2*np.pi*440*np.arange(int(rate*seconds))/rate)
    b = io.BytesIO()
    sf.write(b, np.tile(x[:, None], channels), rate, format=form, subtype=subtype)
    return b.getvalue()

WHOLE = {'a.wav': encoded('WAV', 'PCM_16'), 'u8.wav': encoded('WAV', 'PCM_U8', 8000), 'f.wav': encoded('WAV', 'FLOAT', 44100, 2), 'a.flac': encoded('FLAC', 'PCM_16'), 'hi.flac': encoded('FLAC', 'PCM_24', 96000, 2)}

def defined(path):
    "A clear error that names the file, or sound frames in range, and the same ones again"
    try: f = AudioFile(path, ManualClock(3.))
    except ValueError as e:
        assert path.name in str(e)
        return None
    frames = list(ended(f))
    assert frames[-1].end and sum(r.end for r in frames) == 1
    for i, r in enumerate(frames[:-1]):
        assert r.data.shape == (800,) and r.data.dtype == torch.float32 and r.data.isfinite().all() and r.data.abs().max() <= 1
        assert abs(r.t-3-.05*i) < 1e-6
    again = list(AudioFile(path, ManualClock(3.)))
    assert len(again) == len(frames)-1 and all(torch.equal(a.data, b.data) and a.t == b.t for a, b in zip(again, frames))
    return frames

@pytest.mark.parametrize('name', WHOLE)
def test_whole_files(name, tmp_path):
    (tmp_path/name).write_bytes(WHOLE[name])
    assert len(defined(tmp_path/name)) == 9
    got = torch.stack([r.data for r in AudioFile(tmp_path/name)])
    assert torch.allclose(got, frames_of(clean_audio(*sf.read(tmp_path/name, dtype='float32'))[0]), atol=1e-5)

@quick
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1))
def test_truncated(tmp_path, name, share):
    raw = WHOLE[name]
    (tmp_path/name).write_bytes(raw[:int(share*len(raw))])
    out = defined(tmp_path/name)
    if out is not None and share < .9: assert 'cut off' in out[-1].reason

@quick
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 7)), min_size=1, max_size=12), st.booleans())
def test_flipped_bits(tmp_path, name, flips, header):
    raw = bytearray(WHOLE[name])
    for at, bit in flips: raw[at % (60 if header else len(raw))] ^= 1 << bit
    (tmp_path/name).write_bytes(raw)
    defined(tmp_path/name)

@quick
@given(st.binary(max_size=300), st.sampled_from(['x.wav', 'x.flac', 'x.raw', 'x', 'x.mp3']), st.sampled_from([b'', b'RIFF\x24\0\0\0WAVEfmt ', b'fLaC\0\0\0\x22']))
def test_any_bytes(tmp_path, raw, name, head):
    (tmp_path/name).write_bytes(head+raw)
    defined(tmp_path/name)

@quick
@given(st.sampled_from([8000, 11025, 16000, 22050, 44100, 47999, 96000, 192000]), st.integers(1, 3), st.integers(1, 5000), st.booleans())
def test_any_rate_and_length(tmp_path, rate, channels, n, wild):
    x = np.random.default_rng(n).normal(0, 30 if wild else .1, (n, channels)).astype('f4')
    if wild: x[n//2] = np.nan; x[-1] = np.inf
    sf.write(tmp_path/'x.wav', x, rate, subtype='FLOAT')
    f = AudioFile(tmp_path/'x.wav')
    got = torch.stack([r.data for r in f])
    want, report = clean_audio(x, rate)
    assert torch.allclose(got, frames_of(want), atol=2e-5)
    assert f.report['nan'] == report.nan and abs(f.report['read']-n/rate) < 1e-9 and f.report['peak'] == pytest.approx(report.peak) and f.report['silent'] == report.silent

def with_length(raw, size):
    raw = bytearray(raw); at = raw.find(b'data') + 4
    raw[at:at+4] = size.to_bytes(4, 'little')
    return bytes(raw)

@pytest.mark.parametrize('subtype', ['PCM_U8', 'PCM_16', 'PCM_24', 'PCM_32', 'FLOAT'])
@pytest.mark.parametrize('size', [0, 2**31-4096, 2**31-1, 2**31, 2**32-37, 2**32-1])
@pytest.mark.filterwarnings('error::ResourceWarning', 'error::pytest.PytestUnraisableExceptionWarning')
def test_streamed_wav(tmp_path, subtype, size):
    whole, p = encoded('WAV', subtype, channels=2), tmp_path/'x.wav'
    p.write_bytes(whole)
    want = defined(p)
    assert want[-1].reason == 'exhausted'
    p.write_bytes(with_length(whole, size))
    got = defined(p)
    assert len(got) == len(want) and all(torch.equal(a.data, b.data) for a, b in zip(got[:-1], want[:-1]))
    assert 'names no length' in got[-1].reason and 'cut off' not in got[-1].reason
    gc.collect()

@pytest.mark.parametrize('after', [b'', b'LIST\4\0\0\0INFO', b'PAD \0\0\0\0', b'id3 \3\0\0\0abc\0'])
def test_a_wav_of_nothing_is_still_refused(tmp_path, after):
    raw = with_length(encoded('WAV', 'PCM_16', seconds=0), 0)
    (tmp_path/'x.wav').write_bytes(raw + after)
    with pytest.raises(ValueError, match='some samples'): AudioFile(tmp_path/'x.wav')

@pytest.mark.parametrize('form, subtype', [('MP3', 'MPEG_LAYER_III'), ('AIFF', 'PCM_16'), ('AU', 'PCM_16'), ('W64', 'PCM_16'), ('RF64', 'PCM_16'), ('OGG', 'OPUS'), ('OGG', 'VORBIS'), ('CAF', 'PCM_16'), ('FLAC', 'PCM_16')])
@pytest.mark.parametrize('share', [.3, .5, .8])
def test_a_cut_is_named(tmp_path, form, subtype, share):
    raw, p = encoded(form, subtype, seconds=3), tmp_path/'x'
    p.write_bytes(raw)
    assert defined(p)[-1].reason == 'exhausted'
    p.write_bytes(raw[:int(share*len(raw))])
    try: f = AudioFile(p)
    except ValueError as e: assert str(p) in str(e)              # some can't be opened without their end
    else: assert 'cut off' in list(ended(f))[-1].reason and f.report['read'] < 3

def test_flac_of_unknown_length(tmp_path):
    raw = bytearray(WHOLE['a.flac']); raw[21] &= 0xf0; raw[22:26] = bytes(4)
    p = tmp_path/'x.flac'
    for part, why in ((raw, 'names no length'), (raw[:len(raw)*6//10], 'cut off')):
        p.write_bytes(part)
        assert why in defined(p)[-1].reason and AudioFile(p).seconds == float('inf')

@quick
@given(st.integers(1, 30_000), st.sampled_from([8000, 16000, 44100]), st.floats(-1, 1), st.integers(2, 6), st.integers(0, 5))
def test_opposed_channels_are_heard(tmp_path, n, rate, r, channels, k):
    "Whatever is loud in a channel is loud in the sum, and files and arrays agree about it"
    g = np.random.default_rng(n)
    a, b = .1*g.normal(size=(2, n))
    x = np.zeros((n, channels)); x[:, k % channels] = a; x[:, (k+1) % channels] = r*a + (1-r*r)**.5*b
    sf.write(tmp_path/'x.wav', x, rate, subtype='FLOAT')
    f = AudioFile(tmp_path/'x.wav')
    got, (want, report) = torch.stack([y.data for y in f]), clean_audio(x.astype('f4'), rate)
    assert torch.allclose(got, frames_of(want), atol=2e-5) and f.report['opposed'] == pytest.approx(report.opposed)
    power, loudest = want.square().mean().item()*channels**2, np.square(x).mean(0).max()
    assert power > .08*loudest or n < 50
    if n > 5000 and abs(r + .9) > .05 and channels == 2: assert bool(report.opposed) == (r < -.9) == ('cancel' in f.report['problem'])

def test_vanishing_file(tmp_path):
    p = tmp_path/'a.wav'
    p.write_bytes(WHOLE['a.wav'])
    f = AudioFile(p)
    p.unlink()
    only, = ended(f)
    assert only.end and 'a.wav' in only.reason
    for bad in ('no.wav', '.'):
        with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)): AudioFile(tmp_path/bad)
    with pytest.raises(ValueError, match='words.mp4'): (tmp_path/'words.mp4').write_text('x'); VideoFile(tmp_path/'words.mp4')

def test_file_needs_no_memory(tmp_path):
    for seconds in (20, 200): sf.write(tmp_path/f'{seconds}.wav', np.zeros((seconds*48000, 2), 'i2'), 48000)
    def peak(seconds):
        tracemalloc.start()
        for r in AudioFile(tmp_path/f'{seconds}.wav'): pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top
    peak(20)
    assert peak(200) < 1.3*peak(20) < 8e6

class Fake(Source):
    kind, period, replay = 'audio', .05, False
    def __init__(self, script, clock): super().__init__('fake', clock); self.script = script
    def frames(self, t0):
        for x in self.script:
            if callable(x): x()
            else: yield self.raw(x, torch.zeros(800))

def until(dog, n):
    for _ in range(500):
        with dog.lock:
            if len(dog.inbox) >= n: return
        time.sleep(.005)
    raise AssertionError(f'{len(dog.inbox)} of {n} frames came')

def test_stalling_device():
    clock, hang = ManualClock(), threading.Event()
    dog = Watchdog(Fake([0., .05, hang.wait, .60, .65], clock), clock, patience=.2, give_up=5.).start()
    until(dog, 2)
    clock.advance(.1)
    assert [r.missing for r in dog.poll()] == [False, False]
    clock.advance(.15)
    assert dog.poll() == []                                  # patience
    clock.advance(.06)
    gap, = dog.poll()
    assert gap.missing and gap.data is None and gap.reason == 'stalled' and gap.t == pytest.approx(.1) and gap.duration == pytest.approx(.2)
    start = time.perf_counter()
    for _ in range(100): dog.poll()
    assert time.perf_counter()-start < .5                    # the device still hangs
    hang.set(); until(dog, 3)
    clock.advance(.4)
    back = dog.poll()
    assert [r.missing for r in back] == [True, False, False, False]
    assert back[0].t == pytest.approx(.3) and back[0].duration == pytest.approx(.3)
    assert back[-1].end and back[-1].reason == 'exhausted'

def test_vanishing_device():
    def gone(): raise OSError('unplugged')
    clock = ManualClock()
    out = list(Watchdog(Fake([0., .05, gone], clock), WallClock(), patience=1., give_up=5.))
    assert [r.end for r in out] == [False, False, True] and out[-1].reason == 'OSError: unplugged'
    forever = threading.Event()
    c = ManualClock(); dog = Watchdog(Fake([forever.wait], c), c, give_up=1.)
    out = [r for _ in range(60) for r in (c.advance(.05), dog.poll())[1]]
    assert out[-1].end and 'no data' in out[-1].reason and all(r.missing for r in out[:-1]) and dog.poll() == []
    assert dog.thread.daemon
    forever.set()

@pytest.mark.parametrize('junk', [3, None, 'x'])
def test_source_of_nonsense(junk):
    class Bad(Source):
        replay = False
        def frames(self, t0): yield junk
    end, = Watchdog(Bad('bad', WallClock()))
    assert end.end and 'expected Raw' in end.reason

def test_missing_extra(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'sounddevice', None)
    with pytest.raises(ImportError, match=r'chronomem\[audio\]'): Microphone()

def test_no_device():
    def none(*a, **kw): raise RuntimeError('Error querying device -1')
    card = SimpleNamespace(InputStream=none, check_input_settings=none, query_devices=none)
    end, = Microphone(backend=card)
    assert end.end and 'Error querying device' in end.reason

def test_overflow_is_bounded():
    clock = ManualClock()
    dog = Watchdog(Fake([.05*i for i in range(5000)], clock), clock, depth=16).start()
    dog.thread.join(10)
    assert len(dog.inbox) == 16
    clock.advance(250.)
    out = dog.poll()
    assert dog.report['lost'] == 4985 and out[0].missing and out[0].reason == 'overflow' and out[-1].end
    assert sum(r.duration for r in out) == pytest.approx(250.)

@quick
@given(st.lists(st.lists(st.integers(0, 200), max_size=15), min_size=1, max_size=4))
def test_merge_orders(times):
    sources = [TextSource([(t/10, f'{i} {t}') for t in sorted(ts)], name=f's{i}') for i, ts in enumerate(times)]
    out, clock = list(merge(*sources)), ManualClock()
    assert [r.t for r in out] == sorted(r.t for r in out) and sum(r.end for r in out) == len(times)
    assert sorted(r.data for r in out if not r.end) == sorted(f'{i} {t}' for i, ts in enumerate(times) for t in ts)
    seen = [(r.t, r.data, clock.now()) for r in paced(merge(*sources), clock)]
    assert all(t <= now for t, _, now in seen) and [d for _, d, _ in seen] == [r.data for r in out]

@quick
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=12), st.integers(0, 400), st.integers(0, 400))
def test_ring_equals_a_list(pushes, a, b):
    ring, every, at = RawRing(2., shape=(3,)), [], 0
    for n, pause in pushes:
        at += pause
        ring.push(.05*at, torch.arange(at, at+n)[:, None].expand(n, 3).float())
        every += range(at, at+n); at += n
    newest = every[-1]
    want = [i for i in every[-40:] if i > newest-40 and i*.05+.05 > .05*a+1e-9 and i*.05 < .05*b-1e-9]
    t, x = ring.get(.05*a, .05*b)
    assert x[:, 0].tolist() == want and torch.allclose(t, .05*torch.tensor(want, dtype=torch.float64))

def test_ring_memory_is_constant():
    ring = RawRing(10., shape=(60, 80, 3), period=.1, dtype=torch.uint8)
    x, at = torch.zeros(7, 60, 80, 3, dtype=torch.uint8), (ring.t.data_ptr(), ring.data.data_ptr(), ring.data.untyped_storage().nbytes())
    ring.push(0., x)
    tracemalloc.start()
    for i in range(3000): ring.push(.7*i, x)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 50_000 and at == (ring.t.data_ptr(), ring.data.data_ptr(), ring.data.untyped_storage().nbytes()) and len(ring) == 100
    for bad in (torch.zeros(7, 60, 80, 3), torch.zeros(60, 81, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match='frames: expected'): ring.push(0., bad)
    with pytest.raises(ValueError, match='finite'): ring.push(float('nan'), x)

def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'a.wav').write_bytes(WHOLE['a.wav'])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    list(merge(AudioFile('a.wav'), TextSource(['x'])))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before

def test_watch_ends_when_left():
    dogs = []
    class Slow(Source):
        replay = False
        def frames(self, t0):
            while True: time.sleep(.005); yield self.raw(self.clock.now(), 1)
    dog = Watchdog(Slow('slow', WallClock()))
    for i, r in enumerate(watch(dog)):
        if i > 3: break
    del r
    dog.thread.join(2)
    assert not dog.thread.is_alive()

@pytest.mark.data
@pytest.mark.parametrize('collection', ['fsdd', 'librispeech', 'voices', 'emodb', 'oxygen', 'freedesktop', 'noise'])
def test_real_recordings_are_sound(collection):
    "No fault is seen where there is none, and files and arrays give the same frames"
    clips = find_clips(sources=(collection,))
    if not clips: pytest.skip(f'no recordings of {collection}')
    for c in clips[::max(1, len(clips)//12)]:
        if (info := sf.info(c.path)).duration > 60 or info.samplerate < 8000: continue
        f = AudioFile(c.path)
        got = torch.stack([r.data for r in f])
        assert f.report['problem'] == '' and f.report['opposed'] == 0 and not f.report['silent'], c.path
        assert f.report['read'] == pytest.approx(info.duration)
        assert torch.allclose(got, frames_of(clean_audio(*sf.read(c.path, dtype='float32', always_2d=True))[0]), atol=2e-5)

@pytest.mark.data
def test_a_real_voice_opposed_is_the_same_voice(tmp_path):
    clips = find_clips(sources=('librispeech',))
    if not clips: pytest.skip('no recordings of LibriSpeech')
    x, rate = sf.read(clips[0].path, dtype='float32')
    sf.write(tmp_path/'x.wav', np.stack([x, -x], 1), rate, subtype='FLOAT')
    f = AudioFile(tmp_path/'x.wav')
    plain = torch.stack([r.data for r in AudioFile(clips[0].path)])
    assert torch.allclose(torch.stack([r.data for r in f]), plain, atol=1e-5) and 'cancel' in f.report['problem']
