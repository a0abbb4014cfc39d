"""Every causal LM that transformers knows, made tiny and examined: `python tests/causal_types.py [type ...]` prints a line for each; without names it writes nbs/results/causal_types.json."""
import inspect, json, sys, warnings
from pathlib import Path
import torch, torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import add_memory
from chronomem.ladder.ladder import LadderConfig

TABLE = Path(__file__).resolve().parents[1]/'nbs'/'results'/'causal_types.json'
SMALL = MemoryConfig(ladder=LadderConfig.of(3, dims=(16, 16, 16), slots=(2, 1, 1), hidden=16))
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

SIZES = {
    **dict.fromkeys('hidden_size d_model n_embd dim embedding_size word_embed_proj_dim'.split(), 32),
    **dict.fromkeys('num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers'.split(), 2),
    **dict.fromkeys('encoder_layers num_encoder_layers'.split(), 1),
    **dict.fromkeys('num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads mamba_n_heads'.split(), 4),
    **dict.fromkeys('intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff dff d_inner vocab_size vocab_size_per_layer_input'.split(), 64),
    **dict.fromkeys('num_experts num_local_experts n_routed_experts moe_num_experts'.split(), 4),
    **dict.fromkeys('head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim global_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim'.split(), 8),
    **dict.fromkeys('sliding_window attention_chunk_size mamba_d_state state_size hidden_size_per_layer_input'.split(), 8),
    **dict.fromkeys('kv_lora_rank q_lora_rank qk_head_dim mamba_d_head mamba_chunk_size chunk_size index_topk'.split(), 16),
    **dict.fromkeys('max_position_embeddings n_positions'.split(), 128),
    **dict.fromkeys('moe_intermediate_size shared_expert_intermediate_size'.split(), 32),
    **dict(num_key_value_heads=2, num_experts_per_tok=2, mamba_n_groups=1, n_group=1, topk_group=1, num_expert_group=1, num_experts_per_token=2, linear_num_heads=4, linear_num_key_heads=2, linear_num_value_heads=4, index_n_heads=2, mamba_expand=2, time_step_rank=4, pad_token_id=0, bos_token_id=None, eos_token_id=None, unk_token_id=1)}
VARIANTS = ({}, dict(num_key_value_heads=4, head_dim=16), dict(num_key_value_heads=4), dict(num_hidden_layers=4), dict(num_hidden_layers=4, num_key_value_heads=4), dict(num_hidden_layers=8), dict(head_dim=16), dict(bos_token_id=1, eos_token_id=2))
SPECIAL = dict(
    codegen=dict(rotary_dim=4), gptj=dict(rotary_dim=4), cwm=dict(bos_token_id=1, eos_token_id=2), emu3=dict(bos_token_id=1, eos_token_id=2), mllama=dict(bos_token_id=1), reformer=dict(is_decoder=True, axial_pos_embds=False, attn_layers=['local', 'local'], local_attn_chunk_length=8, attention_head_size=8, feed_forward_size=64),
    falcon_h1=dict(mamba_d_ssm=64), gpt_neo=dict(attention_types=[[['global', 'local'], 1]], window_size=8), zaya=dict(num_experts_per_tok=1), blt=dict(encoder_hash_byte_group_vocab=50, encoder_hash_byte_group_nb_functions=1),
    mamba2=dict(num_heads=4, head_dim=16, n_groups=1), xmod=dict(default_language='en_XX'),
    zamba=dict(layer_types=None, attn_layer_period=2, attn_layer_offset=1), xlstm=dict(qk_dim_factor=1., v_dim_factor=1.), **{k: dict(is_decoder=True) for k in 'bert big_bird camembert electra ernie rembert roberta roc_bert roformer xlm-roberta xlm-roberta-xl data2vec-text megatron-bert roberta-prelayernorm'.split()})
