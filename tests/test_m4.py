"What notebook 10_m4 can't show: properties over any token, and damaged files."
import json, math, os
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from chronomem import core
from chronomem.core import seed_all
from chronomem.senses.m4 import M4InputEncoder, M4Token, Schema, SourceVocab, age_features, collate, default_schemas, read_jsonl, write_jsonl

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SCHEMAS = {k: s.replace(width=min(s.width, 3)) for k, s in default_schemas().items()}
VOCAB = SourceVocab(('mic', 'cam'), 3)
number, size, text = st.floats(-1e30, 1e30), st.floats(0, 1e30), st.text(min_size=1, max_size=6).filter(str.strip)
bits32 = st.lists(st.integers(-2**31, 2**31 - 1), max_size=6).map(lambda v: torch.tensor(v, dtype=torch.int32).view(torch.float32)).filter(lambda e: bool(e.isfinite().all()))

def some(d): return st.fixed_dictionaries({}, optional=d)

annotation = some({'value': st.booleans() | number, 'confidence': st.floats(0, 1), 'latency_ms': size, 'class': text, 'location': text | st.lists(number, max_size=4)})
any_token = st.builds(M4Token, modality=text, source=text, timestamp=number, duration_ms=size, embedding=st.none() | bits32, features=st.dictionaries(text, number, max_size=3),
    annotations=st.dictionaries(text, annotation, max_size=3), raw_tokens=st.none() | st.lists(st.integers(), max_size=4), raw_data_ref=st.none() | text)

@st.composite
def legal_token(draw):
    s = SCHEMAS[draw(st.sampled_from(list(SCHEMAS)))]
    part = lambda c: some({'value': st.booleans() | number, 'confidence': st.floats(0, 1), 'latency_ms': size, **({'class': st.sampled_from(c)} if c else {})})
    e = draw(st.none() | st.lists(st.floats(-9, 9, width=32), min_size=s.width, max_size=s.width)) if s.width else None
    return M4Token(s.modality, draw(st.sampled_from(['mic', 'cam', 'x', 'y'])), draw(st.floats(0, 2e9)), draw(size), None if e is None else torch.tensor(e),
        draw(some({k: number for k in s.features})), draw(some({k: part(c) for k, c in s.annotations.items()})))

@pytest.fixture(autouse=True, scope='module')
def no_waiting_for_the_disk():
    real, core.os.fsync = os.fsync, lambda fd: None
    yield
    core.os.fsync = real

@pytest.fixture(scope='module')
def enc():
    seed_all(0)
    return M4InputEncoder(16, SCHEMAS, VOCAB).eval()

def same(a, b):
    e = (a.embedding is None) == (b.embedding is None) and (a.embedding is None or torch.equal(a.embedding.view(torch.int32), b.embedding.view(torch.int32)))
    return e and all(repr(getattr(a, k)) == repr(getattr(b, k)) for k in a.__dataclass_fields__ if k != 'embedding')

@quick
@given(st.lists(any_token, max_size=4))
def test_jsonl_round_trip(tmp_path, tokens):
    write_jsonl(tmp_path/'t', tokens); back = read_jsonl(tmp_path/'t')
    assert len(back) == len(tokens) and all(same(a, b) and a == b for a, b in zip(tokens, back))
    assert (tmp_path/'t').read_bytes().count(b'\n') == len(tokens)

@quick
@given(st.lists(any_token, min_size=1, max_size=3), st.data())
def test_damaged_files_name_the_line(tmp_path, tokens, data):
    write_jsonl(tmp_path/'t', tokens); raw = bytearray((tmp_path/'t').read_bytes())
    i = data.draw(st.integers(0, len(raw) - 1)); raw[i] = data.draw(st.integers(0, 255))
    (tmp_path/'t').write_bytes(raw[:data.draw(st.integers(i, len(raw)))])
    found, errors = read_jsonl(tmp_path/'t', strict=False)
    assert all(isinstance(t, M4Token) for t in found) and all(1 <= n <= len(tokens) + 1 for n, _ in errors)
    if errors:
        with pytest.raises(ValueError, match=f'line {errors[0][0]}: '): read_jsonl(tmp_path/'t')
    else: assert read_jsonl(tmp_path/'t') == found

json_value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=4), s, max_size=3), max_leaves=5)

