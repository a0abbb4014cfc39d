"Would a test notice? Lines of the core, each with a mistake put in, and the test that must fail: `python tests/mutations.py [words]` prints caught or missed, and the score"
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import contextlib, importlib, multiprocessing, shutil, sys, tempfile, time
from collections import defaultdict, namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = 'torch', 'transformers', 'peft', 'tensordict', 'safetensors.torch', 'fastcore.all', 'plotly.graph_objects', 'hypothesis', 'pytest', 'soundfile'
Row = namedtuple('Row', 'file old new test only')                      # file under chronomem/, exact text, what replaces it, test file, pytest's -k

def _rows(file, test, *rows): return [Row(file, old, new, test, only) for old, new, only in rows]

ROWS = [
    *_rows('ladder/rungs.py', 'test_ladder.py',
        ("s['born'].max(1).values).clamp(max=2**20)", "s['born'].min(1).values).clamp(max=2**20)", 'idle_counts'),
        ("(s['born'] < t0[:, None])", "(s['born'] <= t0[:, None])", 'replay_touches'),
        ('due = (t-self.phase) % self.tau == 0', 'due = (t-self.phase+1) % self.tau == 0', 'calendar'),
        ('(g*(new-old)).sum(-1)', '(g*(old-new)).sum(-1)', 'straight_through'),
        ('rank = born.argsort(dim=1, descending=True', 'rank = born.argsort(dim=1, descending=False', 'newest_first'),
        ('m*held + (1-m)*fresh', '(1-m)*held + m*fresh', 'keeps_a_little'),
        ("return s['born'].argmin(1)", "return s['born'].argmax(1)", 'replace_the_oldest'),
        ('age = (t[:, None]-born)*held', 'age = (t[:, None]-born+1)*held', 'age_as_it_is_read'),
        ('return logit > 0', 'return logit < 0', 'even_odds'),
        ('p*rate', 'p', 'learned')),
    *_rows('ladder/ladder.py', 'test_ladder.py',
        ('live & (i < self.unlocked)', 'live & (i <= self.unlocked)', 'locked_rung'),
        ('return t+live, out', 'return t+1, out', 'skip_leaves')),
    *_rows('ladder/recurrent.py', 'test_ladder.py',
        ("self.norm(new), old['z'])", "self.norm(new), old['z']*0+1)", 'dead_rest')),
    *_rows('ladder/writing.py', 'test_rules.py',
        ('values >= max(1, c.cooldown*rung.tau)', 'values > max(1, c.cooldown*rung.tau)', 'rested_exactly'),
        ("now.left = now.left - early.long()", "now.left = now.left", 'so_many_rungs'),
        ('age > older*r.tau', 'age > older', 'so_many_cadences'),
        ('torch.sign(score-usual)', 'torch.sign(usual-score)', 'usual_follows'),
        ("high = (u > c.margin*s['usual'])", "high = (u > s['usual'])", 'margin'),
        ('masked_fill(born < 0, -1.).max(1)', 'masked_fill(born < 0, -1.).min(1)', 'novelty_is'),
        ('masked_fill(born < 0, -1.).argmin(1)', 'masked_fill(born < 0, 9.).argmin(1)', 'gives_way'),
        ('(p.exp()*(p-q))', '(q.exp()*(p-q))', 'kl_and_entropy'),
        ('return -(gain*logp', 'return (gain*logp', 'policy_gradient')),
    *_rows('ladder/reading.py', 'test_rules.py',
        ('ladder.reading.count(r, s, t, ladder.norm(h))', 'ladder.reading.count(r, s, t, h)', 'size_nor_shift'),
        ('x = x - F.softplus', 'x = x + F.softplus', 'age_fades')),
    *_rows('ladder/shaping.py', 'test_rules.py',
        ('F.relu(margin - (without', 'F.relu(margin + (without', 'wishes'),
        ('(share*D - 1e-4).ceil()', '(share*D - 1e-4).floor()', 'wishes'),
        ('t0[:, None] + live.cumsum(1) - 1, -2)', 't0[:, None] + live.cumsum(1), -2)', 'found_by_the_clock')),
    *_rows('ladder/vision_ladder.py', 'test_rules.py', ('return -F.softplus(self.slope)', 'return F.softplus(self.slope)', 'near_in_time')),
    *_rows('backbone/memorylm.py', 'test_scale.py', ("rms *= float(getattr(E, 'embed_scale', 1.))", 'rms *= 1.', 'gemma3')),
    *_rows('thought/nlm.py', 'test_thought.py',
        ('if self.p and self.training:', 'if self.p and not self.training:', 'dropout'),
        ('torch.cat([history[..., 1:], x[..., None]], -1)', 'torch.cat([x[..., None], history[..., :-1]], -1)', 'drops_its_oldest')),
    *_rows('thought/thinker.py', 'test_thought.py',
        ('self.config.dropout*self.training', 'self.config.dropout', 'training_only'),
        ('-keep, None)', '-keep-1, None)', 'newest_that_was_seen'),
        ('used + ~done', 'used + 1', 'early_exit')),
    *_rows('thought/sync.py', 'test_thought.py',
        ('s = self.read(*sums)*self.gain(idle)', 's = self.read(*sums)*self.gain(idle-1)', 'drift'),
        ('torch.cos(2*math.pi*idle/self.period)', 'torch.sin(2*math.pi*idle/self.period)', 'swings'),
        ('beta*r', 'beta', 'weighted_sum')),
    *_rows('thought/running_stats.py', 'test_thought.py', ('k = weight*keep + (1-weight)*keep_silent', 'k = weight*keep_silent + (1-weight)*keep', 'usual_by_hand')),
    *_rows('thought/heads.py', 'test_thought.py', ('y.abs().sigmoid().amin(-1)', 'y.abs().sigmoid().amax(-1)', 'certainty_of_heads')),
    *_rows('thought/convergence.py', 'test_convergence.py',
        ('_weighted(sure.masked_fill(stated == 0, 0.), stated)', '_weighted(sure.masked_fill(stated == 0, 0.), labelled)', 'pooled'),
        ('w*sure.isfinite()', 'w*torch.ones_like(sure)', 'pooled'),
        ('sure.detach().masked_fill(~M, -math.inf)', 'sure.detach()', 'surest_tick'),
        ('losses + cost*waited', 'losses - cost*waited', 'stopping_early'),
        ('(late > 0, self.config.after, 0.)', '(late > 0, 0., self.config.after)', 'expected')),
    *_rows('then/recall.py', 'test_recall.py',
        ('torch.exp2(age/-c.half_life)', 'torch.exp2(age/c.half_life)', 'hand'),
        ('rank < N)', 'rank <= N)', 'overwrites'),
        ('(age >= c.gap)', '(age > c.gap)', 'gap')),
    *_rows('learn/train.py', 'test_tasks.py',
        ('memory.unlocked, was = self.stage+1', 'memory.unlocked, was = self.stage', 'one_rung_more'),
        ('self.n >= self.settled+self.config.settle', 'self.n > self.settled+self.config.settle', 'mastered'),
        ("g['base']*up*down", "g['base']*up", 'rates'),
        ("part = out['loss']*len(w.ask)/len(episode.ask)", "part = out['loss']", 'windows'),
        ('(loss*log.due).sum()', 'loss.sum()', 'hindsight')),
    *_rows('learn/tasks.py', 'test_tasks.py',
        ('steps, -1).max(1)', 'steps, 99).min(1)', 'newest_value'),
        ("n, 'amax')", "n, 'sum')", 'without_memory_by_hand')),
    *_rows('backbone/episodes.py', 'test_tasks.py', (' or episode.order.shape[1] == 1', '', 'last_window')),
    *_rows('thought/subconscious.py', 'test_listener.py',
        ('self.core.sync.gain(idle)', 'self.core.sync.gain(idle-1)', 'meaning_of_drift'),
        ('past[-k] for k', 'past[-k-1] for k', 'meaning_of_the_context'),
        ('(1-c.echo)*context + c.echo*echo', 'c.echo*context + (1-c.echo)*echo', 'meaning_of_the_echo')),
    *_rows('live/executive.py', 'test_listener.py',
        ('torch.where(s.on, c.release, c.hold)', 'torch.where(s.on, c.hold, c.release)', 'meaning_of_beginning'),
        ('s.last >= rest)', 's.last > rest)', 'meaning_of_resting'),
        ('(s.pending == 1) & ~on', '(s.pending == 1) & on', 'meaning_of_anomalies'),
        ('(s.steps >= c.settle)\n', '(s.steps > c.settle)\n', 'meaning_of_a_shift')),
    *_rows('live/boot.py', 'test_listener.py',
        ('awake*c.frame/max(need(h), 1e-9)', 'awake/max(need(h), 1e-9)', 'meaning_of_waking'),
        ('((first-lo) % N < n)', '((first-lo) % N <= n)', 'meaning_of_touched')),
    *_rows('core.py', 'test_core.py',
        ('if isinstance(v, bool) != (hint is bool): raise', 'if False: raise', 'true_is_no_number'),
        ('if _digest(raw, i) != raw[i:i+64]: raise', 'if False: raise', 'flip_in_every_byte')),
    *_rows('then/segments.py', 'test_log.py',
        ("& (rec['tag'] == tag).all(-1)", '', 'swapped_and_foreign'),
        ('data, offset = data[n:], offset+n', 'data, offset = data[n:], offset', 'short_writes')),
    *_rows('then/log.py', 'test_log.py',
        ('finally: os.close(fd)\n    self.disk.fsync(self.dir)\n', 'finally: os.close(fd)\n', 'safe_before'),
        ('            self._undo(had)\n', '', 'taken_back'),
        ('last.first < self.n <= before', 'last.first < self.n < before', 'fails_anywhere'),
        ("if got['digest'] != ", "if False and got['digest'] != ", 'floor_of_nobody')),
    *_rows('live/session.py', 'test_session.py', ('if r.time[0] != self.t: raise', 'if False: raise', 'trace_missing')),
    *_rows('live/ingest.py', 'test_safety.py',
        ('if self._new >= self.save_every and', 'if self._new > self.save_every and', 'save_every_counts'),
        ('left=(n-1-pieces)', 'left=(0*pieces)', 'not_written_whole')),
    *_rows('live/session.py', 'test_safety.py',
        ('if epoch not in (None, self._epoch): raise', 'if False: raise', 'notices_a_wipe'),
        ("if meta.get('owner') != self.owner: raise", 'if False: raise', 'another_persons')),
    *_rows('then/home.py', 'test_safety.py', ('if (_hash(m.user), _hash(m.model)[:16]) != ', 'if False and (_hash(m.user), _hash(m.model)[:16]) != ', 'swapped_directories'))]

