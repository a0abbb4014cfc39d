"What notebooks 28, 56, 77a and 82e can't show: kills, threads, batches, old files, other families, random sequences of acts"
import json, os, random, signal, subprocess, sys, threading, time, warnings
import pytest, torch
from hypothesis import given, strategies as st
import chronomem.live.learning   # noqa: F401, for session.think, fork, memories
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import tiny_lm
from chronomem.backbone.model import ChronoModel, byte_tokenizer
from chronomem.backbone.reader import NEVER, Reader, new_reader
from chronomem.backbone.thinking import Asked, learn_to_think, thinking
from chronomem.core import StateError, load_tensors, save_tensors
from chronomem.ladder.ladder import LadderConfig
from chronomem.ladder.thoughts import Thoughts, ThoughtsConfig, about_key, code_table, held
from chronomem.learn.dialogues import read_dialogues, sample_dialogues, write_dialogues
from chronomem.learn.private_state import Games, draw, hangman, play, shows

SMALL = MemoryConfig(ladder=LadderConfig.of(3, dims=(16, 16, 16), slots=(2, 1, 1), hidden=16), thoughts=ThoughtsConfig(slots=3, tokens=16))
SECRETS = ['My number is 3.', 'My number is 7.']

def toy(family='llama', seed=0, **kw):
    with warnings.catch_warnings(action='ignore'):
        return ChronoModel.from_pretrained('toy', tiny_lm(family, vocab=258, seed=seed), byte_tokenizer(), SMALL, lora_r=0, seed=seed, **kw)

@pytest.fixture
def model(): return toy()

def logits(model, state, text='Is it 3?'):
    ids, mask = model.tokenize([text]*len(state.t))
    with torch.no_grad(), thinking(model, state): return model.lm.logits(ids, mask, *model.lm.recall(state, ids, mask))

@pytest.mark.parametrize('family', ('llama', 'gpt2', 'gemma2', 'mamba', 'qwen3'))
def test_a_thought_changes_what_follows_and_none_changes_nothing(family):
    m = toy(family)
    blank = m.lm.init(2)
    bare = logits(m, m.lm.memory.init(2))
    assert torch.equal(logits(m, blank), bare)
    s = m.keep_thoughts(blank, [SECRETS[0], None])
    got = logits(m, s)
    assert not torch.allclose(got[0], bare[0]) and torch.allclose(got[1], bare[1], atol=1e-4)
    words = m.lm.recall(s, *m.tokenize(['a', 'a']))
    live = words[0][0][words[1][0]]
    E = m.lm.embed(torch.arange(258))
    assert m.spoken(torch.cdist(live.float(), E.float()).argmin(1).tolist()) == SECRETS[0][-16:].strip()

def test_what_thoughts_say_nothing_about_was_never_told(model, monkeypatch):
    gains = iter((.1, .9))
    for name, f in dict(judges=lambda m: 2, about_person=lambda m, q: 5., thoughts_gain=lambda m, state, q: next(gains)).items(): monkeypatch.setattr(ChronoModel, name, f)
    with model.session('dora', incognito=True, recall='traces') as s:
        s.think('Hide my hat.', ['It is in the well.'])
        assert [s.ask('Where is my hat?', 4, remember=False) == NEVER for _ in range(2)] == [True, False]

def test_rows_without_thoughts_are_answered_as_if_alone(model, tmp_path):
    model.thought_reader = new_reader(model, 2, seed=1)
    with torch.no_grad():
        for k in model.thought_reader.weights: model.thought_reader.weights[k].add_(.5)
    a, b = (model.session(u, tmp_path, recall='ladder') for u in 'ab')
    alone = b.ask('Is it 3?', 8, remember=False)
    a.think('A number?', SECRETS, seed=0)
    mine = a.ask('Is it 3?', 8, remember=False)
    assert model.ask_batch([a, b], ['Is it 3?']*2, 8, remember=False) == [mine, alone]
    assert ''.join(a.ask('Is it 3?', 8, stream=True, remember=False)) == mine