@settings(quick, max_examples=100)
@given(st.dictionaries(st.sampled_from([*M4Token.__dataclass_fields__, 'x']), json_value, max_size=9) | json_value, st.booleans())
def test_any_json_is_a_token_or_an_error(tmp_path, value, full):
    if full and isinstance(value, dict): value = {'modality': 'audio', 'source': 'mic', 'timestamp': 1, **value}
    (tmp_path/'t').write_text(json.dumps(value) + '\n')
    tokens, errors = read_jsonl(tmp_path/'t', strict=False)
    assert len(tokens) + len(errors) == 1
    for t in tokens: assert M4Token.from_json(t.to_json()) == t

def test_half_precision_and_dict_order():
    a = M4Token('a', 's', 0, embedding=torch.tensor([0.1]).half(), features=dict(x=1, y=2))
    b = M4Token('a', 's', 0, embedding=torch.tensor([0.1]).half(), features=dict(y=2, x=1))
    assert a == b and a != M4Token('a', 's', 0) and M4Token.from_json(a.to_json()).embedding.half() == a.embedding.half()

@pytest.mark.parametrize('kw, err', [(dict(modality=''), ValueError), (dict(source=None), TypeError), (dict(timestamp=math.nan), ValueError), (dict(timestamp=True), TypeError), (dict(duration_ms=-1e-9), ValueError),
    (dict(embedding=[1.]), TypeError), (dict(embedding=torch.ones(1, 2)), ValueError), (dict(embedding=torch.ones(2).long()), TypeError), (dict(embedding=torch.tensor([math.inf])), ValueError),
    (dict(features=dict(x=None)), TypeError), (dict(features=dict(x=1e39)), ValueError), (dict(features=dict(x=10**400)), ValueError), (dict(features=[1]), TypeError), (dict(annotations=dict(x=3)), TypeError), (dict(annotations=dict(x={'class': 3})), TypeError),
    (dict(annotations=dict(x={'location': 3})), TypeError), (dict(raw_tokens=3), TypeError), (dict(raw_tokens=[True]), TypeError), (dict(raw_data_ref=3), TypeError)])
def test_bad_parts(kw, err):
    with pytest.raises(err, match=next(iter(kw))): M4Token(**{'modality': 'audio', 'source': 'mic', 'timestamp': 0, **kw})

@settings(quick, max_examples=25)
@given(st.lists(legal_token(), min_size=1, max_size=6), st.floats(0, 3e9), st.randoms(use_true_random=False))
def test_batched_shuffled_and_alone_agree(enc, tokens, now, rnd):
    with torch.no_grad():
        y = enc(enc.collate(tokens), now); order = list(range(len(tokens))); rnd.shuffle(order)
        assert y.shape == (len(tokens), 16) and y.isfinite().all()
        torch.testing.assert_close(enc(enc.collate([tokens[i] for i in order]), now), y[order], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat([enc(enc.collate([t]), now) for t in tokens]), y, atol=1e-4, rtol=1e-4)

@settings(quick, max_examples=25)
@given(st.lists(legal_token(), min_size=1, max_size=5))
def test_batch_says_what_was_there(tokens):
    b = collate(tokens, SCHEMAS, VOCAB)
    assert b.has_embedding.tolist() == [t.embedding is not None for t in tokens] and b.time.tolist() == [t.timestamp for t in tokens]
    for i, t in enumerate(tokens):
        s = SCHEMAS[t.modality]; f = dict(zip(s.features, zip(b.features[i].tolist(), b.feature_mask[i].tolist())))
        assert {k for k, (_, m) in f.items() if m} == set(t.features) and int(b.feature_mask[i].sum()) == len(t.features)
        assert all(v == torch.tensor(t.features.get(k, 0.), dtype=torch.float32) for k, (v, _) in f.items())
        assert {k for k, m in zip(s.annotations, b.annotated[i].tolist()) if m} == set(t.annotations)
        assert int(b.annotation_mask[i].sum()) == sum(p in a for a in t.annotations.values() for p in ('value', 'confidence', 'latency_ms'))
        assert int((b.classes[i] >= 0).sum()) == sum('class' in a for a in t.annotations.values())

