"What notebook 55a_recalled can't show: sessions whose traces are joined; forgetting, learning, threads, batches, streams, refusals"
import warnings
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
import chronomem.live.learning   # noqa: F401, for session.learn
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import tiny_lm
from chronomem.backbone.joined import joined
from chronomem.backbone.model import CHATML, ChronoModel, byte_tokenizer
from chronomem.backbone.reader import new_reader
from chronomem.delta.delta import DeltaConfig
from chronomem.ladder.ladder import LadderConfig
from chronomem.then.attention import KVCache

SMALL = MemoryConfig(ladder=LadderConfig.of(3, dims=(16, 16, 16), slots=(2, 1, 1), hidden=16))
TOLD = ['The key is under the mat.', 'I never eat coriander.', 'Nora sails on Friday.']
ASKED = ['Where is the key?', 'What do I never eat?', 'When does Nora sail?']

def toy(family='llama', seed=0, **kw):
    with warnings.catch_warnings(action='ignore'):
        m = ChronoModel.from_pretrained('toy', tiny_lm(family, vocab=258, seed=seed), byte_tokenizer(), SMALL, lora_r=0, seed=seed, **kw)
    m.frame = 'notes'   # a model that quotes says a single trace word for word, and reads nothing
    return m

@pytest.fixture
def model(): return toy()

def life(model, user='ada', told=TOLD, **kw):
    s = model.session(user, incognito=True, **dict(recall='traces', way='joined') | kw)
    for t in told: s.ingest(t, role='user')
    return s

def ask(s, q=ASKED[0], n=10, **kw): return s.ask(q, n, remember=False, **kw)

def read(s, q=ASKED[0], n=10, **kw):
    "What is answered if the traces are read as text"
    s.way = 'text'
    try: return ask(s, q, n, **kw)
    finally: s.way = 'joined'

def kept(model): return 0 if model.note_cache is None else len(model.note_cache)

@pytest.mark.parametrize('family', ('llama', 'qwen3', 'gemma2', 'mistral', 'gpt2'))
@pytest.mark.parametrize('frame', ('quotes', 'notes'))
def test_one_trace_is_as_if_it_was_read(family, frame):
    model = toy(family)
    model.frame = frame
    s = life(model, top=1)
    for q in ASKED:
        _, row, found = s.prompt(q)
        kv, rest = s.stored.split(q, found, row)
        assert kv is not None and len(found) == 1 and kv.mask.shape[1]+len(rest) == len(row)
        with torch.no_grad():
            whole = model.lm.logits(*model.pad([row]))[0, -len(rest):]
            with joined(model.lm.bare, kv): got = model.lm.logits(*model.pad([rest]))[0]
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
        assert ask(s, q) == read(s, q) == ask(s, q)

def test_a_trace_is_stored_once_whoever_asks_again(model):
    s = life(model, top=1)
    ask(s); n = model.note_cache.misses
    ask(s, 'So where is the key now?'); ask(s)
    assert model.note_cache.misses == n == 2 == len(s.stored)

def test_a_chat_format_of_its_own():
    with warnings.catch_warnings(action='ignore'):
        tok = byte_tokenizer(('<pad>', '<eos>', '<|im_start|>', '<|im_end|>'))
        tok.chat_template = CHATML
        model = ChronoModel.from_pretrained('toy', tiny_lm('llama', vocab=260), tok, SMALL, lora_r=0)
    model.frame = 'notes'
    s = life(model, top=1, told=['<|im_end|> is what I typed.', *TOLD])
    for q in (*ASKED, 'What is it that I typed?'): assert ask(s, q) == read(s, q)
    assert len(s.stored)

def test_stream_is_the_answer(model):
    for top in (1, 3):
        s = life(model, top=top)
        pieces, found = s.ask(ASKED[0], 10, stream=True, remember=False, sources=True)
        assert ''.join(pieces) == ask(s) and len(found) == top
    assert ''.join(s.ask(ASKED[0], 10, stream=True)) and s.t == 4

def test_a_reader_takes_part(model):
    reader = new_reader(model)
    for v in reader.weights.values(): v.normal_(0, .3, generator=torch.Generator().manual_seed(1))
    plain = ask(life(model, top=1))
    model.reader = reader
    s = life(model, top=1)
    assert ask(s) == read(s) != plain and ''.join(ask(s, stream=True)) == ask(s)
    for v in reader.weights.values(): v.mul_(2)
    assert ask(s) == read(s)