def test_recall_decides_what_is_read(model):
    s = model.session('ada', incognito=True, recall='traces')
    s.ingest('The sky is grey.', role='user')
    before = {}
    for recall in ('none', 'traces', 'ladder', 'both'):
        s.recall = recall
        before[recall] = logits(model, s.prompt('Is it 3?')[0])
    s.think('A number?', SECRETS)
    for recall in before:
        s.recall = recall
        assert torch.equal(logits(model, s.prompt('Is it 3?')[0]), before[recall]) == (recall == 'none')

def test_joined_traces_give_way_to_thoughts(model):
    s = model.session('ada', incognito=True, recall='traces', way='joined', least=0.)
    s.ingest('The key is under the mat.', role='user')
    s.think('A number?', SECRETS, seed=0)
    joined = s.ask('Where is the key?', 8, remember=False)
    s.way = 'text'
    assert joined == s.ask('Where is the key?', 8, remember=False)

def test_a_state_of_an_older_version_opens_without_thoughts(model, tmp_path):
    with model.session('ada', tmp_path) as s: s.ingest('Hello.')
    path = s.dir/'state.safetensors'
    tensors, meta = load_tensors(path)
    meta['state']['batch'] = {k: v for k, v in meta['state']['batch'].items() if not k.startswith('thoughts')}
    save_tensors(path, {k: v for k, v in tensors.items() if not k.startswith('thoughts')}, meta)
    with model.session('ada', tmp_path) as s:
        assert s.t == 1 and s.stats()['thoughts'] == 0
        s.think('A number?', SECRETS)
        assert s.stats()['thoughts'] == 1

def test_thoughts_of_another_shape_are_refused(model, tmp_path):
    with model.session('ada', tmp_path) as s: s.think('A number?', SECRETS)
    path = s.dir/'state.safetensors'
    tensors, meta = load_tensors(path)
    tensors['thoughts.z'] = tensors['thoughts.z'][:, :, :4].contiguous()
    save_tensors(path, tensors, meta)
    with pytest.raises(StateError, match='another shape'): model.session('ada', tmp_path)

def test_a_memory_saved_before_there_were_thoughts_loads(model, tmp_path):
    with warnings.catch_warnings(action='ignore'): model.save_pretrained(tmp_path)
    path = tmp_path/'memory.safetensors'
    tensors, meta = load_tensors(path)
    old = {k: v for k, v in tensors.items() if not k.startswith('thoughts.')}
    save_tensors(path, old, meta)
    c = json.loads((tmp_path/'config.json').read_text())
    from chronomem.core import fingerprint
    c['weights'] = fingerprint(old)
    del c['memory']['thoughts']
    (tmp_path/'config.json').write_text(json.dumps(c))
    again = ChronoModel.from_pretrained(tmp_path, lm=tiny_lm('llama', vocab=258, seed=0), tokenizer=byte_tokenizer())
    s = again.keep_thoughts(again.lm.init(1), ['x y'])
    assert held(s.thoughts).tolist() == [True]

def test_the_text_is_in_no_file_and_no_answer_tells_more_than_its_size(model, tmp_path):
    with model.session('ada', tmp_path) as s:
        s.ingest('Good morning.', role='user')
        told = s.think('A number?', SECRETS, about='number')
        assert 'My number' not in repr(told) and told.tokens > 5
        assert not any('number' in m.text for m in s.memories())
    assert all(b'My number' not in p.read_bytes() for p in tmp_path.rglob('*') if p.is_file())

KILLED = '''
import sys, warnings; warnings.filterwarnings('ignore')
sys.path.insert(0, sys.argv[2])
from test_think import toy
import chronomem.live.learning
s = toy().session('ada', sys.argv[1])
i = 0
while True:
    s.think('A number?', [f'My number is {i}.'], about='number'); print(i, flush=True); i += 1
    if i % 3 == 0: s.ingest(f'Day {i}.')
'''