SPECIAL |= {k: dict(layer_types=['linear_attention', 'full_attention']) for k in ('bailing_hybrid', 'kimi_linear', 'granitemoehybrid')}
SPECIAL |= {k: dict(is_decoder=True) for k in ('bert-generation', 'xmod')} | dict(xlm=dict(causal=True, emb_dim=32, n_words=64))
SPECIAL['xmod'] |= dict(default_language='en_XX')
SPECIAL |= dict(
    bamba=dict(attn_layer_indices=[1]), cohere_compass_text=dict(layer_types=['full_attention', 'sliding_attention']), dots1=dict(n_shared_experts=1, num_key_value_heads=4),
    dbrx=dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8), ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2)),
    dots3_note_text=dict(layer_types=['indexed_attention', 'sliding_attention'], per_layer_config={}, num_key_value_heads=4, shared_experts_intermediate_size=32),
    gemma3n_text=dict(num_hidden_layers=2, layer_types=['sliding_attention', 'full_attention'], num_kv_shared_layers=0, intermediate_size=64, activation_sparsity_pattern=None, laurel_rank=8),
    gemma4_text=dict(layer_types=['sliding_attention', 'full_attention'], per_layer_config={}), lfm2_moe=dict(layer_types=['conv', 'full_attention'], num_dense_layers=1),
    qwen4_exp_text=dict(layer_types=['linear_attention', 'indexed_attention'], linear_num_key_heads=2, linear_num_value_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, ngram_vocab_size_base=100, ple_embed_dim=32, hc_lowrank=8), xlstm=dict(embedding_dim=32, num_blocks=2),
    zamba=dict(layers_block_type=['linear_attention', 'hybrid'], attention_head_dim=16, attention_hidden_size=64, mamba_dt_rank=4, num_key_value_heads=4),
    zamba2=dict(num_hidden_layers=4, layers_block_type=['linear_attention', 'hybrid']*2, n_mamba_heads=4, mamba_headdim=16, attention_head_dim=16, attention_hidden_size=64, adapter_rank=4, num_key_value_heads=4, num_query_groups=4, kv_channels=8),
    phi4_multimodal=dict(original_max_position_embeddings=128))
SPECIAL['gemma4_unified_text'] = SPECIAL['gemma4_text']
SPECIAL['roc_bert'] |= dict(pronunciation_vocab_size=64, shape_vocab_size=64, pronunciation_embed_dim=32, shape_embed_dim=32)
SPECIAL['modernbert-decoder'] = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)

def _sizes(c, more):
    have = {*c.to_dict(), *c.attribute_map, *inspect.signature(type(c).__init__).parameters}
    listed = {k for k, v in c.to_dict().items() if isinstance(v, list)}
    return {k: v for k, v in (SIZES | more).items() if k in have - listed} | {k: v for k, v in more.items() if k in have}

def config(name, more):
    "The settings of a type, made small"
    cls = CONFIG_MAPPING[name]
    c = cls()
    kw = _sizes(c, more)
    for sub in cls.sub_configs:
        if (s := getattr(c, sub, None)) is not None: kw[sub] = _sizes(s, more) | SPECIAL.get(s.model_type, {}) | dict(model_type=s.model_type)
    return cls(**kw | SPECIAL.get(name, {}))

def build(name, dtype=torch.float32):
    "A tiny random model of a type that runs; a RuntimeError says why there is none"
    why = []
    for more in VARIANTS:
        more = more | SPECIAL.get(name, {})
        try:
            with torch.device('meta'): n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config(name, more)).parameters())
            if n > 8_000_000: raise RuntimeError(f'{n:,} weights')
            with torch.random.fork_rng([]), torch.no_grad():
                torch.manual_seed(0)
                lm = AutoModelForCausalLM.from_config(config(name, more)).eval()
                for p in lm.parameters():
                    if not p.isfinite().all() or p.abs().max() > 1e4: p.normal_(std=.02)
                lm(input_ids=batch(lm)[0])
            g = lm.generation_config
            g.eos_token_id = g.bos_token_id = g.forced_eos_token_id = None; g.pad_token_id = 0
            return lm.to(dtype)
        except Exception as e: why.append(f'{type(e).__name__}: {str(e).strip().splitlines()[0][:120] if str(e) else ""}')
    raise RuntimeError(why[0])

def batch(lm, rows=3, L=19):
    "Prompts of ordinary tokens and a mask with dead tokens in front"
    V = min(64, lm.get_input_embeddings().weight.shape[0])
    ids = torch.randint(5, min(60, V), (rows, L), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids); mask[0, :7] = mask[1, :2] = 0
    return ids, mask

def gap(a, b): return ((a-b).abs().max()/b.abs().max().clamp(min=1)).item()

