"""Latent memory that survives from inference to inference and from process to process, for any Hugging Face causal LM."""
__version__ = "0.0.1"

_ROOMS = dict(core='Config', senses_m4='M4Token M4InputEncoder', senses_audio='Reflex', ladder_ladder='CadenceLadder LadderConfig LadderState',
              thought_machine='ThoughtConfig', thought_thinker='Thinker', then_log='TraceLog', then_recall='Resonance', backbone_backbone='MemoryConfig MemoryLM', backbone_families='add_memory load_lm',
              learn_train='Trainer TrainConfig', live_learning='ChronoModel Session',
              thought_subconscious='Subconscious', live_executive='Executive')
_HOME = {n: m.replace('_', '.') for m, names in _ROOMS.items() for n in names.split()}
__all__ = [*_HOME]

def __getattr__(name):
    "Load a public name's room when it is first used"
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_HOME[name]}'), name)

def __dir__(): return [*globals(), *_HOME]