def mutated(row):
    "The file with the mistake in it; None: stale, as the text isn't there exactly once"
    text = (ROOT/'chronomem'/row.file).read_text()
    return text.replace(row.old, row.new) if text.count(row.old) == 1 else None

def _copy(place, row):
    "Tests, and the package as links, but for the one file"
    shutil.copytree(ROOT/'tests', place/'tests', ignore=shutil.ignore_patterns('__pycache__', '.hypothesis'))
    here, there = place/'chronomem', ROOT/'chronomem'
    for part in (*Path(row.file).parts, None) if row else (None,):
        here.mkdir()
        for f in there.iterdir():
            if f.name != part: (here/f.name).symlink_to(f)
        if part is None or (there/part).is_file(): break
        here, there = here/part, there/part
    if row: (place/'chronomem'/row.file).write_text(mutated(row))

def _pytest(place, test, only):
    "Exit code of the named tests: 0 all pass, 1 some fail, else something else is wrong"
    import pytest
    os.chdir(place); os.environ['PYTHONPATH'] = str(place); sys.path[0], sys.dont_write_bytecode = str(place), True
    with open(os.devnull, 'w') as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        return int(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', f'tests/{test}', '-k', only]))

def judge(row):
    "'caught', 'missed', 'stale', or 'broken': no test ran"
    if mutated(row) is None: return 'stale'
    with tempfile.TemporaryDirectory() as tmp:
        _copy(Path(tmp), row)
        return {0: 'missed', 1: 'caught'}.get(_pytest(Path(tmp), row.test, row.only), 'broken')

def sound(rows):
    "Do the named tests of one file pass without any mistake?"
    with tempfile.TemporaryDirectory() as tmp:
        _copy(Path(tmp), None)
        return _pytest(Path(tmp), rows[0].test, ' or '.join(sorted({r.only for r in rows}))) == 0

def run(rows=ROWS, workers=2, say=print):
    "Row -> verdict; each in a process and a directory of its own, libraries being loaded once"
    for name in LIBRARIES: importlib.import_module(name)
    t0, by_file, out = time.monotonic(), defaultdict(list), {}
    for r in rows: by_file[r.test].append(r)
    with multiprocessing.get_context('fork').Pool(workers, maxtasksperchild=1) as pool:
        fine = dict(zip(by_file, pool.map(sound, by_file.values(), 1)))
        for row, got in zip(rows, pool.imap(judge, rows, 1)):
            out[row] = got if fine[row.test] or got == 'stale' else 'broken'
            say(f'{out[row]:7} {row.file}: {row.old.strip()!r} -> {row.new.strip()!r}', flush=True)
    say(f'{score(out):.3f}: {sum(v == "caught" for v in out.values())} of {len(out)} caught, {time.monotonic()-t0:.0f} s')
    return out

def score(out): return sum(v == 'caught' for v in out.values())/len(out)

if __name__ == '__main__':
    words = sys.argv[1:]
    out = run([r for r in ROWS if all(w in ' '.join(r) for w in words)])
    sys.exit(score(out) < .9 or bool({'stale', 'broken'} & {*out.values()}))