def greedy(m, ids, mask, soft, n):
    for _ in range(n):
        best = m.logits(ids, mask, *soft)[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    return ids[:, -n:]

def ask(ok, what, got=''):
    if not ok: raise AssertionError(f'{what} {got}')

@torch.no_grad()
def _same_as_itself(lm, m, soft):
    ids, mask = batch(lm); ones = torch.ones_like(mask)
    own = lm(input_ids=ids).logits.float()
    for extra in ((), (soft[0], soft[1] & False)): ask(gap(m.logits(ids, ones, *extra), own) < 1e-5, 'empty memory', gap(m.logits(ids, ones, *extra), own))
    loss = m.answer_loss(ids, ones, ids)[0]
    ask(gap(loss, F.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten())) < 1e-5, 'loss')
    full = m.logits(ids, mask, *soft)
    ask(gap(full, own) > 1e-5, 'a memory changes nothing')
    for r in range(3):
        i, k = ids[r:r+1, mask[r].bool()], ones[r:r+1, mask[r].bool()]
        ask(gap(m.logits(ids, mask)[r, mask[r].bool()], lm(input_ids=i).logits[0].float()) < 1e-5, 'padding')
        ask(gap(m.logits(i, k, *(s[r:r+1] for s in soft))[0], full[r, mask[r].bool()]) < 1e-5, 'rows mix')
        ask(gap(m.encode(i, k), m.encode(ids, mask)[r:r+1]) < 1e-4, 'a write depends on padding')

@torch.no_grad()
def _generates(lm, m, soft):
    ids, mask = batch(lm); kw = dict(max_new_tokens=4, do_sample=False)
    own = lm.generate(input_ids=ids, attention_mask=torch.ones_like(mask), **kw)[:, ids.shape[1]:]
    if m._first: own = greedy(m, ids, torch.ones_like(mask), (), 4)   # transformers' own generation counts positions from 0, where its forward pass doesn't
    ask(torch.equal(m.generate(ids, torch.ones_like(mask), **kw), own), 'generation with an empty memory')
    if not torch.equal(own, greedy(m, ids, torch.ones_like(mask), (), 4)): return 'its own generation differs from its forward pass'
    ask(torch.equal(m.generate(ids, mask, *soft, **kw), greedy(m, ids, mask, soft, 4)), 'generation with a memory')
    return ''

def _learns(lm, m, soft):
    ids, mask = batch(lm); y = ids.masked_fill(mask == 0, -100)
    s = soft[0].clone().requires_grad_()
    m.answer_loss(ids, mask, y, s, soft[1])[0].backward()
    ask(s.grad.abs().sum() > 0, 'no gradient at soft tokens')
    m.encode(ids, mask).pow(3).sum().backward()
    ask(m.mem.grad.abs().sum() > 0, 'no gradient at mem tokens')

def _adapts(lm):
    ids, mask = batch(lm); y = ids.clone(); y[:, :-3] = -100
    with torch.no_grad(): own = lm(input_ids=ids).logits.float()
    m = add_memory(lm, SMALL, lora_r=2).eval()
    for n, p in m.lm.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ask(gap(m.logits(ids, torch.ones_like(mask)), own) > 1e-5, 'adapters change nothing')
        with m.plain(): ask(gap(m.logits(ids, torch.ones_like(mask)), own) < 1e-5, 'adapters off')
    m.answer_loss(ids, mask, y)[0].backward()
    ask(any(p.grad is not None and p.grad.any() for n, p in m.lm.named_parameters() if 'lora_' in n), 'no gradient at adapters')

def examine(name):
    "('exact' | 'refuses' | 'not built', why)"
    try: lm = build(name)
    except RuntimeError as e: return 'not built', str(e)
    try: torch.manual_seed(0); m = add_memory(lm, SMALL).eval()
    except ValueError as e: return 'refuses', str(e)
    ids, mask = batch(lm); state = m.memory.init(3)
    with torch.no_grad():
        for _ in range(2): state, _ = m.step(state, ids, mask, gate='always')
    soft = [r.detach() for r in m.memory.read(state)]
    _same_as_itself(lm, m, soft); _learns(lm, m, soft)
    try: why = _generates(lm, m, soft)
    except ValueError as e: why = f'generate refuses: {e}'
    _adapts(lm)
    return 'exact', '; '.join(filter(None, ['' if m.pads else 'rows run one at a time', '' if m._pads_new or why or not m.pads else 'generates row by row', 'generate counts positions as forward does' if m._first and not why else '', why]))

def main(names):
    warnings.simplefilter('ignore')
    from transformers.utils import logging; logging.set_verbosity_error()
    table = {}
    for n in names or NAMES:
        try: table[n] = examine(n)
        except Exception as e: table[n] = 'WRONG', f'{type(e).__name__}: {str(e)[:300]}'
        print(n, *table[n], sep=' | ', flush=True)
    if not names: TABLE.write_text(json.dumps(table, indent=0) + '\n')

if __name__ == '__main__': main(sys.argv[1:])
