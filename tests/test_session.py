"""What notebook 82_session can't say: processes killed at random, hostile names and texts, damaged files, threads, other processes."""
import json, os, random, shutil, signal, subprocess, sys, threading, time, warnings
from pathlib import Path
import pytest, torch
from chronomem.backbone.backbone import MemoryConfig, MemoryLM
from chronomem.backbone.families import add_memory, tiny_lm
from chronomem.core import DirLock, ManualClock, StateError, seed_all, user_dir
from chronomem.ladder.ladder import LadderConfig
from chronomem.backbone.model import CHATML, byte_tokenizer, with_chat
from chronomem.live import session as S
from chronomem import ChronoModel
from chronomem.then.home import users, wipe_user
from chronomem.senses.m4 import M4Token

SMALL = MemoryConfig(ladder=LadderConfig.of(3, dims=(16, 16, 16), slots=(2, 1, 1), hidden=16))

def toy(seed=0, config=SMALL, family='llama', lora_r=2):
    with warnings.catch_warnings(action='ignore'):
        return ChronoModel.from_pretrained('toy', tiny_lm(family, vocab=258), byte_tokenizer(), config, lora_r, seed=seed)

@pytest.fixture(scope='module')
def model(): return toy()

@pytest.fixture
def home(tmp_path): return tmp_path/'home'

def logits(s):
    ids, mask = s.model.tokenize('User: What do I like?')
    with torch.no_grad(): return s.model.lm.logits(ids, mask, *s.model.lm.memory.read(s.state))[0, -1]

def same(a, b): return torch.equal(logits(a), logits(b))
def text(i): return f'Day {i}: I like number {i*i}.'
def tree(path): return sorted((str(p.relative_to(path)), p.lstat().st_size) for p in path.rglob('*')) if path.exists() else None
def die(s):
    "As SIGKILL leaves it: no save, no mark, no goodbye"
    s._end.detach(); s._log._drop(); s._texts is None or s._texts.log._drop(); s._files.lock.release(); s.closed = True

class Reference:
    "The logits after t inferences of an uninterrupted life, to the bit"
    def __init__(self, model): self.s, self.at = model.session('reference', incognito=True), []; self.at.append(logits(self.s))
    def __getitem__(self, t):
        while len(self.at) <= t: self.s.ingest(text(self.s.t)); self.at.append(logits(self.s))
        return self.at[t]

@pytest.fixture(scope='module')
def reference(model): return Reference(model)

# ---- kill -9

def child(work):
    "Run `work` in a child process that never comes back by itself"
    if pid := os.fork(): return pid
    try: work()
    finally: os._exit(1)

def test_kill_while_ingesting(model, home, tmp_path, reference):
    rng, ack, ahead = random.Random(0), tmp_path/'ack', 0
    model.session('ada', home).close(); ack.write_text('0\n')
    def live():
        s = model.session('ada', home, save_every=3)
        with open(ack, 'a') as out:
            while True: s.ingest(text(s.t)); out.write(f'{s.t}\n'); out.flush()
    for _ in range(12):
        before, end, pid = ack.stat().st_size, time.monotonic()+20, child(live)
        while ack.stat().st_size == before and time.monotonic() < end: time.sleep(.001)
        time.sleep(rng.random()*.03)
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        known = int(ack.read_text().split()[-1])
        with model.session('ada', home) as s:
            assert known <= s.t <= known+1 and torch.equal(logits(s), reference[s.t])
            ahead += s.t > known
    assert known >= 12     # one a round is all that a busy machine promises

def test_kill_at_birth(model, home):
    rng = random.Random(1)
    for i in range(20):
        pid = child(lambda: model.session(f'{i//3}', home).ingest(text(0)))
        time.sleep(rng.random()*.02); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        with model.session(f'{i//3}', home) as s: s.ingest('alive')