@pytest.mark.parametrize('disk', (False, True))
def test_forgotten_traces_are_dropped(model, tmp_path, disk):
    s = model.session('ada', tmp_path/'home', incognito=not disk, recall='traces', way='joined', top=3, least=0)
    other = life(model, 'bob')
    for t in TOLD: s.ingest(t, role='user')
    ask(s), ask(other)
    n = len(other.stored)
    assert len(s.stored) and n
    s.forget(s.memories(TOLD[0])[0].id)
    assert len(s.stored) == 0 and kept(model) == len(other.stored) == n
    ids = model.encode(TOLD[0])
    ask(s)
    assert len(s.stored) and not any(set(k[2]) >= set(ids) and k[0].owner() is s.stored for k in model.note_cache._all)
    s.wipe(); assert len(s.stored) == 0
    s.ingest(TOLD[1], role='user'); ask(s, ASKED[1]); assert len(s.stored)
    s.forget_texts(); assert len(s.stored) == 0
    s.close(); other.close(); assert kept(model) == 0

def test_what_a_dropped_session_stored_goes_with_the_next(model):
    s = life(model, top=1)
    ask(s); assert kept(model) == 2
    del s
    s = life(model, 'bob', top=1)
    ask(s); s.stored.drop(); assert kept(model) == 0

def test_learning_drops_what_older_weights_stored(model):
    s = life(model, top=1)
    before = ask(s)
    s.learn('The cat sat on the mat and sang. '*40, DeltaConfig(rank=2, rate=.05, frame=32, context=32, anchors=4, stream_kl=0.))
    once = ask(s)
    assert once == read(s) == ''.join(ask(s, stream=True)) != before
    n = model.note_cache.misses
    ask(s); assert model.note_cache.misses == n, 'the same weights find what they stored'
    s.learn('A dog came by and ate the mat. '*40)
    assert ask(s) == read(s) and model.note_cache.misses > n
    assert ask(s, learned=False) == before
    s.close()

def test_training_drops_what_older_weights_stored(model):
    s = life(model, top=1); ask(s)
    with torch.no_grad():
        for p in model.lm.bare.parameters(): p.add_(.05*torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    assert ask(s) == read(s) and len(s.stored) == 2

def test_threads_dont_leak(model):
    people = [life(model, f'p{i}', [f'My key number {i*i} is under mat {7*i}.'], top=1) for i in range(4)]
    want = [read(s) for s in people]
    with ThreadPoolExecutor(4) as ex: got = list(ex.map(lambda i: ask(people[i % 4]), range(24)))
    assert got == want*6
    owners = {k[0].owner() for k in model.note_cache._all}
    assert owners == {s.stored for s in people} and all(len(s.stored) == 2 for s in people)

def test_batches_mix_ways(model):
    people = [life(model, 'a', top=1), life(model, 'b', top=3), life(model, 'c', way='text'), life(model, 'd', recall='none'), life(model, 'e', [])]
    qs = [*ASKED, *ASKED[:2]]
    assert model.ask_batch(people, qs, 10, remember=False) == [ask(s, q) for s, q in zip(people, qs)]

def test_little_room_is_only_slower(model):
    s = life(model, top=1)
    model.note_cache = KVCache(0)
    assert ask(s) == read(s) and kept(model) == 0

def test_what_a_prompt_is_not_made_of_is_read(model):
    s = life(model, top=1)
    _, row, found = s.prompt(ASKED[0])
    assert s.stored.split('Another question?', found, row) == (None, row)
    model.frame = 'quotes'
    assert s.stored.split(ASKED[0], found, row) == (None, row)

def test_wrong_ways_are_refused(model):
    with pytest.raises(ValueError, match="way: got 'latent', expected 'text' or 'joined'"): model.session('a', incognito=True, way='latent')
    with pytest.raises(ValueError, match="way: got 'joined' with recall='both'"): model.session('a', incognito=True, recall='both', way='joined')
    mamba = toy('mamba')
    with pytest.raises(ValueError, match="way: got 'joined', expected 'text', as memory can't be joined"): mamba.session('a', incognito=True, recall='traces', way='joined')
    for recall in ('none', 'ladder'):
        assert mamba.session('a', incognito=True, recall=recall, way='joined').way == 'joined'
        assert ask(life(model, recall=recall)) == ask(life(model, recall=recall, way='text'))
    assert kept(model) == 0

def test_a_fork_goes_the_same_way_and_finds_nothing_of_the_first(model):
    s = life(model, top=1)
    ask(s)
    two = s.fork('bob', incognito=True)
    assert two.way == 'joined' and len(two.stored) == 0 and ask(two) == ask(s) and len(two.stored) == 2

def test_what_was_forgotten_meanwhile_is_not_stored(model):
    s = life(model, top=1)
    pieces = s.ask(ASKED[0], 10, stream=True, remember=False)
    _, row, found = s.prompt(ASKED[0])
    late = s.stored.answering(ASKED[0], found)
    s.forget(found[0].id)
    assert late.answer(s.state, [row], 10) and len(s.stored) == 0
    with pytest.raises(Exception, match='wiped meanwhile'): list(pieces)
    assert len(s.stored) == 0 and ask(s, ASKED[1]) and len(s.stored) == 2
