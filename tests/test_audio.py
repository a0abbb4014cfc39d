"What notebook 11_audio can't show: any array at all, in any form, is mended or refused by name; what comes out is finite"
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from chronomem.core import load_state, save_state, seed_all
from chronomem.senses.audio import AudioConfig, AudioState, AudioFeatures, Reflex, annotate, batch, clean_audio, frames_of, tokens
from chronomem.senses.voice import SileroVAD
from chronomem.senses.m4 import SourceVocab, collate, default_schemas

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SOUND = 'float16', 'float32', 'float64', '>f4', 'int8', 'uint8', 'int16', '>i2', 'int32'
OTHER = 'bool', 'int64', 'uint16', 'uint32', 'complex64', 'datetime64[s]'
RATES = 8000, 8001, 11025, 16000, 22050, 44100, 48000, 96000, 192000
EAR = Reflex()

def arrays(dtypes, shapes):
    one = lambda d: hnp.arrays(d, shapes, elements=dict(allow_nan=True, allow_infinity=True) if np.dtype(d).kind == 'f' else None)
    return st.sampled_from(dtypes).flatmap(one)

def shapes(low=0): return st.tuples(st.integers(low, 3000)) | st.tuples(st.integers(low, 500), st.integers(low, 5)) | st.tuples(st.integers(low, 8), st.integers(low, 500))
def finite(x): return all(v.isfinite().all() for v in x.to_tensordict().values())

def heard(x, B=1):
    with torch.no_grad(): return EAR(EAR.init(B), x)

def sane(h):
    for p in (h.sound, h.speech, h.features[..., 7]): assert (p >= 0).all() and (p <= 1).all()
    return finite(h) and bool((h.gain > 0).all() and (h.anomaly >= 0).all() and (h.features >= 0).all())

@quick
@given(arrays(SOUND, shapes(1)), st.sampled_from(RATES) | st.integers(8000, 192000))
def test_any_sound_is_mended(x, rate):
    y, r = clean_audio(x, rate)
    assert y.dtype == torch.float32 and y.ndim == 1 and y.isfinite().all() and y.abs().max() <= 1 and len(y)
    assert 0 <= r.clipped <= 1 and 0 <= r.peak < float('inf') and r.nan <= x.size and r.rate == rate
    assert abs(len(y) - r.seconds*16000) <= 2
    state, h = heard(frames_of(y)[None])
    assert sane(h) and finite(state)

@quick
@given(arrays(SOUND + OTHER, shapes() | st.just(()) | st.just((2, 3, 4))), st.sampled_from(RATES) | st.integers(-5, 10**6) | st.floats() | st.none() | st.booleans() | st.text(max_size=3))
def test_anything_else_is_refused_by_name(x, rate):
    try: y, _ = clean_audio(x, rate)
    except (ValueError, TypeError) as e: assert str(e).startswith(('x: ', 'rate: '))
    else: assert y.isfinite().all() and len(y) and x.dtype.name not in OTHER

@pytest.mark.parametrize('x', [None, 3., 'a.wav', [0., 1.], b'xx', object()])
def test_what_is_no_array_is_refused(x):
    with pytest.raises(TypeError, match='^x: '): clean_audio(x, 16000)
    with pytest.raises(TypeError, match='^samples: '): frames_of(x)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.uint8])
def test_tensors_are_arrays_too(dtype): assert clean_audio(torch.ones(100).to(dtype), 16000)[0].isfinite().all()

def test_channels_may_come_first_or_last():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 4000))
    a, b = clean_audio(x, 16000), clean_audio(x.T, 16000)
    assert torch.equal(a[0], b[0]) and a[1] == b[1] and a[1].channels == 2
    torch.testing.assert_close(a[0], torch.tensor(x.mean(0), dtype=torch.float32))

@quick
@given(hnp.arrays('float32', st.tuples(st.integers(1, 3), st.integers(1, 4), st.just(800)), elements=dict(allow_nan=True, allow_infinity=True)), st.sampled_from((torch.float16, torch.float32, torch.float64)))
def test_any_frames_are_heard(x, dtype):
    state, h = heard(torch.tensor(x).to(dtype), len(x))
    assert h.batch_size == x.shape[:2] and h.gain.dtype == torch.float32 and sane(h) and finite(state)
    assert annotate(h, 3.).isfinite().all()
    assert batch(h).batch_size == (x.shape[0]*x.shape[1],)

@quick
@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from((torch.float32, torch.int16, torch.bool, torch.complex64)), st.integers(0, 3))
def test_other_frames_are_refused_by_name(shape, dtype, B):
    with pytest.raises((ValueError, TypeError), match='^(frames|state): '): EAR(EAR.init(B), torch.zeros(shape, dtype=dtype))

def test_a_state_that_does_not_fit_is_refused():
    x = torch.zeros(2, 1, 800)
    for s in (None, 0, EAR.init(3), EAR.init(2).to_tensordict()):
        with pytest.raises((ValueError, TypeError), match='^state: '): EAR(s, x)