CHILD = '''
import sys; sys.path[:0] = {path!r}
from test_session import *
s = toy().session('ada', {home!r}, save_every=4)
print('open', flush=True)
while True:
    s.ingest(text(s.t)); print(s.t, flush=True)
'''
def test_another_process(model, home, reference):
    code = CHILD.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])], home=str(home))
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'open\n'
        with pytest.raises(StateError, match='in use'): model.session('ada', home)
        with pytest.raises(StateError, match='in use'): wipe_user('ada', home)
        model.session('bob', home).close()
        while int(p.stdout.readline()) < 9: pass
    finally: p.kill(); rest = p.communicate()[0].split('\n')
    known = int([x for x in rest if x][-1]) if any(rest) else 9
    with model.session('ada', home) as s: assert known <= s.t <= known+1 and torch.equal(logits(s), reference[s.t])

def test_forked_child_keeps_its_hands_off(model, home):
    s = model.session('ada', home); s.ingest('tea')
    def meddle():
        for f in (lambda: s.ingest('x'), s.save, s.wipe, lambda: model.session('ada', home)):
            try: f(); os._exit(3)
            except StateError: pass
        s.close(); os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child(meddle), 0)[1]) == 0
    s.ingest('still mine'); assert s.t == 2
    with pytest.raises(StateError, match='in use'): DirLock(s.dir).acquire()
    s.close()

@pytest.mark.parametrize('kind', ['ladder', 'recurrent'])
@pytest.mark.parametrize('saves', [0, 3, 7])
def test_replay_is_exact(home, kind, saves):
    m = toy(config=MemoryConfig(kind=kind, ladder=SMALL.ladder))
    s = m.session('ada', home)
    for i in range(7):
        s.ingest(text(i))
        if i+1 == saves: s.save()
    die(s)
    with m.session('ada', home) as again: assert again.t == 7 and same(again, s) and again.writes == s.writes
    with m.session('ada', home) as again: assert again.t == 7 and same(again, s) and again.stats()['unsaved'] == 0

