"What notebooks 43_attention and 55_joined can't show: any lengths, dtypes and mixtures of rows; threads, adapters, nesting, and models put back as they were"
import contextvars, gc, threading, warnings, weakref
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM
from chronomem.backbone.families import add_memory, load_lm, tiny_lm
from chronomem.backbone.joined import _HERE, _IN, can_join, joined, store
from chronomem.backbone.model import ChronoModel, byte_tokenizer
from chronomem.core import data_root
from chronomem.then.attention import KVCache, line_up, take, turn, within

FAMILIES = 'gpt2', 'llama', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'mistral'
ROTARY = FAMILIES[1:]
NEW = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)

def gpt_oss():
    c = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32,
             num_local_experts=4, num_experts_per_tok=2, sliding_window=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0); return AutoModelForCausalLM.from_config(AutoConfig.for_model('gpt_oss', **c)).eval()

def model(name, **kw): return gpt_oss() if name == 'gpt_oss' else tiny_lm(name, **kw)

def words(B, n, seed=0): return torch.randint(1, 64, (B, n), generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def logits(lm, *args, **kw): return lm(*args, **kw).logits

def within_(lm, kv, f, **kw):
    with joined(lm, kv, **kw): return f()

def near(a, b, tol=1e-5): assert (a-b).abs().max() <= tol*b.abs().max().clamp(min=1e-3), float((a-b).abs().max())

def padded(rows, left=True):
    "Rows of different lengths as ids and mask"
    n = max(map(len, rows))
    both = [([9]*(n-len(r)), [0]*(n-len(r)), r.tolist(), [1]*len(r)) for r in rows]
    join = lambda dead, live: dead+live if left else live+dead
    return torch.tensor([join(d, r) for d, _, r, _ in both]), torch.tensor([join(z, o) for _, z, _, o in both])

# Equal to the real text

@pytest.mark.parametrize('name', (*FAMILIES, 'gpt_oss'))
@pytest.mark.parametrize('split', (1, 11, 23))
def test_equal_to_a_real_prefix(name, split):
    lm, x = model(name), words(2, 24)
    kv = store(lm, x[:, :split])
    near(within_(lm, kv, lambda: logits(lm, x[:, split:])), logits(lm, x)[:, split:])
    new = within_(lm, kv, lambda: lm.generate(x[:, split:], attention_mask=torch.ones_like(x[:, split:]), **NEW))
    assert torch.equal(new[:, 24-split:], lm.generate(x, attention_mask=torch.ones_like(x), **NEW)[:, 24:])

@pytest.mark.parametrize('name', (*FAMILIES, 'gpt_oss'))
@pytest.mark.parametrize('left', (True, False))
def test_rows_of_different_lengths(name, left):
    "Memories and prompts of three lengths each, padded; positions given, or counted, or by `generate`"
    lm = model(name)
    mem, ask = [words(1, n, n)[0] for n in (3, 9, 6)], [words(1, n, 20+n)[0] for n in (8, 5, 2)]
    kv, (ids, mask) = store(lm, *padded(mem, left)), padded(ask)
    at = (mask.cumsum(1)-1).clamp(min=0)
    for kw in ({}, dict(position_ids=at)):
        got = within_(lm, kv, lambda: logits(lm, ids, attention_mask=mask, **kw))
        for g, m, a in zip(got, mem, ask): near(g[-len(a):], logits(lm, torch.cat([m, a])[None])[0, len(m):])
    new = within_(lm, kv, lambda: lm.generate(ids, attention_mask=mask, **NEW))[:, ids.shape[1]:]
    for g, m, a in zip(new, mem, ask): assert g.tolist() == lm.generate(torch.cat([m, a])[None], **NEW)[0, len(m)+len(a):].tolist()

@pytest.mark.parametrize('name', ('gemma2', 'gemma3_text', 'mistral'))
@pytest.mark.parametrize('window', (2, 5, 9))
def test_windows(name, window):
    kw = dict(layers=6) if name == 'gemma3_text' else {}
    lm, x = tiny_lm(name, sliding_window=window, **kw), words(2, 20)
    kv = store(lm, x[:, :12])
    near(within_(lm, kv, lambda: logits(lm, x[:, 12:])), logits(lm, x)[:, 12:])
    new = within_(lm, kv, lambda: lm.generate(x[:, 12:], **NEW))[:, 8:]
    assert torch.equal(new, lm.generate(x, **NEW)[:, 20:])

@pytest.mark.parametrize('name', (*ROTARY, 'gpt_oss'))
def test_turned_is_stored_there(name):
    lm, x = model(name), words(2, 8)
    kv, there = store(lm, x), store(lm, x, start=37)
    for moved in (turn(kv, 37), turn(turn(kv, 90), torch.tensor([-53, -53]))):
        for a, b in zip(moved.keys, there.keys): near(a, b, 1e-4)
        assert torch.equal(moved.at, there.at)
    for a, b in zip(kv.values, there.values): near(a, b)

def test_kinds_of_rotation():
    "Yarn scales keys, Phi turns a part, Cohere turns neighbours, SmolLM3 leaves a layer out"
    c = dict(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    make = lambda n, **kw: AutoModelForCausalLM.from_config(AutoConfig.for_model(n, **c | kw)).eval()
    yarn = dict(rope_type='yarn', factor=4., original_max_position_embeddings=128, rope_theta=1e4)
    for lm in (make('phi'), make('cohere'), make('smollm3'), tiny_lm('llama', rope_parameters=yarn)):
        x = words(1, 14)
        kv, there = store(lm, x[:, :6]), store(lm, x[:, :6], start=50)
        for a, b in zip(turn(kv, 50).keys, there.keys): near(a, b, 1e-4)
        near(within_(lm, line_up([[turn(kv, 300)]]), lambda: logits(lm, x[:, 6:])), logits(lm, x)[:, 6:], 1e-4)

def test_absolute_positions_are_not_moved():
    lm, x = tiny_lm('gpt2'), words(1, 8)
    kv = store(lm, x, start=5)
    assert kv.turns is None and kv.at[0, 0] == 5
    with pytest.raises(ValueError, match='start='): turn(kv, 1)
    with pytest.raises(ValueError, match='start='): line_up([[store(lm, x), store(lm, x)]])
    after = within_(lm, store(lm, x[:, :4]), lambda: store(lm, x[:, 4:]))
    assert after.at.tolist() == [[4, 5, 6, 7]]
    near(within_(lm, line_up([[store(lm, x[:, :4]), after]]), lambda: logits(lm, x)), logits(lm, torch.cat([x, x], 1))[:, 8:])

@pytest.mark.parametrize('name', FAMILIES)
def test_bfloat16(name):
    lm, x = tiny_lm(name).bfloat16(), words(2, 20)
    got = within_(lm, store(lm, x[:, :9]), lambda: logits(lm, x[:, 9:])).float()
    near(got, logits(lm, x)[:, 9:].float(), .03)

@pytest.mark.data
def test_a_trained_model():
    folder = data_root()/'stories260k'
    if not folder.is_dir(): pytest.skip('stories260k is not here')
    lm, tok = load_lm(folder)
    x = tok('Once upon a time there was a cat. The cat had a big blue hat. One day, the cat', return_tensors='pt').input_ids
    for split in (5, 15):
        kv = store(lm, x[:, :split])
        near(within_(lm, kv, lambda: logits(lm, x[:, split:])), logits(lm, x)[:, split:])
        near(within_(lm, line_up([[turn(kv, 100)]]), lambda: logits(lm, x[:, split:])), logits(lm, x)[:, split:], 1e-4)

# Several texts

@pytest.mark.parametrize('name', (*ROTARY, 'gpt_oss'))
def test_texts_that_saw_each_other_line_up_as_one(name):
    "A second text that was stored after the first one, taken off its place and put back"
    lm, x = model(name), words(1, 20)
    a = store(lm, x[:, :6])
    with joined(lm, a): b = store(lm, x[:, 6:13])
    assert b.at.tolist() == [[*range(6, 13)]]
    kv = line_up([[a, turn(b, 200)]])
    assert kv.at.tolist() == [[*range(13)]]
    near(within_(lm, kv, lambda: logits(lm, x[:, 13:])), logits(lm, x)[:, 13:], 1e-4)

def test_a_batch_is_its_rows_alone():
    lm, x = tiny_lm('qwen3'), words(3, 10)
    kvs = [store(lm, words(1, n, n)) for n in (4, 2, 7, 5)]
    rows = [[kvs[0], kvs[1]], [], [kvs[2], kvs[3], kvs[0]]]
    got = within_(lm, line_up(rows), lambda: logits(lm, x))
    for i, r in enumerate(rows): near(got[i], within_(lm, line_up([r]), lambda: logits(lm, x[i:i+1]))[0])
    near(got[1], logits(lm, x)[1])

def test_a_budget_keeps_whole_texts_in_order():
    lm = tiny_lm('llama')
    kvs = [store(lm, words(1, n, n)) for n in (4, 9, 3)]
    assert [k.mask.shape[1] for k in within(kvs, 8)] == [4, 3]
    assert line_up([kvs, kvs[1:]], budget=9).mask.sum(1).tolist() == [7, 9]
    assert line_up([kvs], budget=2) is None

def test_beams_and_samples_take_repeated_rows():
    lm, x = tiny_lm('llama'), words(2, 16)
    kv, kw = store(lm, x[:, :9]), dict(NEW, num_beams=3)
    with pytest.raises(ValueError, match='memories of 2 rows for 6 rows'): within_(lm, kv, lambda: lm.generate(x[:, 9:], **kw))
    got = within_(lm, take(kv, [0]*3+[1]*3), lambda: lm.generate(x[:, 9:], **kw))[:, 7:]
    assert torch.equal(got, lm.generate(x, **kw)[:, 16:])

# Nothing is left behind, nobody mixes

@pytest.mark.parametrize('name', (*FAMILIES, 'gpt_oss'))
def test_no_memory_is_the_base_to_the_bit(name):
    lm, x = model(name), words(2, 12)
    kv, base, was = store(lm, x), logits(lm, x), lm.config._attn_implementation
    empty = take(kv, [0, 1], torch.zeros(0, dtype=torch.long))
    for nothing in (None, empty): assert torch.equal(within_(lm, nothing, lambda: logits(lm, x)), base)
    other = model(name)
    with joined(lm, kv): assert torch.equal(logits(other, x), base)
    assert not torch.equal(within_(lm, kv, lambda: logits(lm, x)), base)
    assert torch.equal(logits(lm, x), base)
    assert lm.config._attn_implementation == was and not _IN and not _HERE.get() and not any(m._forward_pre_hooks for m in lm.modules())

def test_two_models_that_share_a_config_do_not_mix():
    lm, x = tiny_lm('llama'), words(1, 10)
    twin = type(lm)(lm.config).eval(); twin.config = lm.config; twin.load_state_dict(lm.state_dict())
    base = logits(twin, x)
    with joined(lm, store(lm, x)):
        near(logits(twin, x), base)
        with joined(twin, store(twin, x[:, :4])): one = logits(twin, x), logits(lm, x)
    near(one[0], within_(lm, store(lm, x[:, :4]), lambda: logits(lm, x)))
    near(one[1], within_(lm, store(lm, x), lambda: logits(lm, x)))
    assert lm.config._attn_implementation == 'sdpa' and not _IN

def test_an_error_inside_leaves_nothing():
    lm, x = tiny_lm('llama'), words(1, 6)
    with pytest.raises(RuntimeError), joined(lm, store(lm, x)): raise RuntimeError
    assert lm.config._attn_implementation == 'sdpa' and not _IN and not _HERE.get()

@pytest.mark.parametrize('name', ('llama', 'gpt2', 'gemma2'))
def test_threads_do_not_mix(name):
    "Six memories and none, entered and left at different times, with passes of others in between"
    lm, x = tiny_lm(name), words(1, 12)
    kvs = [store(lm, words(1, n, n)) for n in (3, 5, 8, 13, 21)] + [None, None]
    run = lambda i: within_(lm, kvs[i], lambda: (logits(lm, x), lm.generate(x, **NEW)))
    want = [run(i) for i in range(7)]
    assert torch.equal(want[5][0], logits(lm, x))
    jobs = [i % 7 for i in range(84)]
    with ThreadPoolExecutor(6) as ex: got = list(ex.map(run, jobs))
    for i, g in zip(jobs, got): assert torch.equal(g[0], want[i][0]) and torch.equal(g[1], want[i][1])
    assert not _IN and lm.config._attn_implementation == ('eager' if name == 'gemma2' else 'sdpa')

def test_a_new_thread_inherits_only_a_copied_context():
    lm, x = tiny_lm('llama'), words(1, 10)
    base, kv, out = logits(lm, x), store(lm, x), {}
    with joined(lm, kv):
        inside, copied = logits(lm, x), contextvars.copy_context()
        jobs = [threading.Thread(target=lambda: out.update(plain=logits(lm, x))), threading.Thread(target=copied.run, args=(lambda: out.update(copied=logits(lm, x)),))]
        for t in jobs: t.start()
        for t in jobs: t.join()
    assert torch.equal(out['plain'], base) and torch.equal(out['copied'], inside)

def test_the_innermost_memory_counts():
    lm, x = tiny_lm('llama'), words(1, 10)
    a, b = store(lm, x[:, :4]), store(lm, x[:, 4:])
    with joined(lm, a):
        outer = logits(lm, x)
        with joined(lm, b): assert torch.equal(logits(lm, x), within_(lm, b, lambda: logits(lm, x)))
        assert torch.equal(logits(lm, x), outer)

def test_models_are_not_kept_alive():
    lm = tiny_lm('llama'); store(lm, words(1, 4)); gone = weakref.ref(lm.model)
    del lm; gc.collect()
    assert gone() is None

def test_dropout_of_a_model_in_training_stays_and_so_does_chance():
    lm = tiny_lm('gpt2').train()
    torch.manual_seed(3); want = torch.rand(1); torch.manual_seed(3)
    assert can_join(lm) == (True, '') and torch.equal(torch.rand(1), want) and all(m.training for m in lm.modules())

# Gates

@pytest.mark.parametrize('name', ('llama', 'gemma2', 'gpt_oss'))
def test_gates(name):
    lm, x = model(name), words(2, 16)
    kv, base = store(lm, x[:, :7]), logits(lm, x[:, 7:])
    run = lambda **kw: within_(lm, kv, lambda: logits(lm, x[:, 7:]), **kw)
    near(run(gate=1.), logits(lm, x)[:, 7:]); near(run(gate=0.), base, 1e-4)
    heads = torch.tensor([0., 1., 0., 1.])
    near(run(gate=heads), run(gate=heads.repeat(2, 1)))
    first = run(gate=torch.stack([torch.ones(4), torch.zeros(4)]))
    near(first, run(layers=[0]), 1e-4)
    assert (first-base).abs().max() > 1e-4 and (run(gate=heads)-run(gate=1-heads)).abs().max() > 1e-4

def test_a_gate_of_two_is_the_memory_twice():
    "Weights of attention count memory as often as the gate says"
    lm, x = tiny_lm('llama', layers=1), words(1, 12)
    kv = store(lm, x[:, :5])
    twice = type(kv)(kv.layers, *(tuple(t.repeat(1, 1, 2, 1) for t in ts) for ts in (kv.keys, kv.values)), kv.mask.repeat(1, 2), kv.at.repeat(1, 2), kv.turns)
    near(within_(lm, kv, lambda: logits(lm, x[:, 5:]), gate=2.), within_(lm, twice, lambda: logits(lm, x[:, 5:])))

# Refusals

@pytest.mark.parametrize('name', ('mamba', 'mamba2'))
def test_models_without_attention_are_refused(name):
    lm = tiny_lm(name)
    ok, why = can_join(lm)
    assert not ok and why
    with pytest.raises(ValueError, match="lm: memory can't be joined"): store(lm, words(1, 3))

# MemoryLM and ChronoModel

def chrono(name, **kw):
    with warnings.catch_warnings(action='ignore'): return ChronoModel.from_pretrained(tiny_lm(name, vocab=258, tie_word_embeddings=False, **kw), byte_tokenizer())

@pytest.mark.parametrize('name', FAMILIES)
def test_answers_equal_those_with_the_text_in_the_prompt(name):
    "Adapters that do something, rows of different lengths, a fresh ladder"
    m = chrono(name); g = torch.Generator().manual_seed(1)
    for n, p in m.lm.named_parameters():
        if 'lora_B' in n: p.data = torch.randn(p.shape, generator=g)*.1
    told, ask = ['The key is under the mat.', 'Blue.', ''], ['Where is it?', 'What colour is the house?', 'Who?']
    told, ask = [m.encode(t) if t else [] for t in told], [m.encode(a) for a in ask]
    lm, state = m.lm.bare, m.lm.memory.init(3)
    kvs = [store(lm, torch.tensor([t])) if t else None for t in told]
    kv = line_up([[k] if k else [] for k in kvs])
    want = m.answer(state, [t+a for t, a in zip(told, ask)], max_new_tokens=8)
    with joined(lm, kv):
        assert m.answer(state, ask, max_new_tokens=8) == want
        ids, mask = m.pad(ask); mine = m.lm.logits(ids, mask)
    for g, t, a in zip(mine, told, ask): near(g[-len(a):], m.lm.logits(*m.pad([t+a]))[0, len(t):])
    base = m.lm.logits(ids, mask)
    assert (mine[0]-base[0])[-len(ask[0]):].abs().max() > 1e-4
    near(mine[2, -len(ask[2]):], base[2, -len(ask[2]):])   # who was told nothing gets what the base says

def test_a_streamed_answer_finds_what_was_joined_when_it_was_asked():
    m = chrono('llama'); state, told, ask = m.lm.memory.init(1), m.encode('The key is under the mat.'), m.encode('Where is it?')
    kv, base = store(m.lm.bare, torch.tensor([told])), m.answer(state, [ask], max_new_tokens=8)[0]
    with joined(m.lm.bare, kv):
        want = m.answer(state, [ask], max_new_tokens=8)[0]
        assert ''.join(m.stream(state, ask, max_new_tokens=8)) == want != base
    assert ''.join(m.stream(state, ask, max_new_tokens=8)) == base

def test_adapters_are_on_when_they_are_read_and_off_in_plain():
    m = add_memory(tiny_lm('llama'), lora_r=4); x = words(1, 8)
    for n, p in m.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.3)
    on = store(m.bare, x)
    with m.plain(): off = store(m.bare, x); base = store(tiny_lm('llama'), x)
    assert (on.values[0]-off.values[0]).abs().max() > 1e-3
    for a, b in zip(off.values, base.values): near(a, b)
    kv = store(m.lm, x)   # the PeftModel, too
    assert torch.equal(kv.keys[1], on.keys[1]) and can_join(m.lm) == (True, '')

# The cache

def test_cached_texts_read_as_stored_ones_do():
    lm, x, cache = tiny_lm('llama'), words(1, 10), KVCache(dtype=torch.float16)
    kv = store(lm, words(1, 6, 5))
    got = cache.get_or('a', lambda: kv)
    near(within_(lm, line_up([[got]]), lambda: logits(lm, x)), within_(lm, kv, lambda: logits(lm, x)), 5e-3)
    assert cache.nbytes == got.nbytes < kv.nbytes

def test_a_cache_of_many_threads_keeps_its_count():
    lm = tiny_lm('llama'); kvs = [store(lm, words(1, n, n)) for n in range(1, 9)]
    cache = KVCache(4*kvs[-1].nbytes)
    def use(i):
        kv = cache.get_or(i % 8, lambda: kvs[i % 8])
        if i % 11 == 0: cache.drop(i % 8)
        return torch.equal(kv.keys[0], kvs[i % 8].keys[0])
    with ThreadPoolExecutor(8) as ex: assert all(ex.map(use, range(800)))
    assert cache.nbytes == sum(kv.nbytes for kv in cache._all.values()) <= cache.bytes and cache.hits+cache.misses == 800

def test_two_copies_of_the_module_in_one_process():
    import importlib.util
    import chronomem.backbone.joined as J
    spec = importlib.util.spec_from_file_location('chronomem.backbone.joined_copy', J.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    for module, seed in ((copy, 0), (J, 1), (copy, 2)): assert module.can_join(tiny_lm(seed=seed)) == (True, '')