@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 9), st.sampled_from((1., .1, 1e-3, 0.)))
def test_cuts_make_no_difference(cuts, seed, size):
    seed_all(seed)
    x = torch.randn(2, sum(cuts), 800)*size*torch.rand(2, sum(cuts), 1)
    (end, whole), s, parts = heard(x, 2), EAR.init(2), []
    for part in x.split(cuts, 1):
        with torch.no_grad(): s, h = EAR(s, part)
        parts.append(h)
    for a, b in ((torch.cat(parts, 1), whole), (s, end)):
        for k, v in a.to_tensordict().items(): torch.testing.assert_close(v, b.get(k), rtol=1e-4, atol=1e-4, msg=lambda m: f'{k}: {m}')

def test_rows_are_apart_and_the_future_is_unseen():
    seed_all(0)
    x = torch.randn(3, 30, 800)*.1
    _, h = heard(x, 3)
    other = x.clone(); other[0] = torch.nan; other[1:, 20:] = 1.
    _, g = heard(other, 3)
    for k, v in h.to_tensordict().items(): torch.testing.assert_close(g.get(k)[1:, :20], v[1:, :20], rtol=1e-5, atol=1e-5)

def test_long_recordings_go_in_blocks():
    seed_all(0)
    x = torch.randn(1, 2500, 800)*.1
    _, h = heard(x)
    s, a = heard(x[:, :1777]); b = EAR(s, x[:, 1777:])[1]
    for k, v in h.to_tensordict().items(): torch.testing.assert_close(torch.cat([a, b], 1).get(k), v, rtol=1e-4, atol=1e-4)

def test_a_saved_reflex_goes_on(tmp_path):
    seed_all(0)
    x = torch.randn(2, 40, 800)*.1
    s, _ = heard(x[:, :25], 2)
    save_state(tmp_path/'ear', s, finite=True)
    back = load_state(tmp_path/'ear', AudioState)[0]
    for k, v in EAR(s, x[:, 25:])[1].to_tensordict().items(): assert torch.equal(v, EAR(back, x[:, 25:])[1].get(k))

@pytest.mark.parametrize('kw', [dict(frame_ms=30), dict(frame_ms=100), dict(rate=8000), dict(rate=48000), dict(rate=44100, frame_ms=40, window_ms=20), dict(mels=1), dict(mels=80), dict(window_ms=11), dict(window_ms=50), dict(hop_ms=5), dict(memory_s=2.), dict(low=20., high=8000.)])
def test_any_config_hears_and_makes_tokens(kw):
    seed_all(0)
    c = AudioConfig(**kw); ear = Reflex(c)
    x = torch.randn(2*c.rate)*.1; x[c.rate:c.rate + 100] = 0
    f = frames_of(clean_audio(x, c.rate, c)[0], c)[None]
    s, h = ear(ear.init(1), f)
    assert finite(h) and finite(s) and h.embedding.shape == (1, f.shape[1], c.width)
    sources, ss = SourceVocab(('mic',)), default_schemas(c.width)
    a, b = batch(h, 1, 7., 2., ss, c), collate(tokens(h, 'mic', 7., 2., c), ss, sources)
    for k, v in b.to_tensordict().items(): assert torch.equal(a.get(k), v), k

@pytest.mark.parametrize('kw', [dict(rate=1000), dict(frame_ms=55), dict(frame_ms=20), dict(window_ms=10), dict(high=9000.), dict(low=5000.), dict(mels=0), dict(target=0.), dict(max_gain=.5), dict(memory_s=1.), dict(alarm=0.), dict(floor=3.)])
def test_senseless_configs_are_refused(kw):
    with pytest.raises(ValueError, match='^AudioConfig.'): AudioConfig(**kw)

def test_silence_is_nothing():
    _, h = heard(torch.zeros(1, 60, 800))
    assert not h.features.any() and (h.sound < .5).all() and (h.speech < .5).all() and not h.anomaly.any()

def test_latency_may_differ_per_frame():
    _, h = heard(torch.zeros(2, 3, 800), 2)
    assert annotate(h, torch.arange(6.).view(2, 3))[..., 0, 2].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert batch(h, torch.tensor([3, 4]), torch.tensor([10., 20.])).time.tolist() == pytest.approx([10, 10.05, 10.1, 20, 20.05, 20.1])

def test_silero_hears_any_frames_in_any_cut():
    pytest.importorskip('silero_vad')
    seed_all(0)
    vad, x = SileroVAD(), torch.randn(2, 9, 800)
    x[0, 3, 5] = torch.nan; x[1, 2] = torch.inf
    end, p = vad(vad.init(2), x)
    assert p.shape == (2, 9) and p.isfinite().all() and finite(end)
    s, parts = vad.init(2), []
    for f in x.split([1, 1, 4, 3], 1): s, q = vad(s, f); parts.append(q)
    torch.testing.assert_close(torch.cat(parts, 1), p)
    with pytest.raises(ValueError, match='^state: expected streams in step'): vad(torch.cat([s[:1], vad.init(1)]), x)
    with pytest.raises(ValueError, match='^AudioConfig.rate'): SileroVAD(AudioConfig(rate=8000, high=3800.))