def test_failed_append_leaves_the_state(model, home, monkeypatch):
    s = model.session('ada', home); s.ingest('tea'); was = logits(s)
    monkeypatch.setattr(s._log.disk, 'pwrite', lambda *a: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'): s.ingest('more')
    assert s.t == 1 and torch.equal(logits(s), was)
    monkeypatch.undo(); s.close()
    with model.session('ada', home) as s: assert s.t == 1; s.ingest('more')

def test_wipe_killed_in_the_middle(model, home, monkeypatch):
    s = model.session('ada', home); s.ingest('tea'); s.save()
    with monkeypatch.context() as m:
        m.setattr(shutil, 'rmtree', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): s.wipe()
    assert s._files.lock is None and s.t == 0                # what can't be seen any more is forgotten here too, and the lock is given back
    with model.session('ada', home) as s: assert s.t == 0
    assert not list((home/'.tmp').iterdir())

def test_fork_killed_in_the_middle(model, home, monkeypatch):
    s = model.session('ada', home); s.ingest('tea')
    with monkeypatch.context() as m:
        m.setattr(S, 'save_state', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): s.fork('eve')
    with model.session('new', home): pass
    with s.fork('eve') as eve: assert eve.t == 1 and same(eve, s)
    assert len(users(home)) == 3 and not list((home/'.tmp').iterdir())

# ---- names and files

NAMES = '../x', '../../../../tmp/x', '/etc/passwd', '.', '..', 'a'*300, 'nul\0byte', 'zeilen\numbruch', '用户 👤', 'e\u0301', '\u00e9', '\ud800', ' ', '~', '*', 'ADA', 'ada', '.lock', 'CON'

def test_hostile_names(model, home, tmp_path):
    for n in NAMES:
        with model.session(n, home) as s: s.ingest(f'My name is {len(n)} {NAMES.index(n)}'); assert home.resolve() in s.dir.resolve().parents
    assert [p.name for p in tmp_path.iterdir()] == ['home'] and {m.user for m in users(home)} == {*NAMES}
    with warnings.catch_warnings(action='error'): before = [logits(model.session(n, home)) for n in NAMES]
    assert len({tuple(b.tolist()) for b in before}) == len(NAMES)
    for bad, e in (('', ValueError), (None, TypeError), (7, TypeError), (b'ada', TypeError)):
        for kw in ({}, dict(incognito=True)):
            with pytest.raises(e): model.session(bad, home, **kw)

def test_private(model, home):
    with model.session('ada', home) as s: s.ingest('tea'); s.save()
    for p in (home, *home.rglob('*')): assert p.stat().st_mode & 0o777 == (0o700 if p.is_dir() else 0o600), p
    assert b'tea' not in b''.join(p.read_bytes() for p in home.rglob('*') if p.is_file())

def test_home(model, tmp_path, monkeypatch):
    monkeypatch.setenv('CHRONOMEM_HOME', str(tmp_path/'env'))
    with model.session('ada') as s: assert tmp_path/'env' in s.dir.parents
    monkeypatch.delenv('CHRONOMEM_HOME'); monkeypatch.setenv('HOME', str(tmp_path/'me'))
    with model.session('ada') as s: assert tmp_path/'me'/'.chronomem' in s.dir.parents

def test_another_models_memory(model, home):
    with model.session('ada', home, clock=ManualClock(5.)) as s: s.ingest('tea')
    was, other = tree(home), toy(1)
    assert other.fingerprint != model.fingerprint
    with pytest.raises(StateError, match=f"'toy'.*{model.fingerprint}.*{other.fingerprint}"): other.session('ada', home)
    (s.dir/'manifest.json').unlink()
    with pytest.raises(StateError, match='fingerprint'): other.session('ada', home)
    with pytest.raises(StateError, match='fingerprint'): (s.dir/'state.safetensors').unlink(); other.session('ada', home)
    with model.session('ada', home) as again: assert same(again, s)
    assert len(tree(home)) == len(was)

def test_same_weights_elsewhere(model, home):
    with model.session('ada', home) as s: s.ingest('tea')
    with toy().session('ada', home) as again: assert same(again, s)

@pytest.mark.parametrize('file', ['state.safetensors', 'manifest.json', 'traces/00000000.seg'])
@pytest.mark.parametrize('harm', ['cut', 'empty', 'flip', 'foreign', 'link'])
def test_damaged_files_are_refused_and_left(model, home, tmp_path, file, harm):
    with model.session('ada', home) as s: [s.ingest(text(i)) for i in range(3)]
    p = s.dir/file; raw = p.read_bytes()
    if harm == 'link': (tmp_path/'real').write_bytes(raw); p.unlink(); p.symlink_to(tmp_path/'real')
    else: p.write_bytes(dict(cut=raw[:len(raw)//3] if 'seg' not in file else raw[:1000], empty=b'', flip=raw[:20]+bytes([raw[20] ^ 1])+raw[21:], foreign=b'GIF89a'+raw)[harm])
    was = tree(home)
    if (file, harm) in (('manifest.json', 'link'), ('traces/00000000.seg', 'flip')):  # a link in one's own directory; the header's second copy
        try: s = model.session('ada', home); s.close(); return
        except (StateError, OSError): assert tree(home) == was; return
    with pytest.raises((StateError, OSError)): model.session('ada', home)
    assert tree(home) == was
    with DirLock(s.dir): pass
    if harm != 'link': p.write_bytes(raw)
    else: p.unlink(); p.write_bytes(raw)
    with model.session('ada', home) as again: assert same(again, s)

def test_trace_missing_between_state_and_now(model, home):
    s = model.session('ada', home); s.ingest('a'); s.save(); old = (s.dir/'state.safetensors').read_bytes()
    s.ingest('b'); s.save(); s.ingest('c'); s.close()
    (s.dir/'state.safetensors').write_bytes(old)
    with model.session('ada', home) as again: assert again.t == 3 and same(again, s)
    shutil.rmtree(s.dir/'traces')
    with model.session('ada', home) as again: assert again.t == 3; again.ingest('d')
    (s.dir/'state.safetensors').write_bytes(old)
    with pytest.raises(StateError, match='jump from inference 1 to 3'): model.session('ada', home)

def test_memory_trained_under_an_open_session(home):
    m = toy(); s = m.session('ada', home); s.ingest('tea')
    with torch.no_grad(): m.lm.mem += 1
    with pytest.raises(StateError, match='weights of the memory changed'): s.save()
    with pytest.raises(StateError): s.close()
    with DirLock(s.dir): pass
    adapters = [p for n, p in m.lm.named_parameters() if 'lora_' in n]
    was = m.fingerprint
    with torch.no_grad(): adapters[0].add_(1)
    assert m.fingerprint == was

# ---- people

def test_two_users_never_mix(model, home, reference):
    a, b = (model.session(n, home) for n in ('ada', 'bob'))
    for i in range(6): a.ingest(text(i)); b.ingest(f'I hate number {i}.'); b.ask('Well?', 4)
    assert torch.equal(logits(a), reference[6]) and not same(a, b)
    a.close(); shutil.copytree(a.dir/'traces', home/'stolen'); b.close()
    shutil.rmtree(b.dir/'traces'); shutil.move(home/'stolen', b.dir/'traces')
    with pytest.raises(StateError, match='not theirs'): model.session('bob', home)

def test_newest_handle_wins(model, home):
    old = model.session('ada', home); old.ingest('tea')
    new = model.session('ada', home/'..'/'home'); assert new.t == 1 and old.closed
    with pytest.raises(StateError, match='closed'): old.ingest('more')
    old.close(); new.ingest('more'); del new
    with toy().session('ada', home) as s: assert s.t == 2

def test_fork_is_independent(model, home):
    with model.session('ada', home) as a:
        for i in range(5): a.ingest(text(i))
        with a.fork('eve') as e, a.fork('ghost', incognito=True) as g:
            assert same(a, e) and same(a, g) and e.writes == a.writes and len(e._log) == 5
            was = logits(a); e.ingest('x'); g.ingest('y')
            assert torch.equal(logits(a), was) and not same(a, e) and not same(e, g)
            a.wipe(); assert e.t == 6
        with pytest.raises(StateError, match='has a memory'): a.fork('eve')
        with pytest.raises(StateError, match='incognito'): g.fork('other') if not g.closed else model.session('g', home, incognito=True).fork('other')
    with model.session('eve', home) as again: assert again.t == 6 and same(again, e)
    assert sorted(m.user for m in users(home)) == ['eve']

def test_incognito_leaves_home_untouched(model, home):
    with model.session('ada', home) as a: a.ingest('tea')
    was = tree(home)
    with model.session('ada', home, incognito=True, save_every=1) as s:
        assert s.t == 0
        s.ingest('secret'); s.ask('Well?', 4); list(s.ask('Well?', 4, stream=True)); s.stats(); s.fork('x', incognito=True).ingest('y')
        for f in (s.save, s.load, lambda: s.fork('x')):
            with pytest.raises(StateError, match='incognito'): f()
        assert s.wipe()['t'] == 3 and s.t == 0
        s.ingest('again')
    with model.session('eve', home/'nowhere', incognito=True) as s: s.ingest('secret')
    assert tree(home) == was

def test_wipe_leaves_nothing(model, home):
    with model.session('bob', home): pass
    was, s = tree(home), model.session('ada', home)
    for i in range(3): s.ingest(text(i))
    (s.dir/'state.safetensors.copy').write_bytes(b'x'); s.save()
    gone = s.wipe()
    assert gone['t'] == 3 == gone['traces'] and gone['files'] == 5 and gone['bytes'] > 1000
    assert [x for x in tree(home) if '/' in x[0]] == [x for x in was if '/' in x[0]] and s.t == 0 and s.writes == dict(tau1=0, tau4=0, tau16=0)
    assert s.stats()['traces'] == 0 and same(s, model.session('x', incognito=True))
    s.save(); s.close(); assert len(users(home)) == 1
    with model.session('ada', home) as s: assert s.t == 0; s.ingest('new'); s.wipe(); s.ingest('newer')
    with model.session('ada', home) as s: assert s.t == 1
    (s.dir/'manifest.json').write_text('broken')
    assert wipe_user('ada', home).files == 4 and len(users(home)) == 1
    with pytest.raises(StateError, match="nobody called 'ada'"): wipe_user('ada', home)

# ---- texts

def test_bad_input(model, home):
    with model.session('ada', home) as s:
        s.ingest('tea'); was = logits(s), tree(home)
        tok = lambda **kw: M4Token(kw.pop('modality', 'text'), 'here', 0., **kw)
        bad = [('', ValueError), (' \n\t', ValueError), ('\ud800', ValueError), (None, TypeError), (7, TypeError), (b'tea', TypeError), (['tea'], TypeError),
               (tok(), ValueError), (tok(raw_tokens=[]), ValueError), (tok(raw_tokens=[9999]), ValueError), (tok(raw_tokens=[-1]), ValueError), (tok(modality='audio', raw_tokens=[5]), ValueError)]
        for x, e in bad:
            for role in (None, 'user'):
                with pytest.raises(e): s.ingest(x, role)
            with pytest.raises((ValueError, TypeError)): s.ask(x)
            with pytest.raises((ValueError, TypeError)): s.ask(x, stream=True)
            with pytest.raises(e): model.ingest_batch([s, model.session('i', incognito=True)], ['fine', x])
        with pytest.raises(ValueError, match="accepts 'text'"): s.ingest(tok(modality='audio'))
        with pytest.raises(ValueError, match='role'): s.ingest('tea', role='robot')
        with pytest.raises(ValueError, match='role'): s.ingest(tok(raw_tokens=[5]), role='user')
        for n in (0, -1, 10**6):
            with pytest.raises(ValueError, match='max_new_tokens|prompt'): s.ask('tea?', n)
        with pytest.raises(ValueError, match='ingest a long text'): s.ask('tea '*300)
        assert torch.equal(logits(s), was[0]) and tree(home) == was[1]

def test_text_tokens(model):
    a, b = (model.session(n, incognito=True) for n in 'ab')
    a.ingest('I like tea.'); b.ingest(M4Token('text', 'here', 0., raw_tokens=model.encode('I like tea.')))
    assert same(a, b)

@pytest.mark.parametrize('extra', [0, 1, 700])
def test_long_texts_are_lived_whole(model, extra):
    a, b = (model.session(n, incognito=True) for n in 'ab')
    words = 'x'*(model.max_tokens+extra)
    got = a.ingest(words)
    for i in range(0, len(words), model.max_tokens): b.ingest(words[i:i+model.max_tokens])
    assert same(a, b) and got.pieces == a.t == b.t == -(-len(words)//model.max_tokens) and got.tokens == len(words)

def test_same_as_step(model):
    s, lm = model.session('a', incognito=True), model.lm
    state = lm.memory.init(1)
    with torch.no_grad():
        for i in range(5): s.ingest(text(i)); state, _ = lm.step(state, *model.tokenize(text(i)))
    assert all(torch.equal(s.state.rungs[n, k], state.rungs[n, k]) for n in lm.memory.shapes for k in ('z', 'born'))

def test_training_mode_does_not_leak(home):
    m = toy(family='gpt2', lora_r=0); a, b = (m.session(n, incognito=True) for n in 'ab')
    a.ingest('tea'); m.lm.train(); b.ingest('tea'); assert m.lm.training
    m.lm.eval(); assert same(a, b)

# ---- many at once

def test_batch_is_one_by_one(model, home):
    texts = [['a', text(1)*40, 'tea'], ['bb'*300, 'c', text(2)], ['d', 'e', 'f'*1200]]
    many, single = ([model.session(f'{k}{i}', home, incognito=i == 2) for i in range(3)] for k in 'mn')
    many[0].ingest('before'); single[0].ingest('before'); many[0] = model.session('m0', home)
    for row in texts:
        got = model.ingest_batch(many, row)
        for w, s, x in zip(got, single, row):
            one = s.ingest(x); assert (w.t, w.tokens, w.pieces, w.wrote) == (one.t, one.tokens, one.pieces, one.wrote)
    qs = ['Tea?', 'What about a much longer question, then?', 'And?']
    assert model.ask_batch(many, qs, 6) == [s.ask(q, 6) for s, q in zip(single, qs)]
    for a, b in zip(many, single): assert a.t == b.t and (logits(a)-logits(b)).abs().max() < 1e-5
    for s in many: s.close()
    with model.session('m1', home) as s: assert (logits(s)-logits(single[1])).abs().max() < 1e-5
    for f in (model.ingest_batch, model.ask_batch):
        assert f([], []) == []
        with pytest.raises(ValueError, match='twice'): f([single[0]]*2, qs[:2])
        with pytest.raises(ValueError, match='one for each'): f(single, qs[:2])
        with pytest.raises(TypeError, match='one str'): f(single, 'abc')
        with pytest.raises(ValueError, match='this very model'): f([toy(1).session('x', incognito=True)], qs[:1])
        with pytest.raises(StateError, match='closed'): f(many, qs)

# ---- streams

def test_stream_errors_surface_and_leaving_does_not_hang(model, monkeypatch):
    s = model.session('a', incognito=True); n = threading.active_count()
    g = s.ask('Tea?', 400, stream=True); next(g); t0 = time.monotonic(); g.close()
    assert time.monotonic()-t0 < 5 and s.t == 0
    g = s.ask('Tea?', 400, stream=True); next(g); del g
    assert threading.active_count() == n
    with pytest.raises(ValueError, match='no_such_option'): list(s.ask('Tea?', 4, stream=True, no_such_option=1))
    monkeypatch.setattr(model.lm.memory, 'read', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): list(s.ask('Tea?', 4, stream=True))
    assert threading.active_count() == n and s.t == 0

def test_a_ladder_that_wants_a_hint_is_refused(model, monkeypatch):
    monkeypatch.setattr(type(model.lm.memory), 'wants_hint', True)
    with pytest.raises(ValueError, match='hint of surprise'): model.session('a', incognito=True)

def test_ingest_while_another_streams(model, reference):
    s, other = (model.session(n, incognito=True) for n in 'ab')
    want = s.ask('Tea?', 60, remember=False)
    g, got = s.ask('Tea?', 60, stream=True), []
    for i, piece in enumerate(g):
        got.append(piece)
        if i < 4: other.ingest(text(i))
    assert ''.join(got) == want and s.t == 1 and torch.equal(logits(other), reference[other.t])

class Scripted(ChronoModel):
    "A model that says what it is told to"
    def says(self, text):
        self.script = self.encode(text) + [self.stop[0]]
        def generate(ids, mask, soft, soft_mask, streamer=None, stopping_criteria=(), **kw):
            out = []
            for i in self.script:
                out.append(i)
                if streamer: streamer.put(torch.tensor([i]))
                if any(c(torch.tensor([out]), None).all() for c in stopping_criteria): break
            self.lm.said = len(out)
            return torch.tensor([out])
        self.lm.generate = generate

@pytest.mark.parametrize('said,heard', [(' Tea. ', 'Tea.'), ('Tëa ✓ 👤\n\nyes', 'Tëa ✓ 👤\n\nyes'), (' Tea.\nUser: more\nUser: x', 'Tea.'), ('a\nUs b', 'a\nUs b'), ('tea\nUser', 'tea\nUser')])
def test_answers_end_where_the_turn_ends(said, heard):
    m = toy(); m.__class__ = Scripted; m.says(said)
    s = m.session('a', incognito=True)
    assert s.ask('?') == heard and ''.join(s.ask('?', stream=True)) == heard
    assert m.lm.said <= len(said.encode().split(b'more')[0])+1

def test_chatml_ends_at_its_token():
    t = byte_tokenizer(('<|im_end|>', '<|im_start|>')); t.chat_template = '... named SmolLM ...'
    m = ChronoModel(add_memory(tiny_lm(vocab=258), SMALL), t)
    assert t.chat_template == CHATML and m.turn == '' and m.stop == [0, 1][:len(m.stop)] and t.padding_side == 'left'
    assert m.chat('Tea?') == '<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n'
    assert m.chat('Tea?', 'Yes.') == '<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n'
    assert m.decode([*m.encode('Yes.'), 0, *m.encode('no')]) == 'Yes.'
    t.chat_template = 'mine'; assert with_chat(t).chat_template == 'mine'

# ---- models

def test_save_and_load_models(model, home, tmp_path):
    seed_all(3)
    with model.session('ada', home) as s: s.ingest('tea')
    own = ChronoModel(add_memory(tiny_lm(vocab=258), SMALL), byte_tokenizer(), 'own', 100)
    own.save_pretrained(tmp_path/'own', backbone=True); model.save_pretrained(tmp_path/'toy')
    back = ChronoModel.from_pretrained(tmp_path/'own'); back.save_pretrained(tmp_path/'again'); again = ChronoModel.from_pretrained(str(tmp_path/'again'))
    assert own.fingerprint == back.fingerprint == again.fingerprint and (again.name, again.max_tokens) == ('own', 100) and again.stop == own.stop
    assert again.chat('x') == own.chat('x') and again.encode('Tëa ✓') == own.encode('Tëa ✓')
    assert not (tmp_path/'toy'/'backbone').exists()
    loaded = ChronoModel.from_pretrained(tmp_path/'toy', tiny_lm(vocab=258))
    assert loaded.fingerprint == model.fingerprint
    with loaded.session('ada', home) as t: assert same(s, t) and t.ask('Tea?', 5, remember=False) == model.answer(s.state, [model._prompt('Tea?')], 5)[0]

def test_names_of_models(tmp_path):
    with pytest.raises((FileNotFoundError, StateError), match='no-such'):
        ChronoModel.from_pretrained('no-such')
    with pytest.raises(FileNotFoundError): ChronoModel.from_pretrained(str(tmp_path/'no-such'))
    with pytest.raises(TypeError, match='MemoryLM'): ChronoModel(tiny_lm(), byte_tokenizer())
    with pytest.raises(ValueError, match='both or neither'): ChronoModel.from_pretrained('x', lm=tiny_lm())
    with pytest.raises(ValueError, match='max_tokens'): ChronoModel(add_memory(tiny_lm(vocab=258), SMALL), byte_tokenizer(), max_tokens=0)
    with pytest.warns(UserWarning, match='untrained'): m = ChronoModel.from_pretrained('x', tiny_lm(vocab=258), byte_tokenizer(), SMALL)
    assert not any(p.requires_grad for p in m.lm.parameters())

@pytest.mark.parametrize('family', ['gpt2', 'mamba'])
def test_other_families(family, home):
    m = toy(family=family)
    with m.session('ada', home) as s: s.ingest(text(0)); a = s.ask('Tea?', 5)
    with m.session('ada', home) as t: assert t.t == 2 and same(s, t) and isinstance(a, str)