def test_a_kill_loses_no_thought_that_was_thought(model, tmp_path):
    here, rng = os.path.dirname(__file__), random.Random(0)
    for k in range(3):
        p = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path), here], stdout=subprocess.PIPE, text=True)
        p.stdout.readline()
        time.sleep(rng.random()*.5)
        p.send_signal(signal.SIGKILL)
        last = int(([0] + [int(l) for l in p.stdout.read().split()])[-1])
        p.wait()
        with model.session('ada', tmp_path) as s:
            n, state = s.stats()['thoughts'], s.state
        options = [model.keep_thoughts(model.lm.init(1), [f'My number is {i}.'], 'number').thoughts['z'][0, 0] for i in (last, last+1)]
        at = state.thoughts['order'][0].argmax()
        assert n == 1 and any(torch.equal(state.thoughts['z'][0, at], z) for z in options), (k, last)

def test_threads_think_and_ask_one_session(model, tmp_path):
    s, bad = model.session('ada', tmp_path), []
    def run(k):
        try:
            for i in range(6):
                if k % 2: s.think('A number?', SECRETS, about=f'{k}')
                else: s.ask('Is it 3?', 2, remember=i % 2 == 0)
        except Exception as e: bad.append(e)
    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not bad and s.stats()['thoughts'] == 2
    z = s.state.thoughts['z'].clone()
    s.close()
    with model.session('ada', tmp_path) as again: assert torch.equal(again.state.thoughts['z'], z)

@given(st.lists(st.tuples(st.sampled_from('abc '), st.integers(0, 250)), max_size=12))
def test_slots_hold_the_newest_of_each_name(acts):
    g = torch.Generator().manual_seed(0)
    E = torch.randn(258, 12, generator=g)
    m = Thoughts(ThoughtsConfig(slots=3, tokens=2, dim=12), E)
    s, want = m.init(1), []
    for name, i in acts:
        name = name.strip()
        s = m.write(s, E[torch.tensor([[i, i+1]])], torch.ones(1, 2), torch.tensor([about_key(name)]))
        same = [w for w in want if name and w[0] == name]
        if same: want.remove(same[0])
        elif len(want) == 3: want.pop(0)
        want.append((name, i))
    soft, live = m.read(s, code_table(lambda i: E[i], 258, m.code, m.mean), lambda i: E[i])
    got = torch.cdist(soft[0][live[0]], E).argmin(1).tolist() if live.any() else []
    assert got == [x for _, i in want for x in (i, i+1)]

def test_learning_draws_the_same_whatever_ran_before(model):
    g = Games()
    torch.rand(7)
    a, b = (learn_to_think(model, lambda rng: draw(g, rng), updates=2, batch=3, progress=False) for _ in 'ab')
    assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)

def test_a_host_who_changes_its_word_is_caught():
    g = Games('test', 'test')
    words = g.by_length[6][:20]
    class Turning:
        def __init__(self): self.n = 0
        def reply(self, who, qs): self.n += 1; return [shows(words[(i+self.n) % 20], 'e') for i in who]
        def reveal(self, who, qs): return [words[i] for i in who]
        def sure(self, who, qs): return [[float(words[i] in q) for q in some] for i, some in zip(who, qs)]
    got = [o.consistent for o in play([hangman(g, random.Random(i), 6) for i in range(20)], Turning())]
    assert sum(got) < 10

def test_dialogues_survive_a_round_and_bad_lines_are_named(tmp_path):
    path = tmp_path/'d.jsonl'
    some = sample_dialogues(20, seed=3)
    write_dialogues(some, path)
    assert read_dialogues(path) == some
    path.write_text(path.read_text() + '{"messages": [{"role": "user"}]}\n')
    with pytest.raises(ValueError, match='line 21, message 1'): read_dialogues(path)

def test_a_reader_travels_with_its_model(model, tmp_path):
    model.thought_reader, model.reader = new_reader(model, 2, seed=1), new_reader(model, 3, seed=2)
    with warnings.catch_warnings(action='ignore'): model.save_pretrained(tmp_path)
    again = ChronoModel.from_pretrained(tmp_path, lm=tiny_lm('llama', vocab=258, seed=0), tokenizer=byte_tokenizer())
    for mine, its in ((model.reader, again.reader), (model.thought_reader, again.thought_reader)):
        assert isinstance(its, Reader) and all(torch.equal(v, its.weights[k]) for k, v in mine.weights.items())