@pytest.mark.parametrize('name', SCHEMAS)
def test_each_gap_differs_from_each_zero(enc, name):
    s, bare = SCHEMAS[name], dict(modality=name, source='mic', timestamp=0.)
    kinds = [{}] + [dict(features={k: 0.}) for k in s.features] + [dict(annotations={k: a}) for k, cs in s.annotations.items() for a in
        ({}, {'value': 0.}, {'confidence': 0.}, {'latency_ms': 0.}, *({'class': c} for c in cs))]
    with torch.no_grad(): y = enc(enc.collate([M4Token(**bare, **k) for k in kinds]), 1.)
    assert (torch.cdist(y, y) + torch.eye(len(y)) > 1e-3).all()

def test_ages_far_apart_stay_apart():
    ages = torch.tensor([0., .05, .1, 1, 60, 3600, 86400, 3e7], dtype=torch.float64)
    f = age_features(1.7e9 - ages, 1.7e9, torch.zeros(8))
    assert (f[1:, 0] - f[:-1, 0] > 0.03).all() and f.max() < 3 and (f[:, 1] == 0).all()
    assert age_features(torch.tensor([5.]), 4., torch.zeros(1))[0, 1] > 0

def test_schemas_and_sources_survive_json():
    for s in default_schemas().values(): assert Schema.from_dict(json.loads(json.dumps(s.to_dict()))) == s and list(s.annotations) == list(Schema.from_dict(s.to_dict()).annotations)
    assert [VOCAB.id(s) for s in ('mic', 'cam')] == [1, 2] and len({VOCAB.id(str(i)) for i in range(99)}) == 3 and len(VOCAB) == 6 and VOCAB.id('\ud800') >= 3
    with pytest.raises(ValueError, match='scales'): Schema('a', ('x',), scales=dict(y=1.))

@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_no_features_at_all():
    enc = M4InputEncoder(4, [Schema('bare'), Schema('wide', width=2)])
    y = enc(enc.collate([M4Token('bare', 's', 0), M4Token('wide', 's', 0, embedding=torch.ones(2))]), 0.)
    assert y.shape == (2, 4) and y.isfinite().all()
    assert M4InputEncoder(4, [Schema('bare')])(collate([], [Schema('bare')]), 0.).shape == (0, 4)

def test_weights_travel(enc):
    other = M4InputEncoder(16, SCHEMAS, VOCAB); other.load_state_dict(enc.state_dict())
    b = enc.collate([M4Token('audio', 'mic', 0, features=dict(rms=1))])
    assert torch.equal(other(b, 1.), enc(b, 1.)) and 'scale' not in enc.state_dict()

deep = st.integers(900, 100_000).flatmap(lambda n: st.sampled_from(['['*n + ']'*n, '{"a":'*n + '1' + '}'*n, '['*n, '[{"a":'*(n//2)]))

@quick
@given(deep, st.sampled_from(['modality', 'embedding', 'features', 'annotations', 'raw_tokens', 'raw_data_ref', 'x', None]))
def test_nested_junk_is_an_error_of_the_token(value, key):
    line = value if key is None else json.dumps({'modality': 'audio', 'source': 'mic', 'timestamp': 1})[:-1] + f', "{key}": {value}}}'
    with pytest.raises((ValueError, TypeError)): M4Token.from_json(line)

@settings(quick, max_examples=200)
@given(st.dictionaries(st.sampled_from([*M4Token.__dataclass_fields__, 'x']), json_value, max_size=9), st.sampled_from(['{}', '[{}]', '{}x', 'x{}', '{} {}']))
def test_from_json_raises_two_kinds_only(value, frame):
    value = {'modality': 'audio', 'source': 'mic', 'timestamp': 1, **value}
    try: t = M4Token.from_json(frame.replace('{}', json.dumps(value)))
    except (ValueError, TypeError) as e: assert str(e)
    else: assert M4Token.from_json(t.to_json()) == t

@quick
@given(st.lists(any_token, min_size=1, max_size=3))
def test_byte_order_marks(tmp_path, tokens):
    write_jsonl(tmp_path/'t', tokens)
    raw = (tmp_path/'t').read_bytes()
    (tmp_path/'t').write_bytes(b'\xef\xbb\xbf' + raw)
    assert read_jsonl(tmp_path/'t') == tokens
    for bom, code in ((b'\xff\xfe', 'utf-16-le'), (b'\xfe\xff', 'utf-16-be')):
        (tmp_path/'t').write_bytes(bom + raw.decode().encode(code))
        for strict in (True, False):
            with pytest.raises(ValueError, match='UTF-16'): read_jsonl(tmp_path/'t', strict)
